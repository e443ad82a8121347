"""Where two logs part: in a field of the header, or in a number of an entry."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from zo.method.entry import Entry

IDENTITY = "run"
"""Field of the header that differs between any two runs, of one recipe too."""
SHOWN = 60
"""Characters of a value that a line has."""


def differences(
    one: tuple[Mapping[str, Any], Sequence[Entry]],
    other: tuple[Mapping[str, Any], Sequence[Entry]],
) -> list[str]:
    """Return a line for each field of the header that differs, and one for the first entry.

    Args:
        one: header and entries of a log.
        other: of another.

    Returns:
        Nothing if both describe the same weights; the identity of a run is not compared.
    """
    (header, entries), (header_2, entries_2) = one, other
    keys = sorted((header.keys() | header_2.keys()) - {IDENTITY})
    found = [
        f"header: {key} is {_shown(header.get(key))} and {_shown(header_2.get(key))}"
        for key in keys
        if header.get(key) != header_2.get(key)
    ]
    pairs = enumerate(zip(entries, entries_2, strict=False), 1)
    parted = next(((number, *pair) for number, pair in pairs if pair[0] != pair[1]), None)
    if parted is not None:
        number, a, b = parted
        return [*found, *(f"entry {number}: {part}" for part in fields_that_differ(a, b))]
    if len(entries) != len(entries_2):
        least = min(len(entries), len(entries_2))
        longer = "first" if len(entries) > least else "second"
        most = max(len(entries), len(entries_2))
        found.append(f"entry {least + 1}: the {longer} log alone has it, and goes on to {most}")
    return found


def fields_that_differ(one: Entry, other: Entry) -> Iterator[str]:
    """Yield a phrase for each number but a step that two entries do not share."""
    for name in ("position", "lr", "part"):
        a, b = getattr(one, name), getattr(other, name)
        if a != b:
            yield f"{name} is {a!r} and {b!r}"
    pairs = enumerate(zip_longest(one.scalars, other.scalars))
    parted = [(place, a, b) for place, (a, b) in pairs if a != b]
    if parted:
        place, a, b = parted[0]
        more = f", and {len(parted) - 1} more differ" if len(parted) > 1 else ""
        yield f"scalar {place} is {a!r} and {b!r}{more}"


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
