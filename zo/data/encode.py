"""Tokenise rows: a label after a template, a completion after its prompt, conversations, texts.

A sequence has ``batch.max_tokens`` at most: a longer one loses the start of its prompt, and only
an answer that is longer by itself loses its end; a text is cut in pieces. A message about a row
names its file and number.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from zo.config.checks import template_columns
from zo.data.chat import Chat, Sample, read_turns
from zo.data.files import Origin, Row
from zo.data.rows import Rows, label_index, read_label
from zo.data.tasks import Example
from zo.errors import UserError

INSTRUCTIONS = ("instruction", "question", "query", "prompt", "INSTRUCTION")
INPUTS = ("input", "context")
ANSWERS = ("output", "response", "answer", "completion", "RESPONSE")
SYSTEMS = ("system", "system_prompt")


class Encoded(NamedTuple):
    """A row as examples."""

    examples: list[Example]
    tokens: int
    """Tokens of the row before it was cut."""
    has_end: bool = True
    """False if an answer was cut at its end."""


class Encoding(NamedTuple):
    """The encoder that fits the columns of a data set."""

    encode: Callable[[Origin, Row], Encoded]
    columns: tuple[str, ...]
    """The columns that it reads."""
    trained: str
    """Phrase: what is trained on, and why."""
    in_pieces: bool = False
    """True if what is too long is cut in pieces."""


class Encoder:
    """Converts the rows of one data set to examples."""

    def __init__(self, rows: Rows, tokenizer: Any, max_tokens: int, vocab_size: int) -> None:
        """Encode ``rows`` with a tokenizer, at most ``max_tokens`` each."""
        self.rows, self.tokenizer, self.max_tokens = rows, tokenizer, max_tokens
        self.name, self._vocab_size = rows.config.name, vocab_size
        self._start, self._end = (
            getattr(tokenizer, f"{which}_token_id", None) for which in ("bos", "eos")
        )

    def single_word_ids(self, words: Sequence[str], reason: str) -> list[int]:
        """Return the one token of each label word.

        Raises:
            UserError: a word is several tokens, or has none of the model's vocabulary; ``reason``
                says why it must be one.
        """
        found = self.word_ids(words)
        for word, ids in zip(words, found, strict=True):
            if len(ids) != 1:
                pieces = self.tokenizer.convert_ids_to_tokens(ids)
                raise UserError(
                    f"data.label_words: {word!r} is {len(ids)} tokens {pieces}, and {reason}; use "
                    "a word of one token"
                )
        return [ids[0] for ids in found]

    def word_ids(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the tokens of each label word.

        Raises:
            UserError: a word has no token of the model's vocabulary.
        """
        found = [tuple(self._ids(word)) for word in words]
        for word, ids in zip(words, found, strict=True):
            if not ids:
                raise UserError(f"data.label_words: {word!r} is 0 tokens; use another word")
            self._check_vocabulary("data.label_words", ids)
        return found

    def warnings_of(self, words: Sequence[str]) -> list[str]:
        """Return a warning if a space in front would make another token of a label word."""
        if (self.rows.template or " ")[-1].isspace():
            return []
        bare = [w for w in words if not w[0].isspace() and self._ids(w) != self._ids(f" {w}")]
        spaced = ",".join(f"'{'' if word[0].isspace() else ' '}{word}'" for word in words)
        return [
            f"data.label_words: {word!r} has no leading space, and does not occur so after a word; "
            f'use data.label_words="[{spaced}]"'
            for word in bare[:1]
        ]

    def labelled(
        self,
        template: str,
        names: Sequence[str],
        is_classifier: bool,
        words: Sequence[tuple[int, ...]] = (),
    ) -> Encoding:
        """Return the encoding of rows with a label, for a choice or a classifier.

        Args:
            template: used unless ``data.template`` is set.
            names: label words or class names, in the order of the targets.
            is_classifier: cut long sequences at the end; else at the start, as a choice needs.
            words: tokens of the label words, if they are to stand in the examples.
        """
        template = self.rows.template or template
        columns = template_columns(template)
        self._need({*columns, "label"}, f"for the template {template!r}")

        def encode(origin: Origin, row: Row) -> Encoded:
            target = self.target(origin, row, names)
            text = template.format_map({c: self._text(origin, row, c) for c in columns})
            ids = self._ids(text, special_tokens=True)
            if words:
                return Encoded([self.followed(origin, ids, words, target)], len(ids))
            kept = ids
            if len(ids) > self.max_tokens and is_classifier:
                kept = self.tokenizer(text, truncation=True, max_length=self.max_tokens)[
                    "input_ids"
                ]
            elif len(ids) > self.max_tokens:
                kept = [ids[i] for i in self._kept(ids, len(ids))]
            return Encoded([self._example(origin, kept, target)], len(ids))

        shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
        why = "the model is a sequence classifier" if is_classifier else "rows have a label"
        what = "class" if is_classifier else "label word"
        trained = f"the {what} after {template!r}, one of {shown}: {why}"
        return Encoding(encode, (*columns, "label"), trained)

    def target(self, origin: Origin, row: Row, names: Sequence[str]) -> int:
        """Return the index of a row's label among label words or class names.

        Raises:
            UserError: it is missing, or not among them.
        """
        label = read_label(origin, row)
        target = label_index(label, names)
        if target is None:
            allowed = ", ".join(name.strip() for name in names)
            raise UserError(
                f"{origin}: label {label!r} is not in the label set; "
                f"use one of {allowed}, or a number from 0 to {len(names) - 1}"
            )
        return target

    def followed(
        self, origin: Origin, ids: Sequence[int], candidates: Sequence[tuple[int, ...]], target: int
    ) -> Example:
        """Return a prompt and what may follow it; too long a prompt loses its start.

        Raises:
            UserError: a candidate leaves the prompt no token.
        """
        longest = max(map(len, candidates))
        if longest >= self.max_tokens:
            raise UserError(
                f"{origin}: an answer has {longest} tokens, and batch.max_tokens={self.max_tokens} "
                f"has no room for a prompt before it; use at least {longest + 1}"
            )
        room = self.max_tokens - longest
        kept = [ids[i] for i in self._kept(ids, len(ids), room)]
        self._check_vocabulary(str(origin), [token for c in candidates for token in c])
        return replace(self._example(origin, kept, target), candidates=tuple(candidates))

    def language(self) -> Encoding:
        """Return the encoding of rows without a label, by the names of their columns.

        Raises:
            UserError: the columns fit none.
        """
        columns = self.rows.columns
        if columns >= {"chosen", "rejected"}:
            used = tuple(c for c in ("prompt", "chosen", "rejected") if c in columns)
            how = "pairs: the chosen answer is to become likelier than the rejected one"
            return Encoding(self._pair, used, how)
        for key in ("messages", "conversations"):
            if key in columns:
                how = "every turn of the assistant, by the tokenizer's chat template"
                return Encoding(partial(self._conversation, key), (key,), how)
        if columns >= {"prompt", "completion"}:
            how = "the completion of each prompt"
            return Encoding(self._prompted, ("prompt", "completion"), how)
        ask, answer, system, more = (
            next((column for column in known if column in columns), "")
            for known in (INSTRUCTIONS, ANSWERS, SYSTEMS, INPUTS)
        )
        if ask and answer:
            has_chat = bool(self.tokenizer.chat_template)
            by = "by the tokenizer's chat template" if has_chat else "under ### Response:"
            return Encoding(
                partial(self._instructed, ask, answer, system, more),
                tuple(column for column in (system, ask, more, answer) if column),
                f"the {answer} of each {ask}, {by}",
            )
        hint = ""
        if "label" in columns:
            hint = "; a label needs data.template and data.label_words"
        elif self.rows.template and self.rows.label_words:
            hint = (
                "; label is missing, which data.template and data.label_words need: name it with "
                "data.columns={label: ...}, or set both to null"
            )
        if "text" in columns and not hint:
            return Encoding(self._pieces, ("text",), "every token of each text", in_pieces=True)
        raise UserError(
            f"data.name={self.name} has columns {', '.join(sorted(columns))}; use text, prompt and "
            f"completion, prompt and chosen and rejected, instruction and output, or messages{hint}"
        )

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self.tokenizer, self._ids, self.name)

    def _conversation(self, key: str, origin: Origin, row: Row) -> Encoded:
        turns = read_turns(origin, row.get(key), self._shown(key))
        return self._answered(origin, self._chat.samples(origin, turns))

    def _prompted(self, origin: Origin, row: Row) -> Encoded:
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            first, key = len(prompt), self._shown("completion")
            turns = read_turns(origin, prompt + completion, key, first)
            return self._answered(origin, self._chat.samples(origin, turns, first))
        prompt = self._text(origin, row, "prompt")
        return self._completed(origin, prompt, self._answer(origin, row, "completion"))

    def _pair(self, origin: Origin, row: Row) -> Encoded:
        """Encode a prompt with a chosen and a rejected answer, as texts or as messages."""
        names = ("chosen", "rejected")
        if any(isinstance(row.get(name), list) for name in names):
            sides = self._pair_of_turns(origin, row, names)
        else:
            prompt = self._text(origin, row, "prompt")
            sides = [self._completed(origin, prompt, self._answer(origin, row, n)) for n in names]
        for name, side in zip(names, sides, strict=True):
            if len(side.examples) > 1:
                raise UserError(
                    f"{origin}: the chat template writes earlier turns of the assistant in another "
                    f"way than the last, so that {self._shown(name)} is several sequences; let it "
                    "have one turn of the assistant"
                )
        (chosen,), (rejected,) = (side.examples for side in sides)
        tokens, has_ends = max(side.tokens for side in sides), all(side.has_end for side in sides)
        return Encoded([replace(chosen, rejected=rejected)], tokens, has_ends)

    def _pair_of_turns(self, origin: Origin, row: Row, names: Sequence[str]) -> list[Encoded]:
        """Encode two answers as messages, or two conversations; trained from where they part."""
        answers = [a if isinstance(a := row.get(n), list) and a else [None] for n in names]
        before, opening = row.get("prompt"), answers[0][0]
        if isinstance(before, str) and isinstance(opening, dict):
            asks = opening.get("role") == "assistant"
            before = [{"role": "user", "content": before}] if asks else []
        before = before if isinstance(before, list) else []
        said = [before + answer for answer in answers]
        parts = (i for i, (a, b) in enumerate(zip(*said, strict=False)) if a != b)
        first = min(next(parts, len(said[0])), *(len(turns) - 1 for turns in said))
        first = max(first, len(before))
        sides = []
        for name, turns in zip(names, said, strict=True):
            found = read_turns(origin, turns, self._shown(name), first)
            sides.append(self._answered(origin, self._chat.samples(origin, found, first)))
        return sides

    def _instructed(
        self, ask: str, answer: str, system: str, more: str, origin: Origin, row: Row
    ) -> Encoded:
        """Encode a row of an instruction and its answer; columns ``system``, ``more`` may be ""."""
        said, wanted = self._text(origin, row, ask), self._answer(origin, row, answer)
        about, given = (
            self._text(origin, row, column) if row.get(column) else "" for column in (system, more)
        )
        if self.tokenizer.chat_template:
            turns = [
                {"role": "system", "content": about},
                {"role": "user", "content": f"{said}\n\n{given}" if given else said},
                {"role": "assistant", "content": wanted},
            ]
            return self._answered(origin, self._chat.samples(origin, turns[0 if about else 1 :]))
        headed = [about, f"### Instruction:\n{said}", given and f"### Input:\n{given}"]
        prompt = "\n\n".join(part for part in (*headed, "### Response:\n") if part)
        return self._completed(origin, prompt, wanted)

    def _completed(self, origin: Origin, prompt: str, completion: str) -> Encoded:
        before, after = self._ids(prompt, special_tokens=True), self._ended(self._ids(completion))
        trained = [False] * len(before) + [True] * len(after)
        return self._answered(origin, [(before + after, trained)])

    def _answered(self, origin: Origin, samples: Sequence[Sample]) -> Encoded:
        """Return samples as examples of at most ``max_tokens``, which keep the last answer."""
        examples, has_end = [], True
        for ids, trained in samples:
            starts = (i for i, now in enumerate(trained) if now and not (i and trained[i - 1]))
            kept = self._kept(ids, max(starts, default=0))
            # The first token of a sequence has no context, so it cannot have a loss.
            losses = [i for i in range(1, len(kept)) if trained[kept[i]]]
            if not losses:
                raise UserError(
                    f"{origin}: the completion is empty, so it has no token to train on; remove "
                    "the row"
                )
            ignored = set(range(losses[0], len(kept))).difference(losses)
            cut = [ids[i] for i in kept]
            examples.append(self._example(origin, cut, losses[0], tuple(sorted(ignored))))
            has_end &= kept[-1] == len(ids) - 1
        return Encoded(examples, max(len(ids) for ids, _ in samples), has_end)

    def _pieces(self, origin: Origin, row: Row) -> Encoded:
        """Cut a text in pieces; every token but the first has a loss in one of them.

        A piece begins with the token before it, or with the text's start-of-sequence token.
        """
        text = self._answer(origin, row, "text")
        ids = self._ended(self._ids(text, special_tokens=True))
        (first, *rest), room = ids, self.max_tokens - 1
        if not rest:
            raise UserError(f"{origin} is 1 token; give at least 2")
        examples = []
        for at in range(0, len(rest), room):
            context = rest[at - 1] if at and first != self._start else first
            examples.append(self._example(origin, [context, *rest[at : at + room]], 1))
        return Encoded(examples, len(ids))

    def _kept(self, ids: Sequence[int], answer: int, count: int | None = None) -> list[int]:
        """Return the ``count`` positions to keep of a sequence, ``max_tokens`` by default.

        They are its start-of-sequence token and its end, but not less than the first tokens of
        what begins at ``answer``.
        """
        count = self.max_tokens if count is None else count
        if len(ids) <= count:
            return list(range(len(ids)))
        head = int(answer > 0 and count > 1 and ids[0] == self._start)
        room = count - head
        start = min(answer, len(ids) - room)
        return [*range(head), *range(start, start + room)]

    def _example(
        self, origin: Origin, ids: Sequence[int], target: int, ignored: tuple[int, ...] = ()
    ) -> Example:
        if not ids:
            raise UserError(f"{origin} is 0 tokens; give at least 1")
        self._check_vocabulary(str(origin), ids)
        return Example(tuple(ids), target, ignored)

    def _check_vocabulary(self, where: str, ids: Sequence[int]) -> None:
        if (largest := max(ids)) >= self._vocab_size:
            raise UserError(
                f"{where}: the tokenizer makes token {largest}, but the model's vocabulary has "
                f"{self._vocab_size}; use the tokenizer that the model was trained with"
            )

    def _ids(self, text: str, special_tokens: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special_tokens)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        """Return ids that end with the end-of-sequence token, if there is one."""
        return ids if self._end is None or ids[-1:] == [self._end] else [*ids, self._end]

    def _text(self, origin: Origin, row: Row, column: str) -> str:
        text, shown = row.get(column), self._shown(column)
        if text is None:
            wrong = f"{origin}: column {shown} is empty or missing"
            raise UserError(f"{wrong}; give its text, or remove the row")
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UserError(f"{origin}: column {shown} holds {kind}, not text; quote it in .jsonl")
        return text

    def _answer(self, origin: Origin, row: Row, column: str) -> str:
        """Return a text that is trained on, which must not be blank."""
        text = self._text(origin, row, column)
        if not text.strip():
            raise UserError(
                f"{origin}: the {self._shown(column)} is empty, so it has no token to train on; "
                "remove the row"
            )
        return text

    def _shown(self, column: str) -> str:
        """Return the user's name of a column."""
        return str((self.rows.config.columns or {}).get(column, column))

    def _need(self, columns: set[str], why: str) -> None:
        if missing := columns - self.rows.columns:
            raise UserError(
                f"data.name={self.name} has columns {', '.join(sorted(self.rows.columns))}, not "
                f"{', '.join(sorted(missing))} {why}; name them with data.columns, or change "
                "data.template"
            )
