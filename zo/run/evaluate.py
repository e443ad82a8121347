"""Scores on held-out batches, shared among all ranks, by plain forwards at the newest version."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo.data.tasks import Batch, Task
from zo.distributed.process_group import Mesh
from zo.io.determinism import explain_nondeterminism
from zo.streaming.replica import Replica


@torch.no_grad()
@explain_nondeterminism()
def evaluate(
    replica: Replica, task: Task, batches: Sequence[Batch], mesh: Mesh, at_once: int
) -> dict[str, float]:
    """Return the scores of a model, with the same bits on every rank and any mesh.

    Args:
        replica: the model.
        task: how a batch is scored.
        batches: on CPU; rank r of R computes batches r, r + R, r + 2 R, ...
        mesh: of the run.
        at_once: batches that one pass over the model serves.
    """
    table = of_batches(
        lambda batch: task.terms(replica.model, batch), replica, batches, mesh, at_once, task.width
    )
    # Summed in the order of the batches, so that the scores have the same bits on any mesh.
    return task.summarize([sum(column) for column in table.T.tolist()])


def of_batches(
    terms: Callable[[Batch], Tensor],
    replica: Replica,
    batches: Sequence[Batch],
    mesh: Mesh,
    at_once: int,
    width: int,
) -> Tensor:
    """Return the terms of batches, float64 of shape ``[len(batches), width]``, on every rank.

    Args:
        terms: of one batch by a plain forward, float64 of shape ``[width]``.
        replica: see :func:`evaluate`.
        batches: see :func:`evaluate`.
        mesh: see :func:`evaluate`.
        at_once: see :func:`evaluate`.
        width: numbers per batch.
    """
    owners = [i % mesh.ranks for i in range(len(batches))]
    mine = batches[mesh.rank :: mesh.ranks]
    cells = [lambda batch=b: terms({k: v.to(mesh.device) for k, v in batch.items()}) for b in mine]
    # Ranks that share slices pass over the model together, as often as the rank with the most
    # batches, rank 0, has to.
    most = -(-len(batches) // mesh.ranks)
    passes = -(-most // at_once)
    return mesh.gather(replica.plain(cells, at_once, passes), owners, width)[0]
