"""The part of a model that a step's directions reach: everything, or its top layers.

``all``      every trainable parameter
``auto``     the top four layers, or all of fewer; everything where they have no order
``top:N``    the top N layers and what the model computes after them; ``top:0``: that alone, such
             as the last norm and the head
``sampled``  drawn anew for each step from :data:`SHARES`, so that every parameter is trained and
             the top, whose steps cost least, more often
"""

from zo.errors import UserError

AUTO_LAYERS = 4
SHARES = ((40, 8), (30, 4), (20, 2), (10, None))
"""Of 100 steps with ``sampled``, how many reach the top 1/n of the layers; ``None``: everything."""


def parse(text: str) -> tuple[str, int]:
    """Return the kind of a part, ``all``, ``auto``, ``sampled`` or ``top``, and the N of ``top:N``.

    Raises:
        UserError: ``estimator.part`` is none of them.
    """
    if text in ("all", "auto", "sampled"):
        return text, 0
    kind, _, number = text.partition(":")
    if kind != "top" or not (number.isascii() and number.isdigit()) or len(number) > 9:
        raise UserError(
            f"estimator.part={text!r} is not known; use all, auto, sampled, or top:N for the top N "
            "layers and what comes after them"
        )
    return kind, int(number)


def layers_reached(part: str, step: int, seed: int, layers: int) -> int | None:
    """Return how many top layers a step's directions reach.

    Args:
        part: ``estimator.part``.
        step: from 1.
        seed: of the run.
        layers: of the model, in the order in which they run; 0 where they have no order.

    Returns:
        A number from 0 to ``layers``; ``None`` for everything, embeddings included.

    Raises:
        UserError: the part has more layers than the model, or its layers have no order.
    """
    kind, top = parse(part)
    if kind == "all":
        return None
    if kind == "auto":
        return min(AUTO_LAYERS, layers) or None
    if layers == 0:
        raise UserError(
            f"estimator.part={part} is of a model whose blocks have an order, and this one's have "
            "none; use estimator.part=all"
        )
    if kind == "top":
        if top > layers:
            raise UserError(
                f"estimator.part={part} is more than the {layers} layers of the model; use "
                f"top:{layers} or less, or all"
            )
        return top
    return _drawn(step, seed, layers)


def fewest_layers(part: str, layers: int) -> int | None:
    """Return how many top layers any step's directions reach at least.

    ``None`` where that is everything, and for ``auto``, which is everything where need be.
    """
    kind, top = parse(part)
    if kind == "sampled":
        return min(max(1, layers // divisor) for _, divisor in SHARES if divisor is not None)
    return top if kind == "top" else None


def _drawn(step: int, seed: int, layers: int) -> int | None:
    """Return the layers of one step of ``sampled``."""
    # Imported here: the configuration reads a part's name without the seconds that torch takes.
    from zo.method.philox import Purpose, word_stream

    word = int(word_stream(seed, 0, 1, step, Purpose.PART)[0])
    total = 0
    for percent, divisor in SHARES:
        total += percent
        if word * 100 < total << 32:
            return None if divisor is None else max(1, layers // divisor)
    raise AssertionError(word)
