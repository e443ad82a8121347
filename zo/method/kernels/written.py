"""Copies of weights that hold probes; the weights themselves are only read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zo.method import kernels
from zo.method.passes import Matrices, Pass, Probe


def written_probes(
    weights: Tensor,
    address: int,
    seed: int,
    distribution: str,
    probes: Sequence[Probe],
    matrices: tuple[Matrices, ...] = (),
) -> Tensor:
    """Return weights with each probe, ``[len(probes), n]``, rounded to their dtype.

    Args:
        weights: contiguous, shape ``[n]``; float64, which no store has, is for checks.
        address: of the first element.
        seed: the run's.
        distribution: of z.
        probes: the probes.
        matrices: see :func:`zo.method.kernels.replay_and_perturb`.
    """
    is_double = weights.dtype == torch.float64
    stored = torch.zeros_like(weights, dtype=torch.float32) if is_double else weights
    out = stored.new_empty(len(probes), weights.numel())
    work = Pass(seed, distribution, (), tuple(probes))
    kernels.replay_and_perturb(stored, address, work, out, None, matrices)
    return weights + out if is_double else out
