"""Rank-one directions: the equation against outer products, the CPU kernel against the equation."""

import pytest
import torch
from test_perturbation import SEED, bits, weights

from zo.method.estimator import float32
from zo.method.kernels import replay_and_perturb
from zo.method.kernels.cpu_random import PARALLEL_FROM
from zo.method.kernels.factors import factor_signs
from zo.method.perturbation import (
    ALIGNMENT,
    STORED_DTYPES,
    Change,
    Matrices,
    Pass,
    Probe,
    Rows,
    factor_signs_reference,
    rademacher,
    rank_one,
    replay_and_perturb_reference,
)
from zo.method.philox import Purpose

START = 2**33 + 128


def placed(*shapes):
    """Matrices one after the other from ``START`` as a layout places them; elements in all."""
    found, at = [], START
    for *lead, rows, width in shapes:
        numel = torch.Size([*lead, rows, width]).numel()
        found.append(Matrices(at, numel, rows, width))
        at += -(-numel // ALIGNMENT) * ALIGNMENT
    return tuple(found), at - START


SHAPES = {
    "layers": ((96, 64), (64, 96), (32, 64)),
    "odd": ((37, 3), (5, 77), (1, 300), (300, 1), (1, 1)),
    "experts": ((5, 31, 40), (3, 2, 9, 7)),
    "wide": ((3, 5000), (2100, 8)),
}


def change(step, directions, decay=1.0):
    coefficients = [float32(1e-4 * (1 + k % 7) * (-1) ** k) for k in range(directions)]
    return Change(step, tuple(range(9 * step, 9 * step + directions)), tuple(coefficients), decay)


ZEROS = Change(
    3,
    tuple(range(30, 44)),
    (0.0, 2.0**-13, -0.0, -(2.0**-13), 0.0, 0.0, 0.0, -0.0, 1e-3, 1e-3, -1e-3, -1e-3, 0.0, 2.0**-9),
)
"""Zeros among others, a group of zeros, and a group whose sum may be zero."""
CHANGES = {
    "one": (change(1, 1),),
    "three": (change(1, 3, float32(0.9999)),),
    "four": (change(1, 4),),
    "five": (change(1, 5),),
    "sixteen": (change(1, 16, float32(0.999)),),
    "sixty-four": (change(1, 64),),
    "zeros": (ZEROS,),
    "entries": (change(1, 5), change(2, 64), ZEROS, change(4, 2, float32(0.99)), change(5, 7)),
    "none": (),
}
PROBES = (Probe(18, 2.0**-10), Probe(18, -(2.0**-10)), Probe(19, float32(1e-3)), Probe(0, 0.0))


def both(matrices, count, dtype, work, first=0, rows=None):
    """Weights and probes by the kernel and by the equation, from element ``first`` on."""
    results = []
    for function in (replay_and_perturb, replay_and_perturb_reference):
        stored = weights(count, dtype)
        stored[::7], stored[3::111], stored[5::113] = -0.0, float("inf"), -float("inf")
        stored[9::127] = torch.finfo(dtype).max
        part = stored[first:]
        out = torch.zeros(len(work.probes), len(part), dtype=dtype)
        function(part, START + first, work, out, rows, matrices)
        results.append((bits(stored), bits(out)))
    return results


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_z_is_the_outer_product_of_the_signs_of_rows_and_columns(shapes):
    matrices, count = placed(*shapes)
    found = rank_one(SEED, 5, START, count, matrices=matrices)
    expected = rademacher(SEED, 5, START, count)
    for m, shape in zip(matrices, shapes, strict=True):
        a, b = (
            factor_signs_reference(SEED, (5,), m.start, m.numel, purpose, torch.float32)[0]
            for purpose in (Purpose.ROW, Purpose.COLUMN)
        )
        experts = m.numel // (m.rows * m.width)
        a = a[: experts * m.rows].view(*shape[:-2], m.rows, 1)
        b = b[: experts * m.width].view(*shape[:-2], 1, m.width)
        expected[m.start - START :][: m.numel] = (a * b).reshape(-1)
    assert torch.equal(found, expected)
    assert torch.equal(rank_one(SEED, 5, START + 128, 300, matrices=matrices), found[128:428])


def test_the_second_moment_is_the_identity():
    """Then estimates are right on average, as with independent signs."""
    matrices, count = placed((2, 3, 5), (4, 4))
    directions, inside = 4000, [*range(30), *range(128, 144)]
    work = Pass(1, "rank-one", probes=tuple(Probe(k, 1.0) for k in range(directions)))
    z = torch.zeros(directions, count)
    replay_and_perturb(torch.zeros(count), START, work, z, matrices=matrices)
    z = z[:, inside].double()
    moment = z.T @ z / directions
    assert (moment - torch.eye(len(inside))).abs().max() < 5 / directions**0.5


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_cpu_kernel_has_the_bits_of_the_equation(dtype, shapes, changes):
    matrices, count = placed(*shapes)
    found, expected = both(matrices, count, dtype, Pass(SEED, "rank-one", changes, PROBES))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_a_slice_that_begins_in_a_row_has_the_bits_of_the_whole(dtype):
    """A rank replays its slice of a block; its bytes must be those of the block."""
    matrices, count = placed((50, 77), (3, 20, 33), (7, 999))
    work = Pass(SEED, "rank-one", CHANGES["entries"])
    whole, parts = weights(count, dtype), weights(count, dtype)
    replay_and_perturb(whole, START, work, matrices=matrices)
    for first in range(0, count, 1152):
        replay_and_perturb(parts[first : first + 1152], START + first, work, matrices=matrices)
    assert torch.equal(bits(whole), bits(parts))


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_threads_do_not_change_bits(dtype):
    matrices, count = placed((1000, 200), (70, 999))
    work, results = Pass(SEED, "rank-one", CHANGES["entries"], PROBES), []
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            stored, out = weights(count, dtype), torch.zeros(len(PROBES), count, dtype=dtype)
            replay_and_perturb(stored, START, work, out, matrices=matrices)
            results.append((bits(stored), bits(out)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_threads_do_not_change_factors():
    """Rows long and many enough that threads share them."""
    stream = SEED, range(64), START + 77, 5000, Purpose.COLUMN, torch.bfloat16
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = factor_signs(*stream)
    finally:
        torch.set_num_threads(threads)
    assert found.numel() >= PARALLEL_FROM
    assert torch.equal(found, factor_signs_reference(*stream))


def test_parameters_between_matrices_keep_independent_signs():
    """A vector has no rows and columns."""
    (matrix, _, last), count = placed((10, 33), (1, 1000), (9, 9))
    work = Pass(SEED, "rank-one", CHANGES["five"], PROBES)
    found, expected = both((matrix, last), count, torch.bfloat16, work)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    dense, _ = both((), count, torch.bfloat16, Pass(SEED, "rademacher", work.changes, PROBES))
    inside = slice(384, 384 + 1000)
    assert torch.equal(found[0][inside], dense[0][inside])
    assert not torch.equal(found[0][:330], dense[0][:330])


@pytest.mark.parametrize(("width", "first"), [(64, 0), (100, 3200), (100, 128)])
def test_rows_that_will_be_read_are_written_and_changes_apply_to_all(width, first):
    """A lookup reads a few rows of an embedding; the head reads all of them in the same step."""
    matrices, count = placed((60, width))
    numbers = torch.tensor([0, 19, 7, 7, 8])
    work = Pass(SEED, "rank-one", CHANGES["five"], PROBES)
    found, expected = both(matrices, count, torch.bfloat16, work, first, Rows(numbers, width))
    assert torch.equal(found[0], expected[0])
    read = [out[:, : 20 * width].reshape(4, 20, width)[:, numbers] for _, out in (found, expected)]
    assert torch.equal(*read)


@pytest.mark.parametrize("dtype", [*STORED_DTYPES, torch.float64])
@pytest.mark.parametrize(("start", "count"), [(START, 10_000), (START + 77, 1), (3, 5000)])
def test_factors_at_hand_are_those_of_the_equation(dtype, start, count):
    """A corrected output and a written probe must be of the same direction."""
    for purpose in (Purpose.ROW, Purpose.COLUMN):
        arguments = SEED, [7, 2**32 - 1, 0], start, count, purpose, dtype
        found = factor_signs(*arguments, "cpu")
        assert torch.equal(found, factor_signs_reference(*arguments))
        assert found.dtype == dtype
        assert found.is_contiguous()
