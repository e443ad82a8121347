"""Errors that a command prints as one line."""

import re

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What ends a line, moves a terminal's cursor, or cannot be encoded."""
MOST_CHARACTERS = 2000
"""Of a message that a user still reads."""


def one_line(what: object, most: int | None = None) -> str:
    """Return the text of an object, such as an error of a library, as one line.

    Args:
        what: its runs of white space become one space.
        most: characters that are kept; all by default.
    """
    return " ".join(str(what).split())[:most]


class UserError(ValueError):
    """Mistake that a user can correct; a command prints it as one line, exit code 2.

    A value in it may come from anyone's file: control characters become escapes, and a text of
    more than ``MOST_CHARACTERS`` loses its middle.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > MOST_CHARACTERS:
            half = MOST_CHARACTERS // 2
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(CONTROL.sub(lambda found: repr(found[0])[1:-1], text))


class RankError(RuntimeError):
    """Loss of another rank, or its silence; a command prints it as one line, exit code 1."""
