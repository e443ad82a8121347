"""What this machine can give a run: memory that is free, and may be locked; each number with its source."""

import os
import resource
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
CAP_IPC_LOCK = 14


def available_host_bytes() -> int:
    """Memory that this process can still get: the system's, or what its control group leaves (v2, then v1)."""
    free = int(psutil.virtual_memory().available)
    for limit, usage in (
        (CGROUP / "memory.max", CGROUP / "memory.current"),
        (CGROUP / "memory/memory.limit_in_bytes", CGROUP / "memory/memory.usage_in_bytes"),
    ):
        try:
            # "max": no limit.
            free = min(free, int(limit.read_text()) - int(usage.read_text()))
        except (OSError, ValueError):
            continue
    return max(0, free)


def lockable_bytes() -> float:
    """Memory that this process may lock (``ulimit -l``); infinite with the capability to lock any."""
    try:
        held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
        if int(held.split()[1], 16) >> CAP_IPC_LOCK & 1:
            return float("inf")
    except (OSError, StopIteration):
        pass
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return float("inf") if soft == resource.RLIM_INFINITY else float(soft)


def name_accelerator() -> None:
    """Tell DeepSpeed, which transformers loads where it is installed; it would guess, and say so on stdout.

    Its disk engine reads into host memory, and as a CPU's it needs no CUDA toolkit to be built.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def free_disk_bytes(path: Path) -> int:
    """Room on the disk that a path lies on, or will."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize
