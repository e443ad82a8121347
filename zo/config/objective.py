"""Keys of the objective."""

import math
from dataclasses import dataclass

from zo.errors import UserError


@dataclass(frozen=True)
class ObjectiveConfig:
    """Objective of a run."""

    beta: float = 0.1
    """Of data with chosen and rejected answers: weight of a log-probability's gain over the base
    model's; the larger, the closer the model stays to it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise UserError(f"objective.beta={self.beta} must be a number above 0, such as 0.1")
