"""A user's objective: which results are a loss, and how finely they are rounded.

a number, a tensor of one number                 a mean: one term of its micro-batch
a tensor of two numbers, or two numbers          sum of losses, number of terms
"""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from zo.data.tasks import Batch
from zo.errors import UserError

Objective = Callable[[nn.Module, Batch], Any]


class OwnObjective:
    """A user's function of model and batch, as the sum of losses and the number of terms."""

    def __init__(self, function: Objective) -> None:
        """Call ``function`` for every cell of the loss table."""
        self._function = function
        self.dtype = torch.float64
        """The coarsest type of a loss that was returned so far."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return float64 of shape ``[2]``.

        Raises:
            UserError: the function returned something else than a loss.
        """
        result = self._function(model, batch)
        parts = list(result) if isinstance(result, tuple | list) else [result]
        if len(parts) > 2 or not all(isinstance(part, Real | Tensor) for part in parts):
            raise UserError(f"the objective returned {_shown(result)}")
        tensors = [torch.as_tensor(part) for part in parts]
        numbers = torch.cat([tensor.detach().flatten().to(tensors[0].device) for tensor in tensors])
        if not 1 <= len(numbers) <= 2 or numbers.is_complex():
            raise UserError(f"the objective returned {_shown(result)}")
        dtype = tensors[0].dtype
        # A number of Python's has been rounded already, nobody knows how.
        if isinstance(parts[0], Tensor) and dtype.is_floating_point:
            self.dtype = max(self.dtype, dtype, key=lambda kind: torch.finfo(kind).eps)
        values = numbers.double()
        return values if len(values) == 2 else torch.cat((values, torch.ones_like(values)))


def _shown(result: Any) -> str:
    """Return a phrase on a result that is not a loss, with what to return in its place."""
    if isinstance(result, Tensor) and result.numel() > 2:
        return f"a tensor of shape {list(result.shape)}, not one loss; return its mean()"
    if result is None:
        return "None; return a loss"
    if isinstance(getattr(result, "loss", None), Tensor):
        return f"a {type(result).__name__}, not a loss; return its .loss"
    return (
        f"a {type(result).__name__} that is not a loss; return a number, a tensor of one, or sum "
        "of losses and number of terms"
    )
