"""The equation, and the CPU kernel against it, bit for bit."""

import math
import os

import pytest
import torch

from zo.method.estimator import float32
from zo.method.kernels import replay_and_perturb
from zo.method.kernels.cpu_random import forget_stale_kernels
from zo.method.perturbation import (
    STORED_DTYPES,
    Change,
    Pass,
    Probe,
    Rows,
    Z,
    _cos_sin_turns,
    _log_uniform,
    gaussian,
    rademacher,
    replay_and_perturb_reference,
)
from zo.method.rounding import round_stochastic, rounding_bits

EPS, SEED = float32(1e-3), 2**63 + 12345
CHANGES = (
    Change(7, (14, 15), (float32(1.25e-4), float32(-3.3e-5)), float32(0.9999)),
    Change(8, (16, 17), (float32(2e-6), 0.0)),
    Change(9, (20, 21, 22, 23, 24, 25), (2.0**-9, -0.0, -(2.0**-9), 0.0, 0.0, float32(3e-5))),
)
PROBES = (Probe(18, EPS), Probe(18, -EPS), Probe(19, EPS), Probe(0, 0.0))


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def weights(count, dtype):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02
    if count > 1000:
        values[:1000] *= 1e-4  # subnormal in float16
        special_values = torch.tensor([7e4, -7e4, math.inf, -math.inf, 65519.0, 0.0])
        values[1000:1006] = special_values[: len(values[1000:1006])]
    return values.to(dtype)


@pytest.mark.parametrize("z", Z.values())
def test_a_slice_of_z_is_z_of_the_slice(z):
    whole = z(SEED, 3, 0, 4096)
    assert torch.equal(z(SEED, 3, 700, 1000), whole[700:1700])


def test_rademacher_is_plus_or_minus_one_in_equal_parts():
    z = rademacher(1, 2, 0, 1 << 20)
    assert set(z.tolist()) == {1.0, -1.0}
    assert abs(z.mean()) < 4 / 1024  # four standard deviations of the mean


def test_gaussian_has_the_moments_of_a_standard_normal():
    z = gaussian(1, 2, 0, 1 << 20).double()
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((z**power).mean() - moment) < 4 * deviation / 1024
    assert abs(z.view(-1, 2).prod(1).mean()) < 4 / 724  # the two of a Box-Muller pair


def test_polynomials_are_as_good_as_float32_allows():
    word = torch.cat([torch.tensor([0, 1, 2**31, 2**32 - 1]), torch.randint(0, 2**32, (1 << 18,))])
    u = (word.to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    assert ((_log_uniform(word) - u.log()).abs() <= 2e-7 * u.log().abs() + 1e-9).all()
    turns = (
        2 * math.pi * ((word & 0x3FFFFFFF).float().double() * 2.0**-32 + (word >> 30) / 4 - 1 / 8)
    )
    cos, sin = _cos_sin_turns(word)
    assert (cos - turns.cos()).abs().max() < 2e-7
    assert (sin - turns.sin()).abs().max() < 2e-7


@pytest.mark.parametrize("distribution", Z)
@pytest.mark.parametrize("dtype", STORED_DTYPES)
@pytest.mark.parametrize(("count", "address"), [(200_001, 128_000), (5_000, 2**39 + 128), (1, 0)])
def test_cpu_kernel_has_the_bits_of_the_equation(distribution, dtype, count, address):
    expected, found = weights(count, dtype), weights(count, dtype)
    expected_out, found_out = torch.zeros(4, count, dtype=dtype), torch.zeros(4, count, dtype=dtype)
    replay_and_perturb_reference(
        expected, address, Pass(SEED, distribution, CHANGES, PROBES), expected_out
    )
    replay_and_perturb(found, address, Pass(SEED, distribution, CHANGES, PROBES), found_out)
    assert torch.equal(bits(found), bits(expected))
    assert torch.equal(bits(found_out), bits(expected_out))


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_threads_and_slices_do_not_change_bits(dtype):
    count = 400_000
    whole, parts = weights(count, dtype), weights(count, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        replay_and_perturb(whole, 0, Pass(SEED, "gaussian", CHANGES))
        torch.set_num_threads(1)
        for start in range(0, count, 128 * 999):
            replay_and_perturb(
                parts[start : start + 128 * 999], start, Pass(SEED, "gaussian", CHANGES)
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(bits(whole), bits(parts))


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_entries_in_one_pass_have_the_bits_of_entries_one_by_one(dtype):
    together, apart = weights(10_000, dtype), weights(10_000, dtype)
    replay_and_perturb(together, 0, Pass(SEED, "rademacher", CHANGES))
    for change in CHANGES:
        replay_and_perturb(apart, 0, Pass(SEED, "rademacher", (change,)))
    assert torch.equal(bits(together), bits(apart))


@pytest.mark.parametrize("width", [768, 100, 5000])
def test_rows_that_will_be_read_are_written_and_changes_apply_to_all(width):
    """A lookup reads a few rows of an embedding; the head reads all of them in the same step."""
    count, numbers = 60 * width, torch.tensor([0, 7, 8, 31, 59])
    whole, part = weights(count, torch.bfloat16), weights(count, torch.bfloat16)
    whole_out, part_out = (torch.zeros(4, count, dtype=torch.bfloat16) for _ in range(2))
    replay_and_perturb(whole, 1280, Pass(SEED, "rademacher", CHANGES, PROBES), whole_out)
    replay_and_perturb(
        part, 1280, Pass(SEED, "rademacher", CHANGES, PROBES), part_out, Rows(numbers, width)
    )
    assert torch.equal(bits(whole), bits(part))
    expected, found = (bits(out).view(4, 60, width)[:, numbers] for out in (whole_out, part_out))
    assert torch.equal(expected, found)


def test_probes_leave_the_stored_weights_alone():
    stored, out = weights(10_000, torch.bfloat16), torch.empty(4, 10_000, dtype=torch.bfloat16)
    replay_and_perturb(stored, 0, Pass(SEED, "rademacher", probes=PROBES), out)
    assert torch.equal(bits(stored), bits(weights(10_000, torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0001, -0.0213, 3.1e-6])
def test_stochastic_rounding_is_right_on_average(dtype, value):
    """Nearest rounding loses every step below half the spacing: bf16 training would stand still."""
    count = 1 << 18
    values = torch.full((count,), value)
    rounded = round_stochastic(values, rounding_bits(1, 1, 0, count), dtype).double()
    spacing = rounded.max() - rounded.min()
    assert 0 < spacing <= abs(value) * 2**-6 + 2.0**-24
    assert abs(rounded.mean() - values.double().mean()) < 4 * spacing / 2 / count**0.5


def test_small_steps_on_bf16_weights_are_realised():
    count, steps, step = 1 << 16, 50, float32(1e-6)
    stored = torch.full((count,), 0.02).to(torch.bfloat16)
    before = stored.double().mean()
    for number in range(steps):
        z = rademacher(5, number, 0, count)
        replay_and_perturb(
            stored, 0, Pass(5, "rademacher", (Change(number + 1, (number,), (step,)),))
        )
    wanted = sum(rademacher(5, n, 0, count).double() for n in range(steps)) * step
    moved = stored.double() - before
    realised = (moved * wanted).sum() / (wanted * wanted).sum()
    assert 0.9 < realised < 1.1, z


def test_compiled_kernels_older_than_a_source_are_forgotten(tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    source, old, new = folder / "random.py", folder / "a.nbi", folder / "b.nbi"
    for path in (old, source, new):
        path.touch()
    os.utime(old, (1, 1))
    os.utime(source, (2, 2))
    os.utime(new, (3, 3))
    forget_stale_kernels(tmp_path)
    assert sorted(folder.iterdir()) == [new, source]
