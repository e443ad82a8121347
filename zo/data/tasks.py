"""Tasks: examples, their collation into micro-batches, and their losses.

    choice       a prompt and the label word that follows it      cross-entropy over the label words
    completion   a text, or a prompt and its completion           cross-entropy of the completion
    class        a text and its class, for a classifier           cross-entropy over the classes
    prompt       a prompt that the model completes                a reward: see zo/data/rewards.py

Losses are computed from logits in float32, never taken from the model: several families return a
loss in bf16, whose spacing is larger than the difference of two probes. Shapes: B sequences,
T tokens, N words or classes, V the vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zo.model.info import ModelInfo

if TYPE_CHECKING:
    from zo.data.rewards import Rewards

Batch = Mapping[str, Tensor]
IGNORED = -100
"""Label of tokens without a loss."""
SHORT_SEQUENCES, SHORT_TOKENS = 2, 32
"""Sequences, and tokens of each, that show how a model computes."""


@dataclass(frozen=True)
class Example:
    """One tokenised example."""

    ids: tuple[int, ...]
    target: int
    """Index of the label; for a completion, the position of the first token with a loss; for a
    prompt, its number among all."""
    ignored: tuple[int, ...] = ()
    """Positions after ``target`` without a loss: what stands between an assistant's turns."""


@dataclass(frozen=True)
class Task:
    """Collation, loss and scores of one kind of example."""

    kind: str
    collate: Callable[[Sequence[Example], Sequence[Example]], Batch]
    """Make a micro-batch of examples; the second ones, among which they are, decide its length."""
    terms: Callable[[nn.Module, Batch], Tensor]
    """Return float64 of shape ``[3]``: sum of losses, number of terms, correct decisions."""

    rewards: "Rewards | None" = None
    """What rewards the completions of prompts; the steps and scores of such a task are of these."""

    def objective(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of losses and the number of terms; float64 of shape ``[2]``."""
        return self.terms(model, batch)[:2]

    def shorten(self, batch: Batch) -> Batch:
        """Return a part of a micro-batch with tokens that have a loss, to check a model with."""
        # Padding is on the left but for a classifier.
        tokens = slice(SHORT_TOKENS) if self.kind == "class" else slice(-SHORT_TOKENS, None)
        rows = {key: value[:SHORT_SEQUENCES] for key, value in batch.items()}
        labels = rows.pop("labels")
        short = {key: value[:, tokens] for key, value in rows.items()}
        # The label of a token is that of the logits before it.
        return short | {"labels": labels if labels.dim() == 1 else labels[:, -SHORT_TOKENS + 1 :]}

    def summarize(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the scores of a data set from the sums of ``terms`` over its batches."""
        loss = sums[0] / sums[1]
        if self.kind == "prompt":
            return {"reward": 0.0 - loss}
        if self.kind == "completion":
            return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return {"accuracy": sums[2] / sums[1], "loss": loss}


def choice(info: ModelInfo, pad: int, word_ids: Sequence[int]) -> Task:
    """Return the task of choosing one of several label words (one token each) after a prompt."""
    # Cached per device: a copy in every forward would make the host wait for the device.
    words = cache(lambda device: torch.tensor(word_ids, device=device))

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        return _pad_left(examples, among, info, pad) | {
            "labels": torch.tensor([e.target for e in examples])
        }

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        last = _last_logits(model, batch, info, 1)[:, -1]
        return _decisions(last[:, words(last.device)], batch["labels"])

    return Task("choice", collate, terms)


def completion(info: ModelInfo, pad: int) -> Task:
    """Return the task of predicting the tokens of a completion, or of a whole text."""

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        longest = max(len(e.ids) - e.target for e in among)
        labels = torch.full((len(examples), longest), IGNORED)
        for row, e in zip(labels, examples, strict=True):
            row[longest - (len(e.ids) - e.target) :] = torch.tensor(e.ids[e.target :])
            row[[longest - len(e.ids) + i for i in e.ignored]] = IGNORED
        return _pad_left(examples, among, info, pad) | {"labels": labels}

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
    """Return the task of a sequence classifier."""

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        longest = max(len(e.ids) for e in among)
        ids = torch.full((len(examples), longest), pad)
        mask = torch.zeros_like(ids)
        for i, e in enumerate(examples):
            ids[i, : len(e.ids)], mask[i, : len(e.ids)] = torch.tensor(e.ids), 1
        labels = torch.tensor([e.target for e in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        return _decisions(_logits(model, batch, info, {}), batch["labels"])

    return Task("class", collate, terms)


def prompts(info: ModelInfo, pad: int, rewards: "Rewards") -> Task:
    """Return the task of completing prompts; ``terms`` are of the prompts' own tokens.

    A model is checked with these, which read all weights as a completion does.
    """

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        return _pad_left(examples, among, info, pad) | {
            "labels": torch.tensor([e.target for e in examples])
        }

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        logits = _logits(model, batch, info, {})
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        # The first token is rated too, by the logits at the last: a prompt may have but one.
        loss = cross_entropy(
            logits.flatten(0, 1).float(), labels.roll(-1, 1).flatten(), reduction="sum"
        )
        count = batch["attention_mask"].sum()
        return torch.stack((loss.double(), count.double(), torch.zeros_like(loss).double()))

    return Task("prompt", collate, terms, rewards)


def _pad_left(
    examples: Sequence[Example], among: Sequence[Example], info: ModelInfo, pad: int
) -> dict[str, Tensor]:
    """Return token ids and masks, ``[B, T]``, left-padded to the longest of ``among``."""
    longest = max(len(e.ids) for e in among)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    for i, e in enumerate(examples):
        ids[i, longest - len(e.ids) :], mask[i, longest - len(e.ids) :] = torch.tensor(e.ids), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in info.accepts:
        # Positions count from the first token that is not padding.
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def _logits(
    model: nn.Module, batch: Batch, info: ModelInfo, options: Mapping[str, object]
) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    fixed = {"use_cache": False} if "use_cache" in info.accepts else {}
    return model(**inputs, **fixed, **options).logits  # type: ignore[no-any-return]


def _last_logits(model: nn.Module, batch: Batch, info: ModelInfo, count: int) -> Tensor:
    """Return logits of the last ``count`` positions, ``[B, count, V]``.

    A model that accepts ``logits_to_keep`` computes no others.
    """
    options = {"logits_to_keep": count} if "logits_to_keep" in info.accepts else {}
    return _logits(model, batch, info, options)[:, -count:]


def _decisions(logits_BN: Tensor, labels: Tensor) -> Tensor:  # noqa: N803
    logits_BN = logits_BN.float()  # noqa: N806
    loss = cross_entropy(logits_BN, labels, reduction="sum").double()
    correct = (logits_BN.argmax(-1) == labels).sum().double()
    return torch.stack((loss, torch.full_like(loss, len(labels)), correct))
