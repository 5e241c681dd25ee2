"""Breaks smtpd.py in one small place after the other, to see whether the tests notice.

    python tests/tools/mutants.py --seconds 600

A mutant is the module with one operator, constant, condition or statement changed.
Each runs in a copy of the tree, with the tests that reach the changed line: those that are
quick come first, and the first that fails, or takes far too long, kills it.  What was
killed is kept under .mutants/, so that a run goes on where the one before it ended.

It needs pytest-cov and pytest-timeout, and loads itself into pytest as a plugin.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import copy
import functools
import glob
import hashlib
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TOP = os.path.abspath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
KEPT_IN = os.path.join(TOP, '.mutants')
COPIED = ['smtpd.py', 'smtpd-stubs', 'setup.cfg', 'test_smtpd.py', 'tests', 'docs', 'README.rst']
TESTS = ['test_smtpd.py', 'tests/test_channel.py', 'tests/test_server_faults.py',
         'tests/test_proxies.py', 'tests/test_oracle.py', 'tests/test_programs.py']
# Coverage does not see what these run in other processes: they run after all others.
IN_PROCESSES = ('CommandLine', 'server_faults')

# Mutants that no user can tell from the module, as this program prints them, and why;
# "..." stands for any text.
EQUIVALENT = {
    '...: return False  ->  return...': 'None is as false',
    '...: 64  ->  65': 'how much is remembered',
    '_parse_command: not text.isprintable() and...  ->  (_CONTROL...': 'it is quick, not needed',
    "_parse_command: ''  ->  'x'...": 'without a verb, no method is looked up',
    '_without_cr: len(octets) < 4096...  ->  (...': 'all ways give the same, one faster',
    "_without_cr: octets.count(b'\\r', 0, 1024) < 32  ->  ...": 'as above',
    '_without_cr: 0  ->  1': 'as above',
    '_lf_for_crlf: len(octets) - len(without_cr)  ->  ...': 'as above',
    "_QUICK_ACK: ... else None  ->  ((...": 'Linux has it',
    '_FD_SETSIZE: ...  ->  (1024)': 'not on Windows',
    '_is_too_much_for_select: ...  ->  (... > _MOST_SOCKETS)': 'one more or less out of 500',
    '_Session.require_SMTPUTF8: False  ->  True': 'the first transaction sets it',
    '_Session._decode_data: False  ->  True': '__init__() sets it where it differs',
    'SMTPServer.enable_SMTPUTF8: False  ->  True': '__init__() sets it',
    '_Session.recv: ...16384...': 'it reads more or less at once',
    '_Session.recv: self.smtp_state == ...': 'as above',
    '_Session._come_back: ...  ->  (_NEXT_TURN)': 'the next turn finds nothing, and ends it',
    '_Session.readable: now - ... >= limit  ->  ...': 'the clock hardly ever says so',
    '_QuietChannels.readable: now >= ...': 'the clock hardly ever says so',
    '_Session.readable: self.producer_fifo and ...  ->  (self._must...': 'the same, more slowly',
    '_Session.found_terminator: self.producer_fifo and ...  ->  '
    '(self.ac_in_buffer and self._must_send_first())': 'the same, more slowly',
    '_Session._ask_for_the_rest: _QUICK_ACK and ...  ->  (octets < ...': 'Linux has it',
    '_Session._ask_for_the_rest: ...  ->  (_QUICK_ACK and octets <...': 'a hint to the system',
    '_Session._ask_for_the_rest: ...  ->  (... <= octets...': 'a hint to the system alone',
    '_Session.collect_incoming_data: ... if self.num_bytes else ...  ->  '
    '(self.max_command_size_limit)': 'the same, computed for each line',
    "_Session.collect_incoming_data: b'\\r\\n.'  ->  b'\\r\\n'":
        'it bounds the memory; at its end the message is counted exactly',
    "_Session.found_terminator: b''  ->  b'x'": 'not looked at',
    '_Session.found_terminator: ...  ->  (self.producer_fifo and self._must_send_first())':
        'there is nothing to put aside, and readable() waits as well',
    '_Session.handle_...: self._settle()  ->  pass': 'it stays in the map, which is slower',
    '_Session._end_idleness: 1  ->  2': 'it has two seconds',
    '_Session.handle_expt: 1  ->  2': 'there is never more than one',
    "_Session._decode_piece: ''  ->  'x'": 'nothing is cut off from either',
    '_Session._decode_piece: 3  ->  4': 'what is decoded a second time becomes the same',
    '_Session._execute_line: octets > limit  ->  (octets >= limit)':
        'the longest limit decides; this one spares its computation',
    '_Session._execute_line: ...  ->  (octets > self.max_command_size_limit)':
        'the same, computed for each line',
    '_Session._add_to_message: ...  ->  (self.num_bytes >= self.data_size_limit)':
        'its last line end will be too much',
    "_Session._add_to_message: b''  ->  b'x'": 'it is refused, whatever it is',
    "_Session._add_to_message: self._message = b''  ->  pass":
        'it is refused, and the client may make it last as long with less',
    '_Session._end_data: size > limit  ->  (size >= limit)':
        'its last line end will be too much',
    '_Session._pass_on_reply: False  ->  True': 'before the reply is known nothing was told',
    "_Session.close...: b''  ->  b'x'": 'no line ends in it',
    'SMTPChannel.smtp_EHLO: 0  ->  1': 'the other is larger',
    "SMTPChannel.smtp_MAIL: ''  ->  'x'": 'does not begin with the keyword either',
    "SMTPChannel.smtp_RCPT: ''  ->  'x'": 'does not begin with the keyword either',
    "SMTPChannel.smtp_HELP: ''  ->  'x'": 'not a command either',
    'SMTPChannel.smtp_...  ->  (parameters.upper().split())': "'' gives no words, more slowly",
    'SMTPChannel.smtp_MAIL: ...  ->  (self._refusal_of_mail_parameters(parameters))':
        'it refuses none of none, more slowly',
    'SMTPServer._wait_for_resources: 60  ->  61': 'one second in sixty',
    '_QuietChannels.__init__: 0.0  ->  1.0': 'both are long ago',
    '_QuietChannels._own_epoll: self._process = os.getpid()  ->  pass':
        'a new one each time, more slowly',
    '_QuietChannels._end_in_loop: self._epoll.close()  ->  pass':
        'nothing refers to it any more, which closes it',
    '_QuietChannels.handle_read: 0  ->  1': 'it does not wait: something is there',
    '_QuietChannels.readable: now + 1  ->  (now - 1)': 'it looks more often',
    "_UpstreamSession._ask_mail: 'BODY='  ->  'BODY'":
        'smtp_MAIL() lets no other parameter through that begins so',
    '_peek: 1  ->  2': 'a peek at more is a peek',
    '_Deliveries.left: ...  ->  (... >= _DELIVERY_SECONDS)': 'nobody hits the very moment',
    '_Deliveries.note: 0  ->  1': 'when it was is not read',
    '_Deliveries.note: ...  ->  (... >= _MOST_DELIVERIES)': 'one more or less out of 1000',
    '_MOST_DELIVERIES: 1000  ->  1001': 'as above',
    '_DELIVERY_SECONDS: 86400  ->  86401': 'seconds out of five days',
    '_Upstream.ac_in_buffer_size: ...': 'slower or faster, and no more',
    '_Upstream.is_in_data: False  ->  True': 'the reply to EHLO sets it',
    '_Upstream._on_reply: _on_reply = None  ->  pass': '_wait_for_reply() and close() set it',
    "_Upstream._deadline: _deadline = float('inf')  ->  pass": '_wait_for_reply() sets it',
    "_Upstream._text: b''  ->  b'x'": 'nobody sees the text of a greeting',
    "_Upstream._exchange: 'out of step: '  ->  'out of step:'": 'a blank in the log',
    '_Upstream...  ->  (time.monotonic() >= self._deadline)': 'nobody hits the very moment',
    '_Upstream._wait_for_reply: self.initiate_send()  ->  pass': 'the loop sends it, a turn later',
    '_Upstream.collect_incoming_data: ...  ->  (... >= _MOST_OF_A_REPLY)':
        'one octet more or less',
    '_MOST_OF_A_REPLY: 65536  ->  65537': 'as above',
    '_is_success: 300  ->  301': 'the only 3yz reply is 354',
    '_Upstream.found_terminator: 100  ->  101': 'one octet more in the log',
    '_run: 1  ->  2...': 'how often it looks at time limits, and at what has come',
    '_run: True  ->  False': 'select() does as well, below 1024',
}
EQUIVALENT_PATTERNS = {
    name: re.compile(re.escape(name).replace(r'\.\.\.', '.*')) for name in EQUIVALENT}


# ---------------------------------------------------------------------------------------------
# Making mutants

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift}


class Mutant(collections.namedtuple(
        'Mutant', 'function start stop before after lines source ordinal')):
    """One change: module[start:stop], which is `before`, becomes `after`."""

    @property
    def key(self):
        """The same as long as the function and the change are."""
        return hashlib.sha256((self.source + '\0' + self.name).encode()).hexdigest()[:16]

    @property
    def is_equivalent(self):
        return any(pattern.fullmatch(self.name) for pattern in EQUIVALENT_PATTERNS.values())

    @property
    def name(self):
        """As it stands in EQUIVALENT; the second change of this kind in the function has a 2."""
        before, after = (' '.join(text.split()) for text in (self.before, self.after))
        number = ' (%d)' % (self.ordinal + 1) if self.ordinal else ''
        return '%s: %s  ->  %s%s' % (self.function, before, after, number)

    def __str__(self):
        return '%d, %s' % (self.lines[0], self.name)


def changed(node, **fields):
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def changes_of_expression(node):
    """The nodes that may stand in the place of this one."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield changed(node, ops=[COMPARISONS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for left_out in range(len(node.values)):
            rest = node.values[:left_out] + node.values[left_out + 1:]
            yield rest[0] if len(rest) == 1 else changed(node, values=rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield changed(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            yield ast.Constant(not value)
        elif isinstance(value, (int, float)):
            yield ast.Constant(value + 1)
        elif isinstance(value, (str, bytes)) and value != 'utf-8':  # 'utf-' is the same
            other = 'x' if isinstance(value, str) else b'x'
            yield ast.Constant(value[:-1] if len(value) > 1 else value + other)


def changes_of_statement(node):
    if isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield)):
        yield ast.Pass()
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete, ast.Raise)):
        yield ast.Pass()
    elif isinstance(node, ast.Return) and ast.unparse(node) not in ('return', 'return None'):
        yield ast.Return(None)
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.Break):
        yield ast.Continue()


def is_for_nobody(node, parents):
    """Docstrings, annotations, and __slots__, which cost memory and no more."""
    parent = parents.get(node)
    if isinstance(parent, (ast.Expr, ast.JoinedStr)) and isinstance(node, ast.Constant):
        return True
    while parent is not None:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__slots__':
            return True
        if getattr(parent, 'annotation', None) is node or getattr(parent, 'returns', None) is node:
            return True
        node, parent = parent, parents.get(parent)
    return False


def make_mutants(module):
    """All mutants of a module's text, in its order."""
    tree = ast.parse(module)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    lines = module.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]

    def position(line, column):  # ast counts columns in octets
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found = {}
    for node in ast.walk(tree):
        if not hasattr(node, 'lineno') or is_for_nobody(node, parents):
            continue
        start = position(node.lineno, node.col_offset)
        stop = position(node.end_lineno, node.end_col_offset)
        function, source = function_of(node, parents)
        for new in [*changes_of_expression(node), *changes_of_statement(node)]:
            after = ast.unparse(ast.fix_missing_locations(new))
            if isinstance(node, ast.expr) and not isinstance(node, ast.Constant):
                after = '(%s)' % after
            found[start, stop, after] = Mutant(function, start, stop, module[start:stop], after,
                                               lines_of(node, parents), source, 0)
    seen = collections.Counter()
    mutants = []
    for _, mutant in sorted(found.items()):
        alike = mutant.function, mutant.before, mutant.after
        mutants.append(mutant._replace(ordinal=seen[alike]))
        seen[alike] += 1
    return mutants


def lines_of(node, parents):
    """Those of its statement, or of the head of it."""
    while not isinstance(node, ast.stmt):
        node = parents[node]
    end = node.body[0].lineno - 1 if getattr(node, 'body', None) else node.end_lineno
    return range(node.lineno, max(node.lineno, end) + 1)


def function_of(node, parents):
    """The name of the function or the constant that it stands in, and the function's source."""
    names, functions = [], []
    while node is not None:
        if isinstance(node, ast.Assign) and isinstance(parents[node], (ast.ClassDef, ast.Module)):
            names.append(ast.unparse(node.targets[0]))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        if isinstance(node, ast.FunctionDef):
            functions.append(node)
        node = parents.get(node)
    return '.'.join(reversed(names)) or '(module)', unparse(functions[0]) if functions else ''


unparse = functools.lru_cache(maxsize=None)(ast.unparse)


def spread(mutants, count, seed):
    """So many of them, from all functions by turns; a change of one leaves the others alone."""
    order = sorted(mutants, key=lambda each: hashlib.sha256((seed + each.key).encode()).digest())
    turn = collections.Counter()
    for number, mutant in enumerate(order):
        order[number] = turn[mutant.function], number, mutant
        turn[mutant.function] += 1
    chosen = [mutant for _, _, mutant in sorted(order)[:count]]
    return sorted(chosen, key=lambda mutant: mutant.start)


# ---------------------------------------------------------------------------------------------
# Running

def pytest_runtest_logreport(report):
    """What pytest loads this module for: how long each test takes."""
    if 'MUTANTS_SECONDS' in os.environ:
        with open(os.environ['MUTANTS_SECONDS'], 'a', encoding='utf-8') as file:
            print(json.dumps([report.nodeid, report.duration, report.outcome]), file=file)


def start_pytest(directory, *options, **more):
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(('PYSMTPD', 'PYTEST', 'COVERAGE', 'PYTHONUNBUFFERED'))}
    return subprocess.Popen(
        [sys.executable, '-m', 'pytest', '-q', '--tb=no', '-rfE', *options], cwd=directory,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**environment, **more})


@contextlib.contextmanager
def copied_tree():
    with tempfile.TemporaryDirectory() as directory:
        for name in COPIED:
            source = os.path.join(TOP, name)
            if os.path.isdir(source):
                shutil.copytree(source, os.path.join(directory, name))
            else:
                shutil.copy2(source, directory)  # with its time: bytecode is kept
        yield directory


class Baseline:
    """Which tests reach which line, and how long each takes; from the unbroken module."""

    def __init__(self, tests):
        digest = hashlib.sha256(repr(tests).encode())
        for pattern in 'smtpd.py', 'test_smtpd.py', 'tests/*.py':
            for path in sorted(glob.glob(os.path.join(TOP, pattern))):
                with open(path, 'rb') as file:
                    digest.update(file.read())
        path = os.path.join(KEPT_IN, 'baseline-%s.json' % digest.hexdigest()[:16])
        if not os.path.exists(path):
            with copied_tree() as directory:
                self.measure(directory, tests, path)
        with open(path, encoding='utf-8') as file:
            self.seconds, self.reached = json.load(file)

    @staticmethod
    def measure(directory, tests, path):
        import coverage
        report, settings, data = (
            os.path.join(directory, name) for name in ('seconds', 'settings', '.coverage'))
        with open(settings, 'w', encoding='utf-8') as file:
            file.write('[run]\ncore = ctrace\ninclude = smtpd.py\n')
        process = start_pytest(
            directory, '--cov', '--cov-config', settings, '--cov-context=test', '--cov-report=',
            '-p', 'mutants', '-m', 'not slow and not real', *tests, MUTANTS_SECONDS=report,
            PYTHONPATH=os.path.dirname(os.path.abspath(__file__)))
        print('left out:' + re.sub('(?s).*=\n', '\n', process.communicate()[0]))
        seconds, left_out = collections.Counter(), set()
        with open(report, encoding='utf-8') as file:
            for name, duration, outcome in map(json.loads, file):
                seconds[name] += duration
                if outcome != 'passed':  # some cannot pass while coverage is measured
                    left_out.add(name)
        for name in left_out:
            del seconds[name]
        covered = coverage.CoverageData(data)
        covered.read()
        reached = {}
        for line, contexts in covered.contexts_by_lineno(*covered.measured_files()).items():
            names = {context.rpartition('|')[0] for context in contexts}
            if '' in names:  # at the import
                names.update(seconds)
            reached[line] = sorted(names.intersection(seconds))
        with open(path, 'w', encoding='utf-8') as file:
            json.dump([seconds, reached], file)

    def tests_of(self, mutant):
        """Those that reach it, the quick ones first; and how long one of them may take."""
        names = set().union(*(self.reached.get(str(line), ()) for line in mutant.lines))
        others = {name for name in self.seconds if any(word in name for word in IN_PROCESSES)}
        tests = sorted(names | others, key=lambda name: (name not in names, self.seconds[name]))
        return tests, 15 + 5 * max(map(self.seconds.get, tests))


def try_mutant(mutant, module, tests, timeout, directory):
    """What pytest says of the test that kills it; None if it lives."""
    with open(os.path.join(directory, 'smtpd.py'), 'w', encoding='utf-8') as file:
        file.write(module[:mutant.start] + mutant.after + module[mutant.stop:])
    shutil.rmtree(os.path.join(directory, '__pycache__'), ignore_errors=True)
    with open(os.path.join(directory, 'chosen'), 'w', encoding='utf-8') as file:
        file.writelines(name + '\n' for name in tests)
    process = start_pytest(directory, '-x', '--timeout=%d' % timeout, '--timeout-method=thread',
                           '@chosen')
    try:
        output, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        return 'time'
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if process.returncode == 0:
        return None
    killer = re.search('^(?:FAILED|ERROR) (.*)', output, re.MULTILINE)
    return killer[1] if killer else output[-100:]


def run_all(mutants, module, options):
    """Yield each mutant and what killed it, as far as time allows."""
    baseline = Baseline(options.tests)
    end = time.monotonic() + options.seconds
    with contextlib.ExitStack() as stack:
        directories = queue.SimpleQueue()
        for _ in range(options.processes):
            directories.put(stack.enter_context(copied_tree()))

        def run(mutant):
            if time.monotonic() >= end:
                return 'not tried'
            directory = directories.get()
            try:
                return try_mutant(mutant, module, *baseline.tests_of(mutant), directory)
            finally:
                directories.put(directory)

        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(options.processes))
        for mutant, killer in zip(mutants, pool.map(run, mutants)):
            if killer != 'not tried':
                yield mutant, killer


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('tests', nargs='*', default=TESTS, help='files for pytest')
    parser.add_argument('--count', type=int, default=400, help='mutants, from all functions')
    parser.add_argument('--seed', default='1', help='chooses them')
    parser.add_argument('--function', default='', help='a regular expression for their names')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after that')
    return parser.parse_args()


def main():
    options = parse_arguments()
    os.makedirs(KEPT_IN, exist_ok=True)
    with open(os.path.join(TOP, 'smtpd.py'), encoding='utf-8') as file:
        module = file.read()
    mutants = make_mutants(module)
    for name, pattern in EQUIVALENT_PATTERNS.items():
        if not any(pattern.fullmatch(mutant.name) for mutant in mutants):
            print('no longer there, remove it from EQUIVALENT:', name)
    chosen = spread([mutant for mutant in mutants if re.search(options.function, mutant.function)],
                    options.count, options.seed)
    with open(os.path.join(KEPT_IN, 'killed'), 'a+', encoding='utf-8') as file:
        file.seek(0)
        killed = {line.split()[0] for line in file}
        counts = collections.Counter(
            'equivalent' if mutant.is_equivalent else 'killed' if mutant.key in killed
            else 'not tried' for mutant in chosen)
        to_do = [mutant for mutant in chosen
                 if not mutant.is_equivalent and mutant.key not in killed]
        for mutant, killer in run_all(to_do, module, options) if to_do else ():
            counts['not tried'] -= 1
            counts['killed' if killer else 'living'] += 1
            if killer:
                print('killed', mutant, flush=True)
                print(mutant.key, mutant, 'by', killer.replace('\n', ' '), file=file, flush=True)
            else:
                print('LIVES', mutant, flush=True)
    print(', '.join('%d %s' % (count, outcome) for outcome, count in sorted(counts.items())))
    return bool(counts['living'])


if __name__ == '__main__':
    sys.exit(main())
