"""An oracle over programs: the old smtpd module and ours run the same subclasses.

A *program* is plain data: the bodies of overridden methods as Python statements,
the options of the channel, and what the client does.  make_program(seed) invents
one; source_of(program) shows it as Python; run(program) gives its trace: what the
client got and when, which overridden methods were called with which arguments and
which state they saw, the messages, the log's errors, the debugging output, the
socket map.  judge() compares two traces; what may differ stands in the table ALLOWED.
Programs run on a fake socket, in one thread, in a loop of our own, so that a trace
depends on nothing but the program and the module.

    python tests/programs.py --seeds 1000:21000 --old python3.11 --new python3.13

runs the old module of one Python against the smtpd.py of this checkout on another (which
needs asyncore and asynchat: name a virtual environment's), shrinks what differs and is
not allowed, and prints it.
"""

import argparse
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
import typing
import warnings

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Breakpoint: 3.12. They are deprecated in 3.10 and 3.11.
    import asynchat
    import asyncore

HERE = os.path.dirname(os.path.abspath(__file__))
OUR_MODULE = os.path.join(os.path.dirname(HERE), 'smtpd.py')
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
    'log_info': "message, type='info'",
    '_getaddr': 'arg',
    '_getparams': 'params',
    '_strip_command_keyword': 'keyword, arg',
    '__getattr__': 'name',
    'process_message': 'peer, mailfrom, rcpttos, data, **kwargs',
    'handle_accepted': 'conn, addr',
    '__init__': '*args, **kwargs',
}
NOT_NOTED = {  # how often these are called depends on how often the loop turns
    'readable', 'writable', '__init__'}


def parameters_of(name):
    return PARAMETERS.get(name, 'arg' if name.startswith('smtp_') else '')


def arguments_of(name):
    return parameters_of(name).replace("='info'", '')


def _method_source(name, statements):
    parameters = parameters_of(name)
    lines = ['    def %s(%s):' % (name, ', '.join(filter(None, ['self', parameters])))]
    if name not in NOT_NOTED:
        noted = arguments_of(name).replace('**', '')
        lines.append('        note(self, %r%s)' % (name, ', ' + noted if noted else ''))
    for statement in statements:
        lines.extend('        ' + line for line in statement.split('\n'))
    if len(lines) == 1:
        lines.append('        pass')
    return '\n'.join(lines) + '\n'


def _class_source(name, bases, attributes, methods):
    lines = ['class %s(%s):' % (name, ', '.join(bases))]
    lines += ['    %s = %s' % each for each in sorted(attributes.items())]
    if attributes and methods:
        lines.append('')
    if not attributes and not methods:
        lines.append('    pass')
    return '\n'.join(lines) + '\n' + '\n'.join(
        _method_source(*each) for each in sorted(methods.items()))


def source_of(program):
    """The classes of a program in Python."""
    classes = []
    bases = ['smtpd.SMTPChannel']
    for name, mixin in (('Before', program.get('before')), ('After', program.get('after'))):
        if mixin:
            classes.append(_class_source(name, [mixin['base']], {}, mixin['methods']))
            bases.insert(0 if name == 'Before' else len(bases), name)
    classes.append(_class_source('Channel', bases, program['attributes'], program['methods']))
    base = 'smtpd.SMTPServer' if program['listens'] else 'StubServer'
    methods = dict(program['server'])
    methods.setdefault('process_message', [])
    classes.append(_class_source('Server', [base], {'channel_class': 'Channel'}, methods))
    return '\n\n'.join(classes)


def shown(program):
    """The whole program for a reader: classes, options, what the client does."""
    options = {name: value for name, value in program.items()
               if name not in ('before', 'after', 'attributes', 'methods', 'server', 'client')
               and value != EMPTY_PROGRAM[name]}
    lines = [source_of(program), '# options: %s' % (options or 'none'), '# the client:']
    lines += ['#   %s' % ' '.join(map(shortened, event)) for event in program['client']]
    return '\n'.join(lines)


EMPTY_PROGRAM = {
    'attributes': {},  # of the channel's class: {name: expression}
    'methods': {},  # of the channel's class: {name: [statement]}
    'before': None,  # a mixin before SMTPChannel in the bases: {'base': name, 'methods': ...}
    'after': None,  # one after it
    'server': {},  # methods of the server: {name: [statement]}
    'patched': None,  # 'asyncore.dispatcher.log_info': a method patched in its class
    'listens': False,  # the server is an SMTPServer on a listening socket; else a stub
    'decode_data': False,
    'enable_SMTPUTF8': False,
    'data_size_limit': 33554432,
    'own_map': True,
    'debug': False,  # DEBUGSTREAM is set from the start
    'room': None,  # octets that the socket takes before the client reads; None: all
    'most': None,  # octets that the socket takes in one turn of the loop; None: all
    'fails': None,  # [octets, errno]: send() raises OSError after so many
    # What the client does: ['feed', text], ['eof'], ['reset'], ['room', octets]
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
# asynchat takes a piece out of the buffer after collect_incoming_data(), we do before.
SEEN_WHILE_COLLECTING = [name for name in SEEN_BY_METHODS if name != 'ac_in_buffer']
# Where no hook is overridden, ours keeps what is not whole yet in a form of its own.
SEEN_AT_REST = [name for name in WATCHED if name not in (
    'received_lines', 'num_bytes', 'ac_in_buffer', 'producer_fifo', 'connected')]


class FakeSocket:
    """The server's end of a connection whose client is world.act()."""

    family = socket.AF_INET

    def __init__(self, world, descriptor):
        self.world = world
        self.descriptor = descriptor
        self.incoming = collections.deque()
        self.ended = None  # 'eof' or 'reset'
        self.octets_sent = 0
        self.is_open = True

    def can_recv(self):
        return bool(self.incoming or self.ended)

    def can_send(self):
        room = self.world.room
        return (room is None or self.octets_sent < room or self.ended == 'reset'
                or self.world.only_the_end_waits())

    def _check(self):
        if not self.is_open:
            raise OSError(errno.EBADF, 'closed')

    def recv(self, size, flags=0):
        self._check()
        if flags & socket.MSG_OOB:
            raise OSError(errno.EINVAL, 'no such octet')
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
        fails = self.world.program['fails']
        if fails and self.octets_sent >= fails[0]:
            raise OSError(fails[1], 'this one fails')
        room = min((limit for limit in (self.world.room, self.world.room_this_turn,
                                        fails and fails[0]) if limit is not None), default=None)
        if room is not None:
            if self.octets_sent >= room:
                raise BlockingIOError(errno.EAGAIN, 'full')
            octets = octets[:room - self.octets_sent]
        self.octets_sent += len(octets)
        self.world.add_text('sent', octets.decode('latin-1'))
        return len(octets)

    def sendall(self, octets):
        self.send(octets)

    def fileno(self):
        return self.descriptor if self.is_open else -1

    def getpeername(self):
        self._check()
        return PEER

    def setblocking(self, flag):
        pass

    def setsockopt(self, *args):
        pass

    def getsockopt(self, *args):
        return 0

    def shutdown(self, how):
        pass

    def close(self):
        if self.is_open:
            self.is_open = False
            self.world.add('closed')


class FakeListener(FakeSocket):
    """A listening socket with one client in its backlog."""

    def can_recv(self):
        return bool(self.incoming)

    def can_send(self):
        return False

    def accept(self):
        self._check()
        if not self.incoming:
            raise BlockingIOError(errno.EAGAIN, 'nobody there')
        return self.incoming.popleft(), PEER

    def bind(self, address):
        pass

    def listen(self, backlog):
        pass

    def close(self):
        self.is_open = False


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


class Stream:
    """A DEBUGSTREAM."""

    def __init__(self, world):
        self.world = world

    def write(self, text):
        self.world.add_text('debug', text)

    def flush(self):
        pass


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
        self.seen_state = {name: _state_text(name, value) for name, value in WATCHED.items()}
        self.counts = collections.Counter()
        self.room = program['room']
        self.room_this_turn = program['most']
        self.is_over = False
        self.map = {} if program['own_map'] else asyncore.socket_map
        self.socket = FakeSocket(self, 7)
        self.listener = FakeListener(self, 8)
        self.sockets = {7: self.socket, 8: self.listener}
        self.channel = None
        self.last_map = None
        self.undo = None  # takes the patch away again

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
        if self.channel is not None and not name.startswith('patched '):
            collects = name.endswith('collect_incoming_data') or _is_collecting()
            self.note_state(SEEN_WHILE_COLLECTING if collects else SEEN_BY_METHODS)
        if name == 'handle_error' and sys.exc_info()[1] is not None:
            args = [_name_of(sys.exc_info()[1])]
        elif name == 'log_info':
            args = [exception_in(str(args[0])) or 'no exception', *args[1:]]
        self.add(name, *map(shortened, args))

    def note_state(self, names):
        changed = {}
        for name in names:
            try:
                value = object.__getattribute__(self.channel, name)
            except AttributeError:
                value = self.channel.COMMAND if name == 'smtp_state' else WATCHED[name]
            text = _state_text(name, value)
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

    def patch(self, path):
        """Put a method that is noted in place of one of asyncore or asynchat."""
        module, class_name, name = path.split('.')
        owner = getattr({'asyncore': asyncore, 'asynchat': asynchat}[module], class_name)
        method = getattr(owner, name)

        def patched(thing, *args, **kwargs):
            if isinstance(thing, self.smtpd.SMTPChannel):
                self.note(thing, 'log_info' if name == 'log_info' else 'patched ' + name, *args)
            return method(thing, *args, **kwargs)

        setattr(owner, name, patched)
        self.undo = lambda: setattr(owner, name, method)

    # What happens

    def namespace(self):
        smtpd, listener = self.smtpd, self.listener

        class ListeningServer(smtpd.SMTPServer):
            def create_socket(self, *args):
                self.set_socket(listener)

        class ModuleForPrograms:
            """The module, but that its server listens on the fake socket."""

            SMTPServer = ListeningServer

            def __getattr__(self, name):
                return getattr(smtpd, name)

            def __setattr__(self, name, value):
                setattr(smtpd, name, value)

        return {'smtpd': ModuleForPrograms(), 'asyncore': asyncore, 'asynchat': asynchat,
                'asyncio': asyncio, 'errno': errno, 'note': self.note, 'once': self.once,
                'replace': self.replace, 'stream': Stream(self), 'Producer': Producer,
                'StubServer': object, 'world': self, '__name__': 'program'}

    def start(self):
        names = self.namespace()
        exec(compile(source_of(self.program), 'program', 'exec'), names)
        if self.program['patched']:
            self.patch(self.program['patched'])
        options = [self.program['data_size_limit'], None if self.map is asyncore.socket_map
                   else self.map, self.program['enable_SMTPUTF8'], self.program['decode_data']]
        if self.program['debug']:
            self.smtpd.DEBUGSTREAM = names['stream']
        if self.program['listens']:
            self.server = names['Server'](('127.0.0.1', 0), None, *options)
            self.listener.incoming.append(self.socket)
        else:
            self.server = names['Server']()
            self.channel = names['Channel'](self.server, self.socket, PEER, *options)

    def act(self, event):
        """Do what the client does next, and let the loop turn until all is quiet."""
        kind = event[0]
        if kind == 'feed':
            self.socket.incoming.append(event[1].encode('latin-1'))
        elif kind == 'room':
            if self.room is not None:
                self.room += event[1]
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
        found = {str(key): type(value).__name__ for map in self.maps()
                 for key, value in map.items()}
        if found != self.last_map:
            self.last_map = found
            self.add('map', found)

    def find_channel(self):
        for map in self.maps():
            for each in map.values():
                if isinstance(each, self.smtpd.SMTPChannel):
                    self.channel = each

    def only_the_end_waits(self):
        # Neither needs room, and a real socket hardly ever is full to the last octet.
        queue = getattr(self.channel, 'producer_fifo', None)
        return bool(queue) and not queue[0]

    def maps(self):
        return [self.map] if self.map is asyncore.socket_map else [self.map, asyncore.socket_map]

    def turn(self):
        """As asyncore.poll(): ask all, then read, then write.  False if nothing was ready."""
        anything = False
        if self.program['most'] is not None:
            self.room_this_turn = self.socket.octets_sent + self.program['most']
        for map in self.maps():
            reading, writing = [], []
            for descriptor, each in list(map.items()):
                wants = each.readable(), each.writable() and not each.accepting
                if not any(wants):
                    continue
                its_socket = self.sockets.get(descriptor)
                if its_socket is None or not its_socket.is_open:
                    raise OSError(errno.EBADF, 'select() would say')
                if wants[0] and its_socket.can_recv():
                    reading.append(descriptor)
                if wants[1] and its_socket.can_send():
                    writing.append(descriptor)
            for action, ready in (asyncore.read, reading), (asyncore.write, writing):
                for descriptor in ready:
                    anything = True
                    if descriptor in map:
                        action(map[descriptor])
        return anything

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


def _is_collecting():
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != 'turn':
        if frame.f_code.co_name == 'collect_incoming_data':
            return True
        frame = frame.f_back
    return False


def _state_text(name, value):
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
        self.version = self.smtpd.__version__
        self.no_debug = self.smtpd.DEBUGSTREAM
        socket.getfqdn = lambda *args: FQDN
        time.ctime = lambda *args: 'now'

    def run(self, program):
        """The trace of the program."""
        smtpd = self.smtpd
        asyncore.socket_map.clear()
        smtpd.SMTPChannel.command_size_limits.clear()  # the old module's are shared by all
        smtpd.__version__, smtpd.DEBUGSTREAM = self.version, self.no_debug
        world = World(smtpd, program)
        streams = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = Log(world)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                return self._run_for_a_while(world)
        finally:
            sys.stdout, sys.stderr = streams
            if world.undo:
                world.undo()
            asyncore.socket_map.clear()
            smtpd.DEBUGSTREAM = self.no_debug

    def _run_for_a_while(self, world):
        has_timer = hasattr(signal, 'setitimer')
        if has_timer:
            signal.signal(signal.SIGALRM, _time_is_up)
            signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.1)
        try:
            try:
                world.run()
            finally:
                if has_timer:
                    signal.setitimer(signal.ITIMER_REAL, 0)
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

    def some_of(self, things, count):
        things = list(things)
        return [things.pop(int(self._random.random() * len(things)))
                for _ in range(min(count, len(things)))]


COMMANDS = ['smtp_HELO', 'smtp_EHLO', 'smtp_MAIL', 'smtp_RCPT', 'smtp_DATA', 'smtp_RSET',
            'smtp_NOOP', 'smtp_QUIT', 'smtp_VRFY', 'smtp_HELP', 'smtp_EXPN']
NEW_COMMANDS = ['smtp_XFOO', 'smtp_XBAR', 'smtp_AUTH', 'smtp_STARTTLS']

HOOKS = ['push', 'close', 'close_when_done', 'handle_close', 'handle_error', 'handle_read',
         'handle_write', 'handle_read_event', 'handle_write_event', 'readable', 'writable',
         'send', 'recv', 'initiate_send', 'collect_incoming_data', 'found_terminator',
         'get_terminator', 'set_terminator', 'log_info', '_getaddr', '_getparams',
         '_set_rset_state', '_set_post_data_state', '_strip_command_keyword', '__getattr__']
OFTEN = ['push', 'push', 'found_terminator', 'found_terminator', 'collect_incoming_data',
         'handle_error', 'close', 'handle_close', 'close_when_done', '_set_rset_state']
RETURNS = {'readable', 'writable', 'send', 'recv', 'get_terminator', '_getaddr', '_getparams',
           '_strip_command_keyword'}
# asyncore and asynchat have these, so that a mixin after SMTPChannel can stand in between.
OF_DISPATCHER = {'close', 'handle_close', 'handle_error', 'readable', 'writable', 'send', 'recv',
                 'log_info', 'handle_read_event', 'handle_write_event'}
OF_ASYNC_CHAT = OF_DISPATCHER | {
    'push', 'close_when_done', 'handle_read', 'handle_write', 'initiate_send',
    'get_terminator', 'set_terminator'}

ERRORS = ['Exception("x")', 'OSError("x")', 'OSError(errno.EPIPE, "x")', 'ValueError("x")',
          'MemoryError()', 'NotImplementedError()', 'asyncio.CancelledError()',
          'asyncore.ExitNow("x")', 'BlockingIOError(errno.EAGAIN, "x")', 'KeyError("x")',
          'ConnectionResetError(errno.ECONNRESET, "x")', 'AttributeError("x")', 'StopIteration()']

REPLIES = ["self.push('250 ok')", "self.push('250 ok')",
           "self.push('250-one')\nself.push('250 two')",
           "self.push('500 no')", "self.push('451 later')", "self.push('334 more')",
           "self.push('554 my own words')", "self.push('')",
           "asynchat.async_chat.push(self, b'250 asynchat\\r\\n')",
           "self.send(b'250 sent\\r\\n')", "self.socket.send(b'250 socket\\r\\n')",
           "self.conn.sendall(b'250 conn\\r\\n')",
           "self.push_with_producer(asynchat.simple_producer(b'250 simple\\r\\n'))",
           "self.push_with_producer(Producer(b'250-a\\r\\n', b'250 b\\r\\n'))",
           "self.producer_fifo.append(b'250 queued\\r\\n')"]
ENDS = ['self.close()', 'self.close_when_done()', 'self.handle_close()', 'self.smtp_QUIT(0)',
        'self.smtp_QUIT(None)', 'self.socket.close()', 'self.conn.close()',
        'self.del_channel()', 'asynchat.async_chat.close(self)']
CALLS = ['self.smtp_NOOP(None)', 'self.smtp_RSET(None)', "self.smtp_EHLO('inner')",
         "self.smtp_MAIL('FROM:<in@x>')", "self.smtp_RCPT('TO:<in@x>')", 'self.smtp_DATA(None)',
         'self.initiate_send()', 'self.handle_write()', 'self.discard_buffers()',
         'self._set_rset_state()', 'self._set_post_data_state()', 'self.found_terminator()',
         "self.collect_incoming_data(b'NOOP')", 'self.handle_read()',
         'asynchat.async_chat.__init__(self, self.conn, self._map)',
         'asynchat.async_chat.__init__(self, self.conn)',
         'self.__init__(self.smtp_server, self.conn, self.addr)',
         'self.set_socket(self.conn)', 'self.set_socket(self.conn, self._map)',
         'self.add_channel()', "self.log_info('hello')", "self.log_info('hello', 'error')",
         "self._strip_command_keyword('FROM:', 'FROM: <x@y>')",
         "self.smtp_server.process_message(self.peer, self.mailfrom, self.rcpttos, b'by hand')"]
SETTINGS = ["self.set_terminator(b'\\n')", "self.set_terminator(b'\\r\\n')",
            'self.set_terminator(5)', 'self.set_terminator(None)', "self.set_terminator('\\r\\n')",
            "self.set_terminator(b'')", 'self.set_terminator(0)',
            "self.set_terminator(b'\\r\\n.\\r\\n')", "self.terminator = b'XX'",
            "self.terminator = 'XX'", 'self.terminator = 3', 'self.terminator = None',
            'self.ac_in_buffer_size = 5', 'self.ac_out_buffer_size = 5',
            'self.smtp_state = 99', "self.smtp_state = 'AUTH'", 'self.smtp_state = self.DATA',
            'self.smtp_state = self.COMMAND', 'self.smtp_state = None',
            'self.command_size_limit = 10', 'self.command_size_limit = None',
            "self.command_size_limits['NOOP'] = 2000",
            'self.command_size_limits.clear()', 'self.data_size_limit = 5',
            'self.data_size_limit = None', 'self.data_size_limit = 0', 'self.num_bytes = 0',
            'self.received_lines = []', 'self.received_lines.clear()',
            "self.received_lines.append(self._emptystring)", "self.seen_greeting = 'set'",
            "self.seen_greeting = ''", 'self.extended_smtp = True', "self.mailfrom = 'set@x'",
            'self.mailfrom = None', "self.rcpttos = ['set@x']", "self.rcpttos.append('more@x')",
            'self.rcpttos = []', "self.fqdn = 'set.example'", "self.received_data = 'set'",
            "self.peer = 'set'", 'self.require_SMTPUTF8 = True',
            "self.ac_in_buffer = b''", "self.ac_in_buffer = b'NOOP\\r\\n'",
            "self.ac_in_buffer += b'RSET\\r\\n'", "self.ac_in_buffer = 'NOOP\\r\\n'",
            'self.producer_fifo.clear()', 'self.connected = False',
            'self._SMTPChannel__state = 0', 'self._SMTPChannel__line = []',
            'self._SMTPChannel__mailfrom = None', 'self._SMTPChannel__conn.send(b"")',
            'smtpd.DEBUGSTREAM = stream', 'smtpd.DEBUGSTREAM = smtpd.Devnull()',
            "replace(self, 'push')", "replace(self, 'found_terminator')",
            "replace(self, 'collect_incoming_data')", "replace(self, 'close')",
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
    'readable': ['return not self.producer_fifo', 'return True',
                 'return len(self.ac_in_buffer) < 10', 'return self.connected and {call}'],
    'writable': ['return bool(self.producer_fifo)', 'return {call}', 'return 1'],
    'recv': ['return self.socket.recv(7)', 'return {call}', 'data = {call}\nreturn data.upper()'],
    'send': ['return self.socket.send(data)', '{call}\nreturn None', 'return {call}'],
    'get_terminator': ['return self.terminator', 'return {call}', "return b'\\n'",
                       "return '\\r\\n'", 'return None', 'return 4', 'return 0'],
    'handle_close': ['pass', 'self.close()', "self.push('421 bye')\n{base}"],
    'close': ['{base}', "self.push('421 closing')\n{base}", 'asynchat.async_chat.close(self)'],
    '_set_rset_state': ['{base}\nself.mine = []', 'self.mine = []\n{base}', 'self.mine = []'],
    '_set_post_data_state': ['{base}\nself.mine = []', '{base}'],
    '_getaddr': ["return arg.strip('<>'), ''", "return '', ''", 'return {call}',
                 'return None, arg'],
    '_getparams': ['return {{}}', 'return None', 'return {call}'],
    '_strip_command_keyword': ["return arg", 'return {call}', "return ''"],
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

PATCHES = ['asyncore.dispatcher.log_info', 'asyncore.dispatcher.log_info',
           'asyncore.dispatcher.send', 'asyncore.dispatcher.recv',
           'asyncore.dispatcher.handle_error', 'asynchat.async_chat.push',
           'asynchat.async_chat.handle_close']

HANDLER_BODIES = [
    'return None', "return '250 fine'", "return '550 no'", "return '550-no\\r\\n550 not this'",
    "return ''", "return '554: Rejected'", "return '550\\tno'", 'return 0', 'return False',
    "return '250'", "raise ValueError('x')", 'raise NotImplementedError', 'raise MemoryError',
    'raise asyncore.ExitNow("x")', "raise OSError(errno.EPIPE, 'x')", 'world.channel.close()',
    'world.channel.close_when_done()', "world.channel.push('250 early')",
    "world.channel.push('250 early')\nraise ValueError('x')", "return '421 bye'",
    'world.channel.handle_close()', "rcpttos.append('changed@x')\nreturn '250 changed'",
    "world.channel.smtp_QUIT(0)\nreturn '550 behind QUIT'", 'raise asyncio.CancelledError']

ATTRIBUTES = [
    ('command_size_limit', '10'), ('command_size_limit', 'None'), ('command_size_limit', '2000'),
    ('ac_in_buffer_size', '5'), ('ac_in_buffer_size', '1'), ('ac_out_buffer_size', '5'),
    ('mine', '[]'), ('use_encoding', '1'), ('connected', 'False'),
    ('ignore_log_types', '()'), ('debug', 'True'), ('COMMAND', '5'), ('DATA', "'data'"),
    ('smtp_NOOP', 'smtpd.SMTPChannel.smtp_RSET'), ('smtp_XFOO', 'smtpd.SMTPChannel.smtp_NOOP'),
    ('smtp_VRFY', 'None'), ('push_lines', 'smtpd.SMTPChannel.push')]


def base_call(name, dice):
    arguments = arguments_of(name)
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


def hook_body(name, dice, number=0):
    call = ('super().%s(%s)' if name == '__getattr__' else '%s') % (
        (name, 'name') if name == '__getattr__' else base_call(name, dice))
    if name in SPECIAL_METHODS and (dice.chance(.5) or name == '__getattr__'):
        body = dice.one_of(SPECIAL_METHODS[name]).format(base=call, call=call)
        if name == '__getattr__' or dice.chance(.7):
            return [body]
        return [guarded(an_action(dice), name, number, dice), body]
    actions = [guarded(an_action(dice), name, each + 10 * number, dice)
               for each in range(dice.one_of([0, 0, 1, 1, 1, 2]))]
    if name in ('collect_incoming_data', 'get_terminator'):  # asynchat goes on with a copy
        actions = [action for action in actions if 'ac_in_buffer ' not in action]
    if name in RETURNS or name == 'collect_incoming_data':  # no program does that
        actions = [action for action in actions if '__init__' not in action]
    place = dice.number(0, len(actions))
    if dice.chance(.07):
        return actions
    if name in RETURNS:
        return [*actions[:place], 'result = ' + call, *actions[place:], 'return result']
    return [*actions[:place], call, *actions[place:]]


def a_hook(dice, names=None):
    if names is None:
        names = OFTEN if dice.chance(.5) else HOOKS
    return dice.one_of(names)


def make_program(seed):
    """Invent a program; the same one for the same seed, on all Pythons."""
    dice = Dice(seed)
    program = {**EMPTY_PROGRAM, 'attributes': {}, 'methods': {}, 'server': {}, 'client': []}
    methods = program['methods']
    program['decode_data'] = dice.chance(.35)
    if not program['decode_data']:
        program['enable_SMTPUTF8'] = dice.chance(.12)
    program['own_map'] = dice.chance(.8)
    program['listens'] = dice.chance(.2)
    program['debug'] = dice.chance(.08)
    if dice.chance(.08):
        program['data_size_limit'] = dice.one_of([None, 0, 5, 20, 100])
    for _ in range(dice.one_of([0, 1, 1, 1, 2, 3])):
        name = dice.one_of(COMMANDS if dice.chance(.4) else NEW_COMMANDS)
        methods[name] = command_body(name, dice)
    if dice.chance(.75):
        for number in range(dice.one_of([1, 1, 1, 2, 2, 3])):
            name = a_hook(dice)
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
    if dice.chance(.1):
        names = [a_hook(dice) for _ in range(dice.one_of([1, 1, 2]))]
        names = [name for name in names if name not in ('__getattr__',)]
        program['before'] = a_mixin(names, dice.one_of(
            ['object', 'asyncore.dispatcher', 'asynchat.async_chat']), dice)
    if dice.chance(.1):
        base = dice.one_of(['asyncore.dispatcher', 'asynchat.async_chat', 'object'])
        there = sorted(OF_DISPATCHER if base == 'asyncore.dispatcher' else OF_ASYNC_CHAT)
        program['after'] = a_mixin([dice.one_of(there)], base, dice)
    if dice.chance(.35):
        program['server']['process_message'] = [dice.one_of(HANDLER_BODIES)]
    if dice.chance(.08):
        program['patched'] = dice.one_of(PATCHES)
    if program['listens'] and dice.chance(.2):
        program['server']['handle_error'] = dice.one_of([['pass'], ['super().handle_error()']])
    if dice.chance(.12):
        program['room'] = dice.one_of([0, 1, 20, 60, 100])
    if dice.chance(.08):
        program['most'] = dice.one_of([5, 7, 30])
    if dice.chance(.05):
        program['fails'] = [dice.one_of([0, 40, 60, 100]),
                            dice.one_of([errno.EPIPE, errno.ECONNRESET, errno.EIO])]


def an_init(dice):
    kind = dice.number(0, 4)
    if kind == 0:
        return [COPIED_INIT]
    call = dice.one_of(['super().__init__(*args, **kwargs)',
                        'smtpd.SMTPChannel.__init__(self, *args, **kwargs)'])
    if kind == 1:
        return [call, call]
    body = [call]
    for number in range(dice.one_of([1, 1, 2])):
        action = guarded(an_action(dice), '__init__', number, dice).replace(', 5)', ', 1)')
        body.insert(dice.number(0, len(body)) if dice.chance(.3) else len(body), action)
    return body


def a_mixin(names, base, dice):
    methods = {}
    for number, name in enumerate(names):
        if name == '__getattr__':
            continue
        body = hook_body(name, dice, 5 + number)
        # A mixin does not know of SMTPChannel.
        methods[name] = [re.sub(r'smtpd\.SMTPChannel\.(\w+)\(self(?:, )?', r'super().\1(', each)
                         for each in body]
    return {'base': base, 'methods': methods}


MESSAGES = ['Subject: x\r\n\r\nbody\r\n.\r\n', 'one line\r\n.\r\n', '..dot\r\nx\r\n.\r\n',
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
    way = dice.number(0, 9)
    if way < 4:
        pieces = lines
    elif way < 7:
        pieces = [''.join(lines)]
    elif way < 9:
        pieces = cut(''.join(lines), dice)
    else:
        pieces = []
        for line in lines:
            if pieces and dice.chance(.5):
                pieces[-1] += line
            else:
                pieces.append(line)
    events = [['feed', piece] for piece in pieces if piece]
    if program['room'] is not None:
        for _ in range(dice.number(1, 3)):
            events.insert(dice.number(1, len(events)), ['room', dice.one_of([1, 30, 100, 10000])])
    if dice.chance(.5):
        end = dice.one_of(['eof', 'eof', 'reset'])
        events.insert(dice.number(1, len(events)) if dice.chance(.15) else len(events), [end])
        if dice.chance(.3) and end == 'eof':
            events.append(['reset'])
    return events


def cut(text, dice):
    places = sorted({0, len(text), *(dice.number(0, len(text)) for _ in range(dice.number(1, 6)))})
    return [text[start:end] for start, end in zip(places, places[1:])]


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

    def overrides(self, *names):
        return bool(overridden(self.program).intersection(names))

    def raises_in(self, name):
        """Whether a method of the program's has a statement that raises."""
        return any('raise' in statement for methods in all_methods(self.program)
                   for statement in methods.get(name, ()))

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
                     _state_text(name, WATCHED[name]))
                for trace in (self.old, self.new)]


def all_methods(program):
    """The methods of the channel's class and of its mixins."""
    mixins = [program[where]['methods'] for where in ('before', 'after') if program[where]]
    return [program['methods'], *mixins]


def overridden(program):
    mixin = program['after'] or {'base': None, 'methods': {}}
    hidden = set(mixin['methods']) if mixin['base'] == 'object' else set()  # by asynchat's
    return {name for methods in all_methods(program) for name in methods
            if methods is not mixin['methods'] or name not in hidden}


def compared(trace):
    """The trace without what is nobody's business."""
    together = []
    for event in trace:
        # Whether a line of debugging output or a reply comes first, nobody can tell.
        if event[0] in ('sent', 'debug'):
            run = 0
            while run < len(together) and together[-1 - run][0] in ('sent', 'debug'):
                run += 1
            same = [each for each in together[len(together) - run:] if each[0] == event[0]]
            if same:
                same[0][1] += event[1]
            else:
                together.insert(len(together) - (run if event[0] == 'debug' else 0), list(event))
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
    """(Case that nothing allows, or None; the rows of ALLOWED that were needed)."""
    old, new = compared(old), compared(new)
    rows = []
    while True:
        case = first_case(program, old, new)
        if case is None:
            return None, rows
        if old_never_ends(case):
            return None, [NOT_COMPARED]
        row = next((each for each in ALLOWED if each not in rows and each.applies(case)), None)
        if row is None:
            return case, rows
        rows.append(row)
        if row.forget is None:
            return None, rows
        old, new = compared(row.forget(old)), compared(row.forget(new))


# ---------------------------------------------------------------------------
# What may differ
# ---------------------------------------------------------------------------

class Allowed(typing.NamedTuple):
    """A row of the table: what may differ, why, and README's words for it.

    `forget` takes out of a trace what differs, and the rest is compared; without it
    nothing that comes after is compared.
    """

    applies: typing.Callable
    reason: str
    readme: str
    forget: typing.Optional[typing.Callable] = None


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


SENDING = {'send', 'initiate_send', 'handle_write', 'handle_write_event', 'replaced send',
           'patched send', 'patched initiate_send'}
ENDING = {'closed', 'map', 'client', 'state', 'end', 'close', 'handle_close', 'replaced close',
          'replaced handle_close', 'patched close', 'patched handle_close', *SENDING}


def sent_at_the_end(trace):
    """What was sent after each act of the client, all at the end of it; not by which calls."""
    result, sent = [], ''
    for event in [*without_state('producer_fifo')(trace), ['client']]:
        if event[0] in SENDING:
            continue
        if event[0] == 'sent':
            sent += event[1]
            continue
        if event[0] == 'client' and sent:
            result.append(['sent', sent])
            sent = ''
        result.append(event)
    return result[:-1]


BEGINNINGS = {'client', 'found_terminator', 'process_message', 'get_terminator',
              'collect_incoming_data', '_getaddr', '_getparams', '_strip_command_keyword'}
INPUT = {'found_terminator', 'process_message', 'get_terminator', 'collect_incoming_data'}
BEGINS_DATA = ['set_terminator', repr(b'\r\n.\r\n')]  # smtp_DATA() replies later
FAILURE = '451 Internal confusion\r\n'


def was_answered(case):
    """Whether anything was sent since the program, or a command of the client, was called."""
    push_fails = case.raises_in('push')
    is_limited = not push_fails and (
        case.program['room'] is not None or case.program['most'] is not None)
    for number in reversed(range(case.at)):
        event = case.old[number]
        if (event[0] == 'push' and not is_limited and case.old[number - 1][0] == 'state'
                and 'ac_in_buffer' in case.old[number - 1][1]):
            return False  # the first one of a command
        if event[0] == 'sent' or event[0] == 'push' and is_limited:
            return True
        if event[0] in BEGINNINGS or event[0].startswith('smtp_') or event == BEGINS_DATA:
            return False
    return False


def until_error(events):
    """The events up to the first error, and its name."""
    for number, event in enumerate(events):
        if event[0] == 'error':
            return events[:number], event[1]
        if event[0] == 'log_info' and event[1] != repr('no exception'):
            return events[:number], event[1].strip("'")
    return events, None


def failure_answered(case):
    """Ours says 451 to a command or a message that failed before it had an answer."""
    if case.overrides('handle_error') or was_answered(case):
        return False
    if case.old_rest[0] in (['closed'], ['close']) and case.old[case.at - 1][0] == 'error':
        # What was sent is compared apart.
        return FAILURE[:5] in str([event for event in case.new_rest if event[0] == 'sent'])
    old_events, old_error = until_error(case.old_rest)
    new_events, new_error = until_error(case.new_rest)
    says = case.new_says() + ''.join(
        event[1] for event in case.new_rest[1:10] if event[0] == 'sent')
    push_fails = new_error is not None and ['push', repr(FAILURE[:-2])] in case.new_rest[:3]
    return ((new_error == old_error or push_fails) and old_error is not None
            and all(event[0] in ('state', 'sent') for event in old_events)
            and (says[:5] == FAILURE[:5] or '451 Internal confusion' in str(new_events)))


def failed_message_is_over(case):
    """A handler failed: ours forgets the transaction before handle_error() is called."""
    calls = [event[0] for event in case.old[:case.at]
             if event[0] not in {'state', 'sent', 'push', *SENDING}]
    fault = next((event for event in case.old_rest if event[0] != 'state'), ['end'])
    while calls[-1:] and calls[-1] in ('error', 'patched handle_error', 'closed',
                                       '_set_post_data_state'):
        calls.pop()
    fails_again = (case.new_rest[0] == ['_set_post_data_state']
                   and case.raises_in('_set_post_data_state'))
    if fails_again and calls[-1:] == ['process_message']:
        return fault[0] in ('error', 'left the loop') and any(
            event[0] == fault[0] for event in case.new_rest[:4])
    return (calls[-1:] == ['process_message'] and fault in case.new_rest[:6]
            and fault[0] in ('handle_error', 'error', 'replaced handle_error', 'log_info',
                             'handle_close', 'close', 'left the loop')
            and all(event[0] in ('state', 'set_terminator', '_set_post_data_state', 'sent')
                    for event in case.new_rest[:case.new_rest.index(fault)]))


def goes_on_after_failure(case):
    """Ours goes on with the input after a failure, the old module when more comes in."""
    before = {event[0] for event in case.old[max(0, case.at - 8):case.at]}
    return (before.intersection(('handle_error', 'error', 'handle_close', 'close',
                                 'replaced handle_error'))
            and next(event[0] for event in case.old_rest if event[0] != 'state') in (
                'client', 'end', 'map', 'sent')
            and (case.overrides('handle_error', 'handle_close', 'close')
                 or 'replace(' in case.source))


def limit_after_ehlo(case):
    """command_size_limit holds after EHLO, too."""
    near = str([*case.old_rest[:6], *case.new_rest[:6]])
    return ('command_size_limit = ' in case.source
            and ('line too long' in near or 'TypeError' in near))


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
    said = ''.join(event[1] for event in case.program['client'] if event[0] == 'feed')
    return 'QUIT' in said.upper() or 'QUIT' in case.source or 'close_when_done' in case.source


def has_ended(case):
    """Ours has ended the session, or would have but for the program or a full socket."""
    return (['closed'] in case.new or case.program['room'] is not None
            or re.search('del_channel|fifo.clear|discard_buffers', case.source) is not None or case.overrides(
                'handle_close', 'close', 'initiate_send', 'writable', 'handle_write',
                'handle_write_event'))


def stops_at_close_when_done(case):
    """After close_when_done() ours executes no more of what the client sent."""
    harmless = {'sent', 'busy'}
    if case.raises_in('handle_write'):
        harmless.add('error')
    if case.overrides('handle_write_event', 'handle_read_event'):  # it may push
        harmless |= {'push', 'patched push'}
    return (asks_for_the_end(case) and has_ended(case) and is_quiet(
        [event for event in until_close(case.new_rest) if event[0] not in harmless
         and not (event[0] == 'error' and event in case.old_rest)])
        and not any(event[0] in INPUT for event in case.new_rest))


def until_close(events):
    """The events up to where close() is called, which may have a body of the program's."""
    return events[:next((number for number, event in enumerate(events)
                         if event[0] in ('close', 'handle_close')), len(events))]


def collects_less(case):
    """After close_when_done() ours does not even collect what comes in."""
    return (asks_for_the_end(case) and has_ended(case) and bool(case.state_differs_in())
            and case.seen('received_lines')[1] == "'(none)'"
            and case.state_differs_in() <= {'received_lines', 'num_bytes', 'ac_in_buffer'}
            and case.seen('ac_in_buffer')[1] == "b''")


def not_connected(case):
    """A program that sets `connected` to false has ended the session, to ours."""
    return 'self.connected = False' in case.source and is_quiet(
        [event for event in case.new_rest if event[0] != 'busy'])


def end_without_recv(case):
    """Ours looks for the end of the input before it calls recv(), where something waits."""
    old = [event[0] for event in case.old_rest if event[0] != 'state']
    is_recv = old[0] in ('recv', 'patched recv')
    return (is_recv and old[1] in ('closed', 'close', 'handle_close', 'patched handle_close')
            and ['eof'] in case.program['client'] and case.program['room'] is not None
            and case.new_rest[0] != case.old_rest[0] and is_quiet(
                [event for event in case.new_rest if event[0] != 'sent']))


def replaced_meanwhile(case):
    """A hook was set in the instance while a message came in: called from the next one on."""
    return (case.seen('smtp_state') != ['0', '0'] and case.seen('num_bytes')[1] != "'0'"
            and re.search(r"replace\(self, '(collect|found_term|get_term)", case.source) is not None
            and (case.state_differs_in() == {'received_lines'}
                 or case.old_rest[0][0].startswith('replaced ')))


def input_set_while_collecting(case):
    """asynchat goes on with a copy of what it had."""
    return case.new_rest[0][0] == 'collect_incoming_data' and any(
        'self.ac_in_buffer' in statement for methods in all_methods(case.program)
        for statement in methods.get('collect_incoming_data', ()))


def nothing_is_no_piece(case):
    """A program emptied the buffer in get_terminator(): ours collects nothing."""
    old, new = case.seen('received_lines')
    return (case.state_differs_in() == {'received_lines'} and case.overrides('get_terminator')
            and old in ("b''", "''") and new == "'(none)'")


def debugs_less(case):
    """What is not executed after the end is not in the debugging output either."""
    old, new = case.old_rest[0], case.new_rest[0]
    is_less = old[0] == 'debug' and (new[0] != 'debug' or old[1].startswith(new[1]))
    ends = (asks_for_the_end(case) or case.program['fails'] is not None
            or re.search(r'(socket|conn)\.close\(\)', case.source) is not None)
    return is_less and ends and has_ended(case) and not any(
        event[0].startswith(('smtp_', 'process_message')) for event in case.new_rest)


def old_never_ends(case):
    """The old module turns in circles, or the program does in it."""
    return any(event[0] in ('busy', 'hung') or 'RecursionError' in str(event[1:2])
               for event in case.old)


def state_is_there(case):
    """The old module has not set an attribute yet that ours has from the start."""
    event = next((each for each in case.old_rest if each[0] not in (
        'state', '_set_rset_state', '_set_post_data_state', 'patched handle_error', 'sent')), ['end'])
    if event[0] == '__getattr__' and event[1].strip("'") in WATCHED:
        return True
    words = str(event[1] if event[1:] else '').strip("'").split()
    return (event[0] in ('error', 'start raised', 'handle_error', 'left the loop', 'log_info')
            and words[:1] == ['AttributeError'] and words[1:] != [] and (
                words[1] in WATCHED or words[1] in (
                    'command_size_limits', '_decode_data', 'conn', 'smtp_server', 'socket')))


def too_much_data(case):
    near = [*case.old_rest[:3], *case.new_rest[:3], *case.old[max(0, case.at - 3):case.at]]
    limit = case.program['data_size_limit']
    not_seen_yet = (case.program['room'] is not None and limit and limit < 1000
                    and 'smtp_state' in case.state_differs_in())
    is_over = (limit and limit < 1000 and case.new_rest[0] == ['_set_post_data_state']
               and '552 Error: T' in str(case.new))
    return not_seen_yet or is_over or any('552 Error: T' in str(event) for event in near)


def sends_before_it_closes(case):
    """Ours closes only when what waits for a client that reads slowly is sent."""
    old_closes = any(event[0] in ('closed', 'handle_close', 'close', 'replaced handle_close',
                                  'replaced close') for event in case.old_rest[:2])
    new_sends = (case.new_rest[0][0] in ('sent', 'close_when_done')
                 and ['closed'] in case.new_rest)
    if case.old_rest[0][0] == 'sent' and case.new_says() and ['closed'] in case.old:
        return any(event[0] == 'error' for event in case.old) and ['closed'] in case.new
    is_limited = case.program['room'] is not None or case.program['most'] is not None
    return old_closes and (is_limited or new_sends)


def fails_later(case):
    """Ours has sent what it held before the connection fails, or tries again a turn later."""
    return (case.program['fails'] is not None
            and case.old_rest[0][0] in (
                'closed', 'error', 'handle_error', 'log_info', 'handle_close')
            and case.old_rest[0] in case.new_rest)


def base_goes_on(case):
    """smtpd.SMTPChannel.close(self) goes on to a mixin behind that has close(), too."""
    mixin = case.program['after']
    return mixin is not None and any('smtpd.SMTPChannel.%s(' % name in case.source
                                     for name in mixin['methods'])


def ends_first(case):
    """A session that ends does so before the exception of the command that ended it is seen."""
    new_errors = [event for event in case.new_rest[:4] if event[0] in ('error', 'left the loop')]
    return (case.new_rest[0] == ['closed'] and asks_for_the_end(case)
            and (case.old_rest[0] in new_errors
                 or case.old_rest[0] == case.new_rest[1] == ['patched handle_error']))


def sends_until_full(case):
    """Ours sends until the socket is full, the old module one piece at each turn of the loop."""
    nested = any('push' in statement or 'producer' in statement
                 for name in ('initiate_send', 'send') for methods in all_methods(case.program)
                 for statement in methods.get(name, ()) if 'once(' in statement)
    if not (nested or 'push_with_producer' in case.source or 'ac_out_buffer_size' in case.source
            or 'producer_fifo' in case.source or case.program['most'] is not None
            or case.program['room'] is not None):
        return False
    old, new = case.old_rest[0], case.new_rest[0]
    return (case.state_differs_in() == {'producer_fifo'}
            or old[0] == new[0] == 'sent' and (
                old[1].startswith(new[1]) or new[1].startswith(old[1]))
            or old[0] in SENDING or new[0] in SENDING or (old[0] == 'sent') != (new[0] == 'sent'))


def control_character(case):
    """CR or LF is left in a command line: by a terminator of the program's own, mostly."""
    old, new = str(case.old_rest), str(case.new_rest[:6])
    is_in_reply = re.search(r'command "[^"]*\\+[rn]', old) is not None
    is_in_name = re.fullmatch(r"\['__getattr__', .*\\+r.*\]", str(case.old_rest[0])) is not None
    is_in_line = ('terminator' in case.source and '\\r\\n' in case.seen('received_lines')[1]
                  and '501 Syntax: RCPT' in new and '555 RCPT' in old)
    cut_off = (case.program['room'] is not None and 'terminator' in case.source
               and case.new_rest[0][0] == 'sent' and case.new_rest[0][1][-4:] == '500 ')
    return cut_off or is_in_reply or is_in_name or is_in_line or ('terminator' in case.source and '500 Error: bad syntax' in new
                           and '500 Error: bad syntax' not in old)


def pieces_of_either_kind(case):
    """The program puts bytes among text into received_lines, or text among bytes."""
    return ('received_lines.append(data' in case.source
            and any(event in (['error', 'TypeError'], ['handle_error', "'TypeError'"],
                              ['log_info', "'TypeError'", "'error'"])
                    for event in case.old_rest[:2]))


def lines_of_a_reply(case):
    """A reply of several lines that a handler returned is pushed line by line."""
    return '550-no\\\\r\\\\n550 not' in (
        str(case.old_rest[0]).replace('\\\\\\\\', '\\\\'))


def text_as_terminator(case):
    """set_terminator() of text is taken; it ended the session."""
    error = until_error(case.old_rest[:4])[1]
    return "set_terminator('" in case.source and (
        error == 'TypeError' or case.state_differs_in() == {'terminator'}
        or ['handle_error', "'TypeError'"] in case.old_rest[:4])


def empty_message(case):
    return case.new_rest[0] != case.old_rest[0] and any(
        event[0] == 'process_message' and event[4] in ("b''", "''")
        for event in case.new_rest[:4]) and not any(
        event[0] == 'process_message' for event in case.old_rest[:4])


def first_dot(case):
    """A dot at the beginning of data may be the end of an empty message."""
    if case.state_differs_in() == {'received_lines', 'ac_in_buffer'}:
        return (case.seen('received_lines')[0] in ("b'.'", "'.'")
                and case.seen('ac_in_buffer')[1].startswith("b'."))
    pieces = [next((event[1] for event in events
                    if event[0].endswith('collect_incoming_data')), '')
              for events in (case.old_rest[:4], case.new_rest[:6])]
    return pieces[0] == "b'.'" and pieces[1].startswith("b'.")


def abandoned_connection(case):
    """The server closes the connection of a channel that could not be made."""
    return case.program['listens'] and (
        ['closed'] in case.new_rest[:2] or case.new_rest[0] == ['close']) and any(
        event[0] in ('error', 'handle_error') for event in case.old_rest[:2]) and not any(
        event[0] == 'client' for event in case.new[:case.at])


def piece_in_another_form(case):
    """Nobody but a hook of asynchat's sees the pieces of what is not whole yet."""
    return (case.state_differs_in() <= {'received_lines', 'num_bytes', 'ac_in_buffer'}
            and bool(case.state_differs_in()) and not case.overrides(
                'collect_incoming_data', 'found_terminator', 'get_terminator')
            and not any(event[0].startswith(
                ('replaced collect_', 'replaced found_', 'replaced get_')) for event in case.old))


def number_as_terminator(case):
    """A terminator that is a number is counted down before the hook is called."""
    return case.state_differs_in() == {'terminator'} and (case.overrides('get_terminator') or any(
        event[0].endswith('collect_incoming_data')
        for event in [*case.old_rest[:2], *case.new_rest[:2]]))


def buffer_is_emptied(case):
    """close() lets go of what the client sent."""
    return ['closed'] in case.old[:case.at] and 'ac_in_buffer' in case.state_differs_in()


def piece_is_used_up(case):
    """A piece is out of the buffer before collect_incoming_data(), even if that raises."""
    calls = [event[0] for event in case.old[:case.at] if event[0] != 'state']
    if case.old_rest[0][0].endswith('collect_incoming_data') and case.overrides('handle_error'):
        return any('raise' in statement for methods in all_methods(case.program)
                   for statement in methods.get('collect_incoming_data', ()))
    return 'ac_in_buffer' in case.state_differs_in() and (
        calls[-1:] != [] and calls[-1].endswith('collect_incoming_data'))


def counted_as_in_rfc_1870(case):
    """num_bytes, while data is received."""
    return 'num_bytes' in case.state_differs_in() and case.seen('smtp_state')[0] != '0'


def message_is_let_go(case):
    return ('received_data' in case.state_differs_in()
            and case.seen('received_data')[1] in ("''", "b''"))


def options_left_behind(case):
    return bool(case.state_differs_in().intersection(('mail_options', 'rcpt_options')))


def second_init(case):
    """A second __init__() begins the session anew before it calls any hook."""
    is_made = any(event[0] == 'client' for event in case.old[:case.at])
    return (('__init__' in case.source or not is_made) and bool(case.state_differs_in())
            and case.state_differs_in() <= {'seen_greeting', 'extended_smtp'})


BEGUN_ANEW = ('seen_greeting', 'extended_smtp', 'num_bytes', 'received_lines', 'mailfrom',
              'rcpttos', 'terminator')


def init_begins_first(case):
    """What a program set before __init__(), or before it calls it again, is not seen in it."""
    names = case.state_differs_in()
    return (bool(names) and names <= {*BEGUN_ANEW} and '__init__(' in case.source
            and all(case.seen(name)[1] == _state_text(name, WATCHED[name]) for name in names))


def second_init_failed(case):
    """A second __init__() did not get so far as to set `peer` again."""
    old, new = case.old_rest[0], case.new_rest[0]
    if old[0] == new[0] == 'sent' and old[1].replace(FQDN, '', 1) == new[1]:
        return case.source.count('__init__(') > 1 and any(
            event[0] == 'start raised' for event in case.old[:case.at])
    return (case.source.count('__init__(') > 1 and old[0] == new[0] == 'process_message'
            and new[1] == 'None' and old[2:] == new[2:])


def set_before_the_session(case):
    """What a hook sets while the channel is made is not set back."""
    return ("self.seen_greeting = 'set'" in case.source
            and case.overrides('_set_rset_state', '_set_post_data_state', 'set_terminator')
            and '503 Duplicate HELO/EHLO' in str(case.new_rest[0])
            and '503 Duplicate HELO/EHLO' not in str(case.old_rest[0]))


def log_info_fails(case):
    """A log_info() of the program's that raises does not end the loop."""
    old, new = case.old_rest[0], case.new_rest[0]
    return (case.overrides('log_info') and old[0] == 'left the loop' and new == ['error', old[1]]
            and any(event[0] == 'log_info' for event in case.old[case.at - 4:case.at]))


def answer_fails(case):
    """The 451 for a failing send() fails, too: one more line in the log."""
    if case.overrides('send', 'initiate_send'):
        errors = [event for event in case.new_rest[:8] if event[0] == 'error']
        return (FAILURE[:-2] in str(case.new_rest[:4]) and len(errors) > 1
                and case.old_rest[0] in errors[1:])
    return (case.program['fails'] is not None and case.new_rest[0][0] == 'error'
            and case.new_rest[0] in case.old[case.at - 3:case.at]
            and case.new_rest[1:] == case.old_rest)


def input_of_its_own(case):
    """A command that fails has put itself into the input: ours goes on after the failure."""
    never_ends = case.new == [['hung']] or case.new[-1] == ['busy']
    if (never_ends and case.program['fails'] and case.overrides('set_terminator')
            and ['error', 'AttributeError terminator'] in case.old):
        return case.overrides('close')  # which pushes, which fails, which closes ...
    return (never_ends and re.search(r"self\.ac_in_buffer \+?= b?'", case.source) is not None
            and re.search(r'raise|Error', case.source) is not None)


def behind_a_producer(case):
    """A session fails while replies wait for a producer that stands before them."""
    old, new = case.old_rest[0], case.new_rest[0]
    return ('push_with_producer' in case.source and old[0] == new[0] == 'sent'
            and old[1].startswith(new[1]) and ['closed'] in case.old[:case.at]
            and any(event[0] == 'error' for event in case.old[:case.at]))


def replied_past_push(case):
    """A reply that the program gave to the socket itself is not known to be one."""
    before = str([event for event in case.old[:case.at] if event[0] == 'sent'][-1:])
    error = until_error(case.old_rest)[1]
    return (re.search(r'self\.(send|socket\.send|conn\.sendall)\(', case.source) is not None
            and re.search('250 (sent|socket|conn)', before) is not None
            and error is not None and FAILURE[:-2] in str(case.new_rest[:6]))


def malformed_path(case):
    """A program's own input stands directly behind an address, or in it."""
    is_own = 'ac_in_buffer' in case.source or "collect_incoming_data(b'NOOP')" in case.source
    return (is_own and re.search("@x>?RSET|@x>?NOOP|'NOOP'", str(case.old_rest[:4])) is not None
            and re.search('501 Syntax: (MAIL|RCPT)', str(case.new_rest[:4])) is not None)


def cannot_verify(case):
    """VRFY of what _getaddr() finds no address in."""
    old, new = str(case.old_rest[:3]), str(case.new_rest[:3])
    return ('502 Could not VRFY' in old and '501 Syntax: VRFY' in new
            and case.overrides('_getaddr'))


def listener_lives_on(case):
    """The server listens on after the fault of a channel that was to be made."""
    return (case.program['listens'] and case.old_rest[0][0] == case.new_rest[0][0] == 'map'
            and '8' not in case.old_rest[0][1] and '8' in case.new_rest[0][1])


def gone_already(case):
    """A connection that is closed while the channel is made is no error."""
    return (case.old_rest[0] in (['start raised', 'OSError'], ['error', 'OSError'])
            and ['closed'] in case.new[:case.at]
            and not any(event[0] == 'client' for event in case.new[:case.at]))


NOT_COMPARED = Allowed(old_never_ends, 'not compared: the old module never comes to rest', '')

ALLOWED = [
    Allowed(counted_as_in_rfc_1870, 'num_bytes in data: RFC 1870 says what counts',
            'CRLF counts as two, doubled dots as one', without_state('num_bytes')),
    Allowed(message_is_let_go, 'the last message is let go early',
            "let go at the session's next command", without_state('received_data')),
    Allowed(options_left_behind, 'what was refused leaves no trace',
            'leave no trace', without_state('mail_options', 'rcpt_options')),
    Allowed(piece_in_another_form, 'what is not whole yet is kept in another form',
            'Where neither is overridden, ``received_lines`` stays empty',
            without_state('received_lines', 'num_bytes', 'ac_in_buffer')),
    Allowed(number_as_terminator, 'a number as terminator is counted down early',
            'A piece is used up before', without_state('terminator')),
    Allowed(piece_is_used_up, 'a piece is used up before collect_incoming_data() is called',
            'A piece is used up before', without_state('ac_in_buffer')),
    Allowed(buffer_is_emptied, 'close() lets go of what the client sent',
            'no more of the input is executed', without_state('ac_in_buffer')),
    Allowed(second_init, 'a second __init__() begins anew at once',
            'starts the session anew before', without_state('seen_greeting', 'extended_smtp')),
    Allowed(init_begins_first, '__init__() begins anew at once',
            'starts the session anew before', without_state(*BEGUN_ANEW)),
    Allowed(second_init_failed, 'a second __init__() that fails leaves no `peer`',
            'starts the session anew before'),
    Allowed(set_before_the_session, 'what a hook sets while a channel is made stays',
            'have their defaults from the start'),
    Allowed(set_before_a_failure, 'what a channel has before it fails',
            'have their defaults from the start', without_state('fqdn', 'peer', 'addr')),
    Allowed(failure_answered, 'a failure is answered with 451', 'raises before it has replied'),
    Allowed(failed_message_is_over, 'a failed message is over', 'its message is forgotten'),
    Allowed(goes_on_after_failure, 'the input after a failure is not left lying',
            'does not wait for more'),
    Allowed(stops_at_close, 'nothing is executed after close()',
            'no more of the input is executed'),
    Allowed(debugs_less, 'nothing is executed after the end, nor in the debugging output',
            'no more of the input is executed'),
    Allowed(stops_at_close_when_done, 'nothing is executed after close_when_done()',
            'no more of the input is executed'),
    Allowed(collects_less, 'nothing is collected after close_when_done()',
            'no more of the input is executed',
            without_state('received_lines', 'num_bytes', 'ac_in_buffer')),
    Allowed(not_connected, 'nothing is executed while `connected` is false',
            'nor while ``connected`` is false'),
    Allowed(state_is_there, 'attributes are there before the old module sets them',
            'have their defaults from the start'),
    Allowed(sends_before_it_closes, 'what waits is sent before the end',
            'What waits to be sent is sent before'),
    Allowed(end_without_recv, 'the end of the input is seen without a call of recv()',
            'without a call of ``recv()``'),
    Allowed(sends_until_full, 'ours sends until the socket is full',
            'not one piece at each turn', sent_at_the_end),
    Allowed(control_character, 'control characters in a command', 'with control characters'),
    Allowed(pieces_of_either_kind, 'received_lines may hold text and bytes',
            'may mix bytes and text'),
    Allowed(lines_of_a_reply, 'a reply of several lines is pushed line by line',
            'each of them is pushed'),
    Allowed(text_as_terminator, 'text is taken as a terminator', 'takes text'),
    Allowed(empty_message, 'an empty message is a message', 'An empty message'),
    Allowed(first_dot, 'a first dot may be an empty message', 'An empty message'),
    Allowed(fails_later, 'a connection that fails is noticed at another piece',
            'not one piece at each turn'),
    Allowed(log_info_fails, 'a log_info() that fails does not end the loop',
            'A ``log_info()`` that raises'),
    Allowed(answer_fails, 'a 451 that cannot be sent is in the log, too',
            'raises before it has replied'),
    Allowed(input_of_its_own, 'a command that fails may be in the input again',
            'and the session goes on'),
    Allowed(behind_a_producer, 'what waits behind a producer is not sent',
            'What waits behind a producer'),
    Allowed(replied_past_push, 'a reply past push() is not known', 'past ``push()``'),
    Allowed(malformed_path, 'an address without a bracket', 'a missing bracket'),
    Allowed(cannot_verify, 'VRFY of what is no address', 'VRFY of what is no address'),
    Allowed(nothing_is_no_piece, 'nothing is collected of nothing', 'empty piece is never collected'),
    Allowed(replaced_meanwhile, 'a hook that is replaced within a message', 'when it begins'),
    Allowed(input_set_while_collecting, 'what a hook puts into ac_in_buffer is input',
            'A piece is used up before'),
    Allowed(base_goes_on, 'a method of SMTPChannel goes on to the mixin behind',
            'goes on to the classes after'),
    Allowed(ends_first, 'a session that ends does so before the log has the fault',
            'What waits to be sent is sent before'),
    Allowed(abandoned_connection, 'a connection without a channel is closed',
            'Where making a channel fails'),
    Allowed(listener_lives_on, 'a listener outlives faults', 'Where making a channel fails'),
    Allowed(limit_after_ehlo, 'command_size_limit holds after EHLO, too', 'holds after EHLO, too'),
    Allowed(gone_already, 'a client that has gone already is no error',
            'a client that has gone already is no fault'),
    Allowed(too_much_data, 'a message over the limit', 'refused with ``552``'),
]


# ---------------------------------------------------------------------------
# Shrinking
# ---------------------------------------------------------------------------

def shrunk(program, is_interesting):
    """The smallest program found by leaving things out that is still interesting."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in smaller_programs(program):
            if is_interesting(candidate):
                program, smaller = candidate, True
                break
    return program


def smaller_programs(program):
    yield from _with_smaller_client(program)
    for name, value in EMPTY_PROGRAM.items():
        if name != 'client' and program[name] != value:
            yield {**program, name: value}
    for where in 'methods', 'server':
        for methods in _smaller_methods(program[where]):
            yield {**program, where: methods}
    for where in 'before', 'after':
        if program[where]:
            for methods in _smaller_methods(program[where]['methods']):
                yield {**program, where: {**program[where], 'methods': methods}}
    for name in program['attributes']:
        yield {**program, 'attributes': _without(program['attributes'], name)}


def _without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


def _smaller_methods(methods):
    for name in methods:
        yield _without(methods, name)
    for name, body in methods.items():
        for number, statement in enumerate(body):
            yield {**methods, name: body[:number] + body[number + 1:]}
            for smaller in _smaller_statements(statement):
                yield {**methods, name: body[:number] + [smaller] + body[number + 1:]}


def _smaller_statements(statement):
    lines = statement.split('\n')
    if len(lines) == 1:
        return
    guard = re.fullmatch(r'if once\(.*\):', lines[0])
    if guard and all(line.startswith('    ') for line in lines[1:]):
        yield '\n'.join(line[4:] for line in lines[1:])
    for number in range(len(lines)):
        smaller = '\n'.join(lines[:number] + lines[number + 1:])
        try:
            compile(_method_source('f', [smaller]).strip(), '', 'exec')
        except SyntaxError:
            continue
        yield smaller


def _with_smaller_client(program):
    client = program['client']
    for number in range(len(client), 0, -1):
        yield {**program, 'client': client[:number - 1]} if number < len(client) else {
            **program, 'client': client[:-1]}
    for number, event in enumerate(client):
        yield {**program, 'client': client[:number] + client[number + 1:]}
        if event[0] != 'feed':
            continue
        if number + 1 < len(client) and client[number + 1][0] == 'feed':
            joined = ['feed', event[1] + client[number + 1][1]]
            yield {**program, 'client': client[:number] + [joined] + client[number + 2:]}
        lines = event[1].splitlines(True)
        for place in range(len(lines) if len(lines) > 1 else 0):
            less = ''.join(lines[:place] + lines[place + 1:])
            yield {**program,
                   'client': client[:number] + [['feed', less]] + client[number + 1:]}


# ---------------------------------------------------------------------------
# The command line
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


def signature(case):
    """What differences of the same origin have in common, mostly."""
    old, new = case.old_rest[0], case.new_rest[0]
    if old[0] == new[0] == 'state':
        names = sorted(name for name in {*old[1], *new[1]} if old[1].get(name) != new[1].get(name))
        return 'state of ' + ' '.join(names)
    texts = [old[1:] and str(old[1]), new[1:] and str(new[1])]
    if old[0] == new[0] and None not in texts:
        same = len(os.path.commonprefix(texts))
        texts = [text[max(0, same - 3):] for text in texts]
    texts = ['' if event[0] == 'state' or not text else text[:15].strip().replace('\n', ' ')
             for event, text in zip((old, new), texts)]
    return '%s %s / %s %s' % (old[0], texts[0], new[0], texts[1])


def shown_case(case):
    lines = [shown(case.program), '']
    same = case.at
    lines += ['both  %s' % shown_event(event) for event in case.old[max(0, same - 6):same]]
    lines += ['old   %s' % shown_event(event) for event in case.old[same:same + 8]]
    lines += ['ours  %s' % shown_event(event) for event in case.new[same:same + 8]]
    return '\n'.join(lines)


def shown_event(event):
    return ' '.join(shortened(each) if number else each for number, each in enumerate(event))


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--seeds', default='0:1000', help='first:last+1')
    parser.add_argument('--old', default='python3.11', help='a Python with the old module')
    parser.add_argument('--new', default=sys.executable, help='the Python for ours')
    parser.add_argument('--module', default=OUR_MODULE, help='our smtpd.py')
    parser.add_argument('--shrink', type=int, default=1, help='so many of each kind (default 1)')
    parser.add_argument('--show', help='the seed of one program: show it and both traces')
    parser.add_argument('--kinds', type=int, default=20, help='kinds of differences to show')
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    with Worker(options.old) as old, Worker(options.new, options.module) as new:
        return compare_and_report(options, old, new)


def compare_and_report(options, old, new):
    if options.show is not None:
        show_one(make_program(int(options.show)), old, new)
        return 0
    first, last = map(int, options.seeds.split(':'))
    faults = collections.defaultdict(list)
    rows = collections.Counter()
    differing = 0
    for _, case, needed in compare_seeds(first, last, old, new):
        differing += bool(case or needed)
        rows.update(row.reason for row in needed)
        if case is not None:
            faults[signature(case)].append(case)
    count = sum(map(len, faults.values()))
    total = last - first
    print('%d programs, %s against %s: %d alike, %d differ as allowed, %d otherwise' % (
        total, options.new, options.old, total - differing, differing - count, count))
    for reason, times in rows.most_common():
        print('%6d  %s' % (times, reason))
    for kind, cases in sorted(faults.items(), key=lambda item: -len(item[1]))[:options.kinds]:
        print('=' * 80 + '\n%d of this kind: %s' % (len(cases), kind))
        for case in cases[:options.shrink]:
            print(shown_case(shrunk_case(case, kind, old, new)) + '\n')
    return 1 if faults else 0


def shrunk_case(case, kind, old, new):
    def fault(program):
        case, _ = judge(program, old.run(program), new.run(program))
        return case if case is not None and signature(case) == kind else None

    return fault(shrunk(case.program, fault)) or case


def show_one(program, old, new):
    print(shown(program))
    for name, worker in ('old', old), ('ours', new):
        print('\n# ' + name)
        for event in worker.run(program):
            print(shown_event(event))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--work']:
        work(sys.argv[2] if sys.argv[2:] else None)
    else:
        sys.exit(main())
