"""Replay and perturb matrices on CPU by rank-one directions: no element of z is ever made.

Of a group of k directions, z_ij has the signs of b_j where row i's a is +1 and the other signs
where it is -1. So a row takes one of 2**k vectors over the columns, by the pattern of its k bits:

    V[pattern]_j = ((+-c_0 b_0j +- c_1 b_1j) +- c_2 b_2j) +- c_3 b_3j,    w_i <- w_i + V[pattern_i]

The vectors of as many groups as fit (a *fill* of the table) are made once for all rows that follow;
if a pass has more, each block of rows goes through the fills in turn while it is in the cache.
"""

from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from zo.method import perturbation as p
from zo.method.kernels.cpu_plan import (
    BLOCK,
    COLUMNS,
    VECTORS,
    Plan,
    plan_of,
    rectangles_of,
    rows_of,
)
from zo.method.kernels.cpu_random import (
    BFLOAT16,
    KINDS,
    PARALLEL_FROM,
    TILE,
    f32,
    fill_signs,
    fill_words,
    i64,
    jit,
    u8,
    u32,
    u64,
)
from zo.method.kernels.cpu_rounding import (
    add_and_round,
    fill_random16,
    load,
    numpy_view,
    round_nearest,
    round_stochastic,
    rounding_scratch,
    widen_add_and_round,
    widen_and_add,
)
from zo.method.philox import Purpose

ROWS = 1024
"""Most rows of a block."""
ROW, COLUMN = u64(Purpose.ROW), u64(Purpose.COLUMN)


class Scratch(NamedTuple):
    """A thread's memory."""

    table: np.ndarray
    patterns: np.ndarray
    """For the groups of a fill, each row's pattern; rows from a multiple of 128."""
    words: np.ndarray
    column: np.ndarray
    loaded: np.ndarray
    """Fill, address and number of columns of the table; fill of the patterns."""
    calls: np.ndarray
    halves: np.ndarray
    y: np.ndarray


@jit
def _scratch():  # type: ignore[no-untyped-def]
    calls, halves = rounding_scratch()
    return Scratch(
        np.empty(BLOCK, np.float32),
        np.empty((VECTORS // 2, ROWS + 256), np.uint8),
        np.empty((4, COLUMNS // 128 + 2), np.uint32),
        np.empty(COLUMNS + 256, np.float32),
        np.full(4, -1, np.int64),
        calls,
        halves,
        np.empty(TILE, np.float32),
    )


@jit
def _tabulate(plan, group, address, columns, s):  # type: ignore[no-untyped-def]
    """Make the vectors of a group for the columns whose bits begin at an address."""
    begin, stride = plan.vectors[group] * columns, columns
    before = i64(address % u64(128))
    calls, first = (before + columns + 127) // 128, plan.first_terms[group]
    for d in range(plan.first_terms[group + 1] - first):
        fill_words(
            plan.seed, address // u64(128), plan.directions[first + d], COLUMN, calls, s.words
        )
        bits = s.column.view(np.uint32)
        fill_signs(s.words, calls, plan.bits_a_word, plan.coefficients[first + d], bits)
        term, half = s.column[before : before + columns], (1 << d) * stride
        for low in range(begin, begin + half, stride):
            without, with_it = s.table[low : low + columns], s.table[low + half :][:columns]
            if d == 0:
                for j in range(columns):
                    without[j], with_it[j] = -term[j], term[j]
            else:
                for j in range(columns):
                    value = without[j]
                    without[j], with_it[j] = value - term[j], value + term[j]


@jit
def _find_patterns(plan, group, address, rows, s, patterns):  # type: ignore[no-untyped-def]
    """Fill ``patterns`` with the bits of the rows that begin at an address, one bit a term."""
    calls, first = (i64(address % u64(128)) + rows + 127) // 128, plan.first_terms[group]
    patterns[: 128 * calls] = u8(0)
    for d in range(plan.first_terms[group + 1] - first):
        fill_words(plan.seed, address // u64(128), plan.directions[first + d], ROW, calls, s.words)
        for i in range(calls):
            for j in range(4):
                word, here = s.words[j, i], patterns[128 * i + 32 * j : 128 * i + 32 * j + 32]
                for b in range(plan.bits_a_word):
                    here[b] |= u8((word >> u32(b)) & u32(1)) << u8(d)


@jit
def _prepare(plan, fill, block, s):  # type: ignore[no-untyped-def]
    """Make the table of a fill and the patterns of a block, unless they are there."""
    rows, columns = block[1], block[2]
    first, stop = plan.first_of_fill[fill], plan.first_of_fill[fill + 1]
    if s.loaded[0] != fill or s.loaded[1] != block[5] or s.loaded[2] != columns:
        for group in range(first, stop):
            _tabulate(plan, group, u64(block[5]), columns, s)
        s.loaded[0], s.loaded[1], s.loaded[2] = fill, block[5], columns
    if s.loaded[3] != fill:
        for group in range(first, stop):
            _find_patterns(plan, group, u64(block[4]), rows, s, s.patterns[group - first])
        s.loaded[3] = fill


@jit
def _vector(plan, group, block, row, s):  # type: ignore[no-untyped-def]
    """Return the vector of a group that a row of a block takes."""
    pattern = s.patterns[group - plan.first_of_fill[plan.fills[group]], block[4] % 128 + row]
    begin = (plan.vectors[group] + i64(pattern)) * block[2]
    return s.table[begin : begin + block[2]]


@jit
def _change(x, begin, stride, block, address, plan, kind, s):  # type: ignore[no-untyped-def]
    """Apply all changes to a block whose row r begins at ``x[begin + r * stride]``."""
    rows, columns = block[1], block[2]
    for e in range(len(plan.steps)):
        decay, group, stop = plan.decays[e], plan.first_groups[e], plan.first_groups[e + 1]
        if decay != f32(1.0):
            for r in range(rows):
                w = x[begin + r * stride :][:columns]
                for j in range(columns):
                    w[j] = w[j] * decay
        while group < stop:
            _prepare(plan, plan.fills[group], block, s)
            last = min(stop, plan.first_of_fill[plan.fills[group] + 1])
            for r in range(rows):
                w = x[begin + r * stride :][:columns]
                for g in range(group, last):
                    v = _vector(plan, g, block, r, s)
                    for j in range(columns):
                        w[j] = w[j] + v[j]
            group = last
        if kind != 0:
            # Whole rows are one line of addresses.
            whole = columns == block[3]
            length = rows * columns if whole else columns
            for r in range(1 if whole else rows):
                for i in range(0, length, TILE):
                    line = x[begin + r * stride + i :][: min(TILE, length - i)]
                    here = address + u64(block[0] + r * block[3] + i)
                    round_stochastic(
                        line, kind, plan.seed, here, plan.steps[e], s.calls, s.halves, s.y
                    )


@jit
def _is_one_fill(plan, kind):  # type: ignore[no-untyped-def]
    """Return whether :func:`_change_bfloat16` serves a pass: every change's vectors fit at once."""
    for e in range(len(plan.steps)):
        group, stop = plan.first_groups[e], plan.first_groups[e + 1]
        if group == stop or plan.fills[group] != plan.fills[stop - 1]:
            return False
    return kind == BFLOAT16


@jit
def _change_bfloat16(stored, block, address, plan, x, s):  # type: ignore[no-untyped-def]
    """Apply all changes to a block of ``stored``, in registers but for vectors after the first."""
    rows, columns, width = block[1], block[2], block[3]
    # Of whole rows, several share a line of addresses.
    height = max(1, TILE // columns) if columns == width else 1
    for e in range(len(plan.steps)):
        decay, group, last = plan.decays[e], plan.first_groups[e], plan.first_groups[e + 1] - 1
        _prepare(plan, plan.fills[group], block, s)
        for r in range(rows):
            at = r % height * columns
            if at == 0:
                here = address + u64(block[0] + r * width)
                count = min(height, rows - r) * columns
                random16 = fill_random16(plan.seed, here, plan.steps[e], count, s.calls, s.halves)
            w = stored[block[0] + r * width :][:columns]
            first, random = _vector(plan, group, block, r, s), random16[at : at + columns]
            if group == last:
                widen_add_and_round(w, decay, first, random)
                continue
            widen_and_add(w, decay, first, x)
            for g in range(group + 1, last):
                v = _vector(plan, g, block, r, s)
                for j in range(columns):
                    x[j] = x[j] + v[j]
            add_and_round(x, _vector(plan, last, block, r, s), random, w)


@jit
def _perturb(x, begin, stride, block, plan, kind, out, s):  # type: ignore[no-untyped-def]
    """Write the probes of a block whose row r begins at ``x[begin + r * stride]``."""
    rows, columns = block[1], block[2]
    for number in range(len(plan.probes)):
        group = plan.probes[number]
        if group >= 0:
            _prepare(plan, plan.fills[group], block, s)
        for r in range(rows):
            w = x[begin + r * stride :][:columns]
            written = out[number, block[0] + r * block[3] :][:columns]
            if kind == 0:
                if group < 0:
                    for j in range(columns):
                        written[j] = w[j]
                else:
                    v = _vector(plan, group, block, r, s)
                    for j in range(columns):
                        written[j] = w[j] + v[j]
            elif group < 0:
                round_nearest(w, kind, written)
            else:
                v, y = _vector(plan, group, block, r, s), s.y[:columns]
                for j in range(columns):
                    y[j] = w[j] + v[j]
                round_nearest(y, kind, written)


@jit
def _height(columns):  # type: ignore[no-untyped-def]
    """Return the rows of a block of so many columns."""
    return max(1, min(ROWS, BLOCK // columns))


@jit
def _replay_and_perturb_float32(rectangles, stored, address, kind, out, *numbers):  # type: ignore[no-untyped-def]
    """Replay and perturb rectangles of float32 ``stored``, in place."""
    s, plan = _scratch(), Plan(*numbers)
    for rectangle in rectangles:
        block = rectangle.copy()
        for first in range(0, rectangle[1], _height(rectangle[2])):
            block[0], block[4] = rectangle[0] + first * rectangle[3], rectangle[4] + first
            block[1] = min(_height(rectangle[2]), rectangle[1] - first)
            s.loaded[3] = -1
            _change(stored, block[0], block[3], block, address, plan, kind, s)
            _perturb(stored, block[0], block[3], block, plan, kind, out, s)


@jit
def _replay_and_perturb(rectangles, stored, address, kind, out, *numbers):  # type: ignore[no-untyped-def]
    """Replay and perturb rectangles of 16-bit ``stored``, each widened to float32 and rounded."""
    s, x, plan = _scratch(), np.empty(BLOCK, np.float32), Plan(*numbers)
    in_registers = _is_one_fill(plan, kind)
    for rectangle in rectangles:
        block, columns = rectangle.copy(), rectangle[2]
        for first in range(0, rectangle[1], _height(columns)):
            block[0], block[4] = rectangle[0] + first * rectangle[3], rectangle[4] + first
            block[1] = min(_height(columns), rectangle[1] - first)
            s.loaded[3] = -1
            if in_registers:
                _change_bfloat16(stored, block, address, plan, x, s)
                if len(plan.probes) == 0:
                    continue
            for r in range(block[1]):
                begin = block[0] + r * block[3]
                load(stored[begin : begin + columns], kind, x[r * columns :][:columns])
            if len(plan.steps) > 0 and not in_registers:
                _change(x, 0, columns, block, address, plan, kind, s)
                for r in range(block[1]):
                    begin = block[0] + r * block[3]
                    w = x[r * columns :][:columns]
                    round_nearest(w, kind, stored[begin : begin + columns])
            _perturb(x, 0, columns, block, plan, kind, out, s)


@numba.njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _replay_and_perturb_float32_in_parts(parts, rectangles, *arguments):  # type: ignore[no-untyped-def]
    """Replay and perturb rectangles, those of a part on one thread."""
    for part in numba.prange(len(parts) - 1):
        _replay_and_perturb_float32(rectangles[parts[part] : parts[part + 1]], *arguments)


@numba.njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _replay_and_perturb_in_parts(parts, rectangles, *arguments):  # type: ignore[no-untyped-def]
    """See :func:`_replay_and_perturb_float32_in_parts`."""
    for part in numba.prange(len(parts) - 1):
        _replay_and_perturb(rectangles[parts[part] : parts[part + 1]], *arguments)


FUNCTIONS = {
    True: (_replay_and_perturb_float32, _replay_and_perturb_float32_in_parts),
    False: (_replay_and_perturb, _replay_and_perturb_in_parts),
}
"""For float32, and for the 16-bit types: the function for one thread, and for several."""


def replay_and_perturb_matrices(
    weights: Tensor,
    address: int,
    work: p.Pass,
    out: Tensor | None,
    rows: p.Rows | None,
    matrices: tuple[p.Matrices, ...],
) -> bool:
    """Replay and perturb what lies in matrices by rank-one directions.

    Returns:
        True if that is all that is to be done: ``rows`` are those of one matrix.
    """
    stored, (plan, columns) = numpy_view(weights), plan_of(work)
    threads = torch.get_num_threads() if weights.numel() >= PARALLEL_FROM else 1
    found = None if rows is None else rows_of(rows, address, weights.numel(), matrices, columns)
    if found is None:
        rectangles, parts = rectangles_of(address, weights.numel(), matrices, columns, threads)
    else:
        rectangles, parts = found, np.arange(threads + 1) * len(found) // threads
    if len(rectangles) > 0:
        written = np.zeros((0, 0), stored.dtype) if out is None else numpy_view(out)
        # The fields one by one: a named tuple does not pass into a parallel loop.
        arguments = (rectangles, stored, u64(address), KINDS[weights.dtype], written, *plan)
        alone, in_parts = FUNCTIONS[weights.dtype == torch.float32]
        if threads == 1:
            alone(*arguments)
        else:
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
            in_parts(parts, *arguments)
    return found is not None
