"""Trials of learning rates on a run's own weights and data, before its first step.

A log is the state of training, so a trial is a short log in memory that is forgotten, and the
weights are read from their source once more. Every rank takes part, as in a step; the rate is the
same on any mesh. Which is used is decided in :mod:`zo.method.rates`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from zo.config.invocation import typed
from zo.config.schema import AUTO, Config
from zo.data.tasks import Batch
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.atomic import replacing, write_whole
from zo.method.entry import Entry
from zo.method.rates import Trial, choose, largest_rate, search
from zo.method.table import LossTable
from zo.observe.divergence import is_far
from zo.observe.metrics import finite_or_none
from zo.run.evaluate import gather_terms
from zo.run.problem import Problem
from zo.state.log import Log
from zo.state.run_folder import RunFolder
from zo.streaming.replica import Replica

STEPS = 4
"""Steps of a trial."""
JUDGED_STEPS = range(STEPS - 1, STEPS + 1)
"""Steps, from 0, whose micro-batches judge a trial: its last, whose loss shows a faint signal, and
the one that follows."""
RISE = 0.2
"""Share of the loss that it may rise by before a trial ends early."""
NAME = "lr_probe"
"""Of the files in a run's folder."""


@dataclass(frozen=True)
class Probed:
    """A rate and the trials that it was chosen by."""

    lr: float
    loss: float
    """Clean loss of the judged micro-batches before any step."""
    sequences: int
    """Of the judged micro-batches."""
    steps: int
    """Of a trial."""
    trials: list[Trial]


class Steps(Protocol):
    """A run that can do steps; its rate and its log are changed from trial to trial."""

    config: Config
    mesh: Mesh
    problem: Problem
    replica: Replica
    log: Log
    folder: RunFolder
    find_reference: Callable[..., None]

    def header(self) -> dict[str, Any]:
        """Return the header of the run's log."""
        ...

    def step(self) -> tuple[LossTable, int, int, bool]:
        """See :meth:`zo.run.trainer.Run.step`."""
        ...


def check_store(config: Config) -> None:
    """Refuse rates that are found where weights cannot be rewound.

    Raises:
        UserError: the store is on disk.
    """
    if config.update.lr == AUTO and config.memory.store == "disk":
        raise UserError(
            f"update.lr={AUTO} tries rates on weights in memory, and memory.store=disk has them on "
            f"disk; give a number, or find one with {typed('lr-probe')} memory.store=host"
        )


def resolve_rate(
    run: Steps, say: Callable[[str], None]
) -> tuple[Config, dict[str, float], Probed | None]:
    """Return a run's configuration with a number where ``update.lr`` is ``auto``.

    It is the number of the run that the folder holds, or else one is found by trials. The run is at
    version 0 then, and has no log.

    Args:
        run: its ``config`` and ``log`` are *modified in place*.
        say: takes a line on each trial.

    Returns:
        The configuration; what of it was found, for ``config.yaml``; and the trials, if any.

    Raises:
        UserError: no rate lowers the loss.
    """
    config, probed = run.config, None
    if config.update.lr != AUTO:
        return config, {}, None
    lr = next((rate for rate in run.mesh.collect(run.folder.found_rate()) if rate), None)
    if lr is None:
        probed = _Trials(run, say).find()
        lr = probed.lr
    return replace(config, update=replace(config.update, lr=lr)), {"update.lr": lr}, probed


class _Trials:
    """Trials from the same weights, and what they share: the clean loss and the first step."""

    def __init__(self, run: Steps, say: Callable[[str], None]) -> None:
        self._run, self._say, self._asked, self._header = run, say, run.config, run.header()
        self._first: Entry | None = None
        """The first step, whose projected gradients are the same at any rate."""
        self._before = inf
        self._judged: list[Batch] = []
        """Micro-batches that judge a trial."""

    def find(self) -> Probed:
        run = self._run
        run.find_reference()
        columns = range(run.config.batch.columns)
        self._judged = [run.problem.batches(step, c) for step in JUDGED_STEPS for c in columns]
        self._begin(0.0)
        self._before, sequences = self._clean_loss(), len(JUDGED_STEPS) * run.config.batch.sequences
        self._say(
            f"update.lr={AUTO}: trying rates for {STEPS} steps each; the loss before is "
            f"{self._before:.4g} on {sequences} sequences"
        )
        run.step()
        self._first = run.log.entries[0]
        top = largest_rate(self._before, self._first.scalars)
        run.replica.rewind()
        trials = [] if top is None else search(self._before, top, self._try)
        lr = choose(self._before, trials)
        if lr is None:
            tried = f"{trials[-1].lr:g} to {trials[0].lr:g}" if trials else "any"
            raise UserError(
                f"update.lr={AUTO} found no rate that lowers the loss, {self._before:.4g} on "
                f"{sequences} sequences ({tried} tried, {STEPS} steps each); give update.lr a "
                "number, or more batch.sequences or estimator.directions for a better estimate"
            )
        self._say(f"update.lr={lr:g}: found by {len(trials)} trials of up to {STEPS} steps")
        return Probed(lr, self._before, sequences, STEPS, trials)

    def _begin(self, lr: float) -> None:
        """Open an empty log, and set a constant rate."""
        run, update = self._run, self._asked.update
        constant = replace(update, lr=lr, schedule="constant", warmup_steps=0)
        run.config, run.log = replace(self._asked, update=constant), Log(self._header)
        run.replica.open(run.log, is_trial=True)

    def _try(self, lr: float) -> Trial:
        """Return what a rate does to the clean loss; the weights are as before."""
        run = self._run
        assert self._first is not None
        self._begin(lr)
        run.log.append(replace(self._first, lr=lr))
        # One step of a rate that is far too large shows in the clean loss, for less than a step.
        loss = self._clean_loss()
        while run.log.version < STEPS and not self._rises(loss):
            loss = run.step()[0].loss
        if not self._rises(loss):
            loss = self._clean_loss()
        run.replica.rewind()
        diverged = self._diverges(loss)
        self._say(
            f"trial of update.lr={lr:g}: loss {self._before:.4g} -> "
            f"{'diverged' if diverged else f'{loss:.4g}'}"
        )
        return Trial(lr, inf if diverged else loss)

    def _rises(self, loss: float) -> bool:
        return not loss <= self._before + RISE * abs(self._before)

    def _diverges(self, loss: float) -> bool:
        uniform = self._run.problem.uniform_loss
        return not isfinite(loss) or is_far(loss, self._before, inf if uniform is None else uniform)

    def _clean_loss(self) -> float:
        """Return the unperturbed mean loss of the micro-batches that judge a trial."""
        run, columns = self._run, self._run.config.batch.columns
        table = gather_terms(self._terms, run.replica, self._judged, run.mesh, columns, width=2)
        loss, terms = (sum(column) for column in table.T.tolist())
        return loss / terms if terms else inf

    def _terms(self, batch: Batch) -> Tensor:
        return self._run.problem.objective(self._run.replica.model, batch).double().view(2)


def save(probed: Probed, folder: Path) -> None:
    """Write the trials as JSON, and as a picture where matplotlib is installed."""
    text = json.dumps(finite_or_none(asdict(probed)), indent=1)
    write_whole(folder / f"{NAME}.json", f"{text}\n".encode())
    try:
        _draw(probed, folder / f"{NAME}.png")
    except ImportError:
        return


def _draw(probed: Probed, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.subplots()
    finite = [trial for trial in probed.trials if isfinite(trial.loss)]
    axes.plot([t.lr for t in finite], [t.loss for t in finite], "o-", color="C0")
    for trial in probed.trials:
        if not isfinite(trial.loss):
            axes.axvline(trial.lr, color="C3", linestyle=":", label="diverged")
    axes.axhline(probed.loss, color="gray", linewidth=1, label="before")
    axes.axvline(probed.lr, color="C1", label=f"update.lr={probed.lr:g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"loss after {probed.steps} steps")
    axes.grid(alpha=0.3)
    named = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(named.values(), named)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def table(probed: Probed) -> str:
    """Return a Markdown table of the trials."""
    lines = ["| update.lr | loss before | loss after |", "|---|---|---|"]
    for trial in probed.trials:
        after = f"{trial.loss:.4f}" if isfinite(trial.loss) else "diverged"
        chosen = " (chosen)" if trial.lr == probed.lr else ""
        lines.append(f"| {trial.lr:g}{chosen} | {probed.loss:.4f} | {after} |")
    return "\n".join(lines)
