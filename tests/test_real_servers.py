"""The proxies in front of real mail servers: Postfix and Mailman 3.

PYSMTPD_TEST_MAILMAN names a virtual environment that has Mailman 3.
"""
import contextlib
import email
import os
import pickle
import re
import shutil
import smtplib
import socket
import subprocess
import tempfile

import pytest

from tests.support import (
    HELLO,
    OTHER_NAMES,
    OTHERS,
    PROXIED,
    both_modes,
    clean_environment,
    find_tool,
    greet,
    held_port,
    is_ready,
    mailman_proxy_to,
    missing,
    post,
    proxy_to,
    running,
    stuffed,
    waits,
    with_x_peer,
)


class Postfix:
    """Debian's Postfix with a configuration, queue and maildir of its own; `start` and `stop`."""

    MAIN = '''
compatibility_level = 3.6
queue_directory = {home}/queue
data_directory = {home}/data
maillog_file = {home}/log
maillog_file_prefixes = {home}
myhostname = upstream.example
mydestination =
mynetworks = 127.0.0.0/8
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
disable_dns_lookups = yes
smtpd_peername_lookup = no
alias_maps =
alias_database =
local_header_rewrite_clients =
message_drop_headers =
message_size_limit = 20000000
smtpd_recipient_restrictions = reject_unlisted_recipient, permit_mynetworks, reject
smtpd_client_connection_count_limit = 0
default_process_limit = 40
queue_run_delay = 1s
minimal_backoff_time = 1s
maximal_backoff_time = 2s
virtual_mailbox_domains = regexp:{{{{/./ yes}}}}
virtual_mailbox_maps = regexp:{{{{!/^unknown/ inbox/}}}}
virtual_mailbox_base = {home}/mail
virtual_mailbox_limit = 0
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
local_transport = error:nothing is local
relay_transport = error:nothing leaves this machine
default_transport = error:nothing leaves this machine
'''
    MASTER = '''
127.0.0.1:{port} inet n - n - - smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
error unix - - n - - error
retry unix - - n - - error
virtual unix - n n - - virtual
postlog unix-dgram n - n - 1 postlogd
'''

    def __init__(self, home, port, program='postfix'):
        self.program = program
        self.home = home
        self.port = port
        self.address = '127.0.0.1', port
        self.inbox = os.path.join(home, 'mail', 'inbox', 'new')
        os.chmod(home, 0o755)  # Postfix's own users must come in
        for name in 'conf', 'queue', 'data', 'mail':
            os.mkdir(os.path.join(home, name))
        shutil.chown(os.path.join(home, 'data'), 'postfix')
        os.chown(os.path.join(home, 'mail'), 65534, 65534)
        with open(os.path.join(home, 'log'), 'w') as log:
            os.chmod(log.fileno(), 0o666)  # not all that write to it are root
        for name, text in ('main.cf', self.MAIN), ('master.cf', self.MASTER):
            with open(os.path.join(home, 'conf', name), 'w') as file:
                file.write(text.format(home=home, port=port))

    def control(self, *command):
        return subprocess.run([self.program, '-c', os.path.join(self.home, 'conf'), *command],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    def start(self):
        started = self.control('start')
        assert started.returncode == 0, started
        for _ in waits():
            with contextlib.suppress(OSError):
                with socket.create_connection(self.address) as probe:
                    if b'upstream.example' in probe.recv(100):
                        return
            assert self.control('status').returncode == 0

    def stop(self):
        self.control('stop')

    def kill(self):
        """At once, with what is under way; its daemons may still be there when abort returns."""
        with contextlib.suppress(OSError):
            with open(os.path.join(self.home, 'queue', 'pid', 'master.pid')) as file:
                group = int(file.read())
            self.control('abort')
            for _ in waits():
                os.killpg(group, 0)  # ends the loop by ProcessLookupError

    def receive(self, count):
        """Wait for so many messages and take them out: (Return-Path, recipient, content).

        The content is without the headers that Postfix put before it, with CRLF.
        """
        for _ in waits(60):
            names = os.listdir(self.inbox) if os.path.isdir(self.inbox) else []
            if len(names) >= count:
                break
        return [(sender, recipient, content)
                for sender, recipient, _, content in map(self.take, names)]

    def take(self, name):
        """Take a message out: Return-Path, recipient, queue id, content."""
        path = os.path.join(self.inbox, name)
        with open(path, 'rb') as file:
            own, queue_id, content = re.fullmatch(
                rb'(.*?\nReceived: from [^\n]*(?:\n[ \t][^\n]*)*?\bid (\w+)'
                rb'(?:[^\n]*\n(?=[ \t]))*[^\n]*\n)(.*)', file.read(), re.S).groups()
        os.unlink(path)
        sender = re.search(rb'^Return-Path: <(.*)>$', own, re.M)[1].decode()
        recipient = re.search(rb'^X-Original-To: (.*)$', own, re.M)[1].decode()
        return sender, recipient, queue_id, content.replace(b'\n', b'\r\n')


@contextlib.contextmanager
def running_postfix():
    program = find_tool('postfix', 'postfix')
    if os.geteuid():
        missing('the rights of root, which Postfix needs to start')
    home = tempfile.mkdtemp(prefix='pysmtpd-postfix-')
    with held_port() as port:
        postfix = Postfix(home, port, program)
        try:
            postfix.start()
            yield postfix
        finally:
            postfix.kill()
            shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope='session')
def postfix():
    with running_postfix() as postfix:
        yield postfix


def assert_queue_stays_empty(postfix):
    """Nothing more is on its way: one more message comes out, and comes alone."""
    client = smtplib.SMTP(*postfix.address, local_hostname='probe.example')
    with client:
        client.sendmail('', ['probe@example.com'], b'Subject: probe\r\n\r\n')
    assert postfix.receive(1) == [('', 'probe@example.com', b'Subject: probe\r\n\r\n')]


KINDS = {
    'plain': PROXIED,
    '8-bit': b'Subject: \xc3\xa9\r\n\r\n' + bytes(range(128, 256)) * 5 + b'\r\n',
    'dots': b'A: b\r\n\r\n.\r\n..\r\n.x\r\n...\r\n\r\n.\r\n',
    'long lines': b'A: b\r\n\r\n' + b'x' * 100000 + b'\r\n' + b'.' * 5000 + b'\r\n',
    '1 MB': b'A: b\r\n\r\n' + b'0123456789 .\r\n..\r\n' * 55000,
    'empty lines at the end': b'A: b\r\n\r\nend\r\n\r\n\r\n\r\n',
    'From_ lines': b'A: b\r\n\r\nFrom here\r\n>From there\r\n',
    'NUL and controls': b'A: b\r\n\r\n\0\1\x1a\x7f\t\x0b\x0c\r\n',
}


@pytest.mark.real
@both_modes
@pytest.mark.parametrize('kind', KINDS)
def test_message_arrives_byte_for_byte_in_a_real_postfix(postfix, decode_data, kind):
    with proxy_to(postfix, decode_data=decode_data) as proxy:
        assert post(proxy, KINDS[kind], recipients=OTHERS).startswith(b'250 ')
    assert sorted(postfix.receive(2)) == [
        ('sender@example.com', recipient, with_x_peer(KINDS[kind])) for recipient in OTHER_NAMES]


@pytest.mark.real
def test_message_too_large_for_a_real_postfix_reaches_the_client(postfix):
    large = b'A: b\r\n\r\n' + b'x' * 70 * 15000 + b'\r\n'
    with proxy_to(postfix) as proxy:
        assert post(proxy, large * 20).startswith(b'552 5.3.4 ')
    assert_queue_stays_empty(postfix)


@pytest.mark.real
def test_each_recipient_hears_what_a_real_postfix_says(postfix):
    with proxy_to(postfix) as proxy, greet(proxy, HELLO) as client:
        assert client.say(b'MAIL FROM:<>').startswith(b'250 2.1.0 Ok')
        assert client.say(b'RCPT TO:<unknown@example.com>').startswith(b'550 5.1.1 <unknown@')
        assert client.say(b'RCPT TO:<rcpt@example.com>').startswith(b'250 2.1.5 Ok')
        assert client.say(b'DATA').startswith(b'354 ')
        client.send(stuffed(PROXIED))
        assert re.fullmatch(rb'250 2\.0\.0 Ok: queued as \w+\r\n', client.reply())
    assert postfix.receive(1) == [('', 'rcpt@example.com', with_x_peer(PROXIED))]
    assert_queue_stays_empty(postfix)


class Mailman:
    """A real Mailman 3, as far as its LMTP server: the queues are where mail ends."""

    CONFIGURATION = '''
[mailman]
layout: test
site_owner: owner@lists.example
[paths.test]
var_dir: {home}/var
[mta]
incoming: mailman.mta.null.NullMTA
lmtp_host: 127.0.0.1
lmtp_port: {port}
[database]
class: mailman.database.sqlite.SQLiteDatabase
url: sqlite:///{home}/mailman.db
'''
    READ = '''
import glob, os, pickle, sys
found = []
for path in sorted(glob.glob(sys.argv[1] + '/*.pck')):
    with open(path, 'rb') as file:
        message, data = pickle.load(file), pickle.load(file)
    found.append((data['listid'], message.as_bytes()))
    os.unlink(path)
pickle.dump(found, sys.stdout.buffer)
'''

    def __init__(self, home, environment, port):
        self.home = home
        self.programs = os.path.join(environment, 'bin')
        self.configuration = os.path.join(home, 'mailman.cfg')
        self.address = '127.0.0.1', port
        with open(self.configuration, 'w') as file:
            file.write(self.CONFIGURATION.format(home=home, port=port))

    @contextlib.contextmanager
    def running(self):
        """The process of its LMTP server."""
        command = [os.path.join(self.programs, 'runner'), '-C', self.configuration,
                   '-r', 'lmtp:0:1']
        with open(os.path.join(self.home, 'output'), 'ab') as output:
            with running(command, env=clean_environment(), stdout=output,
                         stderr=subprocess.STDOUT) as process:
                assert is_ready(process, self.address)
                yield process

    def create(self, name):
        subprocess.run([os.path.join(self.programs, 'mailman'), '-C', self.configuration,
                        '--run-as-root', 'create', name], env=clean_environment(), timeout=120,
                       check=True, capture_output=True, stdin=subprocess.DEVNULL)

    def take(self, queue):
        """Take the messages out of a queue: (list id, message)."""
        directory = os.path.join(self.home, 'var', 'queue', queue)
        done = subprocess.run([os.path.join(self.programs, 'python'), '-c', self.READ, directory],
                              env=clean_environment(), capture_output=True, timeout=600)
        return [(list_id, email.message_from_bytes(octets))
                for list_id, octets in pickle.loads(done.stdout)]


@contextlib.contextmanager
def configured_mailman(home):
    environment = os.environ.get('PYSMTPD_TEST_MAILMAN')
    if not environment or not os.path.exists(os.path.join(environment, 'bin', 'mailman')):
        missing('Mailman 3 (PYSMTPD_TEST_MAILMAN names no virtual environment that has it)')
    with held_port() as port:
        yield Mailman(str(home), environment, port)


@pytest.fixture(scope='session')
def mailman(tmp_path_factory):
    with configured_mailman(tmp_path_factory.mktemp('mailman')) as mailman:
        mailman.create('announce@lists.example')
        with mailman.running():
            yield mailman


@pytest.mark.real
@both_modes
def test_post_and_request_end_in_the_queues_of_a_real_mailman_the_unknown_goes_upstream(
        upstream, mailman, decode_data):
    message = (b'From: sender@example.com\r\nSubject: a post\r\n'
               b'Message-ID: <1@example.com>\r\n\r\n.dot and 8-bit \xff\r\n')
    recipients = (b'<announce@lists.example>', b'<announce-request@lists.example>',
                  b'<announce-nonsense@lists.example>', b'<someone@example.com>')
    with mailman_proxy_to(upstream, mailman, decode_data=decode_data) as proxy:
        assert post(proxy, message, recipients=recipients).startswith(b'250 ')
    for queue in 'in', 'command':
        (list_id, queued), = mailman.take(queue)
        assert list_id == 'announce.lists.example'
        assert queued['X-Peer'] == '127.0.0.1'
        assert queued['Message-ID'] == '<1@example.com>'
        assert queued['X-MailFrom'] == 'sender@example.com'
        assert queued.get_payload(decode=True).rstrip() == b'.dot and 8-bit \xff'
    assert upstream.messages == [
        ('sender@example.com', ['announce-nonsense@lists.example', 'someone@example.com'],
         with_x_peer(message))]
