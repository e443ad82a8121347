"""Random bits as a function of an address: Philox4x32-10, the plain-torch reference.

A call maps (key, counter) to four 32-bit words by ten rounds of multiply, exchange and xor. There
is no state, so any process makes any part of the stream in any order:

    words(seed, call, direction, purpose)
        = Philox4x32-10(key=seed, counter=(call_lo, call_hi, direction, purpose))

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import enum

import torch
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MASK = 0xFFFFFFFF


class Purpose(enum.IntEnum):
    """Use of a stream; the last word of the counter, so that two uses never share bits."""

    RADEMACHER = 0
    GAUSSIAN = 1
    ROUNDING = 2
    SHUFFLE = 3
    TOKENS = 4
    ROW = 5
    COLUMN = 6
    PART = 7
    BUCKET = 8
    SAMPLE = 9
    SPLIT = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Compute ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape, each value in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        int64 tensor of shape ``[*counter.shape, 4]``, each value in [0, 2**32).
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64, which keeps every bit; the mask undoes the sign of the
        # arithmetic shift.
        p0, p1 = x0 * MULTIPLIER_0, x2 * MULTIPLIER_1
        x0, x1, x2, x3 = (
            ((p1 >> 32) & MASK) ^ x1 ^ k0,
            p1 & MASK,
            ((p0 >> 32) & MASK) ^ x3 ^ k1,
            p0 & MASK,
        )
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return torch.stack((x0, x1, x2, x3), dim=-1)


def words(seed: int, calls: Tensor, direction: int | Tensor, purpose: Purpose) -> Tensor:
    """Return the four words of each numbered call of one stream.

    Args:
        seed: the run's seed, in [0, 2**64).
        calls: int64 tensor of call numbers, each >= 0.
        direction: number of the stream of this purpose, in [0, 2**32), or one for each call: an
            int64 tensor of the shape of ``calls``.
        purpose: use of the stream.

    Returns:
        int64 tensor of shape ``[*calls.shape, 4]``, each value in [0, 2**32).
    """
    assert 0 <= seed < 1 << 64, seed
    if not isinstance(direction, Tensor):
        assert 0 <= direction <= MASK, direction
        direction = torch.full_like(calls, direction)
    counter = (calls & MASK, calls >> 32, direction, torch.full_like(calls, int(purpose)))
    return philox4x32(counter, (seed & MASK, seed >> 32))


def word_stream(seed: int, start: int, count: int, direction: int, purpose: Purpose) -> Tensor:
    """Return words ``start .. start + count`` of one stream, four per call; int64 ``[count]``."""
    first = start // 4
    calls = torch.arange(first, (start + count + 3) // 4, dtype=torch.int64)
    return words(seed, calls, direction, purpose).reshape(-1)[start - 4 * first :][:count]
