"""Find a learning rate: zo lr-probe, with the arguments of zo train."""

import os
import shlex

from zo.config.cli import asked_for_text, split
from zo.config.invocation import usage, words
from zo.config.recipes import load_config, recipe_for
from zo.errors import UserError

ARGUMENTS = "[recipe=NAME] [key=value ...] [--help | --cfg job], under torchrun too"


def main(arguments: list[str]) -> None:
    """Print a table of rates with the loss before and after some steps, and a command to train.

    The trials stay in ``run.dir`` as lr_probe.json and lr_probe.png; zo train with the
    same arguments and that ``run.dir`` goes on from there.
    """
    own, overrides = split(arguments, ("recipe", "update.lr"))
    recipe = own.get("recipe") or recipe_for(overrides)
    if text := asked_for_text(arguments, recipe, overrides, usage("lr-probe", ARGUMENTS)):
        print(text)
        return
    if own.get("update.lr", "auto") != "auto":
        raise UserError(f"update.lr={own['update.lr']} is what this command finds; leave it out")
    config = load_config(recipe, [*overrides, "update.lr=auto"])

    from zo.run.rates import table
    from zo.run.trainer import Trainer

    folder, probed = Trainer(config).find_rate()
    if int(os.environ.get("RANK", 0)) == 0:
        given = [o for o in overrides if not o.startswith("run.dir=")]
        command = [*words("train"), f"recipe={recipe}", *given]
        print(table(probed))
        print(f"\nTrials: {folder}/lr_probe.json")
        print(f"Train:  {shlex.join([*command, f'update.lr={probed.lr:g}'])}")
