"""Servers that meet fork(), a lack of everything, and other systems than this one."""
import asyncore
import contextlib
import errno
import gc
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback

import pytest

import smtpd
from tests.support import (
    FQDN,
    PEER,
    STRICT,
    FakeConnection,
    Listener,
    RawClient,
    RecordingServer,
    WaitingServer,
    channels_of,
    environment,
    greet,
    has_input,
    held_port,
    reset,
    running,
    serving,
    small_buffers,
    steps,
    traced_memory,
    turning,
    variant,
)

BANNER = ('220 %s %s\r\n' % (FQDN, smtpd.__version__)).encode()
TO_DATA = b'EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n'
NEXT_MESSAGE = b'MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n'

in_map_and_selector = pytest.mark.parametrize(
    'selector', [False, True], ids=['in the map', 'in the selector'])
both_loops = pytest.mark.parametrize('use_poll', [False, True], ids=['select', 'poll'])
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork() here')
needs_epoll = pytest.mark.skipif(not hasattr(select, 'epoll'), reason='no epoll here')
needs_limits = pytest.mark.skipif(os.name != 'posix', reason='no resource limits here')
needs_signals = pytest.mark.skipif(os.name != 'posix', reason='no SIGINT to a process here')


def post(client, text=b'x'):
    """Send a message after EHLO; returns the reply to its data."""
    replies = [client.say(line) for line in (
        b'MAIL FROM:<a@b>', b'RCPT TO:<c@d>', b'DATA', text + b'\r\n.')]
    assert replies[:3] == [b'250 OK\r\n', b'250 OK\r\n',
                           b'354 End data with <CR><LF>.<CR><LF>\r\n']
    return replies[3]


@contextlib.contextmanager
def script(text, options=STRICT, prelude=None, **kwargs):
    """A process that runs a script, which first prints its port: yields it and its address.

    It ends with its standard input.
    """
    command = [*options, '-c', (prelude or PRELUDE) + text]
    with running(command, stdin=subprocess.PIPE, **kwargs) as process:
        first = process.stdout.readline()
        assert first, process.stderr.read().decode()
        yield process, ('127.0.0.1', int(first))


PRELUDE = '''
import encodings.ascii  # PyPy takes it from a file when it is first needed
import asyncore, errno, gc, os, signal, socket, sys, threading, time
import smtpd
sys.stderr.reconfigure(line_buffering=True)  # PyPy's is not, on a pipe
signal.alarm(60)
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=lambda: signal.alarm(60))

class Server(smtpd.SMTPServer):
    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        return '250 of %d' % os.getpid()

def hoard(up_to=None):
    """Take all descriptors, or those up to a number."""
    taken = []
    try:
        while not (up_to and taken and taken[-1] >= up_to):
            taken.append(os.dup(0))
    except OSError:
        pass
    return taken

def limit(count):
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))

class Channel(smtpd.SMTPChannel):
    hoarded = []

    def smtp_XHOARD(self, arg):
        self.hoarded += hoard(int(arg or 0))
        self.push('250 OK')

    def smtp_XFREE(self, arg):
        while self.hoarded:
            os.close(self.hoarded.pop())
        self.push('250 OK')

    def smtp_XCLOSE(self, arg):
        self.smtp_server.close()
        self.push('250 OK')

    def smtp_XFAIL(self, arg):
        raise ZeroDivisionError('on purpose')

Server.channel_class = Channel

def tell_port(server):
    print(server.socket.getsockname()[1], flush=True)

def serve():
    global server
    server = Server(('127.0.0.1', 0), None)
    tell_port(server)
    asyncore.loop()
'''
PLAIN = [sys.executable]  # from 3.12 on, fork() beside a thread warns


# ---------------------------------------------------------------------------------------------
# The log

@pytest.mark.parametrize('error', [
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)), MemoryError(), ImportError('no'),
    RecursionError('too deep')], ids=lambda error: type(error).__name__)
def test_a_traceback_that_cannot_be_had_ends_nothing(error, monkeypatch, capsys):
    def format_exc():
        raise error

    def fail(self, arg):
        raise ZeroDivisionError('on purpose')

    monkeypatch.setattr(traceback, 'format_exc', format_exc)
    with serving(variant(channel={'smtp_XFAIL': fail})) as server, \
            greet(server, b'EHLO x') as client:
        assert client.say(b'XFAIL') == b'451 Internal confusion\r\n'
        assert client.say(b'NOOP') == b'250 OK\r\n'
    assert 'ZeroDivisionError: on purpose' in capsys.readouterr().err


@needs_limits
def test_a_fault_without_descriptors_ends_nothing():
    """traceback imports modules when it is first used."""
    text = '''
limit(50)
serve()
'''
    with script(text) as (process, address), greet(address, b'EHLO x') as client:
        assert client.say(b'XHOARD') == b'250 OK\r\n'
        assert client.say(b'XFAIL') == b'451 Internal confusion\r\n'
        assert client.say(b'XFREE') == b'250 OK\r\n'


# Started by root below a folder of root's own: nobody may import nothing.
AS_NOBODY = '''
import runpy

class Locked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        raise PermissionError(errno.EACCES, 'no right to import', name)

os.setgroups = os.setgid = lambda number: None
os.setuid = lambda number: sys.meta_path.insert(0, Locked)
real_listen = asyncore.dispatcher.listen
def listen(self, num):
    real_listen(self, num)
    tell_port(self)
asyncore.dispatcher.listen = listen
sys.argv[1:] = ['-c', %r, '127.0.0.1:0', '127.0.0.1:9']
runpy.run_module('smtpd', run_name='__main__', alter_sys=True)
'''
needs_users = pytest.mark.skipif(os.name != 'posix', reason='no user nobody here')


@needs_users
def test_a_fault_is_logged_whole_though_nobody_may_read_what_that_takes(tmp_path):
    (tmp_path / 'own.py').write_text(
        "import smtpd\n"
        "class Channel(smtpd.SMTPChannel):\n"
        "    smtp_XFAIL = lambda self, arg: 1 / 0\n"
        "class Server(smtpd.SMTPServer):\n"
        "    channel_class = Channel\n")
    with script(AS_NOBODY % 'own.Server', env=environment(tmp_path)) as (process, address):
        with greet(address, b'EHLO x') as client:
            assert client.say(b'XFAIL') == b'451 Internal confusion\r\n'
            assert client.say(b'NOOP') == b'250 OK\r\n'
        process.terminate()
        log = process.stderr.read().decode()
    assert 'Traceback' in log and 'ZeroDivisionError' in log


@needs_users
def test_a_proxy_knows_who_got_a_message_though_nobody_may_read_what_that_takes(
        upstream, tmp_path):
    upstream.faults = {'.': [None, '451 4.3.0 Not now']}
    (tmp_path / 'own.py').write_text(
        'import smtpd\n'
        'class Lists(smtpd.MailmanProxy):\n'
        '    mailman_lmtp_address = %r, %r\n' % upstream.address)
    with script(AS_NOBODY % 'own.Lists', env=environment(tmp_path)) as (process, address), \
            greet(address, b'EHLO x') as client:
        assert steps(client, recipients=[b'<a@x>', b'<b@x>'])[-1] == '451 4.3.0 Not now'
        assert steps(client, recipients=[b'<a@x>', b'<b@x>'])[-1] == '250 OK'
    assert [recipients for _, recipients, _ in upstream.messages] == [['a@x'], ['b@x']]


def test_a_log_info_that_is_patched_into_asyncore_gets_the_log(monkeypatch, capsys):
    """As zope.server does."""
    logged = []
    monkeypatch.setattr(asyncore.dispatcher, 'log_info',
                        lambda self, message, type='info': logged.append((message, type)))
    server = RecordingServer(map={})
    server.log_info('of the server')
    smtpd.SMTPChannel(server, FakeConnection(), PEER, map={}).log_info('of a channel', 'error')
    server.close()
    assert logged == [('of the server', 'info'), ('of a channel', 'error')]
    assert capsys.readouterr() == ('', '')


class Untold(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize('error, told', [
    (ZeroDivisionError('on purpose'), 'ZeroDivisionError: on purpose'), (Untold(), 'Untold')])
def test_a_log_info_that_fails_ends_nothing(error, told, capsys):
    def log_info(self, *args):
        raise error

    def fail(self, arg):
        raise KeyError('of the command')

    channel = {'smtp_XFAIL': fail, 'log_info': log_info}
    with serving(variant(channel=channel)) as server, greet(server, b'EHLO x') as client:
        assert client.say(b'XFAIL') == b'451 Internal confusion\r\n'
        assert client.say(b'NOOP') == b'250 OK\r\n'
    log = capsys.readouterr().err
    assert "KeyError: 'of the command'" in log and log.splitlines()[-1] == told


# ---------------------------------------------------------------------------------------------
# fork()

@needs_fork
@in_map_and_selector
def test_a_server_that_is_made_before_fork_answers_in_each_worker(selector):
    text = '''
Server.process_message_threads = 2
Server.channels_in_selector = %r
server = Server(('127.0.0.1', 0), None)
workers = []
for _ in range(2):
    worker = os.fork()
    if not worker:
        asyncore.loop()
    workers.append(worker)
tell_port(server)
sys.stdin.read()
for worker in workers:
    os.kill(worker, signal.SIGTERM)
''' % selector
    with script(text, PLAIN) as (process, address), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(greet(address, b'EHLO x')) for _ in range(10)]
        for _ in range(5):
            for client in clients:
                client.send(NEXT_MESSAGE)
            for client in clients:
                assert [client.reply()[:3] for _ in range(4)] == [b'250', b'250', b'354', b'250']
        process.communicate()


@needs_fork
@pytest.mark.parametrize('threads', [0, 1], ids='{} threads'.format)
@in_map_and_selector
def test_a_child_that_closes_all_leaves_its_parents_sessions_alone(selector, threads):
    text = '''
class Forking(Server):
    channels_in_selector = %r
    process_message_threads = %r
    def process_message(self, *args, **kwargs):
        child = os.fork()
        if not child:
            asyncore.close_all()
            os._exit(len(asyncore.socket_map))
        return '250 %%d' %% os.waitpid(child, 0)[1]

server = Forking(('127.0.0.1', 0), None)
tell_port(server)
asyncore.loop()
''' % (selector, threads)
    with script(text, PLAIN) as (process, address), \
            greet(address, b'EHLO x') as client, greet(address, b'EHLO x') as other:
        assert [post(client) for _ in range(2)] == 2 * [b'250 0\r\n']
        assert client.say(b'NOOP') == other.say(b'NOOP') == b'250 OK\r\n'


SERVING_CHILD = '''
class Forking(Channel):
    def smtp_XFORK(self, arg):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            self.close()
        else:
            self.begin_child()
            self.push('250 OK')

    def begin_child(self):
        pass
'''


@needs_fork
@in_map_and_selector
def test_a_child_serves_the_sessions_that_it_inherits(selector):
    """And the parent keeps out of it: it waits."""
    text = '''
class Inheriting(Forking):
    def smtp_XEXEC(self, arg):
        """What a program that this one runs would inherit."""
        numbers = range(3, 50)
        self.push('250 %%s' %% [each for each in numbers if is_inherited(each)])

def is_inherited(descriptor):
    try:
        return os.get_inheritable(descriptor)
    except OSError:
        return False

Server.channel_class = Inheriting
Server.channels_in_selector = %r
Server.process_message_threads = 1
serve()
''' % selector
    with script(SERVING_CHILD + text, PLAIN) as (process, address):
        with greet(address, b'EHLO x') as client, greet(address, b'EHLO x') as other:
            parent = post(client)
            assert client.say(b'XFORK') == b'250 OK\r\n'
            child = post(client)
            assert child != parent and post(client) == post(other) == child
            assert client.say(b'XEXEC') == b'250 []\r\n'
            assert client.say(b'XCLOSE') == b'250 OK\r\n'
            assert client.say(b'QUIT') == other.say(b'QUIT') == b'221 Bye\r\n'
        with greet(address, b'EHLO x') as client:
            assert post(client) == parent


@needs_fork
@in_map_and_selector
def test_a_child_does_not_wait_for_the_threads_of_its_parent(selector):
    """It has not got them: its loop ends when it has closed what it inherited."""
    text = '''
class Waiting(Server):
    process_message_threads = 1
    channels_in_selector = %r
    go = threading.Event()
    def process_message(self, *args, **kwargs):
        self.go.wait()

class Forking(Channel):
    def smtp_XFORK(self, arg):
        child = os.fork()
        if not child:
            for each in gc.get_objects():
                if isinstance(each, (smtpd.SMTPServer, smtpd.SMTPChannel)):
                    each.close()
            asyncore.loop(.05)
            os._exit(len(asyncore.socket_map))
        self.push('250 %%d' %% os.waitpid(child, 0)[1])
        server.go.set()

Waiting.channel_class = Forking
server = Waiting(('127.0.0.1', 0), None)
tell_port(server)
asyncore.loop()
''' % selector
    with script(text, PLAIN) as (process, address):
        with greet(address, b'EHLO x') as waiting, greet(address, b'EHLO x') as client:
            waiting.send(NEXT_MESSAGE)
            assert [waiting.reply()[:3] for _ in range(3)] == [b'250', b'250', b'354']
            assert client.say(b'XFORK') == b'250 0\r\n'
            assert waiting.reply() == b'250 OK\r\n'


@needs_fork
def test_a_child_that_a_handler_makes_handles_no_message_that_waits_in_its_parent():
    text = '''
class Forking(Server):
    process_message_threads = 1
    go = threading.Event()
    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        if data == b'x':
            os.write(write_end, b'x')
            return '250 of %d' % os.getpid()
        self.go.wait()
        child = os.fork()  # it ends with this call
        return '250 %s' % (os.waitpid(child, 0)[1] if child else 'of the child')

def smtp_XGO(self, arg):
    server.go.set()
    self.push('250 OK')

def smtp_XCOUNT(self, arg):
    self.push('250 %d' % len(os.read(read_end, 10)))

Channel.smtp_XGO, Channel.smtp_XCOUNT = smtp_XGO, smtp_XCOUNT
read_end, write_end = os.pipe()
server = Forking(('127.0.0.1', 0), None)
tell_port(server)
asyncore.loop()
'''
    # Not under coverage, which keeps the child from ending where its thread does.
    plain = {name: value for name, value in environment().items() if name[:8] != 'COVERAGE'}
    with script(text, PLAIN, env=plain) as (process, address), greet(address) as client, \
            greet(address, b'EHLO x') as forks, greet(address, b'EHLO x') as waits:
        for each, message in (forks, NEXT_MESSAGE.replace(b'\r\nx', b'\r\nfork')), (
                waits, NEXT_MESSAGE):
            each.send(message)
            assert [each.reply()[:3] for _ in range(3)] == [b'250', b'250', b'354']
        assert client.say(b'NOOP') == client.say(b'XGO') == b'250 OK\r\n'
        assert forks.reply() == b'250 0\r\n' and waits.reply().startswith(b'250 of')
        assert client.say(b'XCOUNT') == b'250 1\r\n'


@needs_fork
@both_loops
def test_a_worker_that_closes_leaves_the_listener_to_the_others(use_poll):
    """It closes just when its loop will wait for the listener."""
    text = '''
server = Server(('127.0.0.1', 0), None)
worker = os.fork()
if not worker:
    waits, closed, ended = threading.Event(), threading.Event(), threading.Event()
    def readable():
        is_readable = smtpd.SMTPServer.readable(server)
        waits.set()
        closed.wait()
        return is_readable
    def loop():
        asyncore.loop(.05, %r)
        ended.set()
    server.readable = readable
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    waits.wait()
    server.close()
    closed.set()
    thread.join(20)
    os._exit(bool(asyncore.socket_map) or not ended.is_set())
assert os.waitpid(worker, 0)[1] == 0
tell_port(server)
asyncore.loop()
''' % use_poll
    with script(text, PLAIN) as (process, address), greet(address, b'EHLO x') as client:
        assert client.say(b'NOOP') == b'250 OK\r\n'


# ---------------------------------------------------------------------------------------------
# Descriptors that are others' by now

@pytest.mark.skipif(os.name != 'posix', reason='sockets have no descriptors here')
@pytest.mark.parametrize('files', [0, 20], ids='{} files'.format)
def test_close_leaves_files_alone_that_got_the_numbers_of_our_sockets(files):
    """python-daemon closes all descriptors that it does not know."""
    text = '''
Server.process_message_threads = 1
server = Server(('127.0.0.1', 0), None)
tell_port(server)
os.closerange(3, server.socket.fileno())
os.closerange(server.socket.fileno() + 1, 50)
files = [os.open(os.devnull, os.O_RDONLY) for _ in range(%d)]
server.close()
for file in files:
    os.fstat(file)
os.write(1, b'all there')
''' % files
    with script(text) as (process, address):
        # Not communicate(), which does not see what came with the port.
        assert process.stdout.read() == b'all there', process.stderr.read().decode()


# ---------------------------------------------------------------------------------------------
# close()

@contextlib.contextmanager
def looping(server_class, timeout=0.05, **attributes):
    """A server whose loop ends when nothing is left in its map: yields it and the thread."""
    waits = threading.Event()

    def readable(self):
        is_readable = server_class.readable(self)
        waits.set()
        return is_readable

    server = variant(server_class, readable=readable, **attributes)(map={})
    # poll(), since select() raises if it comes to a descriptor just when that is closed.
    thread = threading.Thread(target=asyncore.loop, args=(timeout, True, server._map))
    thread.start()
    try:
        assert waits.wait(20)
        yield server, thread
    finally:
        server.close()
        with contextlib.suppress(OSError):
            socket.create_connection(server.port, timeout=1).close()
        thread.join(20)
        assert not thread.is_alive()


class Given(RecordingServer):
    """Its `listener` was made elsewhere, as systemd hands one in."""

    def __init__(self, map):
        asyncore.dispatcher.__init__(self, map=map)
        self.set_socket(self.listener)
        self.port = self.socket.getsockname()
        self.accepting = True


def test_close_from_another_thread_leaves_a_listener_alone_that_is_not_ours():
    """Others may share it: shutdown() would end it for all."""
    with socket.create_server(('127.0.0.1', 0)) as shared:
        with looping(Given, listener=shared.dup()) as (server, _):
            server.close()
        with RawClient(shared.getsockname()):
            shared.settimeout(20)
            shared.accept()[0].close()


def test_close_after_the_loop_of_another_thread_has_ended():
    with held_port() as port:
        server = RecordingServer(('127.0.0.1', port), map={})
        thread = threading.Thread(target=asyncore.loop, args=(0, True, server._map, 1))
        thread.start()
        thread.join(20)
        server.close()
        assert server._map == {}
        with pytest.raises(ConnectionRefusedError):
            RawClient(('127.0.0.1', port))


class KnownPort(RecordingServer):
    def listen(self, num):
        super().listen(num)
        self.port = self.socket.getsockname()


def test_close_from_another_thread_where_a_listener_cannot_be_shut_down(monkeypatch):
    """macOS."""
    def shutdown(sock, how):
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    monkeypatch.setattr(socket.socket, 'shutdown', shutdown)
    with looping(KnownPort) as (server, thread):
        server.close()
        thread.join(20)
        assert not thread.is_alive() and server._map == {}


class Interrupter:
    """Something in the map that calls a function between what the loop asks and its wait."""

    accepting = False

    def __init__(self, sockets, function):
        self.sockets, self.function = sockets, function
        sockets[-1] = self  # the last one that is asked

    def readable(self):
        del self.sockets[-1]
        thread = threading.Thread(target=self.function)
        thread.start()
        thread.join()
        return False

    def writable(self):
        return False


@contextlib.contextmanager
def two_sessions(selector):
    """A server, its loop's thread in select(), two channels, their clients."""
    class Server(variant(KnownPort, channels_in_selector=selector)):
        channels = ()

        def handle_accepted(self, conn, addr):
            self.channels += (self.channel_class(self, conn, addr, map=self._map),)

    server = Server(map={})
    thread = threading.Thread(target=asyncore.loop, args=(30, False, server._map))
    thread.start()
    with greet(server, b'EHLO x') as first, greet(server, b'EHLO x') as second:
        yield server, server.channels, first, second
        thread.join(20)
    assert not thread.is_alive() and server._map == {}
    assert [channel.socket.fileno() for channel in server.channels] == [-1, -1]


@in_map_and_selector
def test_channels_closed_by_another_thread_just_when_the_loop_will_wait_for_them(selector):
    with two_sessions(selector) as (server, channels, first, second):
        Interrupter(server._map, lambda: [channels[0].close() for _ in range(2)])
        assert second.say(b'NOOP') == b'250 OK\r\n'  # and the loop comes round
        assert first.rest() == b''
        server.close()
        Interrupter(server._map, channels[1].close)
        second.send(b'NOOP\r\n')


def test_a_channel_on_a_stub_closed_by_another_thread():
    with serving() as server, greet(server, b'EHLO x') as client:
        connection = FakeConnection()
        channel = smtpd.SMTPChannel(server, connection, PEER, map={})
        channel.close()
        assert connection.closed
        assert client.say(b'NOOP') == b'250 OK\r\n'


@in_map_and_selector
def test_two_threads_push_to_one_session_whose_client_does_not_read(selector):
    has_pushed = threading.Event()

    class Channel(smtpd.SMTPChannel):
        def smtp_XPUSH(self, arg):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            threads = [threading.Thread(target=self.push_many, args=(name,)) for name in 'ab']
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            has_pushed.set()

        def push_many(self, name):
            for number in range(2000):
                self.push('250-%s %d %s' % (name, number, 'x' * 300))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with serving(variant(channels_in_selector=selector, channel_class=Channel)) as server:
            with greet(server, b'EHLO x') as client:
                client.send(b'XPUSH\r\nQUIT\r\n')
                assert has_pushed.wait(20)
                lines = client.rest().decode().splitlines(keepends=True)
    finally:
        sys.setswitchinterval(interval)
    assert lines.pop() == '221 Bye\r\n' and len(lines) == 4000
    for name in 'ab':
        assert [line for line in lines if line[4] == name] == [
            '250-%s %d %s\r\n' % (name, number, 'x' * 300) for number in range(2000)]


# ---------------------------------------------------------------------------------------------
# Listeners that are not ours

@in_map_and_selector
def test_a_listener_that_blocks_is_accepted_from_once_an_event(selector):
    with socket.create_server(('127.0.0.1', 0)) as listener:
        given = variant(Given, channels_in_selector=selector)
        with looping(given, listener=listener.dup()) as (server, _), greet(
                server, b'EHLO x', timeout=5) as client:
            assert client.say(b'NOOP') == b'250 OK\r\n'


def test_an_accept_that_always_has_a_connection_is_asked_once_an_event():
    server = RecordingServer(map={})
    connections = []

    def accept():
        connections.append(FakeConnection(1000 + len(connections)))
        return connections[-1], PEER

    server.accept = accept
    server.handle_read_event()
    assert len(connections) == 1
    del server.accept
    server.close()


# ---------------------------------------------------------------------------------------------
# What the system's ways to wait cannot do

@needs_limits
@pytest.mark.parametrize('taken', [1023, 1100])
def test_numbers_that_select_cannot_take_end_nothing(taken):
    """Neither the client's nor the selector's; the first of them is 1024."""
    text = '''
class Hoarding(Server):
    channels_in_selector = True

    def accept(self):
        pair = super().accept()
        while not pair and self.taken:
            os.close(self.taken.pop())
        return pair

limit(2000)
server = Hoarding(('127.0.0.1', 0), None)
tell_port(server)
server.taken = hoard(%d)
asyncore.loop()
''' % taken
    with script(text) as (process, address):
        with RawClient(address) as client:
            assert client.rest() == b'421 Service not available\r\n'
        with greet(address, b'EHLO x') as client:
            assert client.say(b'NOOP') == b'250 OK\r\n'


@needs_limits
@pytest.mark.parametrize('use_poll', [False, True], ids=['select', 'poll'])
def test_numbers_that_select_cannot_take_are_served_in_the_selector(use_poll):
    """Also while a client that does not read its replies has to wait."""
    text = '''
def smtp_XLONG(self, arg):
    self.push('250 ' + 10_000_000 * 'x')

Channel.smtp_XLONG = smtp_XLONG
Server.channels_in_selector = True
Server.process_message_threads = 1
limit(2000)
server = Server(('127.0.0.1', 0), None)
tell_port(server)
asyncore.loop(count=1)  # the first client comes, before numbers are large
hoard(1100)
asyncore.loop(use_poll=%s)
''' % use_poll
    with script(text) as (process, address), RawClient(address) as first:
        assert first.reply().startswith(b'220 ')
        with greet(address, b'EHLO x') as client:
            client.send(b'XLONG\r\nNOOP\r\n')
            assert first.say(b'NOOP') == b'250 OK\r\n'
            assert len(client.reply()) == 10_000_006 and client.reply() == b'250 OK\r\n'
            assert post(client).startswith(b'250 of')
        assert process.poll() is None


@pytest.mark.parametrize('selector', [False, True], indirect=True)
def test_a_channel_is_asked_only_for_what_it_is_ready_for(selector):
    """A handle_read() or handle_write() of the program's may count on it."""
    def handle_read(self):
        asked.append(('read', bool(select.select([self.socket], [], [], 0)[0])))
        smtpd.SMTPChannel.handle_read(self)

    def handle_write(self):
        asked.append(('write', bool(select.select([], [self.socket], [], 0)[1])))
        smtpd.SMTPChannel.handle_write(self)

    asked = []
    channel = {'handle_read': handle_read, 'handle_write': handle_write,
               'unsent_reply_limit': None,
               'smtp_XLONG': lambda self, arg: self.push('250 ' + 1_000_000 * 'x'),
               'smtp_XNIL': lambda self, arg: None}
    with turning(variant(channel=channel)) as (server, turn), small_buffers(server) as client:
        client.send(b'XLONG\r\n')
        assert turn(until=lambda: asked)
        [channel] = channels_of(server)
        assert turn(until=lambda: not select.select([], [channel.socket], [], 0)[1])
        for _ in range(5):
            del asked[:]
            client.send(b'XNIL\r\n')
            assert turn(until=lambda: ('read', True) in asked)
        left = len(BANNER) + 1_000_006
        while left:
            assert turn(until=lambda: has_input(client))
            left -= len(client.socket.recv(1 << 20))
        assert set(asked) == {('read', True), ('write', True)}


@needs_limits
@in_map_and_selector
def test_a_socket_pair_that_select_cannot_take_is_451(selector):
    """It is made late, for the first message, where the program accepts by itself."""
    text = '''
limit(2000)
class Own(Server):
    process_message_threads = 1
    channels_in_selector = %r
    def __init__(self):
        asyncore.dispatcher.__init__(self)
        self.create_socket(socket.AF_INET, socket.SOCK_STREAM)
        self.bind(('127.0.0.1', 0))
        self.listen(5)
    def accept(self):
        return asyncore.dispatcher.accept(self)

tell_port(Own())
asyncore.loop()
''' % selector
    with script(text) as (process, address), greet(address, b'EHLO x') as client:
        assert client.say(b'XHOARD 1100') == b'250 OK\r\n'
        assert post(client) == b'451 Internal confusion\r\n'
        assert client.say(b'XFREE') == b'250 OK\r\n'
        assert post(client).startswith(b'250 of')


@needs_limits
def test_more_sockets_than_windows_takes_are_refused():
    text = '''
def select_of_windows(*lists_and_timeout):
    if max(map(len, lists_and_timeout[:3])) > 512:
        raise ValueError('too many file descriptors in select()')
    return real_select(*lists_and_timeout)

real_select, select.select = select.select, select_of_windows
limit(1500)
serve()
'''
    on_windows = PRELUDE.replace('import smtpd', "os.name = 'nt'; import smtpd; os.name = 'posix'")
    with script(text, prelude='import select' + on_windows) as (process, address), \
            contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(address)) for _ in range(520)]
        codes = [client.reply()[:3] for client in clients]
        assert codes == sorted(codes) and 490 < codes.count(b'220') < 512
        clients[0].close()
        assert clients[1].say(b'NOOP') == b'250 OK\r\n'
        assert stack.enter_context(RawClient(address)).reply().startswith(b'220 ')


def test_without_epoll_and_fork_channels_stand_in_the_map():
    """As on Windows."""
    without_epoll = '''
import os, select
vars(os).pop('register_at_fork', None)
for name in [name for name in vars(select) if 'epoll' in name.lower()]:
    delattr(select, name)
'''
    text = '''
Server.channels_in_selector = True
serve()
'''
    with script(text, prelude=without_epoll + PRELUDE) as (process, address), \
            greet(address, b'EHLO x') as client:
        assert client.say(b'NOOP') == b'250 OK\r\n'


# ---------------------------------------------------------------------------------------------
# No threads, no descriptors

@in_map_and_selector
def test_without_threads_pipelined_messages_are_451_each(selector, monkeypatch, capsys):
    def start(thread):
        raise RuntimeError("can't start new thread")

    count = 500
    server_class = variant(process_message_threads=1, channels_in_selector=selector)
    with serving(server_class) as server, greet(server, b'EHLO x') as client:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, 'start', start)
            sender = NEXT_MESSAGE * count
            client.send(sender)
            replies = [client.reply()[:3] for _ in range(4 * count)]
            assert client.say(b'NOOP') == b'250 OK\r\n'
        assert replies == count * [b'250', b'250', b'354', b'451']
        assert post(client) == b'250 OK\r\n' and len(server.messages) == 1
    log = capsys.readouterr().err
    assert log.count("can't start new thread") == count
    assert len(log) < 250 * count


@needs_limits
def test_without_descriptors_a_message_is_answered_though_its_server_is_closed():
    text = '''
limit(50)
Server.process_message_threads = 1
serve()
'''
    with script(text) as (process, address), greet(address, b'EHLO x') as client:
        assert client.say(b'XCLOSE') == b'250 OK\r\n'
        assert client.say(b'XHOARD') == b'250 OK\r\n'
        assert post(client) == b'451 Internal confusion\r\n'
        assert client.say(b'XFREE') == b'250 OK\r\n'
        assert post(client).startswith(b'250 of')
        assert client.say(b'QUIT') == b'221 Bye\r\n'
        assert process.wait(20) == 0


@contextlib.contextmanager
def without_resources(server):
    """accept() fails, though a connection waits, and keeps the loop from waiting."""
    real = server.socket
    server.socket = Listener(real, errno.EMFILE)
    try:
        with RawClient(server):
            yield server.socket
    finally:
        server.socket = real


def test_a_lack_of_descriptors_does_not_keep_the_loop_busy(monkeypatch, capsys):
    """It waits for a moment after each try, though a connection is there."""
    waits = []
    real_select = select.select
    with turning() as (server, turn), without_resources(server) as listener:
        monkeypatch.setattr(select, 'select', lambda *args: waits.append(args[3]) or
                            real_select(*args))
        for _ in range(5):
            asyncore.loop(timeout=0, map=server._map, count=1)
        assert 1 <= listener.attempts <= sum(wait > 0 for wait in waits) + 1


@needs_limits
def test_without_a_descriptor_for_the_selector_the_map_serves():
    text = '''
limit(50)
Server.channels_in_selector = True
server = Server(('127.0.0.1', 0), None)
tell_port(server)
Channel.hoarded += hoard()
os.close(Channel.hoarded.pop())
asyncore.loop()
'''
    with script(text) as (process, address), greet(address, b'EHLO x') as client:
        assert post(client).startswith(b'250 of')
        assert client.say(b'XFREE') == b'250 OK\r\n'


@needs_limits
@pytest.mark.skipif(not hasattr(select, 'poll'), reason='no poll() here')
def test_without_descriptors_a_loop_in_poll_serves_those_that_select_could_not_take():
    text = '''
limit(1100)
server = Server(('127.0.0.1', 0), None)
tell_port(server)
hoard(1030)
asyncore.loop(use_poll=True)
'''
    with script(text) as (process, address), greet(address, b'EHLO x') as client:
        assert client.say(b'XHOARD') == b'250 OK\r\n'
        with RawClient(address) as waiting:
            for _ in range(3):
                assert post(client).startswith(b'250 of')
            assert client.say(b'XFREE') == b'250 OK\r\n'
            assert waiting.reply().startswith(b'220 ')
        process.terminate()
        log = process.stderr.read().decode()
    assert log.startswith('error: no resources') and len(log.splitlines()) == 1


@needs_limits
@both_loops
@in_map_and_selector
def test_without_descriptors_connections_wait_and_need_no_thread(selector, use_poll):
    text = '''
limit(50)
class Counting(Server):
    process_message_threads = 1
    channels_in_selector = %r

    def process_message(self, *args, **kwargs):
        return '250 %%d threads' %% started

started = 0
real_start = threading.Thread.start
def start(thread):
    global started
    started += 1
    real_start(thread)
threading.Thread.start = start
server = Counting(('127.0.0.1', 0), None)
tell_port(server)
asyncore.loop(use_poll=%r)
''' % (selector, use_poll)
    with script(text) as (process, address), greet(address, b'EHLO x') as client:
        assert client.say(b'XHOARD') == b'250 OK\r\n'
        with RawClient(address) as waiting:
            for _ in range(20):
                assert post(client) == b'250 1 threads\r\n'
            assert not select.select([waiting.socket], [], [], 0)[0]
            assert client.say(b'XFREE') == b'250 OK\r\n'
            assert waiting.reply().startswith(b'220 ')
        assert client.say(b'QUIT') == b'221 Bye\r\n'
        process.terminate()
        log = process.stderr.read().decode()
    assert log.startswith('error: no resources') and len(log.splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# Threads that wait for another call

def test_a_message_waits_for_a_busy_thread_if_no_other_can_be_started(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with serving(WaitingServer) as server, \
            greet(server, b'EHLO x') as first, greet(server, b'EHLO x') as second:
        first.send(NEXT_MESSAGE)
        server.wait_until_entered()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, 'start', start)
            second.send(NEXT_MESSAGE)
            assert [second.reply()[:3] for _ in range(3)] == [b'250', b'250', b'354']
            server.go.set()
            assert second.reply() == b'250 OK\r\n'
        assert len(server.messages) == 2 and len(server.threads) == 1


def test_a_thread_that_waits_for_the_next_message_keeps_none():
    with serving(variant(process_message_threads=1, process_message=lambda *args: None)) as server:
        with greet(server, b'EHLO x') as client, traced_memory() as now_and_peak:
            assert post(client, 100_000 * (98 * b'x' + b'\r\n')) == b'250 OK\r\n'
            assert client.say(b'RSET') == b'250 OK\r\n'
            gc.collect()  # PyPy counts no references
            assert now_and_peak()[0] < 5_000_000


def test_a_thread_that_waits_in_vain_ends_and_the_next_message_has_another():
    class Server(RecordingServer):
        process_message_threads = 1

        def process_message(self, *args, **kwargs):
            threads.append(threading.current_thread())

    threads = []
    with serving(Server) as server, greet(server, b'EHLO x') as client:
        assert post(client) == post(client) == b'250 OK\r\n'
        first, second = threads
        assert first is second and first.daemon
        first.join(20)
        assert not first.is_alive()
        assert post(client) == b'250 OK\r\n' and threads[2] is not first


@needs_signals
@pytest.mark.parametrize('end', ['Ctrl-C', 'the end of the program'])
def test_a_handler_that_hangs_in_a_thread_keeps_no_program_from_ending(end):
    text = '''
class Hanging(Server):
    process_message_threads = 1
    def process_message(self, *args, **kwargs):
        threading.Event().wait()

def smtp_XEND(self, arg):
    raise asyncore.ExitNow

Channel.smtp_XEND = smtp_XEND
server = Hanging(('127.0.0.1', 0), None)
tell_port(server)
try:
    asyncore.loop()
except (KeyboardInterrupt, asyncore.ExitNow):
    os.write(2, b'ended')
'''
    with script(text) as (process, address), \
            greet(address, b'EHLO x') as hangs, greet(address) as client:
        hangs.send(NEXT_MESSAGE)
        assert [hangs.reply()[:3] for _ in range(3)] == [b'250', b'250', b'354']
        assert client.say(b'NOOP') == b'250 OK\r\n'
        if end == 'Ctrl-C':
            process.send_signal(signal.SIGINT)
        else:
            client.send(b'XEND\r\n')
        assert process.wait(20) == 0 and process.stderr.read() == b'ended'


def test_a_message_that_comes_just_when_a_thread_gives_up_is_handled(monkeypatch):
    class Late(queue.SimpleQueue):
        """Each other wait is in vain, though something has come by its end."""

        def __init__(self):
            super().__init__()
            self.has_come = threading.Semaphore(0)
            self.waits_in_vain = False

        def put(self, thing):
            super().put(thing)
            self.has_come.release()

        def get(self, block=True, timeout=None):
            if timeout is None:
                return super().get(block)
            self.waits_in_vain = not self.waits_in_vain
            if not self.waits_in_vain:
                return super().get(timeout=20)
            assert self.has_come.acquire(timeout=20)
            raise queue.Empty

    monkeypatch.setattr(queue, 'SimpleQueue', Late)
    with serving(variant(process_message_threads=1)) as server, \
            greet(server, b'EHLO x') as client:
        assert [post(client) for _ in range(3)] == 3 * [b'250 OK\r\n']
        # The thread that waits would keep the test from ending.
        for each in gc.get_objects():
            if isinstance(each, Late):
                each.has_come.release()


# ---------------------------------------------------------------------------------------------
# What is closed is freed

@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='needs Linux /proc')
@pytest.mark.parametrize('threads', [0, 1], ids='{} threads'.format)
@in_map_and_selector
def test_a_server_that_is_closed_frees_its_descriptors_without_the_garbage_collector(
        selector, threads):
    server_class = variant(channels_in_selector=selector, process_message_threads=threads)
    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            with looping(type('Server', (server_class, KnownPort), {})) as (server, thread):
                with greet(server, b'EHLO x') as client:
                    assert post(client) == b'250 OK\r\n'
                    assert client.say(b'QUIT') == b'221 Bye\r\n'
            counts.append(len(os.listdir('/proc/self/fd')))
    finally:
        gc.enable()
    assert counts == 5 * counts[:1]


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='needs Linux /proc')
def test_a_session_that_outlives_its_server_frees_what_its_messages_took():
    """Its first thread comes after close()."""
    text = '''
def smtp_XCOUNT(self, arg):
    self.smtp_server.process_message_threads = 1
    self.push('250 %d' % len(os.listdir('/proc/self/fd')))

Channel.smtp_XCOUNT = smtp_XCOUNT
serve()
'''
    with script(text) as (process, address), greet(address, b'EHLO x') as client:
        assert client.say(b'XCLOSE') == b'250 OK\r\n'
        count = client.say(b'XCOUNT')
        assert post(client).startswith(b'250 of')
        assert client.say(b'XCOUNT') == count


# ---------------------------------------------------------------------------------------------
# Programs whose methods raise

@in_map_and_selector
def test_a_channel_whose_init_and_close_raise_leaves_nothing_behind(selector, capsys):
    class Channel(smtpd.SMTPChannel):
        def __init__(self, *args):
            super().__init__(*args)
            raise ZeroDivisionError

        def close(self):
            raise ZeroDivisionError

    sockets = {}
    server = variant(channels_in_selector=selector)(map=sockets)
    server.channel_class = Channel
    with socket.create_connection(server.socket.getsockname()[:2]) as client:
        client.settimeout(20)
        asyncore.loop(timeout=20, map=sockets, count=1)
        assert client.recv(100).startswith(b'220 ') and client.recv(100) == b''
    server.close()
    asyncore.loop(timeout=5, map=sockets, count=20)
    assert sockets == {}


def test_a_client_that_has_reset_before_it_is_accepted_has_an_address(capfd):
    """Port scanners do so; a program's close() may look at it."""
    addresses = []

    def close(self):
        addresses.append(self.addr[0])
        smtpd.SMTPChannel.close(self)

    with turning(variant(channel={'close': close})) as (server, turn):
        reset(RawClient(server))
        assert turn(until=lambda: addresses)
        assert addresses == ['127.0.0.1'] and list(server._map.values()) == [server]
    assert capfd.readouterr() == ('', '')


@in_map_and_selector
def test_close_all_closes_all_channels_but_the_one_that_raises(selector):
    class Channel(smtpd.SMTPChannel):
        def close(self):
            if not raised:
                raised.append(self)
                raise ZeroDivisionError
            super().close()

    raised, sockets = [], {}
    server = variant(channels_in_selector=selector, channel_class=Channel)(map=sockets)
    channels = []
    with contextlib.ExitStack() as clients:
        for _ in range(5):
            clients.enter_context(socket.create_connection(server.socket.getsockname()[:2]))
        while len(channels) < 5:
            asyncore.loop(timeout=20, map=sockets, count=1)
            channels = channels_of(server)
        asyncore.close_all(sockets, ignore_all=True)
        assert [channel for channel in channels if channel.connected] == raised
        smtpd.SMTPChannel.close(*raised)


@pytest.mark.parametrize('threads', [0, 1])
def test_a_channel_that_cannot_even_push_451_is_closed(threads, capsys):
    class Channel(smtpd.SMTPChannel):
        def push(self, msg):
            if self.received_data:
                raise OSError('no space for my log')
            super().push(msg)

    server_class = variant(process_message_threads=threads, channel_class=Channel)
    with serving(server_class) as server, greet(server, b'EHLO x') as client:
        client.send(NEXT_MESSAGE)
        assert [client.reply()[:3] for _ in range(3)] == [b'250', b'250', b'354']
        assert client.reply() == b''


@pytest.mark.parametrize('threads', [0, 1])
def test_a_session_goes_on_if_the_loop_does_after_a_handlers_exit(threads):
    class Server(RecordingServer):
        process_message_threads = threads

        def process_message(self, *args, **kwargs):
            raise asyncore.ExitNow

    sockets = {}
    server = Server(map=sockets)
    with socket.create_connection(server.socket.getsockname()[:2]) as client, \
            pytest.raises(asyncore.ExitNow):
        client.sendall(TO_DATA + b'x\r\n.\r\n')
        asyncore.loop(timeout=20, map=sockets, count=100)
    channel, = channels_of(server)
    assert channel.smtp_state == channel.COMMAND
    asyncore.close_all(sockets)


# ---------------------------------------------------------------------------------------------
# Two threads

@both_loops
def test_a_server_that_is_made_beside_a_loop_that_turns_is_served(use_poll):
    """poll() would tell of a socket that does not listen yet, and asyncore close it."""
    class First(RecordingServer):
        def readable(self):
            turned.set()
            return super().readable()

    class Second(RecordingServer):
        def listen(self, num):
            for _ in range(3):
                turned.clear()
                assert turned.wait(20)
            super().listen(num)

    turned, sockets = threading.Event(), {}
    first = First(map=sockets)
    thread = threading.Thread(target=asyncore.loop, args=(0.01, use_poll, sockets))
    thread.start()
    try:
        second = Second(map=sockets)
        for server in second, first:
            with greet(server) as client:
                assert client.say(b'NOOP') == b'250 OK\r\n'
            server.close()
    finally:
        first.close()
        thread.join(20)
    assert not thread.is_alive() and sockets == {}


@both_loops
@in_map_and_selector
def test_close_all_from_another_thread_closes_all(selector, use_poll, capfd):
    """As the tearDown() of many test suites calls it."""
    class Channel(smtpd.SMTPChannel):
        def __init__(self, *args):
            super().__init__(*args)
            sockets.append(self.socket)

    def loop():
        asyncore.loop(timeout=0.05, use_poll=use_poll, map=server._map)
        ended.append(True)

    for _ in range(20):
        sockets, ended = [], []
        server = variant(channel_class=Channel, channels_in_selector=selector)(map={})
        sockets.append(server.socket)
        thread = threading.Thread(target=loop)
        thread.start()
        with contextlib.ExitStack() as clients:
            for _ in range(6):
                clients.enter_context(greet(server))
            asyncore.close_all(server._map)
            thread.join(20)
        assert ended and server._map == {}
        assert [each.fileno() for each in sockets] == 7 * [-1]
    assert capfd.readouterr() == ('', '')


@both_loops
def test_a_server_that_is_closed_just_before_the_loop_asks_it_wakes_the_loop(use_poll):
    """The loop took it from the map before, and has nothing else to wait for."""
    class Server(RecordingServer):
        def readable(self):
            if knows_its_thread.is_set():
                about_to_ask.set()
                assert closed.wait(20)
            return super().readable()

    def loop():
        asyncore.loop(timeout=0, map=sockets, count=1)
        knows_its_thread.set()
        asyncore.loop(timeout=600, use_poll=use_poll, map=sockets)

    knows_its_thread, about_to_ask, closed = (threading.Event() for _ in range(3))
    sockets = {}
    server = Server(map=sockets)
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    assert about_to_ask.wait(20)
    server.close()
    closed.set()
    thread.join(20)
    assert not thread.is_alive() and sockets == {}


@both_loops
def test_two_servers_that_are_closed_one_after_the_other_leave_no_loop_asleep(use_poll):
    for _ in range(50):
        sockets = {}
        first = RecordingServer(map=sockets)
        thread = threading.Thread(daemon=True, target=lambda sockets=sockets: asyncore.loop(
            timeout=600, use_poll=use_poll, map=sockets))
        thread.start()
        second = RecordingServer(map=sockets)
        first.close()
        second.close()
        thread.join(20)
        assert not thread.is_alive() and sockets == {}


def test_a_server_that_was_closed_may_listen_again():
    with contextlib.closing(RecordingServer(map={})) as server:
        server.close()
        server.create_socket(socket.AF_INET, socket.SOCK_STREAM)
        server.bind(('127.0.0.1', 0))
        server.listen(5)
        thread = threading.Thread(target=asyncore.loop, daemon=True,
                                  kwargs={'timeout': 1, 'map': server._map})
        thread.start()
        with greet(server) as client:
            assert client.say(b'NOOP') == b'250 OK\r\n'
        server.close()
        thread.join(20)
        assert not thread.is_alive()


def test_close_of_a_mixin_after_the_server_is_called():
    class Mixin(asyncore.dispatcher):
        def close(self):
            closed.append(self)
            super().close()

    closed = []
    server = type('Server', (RecordingServer, Mixin), {})(map={})
    server.close()
    assert closed == [server] and server._map == {}


def test_a_server_that_is_closed_just_before_it_accepts_has_nothing_to_complain_about(capfd):
    class Server(RecordingServer):
        def handle_accept(self):
            accepting.set()
            assert closed.wait(20)
            super().handle_accept()

    accepting, closed = threading.Event(), threading.Event()
    with serving(Server) as server, socket.create_connection(server.socket.getsockname()):
        assert accepting.wait(20)
        server.close()
        closed.set()
    assert capfd.readouterr() == ('', '')


@contextlib.contextmanager
def held(lock):
    """A program's lock; two threads that wait for each other do not wait for ever."""
    assert lock.acquire(timeout=20)
    try:
        yield
    finally:
        lock.release()


@pytest.mark.parametrize('name', ['close', 'del_channel', 'handle_close', 'send'])
@in_map_and_selector
def test_program_may_close_all_under_a_lock_that_its_methods_wait_for(name, selector):
    armed, arrived, taken = (threading.Event() for _ in range(3))
    lock = threading.RLock()

    def method(self, *args):
        if armed.is_set():
            arrived.set()
            assert taken.wait(20)
        with held(lock):
            return getattr(smtpd.SMTPChannel, name)(self, *args)

    def stop():
        with held(lock):
            taken.set()
            for channel in channels_of(server):
                channel.close()
            server.close()

    server_class = variant(channel={name: method}, channels_in_selector=selector)
    with serving(server_class) as server, greet(server) as client:
        armed.set()
        client.send(b'QUIT\r\n')
        assert arrived.wait(20)
        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
