"""Adapters by the package ``peft``: small trained modules beside the frozen weights of a model.

LoRA (Hu et al. 2021) adds B A x to a linear layer's output, (IA)^3 (Liu et al. 2022) scales it;
virtual tokens are in :mod:`zo.model.virtual_tokens`. A classifier's head is trained beside them.
``peft`` puts the modules into the model, initialises them and has the format that they are saved
in. The base's parameters keep their names but for ``base_layer`` where a module is wrapped, so they
are read from its checkpoint as ever.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zo.config.peft import PEFT_KEYS, PeftConfig
from zo.errors import UserError, one_line
from zo.model.layout import Block, Layout, Part, Placed, spans
from zo.model.source import WeightSource
from zo.model.virtual_tokens import NAME, add_virtual_tokens, save_virtual_tokens

WRAPPED = "base_layer"
"""Name that ``peft`` gives to a module inside the one that takes its place."""
PREFIX_SCALE = 0.1
"""Standard deviation of a prefix at the start, where peft has 1: with that, 20 tokens raised the
quickstart's loss before the first step from 0.07 to 0.61, with this to 0.08."""
PREFIX = "base_model.model."
"""Of every name in a file of ``peft``."""


def has_adapters(model: nn.Module) -> bool:
    """Return True if ``peft`` has put adapters into a model."""
    return bool(getattr(model, "peft_config", None))


def add_adapters(
    model: nn.Module,
    settings: PeftConfig,
    base: str,
    revision: str | None,
    task: str = "causal-lm",
) -> None:
    """Put adapters into a model and freeze its own parameters but for a classifier's head.

    Args:
        model: a transformers model; *modified in place*. Where its parameters are on meta, those of
            the adapters are too, in float32.
        settings: ``peft.type`` is set.
        base: ``model.name``, for the file of the adapters.
        revision: ``model.revision``, for the same.
        task: of the model.

    Raises:
        UserError: ``peft`` is not installed, does not know the model, or finds no such modules.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"peft.type={settings.type} needs the extra peft ({error}); install it with: "
            "pip install 'peft>=0.21', or choose parameters by model.train"
        ) from error
    options: dict[str, Any] = {"base_model_name_or_path": base, "revision": revision}
    options |= {"task_type": "CAUSAL_LM" if task == "causal-lm" else "SEQ_CLS"}
    if settings.type in PEFT_KEYS["tokens"]:
        add_virtual_tokens(model, settings, options)
        return
    head = [] if task == "causal-lm" else _head(model)
    targets: Any = settings.targets
    options |= {"target_modules": "all-linear" if targets == ["all-linear"] else targets}
    if head:
        options["exclude_modules"] = rf"({'|'.join(map(re.escape, head))})(\..*)?"
    if settings.type == "ia3":
        options |= {} if targets is None else {"feedforward_modules": []}
        config: Any = peft.IA3Config(**options)
    else:
        config = peft.LoraConfig(r=settings.rank or 8, lora_alpha=settings.alpha or 16, **options)
    on_meta = any(p.device.type == "meta" for p in model.parameters())
    try:
        peft.inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=on_meta)
    except (ValueError, TypeError) as error:
        said = one_line(error, 300)
        raise UserError(
            f"peft.type={settings.type} cannot be added to model.name={base}: {said}; set "
            "peft.targets to names of its linear modules, such as [q_proj,v_proj] or [all-linear]"
        ) from error
    if head:
        # Trained in place: peft's wrapper would keep a second, frozen head in the model.
        config.modules_to_save, config.exclude_modules = head, None
        for name in head:
            model.get_submodule(name).requires_grad_(True)


def _head(model: nn.Module) -> list[str]:
    """Return the modules of a classifier that are not of the model below it."""
    below = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    return [
        name
        for name, child in model.named_children()
        if child is not below and any(True for _ in child.parameters())
    ]


def initial_adapters(
    model: nn.Module, settings: PeftConfig, seed: int, task: str = "causal-lm"
) -> dict[str, Tensor]:
    """Return the adapters' parameters as ``peft`` initialises them, by name, float32 on CPU.

    A prefix is scaled down.

    Args:
        model: without adapters, its parameters on meta; *used up*.
        settings: ``peft.type`` is set.
        seed: of what is drawn.
        task: of the model.
    """
    own = {name for name, _ in model.named_parameters()}
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
        add_adapters(model, settings, "", None, task)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if settings.type == "prefix":
        trained = {name: values * PREFIX_SCALE for name, values in trained.items()}
    return {name: values for name, values in trained.items() if name not in own}


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
    if config.is_prompt_learning:
        save_virtual_tokens(state, folder)
        _save_config(config, folder)
        return
    found = get_peft_model_state_dict(
        model, state_dict=dict(state), adapter_name=name, save_embedding_layers=False
    )
    found |= {key: state[key] for key in _of_modules(state, config.modules_to_save or ())}
    named = {
        key if key.startswith(PREFIX) else PREFIX + key: tensor.contiguous()
        for key, tensor in found.items()
    }
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _save_config(config, folder)


def _of_modules(names: Iterable[str], modules: Collection[str]) -> list[str]:
    """Return the names of parameters of some modules."""
    return [name for name in names if any(name.startswith(f"{module}.") for module in modules)]


def _save_config(config: Any, folder: Path) -> None:
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
