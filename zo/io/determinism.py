"""Make a process's GPU arithmetic repeat bit for bit, which the same log on any mesh rests on.

Process-wide and not undone: kernels that were chosen under other settings may give other bits. On CPU nothing changes.
"""

import os

import torch


def make_deterministic(device: torch.device | str) -> None:
    """Set what decides the bits of a forward on a GPU; call before the first use of CUDA.

    Float32 products are taken in float32 (no TF32), and 16-bit ones are summed in float32: a reduced-precision sum
    depends on how a library splits it. An operation without a deterministic version raises RuntimeError.
    """
    if torch.device(device).type != "cuda":
        return
    # Read when cuBLAS makes its handle; https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # Filling each new tensor costs a pass over memory; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
