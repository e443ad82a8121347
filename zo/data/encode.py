"""Tokenise rows: a template and a label, a prompt and its completion, a text, or chat messages.

Sequences longer than ``batch.max_tokens`` are cut. A message about a row names its file and number.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

from zo.config.checks import template_columns
from zo.data.rows import Origin, Row, Rows, label_index, read_label
from zo.data.tasks import Example
from zo.errors import UserError


class Encoder:
    """Converts the rows of one data set to examples."""

    def __init__(self, rows: Rows, tokenizer: Any, max_tokens: int) -> None:
        """Encode ``rows`` with a tokenizer, at most ``max_tokens`` each."""
        self.rows, self.tokenizer, self.max_tokens = rows, tokenizer, max_tokens
        self.name = rows.config.name

    def word_ids(self, words: Sequence[str]) -> list[int]:
        """Return the one token of each label word.

        Raises:
            UserError: a word is several tokens.
        """
        ids = [self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        for word, tokens in zip(words, ids, strict=True):
            if len(tokens) != 1:
                pieces = self.tokenizer.convert_ids_to_tokens(tokens)
                raise UserError(
                    f"data.label_words: {word!r} is {len(tokens)} tokens {pieces}; use a word of "
                    "one token"
                )
        return [tokens[0] for tokens in ids]

    def labelled(
        self, template: str, names: Sequence[str], special_tokens: bool
    ) -> Callable[[Origin, Row], Example]:
        """Return the encoder of rows with a label, for a choice or a classifier.

        Args:
            template: used unless ``data.template`` is set.
            names: label words or class names, in the order of the targets.
            special_tokens: cut long sequences at the end; else at the start, as a choice needs.
        """
        template = self.rows.template or template
        columns = template_columns(template)
        self._need({*columns, "label"}, f"for the template {template!r}")

        def encode(origin: Origin, row: Row) -> Example:
            label = read_label(origin, row)
            target = label_index(label, names)
            if target is None:
                allowed = ", ".join(name.strip() for name in names)
                raise UserError(
                    f"{origin}: label {label!r} is not in the label set; "
                    f"use one of {allowed}, or a number from 0 to {len(names) - 1}"
                )
            text = template.format_map(
                {column: self._text(origin, row, column) for column in columns}
            )
            ids = self._ids(text, add_special_tokens=True)
            kept = ids[: self.max_tokens] if special_tokens else ids[-self.max_tokens :]
            return self._example(origin, kept, target)

        return encode

    def completion(self) -> Callable[[Origin, Row], Example]:
        """Return the encoder of rows with ``messages``, ``prompt``, ``completion`` or ``text``."""
        columns = self.rows.columns
        if "messages" in columns:
            return self._messages
        if {"prompt", "completion"} <= columns:
            return self._prompted
        label_hint = (
            "; a label needs data.template and data.label_words" if "label" in columns else ""
        )
        if "text" in columns and not label_hint:
            return lambda origin, row: self._joined(
                origin, [], self._ids(self._text(origin, row, "text"), True)
            )
        raise UserError(
            f"data.name={self.name} has columns {', '.join(sorted(columns))}; use text, prompt and "
            f"completion, or messages{label_hint}"
        )

    def _prompted(self, origin: Origin, row: Row) -> Example:
        prompt = self._ids(self._text(origin, row, "prompt"), add_special_tokens=True)
        completion = self._ids(self._text(origin, row, "completion"), add_special_tokens=False)
        end = self.tokenizer.eos_token_id
        return self._joined(origin, prompt, completion + ([] if end is None else [end]))

    def _messages(self, origin: Origin, row: Row) -> Example:
        """Encode the last message as the completion of the ones before it."""
        messages = row.get("messages")
        objects = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        if not messages or not objects or messages[-1].get("role") != "assistant":
            raise UserError(f"{origin}: messages must end with one of role assistant")
        if not self.tokenizer.chat_template:
            raise UserError(
                f"data.name={self.name} has messages, but the model's tokenizer has no chat "
                "template; use prompt and completion"
            )
        try:
            before = self.tokenizer.apply_chat_template(
                messages[:-1], tokenize=False, add_generation_prompt=True
            )
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{origin}: the model's chat template rejects the messages: {reason}"
            ) from error
        if not rendered.startswith(before):
            raise UserError(
                f"{origin}: the chat template's text of all messages does not begin with its text "
                "of the messages before the last one; use prompt and completion"
            )
        return self._joined(
            origin, self._ids(before, False), self._ids(rendered[len(before) :], False)
        )

    def _joined(self, origin: Origin, prompt: list[int], completion: list[int]) -> Example:
        """Cut to ``max_tokens``: the completion at its end, then the prompt at its start."""
        completion = completion[: self.max_tokens]
        room = self.max_tokens - len(completion)
        prompt = prompt[len(prompt) - room :] if len(prompt) > room else prompt
        if not completion:
            raise UserError(
                f"{origin}: the completion is empty, so it has no token to train on; remove the row"
            )
        # The first token of a sequence has no context, so it cannot have a loss.
        return self._example(origin, prompt + completion, max(1, len(prompt)), 2)

    def _example(self, origin: Origin, ids: list[int], target: int, least: int = 1) -> Example:
        if len(ids) < least:
            raise UserError(f"{origin} is {len(ids)} tokens; give at least {least}")
        return Example(tuple(ids), target)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _text(self, origin: Origin, row: Row, column: str) -> str:
        text = row.get(column)
        if text is None:
            raise UserError(
                f"{origin}: column {column} is empty or missing; give its text, or remove the row"
            )
        if not isinstance(text, str):
            raise UserError(f"{origin}: column {column} holds {type(text).__name__}, not text")
        return text

    def _need(self, columns: set[str], why: str) -> None:
        if missing := columns - self.rows.columns:
            raise UserError(
                f"data.name={self.name} has columns {', '.join(sorted(self.rows.columns))}, not "
                f"{', '.join(sorted(missing))} {why}; rename the columns or change data.template"
            )
