"""Are the weights still what the log makes of them? A sample of every rank's own, now and then.

Memory and disks err, and so may a rank. Each rank holds copies of ``HELD`` samples of the bytes that it stores. An
audit takes the oldest copy, replays it to the newest version and compares it with the bytes that are stored: if they
differ, that rank errs. Then it copies the next sample, compares its checksum with those of the ranks that store the
same bytes, and holds that copy in the old one's place. So a copy waits ``HELD`` audits, and an audit replays as many
entries at step 10 as at step 100,000. Samples pass over all blocks in turn. The base is not read: the first copies are
the base's, or a snapshot's whose fingerprint was checked.
"""

from collections import Counter, deque
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from zo.distributed.process_group import Mesh
from zo.errors import RankError
from zo.model.layout import GRAIN, Block, spans
from zo.state.replay import Replay
from zo.streaming.replica import Replica

SAMPLE_BYTES = 64 * GRAIN
"""Bytes of each rank that are looked at, at most."""
HELD = 8
"""Samples that a rank holds: 2 MiB, and how long an error may go unseen; the entries an audit replays grow with it."""


@dataclass(frozen=True)
class Sample:
    """Some bytes of a block."""

    block: Block
    start: int
    size_bytes: int


@dataclass(frozen=True)
class Copy:
    """A sample's bytes at a version."""

    sample: Sample
    image: Tensor
    version: int


def sample(replica: Replica, number: int) -> Sample | None:
    """The ``number``-th sample of a rank's weights: all blocks in turn, then further on in each of them."""
    own = replica.store.slice
    blocks = [block for block in replica.layout.blocks if block.trainable and own.within(block)]
    if not blocks:
        return None
    turn, which = divmod(number, len(blocks))
    within = own.within(blocks[which])
    start = within[turn * SAMPLE_BYTES % len(within) // GRAIN * GRAIN]
    return Sample(blocks[which], start, min(SAMPLE_BYTES, within.stop - start))


class Audit:
    """The samples that one rank holds."""

    def __init__(self, replica: Replica) -> None:
        """Copy the first samples; the weights must be good here: the base's, or a snapshot's that was checked."""
        self._replica, self._replay = replica, Replay(replica.log)
        replica.drain()
        self._held: deque[Copy] = deque()
        self._next = 0
        # What an earlier process left on disk is good only once a visit has held it against its checksum.
        while not replica.store.is_durable and self._next < HELD:
            self._hold(self._copied(sample(replica, self._next)))

    def _copied(self, taken: Sample | None) -> Copy | None:
        """Copy what is stored; nothing where the disk refuses, which the next visit mends."""
        if taken is None:
            return None
        image = torch.zeros(taken.size_bytes, dtype=torch.uint8)
        try:
            return Copy(taken, image, self._replica.store.peek(taken.block, taken.start, image))
        except OSError:
            return None

    def _hold(self, copy: Copy | None) -> None:
        self._next += 1
        if copy is not None:
            self._held.append(copy)

    def _newest(self, copy: Copy) -> Copy:
        """Bring a copy to the newest version, in place."""
        newest = self._replay.log.version
        self._replay.catch_up(
            copy.sample.block, copy.image, copy.sample.start, copy.version, newest
        )
        return Copy(copy.sample, copy.image, newest)

    def check(self, mesh: Mesh) -> None:
        """Look at one held sample and at a new one; every rank calls this after the same step.

        Raises:
            RankError: the weights of some ranks are not what they should be; on every rank, naming them.
        """
        self._replica.drain()
        damaged, found, block = "", "", ""
        if len(self._held) >= HELD:
            held = self._newest(self._held.popleft())
            stored = self._copied(held.sample)
            if stored is not None and _checksum(held) != _checksum(self._newest(stored)):
                damaged = held.sample.block.name
        fresh = self._copied(sample(self._replica, self._next))
        if fresh is not None:
            fresh = self._newest(fresh)
            found, block = _checksum(fresh), fresh.sample.block.name
        self._hold(fresh)
        said = mesh.collect([self._replica.store.slice.index, damaged, found, block])
        _judge([tuple(row) for row in said], self._replica.log.version)


def _judge(said: list[tuple[int, str, str, str]], version: int) -> None:
    """Raise a :class:`RankError` if a rank errs.

    Args:
        said: by rank: which slice it keeps, the block whose held sample is damaged, checksum and block of a new sample.
        version: the newest.
    """
    wrong = {rank: damaged for rank, (_, damaged, _, _) in enumerate(said) if damaged}
    differing: list[int] = []
    for index in sorted({row[0] for row in said}) if not wrong else ():
        of_slice = {
            rank: found for rank, (at, _, found, _) in enumerate(said) if at == index and found
        }
        votes = Counter(of_slice.values()).most_common()
        if len(votes) > 1 and votes[0][1] > votes[1][1]:
            wrong |= {
                rank: said[rank][3] for rank, found in of_slice.items() if found != votes[0][0]
            }
        elif len(votes) > 1:
            differing += of_slice
    remedy = (
        "remove blocks/ and snapshots/ of the run's folder if they are there, and start the same command again: base "
        "and log make the weights anew"
    )
    if wrong:
        named = ", ".join(f"rank {rank} (block {block})" for rank, block in sorted(wrong.items()))
        raise RankError(
            f"after step {version} the weights of {named} are not what the log makes of the base: its memory or disk "
            f"errs; look at that machine, {remedy}"
        )
    if differing:
        named = " and ".join(map(str, differing))
        raise RankError(
            f"after step {version} the weights of ranks {named} differ (block {said[differing[0]][3]}), and it is not "
            f"known which are wrong: memory or a disk errs; look at these machines, {remedy}"
        )


def _checksum(copy: Copy) -> str:
    """Checksum of the trainable parameters in a sample's bytes."""
    digest = xxhash.xxh3_64()
    for part, _, flat in spans(copy.sample.block, copy.image, copy.sample.start):
        if not part.parameter.spec.frozen:
            digest.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
