"""Random words, and z, for the CPU kernels: compiled by numba, with the bits of the references.

The equations are those of ``philox`` and ``perturbation``. Loops are branch-free, over slices, so
that LLVM vectorises them.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from zo.method import perturbation as p
from zo.method.philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1, Purpose

numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]

TILE = 4096
"""Elements per tile; with its words and values it stays in the first two cache levels."""
PARALLEL_FROM = 1 << 17
"""Below this many elements a second thread costs more than it gives."""

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BFLOAT16, FLOAT16 = 1, 2
RADEMACHER, GAUSSIAN, ROUNDING = (
    np.uint64(v) for v in (Purpose.RADEMACHER, Purpose.GAUSSIAN, Purpose.ROUNDING)
)

u8, u32, u64 = np.uint8, np.uint32, np.uint64
i32, i64, f32 = np.int32, np.int64, np.float32
_MUL_0, _MUL_1, _WEYL_0, _WEYL_1 = u64(MULTIPLIER_0), u64(MULTIPLIER_1), u64(WEYL_0), u64(WEYL_1)
_MASK, _32 = u64(0xFFFFFFFF), u64(32)
_LOG_P, _SIN_P, _COS_P = (tuple(f32(c) for c in poly) for poly in (p.LOG_P, p.SIN_P, p.COS_P))
_LN_2 = f32(p.LN_2)


def forget_stale_kernels(method: Path) -> None:
    """Delete compiled kernels that are older than a source file of the method.

    numba keeps a compiled function as long as the function's own file is the same; constants and
    functions of other files are compiled into it.
    """
    newest = max(source.stat().st_mtime for source in method.rglob("*.py"))
    with suppress(OSError):  # Where the folder is read-only, numba keeps them elsewhere.
        for index in method.rglob("*.nbi"):
            if index.stat().st_mtime < newest:
                index.unlink(missing_ok=True)


forget_stale_kernels(Path(__file__).parent.parent)

jit = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")


@jit
def fill_words(seed, first_call, direction, purpose, count, words):  # type: ignore[no-untyped-def]
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


@jit
def _horner(poly, t):  # type: ignore[no-untyped-def]
    value = poly[len(poly) - 1]
    for k in range(len(poly) - 2, -1, -1):
        value = value * t + poly[k]
    return value


@jit
def _box_muller(words, count, u, v, z):  # type: ignore[no-untyped-def]
    """Fill ``z[:4 * count]`` from ``words[4, :count]``, by the equations of ``perturbation``.

    ``u[count]`` and ``v[4, count]`` are scratch.
    """
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


@jit
def fill_signs(words, count, bits_a_word, one, bits):  # type: ignore[no-untyped-def]
    """Fill ``bits[:128 * count]`` from ``words[4, :count]``: a set bit gives ``one``.

    A cleared bit gives ``one`` with its sign bit, the uppermost of 32, turned.

    ``bits_a_word`` is 32, but not a constant: LLVM would unroll the inner loop before it could
    vectorise it, which takes four times as long.
    """
    for i in range(count):
        for j in range(4):
            cleared, signs = ~words[j, i], bits[128 * i + 32 * j : 128 * i + 32 * j + 32]
            for b in range(bits_a_word):
                signs[b] = one ^ ((cleared >> u32(b)) << u32(31))


def vector_at(context: Any, builder: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    """Return LLVM's pointer to the vector whose first element is an array's element ``at``."""
    proxy: Any = cgutils.create_struct_proxy(kind)  # type: ignore[no-untyped-call]
    data = proxy(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


@intrinsic
def _add_signs(_context: Any, y: Any, x: Any, at: Any, word: Any, c: Any) -> Any:
    """Compute ``y[at : at + 32] = x[at : at + 32] + z * c``, z being 1 where a bit is set, else -1.

    Elements of ``x`` and of ``y`` are adjacent float32. Written in LLVM's own terms, for its
    vectoriser finds no way from the bits of a word to a vector of signs.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        y, x, at, word, c = arguments
        vector, bits = ir.VectorType(ir.FloatType(), 32), ir.VectorType(ir.IntType(1), 32)

        def splat(number: Any) -> Any:
            undefined = ir.Constant(vector, ir.Undefined)
            first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), 32), [0] * 32)
            return builder.shuffle_vector(first, undefined, zeros)

        signs = builder.bitcast(word, bits)
        term = builder.select(signs, splat(c), splat(builder.fneg(c)))
        source, target = (
            vector_at(context, builder, kind, array, at, vector)
            for kind, array in ((signature.args[1], x), (signature.args[0], y))
        )
        builder.store(builder.fadd(builder.load(source, align=4), term), target, align=4)
        return context.get_dummy_value()

    return types.void(y, x, types.int64, types.uint32, types.float32), generate


@jit
def draw(seed, address, direction, gaussian, words, u, v, z):  # type: ignore[no-untyped-def]
    """Draw z(seed, direction, address ..) for a tile: ``z[:TILE]``, or of signs ``words`` alone."""
    if gaussian:
        fill_words(seed, address // u64(4), direction, GAUSSIAN, TILE // 4, words)
        _box_muller(words, TILE // 4, u, v, z)
    else:
        fill_words(seed, address // u64(128), direction, RADEMACHER, TILE // 128, words)


@jit
def add_drawn(y, x, c, gaussian, words, z):  # type: ignore[no-untyped-def]
    """Compute ``y = x + z * c`` with what was drawn; ``len(x)`` is a multiple of 128."""
    if gaussian:
        for i in range(len(x)):
            y[i] = x[i] + z[i] * c
    else:
        for i in range(len(x) // 128):
            for j in range(4):
                _add_signs(y, x, 128 * i + 32 * j, words[j, i], c)  # type: ignore[call-arg]
