"""Throughput of two processes behind HAProxy beside one, as a ratio: the manual's recipe.

    python benchmarks/haproxy.py [rounds]

Needs HAProxy and Postfix's smtp-source (Debian's packages haproxy and postfix).
Each round measures every case once; medians are told. Two handlers: one that
keeps messages in a Maildir (the disk's work), one that parses each message and
computes for about two milliseconds (the processor's work).
"""
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
MODULE = os.path.dirname(HERE)
MESSAGES = 4000
SESSIONS = 8

HANDLERS = '''
import email
import hashlib
import mailbox
import smtpd


class Maildir(smtpd.SMTPServer):
    maildir = mailbox.Maildir('mail')

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        self.maildir.add(data)


class Busy(smtpd.SMTPServer):
    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        email.message_from_bytes(data).as_bytes()
        hashlib.pbkdf2_hmac('sha256', data, b'', 6000)
'''


def unused_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def manual_configuration(ports):
    with open(os.path.join(MODULE, 'docs', 'howto', 'haproxy.rst')) as file:
        found = re.search(r':name: recipe-haproxy-cfg\n\n((?:   .*\n|\n)+)', file.read())
    text = re.sub('^   ', '', found[1], flags=re.MULTILINE).replace('localhost:', '127.0.0.1:')
    for name, port in zip(('1025', '2501', '2502'), ports):
        text = text.replace(name, str(port))
    return text


def wait_for(port):
    while True:
        try:
            with socket.create_connection(('127.0.0.1', port), timeout=5) as connection:
                if connection.recv(3) == b'220':
                    return
        except OSError:
            time.sleep(0.05)


def measure(port):
    before = time.perf_counter()
    subprocess.run(['smtp-source', '-s', str(SESSIONS), '-m', str(MESSAGES), '-l', '1000', '-d',
                    '127.0.0.1:%d' % port], check=True,
                   env=dict(os.environ, PATH=os.environ['PATH'] + ':/usr/sbin'))
    return MESSAGES / (time.perf_counter() - before)


def measure_all(handler, rounds):
    with tempfile.TemporaryDirectory() as home:
        with open(os.path.join(home, 'handlers.py'), 'w') as file:
            file.write(HANDLERS)
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith('PYTHON')}
        environment['PYTHONPATH'] = MODULE
        processes = []
        ports = [unused_port() for _ in range(4)]
        try:
            for port in ports[:2]:
                processes.append(subprocess.Popen(
                    [sys.executable, '-m', 'smtpd', '-n', '-c', 'handlers.' + handler,
                     '127.0.0.1:%d' % port], cwd=home, env=environment))
            for number, backends in (2, ports[:1]), (3, ports[:2]):
                text = manual_configuration([ports[number], *ports[:2]])
                if len(backends) == 1:
                    text = re.sub('.*server two.*\n', '', text)
                path = os.path.join(home, '%d.cfg' % number)
                with open(path, 'w') as file:
                    file.write(text)
                processes.append(subprocess.Popen(['haproxy', '-q', '-f', path], env=dict(
                    os.environ, PATH=os.environ['PATH'] + ':/usr/sbin')))
            for port in ports:
                wait_for(port)
            rates = {'one process alone': [], 'one behind HAProxy': [], 'two behind HAProxy': []}
            for _ in range(rounds):
                for name, port in zip(rates, (ports[0], ports[2], ports[3])):
                    rates[name].append(measure(port))
                    shutil.rmtree(os.path.join(home, 'mail', 'new'), ignore_errors=True)
                    os.makedirs(os.path.join(home, 'mail', 'new'), exist_ok=True)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return {name: statistics.median(values) for name, values in rates.items()}


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for handler in 'Maildir', 'Busy':
        rates = measure_all(handler, rounds)
        alone, one, two = rates.values()
        print('%-8s' % handler, ', '.join('%s: %.0f msg/s' % each for each in rates.items()),
              '-> two beside one: %.2f (beside one alone: %.2f)' % (two / one, two / alone),
              flush=True)


if __name__ == '__main__':
    main()
