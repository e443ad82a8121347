"""Bring a block from its version to a later one: the only code that writes parameters.

    theta_t = replay(theta_0, entries 1..t)

The entries are applied in one pass over the block's memory, and the probes of the visit that asked
for it are written in the same pass.
"""

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock

from torch import Tensor

from zo.errors import UserError
from zo.method.entry import Entry
from zo.method.kernels import replay_and_perturb
from zo.method.passes import DISTRIBUTIONS
from zo.method.perturbation import Pass, Probe, Rows
from zo.method.update import RULES
from zo.model.form import Form
from zo.model.layout import Block, Layout, Segment, runs
from zo.model.source import WeightSource
from zo.state.anchor import Anchor
from zo.state.log import Log

Run = tuple[Segment, int, Tensor]
"""A segment, the number of its first element in a range, and its elements there, flat."""
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
    anchor: float = 0.0

    @classmethod
    def of(cls, log: Log) -> "Recipe":
        """Return the recipe that a log was written with.

        Raises:
            UserError: the log lacks a part of it, or has what this version of zo does not know.
        """
        h = log.header
        for key in ("seed", "distribution", "rule", "weight_decay"):
            if key not in h:
                raise UserError(
                    f"the log's header lacks {key}, without which its steps cannot be repeated; "
                    "take a copy of the log from elsewhere"
                )
        for key, known in (("rule", RULES), ("distribution", DISTRIBUTIONS)):
            if h[key] not in known:
                raise UserError(
                    f"the log has {key}={h[key]!r}, which this version of zo does not know; "
                    "install the one that wrote it"
                )
        anchor = h.get("anchor", 0.0)
        return cls(h["seed"], h["distribution"], h["rule"], h["weight_decay"], anchor)


class Replay:
    """Applies a log to blocks, wherever their weights are."""

    def __init__(self, log: Log, layout: Layout, base: WeightSource | None = None) -> None:
        """Replay ``log`` on blocks of ``layout``; entries appended later are seen.

        ``base`` is read again by a log with an anchor, and may be ``None`` without.
        """
        self.log, self.recipe = log, Recipe.of(log)
        self._anchor: Anchor | None = None
        if self.recipe.anchor:
            assert base is not None
            self._anchor = Anchor(self.recipe.anchor, base, layout)
        self._position = Form.of(log.header, layout).positions
        self._entries = _EntriesByPosition(log)
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
        key, first, last = self._range(block, version)
        if self._anchor is not None and first < last:
            base = self._anchor.read(block, 0, block.trainable_bytes, stored[0].device)
            pairs = zip(block.trainable, stored, strict=False)  # Frozen ones come last.
            of_segments = [(segment, 0, flat) for segment, flat in pairs]
            self._apply_anchored(of_segments, runs(block, base), key, range(first, last))
            first = last
        for i, segment in enumerate(block.trainable):
            work = self._pass(key, first, last, segment.decays, tuple(probes))
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
        entries = self._range(block, version, newest)
        if self._anchor is not None and entries[1] < entries[2]:
            base = self._anchor.read(block, start, image.numel(), image.device)
            trained = [run for run in runs(block, image, start) if not run[0].frozen]
            self._apply_anchored(trained, runs(block, base, start), entries[0], range(*entries[1:]))
        elif entries[1] < entries[2]:
            for segment, first, flat in runs(block, image, start):
                if not segment.frozen:
                    work = self._pass(*entries, segment.decays)
                    address = segment.start + first
                    replay_and_perturb(flat, address, work, matrices=segment.matrices)
        return newest

    def _apply_anchored(
        self, weights: Iterable[Run], bases: Iterable[Run], key: int, entries: range
    ) -> None:
        """Apply entries one by one, each after a pull to the base.

        Args:
            weights: the trainable runs of a block; *modified in place*.
            bases: the same of version 0.
            key: of the entries.
            entries: their numbers among the ones of that key.
        """
        assert self._anchor is not None
        for (segment, first, flat), (_, _, base) in zip(weights, bases, strict=True):
            for number in entries:
                (entry,) = self._entries.some(key, number, number + 1)
                self._anchor.pull(flat, base, entry.lr)
                work = self._pass(key, number, number + 1, segment.decays)
                replay_and_perturb(flat, segment.start + first, work, matrices=segment.matrices)

    def changes_anything(self, block: Block, version: int, newest: int) -> bool:
        """Return True if entries ``version + 1 .. newest`` can alter the block's bytes.

        They do not where nothing of it is trained, or where every scalar is zero and nothing
        decays.
        """
        if not block.trainable:
            return False
        _, first, last = self._range(block, version, newest)
        if self._anchor is not None:
            return first < last
        decays = any(segment.decays for segment in block.trainable)
        changes = self._pass(*self._range(block, version, newest), decays).changes
        return any(any(change.coefficients) or change.decay != 1.0 for change in changes)

    def _range(self, block: Block, version: int, newest: int | None = None) -> tuple[int, int, int]:
        """Return the entries after a version that reach a block.

        As a key of the entries' parts, and the first and last of them among the ones of that key.
        """
        newest = self.log.version if newest is None else newest
        return self._entries.range(self._position[block.index], version, newest)

    def _make_pass(
        self, key: int, first: int, last: int, decays: bool, probes: tuple[Probe, ...] = ()
    ) -> Pass:
        rule, weight_decay = RULES[self.recipe.rule], self.recipe.weight_decay
        changes = [rule(entry, weight_decay) for entry in self._entries.some(key, first, last)]
        seen = changes if decays else [replace(change, decay=1.0) for change in changes]
        return Pass(self.recipe.seed, self.recipe.distribution, tuple(seen), probes)


class _EntriesByPosition:
    """The entries of a log that reach each position; found once, as the log grows.

    Positions that the same entries reach share a key: the largest part of an entry up to theirs.
    """

    def __init__(self, log: Log) -> None:
        self._log, self._seen = log, 0
        self._lock = Lock()  # Slices catch up in the thread that gathers them.
        self._parts: list[int] = []
        self._steps: dict[int, list[int]] = {}

    def range(self, position: int, version: int, newest: int) -> tuple[int, int, int]:
        with self._lock:
            self._read_on()
            place = bisect_right(self._parts, position)
            if not place:
                return -1, 0, 0
            key = self._parts[place - 1]
            steps = self._steps[key]
        return key, bisect_right(steps, version), bisect_right(steps, newest)

    def some(self, key: int, first: int, last: int) -> Sequence[Entry]:
        return [self._log.entries[step - 1] for step in self._steps.get(key, [])[first:last]]

    def _read_on(self) -> None:
        for entry in self._log.entries[self._seen :]:
            if entry.part not in self._steps:
                insort(self._parts, entry.part)
                lower = self._parts[: self._parts.index(entry.part)]
                self._steps[entry.part] = list(self._steps[lower[-1]]) if lower else []
            for part in self._parts[self._parts.index(entry.part) :]:
                self._steps[part].append(entry.step)
        self._seen = len(self._log.entries)
