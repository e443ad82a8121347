"""A user's objective: what it may return, and how finely.

A mean counts as one term of its micro-batch, so that a step's loss is the mean over micro-batches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zo.data.tasks import Batch
from zo.errors import UserError

EXPECTED = "return a loss (a number, or a tensor of one), or a tensor of sum of losses and terms"


class OwnObjective:
    """A user's function of model and batch, as the sum of losses and the number of terms."""

    def __init__(self, function: Callable[[nn.Module, Batch], Any]) -> None:
        """Call ``function`` for every cell of the loss table."""
        self._function = function
        self.dtype = torch.float64
        """The coarsest type of a loss that was returned so far."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return float64 of shape ``[2]``.

        Raises:
            UserError: the function returns something else than a loss.
        """
        result = self._function(model, batch)
        if isinstance(result, tuple | list) and len(result) == 2 and all(map(_is_number, result)):
            first, second = (torch.as_tensor(part) for part in result)
            result = torch.stack((first.view(()).double(), second.view(()).to(first).double()))
        elif isinstance(result, int | float):  # True and False are numbers too.
            result = torch.tensor(float(result), dtype=torch.float64)
        if not isinstance(result, Tensor) or result.numel() not in (1, 2) or result.is_complex():
            raise UserError(f"objective returned {_shown(result)}; {EXPECTED}")
        if (
            result.is_floating_point()
            and torch.finfo(result.dtype).eps > torch.finfo(self.dtype).eps
        ):
            self.dtype = result.dtype
        values = result.detach().reshape(-1).double()
        return values if len(values) == 2 else torch.cat((values, torch.ones_like(values)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _shown(result: object) -> str:
    if result is None:
        return "nothing: is its return missing?"
    if isinstance(result, Tensor):
        kind = (
            "complex numbers" if result.is_complex() else "a loss for each example: take its mean()"
        )
        return f"a tensor of shape {list(result.shape)}, {kind}"
    has_loss = getattr(result, "loss", None) is not None
    return f"a {type(result).__name__}{' : take its .loss' if has_loss else ''}"
