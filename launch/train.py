"""Fine-tune: torchrun [--nproc-per-node N] launch/train.py recipe=NAME [key=value ...]."""

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zo.io.signals import end_on_signals

if __name__ == "__main__":
    end_on_signals()  # Before the imports, which take seconds.

from omegaconf import DictConfig

from zo.config.cli import asked_for_text, run, split
from zo.config.recipes import DEFAULT, as_config, resolve
from zo.errors import UserError

USAGE = (
    "usage: [torchrun --nproc-per-node N] launch/train.py [recipe=NAME] [key=value ...] "
    "[-m | --help | --cfg job]"
)


def main(arguments: list[str]) -> None:
    """Run the command; the last line on stdout is the summary of the run."""
    own, overrides = split(arguments, ("recipe",))
    recipe = own.get("recipe", DEFAULT)
    if text := asked_for_text(arguments, recipe, overrides, USAGE):
        print(text)
    elif "-m" in arguments or "--multirun" in arguments:
        sweep(recipe, [o for o in overrides if o not in ("-m", "--multirun")])
    else:
        train(
            resolve(recipe, overrides),
            shlex.join(["python", "launch/train.py", f"recipe={recipe}", *overrides]),
        )


def train(node: DictConfig, command: str = "") -> None:
    """Train once."""
    config = as_config(node)
    # Imported here: torch and transformers take seconds; --help and key errors need neither.
    from zo.run.trainer import Trainer

    summary = Trainer(config, command=command).train()
    if int(os.environ.get("RANK", 0)) == 0 and summary["fingerprint"]:
        print(json.dumps(summary), flush=True)


def sweep(recipe: str, overrides: list[str]) -> None:
    """Train each combination of values in turn, by Hydra's multirun."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "--multirun does not work under torchrun, whose ranks would start different runs; "
            "sweep with python"
        )
    import hydra

    from zo.config.recipes import FOLDER

    resolve(recipe, [o for o in overrides if "," not in o])
    # Runs have their own folders; the files of Hydra are removed.
    with tempfile.TemporaryDirectory() as scrap:
        quiet = [
            f"hydra.sweep.dir={scrap}",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
        ]
        sys.argv[1:] = ["-m", *overrides, f"recipe={recipe}", *quiet]
        hydra.main(version_base="1.3", config_path=str(FOLDER), config_name=recipe)(train)()


if __name__ == "__main__":
    sys.exit(run(main))
