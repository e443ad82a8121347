"""What the Triton kernels share: random words, z by address, loads, stores and rounding.

Philox runs once per call, not once per element: the words of a vector of calls are laid side by
side and widened to signs, normals or halves. Nothing is contracted or flushed to zero
(``OPTIONS``), and the 16-bit types are rounded on their bits, so a GPU, a CPU and Triton's
interpreter agree.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo.method import perturbation as p
from zo.method.passes import GROUP
from zo.method.philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1, Purpose

TILE = 2048
VECTOR = 16
"""A segment's size is counted in so many elements where it can be, for loads of whole vectors."""
OPTIONS = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
"""Compiler options: no product is contracted with a sum, no subnormal float32 becomes zero."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_MUL_0, _MUL_1 = tl.constexpr(MULTIPLIER_0), tl.constexpr(MULTIPLIER_1)
_WEYL_0, _WEYL_1, _ROUNDS = tl.constexpr(WEYL_0), tl.constexpr(WEYL_1), tl.constexpr(ROUNDS)
_RADEMACHER, _GAUSSIAN = tl.constexpr(int(Purpose.RADEMACHER)), tl.constexpr(int(Purpose.GAUSSIAN))
_ROUNDING = tl.constexpr(int(Purpose.ROUNDING))
_LOG_P, _SIN_P, _COS_P = tl.constexpr(p.LOG_P), tl.constexpr(p.SIN_P), tl.constexpr(p.COS_P)
_LOG_LAST, _TURN_LAST = tl.constexpr(len(p.LOG_P) - 1), tl.constexpr(len(p.SIN_P) - 1)
_LN_2, _SQRT_HALF = tl.constexpr(p.LN_2), tl.constexpr(p.SQRT_HALF_BITS)
_BFLOAT16, _FLOAT16 = tl.constexpr(1), tl.constexpr(2)
GROUP_SIZE = tl.constexpr(GROUP)


@triton.jit
def side_by_side(a, b, c, d, count: tl.constexpr):  # type: ignore[no-untyped-def]
    """Interleave four vectors of ``count`` to one of ``4 * count``: a0 b0 c0 d0 a1 ..."""
    pairs = tl.join(tl.join(a, b), tl.join(c, d))  # [count, within the pair, which pair]
    return tl.reshape(tl.permute(pairs, (0, 2, 1)), (4 * count,))


@triton.jit
def draw_words(  # type: ignore[no-untyped-def]
    seed_lo,
    seed_hi,
    address,
    per_call: tl.constexpr,
    direction,
    purpose,
    count: tl.constexpr,
):
    """Return words 0 .. 3 of ``count`` calls from the one of ``address``; uint32."""
    call = address // per_call + tl.arange(0, count).to(tl.int64)
    x0, x1 = call.to(tl.uint32), (call >> 32).to(tl.uint32)
    x2, x3 = tl.zeros_like(x0) + direction.to(tl.uint32), tl.zeros_like(x0) + purpose
    k0, k1 = seed_lo.to(tl.uint32), seed_hi.to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        p0, p1 = x0.to(tl.uint64) * _MUL_0, x2.to(tl.uint64) * _MUL_1
        x0, x2 = (p1 >> 32).to(tl.uint32) ^ x1 ^ k0, (p0 >> 32).to(tl.uint32) ^ x3 ^ k1
        x1, x3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = (
            (k0.to(tl.uint64) + _WEYL_0).to(tl.uint32),
            (k1.to(tl.uint64) + _WEYL_1).to(tl.uint32),
        )
    return x0, x1, x2, x3


@triton.jit
def _box_muller(uniform, angle):  # type: ignore[no-untyped-def]
    """Return two normals from two words, by the equations of ``perturbation``."""
    u = uniform.to(tl.float32) * 2.0**-32 + 2.0**-33
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    value = tl.zeros_like(t) + _LOG_P[_LOG_LAST]
    for k in tl.static_range(_LOG_LAST - 1, -1, -1):
        value = value * t + _LOG_P[k]
    square = t * t
    log = exponent.to(tl.float32) * _LN_2 + ((value * (square * t) - square * 0.5) + t)
    radius = tl.sqrt_rn(log * -2.0)
    t = (angle & 0x3FFFFFFF).to(tl.int32).to(tl.float32) * 2.0**-30 - 0.5
    square = t * t
    sin, cos = tl.zeros_like(t) + _SIN_P[_TURN_LAST], tl.zeros_like(t) + _COS_P[_TURN_LAST]
    for k in tl.static_range(_TURN_LAST - 1, -1, -1):
        sin, cos = sin * square + _SIN_P[k], cos * square + _COS_P[k]
    sin = sin * t
    odd, far = (angle & 0x40000000) != 0, (angle & 0x80000000) != 0
    x, y = tl.where(odd, -sin, cos), tl.where(odd, cos, sin)
    return radius * tl.where(far, -x, x), radius * tl.where(far, -y, y)


@triton.jit
def draw_z(seed_lo, seed_hi, address, direction, gaussian: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return z(seed, direction, address ..); float32 ``[tile]``."""
    if gaussian:
        a, b, c, d = draw_words(seed_lo, seed_hi, address, 4, direction, _GAUSSIAN, tile // 4)
        z0, z1 = _box_muller(a, b)
        z2, z3 = _box_muller(c, d)
        return side_by_side(z0, z1, z2, z3, tile // 4)
    else:  # noqa: RET505 -- Triton compiles the branch of a constant only where it is one
        bits = draw_bits(seed_lo, seed_hi, address, direction, _RADEMACHER, tile)
        return tl.where(bits != 0, 1.0, -1.0)


@triton.jit
def draw_bits(seed_lo, seed_hi, address, direction, purpose, count: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the bits of ``count`` addresses of one stream, 0 or 1; uint32 ``[count]``."""
    a, b, c, d = draw_words(seed_lo, seed_hi, address, 128, direction, purpose, count // 128)
    words = tl.reshape(side_by_side(a, b, c, d, count // 128), (count // 32, 1))
    return tl.reshape((words >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1, (count,))


@triton.jit
def load_wide(stored, place, inside, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """Widen to float32, exactly."""
    if kind == 0:
        return tl.load(stored + place, mask=inside, other=0.0)
    half = tl.load(stored + place, mask=inside, other=0).to(tl.uint32) & 0xFFFF
    if kind == _BFLOAT16:
        return (half << 16).to(tl.float32, bitcast=True)
    # Move the exponent as if it were float32's, then scale by 2**112: exact for subnormals too.
    scaled = ((half & 0x7FFF) << 13).to(tl.float32, bitcast=True) * 2.0**112
    special = tl.where((half & 0x7C00) == 0x7C00, 0x7F800000, 0).to(tl.uint32)
    return (scaled.to(tl.uint32, bitcast=True) | special | ((half & 0x8000) << 16)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def store_nearest(stored, place, inside, x, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store float32 in the stored dtype, ties to even."""
    if kind == 0:
        tl.store(stored + place, x, mask=inside)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
        if kind == _BFLOAT16:
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            rounded = tl.where(magnitude > 0x7F800000, 0x7FC0, rounded)
        else:
            normal = ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13) - (112 << 10)
            # Adding 1/2 leaves a multiple of 2**-24, float16's spacing below 2**-14, in the low
            # bits.
            raised = (
                tl.where(magnitude < 0x38800000, magnitude, 0).to(tl.float32, bitcast=True) + 0.5
            )
            subnormal = raised.to(tl.uint32, bitcast=True) - 0x3F000000
            rounded = tl.where(magnitude < 0x38800000, subnormal, tl.minimum(normal, 0x7C00))
            rounded = sign | tl.where(magnitude > 0x7F800000, 0x7E00, rounded)
        tl.store(stored + place, rounded.to(tl.int16), mask=inside)


@triton.jit
def round_stochastic(x, kind: tl.constexpr, seed_lo, seed_hi, address, step, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round float32 to numbers of the stored dtype, by the equations of ``rounding``."""
    # Eight calls a line of 128 addresses; of each its words' 16 bits from every byte on.
    a, b, c, d = draw_words(seed_lo, seed_hi, address, 16, step, _ROUNDING, tile // 16)
    words = tl.reshape(side_by_side(a, b, c, d, tile // 16), (tile // 128, 8, 4))
    words = tl.reshape(tl.permute(words, (0, 2, 1)), (tile // 32, 1, 8))
    shift = (tl.arange(0, 4)[None, :, None] * 8).to(tl.uint32)
    random16 = tl.reshape((words >> shift | words << (32 - shift & 31)) & 0xFFFF, (tile,))
    bits = x.to(tl.uint32, bitcast=True)
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    if kind == _BFLOAT16:
        rounded = tl.where(finite, (bits + random16) & 0xFFFF0000, bits)
    else:
        normal = (magnitude + (random16 >> 3)) & 0xFFFFE000
        normal = tl.where(normal < 0x47800000, normal, 0x7F800000)
        small = tl.where(magnitude < 0x38800000, magnitude, 0).to(tl.float32, bitcast=True)
        units = (small * 2.0**24 + random16.to(tl.int32).to(tl.float32) * 2.0**-16).to(tl.int32)
        subnormal = (units.to(tl.float32) * 2.0**-24).to(tl.uint32, bitcast=True)
        rounded = sign | tl.where(
            magnitude < 0x38800000, subnormal, tl.where(finite, normal, magnitude)
        )
    return rounded.to(tl.float32, bitcast=True)


@lru_cache(maxsize=256)
def numbers_of(work: p.Pass) -> tuple[Tensor, int]:
    """Return a pass's numbers as one int32 tensor, and the most directions of a change.

    float32 numbers are given by their bits.
    """
    changes, probes = work.changes, work.probes
    width = max((len(c.directions) for c in changes), default=0)
    floats = [c for change in changes for c in (change.decay, *change.coefficients)] + [
        probe.scale for probe in probes
    ]
    bits = iter(torch.tensor(floats, dtype=torch.float32).view(torch.int32).tolist())
    numbers = [work.seed & 0xFFFFFFFF, work.seed >> 32]
    for change in changes:
        numbers += [change.step, next(bits)]
        for direction in change.directions:
            numbers += [direction, next(bits)]
        numbers += [0, 0] * (width - len(change.directions))
    for probe in probes:
        numbers += [probe.direction, next(bits)]
    return torch.tensor(numbers, dtype=torch.int64).to(torch.int32), width


@lru_cache(maxsize=256)
def table_of(work: p.Pass, device: torch.device, stream: int) -> Tensor:
    """Return a pass's numbers on a device, uploaded once for all segments on one stream.

    ``stream`` is part of the key: the upload is ordered before launches on its own stream only.
    """
    numbers, _ = numbers_of(work)
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


def stored_as(tensor: Tensor) -> Tensor:
    """Return a tensor as the kernels take it: float32 as it is, the 16-bit types as their bits."""
    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)
