"""Channels: limits met exactly, and what seldom happens."""
import asyncore
import collections
import contextlib
import errno
import os
import select
import socket
import unittest.mock

import pytest

import smtpd
from tests.support import (
    ANSWERED_TO_DATA,
    ONE_MESSAGE,
    PEER,
    TO_DATA,
    FakeConnection,
    HookedChannel,
    RecordingServer,
    StubServer,
    WaitingServer,
    both_modes,
    channel_with,
    channels_of,
    feed,
    greet,
    in_map_and_selector,
    in_mode,
    in_pieces,
    is_served,
    make_channel,
    read_replies,
    serving,
    three_ways,
    traced_memory,
    variant,
    without_init,
)


def waiting(channel):
    """What has been answered, whether it has been sent or not."""
    return channel.conn.sent + b''.join(channel.producer_fifo)


@pytest.mark.parametrize('limit, executed', [(1000, 126), (10 ** 6, 501), (None, 1000)])
def test_no_more_commands_are_executed_than_replies_may_wait(limit, executed):
    channel = channel_with(unsent_reply_limit=limit)
    channel.conn.send = unittest.mock.Mock(side_effect=BlockingIOError(errno.EAGAIN, 'full'))
    channel.conn.incoming.append(b'NOOP\r\n' * 1000)
    asyncore.read(channel)
    assert waiting(channel) == executed * b'250 OK\r\n'


@pytest.mark.parametrize('sent, answered', [
    (b'NOOP\r\n' * 1000, b'250 OK\r\n' * 1000),
    (b'XFAIL\r\nNOOP\r\n', b'451 Internal confusion\r\n250 OK\r\n')], ids=['many', 'a fault'])
def test_a_client_that_speaks_just_when_its_time_is_over_is_served(sent, answered, clock, capsys):
    channel = channel_with(smtp_XFAIL=lambda self, arg: 1 / 0)
    clock.seconds += 301
    assert channel.readable() and channel.writable()
    assert feed(channel, sent) == answered
    assert not channel.conn.closed


def test_a_limit_of_less_than_a_second_is_met(clock):
    channel = channel_with(idle_timeout_seconds=0.25)
    assert channel.readable() and not channel.writable()
    clock.seconds += 0.25
    assert channel.readable() and channel.writable()


@three_ways
@pytest.mark.parametrize('text', [b'', b'x', b'.', b'\r\n', b'\r'], ids=repr)
def test_messages_that_come_together_stay_two(text, way):
    channel = make_channel()
    feed(channel, TO_DATA)
    if text:
        channel.conn.incoming.append(text)
        asyncore.read(channel)
    way(channel, [b'\r\n.\r\n', TO_DATA[8:], b'forged\r\n.\r\n'])
    assert len(channel.smtp_server.messages) == 2


@pytest.mark.parametrize('last', [b'', b'QUIT\r\n'], ids=repr)
def test_a_client_that_has_ended_gets_the_replies_that_wait(last):
    channel = make_channel()
    channel.conn.sends_at_most = 1
    for text in b'NOOP\r\n' + last, b'':
        channel.conn.incoming.append(text)
        asyncore.read(channel)
    feed(channel, b'')
    assert channel.conn.closed
    assert channel.conn.sent == b'250 OK\r\n' + (b'221 Bye\r\n' if last else b'')


@pytest.mark.parametrize('terminator', [-1, 1.5, object()], ids=['-1', '1.5', 'an object'])
def test_a_terminator_that_is_none_does_not_keep_the_loop_busy(terminator, capsys):
    """What comes of it is asynchat's affair."""
    channel = channel_with(smtp_XEND=lambda self, arg: setattr(self, 'terminator', terminator))
    feed(channel, b'XEND\r\n', b'NOOP\r\n', b'NOOP\r\n')
    assert channel.conn.closed or not channel.writable()


@pytest.mark.parametrize('hook', ['get_terminator', 'push'])
@pytest.mark.parametrize('error', [asyncore.ExitNow, KeyboardInterrupt, SystemExit])
def test_what_ends_the_loop_may_come_from_a_hook(error, hook):
    def method(self, msg='451'):
        if msg.startswith('451'):
            raise error

    with pytest.raises(error):
        feed(channel_with(**{hook: method, 'smtp_XFAIL': lambda self, arg: 1 / 0}), b'XFAIL\r\n')


@pytest.mark.parametrize('end', ['close', 'close_when_done', 'handle_close'])
def test_nothing_is_executed_after_the_end(end):
    done = []
    channel = channel_with(smtp_XEND=lambda self, arg: getattr(self, arg)(),
                           smtp_XNOTE=lambda self, arg: done.append(arg))
    feed(channel, b'XEND %s\r\nXNOTE\r\n' % end.encode())
    assert channel.conn.closed and not done


def test_a_reply_of_many_lines_is_one_error():
    def smtp_XMANY(self, arg):
        for line in '550-one', '550-two', '550 three':
            self.push(line)

    channel = channel_with(error_limit=3, smtp_XMANY=smtp_XMANY)
    for end in b'550 three\r\n', b'550 three\r\n', b'421 Error: too many errors\r\n':
        assert feed(channel, b'XMANY\r\n').endswith(end)


def test_what_a_command_leaves_in_received_lines_is_the_beginning_of_the_next_line():
    """As it was: a command may take a piece back."""
    channel = channel_with(smtp_XPUT=lambda self, arg: self.received_lines.append(b'NO'))
    assert feed(channel, b'XPUT\r\nOP\r\n') == b'250 OK\r\n'


@pytest.mark.parametrize('base', [smtpd.SMTPChannel, HookedChannel])
@pytest.mark.parametrize('limit', [None, 0])
def test_without_a_limit_a_message_of_any_size_arrives(base, limit):
    channel = make_channel(channel_class=base, data_size_limit=limit)
    feed(channel, TO_DATA)
    assert feed(channel, b'x' * 100_000, b'\r\n.\r\n') == b'250 OK\r\n'
    assert [len(each[3]) for each in channel.smtp_server.messages] == [100_000]


def test_of_a_message_that_was_not_kept_in_full_nothing_is_delivered():
    """Its dots were doubled across pieces, so that it seemed larger than it was."""
    channel = make_channel(channel_class=HookedChannel, data_size_limit=20)
    feed(channel, TO_DATA)
    for piece in [b'x'] + 9 * [b'\r\n', b'..']:
        channel.collect_incoming_data(piece)
    channel.found_terminator()
    assert channel.conn.sent.endswith(b'552 Error: Too much mail data\r\n')
    assert not channel.smtp_server.messages


@pytest.mark.parametrize('size, code', [
    ('0' * 17 + '100', b'250'), ('0' * 18 + '100', b'552'), ('0' * 17 + '101', b'552')])
def test_a_size_has_twenty_digits_at_most(size, code):
    channel = make_channel(data_size_limit=100)
    feed(channel, b'EHLO x\r\n')
    assert feed(channel, b'MAIL FROM:<a@b> SIZE=%s\r\n' % size.encode())[:3] == code


def test_what_getparams_returns_stays_as_it_is():
    known = {'SIZE': '5'}
    channel = channel_with(_getparams=lambda self, params: known)
    feed(channel, b'EHLO x\r\nMAIL FROM:<a@b> SIZE=5\r\n')
    assert known == {'SIZE': '5'}


def test_a_limit_for_mail_that_is_larger_than_ours_stays():
    channel = channel_with(command_size_limits={'MAIL': 1000})
    feed(channel, b'EHLO x\r\n')
    assert channel.command_size_limits['MAIL'] == 1000


def test_a_factory_of_the_programs_own_gives_the_limits_after_ehlo():
    channel = channel_with(command_size_limits=collections.defaultdict(lambda: 20))
    feed(channel, b'HELP\r\n')
    line = b'NOOP' + b' ' * 20 + b'\r\n'
    assert feed(channel, line) == b'250 OK\r\n'
    feed(channel, b'EHLO x\r\n')
    assert feed(channel, line) == b'500 Error: line too long\r\n'
    assert feed(channel, b'NOOP\r\n') == b'250 OK\r\n'


def test_set_rset_state_forgets_the_message():
    channel = make_channel()
    feed(channel, ONE_MESSAGE)
    assert channel.received_data
    channel.received_lines.append(b'left')
    channel._set_rset_state()
    assert channel.received_data == '' and channel.received_lines == []


def test_a_property_may_need_what_the_programs_init_sets():
    class Channel(smtpd.SMTPChannel):
        def __init__(self, *args, **kwargs):
            self.senders = []
            super().__init__(*args, **kwargs)

        @property
        def mailfrom(self):
            return self.senders[-1]

        @mailfrom.setter
        def mailfrom(self, value):
            self.senders.append(value)

    channel = make_channel(channel_class=Channel)
    feed(channel, b'EHLO x\r\nMAIL FROM:<a@b>\r\n')
    assert channel.senders[-1] == 'a@b'


@pytest.mark.parametrize('terminator, line, answer', [
    (b'\n', b'NOOP\r\n', b'250 OK\r\n'),
    (b'\n', b'NOOP\n', b'250 OK\r\n'),
    (b'\n', b'VRFY x\r\n',
     b'252 Cannot VRFY user, but will accept message and attempt delivery\r\n'),
    (b'\r\n', b'NOOP\r\r\n', b'500 Error: bad syntax\r\n')])
def test_a_cr_before_the_line_end_belongs_to_it_where_a_program_takes_bare_lf(
        terminator, line, answer):
    channel = make_channel(channel_class=HookedChannel)
    channel.set_terminator(terminator)
    assert feed(channel, line) == answer


@pytest.mark.parametrize('line', [b'.', 76 * b'x', 100_000 * b'x'], ids=['.', '76 x', 'x'])
@pytest.mark.parametrize('base', [smtpd.SMTPChannel, HookedChannel])
@both_modes
def test_memory_that_a_message_takes(decode_data, base, line):
    """While it is handled, with what the handler gets; and at any time before."""
    class Server(StubServer):
        def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
            self.length, self.octets = len(data), now_and_peak()

    channel = make_channel(Server(), base, decode_data=decode_data)
    feed(channel, TO_DATA)
    wire = (line.replace(b'.', b'..') + b'\r\n') * (1_000_000 // (len(line) + 2))
    pieces = in_pieces(wire, 50_000)
    with traced_memory() as now_and_peak:
        feed(channel, *pieces, b'.\r\n')
    server = channel.smtp_server
    assert server.length == len(wire.replace(b'..', b'.').replace(b'\r\n', b'\n')) - 1
    assert server.octets[0] < 1.2 * server.length and server.octets[1] < 2.5 * server.length


def test_a_greeting_ends_the_transaction_before_it():
    """A program that offers STARTTLS forgets the first greeting."""
    channel = channel_with(smtp_XTLS=lambda self, arg: setattr(self, 'seen_greeting', ''))
    assert feed(channel, b'HELO x\r\nMAIL FROM:<a@b>\r\nXTLS\r\nHELO x\r\n').count(b'250') == 3
    assert feed(channel, b'MAIL FROM:<c@d>\r\n') == b'250 OK\r\n' and channel.mailfrom == 'c@d'


class SelfMadeChannel(smtpd.SMTPChannel):
    """Copied its found_terminator from somewhere: all of it is its own."""

    def found_terminator(self):
        whole = self._emptystring.join(self.received_lines)
        self.received_lines = []
        self.num_bytes = 0
        if self.smtp_state == self.COMMAND:
            verb, _, argument = (whole if self._decode_data else whole.decode()).partition(' ')
            getattr(self, 'smtp_' + verb.upper())(argument or None)
            return
        undotted = [line[1:] if line and line[0] == self._dotsep else line
                    for line in whole.split(self._linesep)]
        self.received_data = self._newline.join(undotted)
        status = self.smtp_server.process_message(
            self.peer, self.mailfrom, self.rcpttos, self.received_data)
        self._set_post_data_state()
        self.push(status or '250 OK')


@both_modes
@pytest.mark.parametrize('base', [smtpd.SMTPChannel, SelfMadeChannel])
def test_a_second_init_begins_a_session_anew_in_its_own_mode(base, decode_data):
    channel = make_channel(channel_class=base, decode_data=not decode_data)
    feed(channel, TO_DATA + b'half of a message')
    channel.__init__(channel.smtp_server, channel.conn, PEER, map={}, decode_data=decode_data)
    assert b'503' not in feed(channel, TO_DATA + b'..x', b'\r\ny\r\n.\r\n')
    assert [each[3] for each in channel.smtp_server.messages] == [in_mode(b'.x\ny', decode_data)]


def test_a_character_that_is_cut_in_two_reaches_a_hook_whole():
    channel = make_channel(channel_class=SelfMadeChannel, decode_data=True)
    feed(channel, TO_DATA + b'\xc3', b'\xa9\r\n.\r\n')
    assert channel.smtp_server.messages[0][3] == '\xe9'


def test_what_comes_after_quit_is_not_executed_by_a_found_terminator_of_ones_own():
    channel = make_channel(channel_class=SelfMadeChannel)
    assert feed(channel, b'QUIT\r\nHELO x\r\n') == b'221 Bye\r\n' and not channel.seen_greeting


@pytest.mark.skipif(not hasattr(select, 'poll'), reason='no poll() here')
def test_a_channel_that_is_closed_between_reading_and_writing_is_closed_once():
    """poll() tells of both at once."""
    def close(self):
        closed.append(self)
        smtpd.SMTPChannel.close(self)

    closed = []
    channel = channel_with(close=close, smtp_XCLOSE=lambda self, arg: self.close())
    channel.conn.incoming.append(b'XCLOSE\r\n')
    asyncore.readwrite(channel, select.POLLIN | select.POLLOUT)
    assert channel.conn.closed and len(closed) == 1


def test_a_client_that_has_gone_before_its_channel_is_made_does_not_keep_the_loop_busy():
    """Where the program's own __init__() does not look."""
    conn = FakeConnection()
    conn.getpeername = unittest.mock.Mock(side_effect=OSError(errno.ENOTCONN, 'gone'))
    conn.incoming.append(b'')
    channel = without_init(StubServer(), conn, PEER, {})
    channel.push('220 mine')
    asyncore.read(channel)
    asyncore.write(channel)
    assert conn.closed


@in_map_and_selector
def test_a_session_that_the_program_closes_while_its_handler_runs(capsys):
    def smtp_XALONE(self, arg):
        for each in channels_of(self.smtp_server):
            if each is not self:
                each.close()
        self.push('250 OK')

    with serving(variant(WaitingServer, channel={'smtp_XALONE': smtp_XALONE})) as server, \
            greet(server) as client, greet(server) as other:
        client.send(ONE_MESSAGE + b'NOOP\r\n')
        server.wait_until_entered()
        assert other.say(b'XALONE') == b'250 OK\r\n'
        assert client.rest() == ANSWERED_TO_DATA
        server.go.set()
        assert server.arrived.wait(20)
        assert is_served(server)
        with greet(server) as again:
            again.send(ONE_MESSAGE)
            assert read_replies(again, 5).endswith(b'250 OK\r\n')
    assert capsys.readouterr() == ('', '')


@in_map_and_selector
def test_a_descriptor_that_comes_again_without_a_word_is_the_new_channels():
    server = RecordingServer(map={})
    first, second = socket.socketpair(), socket.socketpair()
    with contextlib.closing(server), first[1], second[0], second[1]:
        smtpd.SMTPChannel(server, first[0], PEER, map=server._map)
        os.dup2(second[0].fileno(), first[0].fileno())
        new = smtpd.SMTPChannel(server, first[0], PEER, map=server._map)
        second[1].sendall(b'QUIT\r\n')
        asyncore.loop(timeout=5, map=server._map, count=1)
        assert not new.connected


def test_a_message_whose_client_has_gone_before_its_replies_could_leave_is_not_handled(capsys):
    channel = make_channel()
    channel.conn.send = unittest.mock.Mock(side_effect=BrokenPipeError(errno.EPIPE, 'gone'))
    feed(channel, ONE_MESSAGE)
    assert channel.conn.closed and channel.smtp_server.messages == []
