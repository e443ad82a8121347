"""Say where two logs part: zo diff LOG LOG, each a log file, an artefact or a run's folder.

Exit code 0: both describe the same weights; 1: they part, in what the lines say.
"""

from pathlib import Path

from zo.config.invocation import usage
from zo.errors import UserError
from zo.state.log import read
from zo.state.log_diff import differences
from zo.state.run_folder import RunFolder

ARGUMENTS = "LOG LOG, each a log file or the folder of an artefact or a run"
PART = 1


def main(arguments: list[str]) -> None:
    """Compare headers, then entries, and print what differs."""
    if "--help" in arguments or "-h" in arguments:
        print(usage("diff", ARGUMENTS))
        return
    if len(arguments) != 2:
        raise UserError(usage("diff", ARGUMENTS))
    paths = [Path(argument).expanduser() for argument in arguments]
    files = [RunFolder(path).log_file if path.is_dir() else path for path in paths]
    one, other = map(read, files)
    found = differences(one, other)
    print("\n".join(found) or f"the same to entry {len(one[1])}")
    if found:
        raise SystemExit(PART)
