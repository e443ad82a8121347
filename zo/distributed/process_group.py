"""The running ranks of a run: how they meet, and all that they say to one another.

A single process needs none of it. What ranks say to one another goes by gloo, whatever the device; slices of blocks go
by the device's own means (NCCL).
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from zo.distributed.failure import Peers
from zo.distributed.mesh import Shape, places
from zo.distributed.slices import Slices
from zo.errors import UserError


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
        self.device = (
            torch.device(device, self.local_rank) if device == "cuda" else torch.device(device)
        )
        self.shape, self.slices = Shape(1, 1), None
        self.timeout = timedelta(seconds=timeout_s)
        self.scalar_bytes = 0
        """Bytes that this rank sent in collectives of scalars, so far."""
        self._barriers = 0
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
                "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.ranks,
                timeout=self.timeout,
            )
            self._store.set(f"host/{self.rank}", socket.gethostname())
            hosts = [self._store.get(f"host/{rank}").decode() for rank in range(self.ranks)]
        except (RuntimeError, ValueError, OSError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"rank {self.rank} cannot meet the other {self.ranks - 1} at {where} ({said}); start all ranks with "
                "torchrun, with an address and a free port that every node reaches"
            ) from error
        self._peers = Peers(self._store, self.rank, hosts, self.timeout)

    def arrange(self, shape: Shape) -> None:
        """Give the axes their sizes; every rank calls this."""
        assert shape.perturb * shape.data == self.ranks
        self.shape = shape
        if shape.slice > 1:
            self.slices = Slices(
                self._peers, self.local_rank % shape.slice, shape.slice, self.device
            )

    @property
    def first_of_node(self) -> bool:
        """Whether this is the rank that keeps a node's files."""
        return self.local_rank == 0

    def together(self) -> AbstractContextManager[None]:
        """See :meth:`zo.distributed.failure.Peers.together`; for runs of more than one rank."""
        return self._peers.together()

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
        local = (
            torch.stack(list(mine)).to("cpu", torch.float64)
            if mine
            else torch.zeros(0, width, dtype=torch.float64)
        )
        if self.ranks == 1:
            return local, flag
        most, at = places(tuple(owners), self.ranks)
        most += 1
        padded = torch.zeros(most, width, dtype=torch.float64)
        padded[: len(local)], padded[-1] = local, float(flag)
        gathered = torch.empty(self.ranks * most, width, dtype=torch.float64)
        with self.together():
            dist.all_gather_single(gathered, padded)
        self.scalar_bytes += padded.nbytes
        return gathered[list(at)], bool(gathered[most - 1 :: most].any())

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
        return [
            json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)
        ]

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
        found = next(
            (said for said in self.collect(str(mistake) if mistake else None) if said), None
        )
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
            self._peers.check()
            time.sleep(0.02)

    def close(self) -> None:
        """Leave the group."""
        if self.ranks > 1:
            self._peers.close()
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
