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
from zo.method.kernels.cpu_random import (
    BFLOAT16,
    KINDS,
    PARALLEL_FROM,
    ROUNDING,
    TILE,
    f32,
    fill_words,
    fill_z,
    i32,
    jit,
    u32,
    u64,
)


@jit
def _load(stored, kind, x):  # type: ignore[no-untyped-def]
    """Widen ``stored`` to float32 in ``x``, exactly."""
    count = len(stored)
    if kind == BFLOAT16:
        bits = x.view(np.uint32)
        for i in range(count):
            bits[i] = u32(stored[i]) << u32(16)
    else:
        bits = x.view(np.uint32)
        for i in range(count):
            # Move the exponent as if float32's, then scale by 2**112: exact for subnormals too.
            bits[i] = (u32(stored[i]) & u32(0x7FFF)) << u32(13)
        for i in range(count):
            x[i] = x[i] * f32(2.0**112)
        for i in range(count):
            half = u32(stored[i])
            special = u32(0x7F800000) if (half & u32(0x7C00)) == u32(0x7C00) else u32(0)
            bits[i] = bits[i] | special | ((half & u32(0x8000)) << u32(16))


@jit
def _round_nearest(x, kind, stored):  # type: ignore[no-untyped-def]
    """Write float32 ``x`` to ``stored`` in its dtype, ties to even."""
    count = len(stored)
    bits = x.view(np.uint32)
    if kind == BFLOAT16:
        for i in range(count):
            b = bits[i]
            rounded = (b + u32(0x7FFF) + ((b >> u32(16)) & u32(1))) >> u32(16)
            stored[i] = u32(0x7FC0) if (b & u32(0x7FFFFFFF)) > u32(0x7F800000) else rounded
    else:
        for i in range(count):
            sign, b = (bits[i] >> u32(16)) & u32(0x8000), bits[i] & u32(0x7FFFFFFF)
            normal = ((b + u32(0xFFF) + ((b >> u32(13)) & u32(1))) >> u32(13)) - u32(112 << 10)
            # Units of 2**-24 below 2**-14: x 2**24 is exact, rint rounds ties to even.
            subnormal = u32(i32(np.rint(min(abs(x[i]), f32(1.0)) * f32(2.0**24))))
            rounded = subnormal if b < u32(0x38800000) else min(normal, u32(0x7C00))
            stored[i] = sign | (u32(0x7E00) if b > u32(0x7F800000) else rounded)


@jit
def _round_stochastic(x, kind, seed, address, step, words, halves, small):  # type: ignore[no-untyped-def]
    """Round float32 ``x`` in place to numbers of the stored dtype.

    ``halves`` and ``small`` are scratch. Words in the order of calls, seen as 16-bit numbers (low
    half first, as in memory), are in the order of addresses.
    """
    fill_words(seed, address // u64(8), step, ROUNDING, TILE // 8, words)
    by_call = halves.reshape(-1, 4)
    for i in range(TILE // 8):
        by_call[i, 0], by_call[i, 1], by_call[i, 2], by_call[i, 3] = (
            words[0, i],
            words[1, i],
            words[2, i],
            words[3, i],
        )
    bits, random16 = x.view(np.uint32), halves.view(np.uint16)
    if kind == BFLOAT16:
        for i in range(len(x)):
            b = bits[i]
            finite = (b & u32(0x7FFFFFFF)) < u32(0x7F800000)
            bits[i] = ((b + u32(random16[i])) & u32(0xFFFF0000)) if finite else b
        return
    for i in range(len(x)):
        units = min(abs(x[i]), f32(1.0)) * f32(2.0**24) + f32(i32(u32(random16[i]))) * f32(2.0**-16)
        small[i] = f32(i32(units)) * f32(2.0**-24)
    small_bits = small.view(np.uint32)
    for i in range(len(x)):
        sign, b = bits[i] & u32(0x80000000), bits[i] & u32(0x7FFFFFFF)
        normal = (b + (u32(random16[i]) >> u32(3))) & u32(0xFFFFE000)
        normal = normal if normal < u32(0x47800000) else u32(0x7F800000)
        large = normal if b < u32(0x7F800000) else b
        bits[i] = sign | (small_bits[i] if b < u32(0x38800000) else large)


@jit
def _replay_and_perturb_float32(  # type: ignore[no-untyped-def]
    stored,
    tiles,
    address,
    seed,
    gaussian,
    bits_a_word,
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
    z, u, v = (
        np.empty(TILE, np.float32),
        np.empty(TILE // 4, np.float32),
        np.empty((4, TILE // 4), np.float32),
    )
    words = np.empty((4, TILE // 4), np.uint32)
    for tile in tiles:
        lo = tile * TILE
        count, here, in_z = min(TILE, len(stored) - lo), address + u64(lo), -1
        # Slices start at zero: a loop with an index that may be negative is not vectorised.
        x = stored[lo : lo + count]
        for e in range(len(steps)):
            decay = decays[e]
            if decay != f32(1.0):
                for i in range(count):
                    x[i] = x[i] * decay
            for k in range(directions.shape[1]):
                c = coefficients[e, k]
                if c != f32(0.0):
                    fill_z(seed, here, directions[e, k], gaussian, bits_a_word, words, u, v, z)
                    for i in range(count):
                        x[i] = x[i] + z[i] * c
        for row in range(len(probes)):
            c, y = scales[row], out[row, lo : lo + count]
            if c == f32(0.0):
                for i in range(count):
                    y[i] = x[i]
                continue
            if in_z < 0 or probes[row] != probes[in_z]:
                fill_z(seed, here, probes[row], gaussian, bits_a_word, words, u, v, z)
                in_z = row
            for i in range(count):
                y[i] = x[i] + z[i] * c


@jit
def _replay_and_perturb(  # type: ignore[no-untyped-def]
    stored,
    tiles,
    address,
    seed,
    gaussian,
    bits_a_word,
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
    x, y = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    z, u, v = (
        np.empty(TILE, np.float32),
        np.empty(TILE // 4, np.float32),
        np.empty((4, TILE // 4), np.float32),
    )
    words, halves = np.empty((4, TILE // 4), np.uint32), np.empty(TILE // 2, np.uint32)
    for tile in tiles:
        lo = tile * TILE
        count, here, in_z = min(TILE, len(stored) - lo), address + u64(lo), -1
        # Slices start at zero: a loop with an index that may be negative is not vectorised.
        here_stored = stored[lo : lo + count]
        _load(here_stored, kind, x)
        for e in range(len(steps)):
            decay = decays[e]
            if decay != f32(1.0):
                for i in range(count):
                    x[i] = x[i] * decay
            for k in range(directions.shape[1]):
                c = coefficients[e, k]
                if c != f32(0.0):
                    fill_z(seed, here, directions[e, k], gaussian, bits_a_word, words, u, v, z)
                    for i in range(count):
                        x[i] = x[i] + z[i] * c
                    in_z = -1
            _round_stochastic(x[:count], kind, seed, here, steps[e], words, halves, y)
        if len(steps) > 0:
            _round_nearest(x, kind, here_stored)
        for row in range(len(probes)):
            c = scales[row]
            if c == f32(0.0):
                _round_nearest(x, kind, out[row, lo : lo + count])
                continue
            if in_z < 0 or probes[row] != probes[in_z]:
                fill_z(seed, here, probes[row], gaussian, bits_a_word, words, u, v, z)
                in_z = row
            for i in range(count):
                y[i] = x[i] + z[i] * c
            _round_nearest(y, kind, out[row, lo : lo + count])


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


def _numpy(tensor: Tensor) -> np.ndarray:
    """Return the tensor's memory: float32 as it is, the 16-bit types as their bits."""
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).detach().numpy()


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
) -> None:
    """Compute :func:`zo.method.kernels.replay_and_perturb` on CPU, on as many threads as torch."""
    if rows is not None and work.changes:
        replay_and_perturb_cpu(weights, address, replace(work, probes=()))
        work = replace(work, changes=())
    count, stored = weights.numel(), _numpy(weights)
    arguments = (
        u64(address),
        u64(work.seed),
        work.distribution == "gaussian",
        32,
        KINDS[weights.dtype],
        *_numbers(work),
        np.zeros((0, 0), stored.dtype) if out is None else _numpy(out),
    )
    tiles = np.arange(-(-count // TILE)) if rows is None else _tiles_of(rows, count)
    threads = torch.get_num_threads() if len(tiles) * TILE >= PARALLEL_FROM else 1
    alone, in_parts = FUNCTIONS[weights.dtype == torch.float32]
    if threads == 1:
        alone(stored, tiles, *arguments)
    else:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        in_parts(threads, stored, tiles, *arguments)
