"""The loop of a run.

table   = LossTable(probes, columns)                   # rows and columns; which rank computes which cell
values  = mesh.gather(replica.table(this rank's cells))
scalars = estimator.estimate(table.fill(values))
log.append(Entry(step, lr, scalars))                   # durable; blocks catch up when next visited
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo.config.schema import Config, check_threads
from zo.data.tasks import Batch
from zo.distributed.mesh import fit
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.determinism import make_deterministic
from zo.io.hardware import choose_device
from zo.io.signals import go_on_with, termination
from zo.method import estimator
from zo.method.entry import Entry
from zo.method.table import LossTable
from zo.method.update import learning_rate
from zo.observe.metrics import Progress, finite_or_none
from zo.observe.timeline import check_drawable
from zo.run.assemble import assemble, to_device
from zo.run.audit import Audit
from zo.run.evaluate import evaluate
from zo.run.export import write_folder
from zo.run.problem import Problem, build_problem, own_problem
from zo.run.reporter import Reporter
from zo.run.restore import card_of, restore_snapshot
from zo.run.startup import acquire_run_folder, check_alike, open_log
from zo.state.log import Log
from zo.state.run_folder import RunFolder
from zo.state.versions import versions


class Trainer:
    """One run, from a configuration or around a user's own model.

    ``Trainer(config).train()`` is what ``launch/train.py`` does. A model of one's own, any ``nn.Module``, comes with an
    objective and batches::

        Trainer(config, model=net, objective=lambda net, batch: ..., batches=lambda step, column: ...)

    ``objective(model, batch)`` returns a tensor of two numbers, the sum of losses and the number of terms, and needs no
    gradient; ``batches(step, column)`` returns the micro-batch of a step (from 0) and a column, a mapping of tensors.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: nn.Module | None = None,
        objective: Callable[[nn.Module, Batch], Tensor] | None = None,
        batches: Callable[[int, int], Batch] | None = None,
        command: str = "",
    ) -> None:
        """Take a configuration; nothing is read or written before :meth:`train`.

        ``command`` is what reproduces the run, for its model card.

        Raises:
            UserError: a model of one's own without objective or batches, or the other way round.
        """
        own = [part is not None for part in (model, objective, batches)]
        if any(own) and not all(own):
            raise UserError("a model of your own needs model=, objective= and batches= together")
        self.config, self._command = config, command
        self._own = (
            own_problem(model, objective, batches) if model and objective and batches else None
        )

    def train(self) -> dict[str, Any]:
        """Run to ``run.steps``, from the start or from where the run's folder stands.

        SIGTERM ends it after the step that is going on.

        Returns:
            ``run_dir``, ``steps``, ``loss``, ``eval``, ``train_s``, ``fingerprint``; the last is ``None`` where SIGTERM
            ended the run before ``run.steps``.

        Raises:
            UserError: what the user can mend; the run's log stays whole.
            RankError: another rank is gone, or its weights are not what they should be; the log stays whole too.
        """
        device = choose_device(self.config.run.device)
        make_deterministic(device)
        with ExitStack() as resources, torch.no_grad():
            asked = resources.enter_context(termination())
            mesh = Mesh(device.type, self.config.mesh.timeout_s)
            resources.callback(mesh.close)
            return Run(self.config, mesh, self._own, self._command, resources).to_end(asked)


class Run:
    """A run in progress: the loop over steps, and what belongs after some of them."""

    def __init__(
        self, config: Config, mesh: Mesh, own: Problem | None, command: str, resources: ExitStack
    ) -> None:
        """Check everything that can be checked, load the model, and create or open the run's folder.

        Args:
            config: of the run.
            mesh: of all ranks.
            own: a user's own problem.
            command: for the model card.
            resources: takes the lock of the folder, which the caller releases.
        """
        self.config, self.mesh = config, mesh
        settings = config.estimator
        estimator.check_directions(config.run.steps, settings.directions)
        # The table of step 1 has the shape of every step's.
        self._first_table = LossTable(
            estimator.probes(settings.name, 1, settings.directions, settings.eps),
            config.batch.columns,
        )
        mesh.arrange(
            fit(
                config.mesh,
                mesh.ranks,
                self._first_table.rows,
                self._first_table.columns,
                mesh.local_ranks,
            )
        )
        self.folder = RunFolder(Path(mesh.broadcast(config.run.dir or _default_dir(config.recipe))))
        if config.run.dir is None and (
            mesh.nodes > 1 or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        ):
            raise UserError(
                "run.dir is empty, and a restart would begin another run; give the folder to go on in"
            )
        with mesh.agreed():
            self.folder.check(config)
        self.is_writer = acquire_run_folder(mesh, self.folder, resources)
        go_on_with(
            f"no completed step is lost: the same command with run.dir={self.folder.path} goes on"
        )
        if config.run.threads is not None:
            check_threads(config.run.threads, os.cpu_count() or 1)
            torch.set_num_threads(config.run.threads)
        if config.profile.range:
            check_drawable()
        say = Progress(0, 0, mesh.rank == 0).say
        if own is None:
            say(f"reading {config.model.name} and {config.data.name}")
        self.problem = own or build_problem(config)
        self.replica = assemble(self.problem, config, mesh, self.folder.blocks(mesh.rank), say)
        self.log = self._open_log(command)
        restore_snapshot(self.folder, self.replica, self.log, say)
        self.replica.open(self.log)
        self.audit = Audit(self.replica) if config.mesh.check_every else None
        self.reporter = Reporter(config, mesh, self.folder, self.log, self.replica)

    def _open_log(self, command: str) -> Log:
        config, base = self.config, self.replica.store.base
        header = {
            "base": base,
            "data": self.problem.data_checksum,
            "directions": config.estimator.directions,
            "distribution": config.estimator.distribution,
            "rule": config.update.name,
            "seed": config.run.seed,
            "weight_decay": config.update.weight_decay,
        }
        check_alike(self.mesh, base, self.problem.data_checksum)
        facts = {
            "versions": versions(),
            "base": {"name": config.model.name, "fingerprint": base},
            "command": command,
        }
        return open_log(self.mesh, self.folder, self.is_writer, config, facts, header)

    def to_end(self, asked: threading.Event) -> dict[str, Any]:
        """Train, evaluate, export; end after a step once ``asked`` is set, on any rank."""
        config, begun, loss, stops = self.config, time.monotonic(), None, False
        try:
            self.reporter.say_first(self._first_table)
            self._evaluate()
            while self.log.version < config.run.steps and not stops:
                self.reporter.begin_step()
                table, skipped, stops = self.step(asked.is_set())
                losses = table.row_losses()
                loss = sum(losses) / len(losses)
                self.reporter.end_step(loss, skipped, table.tokens)
                self._after_step()
                # Ranks agree on it in a step's collective; alone there is nobody to ask.
                stops = stops or (self.mesh.ranks == 1 and asked.is_set())
            self.replica.drain()
            self.log.check_in_place()
            if self.log.version < config.run.steps:
                self.reporter.progress.say(
                    f"SIGTERM ended {self.folder.path} after step {self.log.version} of {config.run.steps}; the same "
                    "command goes on from there"
                )
        finally:
            self.reporter.close()
            self.log.close()
        return self._finish(loss, time.monotonic() - begun)

    def step(self, asked: bool = False) -> tuple[LossTable, int, bool]:
        """Fill one table, read scalars off it, and make their entry durable; replay moves the weights at next visits.

        Returns:
            The filled table, how many directions had no finite estimate, and whether a rank was ``asked`` to end.
        """
        settings, number, shape = self.config.estimator, self.log.version + 1, self.mesh.shape
        probes = estimator.probes(settings.name, number, settings.directions, settings.eps)
        table = LossTable(probes, self.config.batch.columns)
        cells = table.cells(self.mesh.rank, shape.perturb, shape.data)
        results = self.replica.table(
            table.probes, [row for row, _ in cells], self._forwards(number, cells)
        )
        owners = table.owners(shape.perturb, shape.data)
        values, stops = self.mesh.gather(results, owners, width=3, flag=asked)
        table = table.fill(values)
        scalars, skipped = estimator.estimate(settings.name, table, settings.eps)
        u = self.config.update
        lr = learning_rate(number, self.config.run.steps, u.lr, u.schedule, u.warmup_steps)
        self.log.append(Entry(number, number * self.config.batch.sequences, lr, scalars))
        return table, skipped, stops

    def _forwards(self, step: int, cells: Sequence[tuple[int, int]]) -> list[Callable[[], Tensor]]:
        """The forward of each cell."""
        columns = sorted({column for _, column in cells})
        batches = {
            column: to_device(self.problem.batches(step - 1, column), self.mesh)
            for column in columns
        }
        return [partial(self._forward, batches[column]) for _, column in cells]

    def _forward(self, batch: Batch) -> Tensor:
        """Sum of losses, number of terms, number of tokens; float64 of shape ``[3]``."""
        result = self.problem.objective(self.replica.model, batch).to(torch.float64)
        mask = batch.get("attention_mask", batch.get("input_ids"))
        tokens = (
            0
            if mask is None
            else (mask.sum() if mask is batch.get("attention_mask") else mask.numel())
        )
        # Filled by a kernel: a number that is copied to a GPU would be waited for.
        count = tokens if isinstance(tokens, Tensor) else result.new_full((1,), tokens)
        return torch.cat((result.view(2), count.to(result.device, torch.float64).view(1)))

    def _after_step(self) -> None:
        step, every, often = (
            self.log.version,
            self.config.run.snapshot_every,
            self.config.mesh.check_every,
        )
        # The blocks of a durable store are snapshots already.
        sliced = self.mesh.slices is not None
        if (
            every
            and step % every == 0
            and not self.replica.store.is_durable
            and (self.is_writer or sliced)
        ):
            if self.is_writer:
                self.folder.save_snapshot(step, self.replica, self.replica.store.base, self.log)
            else:
                self.replica.fingerprint()
        if self.audit is not None and step % often == 0:
            self.audit.check(self.mesh)
        self._evaluate()

    def _evaluate(self) -> None:
        """Score the current version, on every rank, where that is due and not recorded."""
        problem, step = self.problem, self.log.version
        every, steps = self.config.eval.every, self.config.run.steps
        due = every and (step % every == 0 or step == steps)
        if not due or problem.task is None or not problem.dev_batches:
            return
        scores = known = self.reporter.known_scores(step)
        if scores is None:
            at_once = self._first_table.rows * self._first_table.columns
            scores = evaluate(self.replica, problem.task, problem.dev_batches, self.mesh, at_once)
        self.reporter.evaluated(step, scores, is_new=known is None)

    def _finish(self, loss: float | None, train_s: float) -> dict[str, Any]:
        finished = self.log.version >= self.config.run.steps
        fingerprint = self.replica.fingerprint() if finished else None
        summary = {
            "run_dir": str(self.folder.path),
            "steps": self.log.version,
            "loss": finite_or_none(loss),
            "eval": self.reporter.scores or None,
            "train_s": round(train_s, 3),
            "fingerprint": fingerprint,
        }
        if fingerprint is not None and self.config.export.at_end and self.problem.exportable:
            self._export(fingerprint)
        self.replica.close(give_back=self.problem.own and finished)
        self.mesh.barrier()
        return summary

    def _export(self, fingerprint: str) -> None:
        if self.mesh.rank:
            if self.mesh.slices is not None:
                self.replica.pass_over()
            return
        content = self.folder.read_config()
        card = card_of(
            content, self.log.header, self.log.version, self.reporter.scores, fingerprint
        )
        model, tokenizer = self.replica.model, self.problem.tokenizer
        write_folder(model, tokenizer, self.folder.model, card, source=self.replica, replace=True)


def _default_dir(recipe: str) -> str:
    return f"runs/{recipe or 'run'}-{datetime.now():%Y%m%d-%H%M%S-%f}"
