"""README.rst and the manual: their first lines run as printed, their facts and links hold."""
import configparser
import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
import zlib

import pytest

import smtpd
from tests.pages import (
    END_OF_MESSAGE,
    HANDLERS_DATA,
    README,
    Program,
    block,
    post_message,
    read,
    said_by,
    save_block,
)
from tests.support import HERE, copy_of_the_source, find_tool, need_module


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r'`[^`<]+<([^`>]+)>`_', read(README))
    assert links
    for target in links:
        assert target.startswith('https:') or os.path.isfile(os.path.join(HERE, target))


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 12), reason='Sphinx needs a newer Python')
def test_the_manual_builds_and_its_reference_names_all_that_is_public(tmp_path):
    need_module('sphinx')
    need_module('furo')
    subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '-n', '-b', 'html',
                    os.path.join(HERE, 'docs'), str(tmp_path / 'html')],
                   check=True, timeout=300)
    inventory = (tmp_path / 'html' / 'objects.inv').read_bytes().split(b'\n', 4)[4]
    objects = zlib.decompress(inventory).decode()
    told = re.findall(r'^smtpd\.(?:\w+\.)?(\w+) py:', objects, re.MULTILINE)
    names = {name for name, value in vars(smtpd).items() if not inspect.ismodule(value)}
    for cls in map(vars(smtpd).get, smtpd.__all__):
        names |= set(dir(cls)) - {*dir(smtpd.asynchat.async_chat), 'ac_in_buffer', 'terminator'}
    public = {name for name in names if not name.startswith('_')} | {'__version__', 'EMPTYSTRING'}
    assert public - set(told) == set()


LIMITS = [  # in the first of a docstring's two columns
    (cls, name) for cls in (smtpd.SMTPChannel, smtpd.SMTPServer, smtpd.PureProxy)
    for name in re.findall(r'^ *(\w+_(?:limit|seconds|backlog|per_event|threads)) {2,}\S',
                           cls.__doc__, re.MULTILINE)]


@pytest.mark.parametrize('cls, name', LIMITS, ids=[name for cls, name in LIMITS])
def test_the_limits_in_the_manual_are_those_of_the_module(cls, name):
    found = re.search(r'^``%s``(?: \[\d\]_)? +(\S+) ' % name,
                      read(os.path.join(HERE, 'docs', 'limits.rst')), re.MULTILINE)
    assert found[1] == str(getattr(cls, name))


def test_the_newest_heading_of_the_changes_is_the_version():
    setup = configparser.ConfigParser()
    setup.read(os.path.join(HERE, 'setup.cfg'), encoding='utf-8')
    newest = re.search(r'^(\d[\w.]*) \(.*\)\n-+$', read(os.path.join(HERE, 'CHANGES.rst')),
                       re.MULTILINE)
    assert newest[1] == setup['metadata']['version']


def test_the_server_in_the_readme_prints_a_message_and_ends_at_ctrl_c(start, tmp_path):
    program = start(['python', '-u', save_block(tmp_path, 'own-server')])
    post_message(program.address)
    assert program.line() == "j@example.com ['you@example.com'] %r" % HANDLERS_DATA
    assert program.interrupt() == (0, '', '')


def test_the_example_in_the_module_s_docstring_runs(start, tmp_path):
    example, = re.findall(r'::\n\n((?:    .*\n|\n)+)', smtpd.__doc__)
    (tmp_path / 'server.py').write_text(textwrap.dedent(example).replace('8025', '0'))
    program = start('python -u server.py')
    post_message(program.address)
    assert program.line() == (
        "j@example.com -> ['you@example.com'] %d octets" % len(HANDLERS_DATA))


def test_a_session_calls_what_the_manual_says(start, run_python, tmp_path):
    save_block(tmp_path, 'calls')
    program = start(block('calls-command'))
    run_python(save_block(tmp_path, 'tutorial-send', port_1025=program.port))
    # smtplib writes "from:" from Python 3.12 on, and "FROM:" before.
    assert '\n'.join(program.lines_to('close')).lower() == block('calls-printed').lower().strip()


def test_wrong_arguments_get_the_lines_that_the_manual_shows(run_python):
    lines = block('wrong-arguments').splitlines()
    for command, complaint in zip(lines[::2], lines[1::2]):
        prompt, python, *arguments = shlex.split(command)
        assert (prompt, python) == ('$', 'python')
        assert run_python('-W', 'ignore', *arguments).stdout == complaint + '\n'


@pytest.fixture
def shell(tmp_path, user_environment):
    """shell(commands, directory): what a newcomer pastes, and what it prints.

    The source is in tmp_path / 'pysmtpd'; the pip of this machine knows where dependencies are.
    """
    need_module('ensurepip')
    copy_of_the_source(tmp_path / 'pysmtpd')

    def run(commands, directory='pysmtpd'):
        (tmp_path / directory).mkdir(exist_ok=True)
        outcome = subprocess.run(
            ['sh', '-ec', commands], cwd=tmp_path / directory, env=run.environment, timeout=600,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding='utf-8')
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        return outcome.stdout

    site = user_environment['PYTHONPATH'].split(os.pathsep)[0]
    run.environment = {name: value for name, value in user_environment.items()
                       if not name.startswith('PYSMTPD')}
    run.environment.update(
        PYTHONPATH=site, PIP_QUIET='1', PIP_DISABLE_PIP_VERSION_CHECK='1',
        PYTEST_ADDOPTS='-k TestModule')
    return run


ENTER = 'python3 -m venv env\n. env/bin/activate\n'
# Breakpoint: 3.12. Below it the standard library's own wins.
OURS = os.path.join('site-packages', 'smtpd.py') if sys.version_info >= (3, 12) else (
    os.path.join('python%d.%d' % sys.version_info[:2], 'smtpd.py'))


@pytest.mark.slow
class TestInstall:
    def test_the_first_line_of_the_readme_starts_a_server(self, shell, tmp_path):
        with Program(['sh', '-c', block('try-it')], tmp_path / 'pysmtpd',
                     shell.environment) as program:
            assert shell(block('send-one', port_1025=program.port)) == ''
            assert said_by(program, END_OF_MESSAGE) == block('printed')
            assert program.interrupt()[1:] == ('', '')

    def test_the_second_line_of_the_readme_tests_it(self, shell):
        assert re.search(r' [1-9]\d* passed', shell(block('test-it')))

    def test_the_tutorial_installs_it(self, shell):
        assert shell(block('tutorial-install') + block('which-one'), 'new').strip().endswith(OURS)

    def test_a_program_s_environment_gets_it(self, shell):
        assert shell(ENTER + block('install') + 'cd env\n' + block('which-one')
                     ).strip().endswith(OURS)

    def test_a_requirements_file_gets_it_from_a_repository(self, shell, tmp_path):
        find_tool('git', 'git')
        shell('git init -q; git add .;'
              'git -c user.name=x -c user.email=x@example.com commit -qm x')
        place = 'https://ADDRESS-OF-THE-REPOSITORY'
        assert place in block('requirements')
        (tmp_path / 'requirements.txt').write_text(
            block('requirements').replace(place, 'file://%s/pysmtpd' % tmp_path))
        assert shell(ENTER + 'pip install -r ../requirements.txt\n' + block('which-one'), 'new'
                     ).strip().endswith(OURS)

    @pytest.mark.skipif(sys.version_info < (3, 12), reason='there is no standard-smtpd')
    def test_one_line_moves_from_standard_smtpd(self, shell):
        # Both: who moves may have seen already that the old one hides the new one.
        which = '(cd env && %s)\n' % block('which-one').strip()
        old, new = shell(ENTER + 'pip install . standard-smtpd\n' + which + block('move') + which
                         ).splitlines()
        assert old.endswith(os.path.join('smtpd', '__init__.py'))
        assert new.endswith(OURS)

    def test_the_folder_for_systemd_has_all_that_it_needs(self, shell, tmp_path):
        save_block(tmp_path / 'pysmtpd', 'recipe-maildir')
        shell(block('recipe-systemd-install').replace('/opt/smtpd', str(tmp_path / 'opt')))
        shell('cd ../opt; bin/python -c "import keep; print(keep.MaildirServer)"', 'opt')


@pytest.mark.slow
def test_the_benchmark_is_where_the_manual_says():
    command = shlex.split(block('benchmark'))
    subprocess.run([sys.executable, *command[1:], '--help'], cwd=HERE, check=True, timeout=60,
                   stdout=subprocess.DEVNULL)
