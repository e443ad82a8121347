"""Decay toward the base: a step also shrinks how far the weights are from those of version 0.

    w <- w_0 + (1 - lr * anchor) * (w - w_0),  then the entry's change

With SGD the weights are w_0 + sum_k c_k z_k, so this is a decay of old coefficients. Their
directions would have to be made again, more of them at every step; w_0 is read again instead, from
the checkpoint, a block at a time. Each operation has one rounding in float32 on any device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zo.errors import UserError
from zo.method.estimator import float32
from zo.model.layout import Block, Layout
from zo.model.source import WeightSource


class Anchor:
    """The weights of version 0, which others are pulled to."""

    def __init__(self, strength: float, base: WeightSource, layout: Layout) -> None:
        """Take ``update.anchor`` and the source of the weights of version 0."""
        self._strength, self._base, self._layout = strength, base, layout

    def read(self, block: Block, start: int, size_bytes: int, device: torch.device) -> Tensor:
        """Return the trainable bytes of a block of version 0 in a range, uint8 on a device."""
        stop = min(start + size_bytes, block.trainable_bytes)
        image = torch.zeros(max(0, stop - start), dtype=torch.uint8)
        if len(image):
            self._base.read(block, self._layout, image, start)
        return image.to(device)

    def pull(self, weights: Tensor, base: Tensor, lr: float) -> None:
        """Pull weights to the base.

        Args:
            weights: float32; *modified in place*.
            base: of the same elements.
            lr: of the entry.
        """
        kept = float32(max(0.0, 1.0 - lr * self._strength))
        if kept != 1.0:
            weights.sub_(base).mul_(kept).add_(base)


def check_anchor(strength: float, layout: Layout, base: WeightSource | None) -> None:
    """Check that a model can be anchored.

    Raises:
        UserError: its base cannot be read again, or what is trained is not stored in float32.
    """
    if not strength:
        return
    dtypes: Sequence[torch.dtype] = [s.dtype for b in layout.blocks for s in b.trainable]
    if base is None:
        raise UserError(
            f"update.anchor={strength} reads the weights of the base again, and a model of your "
            "own is trained in place; load it by model.name, or use update.anchor=0"
        )
    if any(dtype != torch.float32 for dtype in dtypes):
        raise UserError(
            f"update.anchor={strength} is for weights that are stored in float32; use "
            "model.dtype=float32 or adapters (peft.type=lora), or update.anchor=0"
        )
