"""Prompts for an encoder, and completions or label words for its decoder.

    choice       a prompt and its label word      cross-entropy over the label words
    completion   a prompt and its completion      cross-entropy of the completion

The model's own helper shifts the decoder's tokens. An example is the prompt and, from ``target``
on, the completion. Both are padded on the right, where positions do not notice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo.data.encode import Encoded, Encoder, Encoding
from zo.data.files import Origin
from zo.data.tasks import (
    IGNORED,
    Batch,
    Example,
    Task,
    decisions,
    each_decision,
    label_losses,
    terms_of,
)
from zo.errors import UserError
from zo.model.info import ModelInfo


class PairEncoder(Encoder):
    """Converts the rows of one data set to prompts and completions, ``max_tokens`` each."""

    def choice(
        self, template: str, names: Sequence[str], info: ModelInfo, pad: int
    ) -> tuple[Task, Encoding]:
        """Return the task and the encoding of rows with a label word for the decoder.

        Raises:
            UserError: a word is several tokens.
        """
        reason = "the decoder of an encoder-decoder model makes one"
        words = self.single_word_ids(names, reason)
        task = choice(pad, words, self.lead(names[0], words[0]))
        return task, self.labelled(template, names, is_classifier=False)

    def lead(self, word: str, word_id: int) -> list[int]:
        """Return the special tokens that stand before a label word in the decoder."""
        ids = self._target_ids(word)
        return ids[: ids.index(word_id)] if word_id in ids else []

    def warnings_of(self, words: Sequence[str]) -> list[str]:
        """Return none: a word stands alone in the decoder, so no space belongs in front of it."""
        return []

    def language(self) -> Encoding:
        """Return the encoding of rows without a label, by the names of their columns.

        Raises:
            UserError: the columns fit none, or do not hold pairs.
        """
        remedy = "give columns prompt and completion, or text and label with data.label_words"
        found = None
        if not self.rows.columns & {"messages", "conversations"}:
            found = super().language()
        if found is None or found.in_pieces:
            raise UserError(
                f"data.name={self.name} has columns {', '.join(sorted(self.rows.columns))}, and "
                f"the model has an encoder and a decoder, which take pairs; {remedy}"
            )
        return found

    def _completed(self, origin: Origin, prompt: str, completion: str) -> Encoded:
        before, after = self._ids(prompt, special_tokens=True), self._target_ids(completion)
        kept = [before[i] for i in self._kept(before, len(before))]
        ids = [*kept, *after[: self.max_tokens]]
        longest = max(len(before), len(after))
        example = self._example(origin, ids, len(kept))
        return Encoded([example], longest, len(after) <= self.max_tokens)

    def _target_ids(self, text: str) -> list[int]:
        return self._ended(list(self.tokenizer(text_target=text)["input_ids"]))


def completion(pad: int) -> Task:
    """Return the task of predicting completions in the decoder."""

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        labels = _right([e.ids[e.target :] for e in examples], [e.ids[e.target :] for e in among])
        return _prompts(examples, among, pad) | {"labels": labels}

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        return terms_of(label_losses(_logits(model, batch, labels), labels, "sum"), labels)

    return Task("completion", collate, terms, has_encoder=True)


def choice(pad: int, word_ids: Sequence[int], lead: Sequence[int]) -> Task:
    """Return the task of choosing one of several label words (one token each) in the decoder.

    Args:
        pad: token of padding.
        word_ids: of the label words.
        lead: special tokens that the decoder has before the word.
    """

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        labels = torch.tensor([e.target for e in examples])
        whole = [Example(e.ids, len(e.ids)) for e in among]
        return _prompts([Example(e.ids, len(e.ids)) for e in examples], whole, pad) | {
            "labels": labels
        }

    def of_words(model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        words = torch.tensor([*lead, *word_ids], device=labels.device)
        # The shift drops the last token, so that any word stands for all.
        logits = _logits(model, batch, words[: len(lead) + 1].expand(len(labels), -1))
        return logits[:, -1, words[len(lead) :]]

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        return decisions(of_words(model, batch), batch["labels"])

    def examine(model: nn.Module, batch: Batch) -> Tensor:
        return each_decision(of_words(model, batch), batch["labels"])

    return Task("choice", collate, terms, "accuracy", examine, has_encoder=True)


def _prompts(examples: Sequence[Example], among: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """Return token ids and masks, ``[B, T]``, padded to the longest prompt of ``among``."""
    ids = _right([e.ids[: e.target] for e in examples], [e.ids[: e.target] for e in among])
    mask = (ids != IGNORED).long()
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


def _right(rows: Sequence[Sequence[int]], among: Sequence[Sequence[int]]) -> Tensor:
    """Return rows, ``[B, T]``, with ``IGNORED`` up to the length of the longest of ``among``."""
    padded = torch.full((len(rows), max(map(len, among))), IGNORED)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return padded


def _logits(model: nn.Module, batch: Batch, labels: Tensor) -> Tensor:
    """Return the decoder's logits, ``[B, L, V]``, for labels ``[B, L]``."""
    inputs: dict[str, Any] = {key: batch[key] for key in ("input_ids", "attention_mask")}
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        inputs["labels"] = labels  # Models without the helper shift these by themselves.
    else:
        inputs["decoder_input_ids"] = shift(labels)
    return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]
