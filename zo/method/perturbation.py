"""A perturbation is a function, not a state: z(seed, direction, address).

Training has one operation on weights. On consecutive parameters from a flat address it replays
pending log entries in place and writes the probes beside them, in one pass over memory:

    for each change:  w <- round(decay * w + sum_k coefficient_k * z(direction_k))   (stored dtype)
    for each probe:   out_p = nearest(w + scale_p * z(direction_p))

The sum takes the directions in order, in groups of four (the last may be shorter): for each group
``w <- w + (((c_0 z_0 + c_1 z_1) + c_2 z_2) + c_3 z_3)``, terms with ``c = 0`` left out. The sum of
a group with signs for z has one value for each pattern of signs, which a kernel can tabulate.

``rank-one`` directions are matrices of rank one: z_ij = a_i * b_j with signs a of the rows and b of
the columns. E[z z^T] = I as for independent signs, and m + n bits make m * n of them. Whatever is
not a matrix (vectors, padding) has independent signs.

This file has the equation in plain torch (any device, slow); ``kernels`` has the fast versions with
the same bits. Every floating-point operation is a separate IEEE float32 operation: nothing is
contracted, so devices agree.

Sources: Spall 1992 and Sadegh & Spall 1998 (SPSA, Rademacher); Box & Muller 1958; Malladi et al.
2023 (MeZO).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from zo.method.passes import DISTRIBUTIONS, GROUP
from zo.method.passes import Change as Change
from zo.method.passes import Matrices as Matrices
from zo.method.passes import Pass as Pass
from zo.method.passes import Probe as Probe
from zo.method.philox import MASK, Purpose, words
from zo.method.rounding import round_stochastic, rounding_bits

ALIGNMENT = 128
"""Addresses of parameters, slices and kernels' tiles are multiples of this.

One Philox call makes so many signs.
"""

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# log(1 + t) = t - t^2/2 + t^3 P(t) on [2^-1/2 - 1, 2^1/2 - 1]; sin and cos of a quarter turn
# times t, |t| <= 1/2.
# Minimax fits of our own; tests/test_perturbation.py bounds their error against float64.
LOG_P = (
    0.3333333134651184,
    -0.250008225440979,
    0.20001225173473358,
    -0.16623347997665405,
    0.14201806485652924,
    -0.1316031664609909,
    0.1276128739118576,
    -0.0763377919793129,
)
SIN_P = (1.5707963705062866, -0.6459634900093079, 0.07968022674322128, -0.004602177068591118)
COS_P = (1.0, -1.2336970567703247, 0.2535986304283142, -0.020408352836966515)
LN_2 = 0.6931471824645996
SQRT_HALF_BITS = 0x3F3504F3


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix that starts at the first address: only these will be read of the probes."""

    numbers: Tensor
    """int64 of shape ``[k]``."""
    width: int
    """Elements per row."""


def rademacher(
    seed: int, direction: int, address: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return z = +1 or -1 for ``count`` addresses from ``address``; float32 of shape ``[count]``.

    Address a takes bit ``a % 32`` of word ``a % 128 // 32`` of call ``a // 128``; a set bit is +1.
    """
    return factor_signs_reference(
        seed, (direction,), address, count, Purpose.RADEMACHER, torch.float32, device
    )[0]


def factor_signs_reference(
    seed: int,
    directions: Sequence[int],
    start: int,
    count: int,
    purpose: Purpose,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Compute :func:`zo.method.kernels.factors.factor_signs` in plain torch, on any device."""
    assert all(0 <= direction <= MASK for direction in directions), directions
    first = start // 128
    calls = torch.arange(first, (start + count + 127) // 128, dtype=torch.int64, device=device)
    streams = torch.tensor(directions, dtype=torch.int64, device=device)
    shape = len(directions), len(calls)
    w = words(seed, calls.expand(shape), streams[:, None].expand(shape), purpose)
    bits = (w[..., None] >> torch.arange(32, device=device)) & 1
    signs = (bits * 2 - 1).to(dtype).reshape(len(directions), -1)
    return signs[:, start - 128 * first :][:, :count]


def rank_one(
    seed: int,
    direction: int,
    address: int,
    count: int,
    device: torch.device | str = "cpu",
    matrices: Sequence[Matrices] = (),
) -> Tensor:
    """Return z = a * b on ``matrices``, independent signs elsewhere; float32 ``[count]``.

    Sign a of row r of a parameter (numbered through its matrices) takes the bit of "address"
    ``start + r`` as :func:`rademacher` does, of the stream of ``Purpose.ROW``; b of a column that
    of ``Purpose.COLUMN``. Parameters have no fewer elements than rows or columns, so that two
    share no bits.

    Args:
        seed: the run's seed.
        direction: number of the direction.
        address: flat address of the first element.
        count: number of elements.
        device: of the result.
        matrices: where the matrices are; they may lie outside the range, in part or whole.
    """
    z = rademacher(seed, direction, address, count, device)
    for m in matrices:
        first, stop = max(address, m.start), min(address + count, m.stop)
        if first < stop:
            place = torch.arange(first - m.start, stop - m.start, device=device)
            row = place // m.width
            column = row // m.rows * m.width + place % m.width
            a, b = (
                factor_signs_reference(
                    seed, (direction,), m.start + low, high - low + 1, purpose, z.dtype, device
                )[0][numbers - low]
                for numbers, purpose in ((row, Purpose.ROW), (column, Purpose.COLUMN))
                for low, high in [(int(numbers.min()), int(numbers.max()))]
            )
            z[first - address : stop - address] = a * b
    return z


def gaussian(
    seed: int, direction: int, address: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return standard normal z for ``count`` addresses from ``address``; float32 ``[count]``.

    Address a takes number ``a % 4`` of call ``a // 4``; words (0, 1) and (2, 3) each give a
    Box-Muller pair, cosine first. |z| is at most 6.8.
    """
    first = address // 4
    calls = torch.arange(first, (address + count + 3) // 4, dtype=torch.int64, device=device)
    w = words(seed, calls, direction, Purpose.GAUSSIAN).reshape(-1, 2)
    # torch.sqrt of float32 is not correctly rounded on every CPU; through float64 it is
    # (53 >= 2 * 24 + 2 bits).
    radius = (-2.0 * _log_uniform(w[:, 0])).double().sqrt().float()
    cos, sin = _cos_sin_turns(w[:, 1])
    return torch.stack((radius * cos, radius * sin), dim=-1).reshape(-1)[address - 4 * first :][
        :count
    ]


def _log_uniform(word: Tensor) -> Tensor:
    """Return log((word + 1/2) / 2**32), the quotient in float32; word is int64 in [0, 2**32)."""
    u = word.to(torch.float32) * 2.0**-32 + 2.0**-33
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).view(torch.float32) - 1.0
    p = _horner(LOG_P, t)
    square = t * t
    return exponent.to(torch.float32) * LN_2 + ((p * (square * t) - square * 0.5) + t)


def _cos_sin_turns(word: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of ``word / 2**32`` turns, less an eighth of a turn.

    The top two bits are the quadrant.
    """
    quadrant = word >> 30
    t = (word & 0x3FFFFFFF).to(torch.float32) * 2.0**-30 - 0.5
    square = t * t
    sin, cos = _horner(SIN_P, square) * t, _horner(COS_P, square)
    odd = (quadrant & 1) == 1
    x, y = torch.where(odd, -sin, cos), torch.where(odd, cos, sin)
    return torch.where(quadrant >= 2, -x, x), torch.where(quadrant >= 2, -y, y)


def _horner(coefficients: Sequence[float], t: Tensor) -> Tensor:
    value = torch.full_like(t, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * t + c
    return value


Z: dict[str, Callable[..., Tensor]] = dict(
    zip(DISTRIBUTIONS, (rademacher, gaussian, rank_one), strict=True)
)
"""The distributions of z, by the name that ``estimator.distribution`` takes."""


def replay_and_perturb_reference(
    weights: Tensor,
    address: int,
    work: Pass,
    out: Tensor | None = None,
    rows: Rows | None = None,
    matrices: tuple[Matrices, ...] = (),
) -> None:
    """Compute :func:`zo.method.kernels.replay_and_perturb` in plain torch, on any device.

    The kernels must give the same bits.
    """
    z, seed, count, device = Z[work.distribution], work.seed, weights.numel(), weights.device
    if work.distribution == "rank-one":
        z = partial(rank_one, matrices=matrices)
    for change in work.changes:
        values = weights.to(torch.float32)
        if change.decay != 1.0:
            values = values * change.decay
        terms = list(zip(change.directions, change.coefficients, strict=True))
        for first in range(0, len(terms), GROUP):
            group = [(d, c) for d, c in terms[first : first + GROUP] if c != 0.0]
            if group:
                products = (z(seed, d, address, count, device) * c for d, c in group)
                values = values + reduce(torch.add, products)
        random16 = rounding_bits(seed, change.step, address, count, device)
        weights.copy_(round_stochastic(values, random16, weights.dtype))
    for row, probe in enumerate(work.probes):
        assert out is not None
        values = weights.to(torch.float32)
        if probe.scale != 0.0:
            values = values + z(seed, probe.direction, address, count, device) * probe.scale
        out[row].copy_(values)
