"""Bring a block from its version to a later one: the only code that writes parameters.

    theta_t = replay(theta_0, entries 1..t)

The entries are applied in one pass over the block's memory, and the probes of the visit that asked
for it are written in the same pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from zo.method.kernels import replay_and_perturb
from zo.method.perturbation import Pass, Probe, Rows
from zo.method.update import RULES
from zo.model.layout import Block, runs
from zo.state.log import Log

PASSES_KEPT = 256
"""Passes that are kept for the next block of a step: two (with decay and without) for each group of
probes."""


@dataclass(frozen=True)
class Recipe:
    """Settings, beside the entries, that decide a replay's bits; part of the log's header."""

    seed: int
    distribution: str
    rule: str
    weight_decay: float

    @classmethod
    def of(cls, log: Log) -> "Recipe":
        """Return the recipe that a log was written with."""
        h = log.header
        return cls(h["seed"], h["distribution"], h["rule"], h["weight_decay"])


class Replay:
    """Applies a log to blocks, wherever their weights are."""

    def __init__(self, log: Log) -> None:
        """Replay ``log``; entries appended later are seen."""
        self.log, self.recipe = log, Recipe.of(log)
        self._pass = lru_cache(PASSES_KEPT)(self._make_pass)

    def visit(
        self,
        block: Block,
        stored: Sequence[Tensor],
        version: int,
        probes: Sequence[Probe] = (),
        out: Sequence[Tensor] = (),
        row_numbers: Tensor | None = None,
    ) -> int:
        """Bring one block to the newest version and write probes of it.

        Args:
            block: which block.
            stored: its weights, one flat tensor a segment; *modified in place* if they lag. Frozen
                ones stay.
            version: of the weights.
            probes: the probes.
            out: one tensor a trainable segment, of shape ``[>= len(probes), segment.numel]``;
                *modified in place*.
            row_numbers: for a block of one matrix, the only rows of it that will be read of
                ``out``.

        Returns:
            The newest version, at which the weights stand now.
        """
        newest = self.log.version
        for i, segment in enumerate(block.trainable):
            work = self._pass(version, newest, segment.decays, tuple(probes))
            if work.changes or probes:
                rows = None if row_numbers is None else Rows(row_numbers, segment.parts[0].shape[1])
                written, matrices = out[i] if probes else None, segment.matrices
                replay_and_perturb(stored[i], segment.start, work, written, rows, matrices)
        return newest

    def catch_up(self, block: Block, image: Tensor, start: int, version: int, newest: int) -> int:
        """Bring some bytes of a block, a slice of it, to a version.

        Args:
            block: which block.
            image: its bytes from ``start``, uint8 (see :func:`zo.model.layout.runs`); *modified in
                place*.
            start: a multiple of ``GRAIN``.
            version: of the weights.
            newest: to bring them to.

        Returns:
            ``newest``.
        """
        if version < newest:
            for segment, first, flat in runs(block, image, start):
                if not segment.frozen:
                    work = self._pass(version, newest, segment.decays)
                    address = segment.start + first
                    replay_and_perturb(flat, address, work, matrices=segment.matrices)
        return newest

    def changes_anything(self, block: Block, version: int, newest: int) -> bool:
        """Return True if entries ``version + 1 .. newest`` can alter the block's bytes.

        They do not where nothing of it is trained, or where every scalar is zero and nothing
        decays.
        """
        if not block.trainable:
            return False
        decays = any(segment.decays for segment in block.trainable)
        changes = self._pass(version, newest, decays).changes
        return any(any(change.coefficients) or change.decay != 1.0 for change in changes)

    def _make_pass(
        self, version: int, newest: int, decays: bool, probes: tuple[Probe, ...] = ()
    ) -> Pass:
        rule, weight_decay = RULES[self.recipe.rule], self.recipe.weight_decay
        changes = [rule(entry, weight_decay) for entry in self.log.entries[version:newest]]
        seen = changes if decays else [replace(change, decay=1.0) for change in changes]
        return Pass(self.recipe.seed, self.recipe.distribution, tuple(seen), probes)
