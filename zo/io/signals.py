"""SIGTERM as a flag that the training loop polls, and an immediate end on SIGINT.

A second SIGTERM ends the process at once, too.

A process that a signal ends does not unwind: an exception raised by a handler could be swallowed in
a library, in a destructor or in a greenlet, and a process that waits for another rank in C would
never see it. It prints one line, does what :func:`before_end` has, removes unfinished folders, and
exits. The log is as safe as after ``kill -9``.
"""

import ctypes
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ANSWER_S = 0.5
"""Seconds that the main thread has to answer a signal; it may be in a long call, and another thread
answers then."""

LAST_ACT_S = 1.0
"""Seconds that what is to be done before a signal's end may take; a dead disk must not delay it."""

_stopping: list[threading.Event] = []
_unfinished: set[Path] = set()
_last_acts: list[Callable[[], None]] = []
_remedy = ["start the same command again"]


@contextmanager
def termination() -> Iterator[threading.Event]:
    """Yield an event that the first SIGTERM sets; a second SIGTERM ends the process."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # Only the main thread may set handlers: the caller's stays.
        return
    before = signal.getsignal(signal.SIGTERM)
    if before is not _drain:
        signal.signal(signal.SIGTERM, lambda number, _: _answer(number))
    _stopping.append(asked)
    try:
        yield asked
    finally:
        _stopping.remove(asked)
        signal.signal(signal.SIGTERM, before)


def end_on_signals() -> None:
    """Have SIGINT and SIGTERM end this process at once, in one line and without a traceback.

    For commands, which call it before they import anything that takes long. Exit code 128 + signal:
    130 and 143.
    """
    global _pipe
    _pipe, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        if (
            signal.getsignal(number) is not signal.SIG_IGN
        ):  # As nohup and a shell's background jobs have it.
            signal.signal(number, _drain)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_answer_for_main, daemon=True).start()


def set_remedy(remedy: str) -> None:
    """Set the end of the line that a process ended by a signal prints: how to resume."""
    _remedy[0] = remedy


@contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Have a folder removed if a signal ends the process within this block."""
    _unfinished.add(path)
    try:
        yield
    finally:
        _unfinished.discard(path)


@contextmanager
def before_end(act: Callable[[], None]) -> Iterator[None]:
    """Have a function called if a signal ends the process within this block."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)


_pipe = -1
"""Read end of the pipe into which Python writes a byte for each signal, whatever the main thread
does."""


def _drain(*_: object) -> None:
    """Answer the signals that nobody has answered yet, each once."""
    with suppress(BlockingIOError):
        for number in os.read(_pipe, 16):
            _answer(number)


def _answer_for_main() -> None:
    """Answer signals while the main thread is in a call that does not return."""
    while True:
        select.select([_pipe], [], [])
        time.sleep(ANSWER_S)
        _drain()


def _answer(number: int) -> None:
    if number == signal.SIGTERM and _stopping and not _stopping[-1].is_set():
        _stopping[-1].set()
        _say("SIGTERM: the run ends after this step; send it again to end now")
    elif number in (signal.SIGINT, signal.SIGTERM):
        _end(number)


def _end(number: int) -> None:
    _say(f"ended by {signal.Signals(number).name}; {_remedy[0]}")
    with suppress(RuntimeError):  # No thread can be started.
        thread = threading.Thread(target=lambda: [act() for act in _last_acts], daemon=True)
        thread.start()
        thread.join(LAST_ACT_S)
    for path in list(_unfinished):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(128 + number)


def _say(line: str) -> None:
    """Write one line to stderr, on rank 0, by a system call: a print may be interrupted."""
    if int(os.environ.get("RANK", 0)) == 0:
        with suppress(OSError):
            os.write(2, f"{chr(10) * os.isatty(2)}{line}\n".encode())


def _forget() -> None:
    """Give a forked child the system's way with signals: its parent's pipe is not its own."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _drain:
            signal.signal(number, signal.SIG_DFL)
    _stopping.clear()
    _unfinished.clear()
    _last_acts.clear()


@contextmanager
def end_with_reader() -> Iterator[None]:
    """End this process without a traceback, exit code 141, where the reader of its output is gone.

    As SIGPIPE does to other commands, for ``zo recipes | head -1``. The signal itself stays
    ignored, as Python has it: it would also end a run whose tracker closes a connection.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        for descriptor in (1, 2):
            poll.register(descriptor, 0)  # Reports POLLERR in any case.
        if not poll.poll(0):
            raise
        os._exit(128 + signal.SIGPIPE)


PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def end_with_agent() -> None:
    """Have Linux kill this process when the torchrun agent that started it dies.

    An agent that is killed by SIGKILL cannot end its ranks: they would train on, unseen, and keep
    the run folder's lock from the command that resumes. SIGKILL, for a step may take minutes and
    none is lost by it. The kernel watches the parent from this call on, so it comes early;
    without torchrun, or elsewhere than on Linux, nothing is changed.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # It died before the call.
        os.kill(os.getpid(), signal.SIGKILL)
