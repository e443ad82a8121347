"""Pairs of a better and a worse answer to a prompt, trained by direct preference optimisation.

    margin = beta * ((log p(chosen) - log p_0(chosen)) - (log p(rejected) - log p_0(rejected)))
    loss   = -log sigmoid(margin)

p_0 is the base model, the weights at version 0. Its log-probabilities are numbers of the data, one
an answer, found before the first step; so there is no second model. A micro-batch of n pairs has
2 n sequences, a chosen answer and its rejected one by turns.

Source: Rafailov et al. 2023, "Direct preference optimization".
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from zo.data.tasks import Batch, Example, Task, answer_losses, collate_answers
from zo.model.info import ModelInfo


class Reference:
    """Log-probabilities of answers under the base model, by a digest of the tokens."""

    def __init__(
        self, info: ModelInfo, pad: int, drawn: Callable[[int], Iterable[Example]]
    ) -> None:
        """Start without any.

        Args:
            info: of the model.
            pad: padding token.
            drawn: returns the pairs that so many steps draw, and those that are evaluated on.
        """
        self._info, self._pad, self._drawn = info, pad, drawn
        self.known: dict[str, float] = {}

    def of(self, answer: Example) -> float:
        """Return an answer's log-probability; 0 while none is known, as the start-up check runs."""
        return self.known[digest(answer)] if self.known else 0.0

    def missing(self, steps: int) -> list[tuple[str, Batch]]:
        """Return the answers that so many steps need and that are not known.

        Each comes with its digest, as a batch of its own: its number must not depend on the padding
        of others.
        """
        wanted = {digest(side): side for pair in self._drawn(steps) for side in pair.sides}
        return [
            (key, collate_answers([side], [side], self._info, self._pad))
            for key, side in wanted.items()
            if key not in self.known
        ]

    def score(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the log-probabilities of the answers of a batch, float64 of shape ``[B]``."""
        return log_probabilities(model, batch, self._info)


def digest(answer: Example) -> str:
    """Return a hash of an answer with its prompt."""
    tokens = json.dumps([answer.ids, answer.target, answer.ignored])
    return hashlib.sha256(tokens.encode()).hexdigest()[:24]


def log_probabilities(model: nn.Module, batch: Batch, info: ModelInfo) -> Tensor:
    """Return the log-probability of each answer, float64 of shape ``[B]``."""
    return -answer_losses(model, batch, info).double().sum(1)


def preference(info: ModelInfo, pad: int, beta: float, reference: Reference) -> Task:
    """Return the task of making the chosen answers likelier than the rejected ones.

    Args:
        info: of the model.
        pad: padding token.
        beta: ``objective.beta``.
        reference: of the answers.
    """

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        sides, all_sides = ([s for e in some for s in e.sides] for some in (examples, among))
        known = torch.tensor([reference.of(side) for side in sides], dtype=torch.float64)
        return {**collate_answers(sides, all_sides, info, pad), "reference": known}

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        gain = log_probabilities(model, batch, info) - batch["reference"]
        margin = beta * (gain[::2] - gain[1::2])
        count = torch.full_like(margin[0], len(margin))
        return torch.stack(
            (softplus(-margin).sum(), count, (margin > 0).double().sum(), margin.sum())
        )

    return Task("pair", collate, terms, "accuracy", width=4)
