"""The versions that a result's bits depend on."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions that the bits of a run on ``device`` depend on, by name.

    The GPU and its libraries are included for a CUDA device only: ranks that compute on CPU are
    alike whatever GPUs their nodes have.
    """
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("zo", "torch", "transformers", "numba")}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    if device.type != "cuda":
        return found
    found["cuda"] = str(torch.version.cuda)
    found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    major = found["cuda"].split(".")[0]
    for package in ("nvidia-cublas", f"nvidia-cublas-cu{major}"):
        with suppress(PackageNotFoundError):
            found["cublas"] = version(package)
    gpu = torch.cuda.get_device_properties(device)
    found["gpu"] = f"{gpu.name} (compute capability {gpu.major}.{gpu.minor})"
    return found
