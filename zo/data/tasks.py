"""What an example is, how examples become a micro-batch, and what its loss is.

    choice       a prompt, and one label word of several that should follow it      cross-entropy over the words
    completion   a text, or a prompt and its completion                             cross-entropy of the tokens after it
    class        a text and its class, for a sequence classifier                    cross-entropy over the classes

Losses are taken from logits widened to float32, never from the model: several families return a loss in bf16, whose
spacing is larger than the difference of two probes. Shapes: B sequences, T tokens, K last tokens, N words or classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zo.model.info import ModelInfo

Batch = Mapping[str, Tensor]
IGNORED = -100
"""Label of a token without loss."""


@dataclass(frozen=True)
class Example:
    """One tokenised example."""

    ids: tuple[int, ...]
    target: int
    """The label; for a completion, the position of the first token with a loss."""


@dataclass(frozen=True)
class Task:
    """How a kind of example is batched and scored."""

    kind: str
    collate: Callable[[Sequence[Example]], Batch]
    terms: Callable[[nn.Module, Batch], Tensor]
    """Model and batch -> float64 of shape ``[3]``: sum of losses, number of terms, number of right decisions."""

    def objective(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of losses and number of terms; float64 of shape ``[2]``."""
        return self.terms(model, batch)[:2]

    def summarize(self, sums: Sequence[float]) -> dict[str, float]:
        """Totals of ``terms`` over a data set -> its scores."""
        loss = sums[0] / sums[1]
        if self.kind == "completion":
            return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return {"accuracy": sums[2] / sums[1], "loss": loss}


def choice(info: ModelInfo, pad: int, word_ids: Sequence[int]) -> Task:
    """Decide between label words, one token each, at the end of a prompt."""
    # Once for each device: a copy in each forward would make the host wait for the device.
    words = cache(lambda device: torch.tensor(word_ids, device=device))

    def collate(examples: Sequence[Example]) -> Batch:
        return _pad_left(examples, info, pad) | {
            "labels": torch.tensor([e.target for e in examples])
        }

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        last = _last_logits(model, batch, info, 1)[:, -1]
        return _decisions(last[:, words(last.device)], batch["labels"])

    return Task("choice", collate, terms)


def completion(info: ModelInfo, pad: int) -> Task:
    """Predict the tokens of a completion, or of a whole text, one after another."""

    def collate(examples: Sequence[Example]) -> Batch:
        longest = max(len(e.ids) - e.target for e in examples)
        labels = torch.full((len(examples), longest), IGNORED)
        for row, e in zip(labels, examples, strict=True):
            row[longest - (len(e.ids) - e.target) :] = torch.tensor(e.ids[e.target :])
        return _pad_left(examples, info, pad) | {"labels": labels}

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        logits = _last_logits(model, batch, info, labels.shape[1] + 1)[:, :-1]
        loss = cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = (labels != IGNORED).sum()
        return torch.stack((loss.double(), count.double(), torch.zeros_like(loss).double()))

    return Task("completion", collate, terms)


def classification(info: ModelInfo, pad: int) -> Task:
    """Decide between the classes of a sequence classifier."""

    def collate(examples: Sequence[Example]) -> Batch:
        longest = max(len(e.ids) for e in examples)
        ids = torch.full((len(examples), longest), pad)
        mask = torch.zeros_like(ids)
        for i, e in enumerate(examples):
            ids[i, : len(e.ids)], mask[i, : len(e.ids)] = torch.tensor(e.ids), 1
        labels = torch.tensor([e.target for e in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        return _decisions(_logits(model, batch, info, {}), batch["labels"])

    return Task("class", collate, terms)


def _pad_left(examples: Sequence[Example], info: ModelInfo, pad: int) -> dict[str, Tensor]:
    """Token ids and masks of shape ``[B, T]``, ends aligned, T the longest of these examples."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    for i, e in enumerate(examples):
        ids[i, longest - len(e.ids) :], mask[i, longest - len(e.ids) :] = torch.tensor(e.ids), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in info.accepts:
        # Positions count from the first real token, as they would without padding.
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def _logits(
    model: nn.Module, batch: Batch, info: ModelInfo, options: Mapping[str, object]
) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    fixed = {"use_cache": False} if "use_cache" in info.accepts else {}
    return model(**inputs, **fixed, **options).logits  # type: ignore[no-any-return]


def _last_logits(model: nn.Module, batch: Batch, info: ModelInfo, count: int) -> Tensor:
    """Logits of the last ``count`` positions; ``[B, count, V]``. Models that can are asked for no more."""
    options = {"logits_to_keep": count} if "logits_to_keep" in info.accepts else {}
    return _logits(model, batch, info, options)[:, -count:]


def _decisions(logits_BN: Tensor, labels: Tensor) -> Tensor:  # noqa: N803
    logits_BN = logits_BN.float()  # noqa: N806
    loss = cross_entropy(logits_BN, labels, reduction="sum").double()
    right = (logits_BN.argmax(-1) == labels).sum().double()
    return torch.stack((loss, torch.full_like(loss, len(labels)), right))
