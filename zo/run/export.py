"""A trained model as a Hugging Face folder with a model card, and that folder on the hub.

Weights leave through ``save_pretrained``, so through transformers' own converters, a part of the model at a time. A
folder appears whole or not at all: written beside under a hidden name, synced, renamed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack
from transformers.core_model_loading import revert_weight_conversion

from zo.errors import UserError
from zo.io.atomic import replacing
from zo.io.hardware import name_accelerator
from zo.io.signals import unfinished
from zo.run.model_card import Card, _one_line, model_card
from zo.state.run_folder import check_replaceable, manifest

SHARD_BYTES = 5_000_000_000
"""Weights converted and written at once, at most, unless one layer has more; the hub's usual size of a file."""
STREAMED_BYTES, STREAMED_FILES = 128_000_000, 100
"""The same for weights that are not in memory: at most that much, or that part of the model, if that is more."""
ROOM_BYTES = 32 * 2**20
"""Room asked for beside the weights: tokenizer (17 MB for the largest that we know, Gemma-3's), configuration, card."""
LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")
"""The start of a weight's name up to its outermost layer's number."""


class Source(Protocol):
    """Where the weights are while they are written."""

    is_resident: bool
    """Whether they stay in memory, so that nothing need be copied."""

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Every parameter that is trained, by the first of its names; else valid until the next is asked for."""
        ...


def write_folder(
    model: nn.Module,
    tokenizer: Any,
    to: Path,
    card: Card,
    *,
    source: Source | None = None,
    replace: bool = False,
) -> None:
    """Write a folder that ``from_pretrained`` reads: weights, configuration, tokenizer if there is one, card.

    Memory over the model's: nothing where transformers keeps weights in memory as they are on disk; else what it
    converts, and of weights that come from elsewhere a hundredth, ``STREAMED_BYTES`` or one layer at a time.

    Args:
        model: a transformers model; its parameters may be views of larger tensors, and tied.
        tokenizer: a transformers tokenizer, or None.
        to: the folder; missing or empty.
        card: what the card says.
        source: of the weights that the model itself does not hold.
        replace: put the new folder in the place of one that this function wrote, which stays until the new one is
            whole.

    Raises:
        UserError: the folder is not empty (with ``replace``: holds what zo did not write), or the disk is too small,
            full or not writable; nothing is left behind.
    """
    name_accelerator()
    to = to.expanduser()
    if replace:
        check_replaceable(to)
    to = to.resolve()
    content = _Content(model)
    with _whole_or_nothing(to, content.size_bytes + ROOM_BYTES, replace) as beside:
        _write_weights(model, content, source, beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        names = [path.name for path in beside.iterdir()]
        (beside / "README.md").write_text(
            f"{model_card(card)}\n{manifest(names)}\n", encoding="utf-8"
        )


class _Content:
    """What is to be saved of a model: names, shapes and ties, before any weight is at hand."""

    def __init__(self, model: nn.Module) -> None:
        state = model.state_dict(keep_vars=True)
        parameters: dict[object, list[str]] = {}
        for name, tensor in state.items():
            # Loaded models tie two Parameter objects on one storage; a placeholder has a storage of one element.
            whole = tensor.device.type != "meta" and tensor.is_contiguous() and tensor.numel()
            parameters.setdefault(
                (tensor.data_ptr(), tensor.shape) if whole else id(tensor), []
            ).append(name)
        self.names = {names[0]: names for names in parameters.values()}
        """All names of each tensor, by the first of them."""
        self.resident = {name: state[name].detach() for name in self.names}
        """What the model itself holds: all of it, or placeholders for what comes from elsewhere."""
        self.meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
        self.size_bytes = sum(self.meta[name].nbytes for name in self.names)

    def parts(self, model: nn.Module, most_bytes: int) -> list[list[str]]:
        """Cut the weights between layers, and modules outside them, into parts of at most that much, or one layer."""
        layers: dict[str, list[str]] = {}
        for name in self.names:
            found = LAYER.match(name)
            layers.setdefault(found.group() if found else name.rpartition(".")[0], []).append(name)
        parts: list[list[str]] = [[]]
        for layer in layers.values():
            if parts[-1] and self._bytes(parts[-1] + layer) > most_bytes:
                parts.append([])
            parts[-1] += layer
        # A whole conversion takes more memory, and is right for any model.
        apart = len(parts) > 1 and not self._joins_layers() and self._convert_apart(model, parts)
        return parts if apart else [list(self.names)]

    def _joins_layers(self) -> bool:
        """Whether a tie joins two layers."""
        found = (
            {m.group() for name in names if (m := LAYER.match(name))}
            for names in self.names.values()
        )
        return any(len(layers) > 1 for layers in found)

    def _bytes(self, names: Sequence[str]) -> int:
        return sum(self.meta[name].nbytes for name in names)

    def _convert_apart(self, model: Any, parts: Sequence[Sequence[str]]) -> bool:
        """Whether the parts, each converted alone, give the names and shapes of the whole."""

        def saved(names: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
            on_meta = {name: self.meta[name] for first in names for name in self.names[first]}
            return [
                (name, tuple(tensor.shape))
                for name, tensor in revert_weight_conversion(model, on_meta).items()
            ]

        return sorted(saved(list(self.names))) == sorted(
            item for part in parts for item in saved(part)
        )


@contextmanager
def _whole_or_nothing(to: Path, bytes_needed: int, replace: bool) -> Iterator[Path]:
    """An empty folder beside ``to`` that takes its place if the block ends well, and goes away if it does not."""
    # One fixed, hidden name: what a killed export left is found and removed by the next.
    beside = to.with_name(f".{to.name}.unfinished")
    try:
        if to.exists() and not (to.is_dir() and (replace or not any(to.iterdir()))):
            raise UserError(f"{to} exists and is not an empty folder; choose a new one")
        if os.path.ismount(to):
            raise UserError(
                f"{to} is a mount point, which no folder can replace; use a folder in it: {to / 'model'}"
            )
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)  # Before the room is looked at.
        bytes_free = shutil.disk_usage(to.parent).free
        if bytes_free < bytes_needed:
            raise UserError(
                f"{to} needs {bytes_needed} bytes ({bytes_needed / 2**30:.2f} GiB) and its disk has {bytes_free} free "
                f"({bytes_free / 2**30:.2f} GiB); make room, or choose a folder on another disk"
            )
        with replacing(to, beside), unfinished(beside):
            beside.mkdir()
            yield beside
    except BaseException as error:
        # The tokenizers library raises a bare Exception with the system's words.
        if isinstance(error, OSError | SafetensorError) or "(os error " in str(error):
            raise UserError(
                f"{to} cannot be written: {_one_line(error)}; make room, or choose a folder that can be written"
            ) from error
        raise


def _write_weights(
    model: nn.Module, content: _Content, source: Source | None, folder: Path
) -> None:
    """Write weights and configuration; a file a part, and their index, where there is more than one part."""
    save: Any = model.save_pretrained
    streamed = source is not None and not source.is_resident
    most_bytes = (
        max(STREAMED_BYTES, content.size_bytes // STREAMED_FILES) if streamed else SHARD_BYTES
    )
    parts = content.parts(model, most_bytes)
    weight_map: dict[str, str] = {}
    for number, state in _states(content, source if streamed else None, parts):
        if len(parts) == 1:
            save(folder, state_dict=state, max_shard_size=SHARD_BYTES)
            continue  # To the end of the source: other ranks may pass over it too.
        # In a folder of its own: save_pretrained removes the files of other parts.
        inner, name = folder / "part", f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save(inner, state_dict=state, max_shard_size="1000TB")
        del state  # While the next part is brought, this one takes no memory.
        with safe_open(inner / "model.safetensors", framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        (inner / "model.safetensors").rename(folder / name)
        for path in inner.iterdir():
            path.replace(folder / path.name)
        inner.rmdir()
    if len(parts) == 1:
        return
    index = {"metadata": {"total_size": content.size_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2) + "\n", encoding="utf-8"
    )


def _states(
    content: _Content, source: Source | None, parts: Sequence[Sequence[str]]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Each part's number and its weights, when they are all at hand."""
    of_part = {name: number for number, part in enumerate(parts) for name in part}
    lacking = {
        name
        for name, tensor in content.resident.items()
        if source is not None and _is_placeholder(tensor)
    }
    assert source is not None or not any(map(_is_placeholder, content.resident.values()))
    left = [len(lacking & set(part)) for part in parts]
    held: list[dict[str, Tensor]] = [
        {n: content.resident[n] for n in part if n not in lacking} for part in parts
    ]

    def state(number: int) -> dict[str, Tensor]:
        # Every tensor as a storage of its own: save_pretrained clones those that share one, a second copy of the
        # model where a block is one tensor. Through DLPack each keeps its address; ties stay visible.
        own = {first: from_dlpack(tensor) for first, tensor in held[number].items()}
        held[number] = {}
        return {name: own[first] for first in parts[number] for name in content.names[first]}

    yield from ((number, state(number)) for number, count in enumerate(left) if not count)
    for name, tensor in source.tensors() if source is not None else ():
        first = next(f for f, names in content.names.items() if name in names)
        number = of_part[first]
        held[number][first] = tensor.detach().to("cpu", copy=True).contiguous()
        left[number] -= 1
        if not left[number]:
            yield number, state(number)


def _is_placeholder(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and not any(tensor.stride())
