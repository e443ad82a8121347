"""Copy a recipe to a file to change: zo init [recipe=NAME] to=FILE.yaml."""

from pathlib import Path

from zo.config.cli import split
from zo.config.recipes import OWN, recipe_file
from zo.errors import UserError
from zo.io.atomic import write_whole

USAGE = "usage: zo init [recipe=NAME] to=FILE.yaml"


def main(arguments: list[str]) -> None:
    """Write the copy, whole or not at all, and print the command that trains with it."""
    own, rest = split(arguments, ("recipe", "to"))
    if "--help" in rest or "-h" in rest:
        print(USAGE)
        return
    if rest or not own.get("to"):
        raise UserError(f"{rest[0] + ' is not an argument; ' if rest else ''}{USAGE}")
    source, to = recipe_file(own.get("recipe") or OWN), Path(own["to"]).expanduser()
    if to.suffix != ".yaml":
        raise UserError(
            f"to={own['to']} is not the name of a recipe; give a file that ends in .yaml"
        )
    if to.exists() or to.is_symlink():
        raise UserError(f"to={own['to']} exists; choose a new file")
    if not to.parent.is_dir():
        raise UserError(f"to={own['to']} is in a folder that does not exist; create {to.parent}")
    write_whole(to, source.read_bytes())
    print(f"zo train recipe={to}")
