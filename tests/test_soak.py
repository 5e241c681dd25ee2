"""Servers that must stay up through hostile sessions and bad hours."""
import os
import subprocess
import sys

import pytest

from tests.support import HERE, environment

pytestmark = pytest.mark.slow


def run(*command):
    # What coverage does in another process takes memory, which is counted.
    plain = {name: value for name, value in environment().items() if name[:8] != 'COVERAGE'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *command], cwd=HERE, env=plain, text=True, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('seed', [1, 2, 3])
def test_hostile_sessions(seed):
    """The short form of benchmarks/soak.py, which says what it does."""
    path = os.path.join(HERE, 'benchmarks', 'soak.py')
    if not os.path.exists(path):
        pytest.skip('needs benchmarks/soak.py')
    run(path, '--commands=50000', '--seed=%d' % seed)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='counts in /proc')
def test_bad_hours():
    """The short form of tools/stress.py."""
    run('-m', 'tests.tools.stress', '--seconds=5', '--seed=1')
