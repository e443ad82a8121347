"""A run's result as a Hugging Face folder, with a model card that says how it was made, and its push to the hub.

Weights go through transformers' own ``save_pretrained``, which undoes what loading did to names and shapes. A folder
appears whole or not at all.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from zo.config import UserError
from zo.log import sync_folder


@dataclass(frozen=True)
class Card:
    """What a model card says."""

    base: str
    base_fingerprint: str
    data: str
    data_checksum: str
    recipe: str
    command: str
    seed: int
    steps: int
    fingerprint: str
    method: str
    scores: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def model_card(card: Card) -> str:
    """The text of a model's ``README.md``, with the front matter that the hub reads."""
    # Only what looks like a hub id may stand in the front matter: the hub checks it.
    facts = ModelCardData(
        library_name="transformers",
        base_model=card.base if _is_hub_id(card.base) else None,
        datasets=[card.data] if _is_hub_id(card.data) else None,
        tags=["zeroth-order", "forward-only", "zo"],
    )
    scores = "\n".join(f"| {name} | {value:.4g} |" for name, value in card.scores.items())
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    body = f"""
# {card.base}, fine-tuned by zo with forward passes only

{card.steps} steps of {card.method} on `{card.data}`; every trainable parameter was trained, no gradient was computed.

| held-out score | value |
|---|---|
{scores or "| (not evaluated) | |"}

## Reproduce

```
{card.command}
```

| | |
|---|---|
| recipe | `{card.recipe or "none"}` |
| seed | {card.seed} |
| base model | `{card.base}`, fingerprint `{card.base_fingerprint}` |
| data | `{card.data}`, checksum `{card.data_checksum}` |
| versions | {versions} |
| fingerprint | `{card.fingerprint}` |

A fingerprint is the SHA-256 of all trainable parameters in address order: the same fingerprint means the same bits.
"""
    return f"---\n{facts.to_yaml()}\n---\n{body}"


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def check_target(to: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        UserError: ``to`` exists and is not an empty folder.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"to={to} exists and is not empty; give a new folder")


def write_folder(model: Any, tokenizer: Any, to: Path, card: Card, *, replace: bool = False) -> None:
    """Write a Hugging Face folder.

    Args:
        model: a transformers model with the weights to save.
        tokenizer: saved beside it, if there is one.
        to: the folder to make.
        card: for its ``README.md``.
        replace: whether a folder that is there may be replaced, once the new one is whole.

    Raises:
        UserError: the folder is taken, or the disk refuses.
    """
    if not replace:
        check_target(to)
    unfinished = to.with_name(f".{to.name}.unfinished")
    size_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        if (room := shutil.disk_usage(unfinished).free) < size_bytes:
            raise UserError(f"to={to}: {size_bytes} bytes are needed and {room} are free; make room or go elsewhere")
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        ModelCard(model_card(card)).save(unfinished / "README.md")
        for file in unfinished.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        sync_folder(unfinished)
        if to.exists():
            shutil.rmtree(to)
        os.rename(unfinished, to)
        sync_folder(to.parent)
    except OSError as error:
        raise UserError(f"to={to} cannot be written: {error.strerror or error}; make room or go elsewhere") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def push(folder: Path, repo_id: str, private: bool = True) -> str:
    """Upload a folder to the hub that ``HF_ENDPOINT`` names, as the user whose token is set.

    Returns:
        The address of the repository.

    Raises:
        UserError: no token, a bad name, or the hub cannot be reached.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Fine-tuned with zo")
    except HFValidationError as error:
        raise UserError(f"push={repo_id} is no repository's name; use USER/NAME") from error
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"push={repo_id} was refused: {reason}; log in with `hf auth login` or set HF_TOKEN, and check the name"
        ) from error
    return str(address)


def card_of(content: dict[str, Any], header: dict[str, Any], steps: int, scores: dict[str, float] | None, fingerprint: str) -> Card:
    """The card of a run.

    Args:
        content: what its ``config.yaml`` holds.
        header: of its log.
        steps: entries of its log that were replayed.
        scores: on held-out data, if there are any.
        fingerprint: of the weights.
    """
    config = content["config"]
    estimator, update = config["estimator"], config["update"]
    method = (
        f"{estimator['name']} (eps {estimator['eps']}, {estimator['directions']} {estimator['distribution']} direction(s) a "
        f"step) and {update['name']} (lr {update['lr']}, {update['schedule']})"
    )
    return Card(
        base=config["model"]["name"] or "own model",
        base_fingerprint=header["base"],
        data=config["data"]["name"] or "own data",
        data_checksum=header["data"],
        recipe=config["recipe"],
        command=content["command"],
        seed=config["run"]["seed"],
        steps=steps,
        fingerprint=fingerprint,
        method=method,
        scores=scores or {},
        versions=content["versions"],
    )
