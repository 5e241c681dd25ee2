"""Servers that meet fork(), a lack of everything, and other systems than this one."""
import asyncore
import concurrent.futures
import contextlib
import errno
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
import unittest.mock
import weakref

import pytest

import smtpd
from tests import support
from tests.support import (
    ANSWERED,
    BANNER,
    HELLO,
    ONE_MESSAGE,
    PEER,
    STRICT,
    TRANSACTION,
    FakeConnection,
    RawClient,
    RecordingServer,
    WaitingServer,
    channel_with,
    channels_of,
    environment,
    failing_listener,
    feed,
    greet,
    has_input,
    held_port,
    in_map_and_selector,
    is_served,
    looping,
    read_replies,
    read_until,
    relay_message,
    reset,
    serving,
    small_buffers,
    start_message,
    steps,
    turning,
    variant,
)

OK = b'250 OK\r\n'
CONFUSED = b'451 Internal confusion\r\n'

both_loops = pytest.mark.parametrize('use_poll', [False, True], ids=['select', 'poll'])
without_and_with_thread = pytest.mark.parametrize('threads', [0, 1], ids='{} threads'.format)
needs_fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork() here')
needs_posix = pytest.mark.skipif(
    os.name != 'posix', reason='no limits of resources, no users, no SIGINT to a process here')
needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='needs Linux /proc')

PRELUDE = '''
import asyncore, errno, gc, os, signal, socket, sys, threading
import smtpd
signal.alarm(60)
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=lambda: signal.alarm(60))

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

class Server(smtpd.SMTPServer):
    channel_class = Channel

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

def make(server_class=Server):
    server = server_class(('127.0.0.1', 0), None)
    tell_port(server)
    return server

def tell_port(server):
    print(server.socket.getsockname()[1], flush=True)

def serve(server_class=Server):
    global server
    server = make(server_class)
    asyncore.loop()
'''
PLAIN = [sys.executable]  # from 3.12 on, fork() beside a thread warns


def script(text, options=STRICT, prelude=PRELUDE, selector=False, threads=0, **kwargs):
    modes = 'Server.channels_in_selector, Server.process_message_threads = %r, %d\n' % (
        selector, threads)
    return support.script(prelude + modes + text, options, **kwargs)


# ---------------------------------------------------------------------------------------------
# The log

@pytest.mark.parametrize('error', [
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)), MemoryError(), ImportError('no'),
    RecursionError('too deep')], ids=lambda error: type(error).__name__)
def test_a_traceback_that_cannot_be_had_ends_nothing(error, monkeypatch, capsys):
    """It needs modules, when the first one is made: descriptors, memory and rights may lack."""
    monkeypatch.setattr(traceback, 'format_exc', unittest.mock.Mock(side_effect=error))
    channel = channel_with(smtp_XFAIL=lambda self, arg: 1 / 0)
    assert feed(channel, b'XFAIL\r\nNOOP\r\n') == CONFUSED + OK
    assert 'ZeroDivisionError' in capsys.readouterr().err


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
sys.argv[1:] = ['-c', 'own.Own', '127.0.0.1:0', '127.0.0.1:9']
runpy.run_module('smtpd', run_name='__main__', alter_sys=True)
'''


@needs_posix
def test_nobody_logs_what_failed_and_knows_who_got_a_message(upstream, tmp_path):
    (tmp_path / 'own.py').write_text('''
import smtpd

class Channel(smtpd.SMTPChannel):
    def smtp_XFAIL(self, arg):
        1 / 0

class Own(smtpd.MailmanProxy):
    channel_class = Channel
    mailman_lmtp_address = %r, %r
''' % upstream.address)
    upstream.faults = {'.': [None, '451 4.3.0 Not now']}
    with script(AS_NOBODY, env=environment(tmp_path)) as (process, address), \
            greet(address, HELLO) as client:
        assert client.say(b'XFAIL') == CONFUSED
        for answer in '451 4.3.0 Not now', '250 OK':
            assert steps(client, recipients=[b'<a@x>', b'<b@x>'])[-1] == answer
        process.terminate()
        log = process.stderr.read().decode()
    assert 'ZeroDivisionError' in log
    assert [recipients for _, recipients, _ in upstream.messages] == [['a@x'], ['b@x']]


class Untold(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize('error, told', [
    (OSError('on purpose'), 'OSError: on purpose'), (Untold(), 'Untold')], ids=['told', 'untold'])
def test_a_log_info_that_fails_ends_nothing(error, told, capsys):
    channel = channel_with(log_info=unittest.mock.Mock(side_effect=error),
                           smtp_XFAIL=lambda self, arg: 1 / 0)
    assert feed(channel, b'XFAIL\r\nNOOP\r\n') == CONFUSED + OK
    log = capsys.readouterr().err
    assert 'ZeroDivisionError' in log and log.splitlines()[-1].startswith(told)


# ---------------------------------------------------------------------------------------------
# fork()

@needs_fork
def test_a_server_that_is_made_before_fork_answers_in_each_worker(selector):
    text = '''
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
'''
    with script(text, PLAIN, selector=selector, threads=2) as (process, address), \
            contextlib.ExitStack() as stack:
        clients = [stack.enter_context(greet(address, HELLO)) for _ in range(10)]
        for _ in range(5):
            for client in clients:
                start_message(client)
            for client in clients:
                assert client.reply().startswith(b'250 of')
        assert clients[0].say(b'XCLOSE') == OK  # in its worker
        assert all(is_served(address) for _ in range(10))
        assert relay_message(clients[0]).startswith(b'250 of')
        process.communicate()


@needs_fork
@without_and_with_thread
def test_a_child_that_closes_all_leaves_its_parents_sessions_alone(selector, threads):
    text = '''
class Forking(Server):
    def process_message(self, *args, **kwargs):
        child = os.fork()
        if not child:
            asyncore.close_all()
            os._exit(len(asyncore.socket_map))
        return '250 %d' % os.waitpid(child, 0)[1]

serve(Forking)
'''
    with script(text, PLAIN, selector=selector, threads=threads) as (_, address), \
            greet(address, HELLO) as client, greet(address, HELLO) as other:
        assert [relay_message(client) for _ in range(2)] == 2 * [b'250 0\r\n']
        assert client.say(b'NOOP') == other.say(b'NOOP') == OK


@needs_fork
def test_a_child_serves_the_sessions_that_it_inherits(selector):
    """And the parent keeps out of it: it forgets the session, and waits."""
    text = '''
class Forking(Channel):
    def smtp_XFORK(self, arg):
        child = os.fork()
        if child:
            self.del_channel()
            self.push('250 OK')
            os.waitpid(child, 0)
            self.close()

    def smtp_XEXEC(self, arg):
        """What a program that this one runs would inherit."""
        self.push('250 %s' % [each for each in range(3, 50) if is_inherited(each)])

def is_inherited(descriptor):
    try:
        return os.get_inheritable(descriptor)
    except OSError:
        return False

Server.channel_class = Forking
serve()
'''
    with script(text, PLAIN, selector=selector, threads=1) as (_, address):
        with greet(address, HELLO) as client, greet(address, HELLO) as other:
            parent = relay_message(client)
            assert client.say(b'XFORK') == OK
            child = relay_message(client)
            assert child != parent and relay_message(client) == relay_message(other) == child
            assert client.say(b'XEXEC') == b'250 []\r\n'
            assert client.say(b'XCLOSE') == OK
            assert client.say(b'QUIT') == other.say(b'QUIT') == b'221 Bye\r\n'
        with greet(address, HELLO) as client:
            assert relay_message(client) == parent


@needs_fork
def test_a_child_does_not_wait_for_the_threads_of_its_parent(selector):
    """It has not got them: its loop ends when it has closed what it inherited."""
    text = '''
go = threading.Event()

class Waiting(Server):
    def process_message(self, *args, **kwargs):
        go.wait()

def smtp_XFORK(self, arg):
    child = os.fork()
    if not child:
        for each in gc.get_objects():
            if isinstance(each, (smtpd.SMTPServer, smtpd.SMTPChannel)):
                each.close()
        asyncore.loop(.05)
        os._exit(len(asyncore.socket_map))
    self.push('250 %d' % os.waitpid(child, 0)[1])
    go.set()

Channel.smtp_XFORK = smtp_XFORK
serve(Waiting)
'''
    with script(text, PLAIN, selector=selector, threads=1) as (_, address), \
            greet(address, HELLO) as waiting, greet(address, HELLO) as client:
        start_message(waiting)
        assert client.say(b'XFORK') == b'250 0\r\n'
        assert waiting.reply() == OK


@needs_fork
def test_a_child_that_a_handler_makes_handles_no_message_that_waits_in_its_parent():
    text = '''
go = threading.Event()
read_end, write_end = os.pipe()

class Forking(Server):
    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        if data == b'waits':
            os.write(write_end, b'x')
            return '250 of %d' % os.getpid()
        go.wait()
        child = os.fork()  # it ends with this call
        return '250 %s' % (os.waitpid(child, 0)[1] if child else 'of the child')

def smtp_XGO(self, arg):
    go.set()
    self.push('250 OK')

def smtp_XCOUNT(self, arg):
    self.push('250 %d' % len(os.read(read_end, 10)))

Channel.smtp_XGO, Channel.smtp_XCOUNT = smtp_XGO, smtp_XCOUNT
serve(Forking)
'''
    # Not under coverage, which keeps the child from ending where its thread does.
    plain = {name: value for name, value in environment().items() if name[:8] != 'COVERAGE'}
    with script(text, PLAIN, threads=1, env=plain) as (_, address), greet(address) as client, \
            greet(address, HELLO) as forks, greet(address, HELLO) as waits:
        start_message(forks, b'forks\r\n')
        start_message(waits, b'waits\r\n')
        assert client.say(b'NOOP') == client.say(b'XGO') == OK
        assert forks.reply() == b'250 0\r\n' and waits.reply().startswith(b'250 of')
        assert client.say(b'XCOUNT') == b'250 1\r\n'


@needs_fork
def test_a_child_is_free_of_what_was_closed_beside_the_loop_of_its_parent():
    text = '''
entered, go = threading.Event(), threading.Event()

def smtp_XWAIT(self, arg):
    entered.set()
    go.wait()

Channel.smtp_XWAIT = smtp_XWAIT
server = make()
threading.Thread(target=asyncore.loop).start()
entered.wait()
asyncore.close_all()
child = os.fork()
if not child:
    os._exit(0)
os.write(1, b'ended %d' % os.waitpid(child, 0)[1])
go.set()
'''
    with script(text, PLAIN, selector=True) as (process, address), greet(address) as client:
        client.send(b'XWAIT\r\n')
        assert read_until(process.stdout, b'ended 0')


@needs_fork
@both_loops
def test_a_worker_that_closes_leaves_the_listener_to_the_others(use_poll):
    text = '''
server = Server(('127.0.0.1', 0), None)
worker = os.fork()
if not worker:
    turned = threading.Event()
    server.readable = lambda: turned.set() or smtpd.SMTPServer.readable(server)
    thread = threading.Thread(target=asyncore.loop, args=(.05, %r))
    thread.start()
    turned.wait()
    server.close()
    thread.join(20)
    os._exit(bool(asyncore.socket_map))
assert os.waitpid(worker, 0)[1] == 0
tell_port(server)
asyncore.loop()
''' % use_poll
    with script(text, PLAIN) as (_, address):
        assert is_served(address)


# ---------------------------------------------------------------------------------------------
# close()

def in_another_thread(function, *args):
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


class Given(RecordingServer):
    """Its `listener` was made elsewhere, as systemd hands one in."""

    def __init__(self, *args, map):
        super().__init__(map=map)
        self.close()
        self.set_socket(self.listener)
        self.accepting = True


def test_close_from_another_thread_leaves_a_listener_alone_that_is_not_ours():
    """Others may share it: shutdown() would end it for all."""
    with socket.create_server(('127.0.0.1', 0)) as shared:
        with looping(variant(Given, listener=shared.dup()), 0.05, use_poll=True) as server:
            server.close()
        with RawClient(shared.getsockname()):
            shared.settimeout(20)
            shared.accept()[0].close()


def test_close_after_the_loop_of_another_thread_has_ended():
    with held_port() as port:
        server = RecordingServer(('127.0.0.1', port), map={})
        in_another_thread(asyncore.loop, 0, True, server._map, 1)
        server.close()
        assert server._map == {}
        with pytest.raises(ConnectionRefusedError):
            RawClient(('127.0.0.1', port))


def test_close_from_another_thread_where_a_listener_cannot_be_shut_down(monkeypatch):
    """macOS; the loop finds out at its next turn."""
    monkeypatch.setattr(socket.socket, 'shutdown', unittest.mock.Mock(side_effect=OSError))
    with looping(timeout=0.05, use_poll=True) as server:
        server.close()


class Interrupter:
    """Something in the map that calls a function between what the loop asks and its wait."""

    accepting = False

    def __init__(self, sockets, function):
        self.sockets, self.function = sockets, function
        sockets[-1] = self  # the last one that is asked

    def readable(self):
        del self.sockets[-1]
        in_another_thread(self.function)
        return False

    def writable(self):
        return False


@in_map_and_selector
def test_channels_closed_by_another_thread_just_when_the_loop_will_wait_for_them():
    with looping() as server, greet(server) as first:
        [one] = channels_of(server)
        with greet(server) as second:
            [other] = set(channels_of(server)) - {one}
            Interrupter(server._map, lambda: [one.close() for _ in range(2)])
            assert second.say(b'NOOP') == OK  # and the loop comes round
            assert first.rest() == b''
            server.close()
            Interrupter(server._map, other.close)
            second.send(b'NOOP\r\n')
    assert one.socket.fileno() == other.socket.fileno() == -1


def test_a_channel_on_a_stub_closed_by_another_thread():
    with serving() as server, greet(server) as client:
        channel = smtpd.SMTPChannel(server, FakeConnection(), PEER, map={})
        channel.close()
        assert channel.conn.closed
        assert client.say(b'NOOP') == OK


@in_map_and_selector
def test_two_threads_push_to_one_session_whose_client_does_not_read(monkeypatch):
    has_pushed = threading.Event()

    class Channel(smtpd.SMTPChannel):
        def smtp_XPUSH(self, arg):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                pool.map(self.push_many, 'ab')
            has_pushed.set()

        def push_many(self, name):
            for number in range(2000):
                self.push('250-%s %d %s' % (name, number, 'x' * 300))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with serving(variant(channel_class=Channel)) as server, greet(server) as client:
            client.send(b'XPUSH\r\nQUIT\r\n')
            assert has_pushed.wait(20)
            lines = client.rest().decode().splitlines()
    finally:
        sys.setswitchinterval(interval)
    assert lines.pop() == '221 Bye' and len(lines) == 4000
    for name in 'ab':
        assert [line for line in lines if line[4] == name] == [
            '250-%s %d %s' % (name, number, 'x' * 300) for number in range(2000)]


@in_map_and_selector
def test_a_session_whose_descriptor_someone_keeps_does_not_wake_the_loop_when_it_is_closed():
    """As a child does that was forked before."""
    with turning() as (server, turn), RawClient(server), RawClient(server):
        assert turn(until=lambda: len(channels_of(server)) == 2)
        channel, _ = channels_of(server)
        kept = os.dup(channel.socket.fileno())
        in_another_thread(channel.close)
        turn(at_most=3)
        assert select.select(list(server._map), [], [], 0)[0] == []
        os.close(kept)


# ---------------------------------------------------------------------------------------------
# Listeners that are not ours

@in_map_and_selector
@pytest.mark.skipif(not hasattr(socket, 'AF_UNIX'), reason='no AF_UNIX here')
def test_an_lmtp_server_on_a_path(tmp_path):
    channel = {'smtp_LHLO': smtpd.SMTPChannel.smtp_HELO}
    path = str(tmp_path / 'lmtp')
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        client.connect(path)
        with turning(variant(Given, channel, listener=listener.dup())) as (server, turn):
            client.sendall(ONE_MESSAGE.replace(b'HELO', b'LHLO') + b'QUIT\r\n')
            assert turn(until=lambda: server.messages and not channels_of(server))
            assert client.makefile('rb').read() == BANNER + ANSWERED + b'221 Bye\r\n'
            assert server.messages[0][:4] == ('', 'a@b', ['c@d'], b'text')


# ---------------------------------------------------------------------------------------------
# What the system's ways to wait cannot do

@needs_posix
@pytest.mark.parametrize('taken', [1023, 1100])
def test_numbers_that_select_cannot_take_end_nothing(taken):
    """Neither the client's nor the selector's; the first of them is 1024."""
    text = '''
class Hoarding(Server):
    taken = ()

    def accept(self):
        pair = super().accept()
        while not pair and self.taken:
            os.close(self.taken.pop())
        return pair

limit(2000)
server = make(Hoarding)
server.taken = hoard(%d)
asyncore.loop()
''' % taken
    with script(text, selector=True) as (process, address):
        with RawClient(address) as client:
            assert client.rest() == b'421 Service not available\r\n'
        assert is_served(address)
        process.terminate()
        assert process.stderr.read() == b''


@needs_posix
@both_loops
def test_numbers_that_select_cannot_take_are_served_in_the_selector(use_poll):
    """Also while a client that does not read its replies has to wait."""
    text = '''
Channel.smtp_XLONG = lambda self, arg: self.push('250 ' + 30_000_000 * 'x')
limit(2000)
server = make()
asyncore.loop(count=1)  # the first client comes, before numbers are large
hoard(1100)
asyncore.loop(use_poll=%s)
''' % use_poll
    with script(text, selector=True, threads=1) as (process, address), \
            greet(address, b'NOOP') as first, greet(address, HELLO) as client:
        client.send(b'XLONG\r\nNOOP\r\n')
        assert first.say(b'NOOP') == OK
        assert len(client.reply()) == 30_000_006 and client.reply() == OK
        assert relay_message(client).startswith(b'250 of')
        assert client.say(b'NOOP') == OK and process.poll() is None


@in_map_and_selector
def test_a_channel_is_asked_only_for_what_it_is_ready_for():
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


@needs_posix
def test_a_socket_pair_that_select_cannot_take_is_451(selector):
    """It is made late, for the first message, where the program accepts by itself."""
    text = '''
class Own(Server):
    def accept(self):
        return asyncore.dispatcher.accept(self)

limit(2000)
serve(Own)
'''
    with script(text, selector=selector, threads=1) as (_, address), \
            greet(address, HELLO) as client:
        assert client.say(b'XHOARD 1100') == OK
        assert relay_message(client) == CONFUSED
        assert client.say(b'XFREE') == OK
        assert relay_message(client).startswith(b'250 of')


@needs_posix
def test_more_sockets_than_windows_takes_are_refused():
    on_windows = 'import os; os.name = "nt"; import smtpd; os.name = "posix"' + PRELUDE
    text = '''
import select

def select_of_windows(*lists_and_timeout):
    if max(map(len, lists_and_timeout[:3])) > 512:
        raise ValueError('too many file descriptors in select()')
    return real_select(*lists_and_timeout)

real_select, select.select = select.select, select_of_windows
limit(1500)
serve()
'''
    with script(text, prelude=on_windows) as (_, address), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(address)) for _ in range(520)]
        codes = [client.reply()[:3] for client in clients]
        assert codes == sorted(codes) and 490 < codes.count(b'220') < 512
        clients[0].close()
        assert clients[1].say(b'NOOP') == OK
        assert stack.enter_context(RawClient(address)).reply().startswith(b'220 ')


def test_without_epoll_and_fork_channels_stand_in_the_map():
    """As on Windows."""
    without_epoll = '''
import os, select
vars(os).pop('register_at_fork', None)
for name in [name for name in vars(select) if 'epoll' in name.lower()]:
    delattr(select, name)
'''
    with script('serve()', prelude=without_epoll + PRELUDE, selector=True) as (_, address):
        assert is_served(address)


# ---------------------------------------------------------------------------------------------
# No threads, no descriptors

def without_threads(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', start)


@in_map_and_selector
def test_without_threads_pipelined_messages_are_451_each(monkeypatch, capsys):
    count = 500
    with serving(variant(process_message_threads=1)) as server, greet(server, HELLO) as client:
        with monkeypatch.context() as patch:
            without_threads(patch)
            client.send(count * (TRANSACTION + b'x\r\n.\r\n'))
            assert [client.reply()[:3] for _ in range(4 * count)] == count * [
                b'250', b'250', b'354', b'451']
            assert client.say(b'NOOP') == OK
        assert relay_message(client) == OK and len(server.messages) == 1
    assert capsys.readouterr().err.count("RuntimeError: can't start new thread") == count


def test_without_threads_the_loop_ends_when_all_is_closed(monkeypatch):
    with looping(variant(process_message_threads=1)) as server, greet(server, HELLO) as client:
        without_threads(monkeypatch)
        server.close()
        assert relay_message(client).startswith(b'451 ')


@needs_posix
def test_without_descriptors_a_message_is_answered_though_its_server_is_closed():
    with script('limit(50); serve()', threads=1) as (process, address), \
            greet(address, HELLO) as client:
        assert client.say(b'XCLOSE') == OK
        assert client.say(b'XHOARD') == OK
        assert relay_message(client) == CONFUSED
        assert client.say(b'XFREE') == OK
        assert relay_message(client).startswith(b'250 of')
        assert client.say(b'QUIT') == b'221 Bye\r\n'
        assert process.wait(20) == 0


def test_a_lack_of_descriptors_does_not_keep_the_loop_busy(monkeypatch, capsys):
    waits = []
    with turning() as (server, turn), RawClient(server):
        real_socket, server.socket = server.socket, failing_listener(server, errno.EMFILE)
        monkeypatch.setattr(time, 'sleep', waits.append)
        for _ in range(5):
            asyncore.loop(timeout=0, map=server._map, count=1)
        assert server.socket.accept.call_count == len(waits) == 5 and min(waits) > 0
        server.socket = real_socket


@needs_posix
def test_without_a_descriptor_for_the_selector_the_map_serves():
    text = '''
limit(50)
server = make()
Channel.hoarded += hoard()
os.close(Channel.hoarded.pop())
asyncore.loop()
'''
    with script(text, selector=True) as (_, address), greet(address, HELLO) as client:
        assert relay_message(client).startswith(b'250 of')
        assert client.say(b'XFREE') == OK


@needs_posix
@pytest.mark.parametrize('descriptors, use_poll', [
    ('limit(50)', False), ('limit(50)', True), ('limit(1100); hoard(1030)', True)])
def test_without_descriptors_connections_wait_and_sessions_go_on(selector, descriptors, use_poll):
    text = '''
server = make()
%s
asyncore.loop(use_poll=%r)
''' % (descriptors, use_poll)
    with script(text, selector=selector, threads=1) as (process, address), \
            greet(address, HELLO) as client:
        assert client.say(b'XHOARD') == OK
        with RawClient(address) as waiting:
            for _ in range(20):
                assert relay_message(client).startswith(b'250 of')
            assert not has_input(waiting)
            assert client.say(b'XFREE') == OK
            assert waiting.reply().startswith(b'220 ')
        process.terminate()
        log = process.stderr.read().decode()
    assert log.startswith('error: no resources') and len(log.splitlines()) == 1


@needs_posix
@pytest.mark.parametrize('end', ['Ctrl-C', 'the end of the program'])
def test_a_handler_that_hangs_in_a_thread_keeps_no_program_from_ending(end):
    text = '''
class Hanging(Server):
    def process_message(self, *args, **kwargs):
        threading.Event().wait()

def smtp_XEND(self, arg):
    raise asyncore.ExitNow

Channel.smtp_XEND = smtp_XEND
server = make(Hanging)
try:
    asyncore.loop(timeout=1)  # Ctrl-C does not wake a select() that is about to start
except (KeyboardInterrupt, asyncore.ExitNow):
    os.write(2, b'ended')
'''
    with script(text, threads=1) as (process, address), \
            greet(address, HELLO) as hangs, greet(address) as client:
        start_message(hangs)
        assert client.say(b'NOOP') == OK
        if end == 'Ctrl-C':
            process.send_signal(signal.SIGINT)
        else:
            client.send(b'XEND\r\n')
        assert process.wait(20) == 0 and process.stderr.read() == b'ended'


def test_a_session_outlives_the_close_of_its_server_in_another_thread():
    """Even if another server is made in the loop meanwhile."""
    def smtp_XSERVE(self, arg):
        smtpd.SMTPServer(('127.0.0.1', 0), None, map={}).close()
        self.push('250 OK')

    server_class = variant(WaitingServer, channel_class=variant(
        smtpd.SMTPChannel, smtp_XSERVE=smtp_XSERVE))
    with looping(server_class) as server, \
            greet(server, HELLO) as first, greet(server, HELLO) as second:
        start_message(first)
        server.wait_until_entered()
        server.close()
        assert second.say(b'XSERVE') == OK
        server.go.set()
        assert first.reply() == OK
        for client in first, second:
            assert client.say(b'QUIT') == b'221 Bye\r\n'


def test_a_message_that_waits_as_its_server_closes_is_answered():
    def push(self, msg):
        smtpd.SMTPChannel.push(self, msg)
        if len(server.messages) == 1:  # the reply to the first one
            server.close()

    server_class = variant(WaitingServer, process_message_threads=1,
                           channel_class=variant(smtpd.SMTPChannel, push=push))
    with turning(server_class) as (server, turn), \
            RawClient(server) as first, RawClient(server) as second:
        for client in first, second:
            client.send(HELLO + b'\r\n' + TRANSACTION)
        turn(until=lambda: [len(each.rcpttos) for each in channels_of(server)] == [1, 1])
        first.send(b'1\r\n.\r\n')
        assert turn(until=lambda: server.entered.acquire(blocking=False))
        second.send(b'2\r\n.\r\n')
        server.go.set()
        for thread in threading.enumerate():
            if thread.ident in server.threads:
                thread.join(20)
        turn(until=lambda: len(server.messages) == 2)
        turn(at_most=20)
        for client in first, second:
            assert read_replies(client, 6) == BANNER + ANSWERED


def test_a_method_that_fails_after_it_has_begun_to_wait_ends_the_session(capsys):
    def found_terminator(self):
        has_data = self.smtp_state == self.DATA
        smtpd.SMTPChannel.found_terminator(self)
        assert not has_data, 'on purpose'

    channel_class = variant(smtpd.SMTPChannel, found_terminator=found_terminator)
    with serving(variant(WaitingServer, channel_class=channel_class)) as server, \
            greet(server, HELLO) as client:
        start_message(client)
        assert client.rest() == b''
        server.go.set()
    assert 'on purpose' in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# What is closed is freed

@needs_proc
@in_map_and_selector
@without_and_with_thread
def test_a_server_that_is_closed_is_freed_without_the_garbage_collector(threads):
    class Server(RecordingServer):
        process_message_threads = threads

        def readable(self):
            if self.messages and len(self._map) == 1:  # nobody else is there, at a new turn
                is_alone.set()
            return super().readable()

    is_alone = threading.Event()
    counts, servers = [], []
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            is_alone.clear()
            with looping(Server, 0.05, use_poll=True) as server:
                with greet(server, HELLO) as client:
                    assert relay_message(client) == OK
                    assert client.say(b'QUIT') == b'221 Bye\r\n'
                assert is_alone.wait(20)
                server.close()
            counts.append(len(os.listdir('/proc/self/fd')))
            servers.append(weakref.ref(server))
        assert [server() for server in servers[:-1]] == 4 * [None]
    finally:
        gc.enable()
    assert counts == 5 * counts[:1]


@in_map_and_selector
def test_nothing_is_kept_of_a_session_that_another_thread_closes():
    with serving() as server, greet(server) as client:
        [channel] = channels_of(server)
        for _ in range(2):
            channel.close()
        channel = weakref.ref(channel)
        assert client.rest() == b''
        while channel() is not None:
            assert is_served(server)
            gc.collect()


@needs_proc
def test_a_session_that_outlives_its_server_frees_what_its_messages_took():
    """Its first thread comes after close()."""
    text = '''
def smtp_XCOUNT(self, arg):
    self.smtp_server.process_message_threads = 1
    self.push('250 %d' % len(os.listdir('/proc/self/fd')))

Channel.smtp_XCOUNT = smtp_XCOUNT
serve()
'''
    with script(text) as (_, address), greet(address, HELLO) as client:
        assert client.say(b'XCLOSE') == OK
        count = client.say(b'XCOUNT')
        assert relay_message(client).startswith(b'250 of')
        assert client.say(b'XCOUNT') == count


# ---------------------------------------------------------------------------------------------
# Programs whose methods raise

@in_map_and_selector
def test_what_comes_together_with_a_command_that_fails_is_executed_at_once(capsys):
    channel = {'smtp_XFAIL': lambda self, arg: 1 / 0}
    with serving(variant(channel=channel), timeout=60) as server, greet(server) as client:
        client.send(b'XFAIL\r\nNOOP\r\n')
        assert client.reply() == CONFUSED and client.reply() == OK


@in_map_and_selector
@pytest.mark.parametrize('close_fails', [False, True], ids=['', 'and so does its close()'])
def test_a_channel_that_fails_in_init_leaves_nothing_behind(close_fails, capsys):
    class Channel(smtpd.SMTPChannel):
        def __init__(self, *args):
            super().__init__(*args)
            raise RuntimeError('in __init__')

        def close(self):
            closed.append(self)
            if close_fails:
                raise ZeroDivisionError
            super().close()

    closed = []
    with turning(variant(channel_class=Channel)) as (server, turn):
        for _ in range(2):  # the server goes on
            with RawClient(server) as client:
                assert turn(until=lambda: has_input(client)) and client.rest() == BANNER
        server.close()
        assert turn(until=lambda: not server._map)
    assert len(closed) == 2
    assert 'RuntimeError: in __init__' in capsys.readouterr().err


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
def test_close_all_closes_all_channels_but_the_one_that_raises():
    def close(self):
        if not raised:
            raised.append(self)
            raise ZeroDivisionError
        smtpd.SMTPChannel.close(self)

    raised = []
    with turning(variant(channel={'close': close})) as (server, turn), \
            contextlib.ExitStack() as clients:
        for _ in range(5):
            clients.enter_context(RawClient(server))
        assert turn(until=lambda: len(channels_of(server)) == 5)
        channels = channels_of(server)
        asyncore.close_all(server._map, ignore_all=True)
        assert [channel for channel in channels if channel.connected] == raised
        smtpd.SMTPChannel.close(*raised)


@without_and_with_thread
def test_a_channel_that_cannot_even_push_451_is_closed(threads, capsys):
    def push(self, msg):
        if self.received_data:
            raise OSError('no space for my log')
        smtpd.SMTPChannel.push(self, msg)

    server_class = variant(process_message_threads=threads, channel={'push': push})
    with serving(server_class) as server, greet(server, HELLO) as client:
        server.reply = KeyError('x')
        assert relay_message(client) == b''
    err = capsys.readouterr().err
    assert "KeyError: 'x'" in err and '\nOSError: no space' in err


@without_and_with_thread
def test_a_session_goes_on_if_the_loop_does_after_a_handlers_exit(threads):
    server_class = variant(process_message_threads=threads, process_message=unittest.mock.Mock(
        side_effect=asyncore.ExitNow))
    with turning(server_class) as (server, turn), RawClient(server) as client:
        client.send(ONE_MESSAGE)
        with pytest.raises(asyncore.ExitNow):
            turn()
        client.send(b'NOOP\r\n')
        turn(until=lambda: has_input(client))
        assert client.reply() == BANNER


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

    turned = threading.Event()
    with looping(First, 0.01, use_poll) as first:
        second = Second(map=first._map)
        for server in second, first:
            assert is_served(server)
            server.close()


@both_loops
@in_map_and_selector
def test_close_all_from_another_thread_closes_all(use_poll, capfd):
    """As the tearDown() of many test suites calls it."""
    for _ in range(20):
        with looping(timeout=0.05, use_poll=use_poll) as server, \
                contextlib.ExitStack() as clients:
            for _ in range(6):
                clients.enter_context(greet(server))
            channels = channels_of(server)
            asyncore.close_all(server._map)
        assert [each.socket.fileno() for each in [server, *channels]] == 7 * [-1]
    assert capfd.readouterr() == ('', '')


@needs_proc
def test_close_all_from_another_thread_frees_what_a_handler_under_way_took(monkeypatch):
    """Even if the loop has just started the handler, and goes on during close_all()."""
    class Server(WaitingServer):
        def close(self):
            closing.set()
            assert any(len(self._map) > 2 for _ in support.waits())  # one more stands in it
            super().close()

    count, closing = len(os.listdir('/proc/self/fd')), threading.Event()
    with looping(Server) as server, greet(server, HELLO) as client:
        start = threading.Thread.start
        monkeypatch.setattr(
            threading.Thread, 'start', lambda thread: (start(thread), closing.wait(20)))
        start_message(client)
        server.wait_until_entered()
        asyncore.close_all(server._map)
        server.go.set()
    assert any(len(os.listdir('/proc/self/fd')) == count for _ in support.waits())


@both_loops
@pytest.mark.parametrize('turn', [1, 2], ids='turn {}'.format)  # which makes it known to the other
def test_a_server_that_is_closed_just_before_the_loop_asks_it_wakes_the_loop(use_poll, turn):
    """The loop took it from the map before, and has nothing else to wait for."""
    class Server(RecordingServer):
        turns = 0

        def readable(self):
            self.turns += 1
            if self.turns == turn:
                in_another_thread(self.close)
            return super().readable()

    with looping(Server, 0.01, use_poll):
        pass


@in_map_and_selector
def test_a_loop_that_sleeps_ends_when_another_thread_closes_all_that_it_serves():
    with looping() as server, greet(server):
        server.close()
        for channel in channels_of(server):
            channel.close()


@both_loops
def test_two_servers_that_are_closed_one_after_the_other_leave_no_loop_asleep(use_poll):
    for _ in range(50):
        with looping(use_poll=use_poll) as first:
            second = RecordingServer(map=first._map)
            first.close()
            second.close()


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
def test_program_may_close_all_under_a_lock_that_its_methods_wait_for(name):
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

    with serving(variant(channel={name: method})) as server, greet(server) as client:
        armed.set()
        client.send(b'QUIT\r\n')
        assert arrived.wait(20)
        in_another_thread(stop)
