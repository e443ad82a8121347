"""Stack the arguments of equal calls of a module in the batch dim, and split what comes of it.

A tensor of two or more dims has the batch in its dim 0, or one row that stands for all of it; one
of fewer dims, and what is no tensor, is the same for all. Whether that holds for a model is for the
self-check to prove.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Call(NamedTuple):
    """Arguments of a module."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]


def stack(calls: Sequence[Any]) -> Any | None:
    """Stack structures (arguments, outputs) in dim 0 of their tensors.

    Returns:
        ``None`` if they differ in structure, in a shape, or in what should be the same for all.
    """
    if len(calls) == 1:
        return calls[0]
    flat = [tree_flatten(call) for call in calls]
    if any(structure != flat[0][1] for _, structure in flat):
        return None
    batch = next((x.shape[0] for x in flat[0][0] if _has_batch(x)), 1)
    stacked = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        first = leaves[0]
        if not isinstance(first, Tensor):
            if any(type(leaf) is not type(first) or leaf != first for leaf in leaves):
                return None
            stacked.append(first)
        elif any(not isinstance(leaf, Tensor) or leaf.shape != first.shape for leaf in leaves):
            return None
        elif _has_batch(first) and first.shape[0] == batch:
            stacked.append(concatenate(leaves))
        elif all(leaf is first or torch.equal(leaf, first) for leaf in leaves):
            stacked.append(first)
        elif _has_batch(first):
            rows = batch if first.shape[0] == 1 else first.shape[0]
            stacked.append(torch.cat([x.expand(rows, *x.shape[1:]) for x in leaves]))
        else:
            return None
    return tree_unflatten(stacked, flat[0][1])


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() >= 2


def concatenate(pieces: Sequence[Tensor]) -> Tensor:
    """Concatenate in dim 0; pieces of one tensor that lie side by side are viewed, not copied."""
    first = pieces[0]
    size, start = first.numel() * first.element_size(), first.data_ptr()
    if all(
        piece.is_contiguous()
        and piece.data_ptr() == start + number * size
        and piece.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for number, piece in enumerate(pieces)
    ):
        return first.as_strided((len(pieces) * first.shape[0], *first.shape[1:]), first.stride())
    return torch.cat(tuple(pieces))


def split(stacked: Any, count: int) -> list[Any]:
    """Split a structure of tensors into ``count`` equal ones.

    Raises:
        ValueError: a batch dim is not a multiple of ``count``.
    """
    if count == 1:
        return [stacked]
    leaves, structure = tree_flatten(stacked)
    parts: list[Sequence[Any]] = []
    for leaf in leaves:
        if _has_batch(leaf) and leaf.shape[0] > 1:
            if leaf.shape[0] % count:
                raise ValueError(f"{tuple(leaf.shape)} does not split into {count}")
            parts.append(torch.split(leaf, leaf.shape[0] // count))
        else:
            parts.append([leaf] * count)
    return [tree_unflatten([part[i] for part in parts], structure) for i in range(count)]
