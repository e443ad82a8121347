"""Evaluate probes of rank one without writing them: a probe is a correction of a layer's output.

    x (W + c a bT)T = x WT + c (x . b) aT                linear layer, W [m, n], a [m], b [n]
    (W + c a bT)[ids] = W[ids] + c a[ids] bT             embedding

Rows of several cells go through one product with the stored weights; each cell's rows get its own
correction. It is added before the product's float32 sum is rounded. A plain ``nn.Linear``,
``nn.Embedding`` or ``Conv1D`` is corrected; any other module with parameters of its own runs once
a cell, with that cell's probe of its parameters written beside the stored ones.

Sources: Salimans et al. 2017 (evolution strategies); Sarkar et al. 2025, "EGGROLL" (rank-one
perturbations as corrections).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from zo.method.kernels.factors import factor_signs
from zo.method.kernels.written import written_probes
from zo.method.passes import Probe
from zo.method.philox import Purpose
from zo.model.binding import Binding
from zo.model.blocks import layer_lists, pattern
from zo.model.form import Form
from zo.model.layout import Part, Placed, Segment
from zo.model.patches import Patches
from zo.model.stacking import Call, Stacker, split

WRITTEN_AT_ONCE = 1 << 22
"""Elements of written parameters that are in memory at once; but at least one probe's."""
PROBES_KEPT = 64
"""Folds whose numbers are kept on the device."""
CORRECTED = (nn.Linear, nn.Embedding, Conv1D)
"""Types of modules whose probes are corrections, if they are exactly of that type."""


def is_plain(module: nn.Module) -> bool:
    """Return True for a module that reads its weight as its type alone says."""
    if type(module) not in CORRECTED or "forward" in vars(module):
        return False
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.dim() == 2 and not any(hooks)


def correct_linear(
    x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return the product with a weight and, for each cell, with its probe.

    Args:
        x: shape ``[..., n]``; the rows of K cells follow one another, the same number of each.
        weight: ``[m, n]``.
        rows: c times a of each cell, ``[K, m]``.
        columns: b of each cell, ``[K, n]``.
        bias: of each cell, ``[K, m]``.

    Returns:
        Shape ``[..., m]``.
    """
    flat = x.reshape(len(rows), -1, x.shape[-1])
    along = torch.bmm(flat, columns.unsqueeze(2))
    corrected = (
        along * rows.unsqueeze(1)
        if bias is None
        else torch.addcmul(bias.unsqueeze(1), along, rows.unsqueeze(1))
    )
    out = corrected.view(-1, rows.shape[1]).addmm_(flat.view(-1, x.shape[-1]), weight.t())
    return out.view(*x.shape[:-1], rows.shape[1])


def correct_embedding(found: Tensor, scales: Tensor, columns: Tensor) -> Tensor:
    """Return rows that were looked up, each with its cell's probe.

    Args:
        found: shape ``[R, n]``.
        scales: c times a of each row, ``[R]``.
        columns: b of each row's cell, ``[R, n]``.
    """
    wide = torch.promote_types(found.dtype, torch.float32)
    probed = torch.addcmul(found.to(wide), scales.to(wide).unsqueeze(1), columns.to(wide))
    return probed.to(found.dtype)


class Probing:
    """The modules of a model, each computing with the probes of the cells that run it."""

    def __init__(self, binding: Binding, form: Form) -> None:
        """Replace the forwards of the modules that own trainable parameters.

        Args:
            binding: the model's parameters.
            form: of the probes.
        """
        self.part = 0
        """Position of the first block that probes reach."""
        self.splits_rows_only = True
        """False if a module that runs once a cell may be given a key-value cache to split."""
        self._with_matrices: list[str] = []
        """Modules whose probes of matrices are written."""
        self._kept: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] | None = None
        self._binding, self._form = binding, form
        self._position_of = form.of_parameter
        self._module_position: dict[str, int] = {}
        self._active: dict[greenlet, tuple[Probe, ...]] = {}
        self._patches = Patches()
        # Kept for all modules of a step: on a GPU the host would wait for each copy.
        self._numbers = lru_cache(PROBES_KEPT)(_numbers)
        self._placed: dict[str, Placed] = {
            name: part.parameter
            for group in binding.layout.groups
            for part in group.parts
            for name in part.parameter.spec.names
        }
        in_chunks = {
            name.rpartition(".")[0]
            for block in binding.layout.blocks
            for part in block.parts
            if part.rows is not None
            for name in part.parameter.spec.names
        }
        lists = layer_lists(binding.model)
        whole = {n for n, _ in binding.model.named_modules() if pattern(n, lists) in form.written}
        for name, module in binding.model.named_modules():
            self._patch(name, module, whole, in_chunks)

    def _patch(self, name: str, module: nn.Module, written: set[str], in_chunks: set[str]) -> None:
        if any(_is_inside(name, outer) for outer in written - {name}):
            return
        is_whole = name in written
        leaves = (leaf for leaf, _ in module.named_parameters(recurse=is_whole))
        found = (self._placed.get(_join(name, leaf)) for leaf in leaves)
        own = [p for p in dict.fromkeys(found) if p and (is_whole or not _is_of_child(p, name))]
        if not own:
            return
        self._module_position[name] = self._position_of[own[0].name]
        own = [p for p in own if not p.spec.frozen]
        if not own or name in in_chunks:
            return  # Chunks are computed by :meth:`linear` and :meth:`embedding`.
        if name not in written and is_plain(module) and self._trained(name, "weight"):
            make = self._embedding if isinstance(module, nn.Embedding) else self._linear
            self._patches.replace(module, make(name, module))
        else:
            if any(len(p.spec.shape) >= 2 for p in own):
                self._with_matrices.append(name)
            self.splits_rows_only &= not any(True for _ in module.children())
            self._patches.replace(module, self._written(module, own))

    def written_matrices(self) -> list[str]:
        """Return the modules, as patterns, whose probes of matrices are written."""
        lists = layer_lists(self._binding.model)
        return list(dict.fromkeys(pattern(name, lists) for name in self._with_matrices))

    def positions(self) -> dict[str, int]:
        """Return the modules with parameters, trained or frozen, and the position of each."""
        return dict(self._module_position)

    def _trained(self, name: str, leaf: str) -> Placed | None:
        placed = self._placed.get(_join(name, leaf))
        return None if placed is None or placed.spec.frozen else placed

    @contextmanager
    def computing(self, probes: tuple[Probe, ...]) -> Iterator[None]:
        """Let the current greenlet compute with these probes, one for each cell of its rows."""
        here = getcurrent()
        before = self._active.get(here)
        self._active[here] = probes if any(p.scale != 0.0 for p in probes) else ()
        try:
            yield
        finally:
            if before is None:
                del self._active[here]
            else:
                self._active[here] = before

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep the factors of the probes that are computed with: many forwards need them."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def _probes(self, parameter: Placed) -> tuple[Probe, ...]:
        """Return the probes of a parameter in the current forward; empty at the weights alone."""
        if parameter.spec.frozen:
            return ()
        probes = self._active.get(getcurrent(), ())
        return probes if self._position_of[parameter.name] >= self.part else ()

    def _factors(
        self, part: Part, probes: Sequence[Probe], like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return a of the part's rows, ``[K, m]``, b, ``[K, n]``, and c, ``[K, 1]``, of probes."""
        key = part.parameter.name, part.rows, like.dtype
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        start, first = part.parameter.start, part.rows[0] if part.rows else 0
        m, n = part.shape
        dtype, device = like.dtype, like.device
        directions, which, scales = self._numbers(tuple(probes), dtype, device)
        seed = self._form.seed
        a = factor_signs(seed, directions, start + first, m, Purpose.ROW, dtype, device)
        b = factor_signs(seed, directions, start, n, Purpose.COLUMN, dtype, device)
        found = a[which], b[which], scales
        if self._kept is not None:
            self._kept[key] = found
        return found

    def linear(self, part: Part, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product of ``x`` with rows of a weight, ``[m, n]``, and with their probes."""
        probes = self._probes(part.parameter)
        if not probes:
            return functional.linear(x, weight)
        a, b, scales = self._factors(part, probes, x)
        return correct_linear(x, weight, a * scales, b)

    def embedding(self, part: Part, ids: Tensor, found: Tensor, places: Tensor, of: int) -> Tensor:
        """Return rows that were looked up with their probes.

        Args:
            part: the rows of the matrix that they come from.
            ids: numbers of the rows among the part's, ``[R]``.
            found: the rows, ``[R, n]``.
            places: number of each among all that the cells look up, ``[R]``.
            of: how many that are; each cell looks up as many.
        """
        probes = self._probes(part.parameter)
        if not probes:
            return found
        a, b, scales = self._factors(part, probes, found)
        cells = places // (of // len(probes))
        return correct_embedding(found, (a * scales)[cells, ids], b[cells])

    def _linear(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        inner, part = module.forward, Part(self._placed[_join(name, "weight")])
        bias = self._trained(name, "bias")

        def forward(x: Tensor) -> Tensor:
            probes = self._probes(part.parameter)
            if not probes:
                return inner(x)  # type: ignore[no-any-return]
            a, b, scales = self._factors(part, probes, x)
            written: Tensor | None = module.bias  # type: ignore[assignment]
            if written is not None:
                written = (
                    written.expand(len(probes), -1) if bias is None else self._write(bias, probes)
                )
            weight: Tensor = module.weight  # type: ignore[assignment]
            if isinstance(module, Conv1D):  # Its weight is [in, out].
                return correct_linear(x, weight.t(), b * scales, a, written)
            return correct_linear(x, weight, a * scales, b, written)

        return forward

    def _embedding(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        inner, part = module.forward, Part(self._placed[_join(name, "weight")])

        def forward(ids: Tensor) -> Tensor:
            found = inner(ids)
            flat, places = ids.flatten(), torch.arange(ids.numel(), device=ids.device)
            rows = found.view(-1, found.shape[-1])
            return self.embedding(part, flat, rows, places, len(flat)).view(found.shape)

        return forward

    def _write(self, parameter: Placed, probes: Sequence[Probe]) -> Tensor:
        """Return a parameter's probes, ``[len(probes), *shape]``, from its stored weights."""
        written = written_probes(
            self._binding.stored(parameter).reshape(-1),
            parameter.start,
            self._form.seed,
            self._form.distribution,
            probes,
            Segment((Part(parameter),)).matrices,
        )
        return written.view(len(probes), *parameter.spec.shape)

    def _written(self, module: nn.Module, own: Sequence[Placed]) -> Callable[..., Any]:
        inner = module.forward
        at_once = max(1, WRITTEN_AT_ONCE // sum(p.numel for p in own))

        def forward(*arguments: Any, **options: Any) -> Any:
            probes = self._probes(own[0])
            if not probes:
                return inner(*arguments, **options)
            calls, outputs = split(Call(arguments, options), len(probes)), []
            for first in range(0, len(probes), at_once):
                some = probes[first : first + at_once]
                copies = [self._write(parameter, some) for parameter in own]
                for number, probe in enumerate(some):
                    call = calls[first + number]
                    values = [copy[number] for copy in copies]
                    with self._binding.replaced(own, values), self.computing((probe,)):
                        outputs.append(inner(*call.arguments, **call.options))
            return Stacker().stack(outputs)

        return forward

    def detach(self) -> None:
        """Restore the forwards that were replaced."""
        self._patches.restore()


def _numbers(
    probes: tuple[Probe, ...], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Return the distinct directions of probes, the number of each probe's, and the scales."""
    directions = tuple(dict.fromkeys(probe.direction for probe in probes))
    which = torch.tensor([directions.index(probe.direction) for probe in probes])
    scales = torch.tensor([probe.scale for probe in probes], dtype=dtype).unsqueeze(1)
    return directions, which.to(device), scales.to(device)


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _is_of_child(parameter: Placed, module: str) -> bool:
    """Return True if a module has a parameter because one that it contains has it (tied biases)."""
    prefix = _join(module, "")
    return any("." in n.removeprefix(prefix) for n in parameter.spec.names if n.startswith(prefix))


def _is_inside(module: str, outer: str) -> bool:
    return module.startswith(f"{outer}.") or outer == ""
