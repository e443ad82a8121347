"""The fused visit on CPU: compiled by numba, the same bits as the reference in ``perturbation``.

Weights go through the cache once, tile by tile; inner loops are branch-free, over slices, so that LLVM vectorises
them. Bits depend on addresses alone, so any number of threads may split a call. They are OpenMP's, as torch's are: a
pool of Python threads was half as fast, and numba's own ``workqueue`` aborts when two Python threads enter it.
"""

from dataclasses import replace
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

from zo.method import perturbation as p
from zo.method.philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1, Purpose

numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]

TILE = 4096
"""Elements a tile; with its words and values it stays in the first two cache levels."""
PARALLEL_FROM = 1 << 17
"""Below this many elements a second thread costs more than it gives."""

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BFLOAT16, FLOAT16 = 1, 2
RADEMACHER, GAUSSIAN, ROUNDING = (
    np.uint64(v) for v in (Purpose.RADEMACHER, Purpose.GAUSSIAN, Purpose.ROUNDING)
)

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32
_MUL_0, _MUL_1, _WEYL_0, _WEYL_1 = u64(MULTIPLIER_0), u64(MULTIPLIER_1), u64(WEYL_0), u64(WEYL_1)
_MASK, _32 = u64(0xFFFFFFFF), u64(32)
_LOG_P, _SIN_P, _COS_P = (tuple(f32(c) for c in poly) for poly in (p.LOG_P, p.SIN_P, p.COS_P))
_LN_2 = f32(p.LN_2)

_jit = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")


@_jit
def _words(seed, first_call, direction, purpose, count, words):  # type: ignore[no-untyped-def]
    """Fill ``words[4, :count]`` (uint32) with calls ``first_call ..`` of one stream."""
    for i in range(count):
        call = first_call + u64(i)
        x0, x1, x2, x3 = call & _MASK, call >> _32, direction & _MASK, purpose
        k0, k1 = seed & _MASK, seed >> _32
        for _ in range(ROUNDS):
            p0, p1 = x0 * _MUL_0, x2 * _MUL_1
            x0, x1, x2, x3 = (p1 >> _32) ^ x1 ^ k0, p1 & _MASK, (p0 >> _32) ^ x3 ^ k1, p0 & _MASK
            k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
        words[0, i], words[1, i], words[2, i], words[3, i] = u32(x0), u32(x1), u32(x2), u32(x3)


@_jit
def _horner(poly, t):  # type: ignore[no-untyped-def]
    value = poly[len(poly) - 1]
    for k in range(len(poly) - 2, -1, -1):
        value = value * t + poly[k]
    return value


@_jit
def _box_muller(words, count, u, v, z):  # type: ignore[no-untyped-def]
    """``z[:4 * count]`` from ``words[4, :count]``; ``u[count]``, ``v[4, count]`` are scratch; see perturbation."""
    u_bits, columns = u.view(np.int32), z.reshape(-1, 4)
    for pair in range(2):
        uniform, angle, cosine, sine = (
            words[2 * pair],
            words[2 * pair + 1],
            v[2 * pair],
            v[2 * pair + 1],
        )
        for i in range(count):
            u[i] = f32(uniform[i]) * f32(2.0**-32) + f32(2.0**-33)
        for i in range(count):
            exponent = i32(u_bits[i] - i32(p.SQRT_HALF_BITS)) >> i32(23)
            u_bits[i] = u_bits[i] - (exponent << i32(23))
            cosine[i] = f32(exponent)
        for i in range(count):
            t = u[i] - f32(1.0)
            square = t * t
            log = cosine[i] * _LN_2 + ((_horner(_LOG_P, t) * (square * t) - square * f32(0.5)) + t)
            u[i] = np.sqrt(f32(-2.0) * log)
        for i in range(count):
            word, radius = angle[i], u[i]
            t = f32(i32(word & u32(0x3FFFFFFF))) * f32(2.0**-30) - f32(0.5)
            square = t * t
            sin, cos = _horner(_SIN_P, square) * t, _horner(_COS_P, square)
            odd, far = (word & u32(0x40000000)) != u32(0), (word & u32(0x80000000)) != u32(0)
            x = -sin if odd else cos
            y = cos if odd else sin
            cosine[i] = radius * (-x if far else x)
            sine[i] = radius * (-y if far else y)
    for i in range(count):
        for j in range(4):
            columns[i, j] = v[j, i]


@_jit
def _signs(words, count, bits_a_word, z):  # type: ignore[no-untyped-def]
    """``z[:128 * count]`` from ``words[4, :count]``: a set bit is +1.

    ``bits_a_word`` is 32, but not a constant: LLVM would unroll the inner loop before it could vectorise it, which
    takes four times as long.
    """
    bits = z.view(np.uint32)
    for i in range(count):
        for j in range(4):
            cleared, signs = ~words[j, i], bits[128 * i + 32 * j : 128 * i + 32 * j + 32]
            for b in range(bits_a_word):
                signs[b] = u32(0x3F800000) | ((cleared >> u32(b)) << u32(31))


@_jit
def _direction(seed, address, direction, gaussian, bits_a_word, words, u, v, z):  # type: ignore[no-untyped-def]
    """Fill ``z[:TILE]`` with z(seed, direction, address ..)."""
    if gaussian:
        _words(seed, address // u64(4), direction, GAUSSIAN, TILE // 4, words)
        _box_muller(words, TILE // 4, u, v, z)
    else:
        _words(seed, address // u64(128), direction, RADEMACHER, TILE // 128, words)
        _signs(words, TILE // 128, bits_a_word, z)


@_jit
def _load(stored, kind, x):  # type: ignore[no-untyped-def]
    """Widen ``stored`` to float32 in ``x``, exactly."""
    count = len(stored)
    if kind == 0:
        for i in range(count):
            x[i] = stored[i]
    elif kind == BFLOAT16:
        bits = x.view(np.uint32)
        for i in range(count):
            bits[i] = u32(stored[i]) << u32(16)
    else:
        bits = x.view(np.uint32)
        for i in range(count):
            # Move the exponent as if it were float32's, then scale by 2**112: exact for subnormals too.
            bits[i] = (u32(stored[i]) & u32(0x7FFF)) << u32(13)
        for i in range(count):
            x[i] = x[i] * f32(2.0**112)
        for i in range(count):
            half = u32(stored[i])
            special = u32(0x7F800000) if (half & u32(0x7C00)) == u32(0x7C00) else u32(0)
            bits[i] = bits[i] | special | ((half & u32(0x8000)) << u32(16))


@_jit
def _round_nearest(x, kind, stored):  # type: ignore[no-untyped-def]
    """Write float32 ``x`` to ``stored`` in its dtype, ties to even."""
    count = len(stored)
    bits = x.view(np.uint32)
    if kind == 0:
        for i in range(count):
            stored[i] = x[i]
    elif kind == BFLOAT16:
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


@_jit
def _round_stochastic(x, kind, seed, address, step, words, halves, small):  # type: ignore[no-untyped-def]
    """Round float32 ``x`` in place to numbers of the stored dtype; ``halves``, ``small`` are scratch.

    Words in the order of calls, seen as 16-bit numbers (low half first, as this machine keeps them), are in the order
    of addresses.
    """
    _words(seed, address // u64(8), step, ROUNDING, TILE // 8, words)
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


@_jit
def _visit(  # type: ignore[no-untyped-def]
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
    """The visit of these tiles of ``stored``."""
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
        # Slices start at zero: an index that could be negative would keep a loop from being vectorised.
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
                    _direction(seed, here, directions[e, k], gaussian, bits_a_word, words, u, v, z)
                    for i in range(count):
                        x[i] = x[i] + z[i] * c
                    in_z = -1
            if kind != 0:
                _round_stochastic(x[:count], kind, seed, here, steps[e], words, halves, y)
        if len(steps) > 0:
            _round_nearest(x, kind, here_stored)
        for row in range(len(probes)):
            c = scales[row]
            if c == f32(0.0):
                _round_nearest(x, kind, out[row, lo : lo + count])
                continue
            if in_z < 0 or probes[row] != probes[in_z]:
                _direction(seed, here, probes[row], gaussian, bits_a_word, words, u, v, z)
                in_z = row
            for i in range(count):
                y[i] = x[i] + z[i] * c
            _round_nearest(y, kind, out[row, lo : lo + count])


@numba.njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _visit_in_parts(parts, stored, tiles, *arguments):  # type: ignore[no-untyped-def]
    """The visit of these tiles, an equal part of them a thread."""
    for part in numba.prange(parts):
        _visit(
            stored, tiles[part * len(tiles) // parts : (part + 1) * len(tiles) // parts], *arguments
        )


def _tiles_of(rows: p.Rows, count: int) -> np.ndarray:
    """Numbers of the tiles that these rows lie in, sorted."""
    first = rows.numbers.numpy() * rows.width
    spanned = np.arange(0, rows.width + TILE - 1, TILE)[None, :]
    inside = np.minimum(
        first[:, None] + spanned, np.minimum(first + rows.width, count)[:, None] - 1
    )
    return np.unique(inside // TILE)


def _numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's memory: float32 as it is, the 16-bit types as their bits."""
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).detach().numpy()


@lru_cache(maxsize=256)
def _numbers(work: p.Pass) -> tuple[np.ndarray, ...]:
    """A pass's numbers as the kernel takes them; read only.

    Returns:
        Steps, decays, directions and coefficients of the changes; directions and scales of the probes.
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


def visit_cpu(
    weights: Tensor,
    address: int,
    work: p.Pass,
    out: Tensor | None = None,
    rows: p.Rows | None = None,
) -> None:
    """Compute :func:`zo.method.kernels.visit` for tensors on CPU, on as many threads as torch uses."""
    if rows is not None and work.changes:
        visit_cpu(weights, address, replace(work, probes=()))
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
    if threads == 1:
        _visit(stored, tiles, *arguments)
    else:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        _visit_in_parts(threads, stored, tiles, *arguments)
