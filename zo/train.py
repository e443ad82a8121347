"""Fine-tune, as ``zo train``: torchrun [--nproc-per-node N] -m zo.train [key=value ...]."""

import sys

from zo.io.signals import end_on_signals

if __name__ == "__main__":
    end_on_signals()  # Before the imports, which take seconds.

from zo.commands.train import main
from zo.config.cli import run

if __name__ == "__main__":
    sys.exit(run(main))
