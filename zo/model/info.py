"""Facts of a model that data and objectives need, whatever its family."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """What data needs to know of a model, whatever its family."""

    task: str
    """``causal-lm`` or ``sequence-classification``."""
    vocab_size: int
    accepts: frozenset[str]
    """Names of the arguments of its forward."""
