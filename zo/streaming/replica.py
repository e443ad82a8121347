"""One copy of a model's weights and the log that they follow: store, cache and streamer, wired.

Training, evaluation and export use a model through this class alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from zo.config.schema import STORES, MemoryConfig
from zo.distributed.slices import Slices
from zo.io.engines import ENGINES, Engine
from zo.method.perturbation import Probe
from zo.model.binding import Binding
from zo.model.blocks import tied
from zo.model.fingerprint import Fingerprint
from zo.model.folds import ALONE, Cell, Folds, Together
from zo.model.form import Form
from zo.model.layout import WHOLE, Block, Layout, Part, Placed, Slice, Spec, views
from zo.model.lockstep import Lockstep
from zo.model.probing import Probing
from zo.model.source import SharedSource, WeightSource
from zo.observe.timeline import Timeline
from zo.state.log import Log, untrained_header
from zo.state.replay import Replay
from zo.streaming.budget import Budget, budget
from zo.streaming.cache import BlockCache, ResidentCache, SlotCache, Traffic
from zo.streaming.device import device_of
from zo.streaming.disk_store import DiskStore
from zo.streaming.stores import DeviceStore, HostStore
from zo.streaming.streamer import UNPERTURBED, Streamer
from zo.streaming.whole import Whole

T = TypeVar("T")
Stored = tuple[DeviceStore | HostStore | DiskStore, Callable[[Replay], BlockCache]]
"""A store, and what makes the cache of its blocks."""


class Replica:
    """A model's weights, at version 0 until :meth:`open` gives them a log."""

    cache: BlockCache
    streamer: Streamer
    log: Log
    is_resident: bool
    """Whether tensors that :meth:`tensors` yields stay valid."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        base: Callable[[Engine], WeightSource],
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
        engine = ENGINES[memory.disk_engine if memory.store == "disk" else "mmap"]()
        source = SharedSource(base(engine))
        source.attach_buffers(model)
        self.base: WeightSource | None = source if source.is_rereadable else None
        """The source of the weights of version 0, if it can be read once more."""
        self._source: WeightSource | None = source
        self.model, self.layout, self.device, self.slices = model, layout, device, slices
        self._memory, self._device = memory, device_of(device)
        self.timeline = Timeline(self._device)
        placed = {
            name for g in layout.groups for part in g.parts for name in part.parameter.spec.names
        }
        self.resident = [
            _spec(model, names) for names in tied(model, trainable=False) if names[0] not in placed
        ]
        """The frozen parameters that no store holds."""
        self.binding = Binding(model, layout, device)
        own = Slice(slices.index, slices.of) if slices else WHOLE
        stores: tuple[Callable[[], Stored], ...] = (
            lambda: self._in_place(DeviceStore(layout, source, device)),
            lambda: self._in_slots(HostStore(layout, source, own)),
            lambda: self._in_slots(DiskStore(layout, source, engine, folder, writable, own)),
        )
        self.store, self._make_cache = dict(zip(STORES, stores, strict=True))[memory.store]()
        self._found = Fingerprint(layout, self.resident)
        self._found.take_over(self.store.found)
        self._add_resident(source)
        if slices is None:
            self.exchange_digests()

    def _in_place(self, store: DeviceStore) -> Stored:
        return store, lambda replay: ResidentCache(store)

    def _in_slots(self, store: HostStore | DiskStore) -> Stored:
        def make(replay: Replay) -> BlockCache:
            memory, device = self._memory, self._device
            return SlotCache(store, replay, memory, device, self.timeline, self.slices)

        return store, make

    def _add_resident(self, source: WeightSource) -> None:
        for spec in self.resident:
            block = Block(0, (), (Part(Placed(spec, 0)),))
            image = torch.empty(block.size_bytes, dtype=torch.uint8)
            source.read(block, Layout((block,), (block,)), image)
            values = image[: spec.size_bytes].view(spec.dtype)
            self._found.add_parameter(spec, values)
            self.binding.hold(spec, values.view(spec.shape))
        source.clear_cache()

    def exchange_digests(self) -> None:
        """Complete the fingerprint of version 0, ``store.base``.

        Ranks that share slices call it together.
        """
        if self.slices is not None:
            self.slices.combine(self._found.digests)
        self.store.base = self._found.hexdigest()

    def open(self, log: Log, *, is_trial: bool = False) -> None:
        """Follow a log; a block catches up with it at each visit.

        Args:
            log: of the run.
            is_trial: :meth:`rewind` will be called, until which a model of the user's own stays in
                memory beside the weights.
        """
        self._source = self._source if is_trial else None
        self.store.open(log.version, log.identity)
        self._follow(log)

    def stand_at(self, log: Log) -> None:
        """Follow another log, whose newest version the weights on the device are at already."""
        assert isinstance(self.store, DeviceStore)
        self._detach()
        self.store.versions[:] = [log.version] * len(self.store.versions)
        self._follow(log)

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Compute with the weights of version 0 inside a ``with`` block, before :meth:`open`."""
        self._follow(Log(untrained_header()))
        try:
            yield
        finally:
            self._detach()
            self.cache.close()
            # Their memory, before the next ones take theirs.
            del self.cache, self.streamer
            self.binding.forget()

    def _follow(self, log: Log) -> None:
        """Make what computes with the weights, which stand where the store has them."""
        self.log, replay = log, Replay(log, self.layout, self.base)
        self._replay = replay
        self.cache = self._make_cache(replay)
        self.is_resident = self.cache.is_resident
        self.cache.bind_at_rest(self.binding)
        self._form = form = Form.of(log.header, self.layout)
        self._probing = Probing(self.binding, form) if form.corrects else None
        self.streamer = Streamer(
            self.binding,
            replay,
            self.cache,
            self.device,
            self.timeline,
            self.slices,
            corrects=form.corrects,
            positions=form.positions,
        )
        offload = self._memory.activations == "host"
        self._lockstep = Lockstep(self.binding, offload=offload, probing=self._probing)
        self._folds = Folds(self.binding, self._lockstep, self._probing, form)
        self._whole: Whole | None = None

    def budget(self, rows: tuple[int, int] = (0, 0), cached: int = 0) -> Budget:
        """Return the memory that this rank allocates.

        Args:
            rows: tokens of all its folds, and of one, at most.
            cached: bytes of a key-value cache.
        """
        memory = self._memory
        buffers = sum(b.nbytes for b in self.model.buffers()) + sum(
            spec.size_bytes for spec in self.resident
        )
        on_host = self._device.shares_host_memory
        return budget(
            self.layout,
            memory.store,
            memory.slots,
            self.store.slice,
            on_host,
            buffers,
            rows if self._form.corrects else None,
            cached,
        )

    def said_of_probes(self) -> str | None:
        """Return a line on probes of matrices that are written though they are of rank one."""
        if self._form.distribution != "rank-one":
            return None
        if self._probing is None:
            return (
                "probes are written block by block: a corrected forward of this model differs from "
                "the written one"
            )
        names = self._probing.written_matrices()
        if not names and self._folds.stacks:
            return None
        said = "each cell runs alone" if not self._folds.stacks else "rows of a fold are stacked"
        return f"probes are corrections; {said}; written at {', '.join(names) or 'no matrix'}"

    def table(
        self,
        probes: Sequence[Probe],
        rows: Sequence[int],
        forwards: Sequence[Callable[[], T]],
        together: Together = ALONE,
    ) -> list[T]:
        """Run forwards of a loss table, all of them in one pass over the model.

        Ranks that share slices call it together.

        Args:
            probes: the table's rows.
            rows: for each forward its row.
            forwards: of the model.
            together: which of them are computed together.

        Returns:
            The results, in order.
        """
        if not forwards and self.slices is None:
            return []
        self.streamer.begin(probes, rows, together.part)
        if not together.folds:
            return self._lockstep.run(forwards, self.streamer)
        # A probe that is written is of one cell alone.
        folds = together.folds if self._form.corrects else range(len(forwards))
        cells = [
            Cell(forward, probes[row], column, fold)
            for row, forward, column, fold in zip(
                rows, forwards, together.columns, folds, strict=True
            )
        ]
        return self._folds.run(cells, self.streamer, together.part)

    def whole(
        self,
        probes: Sequence[Probe],
        rows: Sequence[int],
        folds: Sequence[Sequence[int]],
        part: int,
        compute: Callable[[Sequence[int]], Sequence[T]],
    ) -> list[T]:
        """Run what calls the model many times; see :meth:`zo.streaming.whole.Whole.run`."""
        if self._whole is None:
            self._whole = Whole(self.binding, self._replay, self.cache, self._probing, self._form)
        return self._whole.run(probes, rows, folds, part, compute)

    def plain(self, forwards: Sequence[Callable[[], T]], at_once: int, passes: int) -> list[T]:
        """Run forwards of the unperturbed model, ``at_once`` in each of ``passes``."""
        results: list[T] = []
        for first in range(0, passes * at_once, at_once):
            together = forwards[first : first + at_once]
            results += self.table([UNPERTURBED], [0] * len(together), together)
        return results

    def weights(self) -> Iterator[tuple[Block, list[Tensor]]]:
        """Yield every block and its flat tensors at the newest version, one block at a time."""
        return self.streamer.weights()

    def fingerprint(self, each: Callable[[Block, Sequence[Tensor]], None] | None = None) -> str:
        """Hash all parameters at the newest version; ranks that share slices call it together.

        Args:
            each: is given every block and its flat tensors in turn.

        Returns:
            See :class:`zo.model.fingerprint.Fingerprint`.
        """
        found = Fingerprint(self.layout, share=self.store.slice)
        for block, weights in self.weights():
            found.add_segments(block, weights)
            if each is not None:
                each(block, weights)
        return self.combine(found)

    def combine(self, found: Fingerprint) -> str:
        """Return the fingerprint of weights; each rank that shares slices gives its digests."""
        whole = Fingerprint(self.layout, self.resident)
        whole.take_over(self._found, frozen=True)
        whole.take_over(found)
        if self.slices is not None:
            self.slices.combine(whole.digests)
        return whole.hexdigest()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of every parameter at the newest version.

        Unless ``is_resident``, a value is valid until the next one is asked for.
        """
        unfinished: dict[str, Tensor] = {}
        for block, weights in self.weights():
            for part, view in views(block, weights):
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
        """Visit every block once, for a rank that shares slices and needs all weights."""
        for _ in self.weights():
            pass

    def drain(self) -> None:
        """Wait for transfers under way, and raise what failed."""
        self.cache.drain()

    def traffic(self) -> Traffic:
        """Return the bytes moved so far; on a GPU, call it when a step's results have come."""
        return self.cache.traffic()

    def corrupt(self) -> list[str]:
        """Return the names of blocks found corrupt, and rebuilt, since the last call."""
        found, self.store.corrupt = self.store.corrupt, []
        return found

    def close(self, give_back: bool = False) -> None:
        """End the transfers and take the hooks off the model.

        Args:
            give_back: let the model hold its weights, in host memory where the store is not
                ``device``.
        """
        self._detach()
        if give_back and not self.is_resident:
            self.binding.fill(
                (name, tensor.to("cpu", copy=True)) for name, tensor in self.tensors()
            )
        self.cache.close()

    def rewind(self) -> None:
        """Forget the log of a trial: the weights are at version 0 until :meth:`open`.

        Not for weights that are on disk, where what was written back outlives the process.
        """
        assert self._source is not None
        assert not isinstance(self.store, DiskStore)
        self._detach()
        self.cache.close()
        self.store.reload(self._source)

    def _detach(self) -> None:
        """Take the hooks off the model."""
        self._folds.detach()
        self._lockstep.detach()
        if self._probing is not None:
            self._probing.detach()
        self.cache.bind_at_rest(self.binding)


def _spec(model: nn.Module, names: tuple[str, ...]) -> Spec:
    parameter = model.get_parameter(names[0])
    return Spec(names, tuple(parameter.shape), parameter.dtype, frozen=True)
