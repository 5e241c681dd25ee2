"""What becomes of mail through the proxies into a real Postfix and a real Mailman that fail.

The client keeps a ledger, and tries again as RFC 5321 asks.  In the end each message has
reached each recipient for whom the client heard 250, once, unchanged, and nobody else.
PYSMTPD_TEST_LEDGER is the number of messages (300; for Mailman a third of it).
"""
import collections
import concurrent.futures
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading

import pytest

import smtpd
from tests.support import greet, serving, variant, waits
from tests.test_real_servers import (
    KINDS,
    Postfix,
    configured_mailman,
    running_postfix,
    with_x_peer,
)

MESSAGES = int(os.environ.get('PYSMTPD_TEST_LEDGER') or 300)
CLIENTS = 8
SMUGGLED = (b'MAIL FROM:<forged@example.com>\r\nRCPT TO:<victim@example.com>\r\nDATA\r\n'
            b'Subject: forged\r\n\r\nforged\r\n')
ENDS = [b'\r.\r\n', b'\n.\r\n', b'\n.\n', b'\r.\r', b'\r\n.\r', b'\r\n.\n', b'\r\n\0.\r\n',
        b'\r\n.\0\r\n', b'\r\r\n.\r\r\n', b'\n\r.\r\n']


class Mail:
    """A message, and what its client heard."""

    def __init__(self, number, choice, recipients, kinds):
        self.sender = 's%d@example.com' % number
        self.recipients = recipients
        self.expected = set()  # who must have it
        self.refused = {}  # for good, with the reply
        self.tries = 0
        body = choice.choice(kinds)
        if choice.random() < 0.2:
            body = (b'Subject: true\r\n\r\ntext' + choice.choice(ENDS) + SMUGGLED
                    + choice.choice(ENDS) + b'QUIT\r\n')
        self.octets = (b'Message-ID: <%d@example.com>\r\nFrom: %s\r\n'
                       % (number, self.sender.encode()) + body)
        self.pieces = choice.choice([1, 7, 1000, 10 ** 9]) if len(body) < 3000 else 10 ** 9

    @property
    def as_relayed(self):
        return re.sub(b'\r\n|\r|\n', b'\r\n',
                      with_x_peer(self.octets).replace(b'\r\n', b'\n'))

    def hear(self, recipients, reply):
        """Note the reply for those recipients; the ones who are to be tried again."""
        if reply[:1] == b'2':
            self.expected.update(recipients)
        elif reply[:1] == b'5':
            self.refused.update(dict.fromkeys(recipients, reply))
        else:
            return set(recipients)
        return set()


class Clients:
    """Send all mail, and what was put off once more; `progress` counts what was tried."""

    def __init__(self, address, mails):
        self.address = address
        self.left = len(mails)
        self.progress = 0
        self.changed = threading.Condition()
        pool = concurrent.futures.ThreadPoolExecutor(CLIENTS)
        self.running = [pool.submit(self.run, collections.deque(
            (mail, mail.recipients) for mail in mails[number::CLIENTS]))
            for number in range(CLIENTS)]
        pool.shutdown(wait=False)

    def run(self, waiting):
        try:
            while waiting:
                with greet(self.address, b'EHLO client.example', timeout=900) as client:
                    for _ in range(min(3, len(waiting))):
                        mail, recipients = waiting.popleft()
                        again = self.send(client, mail, recipients)
                        assert client.say(b'RSET') == b'250 OK\r\n'
                        if again:
                            waiting.append((mail, [each for each in recipients if each in again]))
                        self.note_progress(not again)
                    client.say(b'QUIT')
        except BaseException:
            self.note_progress(self.left)
            raise

    def note_progress(self, done):
        with self.changed:
            self.progress += 1
            self.left -= done
            self.changed.notify_all()
            if not done:
                self.changed.wait(0.05)  # no more tries a second than a log can bear

    def send(self, client, mail, recipients):
        """One try; the recipients to be tried again."""
        mail.tries += 1
        reply = client.say(b'MAIL FROM:<%s> BODY=8BITMIME' % mail.sender.encode())
        if reply[:1] != b'2':
            return mail.hear(recipients, reply)
        again, taken = set(), []
        for recipient in recipients:
            reply = client.say(b'RCPT TO:<%s>' % recipient.encode())
            if reply[:1] == b'2':
                taken.append(recipient)
            else:
                again |= mail.hear([recipient], reply)
        if not taken:
            return again
        reply = client.say(b'DATA')
        if reply[:1] == b'3':
            octets = (b'\r\n' + mail.octets).replace(b'\r\n.', b'\r\n..')[2:] + b'.\r\n'
            for start in range(0, len(octets), mail.pieces):
                client.send(octets[start:start + mail.pieces])
            reply = client.reply()
        return again | mail.hear(taken, reply)

    def wait_for_progress(self, count):
        """Wait for so many tries more; false if all is sent."""
        with self.changed:
            goal = self.progress + count
            self.changed.wait_for(lambda: self.progress >= goal or not self.left, 600)
            return self.left > 0

    def join(self):
        for each in self.running:
            each.result(3000)


class Ledger:
    """Compares what arrived with what the clients heard."""

    def __init__(self, mails, log):
        self.mails = {mail.sender: mail for mail in mails}
        self.unknown = set(re.findall(r'mail from (\S+): lost after the final dot', log))
        self.arrived = collections.defaultdict(set)  # ids, by (sender, recipient)
        self.count = collections.Counter()

    def arrive(self, sender, recipient, unique, is_unaltered):
        mail = self.mails.get(sender)
        if mail is None or recipient not in mail.recipients:
            self.count['forged' if mail is None else 'astray'] += 1
            return
        self.count['arrived'] += 1
        self.count['altered'] += not is_unaltered
        if self.arrived[sender, recipient] - {unique}:
            self.count['doubled, unknown' if sender in self.unknown else 'doubled'] += 1
        self.arrived[sender, recipient].add(unique)

    def totals(self):
        for sender, mail in self.mails.items():
            for recipient in mail.recipients:
                arrived = bool(self.arrived[sender, recipient])
                self.count['refused'] += recipient in mail.refused
                self.count['lost'] += recipient in mail.expected and not arrived
                self.count['refused, but arrived'] += (
                    recipient in mail.refused and arrived and sender not in self.unknown)
                self.count['without a fate'] += (
                    recipient not in mail.expected and recipient not in mail.refused)
        self.count['messages'] = len(self.mails)
        self.count['tries'] = sum(mail.tries for mail in self.mails.values())
        self.count['outcome unknown'] = len(self.unknown)
        print(dict(self.count), file=sys.__stdout__, flush=True)
        return [self.count[name] for name in (
            'lost', 'doubled', 'altered', 'forged', 'astray', 'refused, but arrived',
            'without a fate')]


class FailingPostfix:
    """The faults that a Postfix has, in turn, each for some of the clients' tries."""

    def __init__(self, postfix, clients):
        self.postfix = postfix
        self.clients = clients
        self.happened = collections.Counter()

    def run(self):
        faults = itertools.cycle([self.reload, self.stop, self.kill])
        while self.clients.wait_for_progress(40):
            fault = next(faults)
            fault()
            self.happened[fault.__name__] += 1

    def start(self):
        for _ in range(20):  # what was there before may still be about to end
            started = self.postfix.control('start')
            if started.returncode == 0 or self.postfix.control('status').returncode == 0:
                return
        pytest.fail(started.stderr)

    def reload(self):
        self.postfix.control('reload')

    def stop(self):
        self.postfix.stop()
        self.clients.wait_for_progress(10)
        self.start()

    def kill(self):
        self.postfix.kill()
        self.clients.wait_for_progress(10)
        self.start()

    def read_inbox(self):
        """Wait until its queue is empty, then take all that has arrived."""
        self.start()
        self.postfix.control('flush')
        for _ in waits(300):
            listed = subprocess.run(
                ['postqueue', '-c', os.path.join(self.postfix.home, 'conf'), '-j'],
                capture_output=True, timeout=60)
            if listed.returncode == 0 and not listed.stdout:
                break
        return map(self.postfix.take, os.listdir(self.postfix.inbox))


@pytest.fixture
def own_postfix(monkeypatch):
    monkeypatch.setattr(Postfix, 'MAIN', Postfix.MAIN + '''
smtpd_recipient_limit = 5
smtpd_recipient_overshoot_limit = 1000
smtpd_soft_error_limit = 1000
smtpd_hard_error_limit = 1000
smtpd_error_sleep_time = 0
''')
    with running_postfix() as postfix:
        yield postfix


class PatientChannel(smtpd.SMTPChannel):
    error_limit = None


@pytest.mark.real
@pytest.mark.slow
def test_ledger_of_mail_into_a_postfix_that_fails(own_postfix, capfd):
    choice = random.Random(1)
    kinds = [octets for name, octets in KINDS.items() if name != '1 MB']
    mails = []
    for number in range(MESSAGES):
        recipients = ['r%d@example.com' % each for each in range(choice.choice([1, 1, 2, 5, 20]))]
        if choice.random() < 0.1:
            recipients.append('unknown@example.com')
        mails.append(Mail(number, choice, recipients, [KINDS['1 MB']] if number % 100 == 99
                          else kinds))
    proxy_class = variant(smtpd.PureProxy, channel_class=PatientChannel)
    with serving(proxy_class, remoteaddr=own_postfix.address) as proxy:
        clients = Clients(proxy, mails)
        failing = FailingPostfix(own_postfix, clients)
        failing.run()
        clients.join()
    ledger = Ledger(mails, capfd.readouterr().err)
    for sender, recipient, queue_id, content in failing.read_inbox():
        mail = ledger.mails.get(sender)
        ledger.arrive(sender, recipient, queue_id, mail and content == mail.as_relayed)
    print(dict(failing.happened), file=sys.__stdout__)
    assert ledger.totals() == [0] * 7
    refusals = {(recipient, reply) for mail in mails for recipient, reply in mail.refused.items()}
    assert [each for each in refusals if each[0] != 'unknown@example.com'] == []


@pytest.fixture
def mailman(tmp_path):
    with configured_mailman(tmp_path) as mailman:
        yield mailman


@pytest.mark.real
@pytest.mark.slow
def test_ledger_of_posts_to_a_mailman_that_restarts(upstream, mailman, capfd):
    lists = ['%s@lists.example' % name for name in ('a', 'b', 'c')]
    for name in lists:
        mailman.create(name)
    choice = random.Random(1)
    mails = [Mail(number, choice, [
        *choice.sample(lists, choice.choice([1, 1, 2, 3])),
        *('r%d@example.com' % each for each in range(choice.choice([0, 0, 1, 3])))],
        [KINDS['plain'], KINDS['8-bit'], KINDS['dots']]) for number in range(MESSAGES // 3)]
    proxy_class = variant(smtpd.MailmanProxy, channel_class=PatientChannel,
                          mailman_lmtp_address=mailman.address)
    restarts = 0
    with serving(proxy_class, remoteaddr=upstream.address) as proxy:
        clients = Clients(proxy, mails)
        going_on = True
        while going_on:
            with mailman.running() as process:
                going_on = clients.wait_for_progress(0)
                while going_on and len(mails) - clients.left < (restarts + 1) * len(mails) / 21:
                    going_on = clients.wait_for_progress(1)
                process.send_signal(choice.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT]))
                process.wait(60)
                restarts += going_on
        clients.join()
    ledger = Ledger(mails, capfd.readouterr().err)
    for sender, recipients, content in upstream.messages:
        for recipient in recipients:
            ledger.arrive(sender, recipient, object(), content == ledger.mails[sender].as_relayed)
    for list_id, message in mailman.take('in'):
        ledger.arrive(message['X-MailFrom'], list_id.replace('.', '@', 1), object(), True)
    print(restarts, 'restarts', file=sys.__stdout__)
    assert ledger.totals() == [0] * 7
    assert restarts >= min(20, len(mails) // 5)
