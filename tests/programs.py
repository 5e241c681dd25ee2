"""An oracle over programs: the old smtpd module and ours run the same subclasses.

A *program* is plain data: the bodies of overridden methods as Python statements,
the options of the channel, and what the client does.  make_program(seed) invents
one; source_of(program) shows it as Python; run(program) gives its trace: what the
client got and when, which overridden methods were called with which arguments and
which state they saw, the messages, the log's errors, the socket map.
compare_programs.py compares two traces.  Programs run on a fake socket, in one thread, in a
loop of our own, so that a trace depends on nothing but the program and the module.
"""

import asyncio
import collections
import errno
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import warnings

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Breakpoint: 3.12. They are deprecated in 3.10 and 3.11.
    import asynchat
    import asyncore

PEER = ('192.0.2.1', 54321)
FQDN = 'mx.example'

# ---------------------------------------------------------------------------
# Programs as text
# ---------------------------------------------------------------------------

PARAMETERS = {  # of the methods that a program may override
    'push': 'msg',
    'send': 'data',
    'recv': 'buffer_size',
    'collect_incoming_data': 'data',
    'set_terminator': 'term',
    '_getaddr': 'arg',
    '_getparams': 'params',
    '__getattr__': 'name',
    'process_message': 'peer, mailfrom, rcpttos, data, **kwargs',
    '__init__': '*args, **kwargs',
}
NOT_NOTED = {  # how often these are called depends on how often the loop turns
    'readable', 'writable', '__init__'}


def parameters_of(name):
    return PARAMETERS.get(name, 'arg' if name.startswith('smtp_') else '')


def method_source(name, statements):
    parameters = parameters_of(name)
    lines = ['    def %s(%s):' % (name, ', '.join(filter(None, ['self', parameters])))]
    if name not in NOT_NOTED:
        noted = parameters.replace('**', '')
        lines.append('        note(self, %r%s)' % (name, ', ' + noted if noted else ''))
    for statement in statements:
        lines.extend('        ' + line for line in statement.split('\n'))
    if len(lines) == 1:
        lines.append('        pass')
    return '\n'.join(lines) + '\n'


def _class_source(name, base, attributes, methods):
    lines = ['class %s(%s):' % (name, base)]
    lines += ['    %s = %s' % each for each in sorted(attributes.items())]
    if attributes and methods:
        lines.append('')
    if not attributes and not methods:
        lines.append('    pass')
    return '\n'.join(lines) + '\n' + '\n'.join(
        method_source(*each) for each in sorted(methods.items()))


def source_of(program):
    """The classes of a program in Python."""
    return '\n\n'.join([
        _class_source('Channel', 'smtpd.SMTPChannel', program['attributes'], program['methods']),
        _class_source('Server', 'object', {}, {'process_message': [], **program['server']})])


def shown(program):
    """The whole program for a reader: classes, options, what the client does."""
    options = {name: value for name, value in program.items()
               if name not in ('attributes', 'methods', 'server', 'client')
               and value != EMPTY_PROGRAM[name]}
    lines = [source_of(program), '# options: %s' % (options or 'none'), '# the client:']
    lines += ['#   %s' % ' '.join(map(shortened, event)) for event in program['client']]
    return '\n'.join(lines)


EMPTY_PROGRAM = {
    'attributes': {},  # of the channel's class: {name: expression}
    'methods': {},  # of the channel's class: {name: [statement]}
    'server': {},  # methods of the server: {name: [statement]}
    'decode_data': False,
    'enable_SMTPUTF8': False,
    'data_size_limit': 33554432,
    # What the client does: ['feed', text], ['eof'], ['reset']
    'client': [],
}


# ---------------------------------------------------------------------------
# The world that a program runs in
# ---------------------------------------------------------------------------

class TimeUp(BaseException):
    """A program has run for too long."""


class Overflow(BaseException):
    """A program has done too much."""


MOST_EVENTS = 3000
MOST_TURNS = 300
SECONDS = 2.0
LEAVES_THE_LOOP = (Exception, KeyboardInterrupt, SystemExit, asyncio.CancelledError)

# What is noted of a channel's state, and what an attribute is that nobody has set yet: ours
# has them all from the start.
WATCHED = {
    'smtp_state': 0, 'seen_greeting': '', 'extended_smtp': False, 'mailfrom': None, 'rcpttos': [],
    'mail_options': [], 'rcpt_options': [], 'require_SMTPUTF8': False, 'received_data': '',
    'num_bytes': 0, 'received_lines': [], 'terminator': b'\r\n', 'ac_in_buffer': b'',
    'connected': False, 'data_size_limit': 33554432, 'fqdn': '', 'peer': None, 'addr': None,
    'producer_fifo': collections.deque()}
# Of the first of these the old module sets some later than ours.
SEEN_BY_METHODS = [name for name in WATCHED if name not in ('fqdn', 'peer', 'addr')]
# Where no hook is overridden, ours keeps data that is not whole yet in a form of its own.
SEEN_AT_REST = [name for name in WATCHED if name not in (
    'received_lines', 'num_bytes', 'ac_in_buffer', 'producer_fifo', 'connected')]


class FakeSocket:
    """The server's end of a connection whose client is world.act()."""

    family = socket.AF_INET
    descriptor = 7

    def __init__(self, world):
        self.world = world
        self.incoming = collections.deque()
        self.ended = None  # 'eof' or 'reset'
        self.is_open = True

    def can_recv(self):
        return bool(self.incoming or self.ended)

    def _check(self):
        if not self.is_open:
            raise OSError(errno.EBADF, 'closed')

    def recv(self, size, flags=0):
        self._check()
        if self.incoming:
            if flags & socket.MSG_PEEK:
                return self.incoming[0][:size]
            octets = self.incoming.popleft()
            if len(octets) > size:
                self.incoming.appendleft(octets[size:])
            return octets[:size]
        if self.ended == 'reset':
            raise ConnectionResetError(errno.ECONNRESET, 'reset')
        if self.ended:
            return b''
        raise BlockingIOError(errno.EAGAIN, 'nothing there')

    def send(self, octets, flags=0):
        self._check()
        octets = bytes(octets)
        if self.ended == 'reset':
            raise BrokenPipeError(errno.EPIPE, 'reset')
        self.world.add_text('sent', octets.decode('latin-1'))
        return len(octets)

    def fileno(self):
        return self.descriptor if self.is_open else -1

    def getpeername(self):
        self._check()
        return PEER

    def setblocking(self, *args):
        return 0

    setsockopt = getsockopt = setblocking

    def shutdown(self, how):
        pass

    def close(self):
        if self.is_open:
            self.is_open = False
            self.world.add('closed')


class Log:
    """In place of stdout and stderr: notes the exceptions that are logged."""

    encoding = 'utf-8'

    def __init__(self, world):
        self.world = world

    def write(self, text):
        name = exception_in(text)
        if name:
            self.world.add('error', name)

    def flush(self):
        pass


def exception_in(text):
    """The name of the exception that a line of the log is about, or None.

    The old module: "uncaptured python exception, closing channel <...> (<class 'X'>:...".
    Ours: a traceback.
    """
    match = re.search(r"uncaptured python exception, closing channel .* \(<class '(.*?)'>:", text)
    if match:
        name = match[1]
    elif 'Traceback (most recent call last)' in text:
        last = [line for line in text.rstrip().split('\n') if line[:1] not in ' |'][-1]
        name = last.partition(':')[0]
    else:
        return None
    missing = re.search(r"has no attribute '(\w+)'", text)
    return name.rpartition('.')[2] + (' ' + missing[1] if missing else '')


class Producer:
    """Gives pieces, for push_with_producer()."""

    def __init__(self, *pieces):
        self.pieces = list(pieces)

    def more(self):
        return self.pieces.pop(0) if self.pieces else b''


def shortened(value):
    text = repr(value)
    return text if len(text) < 300 else '%s...(%d)%s' % (text[:100], len(text), text[-40:])


class World:
    """One run of one program with one module."""

    def __init__(self, smtpd, program):
        self.smtpd = smtpd
        self.program = program
        self.trace = []
        self.seen_state = {name: state_text(name, value) for name, value in WATCHED.items()}
        self.counts = collections.Counter()
        self.is_over = False
        self.socket = FakeSocket(self)
        self.channel = None
        self.last_map = None

    # What is noted

    def add(self, *event):
        self.trace.append(list(event))
        if len(self.trace) > MOST_EVENTS:
            self.is_over = True
            raise Overflow

    def add_text(self, kind, text):
        if self.trace and self.trace[-1][0] == kind:
            self.trace[-1][1] += text
            if len(self.trace[-1][1]) > 100000:
                self.is_over = True
                raise Overflow
        else:
            self.add(kind, text)

    def note(self, thing, name, *args):
        """An overridden method was called: the state that it saw, and the arguments."""
        if isinstance(thing, self.smtpd.SMTPChannel):
            self.channel = thing
        if self.channel is not None:
            self.note_state(SEEN_BY_METHODS)
        if name == 'handle_error' and sys.exc_info()[1] is not None:
            args = [_name_of(sys.exc_info()[1])]
        self.add(name, *map(shortened, args))

    def note_state(self, names):
        changed = {}
        for name in names:
            try:
                value = object.__getattribute__(self.channel, name)
            except AttributeError:
                value = self.channel.COMMAND if name == 'smtp_state' else WATCHED[name]
            text = state_text(name, value)
            if self.seen_state.get(name) != text:
                self.seen_state[name] = changed[name] = text
        if changed:
            self.add('state', changed)

    def once(self, key, time=1):
        """True when it is asked about this key for the first time, or for the given one."""
        self.counts[key] += 1
        return self.counts[key] == time

    def replace(self, channel, name):
        """Override a method in the instance."""
        method = getattr(type(channel), name)

        def replacement(*args):
            self.note(channel, 'replaced ' + name, *args)
            return method(channel, *args)

        setattr(channel, name, replacement)

    # What happens

    def namespace(self):
        return {'smtpd': self.smtpd, 'asyncore': asyncore, 'asynchat': asynchat,
                'asyncio': asyncio, 'errno': errno, 'note': self.note, 'once': self.once,
                'replace': self.replace, 'Producer': Producer, 'world': self,
                '__name__': 'program'}

    def start(self):
        names = self.namespace()
        exec(compile(source_of(self.program), 'program', 'exec'), names)
        options = [self.program[name] for name in (
            'data_size_limit', 'enable_SMTPUTF8', 'decode_data')]
        options.insert(1, None)  # the map
        self.channel = names['Channel'](names['Server'](), self.socket, PEER, *options)

    def act(self, event):
        """Do what the client does next, and let the loop turn until all is quiet."""
        kind = event[0]
        if kind == 'feed':
            self.socket.incoming.append(event[1].encode('latin-1'))
        else:
            self.socket.ended = kind
        self.settle()

    def settle(self):
        for _ in range(MOST_TURNS):
            if self.is_over or not self.turn():
                break
        else:
            self.add('busy')
            self.is_over = True
        self.find_channel()
        if self.channel is not None and not self.is_over:
            self.note_state(SEEN_AT_REST)
        found = {str(key): type(value).__name__ for key, value in asyncore.socket_map.items()}
        if found != self.last_map:
            self.last_map = found
            self.add('map', found)

    def find_channel(self):
        for each in asyncore.socket_map.values():
            if isinstance(each, self.smtpd.SMTPChannel):
                self.channel = each

    def turn(self):
        """As asyncore.poll(): ask all, then read, then write.  False if nothing was ready."""
        reading, writing = [], []
        for descriptor, each in list(asyncore.socket_map.items()):
            wants = each.readable(), each.writable() and not each.accepting
            if not any(wants):
                continue
            if not self.socket.is_open or descriptor != self.socket.descriptor:
                raise OSError(errno.EBADF, 'select() would say')
            if wants[0] and self.socket.can_recv():
                reading.append(descriptor)
            if wants[1]:
                writing.append(descriptor)
        for action, ready in (asyncore.read, reading), (asyncore.write, writing):
            for descriptor in ready:
                if descriptor in asyncore.socket_map:
                    action(asyncore.socket_map[descriptor])
        return bool(reading or writing)

    def run(self):
        try:
            self.start()
            self.settle()
        except LEAVES_THE_LOOP as error:
            self.add('start raised', _name_of(error))
        self.find_channel()
        for number, event in enumerate(self.program['client']):
            self.add('client', number)
            try:
                self.act(event)
            except LEAVES_THE_LOOP as error:
                self.add('left the loop', _name_of(error))
                break
            if self.is_over:
                break


def _name_of(error):
    missing = re.search(r"has no attribute '(\w+)'", str(error))
    return type(error).__name__ + (' ' + missing[1] if missing else '')


def state_text(name, value):
    if value == ():  # the default of a channel whose __init__() has not run
        value = []
    if name == 'received_lines' and isinstance(value, list):
        value = _joined(value)
    elif name == 'producer_fifo' and isinstance(value, collections.deque):
        value = _queue(value)
    return shortened(value)


def _joined(pieces):
    try:
        return type(pieces[0])().join(pieces) if pieces else '(none)'
    except TypeError:
        return pieces


def _queue(pieces):
    text = b''
    others = []
    for piece in pieces:
        if isinstance(piece, bytes):
            text += piece
        else:
            others.append((len(text), None if piece is None else type(piece).__name__))
    return text, others


def _time_is_up(number, frame):
    raise TimeUp


class Runner:
    """Runs programs with a module, in this process."""

    def __init__(self, path=None):
        """The module of this file; without one the standard library's."""
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            standard = os.path.join(sysconfig.get_path('stdlib'), 'smtpd.py')
            self.smtpd = load_module(path or standard)
        socket.getfqdn = lambda *args: FQDN
        time.ctime = lambda *args: 'now'

    def run(self, program):
        """The trace of the program."""
        smtpd = self.smtpd
        asyncore.socket_map.clear()
        smtpd.SMTPChannel.command_size_limits.clear()  # the old module's are shared by all
        world = World(smtpd, program)
        streams = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = Log(world)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                return self._run_for_a_while(world)
        finally:
            sys.stdout, sys.stderr = streams
            asyncore.socket_map.clear()

    def _run_for_a_while(self, world):
        signal.signal(signal.SIGPROF, _time_is_up)
        signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.1)
        try:
            try:
                world.run()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except TimeUp:
            return [['hung']]
        except Overflow:
            pass
        if world.is_over and world.trace[-1] != ['busy']:
            world.trace.append(['busy'])
        return world.trace


def load_module(path):
    spec = importlib.util.spec_from_file_location('smtpd', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['smtpd'] = module
    spec.loader.exec_module(module)
    assert os.path.samefile(module.__file__, path)
    return module


def work(path):
    """Answer each line of stdin, a program or a range of seeds, with its traces."""
    runner = Runner(path)
    out = sys.stdout
    for line in sys.stdin:
        order = json.loads(line)
        programs = [order] if isinstance(order, dict) else map(make_program, range(*order))
        for program in programs:
            out.write(json.dumps(runner.run(program)) + '\n')
        out.flush()


class Worker:
    """Another Python that runs programs."""

    def __init__(self, python, path=None):
        """`python` with the module of this file, or its standard library's."""
        environment = {**os.environ}
        environment.pop('PYTHONUNBUFFERED', None)
        self.process = subprocess.Popen(
            [python, os.path.abspath(__file__), '--work', *([path] if path else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, order, answers=1):
        """Order a program, or the seeds from one to another; return an iterator of the lines."""
        self.process.stdin.write(json.dumps(order) + '\n')
        self.process.stdin.flush()
        return (self._line() for _ in range(answers))

    def _line(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError('the worker ended: %s' % (self.process.wait(),))
        return line

    def run(self, program):
        return json.loads(next(self.ask(program)))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


# ---------------------------------------------------------------------------
# Inventing programs
# ---------------------------------------------------------------------------

class Dice:
    """random.Random, of which only random() is the same in all Pythons."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def chance(self, probability):
        return self._random.random() < probability

    def number(self, low, high):
        return low + int(self._random.random() * (high - low + 1))

    def one_of(self, things):
        return things[int(self._random.random() * len(things))]


COMMANDS = ['smtp_HELO', 'smtp_EHLO', 'smtp_MAIL', 'smtp_RCPT', 'smtp_DATA', 'smtp_RSET',
            'smtp_NOOP', 'smtp_QUIT', 'smtp_VRFY', 'smtp_HELP', 'smtp_EXPN']
NEW_COMMANDS = ['smtp_XFOO', 'smtp_XBAR', 'smtp_AUTH', 'smtp_STARTTLS']

HOOKS = ['push', 'close', 'close_when_done', 'handle_close', 'handle_error', 'handle_read',
         'handle_write', 'handle_read_event', 'handle_write_event', 'readable', 'writable',
         'send', 'recv', 'initiate_send', 'collect_incoming_data', 'found_terminator',
         'get_terminator', 'set_terminator', '_getaddr', '_getparams',
         '_set_rset_state', '_set_post_data_state', '__getattr__']
OFTEN = ['push', 'push', 'found_terminator', 'found_terminator', 'collect_incoming_data',
         'handle_error', 'close', 'handle_close', 'close_when_done', '_set_rset_state']
RETURNS = {'readable', 'writable', 'send', 'recv', 'get_terminator', '_getaddr', '_getparams'}
ERRORS = ['Exception("x")', 'OSError("x")', 'OSError(errno.EPIPE, "x")', 'ValueError("x")',
          'MemoryError()', 'NotImplementedError()', 'asyncio.CancelledError()',
          'asyncore.ExitNow("x")', 'BlockingIOError(errno.EAGAIN, "x")', 'KeyError("x")',
          'ConnectionResetError(errno.ECONNRESET, "x")', 'AttributeError("x")', 'StopIteration()']

REPLIES = ["self.push('250 ok')", "self.push('250 ok')",
           "self.push('250-one')\nself.push('250 two')",
           "self.push('500 no')", "self.push('451 later')", "self.push('334 more')",
           "self.push('554 my own words')", "self.push('')",
           "asynchat.async_chat.push(self, b'250 asynchat\\r\\n')",
           "self.push_with_producer(asynchat.simple_producer(b'250 simple\\r\\n'))",
           "self.push_with_producer(Producer(b'250-a\\r\\n', b'250 b\\r\\n'))",
           "self.producer_fifo.append(b'250 queued\\r\\n')"]
ENDS = ['self.close()', 'self.close_when_done()', 'self.handle_close()', 'self.smtp_QUIT(0)',
        'self.smtp_QUIT(None)', 'self.socket.close()', 'self.conn.close()',
        'asynchat.async_chat.close(self)']
CALLS = ['self.smtp_NOOP(None)', 'self.smtp_RSET(None)', "self.smtp_EHLO('inner')",
         "self.smtp_MAIL('FROM:<in@x>')", "self.smtp_RCPT('TO:<in@x>')", 'self.smtp_DATA(None)',
         'self.initiate_send()', 'self.discard_buffers()',
         'self._set_rset_state()', 'self._set_post_data_state()', 'self.found_terminator()',
         'self.handle_read()',
         'asynchat.async_chat.__init__(self, self.conn, self._map)',
         'asynchat.async_chat.__init__(self, self.conn)',
         'self.__init__(self.smtp_server, self.conn, self.addr)',
         'self.set_socket(self.conn)', 'self.set_socket(self.conn, self._map)',
         'self.add_channel()', "self._strip_command_keyword('FROM:', 'FROM: <x@y>')",
         "self.smtp_server.process_message(self.peer, self.mailfrom, self.rcpttos, b'by hand')"]
SETTINGS = ["self.set_terminator(b'\\n')", "self.set_terminator(b'\\r\\n')",
            'self.set_terminator(5)', 'self.set_terminator(None)',
            "self.set_terminator(b'')", 'self.set_terminator(0)',
            "self.set_terminator(b'\\r\\n.\\r\\n')", "self.terminator = b'XX'",
            "self.terminator = 'XX'", 'self.terminator = 3', 'self.terminator = None',
            'self.ac_in_buffer_size = 5', 'self.ac_out_buffer_size = 5',
            'self.smtp_state = 99', "self.smtp_state = 'AUTH'",
            'self.smtp_state = self.COMMAND', 'self.smtp_state = None',
            'self.data_size_limit = None', 'self.data_size_limit = 0', 'self.num_bytes = 0',
            "self.seen_greeting = ''", 'self.extended_smtp = True', "self.mailfrom = 'set@x'",
            'self.mailfrom = None', "self.rcpttos = ['set@x']", "self.rcpttos.append('more@x')",
            'self.rcpttos = []', "self.fqdn = 'set.example'", "self.received_data = 'set'",
            "self.peer = 'set'", "self.ac_in_buffer = b''",
            'self._SMTPChannel__state = 0', 'self._SMTPChannel__mailfrom = None',
            "replace(self, 'push')", "replace(self, 'found_terminator')",
            "replace(self, 'close')",
            "replace(self, 'handle_error')", "replace(self, 'send')", "replace(self, 'smtp_NOOP')",
            "replace(self, 'handle_close')", "replace(self, 'close_when_done')",
            "replace(self, 'smtp_XFOO')", "replace(self, 'get_terminator')",
            "replace(self, '_set_post_data_state')"]

COPIED_INIT = '''\
server, conn, addr, data_size_limit, map, enable_SMTPUTF8, decode_data = args
asynchat.async_chat.__init__(self, conn, map=map)
self.smtp_server = server
self.conn = conn
self.addr = addr
self.data_size_limit = data_size_limit
self.enable_SMTPUTF8 = enable_SMTPUTF8
self._decode_data = decode_data
if decode_data:
    self._emptystring, self._linesep, self._dotsep, self._newline = '', '\\r\\n', '.', '\\n'
else:
    self._emptystring, self._linesep, self._newline = b'', b'\\r\\n', b'\\n'
    self._dotsep = ord(b'.')
self._set_rset_state()
self.seen_greeting = ''
self.extended_smtp = False
self.fqdn = 'copied.example'
self.peer = conn.getpeername()
self.push('220 copied.example ready')
self.set_terminator(b'\\r\\n')'''

COPIED_FOUND_TERMINATOR = '''\
line = self._emptystring.join(self.received_lines)
self.received_lines = []
if self.smtp_state == self.COMMAND:
    self.num_bytes = 0
    text = line if isinstance(line, str) else line.decode()
    verb, _, arg = text.partition(' ')
    method = getattr(self, 'smtp_' + verb.upper(), None) if verb else None
    if not method:
        self.push('500 my own words')
        return
    method(arg.strip() or None)
elif self.smtp_state == self.DATA:
    lines = line.split(self._linesep)
    lines = [each[1:] if each[:1] and each[0] == self._dotsep else each for each in lines]
    self.received_data = self._newline.join(lines)
    status = self.smtp_server.process_message(
        self.peer, self.mailfrom, self.rcpttos, self.received_data)
    self._set_post_data_state()
    self.push(status or '250 mine')
else:
    self.push('451 my own state')'''

OWN_DIALOGUE = '''\
if self.smtp_state == 99:
    line = self._emptystring.join(self.received_lines)
    self.received_lines = []
    self.smtp_state = self.COMMAND
    self.push('235 %d' % len(line))
    return'''

SPECIAL_METHODS = {  # whole bodies that programs have
    'push': ["{base}\nif msg[:1] == '5':\n    self.close()", "if msg[:3] != '250':\n    {base}",
             "{base}\nif msg[:3] == '354':\n    self.set_terminator(b'\\r\\n.\\r\\n')",
             "{base}\nif msg[:1] == '5':\n    self.close_when_done()",
             "asynchat.async_chat.push(self, msg.encode() + b'\\r\\n')",
             "smtpd.SMTPChannel.push(self, msg.upper())"],
    'handle_error': ["self.push('554 my own words')", "self.push('421 x')\nself.close_when_done()",
                     'self.close()', 'raise', 'pass', "self.push('451 x')\n{base}",
                     'self.handle_close()'],
    'found_terminator': [COPIED_FOUND_TERMINATOR, COPIED_FOUND_TERMINATOR,
                         OWN_DIALOGUE + '\n{base}', OWN_DIALOGUE + '\n{base}',
                         "if not self.received_lines:\n    self.push('500 empty')\n"
                         '    return\n{base}'],
    'collect_incoming_data': ['self.received_lines.append(data)', '{base}\nself.num_bytes = 0',
                              'self.received_lines.append(data.decode())'],
    'readable': ['return not self.producer_fifo',
                 'return len(self.ac_in_buffer) < 10', 'return self.connected and {call}'],
    'writable': ['return bool(self.producer_fifo)', 'return {call}', 'return 1'],
    'recv': ['return self.socket.recv(7)', 'return {call}', 'data = {call}\nreturn data.upper()'],
    'send': ['return self.socket.send(data)', '{call}\nreturn None', 'return {call}'],
    'get_terminator': ['return self.terminator', 'return {call}',
                       'return None', 'return 40', 'return 0'],
    'handle_close': ['pass', 'self.close()', "self.push('421 bye')\n{base}"],
    'close': ['{base}', "self.push('421 closing')\n{base}", 'asynchat.async_chat.close(self)'],
    '_set_rset_state': ['{base}\nself.mine = []', 'self.mine = []\n{base}', 'self.mine = []'],
    '_set_post_data_state': ['{base}\nself.mine = []', '{base}'],
    '_getaddr': ["return arg.strip('<>'), ''", 'return {call}'],
    '_getparams': ['return {{}}', 'return None', 'return {call}'],
    '__getattr__': ['raise AttributeError(name)',
                    "if name.startswith('smtp_'):\n    return lambda arg: self.push('250 any')\n"
                    'raise AttributeError(name)',
                    "self.push('500 unknown ' + name)\nself.close_when_done()\n"
                    'raise AttributeError(name)'],
    'smtp_AUTH': ["self.smtp_state = 99\nself.push('334 go on')",
                  "self.smtp_state = 99\nself.set_terminator(b'\\r\\n')\nself.push('334 go on')"],
    'smtp_STARTTLS': ["self.push('220 ready')\n"
                      'asynchat.async_chat.__init__(self, self.conn, self._map)',
                      "self.push('220 ready')\nself.set_socket(self.conn)\n"
                      'asynchat.async_chat.__init__(self, self.conn, self._map)\n'
                      "self.seen_greeting = ''\nself._set_rset_state()",
                      "self.push('220 ready')\n"
                      'self.__init__(self.smtp_server, self.conn, self.addr)'],
    'smtp_XFOO': ["self.smtp_QUIT(0)\nself.push('500 not sent')",
                  "self.push('250 %r' % self.mine)",
                  "self.push('250 ok')\nraise ValueError('x')"],
    'smtp_EHLO': ["{base}\nself.push('250 MORE')", "self.seen_greeting = arg\n"
                  "self.extended_smtp = True\nself.push('250-own')\nself.push('250 AUTH PLAIN')"],
}

HANDLER_BODIES = [
    'return None', "return '250 fine'", "return '550 no'", "return ''", "return '554: Rejected'",
    "return '550\\tno'", 'return 0', 'return False', "return '250'", "raise ValueError('x')",
    'raise NotImplementedError', 'raise MemoryError', 'raise asyncore.ExitNow("x")',
    "raise OSError(errno.EPIPE, 'x')", 'world.channel.close()', 'world.channel.close_when_done()',
    "world.channel.push('250 early')", "world.channel.push('250 early')\nraise ValueError('x')",
    "return '421 bye'", 'world.channel.handle_close()',
    "rcpttos.append('changed@x')\nreturn '250 changed'",
    "world.channel.smtp_QUIT(0)\nreturn '550 after QUIT'", 'raise asyncio.CancelledError']

ATTRIBUTES = [
    ('ac_in_buffer_size', '5'), ('ac_in_buffer_size', '1'), ('ac_out_buffer_size', '5'),
    ('mine', '[]'), ('use_encoding', '1'),
    ('ignore_log_types', '()'), ('debug', 'True'), ('COMMAND', '5'), ('DATA', "'data'"),
    ('smtp_NOOP', 'smtpd.SMTPChannel.smtp_RSET'), ('smtp_XFOO', 'smtpd.SMTPChannel.smtp_NOOP'),
    ('smtp_VRFY', 'None'), ('push_lines', 'smtpd.SMTPChannel.push')]


def base_call(name, dice):
    arguments = parameters_of(name)
    if dice.chance(.7):
        return 'super().%s(%s)' % (name, arguments)
    return 'smtpd.SMTPChannel.%s(%s)' % (name, ', '.join(filter(None, ['self', arguments])))


def an_action(dice):
    kind = dice.number(0, 19)
    if kind < 6:
        return dice.one_of(REPLIES)
    if kind < 8:
        return dice.one_of(ENDS)
    if kind < 11:
        return dice.one_of(CALLS)
    if kind < 17:
        return dice.one_of(SETTINGS)
    return 'raise ' + dice.one_of(ERRORS)


def guarded(action, name, number, dice):
    """The action at one call only: else many would call each other without an end."""
    condition = 'if once(%r, %d):' % ('%s %d' % (name, number), dice.one_of([1, 1, 1, 2, 2, 3, 5]))
    return condition + '\n    ' + action.replace('\n', '\n    ')


def command_body(name, dice):
    if name in SPECIAL_METHODS and dice.chance(.4):
        return [dice.one_of(SPECIAL_METHODS[name]).format(base=base_call(name, dice), call='')]
    body = []
    if name in COMMANDS:
        if dice.chance(.8):
            body.append(base_call(name, dice))
    elif dice.chance(.8):
        body.append(dice.one_of(REPLIES[:8]))
    for number in range(dice.one_of([0, 1, 1, 1, 2, 2, 3])):
        action = an_action(dice)
        if re.search(r'smtp_|__init__|found_terminator|handle_|close', action):
            action = guarded(action, name, number, dice)
        body.insert(dice.number(0, len(body)), action)
    return body


UNUSUAL = {  # what no program does in these methods
    'collect_incoming_data': '__init__|ac_in_buffer |QUIT|close',  # asynchat goes on with a copy
    'get_terminator': '__init__|ac_in_buffer |QUIT|close',
    'push': 'raise',  # nobody could tell which command has no reply
    'send': 'raise|push',
    'set_terminator': 'raise',
    '_set_rset_state': 'raise|smtp_|push|extended',
    '_set_post_data_state': 'raise|smtp_|push|process_message'}


def hook_body(name, dice, number=0):
    call = ('super().%s(%s)' if name == '__getattr__' else '%s') % (
        (name, 'name') if name == '__getattr__' else base_call(name, dice))
    actions = [guarded(an_action(dice), name, each + 10 * number, dice)
               for each in range(dice.one_of([0, 0, 1, 1, 1, 2]))]
    unusual = UNUSUAL.get(name, '__init__' if name in RETURNS else None)
    actions = [action for action in actions if not unusual or not re.search(unusual, action)]
    if name in SPECIAL_METHODS and (dice.chance(.5) or name == '__getattr__'):
        body = dice.one_of(SPECIAL_METHODS[name]).format(base=call, call=call)
        return [body] if name == '__getattr__' or dice.chance(.7) else [*actions[:1], body]
    # After it the session may be over, and ours closes it at once.
    place = len(actions) if name.startswith('handle_read') else dice.number(0, len(actions))
    if dice.chance(.07) and not name.startswith('handle_write'):
        return actions
    if name in RETURNS:
        return [*actions[:place], 'result = ' + call, *actions[place:], 'return result']
    return [*actions[:place], call, *actions[place:]]


def make_program(seed):
    """Invent a program; the same one for the same seed, on all Pythons."""
    dice = Dice(seed)
    program = {**EMPTY_PROGRAM, 'attributes': {}, 'methods': {}, 'server': {}, 'client': []}
    methods = program['methods']
    program['decode_data'] = dice.chance(.35)
    if not program['decode_data']:
        program['enable_SMTPUTF8'] = dice.chance(.12)
    if dice.chance(.08):
        program['data_size_limit'] = dice.one_of([None, 0])
    for _ in range(dice.one_of([0, 1, 1, 1, 2, 3])):
        name = dice.one_of(COMMANDS if dice.chance(.4) else NEW_COMMANDS)
        methods[name] = command_body(name, dice)
    if dice.chance(.75):
        for number in range(dice.one_of([1, 1, 1, 2, 2, 3])):
            name = dice.one_of(OFTEN if dice.chance(.5) else HOOKS)
            methods[name] = hook_body(name, dice, number)
    _add_rarer_things(program, dice)
    program['client'] = a_client(program, dice)
    return program


def _add_rarer_things(program, dice):
    if dice.chance(.12):
        program['attributes'] = dict(
            dice.one_of(ATTRIBUTES) for _ in range(dice.one_of([1, 1, 2])))
    if dice.chance(.15):
        program['methods']['__init__'] = an_init(dice)
    if dice.chance(.35):
        program['server']['process_message'] = [dice.one_of(HANDLER_BODIES)]


def an_init(dice):
    if dice.chance(.2):
        return [COPIED_INIT]
    call = dice.one_of(['super().__init__(*args, **kwargs)',
                        'smtpd.SMTPChannel.__init__(self, *args, **kwargs)'])
    body = [call]
    for number in range(dice.one_of([1, 1, 2])):
        action = guarded(an_action(dice), '__init__', number, dice).replace(', 5)', ', 1)')
        body.insert(dice.number(0, len(body)) if dice.chance(.3) else len(body), action)
    return body


MESSAGES = ['Subject: x\r\n\r\nbody\r\n.\r\n', 'one line\r\n.\r\n', 'x\r\n..dot\r\n.\r\n',
            '\r\n.\r\n', 'a' * 120 + '\r\n' + 'b' * 30 + '\r\n.\r\n']
USUAL = ['NOOP', 'RSET', 'HELP', 'VRFY a@b', 'EXPN x', 'QUIT', 'BAD', 'MAIL FROM:<m@x>',
         'RCPT TO:<r@x>', 'DATA', 'HELO h', 'EHLO e', 'noop', 'NOOP x', 'HELP MAIL', 'RCPT bad',
         'MAIL FROM:<m@x> SIZE=10', 'XUNKNOWN']


def some_lines(program, dice):
    own = [name[5:] for name in program['methods'] if name.startswith('smtp_')]
    lines = []
    if dice.chance(.8):
        lines.append(dice.one_of(['EHLO client', 'EHLO client', 'HELO client']))
    for _ in range(dice.number(1, 5)):
        kind = dice.number(0, 9)
        if kind < 4 and own:
            verb = dice.one_of(own)
            lines.append(verb + {'MAIL': ' FROM:<m@x>', 'RCPT': ' TO:<r@x>', 'EHLO': ' again',
                                 'HELO': ' again', 'VRFY': ' a@b'}.get(verb, '')
                         + dice.one_of(['', '', '', ' word']))
        elif kind < 7:
            lines.extend(a_transaction(dice))
        elif kind < 9:
            lines.append(dice.one_of(USUAL))
        else:
            lines.append(dice.one_of(['', 'x' * 600, 'y' * 1500, 'NOOP', 'dXNlcg==', '*']))
    if dice.chance(.3):
        lines.append('NOOP')
    if dice.chance(.3):
        lines.append('QUIT')
    return lines


def a_transaction(dice):
    lines = ['MAIL FROM:<m@x>', 'RCPT TO:<r@x>']
    if dice.chance(.2):
        lines.append('RCPT TO:<s@x>')
    lines.append('DATA')
    message = dice.one_of(MESSAGES)
    return [*lines, message[:-2]]


def a_client(program, dice):
    """What the client does: feeds, in pieces; then it closes, resets or waits."""
    lines = [line + '\r\n' for line in some_lines(program, dice)]
    pieces = dice.one_of([lines, [''.join(lines)], cut(''.join(lines), dice)])
    events = [['feed', piece] for piece in pieces if piece]
    if dice.chance(.5):
        end = dice.one_of(['eof', 'eof', 'reset'])
        events.insert(dice.number(1, len(events)) if dice.chance(.15) else len(events), [end])
        if dice.chance(.3) and end == 'eof':
            events.append(['reset'])
    return events


def cut(text, dice):
    places = sorted({0, len(text), *(dice.number(0, len(text)) for _ in range(dice.number(1, 6)))})
    return [text[start:end] for start, end in zip(places, places[1:])]


if __name__ == '__main__':
    if sys.argv[1:2] != ['--work']:
        sys.exit('Run: python -m tests.tools.oracle --help')
    work(sys.argv[2] if sys.argv[2:] else None)
