"""Checks that several groups of keys share; each raises a :class:`UserError` of one line."""

import math
import string
from typing import Any

from zo.errors import UserError


def choice(key: str, value: str, choices: Any) -> None:
    """Raise :class:`UserError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"{key}={value!r} is not known; use one of {', '.join(sorted(choices))}")


MAX_CELLS = 2**20
"""Directions, sequences, and directions times micro-batches of a step, at most. Every cell is one
forward and three float64 numbers that each rank gathers: a table of that many rows has 24 MiB, and
a step of it takes days."""
MAX_THREADS, THREADS_A_CORE = 1024, 4
"""More threads than cores gain nothing, and some tens of thousands end the process."""


def at_most(key: str, value: int, maximum: int) -> None:
    """Raise :class:`UserError` unless ``value`` is <= ``maximum``."""
    if value > maximum:
        raise UserError(f"{key}={value} is out of range; use a number of at most {maximum}")


def check_threads(threads: int, cores: int) -> None:
    """Raise :class:`UserError` if there are too many threads for a machine's cores."""
    if threads > cores * THREADS_A_CORE:
        raise UserError(
            f"run.threads={threads} is too many for the {cores} cores of this machine; use at most "
            f"{cores * THREADS_A_CORE}, or leave it empty"
        )


def template_columns(template: str) -> list[str]:
    """Return the columns that a prompt's template names.

    Raises:
        UserError: a single brace, an empty or numbered field, or a field with a format.
    """
    wrong = None
    try:
        found = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        found, wrong = [], str(error)
    columns = []
    for name, form, conversion in found:
        if form or conversion or not name or name.isdigit() or set(name) & set(".[]"):
            wrong = (
                wrong
                or f"{{{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}"
            )
        columns.append(str(name))
    if wrong:
        raise UserError(
            f"data.template={template!r} is not understood ({wrong}); write {{column}} for a "
            f"column's text, and {{{{{{{{ or }}}}}}}} for a brace"
        )
    return columns


def at_least(key: str, value: float, minimum: float) -> None:
    """Raise :class:`UserError` unless ``value`` is a finite number >= ``minimum``."""
    if (isinstance(value, float) and not math.isfinite(value)) or value < minimum:
        raise UserError(f"{key}={value} is out of range; use a number of at least {minimum}")


def number(key: str, value: Any, wanted: str = "a number") -> float:
    """Return a value as a float.

    Raises:
        UserError: it is none; ``wanted`` says what the key takes.
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key}={str(value)[:100]} is not {wanted}") from None
