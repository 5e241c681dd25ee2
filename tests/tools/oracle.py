"""Runs many programs with the old module and ours, and shows what differs and is not allowed.

    python -m tests.tools.oracle --seeds 1000:21000 --old python3.11 --new python3.13

runs the old module of one Python against the smtpd.py of this checkout on another (which
needs asyncore and asynchat: name a virtual environment's), shrinks what differs and is
not allowed, and prints it.
"""
import argparse
import collections
import os
import sys
import textwrap

from tests.compare_programs import compare_seeds, judge, shown_case, shown_event
from tests.programs import EMPTY_PROGRAM, Worker, make_program, shown
from tests.support import HERE

OUR_MODULE = os.path.join(HERE, 'smtpd.py')

# ---------------------------------------------------------------------------
# Shrinking

def shrunk(program, is_interesting):
    """The smallest program found by leaving things out that is still interesting."""
    smaller = program
    while smaller:
        program = smaller
        smaller = next(filter(is_interesting, smaller_programs(program)), None)
    return program


def smaller_programs(program):
    client = program['client']
    for number, event in enumerate(client):
        before, after = client[:number], client[number + 1:]
        yield {**program, 'client': before}
        yield {**program, 'client': before + after}
        if event[0] == 'feed':
            for text in _with_less(event[1]):
                yield {**program, 'client': before + [['feed', text]] + after}
    for name, value in program.items():
        if name != 'client' and value != EMPTY_PROGRAM[name]:
            yield {**program, name: EMPTY_PROGRAM[name]}
            for less in _with_less(value):
                yield {**program, name: less}


def _with_less(thing):
    """The same with one part left out; a program that is none any more differs in nothing."""
    if isinstance(thing, dict):
        for name, value in thing.items():
            yield {key: other for key, other in thing.items() if key != name}
            for less in _with_less(value):
                yield {**thing, name: less}
    elif isinstance(thing, list) and thing and isinstance(thing[0], str):  # statements
        for number, statement in enumerate(thing):
            yield thing[:number] + thing[number + 1:]
            for less in _with_less(statement):
                yield thing[:number] + [less] + thing[number + 1:]
    elif isinstance(thing, str) and len(thing.splitlines()) > 1:
        lines = thing.splitlines(keepends=True)
        for number in range(len(lines)):
            yield textwrap.dedent(''.join(lines[:number] + lines[number + 1:]))


# ---------------------------------------------------------------------------
# The command line

def signature(case):
    """What differences of the same origin have in common, mostly."""
    if case.old_rest[0][0] == case.new_rest[0][0] == 'state':
        return 'state of ' + ' '.join(sorted(case.state_differs_in()))
    return ' / '.join(event[0] if event[0] == 'state' else shown_event(event)[:25]
                      for event in (case.old_rest[0], case.new_rest[0]))


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--seeds', default='0:1000', help='first:last+1')
    parser.add_argument('--old', default='python3.11', help='a Python with the old module')
    parser.add_argument('--new', default=sys.executable, help='the Python for ours')
    parser.add_argument('--shrink', type=int, default=1, help='so many of each kind (default 1)')
    parser.add_argument('--show', help='the seed of one program: show it and both traces')
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    with Worker(options.old) as old, Worker(options.new, OUR_MODULE) as new:
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
    for kind, cases in sorted(faults.items(), key=lambda item: -len(item[1])):
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
