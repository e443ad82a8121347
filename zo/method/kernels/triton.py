"""Replay and perturb on a GPU: one Triton launch per segment, the bits of ``perturbation``.

A program loads a tile of weights, applies every pending entry in registers, stores it, and writes
the probes beside.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from zo.method import perturbation as p
from zo.method.kernels.triton_common import (
    GROUP_SIZE,
    KINDS,
    OPTIONS,
    TILE,
    VECTOR,
    draw_z,
    load_wide,
    numbers_of,
    round_stochastic,
    store_nearest,
    stored_as,
    table_of,
)
from zo.method.kernels.triton_rank_one import replay_and_perturb_rank_one


# Nothing that changes within a run may choose a variant of the kernel: each takes seconds to
# compile. Pointers keep Triton's rule (aligned to 16 bytes or not): a layout fixes where segments
# lie in their memory.
@triton.jit(do_not_specialize=["units", "address", "num_changes", "num_directions", "num_probes"])
def _replay_and_perturb(  # type: ignore[no-untyped-def]
    stored, units: tl.int64, address: tl.int64, table, num_changes: tl.int32,
    num_directions: tl.int32, num_probes: tl.int32, out, unit: tl.constexpr, kind: tl.constexpr,
    gaussian: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Replay and perturb one tile.

    ``table`` holds seed lo, hi; for each change step, decay, (direction, coefficient)s; then the
    probes' (direction, scale)s.
    """
    count = units * unit  # The product tells the compiler that whole vectors are inside or outside.
    first = tl.program_id(0).to(tl.int64) * tile
    place = first + tl.arange(0, tile).to(tl.int64)
    inside, here = place < count, address + first
    seed_lo, seed_hi = tl.load(table), tl.load(table + 1)
    x = load_wide(stored, place, inside, kind)
    at = table + 2
    for _ in range(num_changes):
        x = x * tl.load(at + 1).to(tl.float32, bitcast=True)
        for group in range(0, num_directions, GROUP_SIZE):
            total = tl.full((tile,), -0.0, tl.float32)  # what adds to nothing, zeros of any sign
            for k in range(group, tl.minimum(group + GROUP_SIZE, num_directions)):
                coefficient = tl.load(at + 3 + 2 * k).to(tl.float32, bitcast=True)
                if coefficient != 0.0:
                    z = draw_z(seed_lo, seed_hi, here, tl.load(at + 2 + 2 * k), gaussian, tile)
                    total = total + z * coefficient
            x = x + total
        if kind != 0:
            x = round_stochastic(x, kind, seed_lo, seed_hi, here, tl.load(at), tile)
        at += 2 + 2 * num_directions
    if num_changes > 0:
        store_nearest(stored, place, inside, x, kind)
    z = tl.zeros((tile,), tl.float32)
    for row in range(num_probes):
        direction = tl.load(at + 2 * row)
        # The two signs of a direction are neighbours and share its z.
        if row == 0 or direction != tl.load(at + 2 * row - 2):
            z = draw_z(seed_lo, seed_hi, here, direction, gaussian, tile)
        scale = tl.load(at + 2 * row + 1).to(tl.float32, bitcast=True)
        # Scale 0 must leave infinities alone: 0 * z is 0, and x + 0 is x but for the sign of -0.
        y = tl.where(scale != 0.0, x + z * scale, x)
        store_nearest(out, place, inside, y, kind)
        out += count


def arguments(
    weights: Tensor, address: int, work: p.Pass, table: Tensor, out: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the kernel's positional arguments, and its constants with the compiler's options.

    The constants depend on the segment's size, its dtype and the distribution, so that a run's
    first step compiles all the variants that it will ever need.
    """
    count, kind = weights.numel(), KINDS[weights.dtype]
    unit = VECTOR if count % VECTOR == 0 else 1
    stored, written = stored_as(weights), stored_as(weights if out is None else out)
    sizes = (len(work.changes), numbers_of(work)[1], len(work.probes))
    constants = {
        "unit": unit,
        "kind": kind,
        "gaussian": work.distribution == "gaussian",
        "tile": TILE,
    }
    return (stored, count // unit, address, table, *sizes, written), constants | OPTIONS


def replay_and_perturb_triton(
    weights: Tensor,
    address: int,
    work: p.Pass,
    out: Tensor | None = None,
    rows: p.Rows | None = None,
    matrices: tuple[p.Matrices, ...] = (),
) -> None:
    """Compute :func:`zo.method.kernels.replay_and_perturb` on a GPU.

    The host does not wait for the device. All of ``out`` is written, whatever ``rows``.
    """
    if work.distribution == "rank-one":
        replay_and_perturb_rank_one(weights, address, work, out, matrices)
        return
    count = weights.numel()
    assert out is None or out.stride(0) == count
    stream = driver.active.get_current_stream(weights.device.index) if weights.is_cuda else 0
    positional, named = arguments(
        weights, address, work, table_of(work, weights.device, stream), out
    )
    _replay_and_perturb[(triton.cdiv(count, TILE),)](*positional, **named)
