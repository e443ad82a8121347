"""Process group of a run: rendezvous and every collective.

A single process needs none of it. Scalars and objects are exchanged with gloo on any device, slices
of blocks with the device's own backend (NCCL).
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
from zo.errors import UserError, one_line

FIRST_PAUSE_S, LAST_PAUSE_S = 0.004, 0.25
"""Seconds between two requests to the store in a barrier; each pause is twice the one before."""


class Mesh:
    """This process as a rank of the run; create it once per process."""

    def __init__(self, device: str = "cpu", timeout_s: int = 1800) -> None:
        """Rendezvous with the other ranks that torchrun started, if any.

        Args:
            device: ``cpu`` or ``cuda``.
            timeout_s: seconds to wait for other ranks.

        Raises:
            UserError: the rendezvous failed.
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
        """Bytes that this rank sent in :meth:`gather` so far."""
        self._barriers = 0
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.ranks > 1:
            self._join()

    slices: Slices | None
    """The group of ranks that share a copy of the weights, if ``mesh.slice`` is more than 1."""

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
            said = one_line(error, 200)
            raise UserError(
                f"rank {self.rank} cannot connect to the other {self.ranks - 1} at {where} "
                f"({said}); start all ranks with torchrun, with an address and a free port that "
                "every node can reach"
            ) from error
        self._peers = Peers(self._store, self.rank, hosts, self.timeout)

    def arrange(self, shape: Shape) -> None:
        """Set the sizes of the axes and create the groups of slices; every rank calls this."""
        assert shape.perturb * shape.data == self.ranks
        self.shape = shape
        if shape.slice > 1:
            self.slices = Slices(
                self._peers, self.local_rank % shape.slice, shape.slice, self.device
            )

    @property
    def first_of_node(self) -> bool:
        """True on the rank that writes a node's files."""
        return self.local_rank == 0

    def together(self) -> AbstractContextManager[None]:
        """See :meth:`zo.distributed.failure.Peers.together`; only for runs of several ranks."""
        return self._peers.together()

    def gather(
        self, mine: Sequence[Tensor], owners: Sequence[int], width: int, flag: bool = False
    ) -> tuple[Tensor, bool]:
        """Gather the values of all ranks: the only collective of a step.

        Args:
            mine: this rank's values, in order; float64 of shape ``[width]`` each, on any device.
            owners: the rank of each value of all ranks, in order; the same on every rank.
            width: numbers per value.
            flag: true if any rank passes true.

        Returns:
            The values, float64 of shape ``[len(owners), width]`` on CPU, and the flag; the same on
            every rank.
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
        """Return the value of rank ``source`` on every rank; it must be valid JSON."""
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
        """Return the values of all ranks, in order, on every rank; they must be valid JSON."""
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
        """Raise a ``UserError`` of one rank in this block on all ranks; every rank enters it.

        Raises:
            UserError: this rank's own, or that of the lowest rank that had one.
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
        """Wait for every rank without a time limit: one may be writing a large model.

        Raises:
            RankError: a rank reported that another one is missing.
        """
        if self.ranks == 1:
            return
        self._barriers += 1
        with self.together():
            self._arrive(f"came/{self._barriers}", waits=True)
            # Rank 0 may host the store, so it stays until the others have sent their last request.
            self._arrive(f"went/{self._barriers}", waits=self.rank == 0)

    def _arrive(self, counter: str, waits: bool) -> None:
        """Count this rank; the last one sets a key that the others wait for."""
        if self._store.add(counter, 1) == self.ranks:
            self._store.set(f"{counter}/all", "")
            return
        # Polled, because each timeout of the store's own wait writes two warnings to stderr.
        pause_s = FIRST_PAUSE_S
        while waits and not self._store.check([f"{counter}/all"]):
            self._peers.check()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def close(self) -> None:
        """Destroy the process group."""
        if self.ranks > 1:
            self._peers.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _apart(store: Any, rank: int, ranks: int, timeout: timedelta) -> Any:
    """Return a view of the store that no earlier group of ranks has written to.

    torchrun keeps one store when nodes leave and join, so a rank could read addresses of dead
    ranks. Each process writes a new random word; rank 0 publishes the words of all ranks as the
    name of the group, and a rank accepts a name only if it contains its own word.
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
    raise RuntimeError(f"not all of the {ranks} ranks connected in time")
