"""Breaks smtpd.py in one small place after the other, to see whether the tests notice.

    python tests/tools/mutants.py --seconds 600

A mutant is the module with one operator, constant, condition or statement changed.
Each runs in a copy of the tree, with the tests that reach the changed line, in the
processes that they start too; those that are quick come first, and the first that
fails, or takes many times as long as it should, kills it. Results are kept under
.mutants/, so that a run goes on where the one before it ended; after a change of the
tests, only those that lived are tried again.

It needs pytest and coverage, and loads itself into pytest as a plugin.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import copy
import functools
import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TOP = os.path.abspath(os.path.join(os.path.dirname(__file__), os.pardir, os.pardir))
KEPT_IN = os.path.join(TOP, '.mutants')
COPIED = ['smtpd.py', 'smtpd-stubs', 'setup.cfg', 'test_smtpd.py', 'tests', 'docs']
TESTS = ['test_smtpd.py', 'tests/test_channel.py', 'tests/test_server_faults.py',
         'tests/test_proxies.py', 'tests/test_oracle.py', 'tests/test_programs.py']
NOT_SLOW = 'not slow and not real'
# These run after all others, since coverage does not see all that they run: some end their
# processes with SIGKILL, or become nobody, who may write nothing.
IN_PROCESSES = ('CommandLine', 'server_faults')

# Each process that a test starts tells coverage which test it was.
COVERAGE = """
[run]
parallel = true
patch = _exit
sigterm = true
context = ${MUTANTS_TEST-}
include = %(directory)s/smtpd.py
data_file = %(directory)s/.coverage
"""

# Mutants that no user can tell from the module, as this program prints them, and why.
EQUIVALENT = {
    '_parse_command: not text.isprintable() and _CONTROL_CHARACTER.search(text)  ->  '
    '(_CONTROL_CHARACTER.search(text))': 'isprintable() is quick, and true of no such text',
    "_accepted_keywords: handler = getattr(handler, '__func__', handler)  ->  pass":
        'it is quick, and no more',
    "_without_cr: octets.count(b'\\r', 0, 1024) < 32  ->  "
    "(octets.count(b'\\r', 0, 1024) <= 32)": 'both ways give the same, one faster',
    'SMTPChannel.require_SMTPUTF8: False  ->  True': 'the first transaction sets it',
    'SMTPChannel._decode_data: False  ->  True': '__init__() sets it where it differs',
    'SMTPChannel._client_has_ended: return False  ->  return': 'None is as false',
    'SMTPChannel._client_has_ended: 1  ->  2': 'a peek at more is a peek',
    "SMTPChannel._decode_piece: ''  ->  'x'": 'nothing is cut off from either',
    'SMTPChannel._decode_piece: 3  ->  4': 'what is decoded a second time becomes the same',
    'SMTPChannel._execute_line: octets > limit  ->  (octets >= limit)':
        'the longest limit decides; this one spares its computation',
    'SMTPChannel._execute_line: octets > limit and octets > self.max_command_size_limit  ->  '
    '(octets > self.max_command_size_limit)': 'the same, computed for each line',
    'SMTPChannel._add_to_message: self.num_bytes > self.data_size_limit  ->  '
    '(self.num_bytes >= self.data_size_limit)': 'its last line end will be too much',
    "SMTPChannel._add_to_message: b''  ->  b'x'": 'it is refused, whatever it is',
    'SMTPChannel.smtp_EHLO: 0  ->  1': 'the other is larger',
    "SMTPChannel.smtp_MAIL: ''  ->  'x'": 'does not begin with the keyword either',
    "SMTPChannel.smtp_RCPT: ''  ->  'x'": 'does not begin with the keyword either',
    'SMTPChannel.smtp_MAIL: parameters.upper().split() if parameters else []  ->  '
    '(parameters.upper().split())': "'' gives no words, more slowly",
    'SMTPChannel.smtp_RCPT: parameters.upper().split() if parameters else []  ->  '
    '(parameters.upper().split())': "'' gives no words, more slowly",
    'SMTPChannel.smtp_MAIL: None if parameters == {} else '
    'self._refusal_of_mail_parameters(parameters)  ->  '
    '(self._refusal_of_mail_parameters(parameters))': 'it refuses none of none, more slowly',
    "SMTPChannel.smtp_HELP: ''  ->  'x'": 'not a command either',
    '_Reader.writable: return False  ->  return': 'None is as false',
    '_Threads.readable: return False  ->  return': 'None is as false',
    '_Threads.handle_read: 4096  ->  4097': 'any large number will do',
    "_deliveries_of: '_deliveries'  ->  '_deliverie'": 'nobody else knows the name',
    "_Relay.mail: 'BODY='  ->  'BODY'":
        'smtp_MAIL() lets no other parameter through that begins so',
    '_has_gone: 1  ->  2': 'a peek at more is a peek',
    "_digest: b'\\n'  ->  b'\\nx'": 'it stands between the two, whatever it is',
}


# ---------------------------------------------------------------------------------------------
# Making mutants

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift}


class Mutant(collections.namedtuple(
        'Mutant', 'function start stop before after line lines source ordinal')):
    """One change: source[start:stop], which is `before`, becomes `after`."""

    @property
    def key(self):
        """The same as long as the function and the change are."""
        told = '\0'.join([self.function, self.source, self.before, self.after, str(self.ordinal)])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def applied_to(self, module):
        return module[:self.start] + self.after + module[self.stop:]

    @property
    def name(self):
        """As it stands in EQUIVALENT; the second change of this kind in the function has a 2."""
        before, after = (' '.join(text.split()) for text in (self.before, self.after))
        number = ' (%d)' % (self.ordinal + 1) if self.ordinal else ''
        return '%s: %s  ->  %s%s' % (self.function, before, after, number)

    def __str__(self):
        return '%d, %s' % (self.line, self.name)


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
    starts = [0]
    for line in module.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    octets = [line.encode() for line in module.splitlines()]

    def position(line, column):  # ast counts columns in octets
        return starts[line - 1] + len(octets[line - 1][:column].decode())

    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    @functools.lru_cache(maxsize=None)
    def source_of(function):
        return ast.unparse(function)

    def lines_of(node):  # of its statement, or of the head of it
        while not isinstance(node, ast.stmt):
            node = parents[node]
        body = getattr(node, 'body', None)
        return range(node.lineno, max(node.lineno, body[0].lineno - 1 if body
                                      else node.end_lineno) + 1)

    def function_of(node):
        names = []
        source, inner = '', True
        while node is not None:
            if isinstance(node, ast.Assign) and isinstance(
                    parents[node], (ast.ClassDef, ast.Module)):
                names.append(ast.unparse(node.targets[0]))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.append(node.name)
                if inner and isinstance(node, ast.FunctionDef):
                    source, inner = source_of(node), False
            node = parents.get(node)
        return '.'.join(reversed(names)) or '(module)', source

    found = {}
    for node in ast.walk(tree):
        if not hasattr(node, 'lineno') or is_for_nobody(node, parents):
            continue
        start = position(node.lineno, node.col_offset)
        stop = position(node.end_lineno, node.end_col_offset)
        before = module[start:stop]
        for new in [*changes_of_expression(node), *changes_of_statement(node)]:
            after = ast.unparse(ast.fix_missing_locations(new))
            if isinstance(node, ast.expr) and not isinstance(node, ast.Constant):
                after = '(%s)' % after
            function, source = function_of(node)
            found[start, stop, after] = Mutant(
                function, start, stop, before, after, node.lineno, lines_of(node), source, 0)
    seen = collections.Counter()
    mutants = []
    for place in sorted(found):
        mutant = found[place]
        alike = mutant.function, mutant.before, mutant.after
        mutants.append(mutant._replace(ordinal=seen[alike]))
        seen[alike] += 1
    return mutants


def is_module(text):
    try:
        compile(text, 'smtpd.py', 'exec')
    except SyntaxError:
        return False
    return True


def spread(mutants, module, count, seed):
    """So many of them, from all functions by turns; a change of one leaves the others alone."""
    by_function = collections.defaultdict(list)
    for mutant in mutants:
        by_function[mutant.function].append(mutant)
    for name, each in by_function.items():
        random.Random('%s %s' % (seed, name)).shuffle(each)
    chosen = []
    while len(chosen) < count and any(by_function.values()):
        for each in by_function.values():
            if each and len(chosen) < count:
                mutant = each.pop()
                if is_module(mutant.applied_to(module)):
                    chosen.append(mutant)
    return sorted(chosen, key=lambda mutant: mutant.start)


# ---------------------------------------------------------------------------------------------
# What pytest loads: tells coverage which test runs, or picks tests and limits their time

def baseline_coverage():
    import coverage
    return os.environ.get('MUTANTS_BASELINE') and coverage.Coverage.current()


def pytest_configure():
    if baseline_coverage():
        os.environ['COVERAGE_PROCESS_START'] = os.environ['MUTANTS_RCFILE']
        subprocess.Popen.kill = end_gently


def end_gently(process):
    """SIGKILL would leave coverage no time to save what it has seen."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.send_signal(signal.SIGKILL)


@functools.lru_cache(maxsize=None)
def chosen_tests():
    """The seconds that each may take, in the order in which they run."""
    with open(os.environ['MUTANTS_TESTS'], encoding='utf-8') as file:
        return json.load(file)


def pytest_collection_modifyitems(config, items):
    if os.environ.get('MUTANTS_TESTS'):
        order = {name: number for number, name in enumerate(chosen_tests())}
        items[:] = sorted((item for item in items if item.nodeid in order),
                          key=lambda item: order[item.nodeid])


def pytest_runtest_logstart(nodeid):
    if baseline_coverage():
        baseline_coverage().switch_context(nodeid)
        os.environ['MUTANTS_TEST'] = nodeid
    else:
        signal.signal(signal.SIGALRM, lambda *_: killed_by(nodeid, 'which takes too long'))
        signal.alarm(chosen_tests()[nodeid])


def pytest_runtest_logfinish(nodeid):
    if baseline_coverage():
        baseline_coverage().switch_context('')
        os.environ['MUTANTS_TEST'] = ''
    else:
        signal.alarm(0)


def pytest_runtest_logreport(report):
    if baseline_coverage():
        with open(os.environ['MUTANTS_BASELINE'], 'a', encoding='utf-8') as file:
            print(json.dumps([report.nodeid, report.duration]), file=file)
    elif report.failed:
        killed_by(report.nodeid)


def killed_by(*told):
    with open(os.environ['MUTANTS_TESTS'] + '.killer', 'w', encoding='utf-8') as file:
        print(*told, file=file)
    os._exit(1)  # a thread of the mutant's may not end


# ---------------------------------------------------------------------------------------------
# Running

def clean_environment(**more):
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(('PYSMTPD', 'PYTEST', 'COVERAGE', 'PYTHONUNBUFFERED'))}
    return dict(environment, PYTHONPATH=os.path.dirname(os.path.abspath(__file__)), **more)


def copy_tree(directory):
    for name in COPIED:
        source = os.path.join(TOP, name)
        if os.path.isdir(source):
            shutil.copytree(source, os.path.join(directory, name), dirs_exist_ok=True)
        elif os.path.exists(source):
            shutil.copy2(source, directory)  # with its time: bytecode is kept


def digest_of_tests():
    """Of what may change which lines a test reaches."""
    digest = hashlib.sha256()
    for folder, _, names in sorted(os.walk(os.path.join(TOP, 'tests'))):
        for name in sorted(names):
            if name.endswith('.py') and name != 'mutants.py':
                with open(os.path.join(folder, name), 'rb') as file:
                    digest.update(file.read())
    for name in ('smtpd.py', 'test_smtpd.py'):
        with open(os.path.join(TOP, name), 'rb') as file:
            digest.update(file.read())
    return digest.hexdigest()[:16]


class Baseline:
    """Which tests reach which line, and how long each takes; from the unbroken module."""

    def __init__(self, tests):
        path = os.path.join(KEPT_IN, 'baseline-%s.json' % digest_of_tests())
        if not os.path.exists(path):
            self.measure(tests, path)
        with open(path, encoding='utf-8') as file:
            kept = json.load(file)
        self.seconds = kept['seconds']
        self.reached = {int(line): set(self.seconds if names is None else names)
                        for line, names in kept['reached'].items()}
        self.in_processes = {name for name in self.seconds
                             if any(word in name for word in IN_PROCESSES)}

    @staticmethod
    def measure(tests, path):
        import coverage
        with tempfile.TemporaryDirectory() as directory:
            copy_tree(directory)
            report = os.path.join(directory, 'durations')
            settings = os.path.join(directory, 'coveragerc')
            with open(settings, 'w', encoding='utf-8') as file:
                file.write(COVERAGE % {'directory': directory})
            run = [sys.executable, '-m', 'coverage', 'run', '--rcfile', settings, '-m', 'pytest',
                   '-q', '-p', 'mutants', '-m', NOT_SLOW, *tests]
            done = subprocess.run(
                run, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
                env=clean_environment(MUTANTS_BASELINE=report, MUTANTS_RCFILE=settings))
            if done.returncode:
                sys.exit('the unbroken module fails:\n' + done.stdout)
            seconds = collections.Counter()
            with open(report, encoding='utf-8') as file:
                for line in file:
                    name, duration = json.loads(line)
                    seconds[name] += duration
            whole = coverage.Coverage(config_file=settings)
            whole.combine()
            covered = whole.get_data()
            [module] = covered.measured_files()
            reached = {line: None if '' in names else names  # '': at the import, so by all
                       for line, names in covered.contexts_by_lineno(module).items()}
        with open(path, 'w', encoding='utf-8') as file:
            json.dump({'seconds': seconds, 'reached': reached}, file)

    def tests_of(self, mutant, at_most=None):
        """Those that reach it, the quick ones first; all, if it runs at the import.

        With the seconds that each may take.
        """
        names = set().union(*(self.reached.get(line, ()) for line in mutant.lines))
        order = sorted(names | self.in_processes, key=lambda name: (
            name not in names, self.seconds[name], name))
        if at_most and len(order) > at_most:
            order = [order[number * len(order) // at_most] for number in range(at_most)]
        return {name: 15 + int(5 * self.seconds[name]) for name in order}


def try_mutant(mutant, module, tests, directory):
    """('killed', the test) or ('lives', None)."""
    with open(os.path.join(directory, 'smtpd.py'), 'w', encoding='utf-8') as file:
        file.write(mutant.applied_to(module))
    shutil.rmtree(os.path.join(directory, '__pycache__'), ignore_errors=True)
    chosen = os.path.join(directory, 'chosen.json')
    with open(chosen, 'w', encoding='utf-8') as file:
        json.dump(tests, file)
    process = subprocess.Popen(
        [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'mutants', '--tb=no',
         *sorted({name.partition('::')[0] for name in tests})],
        cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
        env=clean_environment(MUTANTS_TESTS=chosen))
    try:
        status = process.wait(60 + sum(tests.values()))
    except subprocess.TimeoutExpired:
        return 'killed', 'time'
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if status == 0:
        return 'lives', None
    assert status != 5, 'pytest found none of the tests'
    killer = chosen + '.killer'
    if not os.path.exists(killer):
        return 'killed', 'import'
    with open(killer, encoding='utf-8') as file:
        told = file.read().strip()
    os.remove(killer)
    return 'killed', told


def read_results(path):
    results = {}
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            for line in file:
                each = json.loads(line)
                results[each['key']] = each
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('tests', nargs='*', default=TESTS, help='files for pytest')
    parser.add_argument('--count', type=int, default=400, help='mutants, from all functions')
    parser.add_argument('--seed', type=int, default=1, help='chooses them')
    parser.add_argument('--function', default='', help='a regular expression for their names')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after that')
    parser.add_argument('--at-most', type=int, metavar='N',
                        help='run N of the tests that reach each, and forget what lives')
    parser.add_argument('--list', action='store_true', help='run nothing: tell what is known')
    options = parser.parse_args()

    os.makedirs(KEPT_IN, exist_ok=True)
    with open(os.path.join(TOP, 'smtpd.py'), encoding='utf-8') as file:
        module = file.read()
    all_mutants = make_mutants(module)
    for name in set(EQUIVALENT).difference(mutant.name for mutant in all_mutants):
        print('no longer there, remove it from EQUIVALENT:', name)
    mutants = [mutant for mutant in spread(all_mutants, module, options.count, options.seed)
               if re.search(options.function, mutant.function)]
    path = os.path.join(KEPT_IN, 'results.jsonl')
    results = read_results(path)
    digest = digest_of_tests()
    to_do = [mutant for mutant in mutants if not is_known(mutant, results, digest)]
    if not options.list and to_do:
        baseline = Baseline(options.tests)
        end = time.monotonic() + options.seconds

        with contextlib.ExitStack() as stack:
            directories = queue.SimpleQueue()
            for _ in range(options.processes):
                directory = stack.enter_context(tempfile.TemporaryDirectory())
                copy_tree(directory)
                directories.put(directory)

            def run(mutant):
                if time.monotonic() >= end:
                    return None
                directory = directories.get()
                tests = baseline.tests_of(mutant, options.at_most)
                outcome, killer = try_mutant(mutant, module, tests, directory)
                directories.put(directory)
                return {'key': mutant.key, 'mutant': str(mutant), 'outcome': outcome,
                        'by': killer, 'tests': digest}

            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(options.processes))
            file = stack.enter_context(open(path, 'a', encoding='utf-8'))
            for result in pool.map(run, to_do):
                if result is not None:
                    print(result['outcome'], result['mutant'], flush=True)
                    if result['outcome'] == 'killed' or not options.at_most:
                        results[result['key']] = result
                        print(json.dumps(result), file=file, flush=True)
    return tell(mutants, results, module)


def is_known(mutant, results, digest):
    result = results.get(mutant.key)
    return (mutant.name in EQUIVALENT or result is not None
            and (result['outcome'] == 'killed' or result['tests'] == digest))


def section_of(mutant, module):
    titles = re.findall(r'^# -{75}\n# (.*)\n# -{75}\n', module[:mutant.start], re.MULTILINE)
    return titles[-1] if titles else 'Names of the module'


def tell(mutants, results, module):
    by_section = collections.defaultdict(collections.Counter)
    for mutant in mutants:
        if mutant.name in EQUIVALENT:
            outcome = 'equivalent'
        else:
            outcome = results.get(mutant.key, {'outcome': 'not tried'})['outcome']
        by_section[section_of(mutant, module)][outcome] += 1
        if outcome == 'lives':
            print('LIVES', mutant)
    for section, counts in by_section.items():
        print('%s: %s' % (section, told(counts)))
    counts = sum(by_section.values(), collections.Counter())
    print('all: ' + told(counts))
    return bool(counts['lives'])


def told(counts):
    return ', '.join('%d %s' % (count, outcome) for outcome, count in sorted(counts.items()))


if __name__ == '__main__':
    sys.exit(main())
