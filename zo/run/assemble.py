"""Assembly of a model for training, scores or export: find and check its blocks, fill its store."""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo.config.schema import Config, EstimatorConfig
from zo.data.tasks import Batch
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.host_memory import return_freed_memory
from zo.method.part import fewest_layers, layers_reached
from zo.model.blocks import find_layout, layer_names, layer_of
from zo.model.form import forward_order, layer_places
from zo.model.held import Held
from zo.model.layout import Layout
from zo.run.problem import Problem
from zo.streaming.replica import Replica
from zo.streaming.selfcheck import Checked, move_resident, self_check

CHECKED_BATCHES = 2
"""Micro-batches of the first step that the self-check runs, at most."""


@dataclass(frozen=True)
class Structure:
    """Facts of a model that decide what a step computes; part of the log's header."""

    order: tuple[str, ...]
    """Modules that enter its groups, in the order of the forward."""
    layers: tuple[int, ...]
    """Places of its layers in that order, without those that the loss does not use."""
    trained: range
    """Places from the first to the last module that enters a group with a trainable parameter."""
    meet: str
    written: frozenset[str]
    """See :class:`zo.model.form.Form`."""
    held: tuple[str, ...] = ()
    """Parameters that are not trained though the configuration would have it."""
    lines: tuple[str, ...] = ()
    """What a user should know of them."""

    @classmethod
    def of(cls, layout: Layout, model: nn.Module, checked: Checked, held: Held) -> "Structure":
        """Return the facts of a model that was checked on a smaller copy, where ``held`` is."""
        order = forward_order(layout, model, checked.visits)
        entered = {m for group in layout.groups if group.trainable for m in group.modules}
        places = [at for at, module in enumerate(order) if module in entered]
        trained = range(places[0], places[-1] + 1)
        idle = {layer_of(name, layer_names(model)) for name in held.unused}
        layers = tuple(at for at in layer_places(model, order) if order[at] not in idle)
        names = tuple(sorted(held.unused | held.elsewhere))
        form = checked.meet, checked.written
        return cls(order, layers, trained, *form, names, tuple(held.lines(model)))

    def fork(self, part: str, step: int, seed: int) -> int:
        """Return the place of the first module that a step's directions reach.

        Raises:
            UserError: the model has too few layers.
        """
        reached = layers_reached(part, step, seed, len(self.layers))
        start = self._first_place(reached)
        if part == "auto" and start >= self.trained.stop:
            start = 0
        # Below the first trained module all cells are the same computation.
        return max(self.trained.start, start)

    def _first_place(self, reached: int | None) -> int:
        """Return the place of the first module of so many top layers and what follows them."""
        if reached is None:
            return 0
        return self.layers[-reached] if reached else self.layers[-1] + 1

    def check(self, settings: EstimatorConfig, layout: Layout) -> None:
        """Check what an estimator asks of the model.

        Raises:
            UserError: the model has too few layers, none that is trained, or no matrix.
        """
        self.fork(settings.part, 1, 0)
        least = fewest_layers(settings.part, len(self.layers))
        if least is not None and self._first_place(least) >= self.trained.stop:
            raise UserError(
                f"estimator.part={settings.part} has steps that reach no trained parameter; use "
                "estimator.part=all, or train parameters of the top with model.train"
            )
        parts = (part for block in layout.blocks for part in block.parts)
        matrices = any(len(part.parameter.spec.shape) >= 2 for part in parts)
        if settings.distribution == "rank-one" and not matrices:
            raise UserError(
                "estimator.distribution=rank-one is of matrices, and the model has none; use "
                "estimator.distribution=rademacher"
            )

    def header(self) -> dict[str, Any]:
        """Return what the log's header says of it."""
        held = {"held": list(self.held)} if self.held else {}
        return {
            "order": list(self.order),
            "meet": self.meet,
            "written": sorted(self.written),
            **held,
        }


def trained_header(config: Config) -> dict[str, Any]:
    """Return what the log's header says of training that not every run has."""
    found: dict[str, Any] = {}
    if config.model.train is not None:
        found["train"] = config.model.train
    if config.peft.type is not None:
        found["peft"] = asdict(config.peft)
    if config.update.anchor:
        found["anchor"] = config.update.anchor
    return found


def log_header(
    config: Config, replica: Replica, problem: Problem, structure: Structure
) -> dict[str, Any]:
    """Return the header of a new log."""
    return {
        "base": replica.store.base,
        "data": problem.data_checksum,
        "directions": config.directions,
        "distribution": config.estimator.distribution,
        "rule": config.update.name,
        "seed": config.run.seed,
        "weight_decay": config.update.weight_decay,
        **structure.header(),
        **trained_header(config),
    }


def assemble(
    problem: Problem,
    config: Config,
    mesh: Mesh,
    folder: Path,
    phase: Callable[[str], AbstractContextManager[None]],
    writable: bool = True,
) -> tuple[Replica, Structure]:
    """Check a model against its plain forward and fill its store; every rank calls this.

    Args:
        problem: the model, and micro-batches to check it with.
        config: of the run.
        mesh: of the ranks; a store keeps this rank's slice.
        folder: of a disk store's blocks.
        phase: shows what is done inside of it, if that takes long.
        writable: whether a disk store may write there.

    Returns:
        The weights at version 0, which :meth:`zo.streaming.replica.Replica.open` gives a log, and
        what was found of the model.

    Raises:
        UserError: the model cannot be split into blocks, its weights cannot be read, or there is
            not enough memory or disk.
    """
    columns = range(min(CHECKED_BATCHES, config.batch.columns))
    batches = [to_device(problem.batches(0, column), mesh) for column in columns]
    forwards = [_forward(problem, batch) for batch in batches]
    probed = _short_forwards(problem, batches)
    models = [model for model in (problem.narrow, problem.skeleton) if model is not None]
    unit = config.memory.unit
    with phase("checking that block-by-block forwards equal plain forwards, bit for bit"):
        distribution = config.estimator.distribution
        # What the user names to be trained, or gives as a model, is trained or refused.
        may_hold = config.model.train is None and not problem.own
        checked = self_check(models, forwards, mesh.device, distribution, unit, probed, may_hold)
    held = checked.held.hold(problem.skeleton)
    gc.collect()  # The copies of the check, before the weights take their memory.
    return_freed_memory()
    layout = find_layout(problem.skeleton, unit, checked.merged, checked.resident)
    model = problem.build()
    checked.held.hold(model)
    structure = Structure.of(layout, problem.skeleton, checked, held)
    size = sum(b.size_bytes for b in layout.blocks) / 2**20
    with phase(f"loading weights: {size:,.1f} MiB"), mesh.agreed():
        replica = Replica(
            model,
            layout,
            problem.base,
            config.memory,
            mesh.device,
            folder,
            writable=writable,
            slices=mesh.slices,
        )
    if mesh.slices is not None:
        replica.exchange_digests()
    move_resident(model, mesh.device)
    return replica, structure


def _short_forwards(
    problem: Problem, batches: Sequence[Batch]
) -> dict[torch.dtype, list[Callable[[nn.Module], Tensor]]]:
    """Return micro-batches to check probes with, for a model in float64 and in float32.

    Cells of a whole one, all at once and in float64, could take more memory than the run.
    """
    short = batches if problem.task is None else [problem.task.shorten(b) for b in batches]
    return {
        torch.float64: [_forward(problem, _widen(batch)) for batch in short],
        torch.float32: [_forward(problem, batch) for batch in short],
    }


def _forward(problem: Problem, batch: Batch) -> Callable[[nn.Module], Tensor]:
    return lambda model: (problem.check or problem.objective)(model, batch)


def _widen(batch: Batch) -> Batch:
    return {key: v.double() if v.is_floating_point() else v for key, v in batch.items()}


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """Return a micro-batch on the device of this rank."""
    return {key: value.to(mesh.device, non_blocking=True) for key, value in batch.items()}
