"""Replay and perturb on CPU: compiled by numba, the same bits as the reference in ``perturbation``.

Weights go through the cache once, tile by tile; inner loops are branch-free, over slices, so that
LLVM vectorises them. Bits depend on addresses alone, so any number of threads may split a call.
They are OpenMP's, as torch's are: a pool of Python threads was half as fast, and numba's own
``workqueue`` aborts when two Python threads enter it.
"""

from dataclasses import replace
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

from zo.method import perturbation as p
from zo.method.kernels.cpu_plan import spans_between
from zo.method.kernels.cpu_random import (
    KINDS,
    PARALLEL_FROM,
    TILE,
    add_drawn,
    draw,
    f32,
    jit,
    u64,
)
from zo.method.kernels.cpu_rank_one import replay_and_perturb_matrices
from zo.method.kernels.cpu_rounding import (
    load,
    numpy_view,
    round_nearest,
    round_stochastic,
    rounding_scratch,
)
from zo.method.passes import GROUP


@jit
def _scratch():  # type: ignore[no-untyped-def]
    """Return ``words``, ``u``, ``v`` and ``z`` of :func:`draw`."""
    return (
        np.empty((4, TILE // 4), np.uint32),
        np.empty(TILE // 4, np.float32),
        np.empty((4, TILE // 4), np.float32),
        np.empty(TILE, np.float32),
    )


@jit
def _add_directions(x, directions, coefficients, seed, here, gaussian, scratch, s):  # type: ignore[no-untyped-def]
    """Add a change's directions to ``x``, in groups whose sums ``s`` takes up."""
    (words, u, v, z), total = scratch, s[: len(x)]
    for first in range(0, len(directions), GROUP):
        stop = min(first + GROUP, len(directions))
        terms = np.count_nonzero(coefficients[first:stop])
        # The sum of nothing is -0.0, which changes no number that is added to it.
        if terms > 1:
            total[:] = f32(-0.0)
        for k in range(first, stop):
            if coefficients[k] != f32(0.0):
                draw(seed, here, directions[k], gaussian, words, u, v, z)
                into = total if terms > 1 else x
                add_drawn(into, into, coefficients[k], gaussian, words, z)
        if terms > 1:
            for i in range(len(x)):
                x[i] = x[i] + total[i]


@jit
def _whole_calls(count):  # type: ignore[no-untyped-def]
    """Return ``count`` rounded up to whole calls of 128 signs."""
    return (count + 127) // 128 * 128


@jit
def _replay_and_perturb_float32(  # type: ignore[no-untyped-def]
    stored,
    tiles,
    address,
    seed,
    gaussian,
    kind,
    steps,
    decays,
    directions,
    coefficients,
    probes,
    scales,
    out,
):
    """Replay and perturb these tiles of float32 ``stored`` in place: nothing is to be rounded."""
    last, s, scratch = np.empty(TILE, np.float32), np.empty(TILE, np.float32), _scratch()
    words, u, v, z = scratch
    for tile in tiles:
        lo = tile * TILE
        count, here, drawn = min(TILE, len(stored) - lo), address + u64(lo), -1
        # Slices start at zero: a loop with an index that may be negative is not vectorised.
        in_place, here_stored = count % 128 == 0, stored[lo : lo + count]
        x = here_stored if in_place else last[: _whole_calls(count)]
        if not in_place:
            x[:count] = here_stored
        for e in range(len(steps)):
            decay = decays[e]
            if decay != f32(1.0):
                for i in range(len(x)):
                    x[i] = x[i] * decay
            _add_directions(x, directions[e], coefficients[e], seed, here, gaussian, scratch, s)
        if not in_place:
            here_stored[:] = x[:count]
        for row in range(len(probes)):
            c, y = scales[row], out[row, lo : lo + count]
            if c == f32(0.0):
                y[:] = x[:count]
                continue
            if drawn < 0 or probes[row] != probes[drawn]:
                draw(seed, here, probes[row], gaussian, words, u, v, z)
                drawn = row
            if in_place:
                add_drawn(y, x, c, gaussian, words, z)
            else:
                add_drawn(s[: len(x)], x, c, gaussian, words, z)
                y[:] = s[:count]


@jit
def _replay_and_perturb(  # type: ignore[no-untyped-def]
    stored,
    tiles,
    address,
    seed,
    gaussian,
    kind,
    steps,
    decays,
    directions,
    coefficients,
    probes,
    scales,
    out,
):
    """Replay and perturb these tiles of 16-bit ``stored``, each widened to float32 and rounded."""
    tile_x, s, scratch = np.empty(TILE, np.float32), np.empty(TILE, np.float32), _scratch()
    words, u, v, z = scratch
    calls, halves = rounding_scratch()
    for tile in tiles:
        lo = tile * TILE
        count, here, drawn = min(TILE, len(stored) - lo), address + u64(lo), -1
        # Slices start at zero: a loop with an index that may be negative is not vectorised.
        here_stored, x = stored[lo : lo + count], tile_x[: _whole_calls(count)]
        load(here_stored, kind, x)
        for e in range(len(steps)):
            decay = decays[e]
            if decay != f32(1.0):
                for i in range(count):
                    x[i] = x[i] * decay
            _add_directions(x, directions[e], coefficients[e], seed, here, gaussian, scratch, s)
            round_stochastic(x[:count], kind, seed, here, steps[e], calls, halves, s)
        if len(steps) > 0:
            round_nearest(x[:count], kind, here_stored)
        for row in range(len(probes)):
            c = scales[row]
            if c == f32(0.0):
                round_nearest(x[:count], kind, out[row, lo : lo + count])
                continue
            if drawn < 0 or probes[row] != probes[drawn]:
                draw(seed, here, probes[row], gaussian, words, u, v, z)
                drawn = row
            add_drawn(s[: len(x)], x, c, gaussian, words, z)
            round_nearest(s[:count], kind, out[row, lo : lo + count])


@numba.njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _replay_and_perturb_in_parts(parts, stored, tiles, *arguments):  # type: ignore[no-untyped-def]
    """Replay and perturb these tiles, an equal part of them per thread."""
    for part in numba.prange(parts):
        _replay_and_perturb(
            stored, tiles[part * len(tiles) // parts : (part + 1) * len(tiles) // parts], *arguments
        )


@numba.njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _replay_and_perturb_float32_in_parts(  # type: ignore[no-untyped-def]
    parts, stored, tiles, *arguments
):
    """See :func:`_replay_and_perturb_in_parts`."""
    for part in numba.prange(parts):
        _replay_and_perturb_float32(
            stored, tiles[part * len(tiles) // parts : (part + 1) * len(tiles) // parts], *arguments
        )


def _tiles_of(rows: p.Rows, count: int) -> np.ndarray:
    """Return the numbers of the tiles that overlap these rows, sorted."""
    first = rows.numbers.numpy() * rows.width
    spanned = np.arange(0, rows.width + TILE - 1, TILE)[None, :]
    inside = np.minimum(
        first[:, None] + spanned, np.minimum(first + rows.width, count)[:, None] - 1
    )
    return np.unique(inside // TILE)


@lru_cache(maxsize=256)
def _numbers(work: p.Pass) -> tuple[np.ndarray, ...]:
    """Return a pass's numbers as the kernel takes them; read only.

    Returns:
        Steps, decays, directions and coefficients of the changes; directions and scales of the
        probes.
    """
    width = max((len(c.directions) for c in work.changes), default=0)
    directions, coefficients = (
        np.zeros((len(work.changes), width), u64),
        np.zeros((len(work.changes), width), f32),
    )
    for row, change in enumerate(work.changes):
        directions[row, : len(change.directions)] = change.directions
        coefficients[row, : len(change.coefficients)] = change.coefficients
    return (
        np.array([c.step for c in work.changes], u64),
        np.array([c.decay for c in work.changes], f32),
        directions,
        coefficients,
        np.array([probe.direction for probe in work.probes], u64),
        np.array([probe.scale for probe in work.probes], f32),
    )


FUNCTIONS = {
    True: (_replay_and_perturb_float32, _replay_and_perturb_float32_in_parts),
    False: (_replay_and_perturb, _replay_and_perturb_in_parts),
}
"""For float32, and for the 16-bit types: the function for one thread, and for several."""


def replay_and_perturb_cpu(
    weights: Tensor,
    address: int,
    work: p.Pass,
    out: Tensor | None = None,
    rows: p.Rows | None = None,
    matrices: tuple[p.Matrices, ...] = (),
) -> None:
    """Compute :func:`zo.method.kernels.replay_and_perturb` on CPU, on as many threads as torch."""
    if rows is not None and work.changes:
        replay_and_perturb_cpu(weights, address, replace(work, probes=()), matrices=matrices)
        work = replace(work, changes=())
    if work.distribution != "rank-one":
        _replay_and_perturb_dense(weights, address, work, out, rows)
        return
    if replay_and_perturb_matrices(weights, address, work, out, rows, matrices):
        return
    for first, stop in spans_between(matrices, address, weights.numel()):
        _replay_and_perturb_span(weights, address, _dense(work), out, first, stop)


@lru_cache(maxsize=256)
def _dense(work: p.Pass) -> p.Pass:
    """Return a pass of rank-one directions as it is outside of matrices."""
    return replace(work, distribution="rademacher")


def _replay_and_perturb_span(
    weights: Tensor, address: int, work: p.Pass, out: Tensor | None, first: int, stop: int
) -> None:
    """Replay and perturb elements ``first .. stop``, from any address."""
    before = first % p.ALIGNMENT
    aligned = slice(first - before, min(stop, first - before + p.ALIGNMENT) if before else stop)
    if before == 0:
        part = None if out is None else out[:, aligned]
        _replay_and_perturb_dense(weights[aligned], address + first, work, part)
        return
    # The padding after a matrix: what stands before it in its line of addresses is not changed.
    copy, written = weights[aligned].clone(), None if out is None else out[:, aligned].clone()
    _replay_and_perturb_dense(copy, address + first - before, work, written)
    weights[first : aligned.stop] = copy[before:]
    if out is not None and written is not None:
        out[:, first : aligned.stop] = written[:, before:]
    if aligned.stop < stop:
        _replay_and_perturb_span(weights, address, work, out, aligned.stop, stop)


def _replay_and_perturb_dense(
    weights: Tensor,
    address: int,
    work: p.Pass,
    out: Tensor | None = None,
    rows: p.Rows | None = None,
) -> None:
    """Replay and perturb with z that depends on nothing but the address."""
    count, stored = weights.numel(), numpy_view(weights)
    arguments = (
        u64(address),
        u64(work.seed),
        work.distribution == "gaussian",
        KINDS[weights.dtype],
        *_numbers(work),
        np.zeros((0, 0), stored.dtype) if out is None else numpy_view(out),
    )
    tiles = np.arange(-(-count // TILE)) if rows is None else _tiles_of(rows, count)
    threads = torch.get_num_threads() if len(tiles) * TILE >= PARALLEL_FROM else 1
    alone, in_parts = FUNCTIONS[weights.dtype == torch.float32]
    if threads == 1:
        alone(stored, tiles, *arguments)
    else:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        in_parts(threads, stored, tiles, *arguments)
