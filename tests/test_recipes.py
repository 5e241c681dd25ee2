"""The programs of the tutorial and the how-to pages, run from the pages themselves."""
import contextlib
import mailbox
import os
import re
import shlex
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.pages import (
    END_OF_MESSAGE,
    HANDLERS_DATA,
    ODD_HEADERS,
    RECIPE_MESSAGE,
    block,
    post_message,
    said_by,
    save_block,
)
from tests.support import (
    HELLO,
    find_tool,
    greet,
    held_port,
    need_module,
    running_server,
    serving,
    start_message,
    waits,
)


class TestTutorial:
    def test_see_a_message(self, start, run_python, tmp_path):
        program = start(block('debugging'))
        name = save_block(tmp_path, 'tutorial-send', port_1025=program.port)
        assert shlex.split(block('tutorial-send-command')) == ['python', name]
        assert run_python(name).stdout == ''
        assert said_by(program, END_OF_MESSAGE) == block('tutorial-printed')
        assert program.interrupt() == (0, '', '')

    def test_do_something_with_messages(self, start, run_python, tmp_path):
        save_block(tmp_path, 'tutorial-subjects')
        program = start(block('tutorial-subjects-command'))
        run_python(save_block(tmp_path, 'tutorial-send', port_1025=program.port))
        assert program.line() + '\n' == block('tutorial-subjects-printed')

    def test_no_subject_is_refused(self, start, tmp_path):
        save_block(tmp_path, 'tutorial-subjects')
        program = start(block('tutorial-subjects-command'), PYTHONIOENCODING='ascii')
        for subject in ODD_HEADERS:
            post_message(program.address, message=b'Subject: %s\r\n\r\n' % subject)
            assert ' about ' in program.line()

    def test_change_the_dialogue(self, start, run_python, tmp_path):
        save_block(tmp_path, 'tutorial-subjects')
        save_block(tmp_path, 'tutorial-channel')
        program = start(block('tutorial-channel-command'))
        sent = run_python(save_block(tmp_path, 'tutorial-channel-send', port_1025=program.port))
        assert sent.stdout == block('tutorial-channel-refused')
        assert program.line() + '\n' == block('tutorial-channel-printed')

    def test_catch_mail_in_a_test_suite(self, run_python, tmp_path):
        name = save_block(tmp_path, 'recipe-pytest')
        install, run = block('tutorial-pytest').splitlines()
        assert (install, shlex.split(run)) == ('pip install pytest', ['pytest', name])
        outcome = run_python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-W', 'error',
                             '-W', 'ignore:The asyn', name)
        assert outcome.returncode == 0, outcome.stdout
        assert block('tutorial-pytest-printed').strip() in outcome.stdout


def test_limits_are_changed_as_the_manual_says(start, tmp_path):
    save_block(tmp_path, 'change-limits')
    program = start('python -m smtpd -n -c patient.PatientServer localhost:0')
    with smtplib.SMTP(*program.address, timeout=30) as client:
        client.helo('client.example')
        client.docmd('MAIL', 'FROM:<a@example.com>')
        answers = [client.docmd('RCPT', 'TO:<b%d@example.com>' % number) for number in range(6)]
    assert [code for code, text in answers] == [250] * 5 + [452]


def test_the_recipe_with_a_list_ends_after_three_messages(start, tmp_path):
    program = start(['python', save_block(tmp_path, 'recipe-list')])
    for name in 'abc':
        post_message(program.address, [name + '@example.com', 'd@example.com'], b'12345\r\n')
    assert program.process.wait(30) == 0
    assert program.output.read().decode().splitlines() == [
        'j@example.com -> %s@example.com, d@example.com 5 octets' % name for name in 'abc']


def test_the_recipe_with_a_maildir_keeps_messages(start, tmp_path):
    save_block(tmp_path, 'recipe-maildir')
    program = start(block('recipe-maildir-command'))
    post_message(program.address, ['you@example.com', 'they@example.com'])
    assert program.interrupt() == (0, '', '')
    kept, = mailbox.Maildir(str(tmp_path / 'mail'), create=False)
    assert kept['Return-Path'] == '<j@example.com>'
    assert kept.get_all('Delivered-To') == ['you@example.com', 'they@example.com']
    assert kept['Subject'] == '=?utf-8?q?Caf=C3=A9?='
    assert kept.get_payload(decode=True) == 'Zwei Cafés, bitte.'.encode('iso-8859-1')


def test_the_recipe_for_people_prints_decoded_text(start, tmp_path):
    save_block(tmp_path, 'recipe-readable')
    program = start(block('recipe-readable-command'))
    post_message(program.address)
    lines = program.lines_to('Zwei Cafés, bitte.')
    assert lines[1] == 'From j@example.com to you@example.com'
    assert 'From: Jürgen <j@example.com>' in lines
    assert 'Subject: Café' in lines
    post_message(program.address, message=b'Content-Type: image/png\r\n\r\n')
    program.lines_to('(no text)')


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_the_recipe_for_people_shows_all_mail(start, tmp_path, encoding):
    save_block(tmp_path, 'recipe-readable')
    program = start(block('recipe-readable-command'), PYTHONIOENCODING=encoding)
    for header in [
            *[name + odd for name in (b'From: ', b'Subject: ') for odd in ODD_HEADERS],
            b'Content-Type: text/plain; charset=nobodys',
            b'Content-Type: text/plain; charset="\xe9"', b'Content-Type: text/plain; =',
            b'Content-Type: ;', b'Content-Type: multipart/mixed',
            b'Content-Type: multipart/mixed; boundary=x', b'Content-Transfer-Encoding: base64',
            b'Content-Transfer-Encoding: nobodys', b'no header', b'Date: 99', b'\xff: \xff', b'']:
        for text in b'Hell\xf6.\r\nHello.', b'Hello.', b'Hello.\r\n--x--':
            post_message(program.address, message=header + b'\r\n\r\n--x\r\n\r\n' + text)
            post_message(program.address, message=b'Subject: the next\r\n\r\n')
            assert 'Hello.' in program.lines_to('Subject: the next'), header


def test_the_recipe_that_refuses_does_so(start, tmp_path):
    save_block(tmp_path, 'recipe-refuse')
    program = start(block('recipe-refuse-command'))
    assert post_message(program.address) == {}
    with pytest.raises(smtplib.SMTPDataError) as refusal:
        post_message(program.address, ['later@example.com'])
    assert refusal.value.args == (451, b'Try again later')
    with pytest.raises(smtplib.SMTPDataError) as refusal:
        post_message(program.address, message=b'Come to our casino')
    assert refusal.value.args == (550, b'We do not want this')


def test_the_recipe_with_an_own_command_answers_it(start, tmp_path):
    save_block(tmp_path, 'recipe-command')
    program = start(block('recipe-command-command'))
    with greet(program.address) as client:
        assert client.say(b'XFOO bar') == b'250 BAR\r\n'
        assert client.say(b'xfoo') == b'501 Syntax: XFOO text\r\n'
        assert client.say(b'XBAR') == b'500 Error: command "XBAR" not recognized\r\n'


class TestRecipeAuth:
    @pytest.fixture
    def program(self, start, tmp_path):
        save_block(tmp_path, 'recipe-auth')
        return start(block('recipe-auth-command'))

    def test_a_client_logs_in_and_sends(self, program):
        with smtplib.SMTP(*program.address, timeout=30) as client:
            client.ehlo('client.example')
            assert client.esmtp_features['auth'].strip() == 'PLAIN'
            assert client.login('alice', 'open sesame') == (235, b'Authentication successful')
            assert client.sendmail('j@example.com', ['you@example.com'], RECIPE_MESSAGE) == {}

    def test_nobody_sends_without(self, program):
        with pytest.raises(smtplib.SMTPSenderRefused) as refusal:
            post_message(program.address)
        assert refusal.value.smtp_code == 530

    @pytest.mark.parametrize('dialogue', [
        [(b'AUTH PLAIN', b'503 Error: send EHLO first')],
        [(b'EHLO c', None), (b'AUTH', b'504 Error: only PLAIN is supported'),
         (b'AUTH LOGIN', b'504 Error: only PLAIN is supported'),
         (b'AUTH PLAIN AGFsaWNlAHdyb25n', b'535 Authentication credentials invalid'),
         (b'AUTH PLAIN AGJvYgA=', b'535 Authentication credentials invalid'),
         (b'AUTH PLAIN ?', b'501 Error: bad response'),
         (b'AUTH PLAIN YWxpY2U=', b'501 Error: bad response'),
         (b'AUTH PLAIN /w==', b'501 Error: bad response'),
         (b'AUTH PLAIN', b'334 '), (b'*', b'501 Error: bad response'),
         (b'AUTH PLAIN', b'334 '),
         (b'AGFsaWNlAG9wZW4gc2VzYW1l', b'235 Authentication successful'),
         (b'AUTH PLAIN', b'503 Error: not now'),
         (b'MAIL FROM:<a@example.com> AUTH', b'501 Syntax: MAIL FROM: <address> '
                                             b'[SP <mail-parameters>]'),
         (b'MAIL FROM:<a@example.com> ' + b' '.join([b'AUTH=' + b'x' * 500] * 2), b'250 OK'),
         (b'RCPT TO:<a@example.com> AUTH=<>',
          b'555 RCPT TO parameters not recognized or not implemented'),
         (b'RSET', b'250 OK'),
         (b'MAIL FROM:<a@example.com> SIZE=10 auth=<>', b'250 OK'),
         (b'NOOP', b'250 OK')],
    ], ids=['it needs EHLO', 'all else'])
    def test_its_dialogue(self, program, dialogue):
        with greet(program.address) as client:
            for command, reply in dialogue:
                answer = client.say(command)
                assert reply is None or answer == reply + b'\r\n'


@pytest.fixture
def certificate(tmp_path):
    """cert.pem and key.pem made as the manual says; a client's context that trusts them."""
    find_tool('openssl', 'openssl')
    subprocess.run(block('recipe-starttls-certificate'), shell=True, cwd=tmp_path, check=True,
                   stderr=subprocess.DEVNULL)
    return ssl.create_default_context(cafile=str(tmp_path / 'cert.pem'))


class TestRecipeStartTLS:
    @pytest.fixture
    def program(self, certificate, start, tmp_path):
        save_block(tmp_path, 'recipe-starttls')
        return start(block('recipe-starttls-command'))

    def test_a_client_sends_through_tls(self, program, certificate):
        with smtplib.SMTP(*program.address, timeout=30) as client:
            client.ehlo('client.example')
            assert client.has_extn('starttls')
            client.starttls(context=certificate)
            assert client.ehlo_resp is None
            client.ehlo('client.example')
            assert not client.has_extn('starttls')
            assert client.docmd('STARTTLS') == (503, b'Error: TLS is active')
            assert client.sendmail('j@example.com', ['you@example.com'], RECIPE_MESSAGE) == {}
        assert "b'Subject: =?utf-8?q?Caf=C3=A9?='" in program.lines_to(END_OF_MESSAGE)

    def test_a_large_message_passes(self, program, certificate):
        text = b'Subject: large\r\n\r\n' + b'0123456789\r\n' * 100000
        # The server prints while it is read from.
        with smtplib.SMTP(*program.address, timeout=30) as client, ThreadPoolExecutor() as pool:
            client.starttls(context=certificate)
            lines = pool.submit(program.lines_to, END_OF_MESSAGE)
            client.sendmail('j@example.com', ['you@example.com'], text)
        assert lines.result().count("b'0123456789'") == 100000

    def test_it_goes_on_without_tls(self, program):
        with greet(program.address) as client:
            assert client.say(b'STARTTLS now') == b'501 Syntax: STARTTLS\r\n'
            assert client.say(b'NOOP') == b'250 OK\r\n'

    @pytest.mark.parametrize('ahead', [b'', b'NOOP\r\n', b'NOOP\r\nNOOP\r\n', b'XFOO'],
                             ids=['nothing', 'a command', 'two', 'half of one'])
    def test_what_was_sent_ahead_of_the_handshake_is_thrown_away(
            self, program, certificate, ahead):
        with greet(program.address) as client:
            client.say(b'EHLO before')
            assert client.say(b'MAIL FROM:<before@example.com>') == b'250 OK\r\n'
            client.send(b'STARTTLS\r\n' + ahead)
            assert client.file.readline() == b'220 Ready to start TLS\r\n'
            with certificate.wrap_socket(client.socket, server_hostname='localhost') as tls:
                tls.sendall(b'MAIL FROM:<a@x>\r\nHELO after\r\nMAIL FROM:<a@x>\r\n'
                            + 2700 * b'NOOP\r\n' + b'QUIT\r\n')  # all in one record
                assert tls.makefile('rb').read() == (
                    b'503 Error: send HELO first\r\n250 mx.example\r\n'
                    + 2701 * b'250 OK\r\n' + b'221 Bye\r\n')

    @pytest.mark.parametrize('sent', [b'', b'\x16', b'this is no handshake' * 100], ids=[
        'nothing', 'its first octet', 'something else'])
    def test_a_client_that_talks_no_tls_keeps_no_other_waiting(self, program, sent):
        with greet(program.address) as client:
            assert client.say(b'STARTTLS') == b'220 Ready to start TLS\r\n'
            client.send(sent)
            post_message(program.address)


class TestRecipeStartTLSWithAuth:
    @pytest.fixture
    def program(self, certificate, start, tmp_path):
        for name in 'recipe-auth', 'recipe-starttls', 'recipe-starttls-auth':
            save_block(tmp_path, name)
        return start(block('recipe-starttls-auth-command'))

    def test_a_client_logs_in_through_tls(self, program, certificate):
        with smtplib.SMTP(*program.address, timeout=30) as client:
            client.starttls(context=certificate)
            client.login('alice', 'open sesame')
            assert client.sendmail('j@example.com', ['you@example.com'], RECIPE_MESSAGE,
                                   ['AUTH=<>']) == {}

    def test_a_client_without_tls_keeps_its_password(self, program):
        """RFC 4954, 4: what is not offered is not sent."""
        with smtplib.SMTP(*program.address, timeout=30) as client:
            with pytest.raises(smtplib.SMTPNotSupportedError):
                client.login('alice', 'open sesame')
            assert client.docmd('AUTH', 'PLAIN') == (538, b'Encryption required')


def test_the_recipe_for_parameters_keeps_them(start, tmp_path):
    save_block(tmp_path, 'recipe-extension')
    program = start(block('recipe-extension-command'))
    with greet(program.address) as client:
        assert b'250-DSN\r\n' in client.say(b'EHLO c')
        assert client.say(b'MAIL FROM:<a@b.example> NOTIFY=NEVER')[:3] == b'555'
        assert client.say(b'MAIL FROM:<a@b.example> RET')[:3] == b'501'
        assert client.say(b'MAIL FROM:<a@b.example> RET=HDRS ENVID=Qq314') == b'250 OK\r\n'
        assert client.say(b'RCPT TO:<c@d.example> RET=HDRS')[:3] == b'555'
        assert client.say(b'RCPT TO:<c@d.example> NOTIFY')[:3] == b'501'
        assert client.say(b'RCPT TO:<c@d.example> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;C@d.example'
                          ) == b'250 OK\r\n'
        assert client.say(b'RCPT TO:<e@f.example>') == b'250 OK\r\n'
        client.say(b'DATA')
        assert client.say(b'.') == b'250 OK\r\n'
    lines = program.lines_to(END_OF_MESSAGE)
    assert "mail options: ['RET=HDRS', 'ENVID=QQ314']" in lines
    assert "rcpt options: ['NOTIFY=SUCCESS,DELAY ORCPT=rfc822;C@d.example', '']" in lines


def test_the_command_for_a_proxy_relays(start):
    with serving(localaddr=('localhost', 0)) as upstream:
        program = start(block('recipe-proxy-command', port_25=upstream.port_number))
        post_message(program.address)
        peer, mailfrom, rcpttos, data, kwargs = upstream.messages[0]
    assert (mailfrom, rcpttos) == ('j@example.com', ['you@example.com'])
    assert b'\nX-Peer: ' in data
    assert data.endswith(b'\n\nZwei Caf=E9s, bitte.')


def test_the_recipe_for_a_gateway_is_no_open_relay(start, tmp_path):
    save_block(tmp_path, 'recipe-gateway')
    with serving(localaddr=('localhost', 0)) as upstream:
        program = start(block('recipe-gateway-command', port_25=upstream.port_number))
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            post_message(program.address, ['you@example.net'])
        assert post_message(program.address, ['You@Example.com', 'you@example.net']) == {
            'you@example.net': (550, b'Relaying denied')}
        assert [message[2] for message in upstream.messages] == [['You@Example.com']]
        with greet(program.address) as client:
            client.say(b'EHLO client.example')
            client.say(b'MAIL FROM:<a@example.com>')
            for path in (b'<you@example.net> <x@example.com>', b'you@example.net,x@example.com>',
                         b'<you@example.net>x@example.com>', b'<you@example.net@example.com>',
                         b'"you@example.net"@example.com>'):
                assert client.say(b'RCPT TO:' + path)[:1] == b'5', path
            assert client.say(b'RCPT TO:you@example.com') == b'250 OK\r\n'


def test_the_server_in_a_thread_serves_test_suites(run_python, tmp_path):
    for name in 'recipe-thread', 'recipe-thread-unittest', 'recipe-thread-pytest':
        save_block(tmp_path, name)
    for command, done in zip(block('recipe-thread-command').splitlines(), ('OK', '1 passed')):
        outcome = run_python('-W', 'ignore', *shlex.split(command)[1:])
        assert outcome.returncode == 0 and done in outcome.stdout, outcome.stdout


def test_the_recipe_for_logging_logs_dialogue_and_tracebacks(start, tmp_path):
    name = save_block(tmp_path, 'recipe-log')
    with open(tmp_path / name, 'a', encoding='utf-8') as file:
        file.write('LoggedServer.process_message = lambda *args, **kwargs: 1 / 0\n')
    program = start(block('recipe-log-command'))
    with pytest.raises(smtplib.SMTPDataError):
        post_message(program.address)
    _, _, errors = program.interrupt()
    assert re.search(r'^\d{4}-\S+ \S+ DEBUG .*sender: j@example.com$', errors, re.MULTILINE)
    assert re.search(r'^\d{4}-\S+ \S+ ERROR .*ZeroDivisionError', errors, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize('name, module, package, subject', [
    pytest.param('recipe-django', 'django', 'Django', 'Hello from Django',
                 marks=pytest.mark.real),
    pytest.param('recipe-flask', 'flask_mail', 'Flask-Mail', 'Hello from Flask',
                 marks=pytest.mark.real),
    ('recipe-logging', 'logging', 'logging', 'Hello from logging')])
def test_mail_of_frameworks_arrives(name, module, package, subject, start, tmp_path, run_python):
    need_module(module, package)
    program = start(block('debugging'))
    outcome = run_python('-W', 'ignore', save_block(tmp_path, name, port_1025=program.port))
    assert outcome.returncode == 0, outcome.stdout
    lines = program.lines_to(END_OF_MESSAGE)
    assert "b'Subject: %s'" % subject in lines
    assert "b'It works.'" in lines


@pytest.mark.parametrize('which', ['old', 'new'])
def test_old_and_new_do_the_same(which, user_environment, tmp_path):
    need_module('aiosmtpd')
    with running_server(
            lambda port: ['python', '-W', 'ignore', save_block(
                tmp_path, 'recipe-aiosmtpd-' + which, port_1025=port)],
            host='localhost', cwd=tmp_path, env=user_environment) as (process, address):
        assert post_message(address, ['you@example.com', 'nobody@example.com']) == {
            'nobody@example.com': (550, b'No such user here')}
        assert re.fullmatch(rb"(127.0.0.1|::1) j@example.com \['you@example.com'\] 8 lines\n",
                            process.stdout.readline())
        with pytest.raises(smtplib.SMTPResponseException) as refusal:
            post_message(address, message=b'Subject: x\r\n\r\n' + b'x' * 1000000)
        assert refusal.value.smtp_code == 552


class TestRecipeAsyncio:
    @pytest.fixture
    def start_with(self, start, tmp_path):
        def start_with(step):
            """With another first step in the coroutine that takes a message."""
            name = save_block(tmp_path, 'recipe-asyncio')
            text = (tmp_path / name).read_text()
            assert 'await asyncio.sleep(0.1)' in text
            (tmp_path / name).write_text(text.replace('await asyncio.sleep(0.1)', step))
            return start(['python', name])

        return start_with

    def test_a_coroutine_takes_the_message(self, start_with):
        program = start_with('await asyncio.sleep(0)')
        post_message(program.address)
        assert program.line() == (
            'j@example.com -> you@example.com %d octets' % len(HANDLERS_DATA))
        assert program.interrupt() == (0, '', '')

    def test_two_clients_do_not_wait_for_each_other(self, start_with):
        program = start_with("""
        came = globals().setdefault('came', {'first': asyncio.Event(), 'second': asyncio.Event()})
        came[mailfrom.partition('@')[0]].set()
        await came['first'].wait()
        await came['second'].wait()
""")
        with greet(program.address, HELLO) as first, greet(program.address, HELLO) as second:
            start_message(first, sender=b'<first@example.com>')
            start_message(second, sender=b'<second@example.com>')
            assert first.reply() == second.reply() == b'250 OK\r\n'

    def test_a_coroutine_that_raises_costs_a_451(self, start_with):
        with pytest.raises(smtplib.SMTPDataError) as refusal:
            post_message(start_with('raise OSError').address)
        assert refusal.value.smtp_code == 451


@pytest.mark.real
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    analyze = find_tool('systemd-analyze', 'systemd')
    unit = tmp_path / save_block(tmp_path, 'recipe-systemd')
    unit.write_text(unit.read_text().replace('/opt/smtpd/bin/python', sys.executable))
    outcome = subprocess.run([analyze, 'verify', str(unit)], timeout=60, encoding='utf-8',
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert unit.name not in outcome.stdout
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.real
def test_haproxy_passes_over_a_process_that_died_and_ctrl_c_ends_all(start, tmp_path):
    find_tool('haproxy', 'haproxy')
    save_block(tmp_path, 'recipe-maildir')
    with held_port() as front, held_port() as one, held_port() as two:
        for name in 'recipe-haproxy-cfg', 'recipe-haproxy-script':
            save_block(tmp_path, name, port_1025=front, port_2501=one, port_2502=two)
        script = start(block('recipe-haproxy-command'))
        for _ in waits():  # until both serve: HAProxy takes them in turn
            with contextlib.suppress(OSError, smtplib.SMTPException):
                for port in front, one, two:
                    post_message(('localhost', port))
                break
        with open('/proc/%d/task/%d/children' % (2 * (script.process.pid,))) as file:
            os.kill(int(file.read().split()[0]), signal.SIGKILL)
        for _ in range(4):
            post_until_accepted(('localhost', front))
        script.send(signal.SIGINT)
        script.process.wait(30)
        with pytest.raises(OSError):
            for _ in waits():
                socket.create_connection(('localhost', two)).close()


def post_until_accepted(address):
    """What a mail program does: 4yz and a lost connection mean "try again"."""
    for _ in waits():
        with contextlib.suppress(OSError, smtplib.SMTPServerDisconnected):
            return post_message(address)
