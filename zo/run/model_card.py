"""The model card of a run: metadata for the hub, and what a reader needs to judge and repeat it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)(?<!\.jsonl)(?<!\.csv)(?<!\.parquet)")
"""``namespace/name``, and not a data file in a folder."""


@dataclass(frozen=True)
class Card:
    """The content of a run's model card."""

    base: str
    """Hub id, folder or name of the model it started from."""
    base_fingerprint: str
    """Fingerprint of its parameters before the first step."""
    data: str
    """Task, file or hub id."""
    data_checksum: str
    recipe: str
    command: str
    """The command that reproduces the weights, as typed."""
    seed: int
    steps: int
    method: str
    """Estimator and update with their numbers, in one line."""
    metrics: Mapping[str, float]
    """Score by name."""
    versions: Mapping[str, str]
    """Version by library."""
    fingerprint: str
    """BLAKE3 hash of all parameters in address order (see :mod:`zo.model.fingerprint`)."""


TEXT = """# {title}

All trainable parameters were fine-tuned with forward passes only (zeroth-order optimisation, no
backward pass) by `zo`. The base model's licence and limits still hold.

{facts}

## Scores

{metrics}

## Reproduce

```
{command}
```

{versions}

The weights' fingerprint, a BLAKE3 hash of all parameters in address order, is `{fingerprint}`;
equal fingerprints mean equal bits. To check it, run the command above with these versions, on the
same kind of device and any number of ranks: the last line that it prints is a JSON object with the
same `fingerprint`.
"""


def model_card(card: Card) -> str:
    """Return the text of ``README.md``: metadata for the hub, facts, scores, and the command."""
    data = ModelCardData(
        base_model=card.base if _is_hub_id(card.base) else None,
        datasets=[card.data] if _is_hub_id(card.data) else None,
        library_name="transformers",
        tags=["zeroth-order", "forward-only", "zo"],
    )
    facts = {
        "base model": card.base,
        "base model fingerprint": card.base_fingerprint,
        "data": card.data,
    }
    facts |= {"data checksum": card.data_checksum, "recipe": card.recipe, "method": card.method}
    facts |= {"steps": str(card.steps), "seed": str(card.seed)}
    scores = {name: f"{value:.6g}" for name, value in card.metrics.items()}
    text = TEXT.format(
        title=f"{card.base.rstrip('/').rpartition('/')[2]}, fine-tuned forward-only",
        facts=_table("", "", facts),
        metrics=_table("metric", "value", scores) if scores else "Not evaluated.",
        command=card.command,
        versions=_table("library", "version", card.versions),
        fingerprint=card.fingerprint,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _table(left: str, right: str, rows: Mapping[str, object]) -> str:
    cells = [(left, right), ("---", "---"), *rows.items()]
    return "\n".join(
        "| " + " | ".join(one_line(c).replace("|", "\\|") for c in row) + " |" for row in cells
    )


def _is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def one_line(what: object) -> str:
    """Return the text of an object with every run of white space as one space."""
    return " ".join(str(what).split())
