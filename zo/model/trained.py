"""The parameters that are trained: those whose names match patterns; the others are frozen."""

from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from zo.errors import UserError
from zo.model.blocks import layer_lists, pattern, tied

SHOWN = 4
"""Names that a message shows for a pattern that matches none."""


def train_only(model: nn.Module, patterns: str | None) -> None:
    """Let the parameters that match be trained, and freeze the others.

    A tied parameter is trained if one of its names matches.

    Args:
        model: ``requires_grad`` of its parameters is *set in place*; they may be on meta.
        patterns: ``model.train``; ``None`` leaves the model as it is.

    Raises:
        UserError: a pattern matches no parameter.
    """
    if patterns is None:
        return
    unused = dict.fromkeys(part.strip() for part in patterns.split("|"))
    every = tuple(unused)
    for names in tied(model, trainable=None):
        parameters = {id(p): p for p in map(model.get_parameter, names)}
        found = [p for p in every if any(fnmatchcase(name, p) for name in names)]
        # Quantised weights are read, never trained.
        found = found if all(p.is_floating_point() for p in parameters.values()) else []
        for parameter in parameters.values():
            parameter.requires_grad_(bool(found))
        for part in found:
            unused.pop(part, None)
    for part in unused:
        lists = layer_lists(model)
        known = dict.fromkeys(pattern(name, lists) for name, _ in model.named_parameters())
        near = get_close_matches(part, known, n=SHOWN, cutoff=0.0)
        raise UserError(
            f"model.train={patterns!r}: {part} matches no parameter; use patterns of names such "
            f"as {', '.join(near)}"
        )
