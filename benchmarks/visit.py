"""Time of a visit's kernel on CPU: nanoseconds an element, over memory larger than the caches.

    python benchmarks/visit.py [--threads 2] [--rounds 9]

Twelve blocks of OPT-125M's size, one after the other; probes go to one scratch memory, as in a run.
"""

import argparse
import json
import statistics
import time

import torch

from zo.method.kernels import replay_and_perturb
from zo.method.perturbation import Change, Pass, Probe

NUMEL, BLOCKS = 7_077_888, 12
PAIR = (Probe(1, 1e-3), Probe(1, -1e-3))
ONE, SIXTEEN = Change(1, (0,), (1e-4,)), Change(1, tuple(range(16)), (1e-4,) * 16)
PASSES = {
    "replay": ((ONE,), ()),
    "pair": ((), PAIR),
    "replay and pair": ((ONE,), PAIR),
    "replay of 16": ((SIXTEEN,), ()),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def measure(run):
        run()
        times = []
        for _ in range(arguments.rounds):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        return round(statistics.median(times) / (NUMEL * BLOCKS) * 1e9, 3)

    for dtype in (torch.float32, torch.bfloat16):
        blocks = [torch.randn(NUMEL).to(dtype) for _ in range(BLOCKS)]
        out = torch.empty(2, NUMEL, dtype=dtype)
        found = {
            "dtype": str(dtype).removeprefix("torch."),
            "copy": measure(lambda: [out[0].copy_(block) for block in blocks]),  # noqa: B023
            "in place": measure(lambda: [block.mul_(1.0) for block in blocks]),  # noqa: B023
        }
        for distribution in ("rademacher", "gaussian"):
            for name, (changes, probes) in PASSES.items():
                work = Pass(1, distribution, changes, probes)
                found[f"{distribution}, {name}"] = measure(
                    lambda: [
                        replay_and_perturb(block, i * NUMEL, work, out if work.probes else None)  # noqa: B023
                        for i, block in enumerate(blocks)  # noqa: B023
                    ]
                )
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
