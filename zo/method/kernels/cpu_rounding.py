"""Widen stored numbers to float32, and round float32 to them: compiled by numba for CPU kernels.

The equations are those of ``rounding`` and of IEEE 754's nearest, on bits. Loops are branch-free,
over slices, so that LLVM vectorises them.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
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
    vector_at,
)


@intrinsic
def _spread(_context: Any, random16: Any, at: Any, words: Any, call: Any) -> Any:
    """Write 32 random numbers, ``random16[at : at + 32]``, of a word of the 8 calls from ``call``.

    Written in LLVM's own terms, for its vectoriser takes the 8 calls one by one.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        random16, at, words, call = arguments
        half, eight = ir.IntType(16), ir.VectorType(ir.IntType(32), 8)
        sixteen = ir.VectorType(ir.IntType(32), 16)

        def shift(first: int, second: int) -> Any:
            return ir.Constant(sixteen, [first] * 8 + [second] * 8)

        source = vector_at(context, builder, signature.args[2], words, call, eight)
        word = builder.load(source, align=4)
        twice = ir.Constant(sixteen, list(range(8)) * 2)
        word = builder.shuffle_vector(word, ir.Constant(eight, ir.Undefined), twice)
        low = builder.lshr(word, shift(0, 8))
        high = builder.or_(builder.lshr(word, shift(16, 24)), builder.shl(word, shift(16, 8)))
        for number, bits in enumerate((low, high)):
            index = builder.add(at, ir.Constant(ir.IntType(64), 16 * number))
            halves = ir.VectorType(half, 16)
            target = vector_at(context, builder, signature.args[0], random16, index, halves)
            builder.store(builder.trunc(bits, halves), target, align=2)
        return context.get_dummy_value()

    return types.void(random16, types.int64, words, types.int64), generate


@intrinsic
def _widened(_context: Any, stored: Any) -> Any:
    """Return a bfloat16's bits as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        high = builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16))
        return builder.bitcast(high, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _rounded(_context: Any, x: Any, random16: Any) -> Any:
    """Return the bits of a bfloat16 next to a float32, by 16 random bits.

    Of numbers of 32 bits alone: numba's own arithmetic widens them to 64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, half = ir.IntType(32), ir.IntType(16)
        x, random16 = arguments
        # An infinity's upper half stays, whatever is added.
        bits = builder.add(builder.bitcast(x, word), builder.zext(random16, word))
        upper = builder.trunc(builder.lshr(bits, ir.Constant(word, 16)), half)
        is_nan = builder.fcmp_unordered("uno", x, x)
        return builder.select(is_nan, ir.Constant(half, 0x7FC0), upper)

    return types.uint16(types.float32, types.uint16), generate


@jit
def rounding_scratch():  # type: ignore[no-untyped-def]
    """Return the ``words`` and ``halves`` that :func:`round_stochastic` writes into."""
    lines = TILE // 128 + 1
    return np.empty((4, 8 * lines), np.uint32), np.empty(128 * lines, np.uint16)


@jit
def load(stored, kind, x):  # type: ignore[no-untyped-def]
    """Widen ``stored`` to float32 in ``x``, exactly."""
    count = len(stored)
    if kind == BFLOAT16:
        for i in range(count):
            x[i] = _widened(stored[i])  # type: ignore[call-arg]
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
def fill_random16(seed, address, step, count, words, halves):  # type: ignore[no-untyped-def]
    """Return the random numbers of at most ``TILE`` addresses, a part of ``halves``.

    ``words`` and ``halves`` are scratch, see :func:`rounding_scratch`.
    """
    before = i64(address % u64(128))
    lines = (before + count + 127) // 128
    fill_words(seed, address // u64(128) * u64(8), step, ROUNDING, 8 * lines, words)
    for i in range(lines):
        for j in range(4):
            _spread(halves, 128 * i + 32 * j, words[j], 8 * i)  # type: ignore[call-arg]
    return halves[before : before + count]


@jit
def widen_and_add(stored, decay, v, x):  # type: ignore[no-untyped-def]
    """Compute ``x = stored * decay + v`` of bfloat16 ``stored``, in float32."""
    for j in range(len(v)):
        x[j] = _widened(stored[j]) * decay + v[j]  # type: ignore[call-arg]


@jit
def add_and_round(x, v, random16, stored):  # type: ignore[no-untyped-def]
    """Round ``x + v`` to bfloat16 ``stored``, as :func:`round_stochastic` does."""
    for j in range(len(v)):
        stored[j] = _rounded(x[j] + v[j], random16[j])  # type: ignore[call-arg]


@jit
def widen_add_and_round(stored, decay, v, random16):  # type: ignore[no-untyped-def]
    """Round ``stored * decay + v`` to bfloat16 in place, as :func:`round_stochastic` does."""
    for j in range(len(v)):
        x = _widened(stored[j]) * decay + v[j]  # type: ignore[call-arg]
        stored[j] = _rounded(x, random16[j])


@jit
def round_stochastic(x, kind, seed, address, step, words, halves, small):  # type: ignore[no-untyped-def]
    """Round float32 ``x``, at most ``TILE`` elements, in place to numbers of the stored dtype.

    ``words``, ``halves`` (see :func:`rounding_scratch`) and ``small[len(x)]`` are scratch.
    """
    random16 = fill_random16(seed, address, step, len(x), words, halves)
    if kind == BFLOAT16:
        for i in range(len(x)):
            x[i] = _widened(_rounded(x[i], random16[i]))  # type: ignore[call-arg]
        return
    bits = x.view(np.uint32)
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
