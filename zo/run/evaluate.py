"""Scores on held-out batches, shared among all ranks, by plain forwards at the newest version."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from zo.config.schema import Config
from zo.data.scores import evaluation
from zo.data.tasks import Batch, Task
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.determinism import explain_nondeterminism
from zo.observe.history import Evaluation
from zo.run.problem import Problem
from zo.run.rewarded import measure_held_out
from zo.streaming.replica import Replica


def check_scored(config: Config, problem: Problem) -> None:
    """Check that a run whose end depends on its scores has some.

    Raises:
        UserError: it has none.
    """
    task, metric = problem.task, config.eval.metric
    uses = {
        f"eval.patience={config.eval.patience}": config.eval.patience is not None,
        f"eval.metric={metric}": metric is not None,
        f"export.step={config.export.step}": config.export.step == "best" and config.export.at_end,
    }
    asked = [setting for setting, is_set in uses.items() if is_set]
    if not asked:
        return
    if problem.own or task is None:
        raise UserError(f"{asked[0]} needs a task of zo's, not a model of your own")
    if not config.eval.every:
        raise UserError(f"{asked[0]} needs evaluations; set eval.every")
    if not problem.dev_batches:
        raise UserError(f"{asked[0]} needs held-out examples; set data.dev or data.dev_examples")
    known = [*task.summarize([0.0, 1.0, 0.0]), *(["macro_f1"] if task.names else [])]
    if metric is not None and metric not in known:
        raise UserError(
            f"eval.metric={metric} is not a score of this data; use {' or '.join(known)}"
        )


@torch.no_grad()
@explain_nondeterminism()
def evaluate(
    replica: Replica, task: Task, batches: Sequence[Batch], mesh: Mesh, at_once: int
) -> Evaluation:
    """Return the scores of a model, with the same bits on every rank and any mesh.

    Args:
        replica: the model.
        task: how a batch is scored.
        batches: on CPU; rank r of R computes batches r, r + R, r + 2 R, ...
        mesh: of the run.
        at_once: batches that one pass over the model serves.
    """
    if task.rewards is not None:
        owners = [i % mesh.ranks for i in range(len(batches))]
        mine = batches[mesh.rank :: mesh.ranks]
        sums, _ = mesh.gather(measure_held_out(replica, task.rewards, mine, mesh), owners, width=3)
        return Evaluation(task.summarize([sum(column) for column in sums.T.tolist()]))
    labels = [] if task.examine is None else [batch["labels"] for batch in batches]
    rows = max(map(len, labels), default=1)
    width = task.width if task.examine is None else 3 * rows
    table = gather_terms(
        lambda batch: _examine(replica.model, task, batch, rows),
        replica,
        batches,
        mesh,
        at_once,
        width,
    )
    if task.examine is None:
        # Summed in the order of the batches, so that the scores have the same bits on any mesh.
        return Evaluation(task.summarize([sum(column) for column in table.T.tolist()]))
    parts = [one.view(rows, 3)[: len(own)] for one, own in zip(table, labels, strict=True)]
    classes = torch.cat(labels).tolist() if labels[0].dim() == 1 else None
    return evaluation(task, torch.cat(parts), classes)


def _examine(model: nn.Module, task: Task, batch: Batch, rows: int) -> Tensor:
    """Return the examples of a batch, padded to so many rows, or else their sums, as one row."""
    if task.examine is None:
        return task.terms(model, batch)
    table = task.examine(model, batch)
    return pad(table, (0, 0, 0, rows - len(table))).flatten()


def gather_terms(
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
