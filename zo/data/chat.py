"""Conversations: rows of several forms as turns, and turns as tokens with those to train on.

A turn is a mapping with ``role`` and ``content``, as chat templates take it.
"""

import re
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

from zo.data.files import Origin
from zo.errors import UserError, one_line

Turn = dict[str, Any]
Sample = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is trained on."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Roles of ShareGPT's form by the names that it has for them; others keep theirs."""
REJECTIONS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    RecursionError,
)
"""Raised by a template for turns that it is not made for."""
MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\b")


def read_turns(origin: Origin, said: object, key: str, first: int = 0) -> list[Turn]:
    """Return the turns of a row's ``messages`` or ShareGPT's ``conversations``.

    Turns after the last one of role assistant are left out: nothing is trained on them.

    Args:
        origin: of the row.
        said: a list of ``{role, content}`` or ``{from, value}``.
        key: column, for messages.
        first: number of the first turn to train on.

    Raises:
        UserError: it has another form, no turn of role assistant, or an empty one.
    """
    turns = []
    for message in said if isinstance(said, list) and said else [None]:
        # Files are read as tables, whose missing fields are None.
        turn = (
            {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        )
        role = turn.pop("from", None) or turn.get("role")
        if not isinstance(role, str):
            raise UserError(
                f"{origin}: {key} must be a list of objects with role and content, or with from "
                "and value"
            )
        content = turn.pop("value", None) or turn.get("content", "")
        turns.append({**turn, "role": ROLES.get(role, role), "content": content})
    while len(turns) > first and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) <= first:
        raise UserError(f"{origin}: {key} must hold a turn of role assistant to train on")
    for number, turn in enumerate(turns, 1):
        if turn["role"] == "assistant" and not turn["content"] and "tool_calls" not in turn:
            raise UserError(f"{origin}: turn {number} of {key}, the assistant's, is empty")
    return turns


class Chat:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any, tokenize: Callable[[str], list[int]], name: str) -> None:
        """Check that there is a template.

        Args:
            tokenizer: the model's.
            tokenize: returns the ids of a text, without special tokens of its own.
            name: ``data.name``, for messages.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise UserError(
                f"data.name={name} has messages, but the model's tokenizer has no chat template; "
                "use an instruction-tuned model's tokenizer, or prompt and completion"
            )
        self.tokenizer, self._tokenize = tokenizer, tokenize

    @cached_property
    def _marks_assistant(self) -> bool:
        """True if the template marks the assistant's tokens, and the tokenizer can find them."""
        template = self.tokenizer.get_chat_template()
        return bool(self.tokenizer.is_fast and MARKS_ASSISTANT.search(template))

    def samples(self, origin: Origin, turns: list[Turn], first: int = 0) -> list[Sample]:
        """Return turns as tokens, those of the assistant to be trained on.

        The template's own marks of the assistant's tokens are used where it has any. Otherwise its
        texts of the turns up to an assistant's, without and with that one, tell where it is. A
        template that writes earlier turns in another way than the last one, without their
        reasoning, for example, gives a sample for each assistant's turn, as the model sees it when
        it answers.

        Args:
            origin: of the row.
            turns: as from :func:`read_turns`.
            first: number of the first turn that is trained on.

        Raises:
            UserError: the template rejects the turns.
        """
        try:
            if self._marks_assistant and not first:
                return [self._marked(turns)]
            asked = [k for k in range(first, len(turns)) if turns[k]["role"] == "assistant"]
            before = [self._render(turns[:k], add_generation_prompt=True) for k in asked]
            through = [self._render(turns[: k + 1]) for k in asked]
        except REJECTIONS as error:
            reason = one_line(error, 300)
            raise UserError(
                f"{origin}: the model's chat template rejects the messages: {reason}"
            ) from error
        texts = list(zip(before, through, strict=True))
        if not all(after.startswith(text) for text, after in texts):
            raise UserError(
                f"{origin}: the chat template's text of all messages does not begin with its text "
                "of the messages before the last one; use prompt and completion"
            )
        whole = all(b[0].startswith(a[1]) for a, b in pairwise(texts))
        return [self._sample(texts)] if whole else [self._sample([pair]) for pair in texts]

    def _sample(self, texts: list[tuple[str, str]]) -> Sample:
        """Return the sample of texts that each begin with the one before them."""
        ids: list[int] = []
        trained: list[bool] = []
        done = ""
        for before, through in texts:
            for text, is_trained in ((before[len(done) :], False), (through[len(before) :], True)):
                found = self._tokenize(text)
                ids += found
                trained += [is_trained] * len(found)
            done = through
        return ids, trained

    def _marked(self, turns: list[Turn]) -> Sample:
        found = self.tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True
        )
        trained = [bool(mark) for mark in found["assistant_masks"]]
        return list(found["input_ids"]), trained

    def _render(self, turns: list[Turn], add_generation_prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text
