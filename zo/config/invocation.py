"""Commands as the user of this process types them: by ``launch/`` of a checkout, or by ``zo``."""

import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
"""Scripts of a checkout; an installed package has none."""


def words(name: str, ranks: int | str = 1) -> list[str]:
    """Return the words that start a command, without its arguments.

    Args:
        name: subcommand of ``zo``, such as ``lr-probe``.
        ranks: to start; several of ``train`` alone.
    """
    by_script = Path(sys.argv[0]).resolve().parent == LAUNCH
    script = f"launch/{name.replace('-', '_')}.py"
    if ranks == 1:
        return ["python", script] if by_script else ["zo", name]
    assert name == "train"
    module = [script] if by_script else ["-m", "zo.train"]
    return ["torchrun", "--nproc-per-node", str(ranks), *module]


def typed(name: str, ranks: int | str = 1) -> str:
    """Return what starts a command, as text (see :func:`words`)."""
    return " ".join(words(name, ranks))


def usage(name: str, arguments: str) -> str:
    """Return the usage line of a command."""
    return f"usage: {typed(name)} {arguments}"
