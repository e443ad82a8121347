"""Choose how the cells of a fold are computed together, and check it against written probes.

A small copy of the model runs in float64: corrected and stacked, and by plain forwards of weights
that hold the probes. Only here may bits differ; the losses must agree within ``TOLERANCE``.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from zo.config.schema import MemoryConfig
from zo.io.host_memory import return_freed_memory
from zo.method.kernels.written import written_probes
from zo.method.passes import Probe
from zo.model.blocks import find_layout
from zo.model.folds import Together
from zo.model.form import MEETINGS, forward_order, layer_places
from zo.model.layout import Block, Layout
from zo.model.source import ModelSource
from zo.state.log import Log, untrained_header
from zo.streaming.replica import Replica
from zo.streaming.stores import DeviceStore

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Of losses, by the dtype of the model: tasks compute each loss in float32."""
PROBES = (Probe(0, 0.0625), Probe(0, -0.0625), Probe(1, 0.0625))
"""Far larger than any eps, so that a probe that is missing changes every loss."""
SEED = 1
PIECE = 1 << 20
"""Elements written at once."""

Forward = Callable[[nn.Module], Tensor]


def choose_meeting(
    small: nn.Module,
    forwards: Mapping[torch.dtype, Sequence[Forward]],
    device: torch.device,
    written: frozenset[str],
    visits: Sequence[str],
    resident: frozenset[str] = frozenset(),
) -> str:
    """Return where cells meet (see :class:`zo.model.form.Form`): the fastest way that is right.

    Args:
        small: a small model with weights.
        forwards: micro-batches to try, for a model in float64 and in float32.
        device: the device to compute on.
        written: modules whose probes are written with what is inside of them.
        visits: modules that enter blocks, in the order of the forward.
        resident: frozen parameters that are in no block.

    Returns:
        Empty if no way is right, so that all probes must be written.
    """
    for dtype, tolerance in TOLERANCE.items():
        model = copy.deepcopy(small).to(dtype)
        try:
            layout = find_layout(model, resident=resident)
            return _choose(model, layout, forwards[dtype], device, written, visits, tolerance)
        except RuntimeError:
            if dtype == torch.float32:
                raise
            # Some operations (grouped products of experts) have no float64.
    raise AssertionError


def _choose(
    model: nn.Module,
    layout: Layout,
    forwards: Sequence[Forward],
    device: torch.device,
    written: frozenset[str],
    visits: Sequence[str],
    tolerance: float,
) -> str:
    order = forward_order(layout, model, visits)
    layers = layer_places(model, order)
    parts = [0, layers[-1]] if layers else [0]
    with torch.no_grad():
        expected = [_written_losses(model, layout, forwards, order, part) for part in parts]
        for meet in MEETINGS:
            header: dict[str, object] = {
                "order": list(order),
                "written": sorted(written),
                "meet": meet,
            }
            try:
                found = [
                    _corrected_losses(model, layout, forwards, device, header, part)
                    for part in parts
                ]
            except (RuntimeError, ValueError, IndexError, TypeError):
                continue  # What does not stack: the next way assumes less.
            if all(_agree(a, b, tolerance) for a, b in zip(found, expected, strict=True)):
                return meet
    return ""


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    return all(
        torch.allclose(a.nan_to_num(), b.nan_to_num(), rtol=tolerance, atol=tolerance)
        for a, b in zip(found, expected, strict=True)
    )


def _corrected_losses(
    model: nn.Module,
    layout: Layout,
    forwards: Sequence[Forward],
    device: torch.device,
    header: dict[str, object],
    part: int,
) -> list[Tensor]:
    replica = _replica(model, layout, device)
    replica.open(Log(untrained_header("rank-one", SEED) | header))
    cells = [(column, row) for column in range(len(forwards)) for row in range(len(PROBES))]
    columns = [column for column, _ in cells]
    try:
        return replica.table(
            PROBES,
            [row for _, row in cells],
            [lambda forward=forwards[c]: forward(model) for c in columns],  # type: ignore[misc]
            Together(columns, columns, part),
        )
    finally:
        replica.close()
        return_freed_memory()


def _written_losses(
    model: nn.Module,
    layout: Layout,
    forwards: Sequence[Forward],
    order: Sequence[str],
    part: int,
) -> list[Tensor]:
    replica = _replica(model, layout, next(model.parameters()).device)
    replica.open(Log(untrained_header("rank-one", SEED)))
    by_row = []
    for probe in PROBES:
        with _bound_at_each_use(replica, probe, order, part):
            by_row.append([forward(model) for forward in forwards])
    replica.close()
    return_freed_memory()
    return [losses[column] for column in range(len(forwards)) for losses in by_row]


@contextmanager
def _bound_at_each_use(
    replica: Replica, probe: Probe, order: Sequence[str], part: int
) -> Iterator[None]:
    """Bind a group to weights with the probe at modules of a part, else to its stored weights.

    The probe is written at each use, so that one group's copy is in memory at a time.
    """
    hooks, store = [], replica.store
    assert isinstance(store, DeviceStore)
    for group, stored in zip(replica.layout.groups, store.groups, strict=True):
        for module in group.modules:

            def bind(
                _: nn.Module,
                __: object,
                group: Block = group,
                stored: list[Tensor] = stored,
                is_reached: bool = order.index(module) >= part,
            ) -> None:
                weights = probed(group, stored, "rank-one", probe) if is_reached else stored
                replica.binding.bind(group, weights)

            def release(*_: object, group: Block = group) -> None:
                replica.binding.release(group)
                replica.binding.forget()

            entered = replica.model.get_submodule(module)
            hooks.append(entered.register_forward_pre_hook(bind))
            hooks.append(entered.register_forward_hook(release))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        replica.binding.forget()


def probed(group: Block, stored: Sequence[Tensor], distribution: str, probe: Probe) -> list[Tensor]:
    """Return a group's flat tensors, one a segment, the trainable ones as copies with a probe."""
    found = list(stored)
    for i, segment in enumerate(group.trainable):
        found[i] = torch.empty_like(stored[i])
        # In pieces, for the equation in float64 takes several times the memory of its result.
        for start in range(0, segment.numel, PIECE):
            piece, address = stored[i][start : start + PIECE], segment.start + start
            (written,) = written_probes(
                piece, address, SEED, distribution, [probe], segment.matrices
            )
            found[i][start : start + PIECE] = written
    return found


def _replica(model: nn.Module, layout: Layout, device: torch.device) -> Replica:
    source = ModelSource(model)
    return Replica(model, layout, lambda engine: source, MemoryConfig(), device, Path())
