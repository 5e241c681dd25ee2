"""The oracle over programs: what may differ between the old module and ours, and what does.

judge() compares two traces of one program (see programs.py); what may differ stands in the
table ALLOWED.  tests/tools/oracle.py runs as many programs as one likes.
"""

import json
import re
import typing

from tests.programs import (
    WATCHED,
    make_program,
    shortened,
    shown,
    source_of,
    state_text,
)

# ---------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------

class Case(typing.NamedTuple):
    """A program, both traces, and the place where they first differ."""

    program: dict
    old: list
    new: list
    at: int

    @property
    def old_rest(self):
        return self.old[self.at:] + [['end']]

    @property
    def new_rest(self):
        return self.new[self.at:] + [['end']]

    @property
    def source(self):
        return source_of(self.program)

    @property
    def said(self):
        return ''.join(event[1] for event in self.program['client'] if event[0] == 'feed')

    def overrides(self, *names):
        return bool(self.program['methods'].keys() & set(names))

    def raises_in(self, name):
        """Whether a method of the program's has a statement that raises."""
        return 'raise' in str(self.program['methods'].get(name))

    def new_says(self):
        """What ours sends before anything else happens, beyond what the old module sends too."""
        first = self.new_rest[0]
        if first[0] != 'sent':
            return ''
        if self.old_rest[0][0] != 'sent':
            return first[1]
        old = self.old_rest[0][1]
        return first[1][len(old):] if first[1].startswith(old) else ''

    def state_differs_in(self):
        """The names of the attributes in which the states differ here."""
        old, new = self.old_rest[0], self.new_rest[0]
        if old[0] != 'state' and new[0] != 'state':
            return set()
        old = old[1] if old[0] == 'state' else {}
        new = new[1] if new[0] == 'state' else {}
        return {name for name in {*old, *new} if old.get(name) != new.get(name)}

    def seen(self, name):
        """What an attribute is here, in the old module and in ours."""
        return [next((event[1][name] for event in reversed(trace[:self.at + 1])
                      if event[0] == 'state' and name in event[1]),
                     state_text(name, WATCHED[name]))
                for trace in (self.old, self.new)]


def compared(trace):
    """The trace with what was sent in one piece, where nothing else happens between."""
    together = []
    for event in trace:
        if event[0] == 'sent' and together and together[-1][0] == 'sent':
            together[-1] = ['sent', together[-1][1] + event[1]]
        else:
            together.append(event)
    return together


def first_case(program, old, new):
    """The Case of two traces, or None where they are the same."""
    for at, (one, other) in enumerate(zip(old, new)):
        if one != other:
            return Case(program, old, new, at)
    if len(old) != len(new):
        return Case(program, old, new, min(len(old), len(new)))
    return None


def judge(program, old, new):
    """(Case that nothing allows, or None; the reasons in ALLOWED that were needed)."""
    old, new = compared(old), compared(new)
    reasons, used = [], set()
    while True:
        case = first_case(program, old, new)
        if case is None:
            return None, reasons
        if old_never_ends(case):
            return None, [NOT_COMPARED]
        reason, applies, forget = next(
            (kind for kind in KINDS if kind[1] not in used and kind[1](case)), (None,) * 3)
        if reason is None:
            return case, reasons
        if reason not in reasons:
            reasons.append(reason)
        if forget is None:
            return None, reasons
        used.add(applies)
        old, new = compared(forget(old)), compared(forget(new))


# ---------------------------------------------------------------------------
# What may differ
# ---------------------------------------------------------------------------

class Allowed(typing.NamedTuple):
    """A row of the table: what may differ, in a user's words, and how that is recognized.

    Each pair of `kinds` is a function that recognizes a Case, and one that takes out of a
    trace what differs, so that the rest is compared; with None nothing that comes after is.
    """

    reason: str
    kinds: list


def without_state(*names):
    def forget(trace):
        for event in trace:
            if event[0] != 'state':
                yield event
                continue
            left = {name: value for name, value in event[1].items() if name not in names}
            if left:
                yield ['state', left]

    return lambda trace: list(forget(trace))


SENDING = {'send', 'initiate_send', 'handle_write', 'handle_write_event', 'replaced send'}
ENDING = {'closed', 'map', 'client', 'state', 'end', 'close', 'handle_close', 'replaced close',
          'replaced handle_close', *SENDING}
BEGINNINGS = {'client', 'found_terminator', 'process_message', 'get_terminator',
              'collect_incoming_data', '_getaddr', '_getparams'}
INPUT = {'found_terminator', 'process_message', 'get_terminator', 'collect_incoming_data'}
BEGINS_DATA = ['set_terminator', repr(b'\r\n.\r\n')]  # smtp_DATA() replies later
FAILURE = '451 Internal confusion\r\n'


def was_answered(case):
    """Whether anything was sent since the program, or a command of the client, was called."""
    names = [event[0] for event in reversed(case.old[:case.at])]
    if 'initiate_send' in names and 'sent' not in names[:names.index('initiate_send')]:
        return False  # what was pushed last has not been sent
    for number in reversed(range(case.at)):
        event = case.old[number]
        if (event[0] == 'push' and case.old[number - 1][0] == 'state'
                and 'ac_in_buffer' in case.old[number - 1][1]):
            return False  # the first one of a command
        if event[0] == 'sent':
            # What is no command has no method: that reply was to the line before.
            return re.search(r'500 Error: [^\r\n]+\r\n$', event[1]) is None
        if event[0] in BEGINNINGS or event[0].startswith('smtp_') or event == BEGINS_DATA:
            return False
    return False


def failure_answered(case):
    """Ours says 451 to a command or a message that failed before it had an answer."""
    calls_ours = 'super().handle_error()' in case.source or '.handle_error(self)' in case.source
    if case.overrides('handle_error') and not calls_ours or was_answered(case):
        return False
    last = next((event[0] for event in reversed(case.old[:case.at])
                 if event[0] not in ('state', 'sent', 'push', '_set_post_data_state',
                                     'set_terminator', *SENDING)), None)
    return (last in ('error', 'handle_error', 'replaced handle_error')
            and FAILURE[:5] in str(case.new_rest[:8]))


def failed_message_is_over(case):
    """A handler failed: ours forgets the transaction before handle_error() is called."""
    before = [event[0] for event in case.old[max(0, case.at - 8):case.at]]
    fault = next((event[0] for event in case.old_rest if event[0] != 'state'), 'end')
    names = [event[0] for event in case.new_rest[:6]]
    return ('process_message' in before and fault in names
            and fault in ('handle_error', 'error', 'replaced handle_error', 'handle_close',
                          'close', 'left the loop')
            and {*names[:names.index(fault)]} <= {'state', 'set_terminator', 'sent', 'closed',
                                                  '_set_post_data_state',
                                                  'replaced _set_post_data_state'})


def input_is_held(case):
    """A failure has put the rest of the input aside until the loop's next turn."""
    return (case.state_differs_in() == {'ac_in_buffer'}
            and case.seen('ac_in_buffer')[1] == "b''"
            and any(event[0] in ('handle_error', 'replaced handle_error', 'error', 'left the loop')
                    for event in [*case.old[max(0, case.at - 4):case.at], *case.old_rest[:2]]))


def goes_on_after_failure(case):
    """Ours goes on with the input after a failure, the old module when more comes in."""
    before = {event[0] for event in case.old[:case.at]}
    return (before.intersection(('handle_error', 'error', 'handle_close', 'close',
                                 'replaced handle_error'))
            and next(event[0] for event in case.old_rest if event[0] != 'state') in (
                'client', 'end', 'map', 'sent')
            and (case.overrides('handle_error', 'handle_close', 'close')
                 or 'replace(' in case.source))


def long_line_is_not_kept(case):
    names = case.state_differs_in()
    return (bool(names) and names <= {'num_bytes', 'received_lines'}
            and re.search('x{500}|y{500}', case.said) is not None)


def set_before_a_failure(case):
    """The channel could not be made, and has got so far."""
    return (bool(case.state_differs_in()) and case.state_differs_in() <= {'fqdn', 'peer', 'addr'}
            and any(event[0] in ('error', 'start raised', 'handle_error')
                    for event in case.old[:case.at]))


def is_quiet(events):
    return all(event[0] in ENDING or event[0] == 'left the loop' for event in events)


def stops_at_close(case):
    """After close() ours executes no more of what the client sent."""
    return ['closed'] in case.new[:case.at] and is_quiet(case.new_rest)


def asks_for_the_end(case):
    return 'QUIT' in case.said.upper() or 'QUIT' in case.source or 'close_when_done' in case.source


def has_ended(case):
    """Ours has ended the session, or would have but for the program."""
    return (['closed'] in case.new
            or 'discard_buffers' in case.source
            or case.overrides('handle_close', 'close', 'initiate_send', 'writable',
                              'handle_write', 'handle_write_event'))


def stops_at_close_when_done(case):
    """After close_when_done() ours executes no more of what the client sent."""
    harmless = {'sent', 'busy', 'handle_read', 'handle_read_event'}
    if case.raises_in('handle_write'):
        harmless.add('error')
    if case.overrides('handle_write_event', 'handle_read_event'):  # it may push
        harmless.add('push')
    rest = until_close(case.new_rest)
    return (asks_for_the_end(case) and has_ended(case) and is_quiet(
        [event for event in rest if event[0] not in harmless and event not in case.old_rest])
        and not any(event[0] in INPUT for event in rest))


def until_close(events):
    """The events up to where close() is called, which may have a body of the program's."""
    return events[:next((number for number, event in enumerate(events)
                         if event[0] in ('close', 'handle_close')), len(events))]


def collects_less(case):
    """After close_when_done() ours does not even collect what comes in."""
    return (asks_for_the_end(case) and has_ended(case) and bool(case.state_differs_in())
            and case.state_differs_in() <= {'received_lines', 'num_bytes', 'ac_in_buffer'}
            and ('received_lines' not in case.state_differs_in()
                 or case.seen('received_lines')[1] == "'(none)'")
            and case.seen('ac_in_buffer')[1] == "b''")


def dropped_input_after_the_end(case):
    """The program has kept the session open after close_when_done(): the input was dropped."""
    return case.overrides('close', 'handle_close') and re.search(
        r"221 Bye|\(\d+, None\)|'close_when_done'", str(case.old[:case.at])) is not None


def old_never_ends(case):
    """The old module turns in circles, or the program does in it."""
    return any(event[0] in ('busy', 'hung') or 'RecursionError' in str(event[1:2])
               for event in case.old)


SET_EARLY = {*WATCHED, 'command_size_limits', '_decode_data', '_emptystring', 'conn',
             'smtp_server', 'socket'}


def state_is_there(case):
    """The old module has not set an attribute yet that ours has from the start."""
    before = {'state', 'sent', '_set_rset_state', '_set_post_data_state', 'replaced handle_error'}
    event = next((each for each in case.old_rest if each[0] not in before), ['end'])
    if case.new == [['hung']]:  # a close() that pushes, which fails, which closes ...
        return ['error', 'AttributeError terminator'] in case.old
    if event[0] == '__getattr__' and event[1].strip("'") in SET_EARLY:
        return True
    words = str(event[1] if event[1:] else '').strip("'").split()
    return (event[0] in ('error', 'start raised', 'handle_error', 'left the loop')
            and words[:1] == ['AttributeError'] and SET_EARLY.issuperset(words[1:2] or ['?']))


def sends_before_it_closes(case):
    """Ours closes only when what waits is sent."""
    says = case.new_says()
    return (bool(says) and not says.startswith(FAILURE[:-2])
            and ['closed'] in case.old and ['closed'] in case.new_rest)


def control_character(case):
    """CR or LF is left in a command line: by a terminator of the program's own, mostly."""
    if ['closed'] in case.old[:case.at]:  # nobody sees the replies
        return case.seen('terminator')[0] == repr(b'\n')
    # What was sent in pieces, too.
    old, new = (str(events[:6]) + repr(''.join(each[1] for each in events if each[0] == 'sent'))
                for events in (case.old_rest, case.new_rest))
    return (new.count('500 Error: bad syntax') > old.count('500 Error: bad syntax') or re.search(
        r"""command "[^"]*\\+[rn]|'__getattr__', [^]]*\\+r""", old) is not None)


def piece_in_another_form(case):
    """Data is put together as it comes, where no hook sees the pieces."""
    return (case.seen('smtp_state') != ['0', '0'] and bool(case.state_differs_in())
            and case.state_differs_in() <= {'received_lines', 'num_bytes', 'ac_in_buffer'}
            and not case.overrides(
                'collect_incoming_data', 'found_terminator', 'get_terminator')
            and not any(event[0] in ('replaced found_terminator', 'replaced get_terminator')
                        for event in case.old[:case.at]))


def buffer_is_emptied(case):
    """close() and close_when_done() let go of what the client sent."""
    has_ended = ['closed'] in case.old[:case.at] or ', None)' in case.seen('producer_fifo')[1]
    return has_ended and 'ac_in_buffer' in case.state_differs_in()


def counted_as_in_rfc_1870(case):
    """num_bytes, while data is received."""
    return 'num_bytes' in case.state_differs_in() and case.seen('smtp_state')[0] != '0'


def message_is_dropped(case):
    return ('received_data' in case.state_differs_in()
            and case.seen('received_data')[1] in ("''", "b''"))


def options_left_behind(case):
    return bool(case.state_differs_in().intersection(('mail_options', 'rcpt_options')))


BEGUN_ANEW = ('smtp_state', 'seen_greeting', 'extended_smtp', 'data_size_limit', 'num_bytes',
              'received_lines', 'mailfrom', 'rcpttos', 'require_SMTPUTF8', 'terminator')


def begun_anew(case):
    """What was set before __init__(), or before it is called again, is not seen in it."""
    is_made = any(event[0] == 'client' for event in case.old[:case.at])
    names = case.state_differs_in()
    return (('__init__' in case.source or not is_made)
            and bool(names) and names <= {*BEGUN_ANEW}
            and all(case.seen(name)[1] == state_text(name, WATCHED[name])
                    for name in names - {'data_size_limit', 'seen_greeting', 'extended_smtp'}))


def gone_already(case):
    """A connection that is closed while the channel is made is no error."""
    return (any(event[0] in ('start raised', 'error') for event in case.old_rest[:2])
            and ['closed'] in case.new[:case.at]
            and not any(event[0] == 'client' for event in case.new[:case.at]))


NOT_COMPARED = 'not compared: the old module never comes to rest'

ALLOWED = [
    Allowed('num_bytes in data: RFC 1870 says what counts',
            [(counted_as_in_rfc_1870, without_state('num_bytes'))]),
    Allowed('the last message is kept until the next DATA only',
            [(message_is_dropped, without_state('received_data'))]),
    Allowed('what was refused leaves no trace',
            [(options_left_behind, without_state('mail_options', 'rcpt_options'))]),
    Allowed('data is put together as it comes, where no hook sees the pieces',
            [(piece_in_another_form,
              without_state('received_lines', 'num_bytes', 'ac_in_buffer'))]),
    Allowed('__init__() begins the session anew before it calls a method',
            [(begun_anew, without_state(*BEGUN_ANEW))]),
    Allowed('attributes are there from the start',
            [(set_before_a_failure, without_state('fqdn', 'peer', 'addr')),
             (gone_already, None),
             (state_is_there, None)]),
    Allowed('the input after a failure comes at the next turn',
            [(input_is_held, without_state('ac_in_buffer')),
             (goes_on_after_failure, None)]),
    Allowed('a failure is answered with 451',
            [(failure_answered, None)]),
    Allowed('a failed command or message is over',
            [(failed_message_is_over, None)]),
    Allowed('nothing is executed after close()',
            [(buffer_is_emptied, without_state('ac_in_buffer')), (stops_at_close, None)]),
    Allowed('nothing is executed after close_when_done()',
            [(collects_less, without_state('received_lines', 'num_bytes', 'ac_in_buffer')),
             (stops_at_close_when_done, None),
             (dropped_input_after_the_end, None)]),
    Allowed('what waits is sent before the end', [(sends_before_it_closes, None)]),
    Allowed('control characters in a command are refused, a bare LF may end it',
            [(control_character, None)]),
    Allowed('a line that is too long is not kept',
            [(long_line_is_not_kept, without_state('num_bytes', 'received_lines'))]),
]
KINDS = [(row.reason, *kind) for row in ALLOWED for kind in row.kinds]


# ---------------------------------------------------------------------------
# Many programs
# ---------------------------------------------------------------------------

def compare_seeds(first, last, old, new, chunk=100):
    """Yield (seed, *judgement) for each seed from first up to last."""
    for start in range(first, last, chunk):
        seeds = range(start, min(start + chunk, last))
        answers = [worker.ask([start, seeds.stop], len(seeds)) for worker in (old, new)]
        for seed, old_line, new_line in zip(seeds, *answers):
            if old_line == new_line:
                yield seed, None, []
            else:
                traces = json.loads(old_line), json.loads(new_line)
                yield (seed, *judge(make_program(seed), *traces))


def shown_case(case):
    lines = [shown(case.program), '']
    same = case.at
    lines += ['both  %s' % shown_event(event) for event in case.old[max(0, same - 6):same]]
    lines += ['old   %s' % shown_event(event) for event in case.old[same:same + 8]]
    lines += ['ours  %s' % shown_event(event) for event in case.new[same:same + 8]]
    return '\n'.join(lines)


def shown_event(event):
    return ' '.join(shortened(each) if number else each for number, each in enumerate(event))
