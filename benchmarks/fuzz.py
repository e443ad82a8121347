"""Feed the readers of files as many damaged inputs as fit in some minutes of one core.

nice -n 10 python benchmarks/fuzz.py [--minutes 15] [--seed 0] [--only NAME ...]

The targets are those of tests/malformed.py, and so are the limits of time and memory; each gets the
same share of the minutes. The last line is one JSON object: for each target its inputs, those
refused, seconds, and the growth of the process's resident memory. An input that fails is printed as
hypothesis has shrunk it, and the exit code is 1.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import damage
import malformed
from hypothesis import HealthCheck, Phase, given, seed, settings

ROUND = 2000
"""Inputs between two looks at the clock; hypothesis keeps those of a round in memory."""


def feed(name: str, until: float, number: int) -> dict[str, float]:
    """Feed one target until some time; return what was counted."""
    read, inputs, _ = malformed.TARGETS[name]
    counted = {"inputs": 0, "refused": 0}
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while time.monotonic() < until:

        @seed(number)
        @settings(
            max_examples=ROUND,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(inputs)
        def each(value):
            if time.monotonic() < until:
                counted["inputs"] += 1
                counted["refused"] += damage.feed(read, value)

        each()
        number += 1_000_003
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        **counted,
        "seconds": round(time.monotonic() - begun, 1),
        "peak_rss_growth_mib": round(grown / 1024, 1),
    }


def main() -> int:
    """Feed all targets, or some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="*", default=list(malformed.TARGETS), choices=list(malformed.TARGETS)
    )
    asked = parser.parse_args()
    found, failed = {}, 0
    for name in asked.only:
        until = time.monotonic() + asked.minutes * 60 / len(asked.only)
        try:
            found[name] = feed(name, until, asked.seed)
        except Exception as error:
            failed += 1
            notes = "\n".join(getattr(error, "__notes__", []))
            print(f"{name}: {type(error).__name__}: {error}\n{notes}", file=sys.stderr)
            continue
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    total = sum(one["inputs"] for one in found.values())
    print(json.dumps({"inputs": total, "failed": failed, "targets": found}))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
