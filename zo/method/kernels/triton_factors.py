"""Signs of rows and columns on a GPU, many directions in one Triton launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from zo.method.kernels.triton_common import draw_bits
from zo.method.philox import Purpose

LINE = 1024
"""Signs that one program makes."""


@triton.jit(do_not_specialize=["seed_lo", "seed_hi", "first", "before", "count", "purpose"])
def _fill(  # type: ignore[no-untyped-def]
    signs, directions, seed_lo: tl.int64, seed_hi: tl.int64, first: tl.int64, before: tl.int32,
    count: tl.int64, purpose: tl.int32, line: tl.constexpr,
):  # fmt: skip
    """Fill one line of one direction's row; bits begin ``before`` bits after address ``first``."""
    begin, row = tl.program_id(0).to(tl.int64) * line, tl.program_id(1).to(tl.int64)
    direction = tl.load(directions + row)
    address = first + begin
    bits = draw_bits(seed_lo, seed_hi, address, direction, purpose.to(tl.uint32), line)
    place = begin - before + tl.arange(0, line)
    inside = (place >= 0) & (place < count)
    tl.store(signs + row * count + place, tl.where(bits != 0, 1.0, -1.0), mask=inside)


def factor_signs_triton(
    seed: int,
    directions: Sequence[int],
    start: int,
    count: int,
    purpose: Purpose,
    dtype: torch.dtype,
    device: torch.device | str = "cuda",
) -> Tensor:
    """Compute :func:`zo.method.kernels.factors.factor_signs` on a GPU."""
    signs = torch.empty(len(directions), count, dtype=dtype, device=device)
    numbers = torch.tensor(directions, dtype=torch.int64)
    if signs.is_cuda:
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    before = start % 128
    grid = triton.cdiv(before + count, LINE), len(directions)
    halves = seed & 0xFFFFFFFF, seed >> 32
    if signs.numel() > 0:
        _fill[grid](signs, numbers, *halves, start - before, before, count, int(purpose), line=LINE)
    return signs
