"""Keys of what a run minimises (``objective``)."""

import math
from dataclasses import dataclass

from zo.config.checks import choice
from zo.errors import UserError

LIKELIHOOD = "cross-entropy"
"""The objective of ordinary fine-tuning."""
SCORES = ("accuracy", "f1")
"""Scores that can be the objective; a run minimises 1 minus the score."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised."""

    name: str | None = None
    """``cross-entropy``, which is the default; or a score, which needs no gradient: ``accuracy`` of
    labels and choices, ``f1`` of generated answers."""
    beta: float = 0.1
    """Of data with chosen and rejected answers: weight of a log-probability's gain over the base
    model's; the larger, the closer the model stays to it."""

    def __post_init__(self) -> None:
        if self.name is not None:
            choice("objective.name", self.name, (LIKELIHOOD, *SCORES))
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise UserError(f"objective.beta={self.beta} must be a number above 0, such as 0.1")
