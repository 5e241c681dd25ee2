"""Tests of smtpd.py: what a user of the module would notice.

In layers: a channel that is fed bytes, without a socket; a real socket and raw
bytes; smtplib as the independent client; `python -m smtpd` as a process; the
proxies before upstreams that misbehave on purpose.

They need nothing but Python and the packages that tests/support.py imports.
The judges from outside are in tests/.
"""
import asynchat
import asyncore
import contextlib
import dataclasses
import errno
import functools
import inspect
import io
import itertools
import os
import re
import select
import signal
import smtplib
import socket
import subprocess
import sys
import textwrap
import threading
import types
import unittest.mock

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.support import (
    ANSWERED,
    ANSWERED_TO_DATA,
    BANNER,
    FQDN,
    FROM_AND_TO,
    MODULE_DIR,
    ONE_MESSAGE,
    PEER,
    PROXIED,
    READY,
    SMTPD,
    STRICT,
    TIMED_OUT,
    TO_DATA,
    TRANSACTION,
    TRANSACTION_ANSWERED,
    FakeConnection,
    HookedChannel,
    RawClient,
    RecordingServer,
    StubServer,
    WaitingServer,
    both_modes,
    channel_with,
    channels_of,
    command_line,
    count_lines,
    environment,
    failing_listener,
    feed,
    greet,
    has_input,
    in_map_and_selector,
    in_mode,
    in_pieces,
    is_served,
    line_by_line,
    looping,
    make_channel,
    octets,
    read_replies,
    read_until,
    reset,
    running_server,
    server_lines,
    serving,
    shut,
    small_buffers,
    smtpd,
    three_ways,
    traced_memory,
    turning,
    variant,
    with_x_peer,
    without_init,
)

pytest_plugins = ['tests.support']  # its fixtures

# ---------------------------------------------------------------------------
# The module

def test_the_module_under_test_is_ours():
    """On Python up to 3.11 it is easily the standard library's."""
    assert os.path.samefile(os.path.dirname(smtpd.__file__), MODULE_DIR)


SERVER_SIGNATURE = ('(localaddr, remoteaddr, data_size_limit=33554432, map=None, '
                    'enable_SMTPUTF8=False, decode_data=False)')
CHANNEL_SIGNATURE = ('(server, conn, addr, data_size_limit=33554432, map=None, '
                     'enable_SMTPUTF8=False, decode_data=False)')


class TestModule:
    def test_all_is_what_the_documentation_names(self):
        assert sorted(smtpd.__all__) == [
            'DebuggingServer', 'MailmanProxy', 'PureProxy', 'SMTPChannel', 'SMTPServer']

    def test_every_other_public_name_is_one_that_programs_know(self):
        known = {'NEWLINE', 'COMMASPACE', 'EMPTYSTRING', 'DATA_SIZE_DEFAULT', 'DEBUGSTREAM',
                 'Devnull', 'Options', 'parseargs', 'program', 'usage'}
        public = {name for name, value in vars(smtpd).items()
                  if not name.startswith('_') and not inspect.ismodule(value)}
        assert public - set(smtpd.__all__) <= known

    @pytest.mark.parametrize('name, value', [
        ('__version__', 'Python SMTP proxy version 0.3'),
        ('NEWLINE', '\n'),
        ('COMMASPACE', ', '),
        ('EMPTYSTRING', ''),  # went missing in Python 3 and kept programs from importing
        ('DATA_SIZE_DEFAULT', 2 ** 25),
        ('asyncore', asyncore),  # there is one, with its one socket_map
        ('asynchat', asynchat),
        ('socket', socket),
    ])
    def test_names_that_programs_import(self, name, value):
        assert getattr(smtpd, name) == value

    def test_a_name_that_is_not_there_is_an_attribute_error(self):
        assert not hasattr(smtpd, 'NO_SUCH_NAME')

    def test_devnull_takes_text_and_keeps_quiet(self, capsys):
        print('text', file=smtpd.Devnull(), flush=True)
        assert capsys.readouterr() == ('', '')

    @pytest.mark.parametrize('found, documented', [
        (smtpd.SMTPServer, SERVER_SIGNATURE),
        (smtpd.SMTPChannel, CHANNEL_SIGNATURE),
        (smtpd.SMTPServer.process_message,
         '(self, peer, mailfrom, rcpttos, data, **kwargs)'),
    ], ids=['SMTPServer', 'SMTPChannel', 'process_message'])
    def test_signatures_are_the_documented_ones(self, found, documented):
        assert str(inspect.signature(found)) == documented

    @pytest.mark.parametrize('proxy', ['DebuggingServer', 'PureProxy', 'MailmanProxy'])
    def test_the_other_servers_take_the_same_arguments(self, proxy):
        signature = inspect.signature(getattr(smtpd, proxy))
        signature.bind(('localhost', 0), ('localhost', 25), 1000, {}, False, True)
        signature.bind(('localhost', 0), ('localhost', 25), data_size_limit=0, map=None,
                       enable_SMTPUTF8=False, decode_data=False)

    @pytest.mark.parametrize('owner, name, value', [
        ('SMTPServer', 'process_message_threads', 0),
        ('SMTPServer', 'channels_in_selector', False),
        ('SMTPServer', 'listen_backlog', 1024),
        ('SMTPServer', 'accepts_per_event', 100),
        ('PureProxy', 'upstream_timeout_seconds', 60),
        ('PureProxy', 'upstream_command_timeout_seconds', 300),
        ('PureProxy', 'upstream_data_timeout_seconds', 120),
        ('PureProxy', 'upstream_block_timeout_seconds', 180),
        ('PureProxy', 'upstream_final_timeout_seconds', 600),
        ('PureProxy', 'upstream_connection_limit', 200),
        ('MailmanProxy', 'mailman_lmtp_address', ('localhost', 8024)),
        ('SMTPChannel', 'COMMAND', 0), ('SMTPChannel', 'DATA', 1),
        ('SMTPChannel', 'command_size_limit', 512),
        ('SMTPChannel', 'idle_timeout_seconds', 300),
        ('SMTPChannel', 'recipient_limit', 1000),
        ('SMTPChannel', 'error_limit', 100),
        ('SMTPChannel', 'unsent_reply_limit', 65536),
    ])
    def test_class_attributes_have_their_documented_defaults(self, owner, name, value):
        found = getattr(getattr(smtpd, owner), name)
        assert found == value and type(found) is type(value)

    def test_the_classes_are_what_they_were(self):
        assert issubclass(smtpd.SMTPServer, asyncore.dispatcher)
        assert issubclass(smtpd.SMTPChannel, asynchat.async_chat)
        assert smtpd.SMTPServer.channel_class is smtpd.SMTPChannel
        for name in ('DebuggingServer', 'PureProxy'):
            assert issubclass(getattr(smtpd, name), smtpd.SMTPServer)
        assert issubclass(smtpd.MailmanProxy, smtpd.PureProxy)

    def test_decode_data_and_smtputf8_exclude_each_other(self):
        with pytest.raises(ValueError):
            smtpd.SMTPServer(('127.0.0.1', 0), None, map={},
                             enable_SMTPUTF8=True, decode_data=True)
        with pytest.raises(ValueError, match='cannot be set to True at the same time$'):
            make_channel(enable_SMTPUTF8=True, decode_data=True)

    @pytest.mark.parametrize('name', '''
        start run stop host port name daemon data logger messages queue session active auth user
        password username timeout debugging path ident join is_alive
        _started _name _lock _data _handler _server'''.split())
    def test_names_that_subclasses_use_are_left_to_them(self, name):
        server = smtpd.SMTPServer(('127.0.0.1', 0), None, map={})
        with contextlib.closing(server):
            assert not hasattr(server, name)
        assert not hasattr(make_channel(), name)


# ---------------------------------------------------------------------------
# A channel fed bytes, without a socket: dialogues

def client_lines(transcript):
    return [octets(line[3:]) + b'\r\n' for line in transcript if line.startswith('C: ')]


def hold(channel, transcript, way):
    """Hold the dialogue and compare."""
    if way is line_by_line:  # here each reply has its place
        held = []
        for line in client_lines(transcript):
            held.append('C: ' + line[:-2].decode('utf-8', 'surrogateescape'))
            held += server_lines(feed(channel, line))
        assert held == list(transcript)
    else:
        assert way(channel, client_lines(transcript)) == [
            line for line in transcript if line.startswith('S: ')]


HELO = ('C: HELO client.example', 'S: 250 mx.example')
EHLO = ('C: EHLO client.example', 'S: 250-mx.example', 'S: 250-SIZE 33554432',
        'S: 250-8BITMIME', 'S: 250 HELP')
MAIL = ('C: MAIL FROM:<sender@example>', 'S: 250 OK')
RCPT = ('C: RCPT TO:<one@example>', 'S: 250 OK')
DATA = ('C: DATA', 'S: 354 End data with <CR><LF>.<CR><LF>')
MESSAGE = MAIL + RCPT + DATA + ('C: Subject: x', 'C: ', 'C: text', 'C: .', 'S: 250 OK')
UNKNOWN = ('C: FOO', 'S: 500 Error: command "FOO" not recognized')

COMMANDS = 'EHLO HELO MAIL RCPT DATA RSET NOOP QUIT VRFY'
PARAMETERS = ' [SP <mail-parameters>]'
MAIL_SYNTAX = '501 Syntax: MAIL FROM: <address>'
RCPT_SYNTAX = '501 Syntax: RCPT TO: <address>'
MAIL_UNKNOWN = '555 MAIL FROM parameters not recognized or not implemented'
RCPT_UNKNOWN = '555 RCPT TO parameters not recognized or not implemented'
BODY_SYNTAX = '501 Error: BODY can only be one of 7BIT, 8BITMIME'

# What was said before, commands, and what each of them is answered then.
ANSWERS = [
    ((), ['HELO client.example', 'hElO client.example', 'HELO  client '], '250 mx.example'),
    ((), ['HELO'], '501 Syntax: HELO hostname'),
    (HELO, ['HELO'], '501 Syntax: HELO hostname'),
    ((), ['EHLO'], '501 Syntax: EHLO hostname'),
    (HELO, ['HELO again', 'EHLO again'], '503 Duplicate HELO/EHLO'),
    (EHLO, ['HELO again', 'EHLO again'], '503 Duplicate HELO/EHLO'),
    ((), ['NOOP', 'NOOP ', 'RSET'], '250 OK'),
    ((), ['NOOP hi'], '501 Syntax: NOOP'),
    ((), ['RSET hi'], '501 Syntax: RSET'),
    ((), ['QUIT', 'QUIT now'], '221 Bye'),
    ((), ['VRFY one@example', 'VRFY <one@example>', 'VRFY one', 'VRFY Jane Doe', 'VRFY <a@b> x'],
     '252 Cannot VRFY user, but will accept message and attempt delivery'),
    ((), ['VRFY'], '501 Syntax: VRFY <address>'),
    ((), ['EXPN', 'EXPN list'], '502 EXPN not implemented'),
    ((), ['HELP'], '250 Supported commands: ' + COMMANDS),
    ((), ['HELP me', 'HELP MAIL RCPT'], '501 Supported commands: ' + COMMANDS),
    *(((), ['HELP ' + syntax.split()[0], 'help ' + syntax.split()[0].lower()],
       '250 Syntax: ' + syntax)
      for syntax in ['HELO hostname', 'EHLO hostname', 'MAIL FROM: <address>',
                     'RCPT TO: <address>', 'DATA', 'RSET', 'NOOP', 'QUIT', 'VRFY <address>']),
    (EHLO, ['HELP MAIL'], '250' + MAIL_SYNTAX[3:] + PARAMETERS),
    (EHLO, ['HELP RCPT'], '250' + RCPT_SYNTAX[3:] + PARAMETERS),

    ((), ['MAIL FROM:<a@b>', 'RCPT TO:<a@b>', 'DATA'], '503 Error: send HELO first'),
    (EHLO + MAIL, ['MAIL FROM:<a@b>'], '503 Error: nested MAIL command'),
    (EHLO, ['mail from:<a@b>', 'MAIL FROM:  <a@b>', 'MAIL FROM:<>', 'MAIL FROM:<> SIZE=9',
            'MAIL FROM:<a@b> size=9', 'MAIL FROM:<a@b> SIZE=33554432'], '250 OK'),
    (EHLO, ['MAIL FROM:<a@b> SIZE=33554433'],
     '552 Error: message size exceeds fixed maximum message size'),
    (EHLO, ['MAIL FROM:<a@b> X=Y', 'MAIL FROM:<a@b> SMTPUTF8'], MAIL_UNKNOWN),
    (HELO, ['MAIL', 'MAIL FROM:<a@b> SIZE=9'], MAIL_SYNTAX),
    (EHLO, ['MAIL', 'MAIL <a@b>', 'MAIL FROM <a@b>', 'MAIL FROM:', 'MAIL FROM: ', 'MAIL TO:<a@b>',
            *('MAIL FROM:<a@b> ' + parameter for parameter in [
                'SIZE', 'SIZE=', 'SIZE=-1', 'SIZE=+1', 'SIZE=x', 'SIZE=\xb2', 'SIZE=1_0',
                'SIZE=\u0661', '=', '=x', 'X=', 'X= SIZE=1'])], MAIL_SYNTAX + PARAMETERS),

    (EHLO, ['RCPT TO:<a@b>'], '503 Error: need MAIL command'),
    (EHLO + MAIL, ['rcpt to:<a@b>'], '250 OK'),
    (EHLO + MAIL, ['RCPT TO:<a@b> NOTIFY=NEVER'], RCPT_UNKNOWN),
    (HELO + MAIL, ['RCPT', 'RCPT TO:<a@b> X=Y'], RCPT_SYNTAX),
    (EHLO + MAIL, ['RCPT', 'RCPT <a@b>', 'RCPT TO:', 'RCPT FROM:<a@b>'],
     RCPT_SYNTAX + PARAMETERS),
    (EHLO, ['DATA'], '503 Error: need RCPT command'),
    (EHLO + MAIL, ['DATA'], '503 Error: need RCPT command'),
    (EHLO + MAIL + RCPT, ['DATA now'], '501 Syntax: DATA'),

    ((), ['foo x y'], UNKNOWN[1][3:]),
    ((), [' ', ' NOOP'], '500 Error: command "" not recognized'),
    ((), ['set_terminator'], '500 Error: command "SET_TERMINATOR" not recognized'),
    ((), ['MAILFROM:<a@b>'], '500 Error: command "MAILFROM:<A@B>" not recognized'),
    ((), ['\xdcBER'], '500 Error: command "?BER" not recognized'),
    ((), ['QU\u0131T'], '500 Error: command "QU?T" not recognized'),  # the dotless i
    (EHLO, ['', '\udcff', 'MAIL FROM:<\udce9@b>', '\x00\udcff\udcfe',
            *('NO%sOP' % control for control in '\x00\x01\n\x0b\r\x1b\x7f')],
     '500 Error: bad syntax'),
]
# With decode_data there is no 8BITMIME to offer, and so no BODY to take.
BODY_ANSWERS = [
    (EHLO, ['MAIL FROM:<a@b> ' + parameters for parameters in [
        'BODY=7BIT', 'body=8bitmime', 'SIZE=1 BODY=7BIT']], '250 OK'),
    (EHLO, ['MAIL FROM:<a@b> BODY=BINARYMIME', 'MAIL FROM:<a@b> BODY'], BODY_SYNTAX),
]
UTF8_EHLO = EHLO[:-1] + ('S: 250-SMTPUTF8', 'S: 250 HELP')
SMTPUTF8_ANSWERS = [
    (UTF8_EHLO, ['MAIL FROM:<\xe4@\xf6> SMTPUTF8', 'MAIL FROM:<a@b> BODY=8BITMIME SMTPUTF8',
                 'MAIL FROM:<a@b> SIZE=5'], '250 OK'),
    (UTF8_EHLO, ['MAIL FROM:<a@b> SMTPUTF8=1'], '501 Error: SMTPUTF8 takes no arguments'),
]
LONGER = {
    'RSET forgets the transaction': EHLO + MAIL + RCPT + (
        'C: RSET', 'S: 250 OK', 'C: DATA', 'S: 503 Error: need RCPT command',
        'C: RCPT TO:<x@example>', 'S: 503 Error: need MAIL command') + MAIL,
    'RSET keeps the greeting': EHLO + (
        'C: RSET', 'S: 250 OK', 'C: EHLO again', 'S: 503 Duplicate HELO/EHLO'),
    'EHLO after a refused EHLO': ('C: EHLO', 'S: 501 Syntax: EHLO hostname') + EHLO,
    'RCPT after a refused MAIL': EHLO + (
        'C: MAIL FROM:', 'S: ' + MAIL_SYNTAX + PARAMETERS,
        'C: RCPT TO:<a@b>', 'S: 503 Error: need MAIL command'),
    'RCPT for many': EHLO + MAIL + RCPT * 5,
    'a message after HELO': HELO + MESSAGE,
    'two messages and good-bye': EHLO + MESSAGE * 2 + ('C: QUIT', 'S: 221 Bye'),
    'an empty message': EHLO + MAIL + RCPT + DATA + ('C: .', 'S: 250 OK', 'C: NOOP', 'S: 250 OK'),
    'commands inside of data are data':
        EHLO + MAIL + RCPT + DATA + ('C: QUIT', 'C: RSET', 'C: .', 'S: 250 OK'),
    'a session goes on after nonsense': ('C: \x00\udcff', 'S: 500 Error: bad syntax') + EHLO,
}


def dialogues(answers, longer=()):
    return pytest.mark.parametrize('transcript', [
        *(pytest.param((*before, 'C: ' + command, 'S: ' + reply),
                       id=' '.join([*(line[3:7] for line in before if line[0] == 'C'),
                                    ascii(command)]))
          for before, commands, reply in answers for command in commands),
        *(pytest.param(longer[sentence], id=sentence) for sentence in longer)])


class TestDialogues:
    @three_ways
    @both_modes
    @dialogues(ANSWERS, LONGER)
    def test_dialogue(self, transcript, decode_data, way):
        if decode_data:
            transcript = [line for line in transcript if line != 'S: 250-8BITMIME']
        hold(make_channel(decode_data=decode_data), transcript, way)

    @three_ways
    @dialogues(BODY_ANSWERS)
    def test_body_parameter(self, transcript, way):
        hold(make_channel(), transcript, way)

    @dialogues(BODY_ANSWERS)
    def test_body_parameter_is_unknown_with_decode_data(self, transcript):
        channel = make_channel(decode_data=True)
        feed(channel, b'EHLO client\r\n')
        hold(channel, (transcript[-2], 'S: ' + MAIL_UNKNOWN), line_by_line)

    @three_ways
    @dialogues(SMTPUTF8_ANSWERS)
    def test_smtputf8(self, transcript, way):
        hold(make_channel(enable_SMTPUTF8=True), transcript, way)

    @pytest.mark.parametrize('limit', [None, 0])
    def test_without_a_limit_no_size_is_told_and_any_is_taken(self, limit):
        hold(make_channel(data_size_limit=limit), (
            EHLO[0], EHLO[1], *EHLO[3:],
            'C: MAIL FROM:<a@b> SIZE=99999999999999', 'S: 250 OK'), line_by_line)

    def test_another_limit_is_told_and_holds(self):
        hold(make_channel(data_size_limit=1000), (
            EHLO[0], EHLO[1], 'S: 250-SIZE 1000', *EHLO[3:],
            'C: MAIL FROM:<a@b> SIZE=1001',
            'S: 552 Error: message size exceeds fixed maximum message size',
            'C: MAIL FROM:<a@b> SIZE=1000', 'S: 250 OK'), line_by_line)

    @three_ways
    @both_modes
    def test_a_message_reaches_the_handler_with_its_envelope(self, way, decode_data):
        channel = make_channel(decode_data=decode_data)
        way(channel, client_lines((
            'C: EHLO client.example', 'C: MAIL FROM:<sender@example> size=20',
            'C: RCPT TO:<one@example>', 'C: RCPT TO:<two@example>', 'C: DATA', 'C: Subject: x',
            'C: ', 'C: text', 'C: .')))
        data = b'Subject: x\n\ntext'
        keywords = {'mail_options': ['SIZE=20'], 'rcpt_options': []}
        assert channel.smtp_server.messages == [(
            PEER, 'sender@example', ['one@example', 'two@example'],
            data.decode() if decode_data else data, {} if decode_data else keywords)]

    def test_instance_variables_are_the_documented_ones(self):
        channel = make_channel()
        assert channel.smtp_server.messages == []
        assert (channel.addr, channel.peer, channel.fqdn) == (PEER, PEER, FQDN)
        assert (channel.smtp_state, channel.seen_greeting) == (channel.COMMAND, '')
        assert (channel.mailfrom, channel.rcpttos, channel.received_lines) == (None, [], [])
        assert not channel.received_data
        feed(channel, b'EHLO client.example\r\nMAIL FROM:<a@b> SIZE=1\r\nRCPT TO:<c@d>\r\n')
        assert (channel.seen_greeting, channel.extended_smtp) == ('client.example', True)
        assert (channel.mailfrom, channel.rcpttos) == ('a@b', ['c@d'])
        assert (channel.mail_options, channel.rcpt_options) == (['SIZE=1'], [])
        feed(channel, b'DATA\r\nline\r\n')
        assert channel.smtp_state == channel.DATA
        feed(channel, b'other\r\n.\r\n')
        assert channel.received_data == b'line\nother'
        assert channel.smtp_state == channel.COMMAND
        assert (channel.mailfrom, channel.rcpttos) == (None, [])

    @pytest.mark.parametrize('greeting, verb, limit, smtputf8', [
        (b'HELO x', b'NOOP ', 512, False), (b'HELO x', b'MAIL FROM:', 512, False),
        (b'EHLO x', b'NOOP ', 512, False), (b'EHLO x', b'MAIL FROM:', 538, False),
        (b'EHLO x', b'RCPT TO:', 512, False), (b'EHLO x', b'MAIL FROM:', 548, True)])
    def test_a_command_line_may_be_as_long_as_its_limit(self, greeting, verb, limit, smtputf8):
        channel = make_channel(enable_SMTPUTF8=smtputf8)
        feed(channel, greeting + b'\r\n')
        line = verb + b'x' * (limit - len(verb))
        assert feed(channel, line + b'\r\n') != b'500 Error: line too long\r\n'
        assert feed(channel, *in_pieces(line + b'x\r\n', 520), b'RSET\r\n') == (
            b'500 Error: line too long\r\n250 OK\r\n')

    @three_ways
    def test_an_endless_command_line_gets_one_reply_at_its_end(self, way):
        """And it is not kept meanwhile."""
        channel = make_channel()
        line = b'x' * 20_000
        with traced_memory() as now_and_peak:
            sent = way(channel, [line, line, b'\r\n', b'NOOP\r\n'])
            assert now_and_peak()[0] < 15_000
        assert sent == ['S: 500 Error: line too long', 'S: 250 OK']


# ---------------------------------------------------------------------------
# Paths and parameters

VERBATIM_PATHS = [  # odd dots: phone companies gave these out; RFC 2047 is for headers
    'a@b', '<a@b>', '<a>', 'a', '<Postmaster>', '<first.last+tag@sub-domain.example>',
    "<a/b=c+d!#$%&'*^_`{|}~?-e@c>", '<a.@x>', '<.a@x>', '<a..b@x>', '<a..@x>', '<.@x>',
    '<a@-.x>', '<-@b>', '<a@b_c>', '<a@b!c>', '<a@-x>', '<a@x->', '<a@x-.y>', '<a@123>',
    '<A@B.Example>', '<"a b"@c>', '"a b"@c', '<"plain"@x>', '<"a\\"b"@c>', '<"a\\\\"@c>',
    '<"a\\b"@c>', '<"a@b"@c>', '<"a>b"@c>', '<"(c)"@c>', '<" "@c>', '<""@c>', '<"a b">',
    '<a@[127.0.0.1]>', 'a@[127.0.0.1]', '<a@[IPv6:::1]>', '<a@[IPv6:2001:db8::1]>', '<\xe9@b>',
    '<\u7528\u6237@\u4f8b\u5b50.example>', '<\U0001f600@c>', '<"\xe9 \xe8"@c>', '<=?x?=@b>',
    '<a=?utf-8?q?x?=@b>', '<=?utf-8?q?x=0d=0aRCPT?=@example.com>', '<a@=?utf-8?q?x?=>',
    '<' + 400 * 'a' + '@b>', '<a@' + '.'.join(100 * ['abc']) + '>']
PATHS_TAKEN = {  # as sent: as handed on
    **{path: path[1:-1] if path[0] == '<' else path for path in VERBATIM_PATHS},
    '<>': '<>', '  <a@b>': 'a@b', '\t<a@b>': 'a@b', '<a@b> ': 'a@b', '<a@b>\t': 'a@b',
    '<@x:a@b>': 'a@b', '<@x,@y.example:a@b>': 'a@b', '<@[192.0.2.1]:a@b>': 'a@b',
    '<@x:Postmaster>': 'Postmaster',
}
PATHS_REFUSED = [
    '<(c)a@b>', '<a(c)@b>', '<a@b(c)>', '<a@(x)b>', '< a@b >', '<a @b>', '<a@ b>', '<a@b >',
    '<a b@c>', '<a\tb@c>', '<a@b', 'a@b>', '<a@b>c', '<a@b>SIZE=1', '<a@b>,<c@d>', 'a@b,c@d',
    '<a@b><c@d>', 'Foo <a@b>', '"Foo" <a@b>', 'a@b <c@d>', '<a@x.>', '<a@.x>', '<a@x..y>',
    '<a@>', '<@b>', '<@>', '<a@b@c>', '<a@@b>', '<<a@b>>', '<<>>', '<', '>', '<a@b>>', '"',
    '<">', '<"a@b>', '<a@b"', '<"a"b@c>', '<a"b"@c>', '<a@"b">', '<a\\b@c>', '<a@b\\>',
    '<"a\\"@c>', '<a:b@c>', '<a;b@c>', '<a,b@c>', '<a[b@c>', '<a<b@c>', '<a>b@c>',
    '<a@[127.0.0.1>', '<a@[x]y>', '<a@[x y]>', '<a@[[x]]>', '<@x:>', '<@@x:a@b>', '<x:a@b>',
    '@x:a@b',
]
CONTROL_CHARACTERS = [chr(n) for n in itertools.chain(range(9), range(10, 32), [127])]

# The three commands that take a path, and what comes before them.
MAIL_FROM = (b'EHLO x\r\n', b'MAIL FROM:')
RCPT_TO = (b'EHLO x\r\nMAIL FROM:<a@b>\r\n', b'RCPT TO:')
VRFY = (b'NOOP\r\n', b'VRFY ')


def send_path(path, before, verb, **kwargs):
    """What is answered to the command, and the channel."""
    channel = make_channel(**kwargs)
    feed(channel, before)
    return feed(channel, verb + octets(path) + b'\r\n').decode('utf-8'), channel


def is_one_reply_line(text):
    return bool(re.fullmatch(r'[2-5][0-9][0-9][ -][ -~]*\r\n', text))


class TestPaths:
    @pytest.mark.parametrize('sent, handed_on', PATHS_TAKEN.items(), ids=ascii)
    def test_a_well_formed_path_is_handed_on_verbatim(self, sent, handed_on):
        reply, channel = send_path(sent, *MAIL_FROM)
        assert (reply, channel.mailfrom) == ('250 OK\r\n', handed_on)
        reply, channel = send_path(sent, *RCPT_TO)
        assert (reply, channel.rcpttos) == ('250 OK\r\n', [handed_on])
        feed(channel, b'DATA\r\nx\r\n.\r\n')
        assert channel.smtp_server.messages[0][1:3] == ('a@b', [handed_on])

    @pytest.mark.parametrize('path', [path for path in PATHS_TAKEN if path != '<>'], ids=ascii)
    def test_a_well_formed_path_can_be_verified(self, path):
        assert send_path(path, *VRFY)[0].startswith('252 ')

    @pytest.mark.parametrize('path', PATHS_REFUSED, ids=ascii)
    def test_a_malformed_path_is_refused(self, path):
        reply, channel = send_path(path, *MAIL_FROM)
        assert reply == '501 Syntax: MAIL FROM: <address> [SP <mail-parameters>]\r\n'
        assert channel.mailfrom is None
        reply, channel = send_path(path, *RCPT_TO)
        assert reply == '501 Syntax: RCPT TO: <address> [SP <mail-parameters>]\r\n'
        assert channel.rcpttos == []

    @pytest.mark.parametrize('path', ['"', '<', '<@', '<a@b', '"a', '<(c)a@b>', '<a@[x>', '@',
                                      '<a@x..y>', '<a\x00b@c>', '<<a@b>>'])
    def test_a_malformed_path_cannot_be_verified(self, path):
        reply, _ = send_path(path, *VRFY)
        assert re.fullmatch(r'5[0-9][0-9] [ -~]*\r\n', reply)

    @pytest.mark.parametrize('control', CONTROL_CHARACTERS, ids=ascii)
    @pytest.mark.parametrize('form', ['<a%sb@c>', '<"a%sb"@c>', '<a@b%sc>', '%s<a@b>', '<a@b>%s'])
    def test_control_characters_are_refused(self, form, control):
        for command in (MAIL_FROM, RCPT_TO, VRFY):
            assert send_path(form % control, *command)[0] == '500 Error: bad syntax\r\n'

    @pytest.mark.parametrize('arg, address, rest', [
        (None, '', ''), ('', '', ''), ('a@b', 'a@b', ''), ('<a@b>', 'a@b', ''),
        ('<>', '<>', ''), ('<a@b> SIZE=1', 'a@b', 'SIZE=1'), ('a@b SIZE=1', 'a@b', 'SIZE=1')])
    def test_getaddr_gives_the_address_and_the_rest(self, arg, address, rest):
        found = make_channel()._getaddr(arg)
        assert (found[0], found[1].strip()) == (address, rest)

    @pytest.mark.parametrize('params, parsed', [
        ([], {}), (['SIZE=1'], {'SIZE': '1'}), (['SMTPUTF8'], {'SMTPUTF8': True}),
        (['A=B=C', 'D'], {'A': 'B=C', 'D': True}), (['A=<>'], {'A': '<>'}),
        (['X='], None), (['=x'], None), ([''], None)])
    def test_getparams_gives_a_dict_or_none(self, params, parsed):
        assert make_channel()._getparams(params) == parsed

    @pytest.mark.parametrize('keyword, arg, rest', [
        ('FROM:', 'from: x ', 'x'), ('FROM:', 'FROM:x', 'x'), ('TO:', 'TO:<a> ', '<a>'),
        ('FROM:', 'xfrom:x', ''), ('FROM:', 'FROM :x', ''), ('FROM:', '', ''),
        ('FROM:', 'FROM:', '')])
    def test_strip_command_keyword(self, keyword, arg, rest):
        assert make_channel()._strip_command_keyword(keyword, arg) == rest


atoms = st.text(st.sampled_from("abcXYZ019!#$%&'*+-/=?^_`{|}~\xe9\u4f8b"), min_size=1, max_size=8)
dot_strings = st.lists(atoms, min_size=1, max_size=3).map('.'.join)
quoted_strings = st.lists(
    st.sampled_from([' ', 'a', '@', '<', '>', '(', '\xe9', ',', '\\"', '\\\\', '\\a', '.']),
    max_size=8).map(lambda parts: '"%s"' % ''.join(parts))
labels = st.from_regex('[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?', fullmatch=True)
domains = (st.lists(labels, min_size=1, max_size=3).map('.'.join)
           | st.ip_addresses(v=4).map('[{}]'.format)
           | st.ip_addresses(v=6).map('[IPv6:{}]'.format))
mailboxes = st.builds('{}@{}'.format, dot_strings | quoted_strings, domains)
nearly_paths = st.lists(st.sampled_from(
    ['<', '>', '@', '"', '\\', '(', ')', '[', ']', ',', ':', ';', '.', ' ', '\t', '=', '?', '-',
     '=?', '?=', 'utf-8?q?', 'a', 'bc', 'x.example', 'SIZE=1', '1.2.3.4', '\xe9', '\xa0', '\u2028',
     '\x85', '\udcff', '\x00']), max_size=14).map(''.join)


class TestPathProperties:
    @given(mailboxes)
    def test_every_mailbox_of_the_grammar_is_taken_verbatim(self, mailbox):
        reply, channel = send_path('<%s>' % mailbox, *MAIL_FROM)
        assert (reply, channel.mailfrom) == ('250 OK\r\n', mailbox)

    @given(nearly_paths | st.text(max_size=30), st.sampled_from([MAIL_FROM, RCPT_TO, VRFY]),
           st.booleans())
    @settings(max_examples=300)
    @example('<=?utf-8?q?=0d=0a?=@x>', MAIL_FROM, False)
    @example('"', VRFY, True)
    def test_whatever_stands_for_a_path_gets_one_reply(self, path, command, decode_data):
        line = octets(path.replace('\r\n', '')) if path.isascii() else path.replace(
            '\r\n', '').encode('utf-8', 'surrogatepass')
        channel = make_channel(decode_data=decode_data)
        feed(channel, command[0])
        reply = feed(channel, command[1] + line + b'\r\n').decode('ascii')
        assert is_one_reply_line(reply) and reply[0] in '25'
        for address in [channel.mailfrom, *channel.rcpttos]:
            if address not in (None, 'a@b'):
                assert reply == '250 OK\r\n' and address in path
                assert not re.search('[\x00-\x1f\x7f]', address)


# ---------------------------------------------------------------------------
# Data

BODIES = {  # sentence: as sent before the last dot, as handed on
    'nothing': (b'', b''),
    'an empty line': (b'\r\n', b''),
    'two empty lines': (b'\r\n\r\n', b'\n'),
    'one line': (b'a\r\n', b'a'),
    'headers and text': (b'A: b\r\n\r\ntext\r\n', b'A: b\n\ntext'),
    'an empty line at the end': (b'a\r\n\r\n', b'a\n'),
    'a doubled dot at the beginning': (b'..\r\n', b'.'),
    'doubled dots': (b'a\r\n..b\r\n...\r\n....c\r\n', b'a\n.b\n..\n...c'),
    'a dot that was not doubled': (b'a\r\n.b\r\n', b'a\nb'),
    'a dot inside a line': (b'a.b.\r\n', b'a.b.'),
    'a bare LF': (b'a\nb\r\n', b'a\nb'),
    'a dot between bare LFs at the beginning': (b'\n.\nb\r\n', b'\n.\nb'),
    'a dot after a bare LF': (b'a\n.b\r\n', b'a\n.b'),
    'a bare CR': (b'a\rb\r\n', b'a\rb'),
    'a CR before CRLF': (b'a\r\r\nb\r\n', b'a\r\nb'),
    'control characters': (b'\x00\x01\x1b\x7f\r\n', b'\x00\x01\x1b\x7f'),
    'letters that are not ASCII': (
        '\xe4\xf6\r\n\u20ac\U0001f600\r\n'.encode(), '\xe4\xf6\n\u20ac\U0001f600'.encode()),
    'octets that are not UTF-8': (b'caf\xe9 \xff\r\n\xc3\r\n', b'caf\xe9 \xff\n\xc3'),
    'a line of 100,000 octets': (b'x' * 100_000 + b'\r\n', b'x' * 100_000),
    'many short lines': (b'.x\r\n' * 3000, b'\n'.join([b'x'] * 3000)),
}
NO_ENDS = [
    b'\n.\n', b'\n.\r\n', b'\r\n.\n', b'\r\n.\r', b'\r.\r', b'\r.\r\n', b'\r\r.\r\n', b'\n\n.\r\n',
    b'\r\n\0.\r\n', b'\r\n.\0\r\n', b'\r\n.\r\r\n', b'\r\n .\r\n', b'\r\n. \r\n', b'\r\n..\r\n',
    b'\r\n\x0b.\r\n', b'\r\n\xef\xbc\x8e\r\n', b'\0\r\n.\n\0']


def message_of(body):
    """What RFC 5321, 4.5.2 makes of a body as it was sent, the old module's line ends."""
    lines = body.split(b'\r\n')
    return b'\n'.join(line[1:] if line[:1] == b'.' else line for line in lines)


class TestData:
    @pytest.mark.parametrize('size', [1, 2, 3, 7, 1 << 30], ids='in pieces of {}'.format)
    @both_modes
    @pytest.mark.parametrize('sent, handed_on', BODIES.values(), ids=BODIES.keys())
    def test_body(self, sent, handed_on, decode_data, size):
        channel = make_channel(decode_data=decode_data)
        feed(channel, TO_DATA)
        size = max(size, len(sent) // 10_000)  # the large ones not octet by octet
        assert feed(channel, *in_pieces(sent + b'.\r\nNOOP\r\n', size)) == 2 * b'250 OK\r\n'
        assert [message[3] for message in channel.smtp_server.messages] == [
            in_mode(handed_on, decode_data)]

    @pytest.mark.parametrize('size', [1, 1 << 30], ids='in pieces of {}'.format)
    @both_modes
    @pytest.mark.parametrize('no_end', NO_ENDS, ids=ascii)
    def test_only_crlf_dot_crlf_ends_data(self, no_end, decode_data, size):
        """Anything else would let one message become two (SMTP smuggling)."""
        channel = make_channel(decode_data=decode_data)
        feed(channel, TO_DATA)
        body = (b'text' + no_end + b'MAIL FROM:<forged@example>\r\nRCPT TO:<c@d>\r\nDATA\r\n'
                + b'forged' + no_end + b'end')
        assert feed(channel, *in_pieces(body + b'\r\n.\r\n', size)) == b'250 OK\r\n'
        assert [message[3] for message in channel.smtp_server.messages] == [
            in_mode(message_of(body), decode_data)]

    @three_ways
    @both_modes
    def test_after_too_much_data_the_session_is_back_in_command_state(self, way, decode_data):
        channel = make_channel(data_size_limit=100, decode_data=decode_data)
        feed(channel, TO_DATA)
        big = [b'x' * 98 + b'\r\n'] * 20
        transaction = [*FROM_AND_TO, b'DATA\r\n', b'small\r\n', b'.\r\n']
        assert way(channel, big + [b'.\r\n', b'NOOP\r\n'] + transaction) == [
            'S: 552 Error: Too much mail data', 'S: 250 OK', 'S: 250 OK', 'S: 250 OK',
            DATA[1], 'S: 250 OK']
        assert [message[3] for message in channel.smtp_server.messages] == [
            in_mode(b'small', decode_data)]

    @pytest.mark.parametrize('size', [1, 3, 1 << 30], ids='in pieces of {}'.format)
    @pytest.mark.parametrize('body, counted', [
        (b'', 0), (b'12345678\r\n', 10), (b'1\r\n2\r\n', 6), (b'..2\r\n..\r\n', 7),
        (b'..\r\n' * 4, 12), (b'...\r\n', 4), (b'\r\n\r\n', 4), (b'\n\n\n\r\n', 5),
        ('\xe4\xf6\r\n'.encode(), 6)])
    @pytest.mark.parametrize('channel_class', [smtpd.SMTPChannel, HookedChannel])
    @both_modes
    def test_size_is_counted_as_rfc_1870_says(
            self, body, counted, decode_data, channel_class, size):
        """Octets with CRLF, without the doubled dots and without the last dot."""
        def reply_with_limit(limit):
            channel = make_channel(channel_class=channel_class, data_size_limit=limit,
                                   decode_data=decode_data)
            feed(channel, TO_DATA)
            return feed(channel, *in_pieces(body + b'.\r\n', size))

        assert reply_with_limit(counted or 1) == b'250 OK\r\n'
        if counted > 1:
            assert reply_with_limit(counted - 1) == b'552 Error: Too much mail data\r\n'

    @pytest.mark.parametrize('channel_class', [smtpd.SMTPChannel, HookedChannel])
    @both_modes
    def test_data_over_the_limit_is_dropped_as_it_arrives(self, decode_data, channel_class):
        channel = make_channel(channel_class=channel_class, data_size_limit=10_000,
                               decode_data=decode_data)
        feed(channel, TO_DATA)
        piece = (b'x' * 70 + b'\r\n') * 900
        with traced_memory() as now_and_peak:
            for _ in range(100):
                feed(channel, piece)
            assert now_and_peak()[1] < 2_000_000
        assert feed(channel, b'\r\n.\r\n') == b'552 Error: Too much mail data\r\n'

    def test_received_data_is_let_go_at_the_next_data_command(self):
        channel = make_channel()
        feed(channel, TO_DATA + b'text\r\n.\r\nNOOP\r\n' + TO_DATA[8:-6])
        assert channel.received_data == b'text'
        feed(channel, b'DATA\r\n')
        assert not channel.received_data

    @given(st.lists(st.sampled_from([b'.', b'..', b'\r', b'\n', b'\r\n', b'\r\n.', b'a', b'xyz',
                                     b'\xc3\xa9', b'\xff']) | st.binary(max_size=5),
                    max_size=20).map(b''.join),
           st.lists(st.integers(0, 60), max_size=6), st.booleans())
    @settings(max_examples=300)
    def test_any_body_arrives_however_it_is_cut(self, body, cuts, decode_data):
        doubled = body.replace(b'\r\n.', b'\r\n..')
        wire = (b'.' + doubled if body[:1] == b'.' else doubled) + b'\r\n.\r\n'
        channel = make_channel(decode_data=decode_data)
        feed(channel, TO_DATA)
        assert feed(channel, *cut(wire, cuts)) == b'250 OK\r\n'
        assert [message[3] for message in channel.smtp_server.messages] == [
            in_mode(body.replace(b'\r\n', b'\n'), decode_data)]


def cut(wire, cuts):
    """The wire, cut at these places."""
    places = sorted({0, len(wire), *(place for place in cuts if place < len(wire))})
    return [wire[start:stop] for start, stop in zip(places, places[1:])]


wires = st.lists(st.sampled_from([
    b'EHLO x\r\n', b'HELO x\r\n', *FROM_AND_TO, b'MAIL FROM:<a@b> SIZE=5\r\n', b'DATA\r\n',
    b'RSET\r\n', b'NOOP\r\n', b'QUIT\r\n', b'VRFY a\r\n', b'HELP\r\n', b'FOO\r\n', b'.\r\n',
    b'..\r\n', b'text\r\n', b'\r\n', b'\r', b'\n', b'.', b'\xff', b'\xc3', b'\xa9', b'\x00',
    b'x' * 600, TO_DATA, b'a\r\n.\r\n']) | st.binary(max_size=6), max_size=16).map(b''.join)


class TestProperties:
    @given(wires, st.lists(st.integers(0, 400), max_size=6),
           st.sampled_from([{}, {'decode_data': True}, {'enable_SMTPUTF8': True},
                            {'data_size_limit': 5}]))
    @settings(max_examples=400)
    @example(TO_DATA + b'.\r\nNOOP\r\n', [len(TO_DATA) + 1], {})
    @example(TO_DATA + b'\r\n.\r\n', [len(TO_DATA) + 3], {'decode_data': True})
    def test_the_way_that_input_is_cut_changes_nothing(self, wire, cuts, kwargs):
        """And neither do overridden hooks."""
        assume(wire)
        results = []
        for channel_class in (smtpd.SMTPChannel, HookedChannel):
            for pieces in ([wire], cut(wire, cuts), in_pieces(wire, 1)):
                channel = make_channel(channel_class=channel_class, **kwargs)
                sent = feed(channel, *pieces)
                results.append((sent, channel.smtp_server.messages, channel.smtp_state,
                                channel.connected))
        assert all(result == results[0] for result in results)

    @given(st.lists(st.binary(max_size=30) | st.text(max_size=30).map(str.encode), max_size=30))
    def test_every_command_line_gets_exactly_one_reply(self, lines):
        lines = [line for line in lines if b'\r\n' not in line and line[-1:] != b'\r']
        assume(not any(line[:4].upper() in (b'QUIT', b'EHLO') for line in lines))
        sent = feed(make_channel(), b''.join(line + b'\r\n' for line in lines))
        assert len(sent.splitlines()) == len(lines)
        assert all(re.fullmatch(rb'[245][0-9][0-9] [ -~]*', line) for line in sent.splitlines())


# ---------------------------------------------------------------------------
# A session always gets an answer

RETURNS = {  # sentence: what the handler returns, what the client gets
    'None is a plain OK': (None, b'250 OK\r\n'),
    'empty text is a plain OK': ('', b'250 OK\r\n'),
    'text is sent': ('451 Try again later', b'451 Try again later\r\n'),
    'a line end after it is left out': ('250 fine\r\n', b'250 fine\r\n'),
    'bytes are sent as they are': (b'250 caf\xe9', b'250 caf\xe9\r\n'),
    'bytes with a line end get no second one': (b'250 fine\r\n', b'250 fine\r\n'),
    'line breaks make a reply of many lines':
        ('550 no\nreally\r\nno', b'550-no\r\n550-really\r\n550 no\r\n'),
    'a reply of many lines stays one': ('550-no\r\n550 really', b'550-no\r\n550 really\r\n'),
    'another code inside is no second reply': ('250 OK\r\n354 go', b'250-OK\r\n250 354 go\r\n'),
    'text that is not ASCII': ('550 caf\xe9', b'550 caf?\r\n'),
    'a first line without a last one is the last': ('550-no', b'550 no\r\n'),
    'the same in bytes': (b'550-no', b'550 no\r\n'),
    'the code before each line is not doubled':
        ('250 one\n250-two\n250', b'250-one\r\n250-two\r\n250 \r\n'),
    'a number that begins with it is text':
        ('250 queued:\n2500 messages', b'250-queued:\r\n250 2500 messages\r\n'),
    'a code and a semicolon':
        ('451;later\n451;or never', b'451-later\r\n451 or never\r\n'),
}


def fail(*args, **kwargs):
    raise ZeroDivisionError('on purpose')


JUNK = {
    'an int': 250, 'True': True, 'an object': object(), 'a list': ['250 OK'],
    'an object without a repr': unittest.mock.Mock(__repr__=fail),
    'text without a code': 'thanks', 'bytes without a code': b'thanks',
    'a code of two digits': '25 OK', 'an impossible code': '999 x',
    'a code that SMTP has not': '100 x', 'a code of other digits': '2\u0665\u0660 OK'}


def takes_any(*args, **kwargs):
    return '250 %s' % sorted(kwargs)


class TestHandlers:
    @both_modes
    @pytest.mark.parametrize('returned, reply', RETURNS.values(), ids=RETURNS.keys())
    def test_what_a_handler_returns(self, returned, reply, decode_data):
        channel = make_channel(StubServer(returned), decode_data=decode_data)
        feed(channel, TO_DATA)
        assert feed(channel, b'text\r\n.\r\n') == reply
        assert feed(channel, b'NOOP\r\n') == b'250 OK\r\n'

    @pytest.mark.parametrize('returned', JUNK.values(), ids=JUNK.keys())
    def test_junk_that_a_handler_returns_is_451_and_a_line_in_the_log(self, returned, capsys):
        channel = make_channel(StubServer(returned))
        feed(channel, TO_DATA)
        assert feed(channel, b'text\r\n.\r\nNOOP\r\n') == (
            b'451 Internal confusion\r\n250 OK\r\n')
        out, err = capsys.readouterr()
        assert out == ''
        assert re.fullmatch('error: process_message.. returned .*, which is no reply\n', err)

    @pytest.mark.parametrize('returned, reply', [
        ('550 caf\xe9', b'550 caf\xc3\xa9\r\n'), ('550 caf\udce9', b'550 caf?\r\n'),
        (b'550 caf\xe9', b'550 caf\xe9\r\n'), ('550 cafe', b'550 cafe\r\n')], ids=ascii)
    def test_text_goes_out_as_utf_8_where_the_client_asked_for_it(self, returned, reply):
        def push(self, msg):
            assert isinstance(msg, str) or returned != '550 cafe'  # as programs know it
            smtpd.SMTPChannel.push(self, msg)

        channel = make_channel(
            StubServer(returned), variant(smtpd.SMTPChannel, push=push), enable_SMTPUTF8=True)
        feed(channel, TO_DATA.replace(b'<a@b>', b'<a@b> SMTPUTF8'))
        assert feed(channel, b'x\r\n.\r\n') == reply

    @three_ways
    @both_modes
    def test_a_handler_that_raises_is_answered_with_451(self, way, decode_data, capsys):
        server = StubServer(ZeroDivisionError('caf\xe9 \udcff \\'))
        channel = make_channel(server, decode_data=decode_data)
        feed(channel, TO_DATA)
        assert way(channel, [b'text\r\n', b'.\r\n', b'NOOP\r\n', b'MAIL FROM:<a@b>\r\n']) == [
            'S: 451 Internal confusion', 'S: 250 OK', 'S: 250 OK']
        out, err = capsys.readouterr()
        assert out == ''
        assert 'Traceback' in err and 'process_message' in err
        assert 'ZeroDivisionError: caf\\xe9 \\udcff \\\n' in err

    def test_each_command_that_raises_is_answered_with_451(self, capsys):
        @dataclasses.dataclass(frozen=True)
        class Fault(Exception):  # it takes no other attributes
            arg: str

        def smtp_FAIL(self, arg):
            raise Fault(arg)

        assert feed(channel_with(smtp_FAIL=smtp_FAIL), b'FAIL x\r\nFAIL y\r\nNOOP\r\n') == (
            2 * b'451 Internal confusion\r\n' + b'250 OK\r\n')
        err = capsys.readouterr().err
        assert err.count('Traceback') == 2 and 'Fault: x' in err and 'Fault: y' in err

    def test_a_command_that_raises_after_its_reply_ends_the_session(self, capsys):
        def smtp_FAIL(self, arg):
            self.push('250 OK')
            raise KeyError(arg)

        channel = channel_with(smtp_FAIL=smtp_FAIL)
        assert feed(channel, b'FAIL\r\nNOOP\r\n') == b'250 OK\r\n'
        assert channel.conn.closed and 'KeyError' in capsys.readouterr().err

    @pytest.mark.parametrize('stderr', [
        None, io.TextIOWrapper(io.BytesIO(), 'ascii'),
        unittest.mock.Mock(**{'write.side_effect': OSError(errno.EPIPE, 'gone')}),
        unittest.mock.Mock(**{'write.side_effect': ValueError('closed')}),
    ], ids=['none', 'ASCII', 'gone', 'closed'])
    def test_a_log_that_cannot_be_written_to_does_no_harm(self, stderr, monkeypatch):
        monkeypatch.setattr(sys, 'stderr', stderr)
        channel = make_channel(StubServer(ValueError('caf\xe9 \udcff')))
        feed(channel, TO_DATA)
        assert feed(channel, b'x\r\n.\r\nNOOP\r\n') == b'451 Internal confusion\r\n250 OK\r\n'

    def test_what_is_logged(self, capsys):
        channel = make_channel()
        channel.log_info('unhandled event', 'warning')  # asyncore's, which say nothing
        channel.log_info('caf\xe9 \\')
        assert capsys.readouterr() == ('', 'info: caf\\xe9 \\\n')

    def test_log_info_may_be_overridden(self, capsys):
        log = []
        channel = make_channel(StubServer(ZeroDivisionError()), variant(
            smtpd.SMTPChannel,
            log_info=lambda self, message, type='info': log.append((type, message))))
        feed(channel, TO_DATA + b'x\r\n.\r\n')
        [(type, message)] = log
        assert type == 'error' and 'ZeroDivisionError' in message
        assert capsys.readouterr() == ('', '')

    @pytest.mark.parametrize('calls_base, answer', [
        (False, b'554 my own words\r\n'), (True, b'451 Internal confusion\r\n')])
    def test_handle_error_may_be_overridden(self, calls_base, answer, capsys):
        """It finds the exception, and alone decides what the client hears."""
        found = []

        def handle_error(self):
            found.append(sys.exc_info()[0])
            if calls_base:
                smtpd.SMTPChannel.handle_error(self)
            else:
                self.push('554 my own words')

        channel = make_channel(StubServer(ZeroDivisionError()),
                               variant(smtpd.SMTPChannel, handle_error=handle_error))
        feed(channel, TO_DATA)
        assert feed(channel, b'x\r\n.\r\n') == answer
        assert feed(channel, b'NOOP\r\n') == b'250 OK\r\n' and found == [ZeroDivisionError]

    def test_not_implemented_error_leaves_handle_read_when_called_directly(self):
        channel = make_channel(StubServer(NotImplementedError()))
        feed(channel, TO_DATA)
        channel.conn.incoming.append(b'text\r\n.\r\n')
        with pytest.raises(NotImplementedError):
            channel.handle_read()

    def test_process_message_has_to_be_overridden(self, capsys):
        server = smtpd.SMTPServer(('127.0.0.1', 0), None, map={})
        with contextlib.closing(server):
            with pytest.raises(NotImplementedError):
                server.process_message(PEER, 'a@b', ['c@d'], b'')
            channel = make_channel(server)
            feed(channel, TO_DATA)
            assert feed(channel, b'x\r\n.\r\nNOOP\r\n') == b'451 Internal confusion\r\n250 OK\r\n'
        assert 'NotImplementedError' in capsys.readouterr().err

    @pytest.mark.parametrize('handler, reply', [
        (lambda peer, mailfrom, rcpttos, data: '250 none', '250 none'),
        (types.MethodType(lambda self, peer, mailfrom, rcpttos, data: '250 none', 0), '250 none'),
        (lambda peer, mailfrom, rcpttos, data, mail_options=None: '250 %s' % mail_options,
         "250 ['SIZE=9']"),
        (lambda peer, mailfrom, rcpttos, data, mail_options, *, rcpt_options:
         '250 %s %s' % (mail_options, rcpt_options), "250 ['SIZE=9'] []"),
        (lambda peer, mailfrom, rcpttos, data, *, rcpt_options, mail_options:
         '250 %s %s' % (mail_options, rcpt_options), "250 ['SIZE=9'] []"),
        (lambda *args: '250 %d' % len(args), '250 4'),
        (takes_any, "250 ['mail_options', 'rcpt_options']"),
        (functools.partial(takes_any), "250 ['mail_options', 'rcpt_options']"),
        (functools.wraps(takes_any)(lambda peer, mailfrom, rcpttos, data: '250 none'), '250 none'),
    ], ids=[
        'none', 'a method', 'one', 'both', 'by name alone', 'positional', 'any', 'partial',
        'wrapping one that takes any'])
    def test_a_handler_gets_the_keywords_that_it_takes(self, handler, reply):
        """Those of Python 2 take none: the most reported break of the old module."""
        server = StubServer()
        server.process_message = handler  # on the instance, as some programs do
        channel = make_channel(server)
        feed(channel, TO_DATA.replace(b'<a@b>', b'<a@b> SIZE=9'))
        assert feed(channel, b'x\r\n.\r\n') == reply.encode() + b'\r\n'

    def test_a_type_error_inside_a_handler_is_not_taken_for_its_signature(self, capsys):
        calls = []

        def process_message(peer, mailfrom, rcpttos, data, **kwargs):
            calls.append(kwargs)
            raise TypeError("unexpected keyword argument 'mail_options'")

        channel = make_channel(types.SimpleNamespace(process_message=process_message))
        feed(channel, TO_DATA)
        assert feed(channel, b'x\r\n.\r\n') == b'451 Internal confusion\r\n'
        assert len(calls) == 1 and 'TypeError' in capsys.readouterr().err


class TestSession:
    @pytest.mark.parametrize('options', [
        b'SMTPUTF8 SIZE=99999999', b'SMTPUTF8 X=Y', b'BODY=7BIT SMTPUTF8=1'])
    def test_options_of_a_refused_mail_leave_no_trace(self, options):
        channel = make_channel(enable_SMTPUTF8=True)
        feed(channel, b'EHLO x\r\n')
        assert feed(channel, b'MAIL FROM:<a@b> ' + options + b'\r\n')[:1] == b'5'
        assert not channel.require_SMTPUTF8 and not channel.mail_options
        assert feed(channel, b'MAIL FROM:<a@b>\r\n') == b'250 OK\r\n'
        assert not channel.require_SMTPUTF8 and channel.mail_options == []

    def test_options_of_a_refused_rcpt_leave_no_trace(self):
        channel = make_channel()
        feed(channel, TO_DATA[:-6] + b'RCPT TO:<e@f> X=Y\r\nDATA\r\nx\r\n.\r\n')
        [(_, _, rcpttos, _, keywords)] = channel.smtp_server.messages
        assert (rcpttos, keywords['rcpt_options']) == (['c@d'], [])

    @pytest.mark.parametrize('end', [b'RSET\r\n', b'RCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n'])
    def test_options_end_with_the_transaction(self, end):
        channel = make_channel(enable_SMTPUTF8=True)
        feed(channel, b'EHLO x\r\nMAIL FROM:<a@b> SMTPUTF8\r\n' + end)
        assert not channel.require_SMTPUTF8
        feed(channel, *FROM_AND_TO, b'DATA\r\nx\r\n.\r\n')
        assert channel.smtp_server.messages[-1][4]['mail_options'] == []

    @three_ways
    def test_what_comes_after_quit_is_not_executed(self, way):
        channel = make_channel()
        channel.conn.sends_at_most = 1  # the client is slow to read
        channel.conn.incoming.append(b'QUIT\r\nNOOP\r\n')
        way(channel, [TO_DATA, b'forged\r\n.\r\n', b'NOOP\r\n'])
        assert channel.conn.sent == b'221 Bye\r\n' and channel.conn.closed
        assert channel.smtp_server.messages == []

    @pytest.mark.parametrize('error', [ValueError('TLS cannot peek'), OSError()], ids=repr)
    def test_commands_that_come_while_replies_wait_are_executed(self, error):
        channel = make_channel()
        channel.conn.sends_at_most = 1
        channel.conn.recv = unittest.mock.Mock(
            side_effect=[b'NOOP\r\n', error, b'HELO x\r\nQUIT\r\n'])
        asyncore.read(channel)
        asyncore.read(channel)
        assert channel.seen_greeting == 'x'
        channel.conn.sends_at_most = None
        while channel.connected and channel.writable():
            asyncore.write(channel)
        assert channel.conn.sent == b'250 OK\r\n250 mx.example\r\n221 Bye\r\n'

    def test_commands_wait_until_all_replies_are_sent_where_these_are_many(self):
        channel = channel_with(unsent_reply_limit=10)
        channel.conn.sends_at_most = 1
        channel.conn.incoming += [b'HELP\r\n', b'HELP\r\nHELO x\r\n']
        asyncore.read(channel)
        assert not channel.readable()
        asyncore.read(channel)
        asyncore.write(channel)
        assert not channel.seen_greeting
        channel.conn.sends_at_most = None
        while channel.writable():
            asyncore.write(channel)
        assert channel.seen_greeting == 'x'

    def test_small_packets_are_not_held_back(self, monkeypatch):
        """By Nagle's rule, neither ours nor the client's, which may wait for an ACK of ours."""
        options = []
        monkeypatch.setattr(FakeConnection, 'setsockopt', lambda self, *args: options.append(args))
        channel = make_channel()
        assert options == [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]
        feed(channel, TO_DATA)
        del options[:]
        feed(channel, b'a piece of a message')
        assert options == ([(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)]
                           if hasattr(socket, 'TCP_QUICKACK') else [])
        del options[:]
        feed(channel, b'x' * channel.ac_in_buffer_size)  # more waits already
        assert options == []

    @pytest.mark.parametrize('make', [
        make_channel, lambda: channel_with(__repr__=fail),
        lambda: without_init(StubServer(), FakeConnection(), PEER, {})],
        ids=['plain', 'without a repr', 'without init'])
    def test_a_connection_that_breaks_is_closed_and_the_log_says_why(self, make, capsys):
        channel = make()
        feed(channel, OSError(errno.ETIMEDOUT, 'timed out'))
        assert channel.conn.closed and not channel.connected
        out, err = capsys.readouterr()
        assert out == '' and 'timed out' in err and 'SMTPChannel' in err.splitlines()[0]

    def test_a_client_that_has_gone_before_its_session_began(self, monkeypatch):
        monkeypatch.setattr(FakeConnection, 'getpeername', unittest.mock.Mock(
            side_effect=OSError(errno.ENOTCONN, 'gone')))
        channel = make_channel()
        assert channel.conn.closed and not channel.connected

    def test_a_connection_that_fails_in_send_ends_its_session_alone(self, monkeypatch, capsys):
        channel = make_channel()
        monkeypatch.setattr(channel.conn, 'send', unittest.mock.Mock(
            side_effect=OSError(errno.EINVAL, 'no more')))
        feed(channel, b'NOOP\r\nNOOP\r\n')
        assert channel.conn.closed
        assert 'no more' in capsys.readouterr().err

    @pytest.mark.parametrize('before', [b'RSET\r\n', TO_DATA], ids=['in a command', 'in data'])
    @pytest.mark.parametrize('error', [ZeroDivisionError, MemoryError])
    def test_a_hook_that_raises_in_mid_line_ends_the_session(self, error, before, capsys):
        """The rest of the line would be taken for a command."""
        def collect_incoming_data(self, data):
            if data.startswith(b'poison'):
                raise error
            smtpd.SMTPChannel.collect_incoming_data(self, data)

        channel = channel_with(collect_incoming_data=collect_incoming_data)
        feed(channel, before)
        assert feed(channel, b'poison', b'\r\nNOOP\r\n.\r\n') == b''
        assert channel.conn.closed and channel.smtp_server.messages == []
        assert error.__name__ in capsys.readouterr().err

    def test_each_channel_has_its_own_command_size_limits(self):
        limits = smtpd.SMTPChannel.command_size_limits.copy()
        extended, plain = make_channel(), make_channel()
        feed(extended, b'EHLO x\r\nXFOO\r\n')
        assert 'XFOO' not in extended.command_size_limits
        line = b'MAIL FROM:<' + b'a' * 510 + b'@b>\r\n'
        assert feed(plain, b'HELO x\r\n' + line).endswith(b'\r\n500 Error: line too long\r\n')
        assert feed(extended, line) == b'250 OK\r\n'
        assert smtpd.SMTPChannel.command_size_limits == limits and limits.default_factory() == 512

    def test_limits_set_on_the_class_count(self):
        channel = channel_with(command_size_limit=20)
        for greeting in b'RSET', b'EHLO x':
            sent = feed(channel, greeting + b'\r\nNOOP\r\nNOOP ' + b'x' * 16 + b'\r\n')
            assert sent.endswith(b'250 OK\r\n500 Error: line too long\r\n')
        channel = make_channel()
        channel.command_size_limits['XLONG'] = 1000
        assert channel.max_command_size_limit == 1000

    @three_ways
    def test_the_limit_of_recipients(self, way):
        channel = make_channel()
        feed(channel, b'EHLO x\r\nMAIL FROM:<a@b>\r\n')
        sent = way(channel, [b'RCPT TO:<r%d@x>\r\n' % n for n in range(1002)]
                   + [b'DATA\r\n', b'x\r\n.\r\n'])
        assert sent == ['S: 250 OK'] * 1000 + ['S: 452 Error: too many recipients'] * 2 + [
            DATA[1], 'S: 250 OK']
        assert channel.smtp_server.messages[0][2] == ['r%d@x' % n for n in range(1000)]

    @three_ways
    def test_the_limit_of_errors(self, way):
        channel = make_channel()
        sent = way(channel, [b'FOO\r\n'] * 99 + [b'NOOP\r\n'] + [b'FOO\r\n'] + [b'NOOP\r\n'] * 5)
        error = 'S: 500 Error: command "FOO" not recognized'
        assert sent == [error] * 99 + ['S: 250 OK', error, 'S: 421 Error: too many errors']
        assert channel.conn.closed

    def test_errors_are_counted_anew_after_each_message(self):
        channel = channel_with(error_limit=3)
        feed(channel, b'HELO x\r\n')
        for _ in range(5):
            sent = feed(channel, b'FOO\r\nFOO\r\n', *FROM_AND_TO, b'DATA\r\nx\r\n.\r\n')
            assert sent.endswith(READY + b'250 OK\r\n')
        assert feed(channel, b'FOO\r\n' * 4).endswith(b'421 Error: too many errors\r\n')

    @pytest.mark.parametrize('attribute, lines', [
        ('error_limit', [b'FOO\r\n'] * 300),
        ('recipient_limit', [TO_DATA[:-6]] + [b'RCPT TO:<c@d>\r\n'] * 2500)])
    def test_none_turns_a_limit_off(self, attribute, lines):
        sent = feed(channel_with(**{attribute: None}), b''.join(lines))
        assert len(re.findall(rb'(?m)^...[ ]', sent)) == len(lines) + (lines[0][:4] == b'EHLO') * 2
        assert b'\n4' not in sent


# ---------------------------------------------------------------------------
# What existing programs do beyond the documentation

SESSION = (
    EHLO + MESSAGE + ('C: RSET', 'S: 250 OK') + UNKNOWN
    + MESSAGE + ('C: QUIT', 'S: 221 Bye'))


def takes_chunk(self):
    """A found_terminator() for a BDAT of one's own, which has set a number."""
    if self.terminator == b'\r\n':
        smtpd.SMTPChannel.found_terminator(self)
        return
    octets = b''.join(self.received_lines)
    self.received_lines, self.num_bytes = [], 0
    self.set_terminator(b'\r\n')
    self.push('250 %r' % octets)


# Sentence: the class's attributes, what is sent, what is answered.
TERMINATORS = {
    'text, as in Python 2': (
        {'smtp_XTEXT': lambda self, arg: (self.push('250 go on'), self.set_terminator('\r\n'))},
        b'XTEXT\r\nNOOP\r\nNOOP\r\n', b'250 go on\r\n250 OK\r\n250 OK\r\n'),
    'another line end, and no hook': (
        {'smtp_XEND': lambda self, arg: (self.push('250 go on'), self.set_terminator(b'\n\n'))},
        b'XEND\r\nNOOP\n\nRSET x\n\n', b'250 go on\r\n250 OK\r\n501 Syntax: RSET\r\n'),
    'a number, and a hook': (
        {'smtp_BDAT': lambda self, arg: self.set_terminator(int(arg)),
         'found_terminator': takes_chunk},
        b'BDAT 9\r\nline\r\n123NOOP\r\n', b"250 b'line\\r\\n123'\r\n250 OK\r\n"),
}


class TestExistingPrograms:
    @pytest.mark.parametrize('version', [smtpd.__version__, 'ESMTP ready'])
    def test_the_banner_follows_version_and_is_sent_before_init_returns(
            self, version, monkeypatch):
        monkeypatch.setattr(smtpd, '__version__', version)
        connection = FakeConnection()
        smtpd.SMTPChannel(StubServer(), connection, PEER, map={})
        assert connection.sent == b'220 mx.example %s\r\n' % version.encode()

    def test_async_chat_init_may_be_run_again_after_the_banner(self):
        """As TLS code does."""
        class Channel(smtpd.SMTPChannel):
            def __init__(self, server, conn, addr, *args, **kwargs):
                super().__init__(server, conn, addr, *args, **kwargs)
                asynchat.async_chat.__init__(self, conn, self._map)

        channel = make_channel(channel_class=Channel)
        hold(channel, SESSION, line_by_line)
        assert len(channel.smtp_server.messages) == 2

    @three_ways
    def test_an_overridden_push_sees_every_reply_one_call_a_line(self, way):
        pushed = []

        def push(self, msg):
            pushed.append(msg)
            smtpd.SMTPChannel.push(self, msg)

        hold(channel_with(push=push), SESSION, way)
        assert pushed == ['220 mx.example Python SMTP proxy version 0.3'] + [
            line[3:] for line in SESSION if line.startswith('S: ')]

    def test_push_goes_through_the_class_async_chat(self, monkeypatch):
        pushed = []
        monkeypatch.setattr(asynchat.async_chat, 'push', lambda self, data: pushed.append(data))
        feed(make_channel(), b'NOOP\r\n')
        assert pushed == [b'220 mx.example Python SMTP proxy version 0.3\r\n', b'250 OK\r\n']

    def test_after_ehlo_the_last_line_leaves_alone(self):
        """CPython's suite and others look at the last send()."""
        channel = make_channel()
        feed(channel, b'EHLO x\r\n')
        assert channel.conn.sends[-1] == b'250 HELP\r\n'

    def test_replies_leave_before_the_handler_is_called(self):
        """It may take its time."""
        channel = make_channel()
        sent = []
        channel.smtp_server.process_message = lambda *args, **kwargs: sent.append(
            channel.conn.sent)
        feed(channel, TO_DATA + b'text\r\n.\r\nNOOP\r\n')
        assert sent[0].endswith(READY)

    @pytest.mark.parametrize('is_method', [True, False], ids=['a method', 'an attribute'])
    def test_the_reply_of_a_command_is_on_the_wire_when_the_command_returns(self, is_method):
        """Even if more commands wait: TLS code goes on with the bare socket."""
        sent = []

        def start_tls(channel, arg):
            channel.push('220 go')
            sent.append(channel.conn.sent)

        channel = channel_with(**{'smtp_XTLS': start_tls} if is_method else {})
        if not is_method:
            channel.smtp_XTLS = functools.partial(start_tls, channel)
        feed(channel, b'NOOP\r\nXTLS\r\nNOOP\r\n')
        assert [each[-16:] for each in sent] == [b'250 OK\r\n220 go\r\n']

    def test_a_foreign_state_is_internal_confusion(self):
        channel = make_channel()
        channel.smtp_state = 'BAD STATE'
        assert feed(channel, b'NOOP\r\n') == b'451 Internal confusion\r\n'
        channel.smtp_state = channel.COMMAND
        assert feed(channel, b'NOOP\r\n') == b'250 OK\r\n'

    @pytest.mark.parametrize('spec', [None, smtpd.SMTPServer])
    def test_a_server_may_be_a_mock(self, spec, capsys):
        server = unittest.mock.Mock(spec=spec)
        channel = make_channel(server)
        feed(channel, TO_DATA)
        assert feed(channel, b'text\r\n.\r\n') == b'451 Internal confusion\r\n'  # a Mock is junk
        server.process_message.return_value = None
        assert feed(channel, *FROM_AND_TO, b'DATA\r\n2\r\n.\r\n').endswith(b'250 OK\r\n')
        assert [call[0] for call in server.process_message.call_args_list] == [
            (PEER, 'a@b', ['c@d'], b'text'), (PEER, 'a@b', ['c@d'], b'2')]

    def test_a_connection_may_be_a_mock(self):
        connection = unittest.mock.Mock()
        connection.fileno.return_value = 7
        connection.recv.side_effect = [b'NOOP\r\n', b'QUIT\r\n']
        connection.send.side_effect = len
        channel = smtpd.SMTPChannel(StubServer(), connection, PEER, map={})
        channel.handle_read()
        channel.handle_read()
        assert [call[0][0] for call in connection.send.call_args_list] == [
            b'220 mx.example Python SMTP proxy version 0.3\r\n', b'250 OK\r\n', b'221 Bye\r\n']

    @three_ways
    @both_modes
    def test_methods_work_where_init_never_ran(self, decode_data, way):
        channel = without_init(StubServer(), FakeConnection(), PEER, {}, decode_data)
        hold(channel, [line for line in SESSION
                       if not (decode_data and line == 'S: 250-8BITMIME')], way)
        assert [message[1:4] for message in channel.smtp_server.messages] == 2 * [
            ('sender@example', ['one@example'], in_mode(b'Subject: x\n\ntext', decode_data))]

    def test_two_channels_without_init_share_nothing(self):
        one, other = (without_init(StubServer(), FakeConnection(), PEER, {}) for _ in range(2))
        feed(one, b'EHLO x\r\nMAIL FROM:<a@b> SIZE=1\r\nRCPT TO:<c@d>\r\n')
        assert feed(other, b'MAIL FROM:<a@b>\r\n') == b'503 Error: send HELO first\r\n'
        assert (other.mailfrom, list(other.rcpttos)) == (None, [])

    @three_ways
    @pytest.mark.parametrize('is_method', [True, False], ids=['a method', 'a function'])
    def test_a_hook_may_be_set_in_the_middle_of_a_session(self, is_method, way):
        class Channel(smtpd.SMTPChannel):
            def smtp_AUTH(self, arg):
                self.found_terminator = (self.take_response if is_method
                                         else lambda: self.take_response())
                self.push('334 ')

            def take_response(self):
                self.response = self._emptystring.join(self.received_lines)
                self.received_lines = []
                del self.found_terminator
                self.push('235 Authentication successful')

        channel = make_channel(channel_class=Channel)
        hold(channel, ('C: NOOP', 'S: 250 OK', 'C: AUTH PLAIN', 'S: 334 ',
                       'C: c2VjcmV0', 'S: 235 Authentication successful',
                       'C: NOOP', 'S: 250 OK'), way)
        assert channel.response == b'c2VjcmV0'

    def test_a_hook_finds_the_pieces_of_a_message_in_received_lines(self):
        def collect_incoming_data(self, data):
            smtpd.SMTPChannel.collect_incoming_data(self, data)
            found.append(b''.join(self.received_lines))

        found = []
        channel = channel_with(collect_incoming_data=collect_incoming_data)
        feed(channel, TO_DATA + b'a\r\n..b', b'c')
        assert found[-2:] == [b'a\r\n..b', b'a\r\n..bc']

    def test_a_hook_that_is_patched_in_the_class_is_called(self, monkeypatch):
        hook = unittest.mock.Mock(side_effect=smtpd.SMTPChannel.found_terminator)
        channel = make_channel()
        assert feed(channel, b'NOOP\r\n') == b'250 OK\r\n'
        monkeypatch.setattr(smtpd.SMTPChannel, 'found_terminator', lambda self: hook(self))
        assert feed(channel, b'NOOP\r\n') == b'250 OK\r\n'
        hook.assert_called_once_with(channel)

    @pytest.mark.parametrize('size', [1, 5, 100], ids='in pieces of {}'.format)
    @pytest.mark.parametrize('attributes, sent, answered', TERMINATORS.values(),
                             ids=TERMINATORS.keys())
    def test_another_terminator_is_obeyed(self, attributes, sent, answered, size):
        assert feed(channel_with(**attributes), *in_pieces(sent, size)) == answered

    @pytest.mark.parametrize('chunk, message', [
        (b'one\r\ntwo\r\n.\r\nthree\r\n', b'one\ntwo\n\nthree\n'),
        (b'one\r\n.', b'one\n'), (b'one\r', b'one\r'), (b'..one\r\n.\r\n', b'.one\n\n')], ids=repr)
    @three_ways
    def test_data_may_have_a_terminator_of_its_own(self, chunk, message, way):
        """As BDAT (RFC 3030) has; nothing in it ends the data."""
        def smtp_BDAT(self, arg):
            self.smtp_state = self.DATA
            self.set_terminator(int(arg))

        channel = channel_with(smtp_BDAT=smtp_BDAT)
        feed(channel, TO_DATA[:-len(b'DATA\r\n')])
        assert way(channel, [b'BDAT %d\r\n' % len(chunk), chunk, b'NOOP\r\n']) == 2 * ['S: 250 OK']
        assert [each[3] for each in channel.smtp_server.messages] == [message]

    @pytest.mark.parametrize('hooked', [False, True], ids=['plain', 'with hooks'])
    def test_a_command_may_throw_the_rest_of_the_input_away(self, hooked):
        """STARTTLS has to (CVE-2024-34083)."""
        def smtp_STARTTLS(self, arg):
            self.rest = self.ac_in_buffer
            self.ac_in_buffer = b''
            self.push('220 go ahead')

        channel = make_channel(channel_class=variant(
            HookedChannel if hooked else smtpd.SMTPChannel, smtp_STARTTLS=smtp_STARTTLS))
        assert feed(channel, b'NOOP\r\nSTARTTLS\r\nRSET\r\nNOO', b'NOOP\r\n') == (
            b'250 OK\r\n220 go ahead\r\n250 OK\r\n')
        assert channel.rest == b'RSET\r\nNOO'

    def test_the_size_of_a_read_is_asynchats(self, monkeypatch):
        monkeypatch.setattr(asynchat.async_chat, 'ac_in_buffer_size', 5)
        channel = make_channel()
        channel.conn.recv = unittest.mock.Mock(side_effect=channel.conn.recv)
        feed(channel, b'NOOP\r\nNOOP\r\n')
        assert {call[0][0] for call in channel.conn.recv.call_args_list} == {5}

    @pytest.mark.parametrize('old, new', [
        ('server', 'smtp_server'), ('line', 'received_lines'), ('state', 'smtp_state'),
        ('greeting', 'seen_greeting'), ('mailfrom', 'mailfrom'), ('rcpttos', 'rcpttos'),
        ('data', 'received_data'), ('fqdn', 'fqdn'), ('peer', 'peer'), ('conn', 'conn'),
        ('addr', 'addr')])
    def test_the_old_private_names_warn_and_go_through(self, old, new):
        channel, value = make_channel(), object()
        text = '__%s attribute .*%r instead$' % (old, new)
        with pytest.warns(DeprecationWarning, match='Setting ' + text) as setting:
            setattr(channel, '_SMTPChannel__' + old, value)
        assert getattr(channel, new) is value
        with pytest.warns(DeprecationWarning, match='Access to ' + text) as access:
            assert getattr(channel, '_SMTPChannel__' + old) is value
        assert {warning.filename for warning in [*setting, *access]} == {__file__}

    def test_debugstream_may_be_replaced_at_run_time(self, monkeypatch):
        text = []
        monkeypatch.setattr(smtpd, 'DEBUGSTREAM', types.SimpleNamespace(write=text.append))
        channel = make_channel()
        feed(channel, TO_DATA + b'text\r\n.\r\n' + TO_DATA[8:] + b'1\r\n')
        monkeypatch.setattr(smtpd, 'DEBUGSTREAM', smtpd.Devnull())
        assert feed(channel, b'2\r\n.\r\nNOOP\r\n') == b'250 OK\r\n250 OK\r\n'
        assert channel.received_data == b'1\n2'
        transaction = [
            "Data: b'MAIL FROM:<a@b>'", '===> MAIL FROM:<a@b>', 'sender: a@b',
            "Data: b'RCPT TO:<c@d>'", '===> RCPT TO:<c@d>', "recips: ['c@d']", "Data: b'DATA'"]
        assert ''.join(text).splitlines() == [
            'Peer: %r' % (PEER,), "Data: b'EHLO x'", *transaction, "Data: b'text'", *transaction]

    @pytest.mark.parametrize('error', [OSError(errno.EPIPE, 'gone'), ValueError('closed')],
                             ids=repr)
    def test_a_debugstream_that_is_gone_does_no_harm(self, error, monkeypatch, capsys):
        monkeypatch.setattr(smtpd, 'DEBUGSTREAM', unittest.mock.Mock(
            **{'write.side_effect': error}))
        assert feed(make_channel(), TO_DATA + b'x\r\n.\r\n').endswith(READY + b'250 OK\r\n')
        assert capsys.readouterr() == ('', '')

    def test_new_commands_by_new_methods(self):
        hold(channel_with(smtp_XFOO=lambda self, arg: self.push('250 foo %r' % (arg,))), (
            'C: XFOO', 'S: 250 foo None', 'C: xfoo a  b ', "S: 250 foo 'a  b'"), line_by_line)

    def test_a_listen_of_ones_own(self):
        backlogs = []

        def listen(self, num):
            backlogs.append(num)
            smtpd.SMTPServer.listen(self, 3)

        variant(listen=listen)(map={}).close()
        assert backlogs == [1024]

    def test_arguments_of_the_server_are_found_under_their_old_names(self):
        sockets = {}
        server = smtpd.SMTPServer(('127.0.0.1', 0), ('upstream', 25), map=sockets,
                                  decode_data=True)
        with contextlib.closing(server):
            assert server._localaddr == ('127.0.0.1', 0)
            assert server._remoteaddr == ('upstream', 25)
            assert server._decode_data is True and server._map is sockets
            assert list(sockets.values()) == [server]


# ---------------------------------------------------------------------------
# A real socket with raw octets

class TestSocket:
    @pytest.mark.parametrize('use_poll', [False, True], ids=['select', 'poll'])
    @in_map_and_selector
    @both_modes
    def test_a_session(self, decode_data, use_poll):
        with serving(use_poll=use_poll,
                     decode_data=decode_data) as server, greet(server) as client:
            host, port = client.socket.getsockname()
            client.send(ONE_MESSAGE)
            assert read_replies(client, 5) == ANSWERED
            assert client.say(b'QUIT') == b'221 Bye\r\n'
            assert client.rest() == b''
            assert [message[:4] for message in server.messages] == [
                ((host, port), 'a@b', ['c@d'], in_mode(b'text', decode_data))]

    @in_map_and_selector
    @pytest.mark.parametrize('host, reached', [
        ('', '127.0.0.1'), (None, '127.0.0.1'), ('::1', '::1')])
    def test_no_host_is_all_interfaces_and_ipv6(self, host, reached):
        with serving(localaddr=(host, 0)) as server:
            with greet((reached, server.port_number)) as client:
                client.send(ONE_MESSAGE + b'QUIT\r\n')
                assert client.rest() == ANSWERED + b'221 Bye\r\n'
            assert server.messages[0][0][0] == reached

    @in_map_and_selector
    @both_modes
    def test_a_message_of_many_reads(self, decode_data):
        body = b'.' + b'0123456789' * 7 + b'\r\n'
        with serving(decode_data=decode_data) as server:
            with greet(server) as client:
                client.send(ONE_MESSAGE[:-9] + (b'.' + body) * 60_000 + b'.\r\nQUIT\r\n')
                assert client.rest() == ANSWERED + b'221 Bye\r\n'
            assert server.messages[0][3] == in_mode((body[:-2] + b'\n') * 60_000, decode_data)[:-1]


class TestEndOfSession:
    @in_map_and_selector
    @pytest.mark.parametrize('threads', [0, 2], ids='{} threads'.format)
    @pytest.mark.parametrize('sent, answered, messages', [
        (b'', b'', 0),
        (b'NOOP\r\nNO', b'250 OK\r\n', 0),
        (ONE_MESSAGE, ANSWERED, 1),
        (ONE_MESSAGE + b'QUIT\r\n', ANSWERED + b'221 Bye\r\n', 1),
        (2 * ONE_MESSAGE,
         ANSWERED + b'503 Duplicate HELO/EHLO\r\n' + TRANSACTION_ANSWERED, 2),
        (ONE_MESSAGE[:-1], ANSWERED_TO_DATA, 0),
        (ONE_MESSAGE[:-5], ANSWERED_TO_DATA, 0),
    ], ids=['nothing', 'half a command', 'a message', 'a message and QUIT', 'two messages',
            'a message without its last octet', 'a message without its last dot'])
    def test_after_half_close_what_was_received_is_answered(
            self, sent, answered, messages, threads, capsys):
        """As `nc < file` needs it."""
        server_class = variant(process_message_threads=threads)
        with serving(server_class) as server:
            with RawClient(server) as client:
                client.send(sent)
                shut(client)
                assert client.rest() == BANNER + answered
            assert len(server.messages) == messages
            assert is_served(server)
        assert capsys.readouterr() == ('', '')

    @in_map_and_selector
    @pytest.mark.parametrize('threads', [0, 2], ids='{} threads'.format)
    @pytest.mark.parametrize('sent, read, messages', [
        (b'', 0, 0), (b'', 1, 0), (b'HELO x', 1, 0), (b'HELO x\r\n', 2, 0),
        (ONE_MESSAGE[:25], 3, 0), (ONE_MESSAGE[:-9], 5, 0), (ONE_MESSAGE[:-6], 5, 0),
        (ONE_MESSAGE[:-1], 5, 0), (ONE_MESSAGE, 6, 1), (ONE_MESSAGE + b'QUIT\r\n', 7, 1),
    ], ids=['before the banner', 'after the banner', 'in a command', 'after HELO', 'after MAIL',
            'after DATA', 'in data', 'in the final dot', 'after the message', 'after QUIT'])
    def test_after_a_reset_nothing_is_half_delivered(
            self, sent, read, messages, threads, capsys):
        server_class = variant(process_message_threads=threads)
        with serving(server_class) as server:
            client = RawClient(server)
            client.send(sent)
            for _ in range(read):
                client.reply()
            reset(client)
            assert is_served(server)
            assert len(server.messages) == messages
            assert [type(each) for each in server._map.values()].count(server.channel_class) == 0
        assert capsys.readouterr() == ('', '')

    @in_map_and_selector
    @pytest.mark.parametrize('sent, answered', [
        (b'NOOP\r\nNO', b'250 OK\r\n'), (ONE_MESSAGE[:-6], ANSWERED_TO_DATA)],
        ids=['in a command', 'in data'])
    @pytest.mark.parametrize('closed', [False, True], ids=['', 'the server is closed'])
    def test_idle_sessions_end_with_421(self, closed, sent, answered, clock):
        with turning() as (server, turn), RawClient(server) as client:
            client.send(sent)
            assert turn(until=lambda: has_input(client)) and client.reply() == BANNER
            turn(at_most=5)
            if closed:
                server.close()
            clock.seconds += 301
            assert turn(until=lambda: not channels_of(server))
            assert client.rest() == answered + TIMED_OUT and server.messages == []

    @in_map_and_selector
    @pytest.mark.parametrize('channel', [
        {}, {'handle_close': lambda self: self.close()}], ids=['plain', 'own handle_close'])
    @pytest.mark.parametrize('sent', [b'', b'HELP\r\n' * 700], ids=['at rest', 'replies wait'])
    def test_an_idle_client_that_is_gone_does_not_end_the_loop(self, sent, channel, clock):
        class Server(variant(channel=channel)):
            def process_message(self, *args, **kwargs):
                reset(gone)
                clock.seconds += 1000

        with turning(Server) as (server, turn):
            gone = small_buffers(server, 4000)
            gone.send(sent)
            turn(at_most=5)
            if sent:
                shut(gone)
                turn(at_most=5)
            with RawClient(server) as client:
                client.send(ONE_MESSAGE + b'QUIT\r\n')
                turn(at_most=10)
                assert client.rest() == BANNER + ANSWERED + b'221 Bye\r\n'
            turn(at_most=5)
            assert len(server._map) == 1

    @in_map_and_selector
    def test_an_idle_client_that_does_not_even_read_is_shut_off(self, clock):
        with turning() as (server, turn), small_buffers(server):
            turn(at_most=5)
            [channel] = channels_of(server)
            channel.push('250 ' + 50_000_000 * 'x')
            turn(at_most=10)
            assert channel.producer_fifo and len(server._map) == 2
            for _ in range(5):
                clock.seconds += 301
                turn(at_most=5)
            assert len(server._map) == 1

    @pytest.mark.parametrize('replies, times', [(0, 2), (1, 1)])
    def test_an_idle_client_that_cannot_even_be_told_is_shut_off(self, replies, times, clock):
        channel = make_channel()
        channel.conn.shutdown, channel.conn.sends_at_most = unittest.mock.Mock(), 0
        for _ in range(replies):
            channel.push('250 OK')
        for _ in range(times):
            clock.seconds += 301
            channel.readable()
        channel.conn.shutdown.assert_called_once_with(socket.SHUT_RDWR)

    def test_a_client_that_reads_its_replies_is_not_idle(self, clock):
        channel = make_channel()
        channel.conn.shutdown, channel.conn.sends_at_most = unittest.mock.Mock(), 1
        channel.push('250 OK')
        for _ in range(3):
            clock.seconds += 200
            channel.readable()
            asyncore.write(channel)
        channel.conn.shutdown.assert_not_called()

    @in_map_and_selector
    def test_what_is_pushed_to_a_session_at_rest_leaves_at_once(self, monkeypatch):
        with turning() as (server, turn), RawClient(server) as client:
            assert turn(until=lambda: has_input(client)) and client.reply() == BANNER
            turn(at_most=3)
            monkeypatch.setattr('time.monotonic', lambda: 0)
            [channel] = channels_of(server)
            channel.push('250 ' + 30_000_000 * 'x')
            channel.close_when_done()
            assert count_lines(client, turn) == 1

    @in_map_and_selector
    def test_a_channel_that_fails_to_say_421_does_not_end_the_loop(self, clock, capsys):
        def push(self, msg):
            if msg.startswith('421'):
                raise ZeroDivisionError
            smtpd.SMTPChannel.push(self, msg)

        server_class = variant(channel={'push': push})
        with turning(server_class) as (server, turn), RawClient(server) as client:
            assert turn(until=lambda: has_input(client)) and client.reply() == BANNER
            clock.seconds += 301
            assert turn(until=lambda: has_input(client)) and client.rest() == b''
            assert len(server._map) == 1
        assert 'ZeroDivisionError' in capsys.readouterr().err

    def test_a_channel_with_an_init_of_its_own_is_not_idle_from_the_start(self, clock):
        def make(server, conn, addr, data_size_limit, map, *args):
            without_init(server, conn, addr, map).push('220 own')

        clock.seconds += 1000
        with turning(variant(channel_class=staticmethod(make))) as (server, turn), \
                RawClient(server) as client:
            assert turn(until=lambda: has_input(client)) and client.reply() == b'220 own\r\n'
            turn(at_most=2)  # the loop gets to know it
            clock.seconds += 290
            assert not turn(until=lambda: has_input(client), at_most=5)
            clock.seconds += 20
            assert turn(until=lambda: has_input(client)) and client.rest() == TIMED_OUT

    @in_map_and_selector
    @pytest.mark.parametrize('limit, seconds, is_closed', [
        (300, 290, False), (300, 310, True), (None, 1e6, False), (70, 60, False), (70, 80, True)])
    def test_the_limit_of_idle_time(self, limit, seconds, is_closed, clock):
        server_class = variant(channel={'idle_timeout_seconds': limit})
        with turning(server_class) as (server, turn), RawClient(server) as client:
            assert turn(until=lambda: has_input(client)) and client.reply() == BANNER
            turn(at_most=3)
            clock.seconds = seconds
            assert turn(until=lambda: has_input(client), at_most=10) is is_closed
            if not is_closed:
                client.send(b'NOOP\r\n')
                assert turn(until=lambda: has_input(client)) and client.reply() == b'250 OK\r\n'
                clock.seconds += seconds  # counted again after each sign of life
                assert not turn(until=lambda: has_input(client), at_most=10)


class TestServerStaysUp:
    @in_map_and_selector
    def test_a_client_that_does_not_read_is_not_read_from(self):
        """It sends until the network is full, not until our memory is."""
        with turning() as (server, turn), small_buffers(server) as client:
            client.socket.setblocking(False)
            block, sent, blocked = b'HELP\r\n' * 4000, 0, 0
            while blocked < 5 and sent < 50_000_000:
                try:
                    sent += client.socket.send(block[sent % len(block):])
                    blocked = 0
                except BlockingIOError:
                    blocked += 1
                turn(at_most=2)
            assert sent < 50_000_000
            [channel] = channels_of(server)
            assert sum(map(len, channel.producer_fifo)) < 200_000
            replies = len(channel.producer_fifo)
            turn(at_most=5)
            assert len(channel.producer_fifo) <= replies  # nor are its commands executed
            shut(client)
            assert count_lines(client, turn) == 1 + sent // 6  # none is lost

    @in_map_and_selector
    def test_an_out_of_band_byte_does_not_keep_the_loop_busy(self):
        with turning() as (server, turn), RawClient(server) as client:
            assert turn(until=lambda: has_input(client)) and client.reply() == BANNER
            client.socket.send(b'!', socket.MSG_OOB)
            turn(at_most=4)
            descriptors = list(server._map)
            writing = [number for number in descriptors if server._map[number].writable()]
            assert select.select(descriptors, writing, descriptors, 0) == ([], [], [])
            client.send(b'NOOP\r\n')
            assert turn(until=lambda: has_input(client)) and client.reply() == b'250 OK\r\n'

    @in_map_and_selector
    def test_a_readable_of_the_programs_own_is_asked_at_each_turn(self):
        def readable(self):
            asked.append(self)
            return smtpd.SMTPChannel.readable(self)

        asked = []
        with turning(variant(channel={'readable': readable})) as (server, turn), RawClient(server):
            assert turn(until=lambda: asked)
            del asked[:]
            turn(at_most=3)
            assert len(asked) == 3

    @in_map_and_selector
    def test_several_connections_are_accepted_at_a_wake_up_but_not_without_end(self):
        class Server(variant(accepts_per_event=3)):
            accepted = 0

            def handle_accepted(self, conn, addr):
                self.accepted += 1
                super().handle_accepted(conn, addr)

        with turning(Server) as (server, turn), contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(RawClient(server))
            turn(at_most=1)
            assert server.accepted == 3
            assert turn(until=lambda: server.accepted == 5)

    @pytest.mark.parametrize('number, attempts', [
        *((each, 5) for each in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)),
        *((each, None) for each in (errno.ECONNABORTED, errno.EAGAIN, errno.EPROTO, errno.EPERM,
                                    errno.ENETDOWN, errno.EHOSTUNREACH))],
        ids=lambda each: errno.errorcode.get(each, ''))
    def test_the_listener_outlives_any_error(self, number, attempts, capsys):
        with turning() as (server, turn), RawClient(server) as client:
            real = server.socket
            server.socket = failing_listener(server, number)
            turn(at_most=5)
            assert attempts in (None, server.socket.accept.call_count)
            server.socket = real
            assert turn(until=lambda: has_input(client)) and client.reply() == BANNER
        assert ('no resources' in capsys.readouterr().err) is (attempts is not None)

    @pytest.mark.parametrize('name', [
        'mx.ex\xe4mple', '\udcff', UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'bad'),
        OSError('no')], ids=['not ASCII', 'not Unicode', 'cannot be decoded', 'cannot be found'])
    def test_whatever_getfqdn_says_the_banner_goes_out(self, name, monkeypatch):
        monkeypatch.setattr(socket, 'getfqdn', unittest.mock.Mock(
            side_effect=itertools.repeat(name)))
        with serving() as server, RawClient(server) as client:
            banner = client.reply()
            assert re.fullmatch(rb'220 [!-~]+ Python SMTP proxy version 0.3\r\n', banner)
            assert isinstance(name, str) or banner.split()[1] == b'localhost'
            assert re.fullmatch(rb'250 [!-~]+\r\n', client.say(b'HELO x'))

    def test_getfqdn_is_asked_once_a_server(self, monkeypatch):
        """It can take seconds."""
        monkeypatch.setattr(socket, 'getfqdn', unittest.mock.Mock(return_value=FQDN))
        with serving() as server:
            for _ in range(3):
                assert is_served(server)
        assert socket.getfqdn.call_count == 1

    @in_map_and_selector
    @pytest.mark.parametrize('by_itself', [False, True], ids=['twice', 'and then by itself'])
    @pytest.mark.parametrize('threads', [0, 2], ids='{} threads'.format)
    def test_close_from_another_thread_while_a_handler_is_busy(self, threads, by_itself):
        class Server(WaitingServer):
            process_message_threads = threads

            def process_message(self, *args, **kwargs):
                super().process_message(*args, **kwargs)
                if by_itself:
                    self.close()

        with looping(Server) as server, greet(server) as client:
            client.send(ONE_MESSAGE + b'QUIT\r\n')
            server.wait_until_entered()
            server.close()
            server.close()
            server.go.set()
            assert client.rest() == ANSWERED + b'221 Bye\r\n'

    @in_map_and_selector
    def test_a_server_may_close_when_it_has_one_client(self, capsys):
        def handle_accepted(self, conn, addr):
            smtpd.SMTPServer.handle_accepted(self, conn, addr)
            self.close()

        server_class = variant(handle_accepted=handle_accepted)
        with turning(server_class) as (server, turn), RawClient(server) as client:
            client.send(ONE_MESSAGE + b'QUIT\r\n')
            turn(until=lambda: not server._map)
            assert client.rest() == BANNER + ANSWERED + b'221 Bye\r\n'
        assert capsys.readouterr() == ('', '')

    @in_map_and_selector
    @pytest.mark.parametrize('threads', [0, 2], ids='{} threads'.format)
    def test_nothing_else_stays_in_the_map(self, threads, selector):
        """`while asyncore.socket_map:` ends when the last server and channel are closed."""
        server_class = variant(process_message_threads=threads)
        with looping(server_class) as server, greet(server) as client:
            client.send(ONE_MESSAGE)
            assert read_replies(client, 5) == ANSWERED
            assert is_served(server)
            assert len(server._map) == 2
            assert (list(map(type, server._map.values()))[1] is smtpd.SMTPChannel) is not (
                selector and hasattr(select, 'epoll'))
            server.close()
            assert client.say(b'NOOP') == b'250 OK\r\n'
            assert client.say(b'QUIT') == b'221 Bye\r\n'


# ---------------------------------------------------------------------------
# Handler threads

class NotingChannel(smtpd.SMTPChannel):
    """Notes what is executed, and in which thread replies are pushed."""

    def smtp_XNOTE(self, arg):
        self.smtp_server.notes.append(arg)
        self.push('250 noted')

    def push(self, msg):
        self.smtp_server.pushing_threads.add(threading.get_ident())
        super().push(msg)


@in_map_and_selector
class TestHandlerThreads:
    @contextlib.contextmanager
    def serving(self, **attributes):
        server_class = variant(WaitingServer, **{
            'channel_class': NotingChannel, 'notes': [], 'pushing_threads': set(), **attributes})
        with serving(server_class) as server:
            try:
                yield server
            finally:
                server.go.set()

    def test_the_session_waits_unread_and_replies_keep_their_order(self):
        with self.serving() as server, greet(server) as client:
            client.send(ONE_MESSAGE + b'XNOTE 1\r\n' + TRANSACTION
                        + b'2\r\n.\r\nXNOTE 2\r\nFOO\r\nQUIT\r\nXNOTE 3\r\n')
            server.wait_until_entered()
            assert is_served(server)
            assert server.notes == [] and server.messages == []
            server.go.set()
            assert client.rest() == ANSWERED + b'250 noted\r\n' + TRANSACTION_ANSWERED + (
                b'250 noted\r\n500 Error: command "FOO" not recognized\r\n221 Bye\r\n')
            assert server.notes == ['1', '2']
            assert [message[3] for message in server.messages] == [b'text', b'2']

    def test_the_loop_sleeps_though_a_client_sends_while_its_handler_works(self, selector):
        with turning(WaitingServer) as (server, turn), RawClient(server), \
                RawClient(server) as client:
            server.go.set()
            client.send(ONE_MESSAGE)
            assert turn(until=lambda: server.messages)
            turn(at_most=3)
            server.go.clear()
            assert server.entered.acquire()
            client.send(TRANSACTION + b'text\r\n.\r\n')
            assert turn(until=lambda: server.entered.acquire(blocking=False))
            client.send(b'NOOP\r\n')
            turn(at_most=3)
            client.send(b'NOOP\r\n')  # nobody reads it, either
            asks = [[number for number, each in list(server._map.items()) if getattr(each, name)()]
                    for name in ('readable', 'writable')]
            assert select.select(*asks, [], 0) == ([], [], [])
            server.go.set()

    @pytest.mark.parametrize('threads', [1, 2])
    def test_there_are_no_more_threads_than_asked_for(self, threads):
        with self.serving(process_message_threads=threads) as server, \
                contextlib.ExitStack() as stack:
            clients = [stack.enter_context(greet(server)) for _ in range(5)]
            for client in clients:
                client.send(ONE_MESSAGE + b'QUIT\r\n')
            for _ in range(threads):
                server.wait_until_entered()
            assert is_served(server) and len(server.threads) == threads
            server.go.set()
            for client in clients:
                assert client.rest() == ANSWERED + b'221 Bye\r\n'
            assert len(server.messages) == 5

    @pytest.mark.parametrize('leave', [reset, RawClient.close, shut],
                             ids=['reset', 'closed', 'half-closed'])
    def test_a_client_that_is_gone_meanwhile(self, leave, capsys):
        with self.serving() as server:
            clients = [RawClient(server) for _ in range(2)]  # as many as there are threads
            for client in clients:
                client.send(ONE_MESSAGE + b'XNOTE 1\r\n')
                assert client.reply() == BANNER
                server.wait_until_entered()
            channels = channels_of(server)
            for client in clients:
                leave(client)
            assert is_served(server)
            server.go.set()
            while any(channel.connected for channel in channels):
                assert is_served(server)
            for client in clients:
                if leave is shut:
                    assert client.rest() == ANSWERED + b'250 noted\r\n'
                client.close()
            server.go.clear()
            with greet(server) as client:  # no thread is lost
                client.send(ONE_MESSAGE + b'QUIT\r\n')
                server.wait_until_entered()
                assert is_served(server)
                server.go.set()
                assert client.rest() == ANSWERED + b'221 Bye\r\n'
            assert len(server.messages) == 3
        assert capsys.readouterr() == ('', '')

    def test_handle_error_of_a_handler_that_raised_runs_in_the_loop(self, capsys):
        found = []

        def handle_error(self):
            found.append((threading.get_ident(), sys.exc_info()[0]))
            smtpd.SMTPChannel.handle_error(self)

        channel_class = variant(
            NotingChannel, handle_error=handle_error, unsent_reply_limit=None,
            smtp_XLONG=lambda self, arg: self.push('250 ' + 1_000_000 * 'x'))
        with self.serving(channel_class=channel_class) as server, small_buffers(server) as client:
            server.reply = ZeroDivisionError('in a thread')
            client.send(b'XLONG\r\n' + ONE_MESSAGE + b'XNOTE\r\n')
            server.wait_until_entered()
            # Replies that leave only now are none to the message, and let nothing else begin.
            assert read_replies(client, 6).endswith(b'x\r\n' + ANSWERED_TO_DATA)
            server.go.set()
            assert read_replies(client, 2) == b'451 Internal confusion\r\n250 noted\r\n'
            server.reply = None
            client.send(TRANSACTION + b'2\r\n.\r\nQUIT\r\n')
            assert client.rest() == TRANSACTION_ANSWERED + b'221 Bye\r\n'
            [loop] = server.pushing_threads
        assert found == [(loop, ZeroDivisionError)]
        out, err = capsys.readouterr()
        assert out == '' and 'Traceback' in err and 'ZeroDivisionError: in a thread' in err
        assert 'process_message' in err

    @pytest.mark.parametrize('threads', [0, 2], ids='{} threads'.format)
    def test_a_handler_may_close_its_server(self, threads):
        def process_message(self, *args, **kwargs):
            self.close()
            return '250 closed'

        server_class = variant(process_message_threads=threads,
                               process_message=process_message)
        with looping(server_class) as server, greet(server) as client:
            client.send(ONE_MESSAGE + b'QUIT\r\n')
            assert client.rest() == ANSWERED_TO_DATA + b'250 closed\r\n221 Bye\r\n'

    def test_idle_time_does_not_count_while_a_handler_runs(self, clock):
        with self.serving() as server, RawClient(server) as idle, RawClient(server) as client:
            client.send(ONE_MESSAGE)
            server.wait_until_entered()
            clock.seconds += 301
            assert idle.rest() == BANNER + TIMED_OUT
            server.go.set()
            assert read_replies(client, 6) == BANNER + ANSWERED
            assert is_served(server)  # turns of the loop
            assert client.say(b'NOOP') == b'250 OK\r\n' and is_served(server)
            clock.seconds += 301
            assert client.rest() == TIMED_OUT


# ---------------------------------------------------------------------------
# Programs that override, on a real socket

def counting(base, hook, calls):
    """The class, with one method overridden that counts its calls."""
    def method(self, *args, **kwargs):
        calls.append(args)
        return getattr(super(derived, self), hook)(*args, **kwargs)

    derived = type(base.__name__, (base,), {hook: method})
    return derived


class FailingServer(RecordingServer):
    """Fails for one recipient."""

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        if rcpttos == ['fail@example']:
            raise ZeroDivisionError
        return super().process_message(peer, mailfrom, rcpttos, data, **kwargs)


def hold_sessions(server_class, **kwargs):
    """Some sessions of all kinds: all that the clients saw, and the messages."""
    wire = b'EHLO x\r\n' + TRANSACTION + b'a\r\n..b\r\n\xc3\xa9\r\n.\r\n' + TRANSACTION.replace(
        b'c@d', b'fail@example') + b'x\r\n.\r\nFOO\r\nNOOP\r\n' + TRANSACTION + b'2\r\n.\r\n'
    texts = []
    with serving(server_class, **kwargs) as server:
        for last in (b'QUIT\r\n', b''):
            for pieces in ([wire], in_pieces(wire, 5)):
                with RawClient(server) as client:
                    for piece in pieces + [last]:
                        client.send(piece)
                    shut(client)
                    texts.append(client.rest())
        return texts, [message[1:] for message in server.messages]


@functools.lru_cache(maxsize=None)
def hold_plain_sessions(decode_data):
    return hold_sessions(FailingServer, decode_data=decode_data)


class TestHooks:
    @in_map_and_selector
    @both_modes
    @pytest.mark.parametrize('hook', '''collect_incoming_data found_terminator get_terminator
        set_terminator push handle_read handle_close readable writable
        handle_accept handle_accepted recv send close close_when_done log_info handle_read_event
        initiate_send'''.split())
    def test_an_overridden_hook_is_called_and_changes_nothing(
            self, hook, decode_data, capsys):
        calls = []
        plain = hold_plain_sessions(decode_data)
        if hook.startswith('handle_accept'):
            server_class = counting(FailingServer, hook, calls)
        else:
            server_class = variant(
                FailingServer, channel_class=counting(smtpd.SMTPChannel, hook, calls))
        assert hold_sessions(server_class, decode_data=decode_data) == plain
        assert len(calls) >= 2  # close_when_done: two of the sessions end with QUIT
        assert [text.count(b'451 Internal confusion') for text in plain[0]] == [1, 1, 1, 1]
        assert len(plain[1]) == 8

    @in_map_and_selector
    @pytest.mark.parametrize('is_patched', [False, True], ids=['a mixin', 'patched'])
    @pytest.mark.parametrize('hook', '''close handle_close handle_read readable log_info
        handle_error initiate_send send recv'''.split())
    def test_a_hook_of_asyncore_or_asynchat_is_called(
            self, hook, is_patched, monkeypatch, capsys):
        """In a mixin after SMTPChannel, or patched into their class, as zope.server does."""
        def method(self, *args, **kwargs):
            calls.append(type(self))
            return inherited(self, *args, **kwargs)

        calls = []
        owner = next(each for each in asynchat.async_chat.__mro__ if hook in vars(each))
        inherited = vars(owner)[hook]
        bases = smtpd.SMTPChannel,
        if is_patched:
            monkeypatch.setattr(owner, hook, method)
        else:
            bases += type('Mixin', (owner,), {hook: method}),
        channel_class = type('Channel', bases, {'smtp_XFAIL': fail})
        with serving(variant(channel_class=channel_class)) as server, greet(server) as client:
            client.send(b'XFAIL\r\nQUIT\r\n')
            client.rest()
        assert channel_class in calls

    @pytest.mark.parametrize('hook', ['close', 'log_info', 'handle_error'])
    def test_a_hook_in_a_mixin_after_the_server_is_called(self, hook, capsys):
        calls = []
        mixin = counting(asyncore.dispatcher, hook, calls)
        server_class = type('Server', (RecordingServer, mixin), {'channel_class': fail})
        with serving(server_class) as server, RawClient(server) as client:
            assert client.rest() == b''
        assert calls


class TestProgramsOnASocket:
    @in_map_and_selector
    def test_a_handle_accept_of_python_2(self):
        class Server(RecordingServer):
            def handle_accept(self):
                pair = self.accept()
                if pair is not None:
                    conn, addr = pair
                    smtpd.SMTPChannel(self, conn, addr, self.data_size_limit_of_ours, self._map)

            data_size_limit_of_ours = 1000

        with serving(Server) as server, greet(server) as client:
            assert b'SIZE 1000' in client.say(b'EHLO x')
            assert is_served(server)

    @in_map_and_selector
    def test_the_accept_path(self):
        """handle_accept -> handle_accepted(conn, addr) -> channel_class, seven arguments."""
        calls = []

        class Channel(smtpd.SMTPChannel):
            def __init__(self, *args, **kwargs):
                calls.append((args, kwargs))
                super().__init__(*args, **kwargs)

        class Server(RecordingServer):
            def handle_accepted(self, conn, addr):
                calls.append((conn, addr))
                super().handle_accepted(conn, addr)

            def __init__(self, *args, **kwargs):
                self.channel_class = Channel  # may be set on the instance, before __init__
                self.enable_SMTPUTF8 = 'of our own'
                self.host = self.port = self.queue = self.session = 'any attribute may be'
                super().__init__(*args, **kwargs)

        with serving(Server, data_size_limit=99, enable_SMTPUTF8=True) as server:
            with greet(server) as client:
                (conn, addr), (args, kwargs) = calls
                assert addr == client.socket.getsockname()
                assert args == (server, conn, addr, 99, server._map, True, False) and kwargs == {}

    @in_map_and_selector
    def test_a_channel_class_that_accepts_three_arguments(self):
        """As those of Python 2; it lives in the global map, as all that asyncore made once."""
        class ThreeArguments(smtpd.SMTPChannel):
            def __init__(self, server, conn, addr):
                smtpd.SMTPChannel.__init__(self, server, conn, addr)

        assert asyncore.socket_map == {}
        server_class = variant(channel_class=ThreeArguments)
        with turning(server_class, map=None) as (server, turn), RawClient(server) as client:
            client.send(ONE_MESSAGE)
            assert turn(until=lambda: server.messages)
            assert client.reply() == BANNER
        assert asyncore.socket_map == {}

    @in_map_and_selector
    def test_a_channel_lives_in_the_map_that_it_is_given(self):
        sockets = {}
        with contextlib.closing(RecordingServer(map={})) as server:
            channel = smtpd.SMTPChannel(server, FakeConnection(), PEER, map=sockets)
        assert list(sockets.values()) == [channel]

    def test_a_server_that_is_a_thread_too(self):
        class Server(threading.Thread, RecordingServer):
            def __init__(self):
                threading.Thread.__init__(self, name='a name', daemon=True)
                self.sockets = {}
                RecordingServer.__init__(self, map=self.sockets)

            def run(self):
                asyncore.loop(map=self.sockets)

        server = Server()
        server.start()
        assert is_served(server)
        server.close()
        server.join(20)
        assert not server.is_alive() and server.name == 'a name'

    @in_map_and_selector
    @pytest.mark.parametrize('exception', [asyncore.ExitNow, KeyboardInterrupt, SystemExit])
    def test_exit_now_in_a_command_leaves_the_loop(self, exception):
        def smtp_XEND(self, arg):
            raise exception

        server_class = variant(channel={'smtp_XEND': smtp_XEND})
        with turning(server_class) as (server, turn), RawClient(server) as client:
            client.send(b'NOOP\r\nXEND\r\nNOOP\r\n')
            with pytest.raises(exception):
                turn()
            asyncore.close_all(server._map)
            assert client.rest() == BANNER + b'250 OK\r\n'

    def test_exit_now_leaves_the_loop_while_a_connection_is_set_up(self):
        def handle_accepted(self, conn, addr):
            conn.close()
            raise asyncore.ExitNow

        with turning(variant(handle_accepted=handle_accepted)) as (server, turn):
            with RawClient(server), pytest.raises(asyncore.ExitNow):
                turn()


# ---------------------------------------------------------------------------
# smtplib, the independent client

@contextlib.contextmanager
def smtp_client(server):
    with smtplib.SMTP(*server.socket.getsockname()[:2], local_hostname='client.example',
                      timeout=20) as client:
        yield client


@in_map_and_selector
class TestSmtplib:
    @both_modes
    def test_sendmail(self, decode_data):
        recipients = ['c@d.example', 'e@f.example']
        text = 'Subject: x\r\n\r\n.dot\r\n..dots\r\n\r\ntext\r\n.\r\n'
        with serving(decode_data=decode_data) as server:
            with smtp_client(server) as client:
                for _ in range(2):
                    assert client.sendmail('a@b.example', recipients, text) == {}
                assert client.quit() == (221, b'Bye')
            data = in_mode(b'Subject: x\n\n.dot\n..dots\n\ntext\n.', decode_data)
            assert [message[1:4] for message in server.messages] == 2 * [
                ('a@b.example', recipients, data)]
            keywords = {'mail_options': ['SIZE=%d' % len(text)], 'rcpt_options': []}
            assert server.messages[0][4] == ({} if decode_data else keywords)

    def test_a_message_with_international_addresses(self):
        message = email_message('\xfc@b.example', 'caf\xe9')
        with serving(enable_SMTPUTF8=True) as server:
            with smtp_client(server) as client:
                assert client.send_message(message) == {}
            [(_, mailfrom, rcpttos, data, keywords)] = server.messages
            assert (mailfrom, rcpttos) == ('\xfc@b.example', ['to@example.org'])
            assert {'BODY=8BITMIME', 'SMTPUTF8'} < set(keywords['mail_options'])
            assert 'caf\xe9' in data.decode()


def email_message(sender, text):
    import email.message
    import email.policy
    message = email.message.EmailMessage(email.policy.SMTPUTF8)
    message['From'], message['To'], message['Subject'] = sender, 'to@example.org', text
    message.set_content(text + '\n', cte='8bit')
    return message


# ---------------------------------------------------------------------------
# DebuggingServer

PRINTED = {
    'bytes': (b'A: b\n\nx\n\n..', {}, "b'A: b'\nb'X-Peer: 127.0.0.1'\nb''\nb'x'\nb''\nb'..'\n"),
    'headers alone': (b'A: b', {}, "b'A: b'\n"),
    'text': ('A: b\n\nx', {}, 'A: b\nX-Peer: 127.0.0.1\n\nx\n'),
    'no headers': ('\nx', {}, 'X-Peer: 127.0.0.1\n\nx\n'),
    'nothing': (b'', {}, ''),
    'options': (b'\nx', {'mail_options': ['SIZE=1', 'BODY=7BIT'], 'rcpt_options': []},
                "mail options: ['SIZE=1', 'BODY=7BIT']\nb'X-Peer: 127.0.0.1'\nb''\nb'x'\n"),
    'options of both kinds': (
        b'\n', {'mail_options': ['SIZE=1'], 'rcpt_options': ['X']},
        "mail options: ['SIZE=1']\nrcpt options: ['X']\n\nb'X-Peer: 127.0.0.1'\nb''\n"),
    'octets that are not ASCII': (
        b'\nx\xff\xe9', {}, "b'X-Peer: 127.0.0.1'\nb''\nb'x\\xff\\xe9'\n"),
}


@contextlib.contextmanager
def debugging_server():
    server = smtpd.DebuggingServer(('127.0.0.1', 0), None, map={})
    with contextlib.closing(server):
        yield server


class TestDebuggingServer:
    @pytest.mark.parametrize('data, options, printed', PRINTED.values(), ids=PRINTED.keys())
    def test_what_it_prints(self, data, options, printed, capsys):
        with debugging_server() as server:
            assert not server.process_message(PEER, 'a@b', ['c@d'], data, **options)
        assert capsys.readouterr().out == (
            '---------- MESSAGE FOLLOWS ----------\n' + printed
            + '------------ END MESSAGE ------------\n')

    @pytest.mark.parametrize('peer, host', [
        (('::1', 4711, 0, 0), '::1'), ('/run/mail', '/run/mail'), ('', ''), ((), '()')], ids=repr)
    def test_the_host_of_any_peer(self, peer, host, capsys):
        with debugging_server() as server:
            server.process_message(peer, 'a@b', ['c@d'], b'\nx')
        assert "b'X-Peer: %s'" % host in capsys.readouterr().out.splitlines()

    def test_characters_that_stdout_cannot_encode(self, monkeypatch):
        written = io.BytesIO()
        for encoding, text, printed in [('ascii', '\nx\xe4\u20ac', b'x\\xe4\\u20ac'),
                                        ('utf-8', '\nx\xe4\udcff', b'x\xc3\xa4\\udcff'),
                                        ('latin-1', '\nx\xe4\u20ac', b'x\xe4\\u20ac')]:
            monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding, newline='\n'))
            with debugging_server() as server:
                server.process_message(PEER, 'a@b', ['c@d'], text)
            assert printed + b'\n------------ END MESSAGE' in written.getvalue()

    @pytest.mark.parametrize('error', [
        BrokenPipeError(), OSError(errno.EIO, 'gone'), OSError(errno.ENOSPC, 'full'),
        ValueError('closed')], ids=repr)
    def test_stdout_that_is_gone(self, error, monkeypatch):
        monkeypatch.setattr(sys, 'stdout', unittest.mock.Mock(
            encoding='utf-8', **{'write.side_effect': error, 'flush.side_effect': error}))
        with debugging_server() as server:
            channel = make_channel(server)
            feed(channel, TO_DATA)
            assert feed(channel, b'x\r\n.\r\nNOOP\r\n') == 2 * b'250 OK\r\n'

    @pytest.mark.parametrize('stdout', [None, io.StringIO()], ids=['none', 'no encoding'])
    def test_no_stdout_at_all(self, stdout, monkeypatch):
        monkeypatch.setattr(sys, 'stdout', stdout)
        with debugging_server() as server:
            server.process_message(PEER, 'a@b', ['c@d'], '\n\xe9')
        assert stdout is None or '\n\xe9\n' in stdout.getvalue()

    def test_a_print_of_ones_own(self, capsys):
        class Server(smtpd.DebuggingServer):
            def _print_message_content(self, peer, data):
                print('content of', peer, data)

        with contextlib.closing(Server(('127.0.0.1', 0), None, map={})) as server:
            server.process_message(PEER, 'a@b', ['c@d'], b'x')
        assert capsys.readouterr().out.splitlines()[1] == "content of %r b'x'" % (PEER,)


# ---------------------------------------------------------------------------
# python -m smtpd

def run_briefly(command, **kwargs):
    return subprocess.run(command, timeout=60, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def run_smtpd(*options):
    return run_briefly([*SMTPD, *options], env=environment())


def send_message(address, text=b'Subject: x\r\n\r\ntext\r\n'):
    with RawClient(address) as client:
        client.send(TO_DATA.replace(b'<a@b>', b'<a@b> SIZE=20') + text + b'.\r\nQUIT\r\n')
        return client.rest()


PRINTED_MESSAGE = b'''\
---------- MESSAGE FOLLOWS ----------
mail options: ['SIZE=20']
b'Subject: x'
b'X-Peer: 127.0.0.1'
b''
b'text'
------------ END MESSAGE ------------
'''

CLASSES = 'want DebuggingServer, PureProxy, MailmanProxy or package.module.Class'

# What stands between "smtpd: " and "; try --help".
WRONG_ARGUMENTS = [
    (['--foo'], 'option --foo not recognized'),
    (['-s', 'x'], '-s x: want a number of octets, digits only'),
    (['--size', '9' * 5000], '--size %s: want a number of octets, digits only' % ('9' * 5000)),
    (['-s'], 'option -s requires argument'),
    (['1025'], '1025: want HOST:PORT'),
    (['localhost:x'], 'localhost:x: want a port from 0 to 65535'),
    (['localhost:'], 'localhost:: want a port from 0 to 65535'),
    (['127.0.0.1:65536'], '127.0.0.1:65536: want a port from 0 to 65535'),
    (['x:' + '9' * 5000], 'x:%s: want a port from 0 to 65535' % ('9' * 5000)),
    (['localhost:1', 'remote'], 'remote: want HOST:PORT'),
    (['a', 'b', 'c'], 'a b c: want two addresses at most'),
    (['-c', 'NoSuchClass'], 'NoSuchClass: no such class; ' + CLASSES),
    (['-c', 'smtpd.NoSuchClass'], 'smtpd.NoSuchClass: no such class; ' + CLASSES),
    (['-c', 'nosuch.Class'], "nosuch.Class: No module named 'nosuch'; " + CLASSES),
    (['-c', 'email.nosuch.Class'],
     "email.nosuch.Class: No module named 'email.nosuch'; " + CLASSES),
    (['-c', 'SMTPChannel'], 'SMTPChannel: not a server class; ' + CLASSES),
    (['-c', 'os.path.join'], 'os.path.join: not a server class; ' + CLASSES),
    (['-c', ''], ': no such class; ' + CLASSES),
    (['-c', '.Class'], '.Class: Empty module name; ' + CLASSES),
    (['-c', '..'], "..: the 'package' argument is required to perform a relative import for '.'; "
     + CLASSES),
]

# --help does not help with these. Some end in the system's or the interpreter's own words.
FAILED_STARTS = {
    'SMTPUTF8 with a class that refuses it':
        (['-u', '-c', 'PureProxy', '127.0.0.1:0'], 'PureProxy does not support SMTPUTF8'),
    'an unknown host': (['no.such.host.invalid:0'], 'no.such.host.invalid:0: '),
    'an address that is not ours': (['192.0.2.1:0'], '192.0.2.1:0: '),
    'a host that is no name': (['a..b:0'], 'a..b:0: '),
}


class TestCommandLine:
    @pytest.mark.parametrize('option', ['-V', '--version'])
    def test_version(self, option):
        done = run_smtpd(option)
        assert (done.returncode, done.stdout, done.stderr) == (0, smtpd.__version__ + '\n', '')

    @pytest.mark.parametrize('option', ['-h', '--help'])
    def test_help_names_all_options(self, option):
        done = run_smtpd(option)
        assert (done.returncode, done.stderr) == (0, '')
        assert done.stdout.startswith('An RFC 5321 smtp proxy')
        assert 'Usage: python -m smtpd ' in done.stdout and smtpd.__version__ in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80
        for word in ('--nosetuid --version --class --size --smtputf8 --debug --help -n -V -c -s '
                     '-u -d -h 33554432 8025 localhost:localport remotehost:remoteport').split():
            assert word in done.stdout

    @pytest.mark.parametrize('arguments, complaint', WRONG_ARGUMENTS,
                             ids=lambda each: str(each)[:40])
    def test_a_wrong_argument_gets_a_line_that_says_what_was_wanted(self, arguments, complaint):
        done = run_smtpd('-n', *arguments)
        assert (done.returncode, done.stdout) == (1, '')
        assert done.stderr == 'smtpd: %s; try --help\n' % complaint

    @pytest.mark.parametrize('arguments, beginning', FAILED_STARTS.values(),
                             ids=FAILED_STARTS.keys())
    def test_a_failed_start_gets_one_line(self, arguments, beginning):
        done = run_smtpd('-n', *arguments)
        assert (done.returncode, done.stdout) == (1, '')
        assert re.fullmatch('smtpd: %s.*\n' % re.escape(beginning), done.stderr)
        assert '--help' not in done.stderr and 'None' not in done.stderr

    def test_a_class_that_takes_other_arguments_is_no_server(self):
        done = run_smtpd('-n', '-c', 'queue.Queue', '127.0.0.1:0')
        assert re.fullmatch(
            'smtpd: queue.Queue: not a server class: .*; %s; try --help\n' % CLASSES, done.stderr)

    def test_a_class_whose_module_imports_what_is_not_there(self, tmp_path):
        (tmp_path / 'keep.py').write_text('import kee\n')
        done = run_briefly([*SMTPD, '-n', '-c', 'keep.Server'], env=environment(tmp_path))
        assert (done.returncode, done.stdout) == (1, '')
        assert done.stderr.startswith("smtpd: keep.Server: No module named 'kee'; want ")

    def test_a_port_in_use_gets_one_line(self):
        with socket.create_server(('127.0.0.1', 0)) as used:
            address = '127.0.0.1:%d' % used.getsockname()[1]
            done = run_smtpd('-n', '-c', 'DebuggingServer', address)
        assert (done.returncode, done.stdout) == (1, '')
        assert done.stderr == 'smtpd: %s: %s\n' % (
            address, os.strerror(errno.EADDRINUSE))

    def test_each_message_is_seen_at_once_through_a_pipe(self):
        with command_line('-c', 'DebuggingServer') as (process, address):
            for _ in range(2):
                assert send_message(address).endswith(b'250 OK\r\n221 Bye\r\n')
                assert read_until(process.stdout, b'END MESSAGE ------------\n') == PRINTED_MESSAGE

    def test_stdout_that_went_away(self):
        """As `| head` does; the server goes on."""
        with command_line('-c', 'DebuggingServer') as (process, address):
            process.stdout.close()
            for _ in range(3):
                assert send_message(address).endswith(b'250 OK\r\n221 Bye\r\n')
            process.stdout = None

    @pytest.mark.parametrize('options, extensions', [
        ([], b'250-SIZE 33554432\r\n250-8BITMIME\r\n'), (['-s', '0'], b'250-8BITMIME\r\n'),
        (['--size=1000', '-u'], b'250-SIZE 1000\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n')],
        ids=['at first', 'without a limit', 'with one and SMTPUTF8'])
    def test_what_is_offered(self, options, extensions):
        with command_line('-c', 'DebuggingServer', *options) as (_, address), \
                greet(address) as client:
            name, offered = client.say(b'EHLO x').split(b'\r\n', 1)
            assert re.fullmatch(b'250-[!-~]+', name) and offered == extensions + b'250 HELP\r\n'

    @pytest.mark.parametrize('number, status', [
        (signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)], ids=['SIGINT', 'SIGTERM'])
    @pytest.mark.parametrize('class_name', ['DebuggingServer', 'PureProxy', 'MailmanProxy'])
    def test_signals_end_it_silently(self, class_name, number, status):
        with command_line('-c', class_name) as (process, address), RawClient(address) as client:
            assert client.reply().startswith(b'220 ')
            assert [client.say(b'NOOP') for _ in range(3)] == 3 * [b'250 OK\r\n']
            process.send_signal(number)
            assert process.communicate(timeout=20) == (b'', b'')
            assert process.returncode == status

    def test_a_class_in_the_current_folder_with_its_debugging_prints(self, tmp_path):
        """There must be one module, not a __main__ and an smtpd."""
        package = tmp_path / 'mail' / 'servers'
        package.mkdir(parents=True)
        (package.parent / '__init__.py').touch()
        (package / '__init__.py').touch()
        (package / 'inbox.py').write_text(textwrap.dedent('''
            import smtpd
            class Inbox(smtpd.SMTPServer):
                def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
                    print('got', mailfrom, rcpttos, data, self._remoteaddr, flush=True)
        '''))
        with command_line('-d', '-c', 'mail.servers.inbox.Inbox', remote='upstream:2525',
                          cwd=tmp_path) as (process, address):
            assert send_message(address).endswith(b'250 OK\r\n221 Bye\r\n')
            assert read_until(process.stdout, b'\n') == (
                b"got a@b ['c@d'] b'Subject: x\\n\\ntext' ('upstream', 2525)\n")
            dialogue = read_until(process.stderr, b"Data: b'QUIT'")
            for line in (b"Data: b'EHLO x'", b'===> MAIL FROM:<a@b> SIZE=20', b"recips: ['c@d']"):
                assert line + b'\n' in dialogue
            assert b"Incoming connection from ('127.0.0.1', " in dialogue
            assert b'Inbox started at ' in dialogue and b"Local addr: ('127.0.0.1', " in dialogue
            assert process.poll() is None

    @pytest.mark.skipif(os.geteuid() != 0, reason='only root can become nobody')
    def test_root_becomes_nobody_with_all_groups(self):
        """And logs what failed, even where nobody may not read the standard library."""
        import pwd
        nobody = pwd.getpwnam('nobody')
        with running_server(
                lambda port: [*SMTPD, '-c', 'SMTPServer', '127.0.0.1:%d' % port],
                extra_groups=[4, 24]) as (process, address):
            assert send_message(address).endswith(b'451 Internal confusion\r\n221 Bye\r\n')
            assert read_until(process.stderr, b'NotImplementedError')
            with open('/proc/%d/status' % process.pid) as status:
                fields = dict(line.split(':', 1) for line in status)
            assert fields['Uid'].split() == 4 * [str(nobody.pw_uid)]
            assert fields['Gid'].split() == 4 * [str(nobody.pw_gid)]
            assert set(fields['Groups'].split()) <= {str(nobody.pw_gid)}

    @pytest.mark.parametrize('lack, complaint', [
        ("""import os
def refuse(groups):
    raise PermissionError
os.setgroups = refuse
""", 'cannot switch to user nobody: want root, or option -n'),
        ("import sys; sys.modules['pwd'] = None",
         'no user nobody on this system: want option -n')], ids=['no root', 'no users'])
    def test_who_cannot_become_nobody_has_to_say_nosetuid(self, lack, complaint):
        command = [*STRICT, '-c', lack + """
import runpy
runpy.run_module('smtpd', run_name='__main__', alter_sys=True)
"""]
        env = {name: value for name, value in environment().items()
               if not name.startswith('COVERAGE')}  # nobody may not write down what it covers
        done = run_briefly([*command, '-c', 'DebuggingServer', '127.0.0.1:0'], env=env)
        assert (done.returncode, done.stdout) == (1, '')
        assert done.stderr == 'smtpd: %s\n' % complaint

    def test_default_class_of_the_command_line_relays(self, upstream):
        with command_line(remote='%s:%d' % upstream.address) as (_, address):
            with smtplib.SMTP(*address, 'client.example', timeout=60) as client:
                assert client.sendmail('a@example.com', ['b@example.com'], PROXIED) == {}
                upstream.refused = {'b@example.com': '550 5.1.1 No such user'}
                with pytest.raises(smtplib.SMTPRecipientsRefused) as refusal:
                    client.sendmail('a@example.com', ['b@example.com'], PROXIED)
        assert refusal.value.recipients == {'b@example.com': (550, b'5.1.1 No such user')}
        assert upstream.messages == [('a@example.com', ['b@example.com'], with_x_peer(PROXIED))]

    @pytest.mark.parametrize('base, selector', [
        ('smtpd.SMTPServer', True), ('asyncore.dispatcher', None)])
    def test_the_loop_that_it_runs(self, base, selector, tmp_path):
        """One for thousands of sessions: a selector where the class knows of it, and poll()."""
        (tmp_path / 'own.py').write_text(textwrap.dedent('''
            import asyncore, smtpd

            class Own(%s):
                def __init__(self, *args, **kwargs):
                    global own
                    own = self
                    print(args, kwargs)
                    asyncore.dispatcher.__init__(self)

            asyncore.loop = lambda *args, **kwargs: print(
                args, sorted(kwargs.items()), getattr(own, 'channels_in_selector', None))
        ''' % base))
        done = run_briefly([*SMTPD, '-n', '-c', 'own.Own', 'a:1', 'b:2'],
                           env=environment(tmp_path))
        assert (done.returncode, done.stderr) == (0, '')
        assert done.stdout.splitlines() == [
            "(('a', 1), ('b', 2), 33554432) {'enable_SMTPUTF8': False}",
            "() [('timeout', 1), ('use_poll', True)] %s" % selector]


class TestArguments:
    """parseargs(), which programs call."""

    @pytest.mark.parametrize('arguments, expected', [
        ([], ('localhost', 8025, 'localhost', 25, 'PureProxy', True, False)),
        (['-n'], ('localhost', 8025, 'localhost', 25, 'PureProxy', False, False)),
        (['--nosetuid', '--debug', 'x:26'], ('x', 26, 'localhost', 25, 'PureProxy', False, False)),
        (['here:26', 'there:65535'], ('here', 26, 'there', 65535, 'PureProxy', True, False)),
        (['-u', '-c', 'X', ':26'], ('', 26, 'localhost', 25, 'X', True, True)),
        (['--smtputf8', '--class=a.X', '[::1]:26', '[::2]:27'],
         ('::1', 26, '::2', 27, 'a.X', True, True)),
    ], ids=str)
    def test_what_they_mean(self, arguments, expected, monkeypatch):
        monkeypatch.setattr(sys, 'argv', ['smtpd', *arguments])
        monkeypatch.setattr(smtpd, 'DEBUGSTREAM', smtpd.Devnull())
        options = smtpd.parseargs()
        assert smtpd.DEBUGSTREAM is sys.stderr or '--debug' not in arguments
        assert (options.localhost, options.localport, options.remotehost, options.remoteport,
                options.classname, bool(options.setuid), bool(options.enable_SMTPUTF8)) == expected

    def test_usage_ends_the_program(self, capsys, monkeypatch):
        monkeypatch.setattr(smtpd, 'program', 'own')
        for message, told in ('wrong', 'wrong'), ('', 'Usage: own [options]'):
            with pytest.raises(SystemExit, match='3'):
                smtpd.usage(3, message)
            assert told in capsys.readouterr().err
