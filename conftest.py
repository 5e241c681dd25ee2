"""pytest reads this before any test; tests.support, imported first, chooses the module to test."""
import socket
import threading
import time
import types

import pytest

pytest.register_assert_rewrite('tests.support')

from tests.support import FQDN, Upstream, smtpd  # not by itself: tests.support chooses it


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test():
    before = threading.enumerate()
    yield
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(10)
            assert not thread.is_alive(), thread


@pytest.fixture(autouse=True)
def fqdn(monkeypatch):
    """socket.getfqdn() can take seconds: pin it."""
    monkeypatch.setattr(socket, 'getfqdn', lambda name='': FQDN)
    return FQDN


@pytest.fixture
def upstream():
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(params=[False, True], ids=['in the map', 'in the selector'])
def selector(request, monkeypatch):
    monkeypatch.setattr(smtpd.SMTPServer, 'channels_in_selector', request.param)
    return request.param


@pytest.fixture
def clock(monkeypatch):
    """Its `seconds` are what the monotonic clock is ahead of the real one."""
    clock = types.SimpleNamespace(seconds=0)
    monotonic = time.monotonic
    monkeypatch.setattr(time, 'monotonic', lambda: monotonic() + clock.seconds)
    return clock
