"""Keys of what a run minimises (``objective``)."""

from dataclasses import dataclass

from zo.config.checks import choice

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

    def __post_init__(self) -> None:
        if self.name is not None:
            choice("objective.name", self.name, (LIKELIHOOD, *SCORES))
