"""Time to replay entries on the weights of OPT-125M's shape, over a plain copy of them.

    python benchmarks/replay.py [--directions 1,4,16,64] [--distributions rank-one] [--rounds 9]
        [--entries 1]

All parameters of two dims or more are in memory, in one segment; the changes are applied in place.
Every round times the copy and each number of directions once, one after the other; figures are
medians over the rounds. Prints a Markdown table, and the seconds of the copy under it.
"""

import argparse
import statistics
import time

import torch

from zo.method.kernels import replay_and_perturb
from zo.method.perturbation import Change, Matrices, Pass

LAYER = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
SHAPES = [(50272, 768), (2050, 768)] + 12 * LAYER
COPY = "copy"


def place():
    """The matrices one after the other, and their elements in all."""
    matrices, at = [], 0
    for rows, width in SHAPES:
        matrices.append(Matrices(at, rows * width, rows, width))
        at += rows * width
    return tuple(matrices), at


def seconds(dtype, passes, rounds):
    """Median seconds of the copy, and of each pass."""
    matrices, count = place()
    weights = torch.full((count,), 0.02, dtype=dtype)
    copy, times = torch.empty_like(weights), {name: [] for name in (COPY, *passes)}
    for number in range(rounds + 1):
        for name, found in times.items():
            begun = time.perf_counter()
            if name == COPY:
                copy.copy_(weights)
            else:
                replay_and_perturb(weights, 0, passes[name], matrices=matrices)
            if number > 0:  # the first round compiles
                found.append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


def entry(step, directions):
    """An entry of so many directions of its own."""
    numbers = range(step * directions, (step + 1) * directions)
    return Change(step + 1, tuple(numbers), (2.0**-20,) * directions)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directions", default="1,4,16,64")
    parser.add_argument("--distributions", default="rank-one")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--entries", type=int, default=1, help="in one pass; ratios are of one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    directions = list(map(int, arguments.directions.split(",")))
    print("| distribution | dtype |", *(f"{k} |" for k in directions))
    print("|---" * (2 + len(directions)) + "|")
    copies = {}
    for distribution in arguments.distributions.split(","):
        for dtype in arguments.dtypes.split(","):
            passes = {
                k: Pass(1, distribution, tuple(entry(step, k) for step in range(arguments.entries)))
                for k in directions
            }
            found = seconds(getattr(torch, dtype), passes, arguments.rounds)
            ratios = (f"{found[k] / arguments.entries / found[COPY]:.2f} |" for k in directions)
            print(f"| {distribution} | {dtype} |", *ratios, flush=True)
            copies[dtype] = round(found[COPY], 4)
    print(f"\nCopy, s: {copies}; {arguments.threads} threads")


if __name__ == "__main__":
    main()
