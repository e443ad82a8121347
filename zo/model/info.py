"""The facts of a model that data and objectives need."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """The facts of a model that data and objectives need, for any family."""

    task: str
    """A value of ``model.task``."""
    vocab_size: int
    accepts: frozenset[str]
    """Argument names of its forward."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that its configuration ends a text with."""
