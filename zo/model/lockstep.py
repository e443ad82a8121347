"""Many ordinary forwards, one block at a time, so that one visit of a block serves every cell of the loss table.

Each cell is a plain function call in a greenlet of its own. A pre-forward hook on the modules that enter a block
suspends it; the hub resumes every cell that waits for the same block before any of them goes on to the next. No
model is rewritten, and nothing is assumed of its inputs, outputs or control flow: a cell that takes another path
waits for another block and is served there. A vocabulary in chunks is looked up, or multiplied by, chunk by chunk.

Enter autocast and grad modes outside :meth:`Lockstep.run`, never inside a cell across a block: they belong to the
thread, not to the greenlet.
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
from zo.model.layout import Block

T = TypeVar("T")


class BlockProvider(Protocol):
    """Serves each block to the forwards waiting for it."""

    def next(self, block: int | None, lookup: bool) -> int | None:
        """Return the block to serve next, or ``None`` to end the run.

        ``block`` is the earliest that a cell waits for, and ``lookup`` whether rows of it are looked up; ``None`` where
        none waits. Another one is served where other ranks need it first.
        """
        ...

    def serve(
        self, block: int, forwards: Sequence[int], row_numbers: Sequence[Tensor | None]
    ) -> Iterable[int]:
        """Yield every given forward once, each when the block holds that forward's weights.

        ``row_numbers`` holds, for each forward, the rows of an embedding that it looks up, if that is all it does.
        """
        ...


class Lockstep:
    """Hooks on a model's blocks; plain forwards outside :meth:`run` pass through them untouched."""

    def __init__(self, binding: Binding, offload: bool = False) -> None:
        """Attach the hooks.

        Args:
            binding: the model's parameters.
            offload: keep the hidden states of cells that wait in host memory.
        """
        model, self._binding, self._offload = binding.model, binding, offload
        self._waiting: dict[greenlet, int | None] = {}
        self._row_numbers: dict[greenlet, Tensor | None] = {}
        self._hooks = [
            model.get_submodule(name).register_forward_pre_hook(self._hook(block.index))
            for block in binding.layout.blocks
            for name in block.modules
        ]
        self._patched: list[nn.Module] = []
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

    def _enter(
        self, block: int, row_numbers: Tensor | None = None, hidden: Tensor | None = None
    ) -> None:
        """Wait, in a cell, until the block holds the cell's weights."""
        cell = getcurrent()
        if cell not in self._waiting:
            return
        # What a cell has before its first block is its batch's, and other cells' too.
        own = (
            self._offload
            and cell in self._row_numbers
            and hidden is not None
            and hidden.is_floating_point()
        )
        self._waiting[cell], self._row_numbers[cell] = block, row_numbers
        restore = _offload_activation(hidden) if own and hidden is not None else None
        cell.parent.switch()
        if restore is not None:
            restore()

    def _patch(self, model: nn.Module, chunks: list[Block]) -> None:
        """Let the modules that own a parameter in chunks compute with one chunk after another."""
        for name in chunks[0].parts[0].parameter.spec.names:
            module = model.get_submodule(name.rpartition(".")[0])
            make = self._lookup if isinstance(module, nn.Embedding) else self._head
            module.forward = make(chunks)
            self._patched.append(module)

    def _lookup(self, chunks: list[Block]) -> Callable[[Tensor], Tensor]:
        def forward(ids: Tensor) -> Tensor:
            width, dtype = chunks[0].parts[0].shape[1], chunks[0].parts[0].parameter.spec.dtype
            flat = ids.flatten()
            found = torch.empty(len(flat), width, dtype=dtype, device=ids.device)
            for chunk in chunks:
                first, stop = chunk.parts[0].rows or (0, 0)
                inside = ((flat >= first) & (flat < stop)).nonzero().squeeze(1)
                if len(inside):
                    rows = flat[inside] - first
                    self._enter(chunk.index, rows)
                    found[inside] = functional.embedding(rows, self._binding.chunks[chunk.index])
            return found.view(*ids.shape, width)

        return forward

    def _head(self, chunks: list[Block]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            vocabulary = chunks[0].parts[0].parameter.spec.shape[0]
            logits = torch.empty(*x.shape[:-1], vocabulary, dtype=x.dtype, device=x.device)
            for chunk in chunks:
                first, stop = chunk.parts[0].rows or (0, 0)
                self._enter(chunk.index)
                logits[..., first:stop] = functional.linear(x, self._binding.chunks[chunk.index])
            return logits

        return forward

    def run(self, cells: Sequence[Callable[[], T]], provider: BlockProvider) -> list[T]:
        """Run every cell to its end and return their results in order.

        Raises:
            Exception: whatever a forward or the provider raises; the other cells are ended where they stand.
        """
        greenlets = [greenlet(cell) for cell in cells]
        self._waiting = dict.fromkeys(greenlets)
        results: list[Any] = [None] * len(cells)

        def resume(cell: int) -> None:
            self._waiting[greenlets[cell]] = None
            result = greenlets[cell].switch()
            if greenlets[cell].dead:
                results[cell] = result

        try:
            for cell in range(len(cells)):
                resume(cell)
            while True:
                # The earliest block first: cells that skipped one wait for those that did not.
                earliest = min((b for b in self._waiting.values() if b is not None), default=None)
                lookup = any(
                    self._row_numbers[g] is not None
                    for g, b in self._waiting.items()
                    if b == earliest
                )
                block = provider.next(earliest, earliest is not None and lookup)
                if block is None:
                    break
                here = [cell for cell, g in enumerate(greenlets) if self._waiting[g] == block]
                rows = [self._row_numbers[greenlets[cell]] for cell in here]
                with closing(provider.serve(block, here, rows)) as served:  # type: ignore[type-var]
                    for cell in served:
                        resume(cell)
        finally:
            self._waiting, self._row_numbers = {}, {}
            for g in greenlets:
                if not g.dead:
                    g.throw()
        return results

    def detach(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        while self._patched:
            del self._patched.pop().forward


def _offload_activation(tensor: Tensor) -> Callable[[], None]:
    """Move a tensor's memory to the host and free it where it was; what is returned brings it back.

    The storage is emptied in place, so that every reference that the forward holds stays valid. On a GPU copies are in
    the order of its stream, as is the reuse of what is freed.
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
