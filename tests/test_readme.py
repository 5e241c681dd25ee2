"""README.rst and the manual in docs/: what they show is run from the page itself."""
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
    StubServer,
    copy_of_the_source,
    feed,
    find_tool,
    held_port,
    make_channel,
    need_module,
    serving,
    waits,
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
def block(name, **ports):
    """A block's text, with the ports of a test.

    This is the only change that the tests make to the page. A server of ours
    listens on port 0, unless the test says more: block(name, port_1025=34567).
    """
    return re.sub(r'\b(25|1025|2501|2502)\b',
                  lambda port: str(ports.get('port_' + port[0], 0)), BLOCKS[name][1])


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
    try:
        import asyncore
    except ImportError:  # a virtual environment that is new
        pass
    else:
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
    for name in 'python', 'python3':
        (directory / name).write_text('#!/bin/sh\nexec %s "$@"\n' % sys.executable)
        (directory / name).chmod(0o755)
    environment['PATH'] = os.pathsep.join([str(directory), os.environ['PATH'], '/usr/sbin'])
    return environment


class Program:
    """A server that a user started; `port` is where it listens."""

    def __init__(self, command, directory, environment):
        if isinstance(command, str):
            command = shlex.split(command)
        self.process = subprocess.Popen(
            command, cwd=directory, env=environment, bufsize=0, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self.output = open(self.process.stdout.fileno(), 'rb', closefd=False)
        self.errors = b''
        self.port = None
        # A test that waits in vain for a line gets the end of the file instead.
        self.last_resort = threading.Timer(200, self.send, [signal.SIGKILL])
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
        self.send(signal.SIGKILL)
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

    def send(self, number):
        """Send a signal to the program and to what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def interrupt(self):
        """Ctrl-C; returns the exit status, what it printed and what it complained of."""
        self.send(signal.SIGINT)
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


def test_the_readme_renders_without_a_warning():
    need_module('docutils')
    import docutils.core

    warnings_given = io.StringIO()
    docutils.core.publish_doctree(
        read(README), source_path=README, settings_overrides={
            'report_level': 2, 'warning_stream': warnings_given, 'syntax_highlight': 'none'})
    assert warnings_given.getvalue() == ''


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r'`[^`<]+<([^`>]+)>`_', read(README))
    assert links
    for target in links:
        assert target.startswith('https:') or os.path.isfile(os.path.join(HERE, target))


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
          if type(getattr(cls, name, None)) is int and name.islower() and (cls, name) != (
              smtpd.PureProxy, 'process_message_threads')]  # its second row would have no origin


@pytest.mark.parametrize('cls, name', LIMITS, ids=[name for cls, name in LIMITS])
def test_the_limits_in_the_manual_are_those_of_the_module(cls, name):
    found = re.search(r'^``%s``(?: \[\d\]_)? +(\S+) ' % name, page('limits.rst'), re.MULTILINE)
    assert found[1] == str(getattr(cls, name))


def read_setup():
    setup = configparser.ConfigParser()
    setup.read(os.path.join(HERE, 'setup.cfg'), encoding='utf-8')
    return setup


def test_the_newest_heading_of_the_changes_is_the_version():
    newest = re.search(r'^(\d[\w.]*) \(.*\)\n-+$', read(os.path.join(HERE, 'CHANGES.rst')),
                       re.MULTILINE)
    assert newest[1] == read_setup()['metadata']['version']


# What the email package raises an exception for, on some Pythons, or cannot show.
ODD_HEADERS = [
    b'=?utf-8?q?Caf=C3=A9?=', 'Café'.encode(), b'\xe9', b'=?nobodys?q?x?=', b'=?utf-8?b?x?=',
    b'=?utf-8?q?=', b'=?utf-8?q?x=0a=0dy?=', b'"', b'<', b'a@[', b'=?utf-8?q?x?=@y,<>:;', b'']

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


def said_by(program, last):
    """What the program printed, with the client's address as the documents show it."""
    return '\n'.join(program.lines_to(last)).replace("X-Peer: ::1'", "X-Peer: 127.0.0.1'") + '\n'


END_OF_MESSAGE = '------------ END MESSAGE ------------'


class TestTutorial:
    def test_see_a_message(self, start, run_python, tmp_path):
        program = start(block('debugging'))
        name = save_block(tmp_path, 'tutorial-send', port_1025=program.port)
        assert shlex.split(block('tutorial-send-command')) == ['python', name]
        assert run_python(name).stdout == ''
        assert said_by(program, END_OF_MESSAGE) == block('tutorial-printed')
        assert program.interrupt() == (0, '', '')

    def test_do_something_with_messages(self, start, run_python, tmp_path):
        save_block(tmp_path, 'tutorial-subjects')
        program = start(block('tutorial-subjects-command'))
        run_python(save_block(tmp_path, 'tutorial-send', port_1025=program.port))
        assert program.line() + '\n' == block('tutorial-subjects-printed')

    def test_no_subject_is_refused(self, start, tmp_path):
        save_block(tmp_path, 'tutorial-subjects')
        program = start(block('tutorial-subjects-command'), PYTHONIOENCODING='ascii')
        for subject in ODD_HEADERS:
            post_message(program.address, message=b'Subject: %s\r\n\r\n' % subject)
            assert ' about ' in program.line()

    def test_change_the_dialogue(self, start, run_python, tmp_path):
        save_block(tmp_path, 'tutorial-subjects')
        save_block(tmp_path, 'tutorial-channel')
        program = start(block('tutorial-channel-command'))
        sent = run_python(save_block(tmp_path, 'tutorial-channel-send', port_1025=program.port))
        assert sent.stdout == block('tutorial-channel-refused')
        assert program.line() + '\n' == block('tutorial-channel-printed')

    def test_catch_mail_in_a_test_suite(self, run_python, tmp_path):
        name = save_block(tmp_path, 'recipe-pytest')
        install, run = block('tutorial-pytest').splitlines()
        assert (install, shlex.split(run)) == ('pip install pytest', ['pytest', name])
        outcome = run_python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'error',
                             '-W', 'ignore:The asyn', name)
        assert outcome.returncode == 0, outcome.stdout
        assert block('tutorial-pytest-printed').strip() in outcome.stdout


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

    # Breakpoint: 3.12.
    @pytest.mark.skipif(sys.version_info < (3, 12), reason='it has them')
    def test_the_error_messages_are_those_that_people_see(self):
        for message in block('error-texts').splitlines():
            outcome = subprocess.run(
                [sys.executable, '-I', '-S', '-c', 'import ' + message.split("'")[1]],
                stderr=subprocess.PIPE, encoding='utf-8')
            assert outcome.stderr.splitlines()[-1] == message


@pytest.mark.slow
def test_the_benchmark_is_where_the_manual_says():
    command = shlex.split(block('benchmark'))
    subprocess.run([sys.executable, *command[1:], '--help'], cwd=HERE, check=True, timeout=60,
                   stdout=subprocess.DEVNULL)


# The recipes

def test_limits_are_changed_as_the_manual_says(start, tmp_path):
    save_block(tmp_path, 'change-limits')
    program = start('python -m smtpd -n -c patient.PatientServer localhost:0')
    with smtplib.SMTP(*program.address, timeout=30) as client:
        client.helo('client.example')
        client.docmd('MAIL', 'FROM:<a@example.com>')
        answers = [client.docmd('RCPT', 'TO:<b%d@example.com>' % number) for number in range(6)]
    assert [code for code, text in answers] == [250] * 5 + [452]


def test_the_recipe_with_a_list_ends_after_three_messages(start, tmp_path):
    program = start(['python', save_block(tmp_path, 'recipe-list')])
    for name in 'abc':
        post_message(program.address, [name + '@example.com', 'd@example.com'], b'12345\r\n')
    assert program.process.wait(30) == 0
    assert program.output.read().decode().splitlines() == [
        'j@example.com -> %s@example.com, d@example.com 5 octets' % name for name in 'abc']


def test_the_recipe_with_a_maildir_keeps_messages(start, tmp_path):
    save_block(tmp_path, 'recipe-maildir')
    program = start(block('recipe-maildir-command'))
    post_message(program.address, ['you@example.com', 'they@example.com'])
    assert program.interrupt() == (0, '', '')
    kept, = mailbox.Maildir(str(tmp_path / 'mail'), create=False)
    assert kept['Return-Path'] == '<j@example.com>'
    assert kept.get_all('Delivered-To') == ['you@example.com', 'they@example.com']
    assert kept['Subject'] == '=?utf-8?q?Caf=C3=A9?='
    assert kept.get_payload(decode=True) == 'Zwei Cafés, bitte.'.encode('iso-8859-1')


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


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_the_recipe_for_people_shows_all_mail(start, tmp_path, encoding):
    save_block(tmp_path, 'recipe-readable')
    program = start(block('recipe-readable-command'), PYTHONIOENCODING=encoding)
    for header in [
            *[name + odd for name in (b'From: ', b'Subject: ') for odd in ODD_HEADERS],
            b'Content-Type: text/plain; charset=nobodys',
            b'Content-Type: text/plain; charset="\xe9"', b'Content-Type: text/plain; =',
            b'Content-Type: ;', b'Content-Type: multipart/mixed',
            b'Content-Type: multipart/mixed; boundary=x', b'Content-Transfer-Encoding: base64',
            b'Content-Transfer-Encoding: nobodys', b'no header', b'Date: 99', b'\xff: \xff']:
        post_message(program.address, message=header + b'\r\n\r\n--x\r\n\r\nHell\xf6.\r\nHello.')
        post_message(program.address, message=b'Subject: the next\r\n\r\n')
        assert program.lines_to('Subject: the next')


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


def test_the_recipe_with_an_own_command_answers_it(start, tmp_path):
    save_block(tmp_path, 'recipe-command')
    program = start(block('recipe-command-command'))
    with RawClient(program.address) as client:
        client.reply()
        assert client.say(b'XFOO bar') == b'250 BAR\r\n'
        assert client.say(b'xfoo') == b'501 Syntax: XFOO text\r\n'
        assert client.say(b'XBAR') == b'500 Error: command "XBAR" not recognized\r\n'


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
         (b'MAIL FROM:<a@example.com> AUTH', b'501 Syntax: MAIL FROM: <address> '
                                             b'[SP <mail-parameters>]'),
         (b'MAIL FROM:<a@example.com> ' + b' '.join([b'AUTH=' + b'x' * 500] * 2), b'250 OK'),
         (b'RCPT TO:<a@example.com> AUTH=<>',
          b'555 RCPT TO parameters not recognized or not implemented'),
         (b'RSET', b'250 OK'),
         (b'MAIL FROM:<a@example.com> SIZE=10 auth=<>', b'250 OK'),
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


class TestRecipeStartTLSWithAuth:
    @pytest.fixture
    def program(self, certificate, start, tmp_path):
        for name in 'recipe-auth', 'recipe-starttls', 'recipe-starttls-auth':
            save_block(tmp_path, name)
        return start(block('recipe-starttls-auth-command'))

    def test_a_client_logs_in_through_tls(self, program, certificate):
        with smtplib.SMTP(*program.address, timeout=30) as client:
            client.starttls(context=certificate)
            client.login('alice', 'open sesame')
            assert client.sendmail('j@example.com', ['you@example.com'], RECIPE_MESSAGE,
                                   ['AUTH=<>']) == {}

    def test_a_client_without_tls_keeps_its_password(self, program):
        """RFC 4954, 4: what is not offered is not sent."""
        with smtplib.SMTP(*program.address, timeout=30) as client:
            with pytest.raises(smtplib.SMTPNotSupportedError):
                client.login('alice', 'open sesame')
            assert client.docmd('AUTH', 'PLAIN') == (538, b'Encryption required')

    @pytest.mark.real
    def test_swaks_sends_no_password_in_clear(self, program):
        """Nor does it without --tls, where it is told to log in."""
        swaks = find_tool('swaks', 'swaks')
        outcome = subprocess.run(
            [swaks, '--server', '%s:%d' % program.address, '--to', 'you@example.com',
             '--auth', 'PLAIN', '--auth-user', 'alice', '--auth-password', 'open sesame'],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8', timeout=60)
        sent = [line for line in outcome.stdout.splitlines() if line.startswith(' -> ')]
        assert sent and not [line for line in sent if 'AUTH' in line]


def test_the_recipe_for_parameters_keeps_them(start, tmp_path):
    save_block(tmp_path, 'recipe-extension')
    program = start(block('recipe-extension-command'))
    with RawClient(program.address) as client:
        client.reply()
        assert b'250-DSN\r\n' in client.say(b'EHLO c')
        assert client.say(b'MAIL FROM:<a@b.example> NOTIFY=NEVER')[:3] == b'555'
        assert client.say(b'MAIL FROM:<a@b.example> RET')[:3] == b'501'
        assert client.say(b'MAIL FROM:<a@b.example> RET=HDRS ENVID=Qq314') == b'250 OK\r\n'
        assert client.say(b'RCPT TO:<c@d.example> RET=HDRS')[:3] == b'555'
        assert client.say(b'RCPT TO:<c@d.example> NOTIFY')[:3] == b'501'
        assert client.say(b'RCPT TO:<c@d.example> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;C@d.example'
                          ) == b'250 OK\r\n'
        assert client.say(b'RCPT TO:<e@f.example>') == b'250 OK\r\n'
        client.say(b'DATA')
        assert client.say(b'.') == b'250 OK\r\n'
    lines = program.lines_to(END_OF_MESSAGE)
    assert "mail options: ['RET=HDRS', 'ENVID=QQ314']" in lines
    assert "rcpt options: ['NOTIFY=SUCCESS,DELAY ORCPT=rfc822;C@d.example', '']" in lines


def test_the_command_for_a_proxy_relays(start):
    with serving(localaddr=('localhost', 0)) as upstream:
        program = start(block('recipe-proxy-command', port_25=upstream.port_number))
        post_message(program.address)
        peer, mailfrom, rcpttos, data, kwargs = upstream.messages[0]
    assert (mailfrom, rcpttos) == ('j@example.com', ['you@example.com'])
    assert b'\nX-Peer: ' in data
    assert data.endswith(b'\n\nZwei Caf=E9s, bitte.')


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
            assert client.say(b'RCPT TO:you@example.com') == b'250 OK\r\n'


def test_the_gateway_looks_at_no_parameter(tmp_path):
    text = (tmp_path / save_block(tmp_path, 'recipe-gateway')).read_text()
    names = {'__name__': 'gateway'}
    exec(text, names)

    class Channel(names['GatewayChannel']):
        def _getparams(self, params):
            return {}

    server = StubServer()
    channel = make_channel(server, Channel)
    feed(channel, b'EHLO c\r\n', b'MAIL FROM:<a@example.com>\r\n')
    assert feed(channel, b'RCPT TO:<evil@example.net> ORCPT=rfc822;x@example.com\r\n'
                ) == b'550 Relaying denied\r\n'
    assert feed(channel, b'RCPT TO:<x@example.com> ORCPT=rfc822;x@example.net\r\n'
                ) == b'250 OK\r\n'


def test_the_server_in_a_thread_serves_test_suites(run_python, tmp_path):
    for name in 'recipe-thread', 'recipe-thread-unittest', 'recipe-thread-pytest':
        save_block(tmp_path, name)
    for command, done in zip(block('recipe-thread-command').splitlines(), ('OK', '1 passed')):
        outcome = run_python('-W', 'ignore', *shlex.split(command)[1:])
        assert outcome.returncode == 0 and done in outcome.stdout, outcome.stdout


def test_the_recipe_for_logging_logs_dialogue_and_tracebacks(start, tmp_path):
    name = save_block(tmp_path, 'recipe-log')
    with open(tmp_path / name, 'a', encoding='utf-8') as file:
        file.write('LoggedServer.process_message = lambda *args, **kwargs: 1 / 0\n')
    program = start(block('recipe-log-command'))
    with pytest.raises(smtplib.SMTPDataError):
        post_message(program.address)
    _, _, errors = program.interrupt()
    assert re.search(r'^\d{4}-\S+ \S+ DEBUG .*sender: j@example.com$', errors, re.MULTILINE)
    assert re.search(r'^\d{4}-\S+ \S+ ERROR .*ZeroDivisionError', errors, re.MULTILINE | re.DOTALL)



@pytest.mark.parametrize('name, module, package, subject', [
    pytest.param('recipe-django', 'django', 'Django', 'Hello from Django',
                 marks=pytest.mark.real),
    pytest.param('recipe-flask', 'flask_mail', 'Flask-Mail', 'Hello from Flask',
                 marks=pytest.mark.real),
    ('recipe-logging', 'logging', 'logging', 'Hello from logging')])
def test_mail_of_frameworks_arrives(name, module, package, subject, start, tmp_path, run_python):
    need_module(module, package)
    program = start(block('debugging'))
    outcome = run_python('-W', 'ignore', save_block(tmp_path, name, port_1025=program.port))
    assert outcome.returncode == 0, outcome.stdout
    lines = program.lines_to('------------ END MESSAGE ------------')
    assert "b'Subject: %s'" % subject in lines
    assert "b'It works.'" in lines


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
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    analyze = find_tool('systemd-analyze', 'systemd')
    unit = tmp_path / save_block(tmp_path, 'recipe-systemd')
    unit.write_text(unit.read_text().replace('/opt/smtpd/bin/python', sys.executable))
    outcome = subprocess.run([analyze, 'verify', str(unit)], timeout=60, encoding='utf-8',
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert unit.name not in outcome.stdout
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.real
def test_haproxy_passes_over_a_process_that_died_and_ctrl_c_ends_all(start, tmp_path):
    find_tool('haproxy', 'haproxy')
    save_block(tmp_path, 'recipe-maildir')
    with held_port() as front, held_port() as one, held_port() as two:
        for name in 'recipe-haproxy-cfg', 'recipe-haproxy-script':
            save_block(tmp_path, name, port_1025=front, port_2501=one, port_2502=two)
        script = start(block('recipe-haproxy-command'))
        for _ in waits():  # until both serve: HAProxy takes them in turn
            with contextlib.suppress(OSError, smtplib.SMTPException):
                for port in front, one, two:
                    post_message(('localhost', port))
                break
        with open('/proc/%d/task/%d/children' % (2 * (script.process.pid,))) as file:
            os.kill(int(file.read().split()[0]), signal.SIGKILL)
        for _ in range(4):
            post_until_accepted(('localhost', front))
        script.send(signal.SIGINT)
        script.process.wait(30)
        for _ in waits():
            try:
                socket.create_connection(('localhost', two)).close()
            except OSError:
                break


def post_until_accepted(address):
    """What a mail program does: 4yz and a lost connection mean "try again"."""
    for _ in waits():
        with contextlib.suppress(OSError, smtplib.SMTPServerDisconnected):
            return post_message(address)
