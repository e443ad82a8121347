"""Model card of a base model, as far as it can be read: licences and lineage are never guessed."""

from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HFValidationError

from zo.io import quickstart

FILE, WAIT_S = "README.md", 5.0
KEPT = ("license", "license_name", "license_link", "base_model")


def read_base_card(name: str, revision: str | None = None) -> dict[str, Any]:
    """Return what the metadata of a base model's card says of its licence and its own base.

    Args:
        name: folder, hub id, or a packaged model's name.
        revision: on the hub.

    Returns:
        Of the keys ``license``, ``license_name``, ``license_link`` and ``base_model`` those that
        the card has; empty where there is no card, or none that can be read. The hub id that a
        packaged model was made of is its ``base_model``.
    """
    if name in quickstart.MODELS:
        origin, archive = quickstart.ORIGINS[name]
        return {"license": archive.licence.lower(), "base_model": origin}
    try:
        folder = Path(name).expanduser()
        path = folder / FILE
        if not folder.is_dir():
            path = Path(hf_hub_download(name, FILE, revision=revision, etag_timeout=WAIT_S))
        found = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (httpx2.HTTPError, OSError, ValueError, HFValidationError, yaml.YAMLError):
        return {}
    values: dict[str, Any] = found.to_dict()  # type: ignore[no-untyped-call]
    return {key: values[key] for key in KEPT if isinstance(values.get(key), str) and values[key]}
