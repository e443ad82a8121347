"""Fine-tune: zo train recipe=NAME [key=value ...]."""

import json
import os
import shlex
import sys
from dataclasses import asdict

from zo.config.cli import asked_for_text, split
from zo.config.invocation import typed, usage, words
from zo.config.recipes import load_config, recipe_for, recipe_names
from zo.config.schema import Config
from zo.errors import UserError

ARGUMENTS = "[recipe=NAME] [key=value ...] [--check | --help | --cfg job]"


def main(arguments: list[str]) -> None:
    """Run the command; the last line on stdout is the summary of the run."""
    own, overrides = split(arguments, ("recipe",))
    recipe = own.get("recipe") or recipe_for(overrides)
    shown = f"{usage('train', ARGUMENTS)}; several ranks: {typed('train', 'N')} ..."
    if text := asked_for_text(arguments, recipe, overrides, shown):
        print(text)
    elif "--check" in arguments:
        check(load_config(recipe, [o for o in overrides if o != "--check"]))
    elif "-m" in arguments or "--multirun" in arguments:
        raise UserError(f"a grid of runs is started by {typed('sweep')} recipe=NAME key=a,b")
    else:
        command = shlex.join([*words("train"), f"recipe={recipe}", *overrides])
        if recipe not in recipe_names():
            command = ""  # Nobody else has the file; the card has every key in its place.
        train(load_config(recipe, overrides), command)


def train(config: Config, command: str) -> None:
    """Train, and print the summary on rank 0."""
    # Imported here: torch and transformers take seconds; --help and key errors need neither.
    from zo.run.trainer import Trainer

    summary = Trainer(config, command=command).train()
    if int(os.environ.get("RANK", 0)) == 0 and summary["fingerprint"]:
        print(json.dumps(summary), flush=True)


def check(config: Config) -> None:
    """Report on the data of a run; no weights are loaded, and nothing is written."""
    if int(os.environ.get("RANK", 0)):
        return
    from zo.run.problem import build_problem
    from zo.run.rewarded import load

    problem = build_problem(config)
    load(problem.task)
    report = problem.report
    if report is None:
        print("data: synthetic", file=sys.stderr)
        return
    print(*report.lines(), sep="\n", file=sys.stderr)
    print(json.dumps(asdict(report)))
