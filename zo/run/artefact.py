"""A fine-tune in kilobytes: the log of a run, what it is applied to, and a card.

    config.yaml   as in a run's folder; ``base`` has the revision, ``artefact`` what is rebuilt
    steps.log     the log, to its last entry or an earlier one
    README.md     the card

theta = replay(theta_0, entries): with directions of signs the weights have the same bits on any
device. A folder of a run is one, too.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from zo.config.peft import PeftConfig
from zo.config.plain_yaml import write_yaml
from zo.config.recipes import OWN, config_of, load_config
from zo.config.schema import Config
from zo.data.rows import SYNTHETIC
from zo.errors import UserError, one_line
from zo.method.entry import Entry
from zo.run.export import ROOM_BYTES, whole_or_nothing
from zo.run.model_card import Card, model_card
from zo.run.restore import FinishedRun
from zo.run.snippet import log_use
from zo.state import log as logs
from zo.state.log import Log
from zo.state.log_file import read_complete
from zo.state.replay import Recipe
from zo.state.run_folder import CONFIG_FILE, LOG_FILE, RunFolder, manifest

FILES = (CONFIG_FILE, LOG_FILE, "README.md")
WAIT_S = 10.0
"""Seconds that the hub may take to answer."""


@dataclass(frozen=True)
class Artefact:
    """A log, and what is known of the model that it is applied to."""

    source: str
    """As it was asked for."""
    path: Path
    """Folder or file on this machine."""
    content: dict[str, Any]
    """Of ``config.yaml``; of a log alone what could be made of its header and the caller's keys."""
    config: Config
    header: dict[str, Any]
    entries: Sequence[Entry]

    @property
    def facts(self) -> dict[str, Any]:
        """What an export recorded; empty for a run's folder and for a log alone."""
        found = self.content.get("artefact")
        return found if isinstance(found, dict) else {}


def write_artefact(finished: FinishedRun, to: Path, card: Card) -> None:
    """Write base, log and card of a run's model.

    Args:
        finished: the run's model after some entries.
        to: the folder; must not exist, or be empty.
        card: of the model.

    Raises:
        UserError: the model is the user's own, the folder is not empty, or the disk refuses;
            nothing is left behind.
    """
    content, model = finished.content, finished.replica.model
    check_published(content)
    hub: Any = getattr(model, "config", None)
    revision = finished.config.model.revision or getattr(hub, "_commit_hash", None)
    config = content["config"] | {"run": {**content["config"].get("run", {}), "dir": None}}
    config = config | {"model": {**config["model"], "revision": revision}}
    facts: dict[str, Any] = {"steps": finished.steps, "fingerprint": card.fingerprint}
    if type(model).__name__.endswith("ForSequenceClassification"):
        labels = [str(name) for _, name in sorted(hub.id2label.items())]
        facts |= {"classes": labels, "pad": getattr(hub, "pad_token_id", None)}
    facts |= {"scores": {name: float(value) for name, value in card.metrics.items()}}
    facts |= {"template": card.template, "label_words": list(card.label_words)}
    base = {"name": config["model"]["name"], "fingerprint": card.base_fingerprint}
    written = content | {"config": config, "base": base | {"revision": revision}, "artefact": facts}
    use = log_use(model, finished.problem.tokenizer, card.base, card.base_card, revision)
    with whole_or_nothing(to.expanduser().resolve(), ROOM_BYTES, replace=False) as beside:
        (beside / FILES[0]).write_text(write_yaml(written), encoding="utf-8")
        log = Log.create(beside / FILES[1], finished.header)
        try:
            log.extend(finished.replica.log.entries)
        finally:
            log.close()
        card_text = f"{model_card(card, use)}\n{manifest(FILES[:2])}\n"
        (beside / FILES[2]).write_text(card_text, encoding="utf-8")


def check_published(content: dict[str, Any]) -> None:
    """Check that others can have what a run started from.

    Raises:
        UserError: it is a model object of the user's.
    """
    if content.get("own") is True:
        raise UserError(
            "the run trained a model object of your own, which no log can name; use artefact=full, "
            "or train a model of the hub or a folder"
        )


def open_artefact(source: str, base: str | None = None, overrides: Sequence[str] = ()) -> Artefact:
    """Read a log and what it is applied to; no weights are read.

    Args:
        source: a hub id, a folder (of an artefact or of a run), or a log file.
        base: hub id or folder of the base model, where it is not the one that is named there.
        overrides: keys of the model, for a log file without its ``config.yaml``.

    Raises:
        UserError: there is none, it is cut short, or of another version.
    """
    path = Path(source).expanduser()
    if not path.exists():
        path = _download(source)
    folder = RunFolder(path if path.is_dir() else path.parent)
    log_file = folder.log_file if path.is_dir() else path
    if not folder.holds_run:
        if path.is_dir():
            raise UserError(
                f"{source} has no config.yaml, so it is neither a log artefact nor a run; give the "
                "folder that artefact=log wrote"
            )
        return _log_alone(source, log_file, base, overrides)
    if overrides:
        raise UserError(
            f"{overrides[0]} cannot be changed: {folder.config_file} says what the log is of; give "
            "base=, log= and to="
        )
    content = folder.read_config()
    check_published(content)
    facts = content.get("artefact")
    if isinstance(facts, dict) and isinstance(facts.get("steps"), int):
        header, entries = read_complete(log_file, facts["steps"])
    else:
        header, entries = logs.read(log_file)
    _check_header(header, log_file)
    if (begun := content.get("log_header")) and (found := logs.difference(header, begun)):
        raise UserError(
            f"{log_file} is not of its config.yaml: {found[0]} is {found[1]} in the log, and "
            f"{found[2]} there; take both files from one copy"
        )
    config = config_of(content["config"])
    if base is not None and base != config.model.name:
        config = replace(config, model=replace(config.model, name=base, revision=None))
    return Artefact(source, path, content, config, header, entries)


def _log_alone(source: str, path: Path, base: str | None, overrides: Sequence[str]) -> Artefact:
    """Return what a header tells: all but the stored dtype and the task, which keys may set."""
    header, entries = logs.read(path)
    _check_header(header, path)
    if base is None:
        raise UserError(
            f"{source} is a log without its config.yaml, which names the base model; give base="
        )
    config = load_config(OWN, [f"model.name={base}", f"data.name={SYNTHETIC}", *overrides])
    config = replace(
        config,
        model=replace(config.model, train=header.get("train")),
        peft=_peft_of(header, path),
        run=replace(config.run, seed=header["seed"]),
    )
    content = {"config": asdict(config), "command": "", "versions": {}}
    return Artefact(source, path, content, config, header, entries)


def _peft_of(header: dict[str, Any], path: Path) -> PeftConfig:
    try:
        return PeftConfig(**header.get("peft", {}))
    except TypeError as error:
        raise UserError(
            f"{path} has adapters that this version of zo does not know ({error}); install the "
            "version that wrote it"
        ) from error


def _check_header(header: dict[str, Any], path: Path) -> None:
    """Check that a log's entries can be repeated on the base that it names.

    Raises:
        UserError: the header lacks something, or has what this version of zo does not know.
    """
    if "base" not in header:
        raise UserError(f"{path} has a header without base; take another copy of the log")
    Recipe.of(Log(header))


def _download(source: str) -> Path:
    """Return the folder of an artefact of the hub, in the hub's cache.

    Raises:
        UserError: it is neither a path nor a repository with a log that can be read.
    """
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"{source} does not exist; give a folder, a log file, or a hub id")
    try:
        path = Path(snapshot_download(source, allow_patterns=list(FILES), etag_timeout=WAIT_S))
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError, HFValidationError) as error:
        raise UserError(
            f"{source} is not a folder, and cannot be loaded from the hub: {one_line(error, 300)}"
        ) from error
    if not (path / FILES[1]).is_file():
        raise UserError(f"{source} holds no log artefact: it has no {FILES[1]}")
    return path
