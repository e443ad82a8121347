"""Check that sequences are no longer than the positions that a model has."""

from typing import Any

from torch import nn

from zo.errors import UserError

KEYS = ("max_position_embeddings", "n_positions", "n_ctx")
"""Common keys of a configuration; a model without any of them has no limit."""


def check_positions(
    name: str,
    config: Any,
    max_tokens: int,
    skeleton: nn.Module | None = None,
    virtual: int = 0,
    asked: str = "batch.max_tokens",
) -> None:
    """Check that sequences of ``max_tokens`` fit a model's positions.

    Args:
        name: ``model.name``.
        config: of the model's text.
        max_tokens: of a sequence.
        skeleton: the model, for positions that its embedding reserves; parameters may be on meta.
        virtual: tokens that an adapter puts before them.
        asked: key that sets ``max_tokens``.

    Raises:
        UserError: they do not.
    """
    found = ((key, getattr(config, key, None)) for key in KEYS)
    key, limit = next(((k, n) for k, n in found if isinstance(n, int) and n > 0), ("", max_tokens))
    if skeleton is not None and key and limit != getattr(config, "vocab_size", None):
        limit -= _reserved(skeleton, limit)
    taken = virtual if key else 0
    if max_tokens > limit - taken:
        beside = f" beside peft.tokens={taken}" if taken else ""
        raise UserError(
            f"{asked}={max_tokens} is more than the {limit} positions of "
            f"model.name={name} ({key}){beside}; use at most {limit - taken}"
        )


def _reserved(model: nn.Module, positions: int) -> int:
    """Return the rows of an embedding of positions that stand before the first token's.

    Where padding has a row of its own, tokens begin after it.
    """
    embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding))
    of = (m.padding_idx for m in embeddings if m.num_embeddings == positions)
    return max((padding + 1 for padding in of if padding is not None), default=0)
