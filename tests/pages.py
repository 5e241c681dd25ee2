"""The code blocks of README.rst and the manual, and how a user runs them."""
import contextlib
import os
import re
import shlex
import signal
import smtplib
import subprocess
import sys
import threading

import pytest

import smtpd
from tests.support import HERE

README = os.path.join(HERE, 'README.rst')
DOCUMENTS = [README, *sorted(
    os.path.join(directory, name) for directory, _, names in os.walk(os.path.join(HERE, 'docs'))
    for name in names if name.endswith('.rst'))]


def read(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


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
import socket
import sys

socket.getfqdn = lambda name='': 'mx.example'


def telling_loop(timeout=30.0, use_poll=False, map=None, count=None):
    asyncore.loop = loop
    for each in (asyncore.socket_map if map is None else map).values():
        if each.accepting:
            print('PORT', each.socket.getsockname()[1], file=sys.stderr, flush=True)
    loop(timeout, use_poll, map, count)


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
            command, cwd=directory, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self.output = self.process.stdout
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
        self.errors += self.process.communicate()[1]
        print('%s ended with %s:\n%s' % (  # pytest shows it if the test fails
            self.process.args, self.process.returncode, self.errors.decode()), file=sys.stderr)

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


def said_by(program, last):
    """What the program printed, with the client's address as the documents show it."""
    return '\n'.join(program.lines_to(last)).replace("X-Peer: ::1'", "X-Peer: 127.0.0.1'") + '\n'


END_OF_MESSAGE = '------------ END MESSAGE ------------'
