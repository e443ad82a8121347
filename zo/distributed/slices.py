"""Slices of blocks, gathered among the ranks of a node that share one copy of the weights."""

import torch
import torch.distributed as dist
from torch import Tensor

from zo.distributed.failure import Peers


class Slices:
    """A group of ranks, each storing one slice of every block; they visit the blocks together."""

    def __init__(self, peers: Peers, index: int, of: int, device: torch.device) -> None:
        """Create the process groups; every rank of the run calls this.

        Args:
            peers: all ranks of the run.
            index: number of this rank's slice.
            of: number of ranks in a group.
            device: of the blocks that are gathered.
        """
        self.index, self.of, self._peers = index, of, peers
        self.gathered_bytes = 0
        """Bytes received from the other ranks so far."""
        for first in range(0, peers.ranks, of):
            members = list(range(first, first + of))
            # All ranks create all groups, in the same order. Two threads use one group each.
            visits = dist.new_group(members, peers.timeout, "gloo")
            bytes_of_blocks = dist.new_group(
                members, peers.timeout, "nccl" if device.type == "cuda" else "gloo"
            )
            if peers.rank in members:
                self._visits, self._bytes = visits, bytes_of_blocks

    def earliest(self, block: int | None) -> int | None:
        """Return the smallest number that a rank of the group passes; ``None`` if all pass none.

        Ranks agree before each visit, by an all-reduce of 8 bytes, not once a pass: the next block
        of a rank is known only when its forwards arrive there (a chunk of a vocabulary is visited
        only if a token of the rank's micro-batches is in it, and a rank without cells visits
        nothing by itself), so no rank can list its visits when the pass begins. A list from the
        last pass would have to be corrected by a collective in the middle of a pass, and ranks that
        found no difference would not join it.
        """
        none = torch.iinfo(torch.int64).max
        agreed = torch.tensor([none if block is None else block])
        with self._peers.together():
            dist.all_reduce(agreed, dist.ReduceOp.MIN, self._visits)
        return None if agreed.item() == none else int(agreed)

    def combine(self, digests: Tensor) -> None:
        """Fill in missing rows of ``digests`` (uint8, any shape, zeros where missing) in place."""
        with self._peers.together():
            # Ranks that have a row have the same one, and the others zeros: the maximum is the row.
            dist.all_reduce(digests, dist.ReduceOp.MAX, self._visits)

    def gather(self, image: Tensor) -> None:
        """All-gather ``image`` in place.

        Args:
            image: uint8 of shape ``[of * n]`` on the device; bytes ``[index * n, (index + 1) * n)``
                are this rank's slice.
        """
        n = image.numel() // self.of
        own = image[self.index * n : (self.index + 1) * n]
        if not image.is_cuda:  # NCCL gathers in place; gloo does not allow input within output.
            own = own.clone()
        with self._peers.together():
            dist.all_gather_single(image, own, self._bytes)
        self.gathered_bytes += image.numel() - n
