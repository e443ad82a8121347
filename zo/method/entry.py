"""What the log keeps of one step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """What is kept of one step."""

    step: int
    """1 for the first step; theta of version t has entries 1..t applied."""
    position: int
    """Sequences drawn from the data after this step."""
    lr: float
    scalars: tuple[float, ...]
    """Projected gradients, one a direction; float32 values."""
