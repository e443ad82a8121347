"""Rebuild the weights that a log describes: ``zo replay`` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zo.io.signals import end_on_signals

if __name__ == "__main__":
    end_on_signals()  # Before the imports, which take seconds.

from zo.commands.replay import main
from zo.config.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
