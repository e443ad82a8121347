"""Feed the readers of files a million damaged inputs, or as many as are asked for.

python benchmarks/fuzz.py [--inputs 1000000] [--seed 0] [--only NAME ...]

The targets are those of tests/malformed.py, and so are the limits of time and memory. Each gets a
share by what its inputs cost. Where an input is bytes, each that hypothesis makes is followed by
some with more random damage, which cost a tenth. The last line is one JSON object: for each target
its inputs, those refused, seconds, and the growth of the process's resident memory. An input that
fails is printed as hypothesis has shrunk it, and the exit code is 1.
"""

import argparse
import json
import random
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import damage
import malformed
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SHARES = {
    "log": 360,
    "block header": 260,
    "safetensors header": 150,
    "index of shards": 120,
    "metrics.jsonl": 50,
    "redaction": 40,
    "page": 10,
    "data rows": 4,
    "config.yaml": 3,
    "data file": 1,
    "recipe": 1,
    "overrides": 1,
}
"""Of a thousand inputs."""
MORE = 24
"""Inputs of bytes that follow each one that hypothesis makes."""
ROUND = 2000
"""Inputs that hypothesis makes at once; it keeps them in memory."""
KINDS = (
    lambda r: ("flip", r.randrange(2**16), r.randrange(8)),
    lambda r: ("put", r.randrange(2**16), r.randbytes(r.randint(1, 9))),
    lambda r: ("insert", r.randrange(2**16), r.randbytes(r.randint(1, 40))),
    lambda r: ("drop", r.randrange(2**16), r.randint(1, 60)),
    lambda r: ("double", r.randrange(2**16), r.randint(1, 200)),
    lambda r: ("cut", r.randrange(2**16), None),
    lambda r: ("count", r.randrange(2**16), r.choice(damage.EXTREMES)),
)


def variants(value: object, number: int) -> list[object]:
    """Return an input and, of bytes, some with more damage, as a random number has it."""
    if not isinstance(value, bytes):
        return [value]
    chance = random.Random(number)
    more = [
        [chance.choice(KINDS)(chance) for _ in range(chance.randint(1, 3))] for _ in range(MORE)
    ]
    return [value, *(damage.damaged(value, damages) for damages in more)]


def feed(name: str, inputs: int, number: int) -> dict[str, float]:
    """Feed one target so many inputs, at least; return what was counted."""
    read, made, _ = malformed.TARGETS[name]
    counted = {"inputs": 0, "refused": 0}
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while counted["inputs"] < inputs:

        @seed(number)
        @settings(
            max_examples=ROUND,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(made, st.integers(0, 2**32))
        def each(value, chance):
            if counted["inputs"] < inputs:
                for one in variants(value, chance):
                    counted["inputs"] += 1
                    counted["refused"] += damage.feed(read, one)

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
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(SHARES), choices=list(malformed.TARGETS))
    asked = parser.parse_args()
    found, failed = {}, 0
    for name in asked.only:
        try:
            found[name] = feed(name, asked.inputs * SHARES[name] // 1000, asked.seed)
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
