"""Log-probabilities of pairs' answers under the base model, found before the first step.

They are computed once, by plain forwards at version 0, and kept in the run's folder as
``reference.json``: the fingerprint of the base, the numbers, and a checksum of them. A run that
resumes computes those that the file lacks, all of them if it is lost, before its weights leave
version 0.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zo.config.schema import AUTO, Config
from zo.data.pairs import Reference
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.atomic import write_whole
from zo.io.determinism import explain_nondeterminism
from zo.run.evaluate import gather_terms
from zo.run.rates import JUDGED_STEPS
from zo.streaming.replica import Replica

FILE = "reference.json"
SAVED_AT_ONCE = 128
"""Answers between two writes of the file."""


@torch.no_grad()
@explain_nondeterminism()
def find_reference(
    reference: Reference | None,
    replica: Replica,
    mesh: Mesh,
    phase: Callable[[str], AbstractContextManager[None]],
    config: Config,
    folder: Path | None = None,
    is_writer: bool = False,
    steps: int | None = None,
) -> None:
    """Make the numbers known that a run's steps and the held-out data need; every rank calls it.

    Args:
        reference: *modified in place*; ``None`` for data without pairs.
        replica: not opened yet.
        mesh: of the run.
        phase: shows what is done inside of it.
        config: of the run.
        folder: of the run, if there is one.
        is_writer: write the file.
        steps: to know the numbers of; by default those of the run, and of trials of rates.

    Raises:
        UserError: the folder cannot be written.
    """
    if reference is None:
        return
    at_once = 2 * config.batch.sequences
    if steps is None:
        steps = max(config.run.steps, JUDGED_STEPS.stop if config.update.lr == AUTO else 0)
    base = replica.store.base
    kept = _read(folder / FILE, base) if folder and mesh.rank == 0 else {}
    reference.known |= mesh.broadcast(kept)
    missing = reference.missing(steps)

    def keep() -> None:
        with mesh.agreed():
            if folder and is_writer and reference.known.keys() != kept.keys():
                _write(folder / FILE, base, reference.known)

    if missing:
        said = f"log-probabilities of {len(missing):,} answers under the base model"
        with phase(said), replica.at_base():
            for first in range(0, len(missing), SAVED_AT_ONCE):
                keys, batches = zip(*missing[first : first + SAVED_AT_ONCE], strict=True)
                score = partial(reference.score, replica.model)
                found = gather_terms(score, replica, batches, mesh, at_once, width=1)
                reference.known |= dict(zip(keys, found[:, 0].tolist(), strict=True))
                keep()
    keep()


def _checksum(values: dict[str, float]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read(path: Path, base: str) -> dict[str, float]:
    """Return the numbers of a file, none if it is missing, corrupt or of another base."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, float] = content["values"]
        is_ours = (content["base"], content["sha256"]) == (base, _checksum(values))
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # It is derived: the numbers are computed again.
    return values if is_ours else {}


def _write(path: Path, base: str, values: dict[str, float]) -> None:
    content = {"base": base, "sha256": _checksum(values), "values": values}
    try:
        write_whole(path, (json.dumps(content) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; make room, or choose another run.dir"
        ) from error
