"""Replay pending changes on weights and write their probes, by the kernel of their device.

``perturbation`` has the equation; every kernel has the same bits and the same signature.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

from torch import Tensor

from zo.method.perturbation import (
    ALIGNMENT,
    STORED_DTYPES,
    Matrices,
    Pass,
    Rows,
    replay_and_perturb_reference,
)

Kernel = Callable[[Tensor, int, Pass, Tensor | None, Rows | None, tuple[Matrices, ...]], None]

KERNELS = {
    "cpu": ("zo.method.kernels.cpu", "replay_and_perturb_cpu"),
    "cuda": ("zo.method.kernels.triton", "replay_and_perturb_triton"),
}
"""Module and function by type of device; any other device computes the equation in plain torch."""


def replay_and_perturb(
    weights: Tensor,
    address: int,
    work: Pass,
    out: Tensor | None = None,
    rows: Rows | None = None,
    matrices: tuple[Matrices, ...] = (),
) -> None:
    """Replay changes on ``weights`` and write a probe to each row of ``out``, in one pass.

    Args:
        weights: contiguous, shape ``[n]``, float32, bfloat16 or float16; *modified in place* if
            there are changes.
        address: flat address of ``weights[0]``, a multiple of ``ALIGNMENT``.
        work: the changes and the probes.
        out: shape ``[len(work.probes), n]``, rows contiguous, dtype and device of ``weights``;
            *modified in place*.
        rows: all that will be read of ``out``; the rest may be left as it is. Changes apply to all
            of ``weights``.
        matrices: those that ``weights`` may be a piece of, in the order of addresses; each starts
            on a multiple of ``ALIGNMENT``. Only rank-one directions depend on them.
    """
    assert address % ALIGNMENT == 0 and weights.is_contiguous() and weights.dtype in STORED_DTYPES
    _kernel(weights.device.type)(weights, address, work, out, rows, matrices)


@cache
def _kernel(device_type: str) -> Kernel:
    # Imported on first use: numba takes a second, and Triton is absent where there is no GPU.
    if device_type not in KERNELS:
        return replay_and_perturb_reference
    module, function = KERNELS[device_type]
    kernel: Kernel = getattr(import_module(module), function)
    return kernel
