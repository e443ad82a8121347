"""The training loop.

table   = LossTable(probes, columns, cells)      # rows: probes; columns: micro-batches
values  = mesh.gather(forwards of this rank's folds of cells)
scalars = clip(estimator.estimate(table.fill(values)))
log.append(Entry(step, lr, scalars))             # durable; blocks catch up when next visited
"""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo.config.schema import Config
from zo.data.tasks import Batch
from zo.distributed.mesh import fit
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.determinism import explain_nondeterminism, make_deterministic
from zo.io.hardware import choose_device
from zo.io.signals import before_end, set_remedy, termination
from zo.method import estimator
from zo.observe.metrics import finite_or_none
from zo.observe.progress import Progress
from zo.observe.record import Record
from zo.run import rewarded, startup
from zo.run.assemble import assemble, log_header
from zo.run.audit import Audit
from zo.run.evaluate import check_scored, evaluate
from zo.run.objective import Objective
from zo.run.problem import Problem, build_problem, own_problem
from zo.run.rates import Probed, check_store, resolve_rate, save
from zo.run.reference import find_reference
from zo.run.reporter import Reporter
from zo.run.restore import export_model, rebuild, restore_snapshot, save_snapshot
from zo.run.samples import samples
from zo.run.step import Steps
from zo.state.anchor import check_anchor
from zo.state.log import Log
from zo.state.versions import versions


class Trainer:
    """One run, from a configuration or around a user's own model.

    ``Trainer(config).train()`` is what ``zo train`` does. A user's own model, any
    ``nn.Module``, comes with an objective and batches::

        Trainer(
            config,
            model=net,
            objective=lambda net, batch: ...,
            batches=lambda step, column: ...,
        )

    ``objective(model, batch)`` returns a mean loss (a number, or a tensor of one, as
    ``model(**batch).loss``), or a tensor of two numbers, the sum of losses and the number of terms,
    and needs no gradient; ``batches(step, column)`` returns the micro-batch of a step (from 0) and
    a column, a mapping of tensors.
    """

    def __init__(
        self,
        config: Config,
        *,
        model: nn.Module | None = None,
        objective: Objective | None = None,
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
        with self._begun() as (run, asked):
            return run.to_end(asked)

    def find_rate(self) -> tuple[Path, Probed]:
        """Find a learning rate as a run with ``update.lr=auto`` does at start, and do no step.

        Returns:
            The run's folder, where :meth:`train` goes on with this rate, and the trials.

        Raises:
            UserError: a mistake of the user; the folder holds a run already; no rate was found.
        """
        with self._begun() as (run, _):
            if run.probed is None:
                raise UserError(
                    f"run.dir={run.folder.path} holds a run, whose rate is "
                    f"{run.config.update.lr:g}; use a new folder, or leave run.dir out"
                )
            run.reporter.end("stopped")
            run.log.close()
            run.replica.close()
            run.mesh.barrier()
            return run.folder.path, run.probed

    @contextmanager
    def _begun(self) -> Iterator[tuple["Run", threading.Event]]:
        """Yield the run, ready for its next step, and what is set once it is asked to stop."""
        device = choose_device(self.config.run.device)
        make_deterministic(device)
        with ExitStack() as resources, torch.no_grad(), explain_nondeterminism():
            asked = resources.enter_context(termination())
            mesh = Mesh(device.type, self.config.mesh.timeout_s)
            resources.callback(mesh.close)
            yield Run(self.config, mesh, self._own, self._command, resources), asked


class Run(Steps):
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
        check_store(config)
        mesh.arrange(fit(config.mesh, mesh.ranks, config.grid, mesh.local_ranks))
        self.folder = startup.choose_folder(mesh, config)
        self.is_writer = self._lock(resources)
        startup.prepare_process(config)
        record, blocks = Record(), self.folder.blocks(mesh.rank)
        progress = Progress(0, 0, mesh.rank == 0, record.event)
        data = config.data.name or config.task
        with progress.phase(f"reading model {config.model.name} and data {data}"):
            self.problem = own or build_problem(config)
        self._rewards = rewarded.load(self.problem.task)
        check_scored(config, self.problem)
        self.replica, self.structure = assemble(self.problem, config, mesh, blocks, progress.phase)
        for line in self.structure.lines:
            progress.say(line)
        self.structure.check(config.estimator, self.replica.layout)
        check_anchor(config.update.anchor, self.replica.layout, self.replica.base)
        ours = self.problem.reference, self.replica, mesh, progress.phase
        self.find_reference: Callable[..., None] = partial(find_reference, *ours, config)
        self.config, found, self.probed = resolve_rate(self, progress.say)
        self.log = self._open_log(command, found)
        self.find_reference(self.folder.path, self.is_writer)
        if said := startup.extend(mesh, self.folder, self.is_writer, self.config, self.log):
            progress.say(said)
        restore_snapshot(self.folder, self.replica, self.log, progress.warn)
        self.replica.open(self.log)
        self.audit = Audit(self.replica) if config.mesh.check_every else None
        self.reporter = Reporter(self.config, mesh, self.folder, self.log, self.replica, record)
        self.reporter.guard(self.problem.uniform_loss)
        if self.probed is not None and mesh.rank == 0:
            save(self.probed, self.folder.path)

    def _lock(self, resources: ExitStack) -> bool:
        """Check the folder and lock it; return whether this rank writes there."""
        with self.mesh.agreed():
            self.folder.check(self.config)
        is_writer = startup.acquire_run_folder(self.mesh, self.folder, resources)
        resumes = f"the same command with run.dir={self.folder.path} resumes the run"
        set_remedy(f"no completed step is lost: {resumes}")
        return is_writer

    def _open_log(self, command: str, found: dict[str, float]) -> Log:
        """Check that all ranks have the same weights and data, and create or open the log."""
        config, base = self.config, self.replica.store.base
        startup.check_alike(self.mesh, base, self.problem.data_checksum)
        facts: dict[str, Any] = {
            "versions": versions(self.mesh.device),
            "base": {"name": config.model.name, "fingerprint": base},
            "command": command,
        }
        facts |= {"own": True} if self.problem.own else {}
        facts |= {"found": found} if found else {}
        return startup.open_log(
            self.mesh, self.folder, self.is_writer, config, facts, self.header()
        )

    def header(self) -> dict[str, Any]:
        """Return the header of a new log."""
        return log_header(self.config, self.replica, self.problem, self.structure)

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
            while not self._is_done() and not stops:
                self.reporter.begin_step()
                with self.replica.timeline.span("step", f"{self.log.version + 1}"):
                    table, skipped, clipped, stops = self.step(asked.is_set())
                loss = table.loss
                self.reporter.end_step(table, skipped, clipped, self.problem.loss_dtype)
                self._after_step()
                # Several ranks agree on it in a step's collective.
                stops = stops or (self.mesh.ranks == 1 and asked.is_set())
            self.replica.drain()
            self.log.check_in_place()
            if self._is_done():
                self.reporter.say_last()
            else:
                self.reporter.progress.say(
                    f"SIGTERM ended {self.folder.path} after step {self.log.version} of "
                    f"{config.run.steps}; the same command resumes from there"
                )
        finally:
            self.reporter.progress.close()
            self.log.close()
        return loss

    def _is_done(self) -> bool:
        """Return true after the last step, or where ``eval.patience`` has ended the run."""
        return self.log.version >= self.config.run.steps or self.reporter.history.has_ended

    def _after_step(self) -> None:
        """Save a snapshot, audit and evaluate where that is due."""
        step, config = self.log.version, self.config
        if config.run.snapshot_every and step % config.run.snapshot_every == 0:
            save_snapshot(self.folder, self.replica, self.log, self.is_writer)
        if self.audit is not None and step % config.mesh.check_every == 0:
            self.audit.check(self.mesh)
        self._evaluate()

    def _evaluate(self) -> None:
        """Score the current version, on every rank, where that is due and not recorded."""
        problem, step = self.problem, self.log.version
        every, steps = self.config.eval.every, self.config.run.steps
        due = every and (step % every == 0 or step == steps)
        if not due or problem.task is None or not problem.dev_batches:
            return
        found = known = self.reporter.history.at(step)
        if found is None:
            self.reporter.enter("evaluating")
            at_once = len(self._table(1).cells)
            found = evaluate(self.replica, problem.task, problem.dev_batches, self.mesh, at_once)
        self.reporter.evaluated(step, found, is_new=known is None)
        if known is None and (self._is_done() or self.reporter.history.is_first(step)):
            answers = samples(self.replica, problem, found, self.config.memory)
            self.reporter.record_samples(answers)

    def _finish(self, loss: float | None, train_s: float) -> dict[str, Any]:
        """Fingerprint and export the weights of a finished run; return the run's summary."""
        finished, reporter = self._is_done(), self.reporter
        fingerprint = self.replica.fingerprint() if finished else None
        evaluation, best = reporter.evaluation, reporter.history.best()
        summary = {
            "run_dir": str(self.folder.path),
            "steps": self.log.version,
            "loss": finite_or_none(loss),
            "eval": finite_or_none(evaluation.as_json()) if evaluation else None,
            "best": finite_or_none(best._asdict()) if best else None,
            "train_s": round(train_s, 3),
            "fingerprint": fingerprint,
        }
        if fingerprint is not None and self.config.export.at_end and self.problem.exportable:
            reporter.enter("exporting")
            if self.config.export.step == "best" and best and best.step < self.log.version:
                self._go_back(best.step)
                fingerprint = self.replica.fingerprint()
            export_model(self.problem, self.replica, self.mesh, self.folder, fingerprint)
        self.replica.close(give_back=self.problem.own and finished)
        self.mesh.barrier()
        return summary

    def _go_back(self, step: int) -> None:
        """Load the weights of an earlier step in place of the newest."""
        self.replica.close()
        self.audit = None
        del self.replica, self.reporter.replica
        gc.collect()  # There may be no room for both.
        log = Log(self.log.header, self.log.entries[:step])
        self.replica = rebuild(self.problem, self.config, self.mesh, self.folder, log)
        self.reporter.replica = self.replica
