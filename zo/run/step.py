"""One step of a run: fill a loss table, and log the scalars of it; replay moves the weights.

table   = LossTable(probes, columns, cells)      # rows: probes; columns: micro-batches
values  = mesh.gather(forwards of this rank's folds of cells)
scalars = clip(estimator.estimate(table.fill(values)))
log.append(Entry(step, lr, scalars))
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from zo.config.schema import Config
from zo.data.rewards import Rewards
from zo.data.tasks import Batch
from zo.distributed.process_group import Mesh
from zo.method import estimator
from zo.method.entry import Entry
from zo.method.table import LossTable
from zo.method.update import clip, learning_rate
from zo.model.folds import ALONE, Together
from zo.run import rewarded
from zo.run.assemble import Structure, to_device
from zo.run.problem import Problem
from zo.state.log import Log
from zo.streaming.replica import Replica


class Steps:
    """What a step is made of: of a run in progress, or of one whose entries are recomputed."""

    config: Config
    mesh: Mesh
    problem: Problem
    replica: Replica
    """It follows ``log``."""
    structure: Structure
    log: Log
    _rewards: Rewards | None

    def step(self, asked: bool = False) -> tuple[LossTable, int, int, bool]:
        """Fill one table, and log its scalars; replay moves the weights at their next visits.

        Returns:
            The filled table, how many directions had no finite estimate, how many projected
            gradients were limited, and whether any rank was ``asked`` to stop.
        """
        config, step, axes = self.config, self.log.version + 1, self.mesh.shape
        table = self._table(step)
        folds = table.folds(self.mesh.rank, axes.perturb, axes.data)
        results = self._forwards(step, table, [cell for fold in folds for cell in fold])
        owners, width = table.owners(axes.perturb, axes.data), rewarded.width(self._rewards, config)
        values, stops = self.mesh.gather(results, owners, width, flag=asked)
        table, how = table.fill(values), config.estimator
        raw, skipped = estimator.estimate(how.name, table, how.eps, how.shape, how.shape_per)
        limit = config.update.clip
        scalars = raw if limit is None else clip(raw, self.log.entries, limit)
        position = step * config.batch.sequences
        self.log.append(Entry(step, position, self._lr(step), scalars, table.part))
        clipped = sum(before != after for before, after in zip(raw, scalars, strict=True))
        return table, skipped, clipped, stops

    def _table(self, step: int) -> LossTable:
        """Return the empty table of a step, from 1."""
        config, settings = self.config, self.config.estimator
        table = estimator.empty_table(
            settings.name, step, config.directions, settings.eps, config.grid
        )
        return replace(table, part=self._part(step))

    def _part(self, step: int) -> int:
        """Return the position of the first block that a step's directions reach."""
        return self.structure.fork(self.config.estimator.part, step, self.config.run.seed)

    def _lr(self, step: int) -> float:
        """Return the learning rate of a step, from 1."""
        u = self.config.update
        return learning_rate(step, self._horizon(step), u.lr, u.schedule, u.warmup_steps)

    def _horizon(self, step: int) -> int:
        """Return the steps of the schedule that a step belongs to."""
        return self.config.run.steps

    def _forwards(self, step: int, table: LossTable, numbers: Sequence[int]) -> Sequence[Tensor]:
        """Return the result of each cell, given by its number, as :meth:`_forward` has it."""
        cells = [table.cells[number] for number in numbers]
        batches = {
            column: to_device(self.problem.batches(step - 1, column), self.mesh)
            for column in sorted({column for _, column in cells})
        }
        if (rewards := self._rewards) is not None:
            return rewarded.measure_cells(self.replica, rewards, table, numbers, batches, step)
        forwards = [partial(self._forward, batches[column]) for _, column in cells]
        rows, together = [row for row, _ in cells], ALONE
        if self.structure.meet or table.part:
            folds = [number // table.fold for number in numbers]
            together = Together([column for _, column in cells], folds, table.part)
        return self.replica.table(table.probes, rows, forwards, together)

    def _forward(self, batch: Batch) -> Tensor:
        """Return sum of losses, number of terms, of tokens, and that with padding; float64."""
        result = self.problem.objective(self.replica.model, batch).to(torch.float64)
        mask, ids = batch.get("attention_mask"), batch.get("input_ids")
        # Filled by a kernel: copying a number to a GPU would wait for the device.
        padded = result.new_zeros(1)
        if (shaped := mask if ids is None else ids) is not None:
            padded.fill_(shaped.numel())
        tokens = padded if mask is None else mask.sum().to(padded).view(1)
        return torch.cat((result.view(2), tokens, padded))
