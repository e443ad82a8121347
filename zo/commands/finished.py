"""Report if a run is finished: launch/finished.py, with the arguments of training.

Exit code 0: finished; 75: not yet, and the same command resumes the run. For schedulers, because a
run that SIGTERM ended also exits with 0.
"""

import sys
from pathlib import Path

from zo.config.cli import split
from zo.config.recipes import load_config, recipe_for
from zo.errors import UserError
from zo.observe.metrics import read_history
from zo.state.log import read
from zo.state.run_folder import RunFolder

NOT_YET = 75


def main(arguments: list[str]) -> None:
    """Compare log and model folder with the configuration."""
    own, overrides = split(arguments, ("recipe",))
    config = load_config(own.get("recipe") or recipe_for(overrides), overrides)
    if config.run.dir is None:
        raise UserError("run.dir is empty; give the folder of the run")
    folder = RunFolder(Path(config.run.dir))
    steps = len(read(folder.log_file)[1]) if folder.log_file.exists() else 0
    history = read_history(folder.metrics_file, steps, config.eval.metric, config.eval.patience)
    ended = steps >= config.run.steps or history.has_ended
    waits = config.export.at_end and not folder.model.is_dir()
    early = ", ended by eval.patience" if ended and steps < config.run.steps else ""
    print(
        f"{folder.path}: step {steps} of {config.run.steps}{early}"
        f"{', model/ is not written' * waits}",
        file=sys.stderr,
    )
    if not ended or waits:
        raise SystemExit(NOT_YET)
