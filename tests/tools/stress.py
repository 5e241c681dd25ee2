"""What servers go through in bad hours: python -m tests.tools.stress --seconds 600

Sessions of all kinds, good and bad, against servers of all kinds: each 250 belongs to a handler
that ran once and had finished, replies keep their order, and nothing is left in maps,
descriptors, threads.  It prints what it saw, and ends with status 1 at the first fault.
"""
import argparse
import asyncore
import concurrent.futures
import contextlib
import io
import os
import random
import re
import threading
import time

from tests.support import TRANSACTION, greet, reset, shut, smtpd

TIMEOUT = 60  # seconds in which any reply comes


def steps_of(text):
    """What a client sends for a message."""
    return [*TRANSACTION.splitlines(True), text.encode() + b'\r\n.\r\n']


def last_line(client):
    """The last line of a reply; raises EOFError where the server has ended the session."""
    lines = client.reply().decode().splitlines()
    if not lines or lines[-1][3:4] == '-':
        raise EOFError
    return lines[-1]


def answer_to(client, steps=4 * [b'']):
    """The last reply to a message, whose steps are sent now, or have been."""
    for octets, code in zip(steps, ['250', '250', '354', '']):
        if octets:
            client.send(octets)
        reply = last_line(client)
        assert reply.startswith(code), (reply, code)
    return reply


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


class RandomSession:
    """A session whose course is chance; what it gets must fit what it said."""

    def __init__(self, server, address, name, chance):
        self.server, self.address, self.chance = server, address, chance
        moods = ['plain', 'plain', 'sleep', 'raise', 'push', 'close']
        self.texts = ['%s-%d %s' % (name, number, chance.choice(moods))
                      for number in range(chance.randint(1, 8))]
        self.wire = b''.join(step for text in self.texts for step in steps_of(text))
        self.answered = 0

    def run(self):
        """How many of its messages were answered."""
        course = self.chance.choice([
            self.step_by_step, self.pipeline, self.stall, self.reset, self.half_close])
        with greet(self.address, b'EHLO x', timeout=TIMEOUT) as client:
            try:
                course(client)
            except (EOFError, ConnectionError):
                with self.server.account:
                    assert any(text.endswith(' close') and text in self.server.begun
                               for text in self.texts), (self.texts, 'ended for no reason')
        return self.answered

    def check(self, text, reply):
        with self.server.account:
            assert self.server.begun.count(text) == 1, (text, 'has not run once')
            if text.endswith('raise'):
                assert reply.startswith('451'), (text, reply)
            else:
                assert reply == '250 ' + text, (text, reply)
                assert text in self.server.finished, (text, 'has not finished')
        self.answered += 1

    def step_by_step(self, client):
        for text in self.texts:
            self.check(text, answer_to(client, steps_of(text)))
        client.send(b'QUIT\r\n')
        assert last_line(client) == '221 Bye'

    def pipeline(self, client):
        client.send(self.wire + b'QUIT\r\n')
        for text in self.texts:
            self.check(text, answer_to(client))
        assert last_line(client) == '221 Bye'

    def half_close(self, client):
        client.send(self.wire)
        shut(client)
        for text in self.texts:
            self.check(text, answer_to(client))
        assert client.rest() == b''

    def stall(self, client):
        client.send(self.wire[:self.chance.randrange(len(self.wire))])
        time.sleep(self.chance.random() / 20)

    def reset(self, client):
        client.send(self.wire)
        reset(client)


AS_TOLD = r'error: .*\nTraceback .*\n(?:  .*\n)*RuntimeError: as told\n\n?'


def open_descriptors():
    return len(os.listdir('/proc/self/fd'))


def one_round(chance, name):
    Moody.process_message_threads = chance.choice([0, 1, 2, 8])
    Moody.channels_in_selector = chance.choice([False, True])
    Moody.channel_class = MoodyChannel
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    server = Moody(map={})
    address = server.socket.getsockname()
    loop = threading.Thread(
        target=asyncore.loop, args=(1, chance.choice([False, True]), server._map), daemon=True)
    loop.start()
    sessions = [
        RandomSession(server, address, name + str(number), random.Random(chance.random()))
        for number in range(chance.randint(1, 24))]
    with concurrent.futures.ThreadPoolExecutor(len(sessions)) as pool:
        answered = sum(pool.map(RandomSession.run, sessions))
    server.close()
    loop.join(TIMEOUT)
    assert not loop.is_alive() and not server._map, server._map
    for thread in set(threading.enumerate()) - threads:
        thread.join(TIMEOUT)
    assert set(threading.enumerate()) == threads, threading.enumerate()
    server.channels_by_peer.clear()
    del server, loop
    assert open_descriptors() == descriptors, (descriptors, open_descriptors())
    return answered


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--seconds', type=float, default=60)
    parser.add_argument('--seed', type=int, default=random.randrange(10 ** 6))
    options = parser.parse_args()
    print('--seed %d' % options.seed, flush=True)
    chance = random.Random(options.seed)
    end = time.monotonic() + options.seconds
    rounds = answered = 0
    while time.monotonic() < end:
        rounds += 1
        log = io.StringIO()
        with contextlib.redirect_stderr(log):
            answered += one_round(chance, '%d.' % rounds)
        assert not re.sub(AS_TOLD, '', log.getvalue()), log.getvalue()
    print('%d messages of %d rounds were answered as they should be' % (answered, rounds))


if __name__ == '__main__':
    main()
