"""The cells of a table whose losses are of rewards, and the scores of held-out prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zo.config.schema import Config
from zo.data.rewards import Rewards
from zo.data.tasks import Batch, Task
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.method.table import LossTable
from zo.streaming.replica import Replica
from zo.streaming.streamer import UNPERTURBED


def load(task: Task | None, untrusted: str = "") -> Rewards | None:
    """Return what rewards a task's completions, if it is rewarded, with its function imported.

    Args:
        task: of the run.
        untrusted: whose code is not to be run, such as ``run=DIR``; zo's own rewards are.

    Raises:
        UserError: as :meth:`zo.data.rewards.Reward.load`, or the code is not trusted.
    """
    if task is None or task.rewards is None:
        return None
    reward = task.rewards.reward
    if untrusted and not reward.is_ours:
        raise UserError(
            f"{untrusted} is rewarded by code of {reward.name}, which is not run by default; read "
            "it, then set trust_remote_code=true"
        )
    reward.load()
    return task.rewards


def width(rewards: Rewards | None, config: Config) -> int:
    """Return how many numbers a cell of a run's table has."""
    return 4 if rewards is None else 4 + 2 * config.batch.micro


def measure_cells(
    replica: Replica,
    rewards: Rewards,
    table: LossTable,
    numbers: Sequence[int],
    batches: dict[int, Batch],
    step: int,
) -> list[Tensor]:
    """Return the values of some cells of a step's table, as :class:`LossTable` has them.

    Args:
        replica: the model.
        rewards: of its completions.
        table: of the step.
        numbers: of the cells, fold after fold.
        batches: by column.
        step: from 1. The noise of a sample is a function of it and of the prompt's place in the
            step, so that all probes of a prompt have the same.
    """
    columns = [table.cells[number][1] for number in numbers]
    sampled = rewards.decoding.temperature > 0.0

    def compute(cells: Sequence[int]) -> list[Tensor]:
        some = [batches[columns[cell]] for cell in cells]
        sequences = [
            ((step - 1) * table.columns + columns[cell]) * len(batch["labels"])
            + torch.arange(len(batch["labels"]), device=batch["labels"].device)
            for cell, batch in zip(cells, some, strict=True)
        ]
        return rewards.measure(replica.model, some, sequences if sampled else None)

    by_fold: dict[int, list[int]] = {}
    for cell, number in enumerate(numbers):
        by_fold.setdefault(number // table.fold, []).append(cell)
    rows = [table.cells[number][0] for number in numbers]
    return replica.whole(table.probes, rows, list(by_fold.values()), table.part, compute)


def measure_held_out(
    replica: Replica, rewards: Rewards, batches: Sequence[Batch], mesh: Mesh
) -> list[Tensor]:
    """Return sum of losses, number of prompts, and a zero, of each batch, greedily answered."""

    def compute(cells: Sequence[int]) -> list[Tensor]:
        (cell,) = cells
        batch = {key: value.to(mesh.device) for key, value in batches[cell].items()}
        (values,) = rewards.measure(replica.model, [batch])
        return [torch.cat((values[:2], values.new_zeros(1)))]

    alone = [[cell] for cell in range(len(batches))]
    return replica.whole([UNPERTURBED], [0] * len(batches), alone, 0, compute)
