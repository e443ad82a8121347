"""Read a checkpoint's safetensors shards directly into blocks, with transformers' name conversion.

A tensor on disk that matches a parameter in name and shape is read in place: only the bytes that a
block needs, converted to the stored dtype. A parameter that transformers makes of other tensors
(experts: many tensors on disk, one in memory) is made by its own converter. Parameters that the
checkpoint lacks are initialised.
"""

import json
import re
import struct
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from zo.io.engines import Engine
from zo.model.layout import Block, Layout, Part, spans
from zo.model.source import RandomSource, elements_of

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Supported dtypes of the safetensors format."""
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 64
"""Dims of a tensor, as torch has it."""


@dataclass(frozen=True)
class Stored:
    """Location, dtype and shape of one tensor in a shard."""

    path: Path
    start: int
    """Offset of its first byte in the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, engine: Engine, first: int = 0, count: int | None = None) -> Tensor:
        """Return ``count`` elements from element ``first``, flat; all by default."""
        count, size = prod(self.shape) if count is None else count, self.dtype.itemsize
        raw = torch.empty(count * size, dtype=torch.uint8)
        engine.read(self.path, self.start + first * size, raw)
        return raw.view(self.dtype)


def shard_files(path: str, hub: Mapping[str, Any]) -> list[Path]:
    """Return the safetensors files of a folder or a hub id; download those that are not cached.

    Raises:
        OSError: there are none, or a file of the index is missing.
    """
    options = {"revision": hub.get("revision"), "_raise_exceptions_for_missing_entries": False}
    if single := cached_file(path, SAFE_WEIGHTS_NAME, **options):
        return [Path(single)]
    if index := cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **options):
        _check_index(Path(index))
        files, _ = get_checkpoint_shard_files(path, index, revision=hub.get("revision"))  # type: ignore[no-untyped-call]
        return [Path(file) for file in files]
    raise OSError(f"{path} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")


def _check_index(path: Path) -> None:
    """Raise :class:`OSError` unless an index names files of its own folder."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is corrupt: {error}") from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(names, dict) and names and isinstance(content.get("metadata"), dict)):
        raise OSError(f"{path} is corrupt: it has no metadata, or no weight_map of names to files")
    for name in names.values():
        if not isinstance(name, str) or "\0" in name or Path(name).is_absolute():
            raise OSError(f"{path} names {name!r}, which is not a file of its folder")
        if ".." in Path(name).parts:
            raise OSError(f"{path} names {name!r}, which is outside of its folder")


def tensors_of(path: Path) -> dict[str, Stored]:
    """Read the header of a safetensors file; return its tensors by name.

    Raises:
        OSError: the file is missing, not safetensors or truncated, or its header is inconsistent.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int(struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0])
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise OSError(f"{path} is not a safetensors file, or is truncated: {size} bytes")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise OSError(f"{path} has a corrupt header: {error}") from error
    if not isinstance(header, dict):
        raise OSError(f"{path} has a corrupt header: it is not an object")
    header.pop("__metadata__", None)
    _check_header(path, header)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise OSError(f"{path} is truncated: it has {size} bytes, its header needs {end}")
    return {
        name: Stored(path, 8 + length + e["data_offsets"][0], DTYPES[e["dtype"]], tuple(e["shape"]))
        for name, e in header.items()
    }


def _check_header(path: Path, header: Mapping[str, Any]) -> None:
    """Raise :class:`OSError` unless every tensor has a known dtype, a shape and its own bytes."""

    def are_sizes(values: object) -> bool:
        # More dims, or numbers of thousands of digits, would multiply for hours.
        return (
            isinstance(values, list)
            and len(values) <= MAX_DIMS
            and all(type(v) is int and 0 <= v < 2**63 for v in values)
        )

    for name, entry in header.items():
        typed = (
            isinstance(entry, dict)
            and isinstance(entry.get("dtype"), str)
            and are_sizes(entry.get("shape"))
        )
        offsets: Any = entry.get("data_offsets") if typed else None
        if not are_sizes(offsets) or len(offsets) != 2:
            raise OSError(f"{path} has a corrupt header: {name} lacks dtype, shape or data_offsets")
        if entry["dtype"] not in DTYPES:
            raise OSError(
                f"{path} holds tensors of dtype {entry['dtype']}, which is not supported; use "
                f"one of {', '.join(DTYPES)}"
            )
        size_bytes = prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if offsets[1] - offsets[0] != size_bytes:
            raise OSError(
                f"{path} has a corrupt header: {name} of shape {entry['shape']} needs {size_bytes} "
                f"bytes, its data_offsets {offsets} hold {offsets[1] - offsets[0]}"
            )
    extents = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    for (_, end, first), (start, _, second) in pairwise(e for e in extents if e[0] < e[1]):
        if start < end:
            raise OSError(f"{path} has a corrupt header: {first} and {second} overlap")


class CheckpointSource:
    """The weights of a checkpoint's safetensors shards."""

    is_rereadable = True

    def __init__(
        self, model: nn.Module, files: list[Path], engine: Engine, fresh: RandomSource
    ) -> None:
        """Match the tensors of a checkpoint with the parameters of a model on meta.

        Args:
            model: a transformers model; only its structure is used.
            files: the shards.
            engine: reads the shards.
            fresh: initialises parameters that the checkpoint lacks.

        Raises:
            OSError: a shard is missing, truncated or not safetensors.
            ValueError: a tensor and its parameter differ in shape.
        """
        self._model, self._engine, self._fresh = model, engine, fresh
        self._in_place: dict[str, Stored] = {}
        self._converted: dict[str, tuple[WeightConverter, str, list[tuple[str, str, Stored]]]] = {}
        self._cached: tuple[object, dict[str, Tensor]] | None = None
        state, named = (
            model.state_dict(),
            {k: v for file in files for k, v in tensors_of(file).items()},
        )
        self._match(state, named)
        self.missing = sorted(self._missing())
        """Parameters that the checkpoint lacks, except those that transformers may ignore."""

    def _match(self, state: Mapping[str, Tensor], named: Mapping[str, Stored]) -> None:
        mapping = get_model_conversion_mapping(self._model)  # type: ignore[arg-type]
        renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        converters = [t for t in mapping if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = getattr(self._model, "base_model_prefix", None)
        for key in sorted(named, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)  # type: ignore[arg-type]
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)  # type: ignore[arg-type]
            if name not in state:
                continue
            if pattern is not None:
                converter = by_pattern[pattern]
                self._converted.setdefault(name, (converter, name, []))[2].append(
                    (key, pattern, named[key])
                )
            elif tuple(state[name].shape) != named[key].shape:
                raise ValueError(
                    f"{key} has shape {list(named[key].shape)}, its parameter {name} "
                    f"{list(state[name].shape)}"
                )
            else:
                self._in_place[name] = named[key]
        # As from_pretrained does; save_pretrained reverses these conversions.
        self._model._weight_conversions = [t for t in mapping if t.was_used()]  # type: ignore[assignment]
        for entry in list(self._converted.values()):
            # One converter may make several parameters; register it under each.
            for target in self._targets(entry[0], entry[1]):
                if target in state:
                    self._converted.setdefault(target, entry)

    @staticmethod
    def _targets(converter: WeightConverter, first: str) -> list[str]:
        start = converter.target_patterns[0]
        return (
            [first.replace(start, other) for other in converter.target_patterns]
            if start in first
            else [first]
        )

    def _missing(self) -> set[str]:
        found = self._in_place.keys() | self._converted.keys()
        tied: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        ignored = [
            re.compile(p)
            for p in getattr(self._model, "_keys_to_ignore_on_load_missing", None) or []
        ]
        lacking = [names[0] for names in tied.values() if not found & set(names)]
        return {name for name in lacking if not any(p.search(name) for p in ignored)}

    def read(self, block: Block, layout: Layout, image: Tensor, start: int = 0) -> None:
        """See :class:`zo.model.source.WeightSource`."""
        lacking = [
            p for p in block.parts if not any(self._has(name) for name in p.parameter.spec.names)
        ]
        if lacking:
            self._fresh.read(block, layout, image, start)
        else:
            image.zero_()
        for part, first, flat in spans(block, image, start):
            if name := next((n for n in part.parameter.spec.names if self._has(n)), None):
                self._fill(part, name, first, flat)

    def _has(self, name: str) -> bool:
        return name in self._in_place or name in self._converted

    def _fill(self, part: Part, name: str, first: int, flat: Tensor) -> None:
        if name in self._converted:
            flat.copy_(elements_of(part, self._convert(name), first, flat.numel()))
            return
        stored, first = self._in_place[name], part.start - part.parameter.start + first
        if stored.dtype == flat.dtype:
            self._engine.read(
                stored.path, stored.start + first * flat.dtype.itemsize, flat.view(torch.uint8)
            )
        else:
            flat.copy_(stored.read(self._engine, first, flat.numel()))

    def _convert(self, name: str) -> Tensor:
        """Make a parameter that transformers converts from one or more tensors."""
        entry = self._converted[name]
        if self._cached is None or self._cached[0] is not entry:
            self._cached = None
            converter, first, sources = deepcopy(entry[0]), entry[1], entry[2]
            for key, pattern, stored in sources:
                converter.add_tensor(first, key, pattern, self._reader(stored))  # type: ignore[arg-type]
            made = converter.convert(first, model=self._model, config=self._model.config)
            self._cached = entry, {k: v[0] if isinstance(v, list) else v for k, v in made.items()}
        return self._cached[1][name]

    def _reader(self, stored: Stored) -> Callable[[], Tensor]:
        return lambda: stored.read(self._engine).view(stored.shape)

    def attach_buffers(self, model: nn.Module) -> None:
        """Copy saved buffers, and the name conversions that ``save_pretrained`` reverses."""
        for name, buffer in model.named_buffers():
            if name in self._in_place:
                buffer.copy_(self._in_place[name].read(self._engine).view(buffer.shape))
        model._weight_conversions = self._model._weight_conversions

    def is_expensive(self, block: Block) -> bool:
        """Return True unless all parameters of the block are read in place."""
        return not all(
            any(name in self._in_place for name in p.parameter.spec.names) for p in block.parts
        )

    def clear_cache(self) -> None:
        """Free the last converted parameters and the last initialised group."""
        self._cached = None
        self._fresh.clear_cache()
