"""List the recipes with their one-line header: zo recipes."""

from zo.config.recipes import FOLDER, header, recipe_names
from zo.errors import UserError

USAGE = "usage: zo recipes"


def main(arguments: list[str]) -> None:
    """Print a line for each recipe."""
    if "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return
    if arguments:
        raise UserError(f"{arguments[0]} is not an argument; {USAGE}")
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name:<{width}}  {header(FOLDER / f'{name}.yaml')}")
