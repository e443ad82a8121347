"""The loop of a run, and the wiring under it.

probes  = the rows of the table;  cells = the forwards of it that this rank owns, run in lockstep
losses  = the table of all ranks, gathered
scalars = the estimator's reading of it
log.append(Entry(step, lr, scalars))        # durable; blocks catch up when next visited
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo import audit, estimator
from zo.blocks import find_layout
from zo.config import Config, UserError
from zo.evaluate import evaluate
from zo.export import write_folder
from zo.finished import card_of, restore
from zo.folder import RunFolder, versions
from zo.hardware import choose_device
from zo.log import Entry, Log
from zo.mesh import Mesh, fit, owners
from zo.metrics import MetricsFile, Progress, finite_or_none, memory
from zo.preemption import go_on_with, termination
from zo.problem import Problem, build_problem, own_problem
from zo.replica import Replica, Traffic, Weights
from zo.roll_call import check_alike, keep, open_log
from zo.selfcheck import move_resident, self_check
from zo.store import return_freed_memory, return_memory_at_once
from zo.tasks import Batch
from zo.timeline import check_drawable
from zo.update import learning_rate

FIRST_ORDER_LR = 1e-5
"""Full fine-tuning by Gaussian directions diverges from about here; MeZO's authors use 1e-7 to 1e-6."""


@dataclass(frozen=True)
class Outcome:
    """What one step gave."""

    loss: float
    scalars: tuple[float, ...]
    skipped: int
    """Directions that were not finite and count as zero."""
    tokens: int
    stops: bool
    """Whether a rank was asked to end."""


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
        self._own = own_problem(model, objective, batches) if model and objective and batches else None

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
        device = choose_device(self.config.run.device).type
        with ExitStack() as held, torch.no_grad():
            asked = held.enter_context(termination())
            mesh = Mesh(device, self.config.mesh.timeout_s)
            held.callback(mesh.close)
            return Run(self.config, mesh, self._own, self._command, asked, held).to_end()


class Run:
    """A run in progress."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        own: Problem | None,
        command: str,
        asked: threading.Event,
        held: ExitStack,
    ) -> None:
        """Check everything that can be checked, load the model, and open or begin the run's folder.

        Args:
            config: of the run.
            mesh: of all ranks.
            own: a user's own problem.
            command: for the model card.
            asked: set when the run is to end after a step.
            held: takes in the lock of the folder, which the caller lets go of.
        """
        self.config, self.mesh, self.command, self._asked = config, mesh, command, asked
        scales = estimator.ESTIMATORS[config.estimator.name].scales(config.estimator.directions)
        self.rows, self.columns = len(scales), config.batch.columns
        mesh.arrange(fit(config.mesh, mesh.ranks, self.rows, self.columns, mesh.local_ranks))
        self.folder = RunFolder(Path(mesh.broadcast(config.run.dir or _default_dir(config.recipe))))
        if config.run.dir is None and (mesh.nodes > 1 or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))):
            raise UserError("run.dir is empty, and a restart would begin another run; give the folder to go on in")
        with mesh.agreed():
            self.folder.check(config)
        self.keeps = keep(mesh, self.folder, held)
        go_on_with(f"no completed step is lost: the same command with run.dir={self.folder.path} goes on")
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)

        if config.profile.range:
            check_drawable()
        if config.memory.store != "device":
            return_memory_at_once()
        say = Progress(0, 0, mesh.rank == 0).say
        if own is None:
            say(f"reading {config.model.name} and {config.data.name}")
        self.problem = own or build_problem(config)
        say("checking that forwards block by block give the same bits as plain ones")
        layout = find_layout(self.problem.skeleton, config.memory.unit, self._self_check())
        self.model = self.problem.build()
        blocks = self.folder.blocks(mesh.rank)
        say(f"loading weights ({sum(b.size_bytes for b in layout.blocks) / 2**30:.2f} GiB)")
        with mesh.agreed():
            self.weights = Weights(
                self.model, layout, self.problem.base, config.memory, mesh.device, blocks, slices=mesh.slices
            )
        move_resident(self.model, mesh.device)
        self.log = self._open_log()
        self.replica = Replica(self.weights, self.log)
        self.scores: dict[str, float] = {}
        self.skipped_in_a_row = 0

    def _self_check(self) -> frozenset[str]:
        """Lockstep against plain forwards on the micro-batches of the first step, two at most."""
        problem, device, config = self.problem, self.mesh.device, self.config
        batches = [_to(problem.batches(0, column), device) for column in range(min(2, self.columns))]
        forwards = [lambda model, batch=b: problem.objective(model, batch) for b in batches]
        models = [problem.narrow, problem.skeleton] if problem.narrow is not None else [problem.skeleton]
        return self_check(models, forwards, device, config.estimator.distribution, config.memory.unit)

    def _header(self) -> dict[str, Any]:
        c = self.config
        return {
            "base": self.weights.store.base,
            "data": self.problem.data_checksum,
            "directions": c.estimator.directions,
            "distribution": c.estimator.distribution,
            "rule": c.update.name,
            "seed": c.run.seed,
            "weight_decay": c.update.weight_decay,
        }

    def _open_log(self) -> Log:
        header, store = self._header(), self.weights.store
        check_alike(self.mesh, header["base"], header["data"])
        facts = {
            "versions": versions(),
            "base": {"name": self.config.model.name, "fingerprint": store.base},
            "command": self.command,
        }
        return open_log(self.mesh, self.folder, self.keeps, self.config, facts, header)

    def _resume(self, progress: Progress) -> None:
        """Start from the newest snapshot, if there is one, and say where the run goes on."""
        restore(self.folder, self.weights, self.log)
        if self.log.cut_bytes:
            progress.say(f"cut {self.log.cut_bytes} bytes of an unfinished entry from the log")
        if self.log.version:
            progress.say(f"resuming {self.folder.path} after step {self.log.version} of {self.config.run.steps}")

    def to_end(self) -> dict[str, Any]:
        """Train, evaluate, export."""
        config, begun = self.config, time.monotonic()
        progress = Progress(config.run.steps, self.log.version, self.mesh.rank == 0)
        progress.say(self._summary())
        if config.estimator.distribution == "gaussian" and config.update.lr >= FIRST_ORDER_LR:
            progress.say(
                f"update.lr={config.update.lr} looks like a rate for gradients; full fine-tuning by Gaussian "
                "directions usually diverges there: MeZO's authors use 1e-7 to 1e-6 for all parameters, 1e-4 for LoRA"
            )
        self._resume(progress)
        metrics = MetricsFile(self.folder.metrics_file, self.log.version) if self.mesh.rank == 0 else None
        loss, stops = None, False
        try:
            self._evaluate(self.log.version, metrics, progress)
            while self.log.version < config.run.steps and not stops:
                self.replica.timeline.active = self.log.version + 1 in config.profile.range
                started, before, sent = time.monotonic(), self.replica.traffic(), self.mesh.scalar_bytes
                outcome = self.step()
                values = self._record(outcome, time.monotonic() - started, before, sent)
                if metrics:
                    metrics.write(values)
                progress.step(values, self.scores)
                self._watch(outcome, progress)
                self._after_step(metrics, progress)
                # Ranks agree on it in a step's collective; alone there is nobody to ask.
                loss, stops = outcome.loss, outcome.stops or (self.mesh.ranks == 1 and self._asked.is_set())
            self.replica.settle()
            if self.log.version < config.run.steps:
                progress.say(
                    f"SIGTERM ended {self.folder.path} after step {self.log.version} of {config.run.steps}; the same "
                    "command goes on from there"
                )
        finally:
            progress.close()
            if metrics:
                metrics.close()
            self.log.close()
        return self._finish(loss, time.monotonic() - begun)

    def step(self) -> Outcome:
        """Fill one table, read it, and make its entry durable."""
        config, number = self.config, self.log.version + 1
        settings = config.estimator
        probes = estimator.probes(settings.name, number, settings.directions, settings.eps)
        of_cells = owners(self.mesh.shape, self.rows, self.columns)
        mine = [divmod(i, self.columns) for i, owner in enumerate(of_cells) if owner == self.mesh.rank]
        batches = {c: _to(self.problem.batches(number - 1, c), self.mesh.device) for c in sorted({c for _, c in mine})}
        cells = [lambda batch=batches[c]: self._cell(batch) for _, c in mine]
        results = self.replica.table(probes, [row for row, _ in mine], cells)
        table, stops = self.mesh.gather(results, of_cells, width=3, flag=self._asked.is_set())
        table = table.view(self.rows, self.columns, 3)
        losses = estimator.row_losses(table)
        scalars, skipped = estimator.estimate(settings.name, losses, settings.eps)
        u = config.update
        lr = learning_rate(number, config.run.steps, u.lr, u.schedule, u.warmup_steps)
        self.log.append(Entry(number, number * config.batch.sequences, lr, scalars))
        return Outcome(sum(losses) / len(losses), scalars, skipped, int(table[0, :, 2].sum()), stops)

    def _cell(self, batch: Batch) -> Tensor:
        """One forward: sum of losses, number of terms, number of tokens."""
        result = self.problem.objective(self.model, batch).to(torch.float64)
        mask = batch.get("attention_mask", batch.get("input_ids"))
        tokens = 0 if mask is None else (mask.sum() if mask is batch.get("attention_mask") else mask.numel())
        return torch.cat((result.view(2), torch.as_tensor(tokens, device=result.device).to(torch.float64).view(1)))

    def _record(self, outcome: Outcome, step_s: float, before: Traffic, sent: int) -> dict[str, Any]:
        entry, now = self.log.entries[-1], self.replica.traffic()
        values = {
            "step": entry.step,
            "loss": outcome.loss,
            "scalars": list(outcome.scalars),
            "lr": entry.lr,
            "step_s": round(step_s, 6),
            "tokens": outcome.tokens,
            "tokens_per_s": round(outcome.tokens / step_s, 3),
            "read_bytes": now.read_bytes - before.read_bytes,
            "written_bytes": now.written_bytes - before.written_bytes,
            "gathered_bytes": now.gathered_bytes - before.gathered_bytes,
            "scalar_bytes": self.mesh.scalar_bytes - sent,
            "wait_share": round((now.wait_s - before.wait_s) / step_s, 4),
            **memory(self.mesh.device),
        }
        return values | ({"skipped": outcome.skipped} if outcome.skipped else {})

    def _watch(self, outcome: Outcome, progress: Progress) -> None:
        """Report steps that moved nothing, and stop a run that goes nowhere."""
        step, directions = self.log.version, len(outcome.scalars)
        if outcome.skipped:
            progress.say(
                f"step {step}: {outcome.skipped} of {directions} directions had no finite loss and count as zero"
            )
        elif not any(outcome.scalars):
            progress.say(
                f"step {step}: every projected gradient is exactly zero: the loss does not feel the perturbation; "
                "raise estimator.eps, or store the weights in float32"
            )
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if outcome.skipped == directions else 0
        if self.skipped_in_a_row >= self.config.run.max_skipped:
            raise UserError(
                f"no finite loss in {self.skipped_in_a_row} steps in a row (run.max_skipped), the last is step {step}: "
                "the run has diverged or overflows; begin anew with a smaller update.lr, or model.dtype=float32 or "
                "bfloat16 in place of float16"
            )

    def _after_step(self, metrics: MetricsFile | None, progress: Progress) -> None:
        step, every, store = self.log.version, self.config.run.snapshot_every, self.config.memory.store
        if store != "device":
            return_freed_memory()
        # The blocks that a disk store holds are snapshots already.
        if every and step % every == 0 and store != "disk" and (self.keeps or self.replica.sliced):
            fingerprint = self.replica.fingerprint()
            if self.keeps:
                self.folder.save_snapshot(step, self.replica, self.weights.store.base, fingerprint)
            else:
                self.replica.pass_over()
        often = self.config.mesh.check_every
        if often and step % often == 0:
            audit.check(self.weights, self.replica, self.mesh, step // often)
        for name in self.replica.damaged():
            progress.say(f"block {name} was damaged on disk; it was made anew from the base and the log")
        if step in self.config.profile.range[-1:]:
            self.replica.timeline.active = False
            self._draw_timeline()
        self._evaluate(step, metrics, progress)

    def _evaluate(self, step: int, metrics: MetricsFile | None, progress: Progress) -> None:
        """Scores at the current version, on every rank, where one is due and not on record."""
        problem, every, steps = self.problem, self.config.eval.every, self.config.run.steps
        due = every and (step % every == 0 or step == steps)
        if not due or problem.task is None or not problem.dev_batches:
            return
        known = self.mesh.broadcast(metrics.scores.get(step) if metrics else None)
        if known is None:
            at_once = self.rows * self.columns
            self.scores = evaluate(self.model, self.replica, problem.task, problem.dev_batches, self.mesh, at_once)
            if metrics:
                metrics.write({"step": step, "eval": self.scores})
        else:
            self.scores = known
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self.scores.items())
        progress.say(f"step {step}/{steps}  dev {shown}")

    def _finish(self, loss: float | None, train_s: float) -> dict[str, Any]:
        finished = self.log.version >= self.config.run.steps
        fingerprint = self.replica.fingerprint() if finished else None
        summary = {
            "run_dir": str(self.folder.path),
            "steps": self.log.version,
            "loss": finite_or_none(loss),
            "eval": self.scores or None,
            "train_s": round(train_s, 3),
            "fingerprint": fingerprint,
        }
        exports = fingerprint is not None and self.config.export.at_end and self.problem.exportable
        if exports and self.replica.sliced and self.mesh.rank:
            self.replica.pass_over()
        elif fingerprint and exports and self.mesh.rank == 0:
            content = self.folder.read_config()
            card = card_of(content, self.log.header, self.log.version, self.scores, fingerprint)
            write_folder(self.model, self.problem.tokenizer, self.folder.model, card, source=self.replica, replace=True)
        self.replica.close(give_back=self.problem.own and finished)
        self.mesh.barrier()
        return summary

    def _summary(self) -> str:
        layout, shape, memory = self.replica.layout, self.mesh.shape, self.config.memory
        return (
            f"{self.config.recipe or 'run'} in {self.folder.path}: {layout.numel / 1e6:.1f} M parameters in "
            f"{len(layout.blocks)} blocks, {self.config.model.dtype} on {self.mesh.device}, store {memory.store}, "
            f"table {self.rows} x {self.columns} on mesh {shape.perturb} x {shape.data} x {shape.slice}"
        )

    def _draw_timeline(self) -> None:
        """The trace and the picture of the profiled steps."""
        if self.mesh.rank == 0:
            memory, steps = self.config.memory, self.config.profile.steps
            what = f"store {memory.store}, unit {memory.unit}, {memory.slots} slots, lag {memory.lag}"
            title = f"{self.config.model.name or 'own model'}, steps {steps}: {what}"
            self.replica.timeline.save(self.folder.path / "timeline.json", self.folder.path / "timeline.png", title)


def _default_dir(recipe: str) -> str:
    return f"runs/{recipe or 'run'}-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _to(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
