"""Breaks smtpd.py in one small place after the other, to see whether the tests notice.

    python tests/mutants.py --seconds 600

A mutant is the module with one operator, constant, condition or statement changed.
Each runs in a copy of the tree, with the tests that reach the changed line; those that
are quick come first, and the first that fails kills it. Results are kept under
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
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEPT_IN = os.path.join(TOP, '.mutants')
COPIED = ['smtpd.py', 'smtpd-stubs', 'setup.cfg', 'test_smtpd.py', 'tests']
NOT_SLOW = 'not slow and not real'
# Coverage sees what a test runs in its own process alone; these start others.
IN_PROCESSES = ('CommandLine', 'server_faults')
FEW = 20  # where no more tests than these reach a line, those that start processes run too

# Mutants that no user can tell from the module: (function, line, what its part becomes): why.
EQUIVALENT = {
    ('_Transport', 'idle_timeout_seconds = None', 'pass'): 'SMTPChannel has its own',
    ('_Transport._begin_anew', 'self._input_start = 0', 'pass'):
        "asynchat's __init__() sets ac_in_buffer, and that this",
    ('_Transport._begin_anew', 'self._is_mid_block = False', 'True'):
        'the first terminator is a line end, and each piece sets it',
    ('_Transport._client_has_ended', 'return False', 'return'): 'None is as false',
    ('_Transport._process_input',
     'while self._unread_input and self._gate <= _IDLE and self.connected:',
     '(self._gate <= _IDLE and self.connected)'): '_cut() finds no more in nothing',
    ('_Transport._look_for_idleness',
     'if limit is None or now - self._last_sign_of_life < limit or self._gate == _BUSY:',
     '(now - self._last_sign_of_life <= limit)'): 'no clock shows the very moment',
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
        'Mutant', 'function start stop before after line source text ordinal')):
    """One change: source[start:stop], which is `before`, becomes `after`."""

    @property
    def key(self):
        """The same as long as the function and the change are."""
        told = '\0'.join([self.function, self.source, self.before, self.after, str(self.ordinal)])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def applied_to(self, module):
        return module[:self.start] + self.after + module[self.stop:]

    def __str__(self):
        before, after = (' '.join(text.split()) for text in (self.before, self.after))
        return '%d, %s: %s  ->  %s' % (self.line, self.function, before[:90], after[:90])


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
        elif isinstance(value, (str, bytes)):
            other = 'x' if isinstance(value, str) else b'x'
            yield ast.Constant(value[:-1] if len(value) > 1 else value + other)


def changes_of_statement(node):
    if isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield)):
        yield ast.Pass()
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete, ast.Raise)):
        yield ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None:
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

    def function_of(node):
        names = []
        source, inner = '', True
        while node is not None:
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
                function, start, stop, before, after, node.lineno, source,
                module[starts[node.lineno - 1]:starts[node.lineno]].strip(), 0)
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
    """So many of them, from all functions by turns."""
    chance = random.Random(seed)
    by_function = collections.defaultdict(list)
    for mutant in mutants:
        by_function[mutant.function].append(mutant)
    for each in by_function.values():
        chance.shuffle(each)
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

def pytest_collection_modifyitems(config, items):
    names = os.environ.get('MUTANTS_TESTS')
    if names:
        with open(names, encoding='utf-8') as file:
            order = {name: number for number, name in enumerate(json.load(file))}
        items[:] = sorted((item for item in items if item.nodeid in order),
                          key=lambda item: order[item.nodeid])


def pytest_runtest_logstart(nodeid):
    if os.environ.get('MUTANTS_BASELINE'):
        import coverage
        coverage.Coverage.current().switch_context(nodeid)


def pytest_runtest_logfinish(nodeid):
    if os.environ.get('MUTANTS_BASELINE'):
        import coverage
        coverage.Coverage.current().switch_context('')


def pytest_runtest_logreport(report):
    if os.environ.get('MUTANTS_BASELINE'):
        with open(os.environ['MUTANTS_BASELINE'], 'a', encoding='utf-8') as file:
            print(json.dumps([report.nodeid, report.duration]), file=file)
    elif report.failed:
        print('KILLED BY', report.nodeid, flush=True)
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
            shutil.copytree(source, os.path.join(directory, name),
                            ignore=shutil.ignore_patterns('__pycache__'))
        elif os.path.exists(source):
            shutil.copy(source, directory)


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
        self.reached = {int(line): set(names) for line, names in kept['reached'].items()}
        self.in_processes = {name for name in self.seconds
                             if any(word in name for word in IN_PROCESSES)}

    @staticmethod
    def measure(tests, path):
        import coverage
        with tempfile.TemporaryDirectory() as directory:
            copy_tree(directory)
            report = os.path.join(directory, 'durations')
            data = os.path.join(directory, 'coverage')
            done = subprocess.run(
                [sys.executable, '-m', 'coverage', 'run', '--data-file', data, '--rcfile',
                 os.devnull, '--include', 'smtpd.py', '-m', 'pytest', '-q', '-p', 'mutants', '-m',
                 NOT_SLOW, *tests],
                cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
                env=clean_environment(MUTANTS_BASELINE=report))
            if done.returncode:
                sys.exit('the unbroken module fails:\n' + done.stdout)
            seconds = collections.Counter()
            with open(report, encoding='utf-8') as file:
                for line in file:
                    name, duration = json.loads(line)
                    seconds[name] += duration
            covered = coverage.CoverageData(data)
            covered.read()
            [module] = covered.measured_files()
            reached = {line: [name for name in names if name]
                       for line, names in covered.contexts_by_lineno(module).items()}
        with open(path, 'w', encoding='utf-8') as file:
            json.dump({'seconds': seconds, 'reached': reached}, file)

    def tests_of(self, mutant):
        """Those that reach it, the quick ones first; all, if none or if it runs at the import."""
        names = self.reached.get(mutant.line, set())
        if not names or not mutant.source:
            names = set(self.seconds)
        elif len(names) < FEW:
            names = names | self.in_processes
        return sorted(names, key=lambda name: (self.seconds[name], name))


def try_mutant(mutant, module, baseline, tests):
    """('killed', the test) or ('killed', 'time') or ('lives', None)."""
    names = baseline.tests_of(mutant)
    limit = 60 + 3 * sum(baseline.seconds[name] for name in names)
    with tempfile.TemporaryDirectory() as directory:
        copy_tree(directory)
        with open(os.path.join(directory, 'smtpd.py'), 'w', encoding='utf-8') as file:
            file.write(mutant.applied_to(module))
        chosen = os.path.join(directory, 'chosen.json')
        with open(chosen, 'w', encoding='utf-8') as file:
            json.dump(names, file)
        with open(os.path.join(directory, 'output'), 'w+', encoding='utf-8',
                  errors='replace') as output:
            process = subprocess.Popen(
                [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'mutants', '-m', NOT_SLOW,
                 '--tb=no', *tests],
                cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, env=clean_environment(MUTANTS_TESTS=chosen))
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                return 'killed', 'time'
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            killers = [line.split()[-1] for line in output if line.startswith('KILLED BY')]
    if status == 0:
        return 'lives', None
    return 'killed', killers[0] if killers else 'import'


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
    parser.add_argument('tests', nargs='*', default=['test_smtpd.py'], help='files for pytest')
    parser.add_argument('--count', type=int, default=400, help='mutants, from all functions')
    parser.add_argument('--seed', type=int, default=1, help='chooses them')
    parser.add_argument('--function', default='', help='a regular expression for their names')
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--seconds', type=float, default=float('inf'), help='stop after that')
    parser.add_argument('--list', action='store_true', help='run nothing: tell what is known')
    options = parser.parse_args()

    os.makedirs(KEPT_IN, exist_ok=True)
    with open(os.path.join(TOP, 'smtpd.py'), encoding='utf-8') as file:
        module = file.read()
    mutants = [mutant
               for mutant in spread(make_mutants(module), module, options.count, options.seed)
               if re.search(options.function, mutant.function)]
    path = os.path.join(KEPT_IN, 'results.jsonl')
    results = read_results(path)
    digest = digest_of_tests()
    to_do = [mutant for mutant in mutants if not is_known(mutant, results, digest)]
    if not options.list and to_do:
        baseline = Baseline(options.tests)
        end = time.monotonic() + options.seconds

        def run(mutant):
            if time.monotonic() < end:
                outcome, killer = try_mutant(mutant, module, baseline, options.tests)
                return {'key': mutant.key, 'mutant': str(mutant), 'outcome': outcome,
                        'by': killer, 'tests': digest}

        with concurrent.futures.ThreadPoolExecutor(options.processes) as pool, \
                open(path, 'a', encoding='utf-8') as file:
            for result in pool.map(run, to_do):
                if result is not None:
                    results[result['key']] = result
                    print(json.dumps(result), file=file, flush=True)
                    print(result['outcome'], result['mutant'], flush=True)
    return tell(mutants, results)


def is_known(mutant, results, digest):
    result = results.get(mutant.key)
    return (mutant_name(mutant) in EQUIVALENT or result is not None
            and (result['outcome'] == 'killed' or result['tests'] == digest))


def mutant_name(mutant):
    return mutant.function, mutant.text, ' '.join(mutant.after.split())


def tell(mutants, results):
    counts = collections.Counter()
    for mutant in mutants:
        if mutant_name(mutant) in EQUIVALENT:
            outcome = 'equivalent'
        else:
            outcome = results.get(mutant.key, {'outcome': 'not tried'})['outcome']
        counts[outcome] += 1
        if outcome == 'lives':
            print('LIVES', mutant)
    print(', '.join('%d %s' % (count, outcome) for outcome, count in sorted(counts.items())))
    return bool(counts['lives'])


if __name__ == '__main__':
    sys.exit(main())
