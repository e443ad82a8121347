"""The ranks of a run as a mesh, perturb x data x slice: who computes which cell, and how all ranks learn it.

The perturb axis splits the rows of the loss table, the data axis its columns, so perturb x data is the number of ranks.
The slice axis cuts the ranks of each node into groups that keep one copy of the weights together. Every rank
contributes the cells it owns and puts all of them in the same places, so nothing depends on who computed one.

The only module that speaks to ``torch.distributed``; a single process needs none of it. What ranks say to one another
goes by gloo, whatever the device; slices of blocks by the device's own means (NCCL).
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from zo.config import MeshConfig, RankError, UserError

GRACE_S = 2.0
"""How long a rank that lost another one waits for the others to answer, before it says who did not."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the axes."""

    perturb: int
    data: int
    slice: int = 1

    def __str__(self) -> str:
        sizes = f"mesh.perturb={self.perturb} mesh.data={self.data}"
        return sizes + (f" mesh.slice={self.slice}" if self.slice > 1 else "")


def fit(config: MeshConfig, ranks: int, rows: int, columns: int, local_ranks: int | None = None) -> Shape:
    """The mesh that a configuration asks for, its empty axes filled in (perturb first).

    Args:
        config: sizes that are given.
        ranks: of the run.
        rows: of the loss table.
        columns: of the loss table.
        local_ranks: ranks of a node; all of them by default.

    Raises:
        UserError: perturb x data is not the number of ranks, there are more ranks than cells and no slices that a rank
            without one could serve, or slices do not divide a node.
    """
    local_ranks, slices = local_ranks or ranks, config.slice
    if local_ranks % slices:
        use = ", ".join(str(s) for s in range(1, local_ranks + 1) if local_ranks % s == 0)
        raise UserError(
            f"mesh.slice={slices} does not divide the {local_ranks} rank{'s' * (local_ranks > 1)} of a node, and "
            f"slices do not reach over nodes; use {use}"
        )
    pairs = [Shape(p, ranks // p, slices) for p in range(ranks, 0, -1) if ranks % p == 0]
    # A rank without a cell is of use only where it keeps a slice.
    fits = [s for s in pairs if slices > 1 or (s.perturb <= rows and s.data <= columns)]
    wanted = [s for s in fits if config.perturb in (None, s.perturb) and config.data in (None, s.data)]
    # Even splits first: an axis that does not divide its lines leaves ranks waiting.
    wanted.sort(key=lambda s: (rows % s.perturb != 0) + (columns % s.data != 0))
    if not wanted:
        given = [(axis, getattr(config, axis)) for axis in ("perturb", "data")]
        asked = " ".join(f"mesh.{axis}={size}" for axis, size in given if size is not None) or "an empty mesh"
        raise UserError(
            f"{asked} does not fit {ranks} rank{'s' * (ranks > 1)} and a table of {rows} rows (probes) x {columns} "
            f"columns (micro-batches); "
            + (
                f"use {' or '.join(map(str, fits))}"
                if fits
                else f"start at most {rows * columns} ranks, or make batch.micro smaller"
            )
        )
    return wanted[0]


def share(lines: int, axis: int, index: int) -> range:
    """The contiguous lines of a table that one index of an axis owns; sizes differ by at most one."""
    return range(lines * index // axis, lines * (index + 1) // axis)


def owners(shape: Shape, rows: int, columns: int) -> list[int]:
    """The rank that computes each cell of a table, row by row.

    Where the axes divide the table, rank = perturb index * data size + data index. Else its cells are dealt out in
    order: no rank has more than one above another.
    """
    if rows % shape.perturb == 0 and columns % shape.data == 0:
        tall, wide = rows // shape.perturb, columns // shape.data
        return [r // tall * shape.data + c // wide for r in range(rows) for c in range(columns)]
    ranks = shape.perturb * shape.data
    return [rank for rank in range(ranks) for _ in share(rows * columns, ranks, rank)]


class Slices:
    """The ranks that keep one copy of the weights together: they visit blocks together and exchange slices of them."""

    def __init__(self, mesh: "Mesh", index: int, of: int) -> None:
        """Meet the other ranks of the group; every rank of the run calls this.

        Args:
            mesh: of the run.
            index: which slice this rank keeps.
            of: ranks a group.
        """
        self.index, self.of, self._mesh = index, of, mesh
        self.gathered_bytes = 0
        """Bytes that came from the other ranks, so far."""
        for first in range(0, mesh.ranks, of):
            members, timeout = list(range(first, first + of)), mesh.timeout
            # In a fixed order, for every rank takes part in making every group. A group for each of the two threads.
            visits = dist.new_group(members, timeout, "gloo")
            device = "nccl" if mesh.device.type == "cuda" else "gloo"
            bytes_of_blocks = dist.new_group(members, timeout, device)
            if mesh.rank in members:
                self._visits, self._bytes = visits, bytes_of_blocks

    def earliest(self, block: int | None) -> int | None:
        """The smallest number that a rank of the group gives; ``None`` where none gives one."""
        none = torch.iinfo(torch.int64).max
        agreed = torch.tensor([none if block is None else block])
        with self._mesh.together():
            dist.all_reduce(agreed, dist.ReduceOp.MIN, self._visits)
        return None if agreed.item() == none else int(agreed)

    def combine(self, digests: Tensor) -> None:
        """Fill in the rows of ``digests``, uint8 of any shape, that the other ranks have; a row not known is zeros."""
        with self._mesh.together():
            # Whoever has a row has the same one, so that the largest byte of all ranks is the byte of those that do.
            dist.all_reduce(digests, dist.ReduceOp.MAX, self._visits)

    def gather(self, image: Tensor) -> None:
        """Fill ``image``, uint8 of shape ``[of * n]`` on the device, from the ``n`` bytes that each rank has of it."""
        n = image.numel() // self.of
        with self._mesh.together():
            dist.all_gather_single(image, image[self.index * n : (self.index + 1) * n].clone(), self._bytes)
        self.gathered_bytes += image.numel() - n


class Mesh:
    """The running ranks; made once a process."""

    def __init__(self, device: str = "cpu", timeout_s: int = 1800) -> None:
        """Join the other ranks that torchrun started, if any.

        Args:
            device: ``cpu`` or ``cuda``.
            timeout_s: how long the other ranks are waited for.

        Raises:
            UserError: they cannot be met.
        """
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank % self.local_ranks))
        self.nodes = int(os.environ.get("GROUP_WORLD_SIZE", max(1, self.ranks // self.local_ranks)))
        self.device = torch.device(device, self.local_rank) if device == "cuda" else torch.device(device)
        self.shape, self.slices = Shape(1, 1), None
        self.timeout = timedelta(seconds=timeout_s)
        self.scalar_bytes = 0
        """Bytes that this rank sent in collectives of scalars, so far."""
        self._waiting, self._barriers, self._ends = set[int](), 0, threading.Event()
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.ranks > 1:
            self._join()

    slices: Slices | None
    """The ranks that keep the rest of this rank's copy of the weights, if they are cut."""

    def _join(self) -> None:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            store, _, _ = next(rendezvous("env://", timeout=self.timeout))
            self._store = _apart(store, self.rank, self.ranks, self.timeout)
            dist.init_process_group(
                "gloo", store=self._store, rank=self.rank, world_size=self.ranks, timeout=self.timeout
            )
            self._store.set(f"host/{self.rank}", socket.gethostname())
            self._hosts = [self._store.get(f"host/{rank}").decode() for rank in range(self.ranks)]
        except (RuntimeError, ValueError, OSError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"rank {self.rank} cannot meet the other {self.ranks - 1} at {where} ({said}); start all ranks with "
                "torchrun, with an address and a free port that every node reaches"
            ) from error
        self._watcher = threading.Thread(target=self._watch, args=(self._store.clone(),), daemon=True)
        self._watcher.start()

    def arrange(self, shape: Shape) -> None:
        """Give the axes their sizes; every rank calls this."""
        assert shape.perturb * shape.data == self.ranks
        self.shape = shape
        if shape.slice > 1:
            self.slices = Slices(self, self.local_rank % shape.slice, shape.slice)

    @property
    def first_of_node(self) -> bool:
        """Whether this is the rank that keeps a node's files."""
        return self.local_rank == 0

    # What is lost, and who.

    @contextmanager
    def together(self) -> Iterator[None]:
        """What ranks do together; a rank that is not there ends it in an error that names that one.

        Raises:
            RankError: a rank died, or did not come in time.
        """
        thread = threading.get_ident()
        self._waiting.add(thread)
        try:
            yield
        except RuntimeError as error:
            raise RankError(self._lost(error)) from error
        finally:
            self._waiting.discard(thread)

    def _lost(self, error: RuntimeError) -> str:
        said = " ".join(str(error).split())[:160]
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        dead, late = others, others
        with suppress(RuntimeError):
            self._store.set("lost", "")
            until = time.monotonic() + GRACE_S
            while time.monotonic() < until and dead:
                dead = [rank for rank in dead if not self._store.check([f"lives/{rank}"])]
                time.sleep(0.5)
            late = [rank for rank in others if not self._store.check([f"waits/{rank}"])]
        names = [f"rank {rank} (host {self._hosts[rank]})" for rank in dead or late]
        missing = names if len(names) < len(others) or self.ranks == 2 else ["another rank"]
        return (
            f"{', '.join(missing)} died, or was not there within mesh.timeout_s={self.timeout // timedelta(seconds=1)} "
            f"({said}); no step is lost: the same command goes on, and torchrun --max-restarts gives it by itself"
        )

    def _watch(self, store: Any) -> None:
        """When a rank has lost another one, tell it that this one lives, and whether it waits too."""
        with suppress(RuntimeError):  # Whoever keeps the store is gone: the collectives will tell.
            while not self._ends.wait(0.5):
                if store.check(["lost"]):
                    store.set(f"lives/{self.rank}", "")
                    while not self._waiting and not self._ends.wait(0.1):
                        pass
                    store.set(f"waits/{self.rank}", "")
                    return

    # What ranks say to one another.

    def gather(
        self, mine: Sequence[Tensor], owners: Sequence[int], width: int, flag: bool = False
    ) -> tuple[Tensor, bool]:
        """Bring together values that ranks own: the one collective of a step.

        Args:
            mine: this rank's values, in order; float64 of shape ``[width]`` each, on any device.
            owners: for every value of all ranks, in order, the rank that has it; the same on every rank.
            width: numbers a value.
            flag: something that all ranks are to know if it is so on one.

        Returns:
            float64 of shape ``[len(owners), width]`` on CPU, the same on every rank, and whether a rank gave the flag.
        """
        local = torch.stack(list(mine)).to("cpu", torch.float64) if mine else torch.zeros(0, width, dtype=torch.float64)
        if self.ranks == 1:
            return local, flag
        most = max(owners.count(rank) for rank in range(self.ranks)) + 1
        padded = torch.zeros(most, width, dtype=torch.float64)
        padded[: len(local)], padded[-1] = local, float(flag)
        gathered = torch.empty(self.ranks * most, width, dtype=torch.float64)
        with self.together():
            dist.all_gather_single(gathered, padded)
        self.scalar_bytes += padded.nbytes
        taken, places = [0] * self.ranks, []
        for rank in owners:
            places.append(rank * most + taken[rank])
            taken[rank] += 1
        return gathered[places], bool(gathered[most - 1 :: most].any())

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """One rank's value on every rank; what JSON can carry."""
        if self.ranks == 1:
            return value
        data = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor([len(data)])
        with self.together():
            dist.broadcast(size, source)
            content = torch.zeros(int(size), dtype=torch.uint8)
            if self.rank == source:
                content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(content, source)
        return json.loads(content.numpy().tobytes())

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank; what JSON can carry."""
        if self.ranks == 1:
            return [value]
        data = json.dumps(value).encode()
        sizes = torch.empty(self.ranks, dtype=torch.int64)
        with self.together():
            dist.all_gather_single(sizes, torch.tensor([len(data)]))
            padded, most = torch.zeros(int(sizes.max()), dtype=torch.uint8), int(sizes.max())
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            gathered = torch.empty(self.ranks * most, dtype=torch.uint8)
            dist.all_gather_single(gathered, padded)
        rows = gathered.view(self.ranks, most).numpy()
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A mistake that one rank meets inside ends all ranks with its words.

        Raises:
            UserError: the first rank's that met one.
        """
        mistake = None
        try:
            yield
        except UserError as error:
            mistake = error
        found = next((said for said in self.collect(str(mistake) if mistake else None) if said), None)
        if mistake is not None:
            raise mistake
        if found is not None:
            raise UserError(found)

    def barrier(self) -> None:
        """Wait for every rank, however long one takes (to write a large model, say) while it lives."""
        if self.ranks == 1:
            return
        self._barriers += 1
        with self.together():
            self._meet("came")
            # Rank 0 may keep the store: it stays until no other rank asks it anything.
            self._meet("went", waits=self.rank == 0)

    def _meet(self, where: str, waits: bool = True) -> None:
        keys = [f"{where}/{self._barriers}/{rank}" for rank in range(self.ranks)]
        self._store.set(keys[self.rank], "")
        while waits and not self._store.check(keys):
            if self._store.check(["lost"]):
                raise RuntimeError("a rank was lost")
            time.sleep(0.02)

    def close(self) -> None:
        """Leave the group."""
        self._ends.set()
        if self.ranks > 1:
            self._watcher.join()
        if dist.is_initialized():
            dist.destroy_process_group()


def _apart(store: Any, rank: int, ranks: int, timeout: timedelta) -> Any:
    """A part of a store that no earlier group of ranks has written to.

    torchrun keeps one store over several groups when nodes leave and join, so that a rank may read addresses of dead
    ones. Rank 0 names the group by the words that every rank said; a rank goes by a name only if its own word, new in
    each process, is in it.
    """
    word, until = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"zo/word/{rank}", word)
    while time.monotonic() < until:
        if rank == 0:
            words = [store.get(f"zo/word/{r}").decode() for r in range(ranks)]
            store.set("zo/group", json.dumps(words))
            confirmed = [f"zo/{words[r]}/with/{word}" for r in range(1, ranks)]
            if not confirmed or store.check(confirmed):
                store.set(f"zo/{word}/agreed", "")
                return PrefixStore(f"zo/{word}", store)
        elif store.check(["zo/group"]):
            words = json.loads(store.get("zo/group"))
            if len(words) == ranks and words[rank] == word:
                store.set(f"zo/{word}/with/{words[0]}", "")
                if store.check([f"zo/{words[0]}/agreed"]):
                    return PrefixStore(f"zo/{words[0]}", store)
        time.sleep(0.02)
    raise RuntimeError(f"not all of {ranks} ranks came in time")
