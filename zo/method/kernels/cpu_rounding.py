"""Widen stored numbers to float32, and round float32 to them: compiled by numba for CPU kernels.

The equations are those of ``rounding`` and of IEEE 754's nearest, on bits. Loops are branch-free,
over slices, so that LLVM vectorises them.
"""

import numpy as np
import torch
from torch import Tensor

from zo.method.kernels.cpu_random import (
    BFLOAT16,
    ROUNDING,
    TILE,
    f32,
    fill_words,
    i32,
    i64,
    jit,
    u32,
    u64,
)


@jit
def rounding_scratch():  # type: ignore[no-untyped-def]
    """Return the ``words`` and ``halves`` that :func:`round_stochastic` writes into."""
    calls = TILE // 8 + 1
    return np.empty((4, calls), np.uint32), np.empty(4 * calls, np.uint32)


@jit
def load(stored, kind, x):  # type: ignore[no-untyped-def]
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
def round_nearest(x, kind, stored):  # type: ignore[no-untyped-def]
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
def round_stochastic(x, kind, seed, address, step, words, halves, small):  # type: ignore[no-untyped-def]
    """Round float32 ``x``, at most ``TILE`` elements, in place to numbers of the stored dtype.

    ``words``, ``halves`` (see :func:`rounding_scratch`) and ``small[len(x)]`` are scratch. Words in
    the order of calls, seen as 16-bit numbers (low half first, as in memory), are in the order of
    addresses.
    """
    before = i64(address % u64(8))
    calls = (before + len(x) + 7) // 8
    fill_words(seed, address // u64(8), step, ROUNDING, calls, words)
    by_call = halves.reshape(-1, 4)
    for i in range(calls):
        by_call[i, 0], by_call[i, 1], by_call[i, 2], by_call[i, 3] = (
            words[0, i],
            words[1, i],
            words[2, i],
            words[3, i],
        )
    bits = x.view(np.uint32)
    random16 = halves.view(np.uint16)[before : before + len(x)]
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


def numpy_view(tensor: Tensor) -> np.ndarray:
    """Return the tensor's memory: float32 as it is, the 16-bit types as their bits."""
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).detach().numpy()
