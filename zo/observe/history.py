"""Evaluations of a run by step: the best of them, and how long there has been no better one.

Both are functions of the evaluations that ``metrics.jsonl`` records, so that every rank decides
alike, and a resumed run as the one that it continues.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zo.errors import UserError

PREFERRED = ("accuracy", "f1", "exact_match", "reward")
"""Scores to choose the best by, the first that there is; otherwise the lowest loss."""
LOWER_IS_BETTER = ("loss", "perplexity")
DETAILS = "details"
"""Key, among the scores of an evaluation, of what is behind them."""
MOST_DIGITS = 300
"""Of a whole number, which is to fit into a float."""


def read_line(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line of ``metrics.jsonl``; ``None`` if it has no integer ``step``."""
    try:
        values = json.loads(line.decode("utf-8"), parse_int=_whole)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None


def _whole(digits: str) -> int:
    """Return a whole number that fits into a float."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one version of a model on held-out data."""

    scores: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    """Standard errors, figures of each class; see :func:`zo.data.scores.evaluation`."""
    decisions: Sequence[int] = ()
    """The class decided for of each example; not recorded."""

    def as_json(self) -> dict[str, Any]:
        """Return the ``eval`` of a line of ``metrics.jsonl``."""
        return {**self.scores, DETAILS: self.details} if self.details else dict(self.scores)

    @classmethod
    def of_json(cls, values: Any) -> "Evaluation | None":
        """Return what :meth:`as_json` made, null as not-a-number; ``None`` if it is not that."""
        if not isinstance(values, dict):
            return None
        details, scores = values.get(DETAILS, {}), {k: v for k, v in values.items() if k != DETAILS}
        if not isinstance(details, dict) or not all(
            isinstance(v, int | float | None) for v in scores.values()
        ):
            return None
        read = {name: math.nan if v is None else float(v) for name, v in scores.items()}
        return cls(read, details)

    def numbers(self) -> dict[str, float]:
        """Return what a best evaluation can be chosen by."""
        return self.scores | {k: v for k, v in self.details.items() if isinstance(v, float)}


class Best(NamedTuple):
    """The best evaluation of a run."""

    step: int
    metric: str
    value: float


class History:
    """The evaluations of a run."""

    def __init__(self, metric: str | None = None, patience: int | None = None) -> None:
        """Begin without an evaluation.

        Args:
            metric: ``eval.metric``.
            patience: ``eval.patience``.
        """
        self._metric, self._patience = metric, patience
        self._by_step: dict[int, Evaluation] = {}
        self._best: Best | None = None
        self.has_ended = False
        """True if as many evaluations as ``eval.patience`` follow the best one."""

    def add(self, step: int, evaluation: Evaluation) -> None:
        """Take an evaluation; one of the same step is replaced.

        Raises:
            UserError: it has no ``eval.metric``.
        """
        if self._metric is not None and self._metric not in (found := evaluation.numbers()):
            raise UserError(
                f"eval.metric={self._metric} is not a score of this data; use {' or '.join(found)}"
            )
        self._by_step[step] = evaluation
        best = self._best = self._find_best()
        later = sum(step > best.step for step in self._by_step)
        self.has_ended = self._patience is not None and later >= self._patience

    def at(self, step: int) -> Evaluation | None:
        """Return the evaluation of a step, if there is one."""
        return self._by_step.get(step)

    def first(self) -> tuple[int, Evaluation] | None:
        """Return the first step with an evaluation, and that."""
        return min(self._by_step.items(), key=lambda item: item[0], default=None)

    def is_first(self, step: int) -> bool:
        """Return true if no evaluation is of an earlier step."""
        return not any(earlier < step for earlier in self._by_step)

    def last(self) -> tuple[int, Evaluation] | None:
        """Return the last step with an evaluation, and that."""
        return max(self._by_step.items(), key=lambda item: item[0], default=None)

    def best(self) -> Best | None:
        """Return the best evaluation, the first of several; ``None`` if there is none."""
        return self._best

    def _find_best(self) -> Best:
        metric = self._metric or metric_of([e.scores for e in self._by_step.values()])
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0

        def value(step: int) -> float:
            return self._by_step[step].numbers().get(metric, math.nan)

        def rank(step: int) -> float:
            return -math.inf if math.isnan(value(step)) else sign * value(step)

        step = max(sorted(self._by_step), key=rank)
        return Best(step, metric, value(step))

    def why(self) -> str:
        """Return a sentence on why a run ``has_ended``."""
        best = self.best()
        assert best is not None
        return (
            f"{best.metric} has not improved in {self._patience} evaluations (eval.patience) since "
            f"step {best.step}"
        )


def metric_of(scores: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of the score to choose the best of several evaluations by."""
    return next((n for n in PREFERRED if all(n in found for found in scores)), "loss")
