"""Run many ordinary forwards block by block, so that one visit of a block serves all of them.

Each forward is a plain function call in a greenlet of its own. A pre-forward hook on the modules
that enter a block suspends it; the hub resumes every forward that waits for the same block before
any of them continues to the next. No model is rewritten, and nothing is assumed of its inputs,
outputs or control flow: a forward that takes another path waits for another block and is served
there. A vocabulary in chunks is looked up, or multiplied by, chunk by chunk.

Enter autocast and grad modes outside :meth:`Lockstep.run`, never inside a forward across a block:
they belong to the thread, not to the greenlet.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from itertools import groupby
from typing import Any, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.nn import functional

from zo.model.binding import Binding
from zo.model.layout import Block, Part
from zo.model.patches import Patches
from zo.model.probing import Probing

T = TypeVar("T")


class BlockProvider(Protocol):
    """Serves each block to the forwards waiting for it."""

    def next(self, block: int | None, lookup: bool) -> int | None:
        """Return the block to serve next, or ``None`` to end the run.

        Args:
            block: the earliest that a forward waits for, ``None`` if none waits. Another one is
                returned where other ranks need it first.
            lookup: True if rows of it are looked up.
        """
        ...

    def serve(
        self, block: int, forwards: Sequence[int], row_numbers: Sequence[Tensor | None]
    ) -> Iterable[int]:
        """Yield every given forward once, each when the block holds that forward's weights.

        Args:
            block: index of the block.
            forwards: numbers of the forwards that wait for it.
            row_numbers: for each forward, the rows of an embedding that it looks up, int64, or
                ``None`` if it may read all of the block.
        """
        ...


class Lockstep:
    """Hooks on a model's blocks; forwards outside :meth:`run` pass through them untouched."""

    def __init__(
        self,
        binding: Binding,
        offload: bool = False,
        fixed_shapes: bool = False,
        probing: Probing | None = None,
    ) -> None:
        """Attach the hooks.

        Args:
            binding: the model's parameters.
            probing: computes with probes that are not written, if there are any.
            offload: keep the hidden states of waiting forwards in host memory.
            fixed_shapes: look up a vocabulary in chunks on the CPU as on a GPU, where the host must
                not wait for the number of ids in a chunk.
        """
        self._fixed_shapes, self._probing = fixed_shapes, probing
        model, self._binding, self._offload = binding.model, binding, offload
        self._waiting: dict[greenlet, int | None] = {}
        self._row_numbers: dict[greenlet, Tensor | None] = {}
        self._hub = getcurrent()
        self._greenlets: dict[int, greenlet] = {}
        self._started: list[int] = []
        self._suspend = {
            model.get_submodule(name): self._hook(block.index)
            for block in binding.layout.blocks
            for name in block.modules
        }
        self._hooks = [
            module.register_forward_pre_hook(hook) for module, hook in self._suspend.items()
        ]
        self._patches = Patches()
        chunks = [block for block in binding.layout.blocks if block.parts[0].rows is not None]
        for _, of_one in groupby(chunks, key=lambda block: block.parts[0].parameter.name):
            self._patch(model, list(of_one))

    def _hook(self, block: int) -> Callable[..., None]:
        def suspend(module: nn.Module, arguments: Any) -> None:
            # A subclass with a forward of its own may read more than the rows that it is given.
            plain_lookup = type(module).forward is nn.Embedding.forward and len(arguments) == 1
            hidden = arguments[0] if arguments and isinstance(arguments[0], Tensor) else None
            self._enter(block, hidden if plain_lookup else None, hidden)

        return suspend

    def enter(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Suspend the current forward as a call of the module with these arguments would."""
        if module in self._suspend:
            self._suspend[module](module, arguments)

    def enter_block(self, block: int) -> None:
        """Suspend the current forward until the block holds its weights."""
        self._enter(block)

    def _enter(
        self, block: int, row_numbers: Tensor | None = None, hidden: Tensor | None = None
    ) -> None:
        """Suspend the current forward until the block holds its weights."""
        forward = getcurrent()
        if forward not in self._waiting:
            return
        # Before its first block a forward has only its batch, which other forwards share.
        own = (
            self._offload
            and forward in self._row_numbers
            and hidden is not None
            and hidden.is_floating_point()
        )
        self._waiting[forward], self._row_numbers[forward] = block, row_numbers
        restore = _offload_activation(hidden) if own and hidden is not None else None
        forward.parent.switch()
        if restore is not None:
            restore()

    def _patch(self, model: nn.Module, chunks: list[Block]) -> None:
        """Let the modules that own a parameter in chunks compute chunk by chunk."""
        for name in chunks[0].parts[0].parameter.spec.names:
            module = model.get_submodule(name.rpartition(".")[0])
            make = self._lookup if isinstance(module, nn.Embedding) else self._head
            self._patches.replace(module, make(chunks))

    def _lookup(self, chunks: list[Block]) -> Callable[[Tensor], Tensor]:
        def forward(ids: Tensor) -> Tensor:
            width, dtype = chunks[0].parts[0].shape[1], chunks[0].parts[0].parameter.spec.dtype
            found = torch.empty(ids.numel(), width, dtype=dtype, device=ids.device)
            fixed = self._fixed_shapes or ids.device.type != "cpu"
            for chunk in chunks:
                look_up = self._look_up_all if fixed else self._look_up_inside
                look_up(chunk, ids.flatten(), found)
            return found.view(*ids.shape, width)

        return forward

    def _look_up_inside(self, chunk: Block, ids: Tensor, found: Tensor) -> None:
        """Write the rows of the ids in a chunk to ``found``; skip a chunk without any.

        Args:
            chunk: some rows of a vocabulary.
            ids: integers of shape ``[n]``.
            found: shape ``[n, width]``; *modified in place*.
        """
        first, stop = chunk.parts[0].rows or (0, 0)
        inside = ((ids >= first) & (ids < stop)).nonzero().squeeze(1)
        if len(inside):
            rows = ids[inside] - first
            self._enter(chunk.index, rows)
            found[inside] = self._look_up_rows(chunk, rows, inside, len(ids))

    def _look_up_all(self, chunk: Block, ids: Tensor, found: Tensor) -> None:
        """Do the same for all ids, in or out of the chunk: no shape depends on their values.

        On a GPU the host would wait for the number of ids inside. See :meth:`_look_up_inside`.
        """
        first, stop = chunk.parts[0].rows or (0, 0)
        rows = (ids - first).clamp(0, stop - first - 1)
        self._enter(chunk.index, rows)
        places = torch.arange(len(ids), device=ids.device)
        values = self._look_up_rows(chunk, rows, places, len(ids))
        inside = ((ids >= first) & (ids < stop)).unsqueeze(1)
        torch.where(inside, values, found, out=found)

    def _look_up_rows(self, chunk: Block, rows: Tensor, places: Tensor, of: int) -> Tensor:
        found = functional.embedding(rows, self._binding.chunks[chunk.index])
        if self._probing is None:
            return found
        return self._probing.embedding(chunk.parts[0], rows, found, places, of)

    def _head(self, chunks: list[Block]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            vocabulary = chunks[0].parts[0].parameter.spec.shape[0]
            logits = torch.empty(*x.shape[:-1], vocabulary, dtype=x.dtype, device=x.device)
            for chunk in chunks:
                first, stop = chunk.parts[0].rows or (0, 0)
                self._enter(chunk.index)
                product = self._probing.linear if self._probing else _plain_product
                logits[..., first:stop] = product(
                    chunk.parts[0], x, self._binding.chunks[chunk.index]
                )
            return logits

        return forward

    def run(
        self,
        forwards: Sequence[Callable[[], T]],
        provider: BlockProvider,
        numbers: Sequence[int] | None = None,
    ) -> list[T]:
        """Run every forward to its end and return their results in order.

        Args:
            forwards: functions that call the model.
            provider: serves the blocks.
            numbers: of the forwards, by which the provider knows them; 0, 1, ... by default.

        Raises:
            Exception: whatever a forward or the provider raises; the others are ended.
        """
        numbers = range(len(forwards)) if numbers is None else numbers
        results: dict[int, Any] = {}
        self._hub = getcurrent()
        try:
            for number, forward in zip(numbers, forwards, strict=True):
                self.start(number, forward)
            self._resume_started(results)
            while (waiting := self._next(provider)) is not None:
                block, here = waiting
                rows = [self._row_numbers[self._greenlets[number]] for number in here]
                with closing(provider.serve(block, here, rows)) as served:  # type: ignore[type-var]
                    for number in served:
                        self._started.append(number)
                        self._resume_started(results)
        finally:
            left, self._greenlets, self._started = list(self._greenlets.values()), {}, []
            self._waiting, self._row_numbers = {}, {}
            for g in left:
                if not g.dead:
                    g.throw()
        return [results[number] for number in numbers]

    def start(self, number: int, forward: Callable[[], Any]) -> None:
        """Add a forward; during :meth:`run` one may take the place of an ended one's number."""
        self._greenlets[number] = greenlet(forward, self._hub)
        self._started.append(number)

    def _resume_started(self, results: dict[int, Any]) -> None:
        while self._started:
            number = self._started.pop(0)
            current = self._greenlets[number]
            self._waiting[current] = None
            result = current.switch()
            if current.dead:
                results[number] = result

    def _next(self, provider: BlockProvider) -> tuple[int, list[int]] | None:
        """Return the block to serve next, and the numbers of the forwards that wait for it."""
        waiting = {n: b for n, g in self._greenlets.items() if (b := self._waiting[g]) is not None}
        # The earliest block first: forwards that skipped one wait for the others.
        earliest = min(waiting.values(), default=None)
        lookup = any(
            self._row_numbers[self._greenlets[number]] is not None
            for number, block in waiting.items()
            if block == earliest
        )
        block = provider.next(earliest, earliest is not None and lookup)
        if block is None:
            return None
        return block, sorted(number for number, waits_for in waiting.items() if waits_for == block)

    def detach(self) -> None:
        """Remove the hooks and restore the forwards that were replaced."""
        for hook in self._hooks:
            hook.remove()
        self._patches.restore()


def _plain_product(part: Part, x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight)


def _offload_activation(tensor: Tensor) -> Callable[[], None]:
    """Move a tensor's storage to host memory, free it on the device, and return what restores it.

    The storage is emptied in place, so that every reference that the forward holds stays valid. On
    a GPU copies are in the order of its stream, as is the reuse of what is freed.
    """
    storage = tensor.untyped_storage()
    size, there = (
        storage.nbytes(),
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage),
    )
    here = torch.empty(size, dtype=torch.uint8, pin_memory=tensor.device.type == "cuda")
    here.copy_(there, non_blocking=True)
    storage.resize_(0)

    def restore() -> None:
        storage.resize_(size)
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage).copy_(
            here, non_blocking=True
        )

    return restore
