"""What servers go through in bad hours, as programs: python tests/tools/stress.py WORK [options]

    prefork  4 processes with 8 handler threads each share a listener, and one of them closes
             it in the middle: each message is answered, and none is doubled
    starved  floods a server that may have few descriptors: what it serves, what it costs,
             and that it serves as before when the flood is over
    random   sessions of all kinds, good and bad, against servers of all kinds: each 250
             belongs to a handler that ran once and had finished, replies keep their order, and
             nothing is left in maps, descriptors, threads
    cycles   makes and closes servers without the garbage collector: nothing is left either

It prints what it saw, and ends with status 1 at the first fault.  What it tests
is the smtpd.py of this checkout, or of PYSMTPD_TEST_MODULE_DIR.
"""
import argparse
import asyncio
import asyncore
import contextlib
import gc
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.environ.get('PYSMTPD_TEST_MODULE_DIR')
                or os.path.abspath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir)))

import smtpd

TIMEOUT = 60  # seconds in which any reply comes


class Client:
    """One session; raises EOFError where the server ends it."""

    def __init__(self, address):
        self.socket = socket.create_connection(address, timeout=TIMEOUT)
        self.file = self.socket.makefile('rb')

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()
        self.socket.close()

    def send(self, octets):
        self.socket.sendall(octets)

    def reply(self):
        while True:
            line = self.file.readline()
            if not line.endswith(b'\r\n'):
                raise EOFError
            if line[3:4] != b'-':
                return line[:-2].decode()

    def expect(self, *codes):
        for code in codes:
            reply = self.reply()
            assert reply.startswith(code), (reply, code)

    def greet(self):
        self.expect('220')
        self.send(b'EHLO x\r\n')
        self.expect('250')

    def post(self, text):
        """Send a message step by step; the reply to its data."""
        for line, code in (('MAIL FROM:<a@b>', '250'), ('RCPT TO:<c@d>', '250'), ('DATA', '354')):
            self.send(line.encode() + b'\r\n')
            self.expect(code)
        self.send(text.encode() + b'\r\n.\r\n')
        return self.reply()

    def quit(self):
        self.send(b'QUIT\r\n')
        self.expect('221')


def pipelined(text):
    return b'MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n%s\r\n.\r\n' % text.encode()


def in_threads(function, arguments):
    """Call function(argument) for all at once; raises what the first of them raises."""
    faults = []

    def call(argument):
        try:
            function(argument)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=call, args=(each,)) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def open_descriptors():
    with contextlib.suppress(OSError):
        return len(os.listdir('/proc/self/fd'))
    return 0


# ---------------------------------------------------------------------------------------------

class Logging(smtpd.SMTPServer):
    """Writes the text of each message to a file, a line each."""

    process_message_threads = 8

    def __init__(self, file, **kwargs):
        self.log_of_messages = file
        super().__init__(('127.0.0.1', 0), None, **kwargs)

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        os.write(self.log_of_messages, data + b'\n')
        return '250 ' + data.decode()


def work(server, selector):
    """Be a worker until the server and its sessions are closed."""
    def close(number, frame):
        threading.Thread(target=server.close).start()

    signal.signal(signal.SIGUSR1, close)
    server.channels_in_selector = selector
    asyncore.loop(timeout=1)
    os._exit(0)


def prefork(options):
    workers, clients = 4, 40
    each = options.messages // clients
    with tempfile.TemporaryFile(buffering=0) as log:
        os.set_blocking(log.fileno(), True)
        file = os.open('/proc/self/fd/%d' % log.fileno(), os.O_WRONLY | os.O_APPEND)
        server = Logging(file)
        address = server.socket.getsockname()
        pids = []
        for number in range(workers):
            pid = os.fork()
            if not pid:
                work(server, number % 2 == 1)
            pids.append(pid)
        server.close()

        def hold_sessions(number):
            for message in range(each):
                if message % 5 == 0:
                    client = Client(address)
                    client.greet()
                if number == 0 and message == each // 2:
                    os.kill(pids[0], signal.SIGUSR1)
                text = '%d of %d' % (message, number)
                reply = client.post(text)
                assert reply == '250 ' + text, (reply, text)
                if message % 5 == 4 or message == each - 1:
                    client.quit()
                    client.__exit__()

        start = time.monotonic()
        in_threads(hold_sessions, range(clients))
        seconds = time.monotonic() - start
        ended = os.waitpid(pids.pop(0), 0)[1]  # the one that closed, by itself
        for pid in pids:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), 'a worker has ended'
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(file)
        log.seek(0)
        handled = log.read().decode().splitlines()
    assert ended == 0, ended
    assert sorted(handled) == sorted('%d of %d' % (message, number) for number in range(clients)
                                     for message in range(each)), 'lost or doubled'
    print('prefork: %d messages, each answered and handled once, %.0f a second; '
          'a worker closed in the middle' % (len(handled), len(handled) / seconds))


# ---------------------------------------------------------------------------------------------

def serve_starved(descriptors, selector, use_poll, threads, port):
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its log
    os.closerange(3, port)
    os.closerange(port + 1, 64)
    server = Logging(os.open(os.devnull, os.O_WRONLY))
    server.channels_in_selector = selector
    server.process_message_threads = threads
    os.write(port, struct.pack('!H', server.socket.getsockname()[1]))
    asyncore.loop(timeout=1, use_poll=use_poll)


class Flood:
    def __init__(self, address, seconds):
        self.address = address
        self.end = time.monotonic() + seconds
        self.replies = {}  # to data, and what became of the connections without one

    async def run(self, clients):
        await asyncio.gather(*(self.hold_sessions() for _ in range(clients)))

    async def hold_sessions(self):
        while time.monotonic() < self.end:
            try:
                outcome = await asyncio.wait_for(self.session(), 5)
            except asyncio.TimeoutError:
                outcome = 'waits'
            except (OSError, EOFError):
                outcome = 'ended'
            self.replies[outcome] = self.replies.get(outcome, 0) + 1

    async def session(self):
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            greeting = await reader.readuntil(b'\n')
            if greeting[:3] != b'220':
                return greeting[:3].decode()
            writer.write(b'HELO x\r\n' + pipelined('x'))
            for _ in range(5):
                reply = await reader.readuntil(b'\n')
            return reply[:3].decode()
        finally:
            writer.close()


def cpu_seconds(pid):
    with open('/proc/%d/stat' % pid) as file:
        user, system = file.read().rpartition(')')[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')


def starved(options):
    import resource
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for the clients
    for descriptors in options.descriptors:
        for use_poll in False, True:
            for selector in False, True:
                for threads in 0, 2:
                    starve(descriptors, selector, use_poll, threads, options.seconds)


def starve(descriptors, selector, use_poll, threads, seconds):
    mine, its = socket.socketpair()
    pid = os.fork()
    if not pid:
        try:
            serve_starved(descriptors, selector, use_poll, threads, its.fileno())
        finally:
            os._exit(1)
    its.close()
    with mine:
        address = ('127.0.0.1', struct.unpack('!H', mine.recv(2))[0])
        try:
            with Client(address) as first:
                first.greet()
                # More than it can have, which hold what they have and say nothing.
                hoard = [socket.create_connection(address) for _ in range(descriptors)]
                idle = cpu_seconds(pid)
                time.sleep(1)
                idle = cpu_seconds(pid) - idle
                count, end = 0, time.monotonic() + 1
                while time.monotonic() < end:
                    count += first.post('x').startswith('250')
                for each in hoard:
                    each.close()
                flood = Flood(address, seconds)
                asyncio.run(flood.run(100))
                assert first.post('x').startswith('2')
                first.quit()
            with Client(address) as last:  # it serves as before
                last.greet()
                assert last.post('y') == '250 y'
                last.quit()
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), 'the server has ended'
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    print('starved: %4d descriptors, %s, %s, %d threads: %3.0f %% CPU while it waits, %d messages '
          'in a second from one client meanwhile; flooded: %s'
          % (descriptors, 'poll' if use_poll else 'select', 'selector' if selector else 'map',
             threads, 100 * idle, count,
             ', '.join('%d %s' % (flood.replies[each], each) for each in sorted(flood.replies))),
          flush=True)


# ---------------------------------------------------------------------------------------------

class Moody(smtpd.SMTPServer):
    """Does with a message what its text says, and keeps account."""

    def __init__(self, **kwargs):
        self.account = threading.Lock()
        self.begun = []
        self.finished = set()
        self.channels_by_peer = {}
        super().__init__(('127.0.0.1', 0), None, **kwargs)

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        text = data.decode()
        mood = text.split()[1]
        with self.account:
            self.begun.append(text)
        if mood == 'sleep':
            time.sleep(random.random() / 50)
        elif mood == 'raise':
            raise RuntimeError('as told')
        elif mood == 'push':
            self.channels_by_peer[peer].push('250-' + text)
        elif mood == 'close':
            self.channels_by_peer[peer].close_when_done()
        with self.account:
            self.finished.add(text)
        return '250 ' + text


class MoodyChannel(smtpd.SMTPChannel):
    def __init__(self, server, *args, **kwargs):
        super().__init__(server, *args, **kwargs)
        server.channels_by_peer[self.peer] = self


class Log:
    """Standard error, without the lines that the server was told to write."""

    def __init__(self):
        self.faults = []

    def write(self, text):
        if 'as told' not in text:
            self.faults.append(text)

    def flush(self):
        pass


class RandomSession:
    """A session whose course is chance; what it gets must fit what it said."""

    def __init__(self, server, address, name, chance):
        self.server, self.address, self.name, self.chance = server, address, name, chance
        self.answered = 0

    def run(self):
        with Client(self.address) as self.client:
            self.client.greet()
            course = self.chance.choice([
                self.step_by_step, self.pipeline, self.stall, self.reset, self.half_close])
            try:
                course()
            except (EOFError, ConnectionError):
                with self.server.account:
                    assert any(text.endswith(' close') and text in self.server.begun
                               for text in self.all_texts), (self.name, 'ended for no reason')

    def texts(self):
        moods = ['plain', 'plain', 'sleep', 'raise', 'push', 'close']
        self.all_texts = ['%s-%d %s' % (self.name, number, self.chance.choice(moods))
                          for number in range(self.chance.randint(1, 8))]
        return self.all_texts

    def check(self, text, reply):
        mood = text.split()[1]
        with self.server.account:
            assert self.server.begun.count(text) == 1, (text, 'has not run once')
            if mood == 'raise':
                assert reply.startswith('451'), (text, reply)
            else:
                assert reply == '250 ' + text, (text, reply)
                assert text in self.server.finished, (text, 'has not finished')
        self.answered += 1

    def step_by_step(self):
        for text in self.texts():
            self.check(text, self.client.post(text))
        self.client.quit()

    def pipeline(self, end=b'QUIT\r\n'):
        texts = self.texts()
        self.client.send(b''.join(map(pipelined, texts)) + end)
        self.read_pipelined(texts)
        if end:
            self.client.expect('221')

    def read_pipelined(self, texts):
        for text in texts:
            self.client.expect('250', '250', '354')
            self.check(text, self.client.reply())

    def half_close(self):
        texts = self.texts()
        self.client.send(b''.join(map(pipelined, texts)))
        self.client.socket.shutdown(socket.SHUT_WR)
        self.read_pipelined(texts)
        assert self.client.file.read() == b''

    def stall(self):
        wire = b''.join(map(pipelined, self.texts()))
        self.client.send(wire[:self.chance.randrange(len(wire))])
        time.sleep(self.chance.random() / 20)

    def reset(self):
        self.client.send(b''.join(map(pipelined, self.texts())))
        self.client.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))


def random_sessions(options):
    seed = options.seed if options.seed is not None else random.randrange(10 ** 6)
    print('random: --seed %d' % seed, flush=True)
    chance = random.Random(seed)
    end = time.monotonic() + options.seconds
    rounds = answered = 0
    while time.monotonic() < end:
        rounds += 1
        log = Log()
        with contextlib.redirect_stderr(log):
            answered += one_round(chance, '%d.' % rounds)
        assert not log.faults, '\n'.join(log.faults)
    print('random: %d messages of %d rounds were answered as they should be' % (answered, rounds))


def one_round(chance, name):
    Moody.process_message_threads = chance.choice([0, 1, 2, 8])
    Moody.channels_in_selector = chance.choice([False, True])
    Moody.channel_class = MoodyChannel
    use_poll = chance.choice([False, True])
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    server = Moody(map={})
    address = server.socket.getsockname()
    loop = threading.Thread(target=asyncore.loop, args=(1, use_poll, server._map))
    loop.start()
    sessions = [RandomSession(server, address, name + str(number), random.Random(chance.random()))
                for number in range(chance.randint(1, 24))]
    in_threads(RandomSession.run, sessions)
    server.close()
    loop.join(TIMEOUT)
    assert not loop.is_alive(), server._map
    assert not server._map
    for thread in set(threading.enumerate()) - threads:
        thread.join(TIMEOUT)
    server.channels_by_peer.clear()
    del server, loop
    assert set(threading.enumerate()) == threads, threading.enumerate()
    assert open_descriptors() == descriptors, (descriptors, open_descriptors())
    return sum(session.answered for session in sessions)


# ---------------------------------------------------------------------------------------------

def resident_octets():
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def one_cycle(number):
    Moody.process_message_threads = number % 2 * 2
    Moody.channels_in_selector = number // 2 % 2 == 1
    Moody.channel_class = smtpd.SMTPChannel
    server = Moody(map={})
    loop = threading.Thread(target=asyncore.loop, args=(1, False, server._map))
    loop.start()
    with Client(server.socket.getsockname()) as client:
        client.greet()
        assert client.post('0 plain') == '250 0 plain'
        client.quit()
    server.close()
    loop.join(TIMEOUT)
    assert not loop.is_alive() and not server._map


def cycles(options):
    gc.disable()
    run_cycles(options.cycles)  # as many, so that as many threads wait for another message
    memory, descriptors = resident_octets(), open_descriptors()
    run_cycles(options.cycles)
    grown = resident_octets() - memory
    print('cycles: %d servers made and closed: %d octets of memory more, %d descriptors'
          % (options.cycles, grown, open_descriptors() - descriptors))
    assert open_descriptors() == descriptors
    assert grown < 1024 * options.cycles


def run_cycles(count):
    for number in range(count):
        one_cycle(number)
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(TIMEOUT)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work', choices=['prefork', 'starved', 'random', 'cycles'])
    parser.add_argument('--messages', type=int, default=2000, help='of prefork')
    parser.add_argument('--descriptors', type=int, nargs='+', default=[40, 64, 256, 2048],
                        help='that a starved server may have')
    parser.add_argument('--seconds', type=float, default=60, help='of a flood, or of random')
    parser.add_argument('--seed', type=int, help='of random')
    parser.add_argument('--cycles', type=int, default=1000)
    options = parser.parse_args()
    {'prefork': prefork, 'starved': starved, 'random': random_sessions,
     'cycles': cycles}[options.work](options)


if __name__ == '__main__':
    main()
