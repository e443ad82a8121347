"""Train each point of a grid: ``zo sweep`` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from zo.commands import start

if __name__ == "__main__":
    sys.exit(start("sweep"))
