"""The form of a model's probes: decided by the model alone, and recorded in the log's header."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from zo.model.blocks import layer_lists, pattern
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
    order: tuple[int, ...] = ()
    """Groups of the layout in the order of the forward."""
    positions: tuple[int, ...] = ()
    """For each block the place of its group in that order."""
    of_parameter: Mapping[str, int] | None = None
    """The same by a parameter's first name."""

    @classmethod
    def of(cls, header: Mapping[str, Any], layout: Layout) -> "Form":
        """Return the form that a log was written with."""
        order = tuple(header.get("order") or range(len(layout.groups)))
        place = {group: position for position, group in enumerate(order)}
        of_parameter = {
            part.parameter.name: place[group.index]
            for group in layout.groups
            for part in group.parts
        }
        return cls(
            header["seed"],
            header["distribution"],
            header.get("meet", ""),
            frozenset(header.get("written", ())),
            order,
            tuple(layout.positions(order)),
            of_parameter,
        )

    @property
    def corrects(self) -> bool:
        """True if probes are corrections, so that blocks are never written for them."""
        return self.meet != ""


def forward_order(
    layout: Layout, model: nn.Module, first_visits: Collection[str]
) -> tuple[int, ...]:
    """Return the groups of a layout in the order of the forward.

    Args:
        layout: of ``model``.
        model: the model; not computed with.
        first_visits: modules of a smaller copy's groups, in the order of their first visits.
    """
    lists = layer_lists(model)
    ranks: dict[str, int] = {}
    for module in first_visits:
        ranks.setdefault(pattern(module, lists), len(ranks))

    def place(index: int) -> tuple[int, int]:
        known = [
            ranks[p] for m in layout.groups[index].modules if (p := pattern(m, lists)) in ranks
        ]
        return min(known, default=len(ranks)), index

    return tuple(sorted(range(len(layout.groups)), key=place))


def layer_positions(layout: Layout, model: nn.Module, order: Collection[int]) -> list[int]:
    """Return the positions of a model's layers in an order of its groups."""
    layers = {f"{name}.{i}" for name, of in layer_lists(model).items() for i in range(len(of))}
    return [
        position
        for position, index in enumerate(order)
        if layers & set(layout.groups[index].modules)
    ]
