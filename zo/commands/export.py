"""Write a run's model as a Hugging Face folder, or as a log artefact of a few kilobytes.

zo export run=DIR to=DIR [artefact=full|log] [step=N|best] [push=USER/NAME] [public=true]
"""

import os
from pathlib import Path

from zo.config.cli import existing_run, flag, split, step_of
from zo.config.invocation import typed, usage
from zo.errors import UserError

ARGUMENTS = (
    "run=DIR to=DIR [artefact=full|log] [step=N|best] [push=USER/NAME] "
    "[public=true|false] [run.device=cpu|cuda] [trust_remote_code=true]"
)


def main(arguments: list[str]) -> None:
    """Rebuild the weights from base model and log, write the folder, and push it if asked to."""
    keys = ("run", "to", "artefact", "step", "push", "public", "run.device", "trust_remote_code")
    own, rest = split(arguments, keys)
    if "--help" in rest or "-h" in rest:
        print(usage("export", ARGUMENTS))
        return
    if rest or "run" not in own or "to" not in own:
        wrong = f"{rest[0]} is no argument; " if rest else ""
        raise UserError(wrong + usage("export", ARGUMENTS))
    public = flag(own, "public", "without it a pushed repository is private")
    trust = flag(own, "trust_remote_code", "without it no code of the model's own is run")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"a model is exported by one process; start it with {typed('export')}, without torchrun"
        )
    artefact = own.get("artefact", "full")
    if artefact not in ("full", "log"):
        raise UserError(f"artefact={artefact} is not known; use full (weights) or log")
    path, to, step = existing_run(own["run"]), Path(own["to"]).expanduser(), step_of(own)

    from zo.observe.metrics import last_scores
    from zo.run.artefact import check_published, write_artefact
    from zo.run.export import write_folder
    from zo.run.hub import push
    from zo.run.restore import adapted, card_of, load_run
    from zo.state.run_folder import RunFolder

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"to={to} exists and is not an empty folder; choose a new one")
    if artefact == "log":
        check_published(RunFolder(path).read_config())
    device = own.get("run.device")
    finished = load_run(path, lambda config: adapted(config, None, device, trust), step)
    scores = last_scores(path / "metrics.jsonl", finished.steps)
    card = card_of(
        finished.content,
        finished.header,
        finished.steps,
        scores,
        finished.replica.fingerprint(),
        finished.problem.task,
        finished.last_step,
    )
    model, tokenizer = finished.replica.model, finished.problem.tokenizer
    if artefact == "log":
        write_artefact(finished, to, card)
    else:
        write_folder(model, tokenizer, to, card, source=finished.replica)
    finished.replica.close()
    print(to)
    if "push" in own:
        print(push(to, own["push"], private=not public))
