"""The Triton kernel against the equation, bit for bit, in Triton's interpreter: GPU runs must be CPU runs.

The interpreter is chosen when Triton is imported, so the comparison runs in a process of its own.
"""

import os
import subprocess
import sys

import pytest
from test_perturbation import bits

pytest.importorskip("triton", reason="Triton is not installed on this platform")

CASES = [
    (distribution, dtype, count, address)
    for distribution in ("rademacher", "gaussian")
    for dtype in ("float32", "bfloat16", "float16")
    for count, address in ((5_000, 128_000), (2_048, 2**39 + 128))
]


def compare():
    """Run every case; called in the process with the interpreter."""
    import torch
    from test_perturbation import CHANGES, OFFSETS, weights

    from zo.kernels_triton import visit_triton
    from zo.perturbation import visit_reference

    for seed in (3, 2**64 - 1):
        for distribution, name, count, address in CASES:
            dtype = getattr(torch, name)
            expected, found = weights(count, dtype), weights(count, dtype)
            expected_out, found_out = torch.zeros(4, count, dtype=dtype), torch.zeros(4, count, dtype=dtype)
            visit_reference(expected, address, seed, distribution, CHANGES, OFFSETS, expected_out)
            visit_triton(found, address, seed, distribution, CHANGES, OFFSETS, found_out)
            assert torch.equal(bits(found), bits(expected)), (distribution, name, count, "weights")
            assert torch.equal(bits(found_out), bits(expected_out)), (distribution, name, count, "probes")
            visit_triton(found, address, seed, distribution, CHANGES)
            visit_reference(expected, address, seed, distribution, CHANGES)
            assert torch.equal(bits(found), bits(expected)), (distribution, name, count, "replay alone")


def test_the_triton_kernel_has_the_bits_of_the_equation():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", "import test_kernels_triton; test_kernels_triton.compare()"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
