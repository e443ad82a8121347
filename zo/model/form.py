"""The form of a model's probes: decided by the model alone, and recorded in the log's header."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zo.errors import UserError
from zo.model.blocks import layer_lists, layer_names, pattern
from zo.model.layout import Layout

MEETINGS = ("layer", "module", "apart")
"""Modules at which the cells of a fold meet: layers, every module with parameters, or none."""


@dataclass(frozen=True)
class Form:
    """How the probes of a model are evaluated, and which blocks a part of it holds."""

    seed: int = 0
    distribution: str = "rademacher"
    meet: str = ""
    """One of ``MEETINGS``; empty if all probes are written."""
    written: frozenset[str] = frozenset()
    """Modules whose probes are written with what is inside of them, as
    :func:`zo.model.blocks.pattern` names them."""
    order: tuple[str, ...] = ()
    """Modules that enter the layout's groups, in the order of the forward."""
    positions: tuple[int, ...] = ()
    """For each block the place in that order of the last module that enters its group."""
    of_parameter: Mapping[str, int] = field(default_factory=dict)
    """The same by a parameter's first name."""

    @classmethod
    def of(cls, header: Mapping[str, Any], layout: Layout) -> "Form":
        """Return the form that a log was written with.

        Raises:
            UserError: the log is of another model, or of another version of zo.
        """
        order = tuple(header.get("order") or _modules(layout))
        if missing := [module for module in _modules(layout) if module not in order]:
            raise UserError(
                f"the log's order of modules lacks {missing[0] or '(root)'} of this model; use the "
                "model that the log was written for"
            )
        if header.get("meet", "") not in ("", *MEETINGS):
            raise UserError(
                f"the log has meet={header['meet']!r}, which this version of zo does not know; "
                "install the one that wrote it"
            )
        last = last_places(layout, order)
        of_parameter = {
            part.parameter.name: last[group.index]
            for group in layout.groups
            for part in group.parts
        }
        return cls(
            header["seed"],
            header["distribution"],
            header.get("meet", ""),
            frozenset(header.get("written", ())),
            order,
            tuple(last[layout.group_of[block.index].index] for block in layout.blocks),
            of_parameter,
        )

    @property
    def corrects(self) -> bool:
        """True if probes are corrections, so that blocks are never written for them."""
        return self.meet != ""


def _modules(layout: Layout) -> list[str]:
    return [module for group in layout.groups for module in group.modules]


def last_places(layout: Layout, order: Sequence[str]) -> list[int]:
    """Return for each group the place of the last module that enters it.

    A direction of a part reaches the uses of a parameter from the part's first module on: a tied
    embedding is reached as the head that it is at the end, and looked up unchanged below.
    """
    place = {module: at for at, module in enumerate(order)}
    return [max(place[module] for module in group.modules) for group in layout.groups]


def forward_order(layout: Layout, model: nn.Module, visits: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that enter a layout's groups in the order of the forward.

    Args:
        layout: of ``model``.
        model: the model; not computed with.
        visits: the same modules of a smaller copy, in the order of their first visits.
    """
    lists = layer_lists(model)
    ranks: dict[str, int] = {}
    for module in visits:
        ranks.setdefault(pattern(module, lists), len(ranks))
    # Sorting is stable: modules of one pattern, the layers, stay in their order. What is never
    # visited comes first, so that the last layer is the top one.
    return tuple(sorted(_modules(layout), key=lambda m: ranks.get(pattern(m, lists), -1)))


def layer_places(model: nn.Module, order: Sequence[str]) -> list[int]:
    """Return the places of a model's layers in an order of modules."""
    layers = layer_names(model)
    return [at for at, module in enumerate(order) if module in layers]
