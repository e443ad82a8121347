"""Keys of adapters."""

from dataclasses import dataclass

from zo.config.checks import at_least, choice
from zo.errors import UserError

ADAPTERS = ("lora", "ia3", "prompt", "prefix")
"""Adapters that :mod:`zo.model.adapters` adds, which imports torch."""
PEFT_KEYS = {
    "rank": ("lora",),
    "alpha": ("lora",),
    "targets": ("lora", "ia3"),
    "tokens": ("prompt", "prefix"),
}
"""The adapters that each key is of."""


@dataclass(frozen=True)
class PeftConfig:
    """Adapters: small trained modules beside the frozen model."""

    type: str | None = None
    """``lora``, ``ia3``, ``prompt`` (virtual tokens before the text) or ``prefix`` (virtual keys
    and values in each layer), by the package peft (extra ``peft``); none by default."""
    rank: int | None = None
    """Rank of LoRA; 8 by default."""
    alpha: int | None = None
    """LoRA's output is scaled by alpha / rank; 16 by default."""
    targets: list[str] | None = None
    """Ends of the names of the modules that LoRA or IA3 adapts, such as [q_proj,v_proj], or
    [all-linear]; by default what peft takes for the model's family."""
    tokens: int | None = None
    """Virtual tokens of a prompt or prefix; 20 by default."""

    @property
    def virtual_tokens(self) -> int:
        """Tokens that every sequence has in front of it."""
        return (self.tokens or 20) if self.type in PEFT_KEYS["tokens"] else 0

    def __post_init__(self) -> None:
        if self.type is not None:
            choice("peft.type", self.type, ADAPTERS)
        for key, types in PEFT_KEYS.items():
            value = getattr(self, key)
            if value is not None and self.type not in types:
                raise UserError(
                    f"peft.{key} has no effect with peft.type={self.type}; set "
                    f"peft.type={' or '.join(types)}, or leave it out"
                )
            if isinstance(value, int):
                at_least(f"peft.{key}", value, 1)
        if self.targets == []:
            raise UserError("peft.targets is empty; name modules, or leave it out")
