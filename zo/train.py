"""Fine-tune, as ``zo train``: torchrun [--nproc-per-node N] -m zo.train [key=value ...]."""

import sys

from zo.commands import start

if __name__ == "__main__":
    sys.exit(start("train"))
