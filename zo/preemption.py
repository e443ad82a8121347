"""The end of a process as others ask for it: SIGTERM from a scheduler, and the death of torchrun's agent."""

import ctypes
import os
import signal
import sys
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


PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def end_with_agent() -> None:
    """Have Linux kill this process when the torchrun agent that started it dies.

    An agent that is killed by SIGKILL cannot end its ranks: they would train on, unseen, and keep the run folder's lock
    from the command that is to go on. SIGKILL, for a step may take minutes and none is lost by it. The kernel watches
    the parent from this call on, so it comes early; without torchrun, or elsewhere than on Linux, nothing is changed.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # It died before the call.
        os.kill(os.getpid(), signal.SIGKILL)
