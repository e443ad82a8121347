"""Choosing one of several texts that may follow a prompt, and training on one of them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from zo.data.tasks import IGNORED, Batch, Example, Task, answer_losses, completion, decisions
from zo.model.info import ModelInfo


def candidates(info: ModelInfo, pad: int) -> Task:
    """Return the task of choosing one of several texts that may follow a prompt.

    A candidate is one row of the forward. Its score is the mean log-likelihood of its tokens, and
    the loss is the cross-entropy of the scores (Malladi et al. 2023, "MeZO").
    """
    text = completion(info, pad)

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        most = max(len(e.candidates) for e in among)
        rows = torch.full((len(examples), most), -1)
        right = torch.zeros_like(rows, dtype=torch.bool)
        first = 0
        for i, e in enumerate(examples):
            rows[i, : len(e.candidates)] = torch.arange(first, first + len(e.candidates))
            right[i, list(e.right or (e.target,))] = True
            first += len(e.candidates)
        target = torch.tensor([e.target for e in examples])
        return {
            **text.collate(_spread(examples), _spread(among)),
            "rows": rows,
            "right": right,
            "target": target,
        }

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        losses, labels = answer_losses(model, batch, info), batch["labels"]
        scores_R = -losses.sum(1) / (labels != IGNORED).sum(1)  # noqa: N806
        # Row -1, of a candidate that an example lacks, is the last: it is never chosen.
        never = scores_R.new_full((1,), -torch.inf)
        scores_BN = torch.cat((scores_R, never))[batch["rows"]]  # noqa: N806
        sums = decisions(scores_BN, batch["target"])
        chosen = batch["right"].gather(1, scores_BN.argmax(-1, keepdim=True))
        return torch.cat((sums[:2], chosen.sum().double().view(1)))

    return Task("candidates", collate, terms, "accuracy")


def followed(info: ModelInfo, pad: int) -> Task:
    """Return the task of predicting the tokens of the candidate to train on, after its prompt."""
    text = completion(info, pad)

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        return text.collate([e.followed() for e in examples], [e.followed() for e in among])

    return replace(text, collate=collate)


def _spread(examples: Sequence[Example]) -> list[Example]:
    """Return every candidate of every example as a completion."""
    return [e.candidate(number) for e in examples for number in range(len(e.candidates))]
