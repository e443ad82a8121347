"""Tables of a run's page: figures of each class, and answers before and after training."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from zo.observe.chart import short

CLASS_FIGURES = ("examples", "recall", "precision", "f1")
CLASSES_SHOWN = 100


class Answers(NamedTuple):
    """One prompt, what is wanted, and what the model said."""

    prompt: str
    wanted: str
    said: Sequence[str]
    """At each step of :class:`Said`."""


class Said(NamedTuple):
    """Samples of the first and of the last evaluation that has some."""

    steps: Sequence[int]
    rows: Sequence[Answers]


def class_rows(details: Mapping[str, Any]) -> list[list[str]]:
    """Return name and figures of each class."""
    classes = details.get("classes")
    if not isinstance(classes, dict):
        return []
    return [
        [str(name), *(_shown(figures.get(key)) for key in CLASS_FIGURES)]
        for name, figures in list(classes.items())[:CLASSES_SHOWN]
        if isinstance(figures, dict)
    ]


def with_errors(scores: Mapping[str, float], details: Mapping[str, Any]) -> list[str]:
    """Return the scores with their standard errors, as text."""
    errors = details.get("standard_error")
    errors = errors if isinstance(errors, dict) else {}
    found = []
    for name, value in [*scores.items(), ("macro F1", details.get("macro_f1"))]:
        if isinstance(value, int | float):
            error = errors.get(name)
            more = f" ± {short(error)}" if isinstance(error, int | float) else ""
            found.append(f"{name} {short(value)}{more}")
    return found


def answers(events: Iterable[Mapping[str, Any]]) -> Said:
    """Return the samples among events."""
    by_step: dict[int, dict[str, tuple[str, str]]] = {}
    for event in events:
        step, parts = event.get("step"), [event.get(k) for k in ("prompt", "wanted", "answer")]
        is_whole = event.get("kind") == "sample" and all(isinstance(p, str) for p in parts)
        if is_whole and isinstance(step, int):
            prompt, wanted, answer = map(str, parts)
            by_step.setdefault(step, {})[prompt] = wanted, answer
    steps = sorted({min(by_step), max(by_step)}) if by_step else []
    first = by_step[steps[0]] if steps else {}
    rows = [
        Answers(prompt, wanted, [by_step[step].get(prompt, ("", ""))[1] for step in steps])
        for prompt, (wanted, _) in first.items()
    ]
    return Said(steps, rows)


def _shown(value: Any) -> str:
    return short(value) if isinstance(value, int | float) else "-"
