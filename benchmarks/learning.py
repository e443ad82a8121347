"""Held-out accuracy of the quickstart's task over training time, by estimator and seed.

    python benchmarks/learning.py --seconds 60 --seeds 0,1,2 [--only "rank-one, top 4"] \
        --out learning.jsonl
    python benchmarks/learning.py --plot learning.jsonl --to benchmarks/learning.png

Each run is ``torchrun --nproc-per-node 2 launch/train.py``; a probe run of 3 steps sets its number
of steps to what fits the seconds, so that every schedule ends in time. Prints a Markdown table.
Learning rates are the best of those tried for the number of directions (see README.md).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FULL = ["estimator.cover=full", "estimator.part=all", "estimator.directions=1"]
DENSE = ["estimator.distribution=rademacher", "estimator.name=spsa", "estimator.eps=1e-3"]
EACH = ["estimator.cover=diagonal", "estimator.directions=null", "batch.micro=1"]
ONE = ["estimator.distribution=rank-one", "estimator.name=one-sided", "estimator.eps=1e-4"]
CLIP = ["update.clip=2"]
METHODS = {
    "dense, one direction": [
        *DENSE,
        *FULL,
        "batch.micro=8",
        "update.lr=1.5e-4",
        "update.clip=null",
    ],
    "dense, one a sequence": [*DENSE, *EACH, *CLIP, "estimator.part=all", "update.lr=3e-4"],
    "rank-one, one direction": [*ONE, *FULL, "batch.micro=8", "update.lr=1.5e-4", *CLIP],
    "rank-one, one a sequence": [*ONE, *EACH, *CLIP, "estimator.part=all", "update.lr=3e-4"],
    "rank-one, top 1": [*ONE, *EACH, *CLIP, "estimator.part=top:1", "update.lr=4e-3"],
    "rank-one, top 2": [*ONE, *EACH, *CLIP, "estimator.part=top:2", "update.lr=3e-3"],
    "rank-one, top 4": [*ONE, *EACH, *CLIP, "estimator.part=top:4", "update.lr=2e-3"],
    "rank-one, top 8": [*ONE, *EACH, *CLIP, "estimator.part=top:8", "update.lr=1e-3"],
    "rank-one, top 16": [*ONE, *EACH, *CLIP, "estimator.part=top:16", "update.lr=6e-4"],
    "rank-one, sampled": [*ONE, *EACH, *CLIP, "estimator.part=sampled", "update.lr=1e-3"],
    "MeZO": [*DENSE, *FULL, "estimator.distribution=gaussian", "batch.micro=8", "update.lr=1e-4"],
}
"""Settings of each."""
PROBES = {"top 1": 63, "top 2": 31, "top 4": 15, "top 8": 7, "top 16": 3, "sampled": 7}
"""Directions a sequence, for about the same cost of a step; one where there is no part."""
for _name, _settings in METHODS.items():
    _settings.append(f"estimator.probes={PROBES.get(_name.partition(', ')[2], 1)}")

PROBE_STEPS = 3


def launch(settings, seed, steps, every):
    """Train by torchrun on two ranks; return the lines of ``metrics.jsonl``."""
    with tempfile.TemporaryDirectory() as scratch:
        keys = [*settings, f"run.seed={seed}", f"run.steps={steps}", f"eval.every={every}"]
        keys += [f"run.dir={scratch}/run", "export.at_end=false"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += [str(ROOT / "launch" / "train.py"), *keys]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return [json.loads(line) for line in open(f"{scratch}/run/metrics.jsonl")]


@cache
def steps_within(name, seconds, points):
    """Return the steps that fit some seconds, a multiple of ``points``."""
    timed = launch(METHODS[name], 0, PROBE_STEPS, 0)
    step_s = statistics.median(line["step_s"] for line in timed[1:])
    return max(points, int(seconds / step_s) // points * points)


def train(name, seed, seconds, points):
    """Train for some seconds; return a record with accuracy at several times."""
    steps = steps_within(name, seconds, points)
    curve, spent, tokens = [], 0.0, 0
    for line in launch(METHODS[name], seed, steps, steps // points):
        if "eval" in line:
            curve.append((round(spent, 1), line["step"], tokens, line["eval"]["accuracy"]))
        else:
            spent, tokens = spent + line["step_s"], tokens + line["tokens"]
    return {"method": name, "seed": seed, "curve": curve}


def table(records):
    """Return a Markdown table of the last accuracies: mean and spread over seeds."""
    by_method = defaultdict(list)
    for record in records:
        by_method[record["method"]].append(record["curve"][-1])
    lines = ["| estimator | seeds | steps | s | tokens | accuracy, % | lowest, highest |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, ends in by_method.items():
        scores = [100 * accuracy for *_, accuracy in ends]
        spent, steps = (statistics.mean(column) for column in list(zip(*ends, strict=True))[:2])
        counted = [tokens for _, _, tokens, _ in ends if tokens is not None]
        tokens = f"{statistics.mean(counted):.0f}" if counted else "not counted"
        lines.append(
            f"| {name} | {len(ends)} | {steps:.0f} | {spent:.0f} | {tokens} | "
            f"{statistics.mean(scores):.1f} | {min(scores):.1f}, {max(scores):.1f} |"
        )
    return "\n".join(lines)


def plot(records, path):
    """Draw mean accuracy over seconds of training, a line a method."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    by_method = defaultdict(list)
    for record in records:
        by_method[record["method"]].append(record["curve"])
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150)
    for name, curves in by_method.items():
        seconds = [statistics.mean(p[0] for p in points) for points in zip(*curves, strict=True)]
        accuracy = [
            100 * statistics.mean(p[3] for p in points) for points in zip(*curves, strict=True)
        ]
        axes.plot(
            seconds, accuracy, marker="o", markersize=3, label=f"{name} ({len(curves)} seeds)"
        )
    axes.set_xlabel("seconds of training, two cores")
    axes.set_ylabel("held-out accuracy, % (256 reviews)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", action="append", choices=METHODS)
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    if arguments.plot:
        records = [json.loads(line) for line in arguments.plot.read_text().splitlines()]
        plot(records, arguments.to)
        print(table(records))
        return
    for name in arguments.only or METHODS:
        for seed in map(int, arguments.seeds.split(",")):
            record = train(name, seed, arguments.seconds, arguments.points)
            with open(arguments.out, "a") as file:
                file.write(json.dumps(record) + "\n")
            print(name, seed, record["curve"], flush=True)


if __name__ == "__main__":
    main()
