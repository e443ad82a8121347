"""Prompts whose completions are rewarded: their text, their tokens, and their task.

A prompt is a row's ``prompt`` (a text, or messages, which the tokenizer's chat template writes), or
``data.template`` with the row's columns. One that is too long loses its start.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from zo.config.checks import template_columns
from zo.config.schema import Config
from zo.data import countdown, gsm8k, tasks
from zo.data.encode import Encoded, Encoding
from zo.data.files import Origin, Row
from zo.data.report import DataReport, make_report
from zo.data.rewards import Reward, Rewards
from zo.data.rows import Rows
from zo.data.tasks import Batch, Example, Task
from zo.errors import UserError, one_line
from zo.model.generate import Decoding, end_tokens
from zo.model.info import ModelInfo

TEMPLATES = {"countdown": countdown.TEMPLATE, "gsm8k": gsm8k.TEMPLATE}
"""Templates of rewards that zo brings, for rows that have no column ``prompt``."""


def build_prompts(
    rows: Rows, config: Config, tokenizer: Any, info: ModelInfo, pad: int, reward: str
) -> tuple[Task, list[Example], list[Example], DataReport]:
    """Return the task of a reward, its prompts for training, the held-out ones, and a report.

    Args:
        rows: of the data.
        config: of the run.
        tokenizer: of the model.
        info: facts of the model.
        pad: padding token.
        reward: name of the reward.

    Raises:
        UserError: a row lacks what the prompt is made of.
    """
    generation, max_tokens = config.generation, config.batch.max_tokens
    template = rows.template or ("" if "prompt" in rows.columns else TEMPLATES.get(reward, ""))
    prompter = Prompter(rows, tokenizer, template, generation.chat, info.vocab_size)
    numbered = [*rows.numbered_train, *rows.numbered_dev]
    texts = [prompter.text(*row) for row in numbered]
    encoded = [
        prompter.encode(origin, text, number, max_tokens)
        for number, ((origin, _), text) in enumerate(zip(numbered, texts, strict=True))
    ]
    decoding = Decoding(
        generation.max_new_tokens,
        end_tokens(tokenizer, info),
        pad,
        generation.temperature,
        config.run.seed,
    )
    function = Reward(reward, config.objective.timeout_s)
    task = prompting(info, pad, Rewards(function, decoding, tokenizer, texts, numbered))
    how = f"temperature {decoding.temperature:g}" if decoding.temperature else "greedy"
    trained = (
        f"the reward {reward} of what the model writes after each prompt: {how}, at most "
        f"{decoding.max_new_tokens} tokens"
    )
    encoding = Encoding(
        lambda origin, row: prompter.encode(origin, prompter.text(origin, row), 0, max_tokens),
        prompter.columns,
        trained,
    )
    count, examples = len(rows.numbered_train), [row.examples[0] for row in encoded]
    # The first prompt's number, 0, stands for what is written after it.
    shown = ["what the model writes"]
    dev_rows = len(rows.numbered_dev)
    report = make_report(encoding, encoded[:count], dev_rows, max_tokens, tokenizer, shown, ())
    return task, examples[:count], examples[count:], report


def prompting(info: ModelInfo, pad: int, rewards: Rewards) -> Task:
    """Return the task of completing prompts; ``terms`` are of the prompts' own tokens.

    A model is checked with these, which read all weights as a completion does.
    """

    def collate(examples: Sequence[Example], among: Sequence[Example]) -> Batch:
        return tasks.pad_left(examples, among, info, pad) | {
            "labels": torch.tensor([e.target for e in examples])
        }

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        logits = tasks.logits_of(model, batch, info, {})
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, tasks.IGNORED)
        # The first token is rated too, by the logits at the last: a prompt may have but one.
        return tasks.terms_of(tasks.label_losses(logits, labels.roll(-1, 1), "sum"), labels)

    return Task("prompt", collate, terms, rewards=rewards)


class Prompter:
    """Makes the prompts of rows."""

    def __init__(
        self, rows: Rows, tokenizer: Any, template: str, chat: bool, vocab_size: int
    ) -> None:
        """Check that rows have the columns that prompts are made of.

        Args:
            rows: of the data.
            tokenizer: of the model.
            template: of a prompt; empty: the column ``prompt``.
            chat: let the tokenizer's chat template write texts as a user's turn.
            vocab_size: of the model.

        Raises:
            UserError: they lack one, or the tokenizer has no chat template.
        """
        self._tokenizer, self._template, self._chat = tokenizer, template, chat
        self._vocab_size = vocab_size
        self.columns = tuple(template_columns(template)) if template else ("prompt",)
        if missing := {*self.columns} - rows.columns:
            raise UserError(
                f"data.name={rows.config.name} has columns {', '.join(sorted(rows.columns))}, not "
                f"{', '.join(sorted(missing))}, of which the prompts of a reward are made; set "
                "data.template, or name them with data.columns"
            )
        if chat and not tokenizer.chat_template:
            raise UserError(
                "generation.chat=true needs a chat template, and the model's tokenizer has none; "
                "use an instruction-tuned model's tokenizer, or generation.chat=false"
            )

    def text(self, origin: Origin, row: Row) -> str:
        """Return the prompt of a row as the model sees it.

        Raises:
            UserError: a column is missing, or is neither text nor a number nor a list of these.
        """
        values = {column: self._value(origin, row, column) for column in self.columns}
        text = self._template.format_map(values) if self._template else values["prompt"]
        if self._chat and not isinstance(row.get("prompt"), list):
            return self._rendered(origin, [{"role": "user", "content": text}])
        return text

    def _value(self, origin: Origin, row: Row, column: str) -> str:
        value = row.get(column)
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            return self._rendered(origin, value)
        parts = value if isinstance(value, list) and value else [value]
        if any(isinstance(part, bool) or not isinstance(part, str | int | float) for part in parts):
            raise UserError(
                f"{origin}: column {column} must hold a text, a number or a list of them for the "
                f"prompt, not {type(value).__name__}; give its text, or remove the row"
            )
        return ", ".join(map(str, parts))

    def _rendered(self, origin: Origin, messages: list[dict[str, Any]]) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            reason = one_line(error, 300)
            raise UserError(
                f"{origin}: the model's chat template rejects the prompt: {reason}"
            ) from error
        return text

    def encode(self, origin: Origin, text: str, number: int, max_tokens: int) -> Encoded:
        """Return a prompt, by its number among all, with at most ``max_tokens`` tokens.

        Raises:
            UserError: it is empty, or has a token that the model does not have.
        """
        start = self._tokenizer.bos_token_id
        is_rendered = bool(self._tokenizer.chat_template) and text.startswith(
            self._tokenizer.bos_token or "\0"
        )
        ids = list(self._tokenizer(text, add_special_tokens=not is_rendered)["input_ids"])
        if not ids:
            raise UserError(f"{origin}: the prompt is empty; give its text, or remove the row")
        if (largest := max(ids)) >= self._vocab_size:
            raise UserError(
                f"{origin}: the tokenizer makes token {largest}, but the model's vocabulary has "
                f"{self._vocab_size}; use the tokenizer that the model was trained with"
            )
        kept = ids
        if len(ids) > max_tokens:
            head = ids[:1] if ids[0] == start else []
            kept = head + ids[len(ids) - max_tokens + len(head) :]
        return Encoded([Example(tuple(kept), number)], len(ids))
