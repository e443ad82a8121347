"""The Triton kernel on a GPU against the equation on the CPU: a GPU run must be a CPU run, bit for bit."""

import pytest
import torch

from zo.method.kernels import visit
from zo.method.perturbation import STORED_DTYPES, Change, Pass, Probe, Z, visit_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("distribution", Z)
@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_gpu_kernel_has_the_bits_of_the_equation(distribution, dtype):
    count, eps = 1_000_003, 2.0**-10
    changes = (
        Change(7, (14, 15), (2.0**-13, -(2.0**-15)), 1 - 2.0**-12),
        Change(8, (16, 17), (2.0**-19, 0.0)),
    )
    probes = (Probe(18, eps), Probe(18, -eps), Probe(19, eps), Probe(0, 0.0))
    expected = (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    found = expected.cuda()
    expected_out, found_out = (
        torch.zeros(4, count, dtype=dtype),
        torch.zeros(4, count, dtype=dtype, device="cuda"),
    )
    visit_reference(expected, 2**39, Pass(5, distribution, changes, probes), expected_out)
    visit(found, 2**39, Pass(5, distribution, changes, probes), found_out)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(found_out.cpu(), expected_out)
