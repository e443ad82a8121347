"""Record of one step in the log."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Record of one step."""

    step: int
    """1 for the first step; theta of version t has entries 1..t applied."""
    position: int
    """Sequences drawn from the data after this step."""
    lr: float
    scalars: tuple[float, ...]
    """Projected gradients, one per direction; float32 values."""
    part: int = 0
    """First position, in the model's order of layers, that the directions reach; 0: all of it."""
