"""An SMTP server: the smtpd module of Python's standard library, alive again.

    import asyncore, smtpd

    class Inbox(smtpd.SMTPServer):
        def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
            print(mailfrom, '->', rcpttos, len(data), 'octets')

    inbox = Inbox(('localhost', 8025), None)
    asyncore.loop()

`SMTPServer` listens and gives each complete message to process_message();
`SMTPChannel` holds the dialogue with one client.  `DebuggingServer` prints,
`PureProxy` relays, `MailmanProxy` relays and knows the lists of Mailman 3.
`python -m smtpd` runs any of them from the command line.

What is spoken: RFC 5321 (SMTP), RFC 1870 (SIZE), RFC 6152 (8BITMIME) and
RFC 6531 (SMTPUTF8).

How it is built: everything happens in the thread that runs asyncore.loop().
What a channel reads goes, as asynchat has it, through collect_incoming_data()
and found_terminator() where a subclass overrides one of them; where none does,
commands are cut out of the buffer in place and data is turned into its final
form while it arrives.  Replies to pipelined commands leave together.  Nothing
that a client sends raises out of the loop, and a fault in a handler is answered
with 451, so that the client keeps the message and tries again.
"""

# The rooms of this house, in order: names of the module; paths and parameters
# (pure functions); the data of a message; the channel; what wakes and serves
# the loop; the servers; the proxies; the command line.

import asynchat
import asyncore
import codecs
import collections
import contextlib
import errno
import functools
import getopt
import importlib
import io
import os
import re
import selectors
import socket
import sys
import threading
import time
import traceback
import warnings
import weakref

__all__ = ['SMTPChannel', 'SMTPServer', 'DebuggingServer', 'PureProxy', 'MailmanProxy']

__version__ = 'Python SMTP proxy version 0.3'  # the banner's text, not the distribution's version

program = sys.argv[0] if sys.argv else 'smtpd'

NEWLINE = '\n'
COMMASPACE = ', '
DATA_SIZE_DEFAULT = 33554432  # octets; kept from the standard library


def __getattr__(name):
    # CPython's test of __all__ refuses a plain public EMPTYSTRING, and old programs import it.
    if name == 'EMPTYSTRING':
        return ''
    raise AttributeError('module %r has no attribute %r' % (__name__, name))


class Devnull:
    """A stream that throws away what is written to it."""

    def write(self, msg):
        pass

    def flush(self):
        pass


DEBUGSTREAM = Devnull()  # -d and programs replace it at run time


def _debug(form, *values):
    if not isinstance(DEBUGSTREAM, Devnull):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print(form % values, file=DEBUGSTREAM)


def _log_info(self, message, type='info'):
    """asyncore's log_info(), but to stderr; never raises."""
    if type not in self.ignore_log_types:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or no stderr
            text = '%s: %s\n' % (type, message)
            sys.stderr.write(text.encode('ascii', 'backslashreplace').decode('ascii'))


def _log_exception(self):
    self.log_info('exception in %s\n%s' % (_safe_repr(self), traceback.format_exc()), 'error')


def _safe_repr(thing):
    try:
        return repr(thing)
    except Exception:
        return '<%s, whose repr() fails>' % type(thing).__name__


# Taken at import: tests replace smtpd.socket by a mock that lacks them.
_NO_DELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
_QUICK_ACK = ((socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
              if hasattr(socket, 'TCP_QUICKACK') else None)  # Linux alone has it
_OUT_OF_BAND = socket.MSG_OOB
_ANY_ADDRESS = socket.AI_PASSIVE
_SHUT_BOTH = socket.SHUT_RDWR
_socketpair = socket.socketpair
_FD_SETSIZE = 1024  # select() takes no descriptor from here on (POSIX)
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_END_OF_LINE = b'\r\n'
_END_OF_DATA = b'\r\n.\r\n'


# ---------------------------------------------------------------------------
# Paths, parameters, replies, handlers: pure functions
# ---------------------------------------------------------------------------

# An atom is what the email package of the old module took for one, which is
# more than RFC 5321's atext: anything but specials, blanks and control characters.
_ATOM = r'[^\x00-\x20\x7f-\x9f()<>@,:;.\\"\[\]]+'
_ENCODED_WORD = r'=\?[^?\s]*\?[bBqQ]\?[^?\s]*\?='  # RFC 2047; never decoded, so never taken
_DOT_STRING = r'(?!{word}){atom}(?:\.{atom})*'.format(word=_ENCODED_WORD, atom=_ATOM)
_QUOTED_STRING = r'"(?!%s)(?:[^\x00-\x1f\x7f-\x9f"\\]|\\[^\x00-\x1f\x7f-\x9f])*"' % _ENCODED_WORD
# Phone companies gave out local parts with a last dot, and the old module took them.
_LOCAL_PART = r'(?:{dot_string}\.?|{quoted_string})'.format(
    dot_string=_DOT_STRING, quoted_string=_QUOTED_STRING)
_ADDRESS_LITERAL = r'\[[^\x00-\x20\x7f-\x9f\[\]\\]*\]'
_DOMAIN = r'(?:(?!-+(?:\.|[\s>]|$)){dot_string}|{literal})'.format(
    dot_string=_DOT_STRING, literal=_ADDRESS_LITERAL)
_MAILBOX = r'{local_part}@{domain}'.format(local_part=_LOCAL_PART, domain=_DOMAIN)
_SOURCE_ROUTE = r'@{domain}(?:,@{domain})*:'.format(domain=_DOMAIN)  # taken and ignored
_PATH = re.compile(
    r'[ \t]*(?:<(?:{route})?(?P<path>{mailbox}|{local_part})>(?=[ \t]|$)|(?P<null><>)(?=[ \t]|$)'
    r'|(?P<bare>{mailbox}(?=[ \t]|$)|{local_part}$))\s*'.format(
        route=_SOURCE_ROUTE, mailbox=_MAILBOX, local_part=_LOCAL_PART))

# What nearly every client sends: <local@domain> of letters, digits and a few signs.
_PLAIN_PATH = re.compile(r'<([\w+%=]+(?:[.-][\w+%=]+)*@[a-zA-Z0-9]+(?:[.-][a-zA-Z0-9]+)*)>$',
                         re.ASCII)


_CONTROL_CHARACTER = re.compile('[\x00-\x08\x0a-\x1f\x7f-\x9f]')  # a TAB is a blank


@functools.lru_cache(maxsize=64)  # most lines are one of a few
def _parse_command(line):
    """Split a command line (bytes): verb, name of its method, argument or None.

    The verb is in capitals, or None if the line is empty, is not UTF-8 or has
    control characters.  One that is not ASCII has no method: the name is ''.
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
    """Split "path rest" into the path, verbatim but for brackets, and the rest.

    RFC 5321, 4.1.2.  The null path stays '<>'.  ('', text) where there is no
    well-formed path at the beginning.
    """
    plain = _PLAIN_PATH.match(text)
    if plain:
        return plain[1], ''
    match = _PATH.match(text)
    if not match:
        return '', text
    return match['path'] or match['null'] or match['bare'], text[match.end():]


def _parse_parameters(parameters):
    """Make a dict of ['KEYWORD=value', 'KEYWORD']; None if one is malformed.

    RFC 5321, 4.1.2 (esmtp-param).  A keyword without a value gets True.
    """
    parsed = {}
    for parameter in parameters:
        keyword, equals, value = parameter.partition('=')
        if not keyword.isalnum() or equals and not value:
            return None
        parsed[keyword] = value if equals else True
    return parsed


def _printable(text):
    """The text with all but printable ASCII replaced by question marks."""
    return re.sub(r'[^ -~]', '?', text)


def _reply_lines(status):
    """Make the lines of one reply of what a handler returned; [] if it is none.

    Several lines become one multi-line reply (RFC 5321, 4.2.1).  Bytes stay
    the bytes that they are.
    """
    if isinstance(status, bytes):
        return [line.encode('utf-8', 'surrogateescape')
                for line in _reply_lines(status.decode('utf-8', 'surrogateescape'))]
    if not isinstance(status, str) or not re.match(r'[2-5][0-9][0-9]([ -]|[\r\n]*$)', status):
        return []
    code = status[:3]
    lines = [line for line in re.split(r'[\r\n]+', status) if line]
    texts = [line[4:] if line[:3] == code else line for line in lines]
    return ([code + '-' + text for text in texts[:-1]]
            + [lines[0] if lines == [code] else code + ' ' + texts[-1]])


_TAKES_ARGS, _TAKES_KWARGS = 4, 8  # inspect.CO_VARARGS, CO_VARKEYWORDS; inspect takes 2 MB


def _accepted_keywords(handler, offered):
    """Those of the keywords that a handler takes; handlers of Python 2 and 3.4 take none."""
    handler = getattr(handler, '__func__', handler)  # faster to ask than a bound method
    while handler is not None:  # a decorator and what it wraps must both take them
        code = getattr(handler, '__code__', None)
        if code is not None and not code.co_flags & _TAKES_KWARGS:
            named = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
            offered = {name: offered[name] for name in offered if name in named}
        handler = getattr(handler, '__wrapped__', None)
    return offered


def _positional_arguments(channel_class):
    """How many arguments a channel class takes, None for any; old ones take three."""
    code = getattr(getattr(channel_class, '__init__', None), '__code__', None)
    if code is None or code.co_flags & _TAKES_ARGS:
        return None
    return code.co_argcount - 1


# ---------------------------------------------------------------------------
# The data of a message
# ---------------------------------------------------------------------------

# Python looks for one octet many times as fast as for two or three.

def _find_dotted_line(octets):
    return octets.find(b'\r\n.') if b'\r' in octets else -1


def _lf_for_crlf(octets):
    without_cr = octets.replace(b'\r', b'')
    taken_out = len(octets) - len(without_cr)
    if not taken_out or taken_out == octets.count(b'\r\n'):  # as nearly always
        return without_cr
    return octets.replace(b'\r\n', b'\n')


class _IncomingData:
    """Data as it comes over the wire, made into the message piece by piece.

    Line ends become LF, the dots of RFC 5321, 4.5.2 go, and what is over the
    limit is dropped.  The CRLF that ended the DATA command counts as the first
    two octets: so every line *begins* with CRLF, the first one's dot needs no
    case of its own, and an empty message ends in CRLF.CRLF as all others do.
    """

    __slots__ = ('limit', 'octets', '_message', '_held_back')

    def __init__(self, limit):
        self.limit = limit
        self.octets = 0  # RFC 1870's size: with CRLF, without the doubled dots
        self._message = io.BytesIO()  # gives its buffer away without a copy
        self._held_back = _END_OF_LINE  # may be the beginning of the end

    def feed(self, data):
        """Take data; return how much of it belongs here if the end was in it, else None."""
        held_back = len(self._held_back)
        data = self._held_back + data
        dot = _find_dotted_line(data)
        end = data.find(_END_OF_DATA, dot) if dot >= 0 else -1
        if end < 0:
            self._keep(data, dot)
            return None
        self._append(data[:end], dot < end)
        return end + len(_END_OF_DATA) - held_back

    def add(self, data):
        """Take data whose end somebody else has found; finish() is to follow."""
        data = self._held_back + data
        self._keep(data, _find_dotted_line(data))

    def finish(self):
        self._append(self._held_back, True)

    def _keep(self, data, dot):
        stop = len(data) - asynchat.find_prefix_at_end(data, _END_OF_DATA)
        self._held_back = data[stop:]
        self._append(data[:stop], 0 <= dot < stop)

    def _append(self, lines, dotted):
        if dotted:
            lines = lines.replace(b'\r\n.', b'\r\n')
        first = not self.octets
        self.octets += len(lines)
        if self.limit and self.octets > self.limit:
            self._message = None
        else:
            text = _lf_for_crlf(lines)
            self._message.write(text[1:] if first else text)

    def is_too_much(self):
        return bool(self.limit) and self.octets > self.limit

    def message(self):
        """The message, without its last line end."""
        return self._message.getvalue()


# ---------------------------------------------------------------------------
# The channel: one client
# ---------------------------------------------------------------------------

_MOST_HELD = 500  # replies that leave together; a bound, so that a backlog is noticed
_ENOUGH_FOR_A_SEND = 65536  # octets; what send() leaves of a piece is copied

_send_lock = threading.RLock()  # some programs push from a thread of their own


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


class _OfDataKind:
    """A constant of the kind that the channel's data has; a copied __init__ may set it."""

    def __init__(self, text, octets):
        self.text = text
        self.octets = octets

    def __get__(self, channel, owner=None):
        return self.text if channel is not None and channel._decode_data else self.octets


class _SignatureOfInit:
    """For inspect: the arguments of a class are those of __init__(), not of __new__()."""

    def __get__(self, instance, owner):
        import inspect
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class SMTPChannel(asynchat.async_chat):
    """The dialogue with one client (RFC 5321).

    SMTPChannel(server, conn, addr, data_size_limit=33554432, map=None,
                enable_SMTPUTF8=False, decode_data=False)

    `conn` is the connected socket, `addr` the client's address as accept()
    gave it.  The other arguments are SMTPServer's.  ValueError if both
    enable_SMTPUTF8 and decode_data are true.

    Methods that may be overridden: smtp_VERB(arg) for each command, and new
    ones for new commands (`arg` is the text behind the verb, None if there is
    none); push(msg), which sees every reply; collect_incoming_data() and
    found_terminator(), which are called as asynchat calls them.

    Instance variables, to be read: smtp_server, conn, addr, peer, fqdn,
    received_lines, smtp_state (COMMAND or DATA), seen_greeting, mailfrom,
    rcpttos, received_data, mail_options, rcpt_options.

    Class attributes that may be overridden (None turns all but the first off):

    command_size_limit      octets of a command line without its CRLF (512)
    idle_timeout_seconds    without a sign of the client (300), then 421
    recipient_limit         of one message (1000), then 452
    error_limit             5yz replies since the last message (100), then 421
    unsent_reply_limit      octets; not read from while more wait (65536)
    """

    COMMAND = 0
    DATA = 1

    command_size_limit = 512  # RFC 5321, 4.5.3.1.4
    command_size_limits = collections.defaultdict(lambda: 512)  # by verb; each channel has its own
    idle_timeout_seconds = 300  # RFC 5321, 4.5.3.2.7
    recipient_limit = 1000  # Postfix: smtpd_recipient_limit
    error_limit = 100  # as Postfix's smtpd_hard_error_limit (20), but kinder to test suites
    unsent_reply_limit = 65536  # one read's worth

    enable_SMTPUTF8 = False

    # In slots, which are fast and leave room in the instance's dict: with more than 29
    # attributes CPython no longer shares its keys, and each session takes 1.3 KB more.
    _PRIVATE_STATE = {
        '_decode_data': False,
        '_piece_decoder': None,
        '_last_sign_of_life': 0.0,  # on the monotonic clock; __new__() starts it
        '_asks_for_turn': False,  # for handle_write(), though there may be nothing to send
        '_errors_since_message': 0,  # 5yz replies
        '_unread_input': b'',  # what was received and not yet looked at ...
        '_input_start': 0,  # ... from here on
        '_octets_dropped': 0,  # of the present line, which is too long
        '_incoming_data': None,  # the message under way, where no hook is overridden
        '_data_has_begun': False,  # for subclasses that override a hook
        '_is_taking_piece': False,  # a failure now leaves half a line, or half a message
        '_replies_held': False,  # more commands wait: their replies go out together
        '_failure_answered': False,  # 451 was sent: no reason to close
        '_is_hung_up': False,  # the client sends no more
        '_stalled_by': frozenset(),  # why nothing is read or executed: see readable()
        '_watching_hub': None,  # that watches this channel, instead of the socket map
        '_watches_own_idleness': False,  # there is no open server that does
    }
    __slots__ = tuple(_PRIVATE_STATE)
    __signature__ = _SignatureOfInit()

    def __new__(cls, *args, **kwargs):
        # State is born here, not in __init__, which a subclass may never call.
        channel = super().__new__(cls)
        for name, value in cls._PRIVATE_STATE.items():
            setattr(channel, name, value)
        channel._last_sign_of_life = time.monotonic()
        # The connection
        channel.smtp_server = None
        channel.conn = None
        channel.peer = None
        channel.fqdn = ''
        channel.data_size_limit = DATA_SIZE_DEFAULT
        channel.command_size_limits = cls.command_size_limits.copy()
        channel.extended_smtp = False  # EHLO, not HELO
        channel.seen_greeting = ''  # what the client called itself
        # The transaction
        channel.smtp_state = cls.COMMAND
        channel.terminator = _END_OF_LINE
        channel.mailfrom = None
        channel.rcpttos = []
        channel.mail_options = []
        channel.rcpt_options = []
        channel.require_SMTPUTF8 = False  # asked for in MAIL
        channel.received_lines = []  # pieces of the present line, or of data
        channel.received_data = ''  # the last message, until the next command
        channel.num_bytes = 0  # octets in received_lines, and those dropped
        return channel

    def __init__(self, server, conn, addr, data_size_limit=DATA_SIZE_DEFAULT,
                 map=None, enable_SMTPUTF8=False, decode_data=False):
        _check_modes(enable_SMTPUTF8, decode_data)
        self.smtp_server = server
        self.conn = conn
        self.data_size_limit = data_size_limit
        if enable_SMTPUTF8:
            self.enable_SMTPUTF8 = enable_SMTPUTF8
        self._decode_data = decode_data
        self.fqdn = server._own_name() if _is_server(server) else _getfqdn()
        with contextlib.suppress(OSError, AttributeError):  # AF_UNIX; a stub
            conn.setsockopt(*_NO_DELAY)
        asynchat.async_chat.__init__(self, conn, map)
        if not self.connected:  # gone already: getpeername() failed
            self.close()
            return
        self.peer, self.addr = self.addr, addr
        _debug('Peer: %r', self.peer)
        # At once, not queued: TLS code calls async_chat.__init__ again behind this.
        self.push('220 %s %s' % (self.fqdn, __version__))
        self.set_terminator(_END_OF_LINE)

    # ------------------------------------------------------------------
    # Input
    # ------------------------------------------------------------------

    @property
    def ac_in_buffer(self):
        """What was received and not yet looked at, as in asynchat."""
        return self._unread_input[self._input_start:] if self._input_start else self._unread_input

    @ac_in_buffer.setter
    def ac_in_buffer(self, octets):
        self._unread_input = octets
        if self._input_start:
            self._input_start = 0
        if not octets:
            self._replies_held = False

    def set_terminator(self, term):
        """asynchat's set_terminator(); text is taken too, as Python 2's programs give it."""
        if type(term) is bytes:
            self.terminator = term
        else:
            asynchat.async_chat.set_terminator(
                self, term.encode('ascii') if isinstance(term, str) else term)

    def readable(self):
        # Not read from
        # 1. when either side has begun to close the connection ('closing');
        # 2. while its message is with a thread ('handler'): replies keep their order;
        # 3. while it does not read its replies ('backlog').
        if self._watches_own_idleness:
            self._look_for_idleness(time.monotonic())
        return not (self._stalled_by or self._is_hung_up)

    def handle_read_event(self):
        try:
            self.handle_read()
            return
        except asyncore.ExitNow:
            raise
        except Exception:
            self.handle_error()
        self._go_on()

    def handle_read(self):
        try:
            data = self.recv(self.ac_in_buffer_size)
        except BlockingIOError:
            return
        except OSError:
            self.handle_error()
            return
        if not data:
            return
        self._unread_input = self.ac_in_buffer + data if self._unread_input else data
        self._input_start = 0
        self._process_input()

    def _go_on(self):
        """Process what was received before something came in between."""
        while True:
            try:
                self._process_input()
                return
            except asyncore.ExitNow:
                raise
            except Exception:
                self.handle_error()

    def _process_input(self):
        """Execute what the input holds, until it is used up or must wait."""
        try:
            if self._has_hook() or self.received_lines or not isinstance(DEBUGSTREAM, Devnull):
                self._process_as_asynchat()
            else:
                self._process_in_place()
        except asyncore.ExitNow:
            raise
        except Exception:
            self._answer_failure()
            raise
        finally:
            self._last_sign_of_life = time.monotonic()  # now: a handler may have taken its time
            if self._replies_held or self.producer_fifo:
                self._send_replies()
            if self._is_hung_up and not self._owes_replies():
                self.close()

    def _has_hook(self):
        """Whether somebody but us would see the hooks of asynchat called, from now on."""
        # Not by __dict__: whoever looks at it makes attributes slow (up to Python 3.12).
        try:
            return (self.found_terminator.__func__ is not _FOUND_TERMINATOR
                    or self.collect_incoming_data.__func__ is not _COLLECT_INCOMING_DATA
                    or self.get_terminator.__func__ is not _GET_TERMINATOR)
        except AttributeError:  # no method, but a function of the instance
            return True

    def _process_in_place(self):
        while self._unread_input and not self._stalled_by:
            if self.smtp_state == self.COMMAND and self.terminator == _END_OF_LINE:
                is_taken = self._take_command()
            else:
                is_taken = self._take_data()
            if not is_taken:
                return
            # Only the user's commands and handlers, whose replies are not held, set hooks.
            if self._unread_input and not self._replies_held and self._has_hook():
                self._process_as_asynchat()
                return

    def _take_command(self):
        """Execute the next command line of the input; false if it is not whole yet."""
        unread, start = self._unread_input, self._input_start
        end = unread.find(_END_OF_LINE, start)
        if end < 0:
            self._drop_over_long_line()
            return False
        if end + 2 < len(unread):
            self._input_start = end + 2
            self._replies_held = len(self.producer_fifo) < _MOST_HELD
        else:
            self._unread_input = b''
            self._input_start = 0
            self._replies_held = False
        octets = end - start + self._octets_dropped
        self._octets_dropped = 0
        self._execute_line(unread[start:end], octets)
        return True

    def _drop_over_long_line(self):
        line = self.ac_in_buffer
        if self._octets_dropped or len(line) > self.max_command_size_limit + 1:
            keep = line.endswith(b'\r')
            self._octets_dropped += len(line) - keep
            self.ac_in_buffer = line[-1:] if keep else b''

    def _take_data(self):
        """Take data from the input; false if there is not enough of it."""
        if self.smtp_state != self.DATA or self.terminator != _END_OF_DATA:
            return self._take_as_asynchat()  # a subclass has a state or a terminator of its own
        incoming_data = self._incoming_data
        if incoming_data is None:
            incoming_data = self._incoming_data = _IncomingData(self.data_size_limit)
        unread = self.ac_in_buffer
        self._is_taking_piece = True
        taken = incoming_data.feed(unread)
        self._is_taking_piece = False
        self.num_bytes = incoming_data.octets
        if taken is None:
            self.ac_in_buffer = b''
            if _QUICK_ACK and len(unread) < self.ac_in_buffer_size:
                # The rest of the message may wait, by Nagle's rule, for our ACK.
                with contextlib.suppress(OSError, AttributeError):
                    self.socket.setsockopt(*_QUICK_ACK)
        else:
            self.ac_in_buffer = unread[taken:]
            self._incoming_data = None
            self._end_data(incoming_data)
        return True

    def _process_as_asynchat(self):
        while self._unread_input and not self._stalled_by:
            # What began in place goes on so: a program may set DEBUGSTREAM at any time.
            if self._incoming_data:
                is_taken = self._take_data()
            elif self._octets_dropped:
                is_taken = self._take_command()
            else:
                is_taken = self._take_as_asynchat()
            if not is_taken:
                return

    def _take_as_asynchat(self):
        """Call the hooks for the next piece as asynchat's handle_read() does."""
        unread = self.ac_in_buffer
        terminator = self.get_terminator()
        in_data = self.smtp_state == self.DATA
        if in_data and terminator == _END_OF_DATA and not self._data_has_begun:
            # The CRLF of the DATA command and a dot: an empty message.
            if unread.startswith(b'.\r\n'):
                self.ac_in_buffer = unread[3:]
                self._call_found_terminator()
                return True
            if b'.\r\n'.startswith(unread):
                return False
        if not terminator:
            piece, found, rest = unread, False, b''
        elif isinstance(terminator, int):
            piece, rest = unread[:terminator], unread[terminator:]
            found = len(piece) == terminator
            self.terminator = terminator - len(piece)
        else:
            piece, found, rest = unread.partition(terminator)
            if not found:
                stop = len(unread) - asynchat.find_prefix_at_end(unread, terminator)
                piece, rest = unread[:stop], unread[stop:]
        self.ac_in_buffer = rest
        if piece:
            self._data_has_begun = in_data
            self._is_taking_piece = True
            self.collect_incoming_data(piece)
            self._is_taking_piece = False
        if found:
            self._call_found_terminator()
        return bool(piece or found)

    def _call_found_terminator(self):
        self._data_has_begun = False
        if self._decode_data:
            cut_off = self._decode_piece(b'', True)
            if cut_off:
                self.received_lines.append(cut_off)
        self._replies_held = bool(self._unread_input) and len(self.producer_fifo) < _MOST_HELD
        self.found_terminator()

    def collect_incoming_data(self, data):
        """Keep a piece of the present line or of data (asynchat's hook)."""
        if self.smtp_state == self.COMMAND:
            limit = self.max_command_size_limit
            octets = len(data)
        else:
            limit = self.data_size_limit
            octets = len(data) - data.count(b'\r\n.')
        if limit and self.num_bytes > limit:
            return
        self.num_bytes += octets
        self.received_lines.append(self._decode_piece(data) if self._decode_data else data)

    def _decode_piece(self, octets, final=False):
        """Decode what may end within a character, whose rest is to follow."""
        if self._piece_decoder is None:
            self._piece_decoder = codecs.getincrementaldecoder('utf-8')('surrogateescape')
        return self._piece_decoder.decode(octets, final)

    def found_terminator(self):
        """Execute the command, or end the data, that was collected (asynchat's hook)."""
        pieces = collections.deque(self.received_lines)
        octets = self.num_bytes
        self.received_lines = []
        self.num_bytes = 0
        if not isinstance(DEBUGSTREAM, Devnull):
            _debug('Data: %r', self._emptystring.join(pieces))
        if self.smtp_state == self.COMMAND:
            self._execute_line(b''.join(map(_as_octets, pieces)), octets)
        elif self.smtp_state == self.DATA:
            incoming_data = _IncomingData(self.data_size_limit)
            while pieces:  # there may be many: let go of each
                incoming_data.add(_as_octets(pieces.popleft()))
            incoming_data.finish()
            incoming_data.octets = max(incoming_data.octets, octets)
            self._end_data(incoming_data)
        else:
            self.push('451 Internal confusion')

    # ------------------------------------------------------------------
    # Output
    # ------------------------------------------------------------------

    def push(self, msg):
        """Send one line of a reply; CRLF is added.

        `msg` is text, of which ASCII goes out (UTF-8 where the client asked
        for SMTPUTF8), or bytes, which go as they are.
        """
        if isinstance(msg, str):
            msg = msg.encode('utf-8' if self.require_SMTPUTF8 else 'ascii', 'replace')
        asynchat.async_chat.push(self, msg + _END_OF_LINE)
        if msg[:1] == b'5' and msg[3:4] != b'-':
            self._count_error()

    def _count_error(self):
        self._errors_since_message += 1
        if (self.error_limit is not None and self._errors_since_message >= self.error_limit
                and 'closing' not in self._stalled_by):
            self.push('421 Error: too many errors')
            self.close_when_done()

    def initiate_send(self):
        """Send what waits, or as much of it as the connection takes now."""
        if self._replies_held:
            return
        with _send_lock:
            waiting = self.producer_fifo
            if len(waiting) > 1:
                _join_leading_bytes(waiting)
            while waiting and self.connected:
                piece = waiting[0]
                if type(piece) is not bytes:
                    if not self._send_of_producer():
                        break
                    continue
                try:
                    sent = self.send(piece)
                except OSError:
                    self.handle_error()
                    break
                if sent < len(piece):
                    waiting[0] = piece[sent:]
                    break
                waiting.popleft()
            if waiting or self._stalled_by:
                self._stall_input('backlog', self._has_backlog())
                # What was received may have waited for this, and no event would tell.
                self._asks_for_turn = bool(self._unread_input) and not self._stalled_by
                self._tell_hub()

    def _send_of_producer(self):
        """Let asynchat send what is no bytes; true if it is done with it."""
        before = len(self.producer_fifo)
        asynchat.async_chat.initiate_send(self)
        return len(self.producer_fifo) < before

    def _send_replies(self):
        self._replies_held = False
        if self.producer_fifo:
            self.initiate_send()

    def _has_backlog(self):
        limit = self.unsent_reply_limit
        return limit is not None and limit < sum(
            len(piece) for piece in self.producer_fifo if isinstance(piece, bytes))

    def _stall_input(self, reason, stalls=True):
        """Leave the input alone for this reason, or no longer for it."""
        with _send_lock:
            if stalls != (reason in self._stalled_by):
                self._stalled_by ^= {reason}

    def writable(self):
        return bool(self.producer_fifo or self._asks_for_turn or not self.connected)

    def handle_write(self):
        self._asks_for_turn = False
        if self.producer_fifo:
            self.initiate_send()
            self._last_sign_of_life = time.monotonic()
        elif self._is_idle(time.monotonic()):
            self._end_idle_session()
        if self._unread_input or self._is_hung_up:
            self._go_on()

    def close_when_done(self):
        """Close when all replies are sent; what the client sent meanwhile is not executed."""
        self._stall_input('closing')
        asynchat.async_chat.close_when_done(self)
        self._tell_hub()

    def handle_close(self):
        """The client sends no more, or is gone: close when what it sent is answered."""
        if self._owes_replies() and not self._is_hung_up:
            self._is_hung_up = True
            self._tell_hub()
        else:
            self.close()

    def _owes_replies(self):
        return self.connected and bool(
            self.producer_fifo or self._asks_for_turn or 'handler' in self._stalled_by)

    def close(self):
        self.ac_in_buffer = b''
        self._incoming_data = None
        asynchat.async_chat.close(self)

    def handle_expt(self):
        """Take an out-of-band byte away: nobody wants it, and select() would spin on it."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: TLS has none
            self.socket.recv(1, _OUT_OF_BAND)

    log_info = _log_info

    def handle_error(self):
        """Write the traceback to the log; close, but where the client has got its 451."""
        _log_exception(self)
        if self._failure_answered:
            self._failure_answered = False
        else:
            self._is_hung_up = True  # nothing to wait for
            self.handle_close()

    def _answer_failure(self):
        if self._is_taking_piece:  # what follows would be taken for commands
            self._is_taking_piece = False
            self.push('451 Internal confusion')
            self.close_when_done()
        else:
            if self.smtp_state == self.DATA:
                self._set_post_data_state()
            self.push('451 Internal confusion')
        self._failure_answered = True

    def _is_idle(self, now):
        return (self.idle_timeout_seconds is not None and 'handler' not in self._stalled_by
                and now - self._last_sign_of_life >= self.idle_timeout_seconds)

    def _look_for_idleness(self, now):
        # The loop is asking for descriptors: nothing here may raise, or close one.  So ask
        # for handle_write(): in a turn of the loop it comes behind what the client has sent.
        if not self._is_idle(now):
            return
        with contextlib.suppress(OSError, ValueError, LookupError, AttributeError):
            self._asks_for_turn = not self._asks_for_turn
            if not self._asks_for_turn:  # it did, and got none: the client does not even read
                self.socket.shutdown(_SHUT_BOTH)
            self._tell_hub()

    def _end_idle_session(self):
        self._last_sign_of_life = time.monotonic()
        self.push('421 Error: timeout exceeded')
        self.close_when_done()
        self.initiate_send()

    def add_channel(self, map=None):
        server = self.smtp_server
        if _is_server(server) and server._takes_into_hub(self, map):
            server._hub_of_channels.add(self)
        else:
            self._watches_own_idleness = (
                getattr(type(server), 'readable', None) is not SMTPServer.readable)
            asynchat.async_chat.add_channel(self, map)

    def del_channel(self, map=None):
        if self._watching_hub is not None:
            self._watching_hub.discard(self)
        asynchat.async_chat.del_channel(self, map)

    def _tell_hub(self):
        """Readable or writable may have changed outside of the loop's own questions."""
        if self._watching_hub is not None:
            self._watching_hub.watch(self)

    # ------------------------------------------------------------------
    # From a line to a command, from data to the handler
    # ------------------------------------------------------------------

    def _execute_line(self, line, octets):
        """Run one command line; `octets` is its length before anything was dropped."""
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
        if self._replies_held and _COMMANDS.get(verb) is not getattr(method, '__func__', method):
            self._send_replies()  # a command of the user's may want its reply out at once: TLS
        method(argument)

    @property
    def max_command_size_limit(self):
        """Octets of the longest command line that any verb may have."""
        return max([self.command_size_limit, *self.command_size_limits.values()])

    def _end_data(self, incoming_data):
        if incoming_data.is_too_much():
            self._set_post_data_state()
            self.push('552 Error: Too much mail data')
            return
        message = incoming_data.message()
        if self._decode_data:
            message = message.decode('utf-8', 'surrogateescape')
        self.received_data = message
        self._send_replies()  # the handler may take its time
        server = self.smtp_server
        if _is_server(server) and server.process_message_threads:
            self._stall_input('handler')
            self._tell_hub()
            server._run_in_thread(self._handler_call(message), self._handler_has_ended)
        else:
            self._end_message(self._handler_call(message)())

    def _handler_call(self, message):
        handler = self.smtp_server.process_message
        keywords = {}
        if not self._decode_data:
            keywords = _accepted_keywords(handler, {'mail_options': self.mail_options,
                                                    'rcpt_options': self.rcpt_options})
        return functools.partial(
            handler, self.peer, self.mailfrom, self.rcpttos, message, **keywords)

    def _handler_has_ended(self, outcome):
        """In the loop's thread again: reply, and go on with what waits."""
        self._stall_input('handler', False)
        try:
            self._end_message(outcome())
        except asyncore.ExitNow:
            raise
        except Exception:
            self._answer_failure()
            self.handle_error()
        self._go_on()
        self._tell_hub()

    def _end_message(self, status):
        """Reply to data with what the handler returned."""
        takes_utf8 = self.require_SMTPUTF8
        self._set_post_data_state()
        self._errors_since_message = 0
        if not status:
            self.push('250 OK')
            return
        lines = _reply_lines(status)
        if not lines:
            self.log_info('process_message() returned %s, which is no reply' % _safe_repr(status),
                          'error')
            lines = ['250 OK']
        for line in lines:
            self.push(line.encode('utf-8', 'replace')
                      if takes_utf8 and isinstance(line, str) else line)

    def _set_post_data_state(self):
        """Forget the transaction, but for the message (RFC 5321, 4.1.1.4)."""
        self.smtp_state = self.COMMAND
        self.mailfrom = None
        self.rcpttos = []
        self.mail_options = []
        self.rcpt_options = []
        self.require_SMTPUTF8 = False
        self.received_lines = []
        self.num_bytes = 0
        self._incoming_data = None
        self._data_has_begun = False
        self.set_terminator(_END_OF_LINE)

    def _set_rset_state(self):
        """Forget the transaction and the message (RFC 5321, 4.1.1.5)."""
        self._set_post_data_state()
        self.received_data = ''

    # ------------------------------------------------------------------
    # Arguments
    # ------------------------------------------------------------------

    def _strip_command_keyword(self, keyword, arg):
        """What stands behind "FROM:" or "TO:" in `arg`; '' if it does not begin so."""
        length = len(keyword)
        return arg[length:].strip() if arg[:length].upper() == keyword else ''

    def _getaddr(self, arg):
        """Split a path off: (address, rest); the address is '' if it is malformed."""
        return _parse_path(arg)

    def _getparams(self, params):
        """The parameters as a dict; None if one is malformed."""
        return _parse_parameters(params)

    def _refusal_of_mail_parameters(self, parameters):
        """The reply to the parameters of MAIL that we do not take, or None."""
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
        # RFC 1870, 4: 20 digits at most; int() raises ValueError where there are thousands.
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
        """RFC 5321, 4.1.1.1."""
        if self._begin_session('HELO', arg):
            self.push('250 %s' % self.fqdn)

    def _begin_session(self, verb, arg):
        """Take the client's name; false, and answered, if HELO or EHLO is out of order."""
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
        """RFC 5321, 4.1.1.1: the extensions, and longer lines for their parameters."""
        if not self._begin_session('EHLO', arg):
            return
        self.extended_smtp = True
        mail_limit = self.command_size_limit
        self._replies_held = True  # all but the last line leave together
        self.push('250-%s' % self.fqdn)
        if self.data_size_limit:
            self.push('250-SIZE %s' % self.data_size_limit)
            mail_limit += 26  # RFC 1870, 3 (5)
        if not self._decode_data:
            self.push('250-8BITMIME')
        if self.enable_SMTPUTF8:
            self.push('250-SMTPUTF8')
            mail_limit += 10  # RFC 6531, 3.1 (5)
        self._send_replies()
        self.push('250 HELP')
        limits = self.command_size_limits
        limits['MAIL'] = max(limits.get('MAIL', 0), mail_limit)

    def smtp_MAIL(self, arg):
        """RFC 5321, 4.1.1.2."""
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
        options = parameters.upper().split()
        refusal = self._refusal_of_mail_parameters(self._getparams(options)) if options else None
        if refusal:
            self.push(refusal)
            return
        self.mail_options = options
        self.require_SMTPUTF8 = 'SMTPUTF8' in options
        self.mailfrom = address
        _debug('sender: %s', address)
        self.push('250 OK')

    def smtp_RCPT(self, arg):
        """RFC 5321, 4.1.1.3."""
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
        if parameters:
            is_wrong = self._getparams(parameters.upper().split()) is None
            self.push(self._rcpt_syntax() if is_wrong
                      else '555 RCPT TO parameters not recognized or not implemented')
            return
        if self.recipient_limit is not None and len(self.rcpttos) >= self.recipient_limit:
            self.push('452 Error: too many recipients')  # RFC 5321, 4.5.3.1.10
            return
        self.rcpttos.append(address)
        _debug('recips: %s', self.rcpttos)
        self.push('250 OK')

    def smtp_DATA(self, arg):
        """RFC 5321, 4.1.1.4."""
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
        self.push('354 End data with <CR><LF>.<CR><LF>')

    def smtp_RSET(self, arg):
        """RFC 5321, 4.1.1.5."""
        if arg:
            self.push('501 Syntax: RSET')
            return
        self._set_rset_state()
        self.push('250 OK')

    def smtp_NOOP(self, arg):
        """RFC 5321, 4.1.1.9; no argument is taken, as ever in this module."""
        if arg:
            self.push('501 Syntax: NOOP')
        else:
            self.push('250 OK')

    def smtp_HELP(self, arg):
        """RFC 5321, 4.1.1.8."""
        syntax = _COMMAND_SYNTAX.get(arg.upper() if arg else '')
        if syntax:
            if arg.upper() in ('MAIL', 'RCPT'):
                syntax = self._with_mail_parameters(syntax)
            self.push('250 Syntax: ' + syntax)
        else:
            code = '501' if arg else '250'
            self.push(code + ' Supported commands: EHLO HELO MAIL RCPT DATA RSET NOOP QUIT VRFY')

    def smtp_VRFY(self, arg):
        """RFC 5321, 4.1.1.6 and 7.3: nobody is told who has a mailbox here."""
        if arg and (self._getaddr(arg)[0] or self._getaddr(arg.split()[0])[0]):
            self.push('252 Cannot VRFY user, but will accept message and attempt delivery')
        else:
            self.push('501 Syntax: VRFY <address>')

    def smtp_QUIT(self, arg):
        """RFC 5321, 4.1.1.10."""
        self.push('221 Bye')
        self.close_when_done()

    # Not implemented

    def smtp_EXPN(self, arg):
        """RFC 5321, 4.1.1.7."""
        self.push('502 EXPN not implemented')

    # ------------------------------------------------------------------
    # Old names
    # ------------------------------------------------------------------

    # Copies of the old found_terminator() use these.
    _emptystring = _OfDataKind('', b'')
    _linesep = _OfDataKind('\r\n', b'\r\n')
    _newline = _OfDataKind(NEWLINE, b'\n')
    _dotsep = _OfDataKind('.', ord(b'.'))  # what data[0] gives

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


# The hooks as they are before anybody overrides or patches them.
_FOUND_TERMINATOR = SMTPChannel.found_terminator
_COLLECT_INCOMING_DATA = SMTPChannel.collect_incoming_data
_GET_TERMINATOR = SMTPChannel.get_terminator

_COMMANDS = {name[5:]: method for name, method in vars(SMTPChannel).items()
             if name.startswith('smtp_') and callable(method)}

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


def _join_leading_bytes(queue):
    """Make one piece of small ones at the queue's beginning, so that one send() takes them."""
    pieces = []
    octets = 0
    while queue and isinstance(queue[0], bytes) and octets < _ENOUGH_FOR_A_SEND:
        octets += len(queue[0])
        pieces.append(queue.popleft())
    if pieces:
        queue.appendleft(b''.join(pieces))


def _getfqdn():
    try:
        return socket.getfqdn()
    except (OSError, UnicodeError):  # a name that is no name
        return 'localhost'


# ---------------------------------------------------------------------------
# What wakes the loop, and what spares it
# ---------------------------------------------------------------------------

def _wait_is_select():
    """Whether the loop that called us waits in select()."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is asyncore.poll.__code__:
            return True
        frame = frame.f_back
    return False


def _is_too_high_for_select(descriptor):
    # Windows counts sockets instead, and has no small numbers.
    return os.name == 'posix' and descriptor >= _FD_SETSIZE and _wait_is_select()


def _refuse(connection):
    with contextlib.suppress(OSError):
        connection.send(b'421 Service not available\r\n')
    connection.close()


def _close_sockets(*sockets):
    for each in sockets:
        each.close()


def _give(result):
    return result


def _throw(error):
    raise error


def _ignore(outcome):
    pass


class _BackgroundTasks(asyncore.dispatcher):
    """Runs functions in threads; their outcomes come back in the loop's thread.

    A socket pair wakes the loop.  It stands in the socket map only while a
    task runs, so that a loop ends when its servers and channels are closed.
    An outcome is a function that returns or raises what the task did.
    """

    log_info = _log_info

    def __init__(self, map):
        asyncore.dispatcher.__init__(self, map=map)
        self.socket, self._waker = _socketpair()  # now: later no descriptor may be left
        self.socket.setblocking(False)
        self._waker.setblocking(False)
        weakref.finalize(self, _close_sockets, self.socket, self._waker)
        self._at_most = 0
        self._running = 0
        self._queued = collections.deque()  # (task, function for its outcome)
        self._ended = collections.deque()  # (function for the outcome, outcome)
        self._is_abandoned = False

    def start_at_most(self, count, task, take_outcome):
        """Run task() in a thread as soon as fewer than `count` run."""
        self._at_most = count
        self._queued.append((task, take_outcome))
        self._start_queued()

    def start(self, task, take_outcome):
        """Run task() in a thread now."""
        # The map first: the task may close the server, which closes what nobody uses.
        self._running += 1
        self._fileno = self.socket.fileno()
        self.add_channel()
        try:
            threading.Thread(target=self._run, args=(task, take_outcome), daemon=True).start()
        except RuntimeError:  # no more threads to be had
            self._running -= 1
            self._leave_if_idle()
            raise

    def _start_queued(self):
        while self._queued and self._running < self._at_most:
            task, take_outcome = self._queued.popleft()
            try:
                self.start(task, take_outcome)
            except RuntimeError as error:
                take_outcome(functools.partial(_throw, error))

    def _run(self, task, take_outcome):
        try:
            outcome = functools.partial(_give, task())
        except BaseException as error:
            outcome = functools.partial(_throw, error)
        self._ended.append((take_outcome, outcome))
        self._wake_loop()

    def _wake_loop(self):
        with contextlib.suppress(OSError):  # full: the loop is awake; closed: nobody asks
            self._waker.send(b'.')

    def writable(self):
        return False

    def handle_read(self):
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(4096)
        try:
            while self._ended:
                take_outcome, outcome = self._ended.popleft()
                self._running -= 1
                take_outcome(outcome)
        finally:
            if self._ended:
                self._wake_loop()
            self._start_queued()
            self._leave_if_idle()

    def handle_error(self):
        _log_exception(self)

    def _leave_if_idle(self):
        if not self._running and not self._queued:
            self.del_channel()
            if self._is_abandoned:
                self.close()

    def close_when_idle(self):
        self._is_abandoned = True
        self._leave_if_idle()

    def close(self):
        asyncore.dispatcher.close(self)
        self._waker.close()


class _Hub(asyncore.dispatcher):
    """Stands in the socket map for all channels of a server.

    asyncore asks every object in the map at every turn whether it wants to
    read or write.  This one asks the kernel instead: its descriptor is an
    epoll set (Linux) or a kqueue (BSD, macOS), which is readable while one of
    the channels in it is ready.
    """

    is_possible = hasattr(selectors.DefaultSelector, 'fileno')  # not on Windows

    def __init__(self, server):
        asyncore.dispatcher.__init__(self, map=server._map)
        self._smtp_server = server
        self._channels = {}  # by descriptor
        self._events = {}  # what is watched, by descriptor
        self._selector = selectors.DefaultSelector()  # closed by the garbage collector

    def add(self, channel):
        self._forget(channel._fileno)  # somebody closed its socket behind our back
        self._channels[channel._fileno] = channel
        channel._watching_hub = self
        self._fileno = self._selector.fileno()
        self.add_channel()
        self.watch(channel)

    def discard(self, channel):
        channel._watching_hub = None
        if self._channels.get(channel._fileno) is channel:
            self._forget(channel._fileno)
        if not self._channels:
            self.del_channel()

    def _forget(self, descriptor):
        self._channels.pop(descriptor, None)
        if self._events.pop(descriptor, 0):
            self._selector.unregister(descriptor)

    def watch(self, channel):
        """Watch the channel for what it wants now."""
        descriptor = channel._fileno
        wanted = ((selectors.EVENT_READ if channel.readable() else 0)
                  | (selectors.EVENT_WRITE if channel.writable() else 0))
        watched = self._events.get(descriptor, 0)
        if wanted == watched:
            return
        if not watched:
            self._selector.register(descriptor, wanted, channel)
        elif wanted:
            self._selector.modify(descriptor, wanted, channel)
        else:
            self._selector.unregister(descriptor)
        self._events[descriptor] = wanted

    def readable(self):
        self._smtp_server._look_for_idle_sessions(time.monotonic())
        return True

    def writable(self):
        return False

    log_info = _log_info

    def handle_error(self):
        _log_exception(self)

    def handle_read(self):
        for key, events in self._selector.select(0):
            channel = key.data
            if events & selectors.EVENT_READ and channel._watching_hub is self:
                asyncore.read(channel)
            if events & selectors.EVENT_WRITE and channel._watching_hub is self:
                asyncore.write(channel)
                if channel._watching_hub is self:
                    self.watch(channel)

    def close(self):
        for channel in list(self._channels.values()):
            channel.close()


class _ClosingListener(asyncore.dispatcher):
    """Closes a listening socket in the loop's own thread.

    That thread may be about to wait for the descriptor, and must not find it
    closed.  shutdown() wakes it, which close() alone would not.
    """

    def __init__(self, server):
        asyncore.dispatcher.__init__(self, map=server._map)
        self.set_socket(server.socket)
        with contextlib.suppress(OSError, AttributeError):  # macOS does not know it
            self.socket.shutdown(_SHUT_BOTH)

    def writable(self):
        return False

    def handle_read_event(self):
        self.close()

    def __del__(self):
        self.socket.close()


# ---------------------------------------------------------------------------
# The servers
# ---------------------------------------------------------------------------

class SMTPServer(asyncore.dispatcher):
    """Listens, and gives each complete message to process_message().

    SMTPServer(localaddr, remoteaddr, data_size_limit=33554432, map=None,
               enable_SMTPUTF8=False, decode_data=False)

    `localaddr` is the (host, port) to listen on; host '' or None stands for
    all interfaces (IPv4).  `remoteaddr` is the (host, port) of an upstream
    relay, for subclasses that have one, as _remoteaddr.  `data_size_limit` is
    the most octets that a message may have, counted as in RFC 1870; None or 0:
    no limit.  `map` is the socket map, asyncore's own if there is none.
    `enable_SMTPUTF8` offers RFC 6531.  With `decode_data` handlers get text,
    decoded from UTF-8 (what is not UTF-8 as surrogate escapes), else bytes.
    ValueError if both are true; OSError if the address cannot be had.

    Methods that may be overridden: process_message(); handle_accept() and
    handle_accepted(conn, addr), which make the channels; handle_error();
    listen(num).

    Class attributes that may be overridden:

    channel_class            the class of the channels
    process_message_threads  0 (the default): process_message() runs in the
                             loop, and all sessions wait for it; else it runs
                             in up to so many threads
    channels_in_hub          true: channels stand not in the socket map, but in
                             one epoll or kqueue set, so that idle ones cost
                             nothing (default: false; python -m smtpd has it)
    listen_backlog           connections that may wait to be accepted (1024)
    accepts_per_event        connections accepted at one turn of the loop (100)
    """

    channel_class = SMTPChannel
    process_message_threads = 0
    channels_in_hub = False
    listen_backlog = 1024
    accepts_per_event = 100

    enable_SMTPUTF8 = False
    data_size_limit = DATA_SIZE_DEFAULT
    _decode_data = False
    _localaddr = None
    _remoteaddr = None
    _name_of_this_host = None
    _next_look_for_idle = 0.0
    _loop_thread = None  # number of the one that asked us last
    _accepts_again_at = 0.0  # on the monotonic clock
    _background_tasks = None
    _hub_of_channels = None
    _closing_listener = None  # has the socket until the loop's own thread closes it

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
        self._background_tasks = _BackgroundTasks(self._map)
        self.listen(self.listen_backlog)

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        """Do something with a message: to be overridden.

        `peer` is the client's address, a (host, port) pair for IPv4;
        `mailfrom` the reverse-path and `rcpttos` the list of forward-paths as
        the client gave them, without angle brackets ('<>' is the null path).
        `data` is the message, lines ended by LF, without the last line end:
        text if decode_data is true, else bytes.  Then `kwargs` has
        mail_options and rcpt_options, lists like ['BODY=8BITMIME',
        'SMTPUTF8'], and may have more one day.

        Return None for "250 OK", or another reply ("550 No such user"), of one
        or several lines.  If it raises, the client gets 451 and tries again.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------
    # Connections
    # ------------------------------------------------------------------

    def readable(self):
        self._loop_thread = threading.get_ident()
        now = time.monotonic()
        self._look_for_idle_sessions(now)
        return now >= self._accepts_again_at

    def writable(self):
        return False

    def accept(self):
        """asyncore's accept(); None, too, where the connection cannot be served now."""
        try:
            pair = asyncore.dispatcher.accept(self)
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            self._pause_accepting()
            return None
        if (pair is not None and not self._has_hub_for(self.channel_class)
                and _is_too_high_for_select(pair[0].fileno())):
            _refuse(pair[0])
            return None
        return pair

    def _pause_accepting(self):
        # The connection waits in the backlog, and select() would not wait for it.
        self.log_info('no resources to accept a connection: waiting a second', 'error')
        self._accepts_again_at = time.monotonic() + 1
        # No thread or no descriptor to be had either: the loop's next turn will do.
        with contextlib.suppress(RuntimeError, OSError):
            self._tasks_in_background().start(functools.partial(time.sleep, 1), _ignore)

    def _tasks_in_background(self):
        if self._background_tasks is None:
            self._background_tasks = _BackgroundTasks(self._map)
        return self._background_tasks

    def handle_accept(self):
        for _ in range(self.accepts_per_event):
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

    def handle_accepted(self, conn, addr):
        _debug('Incoming connection from %r', addr)
        arguments = (self, conn, addr, self.data_size_limit, self._map,
                     self.enable_SMTPUTF8, self._decode_data)
        self.channel_class(*arguments[:_positional_arguments(self.channel_class)])

    def _abandon_connection(self, connection):
        """Close a connection whose channel could not be made."""
        descriptor = connection.fileno()
        for channels in self._map, self._hub_channels():
            channel = channels.get(descriptor)
            if channel is not None and channel.socket is connection:
                channel.close()
        connection.close()

    log_info = _log_info

    def handle_error(self):
        """Write the traceback to the log; the listener lives on."""
        _log_exception(self)

    def close(self):
        """Stop listening; may be called from any thread.  Channels live on."""
        self.accepting = False
        if self._is_watched_by_another_thread():
            if self._closing_listener is None and self._fileno is not None:
                self._closing_listener = _ClosingListener(self)
                self._fileno = None
        else:
            if self._closing_listener is not None:
                self._closing_listener.close()
            asyncore.dispatcher.close(self)
        for each in list(self._map.values()):
            if isinstance(each, SMTPChannel) and each.smtp_server is self:
                each._watches_own_idleness = True
        tasks, self._background_tasks = self._background_tasks, None
        if tasks is not None:
            tasks.close_when_idle()

    def _is_watched_by_another_thread(self):
        return (self._loop_thread not in (None, threading.get_ident())
                and any(thread.ident == self._loop_thread for thread in threading.enumerate()))

    # ------------------------------------------------------------------
    # For the channels
    # ------------------------------------------------------------------

    def _own_name(self):
        if self._name_of_this_host is None:
            self._name_of_this_host = _getfqdn()  # may take seconds: once a server
        return self._name_of_this_host

    def _run_in_thread(self, call, take_outcome):
        self._tasks_in_background().start_at_most(self.process_message_threads, call, take_outcome)

    def _has_hub_for(self, channel_class):
        return self.channels_in_hub and _Hub.is_possible and _leaves_events_alone(channel_class)

    def _takes_into_hub(self, channel, map):
        if (not self._has_hub_for(type(channel))
                or (channel._map if map is None else map) is not self._map):
            return False
        if self._hub_of_channels is None:
            self._hub_of_channels = _Hub(self)
        return True

    def _hub_channels(self):
        return {} if self._hub_of_channels is None else self._hub_of_channels._channels

    def _look_for_idle_sessions(self, now):
        if now < self._next_look_for_idle:
            return
        self._next_look_for_idle = now + 1
        for each in [*self._map.values(), *self._hub_channels().values()]:
            if (isinstance(each, SMTPChannel) and each.smtp_server is self
                    and not each._watches_own_idleness):
                each._look_for_idleness(now)


def _leaves_events_alone(channel_class):
    return all(getattr(channel_class, name, None) is getattr(SMTPChannel, name)
               for name in ('readable', 'writable', 'handle_read_event',
                            'handle_write_event', 'handle_expt_event'))


class DebuggingServer(SMTPServer):
    """Prints each message to standard output.

    DebuggingServer(localaddr, remoteaddr): arguments as SMTPServer's.
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
    """print() that never raises, whatever stdout cannot encode or has become of it."""
    encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
    with contextlib.suppress(OSError, ValueError):
        print(text.encode(encoding, 'backslashreplace').decode(encoding))


def _host_of(peer):
    """The host of a socket address; AF_UNIX has but a path."""
    return str(peer[0]) if isinstance(peer, tuple) and peer else str(peer)


# ---------------------------------------------------------------------------
# The proxies
# ---------------------------------------------------------------------------

# What only proxies need: who receives has no use for the email package.  They import it
# before root becomes nobody, who may not be able to read the files.
_MODULES_OF_PROXIES = ('smtplib', 'encodings.idna', 'email.generator', 'email.message',
                       'email.mime.multipart', 'email.mime.text', 'email.utils')

_NULL_PATH = '<>'
_NOT_AVAILABLE = b'Upstream not available'
_TRACE_HEADER = re.compile(rb'^(?:received|x-peer)[ \t]*:', re.IGNORECASE | re.MULTILINE)


class PureProxy(SMTPServer):
    """Relays each message to `remoteaddr`; the upstream's answer is the client's.

    PureProxy(localaddr, remoteaddr): arguments as SMTPServer's, but that
    enable_SMTPUTF8 is refused with ValueError.  Listening on a public address
    makes an open relay.

    The client gets 451 while the upstream cannot be reached.  If it refuses
    some recipients and takes others, the reverse-path gets a delivery status
    notification (RFC 3464).

    Class attributes that may be overridden, besides SMTPServer's:

    process_message_threads   32; 0 in a subclass that overrides
                              process_message() or _deliver(), since its code
                              may not expect threads, unless it sets this too
    upstream_timeout_seconds  to wait for the upstream at each step (60)
    hop_limit                 trace headers that a message may have (25); a
                              message with more runs in circles: 554
    """

    process_message_threads = 32  # more than hop_limit: in a circle each hop needs one
    upstream_timeout_seconds = 60
    hop_limit = 25

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            return
        definer = next(base for base in cls.__mro__ if 'process_message_threads' in vars(base))
        is_ours = definer.__module__ == __name__
        if is_ours and (cls.process_message is not definer.process_message
                        or cls._deliver is not definer._deliver):
            cls.process_message_threads = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.enable_SMTPUTF8:
            self.close()
            raise ValueError('%s does not support SMTPUTF8.' % self.__class__.__name__)
        for name in _MODULES_OF_PROXIES:
            importlib.import_module(name)

    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        octets = _lf_lines(_as_octets(data))
        headers_end = _end_of_headers(octets)
        if len(_TRACE_HEADER.findall(octets, 0, headers_end)) >= self.hop_limit:
            return '554 Error: too many hops'
        peer_header = b'X-Peer: ' + _host_of(peer).encode('ascii', 'backslashreplace')
        if octets[-1:] == b'\n':
            octets += b'\n'  # or else _deliver() would take the last, empty line for a line end
        if headers_end < len(octets):
            peer_header += b'\n'
        elif octets:
            peer_header = b'\n' + peer_header
        headers = octets[:headers_end] + peer_header
        octets = headers + octets[headers_end:]
        if isinstance(data, str):
            data = octets.decode('utf-8', 'surrogateescape')
        else:
            data = octets
        refused = self._deliver(mailfrom, rcpttos, data)
        if not refused:
            return None
        if all(recipient in refused for recipient in rcpttos):
            return _reply_for_all(refused)
        if mailfrom != _NULL_PATH:
            try:
                self._notify(mailfrom, refused, headers)
            except Exception:  # the message is delivered: 451 would double it
                _log_exception(self)
        return None

    def _deliver(self, mailfrom, rcpttos, data):
        """Send a message upstream; return {recipient: (code, text)} of those refused."""
        import smtplib
        octets = _as_octets(data)
        return self._hand_over(smtplib.SMTP, self._remoteaddr,
                               lambda upstream: _transact(upstream, mailfrom, rcpttos, octets),
                               rcpttos)

    def _hand_over(self, client_class, address, dialogue, rcpttos):
        """dialogue(client)'s result; all recipients refused with 451 if it breaks off."""
        client = None
        try:
            client = client_class(*address, local_hostname=self._own_name(),
                                  timeout=self.upstream_timeout_seconds)
            client.sock.setsockopt(*_NO_DELAY)
            client.command_encoding = 'utf-8'  # paths go verbatim
            client.ehlo_or_helo_if_needed()
            result = dialogue(client)
            with contextlib.suppress(OSError):  # delivered is delivered
                client.putcmd('QUIT')  # its answer may take long (Postfix does not wait either)
            return result
        except OSError as error:  # SMTPException is one
            self.log_info('%s:%s: %s' % (*address, error), 'error')
            return dict.fromkeys(rcpttos, (451, _NOT_AVAILABLE))
        finally:
            if client is not None:
                client.close()

    def _notify(self, mailfrom, refused, headers):
        """Tell the sender which recipients did not get the message."""
        report = _delivery_status_notification(self._own_name(), mailfrom, refused, headers)
        lost = self._deliver(_NULL_PATH, [mailfrom], report)
        if lost:
            self.log_info('no delivery status notification for %s: %s' % (mailfrom, lost), 'error')


class MailmanProxy(PureProxy):
    """PureProxy that gives the addresses of Mailman 3's lists to Mailman.

    MailmanProxy(localaddr, remoteaddr): arguments as PureProxy's.

    Mailman's LMTP server is asked for each recipient; those that it takes are
    delivered to it, the others go to `remoteaddr`.  The client gets 451 while
    Mailman cannot be reached.

    Class attribute that may be overridden, besides PureProxy's:

    mailman_lmtp_address   (host, port), ('localhost', 8024) unless changed
    """

    process_message_threads = PureProxy.process_message_threads
    mailman_lmtp_address = ('localhost', 8024)  # Mailman's default

    def _deliver(self, mailfrom, rcpttos, data):
        """As PureProxy's; lists come last, so that no retry doubles a post."""
        import smtplib
        octets = _as_octets(data)
        lists = self._hand_over(smtplib.LMTP, self.mailman_lmtp_address,
                                lambda mailman: _known_recipients(mailman, mailfrom, rcpttos),
                                rcpttos)
        if isinstance(lists, dict):
            return lists
        others = [recipient for recipient in rcpttos if recipient not in lists]
        refused = super()._deliver(mailfrom, others, data) if others else {}
        if others and len(refused) == len(set(others)) and _reply_for_all(refused)[:1] == b'4':
            return dict.fromkeys(rcpttos, refused[others[0]])
        for each in dict.fromkeys(lists):
            refused.update(self._hand_over(
                smtplib.LMTP, self.mailman_lmtp_address,
                lambda mailman, each=each: _transact(mailman, mailfrom, [each], octets), [each]))
        return refused


def _as_octets(data):
    return data.encode('utf-8', 'surrogateescape') if isinstance(data, str) else data


def _lf_lines(octets):
    return _lf_for_crlf(octets).replace(b'\r', b'\n')


def _end_of_headers(octets):
    """Where the first empty line begins; the length if there is none."""
    if octets[:1] == b'\n':
        return 0
    return octets.find(b'\n\n') + 1 or len(octets)


def _transact(client, mailfrom, rcpttos, octets):
    """One mail transaction; returns {recipient: (code, text)} of those refused."""
    options = ''
    if not octets.isascii() and client.has_extn('8bitmime'):
        options = ' BODY=8BITMIME'
    reply = client.docmd('MAIL', 'FROM:%s%s' % (_in_brackets(mailfrom), options))
    if not _is_success(reply):
        return dict.fromkeys(rcpttos, reply)
    refused = {}
    accepted = []
    for recipient in dict.fromkeys(rcpttos):
        reply = client.docmd('RCPT', 'TO:' + _in_brackets(recipient))
        if _is_success(reply):
            accepted.append(recipient)
        else:
            refused[recipient] = reply
    if accepted:
        reply = _send_data(client, octets)
        if not _is_success(reply):
            refused.update(dict.fromkeys(accepted, reply))
    return refused


def _is_success(reply):
    return 200 <= reply[0] < 300  # RFC 5321, 4.3.2: by the first digit


def _send_data(client, octets):
    """The DATA command; returns the final reply."""
    # Not smtplib's data(): it leaves a bare CR, behind which a dot could end the message,
    # and takes a hundred times the memory of a message of short lines.
    reply = client.docmd('DATA')
    if reply[0] != 354:
        return reply if reply[0] >= 400 else (451, _NOT_AVAILABLE)
    octets = _lf_lines(octets).replace(b'\n', b'\r\n').replace(b'\r\n.', b'\r\n..')
    if octets[:1] == b'.':
        octets = b'.' + octets
    last = len(octets) // 65536 * 65536
    for start in range(0, last, 65536):  # the time limit holds for each piece
        client.send(octets[start:start + 65536])
    end = b'.\r\n' if octets.endswith(_END_OF_LINE) else _END_OF_DATA
    client.send(octets[last:] + end)
    return client.getreply()


def _known_recipients(mailman, mailfrom, rcpttos):
    """Those of the recipients that Mailman's LMTP server takes; raises if it cannot say."""
    import smtplib
    known = []
    code, text = mailman.docmd('MAIL', 'FROM:' + _in_brackets(mailfrom))
    if code != 250:
        raise smtplib.SMTPResponseException(code, text)
    for recipient in rcpttos:
        code, text = mailman.docmd('RCPT', 'TO:' + _in_brackets(recipient))
        if code == 250:
            known.append(recipient)
        elif not 500 <= code < 600:
            raise smtplib.SMTPResponseException(code, text)
    return known


def _in_brackets(path):
    return path if path == _NULL_PATH else '<%s>' % path


def _reply_for_all(refused):
    """One reply for all refused recipients: a "try again" if there is one, else the last."""
    replies = [_refusal(reply) for reply in refused.values()]
    code, text = next((reply for reply in replies if reply[0] < 500), replies[-1])
    return b'%d %s' % (code, _as_octets(text))


def _refusal(reply):
    """The reply, or a "try again" if it is none that may stand for a refusal."""
    return reply if 400 <= reply[0] < 600 else (451, _NOT_AVAILABLE)


def _one_line(code, text):
    text = _as_octets(text).decode('ascii', 'replace')
    return '%d %s' % (code, _printable(text.replace('\n', ' ')))


def _enhanced_status(reply):
    """RFC 3463's code out of a reply, or one made of its first digit."""
    match = re.match(r'[0-9]{3} ([45]\.[0-9]{1,3}\.[0-9]{1,3})\b', reply)
    return match[1] if match else reply[0] + '.0.0'


def _delivery_status_notification(reporter, mailfrom, refused, headers):
    """RFC 3464's report of what became of some recipients, as bytes."""
    import email.message
    import email.mime.multipart
    import email.mime.text
    import email.utils

    def fields(*pairs):
        part = email.message.Message()
        for name, value in pairs:
            part[name] = value
        return part

    replies = {recipient: _one_line(*_refusal(reply)) for recipient, reply in refused.items()}
    report = email.mime.multipart.MIMEMultipart('report', report_type='delivery-status')
    report['From'] = 'Mail Delivery System <MAILER-DAEMON@%s>' % reporter
    report['To'] = mailfrom
    report['Date'] = email.utils.formatdate()
    report['Message-ID'] = email.utils.make_msgid(domain=reporter)
    report['Subject'] = 'Undelivered mail returned to sender'
    report['Auto-Submitted'] = 'auto-replied'  # RFC 3834
    report.attach(email.mime.text.MIMEText(
        'Your message could not be delivered to:\n\n'
        + ''.join('<%s>: %s\n' % each for each in replies.items())))
    status = email.message.Message()
    status['Content-Type'] = 'message/delivery-status'
    status.set_payload([fields(('Reporting-MTA', 'dns; ' + reporter))] + [
        fields(('Final-Recipient', 'rfc822; ' + recipient), ('Action', 'failed'),
               ('Status', _enhanced_status(reply)), ('Diagnostic-Code', 'smtp; ' + reply))
        for recipient, reply in replies.items()])
    report.attach(status)
    report.attach(email.mime.text.MIMEText(
        headers.decode('utf-8', 'replace'), 'rfc822-headers',
        'us-ascii' if headers.isascii() else 'utf-8'))
    return report.as_bytes()


# ---------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------

_USAGE = """\
An RFC 5321 smtp proxy with optional RFC 1870 and RFC 6531 extensions.

Usage: %(program)s [options] [localhost:localport [remotehost:remoteport]]

    -n, --nosetuid    keep the user's identity; else, when port and address
                      are had, the process becomes the user `nobody', for
                      which it must have been started as root
    -c, --class NAME  the server's class: one of this module (%(classes)s)
                      or package.module.Class; %(default)s if not given
    -s, --size LIMIT  octets that a message may have; 0: no limit; %(size)d
                      if not given
    -u, --smtputf8    offer the SMTPUTF8 extension (RFC 6531)
    -d, --debug       print each dialogue to stderr
    -V, --version     print the version and exit
    -h, --help        print this and exit

Version: %(version)s

Listens on localhost:8025, and relays to localhost:25, unless told otherwise.
An IPv6 address stands in brackets: [::1]:8025.  Without a host (:8025) it
listens on all interfaces (IPv4).
"""


class Options:
    """What the command line says."""

    setuid = True
    classname = 'PureProxy'
    size_limit = None  # None: DATA_SIZE_DEFAULT
    enable_SMTPUTF8 = False


def usage(code, msg=''):
    """Print the message, or the usage if there is none, to stderr, and exit."""
    print(msg or _USAGE % {'program': program, 'version': __version__,
                           'classes': COMMASPACE.join(__all__[2:]),
                           'default': Options.classname, 'size': DATA_SIZE_DEFAULT},
          file=sys.stderr)
    sys.exit(code)


def parseargs():
    """Read sys.argv; returns an Options.  Exits with status 1 at a wrong argument."""
    global DEBUGSTREAM
    try:
        given, arguments = getopt.getopt(
            sys.argv[1:], 'nVhc:s:du',
            ['class=', 'nosetuid', 'version', 'help', 'size=', 'debug', 'smtputf8'])
    except getopt.error as error:
        usage(1, error)
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
                usage(1, 'Invalid size: ' + value)
    if len(arguments) > 2:
        usage(1, 'Invalid arguments: ' + COMMASPACE.join(arguments))
    local, remote = (arguments + ['localhost:8025', 'localhost:25'][len(arguments):])
    options.localhost, options.localport = _parse_address(local, 'local')
    options.remotehost, options.remoteport = _parse_address(remote, 'remote')
    return options


def _parse_address(text, which):
    host, colon, port = text.rpartition(':')
    if not colon:
        usage(1, 'Bad %s spec: %s' % (which, text))
    if host[:1] == '[' and host[-1:] == ']':
        host = host[1:-1]
    number = _natural_number(port)
    if number is None or number > 65535:
        usage(1, 'Bad %s port: %s' % (which, text))
    return host, number


def _natural_number(text):
    return int(text) if re.fullmatch('[0-9]{1,20}', text) else None


def _find_class(name):
    """The class of that name, from this module or package.module.Class."""
    module_name, _, class_name = name.rpartition('.')
    try:
        module = importlib.import_module(module_name or __name__)
    except (ImportError, TypeError) as error:  # TypeError: a name that begins with a dot
        usage(1, 'Cannot import %s: %s' % (module_name, error))
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or issubclass(found, asynchat.async_chat):
        usage(1, 'Unknown class: ' + name)
    return found


def _become_nobody():
    try:
        import pwd
    except ImportError:  # Windows
        usage(1, 'Cannot import module "pwd"; try running with -n option.')
    try:
        nobody = pwd.getpwnam('nobody')
        os.setgroups([])
        os.setgid(nobody.pw_gid)
        os.setuid(nobody.pw_uid)
    except (KeyError, PermissionError):
        usage(1, 'Cannot setuid "nobody"; try running with -n option.')


def _make_server(options):
    server_class = _find_class(options.classname)
    limit = DATA_SIZE_DEFAULT if options.size_limit is None else options.size_limit
    try:
        server = server_class((options.localhost, options.localport),
                              (options.remotehost, options.remoteport),
                              limit, enable_SMTPUTF8=options.enable_SMTPUTF8)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
        usage(1, '%s:%s: %s' % (options.localhost, options.localport,
                                getattr(error, 'strerror', None) or error))
    except ValueError as error:
        usage(1, error)
    except TypeError as error:  # other arguments: no server's class
        usage(1, '%s: %s' % (options.classname, error))
    return server


def _main():
    try:
        options = parseargs()
        server = _make_server(options)
        if isinstance(server, SMTPServer):
            server.channels_in_hub = True  # the socket map is ours
        if options.setuid:
            _become_nobody()
        # A second: Ctrl-C does not wake Windows' select(), nor a poll() that it just precedes.
        asyncore.loop(timeout=1, use_poll=True)
    except KeyboardInterrupt:
        pass
    finally:
        asyncore.close_all(ignore_all=True)
        try:
            sys.stdout.flush()
        except (AttributeError, ValueError):  # there is none, or it is closed
            pass
        except OSError:  # nobody reads it: keep the interpreter from trying again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
    sys.modules['smtpd'] = sys.modules['__main__']  # for what -c imports: one module, not two
    _main()
