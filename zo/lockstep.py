"""Many ordinary forwards, one block at a time, so that one visit of a block serves every cell of the loss table.

Each cell is a plain function call in a greenlet of its own. A pre-forward hook on the modules that enter a block
suspends it; the hub resumes every cell that waits for the same block before any of them goes on to the next. No
model is rewritten, and nothing is assumed of its inputs, outputs or control flow: a cell that takes another path
waits for another block and is served there.

Enter autocast and grad modes outside :meth:`Lockstep.run`, never inside a cell across a block: they belong to the
thread, not to the greenlet.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any, Protocol, TypeVar

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from zo.layout import Layout

T = TypeVar("T")


class Lender(Protocol):
    """Puts a block's weights in place for each cell in turn."""

    def lend(self, block: int, cells: Sequence[int], row_numbers: Sequence[Tensor | None]) -> Iterable[int]:
        """Yield every given cell once, each when the block holds that cell's weights.

        ``row_numbers`` holds, for each cell, which rows of an embedding it is about to look up, if that is all it does.
        """
        ...


class Lockstep:
    """Hooks on a model's blocks; plain forwards outside :meth:`run` pass through them untouched."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        """Attach the hooks."""
        self._waiting: dict[greenlet, int | None] = {}
        self._row_numbers: dict[greenlet, Tensor | None] = {}
        self._hooks = [
            model.get_submodule(name).register_forward_pre_hook(self._hook(block.index))
            for block in layout.blocks
            for name in block.modules
        ]

    def _hook(self, block: int) -> Callable[..., None]:
        def suspend(module: nn.Module, arguments: Any) -> None:
            cell = getcurrent()
            if cell in self._waiting:
                self._waiting[cell] = block
                # A subclass with a forward of its own may read more than the rows that it is given.
                plain_lookup = type(module).forward is nn.Embedding.forward and len(arguments) == 1
                self._row_numbers[cell] = arguments[0] if plain_lookup else None
                cell.parent.switch()

        return suspend

    def run(self, cells: Sequence[Callable[[], T]], lender: Lender) -> list[T]:
        """Run every cell to its end and return their results in order.

        Raises:
            Exception: whatever a cell or the lender raises; the other cells are ended where they stand.
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
            while (block := next((b for b in self._waiting.values() if b is not None), None)) is not None:
                here = [cell for cell, g in enumerate(greenlets) if self._waiting[g] == block]
                rows = [self._row_numbers[greenlets[cell]] for cell in here]
                with closing(lender.lend(block, here, rows)) as lent:  # type: ignore[type-var]
                    for cell in lent:
                        resume(cell)
        finally:
            self._waiting, self._row_numbers = {}, {}
            for g in greenlets:
                if not g.dead:
                    g.throw()
        return results

    def detach(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
