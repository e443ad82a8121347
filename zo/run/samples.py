"""Samples of a model's answers: some held-out prompts, what is wanted, and what the model says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zo.config.schema import MemoryConfig
from zo.data.report import short_text
from zo.data.tasks import IGNORED, Batch
from zo.io.determinism import explain_nondeterminism
from zo.observe.history import Evaluation
from zo.run.problem import Problem
from zo.streaming.replica import Replica

COUNT, NEW_TOKENS = 4, 24
"""Held-out examples that are shown, and tokens of an answer at most."""


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer."""

    prompt: str
    wanted: str
    answer: str


@dataclass(frozen=True)
class _Row:
    """A held-out example as it stands in its batch."""

    ids: list[int]
    label: int
    """Of a class."""
    start: int
    """Position of the first token with a loss, of a completion."""


def samples(
    replica: Replica, problem: Problem, evaluation: Evaluation, memory: MemoryConfig
) -> list[Sample]:
    """Return samples; every rank calls this.

    Label words and classes are those of the evaluation. A completion is the model's greedy one, of
    one forward a token, so that there are samples only where all weights stay on the device.

    Args:
        replica: the model, at the version that was evaluated.
        problem: its held-out examples and its tokenizer.
        evaluation: of it.
        memory: of the run.
    """
    task, tokenizer = problem.task, problem.tokenizer
    if task is None or tokenizer is None or (task.predict is None and not evaluation.decisions):
        return []
    rows = [row for batch in problem.dev_batches for row in _rows(batch)]
    # Of all lengths: the examples are sorted by it.
    chosen = sorted({(2 * i + 1) * len(rows) // (2 * COUNT) for i in range(COUNT)})
    some = [rows[i] for i in chosen]
    if evaluation.decisions and task.names:
        said = [task.names[evaluation.decisions[i]] for i in chosen]
        wanted = [task.names[row.label] for row in some]
        return [
            Sample(_text(tokenizer, row.ids), w.strip(), s.strip())
            for row, w, s in zip(some, wanted, said, strict=True)
        ]
    if task.predict is None or memory.store != "device":
        return []
    answers = _continue(replica, problem, [row.ids[: row.start] for row in some])
    return [
        Sample(
            _text(tokenizer, row.ids[: row.start]),
            _text(tokenizer, row.ids[row.start :]),
            _text(tokenizer, answer),
        )
        for row, answer in zip(some, answers, strict=True)
    ]


def _rows(batch: Batch) -> list[_Row]:
    """Return the examples of a micro-batch without their padding."""
    found = []
    for ids, mask, label in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        kept, start = ids[mask.bool()].tolist(), 0
        if label.dim():
            # The labels are those of the last tokens.
            start = len(kept) - len(label) + int((label != IGNORED).int().argmax())
        found.append(_Row(kept, int(label) if not label.dim() else 0, start))
    return found


@torch.no_grad()
@explain_nondeterminism()
def _continue(
    replica: Replica, problem: Problem, prompts: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Return the most likely tokens after each prompt, one at a time, without an end token."""
    task, end = problem.task, getattr(problem.tokenizer, "eos_token_id", None)
    assert task is not None
    assert task.predict is not None
    predict, answers, open_rows = (
        task.predict,
        [list[int]() for _ in prompts],
        set(range(len(prompts))),
    )
    for _ in range(NEW_TOKENS):
        if not open_rows:
            break
        sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        forward = lambda: predict(replica.model, sequences, replica.device)  # noqa: B023, E731
        (tokens,) = replica.plain([forward], 1, 1)
        for i, token in enumerate(tokens.tolist()):
            if i in open_rows and token == end:
                open_rows.remove(i)
            elif i in open_rows:
                answers[i].append(token)
    return answers


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return short_text(tokenizer.decode(ids, skip_special_tokens=True)).strip()
