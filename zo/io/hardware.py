"""Limits of this machine: devices, free and lockable memory, room on disks."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

from zo.errors import UserError

if TYPE_CHECKING:
    import torch

CAP_IPC_LOCK = 14


def available_host_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of host memory available to this process and its control groups.

    Args:
        root: of the file system that ``proc`` and ``sys`` are mounted in.
    """
    return max(0, min([int(psutil.virtual_memory().available), *_left_by_control_groups(root)]))


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group of this process, v2 or v1, up to the root.

    Usage counts the page cache, which the kernel gives back under pressure. So the inactive part of
    it is free, as the working set of Docker and the kubelet has it: usage - inactive_file.
    """
    for base, path, names in _control_groups(root):
        limit, usage, inactive = names
        for group in (base / path, *(base / parent for parent in path.parents)):
            try:
                # "max": no limit.
                size, used = int((group / limit).read_text()), int((group / usage).read_text())
                stat = dict(
                    line.split() for line in (group / "memory.stat").read_text().splitlines()
                )
                yield size - max(0, used - int(stat.get(inactive, 0)))
            except (OSError, ValueError):
                continue


def _control_groups(root: Path) -> Iterator[tuple[Path, PurePosixPath, tuple[str, str, str]]]:
    """Yield mount point, path and names of files of each hierarchy that may limit memory."""
    mount = root / "sys/fs/cgroup"
    v2, v1 = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/", "1:memory:/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # A group outside of a container's own view has "..", and only the mount point is there to
        # be read.
        inside = PurePosixPath("." if ".." in path else path.lstrip("/") or ".")
        if not controllers:
            yield mount, inside, v2
        elif "memory" in controllers.split(","):
            yield mount / "memory", inside, v1


def lockable_bytes() -> float:
    """Return the bytes that this process may lock; infinite with CAP_IPC_LOCK."""
    try:
        held = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("CapEff")
        )
        if int(held.split()[1], 16) >> CAP_IPC_LOCK & 1:
            return float("inf")
    except (OSError, StopIteration):
        pass
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return float("inf") if soft == resource.RLIM_INFINITY else float(soft)


def choose_device(asked: str) -> "torch.device":
    """Return the device of this rank: the CPU, or the GPU with the rank's number on its node.

    Args:
        asked: ``run.device``: ``cpu``, ``cuda``, or ``auto`` for ``cuda`` where there is one.

    Raises:
        UserError: there is no GPU, or there are more ranks than GPUs.
    """
    import torch  # Not above: --help must not wait for torch.

    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "sees no GPU" if torch.version.cuda else "is built without CUDA"
        raise UserError(
            f"run.device={asked} needs a GPU, and PyTorch {torch.__version__} {why}; use "
            "run.device=cpu, or install PyTorch's build for CUDA and check that nvidia-smi lists a "
            "GPU"
        )
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if max(ranks, local_rank + 1) > gpus:
        raise UserError(
            f"run.device={asked}: {ranks} ranks on this node and {gpus} GPU{'s' * (gpus > 1)}, and "
            f"each rank needs one of its own; start torchrun with --nproc-per-node {gpus}, or use "
            "run.device=cpu"
        )
    return torch.device("cuda", local_rank)


def name_accelerator() -> None:
    """Set DeepSpeed's accelerator, which it would else guess and print to stdout.

    Its disk engine reads into host memory, and as a CPU's it needs no CUDA toolkit to be built.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def free_disk_bytes(path: Path) -> int:
    """Return the free bytes on the disk of a path, which need not exist."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize
