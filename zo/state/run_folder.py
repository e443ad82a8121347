"""The folder of a run: configuration, log and snapshots; created once, opened again to resume.

    config.yaml     resolved configuration, versions, base model and its fingerprint
    steps.log       the log
    metrics.jsonl   one object a step and an evaluation
    reference.json  of pairs: log-probabilities of answers under the base model; a derived file
    events.jsonl    what the run said
    status.json     its phase and step
    report.html     the run as a page
    lr_probe.*      the rates that update.lr=auto tried
    snapshots/      weights at some versions, the last two
    blocks/         what a disk store wrote back, a folder a rank
    lock            held by a running process
    model/          the Hugging Face folder at the end

Files appear whole or not at all: written beside, synced, renamed.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor

from zo.config.plain_yaml import read_yaml, write_yaml
from zo.config.redact import without_secrets_in
from zo.config.schema import AUTO, Config
from zo.errors import UserError, one_line
from zo.io.atomic import replacing, write_whole
from zo.io.block_file import BLOCK_FILE, Header
from zo.io.engines import PAGE
from zo.model.layout import Block, Layout
from zo.state.log import Log
from zo.state.snapshot import Snapshot, Writer

RESULT_KEYS = (
    *("model", "peft", "data", "objective.name", "objective.beta", "generation"),
    *("batch", "estimator", "update", "run.seed"),
)
"""Groups and keys that decide a run's bits, so that a resumed run must have the same."""
SNAPSHOTS_KEPT = 2
UNFINISHED = {"lock", "blocks", "config.yaml.new", "steps.log.new"}
"""Files that a run may leave if it ended before its first step."""
OWN_FOLDERS = ("blocks", "snapshots", "model")
CONFIG_FILE, LOG_FILE = "config.yaml", "steps.log"
WRITTEN_IN = (LOG_FILE, "metrics.jsonl", "events.jsonl", "timeline.json", "tensorboard")
"""What a run opens to write in it; all else is replaced."""
RANK_FOLDER, SNAPSHOT = re.compile(r"rank-\d{5,}"), re.compile(r"step-\d{9,}\.safetensors")
"""Names that a run gives: a rank's blocks, a snapshot."""
MANIFEST = re.compile(r"<!-- Written by zo: (.*) -->")
"""The line of a model card that names the files of its folder, with " / " between them."""
WEIGHTS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.index\.json)?")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested groups as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def manifest(names: Iterable[str]) -> str:
    """Return the line of a model card that names the files of its folder."""
    return f"<!-- Written by zo: {' / '.join(sorted(names))} -->"


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder unless zo wrote it, or it is missing or empty.

    Raises:
        UserError: it is a link or a file, or holds a file that its card does not name.
    """
    if folder.is_symlink():
        raise UserError(
            f"{folder} is a symbolic link, and what it points to would be lost; move it away"
        )
    if not folder.exists():
        return
    if os.path.ismount(folder):
        raise UserError(
            f"{folder} is a mount point, which no folder can replace; use a folder in it: "
            f"{folder / 'model'}"
        )
    if not folder.is_dir():
        raise UserError(f"{folder} exists and is not an empty folder; choose a new one")
    try:
        found = MANIFEST.search((folder / "README.md").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    ours = {"README.md", *found[1].split(" / ")} if found else set()
    for path in sorted(folder.iterdir()):
        named = path.name in ours or (ours and WEIGHTS.fullmatch(path.name))
        if not named or path.is_symlink() or path.is_dir():
            raise UserError(
                f"{folder} would be replaced, and zo did not write {path.name} in it; move it "
                "elsewhere"
            )


class Passing(Protocol):
    """Weights that are visited a block at a time."""

    layout: Layout

    def fingerprint(self, each: Callable[[Block, Sequence[Tensor]], None] | None = None) -> str:
        """Hash all weights, and give every block to ``each`` on the way."""
        ...


class RunFolder:
    """Files of a run."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is read or written."""
        self.path = path
        self.config_file, self.log_file = path / CONFIG_FILE, path / LOG_FILE
        self.metrics_file, self.snapshots, self.model = (
            path / "metrics.jsonl",
            path / "snapshots",
            path / "model",
        )

    @property
    def holds_run(self) -> bool:
        """True if a run was started here."""
        return self.config_file.exists()

    def read_config(self) -> dict[str, Any]:
        """Return the content of ``config.yaml``.

        Raises:
            UserError: there is no run here, or the file is damaged.
        """
        try:
            content = read_yaml(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"run.dir={self.path} does not hold a readable run: {one_line(error)}"
            ) from error
        if (
            not isinstance(content, dict)
            or not isinstance(config := content.get("config"), dict)
            or not isinstance(config.get("run", {}), dict)
            or not isinstance(content.get("extended", []), list)
        ):
            raise UserError(f"run.dir={self.path} holds a corrupt config.yaml; use another run.dir")
        return content

    def check(self, config: Config) -> None:
        """Raise if a folder cannot take this run; nothing is written.

        Raises:
            UserError: it holds another run (naming the keys that differ), files that are not a
                run, or links or files where this run would replace or delete some.
        """
        if not self.holds_run:
            if foreign := next(self._foreign(), None):
                raise UserError(
                    f"run.dir={self.path} is not empty and does not hold a run ({foreign}); use a "
                    "new or empty folder"
                )
            return
        self._check_links()
        if config.export.at_end:
            check_replaceable(self.model)
        content = self.read_config()
        before, now = flatten(content["config"]), flatten(without_secrets_in(asdict(config)))
        keys = [k for k in now if k.startswith(RESULT_KEYS)]
        if self.found_rate() is not None and now["update.lr"] == AUTO:
            keys.remove("update.lr")
        if now["update.schedule"] != "constant" and not config.run.extend:
            keys.append("run.steps")
        differing = [f"{k} ({before.get(k)} -> {now[k]})" for k in keys if before.get(k) != now[k]]
        if differing == [f"run.steps ({before.get('run.steps')} -> {now['run.steps']})"]:
            raise UserError(
                f"run.dir={self.path} holds a run of run.steps={before.get('run.steps')} with "
                f"update.schedule={now['update.schedule']}, whose rates depend on it; "
                f"run.extend=true goes on with the rates of run.steps={now['run.steps']}, or use "
                "another run.dir"
            )
        if differing:
            raise UserError(
                f"run.dir={self.path} holds another run: {', '.join(differing)}; use another "
                "run.dir, or those values"
            )

    def _foreign(self) -> Iterator[str]:
        """Yield what lies in the folder that no start of a run leaves there."""
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            sign = path.name.startswith("lock.")
            if path.is_symlink() or not (sign or path.name in UNFINISHED):
                yield path.name
        self._check_links()
        for rank in sorted((self.path / "blocks").glob("*")):
            if not RANK_FOLDER.fullmatch(rank.name) or not rank.is_dir():
                yield f"blocks/{rank.name}"
            else:
                found = (path.name for path in sorted(rank.iterdir()))
                yield from (
                    f"blocks/{rank.name}/{name}" for name in found if not BLOCK_FILE.fullmatch(name)
                )

    def _check_links(self) -> None:
        """Refuse links in place of files and folders that a run writes to or deletes in."""
        places = [self.path / name for name in OWN_FOLDERS]
        for place in (*places, *places[0].glob("rank-*"), *places[0].glob("rank-*/*")):
            if place.is_symlink():
                raise UserError(
                    f"run.dir={self.path}: {place.relative_to(self.path)} is a symbolic link, and "
                    "a run deletes files there; move it away, or make run.dir itself the link"
                )
        for name in WRITTEN_IN:
            if (self.path / name).is_symlink():
                raise UserError(
                    f"run.dir={self.path}: {name} is a symbolic link, and a run writes to it; move "
                    "it away, or make run.dir itself the link"
                )

    def found_rate(self) -> float | None:
        """Return the learning rate of a run here that was found by trials; ``None`` without one.

        Raises:
            UserError: as :meth:`read_config`.
        """
        found = self.read_config().get("found") if self.holds_run else None
        rate = found.get("update.lr") if isinstance(found, dict) else None
        return float(rate) if isinstance(rate, float | int) else None

    def record_steps(self, steps: int, version: int) -> Any:
        """Record the length of the run, set after step ``version``; return another one before it.

        Raises:
            UserError: the folder cannot be written, or holds no run that can be read.
        """
        content = self.read_config()
        settings = content["config"].setdefault("run", {})
        before, settings["steps"] = settings.get("steps"), steps
        if before == steps:
            return None
        content["extended"] = [*content.get("extended", []), {"after": version, "steps": steps}]
        self._write_config(content)
        return before

    def _write_config(self, content: Mapping[str, Any]) -> None:
        try:
            write_whole(self.config_file, write_yaml(content).encode())
        except OSError as error:
            raise UserError(
                f"run.dir={self.path} cannot be written: {error.strerror}; choose another folder "
                "or make room"
            ) from error

    def create(self, config: Config, facts: Mapping[str, Any], header: Mapping[str, Any]) -> Log:
        """Create a run here, or complete a creation that a crash cut short.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            content = without_secrets_in({"config": asdict(config), **facts}) | {
                "log_header": dict(header)
            }
            self._write_config(content)
            return Log.create(self.log_file, dict(header))
        except OSError as error:
            raise UserError(
                f"run.dir={self.path} cannot be written: {error.strerror}; choose another folder "
                "or make room"
            ) from error

    def left_by_a_log(self) -> list[str]:
        """Return names of files that only a run with a log writes."""
        left = [path for path in (self.metrics_file, self.snapshots) if path.exists()]
        for path in self.path.glob("blocks/*/*.block"):
            with open(path, "rb") as file:
                header = Header.parse(file.read(PAGE))
            if header is not None and header.version:
                left.append(path.parent.parent)
                break
        return [path.name for path in left]

    def save_snapshot(self, step: int, weights: Passing, base: str, log: Log) -> None:
        """Write the weights of one version, a block at a time; the last two snapshots stay.

        Args:
            step: the version.
            weights: at that version.
            base: fingerprint of the base model.
            log: of the run; the snapshot is of its first ``step`` entries alone.

        Raises:
            UserError: the disk refuses; earlier snapshots and the log are untouched.
        """
        path = self.snapshots / f"step-{step:09d}.safetensors"
        facts = {"version": str(step), "base": base, "log": log.digest(step)}
        try:
            self.snapshots.mkdir(exist_ok=True)
            with (
                replacing(path) as beside,
                closing(Writer(beside, weights.layout, facts)) as writer,
            ):
                writer.finish(weights.fingerprint(writer.write))
            unfinished = list(self.snapshots.glob("step-*.new"))
            for old in self._snapshot_files()[:-SNAPSHOTS_KEPT] + unfinished:
                old.unlink()
        except OSError as error:
            raise UserError(
                f"run.dir={self.path}: snapshot of step {step} cannot be written: {error}; the log "
                "is safe: make room and start the same command again, or set run.snapshot_every=0"
            ) from error

    def _snapshot_files(self) -> list[Path]:
        return sorted(
            path for path in self.snapshots.glob("step-*") if SNAPSHOT.fullmatch(path.name)
        )

    def snapshot(self, base: str, log: Log) -> tuple[Snapshot | None, list[str]]:
        """Find the newest snapshot of a run that its log covers.

        Args:
            base: fingerprint of the base model.
            log: of the run.

        Returns:
            The snapshot, if there is one, and a line for each newer one that is ignored.
        """
        ignored: list[str] = []
        for path in reversed(self._snapshot_files()):
            try:
                found = Snapshot(path)
            except (SafetensorError, OSError, KeyError, ValueError):
                ignored.append(f"{path} is ignored: it is corrupt")
                continue
            if found.version > log.version:
                ignored.append(f"{path} is ignored: the log ends at step {log.version}")
            elif (found.base, found.log) != (base, log.digest(found.version)):
                ignored.append(f"{path} is ignored: it is of another run")
            else:
                return found, ignored
        return None, ignored

    def blocks(self, rank: int) -> Path:
        """Return the folder of a rank's disk store."""
        return self.path / "blocks" / f"rank-{rank:05d}"
