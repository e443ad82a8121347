"""zo fine-tunes any Hugging Face model with forward passes only, on one laptop core or a GPU cluster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo.config.recipes import load_config
    from zo.run.trainer import Trainer

__all__ = ["Trainer", "load_config"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for: torch takes seconds that ``python -m zo.log`` need not wait."""
    if name == "Trainer":
        from zo.run.trainer import Trainer

        return Trainer
    if name == "load_config":
        from zo.config.recipes import load_config

        return load_config
    raise AttributeError(f"module 'zo' has no attribute {name!r}")
