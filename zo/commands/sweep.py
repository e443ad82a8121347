"""Train each point of a grid: zo sweep recipe=NAME key=a,b [key=value ...]."""

import os
import sys
from datetime import datetime
from pathlib import Path

from zo.config.cli import asked_for_text, split
from zo.config.invocation import typed, usage
from zo.config.recipes import recipe_file, recipe_for
from zo.errors import UserError

ARGUMENTS = "[recipe=NAME] [nproc=RANKS_A_RUN] [dir=FOLDER] key=a,b [key=value ...]"


def main(arguments: list[str]) -> None:
    """Run the points one after the other; the table is printed, and kept in the folder.

    The same command with the same ``dir`` runs what is missing.
    """
    own, overrides = split(arguments, ("recipe", "nproc", "dir"))
    recipe, nproc = own.get("recipe") or recipe_for(overrides), own.get("nproc", "1")
    if text := asked_for_text(arguments, recipe, overrides, usage("sweep", ARGUMENTS)):
        print(text)
        return
    if not nproc.isdecimal() or int(nproc) < 1:
        raise UserError(f"nproc={nproc} is not a number of ranks; give 1 or more")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "a sweep starts the ranks of its runs; start it with "
            f"{typed('sweep')}, and nproc=RANKS_A_RUN"
        )
    by_default = f"runs/sweep-{recipe_file(recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(own.get("dir") or by_default).expanduser()

    from zo.io.atomic import write_whole
    from zo.run.sweep import best_of, command_line, draw, expand, run_points, table

    points = expand(recipe, overrides, folder)
    print(f"{len(points)} runs in {folder}", file=sys.stderr)
    results = []
    for result in run_points(recipe, points, folder, int(nproc)):
        results.append(result)
        print(f"{len(results)} of {len(points)}: {' '.join(result.chosen)}", file=sys.stderr)
    text = table(results)
    best = best_of(results)
    if best is not None:
        chosen = points[results.index(best)]
        text += f"\n\nBest: {command_line(recipe, chosen, int(nproc))}"
    write_whole(folder / "sweep.md", f"{text}\n".encode())
    try:
        draw(results, folder / "sweep.png")
    except ImportError:
        remedy = "pip install 'matplotlib>=3.10'"
        print(f"no picture, for want of the extra report; {remedy}", file=sys.stderr)
    print(text)
    if failed := sum(result.code != 0 for result in results):
        raise UserError(f"{failed} of {len(results)} runs failed; the table says why")
