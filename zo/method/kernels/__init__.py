"""The visit of a run of parameters: replay what is pending and write probes beside, by the kernel of their device.

``perturbation`` has the equation; every kernel repeats it bit for bit and has the same signature.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

from torch import Tensor

from zo.method.perturbation import ALIGNMENT, STORED_DTYPES, Pass, Rows, visit_reference

Kernel = Callable[[Tensor, int, Pass, Tensor | None, Rows | None], None]

KERNELS = {
    "cpu": ("zo.method.kernels.cpu", "visit_cpu"),
    "cuda": ("zo.method.kernels.triton", "visit_triton"),
}
"""Module and function by type of device; any other device computes the equation in plain torch."""


def visit(
    weights: Tensor, address: int, work: Pass, out: Tensor | None = None, rows: Rows | None = None
) -> None:
    """Replay changes on ``weights`` in place and write one probe a row of ``out``, in one pass over memory.

    Args:
        weights: contiguous, shape ``[n]``, float32, bfloat16 or float16; *modified in place* when there are changes.
        address: flat address of ``weights[0]``, a multiple of ``ALIGNMENT``.
        work: the changes and the probes.
        out: shape ``[len(work.probes), n]``, rows contiguous, dtype and device of ``weights``; *modified in place*.
        rows: what will be read of ``out``; the rest of it may be left as it is. Changes apply to all of ``weights``.
    """
    assert address % ALIGNMENT == 0 and weights.is_contiguous() and weights.dtype in STORED_DTYPES
    _kernel(weights.device.type)(weights, address, work, out, rows)


@cache
def _kernel(device_type: str) -> Kernel:
    # Imported on first use: numba takes a second to import, and Triton is absent where there is no GPU.
    if device_type not in KERNELS:
        return visit_reference
    module, function = KERNELS[device_type]
    kernel: Kernel = getattr(import_module(module), function)
    return kernel
