"""Forward-only fine-tuning of any Hugging Face model, on one laptop core or a GPU cluster."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo.config.recipes import load_config
    from zo.run.replay import from_log
    from zo.run.trainer import Trainer

__all__ = ["Trainer", "from_log", "load_config"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: ``import zo`` does not wait seconds for torch."""
    if name == "Trainer":
        from zo.run.trainer import Trainer

        return Trainer
    if name == "load_config":
        from zo.config.recipes import load_config

        return load_config
    if name == "from_log":
        from zo.run.replay import from_log

        return from_log
    raise AttributeError(f"module 'zo' has no attribute {name!r}")
