"""Valid bytes and values, damaged, as strategies of hypothesis; and the limits of a reader."""

import json
import os
import resource
import signal
import struct
from contextlib import contextmanager, suppress
from pathlib import Path

from hypothesis import strategies as st

from zo.errors import CONTROL, UserError

SECONDS, MEMORY_BYTES = 20, 2**30
REFUSALS = (UserError,)


class Slow(BaseException):
    """Raised in a reader that does not end."""


@contextmanager
def bounded():
    """Limit seconds and memory inside a ``with`` block, in the main thread."""

    def interrupt(number, frame):
        raise Slow

    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def feed(target, value):
    """Read one input; return true if it was refused.

    Raises:
        AssertionError: a refusal is not one short line.
        Exception: what a reader's callers do not expect.
    """
    refusals = getattr(target, "refusals", REFUSALS)
    try:
        with bounded():
            target(value)
    except refusals as error:
        if isinstance(error, UserError):
            said = str(error)
            assert said
            assert len(said) < 2500
            assert not CONTROL.search(said), said
        return True
    return False


NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400, 10**4000]),
    st.floats(),
    st.sampled_from([5e-324, 1.7e308, 0.1]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "\ud800",
            "\n",
            "\x1b[2J",
            "../../x",
            "/etc/passwd",
            "${oc.env:HOME}",
            "{a.b}",
            "{",
            "",
            "%s",
        ]
    ),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def nested(depth):
    """Return a list in so many lists."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = st.one_of(
    LEAVES,
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
        max_leaves=8,
    ),
    st.sampled_from([40, 200, 900]).map(nested),
)


def as_json(value):
    """Return JSON's bytes, also of numbers and texts that only Python's own reader takes."""
    with suppress(RecursionError, ValueError):
        return json.dumps(value).encode()
    return b"[" * 2000 + b"]" * 2000


EXTREMES = [0, 1, 2, 2**15, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1]
PLACE = st.integers(0, 2**16)
DAMAGE = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("put"), PLACE, st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("drop"), PLACE, st.integers(1, 60)),
    st.tuples(st.just("double"), PLACE, st.integers(1, 200)),
    st.tuples(st.just("cut"), PLACE, st.none()),
    st.tuples(st.just("count"), PLACE, st.sampled_from(EXTREMES)),
    st.tuples(st.just("float"), PLACE, st.sampled_from([float("nan"), float("inf"), 1e308])),
)


def damaged(whole, damages):
    """Return bytes with some damages done to them."""
    data = bytearray(whole)
    for kind, place, what in damages:
        at = place % (len(data) + 1)
        if kind == "flip" and data:
            data[place % len(data)] ^= 1 << what
        elif kind == "put":
            data[at : at + len(what)] = what
        elif kind == "insert":
            data[at:at] = what
        elif kind == "drop":
            del data[at : at + what]
        elif kind == "double":
            data[at:at] = data[at : at + what]
        elif kind == "cut":
            del data[at:]
        elif kind == "count":
            data[at : at + 4] = struct.pack("<I", what)
        elif kind == "float":
            data[at : at + 8] = struct.pack("<d", what)
    return bytes(data)


def damages_of(wholes, most=4):
    """Return a strategy of some bytes, damaged."""
    return st.builds(damaged, wholes, st.lists(DAMAGE, max_size=most))
