"""Stand-in for launch/train.py under torchrun in which the rank given by ``CHAOS`` dies.

CHAOS = {"rank": 1, "at": ["zo.state.log", "Log.append", 3, false]}, only in
the first group of ranks.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from ranks import kill_at

if __name__ == "__main__":
    fate = json.loads(os.environ.get("CHAOS", "{}"))
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if fate.get("at") and first and fate["rank"] == int(os.environ["RANK"]):
        kill_at(*fate["at"])
    target = Path(__file__).resolve().parent.parent / "launch" / "train.py"
    sys.argv[0] = str(target)
    runpy.run_path(str(target), run_name="__main__")
