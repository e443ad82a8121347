"""The commands, and the console script ``zo`` that starts them."""

import sys
from importlib import import_module

from zo.io.signals import end_on_signals, end_with_reader

COMMANDS = {
    "train": "fine-tune, or continue a run",
    "evaluate": "score a run or a plain model",
    "export": "write a run's model as a Hugging Face folder, or as a log artefact",
    "replay": "rebuild the weights that a log describes",
    "verify": "compute a sample of a log's entries again",
    "diff": "say where two logs part",
    "sweep": "train each point of a grid",
    "lr-probe": "find a learning rate",
    "recipes": "list the recipes",
    "init": "copy a recipe to a file to change",
}
"""Subcommands with a line of help; each is the module of its name."""


@end_with_reader()
def start(name: str) -> int:
    """Run a command on the process's arguments, and return its exit code."""
    end_on_signals()  # Before the imports, which take seconds.
    from zo.config.cli import run

    return run(import_module(f"zo.commands.{name.replace('-', '_')}").main)


@end_with_reader()
def main() -> int:
    """Run the subcommand that the process's arguments name, and return its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("--help", "-h"):
        print("usage: zo COMMAND [key=value ...] [--help]\n")
        print(*(f"  {command:<10} {line}" for command, line in COMMANDS.items()), sep="\n")
        return 0
    if name not in COMMANDS:
        from zo.config.cli import USER_ERROR

        wrong = f"{name} is not a command" if name else "no command is given"
        print(f"error: {wrong}; use zo {'|'.join(COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    del sys.argv[1]
    return start(name)
