"""Adapters by the package ``peft``: small trained modules beside the frozen weights of a model.

LoRA (Hu et al. 2021) adds B A x to a linear layer's output, (IA)^3 (Liu et al. 2022) scales it.
``peft`` puts the modules into the model, initialises them and has the format that they are saved
in. The base's parameters keep their names but for ``base_layer`` where a module is wrapped, so they
are read from its checkpoint as ever; nothing here writes them.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zo.config.schema import PeftConfig
from zo.errors import UserError
from zo.model.layout import Block, Layout, Part, Placed, spans
from zo.model.source import WeightSource

NAME = "default"
"""The name of the adapter in the model; files do not hold it."""
WRAPPED = "base_layer"
"""Name that ``peft`` gives to a module inside the one that takes its place."""
PREFIX = "base_model.model."
"""Of every name in a file of ``peft``."""


def has_adapters(model: nn.Module) -> bool:
    """Return True if ``peft`` has put adapters into a model."""
    return bool(getattr(model, "peft_config", None))


def add_adapters(model: nn.Module, settings: PeftConfig, base: str, revision: str | None) -> None:
    """Put adapters into a model and freeze its own parameters.

    Args:
        model: a transformers model; *modified in place*. Where its parameters are on meta, those of
            the adapters are too, in float32.
        settings: ``peft.type`` is set.
        base: ``model.name``, for the file of the adapters.
        revision: ``model.revision``, for the same.

    Raises:
        UserError: ``peft`` is not installed, does not know the model, or finds no such modules.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"peft.type={settings.type} needs the extra peft ({error}); install it with: "
            "pip install -e '.[peft]', or choose parameters by model.train"
        ) from error
    targets: Any = settings.targets
    options: dict[str, Any] = {
        "target_modules": "all-linear" if targets == ["all-linear"] else targets
    }
    options |= {"base_model_name_or_path": base, "revision": revision, "task_type": "CAUSAL_LM"}
    if settings.type == "ia3":
        options |= {} if targets is None else {"feedforward_modules": []}
        config: Any = peft.IA3Config(**options)
    else:
        config = peft.LoraConfig(r=settings.rank or 8, lora_alpha=settings.alpha or 16, **options)
    on_meta = any(p.device.type == "meta" for p in model.parameters())
    try:
        peft.inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=on_meta)
    except (ValueError, TypeError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"peft.type={settings.type} cannot be added to model.name={base}: {said}; set "
            "peft.targets to names of its linear modules, such as [q_proj,v_proj] or [all-linear]"
        ) from error


def initial_adapters(model: nn.Module, settings: PeftConfig, seed: int) -> dict[str, Tensor]:
    """Return the adapters' parameters as ``peft`` initialises them, by name, float32 on CPU.

    Args:
        model: without adapters, its parameters on meta; *used up*.
        settings: ``peft.type`` is set.
        seed: of what is drawn.
    """
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # One element, expanded: peft asks for device and shape alone.
                empty = torch.zeros(()).expand(parameter.shape)
                module._parameters[name] = placeholders.setdefault(
                    id(parameter), nn.Parameter(empty, requires_grad=False)
                )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        add_adapters(model, settings, "", None)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_adapters(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` of ``peft``'s format.

    Args:
        model: with adapters.
        state: their parameters by name.
        folder: exists.
    """
    from peft import get_peft_model_state_dict

    adapters: Any = model.peft_config
    name, config = next(iter(adapters.items()))
    found = get_peft_model_state_dict(
        model, state_dict=dict(state), adapter_name=name, save_embedding_layers=False
    )
    named = {
        key if key.startswith(PREFIX) else PREFIX + key: tensor.contiguous()
        for key, tensor in found.items()
    }
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    trains, config.inference_mode = config.inference_mode, True
    config.save_pretrained(folder)
    config.inference_mode = trains


class AdaptedSource:
    """The weights of a model with adapters: the base's from its own source, theirs from memory."""

    def __init__(self, base: WeightSource, adapters: Mapping[str, Tensor]) -> None:
        """Join the source of the base, which knows its names without adapters, and the adapters."""
        self._base, self._adapters = base, adapters
        self.is_rereadable = base.is_rereadable
        self._cached: tuple[Layout, _BaseLayout] | None = None

    def _layout(self, layout: Layout) -> "_BaseLayout":
        if self._cached is None or self._cached[0] is not layout:
            self._cached = layout, _BaseLayout(layout, self._adapters)
        return self._cached[1]

    def read(self, block: Block, layout: Layout, image: Tensor, start: int = 0) -> None:
        """See :class:`zo.model.source.WeightSource`."""
        image.zero_()
        inner = self._layout(layout)
        for part, first, flat in spans(block, image, start):
            name = part.parameter.name
            if name in self._adapters:
                flat.copy_(self._adapters[name].view(-1)[first : first + flat.numel()])
                continue
            begin = inner.begins[block.index, name, part.rows] + first * flat.dtype.itemsize
            of_base = inner.blocks[block.index]
            self._base.read(of_base, inner.layout, flat.view(torch.uint8), begin)

    def is_expensive(self, block: Block) -> bool:
        """See :class:`zo.model.source.WeightSource`."""
        of_base = _without(block, self._adapters)
        return bool(of_base.parts) and self._base.is_expensive(of_base)

    def clear_cache(self) -> None:
        """See :class:`zo.model.source.WeightSource`."""
        self._base.clear_cache()

    def attach_buffers(self, model: nn.Module) -> None:
        """See :class:`zo.model.source.WeightSource`."""
        self._base.attach_buffers(model)


class _BaseLayout:
    """The layout of a model with adapters as its base has it: without them, by its names."""

    def __init__(self, layout: Layout, adapters: Mapping[str, Tensor]) -> None:
        groups = tuple(b for group in layout.groups if (b := _without(group, adapters)).parts)
        every = [_without(block, adapters) for block in layout.blocks]
        self.blocks = {block.index: block for block in every if block.parts}
        self.layout = Layout(groups, tuple(self.blocks.values()))
        self.begins: dict[tuple[int, str, tuple[int, int] | None], int] = {}
        """Byte of a block of the base where a part begins, by block, name with adapters, rows."""
        for block in layout.blocks:
            if block.index in self.blocks:
                begins = _begins(self.blocks[block.index])
                for part in block.parts:
                    name = part.parameter.name
                    if name not in adapters:
                        key = block.index, name, part.rows
                        self.begins[key] = begins[_base_name(name), part.rows]


def _without(block: Block, adapters: Collection[str]) -> Block:
    """Return a block without the parameters of adapters, by the names of the base."""
    parts = tuple(
        Part(_renamed(part.parameter), part.rows)
        for part in block.parts
        if part.parameter.name not in adapters
    )
    return Block(block.index, tuple(map(_base_name, block.modules)), parts)


def _begins(block: Block) -> dict[tuple[str, tuple[int, int] | None], int]:
    """Return the byte of a block where each of its parts begins, by name and rows."""
    found, begin = {}, 0
    for segment in block.segments:
        for part in segment.parts:
            offset = (part.start - segment.start) * segment.dtype.itemsize
            found[part.parameter.name, part.rows] = begin + offset
        begin += segment.size_bytes
    return found


def _renamed(placed: Placed) -> Placed:
    spec = placed.spec
    names = tuple(map(_base_name, spec.names))
    return Placed(type(spec)(names, spec.shape, spec.dtype, spec.frozen), placed.start)


def _base_name(name: str) -> str:
    return ".".join(piece for piece in name.split(".") if piece != WRAPPED)
