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


class Stacker:
    """Stacks of tensors, each made once: masks and positions are the same at every layer.

    On a GPU the host would have to wait for a comparison of two tensors' values.
    """

    def __init__(self) -> None:
        """Start without any."""
        self._made: dict[tuple[int, ...], tuple[Sequence[Tensor], Tensor | None]] = {}

    def stack(self, calls: Sequence[Any]) -> Any | None:
        """Stack structures (arguments, outputs) in dim 0 of their tensors.

        Returns:
            ``None`` if they differ in structure, in a shape, or in what should be the same for all.
        """
        if len(calls) == 1:
            return calls[0]
        flat = [tree_flatten(call) for call in calls]
        if any(structure != flat[0][1] for _, structure in flat):
            return None
        batch = next((leaf.shape[0] for leaf in flat[0][0] if _has_batch(leaf)), 1)
        stacked = []
        for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
            first = leaves[0]
            if isinstance(first, Tensor):
                one = self._stack(leaves, batch)
                if one is None:
                    return None
                stacked.append(one)
            elif any(type(leaf) is not type(first) or leaf != first for leaf in leaves):
                return None
            else:
                stacked.append(first)
        return tree_unflatten(stacked, flat[0][1])

    def _stack(self, leaves: Sequence[Any], batch: int) -> Tensor | None:
        if (view := _side_by_side(leaves)) is not None:
            return view
        key = tuple(map(id, leaves))
        if key not in self._made:
            self._made[key] = leaves, _concatenate(leaves, batch)
        return self._made[key][1]


def _concatenate(leaves: Sequence[Any], batch: int) -> Tensor | None:
    first = leaves[0]
    if any(not isinstance(leaf, Tensor) or leaf.shape != first.shape for leaf in leaves):
        return None
    if _has_batch(first) and first.shape[0] == batch:
        return torch.cat(tuple(leaves))
    if all(leaf is first or torch.equal(leaf, first) for leaf in leaves):
        return first  # type: ignore[no-any-return]
    if not _has_batch(first):
        return None
    rows = batch if first.shape[0] == 1 else first.shape[0]
    return torch.cat([leaf.expand(rows, *leaf.shape[1:]) for leaf in leaves])


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() >= 2


def _side_by_side(leaves: Sequence[Any]) -> Tensor | None:
    """Return a view of equal pieces of a tensor that lie in order, as :func:`split` makes them."""
    first = leaves[0]
    if not _has_batch(first) or not first.is_contiguous():
        return None
    size, start = first.numel() * first.element_size(), first.data_ptr()
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or leaf.shape != first.shape or leaf.dtype != first.dtype:
            return None
        is_next = leaf.data_ptr() == start + number * size and leaf.is_contiguous()
        if not is_next or leaf.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
    whole: Tensor = first.as_strided(
        (len(leaves) * first.shape[0], *first.shape[1:]), first.stride()
    )
    return whole


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
