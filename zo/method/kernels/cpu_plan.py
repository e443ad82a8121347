"""The work of one pass by rank-one directions, cut for the CPU kernel: groups, and rectangles.

A rectangle is a piece of a matrix: int64 ``[first element in the weights, rows, columns, elements
from row to row, address of the first row's bits, address of the first column's bits]``.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from zo.method import perturbation as p
from zo.method.passes import GROUP

BLOCK = 1 << 16
"""Elements of the table, and of a block of rows: both stay in a second-level cache of 1 MiB."""
VECTORS = 128
"""Most vectors in the table, so that each may have 512 columns."""
COLUMNS = 2048
"""Most columns of a rectangle."""


class Plan(NamedTuple):
    """A pass's numbers as the kernel takes them: its changes' groups, then one for each probe."""

    seed: np.uint64
    bits_a_word: int
    steps: np.ndarray
    decays: np.ndarray
    first_groups: np.ndarray
    """Groups of change e begin here; one more number than changes."""
    probes: np.ndarray
    """Group of each probe; -1 for the weights as they are."""
    first_terms: np.ndarray
    """Terms of group g begin here; one more number than groups."""
    directions: np.ndarray
    coefficients: np.ndarray
    """Bits of each term's coefficient."""
    vectors: np.ndarray
    """Number of a group's first vector in the table."""
    fills: np.ndarray
    """Fill of the table that a group belongs to."""
    first_of_fill: np.ndarray
    """Groups of fill f begin here; one more number than fills."""


@lru_cache(maxsize=256)
def plan_of(work: p.Pass) -> tuple[Plan, int]:
    """Return a pass's numbers, read only, and the most columns of its rectangles."""
    groups: list[tuple[tuple[int, float], ...]] = []
    first_groups = [0]
    for change in work.changes:
        terms = list(zip(change.directions, change.coefficients, strict=True))
        for first in range(0, len(terms), GROUP):
            if group := tuple((d, c) for d, c in terms[first : first + GROUP] if c != 0.0):
                groups.append(group)
        first_groups.append(len(groups))
    probes = []
    for probe in work.probes:
        probes.append(len(groups) if probe.scale != 0.0 else -1)
        if probe.scale != 0.0:
            groups.append(((probe.direction, probe.scale),))
    vectors, fills, first_of_fill, used = [], [], [0], 0
    for number, group in enumerate(groups):
        if used + (1 << len(group)) > VECTORS:
            first_of_fill.append(number)
            used = 0
        vectors.append(used)
        fills.append(len(first_of_fill) - 1)
        used += 1 << len(group)
    most = VECTORS if len(first_of_fill) > 1 else max(used, 1)
    terms = [term for group in groups for term in group]
    plan = Plan(
        np.uint64(work.seed),
        32,
        np.array([c.step for c in work.changes], np.uint64),
        np.array([c.decay for c in work.changes], np.float32),
        np.array(first_groups),
        np.array(probes, np.int64),
        np.cumsum([0, *map(len, groups)]),
        np.array([d for d, _ in terms], np.uint64),
        np.array([c for _, c in terms], np.float32).view(np.uint32),
        np.array(vectors, np.int64),
        np.array(fills, np.int64),
        np.array([*first_of_fill, len(groups)]),
    )
    return plan, min(COLUMNS, BLOCK // most // 16 * 16)


@lru_cache(maxsize=256)
def rectangles_of(
    address: int, count: int, matrices: tuple[p.Matrices, ...], columns: int, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rectangles of a segment, and where those of each of ``parts`` parts begin.

    Args:
        address: of the segment.
        count: its elements.
        matrices: where matrices are.
        columns: the most of a rectangle.
        parts: number of equal parts of the segment, one a thread.
    """
    cuts = [address + count * part // parts for part in range(parts + 1)]
    found = [
        [cut for m in matrices for cut in _cut(m, max(low, m.start), min(high, m.stop), columns)]
        for low, high in pairwise(cuts)
    ]
    joined = [np.concatenate(part) if part else np.zeros((0, 6), np.int64) for part in found]
    for part in joined:
        part[:, 0] -= address
    return np.concatenate(joined), np.cumsum([0, *map(len, joined)])


def _cut(m: p.Matrices, low: int, high: int, columns: int) -> list[np.ndarray]:
    """Return rectangles of the elements at addresses ``low .. high`` of a parameter."""
    if low >= high:
        return []
    (first, skipped), (last, left) = divmod(low - m.start, m.width), divmod(high - m.start, m.width)
    if first == last:
        return [_strips(m, np.array([first]), np.array([first + 1]), skipped, left, columns)]
    found = []
    if skipped:
        found.append(
            _strips(m, np.array([first]), np.array([first + 1]), skipped, m.width, columns)
        )
        first += 1
    if first < last:
        starts = np.arange(first // m.rows, (last - 1) // m.rows + 1) * m.rows
        bounds = np.maximum(starts, first), np.minimum(starts + m.rows, last)
        found.append(_strips(m, *bounds, 0, m.width, columns))
    if left:
        found.append(_strips(m, np.array([last]), np.array([last + 1]), 0, left, columns))
    return found


def _strips(
    m: p.Matrices, first: np.ndarray, last: np.ndarray, low: int, high: int, columns: int
) -> np.ndarray:
    """Return rectangles of the rows ``first[i] .. last[i]`` and the columns ``low .. high``.

    The rows i are of one matrix. One strip of columns comes after the other; ``place`` is an
    address.
    """
    strips = -(-(high - low) // columns)
    step = -(-(high - low) // (16 * strips)) * 16
    begin = np.arange(low, high, step)[:, None]
    shape = len(begin), len(first)
    fields = (
        m.start + first * m.width + begin,
        last - first,
        np.minimum(step, high - begin),
        m.width,
        m.start + first,
        m.start + first // m.rows * m.width + begin,
    )
    return np.stack([np.broadcast_to(f, shape) for f in fields], axis=-1).reshape(-1, 6)


def rows_of(
    rows: p.Rows, address: int, count: int, matrices: tuple[p.Matrices, ...], columns: int
) -> np.ndarray | None:
    """Return rectangles of the rows that will be read; None if they are not those of a matrix."""
    numbers = np.unique(rows.numbers.numpy())
    for m in matrices:
        first, skipped = divmod(address - m.start, m.width)
        end = min(m.stop, address + count)
        if m.start <= address < m.stop and skipped == 0 and rows.width == m.width:
            inside = len(numbers) == 0 or address + (int(numbers[-1]) + 1) * m.width <= end
            if inside:
                found = _strips(m, first + numbers, first + numbers + 1, 0, m.width, columns)
                found[:, 0] -= address
                return found
    return None


def spans_between(
    matrices: tuple[p.Matrices, ...], address: int, count: int
) -> list[tuple[int, int]]:
    """Return the elements of a segment that are in no matrix, as (first, stop)."""
    spans, at = [], address
    for m in (*matrices, None):
        first = address + count if m is None else min(m.start, address + count)
        if at < first:
            spans.append((at - address, first - address))
        at = at if m is None else max(at, m.stop)
    return spans
