"""Tasks: examples, their collation into micro-batches, and their losses.

    choice       a prompt and the label word that follows it      cross-entropy over the label words
    mask         a text with a mask and the label word in it      cross-entropy over the label words
    candidates   a prompt and several texts that may follow it    cross-entropy over the candidates
    completion   a text, or a prompt and its completion           cross-entropy of the completion
    class        a text and its class, for a classifier           cross-entropy over the classes
    answer       a question whose answer is generated             F1 (:mod:`zo.data.answers`)
    pair         a prompt, a better and a worse answer            see :mod:`zo.data.pairs`
    prompt       a prompt that the model completes                a reward: see zo/data/rewards.py

A candidate counts by the mean log-likelihood of its tokens. Losses are computed from logits in
float32, never taken from the model: several families return a loss in bf16, whose spacing is larger
than two probes' difference. Shapes: B sequences, T tokens, N words, classes or candidates, R rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zo.config.objective import LIKELIHOOD
from zo.data.rewards import Rewards
from zo.errors import UserError
from zo.model.info import ModelInfo

Batch = Mapping[str, Tensor]
TARGETS = ("labels", "target", "rows", "right", "places", "reference")
"""Keys of a micro-batch that are not arguments of the model."""
WHOLE = "whole."
"""Prefix of the keys of a second micro-batch in one: the same examples as completions."""
IGNORED = -100
"""Label of tokens without a loss."""
SHORT_SEQUENCES, SHORT_TOKENS = 2, 16
"""Sequences, and tokens of each, that show how a model computes."""
UNSTEADY = range(5, 12)
"""Rows of a float32 product on CPU whose bits may depend on the number of threads: oneMKL's did
with 5, 6, 7, 9, 10 and 11 rows, and with no larger number. Ranks share the cores, so that a short
micro-batch would have other bits on another mesh."""


@dataclass(frozen=True)
class Example:
    """One tokenised example."""

    ids: tuple[int, ...]
    target: int
    """Index of the label or of the candidate to train on; for a completion, the position of the
    first token with a loss; for a prompt to be completed, its number among all."""
    ignored: tuple[int, ...] = ()
    """Positions after ``target`` without a loss: what stands between an assistant's turns."""
    candidates: tuple[tuple[int, ...], ...] = ()
    """Tokens of each text that may follow ``ids``."""
    right: tuple[int, ...] = ()
    """Indices of the candidates that count as right; by default ``target`` alone."""
    answers: tuple[str, ...] = ()
    """Texts that count as right where an answer is generated."""
    rejected: "Example | None" = None
    """The same prompt with the answer that is to become less likely than this one."""

    def followed(self) -> "Example":
        """Return the completion of ``ids`` by the candidate to train on."""
        return self.candidate(self.target)

    def candidate(self, number: int) -> "Example":
        """Return the completion of ``ids`` by one candidate."""
        return Example(self.ids + self.candidates[number], len(self.ids))

    @property
    def sides(self) -> "tuple[Example, ...]":
        """The sequences that a micro-batch holds of it: one, or chosen and rejected."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def length(self) -> int:
        """Tokens of its longest sequence."""
        return max(len(side.ids) for side in self.sides)


@dataclass(frozen=True)
class Task:
    """Collation, loss and scores of one kind of example."""

    kind: str
    collate: Callable[[Sequence[Example], Sequence[Example]], Batch]
    """Make a micro-batch of examples; the second ones, among which they are, decide its length."""
    terms: Callable[[nn.Module, Batch], Tensor]
    """Return float64 of shape ``[3]``: sum of losses, number of terms, sum of scores, which are
    correct decisions if ``score`` is accuracy; of pairs also the sum of margins."""
    score: str = ""
    """Name of the mean of the scores; empty if there are none."""
    examine: Callable[[nn.Module, Batch], Tensor] | None = None
    """Return float64 of shape ``[B, 3]``: of each example the sum of losses, the number of terms
    and the class decided for (-1 of a completion); ``None``: ``terms`` alone can be scored."""
    predict: Callable[[nn.Module, Sequence[Sequence[int]], torch.device], Tensor] | None = None
    """Return the most likely token after each of some sequences, int64 of shape ``[B]``."""
    names: tuple[str, ...] = ()
    """The label words or classes, by label."""
    template: str | None = None
    """Prompt of an example with a label word."""
    trained: "Task | None" = None
    """What is trained in its place, of the same examples; ``None``: itself."""
    by_score: bool = False
    """True if 1 minus the score is minimised."""
    check: Callable[[nn.Module, Batch], Tensor] | None = None
    """What shows how a model computes on a micro-batch, where the objective has few values."""
    width: int = 3
    """Numbers that ``terms`` returns."""
    has_encoder: bool = False
    """True if an encoder takes what is before an example's ``target``; padding is on the right."""
    rewards: Rewards | None = None
    """What rewards the completions of prompts; the steps and scores of such a task are of these."""

    def objective(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of losses and the number of terms; float64 of shape ``[2]``."""
        if self.trained is not None:
            return self.trained.objective(model, batch)
        sums = self.terms(model, batch)
        return torch.stack((sums[1] - sums[2], sums[1])) if self.by_score else sums[:2]

    def checked(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return a loss that depends on every bit of the logits; float64 of shape ``[2]``."""
        task = self.trained or self
        return task.check(model, batch) if task.check else task.terms(model, batch)[:2]

    def collate_trained(self, examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        """Make a micro-batch to train on; as ``collate`` makes one to score."""
        return (self.trained or self).collate(examples, among)

    def minimising(self, name: str) -> "Task":
        """Return the task with the objective ``objective.name``.

        Raises:
            UserError: the task has no such score.
        """
        if name == LIKELIHOOD:
            return self
        if name != self.score:
            known = [LIKELIHOOD, *([self.score] if self.score else [])]
            raise UserError(
                f"objective.name={name} does not fit this data, whose score is "
                f"{self.score or 'the loss'}; use {' or '.join(known)}"
            )
        return replace(self, trained=None, by_score=True)

    def shorten(self, batch: Batch) -> Batch:
        """Return a part of a micro-batch with tokens that have a loss, to check a model with."""
        # Padding is on the right where the whole text is read, else on the left.
        reads_all = self.kind in ("class", "mask") or self.has_encoder
        tokens = slice(SHORT_TOKENS) if reads_all else slice(-SHORT_TOKENS, None)
        short = {}
        for key, value in batch.items():
            kept, name = value[:SHORT_SEQUENCES], key.removeprefix(WHOLE)
            if name == "labels" and kept.dim() == 2 and (key != name or self.kind != "answer"):
                # The label of a token is that of the logits before it, but in a decoder's own.
                kept = kept[:, tokens if self.has_encoder else slice(1 - SHORT_TOKENS, None)]
            elif name not in TARGETS:
                kept = kept[:, tokens]
            short[key] = kept
        if "places" in short:
            short["places"] = short["places"].clamp(max=SHORT_TOKENS - 1)
        if "rows" in short:  # Two candidates of the first example.
            rows = torch.arange(len(short["labels"]), device=short["rows"].device).view(1, -1)
            short |= {"rows": rows, "right": rows == 0, "target": torch.zeros_like(rows[:, 0])}
        return short

    def summarize(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the scores of a data set from the sums of ``terms`` over its batches."""
        if self.kind == "prompt":
            return {"reward": 0.0 - sums[0] / sums[1]}
        first, mean = sums[0] / sums[1], sums[2] / sums[1]
        if self.kind == "completion":
            return {"loss": first, "perplexity": math.exp(min(first, 700.0))}
        found = {self.score: mean, "exact_match" if self.kind == "answer" else "loss": first}
        return found | ({"margin": sums[3] / sums[1]} if self.kind == "pair" else {})


def choice(info: ModelInfo, pad: int, word_ids: Sequence[int]) -> Task:
    """Return the task of choosing one of several label words (one token each) after a prompt."""
    # Cached per device: a copy in every forward would make the host wait for the device.
    words = cache(lambda device: torch.tensor(word_ids, device=device))

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        return pad_left(examples, among, info, pad) | {
            "labels": torch.tensor([e.target for e in examples])
        }

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        last = _last_logits(model, batch, info, 1)[:, -1]
        return decisions(last[:, words(last.device)], batch["labels"])

    def examine(model: nn.Module, batch: Batch) -> Tensor:
        last = _last_logits(model, batch, info, 1)[:, -1]
        return each_decision(last[:, words(last.device)], batch["labels"])

    return Task("choice", collate, terms, "accuracy", examine)


def masked(info: ModelInfo, pad: int, word_ids: Sequence[int], mask_id: int) -> Task:
    """Return the task of choosing one of several label words (one token each) for a mask."""
    words = cache(lambda device: torch.tensor(word_ids, device=device))

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        places = torch.tensor([e.ids.index(mask_id) for e in examples])
        return _pad_right(examples, among, pad) | {"places": places}

    def at_mask(model: nn.Module, batch: Batch) -> Tensor:
        logits = logits_of(model, batch, info, {})
        numbers = torch.arange(len(logits), device=logits.device)
        return logits[numbers, batch["places"]][:, words(logits.device)]

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        return decisions(at_mask(model, batch), batch["labels"])

    def examine(model: nn.Module, batch: Batch) -> Tensor:
        return each_decision(at_mask(model, batch), batch["labels"])

    return Task("mask", collate, terms, "accuracy", examine)


def completion(info: ModelInfo, pad: int) -> Task:
    """Return the task of predicting the tokens of a completion, or of a whole text."""

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        return collate_answers(examples, among, info, pad)

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        return terms_of(answer_losses(model, batch, info, "sum"), batch["labels"])

    def examine(model: nn.Module, batch: Batch) -> Tensor:
        sums = answer_losses(model, batch, info).sum(1, dtype=torch.float64)
        terms = (batch["labels"] != IGNORED).sum(1).to(sums)
        return torch.stack((sums, terms, torch.full_like(sums, -1)), 1)

    def predict(
        model: nn.Module, sequences: Sequence[Sequence[int]], device: torch.device
    ) -> Tensor:
        examples = [Example(tuple(ids), 0) for ids in sequences]
        padded = pad_left(examples, examples, info, pad)
        batch = {key: value.to(device) for key, value in padded.items()}
        return _last_logits(model, batch, info, 1)[:, -1].argmax(-1)

    return Task("completion", collate, terms, "", examine, predict)


def collate_answers(
    examples: Sequence[Example], among: Sequence[Example], info: ModelInfo, pad: int
) -> Batch:
    """Return sequences with the labels of their answers, ``[B, longest answer]``, as a batch."""
    longest = max(len(e.ids) - e.target for e in among)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, e in zip(labels, examples, strict=True):
        row[longest - (len(e.ids) - e.target) :] = torch.tensor(e.ids[e.target :])
        row[[longest - len(e.ids) + i for i in e.ignored]] = IGNORED
    return pad_left(examples, among, info, pad) | {"labels": labels}


def answer_losses(
    model: nn.Module, batch: Batch, info: ModelInfo, reduction: str = "none"
) -> Tensor:
    """Return the losses of the labels, ``[B, T]`` with 0 where there is none, or their sum."""
    labels = batch["labels"]
    logits = _last_logits(model, batch, info, labels.shape[1] + 1)[:, :-1]
    return label_losses(logits, labels, reduction)


def label_losses(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Return the losses of labels ``[B, T]``, 0 where there is none (``none``), or their ``sum``.

    Args:
        logits: ``[B, T, V]``.
        labels: int64, ``IGNORED`` where there is none.
        reduction: ``none`` or ``sum``.
    """
    losses = cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
    )
    return losses if reduction == "sum" else losses.view(labels.shape)


def terms_of(loss: Tensor, labels: Tensor) -> Tensor:
    """Return the terms (see :class:`Task`) of a sum of losses of labels, which have no score."""
    count = (labels != IGNORED).sum()
    return torch.stack((loss.double(), count.double(), torch.zeros_like(loss).double()))


def classification(info: ModelInfo, pad: int) -> Task:
    """Return the task of a sequence classifier."""

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        return _pad_right(examples, among, pad)

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        return decisions(logits_of(model, batch, info, {}), batch["labels"])

    def examine(model: nn.Module, batch: Batch) -> Tensor:
        return each_decision(logits_of(model, batch, info, {}), batch["labels"])

    return Task("class", collate, terms, "accuracy", examine)


def steady_length(sequences: int, length: int) -> int:
    """Return a length of at least ``length`` whose products have no :data:`UNSTEADY` rows."""
    few = sequences * length in UNSTEADY
    return -(-UNSTEADY.stop // sequences) if few else length


def _pad_right(
    examples: Sequence[Example], among: Sequence[Example], pad: int
) -> dict[str, Tensor]:
    """Return token ids, masks, ``[B, T]``, right-padded to the longest of ``among``, and labels."""
    longest = steady_length(len(examples), max(len(e.ids) for e in among))
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    for i, e in enumerate(examples):
        ids[i, : len(e.ids)], mask[i, : len(e.ids)] = torch.tensor(e.ids), 1
    labels = torch.tensor([e.target for e in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pad_left(
    examples: Sequence[Example], among: Sequence[Example], info: ModelInfo, pad: int
) -> dict[str, Tensor]:
    """Return token ids and masks, ``[B, T]``, left-padded to the longest of ``among``."""
    longest = steady_length(len(examples), max(len(e.ids) for e in among))
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    for i, e in enumerate(examples):
        ids[i, longest - len(e.ids) :], mask[i, longest - len(e.ids) :] = torch.tensor(e.ids), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in info.accepts:
        # Positions count from the first token that is not padding.
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def logits_of(
    model: nn.Module, batch: Batch, info: ModelInfo, options: Mapping[str, object]
) -> Tensor:
    """Return a model's logits of a micro-batch."""
    inputs = {
        key: value
        for key, value in batch.items()
        if key not in TARGETS and not key.startswith(WHOLE)
    }
    fixed = {"use_cache": False} if "use_cache" in info.accepts else {}
    return model(**inputs, **fixed, **options).logits  # type: ignore[no-any-return]


def _last_logits(model: nn.Module, batch: Batch, info: ModelInfo, count: int) -> Tensor:
    """Return logits of the last ``count`` positions, ``[B, count, V]``.

    A model that accepts ``logits_to_keep`` computes no more than :func:`steady_length` asks for.
    """
    kept = steady_length(len(batch["input_ids"]), count)
    options = {"logits_to_keep": kept} if "logits_to_keep" in info.accepts else {}
    return logits_of(model, batch, info, options)[:, -count:]


def decisions(logits_BN: Tensor, labels: Tensor) -> Tensor:  # noqa: N803
    """Return the terms of choosing among N words or classes (see :class:`Task`)."""
    logits_BN = logits_BN.float()  # noqa: N806
    loss = cross_entropy(logits_BN, labels, reduction="sum").double()
    correct = (logits_BN.argmax(-1) == labels).sum().double()
    return torch.stack((loss, torch.full_like(loss, len(labels)), correct))


def each_decision(logits_BN: Tensor, labels: Tensor) -> Tensor:  # noqa: N803
    """Return of each example its loss, 1 and the class decided for, ``[B, 3]``."""
    loss = cross_entropy(logits_BN.float(), labels, reduction="none").double()
    return torch.stack((loss, torch.ones_like(loss), logits_BN.argmax(-1).to(loss)), 1)
