"""Generated answers, and their scores: F1 over words and exact match, as SQuAD has them.

    F1 = 2 P R / (P + R),  P = shared words / words of the answer,  R = shared / words of the gold

after lower-casing and without punctuation and articles; of several gold answers the best counts
(Rajpurkar et al. 2016).
"""

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo.data import candidates
from zo.data.tasks import WHOLE, Batch, Example, Task, pad_left
from zo.model.generate import Decoding, generate, trim
from zo.model.info import ModelInfo

MAX_NEW_TOKENS = 50
"""Tokens of an answer, at most; MeZO's."""
BLANK = ord(" ")
"""Byte after the end of encoded answers that are shorter than others; JSON ignores it."""


def answering(info: ModelInfo, pad: int, tokenizer: Any) -> Task:
    """Return the task of answering in text: trained by cross-entropy, scored on greedy answers.

    An answer ends at a line break.

    Args:
        info: of a causal language model.
        pad: padding token.
        tokenizer: of the model.
    """
    trained = candidates.followed(info, pad)
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    end = {tokenizer.eos_token_id, *line_break} - {None, tokenizer.unk_token_id}
    decoding = Decoding(MAX_NEW_TOKENS, tuple(sorted(end)), pad)

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        whole = trained.collate(examples, among)
        return {
            **pad_left(examples, among, info, pad),
            "labels": _encode([e.answers for e in examples]),
            **{WHOLE + key: value for key, value in whole.items()},
        }

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        found = [
            _first_line(tokenizer.decode(trim(row, decoding.end), skip_special_tokens=True))
            for row in generate(model, batch, decoding).tolist()
        ]
        gold = _decode(batch["labels"])
        pairs = list(zip(found, gold, strict=True))
        exact = sum(max(exact_match(text, g) for g in golds) for text, golds in pairs)
        shared = sum(max(f1(text, g) for g in golds) for text, golds in pairs)
        device = batch["labels"].device
        return torch.tensor([exact, len(pairs), shared], dtype=torch.float64, device=device)

    def check(model: nn.Module, batch: Batch) -> Tensor:
        whole = {k.removeprefix(WHOLE): v for k, v in batch.items() if k.startswith(WHOLE)}
        return trained.terms(model, whole)[:2]

    return Task("answer", collate, terms, "f1", trained=trained, check=check)


def f1(answer: str, gold: str) -> float:
    """Return F1 over the words of an answer and a gold answer."""
    found, wanted = _words(answer), _words(gold)
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def exact_match(answer: str, gold: str) -> float:
    """Return 1 if an answer has the words of a gold answer in their order, else 0."""
    return float(_words(answer) == _words(gold))


def _words(text: str) -> list[str]:
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _encode(answers: Sequence[Sequence[str]]) -> Tensor:
    """Return the answers of each example as bytes of JSON, ``[B, L]``."""
    encoded = [json.dumps(list(texts)).encode() for texts in answers]
    found = torch.full((len(encoded), max(map(len, encoded))), BLANK, dtype=torch.uint8)
    for row, text in zip(found, encoded, strict=True):
        row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    return found


def _decode(answers: Tensor) -> list[list[str]]:
    return [json.loads(bytes(row)) for row in answers.tolist()]
