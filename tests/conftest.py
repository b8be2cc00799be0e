"""What no test may leave behind: signal handlers of common.run and the loops, scans in the user's cache."""

import signal

import pytest

import common

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path_factory, monkeypatch):
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    monkeypatch.setattr(common, "CACHE", tmp_path_factory.getbasetemp() / "cache")
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)
