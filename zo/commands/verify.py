"""Compute a sample of a log's entries again, from data and weights, and say if the log is true.

zo verify ARTEFACT_OR_RUN [entries=N] [seed=N] [base=HUB_ID_OR_FOLDER] [data=FILE_OR_ID]
"""

import json
import os

from zo.config.cli import flag, split
from zo.config.invocation import typed, usage
from zo.errors import UserError

ARGUMENTS = (
    "ARTEFACT_OR_RUN [entries=N] [seed=N] [base=HUB_ID_OR_FOLDER] "
    "[data=FILE_OR_ID] [run.device=cpu|cuda] [trust_remote_code=true]"
)
KEYS = ("entries", "seed", "base", "data", "run.device", "trust_remote_code")
ENTRIES = "8"
NOT_TRUE = 1


def main(arguments: list[str]) -> None:
    """Print a line for each entry, then one JSON object; exit code 1 for a log that is not true."""
    own, rest = split(arguments, KEYS)
    if "--help" in rest or "-h" in rest:
        print(usage("verify", ARGUMENTS))
        return
    if len(rest) != 1:
        raise UserError(usage("verify", ARGUMENTS))
    count, seed = own.get("entries", ENTRIES), own.get("seed")
    for key, value in (("entries", count), ("seed", seed)):
        if value is not None and not value.isdecimal():
            raise UserError(f"{key}={value} is not a number; give one of at least 0")
    trust = flag(own, "trust_remote_code", "without it no code of others is run")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"a log is verified by one process; start it with {typed('verify')}, without torchrun"
        )

    from zo.run.artefact import open_artefact
    from zo.run.verify import Audited, sample, verify

    artefact = open_artefact(rest[0], own.get("base"))
    steps = sample(len(artefact.entries), int(count), None if seed is None else int(seed))
    audited = Audited(artefact, own.get("data"), own.get("run.device"), trust)
    found = verify(audited, steps, print)
    print(json.dumps(found))
    if not found["true"]:
        raise SystemExit(NOT_TRUE)
