"""README.rst and the manual in docs/: each code block is run from the page itself."""
import configparser
import contextlib
import inspect
import io
import json
import mailbox
import os
import re
import runpy
import shlex
import shutil
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import zlib

import pytest

import smtpd
from tests.support import (
    HERE,
    RawClient,
    copy_of_the_source,
    find_tool,
    held_port,
    need_module,
    serving,
)

README = os.path.join(HERE, 'README.rst')
DOCUMENTS = [README, *sorted(
    os.path.join(directory, name) for directory, _, names in os.walk(os.path.join(HERE, 'docs'))
    for name in names if name.endswith('.rst'))]
STUBS = os.path.join(os.path.dirname(os.path.abspath(smtpd.__file__)), 'smtpd-stubs')


def read(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


def page(name):
    return read(os.path.join(HERE, 'docs', name))


def read_blocks():
    """{name: (language, text)} of the documents' code blocks."""
    blocks = {}
    for document in DOCUMENTS:
        for found in re.finditer(r'^\.\. code-block:: (\w+)\n   :name: ([\w-]+)\n\n'
                                 r'((?:   .*\n|\n)+)', read(document), re.MULTILINE):
            language, name, text = found.groups()
            assert name not in blocks
            blocks[name] = language, re.sub('^   ', '', text, flags=re.MULTILINE).strip() + '\n'
    return blocks


BLOCKS = read_blocks()
EXECUTED = {'mypy-ini'}  # by test_types.py; each test below adds what it executes


def executes(*names):
    """Says which blocks the decorated test executes, or compares with what really comes out."""
    EXECUTED.update(names)
    return lambda test: test


def block(name, **ports):
    """A block's text, with the ports of a test.

    This is the only change that the tests make to the page. A server of ours
    listens on port 0, unless the test says more: block(name, port_1025=34567).
    """
    return re.sub(r'\b(25|1025|2501|2502)\b',
                  lambda port: str(ports.get('port_' + port[0], 0)), BLOCKS[name][1])


def commands(name):
    """The commands of a block that runs one after the other."""
    return re.split(r'[\s\\]+&& ', block(name).strip())


def save_block(directory, name, **ports):
    """Save a block under the name in its first line; returns that name."""
    text = block(name, **ports)
    file_name = re.match(r'# (\S+)\n', text)[1]
    (directory / file_name).write_text(text, encoding='utf-8')
    return file_name


# In each Python that a test starts: socket.getfqdn() is quick, and who starts to serve tells
# its port on stderr, so that no test waits for it by the clock.
SITECUSTOMIZE = '''
import os
import socket
import sys

socket.getfqdn = lambda name='': 'mx.example'


def tell_port(listener):
    print('PORT', listener.getsockname()[1], file=sys.stderr, flush=True)


def telling_loop(timeout=30.0, use_poll=False, map=None, count=None):
    asyncore.loop = loop
    for each in (asyncore.socket_map if map is None else map).values():
        if each.accepting:
            tell_port(each.socket)
    loop(timeout, use_poll, map, count)


async def telling_create_server(self, *args, **kwargs):
    server = await create_server(self, *args, **kwargs)
    tell_port(server.sockets[0])
    return server


if 'TELL_PORT_OF_ASYNCIO' in os.environ:
    import asyncio
    create_server = asyncio.BaseEventLoop.create_server
    asyncio.BaseEventLoop.create_server = telling_create_server
else:
    import asyncore
    loop = asyncore.loop
    asyncore.loop = telling_loop
'''


@pytest.fixture
def user_environment(tmp_path_factory):
    """What a user's shell has, but that ours is found before the standard library's module."""
    directory = tmp_path_factory.mktemp('site')
    (directory / 'sitecustomize.py').write_text(SITECUSTOMIZE)
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(('PYTHON', 'MYPY', 'DJANGO', 'FLASK'))}
    environment['PYTHONPATH'] = os.pathsep.join(
        [str(directory), os.path.dirname(os.path.abspath(smtpd.__file__))])
    environment['PYTHONIOENCODING'] = 'utf-8'
    return environment


class Program:
    """A server that a user started; `port` is where it listens."""

    def __init__(self, command, directory, environment):
        if isinstance(command, str):
            command = shlex.split(command)
        if command[0] == 'python':
            command = [sys.executable] + command[1:]
        self.process = subprocess.Popen(
            command, cwd=directory, env=environment, bufsize=0, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.output = open(self.process.stdout.fileno(), 'rb', closefd=False)
        self.errors = b''
        self.port = None
        # A test that waits in vain for a line gets the end of the file instead.
        self.last_resort = threading.Timer(100, self.process.kill)
        self.last_resort.start()

    def __enter__(self):
        for line in self.process.stderr:
            self.errors += line
            if line.startswith(b'PORT '):
                self.port = int(line[5:])
                break
        if self.port is None:
            self.__exit__()
            pytest.fail('%s did not start:\n%s' % (self.process.args, self.errors.decode()))
        self.address = 'localhost', self.port
        return self

    def __exit__(self, *exc):
        self.last_resort.cancel()
        self.last_resort.join()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.errors += self.process.stderr.read()
        print('%s ended with %s:\n%s' % (  # pytest shows it if the test fails
            self.process.args, self.process.returncode, self.errors.decode()), file=sys.stderr)
        self.output.close()
        self.process.stdout.close()
        self.process.stderr.close()

    def line(self):
        line = self.output.readline().decode()
        assert line, 'the program ended'
        return line.rstrip('\r\n')

    def lines_to(self, last):
        lines = [self.line()]
        while lines[-1] != last:
            lines.append(self.line())
        return lines

    def interrupt(self):
        """Ctrl-C; returns the exit status, what it printed and what it complained of."""
        self.process.send_signal(signal.SIGINT)
        return (self.process.wait(60), self.output.read().decode(),
                self.process.stderr.read().decode())


@pytest.fixture
def start(tmp_path, user_environment):
    """start(command): a Program, in tmp_path, that ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda command, **more: stack.enter_context(
            Program(command, tmp_path, dict(user_environment, **more)))


@pytest.fixture
def run_python(tmp_path, user_environment):
    def run(*arguments, **kwargs):
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8', timeout=300,
            **dict({'env': user_environment}, **kwargs))
    return run


def test_every_code_block_is_executed_here():
    assert set(BLOCKS) - EXECUTED == set()
    assert EXECUTED - set(BLOCKS) == set()


def test_no_document_shows_other_code():
    blocks = 0
    for document in DOCUMENTS:
        text = read(document)
        blocks += len(re.findall(r'^ *\.\. (?:code(?:-block)?|sourcecode|literalinclude)::', text,
                                 re.MULTILINE))
        assert not re.search(r'^(?!\.\.).*::$|^ *>>> ', text, re.MULTILINE), document
    assert blocks == len(BLOCKS)


def test_the_readme_renders_without_a_warning():
    need_module('docutils')
    import docutils.core

    warnings_given = io.StringIO()
    docutils.core.publish_doctree(
        read(README), source_path=README, settings_overrides={
            'report_level': 2, 'warning_stream': warnings_given, 'syntax_highlight': 'none'})
    assert warnings_given.getvalue() == ''


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = read(README)
    assert len(text.splitlines()) <= 250
    links = re.findall(r'`([^`<]+) <([^`>]+)>`_', text)
    inside = {target for name, target in links if not target.startswith('https:')}
    assert all(os.path.isfile(os.path.join(HERE, target)) for target in inside)
    assert inside == {target for name, target in links if name.startswith('docs/')}


def test_the_readme_keeps_the_order_of_a_readers_questions():
    expected = [
        'pip install pysmtpd\n', 'pysmtpd; python_version >= "3.12"', 'asyncore.loop()',
        'Which Pythons', 'What it is not', 'python3 -m venv', 'What it does better\n==',
        'What you may notice\n==', 'The manual\n==', 'Test it\n==', 'MIT']
    text = read(README)
    positions = [text.find(each) for each in expected]
    assert -1 not in positions
    assert positions == sorted(positions)


def columns_of(docstring):
    """The names in the first of a docstring's two columns."""
    return re.findall(r'^ *(\w+) {2,}\S', docstring, re.MULTILINE)


# Breakpoint: 3.12, it has no other smtpd.
@pytest.mark.skipif(sys.version_info >= (3, 12), reason='there is no old module to compare with')
def test_the_manual_calls_standard_what_the_old_module_had():
    marks = runpy.run_path(os.path.join(HERE, 'docs', 'conf.py'))['STANDARD']
    program = ("""
import asyncore, json, socket, sys, smtpd
client, connection = socket.socketpair()
with client:
    server = smtpd.SMTPServer(('127.0.0.1', 0), None)
    channel = smtpd.SMTPChannel(server, connection, None)
    channel.smtp_EHLO('x')
    channel.smtp_MAIL('FROM:<a@b>')
    channel.smtp_RCPT('TO:<a@b>')
    sys.argv[1:] = ['localhost:1', 'localhost:2']
    made = {'SMTPServer': server, 'SMTPChannel': channel, 'Options': smtpd.parseargs()}
    print(json.dumps({name: dir(thing) for name, thing in made.items()}))
    asyncore.close_all()
""")
    told = subprocess.run([sys.executable, '-I', '-W', 'ignore', '-c', program], check=True,
                          stdout=subprocess.PIPE, timeout=60).stdout
    for class_name, old in json.loads(told).items():
        attributes = set(columns_of(getattr(smtpd, class_name).__doc__))
        assert attributes & set(old) <= marks[class_name]
        assert not (attributes - set(old)) & marks[class_name]


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


LIMITS = [(cls, name) for cls in (smtpd.SMTPChannel, smtpd.SMTPServer, smtpd.PureProxy)
          for name in columns_of(cls.__doc__)
          if type(getattr(cls, name, None)) is int and name.islower()]


@pytest.mark.parametrize('cls, name', LIMITS, ids=[name for cls, name in LIMITS])
def test_the_limits_in_the_manual_are_those_of_the_module(cls, name):
    found = re.search(r'^``%s``(?: \[\d\]_)? +(\S+) ' % name, page('limits.rst'), re.MULTILINE)
    assert found[1] == str(getattr(cls, name))


def read_setup():
    setup = configparser.ConfigParser()
    setup.read(os.path.join(HERE, 'setup.cfg'), encoding='utf-8')
    return setup


def test_the_newest_heading_of_the_changes_is_the_version():
    newest = re.search(r'^(\d[\w.]*) \(\d{4}-\d\d-\d\d\)\n-+$',
                       read(os.path.join(HERE, 'CHANGES.rst')), re.MULTILINE)
    assert newest[1] == read_setup()['metadata']['version']


@executes('requirements')
def test_the_requirement_names_this_package_from_3_12_on():
    name, marker = block('requirements').strip().split('; ')
    assert name == read_setup()['metadata']['name']
    for version, wanted in {'3.9': False, '3.11': False, '3.12': True, '3.15': True}.items():
        words = marker.replace('python_version', repr(version))
        if version == '3.9':  # markers compare versions, not text
            words = words.replace("'3.9'", "'3.09'")
        assert eval(words) is wanted


RECIPE_MESSAGE = b'''\
From: =?utf-8?q?J=C3=BCrgen?= <j@example.com>
To: you@example.com
Subject: =?utf-8?q?Caf=C3=A9?=
MIME-Version: 1.0
Content-Type: text/plain; charset=iso-8859-1
Content-Transfer-Encoding: quoted-printable

Zwei Caf=E9s, bitte.
'''.replace(b'\n', b'\r\n')
HANDLERS_DATA = RECIPE_MESSAGE[:-2].replace(b'\r\n', b'\n')


def post_message(address, recipients=('you@example.com',), message=RECIPE_MESSAGE):
    with smtplib.SMTP(*address, local_hostname='client.example', timeout=30) as client:
        return client.sendmail('j@example.com', list(recipients), message)


@executes('five-lines')
def test_the_server_in_five_lines_prints_a_message(start, tmp_path):
    lines = [line for line in block('five-lines').splitlines() if line]
    assert len(lines) == 5
    (tmp_path / 'server.py').write_text(block('five-lines'))
    with_port = start('python -u server.py')
    post_message(with_port.address)
    assert with_port.line() == repr(HANDLERS_DATA)


def test_the_example_in_the_module_s_docstring_runs(start, tmp_path):
    example, = re.findall(r'::\n\n((?:    .*\n|\n)+)', smtpd.__doc__)
    (tmp_path / 'server.py').write_text(textwrap.dedent(example).replace('8025', '0'))
    program = start('python -u server.py')
    post_message(program.address)
    assert program.line() == (
        "j@example.com -> ['you@example.com'] %d octets" % len(HANDLERS_DATA))


def said_by(program, last):
    """What the program printed, with the client's address as the documents show it."""
    return '\n'.join(program.lines_to(last)).replace("X-Peer: ::1'", "X-Peer: 127.0.0.1'") + '\n'


END_OF_MESSAGE = '------------ END MESSAGE ------------'


@executes('try-it', 'send-one', 'printed')
def test_the_transcript_in_the_readme_is_what_comes_out(start, run_python):
    program = start(commands('try-it')[2].replace('smtpd-env/bin/', ''))
    python, *arguments = shlex.split(block('send-one', port_1025=program.port))
    assert python == 'python3'
    assert run_python(*arguments).stdout == ''
    assert said_by(program, END_OF_MESSAGE) == block('printed')
    assert program.interrupt() == (0, '', '')


class TestTutorial:
    @executes('debugging', 'tutorial-send', 'tutorial-send-command', 'tutorial-printed')
    def test_see_a_message(self, start, run_python, tmp_path):
        program = start(block('debugging'))
        name = save_block(tmp_path, 'tutorial-send', port_1025=program.port)
        assert shlex.split(block('tutorial-send-command')) == ['python', name]
        assert run_python(name).stdout == ''
        assert said_by(program, END_OF_MESSAGE) == block('tutorial-printed')
        assert program.interrupt() == (0, '', '')

    @executes('tutorial-subjects', 'tutorial-subjects-command', 'tutorial-subjects-printed')
    def test_do_something_with_messages(self, start, run_python, tmp_path):
        save_block(tmp_path, 'tutorial-subjects')
        program = start(block('tutorial-subjects-command'))
        run_python(save_block(tmp_path, 'tutorial-send', port_1025=program.port))
        assert program.line() + '\n' == block('tutorial-subjects-printed')

    @executes('tutorial-channel', 'tutorial-channel-command')
    def test_change_the_dialogue(self, start, tmp_path):
        save_block(tmp_path, 'tutorial-subjects')
        save_block(tmp_path, 'tutorial-channel')
        program = start(block('tutorial-channel-command'))
        assert post_message(program.address, ['nobody@example.com', 'you@example.com']) == {
            'nobody@example.com': (550, b'No such user here')}
        assert program.line() == "j@example.com to ['you@example.com'] about Café"

    @executes('recipe-pytest', 'tutorial-pytest', 'tutorial-pytest-printed')
    def test_catch_mail_in_a_test_suite(self, run_python, tmp_path):
        name = save_block(tmp_path, 'recipe-pytest')
        install, run = block('tutorial-pytest').splitlines()
        assert (install, shlex.split(run)) == ('pip install pytest', ['pytest', name])
        outcome = run_python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'error',
                             '-W', 'ignore:The asyn', name)
        assert outcome.returncode == 0, outcome.stdout
        assert block('tutorial-pytest-printed').strip() in outcome.stdout


@executes('wrong-arguments')
def test_wrong_arguments_get_the_lines_that_the_manual_shows(run_python):
    lines = block('wrong-arguments').splitlines()
    for command, complaint in zip(lines[::2], lines[1::2]):
        prompt, python, *arguments = shlex.split(command)
        assert (prompt, python) == ('$', 'python')
        assert run_python('-W', 'ignore', *arguments).stdout == complaint + '\n'


@executes('which-one')
def test_one_line_tells_which_module_it_is(run_python):
    command = shlex.split(block('which-one'))
    assert command[0] == 'python'
    outcome = run_python('-W', 'ignore', *command[1:])
    assert os.path.samefile(outcome.stdout.strip(), smtpd.__file__)


@pytest.fixture
def wheel(tmp_path):
    """The directory of a wheel built from a copy of the source."""
    source = copy_of_the_source(tmp_path / 'source')
    subprocess.run([sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check', 'wheel',
                    '--no-deps', '--wheel-dir', str(tmp_path / 'wheel'), str(source)],
                   check=True, timeout=300)
    return tmp_path / 'wheel'


@pytest.fixture
def fresh(wheel, tmp_path, user_environment):
    """The environment variables of a shell in a new virtual environment, tmp_path / 'env'.

    Its pip finds the wheel of this source, and Python our sitecustomize, but not the source.
    """
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(tmp_path / 'env')],
                   check=True)
    scripts = tmp_path / 'env' / 'bin'
    pip = scripts / 'pip'  # Debian's Pythons have none to put there
    pip.write_text('#!/bin/sh\nPYTHONPATH= exec %s -m pip --python %s "$@"\n'
                   % (sys.executable, scripts / 'python'))
    pip.chmod(0o755)
    return dict(user_environment, PIP_QUIET='1', PIP_FIND_LINKS=str(wheel),
                PIP_DISABLE_PIP_VERSION_CHECK='1',
                PYTHONPATH=user_environment['PYTHONPATH'].split(os.pathsep)[0],
                PATH=str(scripts) + os.pathsep + os.environ['PATH'])


def which_smtpd(environment, directory):
    return subprocess.run(
        ['python', '-W', 'ignore', *shlex.split(block('which-one'))[1:]], check=True,
        cwd=directory, env=environment, stdout=subprocess.PIPE, encoding='utf-8').stdout.strip()


@pytest.mark.slow
@executes('install', 'tutorial-install')
def test_a_new_user_installs_and_runs_it(fresh, tmp_path):
    make, install, run = commands('try-it')
    make_there, activate, install_there = block('tutorial-install').splitlines()
    assert (make, make_there) == ('python3 -m venv smtpd-env', 'python3 -m venv env')
    assert activate == '. env/bin/activate'
    assert install == 'smtpd-env/bin/' + install_there
    assert install_there == block('install').strip()
    assert run == 'smtpd-env/bin/' + block('debugging').strip()
    subprocess.run(install_there, shell=True, check=True, cwd=tmp_path, timeout=300, env=fresh)
    # Breakpoint: 3.12. Below it the standard library's own wins, as README says.
    assert ('site-packages' in which_smtpd(fresh, tmp_path)) is (sys.version_info >= (3, 12))
    if sys.version_info >= (3, 12):
        python = shutil.which('python', path=fresh['PATH'])
        with Program([python, *shlex.split(run)[1:]], tmp_path, fresh) as program:
            post_message(program.address)
            program.lines_to(END_OF_MESSAGE)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 12), reason='there is no standard-smtpd')
@executes('move')
def test_one_line_moves_from_standard_smtpd(fresh, tmp_path):
    # Both: who moves may have seen already that the old one hides the new one.
    subprocess.run('pip install pysmtpd standard-smtpd', shell=True, check=True, timeout=300,
                   env=fresh)
    assert which_smtpd(fresh, tmp_path).endswith(os.path.join('smtpd', '__init__.py'))
    subprocess.run(block('move'), shell=True, check=True, timeout=300, env=fresh)
    assert which_smtpd(fresh, tmp_path).endswith(os.path.join('site-packages', 'smtpd.py'))


@pytest.mark.slow
@executes('test-it', 'test-quickly')
def test_the_command_lines_that_test_know_what_to_do():
    need_module('tox')
    make, install, run = commands('test-it')
    assert install == 'test-env/bin/pip install tox'
    listed = subprocess.run([sys.executable, '-m', run.rpartition('/')[2], 'list', '--no-desc'],
                            cwd=HERE, check=True, stdout=subprocess.PIPE,
                            encoding='utf-8').stdout.split()
    assert {'py39', 'py310', 'py311', 'py312', 'py313', 'py314', 'py315', 'docs'} <= set(listed)
    make_too, install, run = commands('test-quickly')
    assert make == make_too == 'python3 -m venv test-env'
    assert install == "test-env/bin/pip install '.[test]'"
    listed = subprocess.run([sys.executable, '-m', *shlex.split(run.rpartition('/')[2]),
                             '--collect-only', '-q'], cwd=HERE, check=True,
                            env=dict(os.environ, PYTEST_ADDOPTS=''),
                            stdout=subprocess.PIPE, encoding='utf-8').stdout
    assert 'test_smtpd.py::' in listed


@pytest.mark.slow
@executes('benchmark')
def test_the_benchmark_is_where_the_manual_says():
    command = shlex.split(block('benchmark'))
    subprocess.run([sys.executable, *command[1:], '--help'], cwd=HERE, check=True, timeout=60,
                   stdout=subprocess.DEVNULL)


# The recipes

@executes('change-limits')
def test_limits_are_changed_as_the_manual_says(start, tmp_path):
    save_block(tmp_path, 'change-limits')
    program = start('python -m smtpd -n -c patient.PatientServer localhost:0')
    with smtplib.SMTP(*program.address, timeout=30) as client:
        client.helo('client.example')
        client.docmd('MAIL', 'FROM:<a@example.com>')
        answers = [client.docmd('RCPT', 'TO:<b%d@example.com>' % number) for number in range(6)]
    assert [code for code, text in answers] == [250] * 5 + [452]


@executes('recipe-list')
def test_the_recipe_with_a_list_ends_after_three_messages(start, tmp_path):
    program = start(['python', save_block(tmp_path, 'recipe-list')])
    for name in 'abc':
        post_message(program.address, [name + '@example.com', 'd@example.com'], b'12345\r\n')
    assert program.process.wait(30) == 0
    assert program.output.read().decode().splitlines() == [
        'j@example.com -> %s@example.com, d@example.com 5 octets' % name for name in 'abc']


@executes('recipe-maildir', 'recipe-maildir-command')
def test_the_recipe_with_a_maildir_keeps_messages(start, tmp_path):
    save_block(tmp_path, 'recipe-maildir')
    program = start(block('recipe-maildir-command'))
    post_message(program.address)
    kept, = mailbox.Maildir(str(tmp_path / 'mail'), create=False)
    assert kept['Subject'] == '=?utf-8?q?Caf=C3=A9?='
    assert kept.get_payload(decode=True) == 'Zwei Cafés, bitte.'.encode('iso-8859-1')


@executes('recipe-readable', 'recipe-readable-command')
def test_the_recipe_for_people_prints_decoded_text(start, tmp_path):
    save_block(tmp_path, 'recipe-readable')
    program = start(block('recipe-readable-command'))
    post_message(program.address)
    lines = program.lines_to('Zwei Cafés, bitte.')
    assert lines[1] == 'From j@example.com to you@example.com'
    assert 'From: Jürgen <j@example.com>' in lines
    assert 'Subject: Café' in lines
    post_message(program.address, message=b'Content-Type: image/png\r\n\r\n')
    program.lines_to('(no text)')
    post_message(program.address,
                 message=b'Content-Type: text/plain; charset=nobodys\r\n\r\nHello.\r\n')
    program.lines_to('Hello.')


@executes('recipe-refuse', 'recipe-refuse-command')
def test_the_recipe_that_refuses_does_so(start, tmp_path):
    save_block(tmp_path, 'recipe-refuse')
    program = start(block('recipe-refuse-command'))
    assert post_message(program.address) == {}
    assert post_message(program.address, ['nobody@example.com', 'you@example.com']) == {
        'nobody@example.com': (550, b'No such user here')}
    with pytest.raises(smtplib.SMTPDataError) as refusal:
        post_message(program.address, ['later@example.com'])
    assert refusal.value.args == (451, b'Try again later')
    with pytest.raises(smtplib.SMTPDataError) as refusal:
        post_message(program.address, message=b'Come to our casino')
    assert refusal.value.args == (550, b'We do not want this')


@executes('recipe-command', 'recipe-command-command')
def test_the_recipe_with_an_own_command_answers_it(start, tmp_path):
    save_block(tmp_path, 'recipe-command')
    program = start(block('recipe-command-command'))
    with RawClient(program.address) as client:
        client.reply()
        assert client.say(b'XFOO bar') == b'250 BAR\r\n'
        assert client.say(b'xfoo') == b'501 Syntax: XFOO text\r\n'
        assert client.say(b'XBAR') == b'500 Error: command "XBAR" not recognized\r\n'


@executes('recipe-auth', 'recipe-auth-command')
class TestRecipeAuth:
    @pytest.fixture
    def program(self, start, tmp_path):
        save_block(tmp_path, 'recipe-auth')
        return start(block('recipe-auth-command'))

    def test_a_client_logs_in_and_sends(self, program):
        with smtplib.SMTP(*program.address, timeout=30) as client:
            client.ehlo('client.example')
            assert client.esmtp_features['auth'].strip() == 'PLAIN'
            assert client.login('alice', 'open sesame') == (235, b'Authentication successful')
            assert client.sendmail('j@example.com', ['you@example.com'], RECIPE_MESSAGE) == {}

    def test_nobody_sends_without(self, program):
        with pytest.raises(smtplib.SMTPSenderRefused) as refusal:
            post_message(program.address)
        assert refusal.value.smtp_code == 530

    @pytest.mark.parametrize('dialogue', [
        [(b'AUTH PLAIN', b'503 Error: send EHLO first')],
        [(b'EHLO c', None), (b'AUTH', b'504 Error: only PLAIN is supported'),
         (b'AUTH LOGIN', b'504 Error: only PLAIN is supported'),
         (b'AUTH PLAIN AGFsaWNlAHdyb25n', b'535 Authentication credentials invalid'),
         (b'AUTH PLAIN AGJvYgA=', b'535 Authentication credentials invalid'),
         (b'AUTH PLAIN ?', b'501 Error: bad response'),
         (b'AUTH PLAIN YWxpY2U=', b'501 Error: bad response'),
         (b'AUTH PLAIN /w==', b'501 Error: bad response'),
         (b'AUTH PLAIN', b'334 '), (b'*', b'501 Error: bad response'),
         (b'AUTH PLAIN', b'334 '),
         (b'AGFsaWNlAG9wZW4gc2VzYW1l', b'235 Authentication successful'),
         (b'AUTH PLAIN', b'503 Error: not now'),
         (b'NOOP', b'250 OK')],
    ], ids=['it needs EHLO', 'all else'])
    def test_its_dialogue(self, program, dialogue):
        with RawClient(program.address) as client:
            client.reply()
            for command, reply in dialogue:
                answer = client.say(command)
                assert reply is None or answer == reply + b'\r\n'


@pytest.fixture
def certificate(tmp_path):
    """cert.pem and key.pem made as the manual says; a client's context that trusts them."""
    find_tool('openssl', 'openssl')
    subprocess.run(block('recipe-starttls-certificate'), shell=True, cwd=tmp_path, check=True,
                   stderr=subprocess.DEVNULL)
    return ssl.create_default_context(cafile=str(tmp_path / 'cert.pem'))


@executes('recipe-starttls', 'recipe-starttls-command', 'recipe-starttls-certificate')
class TestRecipeStartTLS:
    @pytest.fixture
    def program(self, certificate, start, tmp_path):
        save_block(tmp_path, 'recipe-starttls')
        return start(block('recipe-starttls-command'))

    def test_a_client_sends_through_tls(self, program, certificate):
        with smtplib.SMTP(*program.address, timeout=30) as client:
            client.ehlo('client.example')
            assert client.has_extn('starttls')
            client.starttls(context=certificate)
            assert client.ehlo_resp is None
            client.ehlo('client.example')
            assert not client.has_extn('starttls')
            assert client.docmd('STARTTLS') == (503, b'Error: TLS is active')
            assert client.sendmail('j@example.com', ['you@example.com'], RECIPE_MESSAGE) == {}
        assert "b'Subject: =?utf-8?q?Caf=C3=A9?='" in program.lines_to(
            '------------ END MESSAGE ------------')

    def test_a_large_message_passes(self, program, certificate):
        text = b'Subject: large\r\n\r\n' + b'0123456789\r\n' * 100000
        with smtplib.SMTP(*program.address, timeout=30) as client:
            client.starttls(context=certificate)
            lines = []  # the server prints while it is read from
            reading = threading.Thread(target=lambda: lines.extend(
                program.lines_to('------------ END MESSAGE ------------')))
            reading.start()
            try:
                client.sendmail('j@example.com', ['you@example.com'], text)
            except smtplib.SMTPException:
                program.process.kill()
                raise
            finally:
                reading.join()
        assert lines.count("b'0123456789'") == 100000

    def test_it_goes_on_without_tls(self, program):
        with RawClient(program.address) as client:
            client.reply()
            assert client.say(b'STARTTLS now') == b'501 Syntax: STARTTLS\r\n'
            assert client.say(b'NOOP') == b'250 OK\r\n'

    @pytest.mark.parametrize('ahead', [b'', b'NOOP\r\n', b'NOOP\r\nNOOP\r\n', b'XFOO'],
                             ids=['nothing', 'a command', 'two', 'half of one'])
    def test_what_was_sent_ahead_of_the_handshake_is_thrown_away(
            self, program, certificate, ahead):
        with RawClient(program.address) as client:
            client.reply()
            client.say(b'EHLO before')
            assert client.say(b'MAIL FROM:<before@example.com>') == b'250 OK\r\n'
            client.send(b'STARTTLS\r\n' + ahead)
            assert client.file.readline() == b'220 Ready to start TLS\r\n'
            with certificate.wrap_socket(client.socket, server_hostname='localhost') as tls:
                with tls.makefile('rb') as file:
                    tls.sendall(b'MAIL FROM:<a@example.com>\r\n')
                    assert file.readline() == b'503 Error: send HELO first\r\n'
                    tls.sendall(b'HELO after\r\nMAIL FROM:<a@example.com>\r\nQUIT\r\n')
                    assert file.read() == b'250 mx.example\r\n250 OK\r\n221 Bye\r\n'

    def test_a_client_that_talks_no_tls_is_left_and_others_are_served(self, program):
        with RawClient(program.address) as client:
            client.reply()
            assert client.say(b'STARTTLS') == b'220 Ready to start TLS\r\n'
            client.send(b'this is no handshake' * 100)
            with contextlib.suppress(ConnectionResetError):
                client.rest()  # an alert perhaps, and the end
        post_message(program.address)

    def test_a_silent_handshake_delays_no_other_client(self, program):
        with RawClient(program.address) as client:
            client.reply()
            assert client.say(b'STARTTLS') == b'220 Ready to start TLS\r\n'
            post_message(program.address)
            client.send(b'\x16')  # a first octet of a handshake
            post_message(program.address)


@executes('recipe-starttls-auth')
def test_the_recipe_for_both_wants_tls_before_passwords(certificate, start, tmp_path):
    for name in 'recipe-auth', 'recipe-starttls', 'recipe-starttls-auth':
        save_block(tmp_path, name)
    program = start('python -m smtpd -n -c secure.SecureServer localhost:0')
    with smtplib.SMTP(*program.address, timeout=30) as client:
        client.ehlo('client.example')
        with pytest.raises(smtplib.SMTPAuthenticationError) as refusal:
            client.login('alice', 'open sesame')
        assert refusal.value.smtp_code == 538
        client.starttls(context=certificate)
        client.login('alice', 'open sesame')
        assert client.sendmail('j@example.com', ['you@example.com'], RECIPE_MESSAGE) == {}


@executes('recipe-proxy-command')
def test_the_command_for_a_proxy_relays(start):
    with serving(localaddr=('localhost', 0)) as upstream:
        program = start(block('recipe-proxy-command', port_25=upstream.port_number))
        post_message(program.address)
        peer, mailfrom, rcpttos, data, kwargs = upstream.messages[0]
    assert (mailfrom, rcpttos) == ('j@example.com', ['you@example.com'])
    assert b'\nX-Peer: ' in data
    assert data.endswith(b'\n\nZwei Caf=E9s, bitte.')


@executes('recipe-gateway')
def test_the_recipe_for_a_gateway_is_no_open_relay(start, tmp_path):
    with serving(localaddr=('localhost', 0)) as upstream:
        program = start(['python', save_block(tmp_path, 'recipe-gateway',
                                              port_25=upstream.port_number)])
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            post_message(program.address, ['you@example.net'])
        assert post_message(program.address, ['You@Example.com', 'you@example.net']) == {
            'you@example.net': (550, b'Relaying denied')}
        assert [message[2] for message in upstream.messages] == [['You@Example.com']]
        with RawClient(program.address) as client:
            client.reply()
            client.say(b'EHLO client.example')
            client.say(b'MAIL FROM:<a@example.com>')
            for path in (b'<you@example.net> <x@example.com>', b'you@example.net,x@example.com>',
                         b'<you@example.net>x@example.com>', b'<you@example.net@example.com>',
                         b'"you@example.net"@example.com>'):
                assert client.say(b'RCPT TO:' + path)[:1] == b'5', path


@pytest.mark.parametrize('name, module, package, subject', [
    pytest.param('recipe-django', 'django', 'Django', 'Hello from Django',
                 marks=pytest.mark.real),
    pytest.param('recipe-flask', 'flask_mail', 'Flask-Mail', 'Hello from Flask',
                 marks=pytest.mark.real),
    ('recipe-logging', 'logging', 'logging', 'Hello from logging')])
@executes('recipe-django', 'recipe-flask', 'recipe-logging')
def test_mail_of_frameworks_arrives(name, module, package, subject, start, tmp_path, run_python):
    need_module(module, package)
    program = start(block('debugging'))
    outcome = run_python('-W', 'ignore', save_block(tmp_path, name, port_1025=program.port))
    assert outcome.returncode == 0, outcome.stdout
    lines = program.lines_to('------------ END MESSAGE ------------')
    assert "b'Subject: %s'" % subject in lines
    assert "b'It works.'" in lines


@executes('recipe-aiosmtpd-old', 'recipe-aiosmtpd-new')
@pytest.mark.parametrize('which', ['old', 'new'])
def test_old_and_new_do_the_same(which, start, tmp_path):
    with held_port() as port:
        if which == 'new':
            need_module('aiosmtpd')
            # Its Controller cannot do with port 0.
            file_name = save_block(tmp_path, 'recipe-aiosmtpd-new', port_1025=port)
            program = start(['python', '-W', 'ignore', file_name], TELL_PORT_OF_ASYNCIO='1')
        else:
            program = start(['python', save_block(tmp_path, 'recipe-aiosmtpd-old')])
        assert post_message(program.address, ['you@example.com', 'nobody@example.com']) == {
            'nobody@example.com': (550, b'No such user here')}
        assert program.line() in [
            "%s j@example.com ['you@example.com'] 8 lines" % host for host in ('127.0.0.1', '::1')]
        with pytest.raises(smtplib.SMTPResponseException) as refusal:
            post_message(program.address, message=b'Subject: x\r\n\r\n' + b'x' * 1000000)
        assert refusal.value.smtp_code == 552


@executes('recipe-asyncio')
class TestRecipeAsyncio:
    def test_a_coroutine_takes_the_message(self, start, tmp_path):
        program = start(['python', save_block(tmp_path, 'recipe-asyncio')])
        post_message(program.address)
        assert program.line() == (
            'j@example.com -> you@example.com %d octets' % len(HANDLERS_DATA))
        assert program.interrupt() == (0, '', '')

    @pytest.mark.skipif(not hasattr(signal, 'pthread_sigmask'), reason='no masks of signals')
    def test_it_ends_at_a_ctrl_c_that_does_not_wake_the_event_loop(self, start, tmp_path):
        """The server's thread gets the signal; one just before select() wakes nothing either."""
        name = save_block(tmp_path, 'recipe-asyncio')
        text = (tmp_path / name).read_text()
        mask = 'import signal; signal.pthread_sigmask(signal.%s, [signal.SIGINT])\n'
        begin = 'def serve() -> None:\n'
        assert begin in text
        (tmp_path / name).write_text(mask % 'SIG_BLOCK' + text.replace(
            begin, begin + 8 * ' ' + mask % 'SIG_UNBLOCK'))
        program = start(['python', name])
        post_message(program.address)  # until then it may still be starting the thread
        assert program.line()
        assert program.interrupt() == (0, '', '')

    def test_two_clients_do_not_wait_for_each_other(self, start, tmp_path):
        name = save_block(tmp_path, 'recipe-asyncio')
        text = (tmp_path / name).read_text()
        assert 'await asyncio.sleep(0.1)' in text
        (tmp_path / name).write_text(text.replace('await asyncio.sleep(0.1)', """
        came = globals().setdefault('came', {'first': asyncio.Event(), 'second': asyncio.Event()})
        came[mailfrom.partition('@')[0]].set()
        await came['first'].wait()
        await came['second'].wait()
"""))
        program = start(['python', name])
        with RawClient(program.address) as first, RawClient(program.address) as second:
            for client, mailfrom in (first, b'first'), (second, b'second'):
                client.reply()
                client.send(b'HELO c\r\nMAIL FROM:<%s@example.com>\r\nRCPT TO:<a@example.com>\r\n'
                            b'DATA\r\n' % mailfrom)
                for _ in range(4):
                    last = client.reply()
                assert last[:3] == b'354'
            first.send(b'x\r\n.\r\n')
            second.send(b'x\r\n.\r\n')
            assert first.reply() == second.reply() == b'250 OK\r\n'

    def test_a_coroutine_that_raises_costs_a_451(self, start, tmp_path):
        name = save_block(tmp_path, 'recipe-asyncio')
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace('await asyncio.sleep(0.1)', 'raise OSError'))
        program = start(['python', name])
        with pytest.raises(smtplib.SMTPDataError) as refusal:
            post_message(program.address)
        assert refusal.value.smtp_code == 451


@pytest.mark.real
@executes('recipe-systemd', 'recipe-systemd-command')
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    analyze = find_tool('systemd-analyze', 'systemd')
    verify, *_, enable = block('recipe-systemd-command').splitlines()
    unit = tmp_path / save_block(tmp_path, 'recipe-systemd')
    assert verify == 'systemd-analyze verify /etc/systemd/system/' + unit.name
    assert enable == 'systemctl enable --now ' + unit.name
    text = unit.read_text()
    assert 'ExecStart=/opt/smtpd/bin/python -m smtpd -n -c keep.MaildirServer' in text
    unit.write_text(text.replace('/opt/smtpd/bin/python', sys.executable))
    outcome = subprocess.run([analyze, 'verify', str(unit)], timeout=60, encoding='utf-8',
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert unit.name not in outcome.stdout
    assert outcome.returncode == 0, outcome.stdout


def post_until_accepted(address, message):
    """What a mail program does: 4yz and a lost connection mean "try again"."""
    for _ in range(50):
        try:
            return post_message(address, message=message)
        except (smtplib.SMTPServerDisconnected, ConnectionError):
            pass
        except smtplib.SMTPResponseException as refusal:
            assert 400 <= refusal.smtp_code < 500
    pytest.fail('tried 50 times')


class HAProxy:
    """HAProxy, set up as the manual says, before two processes that keep messages in a Maildir."""

    def __init__(self, start, tmp_path, class_name='keep.MaildirServer'):
        haproxy = find_tool('haproxy', 'haproxy')
        save_block(tmp_path, 'recipe-maildir')
        mailbox.Maildir(str(tmp_path / 'mail')).close()
        *commands, proxy_command = block('recipe-haproxy-command').splitlines()
        self.backends = [start(command.rstrip(' &')) for command in commands]
        # It listens on what we bound, so that no port has to be guessed.
        self.listener = socket.create_server(('127.0.0.1', 0), backlog=100)
        self.address = self.listener.getsockname()
        configuration = block('recipe-haproxy-cfg', port_1025=self.address[1],
                              **{'port_%d' % (2501 + number): backend.port
                                 for number, backend in enumerate(self.backends)})
        assert len([line for line in configuration.splitlines() if line.strip()]) <= 14
        configuration = configuration.replace(
            'bind localhost:%d' % self.address[1], 'bind fd@%d' % self.listener.fileno())
        configuration = configuration.replace('localhost:', '%s:' % self.backend_host())
        (tmp_path / 'haproxy.cfg').write_text(configuration)
        assert shlex.split(proxy_command) == ['haproxy', '-f', 'haproxy.cfg']
        self.process = subprocess.Popen(
            [haproxy, '-f', 'haproxy.cfg'], cwd=tmp_path, pass_fds=[self.listener.fileno()],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def backend_host(self):
        return socket.getaddrinfo('localhost', 0, type=socket.SOCK_STREAM)[0][4][0]

    def close(self):
        self.process.kill()
        self.process.wait()
        self.listener.close()


@pytest.mark.real
@executes('recipe-haproxy-cfg', 'recipe-haproxy-command')
class TestRecipeHAProxy:
    @pytest.fixture
    def proxy(self, start, tmp_path):
        with contextlib.closing(HAProxy(start, tmp_path)) as proxy:
            yield proxy

    def test_a_killed_process_costs_its_own_sessions_alone(self, proxy):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(RawClient(proxy.address)) for _ in range(6)]
            for client in clients:
                assert client.reply() == b'220 mx.example %s\r\n' % smtpd.__version__.encode()
                assert client.say(b'HELO client.example') == b'250 mx.example\r\n'
            proxy.backends[0].process.kill()
            proxy.backends[0].process.wait()
            answers = []
            for client in clients:
                try:
                    answers.append(client.say(b'NOOP'))
                except ConnectionError:
                    answers.append(b'')
            assert set(answers) == {b'', b'250 OK\r\n'}  # each process had some
        post_message(proxy.address)

    def test_no_message_is_lost_when_a_process_is_killed_in_mid_load(self, proxy, tmp_path):
        numbers = iter(range(400))
        accepted = []
        turn = threading.Lock()
        half = threading.Event()

        def send_many():
            while True:
                with turn:
                    number = next(numbers, None)
                if number is None:
                    return
                post_until_accepted(proxy.address, b'Subject: %d\r\n\r\n' % number)
                accepted.append(number)
                if len(accepted) > 200:
                    half.set()

        threads = [threading.Thread(target=send_many) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert half.wait(60)
        proxy.backends[0].process.kill()
        for thread in threads:
            thread.join(120)
        assert sorted(accepted) == list(range(400))
        arrived = [int(message['Subject']) for message in
                   mailbox.Maildir(str(tmp_path / 'mail'), create=False)]
        assert set(arrived) == set(range(400))
