"""The training loop.

table   = LossTable(probes, columns, cells)      # rows: probes; columns: micro-batches
values  = mesh.gather(forwards of this rank's folds of cells)
scalars = clip(estimator.estimate(table.fill(values)))
log.append(Entry(step, lr, scalars))             # durable; blocks catch up when next visited
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo.config.checks import check_threads
from zo.config.schema import Config
from zo.data.tasks import Batch
from zo.distributed.mesh import fit
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.determinism import explain_nondeterminism, make_deterministic
from zo.io.hardware import choose_device
from zo.io.signals import before_end, set_remedy, termination
from zo.method import estimator
from zo.method.entry import Entry
from zo.method.table import LossTable
from zo.method.update import clip, learning_rate
from zo.model.folds import ALONE, Together
from zo.observe.metrics import finite_or_none
from zo.observe.progress import Progress
from zo.observe.record import Record
from zo.observe.timeline import check_drawable
from zo.observe.trackers import check_trackers
from zo.run import rewarded
from zo.run.assemble import assemble, to_device, trained_header
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

    ``Trainer(config).train()`` is what ``launch/train.py`` does. A user's own model, any
    ``nn.Module``, comes with an objective and batches::

        Trainer(
            config,
            model=net,
            objective=lambda net, batch: ...,
            batches=lambda step, column: ...,
        )

    ``objective(model, batch)`` returns a tensor of two numbers, the sum of losses and the number of
    terms, and needs no gradient; ``batches(step, column)`` returns the micro-batch of a step
    (from 0) and a column, a mapping of tensors.
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

        ``command`` reproduces the run; it is printed on its model card.

        Raises:
            UserError: a user's own model without objective or batches, or the other way round.
        """
        own = [part is not None for part in (model, objective, batches)]
        if any(own) and not all(own):
            raise UserError("a model of your own needs model=, objective= and batches= together")
        if any(own) and config.peft.type is not None:
            raise UserError(
                f"peft.type={config.peft.type} adds adapters to a model of the hub or a folder; "
                "add them to a model of your own by peft.inject_adapter_in_model"
            )
        self.config, self._command = config, command
        self._own = (
            own_problem(model, objective, batches, config.model.train)
            if model and objective and batches
            else None
        )

    def train(self) -> dict[str, Any]:
        """Run to ``run.steps``, from the start or from the last step in the run's folder.

        SIGTERM stops the run after the current step.

        Returns:
            ``run_dir``, ``steps``, ``loss``, ``eval``, ``train_s``, ``fingerprint``; the last is
            ``None`` if SIGTERM stopped the run before ``run.steps``.

        Raises:
            UserError: a mistake of the user; the run's log stays intact.
            RankError: another rank has failed, or its weights are wrong; the log stays intact.
        """
        device = choose_device(self.config.run.device)
        make_deterministic(device)
        with ExitStack() as resources, torch.no_grad(), explain_nondeterminism():
            asked = resources.enter_context(termination())
            mesh = Mesh(device.type, self.config.mesh.timeout_s)
            resources.callback(mesh.close)
            return Run(self.config, mesh, self._own, self._command, resources).to_end(asked)


class Run:
    """A run in progress: the loop over steps, and what follows some of them."""

    def __init__(
        self, config: Config, mesh: Mesh, own: Problem | None, command: str, resources: ExitStack
    ) -> None:
        """Check everything that can be checked, load the model, and create or open the folder.

        Args:
            config: of the run.
            mesh: of all ranks; its axes are not sized yet.
            own: a user's own problem.
            command: for the model card.
            resources: takes the lock of the folder, which the caller releases.
        """
        self.config, self.mesh = config, mesh
        estimator.check_directions(config.run.steps, config.directions)
        self._arrange_mesh()
        self.folder = self._choose_folder()
        self.is_writer = self._lock(resources)
        self._prepare_process()
        record, blocks = Record(), self.folder.blocks(mesh.rank)
        progress = Progress(0, 0, mesh.rank == 0, record.event)
        with progress.phase(f"reading model {config.model.name} and data {config.data.name}"):
            self.problem = own or build_problem(config)
        self._rewards = self.problem.task.rewards if self.problem.task else None
        if self._rewards is not None:
            self._rewards.reward.load()
        self.replica, self.structure = assemble(self.problem, config, mesh, blocks, progress.phase)
        self.structure.check(config.estimator, self.replica.layout)
        self.log = self._open_log(command)
        restore_snapshot(self.folder, self.replica, self.log, progress.warn)
        self.replica.open(self.log)
        self.audit = Audit(self.replica) if config.mesh.check_every else None
        self.reporter = Reporter(config, mesh, self.folder, self.log, self.replica, record)

    def _arrange_mesh(self) -> None:
        """Size the axes of the mesh to the table, which has the same shape in every step."""
        mesh, config = self.mesh, self.config
        mesh.arrange(fit(config.mesh, mesh.ranks, config.grid, mesh.local_ranks))

    def _choose_folder(self) -> RunFolder:
        """Return the run's folder, the same on every rank.

        Raises:
            UserError: ``run.dir`` is empty and the ranks may be restarted.
        """
        chosen, mesh = self.config.run.dir, self.mesh
        folder = RunFolder(Path(mesh.broadcast(chosen or _default_dir(self.config.recipe))))
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        if chosen is None and (mesh.nodes > 1 or restarts):
            raise UserError(
                "run.dir is empty, and a restart would begin another run; set run.dir to a folder"
            )
        return folder

    def _lock(self, resources: ExitStack) -> bool:
        """Check the folder and lock it; return whether this rank writes there."""
        with self.mesh.agreed():
            self.folder.check(self.config)
        is_writer = acquire_run_folder(self.mesh, self.folder, resources)
        resumes = f"the same command with run.dir={self.folder.path} resumes the run"
        set_remedy(f"no completed step is lost: {resumes}")
        return is_writer

    def _prepare_process(self) -> None:
        """Set the number of threads, and check that what is to be drawn and tracked can be."""
        if (threads := self.config.run.threads) is not None:
            check_threads(threads, os.cpu_count() or 1)
            torch.set_num_threads(threads)
        if self.config.profile.range:
            check_drawable()
        check_trackers(self.config.run.trackers)

    def _open_log(self, command: str) -> Log:
        """Check that all ranks have the same weights and data, and create or open the log."""
        config, base = self.config, self.replica.store.base
        header = {
            "base": base,
            "data": self.problem.data_checksum,
            "directions": config.directions,
            "distribution": config.estimator.distribution,
            "rule": config.update.name,
            "seed": config.run.seed,
            "weight_decay": config.update.weight_decay,
            **self.structure.header(),
            **trained_header(config),
        }
        check_alike(self.mesh, base, self.problem.data_checksum)
        facts = {
            "versions": versions(self.mesh.device),
            "base": {"name": config.model.name, "fingerprint": base},
            "command": command,
        }
        return open_log(self.mesh, self.folder, self.is_writer, config, facts, header)

    def to_end(self, asked: threading.Event) -> dict[str, Any]:
        """Train, evaluate, export; stop after a step once ``asked`` is set, on any rank."""
        begun, reporter = time.monotonic(), self.reporter
        try:
            with before_end(partial(reporter.enter, "stopped")):
                loss = self._loop(asked)
                summary = self._finish(loss, time.monotonic() - begun)
        except BaseException as error:
            reporter.fail(error)
            raise
        reporter.end("finished" if summary["fingerprint"] else "stopped", summary=summary)
        return summary

    def _loop(self, asked: threading.Event) -> float | None:
        """Train to the last step, or until ``asked`` is set; return the last step's loss."""
        config, loss, stops = self.config, None, False
        try:
            self.reporter.say_first(self._table(1), self.problem.report)
            self._evaluate()
            while self.log.version < config.run.steps and not stops:
                self.reporter.begin_step()
                with self.replica.timeline.span("step", f"{self.log.version + 1}"):
                    table, skipped, clipped, stops = self.step(asked.is_set())
                loss = table.loss
                self.reporter.end_step(table, skipped, clipped)
                self._after_step()
                # Several ranks agree on it in a step's collective.
                stops = stops or (self.mesh.ranks == 1 and asked.is_set())
            self.replica.drain()
            self.log.check_in_place()
            if self.log.version < config.run.steps:
                self.reporter.progress.say(
                    f"SIGTERM ended {self.folder.path} after step {self.log.version} of "
                    f"{config.run.steps}; the same command resumes from there"
                )
        finally:
            self.reporter.progress.close()
            self.log.close()
        return loss

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
        owners = table.owners(axes.perturb, axes.data)
        width = 4 if self._rewards is None else rewarded.width(config.batch.micro)
        values, stops = self.mesh.gather(results, owners, width, flag=asked)
        table, settings = table.fill(values), config.estimator
        raw, skipped = estimator.estimate(
            settings.name, table, settings.eps, settings.shape, settings.shape_per
        )
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
        return learning_rate(step, self.config.run.steps, u.lr, u.schedule, u.warmup_steps)

    def _forwards(self, step: int, table: LossTable, numbers: Sequence[int]) -> Sequence[Tensor]:
        """Return the result of each cell, given by its number, as :meth:`_forward` has it."""
        cells = [table.cells[number] for number in numbers]
        batches = {
            column: to_device(self.problem.batches(step - 1, column), self.mesh)
            for column in sorted({column for _, column in cells})
        }
        if self._rewards is not None:
            return rewarded.measure_cells(
                self.replica, self._rewards, table, numbers, batches, step - 1
            )
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

    def _after_step(self) -> None:
        """Save a snapshot, audit and evaluate where that is due."""
        step, config = self.log.version, self.config
        if config.run.snapshot_every and step % config.run.snapshot_every == 0:
            self._save_snapshot()
        if self.audit is not None and step % config.mesh.check_every == 0:
            self.audit.check(self.mesh)
        self._evaluate()

    def _save_snapshot(self) -> None:
        """Write the weights, unless the store is durable: its blocks are snapshots already."""
        if self.replica.store.is_durable:
            return
        if self.is_writer:
            self.folder.save_snapshot(
                self.log.version, self.replica, self.replica.store.base, self.log
            )
        elif self.mesh.slices is not None:
            self.replica.fingerprint()  # The writer's pass gathers this rank's slices.

    def _evaluate(self) -> None:
        """Score the current version, on every rank, where that is due and not recorded."""
        problem, step = self.problem, self.log.version
        every, steps = self.config.eval.every, self.config.run.steps
        due = every and (step % every == 0 or step == steps)
        if not due or problem.task is None or not problem.dev_batches:
            return
        scores = known = self.reporter.known_scores(step)
        if scores is None:
            self.reporter.enter("evaluating")
            at_once = len(self._table(1).cells)
            scores = evaluate(self.replica, problem.task, problem.dev_batches, self.mesh, at_once)
        self.reporter.evaluated(step, scores, is_new=known is None)

    def _finish(self, loss: float | None, train_s: float) -> dict[str, Any]:
        """Fingerprint and export the weights of a finished run; return the run's summary."""
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
            self.reporter.enter("exporting")
            self._export(fingerprint)
        self.replica.close(give_back=self.problem.own and finished)
        self.mesh.barrier()
        return summary

    def _export(self, fingerprint: str) -> None:
        """Write ``model/`` on rank 0; the ranks that share its slices pass over them with it."""
        if self.mesh.rank:
            if self.mesh.slices is not None:
                self.replica.pass_over()
            return
        content, scores = self.folder.read_config(), self.reporter.scores
        card = card_of(content, self.log.header, self.log.version, scores, fingerprint)
        model, tokenizer = self.replica.model, self.problem.tokenizer
        write_folder(model, tokenizer, self.folder.model, card, source=self.replica, replace=True)


def _default_dir(recipe: str) -> str:
    return f"runs/{recipe or 'run'}-{datetime.now():%Y%m%d-%H%M%S-%f}"
