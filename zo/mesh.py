"""The ranks of a run as a mesh, perturb x data: who computes which cell of the loss table, and how all learn it.

The perturb axis splits the rows, the data axis the columns; rank = perturb index * data size + data index. Every rank
contributes the cells it owns and puts all of them in the same places, so nothing depends on who computed one.
The only module that speaks to ``torch.distributed``; a single process needs none of it.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zo.config import MeshConfig, UserError


@dataclass(frozen=True)
class Shape:
    """Sizes of the axes."""

    perturb: int
    data: int


def fit(config: MeshConfig, ranks: int, rows: int, columns: int) -> Shape:
    """The mesh that a configuration asks for, its empty axes filled in (perturb first).

    Raises:
        UserError: it does not multiply to the number of ranks, or an axis has more ranks than the table has lines.
    """
    fits = [Shape(p, ranks // p) for p in range(min(ranks, rows), 0, -1) if ranks % p == 0 and ranks // p <= columns]
    wanted = [s for s in fits if config.perturb in (None, s.perturb) and config.data in (None, s.data)]
    # Even splits first: an axis that does not divide its lines leaves ranks waiting.
    wanted.sort(key=lambda s: (rows % s.perturb != 0) + (columns % s.data != 0))
    if not wanted:
        asked = " ".join(f"mesh.{k}={v}" for k, v in vars(config).items() if v is not None) or "an empty mesh"
        use = " or ".join(f"mesh.perturb={s.perturb} mesh.data={s.data}" for s in fits)
        raise UserError(
            f"{asked} does not fit {ranks} rank{'s' * (ranks > 1)} and a table of {rows} rows (probes) x {columns} "
            f"columns (micro-batches); "
            + (f"use {use}" if fits else f"start at most {rows * columns} ranks, or make batch.micro smaller")
        )
    return wanted[0]


def share(lines: int, axis: int, index: int) -> range:
    """The contiguous lines of a table that one index of an axis owns; sizes differ by at most one."""
    return range(lines * index // axis, lines * (index + 1) // axis)


class Mesh:
    """The running ranks; made once a process."""

    def __init__(self, device: str = "cpu") -> None:
        """Join the other ranks that torchrun started, if any.

        Args:
            device: ``cpu`` or ``cuda``, which chooses gloo or NCCL.
        """
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = torch.device(device, self.local_rank) if device == "cuda" else torch.device(device)
        self.shape = Shape(1, 1)
        if self.ranks > 1 and not dist.is_initialized():
            if device == "cuda":
                torch.cuda.set_device(self.device)
                dist.init_process_group("nccl", device_id=self.device)
            else:
                dist.init_process_group("gloo")

    def arrange(self, shape: Shape) -> None:
        """Give the axes their sizes."""
        assert shape.perturb * shape.data == self.ranks
        self.shape = shape

    def owner(self, row: int, column: int, rows: int, columns: int) -> int:
        """The rank that computes a cell."""
        p = next(i for i in range(self.shape.perturb) if row in share(rows, self.shape.perturb, i))
        d = next(i for i in range(self.shape.data) if column in share(columns, self.shape.data, i))
        return p * self.shape.data + d

    def owners(self, rows: int, columns: int) -> list[int]:
        """The rank that computes each cell of a table, row by row."""
        return [self.owner(r, c, rows, columns) for r in range(rows) for c in range(columns)]

    def gather(self, mine: Sequence[Tensor], owners: Sequence[int], width: int) -> Tensor:
        """Bring together values that ranks own: the one collective of a step.

        Args:
            mine: this rank's values, in order; float64 of shape ``[width]`` each, on any device.
            owners: for every value of all ranks, in order, the rank that has it; the same on every rank.
            width: numbers a value.

        Returns:
            float64 of shape ``[len(owners), width]`` on CPU, the same on every rank.
        """
        local = torch.stack(list(mine)).to(torch.float64) if mine else torch.zeros(0, width, dtype=torch.float64)
        if self.ranks == 1:
            return local.cpu()
        most = max(owners.count(rank) for rank in range(self.ranks))
        padded = torch.zeros(most, width, dtype=torch.float64, device=self.device)
        padded[: len(local)] = local.to(self.device)
        gathered = torch.empty(self.ranks * most, width, dtype=torch.float64, device=self.device)
        dist.all_gather_single(gathered, padded)
        by_rank, taken, places = gathered.cpu(), [0] * self.ranks, []
        for rank in owners:
            places.append(rank * most + taken[rank])
            taken[rank] += 1
        return by_rank[places]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank; what JSON can carry."""
        if self.ranks == 1:
            return value
        data = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor([len(data)], device=self.device)
        dist.broadcast(size, 0)
        content = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(content, 0)
        return json.loads(bytes(content.cpu().tolist()))

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.ranks > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()
