"""pytest reads this before any test; tests.support, imported first, chooses the module to test."""
import socket

import pytest

pytest.register_assert_rewrite('tests.support')

from tests.support import FQDN, Upstream


@pytest.fixture(autouse=True)
def fqdn(monkeypatch):
    """socket.getfqdn() can take seconds: pin it."""
    monkeypatch.setattr(socket, 'getfqdn', lambda name='': FQDN)
    return FQDN


@pytest.fixture
def upstream():
    with Upstream() as upstream:
        yield upstream
