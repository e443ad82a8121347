"""Print a log as JSON lines: ``python -m zo.log FILE`` (see :mod:`zo.state.log`)."""

import sys

from zo.state.log import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
