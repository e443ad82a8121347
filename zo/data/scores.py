"""Scores of a data set, with standard errors and figures of each class, from its examples.

The standard error of the accuracy p of n examples is sqrt(p (1 - p) / (n - 1)). The loss is a
ratio, the sum of losses over that of terms (tokens, for a completion), and its error that of a
ratio: sqrt(n / (n - 1) * sum of (l_i - loss t_i)^2) / sum of t_i, which with one term each is the
usual one of a mean.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo.data.tasks import Task
from zo.observe.history import Evaluation


def evaluation(task: Task, table: Tensor, labels: Sequence[int] | None) -> Evaluation:
    """Return the scores of a data set.

    Args:
        task: of the examples.
        table: float64 of shape ``[examples, 3]``, as :attr:`zo.data.tasks.Task.examine` returns.
        labels: class of each example; ``None`` for completions.
    """
    losses, terms, predicted = table.T
    right = [int(p) == label for p, label in zip(predicted.tolist(), labels or (), strict=False)]
    loss_sum, count = math.fsum(losses.tolist()), math.fsum(terms.tolist())
    scores = task.summarize([loss_sum, count, float(sum(right))])
    n, squares = len(table), (losses - loss_sum / count * terms).square()
    square = math.fsum(squares.tolist())  # Exact, so the same with any number of threads.
    errors = {"loss": None if n < 2 else _root(n / (n - 1) * square) / count}
    details: dict[str, Any] = {"examples": n, "standard_error": errors}
    if labels is not None:
        share = sum(right) / n
        errors |= {"accuracy": None if n < 2 else _root(share * (1 - share) / (n - 1))}
        details |= by_class(predicted.tolist(), labels, task.names)
    return Evaluation(scores, details, [] if labels is None else predicted.long().tolist())


def by_class(
    predicted: Sequence[float], labels: Sequence[int], names: Sequence[str]
) -> dict[str, Any]:
    """Return the macro F1 and for each class its examples, recall, precision and F1.

    The recall of a class is the accuracy on its examples. A figure is ``None`` where nothing
    defines it; the macro F1 is a mean over the classes that occur, in labels or predictions.
    """
    count = max(len(names), max(labels) + 1, int(max(predicted)) + 1)
    pairs = torch.tensor(labels) * count + torch.tensor(predicted).long()
    confusion = torch.bincount(pairs, minlength=count * count).view(count, count)
    found, f1s = {}, []
    given = [name.strip() for name in names]
    shown = given if len(set(given)) == count else [*map(str, range(count))]
    for k, name in enumerate(shown):
        hits, of, said = (int(confusion[k, k]), int(confusion[k].sum()), int(confusion[:, k].sum()))
        f1 = 2 * hits / (of + said) if of + said else None
        found[name] = {
            "examples": of,
            "recall": hits / of if of else None,
            "precision": hits / said if said else None,
            "f1": f1,
        }
        f1s += [] if f1 is None else [f1]
    return {"macro_f1": math.fsum(f1s) / len(f1s), "classes": found}


def _root(value: float) -> float:
    return math.sqrt(value) if value >= 0 else math.nan
