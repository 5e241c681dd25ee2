"""A server that must stay up through many hostile sessions."""
import os
import subprocess
import sys

import pytest

import smtpd
from tests.support import HERE


@pytest.mark.slow
@pytest.mark.parametrize('seed', [1, 2, 3])
def test_hostile_sessions(seed):
    """The short form of benchmarks/soak.py, which says what it does."""
    folders = [HERE, os.path.dirname(os.path.realpath(smtpd.__file__))]
    paths = [os.path.join(folder, 'benchmarks', 'soak.py') for folder in folders]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        pytest.skip('needs benchmarks/soak.py')
    done = subprocess.run(
        [sys.executable, path, '--commands=50000', '--seed=%d' % seed], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
