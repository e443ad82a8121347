"""Make a process's GPU arithmetic repeat bit for bit, which the same log on any mesh rests on.

The settings are process-wide and not undone: kernels that were chosen under other settings may give
other bits. On CPU nothing changes.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zo.errors import UserError


def make_deterministic(device: torch.device | str) -> None:
    """Set what decides the bits of a forward on a GPU; call before the first use of CUDA.

    Float32 products are taken in float32 (no TF32), and 16-bit ones are summed in float32: the bits
    of a reduced-precision sum depend on how the library splits it. An operation without a
    deterministic version raises RuntimeError, see :func:`explain_nondeterminism`.
    """
    if torch.device(device).type != "cuda":
        return
    # Read when the cuBLAS handle is created.
    # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # Filling each new tensor costs a pass over memory, and only memory that was written is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def explain_nondeterminism() -> Iterator[None]:
    """Name the operation without a deterministic implementation that a forward calls.

    Raises:
        UserError: PyTorch refused such an operation, see :func:`make_deterministic`.
    """
    try:
        yield
    except RuntimeError as error:
        # The message of at::Context::alertNotDeterministic.
        refused = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if refused is None:
            raise
        raise UserError(
            f"the model's forward or the objective calls {refused[1]}, which has no deterministic "
            f"implementation on this GPU in PyTorch {torch.__version__}, so no run could be "
            "repeated; use a model or an objective without it, another model.attention, or "
            "run.device=cpu"
        ) from error
