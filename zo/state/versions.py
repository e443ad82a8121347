"""The versions that a result's bits depend on."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch


def versions() -> dict[str, str]:
    """Return the versions of what a result's bits depend on, and the GPU that this process computes with, if any."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("zo", "torch", "transformers", "numba")}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
        for package in (
            "nvidia-cublas",
            f"nvidia-cublas-cu{str(torch.version.cuda).split('.')[0]}",
        ):
            with suppress(PackageNotFoundError):
                found["cublas"] = version(package)
        found["gpu"] = (
            f"{properties.name} (compute capability {properties.major}.{properties.minor})"
        )
    return found
