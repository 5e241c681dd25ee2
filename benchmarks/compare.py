"""Measure this checkout's smtpd.py beside other servers that discard mail.

    python benchmarks/compare.py            about a quarter of an hour
    python benchmarks/compare.py --quick    under three minutes, rougher

Measured are

- ours: smtpd.py of this checkout, under plain asyncore.loop(), with the Python that runs this
  file (another one: --python).  It needs asyncore: from 3.12 on `pip install pyasyncore
  pyasynchat`.  "In the selector" is ours with `channels_in_selector = True`;
- old: the standard library's smtpd, of the same Python if it has one, else of python3.11,
  3.10 or 3.9 on PATH (or standard-smtpd, where it is installed; another Python: --old);
- aiosmtpd, if it is installed for one of these Pythons;
- smtp-sink, Postfix's test server, written in C: the yardstick ("C" in the table).

What is not there is left out.  All traffic goes to 127.0.0.1.  The load comes from driver.c,
compiled on demand (without a C compiler from a slower driver in endpoints.py), and in the rows
that say so from Postfix's smtp-source.  Each measurement has a server process and a driver
process of its own, on different cores; servers take turns; the table shows medians.

How to read the table: x old, x C: our advantage; above 1 ours is better.  Rates
move by up to a third with whatever else the machine does; trust CPU time, memory and ratios.
"Driver busy" is the share of its core that the driver used, with ours and with smtp-sink: near
100 % it is the driver that is measured.  "Other load" should be near 0.  A server that died,
refused or never answered has a note instead of a figure.
"""
import argparse
import collections
import contextlib
import datetime
import json
import os
import platform
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

from endpoints import SMTP_SINK

HERE = os.path.dirname(os.path.abspath(__file__))
ENDPOINTS = os.path.join(HERE, 'endpoints.py')
SMTP_SOURCE = os.path.join(os.path.dirname(SMTP_SINK), 'smtp-source')
FLAGS = ['-E', '-W', 'ignore']  # of the interpreters: as a user's, whatever this environment is
SERVERS = ['ours', 'selector', 'old', 'aiosmtpd', 'smtp-sink']

# name: the driver's work, sessions, idle connections
WORKS = {
    'session': ('session', 4, 0),
    'open': ('open', 4, 0),
    'source': ('smtp-source', 4, 0),
    'lines': ('lines', 1, 0),
    'dots': ('dots', 1, 0),
    'long': ('long', 1, 0),
    'noop': ('noop', 1, 0),
    'rcpt': ('rcpt', 1, 0),
    'idle 500': ('open', 4, 500),
    'idle 5000': ('open', 4, 5000),
    'burst': ('burst', 200, 0),
    'one': ('session', 1, 0),
    'split': ('split', 1, 0),
}
IN_SELECTOR = ['open', 'source', 'idle 500', 'idle 5000']
MESSAGES_OF_30_MB = 3

# what the row is called, work, figure, and what we aim at
ROWS = [
    ('session a message, EHLO, 1 kB, msg/s', 'session', 'rate', '75 x old'),
    ('the same, CPU µs', 'session', 'cpu', ''),
    ('4 open sessions, 1 kB, msg/s', 'open', 'rate', '3.6 x old, 1.35 x C'),
    ('the same, CPU µs a message', 'open', 'cpu', ''),
    ('the same in the selector, msg/s', 'open selector', 'rate', ''),
    ('the same in the selector, CPU µs a message', 'open selector', 'cpu', ''),
    ('4 open sessions of smtp-source, msg/s', 'source', 'rate', '3 x old'),
    ('the same, CPU µs a message', 'source', 'cpu', ''),
    ('the same in the selector, msg/s', 'source selector', 'rate', ''),
    ('the same in the selector, CPU µs a message', 'source selector', 'cpu', ''),
    ('30 MB message, MB/s', 'lines', 'speed', '2.5 x old, 0.77 x C'),
    ('the same, peak resident MB', 'lines', 'peak', '4.7 x old'),
    ('30 MB of short lines that begin with dots, MB/s', 'dots', 'speed', '8.6 x old'),
    ('the same, peak resident MB', 'dots', 'peak', '25 x old'),
    ('30 MB of lines 1 MB long, MB/s', 'long', 'speed', '2.5 x old'),
    ('the same, peak resident MB', 'long', 'peak', ''),
    ('64 KB of pipelined NOOP, ms', 'noop', 'ms', '10 x old'),
    ('64 KB of pipelined RCPT, ms', 'rcpt', 'ms', '50 x old'),
    ('4 sessions beside 500 idle ones, msg/s', 'idle 500', 'rate', ''),
    ('the same in the selector, msg/s', 'idle 500 selector', 'rate', '7.6 x old, 1.3 x C'),
    ('4 sessions beside 5000 idle ones, msg/s', 'idle 5000', 'rate', ''),
    ('the same in the selector, msg/s', 'idle 5000 selector', 'rate', '54 x C'),
    ('burst of 200 connects, all greeted, ms', 'burst', 'burst', '4 x C'),
    ('one small session with EHLO, median ms', 'one', 'ms', '66 x old, 0.9 x C'),
    ('the same, body and final dot in two writes', 'split', 'ms', '130 x old, 64 x C'),
]
RATES = ('rate', 'speed')  # more is better
NOTHING = '\N{EN DASH}'  # a hyphen alone would be a list in reStructuredText


class Failure(Exception):
    """There is no figure: a word or two for the table, and a sentence for the note."""


# ---- processes ----

@contextlib.contextmanager
def on_core(core):
    """Processes that are started within run on this core."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [core])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def two_cores():
    """One for the server, one for the driver; None where that cannot be had."""
    if hasattr(os, 'sched_getaffinity'):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            return cores[-1], cores[0]
    return None, None


def environment():
    """Without what would change how the servers run."""
    return {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}


def ask(python, server):
    """What `endpoints.py probe` tells of this server under this interpreter, or None."""
    try:
        done = subprocess.run([python, *FLAGS, ENDPOINTS, 'probe', server], text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
                              env=environment())
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def find_servers(options):
    pythons = [options.python] + ['python3.11', 'python3.10', 'python3.9', sys.executable]
    choices = {'ours': [options.python], 'selector': [options.python],
               'smtp-sink': [sys.executable],
               'old': [options.old] if options.old else pythons, 'aiosmtpd': pythons}
    found = {}
    for server in SERVERS:
        answers = (ask(shutil.which(python) or python, server) for python in choices[server])
        answer = next(filter(None, answers), None)
        if answer:
            found[server] = answer
    return found


class Server:
    """A server process, listening."""

    def __init__(self, name, python, core):
        self.errors = tempfile.TemporaryFile('w+', errors='replace')
        with on_core(core):
            self.process = subprocess.Popen(
                [python, *FLAGS, ENDPOINTS, 'serve', name], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=self.errors, env=environment(), text=True)

    def wait_until_it_greets(self):
        self.port = int(self.process.stdout.readline() or 0)
        for _ in range(100 if self.port else 0):
            try:
                with socket.create_connection(('127.0.0.1', self.port), timeout=5) as connection:
                    if connection.recv(512):
                        return
            except OSError:
                time.sleep(0.05)
        raise Failure('no start', 'no greeting')

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def died(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)
            return True
        return False

    def last_words(self):
        self.errors.seek(0)
        lines = self.errors.read().split('\n')
        return next((line.strip() for line in reversed(lines) if line.strip()), 'no message')

    def cpu_time(self):
        try:  # the clock that clock_getcpuclockid(3) tells on Linux: all threads, nanoseconds
            return time.clock_gettime((~self.process.pid << 3) | 2)
        except (AttributeError, OSError):
            return None

    def peak(self):
        """MB of memory resident at the most."""
        with contextlib.suppress(OSError):
            with open('/proc/%d/status' % self.process.pid) as status:
                for line in status:
                    if line.startswith('VmHWM:'):
                        return int(line.split()[1]) * 1024 / 1e6
        return None


def compile_driver(folder):
    """The command that starts the driver, and what to call it."""
    compiler = shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')
    if compiler:
        program = os.path.join(folder, 'driver')
        done = subprocess.run([compiler, '-O2', '-o', program, os.path.join(HERE, 'driver.c')],
                              capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return [program], 'driver.c'
        print(done.stderr, file=sys.stderr)
    return [sys.executable, *FLAGS, ENDPOINTS, 'drive'], 'endpoints.py (no C compiler)'


# ---- measuring ----

class Bench:

    def __init__(self, options, found, driver):
        self.found = found
        self.driver = driver
        self.seconds = 0.6 if options.quick else 2
        self.limit = 20 if options.quick else 60
        self.rounds = options.rounds or (3 if options.quick else 5)
        self.budget = 2.5 if options.quick else 15  # seconds; slow cases get fewer rounds
        self.all_in_all = 150 if options.quick else 1000  # seconds; then the first round is all
        self.server_core, self.driver_core = two_cores()
        self.values = collections.defaultdict(list)  # (work, server, figure): numbers
        self.failures = {}  # (work, server): Failure
        self.remarks = {}  # (work, server): a sentence
        self.spent = collections.Counter()  # (work, server): seconds

    def run(self, works):
        start = time.monotonic()
        for number in range(self.rounds):
            for work in works:
                servers = [server for server in self.found
                           if server != 'selector' or work in IN_SELECTOR]
                turn = number % len(servers)
                for server in servers[turn:] + servers[:turn]:
                    late = number and time.monotonic() - start > self.all_in_all
                    if self.spent[work, server] < self.budget and not late:
                        self.measure(number, work, server)

    def measure(self, number, work, server):
        start = time.monotonic()
        try:
            with contextlib.closing(Server(server, self.found[server]['python'],
                                           self.server_core)) as process:
                try:
                    process.wait_until_it_greets()
                    measured = (self.smtp_source if work == 'source' else self.drive)(
                        process, work, server)
                    measured['peak'] = process.peak()
                except Failure as failure:
                    if not process.died():
                        raise
                    raise Failure('died', 'died: ' + process.last_words()) from failure
        except Failure as failure:
            self.failures[work, server] = failure
            tell = failure.args[1]
        else:
            figures = self.figures(work, measured)
            for name, value in figures.items():
                if value is not None:
                    self.values[work, server, name].append(value)
            tell = '  '.join('%s %s' % (name, number_text(value))
                             for name, value in figures.items() if value is not None)
        self.spent[work, server] += time.monotonic() - start
        print('%d/%d %-10s %-10s %s' % (number + 1, self.rounds, work, server, tell),
              file=sys.stderr, flush=True)

    def drive(self, server, work, name):
        kind, sessions, idle = WORKS[work]
        big = kind in ('lines', 'dots', 'long')
        command = [*self.driver, kind, server.port, sessions, idle,
                   1 if big else self.seconds, MESSAGES_OF_30_MB if big else 1000000,
                   5 if kind == 'burst' else self.limit]
        with on_core(self.driver_core):
            process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True)
        try:
            line = process.stdout.readline()
            if line == 'ready\n':
                before = server.cpu_time()
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write('go\n')
                    process.stdin.flush()
                line = process.stdout.readline()
            after = server.cpu_time()
            measured = json.loads(line or '{"error": "the driver died"}')
            if 'error' in measured:
                raise failure_of(measured['error'])
            if measured['greeted'] < sessions:
                lost = sessions - measured['greeted']
                raise Failure('%d lost' % lost,
                              '%d of %d not greeted within 5 s' % (lost, sessions))
            if not measured['units']:
                raise Failure('no answer', 'nothing finished')
            if measured['idle_refused']:
                self.remarks[work, name] = ('%d of the idle connections refused'
                                            % measured['idle_refused'])
            measured['cpu'] = None if before is None or after is None else after - before
            return measured
        finally:
            process.kill()
            process.communicate()

    def smtp_source(self, server, work, name):
        rates = self.values['open', name, 'rate'] or [1000]
        count = max(100, int(rates[-1] * self.seconds))
        for messages in 100, count:  # the first warms up
            before, used, start = server.cpu_time(), cpu_of_children(), time.monotonic()
            with on_core(self.driver_core):
                try:
                    subprocess.run(
                        [SMTP_SOURCE, '-d', '-s', '4', '-l', '1000', '-m', str(messages),
                         '-M', 'client.example.com', '-f', 'alice@example.com',
                         '-t', 'bob@example.com', '127.0.0.1:%d' % server.port],
                        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
                        timeout=self.limit)
                except subprocess.TimeoutExpired:
                    raise Failure('no answer', 'smtp-source waited in vain') from None
                except subprocess.CalledProcessError as exc:
                    raise failure_of(exc.stderr.strip()) from None
        elapsed, after = time.monotonic() - start, server.cpu_time()
        return {'units': count, 'seconds': elapsed, 'busy': (cpu_of_children() - used) / elapsed,
                'cpu': None if before is None or after is None else after - before}

    @staticmethod
    def figures(work, measured):
        kind = WORKS[work][0]
        cpu = measured['cpu']
        figures = {'busy': measured['busy'] * 100}
        if kind in ('lines', 'dots', 'long'):
            figures['speed'] = measured['octets'] / measured['median'] / 1e6
            figures['peak'] = measured['peak']
        elif kind == 'burst':
            figures['burst'] = measured['seconds'] * 1e3
        else:
            figures['rate'] = measured['units'] / measured['seconds']
            figures['cpu'] = None if cpu is None else cpu / measured['units'] * 1e6
            if 'median' in measured:
                figures['ms'] = measured['median'] * 1e3
        return figures


def failure_of(error):
    """The word for the table: refused (500), no answer, gone."""
    if error.startswith('refused: '):
        return Failure('refused (%s)' % error[9:12], error.rstrip('? '))
    if error == 'no answer' or error.startswith('idle connections:'):
        return Failure('no answer', error)
    return Failure('gone', error)


def cpu_of_children():
    use = resource.getrusage(resource.RUSAGE_CHILDREN)
    return use.ru_utime + use.ru_stime


def cpu_of_machine():
    """Seconds that all its cores worked, steal included, since it started; None: not known."""
    with contextlib.suppress(OSError):
        with open('/proc/stat') as stat:
            user, nice, system, idle, iowait, *rest = map(int, stat.readline().split()[1:9])
            return (user + nice + system + sum(rest)) / os.sysconf('SC_CLK_TCK')
    return None


# ---- the table ----

def number_text(value):
    return '%.*f' % (0 if value >= 100 else 1 if value >= 10 else 2, value)


class Table:

    def __init__(self, bench, aims):
        self.bench = bench
        self.aims = aims
        self.notes = []

    def median(self, work, server, figure):
        values = self.bench.values[work, server, figure]
        return statistics.median(values) if values else None

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)
        return ' [%d]_' % (self.notes.index(text) + 1)

    def cell(self, work, server, figure):
        value = self.median(work, server, figure)
        failure = self.bench.failures.get((work, server))
        remark = self.bench.remarks.get((work, server))
        text = NOTHING if value is None else number_text(value)
        if failure and value is None:
            text = failure.args[0]
        if failure:
            text += self.note(failure.args[1])
        if remark:
            text += self.note(remark)
        return text

    def ratio(self, work, ours, other, figure):
        mine, theirs = self.median(work, ours, figure), self.median(work, other, figure)
        if not mine or not theirs:
            return NOTHING
        return number_text(mine / theirs if figure in RATES else theirs / mine)

    def busy(self, work, server):
        value = self.median(work, server, 'busy')
        return NOTHING if value is None else '%.0f' % value

    def row(self, label, work, figure, aim):
        ours = 'ours'
        if work.endswith(' selector'):
            work, ours = work[:-len(' selector')], 'selector'
        cells = [label, 'more' if figure in RATES else 'less', self.cell(work, ours, figure)]
        cells += [self.cell(work, server, figure) for server in SERVERS[2:]
                  if server in self.bench.found]
        cells += [self.ratio(work, ours, 'old', figure),
                  self.ratio(work, ours, 'smtp-sink', figure),
                  self.busy(work, ours) + ' / ' + self.busy(work, 'smtp-sink')]
        return cells + [aim or NOTHING] if self.aims else cells

    def text(self, works):
        heads = ['work', 'better', 'ours',
                 *(server for server in SERVERS[2:] if server in self.bench.found),
                 'x old', 'x C', 'driver busy, %']
        rows = [heads + ['aim'] if self.aims else heads]
        rows += [self.row(*row) for row in ROWS if row[1].replace(' selector', '') in works]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
                 for row in rows]
        rule = '  '.join('=' * width for width in widths)
        notes = ['.. [%d] %s' % pair for pair in enumerate(self.notes, 1)]
        return '\n'.join([rule, lines[0], rule, *lines[1:], rule, '', *notes])


def processor():
    with contextlib.suppress(OSError):
        with open('/proc/cpuinfo') as info:
            for line in info:
                if line.startswith('model name'):
                    return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


class OtherLoad:
    """How much of the machine other processes use while we measure."""

    def __init__(self):
        self.start, self.machine, self.ours = time.monotonic(), cpu_of_machine(), self.used()

    @staticmethod
    def used():
        return cpu_of_children() + time.process_time()

    def text(self):
        if self.machine is None:
            return 'not known'
        others = (cpu_of_machine() - self.machine) - (self.used() - self.ours)
        cores = max(0, others) / (time.monotonic() - self.start)
        return '%.2f of %d cores' % (cores, os.cpu_count())


def heading(bench, driver, other_load):
    found = bench.found
    python = 'python%d.%d' % sys.version_info[:2]
    pinned = ('server on core %d, driver on core %d' % (bench.server_core, bench.driver_core)
              if bench.server_core is not None else 'server and driver not pinned')
    names = {'ours': 'ours', 'old': 'old', 'aiosmtpd': 'aiosmtpd', 'smtp-sink': 'smtp-sink (C)'}
    return '\n'.join([
        ':Date: ' + datetime.datetime.now().strftime('%Y-%m-%d %H:%M'),
        ':Machine: %s, %d cores, %s %s; %s' % (
            processor(), os.cpu_count(), platform.system(), platform.release(), pinned),
        ':Other load: ' + other_load.text(),
        ':Servers: ' + '; '.join('%s: %s' % (name, found[server]['version'])
                                for server, name in names.items() if server in found),
        ':Driver: %s; medians of up to %d runs' % (driver, bench.rounds),
        ':Command: ``%s``' % ' '.join([python, 'benchmarks/compare.py', *sys.argv[1:]]),
    ])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='under three minutes')
    parser.add_argument('--python', default=sys.executable, help='the Python that runs ours')
    parser.add_argument('--old', help='a Python that has the old smtpd')
    parser.add_argument('--rounds', type=int, help='medians of so many runs')
    parser.add_argument('--only', nargs='+', choices=WORKS, metavar='WORK',
                        help='measure only: ' + ', '.join(WORKS))
    parser.add_argument('--aims', action='store_true', help='show what the project aims at')
    options = parser.parse_args()

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 20000 if hard == resource.RLIM_INFINITY else min(hard, 20000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended, too
    found = find_servers(options)
    if 'ours' not in found:
        sys.exit('smtpd.py cannot be imported by %s (from Python 3.12 on it needs pyasyncore'
                 ' and pyasynchat)' % options.python)
    works = [work for work in WORKS if work in (options.only or WORKS)]
    if not os.access(SMTP_SOURCE, os.X_OK):
        works = [work for work in works if work != 'source']
    with tempfile.TemporaryDirectory() as folder:
        driver, driver_name = compile_driver(folder)
        bench = Bench(options, found, driver)
        other_load = OtherLoad()
        bench.run(works)
    print(heading(bench, driver_name, other_load))
    print()
    print(Table(bench, options.aims).text(works))


if __name__ == '__main__':
    main()
