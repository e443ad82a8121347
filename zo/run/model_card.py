"""The model card of a run: metadata for the hub, and what a reader needs to judge and repeat it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from zo.config.invocation import typed
from zo.config.recipes import DEFAULT, load_config, recipe_names
from zo.config.schema import Config
from zo.errors import one_line
from zo.run.snippet import Use

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.json)(?<!\.jsonl)(?<!\.csv)(?<!\.parquet)")
"""``namespace/name``, and not a data file in a folder."""

PYTHON = "from zo import Trainer, load_config"
UNKNOWN = Use(None, "transformers", "")


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
    last_step: int | None = None
    """The run's last step, if it is another one."""
    base_card: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the base model's card, as :func:`zo.run.base_card.read_base_card` returns it."""
    template: str | None = None
    """Prompt of an example with a label word."""
    label_words: Sequence[str] = ()
    adapter: str | None = None
    """Type of the adapters, if the folder holds some."""


TEXT = """# {title}

Fine-tuned with forward passes only (zeroth-order optimisation, no backward pass) by `zo`.
{licence} hold.

{facts}

{use}## Scores

{metrics}

## Reproduce

```
{command}
```

{versions}

The weights' fingerprint, a BLAKE3 hash of all parameters in address order, is `{fingerprint}`;
equal fingerprints mean equal bits. To check it, run the above with these versions, on the same kind
of device and any number of ranks: {proof}
"""


def model_card(card: Card, use: Use = UNKNOWN) -> str:
    """Return the text of ``README.md``: metadata for the hub, facts, use, scores, the command.

    Args:
        card: its content.
        use: of the model.
    """
    known: dict[str, Any] = dict(card.base_card)
    above = known.pop("base_model", None)
    base = card.base if _is_hub_id(card.base) else above
    data = ModelCardData(
        base_model=base,
        datasets=[card.data] if _is_hub_id(card.data) else None,
        library_name=use.library,
        pipeline_tag=use.pipeline,
        tags=["zeroth-order", "forward-only", "zo", *([card.adapter] if card.adapter else [])],
        **known,
    )
    licence = known.get("license_name") or known.get("license")
    named = f"The base model's licence ({licence}) and limits" if licence else ""
    facts = {
        "base model": card.base,
        "base model fingerprint": card.base_fingerprint,
        "data": card.data,
    }
    facts |= {"data checksum": card.data_checksum, "recipe": card.recipe, "method": card.method}
    facts |= {"steps": str(card.steps), "seed": str(card.seed)}
    scores = {name: f"{value:.6g}" for name, value in card.metrics.items()}
    how = f"## Use\n\n```python\n{_fenced(use.code)}```\n\n" if use.code else ""
    text = TEXT.format(
        title=f"{card.base.rstrip('/').rpartition('/')[2]}, fine-tuned forward-only",
        licence=named or "The base model's licence and limits",
        facts=_table("", "", facts),
        use=how,
        metrics=_table("metric", "value", scores) if scores else "Not evaluated.",
        command=_fenced(card.command),
        versions=_table("library", "version", card.versions),
        fingerprint=card.fingerprint,
        proof=_proof(card),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _proof(card: Card) -> str:
    """Return the sentence on where a repeated run shows its fingerprint."""
    if card.last_step not in (None, card.steps):
        return (
            f"`{typed('evaluate')} run=DIR step={card.steps}`, with DIR that run's folder, "
            "prints the same `fingerprint`."
        )
    if card.command.startswith(PYTHON):
        return "`train()` returns the same `fingerprint`."
    return "the last line that it prints is a JSON object with the same `fingerprint`."


def python_of(config: Config, is_own: bool) -> str:
    """Return Python that repeats a run, for one that no command started.

    Args:
        config: of the run.
        is_own: True for a model, an objective and batches of the user's.
    """
    recipe = config.recipe if config.recipe in recipe_names() else DEFAULT
    # A task on the command line also takes the recipe's data away.
    named = [f"task={_hydra(config.task)}"] if config.task != load_config(recipe).task else []
    before, now = (
        {
            f"{group}.{key}": value
            for group, keys in asdict(one).items()
            if isinstance(keys, dict)
            for key, value in keys.items()
        }
        for one in (load_config(recipe, named), config)
    )
    keys = [key for key in now if before[key] != now[key] and key != "run.dir"]
    overrides = [*named, *(f"{key}={_hydra(now[key])}" for key in keys)]
    own = ", model=model, objective=objective, batches=batches" if is_own else ""
    note = "# with your own model, objective and batches\n" if is_own else ""
    listed = "".join(f"    {override!r},\n" for override in overrides)
    settings = f"[\n{listed}]" if overrides else "[]"
    made = f"config = load_config({recipe!r}, {settings})"
    return f"{PYTHON}\n\n{note}{made}\nTrainer(config{own}).train()"


def _hydra(value: Any) -> str:
    """Return a value as Hydra's command line has it."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {_hydra(inner)}' for key, inner in value.items())}}}"
    # A backslash is one but before a quote.
    quoted = re.sub(
        r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value)
    )
    return f"'{quoted}'"


def _fenced(code: str) -> str:
    """Return code that does not end the block that it stands in."""
    return code.replace("```", "` ` `")


def _table(left: str, right: str, rows: Mapping[str, object]) -> str:
    cells = [(left, right), ("---", "---"), *rows.items()]
    return "\n".join(
        "| " + " | ".join(one_line(c).replace("|", "\\|") for c in row) + " |" for row in cells
    )


def _is_hub_id(name: str) -> bool:
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()
