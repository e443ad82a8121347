"""Audit of the weights during a run: samples of the stored bytes against the log and other ranks.

It finds memory and disks that fail silently. Each rank holds copies of ``HELD`` samples of the
bytes that it stores. An audit takes the oldest copy, replays it to the newest version and compares
it with the stored bytes: if they differ, this rank's weights are wrong. Then it copies the next
sample, compares its checksum with those of the ranks that store the same bytes, and holds it in
place of the old copy. So a copy waits for ``HELD`` audits, and an audit replays as many entries at
step 10 as at step 100,000. Samples pass over all blocks in turn.

Limit: the base is not read again. The first copies are the base's, or those of a snapshot whose
fingerprint was checked; a later copy is compared only with the ranks that store the same bytes. So
where one rank alone stores a slice (one rank, or ``mesh.slice`` equal to the ranks that share a
copy), an audit finds bytes that go wrong while a copy of them is held, and does not find bytes that
were already wrong when they were copied.
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
"""Bytes of a sample, at most."""
HELD = 8
"""Samples that a rank holds, 2 MiB in all.

A copy waits for so many audits; the entries that an audit replays grow with it.
"""


@dataclass(frozen=True)
class Sample:
    """A range of bytes of a block."""

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
    """Return a rank's sample of a number: all blocks in turn, then the next bytes of each."""
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
        """Copy the first samples; the weights must be the base's or a checked snapshot's."""
        self._replica, self._replay = replica, Replay(replica.log, replica.layout, replica.base)
        replica.drain()
        self._held: deque[Copy] = deque()
        self._next = 0
        # Blocks that an earlier process left on disk are verified by their first visit only.
        while not replica.store.is_durable and self._next < HELD:
            self._hold(self._copied(sample(replica, self._next)))

    def _copied(self, taken: Sample | None) -> Copy | None:
        """Return a copy of stored bytes; ``None`` on a disk error, which the next visit repairs."""
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
        """Check one held sample and take a new one; every rank calls this after the same step.

        Raises:
            RankError: the weights of some ranks are wrong; raised on every rank, naming them.
        """
        self._replica.drain()
        corrupt, found, block = "", "", ""
        if len(self._held) >= HELD:
            held = self._newest(self._held.popleft())
            stored = self._copied(held.sample)
            if stored is not None and _checksum(held) != _checksum(self._newest(stored)):
                corrupt = held.sample.block.name
        fresh = self._copied(sample(self._replica, self._next))
        if fresh is not None:
            fresh = self._newest(fresh)
            found, block = _checksum(fresh), fresh.sample.block.name
        self._hold(fresh)
        reports = mesh.collect([self._replica.store.slice.index, corrupt, found, block])
        _judge([tuple(row) for row in reports], self._replica.log.version)


def _judge(reports: list[tuple[int, str, str, str]], version: int) -> None:
    """Raise if the weights of a rank are wrong.

    Args:
        reports: by rank: its slice, the block of a held sample that is corrupt or ``""``, checksum
            and block of a new sample.
        version: the newest.

    Raises:
        RankError: a held sample is corrupt, or ranks that store the same bytes differ.
    """
    wrong = {rank: corrupt for rank, (_, corrupt, _, _) in enumerate(reports) if corrupt}
    differing: list[int] = []
    for index in sorted({row[0] for row in reports}) if not wrong else ():
        of_slice = {
            rank: found for rank, (at, _, found, _) in enumerate(reports) if at == index and found
        }
        votes = Counter(of_slice.values()).most_common()
        if len(votes) > 1 and votes[0][1] > votes[1][1]:
            wrong |= {
                rank: reports[rank][3] for rank, found in of_slice.items() if found != votes[0][0]
            }
        elif len(votes) > 1:
            differing += of_slice
    remedy = (
        "remove blocks/ and snapshots/ of the run's folder if they exist, and start the same "
        "command again: the weights are rebuilt from the base and the log"
    )
    if wrong:
        named = ", ".join(f"rank {rank} (block {block})" for rank, block in sorted(wrong.items()))
        raise RankError(
            f"after step {version} the weights of {named} are not those of the base and the log: "
            f"faulty memory or disk; check that machine, {remedy}"
        )
    if differing:
        named = " and ".join(map(str, differing))
        raise RankError(
            f"after step {version} the weights of ranks {named} differ (block "
            f"{reports[differing[0]][3]}), and it is not known which are wrong: faulty memory or "
            f"disk; check these machines, {remedy}"
        )


def _checksum(copy: Copy) -> str:
    """Return the checksum of the trainable parameters in a sample's bytes."""
    digest = xxhash.xxh3_64()
    for part, _, flat in spans(copy.sample.block, copy.image, copy.sample.start):
        if not part.parameter.spec.frozen:
            digest.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
