"""Rebuild the weights that a log describes as a Hugging Face folder, on any machine.

zo replay log=ARTEFACT_OR_RUN_OR_FILE to=DIR [base=HUB_ID_OR_FOLDER]
"""

import os
import sys
from pathlib import Path

from zo.config.cli import flag, split
from zo.config.invocation import typed, usage
from zo.config.schema import STORES
from zo.errors import UserError

ARGUMENTS = (
    "log=ARTEFACT_OR_RUN_OR_FILE to=DIR [base=HUB_ID_OR_FOLDER] "
    "[memory.store=device|host|disk] [run.device=cpu|cuda] [trust_remote_code=true]; a log file "
    "without its config.yaml takes base= and keys of its model, such as model.dtype=bfloat16"
)
KEYS = ("base", "log", "to", "memory.store", "run.device", "trust_remote_code")


def main(arguments: list[str]) -> None:
    """Check base and log, replay, and write the folder; the last line is its fingerprint."""
    own, rest = split(arguments, KEYS)
    if "--help" in rest or "-h" in rest:
        print(usage("replay", ARGUMENTS))
        return
    unknown = [argument for argument in rest if not argument.startswith("model.")]
    if unknown or "log" not in own or "to" not in own:
        wrong = f"{unknown[0]} is no argument; " if unknown else ""
        raise UserError(wrong + usage("replay", ARGUMENTS))
    trust = flag(own, "trust_remote_code", "without it no code of the base's own is run")
    store, to = own.get("memory.store", STORES[0]), Path(own["to"]).expanduser()
    if store not in STORES:
        raise UserError(f"memory.store={store} is not known; use one of {', '.join(STORES)}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"a log is replayed by one process; start it with {typed('replay')}, without torchrun"
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"to={to} exists and is not an empty folder; choose a new one")

    from zo.run.artefact import open_artefact
    from zo.run.export import write_folder
    from zo.run.replay import rebuild

    artefact = open_artefact(own["log"], own.get("base"), rest)
    say = lambda line: print(f"warning: {line}", file=sys.stderr)  # noqa: E731
    rebuilt = rebuild(artefact, own.get("run.device"), store, say, trust)
    replica = rebuilt.replica
    write_folder(replica.model, rebuilt.tokenizer, to, rebuilt.card(), source=replica)
    replica.close()
    print(to)
    print(rebuilt.fingerprint)
