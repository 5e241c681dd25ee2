"""The proxies: what happens upstream, what the client hears, what is delivered."""
import asynchat
import asyncore
import contextlib
import errno
import gc
import itertools
import os
import re
import select
import socket
import sys
import threading
import unittest.mock
import weakref

import pytest

import smtpd
from tests.support import (
    CLOSE,
    ENDLESS,
    HANG,
    HELLO,
    OTHER_NAMES,
    OTHERS,
    PEER,
    PROXIED,
    RECIPIENT,
    SENDER,
    SLOW,
    RawClient,
    RecordingServer,
    Upstream,
    both_modes,
    channels_of,
    greet,
    idle_proxy,
    in_mode,
    looping,
    mailman_proxy_to,
    post,
    proxy_to,
    relay_message,
    reset,
    serving,
    start_message,
    steps,
    stuffed,
    traced_memory,
    turning,
    variant,
    with_x_peer,
)

LIMITS = ['upstream_command_timeout_seconds', 'upstream_data_timeout_seconds',
          'upstream_block_timeout_seconds', 'upstream_final_timeout_seconds']


def impatient(proxy_class=smtpd.PureProxy, **attributes):
    """The proxy's class, with time limits that a test can wait for."""
    return variant(proxy_class, **{**dict.fromkeys(LIMITS, 0.3), **attributes})


def received_from(upstream):
    (_, _, content), = upstream.messages
    return content


def connections_to(upstream, proxy):
    """The proxy's sockets."""
    return [each.socket for each in list(proxy._map.values())
            if isinstance(each, asynchat.async_chat)
            and each.socket.getpeername() == upstream.address]


def codes(replies):
    return ' '.join(reply[:3] for reply in replies)


# ---------------------------------------------------------------------------------------------
# PureProxy: what arrives

@both_modes
@pytest.mark.parametrize('message, expected', [
    (b'A: b\r\n\r\nc\r\n\r\nd\r\n', b'A: b\r\nX-Peer: 127.0.0.1\r\n\r\nc\r\n\r\nd\r\n'),
    (b'\r\nno header\r\n', b'X-Peer: 127.0.0.1\r\n\r\nno header\r\n'),
    (b'A: b\r\nC: d\r\n', b'A: b\r\nC: d\r\nX-Peer: 127.0.0.1\r\n'),
    (b'A: b\r\n\r\nend\r\n\r\n\r\n', b'A: b\r\nX-Peer: 127.0.0.1\r\n\r\nend\r\n\r\n\r\n'),
    (b'..dots\r\n\r\nc\r\n', b'..dots\r\nX-Peer: 127.0.0.1\r\n\r\nc\r\n'),
    (b'A: b\r\n\r\r\nc\r\n\r\nd\r\n', b'A: b\r\nX-Peer: 127.0.0.1\r\n\r\nc\r\n\r\nd\r\n'),
    (b'A: b\r\rc\r\n\r\nd\r\n', b'A: b\r\nX-Peer: 127.0.0.1\r\n\r\nc\r\n\r\nd\r\n'),
    (b'', b'X-Peer: 127.0.0.1\r\n'),
], ids=['before the first empty line', 'an empty line comes first',
        'no empty line: at the end', 'empty lines at the end stay', 'a dot comes first',
        'a CR makes no line that is not empty', 'CRs end lines', 'nothing'])
def test_x_peer_stands_before_the_first_empty_line(upstream, decode_data, message, expected):
    with proxy_to(upstream, decode_data=decode_data) as proxy, greet(proxy, HELLO) as client:
        client.send(b'MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n'
                    + (stuffed(message) if message else b'.\r\n'))
        assert [client.reply()[:3] for _ in range(4)] == [b'250', b'250', b'354', b'250']
    assert received_from(upstream) == expected


@pytest.mark.parametrize('peer, told', [('/run/smtp.sock', b'/run/smtp.sock'), ('', b''),
                                        (('fe80::1', 25, 0, 2), b'fe80::1'), ('\xe9', b'\\xe9')])
def test_x_peer_of_other_address_families(upstream, peer, told):
    with idle_proxy(remoteaddr=upstream.address) as proxy:
        proxy.process_message(peer, 'a@x', ['b@x'], b'A: b\n\nc')
    assert received_from(upstream) == b'A: b\r\nX-Peer: %s\r\n\r\nc\r\n' % told


def test_small_packets_to_the_upstream_are_not_held_back(upstream):
    """By Nagle's rule: a command would wait 40 ms for the upstream's ACK."""
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert relay_message(client) == b'250 OK\r\n'
        assert [each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
                for each in connections_to(upstream, proxy)] == [True]


@pytest.mark.skipif(not socket.has_ipv6, reason='no IPv6 here')
def test_proxy_relays_over_ipv6():
    with Upstream(host='::1') as upstream:
        with proxy_to(upstream, localaddr=('::1', 0)) as proxy:
            assert post(proxy) == b'250 OK\r\n'
        assert upstream.messages[0][2] == with_x_peer(PROXIED, b'::1')


@both_modes
def test_messages_arrive_unchanged(upstream, decode_data):
    body = bytes(octet for octet in range(256) if octet not in b'\r\n')
    odd = b'\r\n'.join([b'Subject: \xe9\xff', b'', body, 'žluťoučký kůň 🐎'.encode(), b''])
    large = b'A: ' + b'h' * 70000 + b'\r\n\r\n' + b'x' * 1000000 + b'\r\n' + b'.\r\n' * 100000
    with proxy_to(upstream, decode_data=decode_data) as proxy, greet(proxy, HELLO) as client:
        for message in odd, large, large[:-2] + b'\r\n\r\n':
            assert relay_message(client, message) == b'250 OK\r\n'
            assert upstream.messages.pop()[2] == with_x_peer(message)


@both_modes
def test_all_line_ends_go_out_as_crlf_and_dots_are_doubled_after_that(upstream, decode_data):
    pieces = (b''.join(piece) for length in range(1, 6)
              for piece in itertools.product((b'\r', b'\n', b'.', b'a'), repeat=length))
    message = b'A: b\r\n\r\nx' + b'x'.join(pieces) + b'x\r\n'
    with proxy_to(upstream, decode_data=decode_data) as proxy:
        assert post(proxy, message) == b'250 OK\r\n'
    # a handler gets CRLF as LF, as documented
    as_handled = with_x_peer(message).replace(b'\r\n', b'\n')
    assert received_from(upstream) == re.sub(b'\r\n|\r|\n', b'\r\n', as_handled)
    assert not re.search(rb'(?<!\r)\n|\r(?!\n)|^\.(?!\.)', upstream.bodies[0], re.M)


@both_modes
@pytest.mark.parametrize('path', [
    b'<plain@example.com>', b'<"quoted .. (local) part"@example.com>',
    b'<"\\"<>\\\\"@example.com>',
    b'<"plain"@example.com>', b'<a.@example.com>', b'<user@[127.0.0.1]>', b'<user@[IPv6:::1]>',
    b"<o'neil+tag=x/y!z%w@example.com>", b'<CamelCase@Example.COM>', b'<root>',
    b'<Postmaster>', b'<>', b'<' + b'l' * 300 + b'@example.com>',
], ids=lambda path: path.decode()[:50])
def test_paths_go_upstream_verbatim(upstream, decode_data, path):
    with proxy_to(upstream, decode_data=decode_data) as proxy:
        recipient = path if path != b'<>' else RECIPIENT
        assert post(proxy, sender=path, recipients=(recipient,)) == b'250 OK\r\n'
    assert re.fullmatch(b'mail from: ?' + re.escape(path) + b'( [^<>]*)?\r\n',
                        upstream.verbs(b'MAIL')[0], re.I)
    assert re.fullmatch(b'rcpt to: ?' + re.escape(recipient) + b'( [^<>]*)?\r\n',
                        upstream.verbs(b'RCPT')[0], re.I)


# ---------------------------------------------------------------------------------------------
# What happened upstream, what the client hears

LARGE = PROXIED + b'x' * 8000000 + b'\r\n'  # more than fits between proxy and upstream
NEEDS_MAIL, NEEDS_RCPT = '503 Error: need MAIL command', '503 Error: need RCPT command'
LATER = '451 Upstream not available'
OK = '250 OK'
GO_ON = '354 Go on'
LOST = [CLOSE, ENDLESS, SLOW, HANG, 'What?', '150 Wait', '2500 OK', '200-One\r\nTwo']
OUR_FAULT = '503 5.5.1 Bad sequence of commands'
HEARD_BEFORE = {'RCPT': [OK], 'DATA': [OK, OK], 'BODY': [OK, OK, GO_ON], '.': [OK, OK, GO_ON]}


@pytest.mark.parametrize('step, faults, reply', [
    # A refusal is the client's, code and text; 421 is the upstream's farewell, not ours.
    *[(step, [fault], reply) for step in ('MAIL', 'RCPT', 'DATA', '.') for fault, reply in [
        ('553 5.1.8 Not so', '553 5.1.8 Not so'), ('452 4.3.1 Full', '452 4.3.1 Full'),
        ('421 4.3.2 Bye', '451 4.3.2 Bye')]],
    ('BODY', ['552 5.3.4 Too big'], '552 5.3.4 Too big'),
    # An upstream that is lost, or out of step.
    ('CONNECT', [*LOST, '421 Busy', '554 No', '354 Go on'], LATER),
    ('EHLO', LOST, LATER),
    ('MAIL', [*LOST, OUR_FAULT, '354 Go on', '300 x'], LATER),
    ('RCPT', [*LOST, OUR_FAULT, '354 Go on', '300 x'], LATER),
    ('DATA', [*LOST, OUR_FAULT, '250 OK', '350 More'], LATER),
    ('BODY', [CLOSE, HANG, '250 OK'], LATER),
    ('.', [*LOST, OUR_FAULT, '354 Go on', '300 x'], LATER),
    # Success is told by the first digit.
    ('EHLO', ['502 5.5.1 What?'], OK),
    ('RCPT', ['251 2.1.5 Moved', '299 x', '250', '200 x'], '2.*'),
    ('.', ['200 x', '299 x'], '2.. x'),
    ('.', ['250 2.0.0 Queued as 4711'], '250 2.0.0 Queued as 4711'),
    # As many lines as it has; what ASCII has no sign for becomes a question mark.
    ('.', ['550-5.7.1 Go\r\n550-\r\n550 5.7.1 away'], '550-5.7.1 Go\r\n550-\r\n550 5.7.1 away'),
    ('RCPT', ['550 Unzul\xe4ssig\t\xff\0'], r'550 Unzul\?ssig'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_reply_of_each_step_is_the_upstreams(upstream, step, faults, reply):
    expected = [*HEARD_BEFORE.get(step, []), reply]
    if reply[0] == '2':
        expected += [OK, OK, GO_ON, OK][len(expected):]
    else:
        expected += {1: [NEEDS_MAIL, NEEDS_RCPT], 2: [NEEDS_RCPT]}.get(len(expected), [])
    with proxy_to(upstream, impatient()) as proxy:
        for fault in faults:
            upstream.faults = {step: fault}
            with greet(proxy, HELLO) as client:
                heard = steps(client, LARGE if step == 'BODY' else PROXIED)
                assert len(heard) == len(expected), (fault, heard)
                assert all(map(re.match, expected, heard)), (fault, heard)
                delivered = heard[-1][:1] == '2'
                assert len(upstream.messages) == delivered
                # The session lives on, and the next try is the only one that arrives.
                upstream.faults = {}
                upstream.released.set()
                assert client.say(b'RSET') == b'250 OK\r\n'
                assert codes(steps(client)) == '250 250 354 250'
                assert len(upstream.messages) == delivered + 1
            upstream.released.clear()
            del upstream.messages[:]


@pytest.mark.parametrize('use_poll', [False, True], ids=['select', 'poll'])
@both_modes
def test_each_recipient_has_its_own_fate(upstream, decode_data, selector, use_poll):
    upstream.refused = {'b@x': '550 5.1.1 No such user', 'c@x': '450 4.2.0 Greylisted'}
    with proxy_to(upstream, decode_data=decode_data, use_poll=use_poll) as proxy:
        with greet(proxy, HELLO) as client:
            recipients = b'<a@x>', b'<b@x>', b'<c@x>', b'<d@x>', b'<a@x>'
            assert steps(client, recipients=recipients) == [
                OK, OK, '550 5.1.1 No such user', '450 4.2.0 Greylisted', OK, OK, GO_ON, OK]
    assert upstream.messages == [('sender@example.com', ['a@x', 'd@x'], with_x_peer(PROXIED))]
    assert upstream.connections == 1


def test_upstream_may_refuse_more_recipients_than_the_client_may_make_errors(upstream):
    upstream.known = 'good'
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        bad = [b'<%d@x>' % number for number in range(150)]
        heard = steps(client, recipients=[*bad, b'<good@x>'])
        assert codes(heard) == '250' + ' 550' * 150 + ' 250 354 250'
        assert client.say(b'MAIL FROM:<a@x>') == b'250 OK\r\n'
        assert client.say(b'RCPT TO:<bad@x>')[:3] == b'550'
        for _ in range(99):
            assert client.say(b'WHAT').startswith(b'500 ')
        assert client.say(b'WHAT').startswith(b'500 ')
        assert client.rest().startswith(b'421 ')


@both_modes
@pytest.mark.parametrize('last, reply', [(b'', []), (b'QUIT\r\n', [b'221'])],
                         ids=['without QUIT, as embedded devices', 'with QUIT'])
def test_a_client_that_pipelines_whole_messages_gets_its_replies_in_order(
        upstream, decode_data, last, reply):
    upstream.refused = {'no@x': '550 No'}
    message = (b'MAIL FROM:<a@x>\r\nRCPT TO:<no@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n' + PROXIED
               + b'.\r\n')
    with proxy_to(upstream, decode_data=decode_data) as proxy, greet(proxy, HELLO) as client:
        client.send(message + b'RSET\r\n' + message + last)
        client.socket.shutdown(socket.SHUT_WR)
        assert re.findall(rb'^...', client.rest(), re.M) == (
            b'250 550 250 354 250 250 250 550 250 354 250'.split() + reply)
    assert [recipients for _, recipients, _ in upstream.messages] == [['b@x']] * 2


def test_parameters_go_upstream_where_it_offers_them(upstream):
    for offered, given, expected in [
            (['SIZE', '8BITMIME'], b' SIZE=123 BODY=7BIT', b' SIZE=123 BODY=7BIT'),
            (['SIZE 1000'], b' BODY=8BITMIME SIZE=123', b' SIZE=123'),
            (['8BITMIME'], b' body=8bitmime SIZE=123', b' BODY=8BITMIME'),
            (['8bitmime'], b'', b' BODY=8BITMIME'),  # it may be
            ([], b' SIZE=123 BODY=8BITMIME', b'')]:
        upstream.extensions = offered
        with proxy_to(upstream) as proxy, RawClient(proxy) as client:
            client.reply()
            assert b'250-8BITMIME' in client.say(b'EHLO client.example')
            assert client.say(b'MAIL FROM:<a@x>' + given) == b'250 OK\r\n'
        assert upstream.verbs(b'MAIL')[-1] == b'MAIL FROM:<a@x>' + expected + b'\r\n'
    upstream.faults = {'EHLO': '502 What?'}
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert client.say(b'MAIL FROM:<a@x>') == b'250 OK\r\n'
        assert [line[:4] for line in upstream.commands[-3:]] == [b'EHLO', b'HELO', b'MAIL']


def test_one_session_upstream_for_each_session(upstream):
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert client.say(b'RSET') == b'250 OK\r\n'
        assert upstream.connections == 0
        assert relay_message(client) == b'250 OK\r\n'
        for line in b'RSET', b'MAIL FROM:<a@x>', b'RSET':
            assert client.say(line) == b'250 OK\r\n'
        assert relay_message(client) == b'250 OK\r\n'
        assert upstream.connections == 1
        assert client.say(b'QUIT') == b'221 Bye\r\n'
        upstream.threads[1].join(20)
    assert [line.split()[0] for line in upstream.commands] == (
        b'EHLO MAIL RCPT DATA MAIL RSET MAIL RCPT DATA QUIT'.split())


@pytest.mark.parametrize('lines, heard', [
    # What is lost stays lost until the next MAIL; no step gets a refusal for good.
    ([b'MAIL FROM:<a@x>'], {b'RCPT TO:<c@x>': b'451', b'RCPT TO:<d@x>': b'451'}),
    ([b'MAIL FROM:<a@x>', b'RCPT TO:<b@x>'],
     {b'RCPT TO:<c@x>': b'451', b'RCPT TO:<b@x>': b'451', b'DATA': b'451'}),
    # Nothing was sent yet: a second transaction will do.
    ([], {}),
    ([b'MAIL FROM:<a@x>', b'RCPT TO:<b@x>', b'DATA'], {b'A: b\r\n\r\n.': b'250'}),
], ids=['after MAIL', 'after RCPT', 'between two messages', 'after DATA'])
def test_upstream_that_starts_anew(upstream, lines, heard):
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert relay_message(client) == b'250 OK\r\n'
        for line in lines:
            assert client.say(line)[:1] in b'23'
        upstream.stop()
        upstream.start()
        assert {line: client.say(line)[:3] for line in heard} == heard
        assert client.say(b'RSET') == b'250 OK\r\n'
        assert codes(steps(client)) == '250 250 354 250'
    assert [each[1] for each in upstream.messages[1:-1]] == [['b@x']] * (b'DATA' in lines)


@pytest.mark.parametrize('farewell', ['421 4.3.2 Bye', CLOSE, OUR_FAULT])
def test_upstream_that_ends_a_session_is_asked_anew_for_the_next_message(upstream, farewell):
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert codes(steps(client)) == '250 250 354 250'
        upstream.faults = {'MAIL': [farewell]}
        assert codes(steps(client)) == '250 250 354 250'
        assert len(connections_to(upstream, proxy)) == 1
    assert upstream.connections == 2


def test_upstream_that_takes_less_by_the_time_of_a_second_try_gets_nothing(upstream):
    """The client was told that both are well; now one is refused."""
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert client.say(b'MAIL FROM:<a@x>').startswith(b'250')
        for recipient in OTHERS:
            assert client.say(b'RCPT TO:' + recipient).startswith(b'250')
        assert client.say(b'DATA').startswith(b'354')
        upstream.stop()
        upstream.start()
        upstream.refused = {OTHER_NAMES[1]: '550 5.1.1 Gone'}
        client.send(stuffed(PROXIED))
        assert client.reply() == b'451 5.1.1 Gone\r\n'
    assert upstream.messages == []


@pytest.mark.parametrize('unasked', ['354 Go on\r\n250 2.0.0 Queued', '354 Go on', '354',
                                     '421 4.3.2 Going', 'What?', '552 5.3.4 Too big'])
def test_reply_to_nothing_is_not_taken_for_the_next_commands(upstream, capfd, unasked):
    """As if the upstream had answered the message before it was there."""
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        for faults, heard in (({'RCPT': ['250 OK\r\n' + unasked]}, '250 250 451'),
                              ({'DATA': '354 Go on\r\n' + unasked}, '250 250 354 451'),
                              ({'RSET': ['250 OK\r\n' + unasked]}, '250 250 354 250')):
            upstream.faults = faults
            assert codes(steps(client)) == heard
            upstream.threads[-1].join(0 if 'RSET' in faults else 20)  # such an upstream is left
            assert client.say(b'RSET') == b'250 OK\r\n'
        client.say(b'MAIL FROM:<a@x>')
        assert client.say(b'RSET') == b'250 OK\r\n'  # between two messages it does no harm
        assert codes(steps(client)) == '250 250 354 250'
    assert len(upstream.messages) == 2
    assert 'may have been delivered' not in capfd.readouterr().err


@pytest.mark.parametrize('refusal', ['554 5.7.1 Over quota', '452 4.3.1 Full'])
@pytest.mark.parametrize('resets', [False, True])
def test_upstream_that_keeps_the_transaction_of_a_message_that_it_refuses(
        upstream, resets, refusal):
    """As Postfix does where smtpd_end_of_data_restrictions refuse."""
    upstream.keeps_refused = True
    upstream.faults = {'.': [refusal]}
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert steps(client) == [OK, OK, GO_ON, refusal]
        if resets:
            assert client.say(b'RSET') == b'250 OK\r\n'
            assert upstream.commands[-1] == b'RSET\r\n'
        for _ in range(2):
            assert codes(steps(client)) == '250 250 354 250'
    assert len(upstream.messages) == 2
    assert upstream.connections == 1


def test_client_may_reset_what_the_upstream_does_not(upstream):
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        upstream.faults = {'RSET': ['500 What?', CLOSE, '421 Bye']}
        for connections in 1, 2, 3:
            assert client.say(b'MAIL FROM:<a@x>') == client.say(b'RSET') == b'250 OK\r\n'
            assert upstream.connections == connections
        assert codes(steps(client)) == '250 250 354 250'
    assert len(upstream.messages) == 1


@pytest.mark.parametrize('fault', [CLOSE, HANG, ENDLESS, 'What?'])
def test_log_says_so_when_nobody_knows_whether_the_message_was_delivered(upstream, capfd, fault):
    upstream.faults = {'.': fault}
    with proxy_to(upstream, impatient(upstream_block_timeout_seconds=60)) as proxy, \
            greet(proxy, HELLO) as client:
        assert steps(client) == [OK, OK, GO_ON, LATER]
        assert client.say(b'RSET') == b'250 OK\r\n'
    log = capfd.readouterr().err
    assert re.findall('^error: .*sender@example.com: (.*?):', log, re.M) == [
        'lost after the final dot']
    assert {CLOSE: ': closed the connection\n', HANG: ': timed out\n'}.get(fault, '') in log
    upstream.faults = {'BODY': HANG}
    with proxy_to(upstream, impatient(upstream_final_timeout_seconds=60)) as proxy:
        assert post(proxy, LARGE).startswith(b'451 ')
    assert 'final dot' not in capfd.readouterr().err


def answers_no_more(listener, waiting):
    """Since others wait for it."""
    listener.listen(0)
    for _ in range(4):
        client = waiting.enter_context(socket.socket())
        client.setblocking(False)
        client.connect_ex(listener.getsockname())


def found_at(*addresses):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', address) for address in addresses]


@pytest.mark.parametrize('use_poll', [False, True], ids=['select', 'poll'])
@pytest.mark.parametrize('first', ['refuses', 'does not answer', 'says no'])
def test_each_address_of_the_upstream_is_tried(upstream, monkeypatch, first, use_poll):
    with socket.socket() as other, contextlib.ExitStack() as waiting:
        other.bind(('127.0.0.1', 0))
        if first == 'does not answer':
            answers_no_more(other, waiting)
        elif first == 'says no':
            upstream.faults = {'CONNECT': ['554 No']}
        found = found_at(upstream.address if first == 'says no' else other.getsockname(),
                         upstream.address)
        proxy_class = impatient(upstream_timeout_seconds=1)
        with serving(proxy_class, remoteaddr=('mx.example', 25), use_poll=use_poll,
                     timeout=0.1) as proxy, greet(proxy, HELLO) as client:
            with monkeypatch.context() as patch:
                patch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: found)
                assert codes(steps(client)) == '250 250 354 250'
            assert len(connections_to(upstream, proxy)) == 1
    assert len(upstream.messages) == 1


def test_close_all_in_another_thread_ends_a_session_that_begins_just_then(upstream, monkeypatch):
    def start_beside(thread):
        monkeypatch.setattr(threading.Thread, 'start', start)
        start(thread)
        other = threading.Thread(target=asyncore.close_all, args=(proxy._map,))
        other.start()
        other.join()

    class Proxy(smtpd.PureProxy):
        def __init__(self, map):
            super().__init__(('127.0.0.1', 0), upstream.address, map=map)

    start = threading.Thread.start
    with looping(Proxy, 0.05) as proxy, greet(proxy, HELLO) as client:
        monkeypatch.setattr(threading.Thread, 'start', start_beside)
        client.send(b'MAIL FROM:<a@x>\r\n')
        assert client.rest() == b''


def test_addresses_of_the_upstream_share_the_time_to_connect(upstream, monkeypatch, clock):
    with socket.socket() as other, contextlib.ExitStack() as waiting, \
            turning(variant(smtpd.PureProxy, upstream_timeout_seconds=100)) as (proxy, turn), \
            RawClient(proxy) as client:
        other.bind(('127.0.0.1', 0))
        answers_no_more(other, waiting)
        found = found_at(other.getsockname(), upstream.address)
        proxy._remoteaddr = 'mx.example', 25
        client.send(HELLO + b'\r\nMAIL FROM:<a@x>\r\n')
        with monkeypatch.context() as patch:
            patch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: found)
            assert turn(until=lambda: any(each.connecting for each in list(proxy._map.values())))
        clock.seconds += 60
        assert turn(until=lambda: upstream.connections)


@pytest.mark.parametrize('use_poll', [False, True], ids=['select', 'poll'])
def test_upstream_that_select_could_not_wait_for_is_451(upstream, use_poll):
    resource = pytest.importorskip('resource')  # not on Windows
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1200:
        pytest.skip('too few descriptors')
    with proxy_to(upstream, use_poll=use_poll) as proxy, greet(proxy, HELLO) as client, \
            greet(proxy, HELLO) as other:
        assert codes(steps(other)) == '250 250 354 250'
        with contextlib.ExitStack() as numbers:
            for _ in range(1030):
                numbers.enter_context(open(os.devnull))
            assert codes(steps(client)) == ('250 250 354 250' if use_poll else '451 503 503')
            assert client.say(b'NOOP') == b'250 OK\r\n'
        assert codes(steps(client)) == '250 250 354 250'


def test_connections_to_one_upstream_are_limited(upstream, capfd):
    with proxy_to(upstream, impatient(upstream_connection_limit=2)) as proxy, \
            greet(proxy, HELLO) as first, greet(proxy, HELLO) as second, \
            greet(proxy, HELLO) as third:
        assert first.say(b'MAIL FROM:<a@x>') == second.say(b'MAIL FROM:<a@x>') == b'250 OK\r\n'
        assert steps(third) == [LATER, NEEDS_MAIL, NEEDS_RCPT]
        assert '2 connections already' in capfd.readouterr().err
        assert first.say(b'QUIT') == b'221 Bye\r\n'
        assert first.rest() == b''
        assert codes(steps(third)) == '250 250 354 250'
        proxy.upstream_connection_limit = None
        with greet(proxy, HELLO) as fourth:
            assert codes(steps(fourth)) == '250 250 354 250'


def test_connections_to_one_upstream_are_limited_though_all_come_at_once(upstream):
    with proxy_to(upstream, impatient(upstream_connection_limit=1)) as proxy, \
            greet(proxy, HELLO) as first, greet(proxy, HELLO) as second:
        for client in first, second:
            client.send(b'MAIL FROM:<a@x>\r\n')
        assert {client.reply()[:3] for client in (first, second)} == {b'250', b'451'}


def test_session_that_ends_leaves_nothing_to_the_garbage_collector(upstream):
    gc.collect()
    gc.disable()
    try:
        with proxy_to(upstream) as proxy:
            with greet(proxy, HELLO) as client:
                assert codes(steps(client)) == '250 250 354 250'
                [channel] = map(weakref.ref, channels_of(proxy))
                assert client.say(b'QUIT') == b'221 Bye\r\n'
                assert client.rest() == b''
        assert channel() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork() here')
@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_child_that_closes_its_copies_of_the_sessions_says_nothing_upstream(upstream):
    def smtp_XFORK(self, arg):
        child = os.fork()
        if not child:
            asyncore.close_all(self._map)
            os._exit(0)
        self.push('250 %d' % os.waitpid(child, 0)[1])

    channel_class = variant(smtpd.SMTPChannel, smtp_XFORK=smtp_XFORK)
    with proxy_to(upstream, impatient(channel_class=channel_class)) as proxy, \
            greet(proxy, HELLO) as client:
        assert client.say(b'MAIL FROM:<a@x>') == client.say(b'RCPT TO:<b@x>') == b'250 OK\r\n'
        assert client.say(b'XFORK') == b'250 0\r\n'
        assert client.say(b'RCPT TO:<c@x>') == b'250 OK\r\n'
        assert upstream.verbs(b'QUIT') == []


def test_upstream_that_cannot_be_reached_is_451(capfd):
    with socket.socket() as unused:
        unused.bind(('127.0.0.1', 0))
        for address in unused.getsockname(), ('a' * 64 + '.example', 25):  # no name of a host
            with serving(smtpd.PureProxy, remoteaddr=address) as proxy, \
                    greet(proxy, HELLO) as client:
                assert steps(client) == [LATER, NEEDS_MAIL, NEEDS_RCPT]
    assert os.strerror(errno.ECONNREFUSED) in capfd.readouterr().err


def test_look_up_for_which_there_are_no_descriptors_is_451(upstream):
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        with unittest.mock.patch('socket.socketpair', side_effect=OSError):
            assert steps(client) == [LATER, NEEDS_MAIL, NEEDS_RCPT]
        assert codes(steps(client)) == '250 250 354 250'


# ---------------------------------------------------------------------------------------------
# Clients that go away, sessions that wait

@pytest.mark.parametrize('leave', ['closes', 'resets'])
@pytest.mark.parametrize('sent', [1, 2, 3, 4])
def test_client_that_goes_away_ends_the_session_upstream(upstream, sent, leave):
    with proxy_to(upstream) as proxy:
        with greet(proxy, HELLO) as client:
            for line in [b'MAIL FROM:<a@x>', b'RCPT TO:<b@x>', b'DATA'][:sent]:
                client.say(line)
            if sent == 4:
                client.send(b'Subject: half a mess')
            if leave == 'resets':
                reset(client)
        upstream.threads[1].join(20)
        assert not upstream.threads[1].is_alive()
    assert upstream.messages == upstream.torn == []
    assert bool(upstream.verbs(b'QUIT\r\n')) == (sent < 3)


@pytest.mark.parametrize('end', ['closes', 'resets', 'is closed by the program'])
def test_message_that_was_given_up_and_comes_again_is_delivered_once(upstream, end):
    upstream.faults = {'.': [HANG]}
    with proxy_to(upstream) as proxy:
        with greet(proxy, HELLO) as client:
            start_message(client)
            assert upstream.hangs.wait(20)
            if end == 'resets':
                reset(client)
            elif end != 'closes':
                channels_of(proxy)[0].close()
                assert client.rest() == b''
        for _ in range(2):
            with greet(proxy, HELLO) as client:
                assert steps(client) == [OK, OK, GO_ON, LATER]
                # Another message, or another sender, is not meant.
                assert codes(steps(client, sender=b'<b@x>')) == '250 250 354 250'
                assert codes(steps(client, b'A: b\r\n\r\n')) == '250 250 354 250'
        upstream.release()
        upstream.threads[1].join(20)
        assert len(upstream.messages) == 5
        assert post(proxy) == b'250 OK\r\n'
        assert len(upstream.messages) == 5
        assert post(proxy) == b'250 OK\r\n'  # who sends it once more means it
        assert len(upstream.messages) == 6


def test_message_to_a_slow_upstream_is_not_multiplied_in_memory(upstream):
    size = 10_000_000
    message = PROXIED + (b'x' * 70 + b'\r\n') * (size // 72)
    upstream.faults = {'BODY': HANG}
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client, \
            greet(proxy, HELLO) as other, traced_memory() as octets:
        start_message(client, message)
        assert upstream.hangs.wait(20)
        for _ in range(20):  # turns of the loop: the kernel takes what it may
            assert other.say(b'NOOP') == b'250 OK\r\n'
        assert octets()[0] < 3.3 * size  # the test's, the handler's, that with X-Peer
        upstream.release()
        assert client.reply() == b'250 OK\r\n'
    assert upstream.messages[0][2] == with_x_peer(message)


@pytest.mark.parametrize('step, lines', [
    ('command', [b'MAIL FROM:<a@x>']), ('command', [b'MAIL FROM:<a@x>', b'RCPT TO:<c@x>']),
    ('data', [b'MAIL FROM:<a@x>', b'RCPT TO:<c@x>', b'DATA']),
    ('final', [b'MAIL FROM:<a@x>', b'RCPT TO:<c@x>', b'DATA', b'A: b\r\n.'])],
    ids=['MAIL', 'RCPT', 'DATA', 'message'])
def test_step_that_our_own_fault_ends_was_not_taken(upstream, step, lines, capfd):
    """And the reply that it leaves unread is not taken for that to the next."""
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert codes(steps(client)) == '250 250 354 250'
        for line in lines[:-1]:
            assert client.say(line)[:1] in b'23'
        upstream.refused = dict.fromkeys(['c@x', 'no@x'], '550 No')
        setattr(proxy, 'upstream_%s_timeout_seconds' % step, 'not a number')
        assert client.say(lines[-1]) == b'451 Internal confusion\r\n'
        delattr(proxy, 'upstream_%s_timeout_seconds' % step)
        if len(lines) < 3:
            # Not 550, which was c's.
            assert client.say(b'RCPT TO:<d@x>')[:3] == (b'451' if len(lines) == 2 else b'503')
            assert client.say(b'DATA')[:3] == b'503'
        assert client.say(b'RSET') == b'250 OK\r\n'
        assert codes(steps(client, recipients=[b'<no@x>', b'<d@x>'])) == '250 550 250 354 250'
    assert upstream.messages[-1][1] == ['d@x']
    assert 'TypeError' in capfd.readouterr().err


@pytest.mark.parametrize('base', [smtpd.PureProxy, RecordingServer])
@pytest.mark.parametrize('step', [0, 1, 2, 3], ids=['MAIL', 'RCPT', 'RCPT again', 'DATA'])
def test_step_that_the_client_was_told_to_be_taken_stands_whatever_fails_then(
        upstream, base, step):
    class Channel(smtpd.SMTPChannel):
        replies = 0

        def push(self, msg):
            super().push(msg)
            if msg.startswith(('250 OK', '354')):
                self.replies += 1
                if self.replies == step + 1:
                    raise OSError('the transcript is full')

        def handle_error(self):
            assert isinstance(sys.exc_info()[1], OSError)

    with proxy_to(upstream, variant(base, channel_class=Channel)) as server, \
            greet(server) as client:
        client.send(b'HELO me\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nRCPT TO:<c@x>\r\n')
        for code in (b'250', b'250', b'250', b'250'):
            assert client.reply()[:3] == code
        assert client.say(b'DATA')[:3] == b'354'
        client.send(stuffed(b'NOOP\r\nVRFY smuggled@x\r\n'))
        assert client.reply() == b'250 OK\r\n'
        recipients = ([each[1] for each in upstream.messages] if base is smtpd.PureProxy
                      else [each[2] for each in server.messages])
        assert recipients == [['b@x', 'c@x']]


def test_step_that_the_client_was_told_to_be_refused_is_taken_back_whatever_fails_then(upstream):
    class Channel(smtpd.SMTPChannel):
        def push(self, msg):
            super().push(msg)
            if msg.startswith('550'):
                raise OSError('the transcript is full')

        def handle_error(self):
            assert isinstance(sys.exc_info()[1], OSError)

    upstream.refused = {'no@x': '550 No'}
    with proxy_to(upstream, variant(smtpd.PureProxy, channel_class=Channel)) as server, \
            greet(server) as client:
        client.send(b'HELO me\r\nMAIL FROM:<a@x>\r\nRCPT TO:<no@x>\r\nDATA\r\n')
        assert [client.reply()[:3] for _ in range(4)] == [b'250', b'250', b'550', b'503']


@pytest.mark.parametrize('step', ['CONNECT', 'MAIL', 'RCPT', 'DATA', '.'])
def test_hung_upstream_holds_up_its_own_session_only(upstream, step, selector):
    """Even if another client, who waits as well, sends the same message."""
    upstream.faults = {step: HANG}
    with proxy_to(upstream, timeout=60) as proxy, greet(proxy, HELLO) as waiting:
        waiting.send(b'MAIL FROM:%s\r\nRCPT TO:%s\r\nDATA\r\n' % (SENDER, RECIPIENT)
                     + stuffed(PROXIED))
        assert upstream.hangs.wait(20)
        with greet(proxy, HELLO) as other:
            assert other.say(b'NOOP') == b'250 OK\r\n'
            upstream.faults = {}
            assert relay_message(other) == b'250 OK\r\n'
        upstream.release()
        assert [waiting.reply()[:1] for _ in range(4)] == [b'2', b'2', b'3', b'2']
    assert len(upstream.messages) == 2


@pytest.mark.parametrize('step', ['CONNECT', 'MAIL', 'RCPT'])
def test_session_closed_by_the_program_lets_a_hung_upstream_go(upstream, capfd, step):
    upstream.faults = {step: HANG}
    with proxy_to(upstream, timeout=0.1) as proxy, greet(proxy, HELLO) as client:
        client.send(b'MAIL FROM:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n' + stuffed(PROXIED))
        assert upstream.hangs.wait(20)
        # serving() closes all channels
    assert proxy._map == {}
    upstream.threads[1].join(20)
    assert not upstream.threads[1].is_alive()
    assert 'Traceback' not in capfd.readouterr().err


def test_session_closed_while_the_name_is_looked_up_leaves_no_connection(upstream, monkeypatch):
    asked, go_on = threading.Event(), threading.Event()
    getaddrinfo = socket.getaddrinfo

    def look_up(*args, **kwargs):
        asked.set()
        assert go_on.wait(20)
        return getaddrinfo(*args, **kwargs)

    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client, \
            greet(proxy, HELLO) as other:
        monkeypatch.setattr(socket, 'getaddrinfo', look_up)
        client.send(b'MAIL FROM:<a@x>\r\n')
        assert asked.wait(20)
        assert other.say(b'NOOP') == b'250 OK\r\n'  # nobody else waits
        channel, = [each for each in channels_of(proxy)
                    if each.peer == client.socket.getsockname()]
        channel.close()
        go_on.set()
        assert client.rest() == b''
        assert codes(steps(other)) == '250 250 354 250'
        upstream.threads[1].join(20)
        assert not upstream.threads[1].is_alive()
        assert len(connections_to(upstream, proxy)) == 1


def test_word_that_comes_at_the_same_time_as_the_client_is_not_the_reply_to_it(upstream, capfd):
    def heard():
        assert turn(until=lambda: select.select([client.socket], [], [], 0)[0])
        return client.reply()[:3]

    with turning(smtpd.PureProxy) as (proxy, turn), RawClient(proxy) as client:
        proxy._remoteaddr = upstream.address
        assert heard() == b'220'
        for line in HELLO + b'\r\n', b'MAIL FROM:<a@x>\r\n':
            client.send(line)
            assert heard() == b'250'
        client.send(b'RCPT TO:<b@x>\r\n')
        upstream.sockets[-1].sendall(b'250 In advance\r\n')
        assert heard() == b'451'
    assert 'talks unasked' in capfd.readouterr().err


def test_upstream_of_which_nothing_is_asked_may_be_silent(upstream, clock):
    proxy_class = variant(smtpd.PureProxy, upstream_command_timeout_seconds=100)
    with proxy_to(upstream, proxy_class) as proxy, greet(proxy, HELLO) as client:
        assert client.say(b'MAIL FROM:<a@x>') == b'250 OK\r\n'
        clock.seconds += 200
        for line in b'NOOP', b'NOOP', b'NOOP', b'RCPT TO:<b@x>':
            assert client.say(line) == b'250 OK\r\n'


def test_rest_of_a_message_does_not_follow_its_refusal(upstream):
    upstream.faults = {'BODY': HANG}
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        start_message(client, LARGE)
        assert upstream.hangs.wait(20)
        upstream.sockets[-1].sendall(b'552 5.3.4 Too big\r\n')
        assert client.reply() == b'552 5.3.4 Too big\r\n'
        upstream.release()
        upstream.threads[1].join(20)
        assert not upstream.threads[1].is_alive()
    assert upstream.messages == []


def test_reply_without_an_end_is_given_up_before_its_time_is(upstream, capfd):
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        upstream.faults = {'RCPT': [ENDLESS]}
        assert codes(steps(client)) == '250 451 503'
    assert 'without an end\n' in capfd.readouterr().err


def test_half_a_line_unasked_is_not_the_beginning_of_the_next_reply(upstream):
    upstream.refused = {'b@x': '550 No'}
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert client.say(b'MAIL FROM:<a@x>') == b'250 OK\r\n'
        upstream.sockets[0].sendall(b'250 ')
        upstream.threads[1].join(20)  # it is left at once
        assert not upstream.threads[1].is_alive()
        assert client.say(b'RCPT TO:<b@x>')[:3] == b'451'


def test_urgent_octet_from_the_upstream_does_not_keep_the_loop_awake(upstream):
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert client.say(b'MAIL FROM:<a@x>') == b'250 OK\r\n'
        upstream.sockets[0].send(b'!', socket.MSG_OOB)
        for _ in range(3):  # turns of the loop
            assert client.say(b'NOOP') == b'250 OK\r\n'
        assert select.select([], [], connections_to(upstream, proxy), 0)[2] == []


# ---------------------------------------------------------------------------------------------
# Circles

@pytest.mark.parametrize('members', [1, 2])
@pytest.mark.parametrize('proxy_class', [smtpd.PureProxy, smtpd.MailmanProxy])
def test_circle_of_proxies_ends_in_a_reply(proxy_class, members):
    proxy_class = impatient(proxy_class, upstream_connection_limit=10, **dict.fromkeys(LIMITS, 60))
    with serving(proxy_class, remoteaddr=('127.0.0.1', 9)) as one, \
            serving(proxy_class, remoteaddr=('127.0.0.1', one.port_number)) as other:
        one._remoteaddr = '127.0.0.1', (one if members == 1 else other).port_number
        for proxy in one, other:
            proxy.mailman_lmtp_address = proxy._remoteaddr
        with greet(one, HELLO) as client:
            heard = steps(client)
            assert set(heard) <= {OK, LATER, NEEDS_MAIL, NEEDS_RCPT}
            assert LATER in heard
            assert client.say(b'RSET') == b'250 OK\r\n'


# ---------------------------------------------------------------------------------------------
# Programs that override commands

class Gateway(smtpd.SMTPChannel):
    """Two commands more, which change the transaction."""

    def smtp_XCOPY(self, arg):
        self.rcpttos.append(arg)
        self.push('250 OK')

    def smtp_XFROM(self, arg):
        self.mailfrom = arg
        self.push('250 OK')


@pytest.mark.parametrize('change, recipients, delivered', [
    (lambda channel: channel.rcpttos.append('archive@x'), (b'<a@x>', b'<no@x>'),
     ['a@x', 'archive@x']),
    (lambda channel: setattr(channel, 'rcpttos', ['yes@x']), (b'<no@x>',), ['yes@x']),
    (lambda channel: channel.rcpttos.__setitem__(-1, 'yes@x'), (b'<no@x>',), ['yes@x']),
], ids=['makes two of one', 'renames', 'renames in place'])
def test_refused_recipient_that_the_program_has_changed(upstream, change, recipients, delivered):
    class Channel(smtpd.SMTPChannel):
        def smtp_RCPT(self, arg):
            super().smtp_RCPT(arg)
            change(self)

    upstream.refused = {'no@x': '550 5.1.1 No such user'}
    with proxy_to(upstream, variant(smtpd.PureProxy, channel_class=Channel)) as proxy, \
            greet(proxy, HELLO) as client:
        heard = steps(client, recipients=recipients)
        assert codes(heard) == '250 ' + '250 ' * (len(recipients) - 1) + '550 354 250'
    assert upstream.messages[0][1] == delivered


def test_transaction_that_the_program_changes_itself_is_the_one_that_counts(upstream):
    proxy_class = variant(smtpd.PureProxy, channel_class=Gateway)
    with proxy_to(upstream, proxy_class) as proxy, greet(proxy, HELLO) as client:
        upstream.refused = {'no@x': '550 5.1.1 No'}
        for change, reply in ((b'XCOPY archive@x', b'250 OK\r\n'),
                              (b'XCOPY no@x', b'550 5.1.1 No (no@x)\r\n'),
                              (b'XFROM c@x', b'250 OK\r\n')):
            for line in b'MAIL FROM:<a@x>', b'RCPT TO:<b@example.com>', change:
                assert client.say(line) == b'250 OK\r\n'
            assert client.say(b'DATA').startswith(b'354 ')
            client.send(stuffed(PROXIED))
            assert client.reply() == reply
    assert [each[:2] for each in upstream.messages] == [
        ('a@x', ['b@example.com', 'archive@x']), ('a@x', ['b@example.com']),
        ('c@x', ['b@example.com'])]


# ---------------------------------------------------------------------------------------------
# Programs that override process_message() or _deliver()

class OverriddenDeliver(smtpd.PureProxy):
    refused = {}
    asked = None

    def _deliver(self, mailfrom, rcpttos, data):
        self.asked = list(rcpttos)
        return self.refused


def test_handlers_of_the_program_get_the_whole_message_in_the_loop(upstream):
    with proxy_to(upstream) as proxy, greet(proxy, HELLO) as client:
        assert relay_message(client) == b'250 OK\r\n'
        proxy.process_message = lambda *args, **kwargs: '250 In thread %d' % threading.get_ident()
        replies = {relay_message(client) for _ in range(2)}
        assert replies != {b'250 OK\r\n'}
        assert len(replies) == 1
        upstream.threads[1].join(20)
        assert upstream.commands[-1] == b'QUIT\r\n'
    with serving(OverriddenDeliver, remoteaddr=upstream.address) as proxy, \
            greet(proxy, HELLO) as client:
        assert steps(client) == [OK, OK, '354 End data with <CR><LF>.<CR><LF>', OK]
    assert upstream.connections == 1


NO, LATE = (550, b'5.1.1 No such user'), (450, '4.2.0 Greylisted')


@pytest.mark.parametrize('refused, reply', [
    ({}, b'250 OK'),
    (None, b'250 OK'),
    ({'c@example.com': NO}, b'550 5.1.1 No such user (c@example.com)'),
    ({'c@example.com': NO, 'd@example.com': LATE}, b'451 4.2.0 Greylisted'),
    ({'d@example.com': LATE}, b'451 4.2.0 Greylisted'),
    ({'d@example.com': (400, b'Wait')}, b'451 Wait'),
    ({'d@example.com': (250, b'What?')}, b'451 Upstream not available'),
    (dict.fromkeys(OTHER_NAMES, (600, b'What?')), b'451 Upstream not available'),
], ids=str)
def test_what_their_deliver_refused_is_never_250(refused, reply):
    with serving(variant(OverriddenDeliver, refused=refused),
                 remoteaddr=('127.0.0.1', 9)) as proxy:
        assert post(proxy, recipients=OTHERS) == reply + b'\r\n'


def test_next_try_of_a_message_goes_to_those_who_did_not_get_it():
    with serving(OverriddenDeliver, remoteaddr=('127.0.0.1', 9)) as proxy:
        proxy.refused = {'d@example.com': LATE}
        assert post(proxy, recipients=OTHERS).startswith(b'451 ')
        assert proxy.asked == ['c@example.com', 'd@example.com']
        assert post(proxy, recipients=OTHERS).startswith(b'451 ')
        assert proxy.asked == ['d@example.com']
        proxy.refused = {}
        assert post(proxy, recipients=OTHERS) == b'250 OK\r\n'
        assert proxy.asked == ['d@example.com']
        # Done: who sends the same message once more means it.
        assert post(proxy, recipients=OTHERS) == b'250 OK\r\n'
        assert proxy.asked == ['c@example.com', 'd@example.com']


def test_only_a_message_that_comes_again_is_remembered():
    """The same to one who gets it and one who is refused, day after day, is another each time."""
    with serving(OverriddenDeliver, remoteaddr=('127.0.0.1', 9)) as proxy:
        for _ in range(2):
            proxy.refused = {'d@example.com': NO}
            assert post(proxy, recipients=OTHERS).startswith(b'550 ')
            assert proxy.asked == ['c@example.com', 'd@example.com']
        proxy.refused = {'d@example.com': LATE}
        assert post(proxy, recipients=OTHERS).startswith(b'451 ')
        proxy.refused = {}
        for asked in None, ['c@example.com']:  # alone, as by a client that splits a message
            proxy.asked = None
            assert post(proxy, recipients=OTHERS[:1]) == b'250 OK\r\n'
            assert proxy.asked == asked


def test_what_is_remembered_ends_in_time(clock):
    with serving(OverriddenDeliver, remoteaddr=('127.0.0.1', 9)) as proxy:
        proxy.refused = {'d@example.com': LATE}
        for days, recipients, asked in ((0, OTHERS, 2), (4.9, OTHERS, 1), (5.1, OTHERS[1:], 1),
                                        (1, OTHERS, 2), (6, OTHERS, 2)):
            clock.seconds += days * 86400
            assert post(proxy, recipients=recipients)[:2] == b'45'
            assert len(proxy.asked) == asked


def test_reply_names_those_refused_for_good_unless_all_were_alike():
    with serving(OverriddenDeliver, remoteaddr=('127.0.0.1', 9)) as proxy:
        proxy.refused = {'c@example.com': NO, 'd@example.com': (554, 'Not\nyou' + 1000 * '!')}
        for recipients in OTHERS, (*OTHERS, b'<e@example.com>'):
            assert post(proxy, recipients=recipients) == (
                b'554-5.1.1 No such user (c@example.com)\r\n554 Not you%s (d@example.com)\r\n'
                % (173 * b'!'))
        del proxy.refused['c@example.com']
        assert post(proxy, recipients=OTHERS[1:]) == b'554-Not\r\n554 you' + 503 * b'!' + b'\r\n'


def test_local_parts_that_differ_in_case_are_two_recipients(upstream):
    """RFC 5321, 2.4."""
    message = b'A: b\n\nc'
    upstream.refused['Smith@x'] = '451 later'
    with idle_proxy(remoteaddr=upstream.address) as proxy:
        assert proxy.process_message(PEER, 'a@x', ['smith@x', 'Smith@x'], message)[:3] == '451'
        upstream.refused.clear()
        assert proxy.process_message(PEER, 'a@x', ['smith@x', 'Smith@x'], message) is None
    assert [recipients for _, recipients, _ in upstream.messages] == [['smith@x'], ['Smith@x']]


def test_what_is_remembered_is_bounded():
    with idle_proxy(OverriddenDeliver) as proxy:
        proxy.refused = {'d@example.com': LATE}

        def asked(number):
            proxy.process_message(PEER, 'a@x', [*OTHER_NAMES], b'N: %d\n\n' % number)
            return len(proxy.asked)

        assert {asked(number) for number in range(20000)} == {2}
        assert (asked(19999), asked(0)) == (1, 2)


# ---------------------------------------------------------------------------------------------
# _deliver() and process_message(), called by hand

@pytest.mark.parametrize('step, fault, code', [
    ('CONNECT', CLOSE, 451), ('DATA', CLOSE, 451), ('DATA', HANG, 451),
    ('.', '554 5.7.1 Not this one', 554)])
def test_deliver_names_every_recipient_when_it_fails(upstream, step, fault, code):
    upstream.faults[step] = fault
    upstream.refused = {'bad@example.com': '550 5.1.1 No such user'}
    with idle_proxy(remoteaddr=upstream.address) as proxy:
        proxy.upstream_data_timeout_seconds = 0.2 if fault == HANG else 20
        refused = proxy._deliver('a@x', ['b@example.com', 'bad@example.com'], b'A: b\n\ntext')
    assert list(refused) == ['b@example.com', 'bad@example.com']
    assert [each[0] for each in refused.values()] == [code, 451 if step == 'CONNECT' else 550]


def test_process_message_can_be_called_by_hand_without_options(upstream):
    with idle_proxy(remoteaddr=upstream.address) as proxy:
        assert proxy.process_message(PEER, 'a@example.com', ['b@example.com'], 'A: b\n\ntext') \
            in (None, '250 OK')
        assert proxy.process_message(PEER, '<>', ['b@example.com'], b'A: b\n\ntext',
                                     mail_options=[], rcpt_options=[]) in (None, '250 OK')
        upstream.refused = {'b@example.com': '550 5.1.1 No such user'}
        reply = proxy.process_message(PEER, 'a@example.com', ['b@example.com'], b'A: b\n\ntext')
        assert reply == '550 5.1.1 No such user'
        for line_end in '\r', '\n':
            with pytest.raises(ValueError, match='line end'):
                proxy._deliver('a@x', ['b@x>%sRCPT TO:<c@x' % line_end], b'')
    assert [content for _, _, content in upstream.messages] \
        == [b'A: b\r\nX-Peer: 127.0.0.1\r\n\r\ntext\r\n'] * 2


@both_modes
def test_subclass_that_calls_deliver_goes_on_working(upstream, decode_data):
    class Tagging(smtpd.PureProxy):
        def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
            tag = 'X-Tag: 1\r\n' if isinstance(data, str) else b'X-Tag: 1\r\n'
            refused = self._deliver(mailfrom, rcpttos, tag + data)
            return '550 %s' % sorted(refused) if refused else None

    upstream.refused = {'bad@example.com': '550 5.1.1 No such user'}
    with proxy_to(upstream, Tagging, decode_data=decode_data) as proxy:
        assert post(proxy) == b'250 OK\r\n'
        assert post(proxy, recipients=(b'<bad@example.com>',)) == b"550 ['bad@example.com']\r\n"
    assert upstream.messages == [
        ('sender@example.com', ['rcpt@example.com'], b'X-Tag: 1\r\n' + PROXIED)]


@both_modes
def test_overridden_deliver_gets_text_where_the_server_decodes_as_it_always_did(decode_data):
    class Keeping(smtpd.PureProxy):
        def _deliver(self, mailfrom, rcpttos, data):
            self.kept = data
            return {}

    with serving(Keeping, remoteaddr=('127.0.0.1', 9), decode_data=decode_data) as proxy:
        assert post(proxy, b'Subject: \xff\r\n\r\nText.\r\n') == b'250 OK\r\n'
        text = in_mode(b'Subject: \xff\nX-Peer: 127.0.0.1\n\nText.', decode_data)
        assert proxy.kept.rstrip() == text


@pytest.mark.parametrize('proxy_class', [smtpd.PureProxy, smtpd.MailmanProxy],
                         ids=lambda proxy_class: proxy_class.__name__)
def test_proxies_refuse_smtputf8_as_documented(proxy_class):
    sockets = {}
    with pytest.raises(ValueError, match=r'Proxy does not support SMTPUTF8\.$'):
        proxy_class(('127.0.0.1', 0), ('127.0.0.1', 9), enable_SMTPUTF8=True, map=sockets)
    assert sockets == {}


# ---------------------------------------------------------------------------------------------
# MailmanProxy

LISTS = (b'<a@lists.example>', b'<b@lists.example>')


@pytest.fixture
def mailman():
    with Upstream(known='@lists.example$') as mailman:
        mailman.faults = {'EHLO': '500 This is LMTP'}
        yield mailman


@both_modes
@pytest.mark.parametrize('recipients', [
    LISTS, OTHERS, LISTS + OTHERS, OTHERS[:1], LISTS[:1],
    (LISTS[0], *OTHERS[1:], LISTS[0], b'<A@LISTS.example>', b'<C@example.com>')], ids=len)
def test_lists_go_to_mailman_once_each_the_others_upstream(
        upstream, mailman, decode_data, recipients):
    message = b'Subject: post \xe9\r\n\r\n.dots\r\n\r\n'
    lists = [each.strip(b'<>').decode() for each in recipients if b'@lists' in each]
    others = [each.strip(b'<>').decode() for each in recipients if b'@example' in each]
    with mailman_proxy_to(upstream, mailman, decode_data=decode_data) as proxy:
        assert post(proxy, message, recipients=recipients) == b'250 OK\r\n'
        assert post(proxy, message, recipients=recipients) == b'250 OK\r\n'  # and once more
    expected = with_x_peer(message)
    assert upstream.messages == 2 * ([('sender@example.com', others, expected)] if others else [])
    assert mailman.messages == 2 * [('sender@example.com', [each], expected)
                                    for each in dict.fromkeys(lists) if each.islower()]


def test_mail_for_lists_alone_needs_no_upstream(upstream, mailman, capfd):
    upstream.stop()
    with mailman_proxy_to(upstream, mailman) as proxy:
        assert post(proxy, recipients=LISTS, sender=b'<>') == b'250 OK\r\n'
        with greet(proxy, HELLO) as client:
            heard = steps(client, recipients=(*LISTS, *OTHERS))
            assert heard == [OK, OK, OK, LATER, LATER, '354 End data with <CR><LF>.<CR><LF>', OK]
            for line in b'MAIL FROM:<a@x>', b'RCPT TO:' + LISTS[0], b'RSET':
                assert client.say(line) == b'250 OK\r\n'
            assert mailman.commands[-1] == b'RSET\r\n'
        mailman.threads[-1].join(20)
        assert mailman.commands[-1] == b'QUIT\r\n'
    upstream.start()
    assert len(mailman.messages) == 4
    assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.parametrize('step, faults', [
    ('CONNECT', ['554 No']), ('LHLO', ['554 No']),
    ('MAIL', ['354 Go on', '451 Later']), ('RCPT', ['354 Go on', '451 Later'])])
def test_while_mailman_cannot_say_nobody_knows_which_are_lists(upstream, mailman, step, faults):
    with mailman_proxy_to(upstream, mailman, impatient(smtpd.MailmanProxy)) as proxy:
        for fault in [CLOSE, HANG, 'What?', '421 Busy', *faults]:
            mailman.faults = {step: fault}
            with greet(proxy, HELLO) as client:
                assert codes(steps(client, recipients=OTHERS + LISTS)) == '250 451 451 451 451 503'
                assert upstream.messages == mailman.messages == []
                mailman.faults = {}
                mailman.released.set()
                assert client.say(b'RSET') == b'250 OK\r\n'
                heard = steps(client, recipients=OTHERS + LISTS)
                assert codes(heard) == '250 250 250 250 250 354 250'
            assert (len(upstream.messages), len(mailman.messages)) == (1, 2)
            mailman.released.clear()
            del upstream.messages[:], mailman.messages[:]
        mailman.stop()
        with greet(proxy, HELLO) as client:
            assert codes(steps(client, recipients=OTHERS + LISTS)) == '250 451 451 451 451 503'
        mailman.start()


@pytest.mark.parametrize('mailman_has, upstream_has, heard, delivered', [
    # What Mailman refuses for good, be it the sender, is the upstream's to judge.
    ({'faults': {'MAIL': '553 5.1.7 UTF-8?'}}, {'refused': {'a@lists.example': '550 Unknown'}},
     '250 550 250 250 250 354 250', ['b@lists.example', *OTHER_NAMES]),
    ({'refused': {'b@lists.example': '450 4.2.1 Busy', 'd@example.com': '500 No list'}}, {},
     '250 250 450 250 250 354 250', ['a@lists.example', *OTHER_NAMES]),
    ({}, {'faults': {'MAIL': '553 5.1.8 Not from you'}},
     '250 250 250 553 553 354 250', ['a@lists.example', 'b@lists.example']),
], ids=['sender refused by Mailman', 'list that is busy', 'sender refused by the upstream'])
def test_each_recipient_is_told_what_the_server_in_charge_says(
        upstream, mailman, mailman_has, upstream_has, heard, delivered):
    vars(mailman).update(mailman_has)
    vars(upstream).update(upstream_has)
    with mailman_proxy_to(upstream, mailman) as proxy, greet(proxy, HELLO) as client:
        assert codes(steps(client, recipients=LISTS + OTHERS)) == heard
    assert len(upstream.verbs(b'MAIL')) == 1
    assert sum((each[1] for each in mailman.messages + upstream.messages), []) == delivered


@pytest.mark.parametrize('step, fault, reply', [
    ('DATA', '452 4.3.1 Full', '452 4.3.1 Full'), ('.', '554 5.7.1 Spam', '554 5.7.1 Spam'),
    ('.', CLOSE, LATER)])
def test_message_that_the_upstream_does_not_take_is_not_posted(
        upstream, mailman, step, fault, reply):
    upstream.faults = {step: fault}
    with mailman_proxy_to(upstream, mailman) as proxy:
        with greet(proxy, HELLO) as client:
            assert steps(client, recipients=LISTS + OTHERS)[-1] == reply
        assert upstream.messages == mailman.messages == []
        upstream.faults = {}
        assert post(proxy, recipients=LISTS + OTHERS) == b'250 OK\r\n'
    assert (len(upstream.messages), len(mailman.messages)) == (1, 2)


@pytest.mark.parametrize('step', ['DATA', '.'])
@pytest.mark.parametrize('fault', ['451 4.3.0 Not now', CLOSE, HANG, ENDLESS, 'What?'])
def test_post_that_mailman_does_not_take_is_451_and_the_next_try_goes_there_only(
        upstream, mailman, step, fault):
    mailman.faults = {step: fault}
    with mailman_proxy_to(upstream, mailman, impatient(smtpd.MailmanProxy)) as proxy:
        assert post(proxy, recipients=LISTS + OTHERS).startswith(b'451 ')
        assert post(proxy, recipients=LISTS + OTHERS).startswith(b'451 ')
        assert mailman.messages == []
        assert [len(recipients) for _, recipients, _ in upstream.messages] == [2]
        mailman.faults = {}
        assert post(proxy, recipients=LISTS + OTHERS) == b'250 OK\r\n'
    assert [len(recipients) for _, recipients, _ in upstream.messages] == [2]
    assert sorted(each[1] for each in mailman.messages) == [
        ['a@lists.example'], ['b@lists.example']]


@pytest.mark.parametrize('step', ['DATA', '.'])
def test_lists_that_refuse_a_post_for_good_are_named(upstream, mailman, step):
    """The others have it: who gets the bounce must be able to tell."""
    with mailman_proxy_to(upstream, mailman) as proxy:
        mailman.faults = {step: ['554 5.6.0 Not this one']}
        assert post(proxy, recipients=LISTS + OTHERS) \
            == b'554 5.6.0 Not this one (a@lists.example)\r\n'
        mailman.faults = {step: '554-5.6.0 Not\r\n554 this one'}
        assert post(proxy, recipients=LISTS + OTHERS) == (
            b'554-5.6.0 Not this one (a@lists.example)\r\n'
            b'554 5.6.0 Not this one (b@lists.example)\r\n')
        mailman.faults = {step: ['554 5.6.0 Not this one', '451 4.3.0 Not now']}
        assert post(proxy, recipients=LISTS + OTHERS) == b'451 4.3.0 Not now\r\n'
    assert [each[1] for each in mailman.messages] == [['b@lists.example']]


def test_list_that_took_the_post_does_not_get_it_again_when_another_did_not(upstream, mailman):
    mailman.faults = {'.': [None, '451 4.3.0 Not now', '400 Nor now']}
    with mailman_proxy_to(upstream, mailman) as proxy:
        assert post(proxy, recipients=LISTS) == b'451 4.3.0 Not now\r\n'
        assert post(proxy, recipients=LISTS) == b'451 Nor now\r\n'
        assert post(proxy, recipients=LISTS) == b'250 OK\r\n'
    assert [each[1] for each in mailman.messages] == [['a@lists.example'], ['b@lists.example']]


def test_deliver_of_the_mailman_proxy_called_by_hand(upstream, mailman):
    upstream.refused = {'d@example.com': '550 5.1.1 No such user'}
    with idle_proxy(smtpd.MailmanProxy, remoteaddr=upstream.address) as proxy:
        proxy.mailman_lmtp_address = mailman.address
        refused = proxy._deliver('a@x', ['a@lists.example', *OTHER_NAMES], b'A: b\n\ntext')
        assert refused == {'d@example.com': (550, b'5.1.1 No such user')}
        for each in upstream, mailman:
            each.threads[1].join(20)
            assert each.commands[-1] == b'QUIT\r\n'
    assert [each[1] for each in upstream.messages + mailman.messages] == [
        ['c@example.com'], ['a@lists.example']]


# ---------------------------------------------------------------------------------------------
# The loop, and what is closed meanwhile

def test_loop_ends_when_the_server_and_the_last_channel_are_closed(upstream, selector):
    """Also with a message under way at the time: it is delivered and answered first."""
    sockets = {}
    proxy_class = smtpd.PureProxy
    proxy = proxy_class(('127.0.0.1', 0), upstream.address, map=sockets)
    loop = threading.Thread(target=asyncore.loop, kwargs={'map': sockets, 'timeout': 60})
    loop.start()
    upstream.faults['.'] = [HANG]
    with greet(proxy, HELLO) as client, greet(proxy, HELLO) as other:
        start_message(client)
        assert upstream.hangs.wait(20)
        proxy.close()
        assert other.say(b'NOOP') == b'250 OK\r\n'  # the loop has seen it
        assert relay_message(other) == b'250 OK\r\n'
        assert other.say(b'QUIT') == b'221 Bye\r\n'
        upstream.release()
        assert client.reply() == b'250 OK\r\n'
        assert client.say(b'QUIT') == b'221 Bye\r\n'
    loop.join(20)
    assert not loop.is_alive()
    assert sockets == {}
