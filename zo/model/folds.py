"""Compute cells of a loss table together: what is equal once, and rows of a fold in one product.

Each cell is an ordinary forward in a greenlet of its own. Cells meet at modules (the layers, and
what stands outside them): the arguments of those that wait at one are stacked in the batch dim, the
module runs once, and each cell goes on with its rows of the output. Below the first block that
probes reach, the cells of a micro-batch are the same computation, which is done once (feature
reuse: Chen et al. 2023, "DeepZero"); from there on every fold goes its own way.

    cells --(wait at a module)--> fold: stack, run once, split --> cells
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, TypeVar

from greenlet import getcurrent, greenlet

from zo.method.passes import Probe
from zo.model.binding import Binding
from zo.model.form import Form
from zo.model.layout import Layout
from zo.model.lockstep import BlockProvider, Lockstep
from zo.model.patches import Patches
from zo.model.probing import Probing
from zo.model.stacking import Call, Stacker, split

T = TypeVar("T")


@dataclass(frozen=True)
class Cell(Generic[T]):
    """One cell of a table: a forward, and what it is computed together with."""

    forward: Callable[[], T]
    probe: Probe
    column: int = 0
    fold: int = 0
    """Cells of a fold share each product; those of a column have the same micro-batch."""


@dataclass(frozen=True)
class Together:
    """Which forwards of a table are computed together."""

    columns: Sequence[int] = ()
    """For each forward its micro-batch."""
    folds: Sequence[int] = ()
    """For each forward its fold; empty if each is computed alone."""
    part: int = 0
    """Position of the first block that probes reach."""


ALONE = Together()


class Folds:
    """The meeting points of a model's cells; forwards outside :meth:`run` pass through them."""

    def __init__(
        self, binding: Binding, lockstep: Lockstep, probing: Probing | None, form: Form
    ) -> None:
        """Replace the forwards of the modules to meet at.

        Args:
            binding: of the model.
            lockstep: serves the blocks that the modules enter.
            probing: computes with the probes of a fold; its forwards are inside of these.
            form: of the probes.
        """
        self._lockstep, self._probing = lockstep, probing
        self.stacks = form.meet in ("layer", "module")
        self._cells: set[greenlet] = set()
        self._stacker = Stacker()
        self._patches = Patches()
        self._inner: dict[str, Callable[..., Any]] = {}
        self._meet_at = _meeting_points(binding.layout, probing, form)
        """Names of the modules to meet at, and their positions in the order of the forward."""
        self._modules = {name: binding.model.get_submodule(name) for name in self._meet_at}
        for name, module in self._modules.items():
            self._inner[name] = module.forward
            self._patches.replace(module, self._meet(name))

    def _meet(self, name: str) -> Callable[..., Any]:
        inner = self._inner[name]

        def forward(*arguments: Any, **options: Any) -> Any:
            here = getcurrent()
            if here in self._cells:
                return here.parent.switch((name, Call(arguments, options)))
            return inner(*arguments, **options)

        return forward

    def run(self, cells: Sequence[Cell[T]], provider: BlockProvider, part: int = 0) -> list[T]:
        """Run the cells of a table to their ends and return their results in order.

        Args:
            cells: those of one column, and of one fold, follow one another.
            provider: serves the blocks.
            part: position of the first block that probes reach.
        """
        results: list[Any] = [None] * len(cells)
        # Above the fork, and without one, folds have nothing in common.
        shared = ("column", "fold") if part else ("fold",)
        drivers = [
            _Driver(self, numbers, cells, results, part) for numbers in _parties(cells, shared)
        ]
        if self._probing is not None:
            self._probing.part = part
        try:
            # Below the fork a driver computes no cell's probe: its number is beyond theirs.
            numbers = [d.cells[0] + (len(cells) if part else 0) for d in drivers]
            self._lockstep.run([d.run for d in drivers], provider, numbers)
        finally:
            self._cells.clear()
            self._stacker = Stacker()
        return results

    def computing(self, probes: tuple[Probe, ...]) -> AbstractContextManager[None]:
        """Let the current greenlet compute with these probes, if they are not written."""
        return nullcontext() if self._probing is None else self._probing.computing(probes)

    def detach(self) -> None:
        """Restore the forwards that were replaced."""
        self._patches.restore()


def _meeting_points(layout: Layout, probing: Probing | None, form: Form) -> dict[str, int]:
    place = {module: at for at, module in enumerate(form.order)}
    if form.meet == "module" and probing is not None:
        return {name: place.get(name, at) for name, at in probing.positions().items()}
    return {module: place[module] for group in layout.groups for module in group.modules}


def _parties(cells: Sequence[Cell[T]], shared: Sequence[str]) -> list[list[int]]:
    """Return the numbers of cells that have a column or a fold in common, joined."""
    party_of: dict[tuple[str, int], list[int]] = {}
    parties: list[list[int]] = []
    for number, cell in enumerate(cells):
        keys = [(key, getattr(cell, key)) for key in shared]
        party = next((party_of[key] for key in keys if key in party_of), None)
        if party is None:
            parties.append(party := [])
        party.append(number)
        party_of.update(dict.fromkeys(keys, party))
    return parties


@contextmanager
def _ended_together(greenlets: Mapping[int, greenlet]) -> Iterator[None]:
    """End greenlets that are left when an error ends the work on them."""
    try:
        yield
    finally:
        for cell in greenlets.values():
            if not cell.dead:
                cell.throw()


class _Driver:
    """A greenlet of the lockstep that runs some cells together."""

    def __init__(
        self,
        folds: Folds,
        numbers: list[int],
        cells: Sequence[Cell[Any]],
        results: list[Any],
        part: int,
    ) -> None:
        self._folds, self.cells, self._table, self._results = folds, numbers, cells, results
        self._part = part
        self._greenlets: dict[int, greenlet] = {}
        self._calls: dict[int, tuple[str, Call]] = {}
        self._is_below = part > 0
        self._followers: dict[int, list[int]] = {}
        """Below the fork, the cells that compute what the first one of their column computes."""
        self._behind: dict[int, tuple[str, Call]] = {}
        """Calls of followers, which wait where their first cell waits."""

    def run(self) -> None:
        """Run the cells to their ends, or to the fork."""
        self._greenlets = {
            number: greenlet(self._table[number].forward, getcurrent()) for number in self.cells
        }
        self._folds._cells.update(self._greenlets.values())
        firsts = list(self.cells)
        if self._is_below:
            of_column: dict[int, int] = {}
            for number in self.cells:
                first = of_column.setdefault(self._table[number].column, number)
                if first != number:
                    self._followers.setdefault(first, []).append(number)
            firsts = list(of_column.values())
        with _ended_together(self._greenlets):
            for number in firsts:
                self._resume(number)
            self._go_on()

    def _resume(self, number: int, *output: Any) -> None:
        """Let a cell go on with the output of its call, and its followers with the same."""
        self._switch(number, output, self._calls)
        for follower in self._followers.get(number, ()):
            self._switch(follower, output, self._behind)

    def _switch(
        self, number: int, output: tuple[Any, ...], calls: dict[int, tuple[str, Call]]
    ) -> None:
        cell = self._greenlets[number]
        waits_for = cell.switch(*output)
        if cell.dead:
            self._results[number] = waits_for
            calls.pop(number, None)
        else:
            calls[number] = waits_for

    def _go_on(self) -> None:
        meet_at = self._folds._meet_at
        while self._calls:
            name = min((name for name, _ in self._calls.values()), key=meet_at.__getitem__)
            if self._is_below and meet_at[name] >= self._part:
                return self._fork()
            here = [number for number, (at, _) in self._calls.items() if at == name]
            calls = {number: self._calls.pop(number)[1] for number in here}
            for number, output in self._call(name, calls):
                self._resume(number, output)
        return None

    def _call(self, name: str, calls: Mapping[int, Call]) -> Iterable[tuple[int, Any]]:
        """Run a module for the cells that wait at it, once if that can be; return their outputs."""
        numbers = list(calls)
        stacks = self._folds.stacks or len(numbers) == 1
        stacked = self._folds._stacker.stack(list(calls.values())) if stacks else None
        outputs: dict[int, Any] = {}
        for group, call in (
            [(numbers, stacked)] if stacked else [([number], calls[number]) for number in numbers]
        ):
            probes = () if self._is_below else tuple(self._table[n].probe for n in group)
            with self._folds.computing(probes):
                self._folds._lockstep.enter(self._folds._modules[name], call.arguments)
                output = self._folds._inner[name](*call.arguments, **call.options)
            outputs |= dict(zip(group, split(output, len(group)), strict=True))
        return outputs.items()

    def _fork(self) -> None:
        """Let each fold go on in a driver of its own."""
        self._calls |= self._behind
        for _, fold in groupby(self.cells, key=lambda number: self._table[number].fold):
            driver = _Driver(self._folds, list(fold), self._table, self._results, self._part)
            driver._is_below = False
            driver._greenlets = {n: self._greenlets.pop(n) for n in driver.cells}
            driver._calls = {n: self._calls[n] for n in driver.cells if n in self._calls}
            self._folds._lockstep.start(driver.cells[0], driver._run_from_fork)

    def _run_from_fork(self) -> None:
        for cell in self._greenlets.values():
            if not cell.dead:
                cell.parent = getcurrent()
        with _ended_together(self._greenlets):
            self._go_on()
