"""What no test may leave behind: signal handlers of common.run and the loops."""

import signal

import pytest

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def nothing_left():
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)
