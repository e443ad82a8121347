"""Audit of a log: a sample of its entries is computed again, from data and weights.

theta_{t-1} = replay(theta_0, entries 1..t-1);  entry t must be what a step from there logs.

A weight that was changed by hand, other data or invented scalars show in the first entry after
them that is sampled: what a model published as weights cannot offer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from zo.config.checks import at_least
from zo.config.schema import AUTO, Config, MeshConfig
from zo.distributed.mesh import fit
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.determinism import explain_nondeterminism, make_deterministic
from zo.io.hardware import choose_device
from zo.method.entry import Entry
from zo.method.estimator import spread
from zo.method.table import LossTable
from zo.observe.progress import Progress
from zo.run import rewarded
from zo.run.artefact import Artefact
from zo.run.assemble import assemble, log_header
from zo.run.problem import build_problem
from zo.run.reference import find_reference
from zo.run.replay import check_base
from zo.run.step import Steps
from zo.state.log import Log, difference
from zo.state.log_diff import fields_that_differ

ROUNDINGS = 8
"""Roundings of a loss by which its recomputation on another machine may differ."""


@dataclass(frozen=True)
class Verdict:
    """What the recomputation of an entry found."""

    step: int
    is_same: bool
    """The entry has the same bits."""
    is_true: bool
    """It has them, or what rounding on another machine makes of them."""
    line: str
    """For people."""


class Audited(Steps):
    """A log whose entries are computed again."""

    def __init__(
        self,
        artefact: Artefact,
        data: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load base and data, and check that they are those of the log.

        Args:
            artefact: the log.
            data: where the training data is, if not under the name that the run had for it.
            device: to compute on; ``None`` for the run's own.
            trust_remote_code: run code that the model's repository or the run's reward brings.

        Raises:
            UserError: base or data are others, or cannot be loaded.
        """
        config = _config(artefact, data, device, trust_remote_code)
        chosen = choose_device(config.run.device)
        make_deterministic(chosen)
        self.mesh = Mesh(chosen.type, config.mesh.timeout_s)
        self.mesh.arrange(fit(config.mesh, self.mesh.ranks, config.grid, self.mesh.local_ranks))
        self.config, self.artefact = config, artefact
        self._phase = Progress(0, 0, True).phase
        with self._phase(f"reading {config.model.name} and {config.data.name or config.task}"):
            self.problem = build_problem(config)
        self._rewards = rewarded.load(
            self.problem.task, "" if trust_remote_code else artefact.source
        )
        ours = self.problem, config, self.mesh, Path(), self._phase
        self.replica, self.structure = assemble(*ours, writable=False)
        self._check()
        self.log = Log(artefact.header)

    def _check(self) -> None:
        artefact = self.artefact
        check_base(artefact, self.replica.store.base)
        header = log_header(self.config, self.replica, self.problem, self.structure)
        found = difference(artefact.header, header)
        if found is None:
            return
        key, there, here = found
        if key == "data":
            raise UserError(
                f"data={self.config.data.name or self.config.task} is not what the log was written "
                f"with: its checksum is {str(here)[:12]}, and {str(there)[:12]} in the log; give "
                "the training data by data="
            )
        raise UserError(
            f"{artefact.source}: the log has {key}={there!r}, and its config.yaml and model give "
            f"{here!r}; take both files from one copy"
        )

    def verdicts(self, steps: Sequence[int], say: Callable[[str], None]) -> list[Verdict]:
        """Compute entries again.

        Args:
            steps: their numbers, from 1, ascending.
            say: is given a line for each.
        """
        reference, found = self.problem.reference, []
        find_reference(
            reference, self.replica, self.mesh, self._phase, self.config, steps=steps[-1]
        )
        self.replica.open(self.log)
        for step in steps:
            self.log.extend(self.artefact.entries[self.log.version : step - 1])
            verdict = self._verdict(step)
            say(verdict.line)
            found.append(verdict)
        return found

    def fingerprint(self) -> str:
        """Return the fingerprint of the weights after the last entry."""
        self.log.extend(self.artefact.entries[self.log.version :])
        return self.replica.fingerprint()

    def _verdict(self, step: int) -> Verdict:
        table, *_ = self.step()
        logged, computed = self.artefact.entries[step - 1], self.log.entries[-1]
        self.log.entries[-1] = logged  # No block was visited since.
        parts = list(fields_that_differ(logged, computed))
        if not parts:
            return Verdict(step, True, True, f"entry {step}: the same bits")
        if self._is_close(table, logged, computed):
            apart = max(map(_apart, logged.scalars, computed.scalars))
            line = f"entry {step}: the same within rounding, scalars by up to {apart:.1e}"
            return Verdict(step, False, True, line)
        line = f"entry {step} is not true: {'; '.join(parts)} (logged and recomputed)"
        return Verdict(step, False, False, line)

    def _is_close(self, table: LossTable, logged: Entry, computed: Entry) -> bool:
        """Return whether two entries differ in the rounding of losses alone."""
        settings = self.config.estimator
        if replace(logged, scalars=()) != replace(computed, scalars=()) or settings.shape:
            return False  # Of shaped losses no bound is known.
        kinds = getattr(torch, self.config.model.dtype), self.problem.loss_dtype
        roundoff = max(torch.finfo(kind).eps for kind in kinds) / 2
        limit = ROUNDINGS * spread(settings.name, table, roundoff)[1] / settings.eps
        return max(map(_apart, logged.scalars, computed.scalars)) <= limit

    @property
    def _extended(self) -> Sequence[dict[str, int]]:
        """Where the run was extended, and to how many steps."""
        return self.artefact.content.get("extended") or []

    def _horizon(self, step: int) -> int:
        """Return the steps that a run had before or after it was extended."""
        known = [one["steps"] for one in self._extended if one["after"] < step]
        return known[-1] if known else self.config.run.steps

    def _lr(self, step: int) -> float:
        """Return the rate of a step; that of the log where the first horizon is not known."""
        first = self._extended[0]["after"] if self._extended else 0
        if step <= first and self.config.update.schedule != "constant":
            return self.artefact.entries[step - 1].lr
        return super()._lr(step)


def _apart(one: float, other: float) -> float:
    return abs(one - other)


def _config(
    artefact: Artefact, data: str | None, device: str | None, trust_remote_code: bool
) -> Config:
    """Return the configuration that a log's steps are computed with."""
    config, content = artefact.config, artefact.content
    if not content.get("versions"):
        raise UserError(
            f"{artefact.source} is a log without its config.yaml, which says how its steps were "
            "computed; give the folder of an artefact or a run"
        )
    found: Any = content.get("found")
    if config.update.lr == AUTO:
        rate = found.get("update.lr") if isinstance(found, dict) else None
        if not isinstance(rate, float):
            raise UserError(
                f"{artefact.source}: config.yaml has update.lr={AUTO} and not the rate that was "
                "found; put the file back that the run wrote"
            )
        config = replace(config, update=replace(config.update, lr=rate))
    if data is not None:
        config = replace(config, data=replace(config.data, name=data))
    if device is not None:
        config = replace(config, run=replace(config.run, device=device))
    model = replace(config.model, trust_remote_code=trust_remote_code)
    return replace(config, mesh=MeshConfig(), model=model)


def sample(entries: int, count: int, seed: int | None) -> list[int]:
    """Return the numbers of entries to recompute: the last, and others at random.

    Nobody who writes a log knows them before, unless ``seed`` is given.
    """
    at_least("entries", count, 1)
    if not entries:
        raise UserError("the log has no entry, so there is nothing to verify")
    chance = Random(seed)
    others = chance.sample(range(1, entries), min(count, entries) - 1)
    return sorted([*others, entries])


@torch.no_grad()
@explain_nondeterminism()
def verify(audited: Audited, steps: Sequence[int], say: Callable[[str], None]) -> dict[str, Any]:
    """Compute entries again, and the fingerprint where one was published.

    Returns:
        ``true``, ``entries`` (of the log), ``checked``, ``same_bits``, ``not_true`` (numbers of
        entries), ``fingerprint``.
    """
    artefact = audited.artefact
    verdicts = audited.verdicts(steps, say)
    fingerprint = audited.fingerprint()
    published = artefact.facts.get("fingerprint", fingerprint)
    if published != fingerprint:
        say(
            f"the weights' fingerprint is {fingerprint[:12]}, and {str(published)[:12]} on the card"
        )
    wrong = [verdict.step for verdict in verdicts if not verdict.is_true]
    return {
        "true": not wrong and published == fingerprint,
        "entries": len(artefact.entries),
        "checked": len(verdicts),
        "same_bits": sum(verdict.is_same for verdict in verdicts),
        "not_true": wrong,
        "fingerprint": fingerprint,
    }
