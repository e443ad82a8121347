"""Shape the losses of a table before directions are estimated from them.

Only their distances from the mean, relative to one another, or only their order then counts:

    z       s = (l - mean) / standard deviation
    rank    s = rank / (n - 1) - 1/2, equal losses sharing the mean of their ranks

among the n losses of the whole table, or among those of each prompt: then a prompt that is harder
than others adds no noise. Where all losses are equal, s is zero.

Sources: Wierstra et al. 2014 (ranks, in natural evolution strategies); Qiu et al. 2025 (z-scores,
in evolution strategies at the scale of language models).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import sqrt

from zo.method.table import LossTable

Agreement = tuple[float, float]
"""Shares of (pair, prompt) whose losses differ, and whose completions are the same."""
COUNTS = 4
"""Numbers of a cell before those of its prompts: see :class:`zo.method.table.LossTable`."""


def z_scores(losses: Sequence[float]) -> list[float]:
    """Return losses less their mean, in standard deviations; zeros if all are equal."""
    mean = sum(losses) / len(losses)
    deviation = sqrt(sum((loss - mean) ** 2 for loss in losses) / len(losses))
    # The mean of equal numbers may be rounded away from them.
    if max(losses) == min(losses) or deviation == 0.0:
        return [0.0] * len(losses)
    return [(loss - mean) / deviation for loss in losses]


def ranks(losses: Sequence[float]) -> list[float]:
    """Return the ranks of losses, from -1/2 for the smallest to 1/2."""
    if len(losses) == 1:
        return [0.0]
    below = [sum(other < loss for other in losses) for loss in losses]
    equal = [sum(other == loss for other in losses) for loss in losses]
    return [(b + (e - 1) / 2) / (len(losses) - 1) - 0.5 for b, e in zip(below, equal, strict=True)]


SHAPES: dict[str, Callable[[Sequence[float]], list[float]]] = {"z": z_scores, "rank": ranks}
"""The shapes, by the name that ``estimator.shape`` takes beside ``none``."""
GROUPS = ("table", "prompt")
"""Losses that are shaped together, as ``estimator.shape_per`` names them."""


def shape(table: LossTable, name: str, per: str) -> LossTable:
    """Return a filled table with shaped losses.

    Args:
        table: a cell may have the loss of each of its prompts after its first ``COUNTS`` numbers.
        name: one of ``SHAPES``.
        per: one of ``GROUPS``. Where cells have no losses by prompt, a micro-batch is a prompt.
    """
    assert table.values is not None
    values, shaping = table.values.clone(), SHAPES[name]
    if per == "table":
        means = table.row_losses() if table.is_full else _cell_means(table)
        shaped = shaping(means)
        of_cells = [shaped[row] for row, _ in table.cells] if table.is_full else shaped
        values[:, 0] = values[:, 1] * values.new_tensor(of_cells)
        return replace(table, values=values)
    by_prompt = prompt_losses(table)
    for first in range(0, len(table.cells), table.height):
        column = by_prompt[first : first + table.height]
        shaped_by_prompt = [shaping(losses) for losses in zip(*column, strict=True)]
        for at, of_cell in enumerate(zip(*shaped_by_prompt, strict=True)):
            count = float(values[first + at, 1])
            values[first + at, 0] = count * sum(of_cell) / len(of_cell)
    return replace(table, values=values)


def prompt_losses(table: LossTable) -> list[list[float]]:
    """Return the losses of each cell's prompts, or its mean loss alone, in the order of cells."""
    found = [prompts for _, prompts in map(_split, table.cell_values())]
    return found if all(found) else [[mean] for mean in _cell_means(table)]


def outputs(table: LossTable) -> list[list[float]]:
    """Return for each cell a number of each prompt's completion: equal completions have equal."""
    return [cell[COUNTS + len(prompts) :] for cell, prompts in map(_split, table.cell_values())]


def _split(cell: list[float]) -> tuple[list[float], list[float]]:
    return cell, cell[COUNTS : COUNTS + (len(cell) - COUNTS) // 2]


def _cell_means(table: LossTable) -> list[float]:
    return [cell[0] / cell[1] if cell[1] else 0.0 for cell in table.cell_values()]


def agreement(table: LossTable, pairs: Sequence[tuple[int, int]]) -> Agreement | None:
    """Return how far two probes of a pair agree on the prompts that both see.

    Args:
        table: filled.
        pairs: rows.

    Returns:
        The shares of (pair, prompt) whose losses differ, and whose completions are the same;
        ``None`` if the table has no losses by prompt.
    """
    losses, written = prompt_losses(table), outputs(table)
    if not all(written):
        return None
    place = {cell: number for number, cell in enumerate(table.cells)}
    differ, same, count = 0, 0, 0
    for one, other in pairs:
        for column in range(table.columns):
            a, b = place.get((one, column)), place.get((other, column))
            if a is None or b is None:
                continue
            count += len(losses[a])
            differ += sum(x != y for x, y in zip(losses[a], losses[b], strict=True))
            same += sum(x == y for x, y in zip(written[a], written[b], strict=True))
    return differ / count, same / count
