"""The Triton kernel on a GPU against the equation on the CPU, bit for bit.

Triton's interpreter and the compiled PTX are checked without a GPU; what the driver's assembler
makes of the PTX, and what the hardware computes, only a GPU can show.
"""

import pytest
import torch

from zo.method.kernels import replay_and_perturb
from zo.method.kernels.factors import factor_signs
from zo.method.perturbation import (
    STORED_DTYPES,
    Change,
    Matrices,
    Pass,
    Probe,
    Z,
    factor_signs_reference,
    replay_and_perturb_reference,
)
from zo.method.philox import Purpose

EPS = 2.0**-10
COUNT = 1_000_003
CHANGES = (
    Change(7, (14, 15), (2.0**-13, -(2.0**-15)), 1 - 2.0**-12),
    Change(8, (16, 17), (2.0**-19, 0.0)),
)
MATRICES = (Matrices(2**39, 3 * 333 * 1000, 333, 1000),)
"""Experts, which leave some elements at the end."""
PROBES = (Probe(18, EPS), Probe(18, -EPS), Probe(19, EPS), Probe(0, 0.0))


def ordinary(dtype):
    """Weights of the size of a trained model's."""
    return (torch.randn(COUNT, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def subnormal(dtype):
    """Numbers near the smallest normal one of the dtype, on both sides, and the smallest of all."""
    info = torch.finfo(dtype)
    places = torch.linspace(-4, 4, COUNT, dtype=torch.float64)
    weights = (places * info.smallest_normal).to(dtype)
    weights[::1000] = info.smallest_normal * info.eps
    return weights


def special(dtype):
    """Infinities, not-a-number, zeros of both signs, and the largest numbers."""
    largest = torch.finfo(dtype).max
    values = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, largest, -largest, 1.0]
    return torch.tensor(values * (COUNT // 8 + 1), dtype=torch.float32)[:COUNT].to(dtype)


def small(weights, dtype):
    """Coefficients of the size of the weights, so that sums of subnormals stay subnormal."""
    if weights is not subnormal:
        return CHANGES, PROBES
    unit = max(torch.finfo(dtype).smallest_normal, 2.0**-126)
    changes = (Change(7, (14, 15), (unit / 4, -unit / 8)), Change(8, (16, 17), (unit / 16, 0.0)))
    return changes, tuple(Probe(p.direction, p.scale * unit * 512) for p in PROBES)


def same_bits(found, expected):
    """Compare bits, so that zeros of different sign differ; any not-a-number is like another."""
    found, nan = found.cpu(), expected.isnan()
    assert torch.equal(found.isnan(), nan)
    kind = torch.int32 if expected.dtype == torch.float32 else torch.int16
    return torch.equal(found.view(kind)[~nan], expected.view(kind)[~nan])


@pytest.mark.parametrize("weights", [ordinary, subnormal, special])
@pytest.mark.parametrize("distribution", Z)
@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_the_kernel_has_the_bits_of_the_equation(distribution, dtype, weights):
    """The assembler and the hardware decide if a subnormal is flushed or a product contracted."""
    changes, probes = small(weights, dtype)
    work, address = Pass(5, distribution, changes, probes), 2**39
    expected = weights(dtype)
    found = expected.cuda()
    expected_out = torch.zeros(len(probes), COUNT, dtype=dtype)
    found_out = torch.zeros(len(probes), COUNT, dtype=dtype, device="cuda")
    replay_and_perturb_reference(expected, address, work, expected_out, None, MATRICES)
    replay_and_perturb(found, address, work, found_out, None, MATRICES)
    assert same_bits(found, expected)
    assert same_bits(found_out, expected_out)


@pytest.mark.parametrize("count", [1, 127, 2048, 2049, 1_000_000])
def test_nothing_is_written_outside_a_segment(count):
    """Masked vector stores at the end of a segment are the hardware's; a neighbour would change."""
    memory = torch.full((count + 4096,), 7.0, device="cuda", dtype=torch.bfloat16)
    segment = memory[2048 : 2048 + count]
    segment.copy_(torch.ones(count))
    expected = segment.cpu()
    work = Pass(5, "rademacher", CHANGES)
    replay_and_perturb_reference(expected, 1280, work)
    replay_and_perturb(segment, 1280, work)
    assert torch.equal(segment.cpu(), expected)
    assert bool((memory[:2048] == 7).all())
    assert bool((memory[2048 + count :] == 7).all())


@pytest.mark.parametrize("dtype", STORED_DTYPES)
@pytest.mark.parametrize(("start", "count"), [(2**33 + 77, 100_000), (3, 5)])
def test_factors_are_those_of_the_equation(dtype, start, count):
    """A corrected output on a GPU must be of the direction that replay applies."""
    stream = 2**63 + 1, [7, 2**32 - 1], start, count, Purpose.ROW, dtype
    assert torch.equal(factor_signs(*stream, "cuda").cpu(), factor_signs_reference(*stream))


def test_a_second_stream_waits_for_its_own_upload():
    """A table of numbers uploaded on one stream may not be there when another stream launches."""
    work, found = Pass(6, "gaussian", CHANGES), []
    for _ in range(20):
        with torch.cuda.stream(torch.cuda.Stream()):
            weights = torch.zeros(4096, device="cuda")
            replay_and_perturb(weights, 0, work)
            found.append(weights.cpu())
    expected = torch.zeros(4096)
    replay_and_perturb_reference(expected, 0, work)
    assert all(torch.equal(one, expected) for one in found)
