"""Runs many programs with the old module and ours, and shows what differs and is not allowed.

    python -m tests.tools.oracle --seeds 1000:21000 --old python3.11 --new python3.13

runs the old module of one Python against the smtpd.py of this checkout on another (which
needs asyncore and asynchat: name a virtual environment's), shrinks what differs and is
not allowed, and prints it.
"""
import argparse
import collections
import os
import re
import sys

from tests.compare_programs import compare_seeds, judge, shown_case, shown_event
from tests.programs import EMPTY_PROGRAM, Worker, make_program, method_source, shown
from tests.support import HERE

OUR_MODULE = os.path.join(HERE, 'smtpd.py')

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
            compile(method_source('f', [smaller]).strip(), '', 'exec')
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
        rows.update(needed)
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
    sys.exit(main())
