"""Channels: limits met exactly, and what seldom happens."""
import asyncore
import errno
import select
import unittest.mock

import pytest

import smtpd
from tests.support import (
    ANSWERED_TO_DATA,
    ONE_MESSAGE,
    TO_DATA,
    WaitingServer,
    channel_with,
    channels_of,
    feed,
    greet,
    is_served,
    read_replies,
    serving,
    variant,
)


def waiting(channel):
    """What has been answered, whether it has been sent or not."""
    return channel.conn.sent + b''.join(channel.producer_fifo)


@pytest.mark.parametrize('limit, executed', [(3992, 500), (4000, 501), (None, 1000)])
def test_no_more_commands_are_executed_than_replies_may_wait(limit, executed):
    """Replies to pipelined commands leave together, 500 at most."""
    channel = channel_with(unsent_reply_limit=limit)
    channel.conn.sends_at_most = 1
    channel.conn.incoming.append(b'NOOP\r\n' * 1000)
    asyncore.read(channel)
    assert waiting(channel) == executed * b'250 OK\r\n'


def test_no_command_is_executed_when_the_replies_before_it_cannot_be_sent():
    done = []
    channel = channel_with(smtp_XNOTE=lambda self, arg: done.append(arg))
    channel.conn.send = unittest.mock.Mock(side_effect=BrokenPipeError(errno.EPIPE, 'gone'))
    feed(channel, b'NOOP\r\nXNOTE\r\n')
    assert channel.conn.closed and done == []


@pytest.mark.parametrize('terminator', [-1, 1.5, object()], ids=['-1', '1.5', 'an object'])
def test_a_terminator_that_is_none_ends_the_session(terminator, capsys):
    channel = channel_with(smtp_XEND=lambda self, arg: setattr(self, 'terminator', terminator))
    assert feed(channel, b'XEND\r\n', b'NOOP\r\n', b'NOOP\r\n') == b''
    assert channel.conn.closed and 'Traceback' in capsys.readouterr().err


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


@pytest.mark.parametrize('threads', [0, 1], ids='{} threads'.format)
@pytest.mark.parametrize('text, reply', [(b'long', '552'), (b'x', '250 of')], ids=['552', '250'])
def test_the_state_after_data_is_set_once_though_the_reply_fails(threads, text, reply, capsys):
    def set_post_data_state(self):
        states.append(self.smtp_state)
        smtpd.SMTPChannel._set_post_data_state(self)

    def push(self, msg):
        if msg.startswith(reply):
            raise ZeroDivisionError
        smtpd.SMTPChannel.push(self, msg)

    states = []
    server_class = variant(
        process_message=lambda *args, **kwargs: '250 of ours', process_message_threads=threads,
        channel={'push': push, '_set_post_data_state': set_post_data_state})
    with serving(server_class, data_size_limit=5) as server, greet(server) as client:
        client.send(TO_DATA)
        read_replies(client, 4)
        del states[:]
        assert client.say(text + b'\r\n.') == b'451 Internal confusion\r\n'
        assert client.say(b'NOOP') == b'250 OK\r\n'
        assert states == [smtpd.SMTPChannel.DATA]


@pytest.mark.parametrize('selector', [False, True], indirect=True)
def test_a_session_that_the_program_closes_while_its_handler_runs(selector, capsys):
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
