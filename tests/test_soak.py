"""A server that must stay up: hostile sessions, no descriptors left, large messages."""
import contextlib
import os
import subprocess
import sys

import pytest

import smtpd
from tests.support import (
    HERE,
    ONE_MESSAGE,
    STRICT,
    RawClient,
    both_modes,
    in_map_and_selector,
    read_until,
    running,
)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [1, 2, 3])
def test_hostile_sessions(seed):
    """The short form of benchmarks/soak.py, which says what it does."""
    folders = [HERE, os.path.dirname(os.path.realpath(smtpd.__file__))]
    paths = [os.path.join(folder, 'benchmarks', 'soak.py') for folder in folders]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        pytest.skip('needs benchmarks/soak.py')
    done = subprocess.run(
        [sys.executable, path, '--commands=50000', '--seed=%d' % seed], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


EMFILE_SCRIPT = '''
import asyncore, contextlib, os, resource, time
import smtpd
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

class Server(smtpd.SMTPServer):
    channels_in_selector = %(selector)r
    turns = 0

    def readable(self):
        self.turns += 1
        return super().readable()

server = Server(('127.0.0.1', 0), None)
real = server.socket
failures = []

class Listener:
    def __getattr__(self, name):
        return getattr(real, name)
    def accept(self):
        try:
            return real.accept()
        except BlockingIOError:
            raise
        except OSError:
            failures.append((time.monotonic(), server.turns))
            if len(failures) == 2:
                (start, first), (end, last) = failures
                print(end - start, last - first, flush=True)
            raise
server.socket = Listener()

class Orders(asyncore.file_dispatcher):
    # In the loop itself: another thread's order could come while accept() is under way.
    hoard = []

    def writable(self):
        return False

    def handle_read(self):
        if self.recv(100) == b'hoard\\n':
            with contextlib.suppress(OSError):
                while True:
                    self.hoard.append(os.dup(0))
        else:
            while self.hoard:
                os.close(self.hoard.pop())
        print('done', flush=True)

print(real.getsockname()[1], flush=True)
Orders(0)
asyncore.loop()
'''

MEMORY_SCRIPT = '''
import asyncore, resource
import smtpd

def peak():
    """VmHWM, which can be set back; ru_maxrss has what the parent had before exec."""
    with open('/proc/self/status') as status:
        return [int(line.split()[1]) for line in status if line.startswith('VmHWM')][0] * 1024

class Hooked(smtpd.SMTPChannel):
    def collect_incoming_data(self, data):
        super().collect_incoming_data(data)

class Server(smtpd.SMTPServer):
    channels_in_selector = %(selector)r
    if %(hooked)r:
        channel_class = Hooked

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        return '250 %%d %%d' %% (peak() - start, len(data))

with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')
start = peak()
server = Server(('127.0.0.1', 0), None, 0, decode_data=%(decode_data)r)
print(server.socket.getsockname()[1], flush=True)
asyncore.loop()
'''


@contextlib.contextmanager
def script(text, **values):
    """A process that runs a script, which first prints its port: yields it and its address."""
    with running(STRICT + ['-c', text % values], stdin=subprocess.PIPE) as process:
        first = process.stdout.readline()
        assert first, process.stderr.read().decode()
        yield process, ('127.0.0.1', int(first))


class TestServerStaysUpInAProcess:
    @in_map_and_selector
    def test_out_of_descriptors(self, selector):
        """The listener lives, pauses without spinning, and serves when descriptors are free."""
        def tell(line):
            process.stdin.write(line + b'\n')
            process.stdin.flush()
            assert read_until(process.stdout, b'\n') == b'done\n'

        with script(EMFILE_SCRIPT, selector=selector) as (process, address), \
                RawClient(address) as first:
            assert first.reply().startswith(b'220 ')
            tell(b'hoard')
            with RawClient(address) as waiting:
                seconds, turns = read_until(process.stdout, b'\n').split()  # of two attempts
                assert float(seconds) > 0.005 and int(turns) == 1
                assert first.say(b'NOOP') == b'250 OK\r\n'
                tell(b'free')
                assert waiting.reply().startswith(b'220 ')
            assert first.say(b'QUIT') == b'221 Bye\r\n'

    @pytest.mark.slow
    @pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='needs Linux /proc')
    @pytest.mark.parametrize('line', [b'.', b'x' * 76, b'x' * 1_000_000],
                             ids=['lines of one dot', 'lines of 76 octets', 'lines of 1 MB'])
    @pytest.mark.parametrize('selector, hooked', [(False, False), (True, False), (False, True)],
                             ids=['in the map', 'in the selector', 'with a hook'])
    @both_modes
    def test_memory_of_a_large_message(self, decode_data, selector, hooked, line):
        per_block = max(1, 60_000 // len(line))
        repeats = 30_000_000 // (per_block * (len(line) + 2))
        size = repeats * per_block * (len(line) + 2)
        with script(MEMORY_SCRIPT, selector=selector, hooked=hooked, decode_data=decode_data) as (
                process, address):
            with RawClient(address, timeout=60) as client:
                client.send(ONE_MESSAGE[:-9])
                block = (line.replace(b'.', b'..') + b'\r\n') * per_block
                for _ in range(repeats):
                    client.send(block)
                client.send(b'.\r\nQUIT\r\n')
                peak, length = map(int, client.rest().split()[-4:-2])
        assert length == repeats * per_block * (len(line) + 1) - 1
        assert peak < 3.5 * size
