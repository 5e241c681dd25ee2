"""The oracle over programs (see compare_programs.py), with seeds that never change.

Up to Python 3.11 the old module is this Python's own; later ones have none, and take
python3.11's.
"""

import os
import sys

import pytest

import smtpd
from tests import compare_programs, programs
from tests.support import python_of


@pytest.fixture(scope='module')
def old():
    # Breakpoint: 3.12.
    python = sys.executable if sys.version_info < (3, 12) else python_of('3.11')
    with programs.Worker(python) as worker:
        yield worker


@pytest.fixture(scope='module')
def ours():
    with programs.Worker(sys.executable, os.path.abspath(smtpd.__file__)) as worker:
        yield worker


def a_program(client, *, attributes=None, **methods):
    """One that the client sends these lines to; a method's body is given as a string."""
    return {**programs.EMPTY_PROGRAM, 'attributes': attributes or {},
            'methods': {name: [body] for name, body in methods.items()},
            'client': [['feed', each] if isinstance(each, str) else each for each in client]}


def octets_sent(trace):
    """What the client got after the banner, and whether the connection was closed."""
    texts = [event[1] for event in trace if event[0] == 'sent']
    sent = ''.join(texts).partition('\r\n')[2]
    return sent.replace('\r\n', '|'), ['closed'] in trace


MESSAGE = ['EHLO x\r\n', 'MAIL FROM:<a@b>\r\n', 'RCPT TO:<c@d>\r\n', 'DATA\r\n', 'x\r\n.\r\n']
EHLO = '250-mx.example|250-SIZE 33554432|250-8BITMIME|250 HELP|'

# What real programs do, and what their clients got of the old module.
KNOWN_PROGRAMS = {
    'a terminator that is text': (
        a_program(['NOOP\r\n'], __init__="super().__init__(*args)\nself.terminator = 'XX'"),
        ('', True)),
    'a get_terminator() that raises': (
        a_program(['NOOP\r\n'], get_terminator="raise ValueError('x')"), ('', True)),
    'a get_terminator() that drops the input': (
        a_program(['NOOP\r\n', 'NOOP\r\n'], get_terminator='if once("it"):\n'
                  '    self.discard_buffers()\nreturn self.terminator'),
        ('250 OK|', False)),
    'a get_terminator() that looks at what has come': (
        a_program([*MESSAGE[:4], 'one', 'two', '\r\n.\r\n'],
                  get_terminator='if self.received_lines:\n'
                  "    self.push('354 %d' % len(self.received_lines))\nreturn self.terminator"),
        (EHLO + '250 OK|250 OK|354 End data with <CR><LF>.<CR><LF>|354 1|354 2|250 OK|', False)),
    'push() and send() by turns': (
        a_program(['EHLO x\r\n'], push="super().push(msg)\nself.send(b'(sent)')"),
        ('(sent)250-mx.example|(sent)250-SIZE 33554432|(sent)250-8BITMIME|(sent)250 HELP|(sent)',
         False)),
}


@pytest.mark.parametrize('name', KNOWN_PROGRAMS)
def test_the_client_of_a_known_program_gets_what_it_got(name, old, ours):
    program, expected = KNOWN_PROGRAMS[name]
    assert octets_sent(old.run(program)) == expected
    assert octets_sent(ours.run(program)) == expected


def test_a_limit_that_is_none_never_hangs_a_session(old, ours):
    program = a_program(['NO', 'OP\r\n'], attributes={'command_size_limit': 'None'})
    assert octets_sent(old.run(program)) == ('', True)
    assert octets_sent(ours.run(program)) in [('', True), ('451 Internal confusion|', False)]


@pytest.mark.parametrize('program', [
    a_program(['XFOO\r\nNOOP\r\n'], smtp_XFOO='self.connected = False'),
    a_program([['eof']], close_when_done='pass'),
], ids=['that is not connected any more', 'whose client has ended'])
def test_no_channel_keeps_the_loop_busy(program, ours):
    trace = ours.run(program)
    assert ['busy'] not in trace
    assert ['closed'] in trace


def test_generated_programs_behave_alike(old, ours):
    """Run python -m tests.tools.oracle for more, and to shrink what this finds."""
    faults = []
    for seed, case, _ in compare_programs.compare_seeds(0, 1000, old, ours):
        if case is not None:
            faults.append('--show %d' % seed)
            print(compare_programs.shown_case(case))
    assert not faults
