"""Score a run or a plain model.

zo evaluate run=DIR [step=N|best] [data=...], or zo evaluate model.name=... [key=...]
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo.config.cli import asked_for_text, existing_run, flag, split, step_of
from zo.config.invocation import usage
from zo.config.recipes import OWN, load_config, recipe_for
from zo.config.schema import Config
from zo.errors import UserError

if TYPE_CHECKING:
    from zo.run.restore import FinishedRun

ARGUMENTS = (
    "run=DIR [step=N|best] [data=FILE_OR_ID [data.columns=...]] [run.device=cpu|cuda] "
    "[trust_remote_code=true], or [recipe=NAME] model.name=... [key=value ...]; either with "
    "lm_eval=TASK,... [lm_eval_tasks=FOLDER] for scores by lm-eval"
)

KEYS = (
    *("recipe", "run", "step", "data", "lm_eval", "lm_eval_tasks", "run.device"),
    "trust_remote_code",
)
BATCHES_AT_ONCE = 2
"""Batches evaluated in one pass over the model."""
LM_EVAL_BATCH = 8
"""Sequences of a forward for lm-eval."""


def main(arguments: list[str]) -> None:
    """Print the scores as one JSON object."""
    own, overrides = split(arguments, KEYS)
    device = own.get("run.device")
    if "run" not in own and device is not None:
        overrides.append(f"run.device={device}")
    recipe = own.get("recipe") or recipe_for(overrides)
    if "run" not in own and "lm_eval" in own:
        overrides.insert(0, "data.name=synthetic")  # Its tasks bring theirs.
    if text := asked_for_text(arguments, recipe, overrides, usage("evaluate", ARGUMENTS)):
        print(text)
        return
    if "run" in own and (wrong := [o for o in overrides if "data" not in own or not is_reading(o)]):
        raise UserError(
            f"{wrong[0]} cannot be changed for a run; give run=DIR and, for other data, "
            "data=FILE_OR_ID with the keys of data that read it, such as data.columns"
        )
    if "run" not in own and not any(o.startswith("model.name=") for o in overrides):
        raise UserError("nothing to score; give run=DIR, or model.name=HUB_ID_OR_FOLDER")
    step = step_of(own)
    if "run" not in own and step is not None:
        raise UserError(f"step={step} is a step of a run; give run=DIR with it")
    trust = flag(own, "trust_remote_code", "without it no code of the model's own is run")
    path = existing_run(own["run"]) if "run" in own else None
    given = load_config(OWN if path else recipe, overrides)
    manager = harness(own)

    from zo.run.restore import adapted, load_plain, load_run, with_prompt

    if path is not None:
        change = lambda config: read_as(  # noqa: E731
            adapted(with_prompt(config), own.get("data"), device, trust), given, overrides
        )
        finished = load_run(path, change, step)
    else:
        finished = load_plain(
            adapted(given, own.get("data"), device, trust or given.model.trust_remote_code)
        )
    found = {"run": own.get("run"), "steps": finished.steps}
    found |= score(finished, own) if manager is None else score_tasks(finished, own, manager)
    if finished.mesh.rank == 0:
        print(json.dumps(found))
    finished.mesh.close()


def is_reading(override: str) -> bool:
    """Return True for a key of data that says how other data is read."""
    key = override.partition("=")[0]
    return key.startswith("data.") and key not in ("data.name", "data.dev")


def read_as(config: Config, given: Config, overrides: Sequence[str]) -> Config:
    """Return a run's configuration with the keys of data that were given."""
    keys = [override.partition("=")[0].removeprefix("data.") for override in overrides]
    return replace(config, data=replace(config.data, **{k: getattr(given.data, k) for k in keys}))


def harness(own: Mapping[str, str]) -> Any:
    """Return lm-eval's task manager if its tasks are asked for."""
    if "lm_eval" not in own:
        return None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("lm_eval= is of one process; start it with python, without torchrun")

    from zo.run.harness import check_harness

    folder = own.get("lm_eval_tasks")
    return check_harness(own["lm_eval"].split(","), Path(folder).expanduser() if folder else None)


def score_tasks(finished: FinishedRun, own: Mapping[str, str], manager: Any) -> dict[str, Any]:
    """Return the scores by lm-eval's tasks."""
    from zo.run.harness import harness_scores

    fingerprint = finished.replica.fingerprint()
    scores = harness_scores(finished, own["lm_eval"].split(","), manager, LM_EVAL_BATCH)
    return {"lm_eval": scores, "fingerprint": fingerprint}


def score(finished: FinishedRun, own: Mapping[str, str]) -> dict[str, Any]:
    """Return the scores on held-out data; every rank calls this."""
    from zo.observe.metrics import finite_or_none
    from zo.run.evaluate import evaluate
    from zo.run.rewarded import load

    problem, mesh, replica = finished.problem, finished.mesh, finished.replica
    if problem.task is None or not problem.dev_batches:
        raise UserError(
            "there is nothing to score on: data.dev_examples is 0, or the data is synthetic; give "
            "data=FILE"
        )
    is_trusted = "run" not in own or own.get("trust_remote_code") == "true"
    load(problem.task, "" if is_trusted else f"run={own['run']}")
    found = evaluate(replica, problem.task, problem.dev_batches, mesh, at_once=BATCHES_AT_ONCE)
    fingerprint = replica.fingerprint()
    replica.close()
    mesh.barrier()
    return {"eval": finite_or_none(found.as_json()), "fingerprint": fingerprint}
