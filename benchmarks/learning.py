"""Held-out accuracy of the quickstart's task over training time, by estimator and seed.

    python benchmarks/learning.py --time step_s.json
    python benchmarks/learning.py --timed step_s.json --seconds 60 --seeds 0,1,2 \
        [--only "rank-one, top 4"] [--processes 1] --out learning.jsonl
    python benchmarks/learning.py --plot learning.jsonl --to benchmarks/learning.png

Each run is ``torchrun launch/train.py``. A step's time is measured first, by two processes on a
quiet machine; it sets a run's number of steps, so that every schedule ends in time, and the seconds
that are reported. The runs themselves have the same losses on any number of processes, and may
share the machine. ``AdamW`` is torch's, on the same batches. Prints a Markdown table. Learning
rates are the best of those tried for the number of directions (see README.md).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from zo import load_config
from zo.io.quickstart import model_folder
from zo.run.problem import build_problem

ROOT = Path(__file__).resolve().parent.parent
PROMPT = ["data.template='{text} It was'", "data.label_words=[' terrible',' great']"]
"""MeZO's for reviews. The task's own begins at 79 %, which leaves less to tell methods apart by."""
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
    "MeZO": [*DENSE, *FULL, "estimator.distribution=gaussian", "batch.micro=8", "update.lr=3e-4"],
}
"""Settings of each."""
PROBES = {"top 1": 63, "top 2": 31, "top 4": 15, "top 8": 7, "top 16": 3, "sampled": 7}
"""Directions a sequence, for about the same cost of a step; one where there is no part."""
for _name, _settings in METHODS.items():
    _settings.append(f"estimator.probes={PROBES.get(_name.partition(', ')[2], 1)}")

ADAMW = {"AdamW": (None, 2e-5), "AdamW, top 2": (2, 1e-4)}
"""Layers, from the top, with the norm behind them (all parameters without a number), and rate."""
TIMED_STEPS = 5


def launch(keys, folder, processes=1):
    """Train in a folder; return the lines of ``metrics.jsonl``."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else [])]
    command += [str(ROOT / "launch" / "train.py"), "recipe=quickstart", *keys]
    command += [f"run.dir={folder}", "export.at_end=false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]


def adamw(keys, choose, lr, schedule, steps, scored, score_in=torch.float32):
    """Train by backward passes; yield lines as ``metrics.jsonl`` has them.

    Args:
        keys: of the data, over the quickstart's.
        choose: sets what is trained of a model, in place.
        lr: learning rate.
        schedule: factor of it, by the number of steps done.
        steps: to do.
        scored: steps to score after.
        score_in: type that scores are computed in.
    """
    keys = [*keys, "batch.micro=16", "estimator.probes=1", "estimator.cover=full"]
    problem = build_problem(load_config("quickstart", [*keys, "estimator.part=all"]))
    model = AutoModelForCausalLM.from_pretrained(model_folder("smollm2-135m-instruct")).eval()
    choose(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    def score(step):
        with torch.no_grad(), torch.autocast("cpu", score_in, enabled=score_in.itemsize < 4):
            terms = sum(problem.task.terms(model, batch) for batch in problem.dev_batches)
        return {"step": step, "eval": problem.task.summarize(terms.tolist())}

    if 0 in scored:
        yield score(0)
    for step in range(1, steps + 1):
        begun, batch = time.perf_counter(), problem.batches(step - 1, 0)
        loss, terms = problem.objective(model, batch)[:2]
        (loss / terms).backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        tokens = int(batch["attention_mask"].sum())
        yield {"step": step, "step_s": time.perf_counter() - begun, "tokens": tokens}
        if step in scored:
            yield score(step)


def top(layers):
    """Return what freezes all but the top layers and the norm behind them; ``None``: nothing."""

    def choose(model):
        if layers is not None:
            model.requires_grad_(False)
            for module in (*model.model.layers[-layers:], model.model.norm):
                module.requires_grad_(True)

    return choose


def lines_of(name, seed, steps, every, processes):
    """Train; return or yield the lines of ``metrics.jsonl``."""
    keys = [*PROMPT, f"run.seed={seed}"]
    if name in ADAMW:
        layers, lr = ADAMW[name]
        scored = {*range(0, steps, every), steps} if every else ()
        return adamw(keys, top(layers), lr, lambda step: 1 - step / steps, steps, scored)
    keys += [*METHODS[name], f"run.steps={steps}", f"eval.every={every}"]
    with tempfile.TemporaryDirectory() as scratch:
        return launch(keys, f"{scratch}/run", processes)


def time_step(name):
    """Return the seconds of a step on two cores."""
    lines = lines_of(name, 0, TIMED_STEPS, 0, 2)
    return statistics.median([line["step_s"] for line in lines if "step_s" in line][1:])


def train(name, seed, step_s, seconds, points, processes):
    """Train for some seconds; return a record with accuracy at several times.

    A point is seconds, steps, tokens, accuracy.
    """
    steps = max(points, int(seconds / step_s) // points * points)
    curve, tokens = [], 0
    for line in lines_of(name, seed, steps, steps // points, processes):
        tokens += line.get("tokens", 0)
        if "eval" in line:
            spent = round(line["step"] * step_s, 1)
            curve.append((spent, line["step"], tokens, line["eval"]["accuracy"]))
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
    figure, axes = pyplot.subplots(figsize=(10, 4.5), dpi=150)
    for number, (name, curves) in enumerate(by_method.items()):
        seconds = [statistics.mean(p[0] for p in points) for points in zip(*curves, strict=True)]
        accuracy = [
            100 * statistics.mean(p[3] for p in points) for points in zip(*curves, strict=True)
        ]
        shown = {"color": pyplot.get_cmap("tab20").colors[number], "marker": "o", "markersize": 3}
        axes.plot(seconds, accuracy, label=f"{name} ({len(curves)} seeds)", **shown)
    axes.set_xlabel("seconds of training, two cores")
    axes.set_ylabel("held-out accuracy, % (256 reviews)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", action="append", choices=[*METHODS, *ADAMW])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--time", type=Path)
    parser.add_argument("--timed", type=Path)
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    if arguments.plot:
        records = [json.loads(line) for line in arguments.plot.read_text().splitlines()]
        plot(records, arguments.to)
        print(table(records))
        return
    names = arguments.only or [*METHODS, *ADAMW]
    if arguments.time:
        arguments.time.write_text(json.dumps({name: time_step(name) for name in names}, indent=1))
        return
    step_s = json.loads(arguments.timed.read_text())
    for seed in map(int, arguments.seeds.split(",")):
        for name in names:
            sizes = step_s[name], arguments.seconds, arguments.points, arguments.processes
            record = train(name, seed, *sizes)
            with open(arguments.out, "a") as file:
                file.write(json.dumps(record) + "\n")
            print(name, seed, record["curve"], flush=True)


if __name__ == "__main__":
    main()
