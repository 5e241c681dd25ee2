"""README.rst: each code block is run from the page itself."""
import asyncore
import configparser
import contextlib
import io
import mailbox
import os
import re
import shlex
import shutil
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import threading

import pytest

import smtpd
from tests.support import HERE, RawClient, find_tool, need_module, serving

README = os.path.join(HERE, 'README.rst')
STUBS = os.path.join(os.path.dirname(os.path.abspath(smtpd.__file__)), 'smtpd-stubs')


def read_readme():
    with open(README, encoding='utf-8') as file:
        return file.read()


def read_blocks():
    """{name: (language, text)} of README's code blocks."""
    blocks = {}
    for found in re.finditer(r'^\.\. code-block:: (\w+)\n   :name: ([\w-]+)\n\n'
                             r'((?:   .*\n|\n)+)', read_readme(), re.MULTILINE):
        language, name, text = found.groups()
        assert name not in blocks
        blocks[name] = language, re.sub('^   ', '', text, flags=re.MULTILINE).strip() + '\n'
    return blocks


BLOCKS = read_blocks()
EXECUTED = {'mypy-ini'}  # by test_types.py; each test below adds what it executes


def executes(*names):
    """Says which of README's blocks the decorated test executes."""
    EXECUTED.update(names)
    return lambda test: test


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
# its port on stderr, so that nobody has to wait for it by the clock.
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
        # Whoever waits in vain for a line shall get the end of the file.
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
        self.output.close()
        self.process.stdout.close()
        self.process.stderr.close()
        self.process.wait()

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
        return (self.process.wait(20), self.output.read().decode(),
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


def test_every_code_block_of_the_readme_is_executed_here():
    assert set(BLOCKS) - EXECUTED == set()
    assert EXECUTED - set(BLOCKS) == set()


def test_the_readme_renders_without_a_warning_and_shows_no_other_code():
    need_module('docutils')
    import docutils.core
    import docutils.nodes

    warnings_given = io.StringIO()
    document = docutils.core.publish_doctree(
        read_readme(), source_path=README, settings_overrides={
            'report_level': 2, 'warning_stream': warnings_given, 'syntax_highlight': 'none'})
    assert warnings_given.getvalue() == ''
    code = [node.astext().strip() for node in document.findall(docutils.nodes.literal_block)]
    assert sorted(code) == sorted(text.strip() for _, text in BLOCKS.values())
    assert not list(document.findall(docutils.nodes.doctest_block))


def test_the_readme_keeps_the_order_of_a_readers_questions():
    expected = [
        'pip install pysmtpd\n', 'pysmtpd; python_version >= "3.12"', 'asyncore.loop()',
        'python -m smtpd -n -c DebuggingServer localhost:1025\n', '3.9 to 3.15', 'Mailpit',
        'pip install pysmtpd && python -m smtpd', 'pip install tox && tox', 'The interface\n==',
        'The command line\n==', 'Limits, and how to change them\n==', 'Recipes\n==',
        'Differences from the standard library\n==', 'Security notes\n==',
        'Living beside other packages\n==', 'Figures\n==', 'Not done, not known\n==']
    text = read_readme()
    positions = [text.find(each) for each in expected]
    assert -1 not in positions
    assert positions == sorted(positions)


def public_names(cls, base):
    return {name for name in vars(cls) if not name.startswith('_') and not hasattr(base, name)}


def test_the_readme_tells_all_of_the_public_interface():
    documented = set(re.findall(r'``([^`]+)``', read_readme()))
    words = {word for each in documented for word in re.findall(r'\w+', each)}
    names = set(smtpd.__all__)
    names |= public_names(smtpd.SMTPServer, asyncore.dispatcher)
    names |= {name for name in vars(smtpd.SMTPChannel)
              if not name.startswith('_') and not hasattr(smtpd.asynchat.async_chat, name)}
    names |= public_names(smtpd.PureProxy, smtpd.SMTPServer)
    names |= public_names(smtpd.MailmanProxy, smtpd.PureProxy)
    for name in sorted(names - {'ac_in_buffer', 'terminator'}):  # asynchat's
        if name.startswith('smtp_') and name[5:].isupper():
            name = name[5:]
        assert name in words, name


@pytest.mark.parametrize('attribute', [
    'SMTPChannel.command_size_limit', 'SMTPChannel.idle_timeout_seconds',
    'SMTPChannel.recipient_limit', 'SMTPChannel.error_limit', 'SMTPChannel.unsent_reply_limit',
    'SMTPServer.listen_backlog', 'SMTPServer.accepts_per_event',
    'PureProxy.upstream_timeout_seconds', 'PureProxy.hop_limit'])
def test_the_defaults_in_the_readme_are_those_of_the_module(attribute):
    class_name, name = attribute.split('.')
    found = re.search(r'^``%s``(?: \[\d\]_)? +(\S+) ' % name, read_readme(), re.MULTILINE)
    assert found[1] == str(getattr(getattr(smtpd, class_name), name))


def read_setup():
    setup = configparser.ConfigParser()
    setup.read(os.path.join(HERE, 'setup.cfg'), encoding='utf-8')
    return setup


def test_the_newest_heading_of_the_changes_is_the_version():
    with open(os.path.join(HERE, 'CHANGES.rst'), encoding='utf-8') as file:
        newest = re.search(r'^(\d[\w.]*) \(\d{4}-\d\d-\d\d\)\n-+$', file.read(), re.MULTILINE)
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
    assert with_port.line() == repr(RECIPE_MESSAGE[:-2].replace(b'\r\n', b'\n'))


@executes('debugging')
def test_the_debugging_server_prints_a_message(start):
    program = start(block('debugging'))
    post_message(program.address)
    lines = program.lines_to('------------ END MESSAGE ------------')
    assert lines[0] == '---------- MESSAGE FOLLOWS ----------'
    assert "b'Subject: =?utf-8?q?Caf=C3=A9?='" in lines
    assert program.interrupt() == (0, '', '')


@executes('which-one')
def test_one_line_tells_which_module_it_is(run_python):
    command = shlex.split(block('which-one'))
    assert command[0] == 'python'
    outcome = run_python('-W', 'ignore', *command[1:])
    assert os.path.samefile(outcome.stdout.strip(), smtpd.__file__)


@pytest.fixture
def wheel(tmp_path):
    """The directory of a wheel built from a copy of the source, which the build would litter."""
    if not os.path.exists(os.path.join(HERE, 'smtpd.py')):
        pytest.skip('the source was moved away')
    source = tmp_path / 'source'
    shutil.copytree(os.path.join(HERE, 'smtpd-stubs'), source / 'smtpd-stubs')
    for name in 'smtpd.py', 'setup.cfg', 'pyproject.toml', 'README.rst', 'LICENSE':
        shutil.copy(os.path.join(HERE, name), source)
    subprocess.run([sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check', 'wheel',
                    '--no-deps', '--wheel-dir', str(tmp_path / 'wheel'), str(source)],
                   check=True, timeout=300)
    return tmp_path / 'wheel'


@pytest.mark.slow
@executes('install', 'try-it')
def test_a_new_user_installs_and_runs_it(wheel, tmp_path, user_environment):
    install, run = block('try-it').strip().split(' && ')
    assert install == block('install').strip()
    assert run == block('debugging').strip()
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(tmp_path / 'fresh')],
                   check=True)
    python = shutil.which('python', path=str(tmp_path / 'fresh' / 'bin'))
    pip = tmp_path / 'fresh' / 'bin' / 'pip'  # Debian's Pythons have none to put there
    pip.write_text('#!/bin/sh\nexec %s -m pip --python %s "$@"\n' % (sys.executable, python))
    pip.chmod(0o755)
    site = user_environment['PYTHONPATH'].split(os.pathsep)[0]  # without our source
    environment = dict(user_environment, PYTHONPATH=site, PIP_QUIET='1',
                       PIP_FIND_LINKS=str(wheel), PIP_DISABLE_PIP_VERSION_CHECK='1',
                       PATH=os.path.dirname(python) + os.pathsep + os.environ['PATH'])
    subprocess.run(install, shell=True, check=True, cwd=tmp_path, timeout=300,
                   env=dict(environment, PYTHONPATH=''))
    which = subprocess.run([python, '-W', 'ignore', *shlex.split(block('which-one'))[1:]],
                           cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE)
    # Breakpoint: 3.12. Below it the standard library's own wins, as README says.
    assert (b'site-packages' in which.stdout) is (sys.version_info >= (3, 12))
    if sys.version_info >= (3, 12):
        with Program([python, *shlex.split(run)[1:]], tmp_path, environment) as program:
            post_message(program.address)
            program.lines_to('------------ END MESSAGE ------------')


@pytest.mark.slow
@executes('test-it')
def test_tox_knows_what_to_do_on_every_python():
    need_module('tox')
    install, run = block('test-it').strip().split(' && ')
    assert (install, run) == ('pip install tox', 'tox')
    listed = subprocess.run([sys.executable, '-m', run, 'list', '--no-desc'], cwd=HERE, check=True,
                            stdout=subprocess.PIPE, encoding='utf-8').stdout.split()
    assert {'py39', 'py310', 'py311', 'py312', 'py313', 'py314', 'py315'} <= set(listed)


@pytest.mark.slow
@executes('benchmark')
def test_the_benchmark_is_where_the_readme_says():
    command = shlex.split(block('benchmark'))
    subprocess.run([sys.executable, *command[1:], '--help'], cwd=HERE, check=True, timeout=60,
                   stdout=subprocess.DEVNULL)


# The recipes

@executes('change-limits')
def test_limits_are_changed_as_the_readme_says(start, tmp_path):
    save_block(tmp_path, 'change-limits')
    program = start('python -m smtpd -n -c patient.PatientServer localhost:0')
    with smtplib.SMTP(*program.address, timeout=30) as client:
        client.helo('client.example')
        client.docmd('MAIL', 'FROM:<a@example.com>')
        answers = [client.docmd('RCPT', 'TO:<b%d@example.com>' % number) for number in range(6)]
    assert [code for code, text in answers] == [250] * 5 + [452]


@executes('recipe-pytest')
def test_the_recipe_for_pytest_passes(run_python, tmp_path):
    file_name = save_block(tmp_path, 'recipe-pytest')
    outcome = run_python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'error',
                         '-W', 'ignore:The asyn', file_name)
    assert outcome.returncode == 0, outcome.stdout
    assert '1 passed' in outcome.stdout


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
        [(b'EHLO c', None), (b'AUTH', b'504 Error: only PLAIN is known here'),
         (b'AUTH LOGIN', b'504 Error: only PLAIN is known here'),
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
    """cert.pem and key.pem made as README says; returns a client's context that trusts them."""
    find_tool('openssl', 'openssl')
    subprocess.run(shlex.split(block('recipe-starttls-certificate')), cwd=tmp_path, check=True,
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

    def test_a_silent_handshake_holds_up_nobody(self, program):
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
    reserved = socket.socket()
    with reserved:
        if which == 'new':
            need_module('aiosmtpd')
            # Its Controller cannot do with port 0. Bound by two, listened on by one.
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(('127.0.0.1', 0))
            file_name = save_block(tmp_path, 'recipe-aiosmtpd-new',
                                   port_1025=reserved.getsockname()[1])
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
    """HAProxy, set up as README says, before two processes that keep messages in a Maildir."""

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
