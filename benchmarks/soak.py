"""Feed this checkout's smtpd.py hostile sessions until it has had a million commands.

    python benchmarks/soak.py                      a million commands, about half a minute
    python benchmarks/soak.py --commands 20000     a short form

One process runs four servers in one asyncore.loop(): bytes and text, in the socket map and in
the selector, with and without handler threads.  This one holds some sessions with each at the
same time: commands in any order with good and odd arguments, messages, random octets, lines that
are far too long, all cut anywhere; it reads late or little, sends an octet out of band, and ends
with QUIT, a half-close, a close or a RST.  Handlers raise now and then.

A finding is

- an exception that reached the loop: one that is logged and does not come from a handler, or
  that ended the process;
- a session without a reply: a complete command or message that got none, or more than one;
- memory that grows: the end more than a tenth (and 4 MB) over the middle.

Exit status 1 if there is one.  The same --seed gives the same sessions.
"""
import argparse
import contextlib
import os
import random
import re
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SESSIONS_AT_ONCE = 24
TIMEOUT = 60  # seconds without any progress of any session

SETTINGS = [  # of the servers
    {},
    {'decode_data': True, 'data_size_limit': 5000},
    {'channels_in_selector': True},
    {'channels_in_selector': True, 'process_message_threads': 2, 'enable_SMTPUTF8': True},
]


# ---------------------------------------------------------------------------
# The process with the servers
# ---------------------------------------------------------------------------

def serve():
    sys.path.insert(0, TOP)
    import smtpd
    assert os.path.dirname(os.path.abspath(smtpd.__file__)) == TOP, smtpd.__file__

    class HandlerFailure(Exception):
        pass

    def log_info(self, message, type='info'):
        if 'HandlerFailure' not in message:
            print(type, message, file=sys.stderr, flush=True)

    class Channel(smtpd.SMTPChannel):
        pass

    class Server(smtpd.SMTPServer):
        channel_class = Channel

        def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
            if 'raise@example' in rcpttos:
                raise HandlerFailure
            if 'refuse@example' in rcpttos:
                return '550 No\nnever'
            return None

    Server.log_info = Channel.log_info = log_info
    ports = []
    for setting in SETTINGS:
        attributes = {name: setting[name] for name in setting if hasattr(Server, name)
                      and name not in ('data_size_limit', 'enable_SMTPUTF8')}
        arguments = {name: setting[name] for name in setting if name not in attributes}
        server = type('Server', (Server,), attributes)(('127.0.0.1', 0), None, **arguments)
        ports.append(server.socket.getsockname()[1])
    print(*ports, flush=True)
    smtpd.asyncore.loop()


# ---------------------------------------------------------------------------
# Hostile sessions
# ---------------------------------------------------------------------------

COMMANDS = [
    b'EHLO x', b'EHLO', b'HELO x', b'NOOP', b'NOOP x', b'RSET', b'HELP', b'HELP MAIL', b'EXPN x',
    b'VRFY a@b', b'VRFY "', b'MAIL FROM:<a@b>', b'MAIL FROM:<>', b'MAIL FROM:<a@b> SIZE=10',
    b'MAIL FROM:<a@b> SIZE=', b'MAIL', b'MAIL FROM:<a@b> BODY=8BITMIME SMTPUTF8',
    b'MAIL FROM:<\xc3\xa9@b> SMTPUTF8', b'MAIL FROM:<"', b'MAIL FROM:<a@[x>', b'RCPT TO:<c@d>',
    b'RCPT TO:<raise@example>', b'RCPT TO:<refuse@example>', b'RCPT TO:<=?utf-8?q?=0d=0a?=@x>',
    b'RCPT TO:<c@d> X=Y', b'RCPT', b'DATA', b'DATA x', b'FOO', b'', b' ', b'.', b'..', b'\xff\xfe',
    b'\xc3\x9cBER', b'QU\xc4\xb1T', b'NO\x00OP', b'set_terminator x', b'__init__',
    b'MAIL FROM:<' + b'a' * 600 + b'@b>', b'x' * 3000,
]
TRANSACTIONS = [
    [b'RSET', b'HELO x', b'MAIL FROM:<a@b>', b'RCPT TO:<%s>' % recipient, b'DATA']
    for recipient in (b'c@d', b'c@d', b'raise@example', b'refuse@example')]
DATA_PIECES = [
    b'text\r\n', b'.', b'..\r\n', b'\r\n', b'\n', b'\r', b'\n.\n', b'\r\n.\n', b'\n.\r\n',
    b'\xff\xc3', b'\x00', b'x' * 1000, b'a\r\n' * 300, b'.\r\n' * 5]
RESET_AT_CLOSE = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)


def make_wire(chance):
    """What one client sends."""
    wire = []
    for _ in range(chance.randint(1, 30)):
        kind = chance.random()
        if kind < 0.6:
            wire += [chance.choice(COMMANDS) + b'\r\n' for _ in range(chance.randint(1, 8))]
        elif kind < 0.9:
            wire += [line + b'\r\n' for line in chance.choice(TRANSACTIONS)]
            wire += [chance.choice(DATA_PIECES) for _ in range(chance.randint(0, 10))]
            if chance.random() < 0.95:
                wire.append(b'\r\n.\r\n')
        elif kind < 0.99:
            wire.append(bytes(chance.randrange(256) for _ in range(chance.randint(1, 200))))
        else:
            wire.append(b'HELP\r\n' * chance.choice([10, 1000]))
    if chance.random() < 0.3:
        wire.insert(chance.randint(0, len(wire)), b'QUIT\r\n')
    return b''.join(wire)


def count_answered(wire, received):
    """How many commands and messages got their reply; AssertionError if one got none, or two."""
    replies = re.findall(rb'(?:[0-9]{3}-[^\r\n]*\r\n)*([0-9]{3})(?: [^\r\n]*)?\r\n', received)
    whole = b''.join(each.group() for each in re.finditer(
        rb'(?:[0-9]{3}-[^\r\n]*\r\n)*[0-9]{3}(?: [^\r\n]*)?\r\n', received))
    assert whole == received, 'what was received is no sequence of replies: %r' % received[-200:]
    assert replies and replies.pop(0) == b'220', 'no banner'
    position = 0
    for count, code in enumerate(replies):
        if code == b'421':
            return count
        end = wire.find(b'\r\n', position)
        assert end >= 0, 'a reply too many: %r' % received[-200:]
        position = end + 2
        if code == b'221':
            assert count == len(replies) - 1, 'a reply behind that to QUIT'
            return count + 1
        if code == b'354':
            # The CRLF of DATA may be the first of the end of data.
            end = wire.find(b'\r\n.\r\n', position - 2)
            if end < 0:
                assert count == len(replies) - 1, 'a reply to half a message'
                return count + 1
            position = end + 3  # its last CRLF stands for a line, which gets the next reply
    assert wire.find(b'\r\n', position) < 0, (
        'no reply to %r, behind %r' % (wire[position:position + 80], received[-200:]))
    return len(replies)


class Session:
    """One client; step() does a little and says whether it is over."""

    def __init__(self, chance, port):
        self.chance = chance
        self.wire = make_wire(chance)
        self.unsent = memoryview(self.wire)
        self.received = b''
        self.reads_late = chance.random() < 0.15
        self.reads_little = chance.random() < 0.1
        self.end = chance.choice(['half-close'] * 6 + ['reset', 'close'])
        if self.end in ('reset', 'close'):
            self.unsent = self.unsent[:chance.randint(0, len(self.wire))]
        self.commands = 0
        self.error = None
        self.was_checked = False  # all its replies
        self.socket = socket.socket()
        if self.reads_late:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(('127.0.0.1', port))
        self.socket.setblocking(False)
        self.has_shut = False
        self.has_sent_out_of_band = False

    def step(self):
        try:
            return self.send() if self.unsent and self.chance.random() < 0.7 else self.receive()
        except OSError:  # ECONNRESET, EPIPE; ENOTCONN from shutdown()
            # The server closed while we still sent: that is only right after QUIT and 421,
            # and what it said last may be lost.
            if not re.search(rb'(?i)quit', self.wire) and self.wire.count(b'\r\n') < 100:
                self.error = 'connection closed before its end'
            return self.finish()

    def send(self):
        size = self.chance.choice([1, 2, 7, 60, 500, 5000, 50_000])
        with contextlib.suppress(BlockingIOError):
            if not self.has_sent_out_of_band and self.chance.random() < 0.01:
                self.has_sent_out_of_band = True  # a second would push the first into the data
                self.socket.send(b'!', socket.MSG_OOB)
            self.unsent = self.unsent[self.socket.send(self.unsent[:size]):]
        return False

    def receive(self):
        if not self.unsent:
            if self.end == 'reset':
                self.socket.setsockopt(*RESET_AT_CLOSE)
            if self.end in ('reset', 'close'):
                return self.finish()
            if not self.has_shut:
                self.has_shut = True
                self.socket.shutdown(socket.SHUT_WR)
        if self.reads_late and not self.has_shut and self.chance.random() < 0.98:
            # The server may wait for us to read; that is the only reason not to send.
            return False
        try:
            data = self.socket.recv(50 if self.reads_little and self.unsent else 100_000)
        except BlockingIOError:
            return False
        self.received += data
        if data:
            return False
        try:
            self.commands = count_answered(self.wire, self.received)
            self.was_checked = True
        except AssertionError as error:
            self.error = str(error)
        return self.finish()

    def finish(self):
        if not self.commands:
            self.commands = self.received.count(b'\r\n')
        self.socket.close()
        return True


# ---------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------

def resident(pid):
    """Resident memory in kB; None where there is no /proc."""
    try:
        with open('/proc/%d/status' % pid) as status:
            return next(int(line.split()[1]) for line in status if line.startswith('VmRSS'))
    except OSError:
        return None


def run(commands, seed, process, ports):
    """Hold sessions; counts of commands, sessions and those read to the end, findings, memory."""
    chance = random.Random(seed)
    sessions, findings, memory = [], [], []
    done = ended = checked = 0
    # A tenth is warming up: caches, arenas, the threads.
    marks = [commands // 10, commands // 2 + commands // 20, commands]
    last_progress = time.monotonic()
    while marks and len(findings) < 20:
        while len(sessions) < SESSIONS_AT_ONCE:
            sessions.append(Session(random.Random(chance.random()), chance.choice(ports)))
        for session in sessions[:]:
            if session.step():
                sessions.remove(session)
                done += session.commands
                ended += 1
                checked += session.was_checked
                last_progress = time.monotonic()
                if session.error:
                    findings.append('%s\n    sent %r' % (session.error, session.wire[:2000]))
        if done >= marks[0]:
            marks.pop(0)
            memory.append(resident(process.pid))
        if time.monotonic() > last_progress + TIMEOUT:
            findings += ['no end of a session: sent %r, left %d, received %r' % (
                session.wire[:2000], len(session.unsent), session.received[-200:])
                for session in sessions[:5]]
            break
        if process.poll() is not None:
            findings.append('the server process ended with status %d' % process.returncode)
            break
        if all(not session.unsent for session in sessions):
            select.select([session.socket for session in sessions], [], [], 1)
    for session in sessions:
        session.socket.close()
    return done, ended, checked, findings, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--commands', type=int, default=1_000_000)
    parser.add_argument('--seed', type=int, default=random.randrange(1 << 32))
    parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    with tempfile.TemporaryFile() as log, subprocess.Popen(
            [sys.executable, '-W', 'ignore', __file__, '--serve'],
            stdout=subprocess.PIPE, stderr=log) as process:
        try:
            ports = [int(port) for port in process.stdout.readline().split()]
            assert ports, 'the servers did not start'
            start = time.monotonic()
            done, ended, checked, findings, memory = run(
                options.commands, options.seed, process, ports)
            seconds = time.monotonic() - start
        finally:
            process.kill()
        log.seek(0)
        logged = log.read().decode('utf-8', 'replace')
    if logged:
        findings.append('logged:\n' + logged[:5000])
    if len(memory) == 3 and None not in memory:
        _, middle, end = memory
        if end > middle + max(4096, middle // 10):
            findings.append('memory grows')
    print('%d commands in %d sessions, %d of them read to their end; seed %d, %.0f s' % (
        done, ended, checked, options.seed, seconds))
    print('resident memory at a tenth, the middle and the end:', *memory, 'kB')
    print('exceptions that reached the loop: %d' % logged.count('Traceback'))
    print('sessions without a reply, or with one too many: %d' % (
        len(findings) - bool(logged) - ('memory grows' in findings)))
    for finding in findings:
        print('FINDING:', finding)
    return 1 if findings else 0


if __name__ == '__main__':
    sys.exit(main())
