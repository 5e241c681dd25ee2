"""Judge from outside: the old module, fed the same dialogues.

Breakpoint: 3.12. From there on it has none.
"""
import importlib.util
import itertools
import os
import re
import sys
import sysconfig
import typing
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smtpd
from tests.support import PEER, FakeConnection, StubServer, feed

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason='this Python has no smtpd of its own')


class Step(typing.NamedTuple):
    """A command line; the data that follow it where it is answered with 354."""

    line: bytes
    data: bytes = b''


class Outcome(typing.NamedTuple):
    """What one step did, as a client and a handler see it."""

    sent: bytes
    messages: list  # (peer, mailfrom, rcpttos, data, kwargs)
    raised: typing.Optional[str]  # what left the channel's handle_read()
    closed: bool
    session: tuple  # seen_greeting, mailfrom, rcpttos, smtp_state


def load_old_module():
    path = os.path.join(sysconfig.get_path('stdlib'), 'smtpd.py')
    spec = importlib.util.spec_from_file_location('standard_library_smtpd', path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def old_module():
    module = load_old_module()
    assert not os.path.samefile(module.__file__, smtpd.__file__)
    return module


class Handler(StubServer):
    """Answers the messages of a session with the replies, over and over."""

    def __init__(self, replies):
        super().__init__()
        self.replies = itertools.cycle(replies or [None])

    def process_message(self, *args, **kwargs):
        self.reply = next(self.replies)
        return super().process_message(*args, **kwargs)


class Session:
    """A channel of either module, driven as a loop drives it."""

    def __init__(self, module, replies=(), **options):
        class Channel(module.SMTPChannel):
            # Not handle_error(): where that is overridden, ours sends no 451.
            def log_info(channel, message, type='info'):
                if sys.exc_info()[0] is not None:
                    self.raised = sys.exc_info()[0].__name__

        self.raised = None
        self.server = Handler(replies)
        # Shared by all sessions of the old module; each of these begins afresh.
        module.SMTPChannel.command_size_limits.clear()
        self.channel = Channel(self.server, FakeConnection(), PEER, map={}, **options)
        self.channel.conn.sends.clear()

    def take(self, *segments):
        """Feed the segments, one read event each; return the Outcome."""
        channel, messages = self.channel, len(self.server.messages)
        return Outcome(
            feed(channel, *segments), self.server.messages[messages:], self.raised,
            not channel.connected,
            (channel.seen_greeting, channel.mailfrom, list(channel.rcpttos), channel.smtp_state))

    def whole(self):
        """The Outcome of all that was fed."""
        return self.take()._replace(sent=self.channel.conn.sent, messages=self.server.messages)

    def take_step(self, step):
        outcome = self.take(step.line + b'\r\n')
        if outcome.sent.startswith(b'354') and step.data:
            end = self.take(step.data)
            outcome = end._replace(sent=outcome.sent + end.sent)
        return outcome


class Case(typing.NamedTuple):
    """A step at which the two differ, and all that is known about it."""

    step: Step
    earlier: list  # the steps before it and what both did: [(step, outcome)]
    old: Outcome
    ours: Outcome
    options: dict  # of the channels
    old_module: typing.Any

    @property
    def text(self):
        return self.step.line.decode('utf-8', 'surrogateescape')

    @property
    def verb(self):
        return self.text.partition(' ')[0]

    @property
    def path(self):
        """What stands after "MAIL FROM:", "RCPT TO:" or "VRFY"; None for other commands."""
        keyword = {'MAIL': 'FROM:', 'RCPT': 'TO:', 'VRFY': ''}.get(self.verb.upper())
        argument = self.text.partition(' ')[2].strip()
        if keyword is None or argument[:len(keyword)].upper() != keyword:
            return None
        return argument[len(keyword):].strip()

    @property
    def address_of_ours(self):
        """What we have just accepted in MAIL or RCPT."""
        _, mailfrom, rcpttos, _ = self.ours.session
        return mailfrom if self.verb.upper() == 'MAIL' else rcpttos[-1]

    def we_only_say(self, pattern):
        """Our answer is this one line, and nothing else happens."""
        before = self.earlier[-1][1].session if self.earlier else ('', None, [], 0)
        return (re.fullmatch(pattern + rb'\r\n', self.ours.sent)
                and self.ours == Outcome(self.ours.sent, [], None, False, before))

    def we_refuse_the_path(self):
        return self.path is not None and self.we_only_say(
            rb'501 Syntax: ((MAIL FROM|RCPT TO): <address>( \[SP <mail-parameters>\])?'
            rb'|VRFY <address>)')


def is_utf8(octets):
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True


PLAIN_PATH = r"(<>|<[\w.+'-]+@[\w.-]*\w>|[\w.+'-]+@[\w.-]*\w)(\s|$)"


def rfc1870_size(data):
    """Octets with CRLF, without the doubled dots, the final dot left out."""
    lines = data[:-len(b'.\r\n')].split(b'\r\n')
    return sum(len(line) - line.startswith(b'.') for line in lines) + 2 * (len(lines) - 1)


def command_that_ended_the_session(case):
    return (case.old.raised and case.old.closed and not case.old.messages
            and case.we_only_say(rb'50[01] [ -~]+'))


def control_character(case):
    return (re.search('[\0-\x08\x0a-\x1f\x7f-\x9f]', case.text)
            and case.we_only_say(rb'500 Error: bad syntax'))


def verb_is_not_ascii(case):
    return (not re.fullmatch('[ -~]*', case.verb)
            and case.we_only_say(rb'500 Error: command "[ -~]*" not recognized'))


def no_path(case):
    """TestPaths tells which are refused, and that the plain ones are not."""
    return case.we_refuse_the_path() and not re.match(PLAIN_PATH, case.path)


def path_not_verbatim(case):
    if not case.path or not re.search(r'"|=\?', case.path):
        return False
    return (case.ours.sent == b'250 OK\r\n' and case.path.lstrip('<').startswith(
        case.address_of_ours)) or case.old.sent.startswith(b'501 Syntax: ')  # '""' left nothing


def size_in_foreign_digits(case):
    return (re.search(r'\sSIZE=[0-9]*[^\x00-\x7f]+', case.text.upper())
            and case.old.sent[:3] in (b'250', b'552', b'555')
            and case.we_only_say(rb'501 Syntax: MAIL FROM: <address> \[SP <mail-parameters>\]'))


def stuck_after_too_much(case):
    reply = rb'354 [ -~]+\r\n552 Error: Too much mail data\r\n'
    return (re.fullmatch(reply, case.ours.sent) and case.ours.sent == case.old.sent
            and rfc1870_size(case.step.data) > case.options['data_size_limit']
            and (case.old.session[3], case.ours.session[3])
            == (smtpd.SMTPChannel.DATA, smtpd.SMTPChannel.COMMAND))


def size_counted_otherwise(case):
    limit = case.options.get('data_size_limit')
    if not limit or not case.step.data or not case.ours.sent.startswith(b'354'):
        return False
    refusal = b'552 Error: Too much mail data\r\n'
    too_much = rfc1870_size(case.step.data) > limit
    return (case.ours.sent.endswith(refusal) == too_much
            and case.old.sent.endswith(refusal) != too_much)


def empty_message(case):
    return (case.step.data == b'.\r\n' and case.old.sent.count(b'\r\n') == 1
            and case.old.session[3] == smtpd.SMTPChannel.DATA
            and case.ours.sent.count(b'\r\n') == 2
            and [message[3] for message in case.ours.messages]
            == ['' if case.options.get('decode_data') else b''])


def data_not_utf8(case):
    if not (case.options.get('decode_data') and not is_utf8(case.step.data)
            and case.old.raised == 'UnicodeDecodeError' and len(case.ours.messages) == 1):
        return False
    message = case.ours.messages[0][3].encode('utf-8', 'surrogateescape')
    unstuffed = (b'\r\n' + case.step.data).replace(b'\r\n.', b'\r\n')[2:-len(b'\r\n\r\n')]
    return message == unstuffed.replace(b'\r\n', b'\n') and not case.ours.closed


def options_left_behind(case):
    def without_keywords(outcome):
        return outcome._replace(messages=[message[:4] for message in outcome.messages])

    refused = [step for step, outcome in case.earlier
               if re.match(rb'(?i)(MAIL|RCPT) ', step.line) and outcome.sent[:1] == b'5']
    mail = [step.line.decode().upper() for step, outcome in case.earlier
            if re.match(rb'(?i)MAIL ', step.line) and outcome.sent[:1] == b'2']
    return (refused and case.old.messages != case.ours.messages
            and without_keywords(case.old) == without_keywords(case.ours)
            and all(message[4]['rcpt_options'] == []
                    and mail[-1].endswith(' '.join(message[4]['mail_options']))
                    for message in case.ours.messages))


NO_OPTIONS = {}  # not to be changed
GREETING = Step(b'EHLO x')
SENDER_STEP = Step(b'MAIL FROM:<a@b>')
RECIPIENT_STEP = Step(b'RCPT TO:<c@d>')
OLD_TRANSACTION = [GREETING, SENDER_STEP, RECIPIENT_STEP]

DIFFERENCES = {  # which ones, and why we differ
    command_that_ended_the_session: 'every command gets an answer',
    control_character: 'they forge log lines and headers',
    verb_is_not_ascii: 'verbs are ASCII (RFC 5321, 2.4), and so is what a reply echoes',
    no_path: 'what the client did not say is forged',
    path_not_verbatim: 'addresses are handed on verbatim',
    size_in_foreign_digits: 'the digits of RFC 1870 are ASCII',
    stuck_after_too_much: 'the session goes on',
    size_counted_otherwise: 'RFC 1870, 5 says what counts',
    empty_message: 'it is a message',
    data_not_utf8: 'nothing is lost',
    options_left_behind: 'what was refused was not said',
}


def first_difference(old_module, steps, replies=(), options=NO_OPTIONS):
    """The Case at which the two first differ; None if they agree to the end."""
    old = Session(old_module, replies, **options)
    ours = Session(smtpd, replies, **options)
    earlier = []
    for step in steps:
        case = Case(step, earlier, old.take_step(step), ours.take_step(step), options, old_module)
        if case.old != case.ours:
            return case
        if case.ours.closed:
            return None
        earlier.append((step, case.ours))
    return None


def feed_by_steps(steps, replies, options):
    """Return the octets that we were fed, and all that we did."""
    session = Session(smtpd, replies, **options)
    octets = b''
    for step in steps:
        outcome = session.take_step(step)
        octets += step.line + b'\r\n'
        if outcome.sent.startswith(b'354'):
            octets += step.data
        if outcome.closed:
            break
    return octets, session.whole()


def cut_up(octets, cuts):
    """The octets in segments: cut at these shares of the whole, or single ones for None."""
    places = ({int(cut * len(octets)) for cut in cuts} | {0, len(octets)} if cuts is not None
              else range(len(octets) + 1))
    places = sorted(places)
    return [octets[start:end] for start, end in zip(places, places[1:])]


def compare(old_module, steps, replies=(), options=NO_OPTIONS, cuts=()):
    """Fail where the two differ and the table has no explanation for it.

    A step with an explained difference is left out, and the dialogue goes on as if it had not
    been said: all the rest is compared too.  What they agree on is then fed again, cut up.
    """
    octets, all_we_did = feed_by_steps(steps, replies, options)
    session = Session(smtpd, replies, **options)
    session.take(*cut_up(octets, cuts))
    assert session.whole() == all_we_did

    steps = list(steps)
    case = first_difference(old_module, steps, replies, options)
    while case is not None:
        assert any(applies(case) for applies in DIFFERENCES), 'unexplained: %r' % (case,)
        del steps[len(case.earlier)]
        case = first_difference(old_module, steps, replies, options)

    octets, all_we_did = feed_by_steps(steps, replies, options)
    segments = cut_up(octets, cuts)
    old = Session(old_module, replies, **options)
    old.take(*segments)
    if not (character_cut_in_two(old, all_we_did, segments)):
        assert old.whole() == all_we_did


def character_cut_in_two(old, all_we_did, segments):
    """Only in segments can these two occur; the old module dies and we do not."""
    return (not all(map(is_utf8, segments)) and old.raised == 'UnicodeDecodeError'
            and (old.channel._decode_data  # data, and commands
                 or b'500 Error: line too long' in all_we_did.sent))  # half of it was dropped


# ---------------------------------------------------------------------------------------------
# Dialogues: whole transactions, and verbs in any order with good and odd arguments

ODD_PATHS = [
    '<a@b.example>', '<>', 'a@b.example', '<Postmaster>', 'Postmaster', '<"a b"@c>', '"a b"@c',
    '<"a\\"b"@c>', '<"plain"@x>', '<a.b+c=d@[127.0.0.1]>', '<a@[IPv6:::1]>', '<@x,@y:a@b>',
    '<@x:Postmaster>', '<@x, @y:a@b>', '<a.@x>', '<.a@x>', '<a..b@x>', '<a@-.x>', '<a@-x>',
    '<a@x-.y>', '<a@x_y>', '<a@x.>', '<a@.x>', '<a@>', '<@b>', '<a@b@c>', '<a@x', 'a@x>',
    '< a@x>', '<a @x>', '<a@x >', '<a@x>y', '<a@x>>', '<(c)a@x>', '<a@x(c)>', 'Foo <a@x>',
    '<a@x> <b@y>', '<a@x>,<b@y>', '<=?utf-8?q?x?=@b>', '<a=?utf-8?q?x?=@b>', '<a@=?utf-8?q?x?=>',
    '<=?x?=@b>', '<\xe9@b>', '<a@\xe9.example>', '<\U0001f600@b>', '<a\u3000b@c>', '<a\\b@c>',
    '<a:b@c>', '<a[b@c>', "<a/b=c+d!#$%&'*^_`{|}~?-e@c>", '<"a"b@c>', '<"a".b@c>', '<""@c>',
    '<<a@b>>', '<<>>', '<', '>', '"', '']
ODD_VERBS = [
    'NOOP', 'RSET', 'HELP', 'VRFY', 'EXPN', 'QUIT', 'HELO', 'EHLO', 'noop', 'rSet', 'XFOO', '',
    'STARTTLS', 'QU\u0131T', 'R\u017fET', '\xdcBER', 'NO\0OP', 'NOOP\t', '_set_rset_state',
    '_EHLO']
ODD_ARGUMENTS = [
    None, '', ' ', 'x', 'x y', 'mail', 'RCPT', 'DATA', 'NOOP', 'HELP x', '\xe9', 'FROM:', 'TO:',
    'FROM :<a@b>', 'TO:<a@b>', 'from: <a@b>', 'x' * 490, 'x' * 507, 'x' * 508, 'x' * 530]
ODD_PARAMETERS = [
    'SIZE=5', 'size=21', 'SIZE=99999999999', 'SIZE', 'SIZE=', 'SIZE=\xb2', 'SIZE=\u0663',
    'SIZE=-1', 'BODY=7BIT', 'body=8bitmime', 'BODY=BINARYMIME', 'BODY', 'SMTPUTF8',
    'smtputf8', 'SMTPUTF8=1', 'X=Y', 'X', 'X=', '=', 'A-B=C', 'AUTH=<>', 'NOTIFY=NEVER', '<x>']
ODD_PIECES_OF_DATA = [
    b'\r\n', b'.', b'..', b'\r\n.', b'\n', b'\r', b'\n.\n', b'\r.\r', b'\r\n.\n', b'\0', b'abc',
    b'Subject: x\r\n', b'\xc3\xa9', b'\xe2\x82\xac', b'\xff', b'\xc3']
MODES = [{}, {'decode_data': True}, {'enable_SMTPUTF8': True}]


def a_command(*words):
    """The step of a command line of these words; some data, in case that it is DATA."""
    line = ' '.join(word for word in words if word is not None)
    return Step(line.encode('utf-8', 'surrogatepass').replace(b'\r\n', b''), b'x\r\n.\r\n')


def some_data(octets):
    """The octets up to the first end of data in them, and that end."""
    return (b'\r\n' + octets + b'\r\n.\r\n').partition(b'\r\n.\r\n')[0][2:] + b'\r\n.\r\n'


def path_commands(verb_and_keyword):
    paths = st.one_of(
        st.sampled_from(ODD_PATHS),
        st.text('ab.@<>"\\()[]:;,=?-_ \t\xe9\0', max_size=12),
        st.builds('<{}@{}>'.format,
                          st.text('ab.-+"\\( =?\xe9', min_size=1, max_size=8),
                          st.text('ab.-[]1:\xe9', min_size=1, max_size=8)),
        st.integers(480, 560).map(lambda length: '<%s@b>' % ('a' * length)))
    return st.builds(
        lambda blank, path, parameters: a_command(verb_and_keyword + blank + path, *parameters),
        st.sampled_from(['', '', '', ' ']), paths,
        st.lists(st.sampled_from(ODD_PARAMETERS), max_size=3))


def generated_dialogues():
    mail, rcpt = path_commands('MAIL FROM:'), path_commands('RCPT TO:')
    data = st.builds(
        Step, st.sampled_from([b'DATA', b'data']),
        st.lists(st.sampled_from(ODD_PIECES_OF_DATA), max_size=6).map(
            lambda pieces: some_data(b''.join(pieces))) | st.just(b'.\r\n'))
    command = st.one_of(
        mail, rcpt, data,
        st.builds(a_command, st.sampled_from(ODD_VERBS), st.one_of(
            st.sampled_from(ODD_ARGUMENTS), st.sampled_from(ODD_PATHS),
            st.text(max_size=8))),
        st.binary(max_size=12).map(lambda line: Step(line.replace(b'\r\n', b''))))
    transaction = st.builds(
        lambda mail, recipients, data: [mail, *recipients, data],
        mail | st.just(SENDER_STEP),
        st.lists(rcpt | st.just(RECIPIENT_STEP), min_size=1, max_size=3), data)
    greeting = st.sampled_from([[], [GREETING], [GREETING], [Step(b'HELO x')]])
    return st.builds(
        lambda greeting, parts: greeting + [step for part in parts for step in part],
        greeting,
        st.lists(transaction | st.lists(command, max_size=4), max_size=4))


@pytest.mark.parametrize('options', MODES, ids=str)
@pytest.mark.parametrize('earlier', [
    [], [GREETING], [Step(b'HELO x')], OLD_TRANSACTION[:2], OLD_TRANSACTION],
    ids=['greeted by none', 'EHLO', 'HELO', 'MAIL', 'RCPT'])
def test_each_command_is_answered_as_by_the_old_module(old_module, earlier, options):
    for verb in ODD_VERBS + ['DATA', 'MAIL', 'RCPT']:
        for argument in ODD_ARGUMENTS:
            steps = earlier + [a_command(verb, argument), Step(b'NOOP')]
            compare(old_module, steps, options=options)


@pytest.mark.parametrize('command', ['MAIL FROM:', 'RCPT TO:', 'VRFY '])
def test_each_path_is_taken_as_by_the_old_module(old_module, command):
    for path in ODD_PATHS:
        for blank, after in [('', ''), (' ', ''), ('', ' SIZE=1'), ('', ' X=Y')]:
            steps = OLD_TRANSACTION[:1 + (command == 'RCPT TO:')]
            compare(old_module, steps + [a_command(command + blank + path + after)])


@pytest.mark.parametrize('options', MODES, ids=str)
def test_each_parameter_is_taken_as_by_the_old_module(old_module, options):
    for command in ('MAIL FROM:<a@b>', 'RCPT TO:<a@b>'):
        for first, second in itertools.product(ODD_PARAMETERS, [None, *ODD_PARAMETERS]):
            steps = OLD_TRANSACTION[:1 + command.startswith('RCPT')]
            compare(old_module, steps + [a_command(command, first, second)], options=options)


@pytest.mark.parametrize('options', MODES, ids=str)
def test_data_are_taken_as_by_the_old_module(old_module, options):
    for pieces in itertools.product(ODD_PIECES_OF_DATA, repeat=2):
        steps = OLD_TRANSACTION + [Step(b'DATA', some_data(b''.join(pieces))), Step(b'NOOP')]
        compare(old_module, steps, [None, '550 no'], options, cuts=None)


@settings(max_examples=1000 if sys.version_info >= (3, 11) else 300)  # the same first 300
@given(
    steps=generated_dialogues(),
    replies=st.lists(st.sampled_from([None, '250 x', '550 no']), max_size=3),
    limit=st.sampled_from([{}, {}, *({'data_size_limit': n} for n in (None, 0, 5, 20))]),
    mode=st.sampled_from(MODES),
    cuts=st.none() | st.lists(st.floats(0, 1), max_size=8))
def test_dialogues_are_as_with_the_old_module(old_module, steps, replies, limit, mode, cuts):
    compare(old_module, steps, replies, {**limit, **mode}, cuts)
