"""An optimizer for training loops of one's own whose step calls the model and keeps no gradient.

    l(row, column) = closure()                       # with the weights theta + c eps z
    g_k            = estimate(mean over columns)
    log.append(Entry(step, lr, g))                   # then replay moves the weights

The entry has the bits of a run of :class:`zo.Trainer` with the same seed, settings and batches, a
column for each call of :meth:`ZOOptimizer.measure`. The model's parameters are views of one memory
that replay writes; beside it there is a copy of the trained ones, for the probe that is evaluated.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zo.config.schema import EstimatorConfig, MemoryConfig, UpdateConfig
from zo.errors import UserError
from zo.io.determinism import explain_nondeterminism, make_deterministic
from zo.method.entry import Entry
from zo.method.estimator import check_directions, estimate, probes
from zo.method.table import LossTable
from zo.method.update import clip
from zo.model.blocks import find_layout
from zo.model.layout import Block, Layout
from zo.model.source import ModelSource
from zo.run.objective import OwnObjective
from zo.state.log import Log, difference, read
from zo.streaming.replica import Replica


class ZOOptimizer(torch.optim.Optimizer):
    """Optimizer over the parameters of a model that require a gradient, none of which is computed.

    ``step(closure)`` calls ``closure()`` once for each probe; it returns the loss of one batch: a
    number, a tensor of one (a mean), or a tensor of sum of losses and number of terms. All calls of
    a micro-batch are the same computation: the model is in ``eval`` mode, and PyTorch's random
    numbers begin at the same place. Learning rate schedulers drive ``param_groups[0]["lr"]``.

    A parameter that the loss does not use moves too, for no loss says that it does not matter; set
    its ``requires_grad`` to False.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        seed: int = 0,
        eps: float = 1e-3,
        directions: int = 1,
        distribution: str = "rademacher",
        estimator: str = "spsa",
        weight_decay: float = 0.0,
        clip: float | None = None,
        log: str | Path | None = None,
    ) -> None:
        """Take the model's weights over; they are copied once, and the parameters stay the objects.

        Args:
            model: on one device; its parameters' memory is *replaced*.
            lr: learning rate; constant unless a scheduler or the loop changes it.
            seed: of the directions, from 0 and below 2**63.
            eps: length of the step along a direction.
            directions: a step; two forwards each with ``spsa``.
            distribution: ``rademacher``, ``gaussian`` or ``rank-one``; probes are written.
            estimator: ``spsa``, ``one-sided`` or ``population``.
            weight_decay: decay a step is lr times this; none on parameters of fewer than two dims.
            clip: limit of a projected gradient, in root mean squares of those of the last 16 steps.
            log: file of the log, created at the first step; in memory by default.

        Raises:
            UserError: a setting is out of range, or the model cannot be split into blocks.
        """
        self._settings = EstimatorConfig(
            name=estimator, directions=directions, eps=eps, distribution=distribution
        )
        update = UpdateConfig(lr=lr, weight_decay=weight_decay, clip=clip)
        trained = _check(model, self._settings, seed)
        super().__init__([{"params": trained}], {"lr": float(update.lr)})
        self._clip, self._path = clip, None if log is None else Path(log)
        self._file: Log | None = None
        self._replica = _take_over(model, trained[0].device)
        self._log = Log(
            {
                "run": uuid.uuid4().hex,
                "base": self._replica.store.base,
                "data": "",
                "directions": directions,
                "distribution": distribution,
                "rule": update.name,
                "seed": seed,
                "weight_decay": float(weight_decay),
            }
        )
        self._replica.open(self._log)
        self._columns: list[Tensor] = []

    @property
    def version(self) -> int:
        """Number of steps that were done, those of a state that was loaded included."""
        return self._log.version

    @torch.no_grad()
    def measure(self, closure: Callable[[], Any]) -> float:
        """Evaluate the step's probes on one micro-batch; :meth:`step` then uses all of them.

        Returns:
            The mean loss over the probes.
        """
        step, settings = self._log.version + 1, self._settings
        directions = self._log.header["directions"]
        check_directions(step, directions)
        rows = probes(settings.name, step, directions, settings.eps)
        numbers, model = list(range(len(rows))), self._replica.model
        own, rewind = OwnObjective(lambda model, batch: closure()), _mark(self._replica.device)

        def evaluate(cells: Sequence[int]) -> list[Tensor]:
            rewind()
            return [own(model, {})]

        with _evaluating(model), explain_nondeterminism():
            found = self._replica.whole(
                rows, numbers, [[number] for number in numbers], 0, evaluate
            )
        column = torch.stack(found).cpu()
        self._columns.append(column)
        return float((column[:, 0] / column[:, 1]).mean())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Do one step on the micro-batches that were measured, and on the closure's.

        Returns:
            The mean loss of the batch over its probes.

        Raises:
            UserError: nothing was measured, the closure gave no loss, or the log cannot be written.
        """
        if closure is not None:
            self.measure(closure)
        if not self._columns:
            raise UserError(
                "step() has no loss to use; call step(closure), where closure() returns the loss "
                "of a batch, or measure(closure) before it"
            )
        settings, log = self._settings, self._log
        directions, number = log.header["directions"], log.version + 1
        rows = probes(settings.name, number, directions, settings.eps)
        columns, self._columns = self._columns, []
        # Column by column, as the cells of a table are.
        table = LossTable(rows, len(columns)).fill(torch.cat(columns))
        scalars, _ = estimate(settings.name, table, settings.eps)
        if self._clip is not None:
            scalars = clip(scalars, log.entries, self._clip)
        drawn = (log.entries[-1].position if log.entries else 0) + len(columns)
        entry = Entry(number, drawn, float(self.param_groups[0]["lr"]), scalars)
        if (file := self._open_file()) is not None:
            file.append(entry)  # Durable before a parameter moves.
        log.append(entry)
        self._replica.pass_over()
        return table.loss

    def _open_file(self) -> Log | None:
        """Return the log's file, created before the first entry of this process.

        Raises:
            UserError: there is a file that these steps do not continue.
        """
        if self._path is not None and self._file is None:
            if self._path.exists():
                self._check_continues(self._path)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = Log.create(self._path, self._log.header)
            self._file.extend(self._log.entries)
        return self._file

    def _check_continues(self, path: Path) -> None:
        """Check that a file holds the entries so far; later ones will be computed again."""
        header, entries = read(path)
        same = header == self._log.header and entries[: self.version] == self._log.entries
        if not self._log.entries or not same:
            raise UserError(
                f"log={path} holds the log of another run; load that run's state to go on with it, "
                "or give another file"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rate and the log so far: some dozen bytes a step, and no tensor."""
        group = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        return {
            "state": {},
            "param_groups": [group],
            "header": dict(self._log.header),
            "entries": [asdict(entry) for entry in self._log.entries],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; the model must hold the weights of that step, as checkpoints do.

        Raises:
            UserError: the state is of another optimizer, or was written with other settings.
        """
        if "header" not in state_dict or "entries" not in state_dict:
            raise UserError(
                "the state is of another optimizer; load one that ZOOptimizer.state_dict() returned"
            )
        header = state_dict["header"]
        kept = {k: v for k, v in self._log.header.items() if k not in ("run", "base")}
        if found := difference(header, kept):
            raise UserError(
                f"the state was written with {found[0]}={found[1]}, and the optimizer has "
                f"{found[2]}; use the same settings"
            )
        self.param_groups[0].update(state_dict["param_groups"][0])
        entries = [Entry(**{**e, "scalars": tuple(e["scalars"])}) for e in state_dict["entries"]]
        self._columns, self._log = [], Log(dict(header), entries)
        if self._file is not None:
            self._file.close()
            self._file = None
        self._replica.stand_at(self._log)


def _take_over(model: nn.Module, device: torch.device) -> Replica:
    """Return the model's weights, which stay on its device."""
    make_deterministic(device)
    layout, memory = find_layout(model), MemoryConfig(store="device")
    with torch.no_grad():
        # With this store nothing is read or written later: the folder is not used.
        return Replica(model, layout, lambda engine: _HandedOver(model), memory, device, Path())


class _HandedOver(ModelSource):
    """The weights of a model in memory, each freed when it has been read."""

    def read(self, block: Block, layout: Layout, image: Tensor, start: int = 0) -> None:
        super().read(block, layout, image, start)
        for part in block.parts:
            for name in part.parameter.spec.names:
                del self._tensors[name]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Compute in ``eval`` mode inside a ``with`` block; each module then has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _mark(device: torch.device) -> Callable[[], None]:
    """Return what lets PyTorch's random numbers begin again where they are now."""
    on_cpu = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind() -> None:
        torch.set_rng_state(on_cpu)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)

    return rewind


def _check(model: nn.Module, settings: EstimatorConfig, seed: int) -> list[nn.Parameter]:
    """Return the parameters that are trained.

    Raises:
        UserError: there is none, or a setting or the model's place makes no sense.
    """
    if settings.name == "population" and settings.directions == 1:
        raise UserError(
            "directions=1 has no other direction to compare with, as estimator=population does; "
            "use 2 or more"
        )
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} is out of range; use a number from 0 and below 2**63")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("the model has no parameter with requires_grad=True; set some")
    if len({p.device for p in model.parameters()}) > 1 or trained[0].device.type == "meta":
        raise UserError(
            "the model's parameters are on several devices or on meta; load the model on one "
            "device, without device_map"
        )
    return trained
