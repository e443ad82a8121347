"""Scores on held-out batches, shared among all ranks, by plain forwards at the newest version."""

from collections.abc import Sequence

import torch

from zo.data.tasks import Batch, Task
from zo.distributed.process_group import Mesh
from zo.io.determinism import explain_nondeterminism
from zo.run.rewarded import measure_held_out
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
    owners = [i % mesh.ranks for i in range(len(batches))]
    mine = batches[mesh.rank :: mesh.ranks]
    if task.rewards is not None:
        found = measure_held_out(replica, task.rewards, mine, mesh)
        table, _ = mesh.gather(found, owners, width=3)
        return task.summarize([sum(column) for column in table.T.tolist()])
    cells = [
        lambda batch=b: task.terms(replica.model, {k: v.to(mesh.device) for k, v in batch.items()})
        for b in mine
    ]
    # Ranks that share slices pass over the model together, as often as the rank with the most
    # batches, rank 0, has to.
    most = -(-len(batches) // mesh.ranks)
    passes = -(-most // at_once)
    table, _ = mesh.gather(replica.plain(cells, at_once, passes), owners, width=3)
    # Summed in the order of the batches, so that the scores have the same bits on any mesh.
    return task.summarize([sum(column) for column in table.T.tolist()])
