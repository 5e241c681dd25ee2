"""What more than one file of the tests uses; it chooses the smtpd.py that they test.

PYSMTPD_TEST_MODULE_DIR names the directory of the smtpd.py to be tested, if not
the one above this; PYSMTPD_TEST_REQUIRE_ALL=1 makes failures of skips.
"""
import asynchat
import asyncore
import contextlib
import errno
import functools
import gc
import importlib.util
import itertools
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import unittest.mock

import pytest
from hypothesis import HealthCheck, settings

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODULE_DIR = os.environ.get('PYSMTPD_TEST_MODULE_DIR') or HERE
# First: up to Python 3.11 the standard library's smtpd comes before an installed one.
sys.path.insert(0, MODULE_DIR)

import smtpd

# The same examples in each run, on however slow a machine.
settings.register_profile('repeatable', derandomize=True, deadline=None, database=None,
                          suppress_health_check=list(HealthCheck))
settings.load_profile('repeatable')

PEER = ('127.0.0.1', 54321)
FQDN = 'mx.example'


# ---------------------------------------------------------------------------------------------
# A channel fed bytes, without a socket

class FakeConnection:
    """A connected socket without a network: recv() pops what feed() queued, send() is recorded."""

    family = socket.AF_INET
    sends_at_most = None  # octets that one send() takes, None for all

    def __init__(self):
        self.incoming = []
        self.sends = []
        self.closed = False

    @property
    def sent(self):
        return b''.join(self.sends)

    def recv(self, size, flags=0):
        if not self.incoming:
            raise BlockingIOError(errno.EAGAIN, 'nothing there')
        data = self.incoming.pop(0)
        if isinstance(data, Exception):
            raise data
        if flags == socket.MSG_PEEK:
            self.incoming.insert(0, data)
        elif len(data) > size:
            self.incoming.insert(0, data[size:])
        return data[:size]

    def send(self, data, flags=0):
        data = bytes(data)[:self.sends_at_most]
        self.sends.append(data)
        return len(data)

    def fileno(self):
        return 7

    def getpeername(self):
        return PEER

    def setblocking(self, *args):
        return 0

    setsockopt = getsockopt = setblocking

    def close(self):
        self.closed = True


class StubServer:
    """The least that a channel needs of a server; keeps what it is given."""

    def __init__(self, reply=None):
        self.messages = []
        self.arrived = threading.Event()
        self.reply = reply

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        self.messages.append((peer, mailfrom, list(rcpttos), data, kwargs))
        self.arrived.set()
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply


def make_channel(server=None, channel_class=None, **kwargs):
    """A channel on a FakeConnection, its banner already taken away."""
    channel = (channel_class or smtpd.SMTPChannel)(
        server or StubServer(), FakeConnection(), PEER, map={}, **kwargs)
    channel.conn.sends.clear()
    return channel


def feed(channel, *pieces):
    """Give the pieces to the channel as a loop would, one read event each; return what it sent."""
    start = len(channel.conn.sent)
    for piece in pieces:
        channel.conn.incoming.append(piece)
        while channel.connected and (channel.conn.incoming and channel.readable()
                                     or channel.writable()):
            if channel.conn.incoming and channel.readable():
                asyncore.read(channel)
            if channel.connected and channel.writable():
                asyncore.write(channel)
    return channel.conn.sent[start:]


def octets(text):
    """The octets of a transcript's line; '\\udcff' stands for the octet 255."""
    return text.encode('utf-8', 'surrogateescape')


def server_lines(sent):
    return ['S: ' + line.decode('utf-8', 'surrogateescape')
            for line in sent.split(b'\r\n')[:-1]]


def all_at_once(channel, lines):
    return server_lines(feed(channel, b''.join(lines)))


def byte_by_byte(channel, lines):
    return server_lines(feed(channel, *(bytes([octet]) for octet in b''.join(lines))))


def line_by_line(channel, lines):
    return server_lines(feed(channel, *lines))


three_ways = pytest.mark.parametrize(
    'way', [all_at_once, byte_by_byte, line_by_line],
    ids=['all at once', 'byte by byte', 'line by line'])
both_modes = pytest.mark.parametrize('decode_data', [False, True], ids=['bytes', 'text'])
TO_DATA = b'EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n'
FROM_AND_TO = [b'MAIL FROM:<a@b>\r\n', b'RCPT TO:<c@d>\r\n']
READY = b'354 End data with <CR><LF>.<CR><LF>\r\n'


def in_mode(data, decode_data):
    return data.decode('utf-8', 'surrogateescape') if decode_data else data


def in_pieces(wire, size):
    return [wire[start:start + size] for start in range(0, len(wire), size)]


# ---------------------------------------------------------------------------------------------
# Channels as existing programs have them

def channel_with(**attributes):
    """A channel whose class has these attributes."""
    return make_channel(channel_class=variant(smtpd.SMTPChannel, **attributes))


def without_init(server, conn, addr, map=None, decode_data=False):
    """Nothing is set but what a program of its own has to say."""
    channel = smtpd.SMTPChannel.__new__(smtpd.SMTPChannel)
    asynchat.async_chat.__init__(channel, conn, map)
    channel.smtp_server, channel.conn, channel.peer, channel.fqdn = server, conn, addr, FQDN
    channel._decode_data, channel._emptystring = decode_data, '' if decode_data else b''
    channel.set_terminator(b'\r\n')
    return channel


class HookedChannel(smtpd.SMTPChannel):
    """Takes asynchat's way, since it overrides the hooks."""

    def collect_incoming_data(self, data):
        super().collect_incoming_data(data)

    def found_terminator(self):
        super().found_terminator()


# ---------------------------------------------------------------------------------------------
# A server in a thread, and a client of raw octets

class RecordingServer(StubServer, smtpd.SMTPServer):
    def __init__(self, localaddr=('127.0.0.1', 0), remoteaddr=None, **kwargs):
        StubServer.__init__(self)
        smtpd.SMTPServer.__init__(self, localaddr, remoteaddr, **kwargs)


@contextlib.contextmanager
def serving(server_class=RecordingServer, localaddr=('127.0.0.1', 0), remoteaddr=None,
            use_poll=False, timeout=0.5, **kwargs):
    """Run a server with a socket map of its own in a thread; close it and its channels."""
    sockets = {}
    server = server_class(localaddr, remoteaddr, map=sockets, **kwargs)
    server.port_number = server.socket.getsockname()[1]
    stopping = threading.Event()

    def loop():
        while not stopping.is_set():
            asyncore.loop(timeout=timeout, use_poll=use_poll, map=sockets, count=1)
        asyncore.close_all(sockets)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield server
    finally:
        stopping.set()
        with contextlib.suppress(OSError):  # wakes the loop
            socket.create_connection(server.socket.getsockname()[:2], timeout=5).close()
        thread.join(20)
        assert not thread.is_alive()


class RawClient:
    """A client of raw octets: says what it is told, reads whole replies."""

    def __init__(self, server_or_address, timeout=20):
        address = getattr(server_or_address, 'socket', None)
        address = address.getsockname()[:2] if address else server_or_address
        self.socket = socket.create_connection(address, timeout=timeout)
        self.file = self.socket.makefile('rb')

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.file.close()
        self.socket.close()

    def send(self, octets):
        self.socket.sendall(octets)

    def reply(self):
        """One whole reply, multi-line ones joined; b'' at the end of the stream."""
        lines = []
        while True:
            line = self.file.readline()
            lines.append(line)
            if line[3:4] != b'-':
                return b''.join(lines)

    def say(self, line):
        self.send(line + b'\r\n')
        return self.reply()

    def rest(self):
        """All until the server closes."""
        return self.file.read()


@contextlib.contextmanager
def traced_memory():
    """Yields a function that tells the octets allocated since, now and at most."""
    tracemalloc = pytest.importorskip('tracemalloc')  # PyPy has none
    tracemalloc.start()
    try:
        yield tracemalloc.get_traced_memory
    finally:
        tracemalloc.stop()


# The test runs twice, its channels watched by asyncore's map, and by the server's selector.
in_map_and_selector = pytest.mark.usefixtures('selector')


def variant(base=RecordingServer, channel=None, **attributes):
    """A class with other attributes; `channel` are those of a server's channels."""
    if channel is not None:
        attributes['channel_class'] = variant(base.channel_class, **channel)
    return type(base.__name__, (base,), attributes)


BANNER = b'220 mx.example Python SMTP proxy version 0.3\r\n'
TRANSACTION = b'MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n'
ONE_MESSAGE = b'HELO x\r\n' + TRANSACTION + b'text\r\n.\r\n'
ANSWERED_TO_DATA = b'250 mx.example\r\n' + 2 * b'250 OK\r\n' + READY
ANSWERED = ANSWERED_TO_DATA + b'250 OK\r\n'
TRANSACTION_ANSWERED = 2 * b'250 OK\r\n' + READY + b'250 OK\r\n'
TIMED_OUT = b'421 Error: timeout exceeded\r\n'


def greet(server_or_address, *lines, timeout=20):
    """A client that has read the banner, and said these lines, which were taken."""
    client = RawClient(server_or_address, timeout)
    for reply in itertools.chain([client.reply()], map(client.say, lines)):
        assert reply.startswith(b'2'), reply
    return client


def read_replies(client, count):
    return b''.join(client.reply() for _ in range(count))


def shut(client):
    """Half-close: nothing more is sent."""
    client.socket.shutdown(socket.SHUT_WR)


def reset(client):
    """Close with a RST instead of a FIN."""
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    client.close()


def is_served(server, times=3):
    """Each answer takes at least one turn of the loop that began after what came before."""
    with greet(server) as client:
        return (all(client.say(b'NOOP') == b'250 OK\r\n' for _ in range(times))
                and client.say(b'QUIT') == b'221 Bye\r\n' and client.rest() == b'')


@contextlib.contextmanager
def turning(server_class=RecordingServer, **kwargs):
    """A server whose loop the test itself turns: yields it and turn(until)."""
    sockets = kwargs.setdefault('map', {})
    if sockets is None:
        sockets = asyncore.socket_map
    server = server_class(('127.0.0.1', 0), None, **kwargs)

    def turn(until=lambda: False, at_most=2000):
        for _ in range(at_most):
            if until():
                return True
            asyncore.loop(timeout=0.01, map=sockets, count=1)
        return until()

    try:
        yield server, turn
    finally:
        asyncore.close_all(sockets)


@contextlib.contextmanager
def looping(server_class=RecordingServer, timeout=30, use_poll=False):
    """A server whose loop must end with the block, when nothing is left in its map."""
    waits = threading.Event()

    def readable(self):
        is_readable = server_class.readable(self)
        waits.set()  # this thread keeps the GIL until it waits
        return is_readable

    server = variant(server_class, readable=readable)(map={})
    thread = threading.Thread(
        target=asyncore.loop, args=(timeout, use_poll, server._map), daemon=True)
    thread.start()
    try:
        assert waits.wait(20)
        yield server
        thread.join(20)
        assert not thread.is_alive() and server._map == {}
    finally:
        if thread.is_alive():
            server.close()


def has_input(client):
    return bool(select.select([client.socket], [], [], 0)[0])


def small_buffers(server, size=20_000):
    """A client between which and the server little fits."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # channels inherit them
        server.socket.setsockopt(socket.SOL_SOCKET, option, size)
    client = RawClient(server)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    return client


def channels_of(server):
    """Wherever they are watched."""
    return [each for each in gc.get_objects()
            if isinstance(each, smtpd.SMTPChannel) and each.smtp_server is server]


def count_lines(client, turn):
    """Read all while the loop turns; how many lines it was."""
    lines, chunk = 0, b'-'
    while chunk:
        assert turn(until=lambda: has_input(client))
        chunk = client.socket.recv(1 << 20)
        lines += chunk.count(b'\n')
    return lines


def failing_listener(server, error):
    """A socket as the server's, whose accept() raises."""
    listener = unittest.mock.Mock(wraps=server.socket)
    listener.accept.side_effect = OSError(error, os.strerror(error))
    return listener


class WaitingServer(RecordingServer):
    """Its handler waits until it is told to go on."""

    process_message_threads = 2

    def __init__(self, *args, **kwargs):
        self.go = threading.Event()
        self.threads = set()
        self.entered = threading.Semaphore(0)
        super().__init__(*args, **kwargs)

    def process_message(self, *args, **kwargs):
        self.threads.add(threading.get_ident())
        self.entered.release()
        assert self.go.wait(20)
        return super().process_message(*args, **kwargs)

    def wait_until_entered(self):
        assert self.entered.acquire(timeout=20)


# ---------------------------------------------------------------------------------------------
# Programs as processes

def environment(*folders, **changes):
    """The environment of a process that imports the module under test, as a user's would be."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(
        [os.path.dirname(os.path.realpath(smtpd.__file__)), *map(str, folders)]), **changes)
    env.pop('PYTHONUNBUFFERED', None)  # hides buffering faults
    return env


# On Python 3.10 and 3.11 the standard library warns of its own asyncore and asynchat.
STRICT = [sys.executable, '-W', 'error', '-W', 'ignore:The asyn:DeprecationWarning']


@contextlib.contextmanager
def running(command, **kwargs):
    """A process, ended at the end."""
    with subprocess.Popen(command, **{
            'env': environment(), 'stdin': subprocess.DEVNULL, 'stdout': subprocess.PIPE,
            'stderr': subprocess.PIPE, **kwargs}) as process:
        try:
            yield process
        finally:
            process.terminate()  # coverage saves then what it has seen
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=20)
            process.kill()
            process.communicate()


@contextlib.contextmanager
def script(text, options=STRICT, **kwargs):
    """A process that runs a script, which first prints its port: yields it and its address.

    It ends with its standard input.
    """
    with running([*options, '-c', text], stdin=subprocess.PIPE, **kwargs) as process:
        first = process.stdout.readline()
        assert first, process.stderr.read().decode()
        yield process, ('127.0.0.1', int(first))


SMTPD = STRICT + ['-m', 'smtpd']


@contextlib.contextmanager
def held_port(host='127.0.0.1'):
    """The number of a port that nobody else is given meanwhile, for a server to listen on.

    A socket is bound to it but does not listen, so connections are refused until the server
    does; a server that sets SO_REUSEADDR may bind it too.  On BSD and macOS it may do so only
    if the two addresses differ, so this one is that of any interface.
    """
    family, any_interface = (
        (socket.AF_INET6, '::') if ':' in host else (socket.AF_INET, '0.0.0.0'))
    with socket.socket(family) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((any_interface, 0))
        yield holder.getsockname()[1]


def is_ready(process, address):
    """Wait until something accepts there; false if the process ended first."""
    for _ in range(400):
        try:
            socket.create_connection(address, timeout=5).close()
            return True
        except OSError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
                return False
    raise AssertionError('not ready')


@contextlib.contextmanager
def running_server(make_command, host='127.0.0.1', **kwargs):
    """The process of make_command(port), which listens there: yields it and its address."""
    with held_port(host) as port, running(make_command(port), **kwargs) as process:
        assert is_ready(process, (host, port)), process.communicate()
        yield process, (host, port)


def command_line(*options, host='127.0.0.1', remote=None, **kwargs):
    """A running `python -m smtpd -n`: yields the process and its address."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # would be inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    spec = '[%s]:%d' if ':' in host else '%s:%d'
    return running_server(lambda port: [*SMTPD, '-n', *options, spec % (host, port)]
                          + ([remote] if remote else []), host, **kwargs)


def read_until(file, end):
    """Read from a pipe, as it comes, until the end is there."""
    text = b''
    while end not in text:
        assert select.select([file], [], [], 20)[0], text
        chunk = os.read(file.fileno(), 65536)
        assert chunk, text
        text += chunk
    return text


# ---------------------------------------------------------------------------------------------
# What a machine may lack

def missing(what):
    """Skip, or fail where nothing may be left out, for want of something on this machine."""
    if os.environ.get('PYSMTPD_TEST_REQUIRE_ALL') == '1':
        pytest.fail('missing: ' + what)
    pytest.skip('missing: ' + what)


def python_of(version):
    variable = 'PYSMTPD_TEST_PYTHON' + version.replace('.', '')
    python = os.environ.get(variable) or shutil.which('python' + version)
    return python or missing('python%s (or its path in %s)' % (version, variable))


# ---------------------------------------------------------------------------------------------
# A server that misbehaves on purpose

SENDER = b'<sender@example.com>'
RECIPIENT = b'<rcpt@example.com>'
HELLO = b'HELO client.example'
PROXIED = b'Subject: hello\r\n\r\nText.\r\n'

CLOSE, HANG, ENDLESS, SLOW = 'break off', 'hang', 'never end', 'never end, slowly'


class Upstream:
    """An SMTP or LMTP server of bare sockets and threads; keeps the octets as they come.

    `faults` maps a step (CONNECT, a verb, BODY for the middle of a message, "." for its end)
    to the reply that it gets, CLOSE, HANG (until release()), ENDLESS or SLOW, or to a list
    of these, None among them, one for each time; `refused` maps a recipient to its reply.
    If `known` is set, recipients that it does not match are refused.
    """

    def __init__(self, host='127.0.0.1', known=None, **faults):
        self.faults = faults
        self.refused = {}
        self.known = known
        self.extensions = ['SIZE 40000000', '8BITMIME']
        self.keeps_refused = False  # the transaction, as some Postfixes do
        self.commands = []
        self.connections = 0
        self.bodies = []
        self.messages = []
        self.torn = []  # lines of messages that had no end
        self.hangs = threading.Event()
        self.released = threading.Event()
        self.address = host, 0

    def __enter__(self):
        host = self.address[0]
        self.port_holder = held_port(host)  # for as long as it is stopped, too
        self.address = host, self.port_holder.__enter__()
        self.start()
        return self

    def __exit__(self, *exc):
        self.stop()
        self.port_holder.__exit__(*exc)

    def start(self):
        family = socket.AF_INET6 if ':' in self.address[0] else socket.AF_INET
        self.listener = socket.create_server(self.address, family=family, backlog=100)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.ends = threading.Event()
        self.sockets = []
        self.threads = [threading.Thread(target=self.accept, daemon=True)]
        self.threads[0].start()

    def stop(self):
        self.ends.set()
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.threads[0].join(20)
        self.release()
        for connection in self.sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        self.listener.close()

    def release(self):
        """Let the sessions go on that hang, and all that come later."""
        self.released.set()

    def accept(self):
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self.sockets.append(connection)
            self.threads.append(
                threading.Thread(target=self.session, args=(connection,), daemon=True))
            self.threads[-1].start()

    def session(self, connection):
        with connection, connection.makefile('rb') as file, contextlib.suppress(OSError):
            self.answer(connection, 'CONNECT', '220 upstream.example')
            mailfrom, recipients = None, []
            for line in file:
                self.commands.append(line)
                verb = line.split()[0].decode().upper()
                path = re.search(b':<?(.*?)>?( [^<>]*)?\r\n|$', line)[1]
                path = path and path.decode()
                if verb in ('EHLO', 'LHLO'):
                    reply = '\r\n'.join(
                        ['250-upstream.example', *('250-' + each for each in self.extensions),
                         '250 HELP'])
                    self.answer(connection, verb, reply)
                elif verb == 'MAIL':
                    if self.answer(connection, verb,
                                   '250 OK' if mailfrom is None else '503 5.5.1 Nested'):
                        mailfrom, recipients = path, []
                elif verb == 'RCPT':
                    if self.answer(connection, verb, self.verdict(mailfrom, path)):
                        recipients.append(path)
                elif verb == 'DATA':
                    reply = '354 Go on' if recipients else '503 5.5.1 No recipients'
                    if self.answer(connection, verb, reply):
                        body = self.read_body(connection, file)
                        is_taken = self.answer(
                            connection, '.', '250 OK',
                            functools.partial(self.keep, mailfrom, recipients, body))
                        if is_taken or not self.keeps_refused:
                            mailfrom = None
                else:
                    self.answer(connection, verb, '221 Bye' if verb == 'QUIT' else '250 OK')
                    if verb == 'QUIT':
                        return
                    mailfrom = None

    def verdict(self, mailfrom, path):
        if mailfrom is None:
            return '503 5.5.1 No sender'
        if self.known and not re.search(self.known, path, re.I):
            return self.refused.get(path, '550 Requested action not taken: mailbox unavailable')
        return self.refused.get(path, '250 OK')

    def read_body(self, connection, file):
        lines = []
        for line in file:
            if line == b'.\r\n':
                return b''.join(lines)
            if not lines:
                self.answer(connection, 'BODY', None)
            lines.append(line)
        self.torn += lines
        raise ConnectionError('the end without a dot')

    def keep(self, mailfrom, recipients, body):
        self.bodies.append(body)
        content = (b'\r\n' + body).replace(b'\r\n.', b'\r\n')[2:]
        self.messages.append((mailfrom, recipients, content))

    def answer(self, connection, step, reply, before=None):
        """Send the reply, or what the test wants instead; whether it is a good one."""
        fault = self.faults.get(step)
        if isinstance(fault, list):
            fault = fault.pop(0) if fault else None
        if fault == HANG:
            self.hangs.set()
            while not self.released.wait(0.01) and not self.ends.is_set():
                self.raise_if_left(connection)
            self.raise_if_left(connection)
        elif fault == CLOSE:
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        elif fault == ENDLESS:
            while True:
                connection.sendall(b'250-and\r\n' * 100)
        elif fault == SLOW:
            while not self.ends.wait(0.05):
                connection.sendall(b'250-and\r\n')
        elif fault is not None:
            reply = fault
        if reply is None:
            return True
        if before and re.match('2[0-9]{2} ', reply):
            before()
        connection.sendall(reply.encode('latin-1') + b'\r\n')
        if step == 'BODY' or reply.startswith('421'):
            connection.shutdown(socket.SHUT_WR)  # it may still read
            raise ConnectionError
        return reply[:1] in '23'

    def raise_if_left(self, connection):
        ready = select.select([connection], [], [], 0)[0]
        if ready and not connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError('the proxy has gone')

    def verbs(self, verb):
        return [line for line in self.commands if line.upper().startswith(verb)]


# ---------------------------------------------------------------------------------------------
# Messages through a proxy

def proxy_to(upstream, proxy_class=smtpd.PureProxy, **kwargs):
    return serving(proxy_class, remoteaddr=upstream.address, **kwargs)


def stuffed(octets):
    """The message as a client sends it: dots doubled, the end marked."""
    assert octets.endswith(b'\r\n')
    return (b'\r\n' + octets).replace(b'\r\n.', b'\r\n..')[2:] + b'.\r\n'


def start_message(client, octets=PROXIED, sender=SENDER, recipients=(RECIPIENT,)):
    """Send a whole message, do not wait for the reply."""
    assert client.say(b'MAIL FROM:' + sender).startswith(b'250 ')
    for recipient in recipients:
        assert client.say(b'RCPT TO:' + recipient).startswith(b'250 ')
    assert client.say(b'DATA').startswith(b'354 ')
    client.send(stuffed(octets))


def steps(client, message=PROXIED, sender=SENDER, recipients=(RECIPIENT,)):
    """One transaction, as far as the replies let it go; the replies in order."""
    replies = [client.say(b'MAIL FROM:' + sender)]
    replies += [client.say(b'RCPT TO:' + each) for each in recipients]
    replies.append(client.say(b'DATA'))
    if replies[-1].startswith(b'354'):
        client.send(stuffed(message))
        replies.append(client.reply())
    return [reply.decode()[:-2] for reply in replies]


def relay_message(client, *args, **kwargs):
    start_message(client, *args, **kwargs)
    return client.reply()


def post(server, *args, **kwargs):
    """One session, one message: the reply to it. The session must go on afterwards."""
    with greet(server, HELLO) as client:
        reply = relay_message(client, *args, **kwargs)
        assert client.say(b'NOOP') == b'250 OK\r\n'
        assert client.say(b'QUIT') == b'221 Bye\r\n'
        assert client.rest() == b''
    return reply


def with_x_peer(octets, peer=b'127.0.0.1'):
    """What the proxy makes of a message that has an empty line."""
    head, empty_line, body = octets.partition(b'\r\n\r\n')
    assert empty_line
    return head + b'\r\nX-Peer: ' + peer + empty_line + body


def idle_proxy(proxy_class=smtpd.PureProxy, remoteaddr=('127.0.0.1', 9), **kwargs):
    """A server that no loop serves, for calls of its methods."""
    return contextlib.closing(proxy_class(('127.0.0.1', 0), remoteaddr, map={}, **kwargs))


def mailman_proxy_to(upstream, mailman, proxy_class=smtpd.MailmanProxy, **kwargs):
    proxy_class = variant(proxy_class, mailman_lmtp_address=mailman.address)
    return proxy_to(upstream, proxy_class, **kwargs)


OTHERS = (b'<c@example.com>', b'<d@example.com>')
OTHER_NAMES = ('c@example.com', 'd@example.com')


def find_tool(name, package):
    path = shutil.which(name, path=os.environ.get('PATH', '') + ':/usr/sbin:/sbin')
    return path or missing("%s (Debian's package %s)" % (name, package))


def waits(seconds=30):
    """For what can only be polled: files and ports of other programs. Ends by failing."""
    for _ in range(int(seconds / 0.02)):
        yield
        select.select([], [], [], 0.02)
    pytest.fail('waited %s seconds in vain' % seconds)


def clean_environment():
    return {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}


def need_module(name, package=None):
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a directory that is only called so: build/
        missing('the package %s' % (package or name))
    return spec


IN_A_REPOSITORY_ONLY = {'.ci', '.git', '.gitignore'}
MADE_HERE = {'.hypothesis', '.mutants', '.tox', 'build', 'dist', 'html', '__pycache__',
             'pysmtpd.egg-info'}


def copy_of_the_source(directory):
    """Builds litter it.  As the source distribution has it, but for what is made from it."""
    shutil.copytree(HERE, str(directory), ignore=lambda _, names: {
        name for name in names
        if name in MADE_HERE | IN_A_REPOSITORY_ONLY or name.endswith('-env')})
    return directory


# ---------------------------------------------------------------------------------------------
# Fixtures


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test():
    """Those for handlers may: they wait a second for the next message."""
    before = threading.enumerate()
    yield
    for thread in threading.enumerate():
        if thread not in before and not thread.daemon:
            thread.join(10)
            assert not thread.is_alive(), thread


@pytest.fixture(autouse=True)
def fqdn(monkeypatch):
    """socket.getfqdn() can take seconds: pin it."""
    monkeypatch.setattr(socket, 'getfqdn', lambda name='': FQDN)
    return FQDN


@pytest.fixture
def upstream():
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(params=[False, True], ids=['in the map', 'in the selector'])
def selector(request, monkeypatch):
    monkeypatch.setattr(smtpd.SMTPServer, 'channels_in_selector', request.param)
    return request.param


@pytest.fixture
def clock(monkeypatch):
    """Its `seconds` are what the monotonic clock is ahead of the real one."""
    clock = types.SimpleNamespace(seconds=0)
    monotonic = time.monotonic
    monkeypatch.setattr(time, 'monotonic', lambda: monotonic() + clock.seconds)
    return clock
