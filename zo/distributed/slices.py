"""Slices of blocks, exchanged among the ranks of a node that keep one copy of the weights together."""

import torch
import torch.distributed as dist
from torch import Tensor

from zo.distributed.failure import Peers


class Slices:
    """The ranks that keep one copy of the weights together: they visit blocks together and exchange slices of them."""

    def __init__(self, peers: Peers, index: int, of: int, device: torch.device) -> None:
        """Meet the other ranks of the group; every rank of the run calls this.

        Args:
            peers: all ranks of the run.
            index: which slice this rank keeps.
            of: ranks a group.
            device: of the blocks that are exchanged.
        """
        self.index, self.of, self._peers = index, of, peers
        self.gathered_bytes = 0
        """Bytes that came from the other ranks, so far."""
        for first in range(0, peers.ranks, of):
            members = list(range(first, first + of))
            # In a fixed order, for every rank takes part in making every group. A group for each of the two threads.
            visits = dist.new_group(members, peers.timeout, "gloo")
            bytes_of_blocks = dist.new_group(
                members, peers.timeout, "nccl" if device.type == "cuda" else "gloo"
            )
            if peers.rank in members:
                self._visits, self._bytes = visits, bytes_of_blocks

    def earliest(self, block: int | None) -> int | None:
        """The smallest number that a rank of the group gives; ``None`` where none gives one."""
        none = torch.iinfo(torch.int64).max
        agreed = torch.tensor([none if block is None else block])
        with self._peers.together():
            dist.all_reduce(agreed, dist.ReduceOp.MIN, self._visits)
        return None if agreed.item() == none else int(agreed)

    def combine(self, digests: Tensor) -> None:
        """Fill in the rows of ``digests``, uint8 of any shape, that other ranks have; a row not known is zeros."""
        with self._peers.together():
            # Whoever has a row has the same one, so the largest byte of all ranks is the byte of those that do.
            dist.all_reduce(digests, dist.ReduceOp.MAX, self._visits)

    def gather(self, image: Tensor) -> None:
        """Fill ``image``, uint8 of shape ``[of * n]`` on the device, from the ``n`` bytes that each rank has of it."""
        n = image.numel() // self.of
        with self._peers.together():
            dist.all_gather_single(
                image, image[self.index * n : (self.index + 1) * n].clone(), self._bytes
            )
        self.gathered_bytes += image.numel() - n
