"""Reports of a run in progress: metrics, record, page, trackers, progress, warnings, timeline."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from zo.config.invocation import typed
from zo.config.redact import without_secrets_in
from zo.config.schema import AUTO, Config
from zo.data.report import DataReport
from zo.distributed.mesh import Shape, idle_report
from zo.distributed.process_group import Mesh
from zo.errors import RankError, UserError
from zo.method import estimator
from zo.method.shaping import Agreement
from zo.method.table import LossTable
from zo.observe.divergence import WINDOW, Divergence
from zo.observe.history import Evaluation, History
from zo.observe.metrics import MetricsFile, memory
from zo.observe.progress import Progress, scores_text
from zo.observe.record import ENDS, Record
from zo.observe.report import Report
from zo.observe.trackers import Trackers
from zo.run.memory import memory_of
from zo.run.samples import Sample
from zo.state.log import Log
from zo.state.run_folder import RunFolder, flatten
from zo.streaming.cache import Traffic
from zo.streaming.replica import Replica

FIRST_ORDER_LR = 1e-5
"""Full fine-tuning by Gaussian directions diverges from about here; MeZO uses 1e-7 to 1e-6."""

LEAST_SPREAD = 8
"""Times the rounding of a loss that the two of a pair should be apart."""


def idle_of(config: Config, shape: Shape) -> str | None:
    """Return the warning of :func:`zo.distributed.mesh.idle_report` for a configuration."""
    settings, batch, grid = config.estimator, config.batch, config.grid
    count = config.directions if settings.cover == "full" else settings.probes
    rows_of = estimator.rows_of(settings.name)
    return idle_report(
        shape, rows_of, count, batch.sequences, batch.micro, grid.fold, settings.cover
    )


class Reporter:
    """The reports of one run; rank 0 writes files and prints, other ranks only count."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        folder: RunFolder,
        log: Log,
        replica: Replica,
        record: Record,
    ) -> None:
        """Open the files after the last step of the log; ``record`` has what was said before."""
        self.config, self.mesh, self.folder, self.log, self.replica = (
            config,
            mesh,
            folder,
            log,
            replica,
        )
        self.evaluation: Evaluation | None = None
        """The newest one."""
        self._first_scores: dict[str, float] = {}
        """The run's first ones, if they are older."""
        self.record = record
        self.progress = Progress(config.run.steps, log.version, mesh.rank == 0, record.event)
        self.metrics: MetricsFile | None = None
        self.history = History(config.eval.metric, config.eval.patience)
        if mesh.rank == 0:
            self._open()
        self._share_evaluations()
        self._skipped_in_a_row, self._said_rounding, self._said_signal = 0, False, False
        self._remedy = "raise estimator.eps"
        self._divergence: Divergence | None = None
        self._said_divergence = False
        self._started, self._before, self._sent = 0.0, Traffic(), 0

    def _open(self) -> None:
        """Open the files of rank 0."""
        folder, warn = self.folder, self.progress.warn
        self.record.open(folder.path, self.log.version)
        self.metrics = MetricsFile(folder.metrics_file, self.log.version, warn)
        self.report = Report(folder.path, warn)
        settings = flatten(without_secrets_in(asdict(self.config)))
        self.trackers = Trackers(self.config.run.trackers, folder.path, settings, warn)
        self.enter("starting")

    def _share_evaluations(self) -> None:
        """Take, on every rank, the evaluations that an earlier process recorded."""
        known = self.metrics.evaluations.items() if self.metrics else ()
        for step, values in self.mesh.broadcast([(step, one.as_json()) for step, one in known]):
            if (found := Evaluation.of_json(values)) is not None:
                self.history.add(step, found)

    @property
    def scores(self) -> dict[str, float]:
        """The newest scores on held-out data."""
        return self.evaluation.scores if self.evaluation else {}

    def guard(self, uniform_loss: float | None) -> None:
        """Watch for divergence; every rank calls this.

        Args:
            uniform_loss: of uniform predictions in nats; ``None`` for losses of another kind, which
                are not watched.
        """
        # Rank 0 alone has read what earlier processes wrote, and all ranks stop together.
        losses = self.metrics.losses if self.metrics else []
        losses = self.mesh.broadcast(losses[:WINDOW] + losses[WINDOW:][-WINDOW:])
        if uniform_loss is not None:
            self._divergence = Divergence(losses, uniform_loss)

    def enter(self, phase: str, **more: Any) -> None:
        """Record the phase of the run; ``more`` as :meth:`zo.observe.record.Record.status`."""
        if self.mesh.rank == 0:
            self.record.step = step = self.log.version
            if (best := self.history.best()) is not None:
                more["best"] = best._asdict()
            left_s = None if self.history.has_ended else self.progress.left_s(step)
            self.record.status(phase, self.config.run.steps, left_s, **more)
            self.report.refresh(now=phase in ENDS or phase == "starting")

    def say_first(self, table: LossTable, data: DataReport | None) -> None:
        """Print the run's data, model, mesh, memory, warnings and first step."""
        for line in data.lines() if data else ():
            self.progress.say(line)
        config, layout, shape = self.config, self.replica.layout, self.mesh.shape
        self.progress.say(
            f"{config.recipe or 'run'} in {self.folder.path}: {layout.numel:,} parameters in "
            f"{len(layout.blocks)} blocks, {config.model.dtype} on {self.mesh.device}, "
            f"store {config.memory.store}, table {table.rows} x {table.columns}"
            f"{'' if table.is_full else f' ({len(table.cells)} cells)'}, "
            f"mesh {shape.perturb} x {shape.data} x {shape.slice}; "
            f"{memory_of(config, self.mesh, self.replica, table)}"
        )
        if written := self.replica.said_of_probes():
            self.progress.say(written)
        if idle := idle_of(config, shape):
            self.progress.warn(idle)
        unshaped = config.estimator.distribution == "gaussian" and config.estimator.shape == "none"
        if unshaped and config.update.lr >= FIRST_ORDER_LR:
            self.progress.warn(
                f"warning: update.lr={config.update.lr} is a usual rate of first-order training; "
                "full fine-tuning by Gaussian directions usually diverges there: MeZO uses 1e-7 to "
                "1e-6 for all parameters, 1e-4 for LoRA"
            )
        settings, update, batch = config.estimator, config.update, config.batch
        self.progress.say(
            f"settings (recipe={config.recipe or 'none'}): update.lr={update.lr:g} "
            f"({update.schedule}), run.steps={config.run.steps}, {batch.sequences} sequences of at "
            f"most {batch.max_tokens} tokens and {config.directions} directions a step "
            f"(estimator.part={settings.part}, eps={settings.eps:g}); --help lists all keys"
        )
        if self.log.cut_bytes:
            self.progress.say(f"cut {self.log.cut_bytes} bytes of an unfinished entry from the log")
        if self.log.version:
            self.progress.say(
                f"resuming {self.folder.path} after step {self.log.version} of {config.run.steps}"
            )

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self.replica.timeline.active = self.log.version + 1 in self.config.profile.range
        self._started, self._before, self._sent = (
            time.monotonic(),
            self.replica.traffic(),
            self.mesh.scalar_bytes,
        )

    def end_step(
        self, table: LossTable, skipped: int, clipped: int, loss_dtype: torch.dtype
    ) -> None:
        """Record a step; warn if it changed nothing.

        Args:
            table: of the step, filled.
            skipped: directions that had no finite estimate.
            clipped: projected gradients that ``update.clip`` limited.
            loss_dtype: the coarsest type that a loss was returned in.

        Raises:
            UserError: no step of the last ``run.max_skipped`` had a finite loss.
        """
        step_s, now, entry = (
            time.monotonic() - self._started,
            self.replica.traffic(),
            self.log.entries[-1],
        )
        roundoff = self._roundoff(loss_dtype)
        spread, resolution = estimator.spread(self.config.estimator.name, table, roundoff)
        values: dict[str, Any] = {
            "step": entry.step,
            "loss": table.loss,
            "scalars": list(entry.scalars),
            "lr": entry.lr,
            "step_s": round(step_s, 6),
            "tokens": table.tokens,
            "padded_tokens": table.padded_tokens,
            "tokens_per_s": round(table.tokens / step_s, 3),
            "pair_spread": spread,
            "pair_resolution": resolution,
            "read_bytes": now.read_bytes - self._before.read_bytes,
            "written_bytes": now.written_bytes - self._before.written_bytes,
            "gathered_bytes": now.gathered_bytes - self._before.gathered_bytes,
            "scalar_bytes": self.mesh.scalar_bytes - self._sent,
            "wait_share": round((now.wait_s - self._before.wait_s) / step_s, 4),
            **memory(self.mesh.device),
        }
        values |= {"skipped": skipped} if skipped else {}
        if agreed := estimator.agreement_of(self.config.estimator.name, table):
            differ, same = agreed
            values |= {"reward": 0.0 - table.loss, "pairs_disagree": differ, "same_outputs": same}
        values |= {} if self.config.update.clip is None else {"clipped": clipped}
        if self.metrics:
            self.metrics.write(values)
            self.trackers.log(values, entry.step)
        self.progress.step(values, self.scores, self._first_scores)
        self.enter("training")
        self._check_divergence(entry.step, table.loss)
        self._warn(entry.step, entry.scalars, skipped, agreed)
        if agreed is None and not self._has_collapsed(table.loss):
            self._warn_of_rounding(entry.step, spread, resolution)
        for name in self.replica.corrupt():
            self.progress.warn(
                f"block {name} was corrupt on disk and was rebuilt from the base and the log"
            )
        if entry.step in self.config.profile.range[-1:]:
            self.replica.timeline.active = False
            self._draw_timeline()

    def _roundoff(self, loss_dtype: torch.dtype) -> float:
        """Return the relative rounding of a loss."""
        model_dtype = getattr(torch, self.config.model.dtype)
        if torch.finfo(loss_dtype).eps > torch.finfo(torch.float32).eps:
            self._remedy = (
                f"the objective returns its loss in {str(loss_dtype).removeprefix('torch.')}; "
                "compute it in float32, from logits.float(), or raise estimator.eps"
            )
        return max(torch.finfo(dtype).eps for dtype in (model_dtype, loss_dtype)) / 2

    def _warn(
        self, step: int, scalars: tuple[float, ...], skipped: int, agreed: Agreement | None
    ) -> None:
        if skipped:
            self.progress.warn(
                f"step {step}: {skipped} of {len(scalars)} directions had no finite loss and count "
                "as zero"
            )
        elif not any(scalars) and agreed is not None:
            if not self._said_signal:
                self.progress.warn(
                    f"step {step}: the signal is gone: no probe has a better reward than another, "
                    f"and {agreed[1]:.0%} of their completions are the same; raise estimator.eps, "
                    "give rewards that tell more completions apart, or set generation.temperature=1"
                )
        elif not any(scalars) and any(self.log.entries[0].scalars):
            self.progress.warn(
                f"step {step}: every projected gradient is exactly zero, and at step 1 they were "
                "not: the model has probably collapsed; start another run with "
                f"update.lr={self.config.update.lr / 10:.2g}"
            )
        elif not any(scalars):
            self.progress.warn(
                f"step {step}: every projected gradient is exactly zero: the perturbation does not "
                f"change the loss: {self._remedy}, or set model.dtype=float32"
            )
        self._said_signal = agreed is not None and not any(scalars)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped == len(scalars) else 0
        if self._skipped_in_a_row >= self.config.run.max_skipped:
            raise UserError(
                f"no finite loss in {self._skipped_in_a_row} steps in a row (run.max_skipped), the "
                f"last is step {step}: the run has diverged or overflows; start another run with a "
                "smaller update.lr, or with model.dtype=float32 or bfloat16 instead of float16"
            )

    def _has_collapsed(self, loss: float) -> bool:
        """Return True far over the start, where longer probes would not differ by more."""
        return self._divergence is not None and self._divergence.is_far(loss)

    def _check_divergence(self, step: int, loss: float) -> None:
        """Stop a run whose step losses diverge, or say so once."""
        if (watched := self._divergence) is not None and watched.add(loss):
            rise = f"{watched.start:.4g} in the first {WINDOW} steps to {watched.now:.4g}"
            self._diverged(step, f"the loss has risen from {rise} in the last {WINDOW}")

    def _diverged(self, step: int, what: str) -> None:
        """Stop the run, or say so once.

        Raises:
            UserError: ``run.divergence=stop``.
        """
        lr, stops = self.config.update.lr, self.config.run.divergence == "stop"
        if self._said_divergence:
            return
        self._said_divergence = True
        line = (
            f"step {step}: {what}: the run diverges with update.lr={lr:g}; start another run with "
            f"update.lr={lr / 10:.2g}, or update.lr={AUTO}"
        )
        if stops:
            raise UserError(f"{line}; run.divergence=warn goes on")
        self.progress.warn(line)

    def _warn_of_rounding(self, step: int, spread: float, resolution: float) -> None:
        """Say once that a step's pairs differ by little more than the rounding of their losses."""
        # Where no pair differs, the step has no projected gradient, which is said already.
        if not self._said_rounding and 0.0 < spread < LEAST_SPREAD * resolution:
            self._said_rounding = True
            self.progress.warn(
                f"step {step}: the probes' losses differ by {spread:.1e}, less than {LEAST_SPREAD} "
                f"times their rounding of {resolution:.1e}: {self._remedy}"
            )

    def evaluated(self, step: int, evaluation: Evaluation, is_new: bool) -> None:
        """Record and print the scores of a step.

        Raises:
            UserError: they have no ``eval.metric``.
        """
        self.evaluation = evaluation
        self.history.add(step, evaluation)
        first, scores = self.history.first(), evaluation.scores
        self._first_scores = first[1].scores if first and first[0] < step else {}
        if self.metrics and is_new:
            self.metrics.write({"step": step, "eval": evaluation.as_json()})
            self.trackers.log({f"dev/{name}": value for name, value in scores.items()}, step)
        errors = evaluation.details.get("standard_error", {})
        shown = scores_text(scores, self._first_scores, errors)
        self.progress.say(f"step {step}/{self.config.run.steps}  dev {shown}", "score")
        self.enter("training")
        start, loss = self._first_scores.get("loss"), scores.get("loss")
        watched = self._divergence
        if watched and start is not None and loss is not None and watched.is_far(loss, start):
            self._diverged(step, f"the held-out loss has risen from {start:.4g} to {loss:.4g}")

    def record_samples(self, found: Sequence[Sample]) -> None:
        """Record samples of the model's answers."""
        for one in found if self.mesh.rank == 0 else ():
            text = f"{one.prompt} [[{one.answer}]], wanted {one.wanted}"
            self.record.event("sample", text, **asdict(one))

    def say_last(self) -> None:
        """Say why a run ends before its last step, and which evaluation was the best."""
        if self.history.has_ended and self.log.version < self.config.run.steps:
            self.progress.say(f"ends after step {self.log.version}: {self.history.why()}")
        best, export = self.history.best(), self.config.export
        if best is not None and best.step < self.log.version:
            where = "in model/"
            if export.step != "best" or not export.at_end:
                where = f"{typed('export')} run={self.folder.path} step=best to=FOLDER writes it"
            self.progress.say(
                f"the best {best.metric}, {best.value:.4g}, is of the model after step "
                f"{best.step}: {where}"
            )

    def _draw_timeline(self) -> None:
        if self.mesh.rank == 0:
            memory, steps = self.config.memory, self.config.profile.steps
            settings = (
                f"store {memory.store}, unit {memory.unit}, {memory.slots} slots, lag {memory.lag}"
            )
            title = f"{self.config.model.name or 'own model'}, steps {steps}: {settings}"
            folder = self.folder.path
            self.replica.timeline.save(folder / "timeline.json", folder / "timeline.png", title)

    def fail(self, error: BaseException) -> None:
        """Record an error that ends the run, or a user's interrupt."""
        said = error if isinstance(error, UserError | RankError) else repr(error)
        if self.mesh.rank == 0:
            self.record.event("error", str(said))
        ended = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        self.end(ended, error=str(said))

    def end(self, phase: str, **more: Any) -> None:
        """Record how the run ended, and close the files.

        Args:
            phase: ``finished``, ``stopped`` or ``failed``.
            more: ``summary`` or ``error``.
        """
        if self.metrics:
            self.metrics.close()
            self.enter(phase, **more)
            self.trackers.finish()
            self.record.close()
