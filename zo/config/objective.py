"""Keys of what a run minimises, and of completions where that is a reward of them."""

import math
import re
from dataclasses import dataclass

from zo.config.checks import at_least, choice
from zo.errors import UserError

LIKELIHOOD = "cross-entropy"
"""The objective of ordinary fine-tuning."""
SCORES = ("accuracy", "f1")
"""Scores that can be the objective; a run minimises 1 minus the score."""
REWARDS = {
    "countdown": "zo.data.countdown:reward",
    "gsm8k": "zo.data.gsm8k:reward",
}
"""Rewards that zo brings, by the value of ``objective.name``; tasks of these names have them."""
NAMED = re.compile(r"[^:]+:[^\W\d]\w*")
"""``module:function``."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised."""

    name: str | None = None
    """``cross-entropy``; a score, which needs no gradient: ``accuracy`` of labels and choices,
    ``f1`` of generated answers; or a reward of completions that the model generates: ``countdown``,
    ``gsm8k``, or ``module:function`` for ``function(prompt, completion, row) -> float``, a
    larger one being better, in a Python file or module of yours. By default a task's own, else
    cross-entropy."""
    beta: float = 0.1
    """Of data with chosen and rejected answers: weight of a log-probability's gain over the base
    model's; the larger, the closer the model stays to it."""
    timeout_s: float = 10.0
    """Seconds that a reward may take for one completion."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise UserError(f"objective.beta={self.beta} must be a number above 0, such as 0.1")
        at_least("objective.timeout_s", self.timeout_s, 0.001)
        if self.name is not None and not NAMED.fullmatch(self.name):
            known = LIKELIHOOD, *SCORES, *REWARDS, "module:function"
            choice("objective.name", self.name, known)
        if self.name == "module:function":
            raise UserError(
                "objective.name=module:function stands for a function of yours; give its file "
                "and name, such as objective.name=my_reward.py:reward"
            )


@dataclass(frozen=True)
class GenerationConfig:
    """Completions that are rewarded."""

    max_new_tokens: int = 64
    """Tokens of a completion at most, beside the batch.max_tokens of its prompt."""
    temperature: float = 0.0
    """Of samples; 0: greedy. Held-out prompts are always answered greedily."""
    chat: bool = False
    """Have the tokenizer's chat template write a prompt as a user's turn, if it is a text."""

    def __post_init__(self) -> None:
        at_least("generation.max_new_tokens", self.max_new_tokens, 1)
        at_least("generation.temperature", self.temperature, 0)


def reward_name(objective: ObjectiveConfig, data: str | None) -> str | None:
    """Return the name of the reward that a run maximises, if it maximises one.

    Args:
        objective: of the run.
        data: ``data.name``, whose task may have a reward.
    """
    name = objective.name or (data if data in REWARDS else LIKELIHOOD)
    return None if name in (LIKELIHOOD, *SCORES) else name
