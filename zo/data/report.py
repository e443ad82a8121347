"""Report of what a run trains on, for its first lines and for ``--check``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median_low
from typing import Any

from zo.data.encode import Encoded, Encoding
from zo.data.tasks import Example

SHOWN_CHARACTERS = 120
"""Characters shown of a part of the example, at most; its middle is left out."""

ENDLESS = (
    "no end-of-sequence token is trained on, for the tokenizer or its chat template has none: the "
    "model does not learn to stop"
)


@dataclass(frozen=True)
class DataReport:
    """Rows, columns, lengths and an example of a run's data."""

    train_rows: int
    dev_rows: int
    sequences: int
    """Sequences that the rows for training make."""
    columns: tuple[str, ...]
    """Columns that are used."""
    trained: str
    """What is trained on, and why."""
    median_tokens: int
    """Of a row for training, before it is cut."""
    longest_tokens: int
    max_tokens: int
    cut_rows: int
    """Rows for training with more than ``max_tokens``."""
    in_pieces: bool
    """True if these are cut in pieces, so that nothing is lost."""
    lost_ends: int
    """Rows for training whose answer is longer than ``max_tokens``, so that its end is lost."""
    example: str
    """The first sequence, in [[ ]] what is trained on."""
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as lines to print."""
        none = "none held out" + (" of so few: give data.dev" if self.train_rows < 5 else "")
        held = f"{self.dev_rows:,} held out" if self.dev_rows else none
        made = f" ({self.sequences:,} sequences)" if self.sequences != self.train_rows else ""
        lines = [
            f"data: {self.train_rows:,} rows to train on{made}, {held}; columns "
            f"{', '.join(self.columns)}",
            f"data: trained on {self.trained}",
            f"data: a row has {self.median_tokens:,} tokens (median), {self.longest_tokens:,} at "
            f"most{self._cut()}",
            f"data: the first sequence, what is trained on in [[ ]]: {self.example}",
        ]
        if self.lost_ends:
            lines.append(
                f"warning: {self.lost_ends:,} of {self.train_rows:,} answers have more than "
                f"{self.max_tokens} tokens by themselves and lost their end: raise batch.max_tokens"
            )
        return lines + [f"warning: {warning}" for warning in self.warnings]

    def _cut(self) -> str:
        if not self.cut_rows:
            return ""
        of = f"; {self.cut_rows:,} of {self.train_rows:,} rows"
        if self.in_pieces:
            return f"{of} cut in pieces of {self.max_tokens}"
        return f"{of} cut to {self.max_tokens} tokens: raise batch.max_tokens"


def make_report(
    encoding: Encoding,
    encoded: Sequence[Encoded],
    dev_rows: int,
    max_tokens: int,
    tokenizer: Any,
    names: Sequence[str],
    warnings: Sequence[str],
) -> DataReport:
    """Return the report of encoded rows.

    Args:
        encoding: made them.
        encoded: the rows for training.
        dev_rows: number of held-out rows.
        max_tokens: of a sequence.
        tokenizer: decodes the example.
        names: label words or classes, by target; empty for a language model.
        warnings: more lines.
    """
    tokens = [row.tokens for row in encoded]
    first = encoded[0].examples[0]
    return DataReport(
        train_rows=len(encoded),
        dev_rows=dev_rows,
        sequences=sum(len(row.examples) for row in encoded),
        columns=encoding.columns,
        trained=encoding.trained,
        median_tokens=median_low(tokens),
        longest_tokens=max(tokens),
        max_tokens=max_tokens,
        cut_rows=sum(count > max_tokens for count in tokens),
        in_pieces=encoding.in_pieces,
        lost_ends=sum(not row.has_end for row in encoded),
        example=mark(first, tokenizer, names),
        warnings=(
            *warnings,
            *([] if names or first.candidates or _ends(encoded, tokenizer) else [ENDLESS]),
        ),
    )


def _ends(encoded: Sequence[Encoded], tokenizer: Any) -> bool:
    """Return true if the first row that kept its end has a special token that is trained on."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    row = next((row for row in encoded if row.has_end), None)
    return row is None or any(
        e.ids[i] in special
        for pair in row.examples
        for e in pair.sides
        for i in range(e.target, len(e.ids))
        if i not in e.ignored
    )


def mark(example: Example, tokenizer: Any, names: Sequence[str]) -> str:
    """Return an example as one line of text, with what is trained on in ``[[ ]]``."""
    if example.candidates:
        followed = tokenizer.decode(example.candidates[example.target])
        return f"{short_text(tokenizer.decode(example.ids))}[[{short_text(followed)}]]"
    if names:
        return f"{short_text(tokenizer.decode(example.ids))}[[{names[example.target]}]]"
    if example.rejected is not None:
        chosen, rejected = (mark(replace(e, rejected=None), tokenizer, ()) for e in example.sides)
        return f"{chosen} rather than {rejected}"
    places = range(len(example.ids))
    parts = groupby(places, lambda i: i >= example.target and i not in example.ignored)
    shown = []
    for is_trained, part in parts:
        text = short_text(tokenizer.decode([example.ids[i] for i in part]))
        shown.append(f"[[{text}]]" if is_trained else text)
    return "".join(shown)


def short_text(text: str) -> str:
    """Return a text without line breaks and other control characters, its middle left out."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
