"""Print a log as JSON lines: ``python -m zo.log FILE`` (see :mod:`zo.state.log`)."""

import sys

from zo.io.signals import end_with_reader
from zo.state.log import main

if __name__ == "__main__":
    with end_with_reader():
        sys.exit(main(sys.argv[1:]))
