"""Are the weights still what the log makes of the base? A sample of every rank's own, now and then.

Memory and disks err, and so may a rank. Each rank copies a run of the bytes that it stores, brings the copy to the
newest version, and tells its checksum; where the base can be read again at once, it makes the same bytes from base and
log, which says who is wrong. Ranks that store the same bytes must agree in any case.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from zo.config import RankError
from zo.layout import GRAIN, Block, spans
from zo.process_group import Mesh
from zo.replay import Replay
from zo.replica import Replica

SAMPLE_BYTES = 64 * GRAIN
"""Bytes of each rank that are looked at, at most."""


@dataclass(frozen=True)
class Sample:
    """Some bytes of a block."""

    block: Block
    start: int
    size_bytes: int


def sample(replica: Replica, number: int) -> Sample | None:
    """The ``number``-th sample of a rank's weights: all blocks in turn, then further on in each of them."""
    own = replica.store.slice
    blocks = [block for block in replica.store.layout.blocks if block.trainable and own.within(block)]
    if not blocks:
        return None
    turn, which = divmod(number, len(blocks))
    within = own.within(blocks[which])
    start = within[turn * SAMPLE_BYTES % len(within) // GRAIN * GRAIN]
    return Sample(blocks[which], start, min(SAMPLE_BYTES, within.stop - start))


def check(replica: Replica, mesh: Mesh, number: int) -> None:
    """Compare the ranks' ``number``-th samples; every rank calls this after the same step.

    Raises:
        RankError: the weights of some ranks are not what they should be; on every rank, naming them.
    """
    replica.drain()
    taken, replay = sample(replica, number), Replay(replica.log)
    found = made = ""
    if taken is not None:
        image = torch.zeros(taken.size_bytes, dtype=torch.uint8)
        found = _brought_up(taken, image, replica.store.peek(taken.block, taken.start, image), replay)
        base = replica.base
        if base is not None and not base.costly(taken.block):
            base.read(taken.block, replica.store.layout, image, taken.start)
            base.forget()
            made = _brought_up(taken, image, 0, replay)
    said = mesh.collect([replica.store.slice.index, found, made, taken.block.name if taken else ""])
    wrong = [rank for rank, (_, ours, truth, _) in enumerate(said) if truth and ours != truth]
    for index in {row[0] for row in said} if not wrong else ():
        of_slice = {rank: ours for rank, (at, ours, _, _) in enumerate(said) if at == index}
        usual, _ = Counter(of_slice.values()).most_common(1)[0]
        wrong += [rank for rank, ours in of_slice.items() if ours != usual]
    if wrong:
        named = ", ".join(f"rank {rank} (block {said[rank][3]})" for rank in sorted(wrong))
        raise RankError(
            f"after step {replica.log.version} the weights of {named} are not what the log makes of the base: its "
            "memory or disk errs; look at that machine, remove blocks/ and snapshots/ of the run's folder if they are "
            "there, and start the same command again: base and log make the weights anew"
        )


def _brought_up(taken: Sample, image: Tensor, version: int, replay: Replay) -> str:
    """Checksum of the parameters in a sample's bytes at the newest version."""
    replay.catch_up(taken.block, image, taken.start, version, replay.log.version)
    digest = xxhash.xxh3_64()
    for part, _, flat in spans(taken.block, image, taken.start):
        if not part.parameter.spec.frozen:
            digest.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
