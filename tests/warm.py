"""Do once, in the server that ranks are forked from, what every new process does before a step.

A run imports datasets and numba, composes its configuration and loads compiled kernels only when it
comes to them, which takes a new process two seconds. Nothing here starts a thread: a fork has none.
"""

import tempfile
from itertools import product
from pathlib import Path

import datasets.packaged_modules.json.json  # noqa: F401
import torch
from filelock import FileLock
from plain import plain_config

from zo.method.kernels import replay_and_perturb
from zo.method.perturbation import Change, Matrices, Pass, Probe

MATRICES = (Matrices(0, 4096, 64, 64),)
CHANGES = (Change(1, (0,), (1e-3,)),)


def load_kernels():
    """Call each kernel on a matrix; where none is in numba's cache yet, one process compiles."""
    with FileLock(Path(tempfile.gettempdir()) / "zo-tests-kernels.lock"):
        for dtype, distribution, probes in product(
            (torch.float32, torch.bfloat16), ("rademacher", "rank-one"), (0, 1)
        ):
            work = Pass(1, distribution, CHANGES, (Probe(0, 1e-3),) * probes)
            out = torch.zeros(1, 4096, dtype=dtype) if probes else None
            replay_and_perturb(torch.zeros(4096, dtype=dtype), 0, work, out, None, MATRICES)


torch.set_num_threads(1)
plain_config()
load_kernels()
