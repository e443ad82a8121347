"""Parameters that are held as they are, because a loss does not use them or no visit serves them.

A model that also sees images trains its text alone: nothing calls its vision tower. A parameter
that is read outside of its block, as the relative embeddings that every layer shares may be, stays
on the device.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from torch import nn

from zo.errors import UserError
from zo.model.blocks import (
    callables,
    callers,
    find_layout,
    is_around,
    kind_of,
    layer_lists,
    layer_names,
    layer_of,
    tied,
    unserved,
)
from zo.model.reads import Forward, out_of_block_reads, used

SHOWN = 4
"""Modules and parameters that a line names."""


class Held(NamedTuple):
    """Names of parameters of a small copy of a model."""

    unused: frozenset[str] = frozenset()
    """They are not read."""
    elsewhere: frozenset[str] = frozenset()
    """They are read outside of their blocks, or belong to modules that contain the layers."""

    def hold(self, model: nn.Module) -> "Held":
        """Freeze what they stand for in a model, in every layer of the same kind.

        Args:
            model: the copy or its original; ``requires_grad`` is *set in place*.

        Returns:
            The names that are frozen by it.
        """
        twins = {
            f"{name}.{i}": f"{name}.{kinds.index(kind)}"
            for name, members in layer_lists(model).items()
            for kinds in [[kind_of(member) for member in members]]
            for i, kind in enumerate(kinds)
        }

        def twin(name: str) -> str:
            layer = layer_of(name, twins)
            return name if layer is None else twins[layer] + name[len(layer) :]

        found: tuple[set[str], set[str]] = (set(), set())
        for names in tied(model):
            for known, held in zip(self, found, strict=True):
                if any(twin(name) in known for name in names):
                    held.update(names)
        for name in found[0] | found[1]:
            model.get_parameter(name).requires_grad_(False)
        return Held(*map(frozenset, found))

    def lines(self, model: nn.Module) -> list[str]:
        """Return what a user should know of the names of this model, one line a reason."""
        reasons = (
            "the loss does not use it",
            "it is read outside of its block or is beside the layers",
        )
        return [
            f"not trained, because {why}: {_shortened(model, names)}"
            for why, names in zip(reasons, self, strict=True)
            if names
        ]


NOTHING = Held()


def find_held(small: nn.Module, forwards: Sequence[Forward], may_hold: bool) -> Held:
    """Return the trainable parameters to hold, and hold them in this model.

    Args:
        small: a small copy of a model; ``requires_grad`` is *set in place*.
        forwards: micro-batches.
        may_hold: hold what no visit serves; else only what is not used.

    Raises:
        UserError: no parameter is left to train.
    """
    trained = [name for names in tied(small) for name in names]
    found = Held(unused=frozenset(_unused(small, forwards))).hold(small)
    if trained and not tied(small):
        raise UserError(
            f"the loss uses none of the parameters to train ({_shortened(small, trained)}); name "
            "others with model.train"
        )
    if not may_hold:
        return found
    around = Held(elsewhere=frozenset(name for names in unserved(small) for name in names))
    around.hold(small)
    frozen = {name for names in tied(small, trainable=False) for name in names}
    read = out_of_block_reads(small, find_layout(small), forwards) - frozen
    more = Held(elsewhere=frozenset(read)).hold(small)
    return Held(found.unused, around.elsewhere | more.elsewhere)


def _unused(model: nn.Module, forwards: Sequence[Forward]) -> Iterable[str]:
    """Yield the trainable parameters that no forward reads, of modules that none calls."""
    called, read = used(model, forwards)
    lists, layers, callable_ = layer_lists(model), layer_names(model), set(callables(model))
    for names in tied(model):
        homes = {layer_of(name, layers) or callers(name, callable_)[-1] for name in names}
        is_idle = not called & homes or any(is_around(home, lists) for home in homes)
        if is_idle and not read.intersection(names):
            yield from names


def _shortened(model: nn.Module, names: Collection[str]) -> str:
    """Return names as one phrase: a module stands for all of its parameters."""
    whole = {
        module
        for module, of in model.named_modules()
        if module and {f"{module}.{leaf}" for leaf, _ in of.named_parameters()} <= set(names)
    }
    shown = dict.fromkeys(
        next(iter(callers(name, whole)), name)
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name in names
    )
    first = ", ".join(list(shown)[:SHOWN])
    return first + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")
