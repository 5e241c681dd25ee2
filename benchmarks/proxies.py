"""Messages relayed by PureProxy, with Postfix's test server as the upstream.

    python benchmarks/proxies.py [--other DIRECTORY] [--selector] [--rounds N] [--messages N]

The smtpd.py of this checkout is measured beside the one in DIRECTORY (an older version's, say),
if that is given; they take turns, and medians are told: messages of 1 kB a second, CPU of the
proxy for each, and its threads under load; with --selector for `channels_in_selector`.  It needs
Linux, smtp-sink and smtp-source (Debian's package postfix), and on Python 3.12 and later
`pip install pyasyncore pyasynchat`.  All traffic goes to 127.0.0.1.
"""
import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
ENVIRONMENT['PATH'] += ':/usr/sbin'

PROXY = """
import asyncore, smtpd
proxy = smtpd.PureProxy(('127.0.0.1', %d), ('127.0.0.1', %d))
proxy.channels_in_selector = %r
asyncore.loop(use_poll=True)
"""
WORKS = [  # clients, recipients of each message
    (1, 1), (4, 1), (32, 1), (1, 20), (32, 20)]


@contextlib.contextmanager
def running(make_command, directory=HERE):
    """The process of make_command(port), which listens there: yields it and the port."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(make_command(port), env=ENVIRONMENT, cwd=directory) as process:
        try:
            while True:
                assert process.poll() is None, 'it has ended'
                with contextlib.suppress(OSError), \
                        socket.create_connection(('127.0.0.1', port), 5) as client:
                    client.recv(3)
                    break
                time.sleep(0.05)
            yield process, port
        finally:
            process.kill()


def sink(port):
    user = ['-u', 'nobody'] if os.getuid() == 0 else []
    return ['smtp-sink', *user, '127.0.0.1:%d' % port, '1024']


def cpu_seconds(process):
    return time.clock_gettime((~process.pid << 3) | 2)  # as clock_getcpuclockid(3) has it


def measure(directory, upstream, clients, recipients, messages, in_selector):
    """Messages a second, CPU in microseconds for each, threads at most."""
    def proxy(port):
        return [sys.executable, '-W', 'ignore', '-c', PROXY % (port, upstream, in_selector)]

    with running(proxy, directory) as (process, port):
        load = ['smtp-source', '-d', '-l', '1000', '-s', str(clients), '-r', str(recipients)]
        subprocess.run([*load, '-m', '200', '127.0.0.1:%d' % port], check=True, env=ENVIRONMENT)
        cpu, began, threads = cpu_seconds(process), time.perf_counter(), 0
        with subprocess.Popen([*load, '-m', str(messages), '127.0.0.1:%d' % port],
                              env=ENVIRONMENT) as source:
            while source.poll() is None:
                threads = max(threads, len(os.listdir('/proc/%d/task' % process.pid)))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    source.wait(0.2)
        assert source.returncode == 0, 'smtp-source has failed'
        seconds = time.perf_counter() - began
        return (messages / seconds, (cpu_seconds(process) - cpu) / messages * 1e6, threads - 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--other', metavar='DIRECTORY', help='of another smtpd.py')
    parser.add_argument('--selector', action='store_true', help='channels_in_selector')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--messages', type=int, default=4000)
    options = parser.parse_args()
    directories = [HERE] + ([os.path.abspath(options.other)] if options.other else [])
    print('clients  recipients  messages/s  CPU us each  threads beside the loop')
    with running(sink) as (_, upstream):
        for clients, recipients in WORKS:
            count = options.messages // (4 if recipients > 1 else 1)
            results = {directory: [] for directory in directories}
            for _ in range(options.rounds):
                for directory in directories:
                    results[directory].append(
                        measure(directory, upstream, clients, recipients, count,
                                options.selector))
            for directory in directories:
                rates, costs, threads = zip(*results[directory])
                print('%7d %11d %11.0f %12.0f %8d  %s' % (
                    clients, recipients, statistics.median(rates), statistics.median(costs),
                    max(threads), 'this' if directory == HERE else 'other'), flush=True)


if __name__ == '__main__':
    main()
