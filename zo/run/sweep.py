"""Grids of runs: each point a process of its own, or one torchrun, and a table of their scores."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import nan
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from zo.config.invocation import words
from zo.config.recipes import load_config, recipe_file
from zo.config.redact import without_secrets
from zo.errors import UserError
from zo.io.atomic import replacing, write_whole
from zo.observe.history import DETAILS, LOWER_IS_BETTER, metric_of

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    chosen: tuple[str, ...]
    """``key=value`` of the keys that the grid varies."""
    fixed: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Result:
    """What came of a point."""

    chosen: tuple[str, ...]
    folder: str
    code: int
    """Exit code; 0: done."""
    summary: dict[str, Any]
    """The last line of a finished run."""
    error: str = ""
    """The last line of one that failed."""

    @property
    def scores(self) -> dict[str, float | None]:
        """Scores on held-out data, or else the last training loss."""
        found = {k: v for k, v in (self.summary.get("eval") or {}).items() if k != DETAILS}
        return found or {"loss": self.summary.get("loss")}


def expand(recipe: str, overrides: Sequence[str], folder: Path) -> list[Point]:
    """Return the points of a grid, in the order of the keys; each is checked as a configuration.

    Args:
        recipe: name of a recipe.
        overrides: ``key=value``, several values separated by commas (or Hydra's ``range``).
        folder: of the sweep; each point gets a folder in it.

    Raises:
        UserError: a key or a value is wrong, or sets the folder of a run.
    """
    if any(o.startswith("run.dir=") for o in overrides):
        raise UserError(
            "run.dir is chosen for each run of a sweep; give dir=FOLDER for all of them"
        )
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise UserError(f"{error.override} is not understood; give key=value or key=a,b") from error
    varied = [o for o in parsed if o.is_sweep_override()]
    fixed = tuple(o.input_line or "" for o in parsed if not o.is_sweep_override())
    values = [[f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()] for o in varied]
    points = []
    for number, chosen in enumerate(product(*values), 1):
        load_config(recipe, [*fixed, *chosen])
        label = re.sub(r"[^A-Za-z0-9.-]+", "_", " ".join(map(without_secrets, chosen)))[:100]
        points.append(
            Point(chosen, fixed, folder / f"{number:03d}-{label or recipe_file(recipe).stem}")
        )
    return points


def run_points(
    recipe: str, points: Sequence[Point], folder: Path, processes: int = 1
) -> Iterator[Result]:
    """Run each point that has no result in ``folder`` yet, and yield all results in order.

    A run that was cut short goes on where it stopped. A point that fails is a result, too, and is
    run again by the next call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results_file = folder / "sweep.json"
    kept = [Result(**r | {"chosen": tuple(r["chosen"])}) for r in _read(results_file)]
    done = {result.folder: result for result in kept if result.code == 0}
    for point in points:
        result = done.get(str(point.folder))
        if result is None or result.chosen != tuple(map(without_secrets, point.chosen)):
            result = _run(recipe, point, processes)
            kept = [k for k in kept if k.folder != result.folder] + [result]
            write_whole(results_file, json.dumps([vars(k) for k in kept], indent=1).encode())
        yield result


def _run(recipe: str, point: Point, processes: int) -> Result:
    # Of this environment, whatever PATH says.
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    start = [torchrun, "--nproc-per-node", str(processes)] if processes > 1 else [sys.executable]
    arguments = [f"recipe={recipe}", *point.fixed, *point.chosen, f"run.dir={point.folder}"]
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [*start, "-m", "zo.train", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = ""
        # The summary is short enough to wait in its pipe.
        for line in process.stderr:
            sys.stderr.write(line)
            said = line.strip() if line.startswith("error") or not said else said
        lines = process.stdout.read().splitlines()
    summary = json.loads(lines[-1]) if process.returncode == 0 and lines else {}
    error = "" if summary else said or "it ended without a summary"
    chosen = tuple(map(without_secrets, point.chosen))
    error = without_secrets(error)
    return Result(chosen, str(point.folder), process.returncode, summary, error)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); delete it and sweep again") from error
    return found


def best_of(results: Sequence[Result]) -> Result | None:
    """Return the finished run with the best score; the first of several; ``None`` if there is none.

    A run whose score is not a number is the worst.
    """
    finished = [result for result in results if result.code == 0]
    if not finished:
        return None
    key = metric_of([result.scores for result in finished])
    sign = -1.0 if key in LOWER_IS_BETTER else 1.0

    def rank(result: Result) -> float:
        value = result.scores.get(key)
        return float("-inf") if value is None or value != value else sign * value

    return max(finished, key=rank)


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table of what was varied, the scores, the seconds and the folder."""
    columns = list(dict.fromkeys(name for result in results for name in result.scores))
    lines = [
        "| " + " | ".join(["run", *columns, "train_s", "folder"]) + " |",
        "|" + "---|" * (len(columns) + 3),
    ]
    best = best_of(results)
    for result in results:
        values = [result.scores.get(name) for name in columns]
        shown = ["" if v is None else f"{v:.4g}" for v in values]
        if result.code:
            shown = [f"failed: {result.error}".replace("|", "/"), *shown[1:]]
        name = " ".join(result.chosen) + (" (best)" if result is best else "")
        seconds = result.summary.get("train_s")
        cells = [name, *shown, "" if seconds is None else f"{seconds:.0f}", result.folder]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the scores of the finished runs: a panel a score, a line a run, the best in orange.

    Raises:
        ImportError: matplotlib is not there.
    """
    from matplotlib.figure import Figure

    finished = [result for result in results if result.code == 0]
    scores = list(dict.fromkeys(name for result in finished for name in result.scores))
    if not scores:
        return
    size = (2 + 4 * len(scores), 1.2 + 0.3 * len(finished))
    figure = Figure(figsize=size, layout="tight")
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)
    names = [" ".join(result.chosen) or "the one run" for result in finished]
    best = best_of(finished)
    colors = ["C1" if result is best else "C0" for result in finished]
    for axes, score in zip(panels[0], scores, strict=True):
        values = [result.scores.get(score) for result in finished]
        axes.scatter([nan if v is None else v for v in values], names, c=colors)
        axes.set_xlabel(score)
        axes.grid(alpha=0.3)
    panels[0][0].invert_yaxis()
    with replacing(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def command_line(recipe: str, point: Point, processes: int) -> str:
    """Return the command that repeats a point in a folder of its own, without secrets."""
    start = words("train", processes)
    return without_secrets(shlex.join([*start, f"recipe={recipe}", *point.fixed, *point.chosen]))
