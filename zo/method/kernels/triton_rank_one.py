"""Replay and perturb by rank-one directions on a GPU: two Triton launches per segment.

The first packs the signs of rows and columns: bit k of a row's (or column's) word w belongs to the
direction in slot ``32 w + k``. The second is the kernel of ``triton``, but that an element's signs
are the words of its row and column, exclusive or: a set bit is -1. Slots of a group are in one
word. Each program works on one *piece*: a matrix with the padding after it, or what lies between.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from zo.method import perturbation as p
from zo.method.kernels.triton_common import (
    GROUP_SIZE,
    KINDS,
    OPTIONS,
    TILE,
    VECTOR,
    draw_bits,
    draw_z,
    load_wide,
    numbers_of,
    round_stochastic,
    store_nearest,
    stored_as,
    table_of,
)
from zo.method.passes import GROUP
from zo.method.philox import Purpose

LINE = 1024
"""Rows or columns whose words one program packs."""
FIELDS = 9
"""Numbers of a piece."""
MOST_WORDS = 1 << 24
"""Beyond so many packed words (64 MiB) the changes of a pass are applied in several launches."""
_FIELDS, _ALIGNMENT = tl.constexpr(FIELDS), tl.constexpr(p.ALIGNMENT)


@triton.jit(do_not_specialize=["length"])
def _pack(table, slots, lines, length: tl.int64, words, line: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pack the signs of one line for 32 slots; ``lines`` holds address, purpose, place of each."""
    at, word = lines + 3 * tl.program_id(0), tl.program_id(1)
    address, purpose, place = tl.load(at), tl.load(at + 1).to(tl.uint32), tl.load(at + 2)
    seed_lo, seed_hi = tl.load(table), tl.load(table + 1)
    packed = tl.zeros((line,), tl.uint32)
    for k in range(32):
        direction = tl.load(slots + 32 * word + k)
        packed |= draw_bits(seed_lo, seed_hi, address, direction, purpose, line) << k
    here = words + word.to(tl.int64) * length + place + tl.arange(0, line)
    tl.store(here, packed.to(tl.int32, bitcast=True))


@triton.jit
def _signs(factors, length, slot, row, column, within):  # type: ignore[no-untyped-def]
    """Return each element's bits from a slot on, lowest first: a set bit is -1; uint32."""
    word = factors + (slot // 32).to(tl.int64) * length
    a = tl.load(word + row, mask=within, other=0).to(tl.uint32, bitcast=True)
    b = tl.load(word + column, mask=within, other=0).to(tl.uint32, bitcast=True)
    return (a ^ b) >> (slot % 32).to(tl.uint32)


@triton.jit
def _z(signs, k, within, is_whole, seed_lo, seed_hi, address, direction, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return z from bit k of ``signs``, and independent signs where no matrix is."""
    bit = (signs >> k) & 1
    z = (0x3F800000 | (bit << 31)).to(tl.float32, bitcast=True)
    if not is_whole:
        z = tl.where(within, z, draw_z(seed_lo, seed_hi, address, direction, False, tile))
    return z


@triton.jit
def _find_piece(pieces, num_pieces, program):  # type: ignore[no-untyped-def]
    """Return the piece of a program: the last one whose first program does not come after it."""
    low, high = num_pieces * 0, num_pieces
    while high - low > 1:
        middle = (low + high) // 2
        begun = tl.load(pieces + middle * _FIELDS) <= program
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle)
    return pieces + low * _FIELDS


@triton.jit
def _find_factors(piece, first, inside, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the words of each element's row and column are, and if it is in a matrix.

    ``first`` is the tile's first element in the parameter. Divisions of 64 bits are done once a
    tile.
    """
    numel, rows, width = tl.load(piece + 4), tl.load(piece + 5), tl.load(piece + 6)
    words = tl.load(piece + 7)
    first_row = first // width
    begin = (first - first_row * width).to(tl.int32) + tl.arange(0, tile)
    down = begin // width.to(tl.int32)
    column = begin - down * width.to(tl.int32)
    matrix = first_row // rows
    over = ((first_row - matrix * rows).to(tl.int32) + down) // rows.to(tl.int32)
    within = (first + tl.arange(0, tile) < numel) & inside
    row_words = words + first_row + down
    columns = tl.load(piece + 8) + (matrix + over) * width + column
    return row_words, columns, within, first + tile <= numel


@triton.jit(
    do_not_specialize=[
        "count", "address", "num_changes", "num_directions", "num_probes", "num_pieces", "length",
    ]
)  # fmt: skip
def _replay_and_perturb(  # type: ignore[no-untyped-def]
    stored, count: tl.int64, address: tl.int64, table, num_changes: tl.int32,
    num_directions: tl.int32, num_probes: tl.int32, out, pieces, num_pieces: tl.int32, factors,
    length: tl.int64, unit: tl.constexpr, kind: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Replay and perturb one tile; ``table`` is that of ``triton``."""
    program = tl.program_id(0)
    piece = _find_piece(pieces, num_pieces, program)
    first = (program - tl.load(piece)) * tile
    begin = tl.load(piece + 1) * _ALIGNMENT + first
    place = begin + tl.arange(0, tile)
    inside, here = place < tl.load(piece + 2) * unit, address + begin
    row, column, within, is_whole = _find_factors(piece, tl.load(piece + 3) + first, inside, tile)
    seed_lo, seed_hi = tl.load(table), tl.load(table + 1)
    x = load_wide(stored, place, inside, kind)
    at, slot = table + 2, num_changes * 0
    for _ in range(num_changes):
        x = x * tl.load(at + 1).to(tl.float32, bitcast=True)
        for group in range(0, num_directions, GROUP_SIZE):
            total = tl.full((tile,), -0.0, tl.float32)  # what adds to nothing, zeros of any sign
            signs = _signs(factors, length, slot, row, column, within)
            for k in range(tl.minimum(GROUP_SIZE, num_directions - group)):
                number = at + 2 + 2 * (group + k)
                coefficient = tl.load(number + 1).to(tl.float32, bitcast=True)
                if coefficient != 0.0:
                    direction = tl.load(number)
                    z = _z(signs, k, within, is_whole, seed_lo, seed_hi, here, direction, tile)
                    total = total + z * coefficient
            x = x + total
            slot += GROUP_SIZE
        if kind != 0:
            x = round_stochastic(x, kind, seed_lo, seed_hi, here, tl.load(at), tile)
        at += 2 + 2 * num_directions
    if num_changes > 0:
        store_nearest(stored, place, inside, x, kind)
    for number in range(num_probes):
        direction = tl.load(at + 2 * number)
        scale = tl.load(at + 2 * number + 1).to(tl.float32, bitcast=True)
        signs = _signs(factors, length, slot + number, row, column, within)
        z = _z(signs, number * 0, within, is_whole, seed_lo, seed_hi, here, direction, tile)
        # Scale 0 must leave infinities and the sign of -0 alone.
        y = tl.where(scale != 0.0, x + z * scale, x)
        store_nearest(out, place, inside, y, kind)
        out += count


class Cut(NamedTuple):
    """A segment as the kernels take it, on their device."""

    pieces: Tensor
    """int64 ``[pieces, FIELDS]``: first program; first element over ``ALIGNMENT``; element after
    the last, over ``unit``; first element in the parameter, its elements, rows and columns of a
    matrix; place of the words of row 0 and of column 0."""
    programs: int
    lines: Tensor
    """int64 ``[lines, 3]``: address, purpose and place of the words that one program packs."""
    length: int
    """Words of all lines."""


@lru_cache(maxsize=256)
def cut_of(
    address: int,
    count: int,
    matrices: tuple[p.Matrices, ...],
    unit: int,
    device: torch.device,
    stream: int,
) -> Cut:
    """Return the pieces of a segment, uploaded on a stream."""
    pieces: list[tuple[int, ...]] = []
    lines: list[tuple[int, int, int]] = []
    at, end, programs = address, address + count, 0
    for m in (*matrices, None):
        first = end if m is None else min(max(m.start, at), end)
        if at < first:
            pieces.append((programs, at, first, 0, 0, 1, 1, 0, 0))
            programs += triton.cdiv(first - at, TILE)
        if m is None or m.stop <= at or first == end:
            continue
        assert m.width + TILE < 1 << 31, m
        at = min(end, triton.cdiv(m.stop, p.ALIGNMENT) * p.ALIGNMENT)
        row, last = (first - m.start) // m.width, (min(m.stop, end) - 1 - m.start) // m.width
        column, last_column = (r // m.rows * m.width for r in (row, last))
        words = (
            _add_lines(lines, m.start, row, last + 1, Purpose.ROW),
            _add_lines(lines, m.start, column, last_column + m.width, Purpose.COLUMN),
        )
        pieces.append((programs, first, at, first - m.start, m.numel, m.rows, m.width, *words))
        programs += triton.cdiv(at - first, TILE)
    rows = [
        (n, (low - address) // p.ALIGNMENT, (high - address) // unit, *rest)
        for n, low, high, *rest in pieces
    ]
    tables = _upload(rows, FIELDS, device), _upload(lines, 3, device)
    return Cut(tables[0], programs, tables[1], LINE * len(lines))


def _add_lines(
    lines: list[tuple[int, int, int]], start: int, first: int, stop: int, purpose: Purpose
) -> int:
    """Add lines for rows or columns ``first .. stop``; return the place of number 0's word."""
    first = first // p.ALIGNMENT * p.ALIGNMENT
    place = LINE * len(lines) - first
    for number in range(first, stop, LINE):
        lines.append((start + number, int(purpose), place + number))
    return place


def _upload(rows: Sequence[tuple[int, ...]], width: int, device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, width)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=256)
def slots_of(work: p.Pass, device: torch.device, stream: int) -> Tensor:
    """Return the direction of every slot, int64, whole words; uploaded on a stream.

    Each change has a whole number of groups, each probe a slot.
    """
    slots: list[int] = []
    for change in work.changes:
        slots += change.directions
        slots += [0] * (_width(work) - len(change.directions))
    slots += [probe.direction for probe in work.probes]
    slots += [0] * (-len(slots) % 32)
    return _upload([(s,) for s in slots], 1, device)


def _width(work: p.Pass) -> int:
    return -(-numbers_of(work)[1] // GROUP) * GROUP


@lru_cache(maxsize=256)
def launches_of(work: p.Pass, slots: int) -> tuple[p.Pass, ...]:
    """Return a pass as several in a row, each of no more slots, but of one change at least.

    The bits are the same: a change rounds to the stored dtype.
    """
    changes = max(1, (slots - len(work.probes)) // max(1, _width(work)))
    if len(work.changes) <= changes:
        return (work,)
    firsts = range(0, len(work.changes), changes)
    return tuple(
        p.Pass(
            work.seed,
            work.distribution,
            work.changes[first : first + changes],
            work.probes if first == firsts[-1] else (),
        )
        for first in firsts
    )


def arguments(
    weights: Tensor,
    address: int,
    work: p.Pass,
    table: Tensor,
    out: Tensor | None,
    cut: Cut,
    factors: Tensor,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the second kernel's positional arguments, and its constants with the options."""
    count = weights.numel()
    constants = {
        "unit": VECTOR if count % VECTOR == 0 else 1,
        "kind": KINDS[weights.dtype],
        "tile": TILE,
    }
    sizes = (len(work.changes), numbers_of(work)[1], len(work.probes))
    written = stored_as(weights if out is None else out)
    pieces = (cut.pieces, len(cut.pieces), factors, cut.length)
    positional = (stored_as(weights), count, address, table, *sizes, written, *pieces)
    return positional, constants | OPTIONS


def replay_and_perturb_rank_one(
    weights: Tensor,
    address: int,
    work: p.Pass,
    out: Tensor | None,
    matrices: tuple[p.Matrices, ...],
) -> None:
    """Compute :func:`zo.method.kernels.replay_and_perturb` on a GPU, by rank-one directions."""
    count, device = weights.numel(), weights.device
    assert out is None or out.stride(0) == count
    stream = driver.active.get_current_stream(device.index) if weights.is_cuda else 0
    unit = VECTOR if count % VECTOR == 0 else 1
    cut = cut_of(address, count, matrices, unit, device, stream)
    for launch in launches_of(work, MOST_WORDS // max(1, cut.length) * 32):
        table, slots = table_of(launch, device, stream), slots_of(launch, device, stream)
        factors = torch.empty(len(slots) // 32, cut.length, dtype=torch.int32, device=device)
        if factors.numel() > 0:
            grid = len(cut.lines), len(factors)
            _pack[grid](table, slots, cut.lines, cut.length, factors, line=LINE, **OPTIONS)
        written = out if launch.probes else None
        positional, named = arguments(weights, address, launch, table, written, cut, factors)
        _replay_and_perturb[(cut.programs,)](*positional, **named)
