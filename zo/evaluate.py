"""Scores on held-out batches, shared among all ranks, by plain forwards of the weights as they stand."""

from collections.abc import Sequence

import torch
from torch import nn

from zo.mesh import Mesh
from zo.tasks import Batch, Task


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, batches: Sequence[Batch], mesh: Mesh) -> dict[str, float]:
    """Scores of a model, the same on every rank and any mesh.

    Args:
        model: its weights must be at one version.
        task: how a batch is scored.
        batches: on CPU; rank r of R computes every R-th.
        mesh: of the run.
    """
    owners = [i % mesh.ranks for i in range(len(batches))]
    mine = [batch for batch, owner in zip(batches, owners, strict=True) if owner == mesh.rank]
    terms = [task.terms(model, {k: v.to(mesh.device) for k, v in batch.items()}) for batch in mine]
    table = mesh.gather(terms, owners, width=3)
    # Summed in the order of the batches, so that the scores have the same bits on any mesh.
    return task.summarize([sum(column) for column in table.T.tolist()])
