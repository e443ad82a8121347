"""Assembly of a model for training, scores or export: find and check its blocks, fill its store."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from zo.config.schema import Config
from zo.data.tasks import Batch
from zo.distributed.process_group import Mesh
from zo.model.blocks import find_layout
from zo.run.problem import Problem
from zo.streaming.replica import Replica
from zo.streaming.selfcheck import move_resident, self_check

CHECKED_BATCHES = 2
"""Micro-batches of the first step that the self-check runs, at most."""


def assemble(
    problem: Problem,
    config: Config,
    mesh: Mesh,
    folder: Path,
    phase: Callable[[str], AbstractContextManager[None]],
    writable: bool = True,
) -> Replica:
    """Check a model against its plain forward and fill its store; every rank calls this.

    Args:
        problem: the model, and micro-batches to check it with.
        config: of the run.
        mesh: of the ranks; a store keeps this rank's slice.
        folder: of a disk store's blocks.
        phase: shows what is done inside of it, if that takes long.
        writable: whether a disk store may write there.

    Returns:
        The weights at version 0; :meth:`zo.streaming.replica.Replica.open` gives them a log.

    Raises:
        UserError: the model cannot be split into blocks, its weights cannot be read, or there is
            not enough memory or disk.
    """
    columns = range(min(CHECKED_BATCHES, config.batch.columns))
    batches = [to_device(problem.batches(0, column), mesh) for column in columns]
    forwards = [lambda model, batch=batch: problem.objective(model, batch) for batch in batches]
    models = (
        [problem.narrow, problem.skeleton] if problem.narrow is not None else [problem.skeleton]
    )
    unit = config.memory.unit
    with phase("checking that block-by-block forwards equal plain forwards, bit for bit"):
        merged = self_check(models, forwards, mesh.device, config.estimator.distribution, unit)
    layout, model = find_layout(problem.skeleton, unit, merged), problem.build()
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
    return replica


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """Return a micro-batch on the device of this rank."""
    return {key: value.to(mesh.device, non_blocking=True) for key, value in batch.items()}
