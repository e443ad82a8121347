"""Replace the forwards of modules, and restore them in the reverse order."""

from collections.abc import Callable
from typing import Any

from torch import nn


class Patches:
    """Forwards that were replaced on modules themselves, not on their classes."""

    def __init__(self) -> None:
        """Start without any."""
        self._before: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let a module compute with another forward."""
        self._before.append((module, vars(module).get("forward")))
        module.forward = forward

    def restore(self) -> None:
        """Restore all forwards."""
        while self._before:
            module, forward = self._before.pop()
            if forward is None:
                del module.forward
            else:
                module.forward = forward
