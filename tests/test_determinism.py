"""A GPU run repeats only if every setting that changes bits is fixed before it begins."""

import os
import subprocess
import sys

CHECK = """
import os, torch
from zo.io.determinism import make_deterministic
make_deterministic("cpu")
assert not torch.are_deterministic_algorithms_enabled()
make_deterministic("cuda")
assert torch.are_deterministic_algorithms_enabled()
assert not torch.is_deterministic_algorithms_warn_only_enabled()
assert not torch.utils.deterministic.fill_uninitialized_memory
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert torch.get_float32_matmul_precision() == "highest"
assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.benchmark
assert not torch.backends.cuda.matmul.allow_tf32
assert not torch.cuda.is_initialized()
"""


def test_a_gpu_run_sets_what_decides_its_bits_and_a_cpu_run_nothing():
    """The settings belong to the process, so they are looked at in one of their own."""
    run = subprocess.run(
        [sys.executable, "-c", CHECK], env=os.environ, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
