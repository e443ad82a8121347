"""Stochastic rounding of float32 values to 16-bit storage.

    round(x) = the stored number below |x| with probability 1 - d, the one above with probability d,
    d = (|x| - below) / (above - below), to 16 random bits

The random bits are a function of step and address. A step of 1e-6 on bfloat16 weights is lost by
rounding to nearest; rounded stochastically, it is realised on average.

Source: Gupta et al. 2015, "Deep learning with limited numerical precision".
"""

import torch
from torch import Tensor

from zo.method.philox import Purpose, words


def rounding_bits(
    seed: int, step: int, address: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return 16 random bits for each of ``count`` addresses from ``address``; int64 ``[count]``.

    A line of 128 addresses takes 8 calls: address a takes call ``a // 128 * 8 + a % 8``, and of its
    four words, one after the other, the 16 bits from byte ``a % 128 // 8`` on (within their word,
    whose first byte follows its last). So eight neighbours lie in one vector of calls. Two numbers
    share each byte, which is the upper one of the first and the lower one of the second.
    """
    first = address // 128
    lines = (address + count + 127) // 128 - first
    calls = torch.arange(8 * first, 8 * (first + lines), dtype=torch.int64, device=device)
    w = words(seed, calls, step, Purpose.ROUNDING).reshape(lines, 8, 4)
    rotated = torch.stack([(w | w << 32) >> 8 * byte & 0xFFFF for byte in range(4)], dim=-1)
    bits = rotated.reshape(lines, 8, 16).transpose(1, 2).reshape(-1)
    return bits[address - 128 * first :][:count]


def round_stochastic(values: Tensor, random16: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values to ``dtype`` up or down with probability by distance.

    Args:
        values: float32, any shape. Not-a-number and infinity stay what they are.
        random16: int64 of the same shape, each value in [0, 2**16).
        dtype: ``torch.bfloat16`` or ``torch.float16``; ``torch.float32`` returns ``values``.

    Returns:
        Tensor of ``dtype``, the same shape. Magnitudes beyond float16's largest become infinite.
    """
    if dtype == torch.float32:
        return values
    bits = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    sign, magnitude = bits & 0x80000000, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = torch.where(magnitude < 0x7F800000, magnitude + random16, magnitude) >> 16
        # A not-a-number whose payload lies in the lost half must not become infinity.
        rounded = torch.where(magnitude > 0x7F800000, 0x7FC0, rounded)
    else:
        normal = ((magnitude + (random16 >> 3)) >> 13) - (112 << 10)
        # Below 2**-14 the spacing is 2**-24 whatever the exponent: count in units of it.
        units = values.abs() * 2.0**24 + random16.to(torch.float32) * 2.0**-16
        subnormal = torch.where(magnitude < 0x38800000, units, 0.0).to(torch.int64)
        rounded = torch.where(magnitude < 0x38800000, subnormal, normal).clamp(max=0x7C00)
        rounded = torch.where(magnitude > 0x7F800000, 0x7E00, rounded)
    stored = rounded | (sign >> 16)
    return torch.where(stored >= 0x8000, stored - 0x10000, stored).to(torch.int16).view(dtype)
