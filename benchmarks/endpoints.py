"""Both ends of a measured connection: servers that discard mail, and a driver for want of a C one.

Started by compare.py, a process each:

    endpoints.py serve SERVER       listen on a free port of 127.0.0.1, print it, discard mail
    endpoints.py probe SERVER       print as JSON what would be measured
    endpoints.py drive ...          as driver.c does, at a third of its rate

SERVER is ours, selector (ours with channels_in_selector), old (the standard library's), aiosmtpd
or smtp-sink.  This file imports little, since its memory is measured.
"""
import os
import select
import signal
import socket
import sys
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMTP_SINK = '/usr/sbin/smtp-sink'
LIFETIME = 180  # seconds, after which a forgotten server ends


def import_smtpd(server):
    """The smtpd module that is meant, and no other."""
    if server != 'old':
        sys.path.insert(0, TOP)
    import smtpd
    ours = os.path.dirname(os.path.abspath(smtpd.__file__)) == TOP
    if ours == (server == 'old') or hasattr(smtpd.SMTPServer, 'channels_in_selector') != ours:
        raise ImportError('another smtpd: ' + smtpd.__file__)
    return smtpd


def serve_smtpd(server):
    smtpd = import_smtpd(server)

    class Discard(smtpd.SMTPServer):
        channels_in_selector = server == 'selector'

        def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
            return None

    listener = Discard(('127.0.0.1', 0), None)
    print(listener.socket.getsockname()[1], flush=True)
    smtpd.asyncore.loop()


def serve_aiosmtpd():
    import asyncio

    from aiosmtpd.smtp import SMTP

    class Discard:
        async def handle_DATA(self, server, session, envelope):
            return '250 OK'

    async def serve():
        listener = await asyncio.get_running_loop().create_server(
            lambda: SMTP(Discard()), '127.0.0.1', 0)
        print(listener.sockets[0].getsockname()[1], flush=True)
        await listener.serve_forever()

    asyncio.run(serve())


def serve_smtp_sink():
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    print(port, flush=True)
    user = ['-u', 'nobody'] if os.getuid() == 0 else []
    os.execv(SMTP_SINK, ['smtp-sink', *user, '-m', '20000', '127.0.0.1:%d' % port, '1024'])


def probe(server):
    import json
    import platform
    import shutil
    import subprocess
    version = ''
    if server == 'smtp-sink':
        if not os.access(SMTP_SINK, os.X_OK):
            raise ImportError('no ' + SMTP_SINK)
        if shutil.which('postconf'):
            version = subprocess.run(['postconf', '-dh', 'mail_version'], text=True,
                                     capture_output=True, timeout=20).stdout.strip()
        version = ('Postfix ' + version).strip()
    else:
        if server == 'aiosmtpd':
            import aiosmtpd
            version = aiosmtpd.__version__ + ' on '
        else:
            import_smtpd(server)
        version += 'Python ' + platform.python_version()
    print(json.dumps({'python': sys.executable, 'version': version}))


class Driver:
    """What driver.c does, with the same arguments and the same output; see there."""

    def __init__(self, work, port, sessions, idle, seconds, count, limit):
        self.work = work
        self.address = ('127.0.0.1', int(port))
        self.seconds, self.count = float(seconds), int(count)
        self.give_up = time.monotonic() + float(limit)
        self.plan, self.first_step = make_plan(work)
        self.times = []
        self.idle_refused = 0
        self.idle = []
        self.sessions = [Session(self) for _ in range(int(sessions))]
        self.open(int(idle))

    def open(self, idle):
        if self.first_step and self.work != 'burst':
            for session in self.sessions:
                session.begin()
            self.run(0, 0)
        for _ in range(idle):
            if time.monotonic() > self.give_up:
                raise OSError('no answer')
            connection = socket.create_connection(self.address, timeout=5)
            if connection.recv(512)[:1] == b'2':
                self.idle.append(connection)
            else:
                self.idle_refused += 1
                connection.close()
        if self.work in ('session', 'split', 'open'):
            self.run(0.2, self.count)
        elif self.work in ('noop', 'rcpt'):
            self.run(1, 1)

    def run(self, seconds, count):
        stop = time.monotonic() + seconds
        self.times.clear()
        begun = 0
        while True:
            now = time.monotonic()
            for session in self.sessions:
                if session.resting and begun < count and now < stop:
                    begun += 1
                    session.begin()
            working = [session for session in self.sessions if not session.resting]
            if not working or (now > self.give_up and self.work == 'burst'):
                return len(self.sessions) - len(working)
            if now > self.give_up:
                raise OSError('no answer')
            poll = select.poll()
            by_descriptor = {session.socket.fileno(): session for session in working}
            for descriptor, session in by_descriptor.items():
                poll.register(descriptor, select.POLLIN | (select.POLLOUT if session.text else 0))
            for descriptor, event in poll.poll(100):
                if event & ~select.POLLOUT:
                    by_descriptor[descriptor].listen()
                by_descriptor[descriptor].speak()

    def measure(self):
        cpu, start = time.process_time(), time.monotonic()
        greeted = self.run(self.seconds,
                           len(self.sessions) if self.work == 'burst' else self.count)
        elapsed = time.monotonic() - start
        return {'units': len(self.times), 'seconds': elapsed,
                'busy': (time.process_time() - cpu) / elapsed,
                'median': sorted(self.times)[len(self.times) // 2] if self.times else 0,
                'greeted': greeted, 'idle_refused': self.idle_refused,
                'octets': len(self.plan[-1][0])}


class Session:

    def __init__(self, driver):
        self.driver = driver
        self.socket = None
        self.resting = True
        self.begin_step(0)

    def begin_step(self, number):
        self.step = number
        self.text, self.wanted = (self.driver.plan + [(b'', 0)])[number]
        self.text = memoryview(self.text)
        self.replies = 0
        self.input = b''

    def begin(self):
        self.began = time.monotonic()
        self.resting = False
        if self.socket is None:
            self.socket = socket.socket()
            self.socket.setblocking(False)
            if self.driver.work != 'split':
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.connect_ex(self.driver.address)
        self.speak()

    def speak(self):
        while not self.resting:
            try:
                while self.text:
                    self.text = self.text[self.socket.send(self.text):]
            except BlockingIOError:
                return
            if self.socket if self.wanted is None else self.replies < self.wanted:
                return
            self.begin_step(self.step + 1)
            if self.step == len(self.driver.plan):
                self.driver.times.append(time.monotonic() - self.began)
                self.begin_step(self.driver.first_step)
            self.resting = self.step == self.driver.first_step

    def listen(self):
        data = self.socket.recv(131072)
        if not data:
            if self.wanted is not None or not self.replies:
                raise OSError('the server closed the connection')
            self.socket.close()
            self.socket = None
        *lines, self.input = (self.input + data).split(b'\n')
        for line in lines:
            if line[:1] not in b'23':
                raise OSError('refused: ' + line.decode('ascii', 'replace').strip())
            self.replies += line[3:4] != b'-'


def make_plan(work):
    """(text, number of replies to wait for; None: the server's close), and where a unit begins."""
    mail = b'MAIL FROM:<alice@example.com>\r\n'
    big = 30000000
    plan = [(b'', 1)]
    if work == 'burst':
        return plan, 1
    plan.append((b'EHLO client.example.com\r\n', 1))
    if work == 'noop':
        return plan + [(b'NOOP\r\n' * (65536 // 6), 65536 // 6)], 2
    if work == 'rcpt':
        lines = []
        while sum(map(len, lines)) < 65450:
            if len(lines) % 992 == 0:
                lines += [b'RSET\r\n', mail]
            lines.append(b'RCPT TO:<u%d@example.com>\r\n' % len(lines))
        return plan + [(b''.join(lines), len(lines))], 2
    line = {'lines': b'x' * 76 + b'\r\n', 'dots': b'..x\r\n', 'long': b'x' * 999998 + b'\r\n'}
    if work in line:
        body = line[work] * (big // len(line[work]))
    else:
        body = (b'From: <a@example.com>\r\nTo: <b@example.com>\r\nSubject: test\r\n\r\n'
                + b'The quick brown fox jumps over the lazy dog, and then sleeps.\r\n' * 15)
    plan += [(mail, 1), (b'RCPT TO:<bob@example.com>\r\n', 1), (b'DATA\r\n', 1)]
    plan += [(body, 0), (b'.\r\n', 1)] if work == 'split' else [(body + b'.\r\n', 1)]
    if work in ('session', 'split'):
        return plan + [(b'QUIT\r\n', None)], 0
    return plan, 2


def drive(*arguments):
    import json
    signal.alarm(int(arguments[-1]) + 10)
    try:
        driver = Driver(*arguments)
        print('ready', flush=True)
        if sys.stdin.readline():
            print(json.dumps(driver.measure()), flush=True)
            sys.stdin.read()
    except OSError as exc:
        print(json.dumps({'error': str(exc)}))


if __name__ == '__main__':
    signal.alarm(LIFETIME)  # outlives execv()
    task, name = sys.argv[1:3]
    if task == 'drive':
        drive(*sys.argv[2:])
    elif task == 'probe':
        probe(name)
    elif name == 'smtp-sink':
        serve_smtp_sink()
    elif name == 'aiosmtpd':
        serve_aiosmtpd()
    else:
        serve_smtpd(name)
