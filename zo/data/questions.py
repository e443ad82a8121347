"""Tokenise rows that ask a question of their own: for a mask, or with answers of their own."""

from collections.abc import Sequence
from dataclasses import replace

from zo.config.checks import template_columns
from zo.data import candidates, tasks
from zo.data.answers import answering
from zo.data.encode import Encoded, Encoder, Encoding
from zo.data.files import Origin, Row
from zo.data.named import NamedRows
from zo.data.tasks import Task
from zo.errors import UserError
from zo.model.info import ModelInfo

MASK = "mask"
"""Field of a template that stands for the mask token."""


class QuestionEncoder(Encoder):
    """Converts rows of masked language models and of tasks with options to examples."""

    def _mask_id(self) -> int:
        """Return the mask token of the tokenizer.

        Raises:
            UserError: it has none.
        """
        if (found := self.tokenizer.mask_token_id) is None:
            raise UserError(
                f"the tokenizer of data.name={self.name} has no mask token, which "
                "model.task=masked-lm needs; give model.tokenizer, or use another model"
            )
        return int(found)

    def choice(
        self, template: str, names: Sequence[str], info: ModelInfo, pad: int
    ) -> tuple[Task, Encoding]:
        """Return the task and the encoding of rows with a label word after a prompt."""
        words = self.word_ids(names)
        if all(len(ids) == 1 for ids in words):
            task = tasks.choice(info, pad, [ids[0] for ids in words])
            return task, self.labelled(template, names, is_classifier=False)
        return candidates.candidates(info, pad), self.labelled(template, names, False, words)

    def masked(self, names: Sequence[str], info: ModelInfo, pad: int) -> tuple[Task, Encoding]:
        """Return the task and the encoding of rows with a label word at a mask.

        Raises:
            UserError: the template has none, or a column is missing.
        """
        template, mask = self.rows.template or "", self._mask_id()
        fields = template_columns(template)
        if fields.count(MASK) != 1:
            raise UserError(
                f"data.template={template!r} needs {{mask}} once, where model.task=masked-lm "
                "predicts the label word"
            )
        columns = [field for field in fields if field != MASK]
        self._need({*columns, "label"}, f"for the template {template!r}")

        def encode(origin: Origin, row: Row) -> Encoded:
            target = self.target(origin, row, names)
            texts = {column: self._text(origin, row, column) for column in columns}
            text = template.format_map(texts | {MASK: self.tokenizer.mask_token})
            ids = self._ids(text, special_tokens=True)
            if ids.count(mask) != 1:
                raise UserError(
                    f"{origin}: the text itself holds {self.tokenizer.mask_token}; remove it"
                )
            kept = self._around(ids, ids.index(mask))
            return Encoded([self._example(origin, kept, target)], len(ids))

        trained = f"the mask of {template!r}, one of {', '.join(map(repr, names))}"
        reason = "a masked language model predicts one at the mask"
        task = tasks.masked(info, pad, self.single_word_ids(names, reason), mask)
        return task, Encoding(encode, (*columns, "label"), trained)

    def _around(self, ids: list[int], at: int) -> list[int]:
        """Return ids cut to ``max_tokens``: first before the token ``at``, then after it.

        The first and the last token, which are special ones, stay.
        """
        excess = max(0, len(ids) - self.max_tokens)
        before = min(excess, max(0, at - 1))
        ids = ids[:1] + ids[1 + before :]
        end = len(ids) - 1
        return ids[: end - (excess - before)] + ids[end:]

    def options(self, rows: NamedRows, info: ModelInfo, pad: int) -> tuple[Task, Encoding]:
        """Return the task and the encoding of rows with options of their own.

        They are trained as MeZO trains them, by the cross-entropy of the right answer's tokens.
        """
        named, template = rows.named, rows.template or ""
        columns = template_columns(template)

        def encode(origin: Origin, row: Row) -> Encoded:
            options = rows.options(origin, row)
            text = template.format_map({c: self._text(origin, row, c) for c in columns})
            ids = self._ids(text, special_tokens=True)
            if named.generates:
                # One answer is trained on; an answer ends with its line.
                gold = tuple(self._ids(f" {options.texts[0]}\n"))
                example = self.followed(origin, ids, [gold], 0)
                example = replace(example, answers=tuple(options.texts))
            else:
                texts = [tuple(self._ids(text)) for text in options.texts]
                example = self.followed(origin, ids, texts, options.right[0])
                example = replace(example, right=tuple(options.right))
            longest = max(map(len, example.candidates))
            return Encoded([example], len(ids) + longest)

        task = candidates.candidates(info, pad)
        if named.generates:
            task = answering(info, pad, self.tokenizer)
        task = replace(task, trained=candidates.followed(info, pad))
        how = "the first answer" if named.generates else "the right one of several answers"
        used = (*named.texts, named.answer)
        return task, Encoding(encode, used, f"{how} after {template!r}")
