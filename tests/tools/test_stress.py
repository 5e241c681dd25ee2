"""The short form of each work of stress.py."""
import subprocess
import sys

import pytest

from tests.support import HERE, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith('linux'), reason='counts in /proc')]


@pytest.mark.parametrize('work', ['prefork --messages 400', 'random --seconds 5 --seed 1'])
def test_servers_in_bad_hours(work):
    # -W: from Python 3.12 on fork() warns of threads, and 3.10 and 3.11 of asyncore.
    command = [sys.executable, '-W', 'ignore', '-m', 'tests.tools.stress']
    # What coverage does in a child after fork() may hang, and takes memory.
    plain = {name: value for name, value in environment().items() if name[:8] != 'COVERAGE'}
    done = subprocess.run([*command, *work.split()], cwd=HERE, env=plain, timeout=240,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
