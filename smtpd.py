"""An SMTP server: the smtpd module that Python 3.12 removed, rewritten from scratch.

For example, a server that tells who sends mail to whom::

    import asyncore, smtpd

    class Inbox(smtpd.SMTPServer):
        def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
            print(mailfrom, '->', rcpttos, len(data), 'octets')

    inbox = Inbox(('localhost', 8025), None)
    asyncore.loop()

`SMTPServer` listens and gives each complete message to process_message();
`SMTPChannel` holds the dialogue with one client.  `DebuggingServer` prints
messages, `PureProxy` relays them, and `MailmanProxy` also delivers to the lists of
Mailman 3.  `python -m smtpd` runs any of them from the command line.

The protocol is RFC 5321 (SMTP) with RFC 1870 (SIZE), RFC 6152 (8BITMIME) and
RFC 6531 (SMTPUTF8).

Everything happens in the thread that runs asyncore.loop(), in asynchat's order.
Nothing that a client sends raises out of the loop.  A handler that fails gets
the client a 451, so that it keeps the message and tries again.
"""

# Layout of this file: names of the module; paths, parameters, replies, handlers (pure
# functions); the transport; the channel; what wakes the loop; the servers; the proxies;
# the command line.

import asynchat
import asyncore
import collections
import contextlib
import errno
import functools
import getopt
import importlib
import io
import itertools
import math
import operator
import os
import queue
import re
import select
import socket
import sys
import threading
import time
import traceback
import warnings

__all__ = ['SMTPChannel', 'SMTPServer', 'DebuggingServer', 'PureProxy', 'MailmanProxy']

#: What the banner says after the host name.  A program may replace it.  It is not the
#: version of the distribution.
__version__ = 'Python SMTP proxy version 0.3'

#: The name of the program in the usage text.
program = sys.argv[0] if sys.argv else 'smtpd'

NEWLINE = '\n'  #: For programs that use it.
COMMASPACE = ', '  #: For programs that use it.
DATA_SIZE_DEFAULT = 33554432  #: Octets; the limit that the standard library had.


def __getattr__(name):
    # Old programs import EMPTYSTRING; CPython's test of __all__ refuses it as a plain name.
    if name == 'EMPTYSTRING':
        return ''
    raise AttributeError('module %r has no attribute %r' % (__name__, name))


class Devnull:
    """A stream that discards what is written to it."""

    def write(self, msg):
        pass

    def flush(self):
        pass


#: Where the dialogue of every session is written: any object with a write() method,
#: such as `sys.stderr`.  The option -d and programs replace it at run time.
DEBUGSTREAM = Devnull()


def _debug(form, *values):
    """Print to DEBUGSTREAM.  Commands look for a Devnull first: that is faster than a call."""
    if not isinstance(DEBUGSTREAM, Devnull):
        with contextlib.suppress(OSError, ValueError):  # closed, or its encoding lacks a character
            print(form % values, file=DEBUGSTREAM)


class _NoThread(Exception):
    """No thread can be started, or there is no descriptor to wake the loop when it ends."""


_ASYNCORES_LOG_INFO = asyncore.dispatcher.log_info  # before a program replaces it


def _log_info(self, message, *args, **kwargs):
    """asyncore's log_info(), but to standard error; never raises.

    A mixin's log_info() is called instead, and so is one that was patched into asyncore.
    """
    ours = next(each for each in self.__class__.__mro__
                if vars(each).get('log_info') is _log_info)
    inherited = super(ours, self).log_info
    if getattr(inherited, '__func__', None) is not _ASYNCORES_LOG_INFO:
        inherited(message, *args, **kwargs)
    else:
        _log_to_stderr(self, message, *args, **kwargs)


def _log_to_stderr(self, message, type='info'):
    if type not in self.ignore_log_types:
        _write_to_stderr('%s: %s\n' % (type, message))


def _write_to_stderr(text):
    with contextlib.suppress(Exception):  # closed, full, or None
        sys.stderr.write(text.encode('ascii', 'backslashreplace').decode('ascii'))


def _log_exception(self):
    """Write the exception that is being handled to the log; never raise."""
    error = sys.exc_info()[1]
    message = 'exception in %s\n%s' % (_safe_repr(self), _safe_traceback(error))
    try:
        self.log_info(message, 'error')
    except Exception as fault:
        _write_to_stderr('error: %s\n%s\n' % (message, _describe(fault)))


def _safe_traceback(error):
    if isinstance(error, _NoThread):  # there may be many, and all come from the same place
        return _describe(error)
    try:
        return traceback.format_exc()
    except Exception:  # the first call imports modules: descriptors, memory or rights may lack
        return _describe(error)


def _describe(error):
    try:
        return '%s: %s' % (type(error).__name__, error)
    except Exception:
        return type(error).__name__


def _safe_repr(thing):
    try:
        return repr(thing)
    except Exception:
        return '<%s, whose repr() fails>' % type(thing).__name__


# Taken at import: CPython's tests replace smtpd.socket with a mock that lacks them.
_NO_DELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
_QUICK_ACK = ((socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
              if hasattr(socket, 'TCP_QUICKACK') else None)  # Linux only
_OUT_OF_BAND = socket.MSG_OOB
_PEEK = socket.MSG_PEEK
_SHUT_BOTH = socket.SHUT_RDWR
_socketpair = socket.socketpair
# What select() takes: POSIX descriptors below 1024; Windows 512 sockets, of which a
# few are left for listeners and what wakes the loop.
_FD_SETSIZE = 1024 if os.name == 'posix' else sys.maxsize
_MOST_SOCKETS = 500 if os.name == 'nt' else sys.maxsize
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


# ---------------------------------------------------------------------------
# Paths, parameters, replies, handlers: pure functions
# ---------------------------------------------------------------------------

# The old module parsed addresses with the email package, whose atoms allow more than
# RFC 5321's atext: anything but specials, blanks and control characters.
_NO_ATOM = r'\x00-\x20\x7f-\x9f()<>@,:;\\"\[\]'
_ATOM = r'[^.{no_atom}]+'.format(no_atom=_NO_ATOM)
_ENCODED_WORD = r'=\?[^?\s]*\?[bBqQ]\?[^?\s]*\?='  # RFC 2047; refused, since we do not decode it
_DOT_STRING = r'(?!{word}){atom}(?:\.{atom})*'.format(word=_ENCODED_WORD, atom=_ATOM)
# Phone companies gave out local parts with dots in odd places, and the old module took them.
_ATOMS_AND_DOTS = r'(?!\.*{word}|\S*\.\.{word})[^{no_atom}]+'.format(
    word=_ENCODED_WORD, no_atom=_NO_ATOM)
_QUOTED_STRING = r'"(?!%s)(?:[^\x00-\x1f\x7f-\x9f"\\]|\\[^\x00-\x1f\x7f-\x9f])*"' % _ENCODED_WORD
_LOCAL_PART = r'(?:{atoms}|{quoted_string})'.format(
    atoms=_ATOMS_AND_DOTS, quoted_string=_QUOTED_STRING)
_ADDRESS_LITERAL = r'\[[^\x00-\x20\x7f-\x9f\[\]\\]*\]'
_DOMAIN = r'(?:{dot_string}|{literal})'.format(
    dot_string=_DOT_STRING, literal=_ADDRESS_LITERAL)
_MAILBOX = r'{local_part}@{domain}'.format(local_part=_LOCAL_PART, domain=_DOMAIN)
_SOURCE_ROUTE = r'@{domain}(?:,@{domain})*:'.format(domain=_DOMAIN)  # accepted and ignored
_PATH = re.compile(
    r'[ \t]*(?:<(?:{route})?(?P<path>{mailbox}|{local_part})>(?=[ \t]|$)|(?P<null><>)(?=[ \t]|$)'
    r'|(?P<bare>{mailbox}(?=[ \t]|$)|{local_part}$))\s*'.format(
        route=_SOURCE_ROUTE, mailbox=_MAILBOX, local_part=_LOCAL_PART))

# What nearly all clients send: <local@domain> of letters, digits and a few signs.
_PLAIN_PATH = re.compile(r'<([\w+%=]+(?:[.-][\w+%=]+)*@[a-zA-Z0-9]+(?:[.-][a-zA-Z0-9]+)*)>$',
                         re.ASCII)


_CONTROL_CHARACTER = re.compile('[\x00-\x08\x0a-\x1f\x7f-\x9f]')  # all but TAB, a blank


@functools.lru_cache(maxsize=64)  # the same few lines come again and again
def _parse_command(line):
    """Split a command line (bytes) into verb, name of its method, and argument or None.

    The verb is in upper case, or None if the line is empty, is not UTF-8 or contains
    control characters.  A verb that is not ASCII has no method: the name is ''.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None, '', None
    if not text or not text.isprintable() and _CONTROL_CHARACTER.search(text):
        return None, '', None
    verb, space, argument = text.partition(' ')
    argument = argument.strip() if space else None
    if not verb.isascii():
        return verb, '', argument
    verb = verb.upper()
    return verb, 'smtp_' + verb, argument


@functools.lru_cache(maxsize=64)
def _parse_path(text):
    """Split "path rest" into the path, verbatim but without brackets, and the rest.

    RFC 5321, 4.1.2.  The null path stays '<>'.  Returns ('', text) if the text does not
    begin with a well-formed path.
    """
    plain = _PLAIN_PATH.match(text)
    if plain:
        return plain[1], ''
    match = _PATH.match(text)
    if not match:
        return '', text
    return match['path'] or match['null'] or match['bare'], text[match.end():]


def _printable(text):
    """The text with question marks for all that is not printable ASCII."""
    return re.sub(r'[^ -~]', '?', text)


def _reply_lines(status):
    """Turn what a handler returned into the lines of one reply; [] if it is no reply.

    Several lines become a multi-line reply (RFC 5321, 4.2.1).  Bytes stay as they are.
    """
    if isinstance(status, bytes):
        return [line.encode('utf-8', 'surrogateescape')
                for line in _reply_lines(status.decode('utf-8', 'surrogateescape'))]
    if not isinstance(status, str) or not re.match(r'[2-5][0-9][0-9]', status):
        return []
    code = status[:3]
    lines = [line for line in re.split(r'[\r\n]+', status) if line]
    if len(lines) == 1 and status[3:4] != '-':
        return lines
    separators = ('', ' ', '-', status[3])
    texts = [line[4:] if line[:3] == code and line[3:4] in separators else line for line in lines]
    return [code + '-' + text for text in texts[:-1]] + [code + ' ' + texts[-1]]


_TAKES_ARGS, _TAKES_KWARGS = 4, 8  # inspect.CO_VARARGS, CO_VARKEYWORDS; importing it costs 2 MB


def _accepted_keywords(handler, offered):
    """The offered keywords that a handler takes; those of Python 2 and 3.4 take none."""
    handler = getattr(handler, '__func__', handler)  # its attributes are found faster
    while handler is not None:  # a decorator, and what it wraps, must both take them
        code = getattr(handler, '__code__', None)
        if code is not None and not code.co_flags & _TAKES_KWARGS:
            named = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
            offered = {name: offered[name] for name in offered if name in named}
        handler = getattr(handler, '__wrapped__', None)
    return offered


# ---------------------------------------------------------------------------
# The transport: asynchat, for clients that cannot be trusted
# ---------------------------------------------------------------------------

# What becomes of a channel's input:
_OPEN = 0  # it is read and executed
_IDLE = 1  # the same, but none has come for long: the loop's next turn says goodbye
_PAUSED = 2  # it waits for a later turn of the loop, when the client has read its replies
_BUSY = 3  # it waits until the work before it is done
_CLOSING = 4  # it is dropped

_END_OF_LINE = b'\r\n'
_END_OF_DATA = b'\r\n.\r\n'

_MOST_HELD = 500  # replies that leave together, or wait for a client that does not read

_ENDS_OF_THE_LOOP = (asyncore.ExitNow, KeyboardInterrupt, SystemExit)  # not errors, in asyncore

_ANSWERED = '_smtpd_answered'  # marks an exception that the client has been told about

# Threads other than the loop's may push and close, perhaps under a lock of the program's that
# its close() or del_channel() takes as well: so none of the program's code runs under _lock.
# Its send() and handle_close() do run under _send_lock, and so closing never takes that one.
_lock = threading.RLock()  # guards all that threads share ...
_send_lock = threading.RLock()  # ... but for the output: one thread sends; taken before _lock


class _Flow:
    """What a channel keeps to itself, above all about its input and output.

    It is one attribute of the channel instead of a dozen: CPython is faster with objects that
    have fewer than 30 attributes, and from 3.13 on only if their class has no slots.
    """

    __slots__ = (
        'gate',  # what becomes of input: _OPEN to _CLOSING
        'unread_input',  # what was received and not given to a hook ...
        'input_start',  # ... from here on
        'is_mid_block',  # a piece has been taken since the last terminator
        'message_under_way',  # bytes or a BytesIO, where data goes past the hooks
        'holds_replies',  # they leave with those of the commands that follow
        'has_replied',  # since the last piece was taken: what it did stands, and gets no 451
        'last_sign_of_life',  # of the client, on the monotonic clock
        'next_look_for_idleness',  # the same; not at each turn of the loop, which is costly
        'watcher',  # the selector that watches this channel, instead of the socket map
        'errors_since_message',  # 5yz replies
        'relay',  # takes the steps of this session to a proxy's upstream
    )

    def begin(self):
        """Set the state of a new connection."""
        self.gate = _OPEN
        self.unread_input = b''
        self.input_start = 0
        self.is_mid_block = False
        self.message_under_way = None
        self.holds_replies = False
        self.has_replied = False
        self.last_sign_of_life = time.monotonic()
        self.next_look_for_idleness = 0.0
        self.watcher = None
        self.errors_since_message = 0
        self.relay = None


class _Transport(asynchat.async_chat):
    """asynchat with limits: cuts input into pieces for the hooks, queues and sends output.

    The hooks are called in asynchat's order, with asynchat's arguments; where nobody would
    notice, a piece goes directly past them.  A piece that is whole, a line or a message, is a
    block.  What asynchat does not do: input is processed only while the gate is open; a fault
    consumes the input that caused it, or ends the session; replies to pipelined commands leave
    together if no program can tell the difference.
    """

    idle_timeout_seconds = None
    unsent_reply_limit = None
    use_encoding = True  # asynchat's: a terminator may be text, as in Python 2's programs

    def __new__(cls, *args, **kwargs):
        # State is set here, since a program's __init__() may never call ours.
        channel = super().__new__(cls)
        channel._flow = _Flow()
        channel._begin_anew()
        return channel

    def _begin_anew(self):
        self._flow.begin()

    def _set_gate(self, gate):
        self._flow.gate = gate
        self._tell_watcher()

    def _tell_watcher(self):
        """Call this when the answer of readable() or writable() may have changed."""
        watcher = self._flow.watcher
        if watcher is not None:
            watcher.watch(self)

    # ------------------------------------------------------------------
    # Input
    # ------------------------------------------------------------------

    @property
    def ac_in_buffer(self):
        """What was received and not yet given to a hook, as in asynchat."""
        flow = self._flow
        return flow.unread_input[flow.input_start:] if flow.input_start else flow.unread_input

    @ac_in_buffer.setter
    def ac_in_buffer(self, octets):
        self._flow.unread_input = octets
        self._flow.input_start = 0

    def readable(self):
        flow = self._flow
        if flow.watcher is None and time.monotonic() >= flow.next_look_for_idleness:
            self._look_for_idleness(time.monotonic())
        # When closing with nothing left to send: to see the end of the input.
        return ((flow.gate <= _IDLE or flow.gate == _CLOSING and not self.producer_fifo)
                and super().readable())

    def handle_read(self):
        if super(_Transport, type(self)).handle_read is not _ASYNCHAT_HANDLE_READ:
            super().handle_read()  # a mixin's, or one that was patched into asynchat
            return
        if self.producer_fifo and self._flow.gate != _CLOSING and self._client_has_ended():
            self.close_when_done()
            self._set_gate(_CLOSING)  # even if that is overridden: the end can be read for ever
            return
        try:
            data = self.recv(self.ac_in_buffer_size)
        except BlockingIOError:
            return
        except OSError:
            self.handle_error()
            return
        flow = self._flow
        if flow.input_start:
            flow.unread_input, flow.input_start = self.ac_in_buffer, 0
        flow.unread_input += data
        self._process_input()

    def _client_has_ended(self):
        """Whether the client has closed its half: recv() would tell too, but close at once."""
        with contextlib.suppress(OSError, TypeError, ValueError):  # ValueError: TLS cannot peek
            return self.socket.recv(1, _PEEK) == b''
        return False

    def _process_input(self):
        """Process what was received, as far as the gate lets it in."""
        try:
            self._take_pieces()
        except _ENDS_OF_THE_LOOP:
            raise
        except BaseException as error:
            self._answer_fault(error)
            raise
        finally:
            flow = self._flow
            flow.last_sign_of_life = time.monotonic()
            if flow.gate or flow.holds_replies:
                self._end_turn()

    def _take_pieces(self):
        """Cut the input at its terminators, and pass the pieces on."""
        flow = self._flow
        while flow.unread_input and flow.gate <= _IDLE and self.connected:
            try:
                terminator = self.terminator if flow.holds_replies else self.get_terminator()
                is_direct = flow.holds_replies or self._goes_past_hooks()
                unread, start = flow.unread_input, flow.input_start
                if terminator is _END_OF_LINE and (end := unread.find(terminator, start)) >= 0:
                    rest, is_whole, is_direct_block = end + 2, True, is_direct  # most commands
                else:
                    end, is_whole, rest = self._cut(unread, start, terminator)
                    is_direct = is_direct and terminator in (_END_OF_LINE, _END_OF_DATA)
                    is_direct_block = is_direct and is_whole
            except BaseException as error:  # it could not be cut at the next try either
                return self._end_with_fault(error)
            if rest == start:
                return
            # Consumed before a hook gets it: one that raises must not get it again.
            if rest == len(unread):
                flow.unread_input = b''
            else:
                if not flow.holds_replies:
                    flow.holds_replies = is_direct_block and self._may_hold_replies()
                elif len(self.producer_fifo) >= _MOST_HELD:
                    self._send_held_replies()
                    if flow.gate > _IDLE:
                        return
                flow.input_start = rest
            flow.has_replied = False
            flow.is_mid_block = not is_direct_block
            if is_direct_block:
                self._take_block(unread[start:end])
            elif is_direct:
                self._take_piece(unread[start:end])
                return
            else:
                self._give_to_hooks(unread[start:end], is_whole)
                if not is_whole:
                    return

    def _give_to_hooks(self, piece, is_whole):
        if piece:
            self.collect_incoming_data(piece)
        if is_whole:
            self._flow.is_mid_block = False
            self.found_terminator()

    def _end_turn(self):
        """Do what is left to do when the input is consumed, or must wait."""
        flow = self._flow
        if flow.holds_replies:
            self._send_held_replies()
        if flow.gate == _IDLE:
            self._set_gate(_OPEN)
        elif flow.gate == _CLOSING:
            self.ac_in_buffer = b''
            if self.connected and self._nobody_could_tell():
                self.initiate_send()  # asynchat would close at the loop's next turn

    def _cut(self, unread, start, terminator):
        """Tell where the next piece ends, whether it is whole, and where the rest begins."""
        length = len(unread)
        if not terminator:
            return length, False, length
        if isinstance(terminator, int):
            if terminator < 0:
                raise ValueError('the terminator is negative: %d' % terminator)
            end = min(start + terminator, length)
            self.terminator = start + terminator - end
            return end, not self.terminator, end
        if (terminator == _END_OF_DATA and not self._flow.is_mid_block
                and unread.startswith(b'.', start)):
            # The line end of the DATA command, and a dot: this may be an empty message.
            if unread.startswith(b'.\r\n', start):
                return start, True, start + 3
            if b'.\r\n'.startswith(unread[start:]):
                return start, False, start
        # rfind() is several times as fast as find(), and there is seldom more than one.
        end = unread.rfind(terminator, start)
        if end >= 0:
            if unread.rfind(terminator, start, end + len(terminator) - 1) >= 0:
                end = unread.find(terminator, start)
            return end, True, end + len(terminator)
        end = max(start, length - asynchat.find_prefix_at_end(unread, terminator))
        return end, False, end

    # ------------------------------------------------------------------
    # Output
    # ------------------------------------------------------------------

    def initiate_send(self):
        flow = self._flow
        flow.has_replied = True
        lock = _send_lock  # a program's send() may fork(), and a child has another
        lock.acquire()  # in fewer steps than `with`
        try:
            super().initiate_send()
            if self.producer_fifo:
                if flow.gate <= _IDLE and self._has_backlog():
                    self._set_gate(_PAUSED)
                else:
                    self._tell_watcher()
        finally:
            lock.release()

    def _send_held_replies(self):
        flow = self._flow
        flow.holds_replies = False
        with _send_lock:
            _join_bytes(self.producer_fifo)
        has_replied = flow.has_replied
        self.initiate_send()
        flow.has_replied = has_replied  # these replies are to earlier input

    def _may_hold_replies(self):
        return not self.producer_fifo and self._nobody_could_tell()

    def _nobody_could_tell(self):
        """Whether none of the program's code is called between our own commands."""
        try:
            return (_overrides_only_commands(type(self))
                    and asynchat.async_chat.push is _ASYNCHAT_PUSH
                    and _methods_between_commands(self) == _METHODS_BETWEEN_COMMANDS)
        except AttributeError:  # a plain function, set on the instance
            return False

    def _has_backlog(self):
        """Whether so much waits to be sent that no further command is executed."""
        limit = self.unsent_reply_limit
        if limit is None:
            return False
        waiting = tuple(self.producer_fifo)
        return len(waiting) > _MOST_HELD or limit < sum(
            len(piece) for piece in waiting if isinstance(piece, bytes))

    def writable(self):
        return _OPEN < self._flow.gate < _BUSY or super().writable()

    def handle_write_event(self):
        if not self.connected:  # nothing can be sent, and writable() would be true for ever
            if self._fileno is not None:  # not closed meanwhile
                self.close()
            return
        flow = self._flow
        reads_replies = bool(self.producer_fifo)
        has_replied = flow.has_replied
        super().handle_write_event()
        flow.has_replied = has_replied  # these replies are to earlier input
        if reads_replies:
            flow.last_sign_of_life = time.monotonic()
        if flow.gate == _IDLE and not reads_replies:
            self._end_idle_session()
        elif flow.gate == _IDLE or flow.gate == _PAUSED and not self._has_backlog():
            self._set_gate(_OPEN)
            self._process_input()

    # ------------------------------------------------------------------
    # The end
    # ------------------------------------------------------------------

    def close_when_done(self):
        """Close after all replies are sent; further input is not executed."""
        super().close_when_done()
        self._set_gate(_CLOSING)

    def close(self):
        """Close now: pending input and output are dropped."""
        super().close()
        self.ac_in_buffer = b''
        self._flow.holds_replies = False
        self._set_gate(_CLOSING)

    def handle_expt(self):
        """Discard an out-of-band byte: left unread, it would make select() spin."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: TLS has none
            self.socket.recv(1, _OUT_OF_BAND)

    # Faults

    def handle_error(self):
        """Write the traceback to the log; then close, unless 451 was sent."""
        if super().handle_error.__func__ is not _ASYNCORE_HANDLE_ERROR:
            super().handle_error()
            return
        _log_exception(self)
        error = sys.exc_info()[1]
        if error is None or not vars(error).pop(_ANSWERED, False):
            self.handle_close()

    def _end_with_fault(self, error):
        if isinstance(error, _ENDS_OF_THE_LOOP):
            raise error
        try:
            self.handle_error()
        finally:
            self.close()

    def _answer_fault(self, error):
        """Tell the client about a fault in a hook, once; not if handle_error() is overridden."""
        if self._flow.unread_input and self._flow.gate <= _IDLE:
            self._set_gate(_PAUSED)  # handle_error() comes first
        if self._flow.has_replied or not self.connected or not self._handles_errors_itself():
            return
        self.push('451 Internal confusion')
        if self._flow.is_mid_block:  # the rest of it would be taken for commands
            self.close_when_done()
        vars(error)[_ANSWERED] = True  # not setattr(): the exception may be a frozen dataclass

    def _handles_errors_itself(self):
        return (getattr(self.handle_error, '__func__', None) is _Transport.handle_error
                and super().handle_error.__func__ is _ASYNCORE_HANDLE_ERROR)

    log_info = _log_info

    # Idle sessions

    def _look_for_idleness(self, now):
        limit = self.idle_timeout_seconds
        self._flow.next_look_for_idleness = now + min(limit or 1, 1)
        if limit is None or now - self._flow.last_sign_of_life < limit or self._flow.gate == _BUSY:
            return
        # The loop is collecting descriptors: nothing here may raise, or close one.
        with contextlib.suppress(OSError, ValueError, LookupError, AttributeError):
            if self._flow.gate == _OPEN:
                # handle_write_event() says goodbye: asyncore reads before it writes, so
                # what the client has sent meanwhile comes first.
                self._flow.last_sign_of_life = now - limit + 1  # it has a second
                self._set_gate(_IDLE)
            else:  # the client does not even read
                self.socket.shutdown(_SHUT_BOTH)

    def _end_idle_session(self):
        self.push('421 Error: timeout exceeded')
        self.close_when_done()
        self.initiate_send()


# As they are before a program patches them.
_ASYNCORE_HANDLE_ERROR = asyncore.dispatcher.handle_error
_ASYNCHAT_HANDLE_READ = asynchat.async_chat.handle_read
_ASYNCHAT_PUSH = asynchat.async_chat.push


def _join_bytes(queue):
    """Join pieces of the queue that follow each other, so that one send() takes them."""
    pieces = [queue.popleft() for _ in range(len(queue))]  # another thread may append meanwhile
    joined = []
    for kind, run in itertools.groupby(pieces, type):
        if kind is bytes:
            joined.append(b''.join(run))
        else:
            joined.extend(run)
    queue.extendleft(reversed(joined))


@functools.lru_cache(maxsize=64)
def _overrides_only_commands(channel_class):
    """Whether a channel class overrides nothing but commands and limits."""
    ours = {SMTPChannel, *SMTPChannel.__mro__}
    theirs = set().union(*(vars(base) for base in channel_class.__mro__ if base not in ours))
    return not any(name in _NAMES_OF_A_CHANNEL and not name.startswith('smtp_')
                   for name in theirs)


# ---------------------------------------------------------------------------
# The channel: the dialogue with one client
# ---------------------------------------------------------------------------

# Finds a line that begins with a dot, or a CR without LF; nearly all data has neither.  It
# is fast because Python looks for one octet many times faster than for two or three.
_NEEDS_CARE = re.compile(rb'\r(?!\n[^.])')


def _unstuff(octets):
    """Undo dot-stuffing and CRLF (RFC 5321, 4.5.2); return the size in octets, and the text.

    A piece must not end inside CRLF or CRLF-dot; _cut() makes no such piece.  The size is
    RFC 1870's: with CRLF, without the doubled dots.
    """
    if not _NEEDS_CARE.search(octets):
        return len(octets), _without_cr(octets)
    octets = octets.replace(b'\r\n.', b'\r\n')
    return len(octets), _lf_for_crlf(octets)


def _without_cr(octets):
    # In a short piece it costs more to count than to choose wrongly.
    if len(octets) < 4096 or octets.count(b'\r', 0, 1024) < 32:
        return octets.replace(b'\r', b'')  # from CR to CR: several times as fast ...
    return octets.translate(None, b'\r')  # ... but not where lines are short


def _lf_for_crlf(octets):
    without_cr = _without_cr(octets)
    if len(octets) - len(without_cr) == octets.count(b'\r\n'):  # as nearly always
        return without_cr
    return octets.replace(b'\r\n', b'\n')


def _appendable(octets):
    """A BytesIO with these octets, at its end; they are copied only when more is written."""
    stream = io.BytesIO(octets)
    stream.seek(0, io.SEEK_END)
    return stream


_UNDECODED = re.compile('[\udc80-\udcff]*\\Z')  # what surrogateescape made of a cut character


def _renamed(old, new):
    """A property for a private name that Python 2.5 to 3.2 had for `new`."""

    def read(self):
        warnings.warn("Access to %s attribute on SMTPChannel is deprecated, use '%s' instead"
                      % (old, new), DeprecationWarning, 2)
        return getattr(self, new)

    def write(self, value):
        warnings.warn("Setting %s attribute on SMTPChannel is deprecated, set '%s' instead"
                      % (old, new), DeprecationWarning, 2)
        setattr(self, new, value)

    return property(read, write)


class SMTPChannel(_Transport):
    """The dialogue with one client (RFC 5321).

    A server calls its `channel_class` with these seven arguments, all positional.
    `conn` is the connected socket, `addr` the client's address as accept() gave it;
    the others are the server's.  Raises ValueError if both `enable_SMTPUTF8` and
    `decode_data` are true.

    For each command line the channel calls smtp_VERB(arg); `arg` is the text after
    the verb, None if there is none.  A subclass may override these methods, and has
    a new command as soon as it has a method for it.  It may override push(), which
    sees every reply, and collect_incoming_data() and found_terminator(), which are
    then called as asynchat would call them.

    Instance variables:

    smtp_server           the server that made the channel
    conn                  the socket of the connection
    addr                  the client's address, as accept() gave it
    peer                  the client's address, as conn.getpeername() gave it
    fqdn                  the server's host name, as socket.getfqdn() gave it
    received_lines        what collect_incoming_data() has kept of the current line or
                          message: a list of bytes, or of str with `decode_data`
    num_bytes             octets of the current line or message so far
    smtp_state            COMMAND or, after the DATA command, DATA
    seen_greeting         what the client called itself in HELO or EHLO
    extended_smtp         true after EHLO, false after HELO
    mailfrom              the address in MAIL FROM, or None
    rcpttos               the list of the addresses in RCPT TO
    mail_options          the list of the parameters of MAIL, in upper case
    rcpt_options          the same for RCPT: always empty
    require_SMTPUTF8      true if MAIL had the parameter SMTPUTF8
    received_data         the last message, until the session's next command
    data_size_limit       the argument; may be set
    enable_SMTPUTF8       the argument; may be set

    Class attributes that a subclass may override; None turns all but the first two
    off:

    command_size_limit    octets of a command line without its CRLF (512)
    command_size_limits   the same by verb, where EHLO allows more
    idle_timeout_seconds  without a sign of the client (300), then 421
    recipient_limit       of one message (1000), then 452
    error_limit           5yz replies since the last message (100), then 421
    unsent_reply_limit    octets; no command is executed while more wait to be sent
                          (65536)

    Constants:

    COMMAND               smtp_state while commands are read
    DATA                  smtp_state while a message is read
    """

    COMMAND = 0
    DATA = 1

    command_size_limit = 512  # RFC 5321, 4.5.3.1.4
    command_size_limits = collections.defaultdict(lambda: 512)  # by verb; each channel has its own
    idle_timeout_seconds = 300  # RFC 5321, 4.5.3.2.7
    recipient_limit = 1000  # Postfix: smtpd_recipient_limit
    error_limit = 100  # as Postfix's smtpd_hard_error_limit (20), but kinder to test suites
    unsent_reply_limit = 65536  # one read's worth

    data_size_limit = DATA_SIZE_DEFAULT
    enable_SMTPUTF8 = False
    require_SMTPUTF8 = False  # asked for in MAIL

    _decode_data = False  # received_lines and messages are text

    # str or bytes, as received_lines is; copies of the old found_terminator() use these.
    _emptystring = b''
    _linesep = b'\r\n'
    _dotsep = ord(b'.')  # what data[0] gives
    _newline = b'\n'

    def __init__(self, server, conn, addr, data_size_limit=DATA_SIZE_DEFAULT,
                 map=None, enable_SMTPUTF8=False, decode_data=False):
        _check_modes(enable_SMTPUTF8, decode_data)
        if self.smtp_server is not None:  # a second call
            self._begin_anew()
        self.smtp_server = server
        self.conn = conn
        # Not set where the class says the same: _Flow tells why attributes are few.
        if self.data_size_limit != data_size_limit:
            self.data_size_limit = data_size_limit
        if self.enable_SMTPUTF8 != enable_SMTPUTF8:
            self.enable_SMTPUTF8 = enable_SMTPUTF8
        if self._decode_data != decode_data:
            self._decode_data = decode_data
        if isinstance(self._emptystring, str) != bool(decode_data):
            self._emptystring, self._linesep, self._dotsep, self._newline = (
                ('', '\r\n', '.', NEWLINE) if decode_data else (b'', b'\r\n', ord(b'.'), b'\n'))
        with contextlib.suppress(OSError, AttributeError):  # AF_UNIX; a stub
            conn.setsockopt(*_NO_DELAY)
        asynchat.async_chat.__init__(self, conn, map)
        if not self.connected:  # gone already: getpeername() failed
            self.close()
            return
        peer, self.addr = self.addr, addr
        self._set_rset_state()
        self.fqdn = server._own_name() if _is_server(server) else _getfqdn()
        self.peer = peer
        _debug('Peer: %r', self.peer)
        # Sent now: TLS subclasses call async_chat.__init__() next, which drops what is queued.
        self.push('220 %s %s' % (self.fqdn, __version__))

    def _begin_anew(self):
        """Set the state of a new connection."""
        super()._begin_anew()
        self.smtp_server = None
        self.conn = None
        self.peer = None
        self.fqdn = ''
        self.command_size_limits = type(self).command_size_limits.copy()
        self.extended_smtp = False  # EHLO, not HELO
        self.seen_greeting = ''  # what the client called itself
        self.received_data = ''  # the last message, until the next command
        self.received_lines = []  # pieces of the current line, or of data
        self.terminator = _END_OF_LINE
        self._begin_transaction()

    def _begin_transaction(self):
        """Set the state that RSET and the end of the data return to."""
        self.smtp_state = self.COMMAND
        self.mailfrom = None
        self.rcpttos = []
        self.mail_options = []
        self.rcpt_options = []
        if self.require_SMTPUTF8:
            self.require_SMTPUTF8 = False
        self.num_bytes = 0  # octets of the current line, or of data, even over the limit
        self._flow.message_under_way = None

    def _set_post_data_state(self):
        """Forget the transaction, but not the message (RFC 5321, 4.1.1.4)."""
        self._begin_transaction()
        self.set_terminator(_END_OF_LINE)

    def _set_rset_state(self):
        """Forget the transaction and the message (RFC 5321, 4.1.1.5)."""
        self._set_post_data_state()
        self.received_data = ''
        self.received_lines = []

    # ------------------------------------------------------------------
    # From the transport: pieces and blocks of input, replies
    # ------------------------------------------------------------------

    def collect_incoming_data(self, data):
        """Keep a piece of the current line or of data (asynchat's hook)."""
        limit = None
        octets = len(data)
        if self.smtp_state == self.COMMAND:
            limit = self.max_command_size_limit
        elif self.smtp_state == self.DATA:
            limit = self.data_size_limit
            octets -= data.count(b'\r\n.')  # RFC 1870 does not count doubled dots
        if limit:
            if self.num_bytes > limit:
                return
            self.num_bytes += octets
        self.received_lines.append(self._decode_piece(data) if self._decode_data else data)

    def _decode_piece(self, octets):
        """Decode a piece, with the beginning of a character that the last piece cut off."""
        last = self.received_lines[-1] if self.received_lines else ''
        cut_off = _UNDECODED.search(last[-3:])[0]
        if cut_off:
            self.received_lines[-1] = last[:-len(cut_off)]
        return (_as_octets(cut_off) + octets).decode('utf-8', 'surrogateescape')

    def found_terminator(self):
        """Execute the collected command, or end the collected data (asynchat's hook)."""
        pieces, self.received_lines = self.received_lines, []
        octets, self.num_bytes = self.num_bytes, 0
        if not isinstance(DEBUGSTREAM, Devnull):
            _debug('Data: %r', self._emptystring.join(pieces))
        if self.smtp_state == self.COMMAND:
            line = b''.join(map(_as_octets, pieces))
            if self.terminator == b'\n':  # set by a program that also takes bare LF
                line = line.rstrip(b'\r')
            self._execute_line(line, octets)
        elif self.smtp_state == self.DATA:
            self._end_data(b'', pieces, octets)
        else:
            self.push('451 Internal confusion')

    def _goes_past_hooks(self):
        """Whether the next piece may bypass asynchat's hooks: nobody would notice."""
        if self._flow.is_mid_block:
            return self._flow.message_under_way is not None
        try:
            return (not self.received_lines
                    and self.found_terminator.__func__ is _FOUND_TERMINATOR
                    and self.collect_incoming_data.__func__ is _COLLECT_INCOMING_DATA
                    and isinstance(DEBUGSTREAM, Devnull))
        except AttributeError:  # a plain function, set on the instance
            return False

    def _take_piece(self, octets):
        """Take a piece past collect_incoming_data()."""
        if (self.smtp_state != self.DATA  # a get_terminator() may look at what has come so far
                or getattr(self.get_terminator, '__func__', None) is not _GET_TERMINATOR):
            self.collect_incoming_data(octets)
            return
        self._add_to_message(octets)
        if _QUICK_ACK and len(octets) < self.ac_in_buffer_size:
            # Nagle's algorithm may keep the rest of the message waiting for our ACK.
            with contextlib.suppress(OSError, AttributeError):
                self.socket.setsockopt(*_QUICK_ACK)

    def _take_block(self, octets):
        """Take a whole line or message past both hooks."""
        if self.smtp_state == self.COMMAND:
            self._execute_line(octets, len(octets))
        elif self.smtp_state == self.DATA:
            self._end_data(octets)
        else:
            self.push('451 Internal confusion')

    def push(self, msg):
        """Send one line of a reply; CRLF is added.  Every reply passes through this method.

        `msg` is text, sent as ASCII with question marks for the rest (as UTF-8 if the
        client asked for SMTPUTF8), or bytes, sent as they are.
        """
        if isinstance(msg, str):
            msg = msg.encode('utf-8' if self.require_SMTPUTF8 else 'ascii', 'replace')
        flow = self._flow
        if flow.holds_replies:
            flow.has_replied = True
            self.producer_fifo.append(msg + _END_OF_LINE)
            if not flow.holds_replies:  # the loop's thread has just sent them, and this is another
                self.initiate_send()
        else:
            asynchat.async_chat.push(self, msg + _END_OF_LINE)
        if msg[:1] == b'5' and msg[3:4] != b'-':
            self._count_error()

    def _count_error(self):
        self._flow.errors_since_message += 1
        if (self.error_limit is not None and self._flow.errors_since_message >= self.error_limit
                and self._flow.gate != _CLOSING):
            self.push('421 Error: too many errors')
            self.close_when_done()

    def add_channel(self, map=None):
        server = self.smtp_server
        with _lock:  # a selector may close if it has no channels
            if _is_server(server) and server._takes_into_selector(self, map):
                self._flow.watcher = server._selector_of_channels
                self._flow.watcher.add(self)
                return
        super().add_channel(map)

    def del_channel(self, map=None):
        with _lock:  # another thread may close it at the same moment
            watcher, self._flow.watcher = self._flow.watcher, None
            if watcher is not None:
                watcher.discard(self)
            super().del_channel(map)

    def close(self):
        if _is_server(self.smtp_server):
            with _lock:
                self.smtp_server._leave_to_loop(self, self._flow.watcher)
        try:
            super().close()
        finally:
            if self._flow.relay is not None:
                self._flow.relay.end()

    # ------------------------------------------------------------------
    # A command line
    # ------------------------------------------------------------------

    def _execute_line(self, line, octets):
        """Execute a command line; `octets` is its length, including what was dropped."""
        limit = self.command_size_limit
        if octets > limit and octets > self.max_command_size_limit:
            self.push('500 Error: line too long')
            return
        verb, method_name, argument = _parse_command(line)
        if verb is None:
            self.push('500 Error: bad syntax')
            return
        if self.received_data:
            self.received_data = ''  # it may be large
        if self.extended_smtp:
            limit = self.command_size_limits.get(verb, limit)
        if octets > limit:
            self.push('500 Error: line too long')
            return
        method = getattr(self, method_name, None)
        if method is None:
            self.push('500 Error: command "%s" not recognized' % _printable(verb))
            return
        if self._flow.holds_replies and getattr(method, '__func__', None) not in _COMMANDS:
            self._send_held_replies()  # a program's own command may send something itself
            if self._flow.gate == _CLOSING:
                return
        method(argument)

    @property
    def max_command_size_limit(self):
        """Octets of the longest command line that any verb may have."""
        return max([self.command_size_limit, *self.command_size_limits.values()])

    # ------------------------------------------------------------------
    # The data of a message
    # ------------------------------------------------------------------

    def _add_to_message(self, octets):
        """Take a piece of data as it came over the wire; drop it if the message is too large."""
        message = self._flow.message_under_way
        if message is None and octets[:1] == b'.':
            octets = octets[1:]
        size, text = _unstuff(octets)
        self.num_bytes += size
        if self.data_size_limit and self.num_bytes > self.data_size_limit:
            self._flow.message_under_way = b''
        elif message is None:
            self._flow.message_under_way = text
        else:
            if not isinstance(message, io.BytesIO):
                self._flow.message_under_way = message = _appendable(message)
            message.write(text)

    def _add_all_but_the_last(self, pieces):
        """The same for collected pieces, which may be cut anywhere; returns what is left."""
        pieces.reverse()  # so that each can be let go: there may be many
        octets = _as_octets(pieces.pop())
        while pieces:  # the next one may begin within CRLF or CRLF-dot
            end = len(octets) - asynchat.find_prefix_at_end(octets, _END_OF_DATA)
            if end:
                self._add_to_message(octets[:end])
            octets = octets[end:] + _as_octets(pieces.pop())
        return octets

    def _end_data(self, octets, collected=(), octets_received=0):
        """Handle the message that these octets, or what hooks have collected, end."""
        try:
            if collected:
                octets = self._add_all_but_the_last(collected)
            self._add_to_message(octets)
            if self.data_size_limit and octets_received > self.data_size_limit:
                self.num_bytes = octets_received  # some were dropped
            self._handle_message()
        except BaseException:  # what follows is a command, whatever happened
            self._drop_data()
            raise

    def _handle_message(self):
        # RFC 1870 also counts the last line end, which went with the terminator.
        size = self.num_bytes + len(_END_OF_LINE) if self.num_bytes else 0
        if self.data_size_limit and size > self.data_size_limit:
            self._set_post_data_state()
            self.push('552 Error: Too much mail data')
            return
        message = self._flow.message_under_way
        message = message.getvalue() if isinstance(message, io.BytesIO) else bytes(message)
        self._flow.message_under_way = None
        if self._decode_data:
            message = message.decode('utf-8', 'surrogateescape')
        self.received_data = message
        if self._is_relayed():
            self._wait_for(self._flow.relay.deliver(message), self._end_message, self._drop_data)
        else:
            self._run_aside(self._handler_call(message), self._end_message, self._drop_data)

    def _drop_data(self):
        """Read commands again, if data were being read."""
        if self.smtp_state == self.DATA:
            self._set_post_data_state()

    def _handler_call(self, message):
        handler = self.smtp_server.process_message
        keywords = {}
        if not self._decode_data:
            keywords = _accepted_keywords(handler, {'mail_options': self.mail_options,
                                                    'rcpt_options': self.rcpt_options})
        return functools.partial(
            handler, self.peer, self.mailfrom, self.rcpttos, message, **keywords)

    def _run_aside(self, call, answer, undo):
        """Run call() in one of the server's threads, if it has any, then answer(outcome).

        outcome() returns or raises what the call did.  If anything raises, undo() is called.
        """
        try:
            if self._flow.holds_replies:
                self._send_held_replies()  # the call may take its time
                if self._flow.gate == _CLOSING:  # the client has gone
                    return
            server = self.smtp_server
            if _is_server(server) and server.process_message_threads:
                self._set_gate(_BUSY)
                take_outcome = functools.partial(self._take_outcome, answer, undo)
                try:
                    server._run_in_thread(call, take_outcome)
                except _NoThread as error:
                    take_outcome(functools.partial(_throw, error))
            else:
                answer(call)
        except BaseException:
            undo()
            raise

    def _wait_for(self, steps, answer, undo):
        """Let a generator run, whose end is then the outcome: see _advance()."""
        if self._flow.holds_replies:
            self._send_held_replies()
            if self._flow.gate == _CLOSING:  # the client has gone
                return undo()
        self._set_gate(_BUSY)
        _advance(steps, functools.partial(self._take_outcome, answer, undo))

    def _take_outcome(self, answer, undo, outcome):
        """Go on in the loop's thread."""
        if self._flow.gate == _BUSY:
            self._set_gate(_PAUSED if self._flow.unread_input else _OPEN)
        self._flow.last_sign_of_life = time.monotonic()
        try:
            answer(outcome)
        except BaseException as error:
            undo()
            if isinstance(error, _ENDS_OF_THE_LOOP):
                raise
            try:
                self._answer_fault(error)
            finally:
                self.handle_error()

    def _end_message(self, outcome):
        """Reply to data with what the handler returned."""
        status = outcome()
        takes_utf8 = self.require_SMTPUTF8
        self._set_post_data_state()
        self._flow.errors_since_message = 0
        if not status:
            self.push('250 OK')
            return
        lines = _reply_lines(status)
        if not lines:
            self.log_info('process_message() returned %s, which is no reply' % _safe_repr(status),
                          'error')
            lines = ['451 Internal confusion']
        for line in lines:
            self.push(line.encode('utf-8', 'replace')
                      if takes_utf8 and isinstance(line, str) else line)

    # ------------------------------------------------------------------
    # Arguments
    # ------------------------------------------------------------------

    def _strip_command_keyword(self, keyword, arg):
        """The text after "FROM:" or "TO:" in `arg`; '' if it does not begin with that."""
        length = len(keyword)
        return arg[length:].strip() if arg[:length].upper() == keyword else ''

    def _getaddr(self, arg):
        """Split off a path: (address, rest); the address is '' if it is malformed."""
        return _parse_path(arg or '')

    def _getparams(self, params):
        """Turn ['KEYWORD=value', 'KEYWORD']; None if one is malformed.

        RFC 5321, 4.1.2 (esmtp-param).  A keyword without a value gets True.
        """
        parsed = {}
        for parameter in params:
            keyword, equals, value = parameter.partition('=')
            if not keyword.isalnum() or equals and not value:
                return None
            parsed[keyword] = value if equals else True
        return parsed

    def _refusal_of_mail_parameters(self, parameters):
        """The reply that refuses these parameters of MAIL; None if we take them."""
        if parameters is None:
            return self._mail_syntax()
        parameters = dict(parameters)
        if not self._decode_data:  # RFC 6152
            if parameters.pop('BODY', '7BIT') not in ('7BIT', '8BITMIME'):
                return '501 Error: BODY can only be one of 7BIT, 8BITMIME'
        if self.enable_SMTPUTF8:  # RFC 6531
            if parameters.pop('SMTPUTF8', True) is not True:
                return '501 Error: SMTPUTF8 takes no arguments'
        size = parameters.pop('SIZE', '0')  # RFC 1870
        if size is True or not (size.isascii() and size.isdigit()):
            return self._mail_syntax()
        # RFC 1870, 4: 20 digits at most; int() raises ValueError for thousands of them.
        if self.data_size_limit and (len(size) > 20 or int(size) > self.data_size_limit):
            return '552 Error: message size exceeds fixed maximum message size'
        if parameters:
            return '555 MAIL FROM parameters not recognized or not implemented'
        return None

    def _with_mail_parameters(self, syntax):
        return syntax + (' [SP <mail-parameters>]' if self.extended_smtp else '')

    def _mail_syntax(self):
        return self._with_mail_parameters('501 Syntax: MAIL FROM: <address>')

    def _rcpt_syntax(self):
        return self._with_mail_parameters('501 Syntax: RCPT TO: <address>')

    # ------------------------------------------------------------------
    # Commands, in the order of a session
    # ------------------------------------------------------------------

    def smtp_HELO(self, arg):
        """Begin a session; `arg` is the client's name (RFC 5321, 4.1.1.1)."""
        if self._begin_session('HELO', arg):
            self.push('250 %s' % self.fqdn)

    def _begin_session(self, verb, arg):
        """Take the client's name; if HELO or EHLO is out of place, refuse it and return False."""
        if not arg:
            self.push('501 Syntax: %s hostname' % verb)
        elif self.seen_greeting:
            self.push('503 Duplicate HELO/EHLO')
        else:
            self._set_rset_state()
            self.seen_greeting = arg
            return True
        return False

    def smtp_EHLO(self, arg):
        """Begin a session, list the extensions, allow longer lines (RFC 5321, 4.1.1.1)."""
        if not self._begin_session('EHLO', arg):
            return
        self.extended_smtp = True
        mail_limit = self.command_size_limit
        was_held = self._flow.holds_replies
        self._flow.holds_replies = was_held or self._may_hold_replies()
        self.push('250-%s' % self.fqdn)
        if self.data_size_limit:
            self.push('250-SIZE %s' % self.data_size_limit)
            mail_limit += 26  # RFC 1870, 3 (5)
        if not self._decode_data:
            self.push('250-8BITMIME')
        if self.enable_SMTPUTF8:
            self.push('250-SMTPUTF8')
            mail_limit += 10  # RFC 6531, 3.1 (5)
        if self._flow.holds_replies and not was_held:
            self._send_held_replies()  # the last line alone: CPython's tests look at it
        self.push('250 HELP')
        limits = self.command_size_limits
        limits['MAIL'] = max(limits.get('MAIL', 0), mail_limit)

    def smtp_MAIL(self, arg):
        """Begin a transaction: check the parameters, set `mailfrom` (RFC 5321, 4.1.1.2)."""
        if not self.seen_greeting:
            self.push('503 Error: send HELO first')
            return
        if not isinstance(DEBUGSTREAM, Devnull):
            _debug('===> MAIL %s', arg)
        address, parameters = self._getaddr(self._strip_command_keyword('FROM:', arg or ''))
        if not address or parameters and not self.extended_smtp:
            self.push(self._mail_syntax())
            return
        if self.mailfrom:
            self.push('503 Error: nested MAIL command')
            return
        options = parameters.upper().split() if parameters else []
        parameters = self._getparams(options)
        refusal = None if parameters == {} else self._refusal_of_mail_parameters(parameters)
        if refusal:
            self.push(refusal)
            return
        server = self.smtp_server
        if _is_server(server) and server._relay_for:
            self._flow.relay = server._relay_for(self)
        self.mail_options = options
        if 'SMTPUTF8' in options:
            self.require_SMTPUTF8 = True
        self.mailfrom = address
        if not isinstance(DEBUGSTREAM, Devnull):
            _debug('sender: %s', address)
        if self._flow.relay is None:
            self.push('250 OK')
        else:
            self._ask_upstream('mail', address, options)

    def smtp_RCPT(self, arg):
        """Add an address to `rcpttos` (RFC 5321, 4.1.1.3)."""
        if not self.seen_greeting:
            self.push('503 Error: send HELO first')
            return
        if not isinstance(DEBUGSTREAM, Devnull):
            _debug('===> RCPT %s', arg)
        if not self.mailfrom:
            self.push('503 Error: need MAIL command')
            return
        address, parameters = self._getaddr(self._strip_command_keyword('TO:', arg or ''))
        if not address or parameters and not self.extended_smtp:
            self.push(self._rcpt_syntax())
            return
        options = self._getparams(parameters.upper().split() if parameters else [])
        if options is None:
            self.push(self._rcpt_syntax())
            return
        if options:
            self.push('555 RCPT TO parameters not recognized or not implemented')
            return
        if self.recipient_limit is not None and len(self.rcpttos) >= self.recipient_limit:
            self.push('452 Error: too many recipients')  # RFC 5321, 4.5.3.1.10
            return
        self.rcpttos.append(address)
        if not isinstance(DEBUGSTREAM, Devnull):
            _debug('recips: %s', self.rcpttos)
        if self._flow.relay is None:
            self.push('250 OK')
        else:
            self._ask_upstream('rcpt', address)

    def smtp_DATA(self, arg):
        """Read a message, up to a line with nothing but a dot (RFC 5321, 4.1.1.4)."""
        if not self.seen_greeting:
            self.push('503 Error: send HELO first')
            return
        if not self.rcpttos:
            self.push('503 Error: need RCPT command')
            return
        if arg:
            self.push('501 Syntax: DATA')
            return
        self.smtp_state = self.DATA
        self.set_terminator(_END_OF_DATA)
        if self._is_relayed():
            self._ask_upstream('data')
            return
        try:
            self.push('354 End data with <CR><LF>.<CR><LF>')
        except BaseException:
            self._undo_unless_told(self._drop_data)
            raise

    def _is_relayed(self):
        """Whether a proxy's upstream has agreed to the transaction as it stands now."""
        return self._flow.relay is not None and self._flow.relay.knows(self.mailfrom, self.rcpttos)

    def _ask_upstream(self, step, *arguments):
        """Let a proxy's upstream reply to a step that we accept."""
        count = self.rcpttos.count(arguments[0]) if step == 'rcpt' else 0
        undo = functools.partial(self._take_back, step, arguments, count)
        self._wait_for(getattr(self._flow.relay, step)(*arguments),
                       functools.partial(self._pass_on_reply, undo),
                       functools.partial(self._undo_unless_told, undo))

    def _pass_on_reply(self, undo, outcome):
        """Reply as the upstream did."""
        reply = outcome()
        if reply[:1] not in '23':
            undo()
        if reply[:1] == '5':
            self._flow.errors_since_message -= 1  # how many may come is the upstream's business
        for line in _reply_lines(reply) if NEWLINE in reply else [reply]:
            self.push(line)

    def _undo_unless_told(self, undo):
        """After a fault: what the client has been told stands."""
        if not self._flow.has_replied:
            undo()

    def _take_back(self, step, arguments, count):
        """Set the state as it was before a step; once more does nothing, should its reply fail."""
        if step == 'mail':
            self._begin_transaction()
        elif step == 'data':
            self._drop_data()
        elif step == 'rcpt' and self.rcpttos.count(arguments[0]) >= count:
            # The last one: the same address may have been taken before.
            del self.rcpttos[-1 - self.rcpttos[::-1].index(arguments[0])]

    def smtp_RSET(self, arg):
        """Forget the transaction and the message, but not the greeting (RFC 5321, 4.1.1.5)."""
        if arg:
            self.push('501 Syntax: RSET')
            return
        self._set_rset_state()
        if self._flow.relay is None:
            self.push('250 OK')
        else:
            self._ask_upstream('reset')

    def smtp_NOOP(self, arg):
        """Do nothing (RFC 5321, 4.1.1.9); an argument is refused, as in the standard library."""
        if arg:
            self.push('501 Syntax: NOOP')
        else:
            self.push('250 OK')

    def smtp_HELP(self, arg):
        """List the commands, or show the syntax of one (RFC 5321, 4.1.1.8)."""
        syntax = _COMMAND_SYNTAX.get(arg.upper() if arg else '')
        if syntax:
            if arg.upper() in ('MAIL', 'RCPT'):
                syntax = self._with_mail_parameters(syntax)
            self.push('250 Syntax: ' + syntax)
        else:
            code = '501' if arg else '250'
            self.push(code + ' Supported commands: EHLO HELO MAIL RCPT DATA RSET NOOP QUIT VRFY')

    def smtp_VRFY(self, arg):
        """Answer 252, which does not say whether an address exists (RFC 5321, 4.1.1.6, 7.3)."""
        if arg and (self._getaddr(arg)[0] or self._getaddr(arg.split()[0])[0]):
            self.push('252 Cannot VRFY user, but will accept message and attempt delivery')
        else:
            self.push('501 Syntax: VRFY <address>')

    def smtp_QUIT(self, arg):
        """Say goodbye and close the connection (RFC 5321, 4.1.1.10)."""
        self.push('221 Bye')
        self.close_when_done()

    # Not implemented

    def smtp_EXPN(self, arg):
        """Answer 502: not implemented (RFC 5321, 4.1.1.7)."""
        self.push('502 EXPN not implemented')

    # ------------------------------------------------------------------
    # Old names
    # ------------------------------------------------------------------

    __server = _renamed('__server', 'smtp_server')
    __line = _renamed('__line', 'received_lines')
    __state = _renamed('__state', 'smtp_state')
    __greeting = _renamed('__greeting', 'seen_greeting')
    __mailfrom = _renamed('__mailfrom', 'mailfrom')
    __rcpttos = _renamed('__rcpttos', 'rcpttos')
    __data = _renamed('__data', 'received_data')
    __fqdn = _renamed('__fqdn', 'fqdn')
    __peer = _renamed('__peer', 'peer')
    __conn = _renamed('__conn', 'conn')
    __addr = _renamed('__addr', 'addr')


# As they are before a program overrides or patches them.
_FOUND_TERMINATOR = SMTPChannel.found_terminator
_COLLECT_INCOMING_DATA = SMTPChannel.collect_incoming_data
_GET_TERMINATOR = SMTPChannel.get_terminator

_COMMANDS = frozenset(method for name, method in vars(SMTPChannel).items()
                      if name.startswith('smtp_') and callable(method))

# What is called from one command to the next: see _nobody_could_tell().
_methods_between_commands = operator.attrgetter(*(name + '.__func__' for name in (
    'collect_incoming_data', 'found_terminator', 'get_terminator', 'set_terminator', 'push',
    'push_with_producer', 'initiate_send', 'send', 'close', 'close_when_done', 'handle_close',
    'handle_error', 'log_info', '_getaddr', '_getparams', '_strip_command_keyword',
    '_set_post_data_state', '_set_rset_state')))
_METHODS_BETWEEN_COMMANDS = _methods_between_commands(SMTPChannel.__new__(SMTPChannel))

_LIMITS = {'command_size_limit', 'idle_timeout_seconds', 'recipient_limit', 'error_limit',
           'unsent_reply_limit'}
_NAMES_OF_A_CHANNEL = frozenset(
    ({*dir(SMTPChannel), *vars(SMTPChannel.__new__(SMTPChannel)), '__getattr__'}
     - {*_LIMITS, '__init__', '__doc__', '__module__', '__dict__', '__weakref__', '__slots__',
        '__firstlineno__', '__static_attributes__'}))

_COMMAND_SYNTAX = {
    'EHLO': 'EHLO hostname',
    'HELO': 'HELO hostname',
    'MAIL': 'MAIL FROM: <address>',
    'RCPT': 'RCPT TO: <address>',
    'DATA': 'DATA',
    'RSET': 'RSET',
    'NOOP': 'NOOP',
    'QUIT': 'QUIT',
    'VRFY': 'VRFY <address>',
}


def _is_server(thing):
    return issubclass(type(thing), SMTPServer)  # not by isinstance(), which Mock(spec=...) fools


def _check_modes(enable_SMTPUTF8, decode_data):
    if enable_SMTPUTF8 and decode_data:
        raise ValueError('decode_data and enable_SMTPUTF8 cannot be set to True at the same time')


def _getfqdn():
    try:
        return socket.getfqdn()
    except (OSError, UnicodeError):  # a name that is no name
        return 'localhost'


# ---------------------------------------------------------------------------
# What wakes the loop, and what spares it
# ---------------------------------------------------------------------------

_IDLE_THREAD_SECONDS = 1  # most clients send their next command within it

_forks = 0  # calls of fork() that this process comes from, and those that it made
_this_process = os.getpid()  # kept, since the selector looks at each turn of the loop


def _before_fork():
    global _forks
    _forks += 1
    _lock.acquire()  # or a child might inherit it locked, without the thread that unlocks it


def _after_fork_in_child():
    global _this_process, _send_lock
    _this_process = os.getpid()
    _lock.release()
    _send_lock = threading.RLock()  # the thread that held the old one is not in the child


if hasattr(os, 'register_at_fork'):  # not on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_lock.release,
                        after_in_child=_after_fork_in_child)


def _is_too_much_for_select(descriptor, sockets=()):
    """Whether our loop waits in select(), which cannot take this descriptor or so many sockets."""
    return (descriptor >= _FD_SETSIZE or len(sockets) >= _MOST_SOCKETS) and _wait_is_select()


def _wait_is_select():
    # Only the stack tells: asyncore's poll() and poll2() ask us the same questions.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is asyncore.poll.__code__:
            return True
        frame = frame.f_back
    return False


def _refuse(connection):
    with contextlib.suppress(OSError):
        connection.send(b'421 Service not available\r\n')
    connection.close()


def _identity(sock):
    """Device and inode, which tell whether a descriptor is still the socket's; None if unknown."""
    try:
        status = os.fstat(sock.fileno())
    except OSError:  # closed; Windows
        return None
    return status.st_dev, status.st_ino


def _give(result):
    return result


def _throw(error):
    raise error


def _advance(steps, ended, outcome=lambda: None):
    """Let a generator go on with the outcome of what it waited for; ended(outcome) at its end.

    It yields starters: start(resume) raises at once, or returns and later calls
    resume(outcome), in the loop's thread.
    """
    while True:
        try:
            try:
                value = outcome()
            except BaseException as error:
                start = steps.throw(error)
            else:
                start = steps.send(value)
        except StopIteration as end:
            return ended(functools.partial(_give, end.value))
        except BaseException as error:
            return ended(functools.partial(_throw, error))
        try:
            return start(functools.partial(_advance, steps, ended))
        except Exception as error:
            outcome = functools.partial(_throw, error)


class _Reader(asyncore.dispatcher):
    """A dispatcher that is only read from, and survives its faults."""

    log_info = _log_info

    def writable(self):
        return False

    def handle_error(self):
        """Write the traceback to the log."""
        _log_exception(self)


class _Threads(_Reader):
    """Runs calls in threads; their outcomes come back in the loop's thread.

    A thread whose call has ended waits a while for the next, since starting one
    takes longer than most calls do.

    A pair of sockets wakes the loop.  It is made when the first client comes,
    and stands in the socket map only while there are calls, so that a loop ends
    when its servers and channels are closed.

    An outcome is a function that returns or raises what the call did.  If there
    is no thread, and none can be started, run() raises _NoThread.
    """

    def __init__(self, map):
        asyncore.dispatcher.__init__(self, map=map)
        self._process = _this_process
        self._pair = ()  # each socket and its identity: others may close their descriptors
        self._calls = queue.SimpleQueue()  # (call, function for its outcome); None ends a thread
        self._undone = 0  # calls that wait for a thread, or run
        self._threads = 0  # those that run a call, or wait for one and not for None
        self._ended = collections.deque()  # (function for the outcome, outcome)
        self._is_abandoned = False

    def is_inherited(self):
        """Whether this is a child after fork(): the threads, and the pair, are its parent's."""
        return self._process != _this_process

    def run(self, at_most, call, take_outcome):
        """Run call() as soon as one of `at_most` threads has time for it."""
        try:
            with _lock:
                self._make_pair()
                self._fileno = self.socket.fileno()
                self.add_channel()
                self._start_thread_if_needed(at_most)
                self._calls.put((call, take_outcome))
                self._undone += 1
        except Exception as error:
            self._leave_if_idle()
            raise _NoThread('no thread to be had: %s' % error) from error

    def _start_thread_if_needed(self, at_most):
        if self._undone < self._threads or self._threads >= at_most:
            return
        try:
            threading.Thread(target=self._serve, daemon=True).start()
            self._threads += 1
        except Exception:
            if not self._threads:  # there is none that would come to the call later
                raise

    def prepare(self):
        """Make the pair while there are descriptors: later clients may take them all."""
        with _lock, contextlib.suppress(OSError):
            if not self._is_abandoned:
                self._make_pair()

    def _make_pair(self):
        if self._pair:
            return
        pair = _socketpair()
        self._pair = [(each, _identity(each)) for each in pair]
        self.socket, self._waker = pair
        if _is_too_much_for_select(self.socket.fileno()):
            self._close_pair()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        for each in pair:
            each.setblocking(False)

    def _serve(self):
        while self._run_next():  # a function, since a thread that waits must keep no message
            pass

    def _run_next(self):
        """Wait for a call and run it; return False if the thread is not needed any more."""
        try:
            given = self._calls.get(timeout=_IDLE_THREAD_SECONDS)
        except queue.Empty:
            return not self._dismiss_spare_thread()
        if given is None:
            return False
        call, take_outcome = given
        try:
            outcome = functools.partial(_give, call())
        except BaseException as error:
            outcome = functools.partial(_throw, error)
        if self.is_inherited():  # the call has forked, and this is the child
            return False
        with _lock:
            self._undone -= 1
            self._ended.append((take_outcome, outcome))
            self._wake_loop()
            return not (self._is_abandoned and self._dismiss_spare_thread())

    def _dismiss_spare_thread(self):
        """Count one thread less if there are more than calls; return whether."""
        with _lock:
            is_spare = self._threads > self._undone
            self._threads -= is_spare
            return is_spare

    def _wake_loop(self):
        with _lock, contextlib.suppress(OSError):  # full: the loop is awake
            if self._pair:
                self._waker.send(b'.')

    def readable(self):
        if self.is_inherited():
            self.close()
            return False
        return True

    def handle_read(self):
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(4096)
        try:
            while self._ended:
                take_outcome, outcome = self._ended.popleft()
                take_outcome(outcome)
        finally:
            if self._ended:
                self._wake_loop()
            self._leave_if_idle()

    def close_when_idle(self):
        """Close when all calls have ended; may be called from any thread."""
        with _lock:
            self._is_abandoned = True
            if self.is_inherited():
                self.close()
                return
            while self._dismiss_spare_thread():
                self._calls.put(None)
            self._leave_if_idle()

    def _leave_if_idle(self):
        with _lock:
            if not self._undone and not self._ended:
                self.del_channel()
                if self._is_abandoned:
                    self._close_pair()

    def close(self):
        with _lock:
            self.del_channel()
            self._close_pair()

    def _close_pair(self):
        for each, identity in self._pair:
            if _identity(each) == identity:
                each.close()
            else:  # the descriptor is something else by now
                each.detach()
        self._pair = ()


class _Selector(_Reader):
    """Stands for all channels of a server in the socket map.

    asyncore asks every object in the map at every turn whether it wants to
    read or write.  This one asks the kernel instead: its descriptor is an
    epoll set, which is readable while one of its channels is ready.
    The set is made for the first channel and closed with the last.
    """

    is_possible = hasattr(select, 'epoll')  # Linux; kqueue is untried

    def __init__(self, map):
        asyncore.dispatcher.__init__(self, map=map)
        self._channels = {}  # by descriptor
        self._events = {}  # what is watched, by descriptor
        self._epoll = None
        self._process = None  # the number of the one that made it
        self._next_look_for_idle = 0.0  # on the monotonic clock

    def open(self):
        """Make the epoll set if there is none; return False if that fails."""
        if self._epoll is None:
            try:
                epoll = select.epoll()
            except OSError:
                return False
            if _is_too_much_for_select(epoll.fileno()):
                epoll.close()
                return False
            self._epoll = epoll
            self._process = _this_process
            self._fileno = epoll.fileno()
        self.add_channel()
        return True

    def _own_epoll(self):
        """The set; in a child after fork() a new one, since the parent still uses the old one."""
        if self._process != _this_process:
            with select.epoll() as epoll:  # under the number by which the socket map knows it
                os.dup2(epoll.fileno(), self._fileno, inheritable=False)
            self._process = _this_process
            for descriptor, events in self._events.items():
                if events:
                    with contextlib.suppress(OSError):  # closed in the child
                        self._epoll.register(descriptor, events)
        return self._epoll

    def add(self, channel):
        """Watch a channel from now on; open() must have returned True."""
        with _lock:
            self._forget(channel._fileno)  # its socket was closed without a word to us
            self._channels[channel._fileno] = channel
            self.watch(channel)

    def discard(self, channel):
        with _lock:
            if self._channels.get(channel._fileno) is channel:
                self._forget(channel._fileno)
            if not self._channels:
                self._close_epoll()

    def _forget(self, descriptor):
        self._channels.pop(descriptor, None)
        if self._events.pop(descriptor, 0) and self._process == _this_process:
            with contextlib.suppress(OSError):  # it is closed
                self._epoll.unregister(descriptor)

    def watch(self, channel):
        """Watch the channel for what it wants now; called from any thread."""
        with _lock:
            if self._epoll is not None and self._channels.get(channel._fileno) is channel:
                self._set_events(channel._fileno, (
                    (select.EPOLLIN if channel.readable() else 0)
                    | (select.EPOLLOUT if channel.writable() else 0)))

    def _set_events(self, descriptor, wanted):
        watched = self._events.get(descriptor, 0)
        if wanted == watched:
            return
        epoll = self._own_epoll()
        if not watched:
            epoll.register(descriptor, wanted)
        elif wanted:
            epoll.modify(descriptor, wanted)
        else:  # epoll reports errors even if asked for nothing
            epoll.unregister(descriptor)
        self._events[descriptor] = wanted

    def readable(self):
        with _lock:
            if not self._channels:  # the client for whom it was opened got none
                self._close_epoll()
                return False
        now = time.monotonic()
        if now >= self._next_look_for_idle:
            self._next_look_for_idle = now + 1
            for channel in list(self._channels.values()):
                channel._look_for_idleness(now)
        try:
            return self._own_epoll() is not None
        except OSError:  # a child's, without descriptors: at the next turn
            return False

    def handle_read(self):
        for descriptor, events in self._own_epoll().poll(0):
            channel = self._channels.get(descriptor)
            watched = self._events.get(descriptor, 0)
            if watched & select.EPOLLIN and events & ~select.EPOLLOUT:
                asyncore.read(channel)
            if watched & select.EPOLLOUT and events & ~select.EPOLLIN:
                asyncore.write(channel)  # which does nothing if it was closed meanwhile
                self.watch(channel)

    def close(self):
        with contextlib.ExitStack() as closing:  # all of them, even if one raises
            closing.callback(self._close_epoll)
            for channel in list(self._channels.values()):
                closing.callback(channel.close)

    def _close_epoll(self):
        if self._epoll is not None:
            self.del_channel()
            self._epoll.close()
            self._epoll = None
            self._events.clear()


class _ClosingSocket(_Reader):
    """Closes the socket of a listener or a channel in the loop's own thread.

    That thread may be about to wait for the descriptor, and must not find it
    closed.  shutdown() wakes it, which close() alone would not; a listener that other
    processes use is let go at once, and its number closed at the loop's next turn.
    """

    def __init__(self, owner, watcher, is_shared):
        asyncore.dispatcher.__init__(self, map=owner._map)
        self._watcher = watcher
        theirs = owner.socket
        self.socket = socket.socket(theirs.family, theirs.type, theirs.proto, theirs.detach())
        self._fileno, owner._fileno = owner._fileno, None
        if watcher is None:
            self.add_channel()
        else:
            watcher.add(self)
        try:
            if is_shared:
                self._let_go()
            else:
                self.socket.shutdown(_SHUT_BOTH)
        except OSError:
            if owner.accepting:  # macOS; what is not connected any more is readable, too
                self.close()

    def is_open(self):
        return self._fileno is not None

    def _let_go(self):
        """Close a socket that other processes use; the loop finds its number readable."""
        ended, other_end = _socketpair()
        with ended, other_end:
            os.dup2(ended.fileno(), self._fileno, inheritable=False)

    def handle_read_event(self):
        self.close()

    def del_channel(self, map=None):
        if self._watcher is not None:
            self._watcher.discard(self)
        super().del_channel(map)

    def _look_for_idleness(self, now):
        """Nothing to look for: the loop's next turn closes it."""


# ---------------------------------------------------------------------------
# The servers
# ---------------------------------------------------------------------------

_PAUSE_SECONDS = 0.01  # between two looks for a descriptor
_COMPLAINT_SECONDS = 60  # between two lines in the log about it


class SMTPServer(_Reader):
    """Listens, and gives each complete message to process_message().

    `localaddr` is the (host, port) to listen on: an empty host or None stands for
    all IPv4 interfaces, '::' for all IPv6 interfaces, port 0 for any free port,
    which `socket.getsockname()` then tells.  `remoteaddr` is the (host, port) of an
    upstream server, for subclasses that relay; they find it in `_remoteaddr`.
    `data_size_limit` is the most octets that a message may have, counted as in
    RFC 1870; None or 0 for no limit.  `map` is the socket map, asyncore's own if
    there is none.  `enable_SMTPUTF8` offers RFC 6531.  With `decode_data`, handlers
    get str instead of bytes, decoded from UTF-8; octets that are not UTF-8 become
    surrogate escapes, and 8BITMIME is not offered.

    Raises ValueError if both `enable_SMTPUTF8` and `decode_data` are true, and
    OSError if the address cannot be bound.

    Class attributes that a subclass may override:

    channel_class            the class of the channels (SMTPChannel)
    process_message_threads  n: process_message() runs in up to n threads, and only
                             its own session waits for it; 0: it runs in the loop,
                             and all sessions wait (0)
    channels_in_selector     true: where there is epoll, the channels share one set
                             in the socket map, so that thousands of idle ones cost
                             nothing; not those that override readable(), writable()
                             or a handle_*_event() method (false; `python -m smtpd`
                             sets it)
    listen_backlog           connections that may wait to be accepted (1024)
    accepts_per_event        connections accepted in one turn of the loop (100); one
                             if the listener is not of our making, or accept() is
                             overridden
    data_size_limit          the argument; may be set
    enable_SMTPUTF8          the argument; may be set
    """

    channel_class = SMTPChannel
    process_message_threads = 0
    channels_in_selector = False
    listen_backlog = 1024
    accepts_per_event = 100

    enable_SMTPUTF8 = False
    data_size_limit = DATA_SIZE_DEFAULT
    _decode_data = False
    _localaddr = None
    _remoteaddr = None
    _name_of_this_host = None
    _loop_thread = None  # number of the one that asked us last
    _closed_at_once = None  # a socket that was not left to the loop: it must not wait for that
    _own_listener = None  # the socket, where it is of our making ...
    _forks_before_listener = 0  # ... after so many forks
    _complains_again_at = 0.0  # on the monotonic clock
    _threads_for_handlers = None
    _selector_of_channels = None
    _relay_for = None  # PureProxy's: makes what takes a channel's steps upstream

    def __init__(self, localaddr, remoteaddr, data_size_limit=DATA_SIZE_DEFAULT,
                 map=None, enable_SMTPUTF8=False, decode_data=False):
        _check_modes(enable_SMTPUTF8, decode_data)
        asyncore.dispatcher.__init__(self, map=map)
        self.data_size_limit = data_size_limit
        self._decode_data = decode_data
        self.enable_SMTPUTF8 = enable_SMTPUTF8
        self._localaddr, self._remoteaddr = localaddr, remoteaddr
        try:
            self._start_listening(*localaddr)
        except BaseException:
            self.close()
            raise
        _debug('%s started at %s\n\tLocal addr: %s\n\tRemote addr:%s',
               self.__class__.__name__, time.ctime(), localaddr, remoteaddr)

    def _start_listening(self, host, port):
        family = socket.AF_INET
        if host:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self.create_socket(family, socket.SOCK_STREAM)
        self.set_reuse_addr()
        self.bind((host or '', port))
        self.listen(self.listen_backlog)
        self._own_listener, self._forks_before_listener = self.socket, _forks

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        """Do something with a message: subclasses override this method.

        `peer` is the client's socket address, a (host, port) pair for IPv4.
        `mailfrom` is the reverse-path and `rcpttos` the list of forward-paths, as
        the client gave them, but without angle brackets; the null path stays '<>'.
        `data` is the message: lines that end in LF, the last one without it; bytes,
        or str with `decode_data`.

        `kwargs` is empty with `decode_data`; otherwise it has `mail_options` and
        `rcpt_options`, the parameters of MAIL and RCPT in upper case, such as
        `['BODY=8BITMIME', 'SMTPUTF8']`.  No parameter of RCPT is supported, so the
        second list is empty.  More keys may come: take `**kwargs`.  A handler
        without them, as in Python 3.4, is called without keywords.

        Return None for `250 OK`, or another reply, such as `'550 No such user'`:
        str or bytes, of one or more lines.  If the method raises, the client gets
        451 and keeps the message.  The base class raises NotImplementedError.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------
    # Connections
    # ------------------------------------------------------------------

    def readable(self):
        self._loop_thread = threading.get_ident()  # at once: close() in another thread needs it
        with _lock:
            return self.socket is not self._closed_at_once

    def accept(self):
        """asyncore's accept(); returns None also if the connection cannot be served now."""
        try:
            pair = asyncore.dispatcher.accept(self)
        except OSError as error:
            if self._fileno is None:  # closed meanwhile, by another thread
                return None
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            self._wait_for_resources(error)
            return None
        if (pair is not None and _is_too_much_for_select(pair[0].fileno(), self._map)
                and not self._has_selector_for(self.channel_class)):
            _refuse(pair[0])
            return None
        if pair is not None and self.process_message_threads:
            self._own_threads().prepare()
        return pair

    def _wait_for_resources(self, error):
        """Pause until a session has something to say, but only for a moment."""
        # The connection stays in the backlog, where it keeps the loop from waiting.
        now = time.monotonic()
        if now >= self._complains_again_at:
            self._complains_again_at = now + _COMPLAINT_SECONDS
            self.log_info('no resources to accept a connection: %s' % error, 'error')
        speakers = [number for number, each in list(self._map.items()) if _may_speak(each)]
        try:
            select.select(speakers, [], [], _PAUSE_SECONDS)
        except (OSError, ValueError):  # numbers over 1023; none, on Windows
            time.sleep(_PAUSE_SECONDS)

    def handle_accept(self):
        """Accept the connections that wait."""
        for _ in range(self.accepts_per_event if self._accept_ends_with_none() else 1):
            pair = self.accept()
            if pair is None:
                return
            try:
                self.handle_accepted(*pair)
            except asyncore.ExitNow:
                raise
            except Exception:
                self._abandon_connection(pair[0])
                self.handle_error()
            if not self.accepting:  # closed meanwhile
                return

    def _accept_ends_with_none(self):
        """Whether accept() returns None when no connection waits; others may block, or go on."""
        return (self.socket is self._own_listener
                and getattr(self.accept, '__func__', None) is SMTPServer.accept)

    def handle_accepted(self, conn, addr):
        """Make a channel for a connection."""
        _debug('Incoming connection from %r', addr)
        arguments = (self, conn, addr, self.data_size_limit, self._map,
                     self.enable_SMTPUTF8, self._decode_data)
        self.channel_class(*arguments[:_positional_arguments(self.channel_class)])

    def _abandon_connection(self, connection):
        """Close a connection whose channel could not be made."""
        descriptor = connection.fileno()
        with contextlib.closing(connection):
            for channels in self._map, self._watched_channels():
                channel = channels.get(descriptor)
                if channel is not None and channel.socket is connection:
                    try:
                        channel.close()
                    finally:  # a program's close() may raise, or leave it there
                        channel.del_channel()

    def close(self):
        """Stop listening; may be called from any thread.  Channels stay open."""
        with _lock:
            is_shared = not self._may_shut_down()
            if self._fileno is not None and not self._leave_to_loop(self, is_shared=is_shared):
                self._closed_at_once = self.socket
        super().close()
        if self._threads_for_handlers is not None:
            self._threads_for_handlers.close_when_idle()

    def del_channel(self, map=None):
        with _lock:  # another thread may close it at the same moment
            super().del_channel(map)

    def _may_shut_down(self):
        """Whether no other process shares the listener: shutdown() would end it for all."""
        return self.socket is self._own_listener and self._forks_before_listener == _forks

    def _leave_to_loop(self, owner, watcher=None, is_shared=False):
        """Let another thread's loop close a dispatcher's socket; return whether it will.

        Call this under _lock.
        """
        if not self._has_loop_elsewhere():
            return False
        if owner._fileno is None or not isinstance(owner.socket, socket.socket):
            return False
        if is_shared and os.name != 'posix':  # where dup2() takes no socket
            return False
        return _ClosingSocket(owner, watcher, is_shared).is_open()

    def _has_loop_elsewhere(self):
        """Whether the loop runs, or has run, in another thread that is alive."""
        return (self._loop_thread not in (None, threading.get_ident())
                and any(thread.ident == self._loop_thread for thread in threading.enumerate()))

    # ------------------------------------------------------------------
    # For the channels
    # ------------------------------------------------------------------

    def _own_name(self):
        if self._name_of_this_host is None:
            self._name_of_this_host = _getfqdn()  # may take seconds: once per server
        return self._name_of_this_host

    def _own_threads(self):
        threads = self._threads_for_handlers
        if threads is None or threads.is_inherited():
            if threads is not None:
                threads.close()
            threads = self._threads_for_handlers = _Threads(self._map)
        if not self.accepting:  # a session outlives its server
            threads.close_when_idle()
        return threads

    def _run_in_thread(self, call, take_outcome):
        """Run call() in a thread, then take_outcome(outcome) in the loop's: see _Threads."""
        self._own_threads().run(self.process_message_threads or 1, call, take_outcome)

    def _has_selector_for(self, channel_class):
        if not (self.channels_in_selector and _Selector.is_possible
                and _leaves_events_alone(channel_class)):
            return False
        if self._selector_of_channels is None:
            self._selector_of_channels = _Selector(self._map)
        return self._selector_of_channels.open()

    def _takes_into_selector(self, channel, map):
        return ((channel._map if map is None else map) is self._map
                and self._has_selector_for(type(channel)))

    def _watched_channels(self):
        return {} if self._selector_of_channels is None else self._selector_of_channels._channels


def _positional_arguments(channel_class):
    """The number of arguments a channel class takes, None for any number; old ones take three."""
    code = getattr(getattr(channel_class, '__init__', None), '__code__', None)
    if code is None or code.co_flags & _TAKES_ARGS:
        return None
    return code.co_argcount - 1


def _may_speak(thing):
    if isinstance(thing, SMTPChannel):
        return thing._flow.gate <= _IDLE
    return isinstance(thing, (_Threads, _Selector))


def _leaves_events_alone(channel_class):
    return all(getattr(channel_class, name, None) is getattr(SMTPChannel, name)
               for name in ('readable', 'writable', 'handle_read_event',
                            'handle_write_event', 'handle_expt_event'))


class DebuggingServer(SMTPServer):
    """Prints each message to standard output, and discards it.

    Arguments as SMTPServer's.  Lines of bytes are printed as Python writes them:
    b'Subject: hello'.
    """

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        _print('---------- MESSAGE FOLLOWS ----------')
        if kwargs.get('mail_options'):
            _print('mail options: %s' % kwargs['mail_options'])
        if kwargs.get('rcpt_options'):
            _print('rcpt options: %s\n' % kwargs['rcpt_options'])
        self._print_message_content(peer, data)
        _print('------------ END MESSAGE ------------')
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()  # a pipe or a container's log shows it now

    def _print_message_content(self, peer, data):
        lines = data.splitlines()
        peer_header = 'X-Peer: ' + _host_of(peer)
        if isinstance(data, bytes):
            lines = [repr(line) for line in lines]
            peer_header = repr(peer_header.encode('utf-8', 'backslashreplace'))
        first_empty = next((i for i, line in enumerate(lines) if line in ('', "b''")), None)
        if first_empty is not None:
            lines.insert(first_empty, peer_header)
        if lines:
            _print(NEWLINE.join(lines))


def _print(text):
    """print() that never raises, even if standard output cannot encode the text or is closed."""
    encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
    with contextlib.suppress(OSError, ValueError):
        print(text.encode(encoding, 'backslashreplace').decode(encoding))


def _host_of(peer):
    """The host of a socket address; AF_UNIX has only a path."""
    return str(peer[0]) if isinstance(peer, tuple) and peer else str(peer)


# ---------------------------------------------------------------------------
# The proxies
# ---------------------------------------------------------------------------

# Imported before root becomes nobody, who may be unable to read the files.
_MODULES_OF_PROXIES = ('encodings.idna', 'hashlib')

_NULL_PATH = '<>'
_NOT_AVAILABLE = b'Upstream not available'
_TOO_MANY_HOPS = 554, b'Error: too many hops'
_TRACE_HEADER = re.compile(rb'^(?:received|x-peer)[ \t]*:', re.IGNORECASE | re.MULTILINE)
_REPLY_LINE = re.compile(rb'([2-5][0-9][0-9])(?:([ -])(.*))?', re.DOTALL)
_MOST_OF_A_REPLY = 65536  # octets; no real reply is as long
_MOST_OF_A_LINE = 506  # octets of text; RFC 5321, 4.5.3.1.5: 512 with code and CRLF
_MOST_DELIVERIES = 1000  # messages to remember ...
_DELIVERY_SECONDS = 5 * 86400  # ... for as long as Postfix tries again (maximal_queue_lifetime)
_BLOCK = 32768  # octets of a message; at most 64 KB on the wire: a time limit holds for each
_EXTENSIONS = {'SIZE': b'SIZE', 'BODY': b'8BITMIME'}  # which offer the parameter


class PureProxy(SMTPServer):
    """Relays each step of a session to `remoteaddr`, whose replies are the client's.

    Arguments as SMTPServer's, but `enable_SMTPUTF8` raises ValueError.  Anyone who can
    connect can send mail anywhere: on a public address this is an open relay.

    MAIL, RCPT, DATA and the message go to the upstream when the client sends them,
    in one upstream session for each client's session.  The client gets 451 if the
    upstream cannot be reached, breaks off, or sends something that is no reply.

    A program that overrides process_message() or _deliver() gets each message as a
    whole instead.  process_message() adds the X-Peer header and calls
    _deliver(mailfrom, rcpttos, data), which sends the message to the upstream and
    returns {recipient: (code, text)} of those that were refused.

    Class attributes that a subclass may override, besides SMTPServer's; the time
    limits are in seconds, and the loop looks at them at each of its turns:

    upstream_timeout_seconds          to connect, to all of the host's addresses
                                      together (60)
    upstream_command_timeout_seconds  for the greeting and the replies to EHLO,
                                      MAIL, RCPT and RSET (300)
    upstream_data_timeout_seconds     for the reply to DATA (120)
    upstream_block_timeout_seconds    to send each 64 KB of a message (180)
    upstream_final_timeout_seconds    for the reply to a message (600)
    upstream_connection_limit         to one upstream at a time (200), then 451; None
                                      for no limit
    hop_limit                         X-Peer and Received headers that show a message
                                      to be in a loop (50), then 554
    """

    upstream_timeout_seconds = 60  # an unreachable host should not take minutes
    upstream_command_timeout_seconds = 300
    upstream_data_timeout_seconds = 120
    upstream_block_timeout_seconds = 180
    upstream_final_timeout_seconds = 600
    upstream_connection_limit = 200  # a circle of proxies ends before descriptors do (1024)
    hop_limit = 50  # Postfix: hopcount_limit

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.enable_SMTPUTF8:
            self.close()
            raise ValueError('%s does not support SMTPUTF8.' % self.__class__.__name__)
        for name in _MODULES_OF_PROXIES:
            importlib.import_module(name)

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        octets = _lf_lines(_as_octets(data))
        if self._has_too_many_hops(octets):
            return _reply_text(_TOO_MANY_HOPS)
        deliveries = _deliveries_of(self)
        left = deliveries.left(mailfrom, octets, rcpttos)
        traced = _with_peer_header(octets, peer)
        if isinstance(data, str):
            traced = traced.decode('utf-8', 'surrogateescape')
        refused = (self._deliver(mailfrom, left, traced) if left else None) or {}
        code, text = _reply_for_all(refused, rcpttos) if refused else (250, b'OK')
        comes_again = 400 <= code < 500
        deliveries.note(mailfrom, octets, rcpttos, refused, comes_again)
        return _reply_text((451 if comes_again else code, text)) if refused else None

    def _deliver(self, mailfrom, rcpttos, data):
        """Send a message upstream; return {recipient: (code, text)} of those refused."""
        sockets = {}
        session = self._new_upstream_session(sockets)
        try:
            return _run(_deliver_whole(session, mailfrom, rcpttos, _as_octets(data)), sockets)
        finally:
            session.quit()

    def _new_upstream_session(self, sockets):
        return _UpstreamSession(self, self._remoteaddr, sockets)

    def _relay_for(self, channel):
        """The relay of this channel; None if the program overrides what relays."""
        relay = channel._flow.relay  # FOUNDER: the channel's attribute
        if _relays_step_by_step(self):
            return relay or _Relay(self, channel)
        if relay is not None:  # overridden since the last message
            relay.end()
        return None

    def _has_too_many_hops(self, octets):
        traces = _TRACE_HEADER.findall(octets, 0, _end_of_headers(octets))
        return len(traces) >= self.hop_limit


class MailmanProxy(PureProxy):
    """PureProxy that gives the addresses of Mailman 3's lists to Mailman.

    Arguments as PureProxy's.

    Mailman's LMTP server is asked about each recipient; `remoteaddr` is asked about
    what Mailman does not know.  While Mailman cannot be reached each recipient gets
    451, since there is no telling which are lists.  If a message has reached some of its
    recipients and not others, the client gets 451, and its next try goes to the
    others only.

    Class attribute that a subclass may override, besides PureProxy's:

    mailman_lmtp_address  (host, port), ('localhost', 8024) unless changed
    """

    mailman_lmtp_address = ('localhost', 8024)  # Mailman's default

    def _new_upstream_session(self, sockets):
        return _MailmanSession(
            _UpstreamSession(self, self.mailman_lmtp_address, sockets, ['LHLO']),
            super()._new_upstream_session(sockets))


_HANDLERS_OF_OURS = PureProxy.process_message, PureProxy._deliver  # before a program patches them


def _relays_step_by_step(proxy):
    """False if a class, a patch or the proxy itself overrides process_message() or _deliver()."""
    handlers = proxy.process_message, proxy._deliver
    return tuple(getattr(each, '__func__', None) for each in handlers) == _HANDLERS_OF_OURS


def _deliveries_of(proxy):
    return vars(proxy).setdefault('_deliveries', _Deliveries())


def _run(steps, sockets):
    """Run a generator to its end in a socket map of its own; return its result."""
    outcomes = []
    _advance(steps, outcomes.append)
    while not outcomes:
        asyncore.loop(timeout=1, use_poll=True, map=sockets, count=1)
    return outcomes[0]()


def _deliver_whole(session, mailfrom, rcpttos, octets):
    """Send a message to all who are taken; return {recipient: (code, text)} of those refused."""
    reply = yield from session.mail(mailfrom, [] if octets.isascii() else ['BODY=8BITMIME'])
    if not _is_success(reply):
        return dict.fromkeys(rcpttos, reply)
    replies = {}
    for each in dict.fromkeys(rcpttos):
        replies[each] = yield from session.rcpt(each)
    accepted = [each for each, reply in replies.items() if _is_success(reply)]
    if accepted:
        replies.update((yield from session.deliver(octets, accepted)))
    return _refused_of(replies)


class _Relay:
    """Takes the steps of one client's session to the upstream.

    mail(), rcpt(), data(), deliver() and reset() are generators that return the reply
    to the client.
    """

    def __init__(self, proxy, channel):
        self._proxy = proxy
        self._channel = channel
        self._session = proxy._new_upstream_session(proxy._map)
        self._mailfrom = None  # what the upstream has agreed to
        self._rcpttos = []
        self._is_delivering = False
        self._is_ended = False  # the client has gone

    def knows(self, mailfrom, rcpttos):
        """False if the program has changed the transaction since the upstream saw it."""
        return mailfrom == self._mailfrom and rcpttos == self._rcpttos

    def mail(self, mailfrom, options):
        self._mailfrom, self._rcpttos = mailfrom, []
        if not any(each.startswith('BODY=') for each in options):
            options = [*options, 'BODY=8BITMIME']  # the data may be 8-bit: it is still to come
        return self._take(self._session.mail(mailfrom, options))

    def rcpt(self, recipient):
        reply = yield from self._take(self._session.rcpt(recipient))
        if reply[:1] == '2':
            self._rcpttos.append(recipient)
        return reply

    def data(self):
        return self._take(self._session.data())

    def deliver(self, message):
        return self._take(self._deliver(_lf_lines(_as_octets(message))))

    def reset(self):
        return self._take(self._session.reset())

    def end(self):
        """The client has gone: leave the upstream, unless a message is on its way."""
        self._is_ended = True
        if not self._is_delivering:
            self._session.quit()

    def is_given_up(self):
        """Whether the client does not wait for the reply to the message that is on its way."""
        self._is_ended = self._is_ended or _has_gone(self._channel)
        return self._is_ended

    def _take(self, steps):
        try:
            return _reply_text((yield from steps))
        finally:
            if self._is_ended:
                self._session.quit()

    def _deliver(self, octets):
        if self._proxy._has_too_many_hops(octets):
            self._session.quit()
            return _TOO_MANY_HOPS
        deliveries = _deliveries_of(self._proxy)
        message = self._mailfrom, octets
        other = deliveries.under_way.get(message)
        if other is not None and other.is_given_up():
            self._session.quit()
            return 451, _NOT_AVAILABLE
        deliveries.under_way[message] = self
        self._is_delivering = True
        try:
            left = deliveries.left(*message, self._rcpttos)
            replies = yield from self._session.deliver(
                _with_peer_header(octets, self._channel.peer), left)
            refused = _refused_of(replies)
            reply = (_reply_for_all(refused, self._rcpttos) if refused
                     else next(iter(replies.values()), (250, b'OK')))
            comes_again = self._is_ended or 400 <= reply[0] < 500
            deliveries.note(*message, self._rcpttos, refused, comes_again)
            return reply
        finally:
            self._is_delivering = False
            deliveries.under_way.pop(message, None)


def _has_gone(channel):
    """Whether the client has closed the connection, and left nothing to be read."""
    try:
        return not channel.socket.recv(1, _PEEK)
    except Exception as error:  # nothing there; TLS cannot peek; a stub
        return isinstance(error, ConnectionError)


class _Deliveries:
    """Remembers who got a message that the client will send again, since others did not."""

    def __init__(self):
        self.under_way = {}  # relays by message
        self._delivered = collections.OrderedDict()  # (recipients, when) by message

    def left(self, mailfrom, octets, rcpttos):
        """The recipients that have not got the message yet."""
        if not self._delivered:
            return rcpttos
        delivered = self._recipients_of(_digest(mailfrom, octets))
        return [each for each in rcpttos if each not in delivered]

    def note(self, mailfrom, octets, rcpttos, refused, comes_again):
        """All but those refused have the message now."""
        delivered = {each for each in rcpttos if each not in refused}
        if not (self._delivered or comes_again and delivered):
            return
        message = _digest(mailfrom, octets)
        recipients = self._recipients_of(message)
        self._delivered.pop(message, None)
        # Unless it comes again, the next message that looks like this one is another.
        recipients = recipients | delivered if comes_again else recipients.difference(rcpttos)
        if recipients:
            self._delivered[message] = recipients, time.monotonic()
        if len(self._delivered) > _MOST_DELIVERIES:
            self._delivered.popitem(last=False)

    def _recipients_of(self, message):
        recipients, noted = self._delivered.get(message, (frozenset(), 0))
        return recipients if time.monotonic() - noted < _DELIVERY_SECONDS else frozenset()


def _digest(mailfrom, octets):
    import hashlib
    return hashlib.sha256(b'\n'.join((_as_octets(mailfrom), octets))).digest()


class _MailmanSession:
    """A client's session with Mailman and, for what Mailman does not know, with the upstream.

    Methods as _UpstreamSession's.
    """

    def __init__(self, mailman, upstream):
        self._mailman = mailman
        self._upstream = upstream

    def mail(self, mailfrom, options):
        # RCPT shows who must be asked: mail for lists alone needs no upstream.
        self._mail = mailfrom, options
        self._replies_to_mail = {}  # by session
        self._lists = {}  # by address in lower case: as the client wrote it first, reply
        self._upstream.accepted = {}
        return _at_once(250, b'OK')

    def rcpt(self, recipient):
        address = recipient.lower()
        if address in self._lists:  # in any spelling it is posted once
            return self._lists[address][1]
        reply = yield from self._ask(self._mailman, recipient)
        if _is_success(reply):
            self._lists[address] = recipient, reply
        return (yield from self._ask(self._upstream, recipient)) if reply[0] >= 500 else reply

    def _ask(self, session, recipient):
        if session not in self._replies_to_mail:
            self._replies_to_mail[session] = yield from session.mail(*self._mail)
        reply = self._replies_to_mail[session]
        return (yield from session.rcpt(recipient)) if _is_success(reply) else reply

    def data(self):
        if self._upstream.accepted:
            return self._upstream.data()
        return _at_once(354, b'End data with <CR><LF>.<CR><LF>')

    def deliver(self, octets, recipients):
        others = [each for each in recipients if each.lower() not in self._lists]
        replies = yield from self._upstream.deliver(octets, others)
        reply = replies[others[0]] if others else (250, b'OK')
        if not _is_success(reply):
            return dict.fromkeys(recipients, reply)
        # One transaction for each list: to some faults Mailman gives one reply for all its
        # recipients, and not one for each (RFC 2033, 4.2): the others would never come.
        posts = {}
        for each in recipients:
            address = each.lower()
            if address in self._lists:
                if address not in posts and not 400 <= reply[0] < 500:  # else at the next try
                    spelling = self._lists[address][0]
                    reply = (yield from self._mailman.deliver(octets, [spelling]))[spelling]
                    posts[address] = reply
                replies[each] = posts.get(address, reply)
        return replies

    def reset(self):
        yield from self._mailman.reset()
        return (yield from self._upstream.reset())

    def quit(self):
        self._mailman.quit()
        self._upstream.quit()


class _UpstreamSession:
    """One client's session with one upstream: its connection, its transaction.

    Each step is a generator that returns the reply, (code, text): 451 if the upstream
    is lost, from there on until the next mail().
    """

    def __init__(self, proxy, address, sockets, hellos=('EHLO', 'HELO')):
        self._proxy = proxy
        self._address = address
        self._sockets = sockets
        self._hellos = hellos
        self._upstream = _Upstream(proxy, address, sockets)  # not connected yet
        self._mail = None  # reverse-path and parameters
        self.accepted = {}  # replies by recipient

    def mail(self, mailfrom, options):
        """Begin a transaction, on a new connection if the old one has ended."""
        self._mail = mailfrom, options
        self.accepted = {}
        return self._guarded(self._begin())

    def rcpt(self, recipient):
        if not self._upstream.connected:
            return 451, _NOT_AVAILABLE
        reply = self.accepted.get(recipient)
        if reply is None:
            line = 'RCPT TO:' + _in_brackets(recipient)
            reply = yield from self._guarded(self._upstream.ask(line))
            if _is_success(reply):
                self.accepted[recipient] = reply
        return reply

    def data(self):
        if not self._upstream.connected:
            return 451, _NOT_AVAILABLE
        seconds = self._proxy.upstream_data_timeout_seconds
        reply = yield from self._guarded(self._upstream.ask('DATA', seconds, [354]))
        self._upstream.is_in_data = reply[0] == 354
        return reply

    def deliver(self, octets, recipients):
        """Send the message to those recipients; {recipient: reply}, the same for all."""
        recipients = list(dict.fromkeys(recipients))
        if not recipients:
            return {}
        reply = yield from self._prepare(recipients)
        if self._upstream.is_in_data:
            reply = yield from self._guarded(self._upstream.send_message(octets))
        self.accepted = {}
        return dict.fromkeys(recipients, reply)

    def _prepare(self, recipients):
        # It may have closed while the client sent its data, and may have more recipients
        # than are left: as nothing has been sent yet, another transaction does no harm.
        if not self._upstream.connected or list(self.accepted) != recipients:
            reply = yield from self.mail(*self._mail)
            for each in recipients:
                if _is_success(reply):
                    reply = yield from self.rcpt(each)
            if not _is_success(reply):
                return 451, reply[1]
        return None if self._upstream.is_in_data else (yield from self.data())

    def reset(self):
        """Let the upstream forget the transaction, too."""
        self.accepted = {}
        if self._upstream.connected:
            yield from self._guarded(self._end_transaction())
        return 250, b'OK'

    def quit(self):
        """Take leave; a message under way gets no final dot, and is none."""
        self._upstream.quit()

    def _guarded(self, steps):
        try:
            reply = yield from steps
        except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
            self._proxy.log_info(
                '%s:%s: mail from %s: %s' % (*self._address, self._mail[0], error), 'error')
            reply = 421, _NOT_AVAILABLE
        except BaseException:  # a reply may be left unread
            self._upstream.close()
            raise
        if reply[0] == 421:
            self._upstream.close()
            reply = 451, reply[1]
        return reply

    def _begin(self):
        if self._upstream.connected:
            with contextlib.suppress(OSError):
                reply = yield from self._ask_mail(*self._mail)
                if reply[0] != 421:
                    return reply
            self._upstream.close()
        greeting = yield from self._connect()
        if _leads_to_itself(self._proxy, self._upstream.socket):
            self._upstream.close()
            return _TOO_MANY_HOPS
        yield from self._greet(greeting)
        return (yield from self._ask_mail(*self._mail))

    def _connect(self):
        """Connect to one of the upstream's addresses; return the greeting."""
        limit = self._proxy.upstream_connection_limit
        others = [each for each in self._sockets.values()
                  if isinstance(each, _Upstream) and each.host_and_port == self._address]
        if limit is not None and len(others) >= limit:
            raise _UpstreamLost('%d connections already' % len(others))
        look_up = functools.partial(socket.getaddrinfo, *self._address, type=socket.SOCK_STREAM)
        if self._sockets is self._proxy._map:
            addresses = yield functools.partial(self._proxy._run_in_thread, look_up)
        else:  # a loop that has nothing else to do
            addresses = look_up()
        ends = time.monotonic() + self._proxy.upstream_timeout_seconds
        for left, (family, _, _, _, address) in zip(range(len(addresses), 0, -1), addresses):
            self._upstream = _Upstream(self._proxy, self._address, self._sockets)
            try:
                seconds = (ends - time.monotonic()) / left
                return (yield from self._upstream.open(family, address, seconds))
            except OSError:
                self._upstream.close()
                if left == 1:
                    raise

    def _greet(self, reply):
        for verb in self._hellos if _is_success(reply) else ():
            reply = yield from self._upstream.ask('%s %s' % (verb, self._proxy._own_name()))
            if _is_success(reply):
                lines = reply[1].upper().split(b'\n')[1:]
                self._upstream.extensions = {line.split()[0] for line in lines if line.strip()}
                return
        raise _UpstreamLost(_reply_text(reply))

    def _ask_mail(self, mailfrom, options):
        yield from self._end_transaction()
        parameters = [' ' + each for each in options
                      if _EXTENSIONS.get(each.partition('=')[0]) in self._upstream.extensions]
        reply = yield from self._upstream.ask(
            'MAIL FROM:%s%s' % (_in_brackets(mailfrom), ''.join(parameters)))
        self._upstream.has_transaction = _is_success(reply)
        return reply

    def _end_transaction(self):
        """Send RSET if there is one: a refused message need not have ended it."""
        reply = 250, b'OK'
        if self._upstream.has_transaction:
            reply = yield from self._upstream.ask('RSET')
        if not _is_success(reply):
            raise _UpstreamLost('has not finished the message before')
        self._upstream.has_transaction = False
        return reply


def _at_once(code, text):
    """A step that waits for nothing."""
    yield from ()
    return code, text


class _UpstreamLost(ConnectionError):
    """The upstream has closed, or its replies can no longer be told apart."""


class _Upstream(asynchat.async_chat):
    """A connection to an SMTP or LMTP server, in the loop.

    Not smtplib's: that blocks, waits for ever for a reply that never ends, takes a
    reply to nothing for the next command's, changes paths, and leaves a bare
    CR in a message, after which a dot could end it.

    open(), ask() and send_message() are generators that return a reply, (code, text), and
    raise OSError if the server is lost: nothing that it may still say counts.
    """

    ac_in_buffer_size = 4096  # replies are short
    terminator = b'\n'
    extensions = frozenset()
    has_transaction = False
    is_in_data = False  # it waits for a message, or the rest of it

    _resume = None  # the step that waits for a reply ...
    _deadline = math.inf  # ... until then, on the monotonic clock
    _octets_read = 0  # of the reply that is being read
    _blocks = iter(())  # of a message, to be sent
    _fault = None  # why it is lost, if no step was told

    log_info = _log_info
    handle_expt = _Transport.handle_expt  # FOUNDER: the channel's

    def __init__(self, proxy, host_and_port, sockets):
        asynchat.async_chat.__init__(self, map=sockets)
        self.host_and_port = host_and_port
        self._proxy = proxy
        self._texts = []  # lines of the reply that is being read
        self._replies = []  # that no step has taken yet

    def open(self, family, address, seconds):
        """Connect; return the greeting."""
        self.create_socket(family)
        if _is_too_much_for_select(self.socket.fileno(), self._map):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.socket.setsockopt(*_NO_DELAY)
        self.connect(address)
        return (yield from self._reply(seconds))

    def ask(self, line, seconds=None, good=range(200, 300)):
        """Send a command; return the reply, a good one or a refusal."""
        if '\r' in line or '\n' in line:
            raise ValueError('a line end in %r' % line)
        self.handle_read()
        if self.is_in_data or self._replies or self._octets_read or self.ac_in_buffer:
            raise _UpstreamLost('waits for a message, or talks unasked')
        self.push(line.encode('utf-8', 'surrogateescape') + _END_OF_LINE)
        if seconds is None:
            seconds = self._proxy.upstream_command_timeout_seconds
        return _check((yield from self._reply(seconds)), good)

    def send_message(self, octets):
        """Send the message, after DATA; return the reply to it."""
        final = self._proxy.upstream_final_timeout_seconds
        self._blocks = _blocks(octets)
        self.handle_read()
        self.producer_fifo.append(self)  # asynchat asks more() for a block when it has sent one
        try:
            if not self._replies:  # else it refuses the message already
                self.initiate_send()
                if not self.producer_fifo:
                    self._allow(final)
                yield self._wait
            reply = _check(self._replies.pop(), () if self.producer_fifo else range(200, 300))
        except OSError as error:
            if self.producer_fifo:
                raise
            raise _UpstreamLost('lost after the final dot: the message may have been delivered, '
                                'and will be once more: %s' % error) from error  # RFC 1047
        if self.producer_fifo:  # or the rest would follow the refusal
            self.close()
        self.is_in_data = False
        self.has_transaction = not _is_success(reply)
        return reply

    def more(self):
        """The next block of the message; with the last one the queue is empty."""
        block, is_last = next(self._blocks)
        seconds = self._proxy.upstream_block_timeout_seconds
        if is_last:
            self.producer_fifo.clear()
            seconds += self._proxy.upstream_final_timeout_seconds
        self._allow(seconds)
        return block

    def quit(self):
        if self.connected and self._resume is None and not self.is_in_data:
            self.push(b'QUIT\r\n')  # Postfix does not wait for the reply either
        self.close()

    def close(self):
        """Cut the connection; a step that waits is given up."""
        self._resume = None
        self.ac_in_buffer = b''
        super().close()

    def _reply(self, seconds):
        self._allow(seconds)
        yield self._wait
        return self._replies.pop()

    def _allow(self, seconds):
        self._deadline = time.monotonic() + seconds

    def _why(self):
        # Not kept: an exception refers to all that it went through, and so to the message.
        return vars(self).pop('_fault', None) or _UpstreamLost('closed the connection')

    def _wait(self, resume):
        if not (self.connected or self.connecting):
            raise self._why()
        self._resume = resume

    # Events

    def readable(self):
        if self._resume is not None and time.monotonic() > self._deadline:
            # The loop is collecting descriptors: none may be closed before its next event.
            self._fault = TimeoutError('timed out')
            with contextlib.suppress(OSError):
                self.socket.shutdown(_SHUT_BOTH)
        return True

    def handle_connect(self):
        self._allow(self._proxy.upstream_command_timeout_seconds)

    def collect_incoming_data(self, data):
        self._collect_incoming_data(data)
        self._octets_read += len(data)
        if self._octets_read > _MOST_OF_A_REPLY:
            raise _UpstreamLost('a reply without an end')

    def found_terminator(self):
        line = self._get_data().rstrip(b'\r')
        match = _REPLY_LINE.fullmatch(line)
        if not match or self._replies:
            raise _UpstreamLost('no reply: %r' % line[:100])
        code, mark, text = match.groups()
        self._texts.append(text or b'')
        if mark != b'-':
            self._replies.append((int(code), b'\n'.join(self._texts)))
            self._texts, self._octets_read = [], 0
            resume, self._resume = self._resume, None
            if resume is not None:
                resume(functools.partial(_give, None))

    def handle_close(self):
        if self.connected:  # it could not be sent to: its last word may be left to read
            self.connected = False
            self.handle_read()
        self._end(self._why())

    def handle_error(self):
        self._end(sys.exc_info()[1])

    def _end(self, error):
        resume, self._resume = self._resume, None
        self.connected = self.connecting = False
        self.del_channel()
        if resume is None:
            self._fault = error
        else:
            resume(functools.partial(_throw, error))
        self.close()  # only now: the loop may hold more events for its number


def _blocks(octets):
    """The message as it goes over the wire, in blocks; and whether it is the last one."""
    octets = _lf_lines(octets)
    for start in range(0, len(octets) or 1, _BLOCK):
        before = octets[start - 1:start] if start else b'\n'
        block = (before + octets[start:start + _BLOCK]).replace(b'\n', b'\r\n')
        block = block.replace(b'\r\n.', b'\r\n..')[2 if before == b'\n' else 1:]
        is_last = start + _BLOCK >= len(octets)
        if is_last:
            block += b'.\r\n' if octets[-1:] == b'\n' else _END_OF_DATA
        yield block, is_last


def _leads_to_itself(proxy, connection):
    """Whether the proxy has connected to the address that it listens on."""
    try:
        listening = proxy.socket.getsockname()
        here, there = connection.getsockname(), connection.getpeername()
    except (OSError, AttributeError):  # closed meanwhile, or never opened
        return False
    is_any = listening[0] in ('0.0.0.0', '::') and here[0] == there[0]
    return there[1] == listening[1] and (there[0] == listening[0] or is_any)


def _check(reply, good=range(200, 300)):
    """The reply, if it is a good one or a refusal of what the client wants."""
    if reply[0] < 400 and reply[0] not in good or reply[0] == 503:  # 503: our own fault
        raise _UpstreamLost('out of step: ' + _reply_text(reply))
    return reply


def _is_success(reply):
    return 200 <= reply[0] < 300  # RFC 5321, 4.3.2: the first digit tells


def _refused_of(replies):
    return {each: reply for each, reply in replies.items() if not _is_success(reply)}


def _reply_for_all(refused, recipients):
    """One reply, where some are refused and the others have the message."""
    replies = {each: reply if 400 <= reply[0] < 600 else (451, _NOT_AVAILABLE)
               for each, reply in refused.items()}
    for code, text in replies.values():
        if code < 500:
            return code, text
    if len(refused) < len(set(recipients)):  # the sender must be able to tell who was
        text = b'\n'.join(b'%.180s (%s)' % (b' '.join(_as_octets(said).split()), _as_octets(each))
                          for each, (_, said) in replies.items())
    return code, text


@functools.lru_cache(maxsize=64)
def _reply_text(reply):
    """(code, text) as process_message() returns replies."""
    code, text = reply
    lines = _as_octets(text).decode('ascii', 'replace').split('\n')
    return NEWLINE.join('%d %s' % (code, _printable(line.strip()[:_MOST_OF_A_LINE]))
                        for line in lines)


def _in_brackets(path):
    return path if path == _NULL_PATH else '<%s>' % path


def _as_octets(data):
    return data.encode('utf-8', 'surrogateescape') if isinstance(data, str) else data


def _lf_lines(octets):
    return _lf_for_crlf(octets).replace(b'\r', b'\n')


def _end_of_headers(octets):
    """Where the first empty line begins; the length if there is none."""
    if octets[:1] == b'\n':
        return 0
    return octets.find(b'\n\n') + 1 or len(octets)


def _with_peer_header(octets, peer):
    """The message with X-Peer after its headers."""
    headers_end = _end_of_headers(octets)
    peer_header = b'X-Peer: ' + _host_of(peer).encode('ascii', 'backslashreplace')
    # Otherwise _deliver() would take the last, empty line for a line end.
    line_end = b'\n' if octets[-1:] == b'\n' else b''
    if line_end or headers_end < len(octets):
        peer_header += b'\n'
    elif octets:
        peer_header = b'\n' + peer_header
    # Joined, since the message may be large.
    return b''.join((octets[:headers_end], peer_header, memoryview(octets)[headers_end:],
                     line_end))


# ---------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------

_BUILT_IN_CLASSES = COMMASPACE.join(__all__[2:])

_USAGE = """\
An RFC 5321 smtp proxy with optional RFC 1870 and RFC 6531 extensions.

Usage: %(program)s [options] [localhost:localport [remotehost:remoteport]]

    -n, --nosetuid    stay the user who started it; otherwise, after binding
                      the port, switch to user `nobody' (needs root)
    -c, --class NAME  the server class: one of this module (%(classes)s)
                      or package.module.Class; %(default)s if not given
    -s, --size LIMIT  the most octets that a message may have; 0: no limit;
                      %(size)d if not given
    -u, --smtputf8    offer the SMTPUTF8 extension (RFC 6531)
    -d, --debug       print each dialogue to standard error
    -V, --version     print the version and exit
    -h, --help        print this and exit

Version: %(version)s

Listens on localhost:8025 and relays to localhost:25 unless told otherwise.
An IPv6 address stands in brackets: [::1]:8025.  Without a host (:8025) it
listens on all interfaces (IPv4).
"""


class Options:
    """What the command line says, from parseargs().

    localhost        the host to listen on
    localport        the port to listen on
    remotehost       the host of a proxy's upstream server
    remoteport       its port
    classname        of the server: a name of this module or package.module.Class
    size_limit       octets that a message may have, 0 for no limit; None: not given
    setuid           become the user nobody
    enable_SMTPUTF8  offer SMTPUTF8
    """

    setuid = True
    classname = 'PureProxy'
    size_limit = None
    enable_SMTPUTF8 = False


def usage(code, msg=''):
    """Print the message, or the usage if there is none, to standard error; exit with `code`."""
    print(msg or _USAGE % {'program': program, 'version': __version__,
                           'classes': _BUILT_IN_CLASSES,
                           'default': Options.classname, 'size': DATA_SIZE_DEFAULT},
          file=sys.stderr)
    sys.exit(code)


def _give_up(form, *values):
    """Exit with status 1 and one line that says what is wrong, and what was wanted."""
    usage(1, 'smtpd: %s; try --help' % (form % values))


def parseargs():
    """Read sys.argv; return `Options`.  Exits with status 1 if an argument is wrong."""
    global DEBUGSTREAM
    try:
        given, arguments = getopt.getopt(
            sys.argv[1:], 'nVhc:s:du',
            ['class=', 'nosetuid', 'version', 'help', 'size=', 'debug', 'smtputf8'])
    except getopt.error as error:
        _give_up('%s', error)
    options = Options()
    for name, value in given:
        if name in ('-h', '--help'):
            usage(0)
        elif name in ('-V', '--version'):
            print(__version__)
            sys.exit(0)
        elif name in ('-n', '--nosetuid'):
            options.setuid = False
        elif name in ('-c', '--class'):
            options.classname = value
        elif name in ('-d', '--debug'):
            DEBUGSTREAM = sys.stderr
        elif name in ('-u', '--smtputf8'):
            options.enable_SMTPUTF8 = True
        else:
            options.size_limit = _natural_number(value)
            if options.size_limit is None:
                _give_up('%s %s: want a number of octets', name, value)
    if len(arguments) > 2:
        _give_up('%s: want two addresses at most', ' '.join(arguments))
    local, remote = (arguments + ['localhost:8025', 'localhost:25'][len(arguments):])
    options.localhost, options.localport = _parse_address(local)
    options.remotehost, options.remoteport = _parse_address(remote)
    return options


def _parse_address(text):
    host, colon, port = text.rpartition(':')
    if not colon:
        _give_up('%s: want HOST:PORT', text)
    if host[:1] == '[' and host[-1:] == ']':
        host = host[1:-1]
    number = _natural_number(port)
    if number is None or number > 65535:
        _give_up('%s: want a port from 0 to 65535', text)
    return host, number


def _natural_number(text):
    return int(text) if re.fullmatch('[0-9]{1,20}', text) else None


def _find_class(name):
    """The server class of that name: one of this module, or package.module.Class."""
    module_name, dot, class_name = name.rpartition('.')
    try:
        module = importlib.import_module(module_name) if dot else sys.modules[__name__]
    except (TypeError, ValueError):  # a name that begins with a dot, or is one
        _refuse_class(name, 'no such module')
    except ImportError as error:
        if (module_name + '.').startswith('%s.' % error.name):
            _refuse_class(name, 'no such module')
        _give_up('%s: cannot import %s: %s', name, module_name, error)
    found = getattr(module, class_name, None)
    if found is None:
        _refuse_class(name, 'no such class')
    if not isinstance(found, type) or issubclass(found, asynchat.async_chat):
        _refuse_class(name, 'not a server class')
    return found


def _refuse_class(name, reason):
    _give_up('%s: %s; want %s or package.module.Class', name, reason, _BUILT_IN_CLASSES)


def _import_for_tracebacks():
    """Let traceback import what its first one takes, while this user may read it."""
    try:
        raise RuntimeError
    except RuntimeError as error:
        _safe_traceback(error)


def _become_nobody():
    try:
        import pwd
    except ImportError:  # Windows
        _give_up('no user nobody on this system: want option -n')
    _import_for_tracebacks()
    try:
        nobody = pwd.getpwnam('nobody')
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
    except (KeyError, PermissionError):
        _give_up('cannot switch to user nobody: want root, or option -n')


def _make_server(options):
    server_class = _find_class(options.classname)
    limit = DATA_SIZE_DEFAULT if options.size_limit is None else options.size_limit
    try:
        server = server_class((options.localhost, options.localport),
                              (options.remotehost, options.remoteport),
                              limit, enable_SMTPUTF8=options.enable_SMTPUTF8)
    except (OSError, UnicodeError) as error:  # UnicodeError: the host is not a name
        _give_up('%s:%s: %s', options.localhost, options.localport,
                 getattr(error, 'strerror', None) or error)
    except ValueError as error:
        _give_up('%s', str(error).rstrip('.'))
    except TypeError as error:  # the class takes other arguments
        _refuse_class(options.classname, 'not a server class: %s' % error)
    return server


def _main():
    try:
        options = parseargs()
        server = _make_server(options)
        if isinstance(server, SMTPServer):
            server.channels_in_selector = True  # the socket map is ours
        if options.setuid:
            _become_nobody()
        # A second: Ctrl-C does not wake select() on Windows, nor a poll() that is about to start.
        asyncore.loop(timeout=1, use_poll=True)
    except KeyboardInterrupt:
        pass
    finally:
        asyncore.close_all(ignore_all=True)
        try:
            sys.stdout.flush()
        except (AttributeError, ValueError):  # None, or closed
            pass
        except OSError:  # broken pipe: keep the interpreter from trying again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
    sys.modules['smtpd'] = sys.modules['__main__']  # for what -c imports: one module, not two
    _main()
