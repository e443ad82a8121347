"""SIGTERM, by which schedulers say that a process is to end soon, as something that a loop can ask for."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that is set when SIGTERM comes, which does not end the process meanwhile."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # Python lets the main thread alone handle signals: there the caller's handler stays.
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
