"""Score a run or a plain model.

launch/evaluate.py run=DIR [step=N] [data=...], or launch/evaluate.py model.name=... [key=value ...]
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zo.io.signals import end_on_signals

if __name__ == "__main__":
    end_on_signals()  # Before the imports, which take seconds.

from zo.config.cli import asked_for_text, existing_run, flag, run, split, step_of
from zo.config.recipes import DEFAULT, load_config
from zo.errors import UserError

USAGE = (
    "usage: launch/evaluate.py run=DIR [step=N] [data=FILE_OR_ID] [run.device=cpu|cuda] "
    "[trust_remote_code=true], or [recipe=NAME] model.name=... [key=value ...]"
)

BATCHES_AT_ONCE = 2
"""Batches evaluated in one pass over the model."""


def main(arguments: list[str]) -> None:
    """Print the scores as one JSON object."""
    keys = ("recipe", "run", "step", "data", "run.device", "trust_remote_code")
    own, overrides = split(arguments, keys)
    device = own.get("run.device")
    if "run" not in own and device is not None:
        overrides.append(f"run.device={device}")
    if text := asked_for_text(arguments, own.get("recipe", DEFAULT), overrides, USAGE):
        print(text)
        return
    if "run" in own and overrides:
        raise UserError(
            f"{overrides[0]} cannot be changed for a run; give run=DIR and, for other data, "
            "data=FILE_OR_ID"
        )
    if "run" not in own and not any(o.startswith("model.name=") for o in overrides):
        raise UserError("nothing to score; give run=DIR, or model.name=HUB_ID_OR_FOLDER")
    step = step_of(own)
    if "run" not in own and step is not None:
        raise UserError(f"step={step} is a step of a run; give run=DIR with it")
    trust = flag(own, "trust_remote_code", "without it no code of the model's own is run")
    path = existing_run(own["run"]) if "run" in own else None
    config = None if path else load_config(own.get("recipe", DEFAULT), overrides)

    from zo.run.evaluate import evaluate
    from zo.run.restore import adapted, load_plain, load_run

    if path:
        change = lambda config: adapted(config, own.get("data"), device, trust)  # noqa: E731
        finished = load_run(path, change, step)
    else:
        finished = load_plain(
            adapted(config, own.get("data"), device, trust or config.model.trust_remote_code)
        )
    problem = finished.problem
    if problem.task is None or not problem.dev_batches:
        raise UserError(
            "there is nothing to score on: data.dev_examples is 0, or the data is synthetic; give "
            "data=FILE"
        )
    if (rewards := problem.task.rewards) is not None:
        if path and not rewards.reward.is_ours and not trust:
            raise UserError(
                f"run={own['run']} is rewarded by code of {rewards.reward.name}, which is not run "
                "by default; read it, then set trust_remote_code=true"
            )
        rewards.reward.load()
    mesh, replica = finished.mesh, finished.replica
    scores = evaluate(replica, problem.task, problem.dev_batches, mesh, at_once=BATCHES_AT_ONCE)
    fingerprint = replica.fingerprint()
    replica.close()
    mesh.barrier()
    if mesh.rank == 0:
        print(
            json.dumps(
                {
                    "run": own.get("run"),
                    "steps": finished.steps,
                    "eval": scores,
                    "fingerprint": fingerprint,
                }
            )
        )
    mesh.close()


if __name__ == "__main__":
    sys.exit(run(main))
