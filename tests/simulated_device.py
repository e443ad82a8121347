"""A device on CPU that is worse than a GPU: copies run as late, and in as odd an order, as events
allow.

Copies are queued and run in two pieces, when an event forces them or when a seeded draw says so.
Every access to memory that transfers touch, by a stream, by PyTorch's operations on the compute
stream, by a worker thread or by the replay kernel, is stamped with a vector clock (Lamport 1978;
Fidge 1988); two accesses of which one writes and neither happens before the other are a race and
end the run, whatever values they saw.
"""

import random
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zo.io import engines
from zo.state import replay
from zo.streaming import device as devices
from zo.streaming import disk_store


class RaceError(AssertionError):
    """Two accesses to the same memory that nothing orders."""


class Stream:
    def __init__(self, number):
        self.number, self.queue = number, deque()

    def __repr__(self):
        return f"stream {self.number}"


class Event:
    def __init__(self, stream, clock):
        self.stream, self.clock, self.passed = stream, clock, False


class SimulatedDevice:
    """See :class:`zo.streaming.device.Device`."""

    shares_host_memory = False

    def __init__(self, seed):
        self.random, self.lock = random.Random(seed), threading.RLock()
        self.streams = [Stream(0)]
        self.clocks = {}
        self.local = threading.local()
        self.regions = []
        self.locked = {}
        self.race = None
        self.counts = {"copies": 0, "delayed": 0, "accesses": 0}

    # Clocks.

    def _clock(self, actor):
        return self.clocks.setdefault(actor, {actor: 0})

    def _thread(self):
        return f"thread {threading.current_thread().name}"

    def _join(self, actor, other):
        mine = self._clock(actor)
        for key, value in other.items():
            mine[key] = max(mine.get(key, 0), value)

    def _tick(self, actor):
        clock = self._clock(actor)
        clock[actor] += 1
        return dict(clock)

    # Memory.

    def register(self, memory, on_device):
        """Watch the storage of a tensor; return its record."""
        storage = memory.untyped_storage()
        found = self._region(storage.data_ptr())
        if found is None:
            start = storage.data_ptr()
            # The tensor is kept, so that its address is not given to another one.
            found = {
                "start": start,
                "stop": start + storage.nbytes(),
                "device": on_device,
                "log": [],
                "keep": memory,
            }
            self.regions.append(found)
        return found

    def _region(self, address):
        return next((r for r in self.regions if r["start"] <= address < r["stop"]), None)

    def access(self, tensor, write, what, stream=None):
        """Note that a tensor is read or written now, by a stream or by the calling thread."""
        if not tensor.numel() or not tensor.is_contiguous():
            return
        with self.lock:
            region = self._region(tensor.data_ptr())
            if region is None:
                return
            self.counts["accesses"] += 1
            actor = stream or (self.compute_stream() if region["device"] else self._thread())
            self._join(actor, self._clock(self._thread()))
            clock = self._tick(actor)
            start = tensor.data_ptr()
            self._check(
                region,
                start,
                start + tensor.numel() * tensor.element_size(),
                write,
                actor,
                clock,
                what,
            )

    def _check(self, region, start, stop, write, actor, clock, what):
        kept = []
        for other in region["log"]:
            o_start, o_stop, o_write, o_actor, o_time, o_what = other
            before = o_actor == actor or clock.get(o_actor, 0) >= o_time
            if o_start < stop and start < o_stop and (write or o_write) and not before:
                self.race = RaceError(
                    f"{what} by {actor} is not ordered after {o_what} by {o_actor}"
                )
                raise self.race
            covered = start <= o_start and o_stop <= stop
            if not (covered and before and (write or (not o_write and o_actor == actor))):
                kept.append(other)
        region["log"] = [*kept, (start, stop, write, actor, clock[actor], what)]

    # The protocol.

    def empty(self, size_bytes):
        memory = torch.from_numpy(np.full(size_bytes, 0xAB, np.uint8))
        with self.lock:
            self.register(memory, on_device=True)
        return memory

    def worker(self, name):
        return Worker(self, name)

    def stream(self):
        with self.lock:
            self.streams.append(Stream(len(self.streams)))
            return self.streams[-1]

    def compute_stream(self):
        return getattr(self.local, "stream", self.streams[0])

    @contextmanager
    def use(self, stream):
        before, self.local.stream = self.compute_stream(), stream
        try:
            yield
        finally:
            self.local.stream = before

    def copy(self, destination, source, stream):
        with self.lock:
            self._raise_race()
            for tensor in (destination, source):
                self.register(tensor, on_device=False)
            self.access(source, False, "copy from", stream)
            self.access(destination, True, "copy to", stream)
            to, of = destination.numpy(), source.numpy()
            half = len(to) // 2
            stream.queue += [(to[:half], of[:half]), (to[half:], of[half:])]
            self.counts["copies"] += 1
            self._progress()

    def record(self, stream):
        with self.lock:
            self._raise_race()
            self._join(stream, self._clock(self._thread()))
            event = Event(stream, self._tick(stream))
            stream.queue.append(event)
            self._progress()
            return event

    def wait(self, stream, event):
        with self.lock:
            self._raise_race()
            self._join(stream, event.clock)
            stream.queue.append(("wait", event))
            if stream is self.compute_stream():
                self._run_all(
                    stream
                )  # PyTorch's operations run at once, so what they wait for must too.
            self._progress()

    def synchronize(self, event):
        with self.lock:
            self._force(event)
            self._join(self._thread(), event.clock)

    def has_passed(self, event):
        with self.lock:
            self._progress()
            if event.passed:
                self._join(self._thread(), event.clock)
            return event.passed

    def elapsed_s(self, start, stop):
        return 0.0

    def lock_pages(self, memory):
        with self.lock:
            self.register(memory, on_device=False)
            assert memory.data_ptr() not in self.locked, "locked twice"
            self.locked[memory.data_ptr()] = memory

    def unlock_pages(self, memory):
        del self.locked[memory.data_ptr()]

    # Running what is queued.

    def _run_head(self, stream):
        item = stream.queue.popleft()
        if isinstance(item, Event):
            item.passed = True
        elif item[0] is not None and isinstance(item[0], str):
            self._force(item[1])
        else:
            np.copyto(*item)

    def _force(self, event):
        while not event.passed:
            self._run_head(event.stream)

    def _run_all(self, stream):
        while stream.queue:
            self._run_head(stream)

    def _runnable(self, stream):
        head = stream.queue[0] if stream.queue else None
        waits = isinstance(head, tuple) and isinstance(head[0], str)
        return head is not None and not (waits and not head[1].passed)

    def _progress(self):
        """Let some streams go on for a while, or none."""
        while self.random.random() < 0.4:
            ready = [s for s in self.streams if self._runnable(s)]
            if not ready:
                return
            self._run_head(self.random.choice(ready))
        self.counts["delayed"] += any(s.queue for s in self.streams)

    def _raise_race(self):
        if self.race is not None:
            raise self.race


class Worker(ThreadPoolExecutor):
    """A worker thread that begins late, and whose results carry its clock."""

    def __init__(self, device, name):
        super().__init__(1, name)
        self._device = device

    def submit(self, job, *arguments):
        device = self._device
        with device.lock:
            begin, delay_s = (
                device._tick(device._thread()),
                device.random.choice((0, 0, 0.0005, 0.002)),
            )

        def run():
            time.sleep(delay_s)
            with device.lock:
                device._join(device._thread(), begin)
            try:
                with Watch(device):
                    return job(*arguments)
            finally:
                with device.lock:
                    ends[0] = device._tick(device._thread())

        ends = [{}]
        return Ordered(device, super().submit(run), ends)


class Ordered:
    """A future whose result orders the thread that takes it after the worker."""

    def __init__(self, device, future, ends):
        self._device, self._future, self._ends = device, future, ends

    def _joined(self, value):
        with self._device.lock:
            self._device._join(self._device._thread(), self._ends[0])
        return value

    def result(self):
        self._future.exception()
        self._joined(None)
        return self._future.result()

    def exception(self):
        return self._joined(self._future.exception())

    def done(self):
        return self._future.done()


class Watch(TorchDispatchMode):
    """Notes what PyTorch's operations read and write."""

    def __init__(self, device):
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not func.is_view and func.namespace == "aten" and "empty" not in func.name():
            written = set()
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written |= {id(leaf) for leaf in tree_leaves(value)}
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                    self._device.access(leaf, id(leaf) in written, func.name())
        return func(*args, **kwargs)


@contextmanager
def simulated(seed):
    """Let every replica of this process compute on a simulated device; yield the devices that were
    made.
    """
    made = []

    def make(torch_device):
        made.append(SimulatedDevice(seed + len(made)))
        return made[-1]

    def noting(function, note):
        def noted(*arguments, **options):
            for device in made:
                note(device, *arguments, **options)
            return function(*arguments, **options)

        return noted

    def note_replay(device, weights, address, work, out=None, rows=None, matrices=()):
        device.access(weights, bool(work.changes), "replay")

    def read(device, engine, path, offset, into):
        device.access(into, True, "read")

    def write(device, engine, path, data):
        device.access(data, False, "write")

    def checksum(device, image):
        device.access(image, False, "checksum")

    patched = [
        (devices.DEVICES, "cpu", make),
        (replay, "replay_and_perturb", noting(replay.replay_and_perturb, note_replay)),
        (engines.Mapped, "read", noting(engines.Mapped.read, read)),
        (engines.Mapped, "write", noting(engines.Mapped.write, write)),
        (disk_store, "checksum", noting(disk_store.checksum, checksum)),
    ]
    before = [(owner, name, _get(owner, name)) for owner, name, _ in patched]
    watch = WatchAll(made)
    try:
        for owner, name, value in patched:
            _set(owner, name, value)
        with watch:
            yield made
    finally:
        for owner, name, value in before:
            _set(owner, name, value)
    for device in made:
        device._raise_race()
        assert not device.locked, "pages stay locked"


class WatchAll(Watch):
    """:class:`Watch` for every device that is made while it is on."""

    def __init__(self, made):
        super().__init__(None)
        self._made = made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self._made:
            return func(*args, **(kwargs or {}))
        self._device = self._made[-1]
        return super().__torch_dispatch__(func, types, args, kwargs)


def _get(owner, name):
    return owner[name] if isinstance(owner, dict) else getattr(owner, name)


def _set(owner, name, value):
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def install(seed):
    """Compute on a simulated device to the end of this process: a rank's prelude."""
    simulated(seed).__enter__()
