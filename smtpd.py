"""An SMTP server: the smtpd module that Python 3.12 removed, rewritten from scratch.

For example, a server that prints who sends mail to whom::

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

All methods are called in the thread that runs asyncore.loop(), in asynchat's order;
process_message() may run in others (`process_message_threads`), and any thread may call
close() and push().  Nothing that a client sends can end the loop.  If a handler fails, the
client gets 451, so that it keeps the message and tries again.
"""

# Layout of this file: names of the module; paths, parameters, replies, handlers (pure
# functions); what servers and channels have in common; waiting; the channel; threads and
# quiet channels; the servers; the proxies; the command line.

import asynchat
import asyncore
import collections
import contextlib
import errno
import functools
import getopt
import importlib
import io
import os
import re
import select
import socket
import sys
import threading
import time
import traceback
import warnings
import weakref

__all__ = ['SMTPChannel', 'SMTPServer', 'DebuggingServer', 'PureProxy', 'MailmanProxy']

#: What the banner says after the host name.  A program may replace it.  It is not the
#: version of the distribution.
__version__ = 'Python SMTP proxy version 0.3'

#: The name of the program in the usage text.
program = 'python -m smtpd' if __name__ == '__main__' else (sys.argv or ['smtpd'])[0]

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
    """Print to DEBUGSTREAM, unless it discards everything."""
    if not isinstance(DEBUGSTREAM, Devnull):
        with contextlib.suppress(OSError, ValueError):  # closed, or its encoding lacks a character
            print(form % values, file=DEBUGSTREAM)


def _log_to_stderr(ignored, message, type='info'):
    if type not in ignored:
        _write_to_stderr('%s: %s\n' % (type, message))


def _write_to_stderr(text):
    with contextlib.suppress(Exception):  # closed, full, or None
        sys.stderr.write(text.encode('ascii', 'backslashreplace').decode('ascii'))


def _log_exception(self):
    """Write the exception that is being handled to the log; never raise."""
    error = sys.exc_info()[1]
    # The first call of format_exc() imports modules: it may lack descriptors, memory, rights.
    message = 'exception in %s\n%s' % (
        _safe_repr(self), _text_from(traceback.format_exc) or _describe(error))
    try:
        self.log_info(message, 'error')
    except Exception as fault:
        _write_to_stderr('error: %s\n%s\n' % (message, _describe(fault)))


def _text_from(function, *arguments):
    """What the function returns; '' if it raises."""
    try:
        return function(*arguments)
    except Exception:
        return ''


def _describe(error):
    return '%s: %s' % (type(error).__name__, _text_from(str, error))


def _safe_repr(thing):
    return _text_from(repr, thing) or object.__repr__(thing)


_socket = socket  # CPython's tests replace smtpd.socket with a mock that lacks many names
_NO_DELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
_QUICK_ACK = ((socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
              if hasattr(socket, 'TCP_QUICKACK') else None)  # Linux only
# What select() takes: on POSIX, descriptors below 1024; on Windows, 512 sockets, a few of
# which are left for listeners and for waking the loop.
_FD_SETSIZE = 1024 if os.name == 'posix' else sys.maxsize
_MOST_SOCKETS = 500 if os.name == 'nt' else sys.maxsize
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


# ---------------------------------------------------------------------------
# Paths, parameters, replies, handlers: pure functions
# ---------------------------------------------------------------------------

# The old module parsed addresses with the email package, whose atoms allow more than
# RFC 5321's atext: anything but specials, blanks and control characters.
_NO_ATOM = r'\x00-\x20\x7f-\x9f()<>@,:;\\"\[\]'
_DOT_STRING = r'{atom}(?:\.{atom})*'.format(atom=r'[^.%s]+' % _NO_ATOM)
_QUOTED_STRING = r'"(?:[^\x00-\x1f\x7f-\x9f"\\]|\\[^\x00-\x1f\x7f-\x9f])*"'
# Phone companies gave out local parts with dots in odd places, and the old module took them.
_LOCAL_PART = r'(?:[^{no_atom}]+|{quoted_string})'.format(
    no_atom=_NO_ATOM, quoted_string=_QUOTED_STRING)
_ADDRESS_LITERAL = r'\[[^\x00-\x20\x7f-\x9f\[\]\\]*\]'
_DOMAIN = r'(?:{dot_string}|{literal})'.format(
    dot_string=_DOT_STRING, literal=_ADDRESS_LITERAL)
_MAILBOX = r'{local_part}@{domain}'.format(local_part=_LOCAL_PART, domain=_DOMAIN)
_SOURCE_ROUTE = r'@{domain}(?:,@{domain})*:'.format(domain=_DOMAIN)  # accepted and ignored
_PATH = re.compile(
    r'[ \t]*(?:<(?:{route})?(?P<path>{mailbox}|{local_part})>(?=[ \t]|$)|(?P<null><>)(?=[ \t]|$)'
    r'|(?P<bare>{mailbox}(?=[ \t]|$)|{local_part}$))\s*'.format(
        route=_SOURCE_ROUTE, mailbox=_MAILBOX, local_part=_LOCAL_PART))
_CONTROL_CHARACTER = re.compile('[\x00-\x08\x0a-\x1f\x7f-\x9f]')  # all but TAB, a blank


@functools.lru_cache(maxsize=64)  # clients send the same few lines again and again
def _parse_command(line):
    """Split a command line into verb, name of its method, and argument or None.

    The verb is in upper case, or None if the line is empty, is not UTF-8 or contains
    control characters.
    """
    line = _as_octets(line)
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None, '', None
    if not text or not text.isprintable() and _CONTROL_CHARACTER.search(text):
        return None, '', None
    _, space, argument = text.partition(' ')
    argument = argument.strip() if space else None
    verb = line.partition(b' ')[0].upper().decode()  # of bytes, upper() changes only ASCII
    return verb, 'smtp_' + verb, argument


@functools.lru_cache(maxsize=64)
def _parse_path(text):
    """Split "path rest" into the path, verbatim but without brackets, and the rest.

    RFC 5321, 4.1.2.  The null path stays '<>'.  Returns ('', text) if the text does not
    begin with a well-formed path.
    """
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
    code = getattr(handler, '__code__', None)
    if code is None or code.co_flags & _TAKES_KWARGS:
        return offered
    named = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
    return {name: offered[name] for name in offered if name in named}


# ---------------------------------------------------------------------------
# What servers and channels have in common
# ---------------------------------------------------------------------------

_ENDS_OF_THE_LOOP = (asyncore.ExitNow, KeyboardInterrupt, SystemExit)  # not errors, in asyncore

# As they are before a program patches them.
_ASYNCORES_LOG_INFO = asyncore.dispatcher.log_info
_ASYNCORES_HANDLE_ERROR = asyncore.dispatcher.handle_error


class _Common:
    """A mixin for dispatchers: the log goes to standard error, and any thread may close."""

    def log_info(self, *args, **kwargs):
        """Write log_info(message, type='info') to standard error; never raises.

        A mixin's log_info() is called instead, and so is one that was patched into asyncore.
        """
        inherited = super().log_info
        if getattr(inherited, '__func__', None) is _ASYNCORES_LOG_INFO:
            inherited = functools.partial(_log_to_stderr, self.ignore_log_types)
        inherited(*args, **kwargs)

    def handle_error(self):
        """Write the traceback to the log; a channel then replies 451, or closes."""
        inherited = super().handle_error
        if inherited.__func__ is not _ASYNCORES_HANDLE_ERROR:
            inherited()
            return
        _log_exception(self)
        self._end_fault()

    def _end_fault(self):
        """Go on after a fault that has been written to the log."""

    def close(self):
        """Close; may be called from any thread.  The channels of a server stay open."""
        loop = self._loop_elsewhere()
        if loop is None:
            super().close()
            self._end_in_loop()
            return
        if self._fileno is not None and isinstance(self.socket, _socket.socket):
            with contextlib.suppress(ValueError):  # the loop has closed it just now
                _Leftover(self, loop)
        super().close()

    def _end_in_loop(self):
        """The rest of close(), in the loop's thread."""

    def del_channel(self, map=None):
        with contextlib.suppress(KeyError):  # another thread has closed it at the same moment
            super().del_channel(map)

    def _loop_elsewhere(self):
        """The _LoopThread that may be waiting for this, if it is another thread; or None."""
        return None

    def _shares_socket(self):
        """Whether other processes may use the socket: shutdown() would end it for all."""
        return False


class _Reader(_Common, asyncore.dispatcher):
    """A dispatcher that is only read from."""

    def writable(self):
        return False


def _peek(connection):
    """The next octet received; b'' at the end of the input, None if there is none yet."""
    try:
        return connection.recv(1, _socket.MSG_PEEK)
    except ConnectionError:
        return b''
    except Exception:  # nothing there; TLS cannot peek; a stub
        return None


class _LoopThread:
    """The thread that runs the loop: no other may close what select() may be waiting for.

    Only the thread keeps it, and all else refers to it weakly, so it lives as long as the thread.
    """

    def __init__(self):
        self.ident = threading.get_ident()
        self.leftovers = set()  # to be closed; asyncore.close_all() clears the map

    def close_leftovers(self):
        while self.leftovers:
            self.leftovers.pop().close()

    def __del__(self):
        self.ident = threading.get_ident()  # the thread has ended: anyone may close
        self.close_leftovers()


class _Leftover(_Reader):
    """The socket of a dispatcher that another thread has closed, until the loop's next turn."""

    def __init__(self, owner, loop):
        asyncore.dispatcher.__init__(self, map=owner._map)
        theirs = owner.socket
        self._owner = owner
        self._is_shared = owner._shares_socket()
        self._leftovers = loop.leftovers
        self._leftovers.add(self)
        owner._fileno = None  # so that its del_channel() leaves our entry in the map
        was_listening, owner.accepting = owner.accepting, False
        # Last of all, for the loop may see it from now on.
        self.set_socket(
            _socket.socket(theirs.family, theirs.type, theirs.proto, theirs.detach()))
        if not self._is_shared:
            try:
                self.socket.shutdown(_socket.SHUT_RDWR)  # wakes the loop, which close() would not
            except OSError:
                if was_listening:  # macOS
                    self.close()

    def readable(self):
        if self._is_shared:  # no event will come
            self.close()
        return not self._is_shared

    def handle_read_event(self):
        self.close()

    def close(self):
        self._leftovers.discard(self)
        super().close()

    def _end_in_loop(self):
        self._owner._end_in_loop()


class _ThisThread(threading.local):
    def __init__(self):
        self.loop = _LoopThread()


_this_thread = _ThisThread()


# ---------------------------------------------------------------------------
# Waiting
# ---------------------------------------------------------------------------

# What is waited for is a function start(resume).  It either raises, or returns and later, in
# the loop's thread, calls resume(outcome) once; outcome() returns or raises what came of it.
# A step that waits in the middle is a generator that yields such functions, and gets outcomes.

def _give(result):
    return result


def _throw(error):
    raise error


def _advance(steps, resume, outcome=None):
    """Run a generator, from an outcome, to its next wait, or to its end and resume()."""
    while True:
        try:
            start = steps.send(outcome)
        except StopIteration as end:
            return resume(functools.partial(_give, end.value))
        except BaseException as error:
            return resume(functools.partial(_throw, error))
        try:
            return start(functools.partial(_advance, steps, resume))
        except Exception as error:
            outcome = functools.partial(_throw, error)


# What a channel waits for before it reads on:
_NEXT_TURN = 'the next turn of the loop'
_REPLIES_SENT = 'the client, which has to read its replies'
_GOODBYE = 'the goodbye to an idle client'  # input that comes before it is taken
# or a list: the outcome of a step that is under way.  It tells this step from all others.


# ---------------------------------------------------------------------------
# The channel: the dialogue with one client
# ---------------------------------------------------------------------------

_END_OF_LINE = b'\r\n'
_END_OF_DATA = b'\r\n.\r\n'
_START_OF_DATA = bytes(bytearray(_END_OF_DATA))  # equal to the other, but not the same
_EMPTY_MESSAGE = b'.\r\n'

_MOST_UNSENT = 500  # replies that a client does not read

# Finds a line that begins with a dot, or a CR without LF; nearly all data has neither.  It
# is fast because Python looks for one octet many times faster than for two or three.
_NEEDS_CARE = re.compile(rb'\r(?!\n[^.])')


def _unstuff(octets):
    """Undo dot-stuffing and CRLF (RFC 5321, 4.5.2); return the size in octets, and the text.

    A piece must not end inside CRLF or CRLF-dot; with this terminator, asynchat's never do.
    The size is that of RFC 1870: CRLF counts as two, added dots do not count.
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


def _standard_limit():
    return 512


def _remove_last(items, item):
    if item in items:  # a program may have rewritten it
        del items[-1 - items[::-1].index(item)]


class _Session(_Common, asynchat.async_chat):
    """A session without its commands: input, lines, messages, replies, waiting.

    The constants and limits that it uses are SMTPChannel's.  It is apart from that class
    for speed: from Python 3.14 on, an instance's attributes are slow if the methods of its
    own class assign to more than 29.
    """

    # What most sessions leave as it is; _set_initial_state() sets the rest.  In CPython,
    # attributes are fast if the class lacks them, and the instance has fewer than 30.
    data_size_limit = DATA_SIZE_DEFAULT
    enable_SMTPUTF8 = False
    require_SMTPUTF8 = False  # asked for in MAIL
    use_encoding = True  # asynchat's: a terminator may be text, as in programs for Python 2

    # str or bytes, as received_lines is; copies of the old found_terminator() use these.
    _decode_data = False
    _emptystring = b''
    _linesep = b'\r\n'
    _dotsep = ord(b'.')  # what data[0] gives
    _newline = b'\n'

    # Private.
    _errors = 0  # 5yz replies since the last message
    _waits_for = None  # _NEXT_TURN, _REPLIES_SENT, _GOODBYE, or a list: a step's outcome
    _unread = b''  # input that is put aside during a wait
    _quiet_channels = None  # where it is kept, instead of the map, while it only waits for input
    _relay = None  # takes the steps of this session to a proxy's upstream

    def __init__(self, server, conn, addr, data_size_limit=DATA_SIZE_DEFAULT,
                 map=None, enable_SMTPUTF8=False, decode_data=False):
        _check_modes(enable_SMTPUTF8, decode_data)
        self._set_initial_state()
        self.smtp_server = server
        self.conn = conn
        for name, value in (('data_size_limit', data_size_limit),
                            ('enable_SMTPUTF8', enable_SMTPUTF8), ('_decode_data', decode_data)):
            if getattr(self, name) != value:
                setattr(self, name, value)
        if isinstance(self._emptystring, str) != bool(decode_data):
            self._emptystring, self._linesep, self._dotsep, self._newline = (
                ('', '\r\n', '.', NEWLINE) if decode_data else (b'', b'\r\n', ord(b'.'), b'\n'))
        self.command_size_limits = self._own_limits()
        with contextlib.suppress(OSError, AttributeError):  # AF_UNIX; a stub
            conn.setsockopt(*_NO_DELAY)
        asynchat.async_chat.__init__(self, conn, map)
        peer, self.addr = self.addr, addr
        if not self.connected:  # gone already: getpeername() failed
            self.close()
            return
        self._set_rset_state()
        self.fqdn = server._own_name if _is_server(server) else _getfqdn()
        self.peer = peer
        _debug('Peer: %r', self.peer)
        # Sent now: TLS subclasses call async_chat.__init__() next, which drops what is queued.
        self.push('220 %s %s' % (self.fqdn, __version__))
        quiet = server._quiet_channels_for(type(self)) if _is_server(server) else None
        if quiet is not None:
            self._quiet_channels = quiet
            self._settle()

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self._sending = threading.RLock()  # one thread at a time
        try:
            self._set_initial_state()  # __init__() may be the program's own
        except Exception:  # a property of the program's that needs what its __init__() sets
            pass
        return self

    __new__.__wrapped__ = __init__  # the signature that help() shows

    def _set_initial_state(self):
        """Set the state of a new session."""
        self.smtp_server = self.conn = self.peer = None
        self.fqdn = self.seen_greeting = self.received_data = ''
        self.extended_smtp = False  # EHLO, not HELO
        self.received_lines = []
        self._is_unanswered = False  # what is being executed has no reply so far
        self._last_sign_of_life = time.monotonic()  # of the client
        self._begin_transaction()

    def _own_limits(self):
        """A copy of the class's limits: this session's EHLO must not change those of others."""
        limits = type(self).command_size_limits.copy()
        if getattr(limits, 'default_factory', None) is _standard_limit:
            limits.default_factory = functools.partial(_give, self.command_size_limit)
        return limits

    def _begin_transaction(self):
        """Set the state that RSET and the end of the data return to."""
        self.smtp_state = self.COMMAND
        self.mailfrom = None
        self.rcpttos = []
        self.mail_options = []
        self.rcpt_options = []
        if self.require_SMTPUTF8:
            self.require_SMTPUTF8 = False
        self.num_bytes = 0
        self._message = None  # the data so far, unless a hook of the program's collects them

    def _set_mail(self, address, options):
        """Set the state that MAIL leads to."""
        if _is_server(self.smtp_server):
            relay = self.smtp_server._relay_for(self)
            if relay is not self._relay:
                self._relay = relay
        self.mail_options = options
        if 'SMTPUTF8' in options:
            self.require_SMTPUTF8 = True
        self.mailfrom = address

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
    # Waiting: a channel on hold reads nothing, and puts aside what it has read already
    # ------------------------------------------------------------------

    def _hold(self, waits_for):
        """Put the unread input aside, which ends asynchat's loop, until _resume()."""
        self._unread = self.ac_in_buffer + self._unread
        self.ac_in_buffer = b''
        self._waits_for = waits_for

    def _resume(self):
        self._waits_for = None
        if self._unread:
            self.handle_read()  # recv() has it

    def _wait(self, start, go_on):
        """Call start(resume), hold the input until it calls back, then go_on(outcome)."""
        outcomes = []
        try:
            start(functools.partial(self._take_outcome, go_on, outcomes))
        except Exception as error:
            outcomes.append(functools.partial(_throw, error))
        if outcomes:
            go_on(outcomes[0])
        else:
            self._hold(outcomes)

    def _take_outcome(self, go_on, outcomes, outcome):
        if self._waits_for is outcomes:
            self._come_back(go_on, outcome)
        else:  # it did not have to wait
            outcomes.append(outcome)

    def _come_back(self, go_on, outcome):
        self._waits_for = _NEXT_TURN if self._unread else None
        self._last_sign_of_life = time.monotonic()
        try:
            go_on(outcome)
        except BaseException as error:
            self._clean_up()
            if isinstance(error, _ENDS_OF_THE_LOOP):
                raise
            self.handle_error()
        self._settle()

    def recv(self, buffer_size):
        """Return what was put aside, or else what the client has sent."""
        if self._unread:
            octets, self._unread = self._unread, b''
            return octets
        if self.producer_fifo and _peek(self.socket) == b'':
            self.close_when_done()  # asyncore's recv() would close at once, and drop the replies
            if None in self.producer_fifo:  # it is not overridden
                raise BlockingIOError
        # asynchat copies the rest after each line, so commands are read in smaller pieces; but
        # what is left of a TLS record (16384) does not wake the loop.
        if buffer_size > 16384 and self.smtp_state == self.COMMAND:
            buffer_size = 16384
        octets = super().recv(buffer_size)
        if self._waits_for is _GOODBYE:
            self._waits_for = None
        return octets

    def readable(self):
        if type(self._waits_for) is list:  # for us, not for the client: it is not idle
            return False
        limit, now = self.idle_timeout_seconds, time.monotonic()
        if limit is not None and now - self._last_sign_of_life >= limit:
            self._end_idleness(limit)
        if self._waits_for is not None and self._waits_for is not _GOODBYE:
            return False
        return not (self.producer_fifo and self._must_send_first()) and super().readable()

    def _must_send_first(self):
        """Whether nothing more is executed until the client reads its replies, or ever."""
        limit = self.unsent_reply_limit
        if limit is not None and len(self.producer_fifo) > _MOST_UNSENT:
            return True
        waiting = tuple(self.producer_fifo)  # another thread may push meanwhile
        return None in waiting or limit is not None and limit < sum(
            len(piece) for piece in waiting if isinstance(piece, bytes))

    def writable(self):
        # A step that waits for something else calls back.
        return type(self._waits_for) is str or super().writable()

    def handle_read(self):
        try:
            super().handle_read()
        finally:
            self._last_sign_of_life = time.monotonic()  # not before: a handler may take its time
        if self.producer_fifo and self.producer_fifo[0] is None:
            self.handle_write()  # asynchat would close at the loop's next turn
        self._settle()

    def handle_write(self):
        if not self.connected and self._fileno is not None:
            self.close()  # nothing can be sent, and writable() would stay true
        had_output, is_unanswered = bool(self.producer_fifo), self._is_unanswered
        super().handle_write()
        self._is_unanswered = is_unanswered  # what was sent were replies to earlier input
        if had_output:
            self._last_sign_of_life = time.monotonic()
        elif self._waits_for is _GOODBYE:
            self.push('421 Error: timeout exceeded')
            self.close_when_done()
            self.initiate_send()
        if (self._waits_for is _NEXT_TURN
                or self._waits_for is _REPLIES_SENT and not self.producer_fifo):
            self._resume()
        self._settle()

    def _end_idleness(self, limit):
        """Mark a session that has been idle for too long: the loop's next turn ends it."""
        # The loop is collecting descriptors: nothing here may raise, or close one.
        self._last_sign_of_life = time.monotonic() - limit + 1  # it has a second
        if self.producer_fifo or self._waits_for is not None:  # it does not even read
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self.socket.shutdown(_socket.SHUT_RDWR)
        else:
            self._waits_for = _GOODBYE

    def _settle(self):
        """To be called when what the channel waits for may have changed."""
        if self._quiet_channels is not None:
            self._quiet_channels.settle(self)

    # ------------------------------------------------------------------
    # asynchat's hooks: input, output, faults, the end
    # ------------------------------------------------------------------

    def get_terminator(self):
        terminator = super().get_terminator()
        if terminator is _START_OF_DATA:
            # The line end of the DATA command, and a dot: this may be an empty message.
            if _EMPTY_MESSAGE.startswith(self.ac_in_buffer[:len(_EMPTY_MESSAGE)]):
                return _EMPTY_MESSAGE
            self.terminator = _END_OF_DATA
        return terminator

    def set_terminator(self, term):
        super().set_terminator(_START_OF_DATA if term == _END_OF_DATA else term)

    def collect_incoming_data(self, data):
        """Keep a piece of the current line or of data (asynchat's hook)."""
        limit = None
        octets = len(data)
        if self.smtp_state == self.COMMAND:
            limit = self.max_command_size_limit if self.num_bytes else self.command_size_limit
        elif self.smtp_state == self.DATA:
            self._ask_for_the_rest(octets)
            if self._collects_messages():
                self._add_to_message(data)
                return
            limit = self.data_size_limit
            octets -= data.count(b'\r\n.')  # RFC 1870 does not count doubled dots
        if limit:
            if self.num_bytes > limit:
                return
            self.num_bytes += octets
        self.received_lines.append(self._decode_piece(data) if self._decode_data else data)

    def _ask_for_the_rest(self, octets):
        """Acknowledge a piece of data without its end at once, where the system can."""
        # Nagle's algorithm may keep the rest of the message waiting for our ACK.
        if (_QUICK_ACK and octets < self.ac_in_buffer_size
                and len(self.ac_in_buffer) < octets + len(_END_OF_DATA)):
            with contextlib.suppress(OSError, AttributeError):
                self.socket.setsockopt(*_QUICK_ACK)

    def _decode_piece(self, octets):
        """Decode a piece, with the beginning of a character that the last piece cut off."""
        last = self.received_lines[-1] if self.received_lines else ''
        cut_off = _UNDECODED.search(last[-3:])[0]
        if cut_off:
            self.received_lines[-1] = last[:-len(cut_off)]
        return (_as_octets(cut_off) + octets).decode('utf-8', 'surrogateescape')

    def found_terminator(self):
        """Execute the collected command, or end the collected data (asynchat's hook)."""
        pieces = self.received_lines
        line = b'' if self.smtp_state == self.DATA else self._emptystring.join(pieces)
        if not isinstance(DEBUGSTREAM, Devnull):
            _debug('Data: %r', self._emptystring.join(pieces))
        self.received_lines = []
        self._is_unanswered = True
        try:
            if self.smtp_state == self.COMMAND:
                octets, self.num_bytes = self.num_bytes, 0
                self._execute_line(line, octets)
            elif self.smtp_state == self.DATA:
                self._end_data(pieces)
            else:
                self.push('451 Internal confusion')
        except BaseException:
            self._clean_up()
            raise
        if self.producer_fifo and self.ac_in_buffer and self._must_send_first():
            self._hold(_REPLIES_SENT)

    def _clean_up(self):
        """After a fault: what the client sends next is a command, at the loop's next turn."""
        if self._is_unanswered and self.smtp_state == self.DATA:
            self._set_post_data_state()
        if self.ac_in_buffer:
            self._hold(_NEXT_TURN)

    def push(self, msg):
        """Send one line of a reply; CRLF is added.  Every reply passes through this method.

        `msg` is text, sent as ASCII with question marks for the rest (as UTF-8 if the
        client asked for SMTPUTF8), or bytes, sent as they are.
        """
        if isinstance(msg, str):
            msg = msg.encode('utf-8' if self.require_SMTPUTF8 else 'ascii', 'replace')
        asynchat.async_chat.push(self, msg + _END_OF_LINE)
        if msg[:1] == b'5' and msg[3:4] != b'-':
            self._count_error()

    def _count_error(self):
        self._errors += 1
        if self.error_limit is not None and self._errors >= self.error_limit:
            self.push('421 Error: too many errors')
            self.close_when_done()

    def initiate_send(self):
        self._is_unanswered = False
        with self._sending:
            super().initiate_send()
        if self.producer_fifo:
            self._settle()

    def _end_fault(self):
        """Reply 451 to a command or message that has no reply yet; otherwise close."""
        if self._is_unanswered and not isinstance(self._waits_for, list):
            try:
                self.push('451 Internal confusion')
                return
            except _ENDS_OF_THE_LOOP:
                raise
            except BaseException:
                _log_exception(self)
        self.handle_close()

    def handle_expt(self):
        """Discard an out-of-band byte: left unread, it would make select() spin."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: TLS has none
            self.socket.recv(1, _socket.MSG_OOB)

    def close_when_done(self):
        """Close after all replies are sent; further input is not executed."""
        super().close_when_done()
        self.ac_in_buffer = self._unread = b''

    def add_channel(self, map=None):
        self._stop_being_quiet()  # __init__() of async_chat may be called again
        super().add_channel(map)

    def del_channel(self, map=None):
        self._stop_being_quiet()
        super().del_channel(map)

    def _stop_being_quiet(self):
        if self._quiet_channels is not None:
            self._quiet_channels.discard(self)

    def _loop_elsewhere(self):
        server = self.smtp_server
        return server._loop_elsewhere() if _is_server(server) else None

    def close(self):
        """Close now: pending input and output are dropped."""
        self._stop_being_quiet()
        super().close()
        self.ac_in_buffer = self._unread = b''

    def _end_in_loop(self):
        relay, self._relay = self._relay, None  # no reference cycle
        if relay is not None:
            relay.end()
        if self._quiet_channels is not None:
            self._quiet_channels.leave_if_idle()

    # ------------------------------------------------------------------
    # A command line
    # ------------------------------------------------------------------

    def _execute_line(self, line, octets):
        """Execute a command line; `octets` is its length, including what was dropped."""
        limit = self.command_size_limit
        if octets > limit and octets > self.max_command_size_limit:
            self.push('500 Error: line too long')
            return
        if self.terminator == b'\n':  # set by a program that also takes bare LF
            line = _as_octets(line).rstrip(b'\r')
        verb, method_name, argument = _parse_command(line)
        if verb is None:
            self.push('500 Error: bad syntax')
            return
        method = getattr(self, method_name, None)
        if self.extended_smtp and method is not None:
            limit = self.command_size_limits[verb]
        if octets > limit:
            self.push('500 Error: line too long')
        elif method is None:
            self.push('500 Error: command "%s" not recognized' % _printable(verb))
        else:
            method(argument)

    @property
    def max_command_size_limit(self):
        """Octets of the longest command line that any verb may have."""
        return max([self.command_size_limit, *self.command_size_limits.values()])

    # ------------------------------------------------------------------
    # The data of a message
    # ------------------------------------------------------------------

    def _collects_messages(self):
        """Whether all hooks are ours: one of the program's may look at the data as they came."""
        return (not self.received_lines  # it goes on as it began
                and getattr(self.found_terminator, '__func__', None) is _FOUND_TERMINATOR
                and getattr(self.collect_incoming_data, '__func__', None) is _COLLECT
                and getattr(self.get_terminator, '__func__', None) is _GET_TERMINATOR
                and self.terminator is _END_OF_DATA  # or a piece may end within CRLF
                and isinstance(DEBUGSTREAM, Devnull))

    def _add_to_message(self, octets):
        """Take a piece of data as it came over the wire; drop it if the message is too large."""
        message = self._message
        if message is None and octets[:1] == b'.':
            octets = octets[1:]
        size, text = _unstuff(octets)
        self.num_bytes += size
        if self.data_size_limit and self.num_bytes > self.data_size_limit:
            self._message = b''
        elif message is None:
            self._message = text
        else:
            if not isinstance(message, io.BytesIO):
                self._message = io.BytesIO()
                self._message.write(message)
            self._message.write(text)

    def _add_pieces(self, pieces):
        """Take collected pieces, which a terminator of the program's may have cut anywhere."""
        pieces.reverse()  # so that each is freed once it is added: there may be many
        rest = b''
        while pieces:
            octets = rest + _as_octets(self._emptystring + pieces.pop())
            end = len(octets) - asynchat.find_prefix_at_end(octets, _END_OF_DATA)
            if end:
                self._add_to_message(octets[:end])
            rest = octets[end:]
        self._add_to_message(rest)

    def _end_data(self, pieces):
        """Handle the message, which our hook has put together, or the program's left in pieces."""
        size, limit = self.num_bytes, self.data_size_limit
        if pieces and not (limit and size > limit):
            self.num_bytes = 0
            self._add_pieces(pieces)
            size = self.num_bytes
        if size:
            size += len(_END_OF_LINE)  # RFC 1870 counts the last one, too
        if limit and size > limit:
            self._set_post_data_state()
            self.push('552 Error: Too much mail data')
        else:
            self._handle_message(self._take_message())

    def _take_message(self):
        message, self._message = self._message or b'', None
        if isinstance(message, io.BytesIO):
            message = message.getvalue()
        return message.decode('utf-8', 'surrogateescape') if self._decode_data else message

    def _handle_message(self, message):
        self.received_data = message
        server = self.smtp_server
        if self._is_relayed():
            self._wait(functools.partial(_advance, self._relay.deliver(message)),
                       self._end_message)
        elif _is_server(server) and server.process_message_threads:
            self._wait(functools.partial(server._own_threads().run, self._handler_call(message)),
                       self._end_message)
        else:
            self._end_message(self._handler_call(message))

    def _handler_call(self, message):
        handler = self.smtp_server.process_message
        keywords = {}
        if not self._decode_data:
            keywords = _accepted_keywords(handler, {'mail_options': self.mail_options,
                                                    'rcpt_options': self.rcpt_options})
        return functools.partial(
            handler, self.peer, self.mailfrom, self.rcpttos, message, **keywords)

    def _end_message(self, outcome):
        """Reply to data with what the handler returned."""
        status = outcome()
        takes_utf8 = self.require_SMTPUTF8
        self._set_post_data_state()
        if self._errors:
            self._errors = 0
        if not status:
            self.push('250 OK')
            return
        lines = _reply_lines(status)
        if not lines:
            self.log_info('process_message() returned %s, which is no reply' % _safe_repr(status),
                          'error')
            lines = ['451 Internal confusion']
        for line in lines:
            if takes_utf8 and isinstance(line, str) and not line.isascii():
                line = line.encode('utf-8', 'replace')
            self.push(line)

    def _is_relayed(self):
        """Whether a proxy's upstream has agreed to the transaction as it stands now."""
        return self._relay is not None and self._relay.knows(self.mailfrom, self.rcpttos)

    def _ask_upstream(self, steps, undo):
        """Let a proxy's upstream reply to a step that we have accepted."""
        self._wait(functools.partial(_advance, steps),
                   functools.partial(self._pass_on_reply, undo))

    def _pass_on_reply(self, undo, outcome):
        """Reply as the upstream did; take the step back if that is a refusal, or fails."""
        is_refused = False
        try:
            reply = outcome()
            is_refused = reply[:1] not in '23'
            if reply[:1] == '5':
                self._errors -= 1  # push() counts it, but the upstream's do not count
            for line in reply.split(NEWLINE):
                self.push(line)
        except BaseException:
            is_refused = is_refused or self._is_unanswered  # what the client was told stands
            raise
        finally:
            if is_refused:
                undo()


class SMTPChannel(_Session):
    """The dialogue with one client (RFC 5321).

    A server calls its `channel_class` with these seven arguments, all positional.
    `conn` is the connected socket, `addr` the client's address as accept() gave it;
    the others are the server's.  Raises ValueError if both `enable_SMTPUTF8` and
    `decode_data` are true.

    For each command line the channel calls smtp_VERB(arg); `arg` is the text after
    the verb, None if there is none.  A subclass may override these methods, and has
    a new command as soon as it has a method for it.  It may override push(), which
    sees every reply, and asynchat's hooks collect_incoming_data() and
    found_terminator().

    Instance variables:

    smtp_server           the server that made the channel
    conn                  the socket of the connection
    addr                  the client's address, as accept() gave it
    peer                  the client's address, as conn.getpeername() gave it
    fqdn                  the server's host name, as socket.getfqdn() gave it
    received_lines        the pieces of the current line, or of a message if the program
                          overrides asynchat's hooks: a list of bytes, or of str with
                          `decode_data`
    num_bytes             octets of the current line or message so far
    smtp_state            COMMAND or, after the DATA command, DATA
    seen_greeting         what the client called itself in HELO or EHLO
    extended_smtp         true after EHLO, false after HELO
    mailfrom              the address in MAIL FROM, or None
    rcpttos               the list of the addresses in RCPT TO
    mail_options          the list of the parameters of MAIL, in upper case
    rcpt_options          the same for RCPT: empty unless a program fills it
    require_SMTPUTF8      true if MAIL had the parameter SMTPUTF8
    received_data         the last message, until the next DATA command
    data_size_limit       octets of a message: the argument; may be changed
    enable_SMTPUTF8       the argument; may be changed

    Class attributes that a subclass may override; None turns off all but the first
    two:

    command_size_limit    octets of a command line without its CRLF, then 500 (512:
                          RFC 5321, 4.5.3.1.4)
    command_size_limits   the same by verb, where EHLO allows more: for MAIL 26 with
                          SIZE (RFC 1870, 3), 10 with SMTPUTF8 (RFC 6531, 3.1)
    idle_timeout_seconds  seconds of silence before 421 (300: RFC 5321, 4.5.3.2.7)
    recipient_limit       recipients of one message, then 452 (1000: Postfix)
    error_limit           5yz replies since the last message, then 421 (100: our own,
                          kinder to test suites than Postfix's 20)
    unsent_reply_limit    octets of replies that wait for the client; while there are
                          more, no command is read (65536: our own)

    Constants:

    COMMAND               smtp_state while commands are read
    DATA                  smtp_state while a message is read
    """
    COMMAND = 0
    DATA = 1

    command_size_limit = 512  # RFC 5321, 4.5.3.1.4
    command_size_limits = collections.defaultdict(_standard_limit)  # by verb; of each channel
    idle_timeout_seconds = 300  # RFC 5321, 4.5.3.2.7
    recipient_limit = 1000  # Postfix: smtpd_recipient_limit
    error_limit = 100  # as Postfix's smtpd_hard_error_limit (20), but kinder to test suites
    unsent_reply_limit = 65536  # our own

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
        self.push('250-%s' % self.fqdn)
        if self.data_size_limit:
            self.push('250-SIZE %s' % self.data_size_limit)
            mail_limit += 26  # RFC 1870, 3 (5)
        if not self._decode_data:
            self.push('250-8BITMIME')
        if self.enable_SMTPUTF8:
            self.push('250-SMTPUTF8')
            mail_limit += 10  # RFC 6531, 3.1 (5)
        self.push('250 HELP')
        limits = self.command_size_limits
        limits['MAIL'] = max(limits.get('MAIL', 0), mail_limit)

    def smtp_MAIL(self, arg):
        """Begin a transaction: check the parameters, set `mailfrom` (RFC 5321, 4.1.1.2)."""
        if not self.seen_greeting:
            self.push('503 Error: send HELO first')
            return
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
        self._set_mail(address, options)
        _debug('sender: %s', address)
        if self._relay is None:
            self.push('250 OK')
        else:
            self._ask_upstream(self._relay.mail(address, options), self._begin_transaction)

    def smtp_RCPT(self, arg):
        """Add an address to `rcpttos` (RFC 5321, 4.1.1.3)."""
        if not self.seen_greeting:
            self.push('503 Error: send HELO first')
            return
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
        _debug('recips: %s', self.rcpttos)
        if self._relay is None:
            self.push('250 OK')
        else:
            self._ask_upstream(self._relay.rcpt(address), functools.partial(
                _remove_last, self.rcpttos, address))

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
        self.received_data = ''  # the last message may be large
        self.smtp_state = self.DATA
        self.set_terminator(_END_OF_DATA)
        if self._is_relayed():
            self._ask_upstream(self._relay.data(), self._set_post_data_state)
        else:
            self.push('354 End data with <CR><LF>.<CR><LF>')

    def smtp_RSET(self, arg):
        """Forget the transaction and the message, but not the greeting (RFC 5321, 4.1.1.5)."""
        if arg:
            self.push('501 Syntax: RSET')
            return
        self._set_rset_state()
        if self._relay is None:
            self.push('250 OK')
        else:
            self._ask_upstream(self._relay.reset(), self._begin_transaction)

    def smtp_NOOP(self, arg):
        """Do nothing (RFC 5321, 4.1.1.9); an argument is refused, as in the standard library."""
        self.push('501 Syntax: NOOP' if arg else '250 OK')

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


# Names that Python 2.5 to 3.2 had: _SMTPChannel__server and so on.
for _old, _new in {'server': 'smtp_server', 'line': 'received_lines', 'state': 'smtp_state',
                   'greeting': 'seen_greeting', 'mailfrom': 'mailfrom', 'rcpttos': 'rcpttos',
                   'data': 'received_data', 'fqdn': 'fqdn', 'peer': 'peer', 'conn': 'conn',
                   'addr': 'addr'}.items():
    setattr(SMTPChannel, '_SMTPChannel__' + _old, _renamed('__' + _old, _new))

# As they are before a program overrides or patches them.
_FOUND_TERMINATOR = SMTPChannel.found_terminator
_COLLECT = SMTPChannel.collect_incoming_data
_GET_TERMINATOR = SMTPChannel.get_terminator

_COMMAND_SYNTAX = {line.split()[0]: line for line in (
    'EHLO hostname', 'HELO hostname', 'MAIL FROM: <address>', 'RCPT TO: <address>', 'DATA',
    'RSET', 'NOOP', 'QUIT', 'VRFY <address>')}


def _is_server(thing):
    return issubclass(type(thing), SMTPServer)  # not by isinstance(), which Mock(spec=...) fools


def _check_modes(enable_SMTPUTF8, decode_data):
    if enable_SMTPUTF8 and decode_data:
        raise ValueError('decode_data and enable_SMTPUTF8 cannot be set to True at the same time')


def _getfqdn():
    try:
        return socket.getfqdn()
    except (OSError, UnicodeError):  # not a valid name
        return 'localhost'


# ---------------------------------------------------------------------------
# Aside: threads for handlers and look-ups, quiet channels outside the map
# ---------------------------------------------------------------------------

def _is_too_much_for_select(descriptor, sockets=()):
    """Whether our loop waits in select(), which cannot take this descriptor or so many sockets."""
    # Only the stack tells: asyncore's poll() and poll2() make the same calls.
    return (descriptor >= _FD_SETSIZE or len(sockets) >= _MOST_SOCKETS) and any(
        frame.f_code is asyncore.poll.__code__
        for frame, _ in traceback.walk_stack(sys._getframe()))


def _check_that_select_takes(descriptor, sockets=()):
    """Raise OSError if our loop waits in select(), and cannot wait for this one, too."""
    if _is_too_much_for_select(descriptor, sockets):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _refuse(connection):
    with contextlib.suppress(OSError):
        connection.send(b'421 Service not available\r\n')
    connection.close()


class _Aside(_Reader):
    """Stands in the socket map for a server while there is something to wait for."""

    def __init__(self, server):
        asyncore.dispatcher.__init__(self, map=server._map)
        self._server = server
        self._process = os.getpid()

    def is_inherited(self):
        """Whether this is a child after fork(): what we have is its parent's."""
        return self._process != os.getpid()

    def _loop_elsewhere(self):
        return self._server._loop_elsewhere()

    def leave_if_idle(self):
        if self._is_idle():
            self.del_channel()
            if not self._server.accepting:
                self.close()

    def close(self):
        loop = self._loop_elsewhere()
        if loop is None:
            super().close()
        else:  # asyncore.close_all() in another thread
            loop.leftovers.add(self)


class _Threads(_Aside):
    """Runs a server's calls, each in a thread; their outcomes come back in the loop's thread.

    A pair of sockets wakes the loop: an octet for each outcome.  It is made when the
    first client comes, and stands in the socket map only while there are calls, so
    that a loop ends when its servers and channels are closed.
    """

    def __init__(self, server):
        super().__init__(server)
        self._waiting = collections.deque()  # (call, resume), for a thread
        self._running = 0
        self._ended = collections.deque()  # (resume, outcome)
        self._waker = None

    def open(self):
        """Make the pair; raises OSError."""
        if self._waker is None:
            self.socket, self._waker = _socket.socketpair()
            try:
                _check_that_select_takes(self.socket.fileno())
            except OSError:
                self.close()
                raise

    def run(self, call, resume):
        """Run call() as soon as a thread may be started, then resume(outcome); raises OSError."""
        self.open()
        self._fileno = self.socket.fileno()
        self.add_channel()  # before the call: it may lead to asyncore.close_all()
        self._waiting.append((call, resume))
        self._start_threads()
        self.leave_if_idle()

    def _start_threads(self):
        while self._waiting and self._running < max(1, self._server.process_message_threads):
            task = self._waiting.popleft()
            try:
                threading.Thread(target=self._serve, args=task, daemon=True).start()
                self._running += 1
            except Exception as error:
                task[1](functools.partial(_throw, error))

    def _serve(self, call, resume):
        try:
            outcome = functools.partial(_give, call())
        except BaseException as error:
            outcome = functools.partial(_throw, error)
        if not self.is_inherited():  # it is if the call has forked, and this is the child
            self._ended.append((resume, outcome))
            with contextlib.suppress(OSError):  # closed meanwhile
                self._waker.send(b'.')

    # In the loop's thread:

    def readable(self):
        if self.is_inherited():
            self.del_channel()
        return not self.is_inherited()

    def handle_read(self):
        if self.is_inherited():  # forked in this turn
            return
        while self._ended:
            self.socket.recv(1)  # does not wait: the thread sends it right after the outcome
            resume, outcome = self._ended.popleft()
            self._running -= 1
            self._start_threads()
            self.leave_if_idle()
            resume(outcome)

    def _is_idle(self):
        return not self._running

    def _end_in_loop(self):
        self._server._threads_for_handlers = None  # no reference cycle
        if self._waker is not None:
            self._waker.close()


class _QuietChannels(_Aside):
    """Stands in the socket map for those channels of a server that only wait for input.

    At every turn asyncore asks every object in the map whether it wants to read
    or write.  Instead of these channels it asks this object alone, whose descriptor
    is that of an epoll set: it is readable while one of the channels is.
    """

    def __init__(self, server):
        super().__init__(server)
        self.channels = {}  # by descriptor
        self._epoll = select.epoll()
        _check_that_select_takes(self._epoll.fileno())
        self._next_look_for_idle = 0.0  # on the monotonic clock

    def settle(self, channel):
        """Take the channel out of the map while it only waits for input; else put it back."""
        descriptor = channel._fileno
        if descriptor is None:  # closed
            return
        reads, writes = channel.readable(), channel.writable()  # the first may end an idle one
        if writes and descriptor < _FD_SETSIZE or not (reads or writes):
            if self.channels.get(descriptor) is channel:
                self._map[descriptor] = channel
                self.discard(channel)
            return
        # A loop in select() could not wait until a larger descriptor is writable.
        event = select.EPOLLOUT if writes else select.EPOLLIN
        # The kernel may take no more, or another thread may be closing it.
        with contextlib.suppress(OSError, KeyError):
            if self._map.get(descriptor) is channel and not self._epoll.closed:
                self._own_epoll().register(descriptor, event)
                self.channels[descriptor] = self._map.pop(descriptor)
                self._fileno = self._epoll.fileno()
                self.add_channel()
            elif descriptor >= _FD_SETSIZE:
                self._own_epoll().modify(descriptor, event)

    def discard(self, channel):
        if self.channels.get(channel._fileno) is channel:
            del self.channels[channel._fileno]
            if self._loop_elsewhere() is None:  # else its next event wakes the loop
                self._unregister(channel._fileno)
                self.leave_if_idle()

    def _unregister(self, descriptor):
        with contextlib.suppress(OSError, ValueError):  # ValueError: the set is closed
            self._own_epoll().unregister(descriptor)

    def _own_epoll(self):
        """The set; in a child after fork() a new one, since the parent still uses the old one."""
        if self.is_inherited():
            with select.epoll() as epoll:  # under the number by which the socket map knows it
                os.dup2(epoll.fileno(), self._epoll.fileno(), inheritable=False)
            self._process = os.getpid()
            for descriptor in self.channels:
                with contextlib.suppress(OSError):  # closed in the child
                    self._epoll.register(descriptor, select.EPOLLIN)
        return self._epoll

    def _is_idle(self):
        return not self.channels

    def _end_in_loop(self):
        self._server._quiet_channels = None  # no reference cycle
        self._epoll.close()

    def readable(self):
        with contextlib.suppress(OSError):  # a child without descriptors: at a later turn
            self._own_epoll()
        now = time.monotonic()
        if now >= self._next_look_for_idle:
            self._next_look_for_idle = now + 1
            for channel in list(self.channels.values()):
                self.settle(channel)
        return bool(self.channels)

    def handle_read(self):
        for descriptor, events in self._own_epoll().poll(0):
            channel = self.channels.get(descriptor)
            if channel is None:
                self._unregister(descriptor)
            else:
                (asyncore.write if events & select.EPOLLOUT else asyncore.read)(channel)
                self.settle(channel)
        self.leave_if_idle()

    def close(self):
        with contextlib.ExitStack() as closing:  # all of them, even if one raises
            closing.callback(super().close)
            for channel in list(self.channels.values()):
                closing.callback(channel.close)


# ---------------------------------------------------------------------------
# The servers
# ---------------------------------------------------------------------------


class SMTPServer(_Reader):
    """Listens, and gives each complete message to process_message().

    `localaddr` is the (host, port) to listen on: an empty host or None stands for
    all IPv4 interfaces, '::' for all IPv6 interfaces, port 0 for any free port,
    which `socket.getsockname()` then returns.  `remoteaddr` is the (host, port) of an
    upstream server, for subclasses that relay; they find it in `_remoteaddr`.
    `data_size_limit` is the largest size of a message in octets, counted as in
    RFC 1870; None or 0 for no limit.  `map` is the socket map, asyncore's own if
    there is none.  `enable_SMTPUTF8` offers RFC 6531.  With `decode_data`, handlers
    get str instead of bytes, decoded from UTF-8; octets that are not UTF-8 become
    surrogate escapes, and 8BITMIME is not offered.

    Raises ValueError if both `enable_SMTPUTF8` and `decode_data` are true, and
    OSError if the address cannot be bound.

    Class attributes that a subclass may override:

    channel_class            the class of the channels (SMTPChannel)
    process_message_threads  how many threads process_message() may run in, so that
                             only its own session waits for it; 0: it runs in the
                             loop, and all sessions wait (0: as in the standard
                             library)
    channels_in_selector     true: where there is epoll, idle channels share one place
                             in the socket map, and thousands cost next to nothing;
                             not those that override readable(), writable() or a
                             handle_*_event() method (false, but true under
                             `python -m smtpd`)
    listen_backlog           connections that may wait to be accepted (1024: our own;
                             the system may cap it)
    accepts_per_event        connections accepted in one turn of the loop (100: our
                             own); one if the program has set the socket or overrides
                             accept()
    data_size_limit          octets of a message, then 552: the argument (33554432, as
                             in the standard library); may be changed
    enable_SMTPUTF8          the argument; may be changed
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
    _loop_thread = None  # a weak reference to the _LoopThread that asked us last
    _is_opening = False  # the socket exists, but does not listen yet
    _own_listener = None  # the socket, if we have made it ...
    _process = None  # ... in this process
    _complains_again_at = 0.0  # on the monotonic clock
    _threads_for_handlers = None
    _quiet_channels = None

    def __init__(self, localaddr, remoteaddr, data_size_limit=DATA_SIZE_DEFAULT,
                 map=None, enable_SMTPUTF8=False, decode_data=False):
        _check_modes(enable_SMTPUTF8, decode_data)
        asyncore.dispatcher.__init__(self, map=map)
        _this_thread.loop.close_leftovers()  # if the loop has ended, it will not
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
        self._is_opening = True
        self.create_socket(family, socket.SOCK_STREAM)
        self.set_reuse_addr()
        self.bind((host or '', port))
        self.listen(self.listen_backlog)
        self._is_opening = False
        self._own_listener, self._process = self.socket, os.getpid()
        self.add_channel()

    def add_channel(self, map=None):
        # Another thread's loop in poll() would close a socket that does not listen yet.
        if not self._is_opening:
            super().add_channel(map)

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
        second list is empty.  More keys may follow: take `**kwargs`.  A handler
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
        last, self._loop_thread = self._loop_thread, weakref.ref(_this_thread.loop)
        # If another thread has just closed this, it left the socket to us only if it knew of us.
        is_ours = self._fileno is not None or last is self._loop_thread
        return super().readable() and is_ours

    def accept(self):
        """asyncore's accept(); also returns None if the connection cannot be served now."""
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
                and self._quiet_channels_for(self.channel_class) is None):
            _refuse(pair[0])
            return None
        if self.process_message_threads:
            with contextlib.suppress(OSError):
                self._own_threads().open()  # while there are descriptors
        return pair

    def _wait_for_resources(self, error):
        """Pause for a moment; the sessions go on between two pauses."""
        # The connection stays in the backlog, where it keeps the loop from waiting.
        now = time.monotonic()
        if now >= self._complains_again_at:
            self._complains_again_at = now + 60
            self.log_info('no resources to accept a connection: %s' % error, 'error')
        time.sleep(0.01)

    def handle_accept(self):
        """Accept the waiting connections."""
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
        """Whether accept() returns None when none waits: a program's may block, or never do so."""
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
        descriptor, quiet = connection.fileno(), self._quiet_channels
        channel = self._map.get(descriptor) or quiet and quiet.channels.get(descriptor)
        with contextlib.closing(connection):
            if channel:
                try:
                    channel.close()
                finally:  # a program's close() may raise, or leave it in the map
                    channel.del_channel()

    def _end_in_loop(self):
        for each in self._threads_for_handlers, self._quiet_channels:
            if each is not None:
                each.leave_if_idle()

    def _loop_elsewhere(self):
        loop = self._loop_thread and self._loop_thread()
        return loop if loop and loop.ident != threading.get_ident() else None

    def _shares_socket(self):
        return self.socket is not self._own_listener or self._process != os.getpid()

    # ------------------------------------------------------------------
    # For the channels
    # ------------------------------------------------------------------

    # May take seconds: once per server.
    _own_name = functools.cached_property(lambda self: _getfqdn())

    def _own_threads(self):
        if self._threads_for_handlers is None or self._threads_for_handlers.is_inherited():
            self._threads_for_handlers = _Threads(self)
        return self._threads_for_handlers

    def _quiet_channels_for(self, channel_class):
        """What keeps channels that only wait for input; None if the socket map does."""
        if not (self.channels_in_selector and hasattr(select, 'epoll')  # Linux; kqueue is untried
                and _leaves_events_alone(channel_class)):
            return None
        if self._quiet_channels is None:
            with contextlib.suppress(OSError):
                self._quiet_channels = _QuietChannels(self)
        return self._quiet_channels

    def _relay_for(self, channel):
        """What takes a channel's steps upstream; a proxy overrides this."""
        return None


def _positional_arguments(channel_class):
    """The number of arguments a channel class takes, None for any number; old ones take three."""
    code = getattr(getattr(channel_class, '__init__', None), '__code__', None)
    if code is None or code.co_flags & _TAKES_ARGS:
        return None
    return code.co_argcount - 1


def _leaves_events_alone(channel_class):
    return all(getattr(channel_class, name, None) is getattr(SMTPChannel, name)
               for name in ('readable', 'writable', 'handle_read_event',
                            'handle_write_event', 'handle_expt_event'))


class DebuggingServer(SMTPServer):
    """Prints each message to standard output, and discards it.

    The arguments are SMTPServer's.  Lines of bytes are printed as Python writes them:
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
            sys.stdout.flush()  # or a pipe or a container's log would show it later

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

_NOT_AVAILABLE = b'Upstream not available'
_REPLY_LINE = re.compile(rb'([2-5][0-9][0-9])(?:([ -])|$)(.*)', re.DOTALL)
_MOST_OF_A_REPLY = 65536  # octets; no real reply is as long
_MOST_DELIVERIES = 1000  # messages to remember ...
_DELIVERY_SECONDS = 5 * 86400  # ... for as long as Postfix tries again (maximal_queue_lifetime)
_EXTENSIONS = {'SIZE': b'SIZE', 'BODY': b'8BITMIME'}  # which offer the parameter


class PureProxy(SMTPServer):
    """Relays each step of a session to `remoteaddr`, and the replies to the client.

    The arguments are SMTPServer's, but `enable_SMTPUTF8` raises ValueError.  On an
    address that strangers can reach, this is an open relay.

    MAIL, RCPT, DATA and the message go to the upstream when the client sends them,
    in one upstream session for each client's session.  The client gets 451 if the
    upstream cannot be reached, breaks off, or sends something that is not a reply.

    A program that overrides process_message() or _deliver() gets each message as a
    whole instead.  process_message() adds the X-Peer header and calls
    _deliver(mailfrom, rcpttos, data), which sends the message to the upstream and
    returns {recipient: (code, text)} of those that were refused.

    Class attributes that a subclass may override, besides SMTPServer's; the time
    limits are in seconds, and the loop looks at them at each of its turns:

    upstream_timeout_seconds          to connect; the host's addresses share it (60: our
                                      own)
    upstream_command_timeout_seconds  for the greeting and the replies to EHLO, MAIL,
                                      RCPT and RSET (300: RFC 5321, 4.5.3.2.1)
    upstream_data_timeout_seconds     for the reply to DATA (120: RFC 5321, 4.5.3.2.4)
    upstream_block_timeout_seconds    to take more of a message (180: RFC 5321,
                                      4.5.3.2.5)
    upstream_final_timeout_seconds    for the reply, once it has taken all (600:
                                      RFC 5321, 4.5.3.2.6)
    upstream_connection_limit         connections to one upstream, then 451 (200: our
                                      own); None for no limit
    """

    upstream_timeout_seconds = 60  # an unreachable host should not take minutes
    upstream_command_timeout_seconds = 300
    upstream_data_timeout_seconds = 120
    upstream_block_timeout_seconds = 180
    upstream_final_timeout_seconds = 600
    upstream_connection_limit = 200  # a circle of proxies ends before descriptors do (1024)

    _deliveries = functools.cached_property(lambda self: _Deliveries())

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.enable_SMTPUTF8:
            self.close()
            raise ValueError('%s does not support SMTPUTF8.' % self.__class__.__name__)
        for name in _MODULES_OF_PROXIES:
            importlib.import_module(name)

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        octets = _lf_lines(_as_octets(data))
        message = _digest(mailfrom, octets)
        left = self._deliveries.left(message, rcpttos)
        octets = _with_peer_header(octets, peer)
        traced = octets.decode('utf-8', 'surrogateescape') if isinstance(data, str) else octets
        refused = (self._deliver(mailfrom, left, traced) if left else None) or {}
        refused = {each: (code, text) if 400 <= code < 600 else (451, _NOT_AVAILABLE)
                   for each, (code, text) in refused.items()}
        reply = self._deliveries.note(message, rcpttos, refused)
        return _reply_text(reply) if refused else None

    def _deliver(self, mailfrom, rcpttos, data):
        """Send a message upstream; return {recipient: (code, text)} of those refused."""
        sockets = {}
        session = self._new_upstream_session(sockets)
        try:
            return _run(_deliver_whole(session, mailfrom, rcpttos, _on_the_wire(data)), sockets)
        finally:
            session.quit()

    def _new_upstream_session(self, sockets):
        return _UpstreamSession(self, self._remoteaddr, sockets)

    def _relay_for(self, channel):
        """The relay of this channel; None if a class, a patch or the proxy overrides a handler."""
        handlers = self.process_message, self._deliver
        if tuple(getattr(each, '__func__', None) for each in handlers) == _HANDLERS_OF_OURS:
            return channel._relay or _Relay(self, channel)
        if channel._relay is not None:  # overridden since the last message
            channel._relay.end()
        return None


class MailmanProxy(PureProxy):
    """A PureProxy that gives mail for Mailman 3's lists to Mailman.

    The arguments are PureProxy's.

    Mailman's LMTP server is asked about each recipient; `remoteaddr` is asked about
    what Mailman does not know.  While Mailman cannot be reached each recipient gets
    451, since nothing shows which are lists.  If a message has reached some of its
    recipients and not others, the client gets 451, and its next try goes to the
    others only.

    Class attribute that a subclass may override, besides PureProxy's:

    mailman_lmtp_address  host and port (('localhost', 8024): Mailman's default)
    """

    mailman_lmtp_address = ('localhost', 8024)  # Mailman's default

    def _new_upstream_session(self, sockets):
        return _MailmanSession(
            _UpstreamSession(self, self.mailman_lmtp_address, sockets, ['LHLO']),
            super()._new_upstream_session(sockets))


_HANDLERS_OF_OURS = PureProxy.process_message, PureProxy._deliver  # before a program patches them


def _run(steps, sockets):
    """Run a generator to its end in a socket map of its own; return its result."""
    outcomes = []
    _advance(steps, outcomes.append)
    while not outcomes:
        asyncore.loop(timeout=1, use_poll=True, map=sockets, count=1)
    return outcomes[0]()


def _deliver_whole(session, mailfrom, rcpttos, message):
    """Send a message to all who are taken; return {recipient: (code, text)} of those refused."""
    session.begin(mailfrom, [])
    replies = {}
    for each in dict.fromkeys(rcpttos):
        replies[each] = yield from session.rcpt(each)
    accepted = [each for each, reply in replies.items() if _is_success(reply)]
    replies.update((yield from session.deliver(message, accepted)))
    return {each: reply for each, reply in replies.items() if not _is_success(reply)}


class _Relay:
    """Takes the steps of one client's session to the upstream.

    mail(), rcpt(), data(), deliver() and reset() are generators that return the reply
    to the client.
    """

    def __init__(self, proxy, channel):
        self._proxy = proxy
        self._channel = channel
        self._session = proxy._new_upstream_session(proxy._map)
        self._client_has_gone = False

    def knows(self, mailfrom, rcpttos):
        """False if the program has changed the transaction since the upstream saw it."""
        return mailfrom == self._mailfrom and rcpttos == self._rcpttos

    def mail(self, mailfrom, options):
        self._mailfrom, self._rcpttos = mailfrom, []  # what the upstream has agreed to
        self._session.begin(mailfrom, options)
        return self._take(self._session.mail())

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
        self._client_has_gone = True
        if self not in self._proxy._deliveries.under_way:
            self._session.quit()

    def is_given_up(self):
        """Whether the client does not wait for the reply to the message that is on its way."""
        self._client_has_gone = self._client_has_gone or _peek(self._channel.socket) == b''
        return self._client_has_gone

    def _take(self, steps):
        try:
            return _reply_text((yield from steps))
        finally:
            if self._client_has_gone or not self._channel.connected:
                self._session.quit()

    def _deliver(self, octets):
        deliveries, message = self._proxy._deliveries, _digest(self._mailfrom, octets)
        if any(other.is_given_up() for other, its in deliveries.under_way.items()
               if its == message):
            return 451, _NOT_AVAILABLE
        octets = _on_the_wire(_with_peer_header(octets, self._channel.peer))
        deliveries.under_way[self] = message
        try:
            replies = yield from self._session.deliver(
                octets, deliveries.left(message, self._rcpttos))
            return deliveries.note(message, self._rcpttos, replies, self._client_has_gone)
        finally:
            del deliveries.under_way[self]


class _Deliveries:
    """Who has which message: the client sends it again if some have not got it."""

    def __init__(self):
        self.under_way = {}  # message by relay
        self._delivered = collections.OrderedDict()  # (recipients, when) by message

    def left(self, message, rcpttos):
        """The recipients that have not got the message yet."""
        recipients, noted = self._delivered.get(message, ((), float('inf')))
        if time.monotonic() - noted > _DELIVERY_SECONDS:
            self._delivered.pop(message, None)
            return rcpttos
        return [each for each in rcpttos if each not in recipients]

    def note(self, message, rcpttos, replies, client_will_retry=False):
        """All but those refused have the message now; return one reply for all."""
        refused = {each: said for each, said in replies.items() if not _is_success(said)}
        reply = _reply_for_all(replies, refused, len(set(rcpttos)))
        recipients, _ = self._delivered.pop(message, (frozenset(), 0))
        if client_will_retry or reply[0] == 451:
            recipients = recipients.union(rcpttos).difference(refused)
        else:  # the next one that looks like it is another message
            recipients = recipients.difference(rcpttos)
        if recipients:
            self._delivered[message] = recipients, time.monotonic()
        if len(self._delivered) > _MOST_DELIVERIES:
            self._delivered.popitem(last=False)
        return reply


def _digest(mailfrom, octets):
    import hashlib
    return mailfrom, hashlib.sha256(octets).digest()


class _MailmanSession:
    """A client's session with Mailman and, for what Mailman does not know, with the upstream.

    The methods are _UpstreamSession's.
    """

    def __init__(self, mailman, upstream):
        self._mailman = mailman
        self._upstream = upstream

    def begin(self, mailfrom, options):
        self._mailman.begin(mailfrom, options)
        self._upstream.begin(mailfrom, options)

    def mail(self):
        yield from ()  # RCPT shows who must be asked: mail for lists alone needs no upstream
        return 250, b'OK'

    def rcpt(self, recipient):
        reply = yield from self._mailman.rcpt(recipient.lower())  # posted once in any spelling
        return (yield from self._upstream.rcpt(recipient)) if reply[0] >= 500 else reply

    def data(self):
        yield from ()  # the upstream is asked when the message is there, if it gets it
        return 354, b'End data with <CR><LF>.<CR><LF>'

    def deliver(self, message, recipients):
        lists = self._mailman.accepted
        replies = yield from self._upstream.deliver(
            message, [each for each in recipients if each.lower() not in lists])
        for reply in replies.values():
            if not _is_success(reply):
                return dict.fromkeys(recipients, reply)
        # One transaction for each list: to some faults Mailman gives one reply for all its
        # recipients, and not one for each (RFC 2033, 4.2): the others would never come.
        for each in dict.fromkeys(map(str.lower, recipients)):
            if each in lists:
                replies.update((yield from self._mailman.deliver(message, [each])))
        return {each: replies.get(each) or replies[each.lower()] for each in recipients}

    def reset(self):
        yield from self._mailman.reset()
        return (yield from self._upstream.reset())

    def quit(self):
        self._mailman.quit()
        self._upstream.quit()


class _UpstreamSession:
    """One client's session with one upstream, on one connection after another.

    After begin() each step is a generator that returns the reply, (code, text): 451 if
    the upstream is lost, from there on until the next begin().
    """

    def __init__(self, proxy, address, sockets, hellos=('EHLO', 'HELO')):
        self.proxy = proxy
        self.address = address
        self.sockets = sockets
        self.hellos = hellos
        self._upstream = _Upstream(self)  # not connected yet

    def begin(self, mailfrom, options):
        """Begin a transaction; the upstream hears of it at the next step."""
        self._mail = mailfrom, options
        self._reply_to_mail = None
        self.accepted = {}  # replies by recipient

    def mail(self):
        self._reply_to_mail = yield from self._guarded(self._begin())
        return self._reply_to_mail

    def rcpt(self, recipient):
        if self._upstream.connected and recipient in self.accepted:  # it gets the message once
            return self.accepted[recipient]
        reply = self._reply_to_mail or (yield from self.mail())
        if _is_success(reply):
            reply = yield from self._ask('RCPT TO:' + _in_brackets(recipient))
            if _is_success(reply):
                self.accepted[recipient] = reply
        return reply

    def data(self):
        return self._ask('DATA', self.proxy.upstream_data_timeout_seconds, [354])

    def deliver(self, message, recipients):
        """Send the message to those recipients; {recipient: reply}, the same for all."""
        if not recipients:
            return {}
        reply = yield from self._prepare(recipients)
        if self._upstream.is_in_data:
            reply = yield from self._guarded(self._upstream.send_message(message))
        return dict.fromkeys(recipients, reply)

    def _prepare(self, recipients):
        # It may have closed while the client sent its data, and may have more recipients
        # than are left: as nothing has been sent yet, another transaction does no harm.
        upstream = self._upstream
        if upstream.talks_unasked() or self.accepted.keys() != set(recipients):
            self.begin(*self._mail)
            for each in recipients:
                reply = yield from self.rcpt(each)
                if not _is_success(reply):
                    return 451, reply[1]
        return None if self._upstream.is_in_data else (yield from self.data())

    def reset(self):
        """Let the upstream forget the transaction; a refused message need not have ended it."""
        if self._upstream.connected and self._upstream.has_transaction:
            # In the middle of a message a command would be a part of it.
            if self._upstream.is_in_data or not _is_success((yield from self._ask('RSET'))):
                self._upstream.close()
            self._upstream.has_transaction = False
        return 250, b'OK'

    def quit(self):
        """Send QUIT; a message under way gets no final dot, and so does not count."""
        self._upstream.quit()

    def _ask(self, *command):
        return self._guarded(self._upstream.ask(*command))

    def _guarded(self, steps):
        try:
            return (yield from steps)
        except BaseException as error:
            self._upstream.close()  # a reply may be left unread
            if not isinstance(error, (OSError, UnicodeError)):  # UnicodeError: not a host name
                raise
            self.proxy.log_info(
                '%s:%s: mail from %s: %s' % (*self.address, self._mail[0], error), 'error')
            return 451, _NOT_AVAILABLE

    def _begin(self):
        if self._upstream.connected:
            with contextlib.suppress(OSError):
                reply = yield from self._ask_mail()
                if self._upstream.connected:
                    return reply
            self._upstream.close()
        yield from self._connect()
        return (yield from self._ask_mail())

    def _connect(self):
        """Connect to one of the upstream's addresses."""
        look_up = functools.partial(socket.getaddrinfo, *self.address, type=socket.SOCK_STREAM)
        if self.sockets is self.proxy._map:
            addresses = (yield functools.partial(self.proxy._own_threads().run, look_up))()
        else:  # in _run(), which has nothing else to do
            addresses = look_up()
        limit = self.proxy.upstream_connection_limit
        others = [each for each in list(self.sockets.values())
                  if isinstance(each, _Upstream) and each.session.address == self.address]
        if limit is not None and len(others) >= limit:
            raise ConnectionError('%d connections already' % len(others))
        seconds = self.proxy.upstream_timeout_seconds / len(addresses)
        for number, (family, _, _, _, address) in enumerate(addresses, 1):
            self._upstream = _Upstream(self)
            try:
                return (yield from self._upstream.open(family, address, seconds))
            except OSError:
                self._upstream.close()
                if number == len(addresses):
                    raise

    def _ask_mail(self):
        yield from self.reset()
        mailfrom, options = self._mail
        if not any(each.startswith('BODY=') for each in options):
            options = [*options, 'BODY=8BITMIME']  # the data may be 8-bit: it is still to come
        parameters = [' ' + each for each in options
                      if _EXTENSIONS.get(each.partition('=')[0]) in self._upstream.extensions]
        reply = yield from self._upstream.ask(
            'MAIL FROM:%s%s' % (_in_brackets(mailfrom), ''.join(parameters)))
        self._upstream.has_transaction = _is_success(reply)
        return reply


class _Upstream(_Common, asynchat.async_chat):
    """A connection to an SMTP or LMTP server, in the loop.

    Not smtplib's: that blocks, waits for ever for a reply that never ends, takes a
    reply to nothing for the next command's, changes paths, and leaves a bare
    CR in a message, after which a dot could end it.

    open(), ask() and send_message() are generators that raise OSError if the server is
    lost: nothing that it may still say counts.  ask() and send_message() return the
    reply, (code, text).
    """

    ac_in_buffer_size = 4096  # replies are short
    terminator = b'\n'
    has_transaction = False
    is_in_data = False  # it waits for a message, or the rest of it

    _on_reply = None  # continues the step that waits for a reply
    _deadline = float('inf')  # of that wait, on the monotonic clock
    _line = b''  # that is being read ...
    _text = b''  # ... of a reply of several lines

    handle_expt = SMTPChannel.handle_expt

    def __init__(self, session):
        asynchat.async_chat.__init__(self, map=session.sockets)
        self.session = session
        self._process = os.getpid()

    def open(self, family, address, seconds):
        """Connect, and say hello."""
        self.create_socket(family)
        _check_that_select_takes(self.socket.fileno(), self._map)
        self.socket.setsockopt(*_NO_DELAY)
        self.connect(address)
        reply = (yield functools.partial(self._wait_for_reply, seconds))()
        for verb in self.session.hellos if _is_success(reply) else ():
            reply = yield from self.ask('%s %s' % (verb, self.session.proxy._own_name))
            if _is_success(reply):
                self.extensions = re.findall(rb'\n(\S+)', reply[1].upper())
                return
        raise ConnectionError(_reply_text(reply))

    def ask(self, line, seconds=None, good=range(200, 300)):
        """Send a command; return the reply, a good one or a refusal."""
        if '\r' in line or '\n' in line:
            raise ValueError('a line end in %r' % line)
        return self._exchange(
            _as_octets(line) + _END_OF_LINE,
            seconds or self.session.proxy.upstream_command_timeout_seconds, good)

    def send_message(self, message):
        """Send the message, after DATA; return the reply to it."""
        try:
            reply = yield from self._exchange(
                memoryview(message), self.session.proxy.upstream_block_timeout_seconds)
        except OSError as error:
            if self.producer_fifo:
                raise
            raise ConnectionError('lost after the final dot: the message may have been delivered, '
                                'and will be once more: %s' % error) from error  # RFC 1047
        self.has_transaction = not _is_success(reply)
        return reply

    def _exchange(self, octets, seconds, good=range(200, 300)):
        self.producer_fifo.append(octets)  # asynchat sends at most 64 KB at once
        if self.talks_unasked():
            raise ConnectionError('talks unasked, or has closed')
        code, text = (yield functools.partial(self._wait_for_reply, seconds))()
        if code < 400 and (code not in good or self.producer_fifo) or code == 503:
            # 503: the order of commands is ours.
            raise ConnectionError('out of step: ' + _reply_text((code, text)))
        if code == 421 or self.producer_fifo:  # it would take the rest for commands
            self.close()
        self.is_in_data = code == 354
        return 451 if code == 421 else code, text

    def talks_unasked(self):
        """Whether it has said something between two steps, or closed; we have not read it yet."""
        return not self.connected or self.ac_in_buffer or _peek(self.socket) is not None

    def quit(self):
        is_ours = self._process == os.getpid()  # in a child after fork(), it is the parent's
        if is_ours and self._on_reply is None and not self.is_in_data:
            self.push(b'QUIT\r\n')  # Postfix does not wait for the reply either
        self.close()

    def close(self):
        """Cut the connection; a step that waits is given up."""
        self._on_reply = None
        super().close()

    def _wait_for_reply(self, seconds, resume):
        self._deadline = time.monotonic() + seconds
        self._on_reply = resume
        self.initiate_send()

    # Events

    def readable(self):
        if self._on_reply is not None and time.monotonic() > self._deadline:
            # The loop is collecting descriptors: none may be closed before its next event.
            with contextlib.suppress(OSError):
                self.socket.shutdown(_socket.SHUT_RDWR)
        return True

    def initiate_send(self):
        super().initiate_send()
        if self.is_in_data:
            self._deadline = time.monotonic() + (
                self.session.proxy.upstream_block_timeout_seconds if self.producer_fifo
                else self.session.proxy.upstream_final_timeout_seconds)

    def handle_connect(self):
        self._deadline = time.monotonic() + self.session.proxy.upstream_command_timeout_seconds

    def collect_incoming_data(self, data):
        self._line += data
        if self._on_reply is None or len(self._line) + len(self._text) > _MOST_OF_A_REPLY:
            raise ConnectionError('talks unasked, or without an end')

    def found_terminator(self):
        line, self._line = self._line.rstrip(b'\r'), b''
        match = _REPLY_LINE.fullmatch(line)
        if not match:
            raise ConnectionError('no reply: %r' % line[:100])
        code, mark, text = match.groups()
        self._text += text + b'\n'
        if mark != b'-':
            reply, self._text = (int(code), self._text[:-1]), b''
            resume, self._on_reply = self._on_reply, None
            resume(functools.partial(_give, reply))

    def handle_close(self):
        if self.connected:  # sending failed, but its last reply may still be there to read
            self.connected = False
            self.handle_read()
        self._end(ConnectionError('timed out' if time.monotonic() > self._deadline
                                  else 'closed the connection'))

    def handle_error(self):
        self._end(sys.exc_info()[1])

    def _end(self, error):
        resume = self._on_reply
        self.close()
        if resume is not None:
            resume(functools.partial(_throw, error))


def _on_the_wire(data):
    """A message with CRLF, its dots doubled (RFC 5321, 4.5.2), and its end."""
    lines = _lf_lines(_as_octets(data)).replace(b'\n.', b'\n..').replace(b'\n', b'\r\n')
    return b''.join((b'.' if lines[:1] == b'.' else b'', lines,
                     b'.\r\n' if lines[-1:] == b'\n' else _END_OF_DATA))


def _is_success(reply):
    return reply[0] < 300  # RFC 5321, 4.3.2: the first digit tells, and none is below 2


def _reply_for_all(replies, refused, recipients):
    """One reply for so many recipients; those who are not refused have the message."""
    if not refused or len(refused) == recipients and len(set(replies.values())) == 1:
        return next(iter(replies.values()), (250, b'OK'))
    for code, text in refused.values():
        if code < 500:
            return 451, text
    return code, b'\n'.join(  # the sender must know who was refused
        b'%.180s (%s)' % (b' '.join(_as_octets(text).split()), _as_octets(each))
        for each, (_, text) in refused.items())


@functools.lru_cache(maxsize=64)
def _reply_text(reply):
    """(code, text) as the lines that the client gets."""
    code, text = reply
    lines = _as_octets(text).decode('ascii', 'replace').split('\n')
    return NEWLINE.join(_reply_lines(NEWLINE.join(  # RFC 5321, 4.5.3.1.5: 512 octets with CRLF
        '%d %s' % (code, _printable(line.strip()[:506])) for line in lines)))


def _in_brackets(path):
    return path if path == '<>' else '<%s>' % path


def _as_octets(data):
    return data.encode('utf-8', 'surrogateescape') if isinstance(data, str) else data


def _lf_lines(octets):
    return _lf_for_crlf(octets).replace(b'\r', b'\n')


def _with_peer_header(octets, peer):
    """The message with X-Peer after its headers."""
    end = 0
    if octets[:1] != b'\n':
        end = octets.find(b'\n\n') + 1 or len(octets)
    is_line = octets[end - 1:end] in (b'', b'\n')  # the last header, as nearly always
    header = b'X-Peer: %s\n' % ascii(_host_of(peer))[1:-1].encode()
    # The data has no LF at its end, and _deliver() takes one for it.
    last = b'\n' if octets[-1:] == b'\n' else b''
    # Joined, since the message may be large.
    return b''.join((octets[:end], b'' if is_line else b'\n', header,
                     memoryview(octets)[end:], last))


# ---------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------

_BUILT_IN_CLASSES = COMMASPACE.join(__all__[2:])

_USAGE = """\
An RFC 5321 smtp proxy with optional RFC 1870 and RFC 6531 extensions.

Usage: %(program)s [options] [localhost:localport [remotehost:remoteport]]

    -n, --nosetuid    do not switch to user nobody; without this, root must
                      start the server, which switches once it listens
    -c, --class NAME  the server class: package.module.Class, or one of
                      %(classes)s;
                      PureProxy if not given
    -s, --size LIMIT  the most octets that a message may have; 0: no limit;
                      %(size)d if not given
    -u, --smtputf8    offer the SMTPUTF8 extension (RFC 6531); not for proxies
    -d, --debug       print each dialogue to standard error
    -V, --version     print the version that the banner shows and exit
    -h, --help        print this and exit

Listens on localhost:8025 and relays to localhost:25 unless told otherwise.
An IPv6 address stands in brackets: [::1]:8025.  Without a host (:8025) it
listens on all interfaces (IPv4).

Version: %(version)s
"""


class Options:
    """What parseargs() has read from the command line.

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
    """Print the message, or the usage if it is empty, and exit with `code`.

    The text goes to standard output if `code` is 0, else to standard error.
    """
    print(msg or _USAGE % {'program': program, 'version': __version__,
                           'classes': _BUILT_IN_CLASSES, 'size': DATA_SIZE_DEFAULT},
          file=sys.stderr if code else sys.stdout)
    sys.exit(code)


def _give_up(form, *values):
    """Exit with status 1 and one line that says what is wrong."""
    usage(1, 'smtpd: ' + form % values)


def _refuse_argument(form, *values):
    """The same, for arguments that --help explains."""
    _give_up(form + '; try --help', *values)


def parseargs():
    """Read sys.argv; return `Options`.  Exits with status 1 if an argument is wrong."""
    global DEBUGSTREAM
    try:
        given, arguments = getopt.getopt(
            sys.argv[1:], 'nVhc:s:du',
            ['class=', 'nosetuid', 'version', 'help', 'size=', 'debug', 'smtputf8'])
    except getopt.error as error:
        _refuse_argument('%s', error)
    options = Options()
    for name, value in given:
        if name in ('-h', '--help'):
            usage(0)
        elif name in ('-V', '--version'):
            usage(0, __version__)
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
                _refuse_argument('%s %s: want a number of octets, digits only', name, value)
    if len(arguments) > 2:
        _refuse_argument('%s: want two addresses at most', ' '.join(arguments))
    local, remote = (arguments + ['localhost:8025', 'localhost:25'][len(arguments):])
    options.localhost, options.localport = _parse_address(local)
    options.remotehost, options.remoteport = _parse_address(remote)
    return options


def _parse_address(text):
    host, colon, port = text.rpartition(':')
    if not colon:
        _refuse_argument('%s: want HOST:PORT', text)
    if host[:1] == '[' and host[-1:] == ']':
        host = host[1:-1]
    number = _natural_number(port)
    if number is None or number > 65535:
        _refuse_argument('%s: want a port from 0 to 65535', text)
    return host, number


def _natural_number(text):
    return int(text) if re.fullmatch('[0-9]{1,20}', text) else None


def _find_class(name):
    """The server class of that name: one of this module, or package.module.Class."""
    module_name, dot, class_name = name.rpartition('.')
    try:
        module = importlib.import_module(module_name) if dot else sys.modules[__name__]
    except (ImportError, TypeError, ValueError) as error:  # the last two: '.Class', '..'
        _refuse_class(name, error)
    found = getattr(module, class_name, None)
    if found is None:
        _refuse_class(name, 'no such class')
    if not isinstance(found, type) or issubclass(found, asynchat.async_chat):
        _refuse_class(name, 'not a server class')
    return found


def _refuse_class(name, reason):
    _refuse_argument(
        '%s: %s; want %s or package.module.Class', name, reason, _BUILT_IN_CLASSES)


def _become_nobody():
    try:
        import pwd
        nobody = pwd.getpwnam('nobody')
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
    except ImportError:  # Windows
        _give_up('no user nobody on this system: want option -n')
    except (KeyError, PermissionError):
        _give_up('cannot switch to user nobody: want root, or option -n')


def _make_server(options):
    server_class = _find_class(options.classname)
    limit = DATA_SIZE_DEFAULT if options.size_limit is None else options.size_limit
    try:
        return server_class((options.localhost, options.localport),
                            (options.remotehost, options.remoteport),
                            limit, enable_SMTPUTF8=options.enable_SMTPUTF8)
    except (OSError, UnicodeError) as error:  # UnicodeError: the host is not a name
        _give_up('%s:%s: %s', options.localhost, options.localport,
                 getattr(error, 'strerror', None) or error)
    except ValueError as error:
        _give_up('%s', str(error).rstrip('.'))
    except TypeError as error:  # the class takes other arguments
        _refuse_class(options.classname, 'not a server class: %s' % error)


def _main():
    options = parseargs()
    try:
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
        asyncore.close_all()


if __name__ == '__main__':
    sys.modules['smtpd'] = sys.modules['__main__']  # for what -c imports: one module, not two
    _main()
