"""Configurations of a small width for a model's self-check.

A layer of a large model has gigabytes, and the modules that read its weights do not depend on its
width.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

HEAD = 16
"""Width of an attention head in a narrow copy."""
WIDTHS = re.compile("hidden|emb|model|dim|width")
"""Matches keys that are widths if they have the model's."""
INNER = re.compile("ffn|inner|intermediate")
"""Matches keys of the width inside of a feed-forward layer."""
LENGTHS = re.compile("max|position|vocab|layers|seq")
"""Matches keys that are no widths, though their values may be equal."""


def narrow_configs(config: Any) -> Iterator[Any]:
    """Yield narrower copies of a transformers configuration, to be tried in this order.

    The first has narrow feed-forward layers too, which not every family builds of any size.
    """
    text = config.get_text_config()
    width, heads = getattr(text, "hidden_size", 0), getattr(text, "num_attention_heads", 0)
    if width and heads and width > heads * HEAD:
        for narrows_inner in (True, False):
            yield _narrowed(copy.deepcopy(config), width, heads * HEAD, narrows_inner)


def _narrowed(config: Any, width: int, to: int, narrows_inner: bool) -> Any:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in list(vars(part).items()):
            if type(value) is not int or LENGTHS.search(key):
                continue
            if value == width and WIDTHS.search(key):
                setattr(part, key, to)
            elif narrows_inner and INNER.search(key):
                setattr(part, key, max(1, value * to // width))
        if isinstance(getattr(part, "head_dim", None), int):
            part.head_dim = HEAD
    return config
