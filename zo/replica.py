"""A model whose weights are visited: store, log and streamer, wired; what training, scores and export share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from zo.base import Base
from zo.binding import Binding
from zo.blocks import tied
from zo.config import MemoryConfig
from zo.disk import ENGINES, Engine
from zo.fingerprint import Fingerprint
from zo.lanes import GpuLanes, Lanes
from zo.layout import WHOLE, Block, Layout, Part, Placed, Slice, Spec, views
from zo.lockstep import Lockstep
from zo.log import Log
from zo.mesh import Slices
from zo.perturbation import Offset
from zo.replay import Replay
from zo.ring import Resident, Ring
from zo.store import DeviceStore, DiskStore, HostStore
from zo.streamer import Streamer
from zo.timeline import Timeline

T = TypeVar("T")
MASTER = Offset(0, 0.0)
"""The probe that is no probe: the parameters themselves."""


@dataclass(frozen=True)
class Traffic:
    """What the lanes moved since they were made."""

    read_bytes: int = 0
    """To slots."""
    written_bytes: int = 0
    """Back to the store."""
    gathered_bytes: int = 0
    """From ranks that keep other slices."""
    wait_s: float = 0.0
    """Time that the compute waited for a block."""


class Weights:
    """A model's weights in a store, before a log is known."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        base: Callable[[Engine], Base],
        memory: MemoryConfig,
        device: torch.device,
        folder: Path,
        writable: bool = True,
        slices: Slices | None = None,
    ) -> None:
        """Fill the store.

        Args:
            model: its parameters may be on meta; they are taken out of it.
            layout: of the model.
            base: makes the source of the weights, given what reads files.
            memory: which store, and how.
            device: of the compute.
            folder: of a disk store's blocks.
            writable: whether a disk store may write there.
            slices: the ranks that keep the rest of the weights, if this one is to keep a slice.

        Raises:
            UserError: too little memory or disk, or weights that cannot be read.
        """
        engine = ENGINES[memory.disk_engine]() if memory.store == "disk" else ENGINES["mmap"]()
        source = base(engine)
        source.adopt(model)
        self.base: Base | None = source if source.lasting else None
        """What the weights of version 0 can be read from once more."""
        self.slices = slices
        own_slice = Slice(slices.index, slices.of) if slices else WHOLE
        placed = {name for g in layout.groups for part in g.parts for name in part.parameter.spec.names}
        self.resident = [_spec(model, names) for names in tied(model, trainable=False) if names[0] not in placed]
        """The frozen parameters that no store holds."""
        self.model, self.memory, self.device, self.timeline = model, memory, device, Timeline(device)
        self.binding = Binding(model, layout, device)
        self.store: DeviceStore | HostStore | DiskStore
        if memory.store == "device":
            self.store = DeviceStore(layout, source, device)
        elif memory.store == "host":
            self.store = HostStore(layout, source, memory.pin, own_slice)
        else:
            self.store = DiskStore(layout, source, engine, folder, writable, own_slice)
        self.found = Fingerprint(layout, self.resident)
        """Digests of what this rank holds of the weights at version 0; of all of them, once :meth:`meet` was called."""
        self.found.take_over(self.store.found)
        self._add_resident(source)
        self.lanes: Lanes | None = None
        if slices is None:
            self.meet()
        if isinstance(self.store, DeviceStore):
            return
        own = engine if memory.store == "disk" else None
        if device.type == "cuda":
            self.lanes = GpuLanes(self.store, own, self.timeline, device, memory.pin, slices)
        else:
            self.lanes = Lanes(self.store, own, self.timeline, slices)

    def _add_resident(self, source: Base) -> None:
        for spec in self.resident:
            block = Block(0, (), (Part(Placed(spec, 0)),))
            image = torch.empty(block.size_bytes, dtype=torch.uint8)
            source.read(block, Layout((block,), (block,)), image)
            self.found.add_parameter(spec, image[: spec.size_bytes].view(spec.dtype))
        source.forget()

    def meet(self) -> None:
        """Bring the ranks' digests of the base together: ``store.base``; ranks that share slices call it together."""
        if self.slices is not None:
            self.slices.combine(self.found.digests)
        self.store.base = self.found.hexdigest()

    def fingerprint(self, found: Fingerprint) -> str:
        """Return the fingerprint of weights of which each rank that shares slices gives the digests that it has."""
        whole = Fingerprint(self.store.layout, self.resident)
        whole.take_over(self.found, frozen=True)
        whole.take_over(found)
        if self.slices is not None:
            self.slices.combine(whole.digests)
        return whole.hexdigest()


def _spec(model: nn.Module, names: tuple[str, ...]) -> Spec:
    parameter = model.get_parameter(names[0])
    return Spec(names, tuple(parameter.shape), parameter.dtype, frozen=True)


class Replica:
    """A model's weights and a log: their versions, from the base to the newest."""

    def __init__(self, weights: Weights, log: Log) -> None:
        """Take up the weights where they stand; blocks catch up when they are visited."""
        self.layout, self.store, self.log = weights.store.layout, weights.store, log
        self.timeline, self.lanes, self._weights = weights.timeline, weights.lanes, weights
        self._binding, self.sliced, replay = weights.binding, weights.slices is not None, Replay(log)
        self.resident = isinstance(self.store, DeviceStore)
        """Whether all weights are in memory where the model computes."""
        if isinstance(self.store, DiskStore):
            self.store.open(log.version)
        if isinstance(self.store, DeviceStore):
            self._place: Resident | Ring = Resident(self.store)
            self._bind_masters(self.store)
        else:
            assert weights.lanes is not None
            self._place = Ring(self.store, weights.lanes, replay, weights.memory.slots, weights.memory.lag)
        self.streamer = Streamer(weights.binding, replay, self._place, weights.device, weights.timeline, weights.slices)
        self.lockstep = Lockstep(weights.binding, park=weights.memory.activations == "host")

    def table(self, probes: Sequence[Offset], rows: Sequence[int], cells: Sequence[Callable[[], T]]) -> list[T]:
        """Run cells of a loss table, one pass over the model for all of them, and of the ranks that share slices.

        Args:
            probes: the table's rows.
            rows: for each cell its row, non-decreasing.
            cells: forwards of the model.
        """
        if not cells and not self.sliced:
            return []
        self.streamer.begin(probes, rows)
        return self.lockstep.run(cells, self.streamer)

    def plain(self, cells: Sequence[Callable[[], T]], at_once: int, passes: int) -> list[T]:
        """Run forwards on the parameters themselves, at the newest version, ``at_once`` in each of ``passes``."""
        results: list[T] = []
        for first in range(0, passes * at_once, at_once):
            together = cells[first : first + at_once]
            results += self.table([MASTER], [0] * len(together), together)
        return results

    def masters(self) -> Iterator[tuple[Block, list[Tensor]]]:
        """Every block's weights at the newest version, one block at a time."""
        return self.streamer.masters()

    def fingerprint(self, each: Callable[[Block, Sequence[Tensor]], None] | None = None) -> str:
        """Hash all parameters at the newest version; ranks that share slices call it together.

        Args:
            each: is given every block and its flat tensors in turn.

        Returns:
            See :class:`zo.fingerprint.Fingerprint`.
        """
        found = Fingerprint(self.layout, share=self.store.slice)
        for block, masters in self.masters():
            found.add_segments(block, masters)
            if each is not None:
                each(block, masters)
        return self._weights.fingerprint(found)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with its weights at the newest version, whole, valid until the next is asked for."""
        unfinished: dict[str, Tensor] = {}
        for block, masters in self.masters():
            for part, view in views(block, masters):
                if part.rows is None:
                    yield part.parameter.name, view
                    continue
                placed = part.parameter
                if placed.name not in unfinished:
                    unfinished[placed.name] = torch.empty(placed.spec.shape, dtype=view.dtype)
                unfinished[placed.name][part.rows[0] : part.rows[1]] = view
                if part.rows[1] == placed.spec.shape[0]:
                    yield placed.name, unfinished.pop(placed.name)

    def pass_over(self) -> None:
        """Visit every block once, as ranks that share slices do where one of them asks for all weights."""
        for _ in self.masters():
            pass

    def settle(self) -> None:
        """Wait for write-backs under way, and raise what went wrong with them."""
        if isinstance(self._place, Ring):
            self._place.finish()

    def traffic(self) -> Traffic:
        """What was moved so far; on a GPU, once the results of a step are on the host."""
        if self.lanes is None:
            return Traffic()
        self.lanes.settle()
        lanes = self.lanes
        return Traffic(lanes.read_bytes, lanes.written_bytes, lanes.gathered_bytes, lanes.wait_s)

    def damaged(self) -> list[str]:
        """Names of blocks that were found damaged since this was asked last."""
        if not isinstance(self.store, DiskStore):
            return []
        found, self.store.damaged = self.store.damaged, []
        return found

    def close(self, give_back: bool = False) -> None:
        """End the lanes and take the hooks off the model; with store ``device`` it holds its weights.

        ``give_back``: it holds them whatever the store; those of another store on CPU.
        """
        self.lockstep.detach()
        if isinstance(self.store, DeviceStore):
            self._bind_masters(self.store)
        elif give_back:
            # In host memory: the model may be larger than the device's.
            self._binding.fill((name, tensor.to("cpu", copy=True)) for name, tensor in self.tensors())
        if self.lanes is not None:
            self.settle()
            self.lanes.close()

    def _bind_masters(self, store: DeviceStore) -> None:
        for group, segments in zip(self.layout.groups, store.groups, strict=True):
            self._binding.bind(group, segments)
