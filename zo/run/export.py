"""Export of a trained model as a Hugging Face folder with a model card.

Weights are written by ``save_pretrained``, so by transformers' own converters, a part of the model
at a time. A folder appears complete or not at all: it is written beside its place under a hidden
name, synced, renamed.
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

from zo.errors import UserError, one_line
from zo.io.atomic import replacing
from zo.io.hardware import name_accelerator
from zo.io.signals import unfinished
from zo.model.adapters import has_adapters, save_adapters
from zo.run.model_card import Card, model_card
from zo.run.snippet import use_of
from zo.state.run_folder import check_replaceable, manifest

SHARD_BYTES = 5_000_000_000
"""Bytes converted and written at once, at most, unless one layer has more; usual for hub files."""
STREAMED_BYTES, STREAMED_FILES = 128_000_000, 100
"""The same for weights that are not in memory: so many bytes, or this fraction of the model."""
ROOM_BYTES = 32 * 2**20
"""Disk space checked for beside the weights: tokenizer (Gemma-3's has 17 MB), config, card."""
LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")
"""The start of a weight's name up to the number of its outermost layer."""


class Source(Protocol):
    """Weights that a model itself does not hold."""

    is_resident: bool
    """True if the weights stay in memory, so that none has to be copied."""

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Yield every trained parameter by the first of its names.

        Unless ``is_resident``, a tensor is valid only until the next is asked for.
        """
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
    """Write a folder that ``from_pretrained`` reads: weights, config, card, tokenizer if any.

    Memory beyond the model's: none where transformers keeps weights in memory as they are on disk;
    else what it converts at once. Weights of a ``source`` that is not resident are written a
    hundredth of the model, ``STREAMED_BYTES`` or one layer at a time.

    Args:
        model: a transformers model; its parameters may be views of larger tensors, and tied.
        tokenizer: a transformers tokenizer, or None.
        to: the folder; must not exist, or be empty.
        card: content of the model card.
        source: of the weights that the model itself does not hold.
        replace: replace a folder that this function wrote, once the new one is complete.

    Raises:
        UserError: the folder is not empty (with ``replace``: has files that zo did not write), or
            the disk is too small, full or not writable; nothing is left behind.
    """
    name_accelerator()
    to = to.expanduser()
    if replace:
        check_replaceable(to)
    to = to.resolve()
    content = _Content(model)
    with whole_or_nothing(to, content.size_bytes + ROOM_BYTES, replace) as beside:
        _write_weights(model, content, source, beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        names = [path.name for path in beside.iterdir()]
        use = use_of(model, tokenizer, card.template, card.label_words)
        (beside / "README.md").write_text(
            f"{model_card(card, use)}\n{manifest(names)}\n", encoding="utf-8"
        )


class _Content:
    """Names, shapes and ties of the tensors of a model, before any weight is read."""

    def __init__(self, model: nn.Module) -> None:
        self.is_adapter = has_adapters(model)
        """True if only the trained parameters are written, in the format of ``peft``."""
        state = model.state_dict(keep_vars=True)
        if self.is_adapter:
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            state = {name: tensor for name, tensor in state.items() if name in trained}
        parameters: dict[object, list[str]] = {}
        for name, tensor in state.items():
            # Loaded models tie two Parameter objects on one storage; the storage of a
            # placeholder has one element.
            is_stored = tensor.device.type != "meta" and tensor.is_contiguous() and tensor.numel()
            parameters.setdefault(
                (tensor.data_ptr(), tensor.shape) if is_stored else id(tensor), []
            ).append(name)
        self.names = {names[0]: names for names in parameters.values()}
        """All names of each tensor, by the first of them."""
        self.resident = {name: state[name].detach() for name in self.names}
        """The tensors of the model itself; placeholders for those that a source holds."""
        self.meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
        self.size_bytes = sum(self.meta[name].nbytes for name in self.names)

    def parts(self, model: nn.Module, most_bytes: int) -> list[list[str]]:
        """Split the names between layers, or modules outside them, into parts.

        A part has at most ``most_bytes``, or one layer.
        """
        if self.is_adapter:
            return [list(self.names)]
        layers: dict[str, list[str]] = {}
        for name in self.names:
            found = LAYER.match(name)
            layers.setdefault(found.group() if found else name.rpartition(".")[0], []).append(name)
        parts: list[list[str]] = [[]]
        for layer in layers.values():
            if parts[-1] and self._bytes(parts[-1] + layer) > most_bytes:
                parts.append([])
            parts[-1] += layer
        # Converting the model at once takes more memory, and is right for any model.
        apart = len(parts) > 1 and not self._joins_layers() and self._convert_apart(model, parts)
        return parts if apart else [list(self.names)]

    def _joins_layers(self) -> bool:
        """Return whether a tie joins two layers."""
        found = (
            {m.group() for name in names if (m := LAYER.match(name))}
            for names in self.names.values()
        )
        return any(len(layers) > 1 for layers in found)

    def _bytes(self, names: Sequence[str]) -> int:
        return sum(self.meta[name].nbytes for name in names)

    def _convert_apart(self, model: Any, parts: Sequence[Sequence[str]]) -> bool:
        """Return whether parts converted alone give the names and shapes of the model at once."""

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
def whole_or_nothing(to: Path, bytes_needed: int, replace: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``to``, which it replaces on success; remove it on an error."""
    # One fixed, hidden name: the next export removes what a killed one left.
    beside = to.with_name(f".{to.name}.unfinished")
    try:
        if to.exists() and not (to.is_dir() and (replace or not any(to.iterdir()))):
            raise UserError(f"{to} exists and is not an empty folder; choose a new one")
        if os.path.ismount(to):
            raise UserError(
                f"{to} is a mount point and cannot be replaced; use a folder in it: {to / 'model'}"
            )
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)  # Before the room is looked at.
        bytes_free = shutil.disk_usage(to.parent).free
        if bytes_free < bytes_needed:
            raise UserError(
                f"{to} needs {bytes_needed} bytes ({bytes_needed / 2**30:.2f} GiB) and its disk "
                f"has {bytes_free} free ({bytes_free / 2**30:.2f} GiB); make room, or choose a "
                "folder on another disk"
            )
        with replacing(to, beside), unfinished(beside):
            beside.mkdir()
            yield beside
    except BaseException as error:
        # The tokenizers library raises a bare Exception with the system's message.
        if isinstance(error, OSError | SafetensorError) or "(os error " in str(error):
            raise UserError(
                f"{to} cannot be written: {one_line(error)}; make room, or choose a writable folder"
            ) from error
        raise


def _write_weights(
    model: nn.Module, content: _Content, source: Source | None, folder: Path
) -> None:
    """Write weights and configuration; with several parts, one file each and their index."""
    save: Any = model.save_pretrained
    streamed = source is not None and not source.is_resident
    most_bytes = (
        max(STREAMED_BYTES, content.size_bytes // STREAMED_FILES) if streamed else SHARD_BYTES
    )
    parts = content.parts(model, most_bytes)
    weight_map: dict[str, str] = {}
    for number, state in _states(content, source if streamed else None, parts):
        if content.is_adapter:
            save_adapters(model, state, folder)
            continue
        if len(parts) == 1:
            save(folder, state_dict=state, max_shard_size=SHARD_BYTES)
            continue  # Exhaust the source: other ranks may take part in its passes.
        # In its own folder: save_pretrained removes the files of other parts.
        inner, name = folder / "part", f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save(inner, state_dict=state, max_shard_size="1000TB")
        del state  # Free it before the next part is read.
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
    """Yield the number of each part and its weights, once all of them are read."""
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
        # A storage for every tensor: save_pretrained clones those that share one, a second copy of
        # the model where a block is one tensor. DLPack keeps addresses, so ties stay visible.
        own = {first: from_dlpack(tensor) for first, tensor in held[number].items()}
        held[number] = {}
        return {name: own[first] for first in parts[number] for name in content.names[first]}

    yield from ((number, state(number)) for number, count in enumerate(left) if not count)
    for name, tensor in source.tensors() if source is not None else ():
        first = next((f for f, names in content.names.items() if name in names), None)
        if first not in lacking:
            continue  # The base of adapters, or what the model itself has.
        number = of_part[first]
        held[number][first] = tensor.detach().to("cpu", copy=True).contiguous()
        left[number] -= 1
        if not left[number]:
            yield number, state(number)


def _is_placeholder(tensor: Tensor) -> bool:
    # A single element has no strides to tell by, but placeholders are NaN.
    return not any(tensor.stride()) and (tensor.numel() > 1 or bool(tensor.isnan().all()))
