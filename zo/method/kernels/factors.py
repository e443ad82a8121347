"""The signs a and b that rank-one directions are made of, for what reads them without weights.

A probe at a linear layer may be a correction of its output, ``x W' + scale * (x b) a'``: it needs
the factors of many directions at once and no element of z. ``perturbation`` has the equation.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from zo.method.perturbation import factor_signs_reference
from zo.method.philox import Purpose

KERNELS = {
    "cpu": ("zo.method.kernels.cpu_factors", "factor_signs_cpu"),
    "cuda": ("zo.method.kernels.triton_factors", "factor_signs_triton"),
}
"""Module and function by type of device; any other device computes the equation in plain torch."""


def factor_signs(
    seed: int,
    directions: Sequence[int],
    start: int,
    count: int,
    purpose: Purpose,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the signs of consecutive rows or columns for each of some directions.

    Args:
        seed: the run's seed, in [0, 2**64).
        directions: numbers of the directions, each in [0, 2**32).
        start: address of the parameter, plus the number of the first row or column (see
            :class:`zo.method.passes.Matrices`); any integer >= 0.
        count: number of rows or columns.
        purpose: ``Purpose.ROW`` for a, ``Purpose.COLUMN`` for b.
        dtype: of the result; floating point, 16 bits or more.
        device: of the result.

    Returns:
        +1 or -1, shape ``[len(directions), count]``, contiguous.
    """
    assert 0 <= seed < 1 << 64 and all(0 <= d < 1 << 32 for d in directions), seed
    assert start >= 0 and purpose in (Purpose.ROW, Purpose.COLUMN), (start, purpose)
    kernel = _kernel(torch.device(device).type)
    return kernel(seed, directions, start, count, purpose, dtype, device)


@cache
def _kernel(device_type: str) -> Callable[..., Tensor]:
    # Imported on first use: numba takes a second, and Triton is absent where there is no GPU.
    if device_type not in KERNELS:
        return factor_signs_reference
    module, function = KERNELS[device_type]
    kernel: Callable[..., Tensor] = getattr(import_module(module), function)
    return kernel
