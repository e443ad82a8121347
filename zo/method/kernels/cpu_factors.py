"""Signs of rows and columns on CPU, many directions at once: compiled by numba."""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from zo.method.kernels.cpu_random import PARALLEL_FROM, TILE, fill_words, jit, u32, u64
from zo.method.philox import Purpose

BITS = {torch.float64: torch.uint64, torch.float32: torch.uint32}
"""Unsigned type of a dtype's bits; uint16 for the others."""


@jit
def _fill(seed, direction, purpose, first_call, before, bits_a_word, plus, minus, signs):  # type: ignore[no-untyped-def]
    """Fill ``signs`` with ``plus`` or ``minus``, from bit ``before`` of a call."""
    words, line = np.empty((4, TILE // 128), np.uint32), np.empty(TILE, signs.dtype)
    at, call = -before, first_call
    while at < len(signs):
        calls = min(TILE, len(signs) - at + 127) // 128
        fill_words(seed, call, direction, purpose, calls, words)
        for i in range(calls):
            for j in range(4):
                word, here = words[j, i], line[128 * i + 32 * j : 128 * i + 32 * j + 32]
                for b in range(bits_a_word):
                    here[b] = plus if (word >> u32(b)) & u32(1) != u32(0) else minus
        first, stop = max(at, 0), min(at + 128 * calls, len(signs))
        signs[first:stop] = line[first - at : stop - at]
        at, call = at + 128 * calls, call + u64(calls)


@jit
def _fill_all(directions, signs, seed, purpose, first_call, before, bits_a_word, ones):  # type: ignore[no-untyped-def]
    """Fill a row of ``signs`` for each direction; ``ones`` holds the bits of +1 and -1."""
    for k in range(len(directions)):
        stream = seed, directions[k], purpose, first_call, before, bits_a_word
        _fill(*stream, ones[0], ones[1], signs[k])


@numba.njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def _fill_all_in_parts(directions, signs, *stream):  # type: ignore[no-untyped-def]
    """See :func:`_fill_all`; the directions are shared out to the threads."""
    for k in numba.prange(len(directions)):
        _fill_all(directions[k : k + 1], signs[k : k + 1], *stream)


def factor_signs_cpu(
    seed: int,
    directions: Sequence[int],
    start: int,
    count: int,
    purpose: Purpose,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Compute :func:`zo.method.kernels.factors.factor_signs` on as many threads as torch."""
    signs = torch.empty(len(directions), count, dtype=dtype)
    bits = BITS.get(dtype, torch.uint16)
    # An array: a tuple does not pass into a parallel loop.
    ones = torch.tensor([1.0, -1.0], dtype=dtype).view(bits).numpy()
    stream = u64(seed), u64(purpose), u64(start // 128), start % 128, 32, ones
    arguments = np.array(directions, np.uint64), signs.view(bits).numpy(), *stream
    threads = torch.get_num_threads() if signs.numel() >= PARALLEL_FROM else 1
    if threads == 1:
        _fill_all(*arguments)
    else:
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        _fill_all_in_parts(*arguments)
    return signs
