"""Held-out accuracy on four sets of labelled texts, at equal seconds and at equal forwards.

    python benchmarks/quality.py --time step_s.json
    python benchmarks/quality.py --timed step_s.json --seconds 20 --trial --out trials.jsonl
    python benchmarks/quality.py --timed step_s.json --rates trials.jsonl --seeds 0,1,2 \
        --out quality.jsonl
    python benchmarks/quality.py --rates trials.jsonl --table quality.jsonl

    python benchmarks/quality.py --timed step_s.json --seconds 120 --schedule linear --trial \
        --only MeZO --lr 1e-4,3e-4 --out longer-trials.jsonl
    (and so on, with the same --seconds and --schedule; --prompt mezo is another prompt)

A step of each method is timed first, in turn, on a quiet machine. Plain MeZO's steps in the given
seconds are the budget: the others get as many seconds, or as many forwards, and are scored at both
ends of one run at a constant rate; with a rate that falls to 0, at equal seconds alone. Each run of
zo is ``launch/train.py`` on one core, and may share the machine; AdamW is torch's, on the same
batches. A method's rate is the one whose trials have the lowest mean held-out loss. A restart goes
on after the records in the file.
"""

import argparse
import json
import shlex
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from learning import adamw, launch
from peft import LoraConfig, inject_adapter_in_model

from zo.config.table import BatchConfig, EstimatorConfig
from zo.data.rows import permutation
from zo.io.quickstart import snippets
from zo.method.update import SCHEDULES
from zo.run.evaluate import evaluate
from zo.run.restore import load_run
from zo.state.log import read

TEMPLATES = {
    "movie-reviews": "Review: {text}\nSentiment:",
    "tweets": "Tweet: {text}\nSentiment:",
    "product-reviews": "Review: {text}\nSentiment:",
    "editorials": "Editorial: {text}\nSentiment:",
}
PROMPTS = {
    "named": (TEMPLATES, (" negative", " positive")),
    "mezo": (dict.fromkeys(TEMPLATES, "{text} It was"), (" terrible", " great")),
}
"""Templates and label words: what the text is and what is asked, or MeZO's prompt for SST-2."""
LONGEST, HELD_OUT, TRAINED_ON = 100, 256, 1000
"""Characters of a text at most, rows held out, and rows to train on at most; classes are equal."""
COMMON = ["batch.sequences=16", "run.threads=1"]
COMMON += [f"data.dev_examples={HELD_OUT}", "run.trackers=[]"]
COMMON += ["run.divergence=warn"]  # A rate that is too large is a result too.
EPS = "estimator.eps=1e-3"
ALL = ["estimator.part=all", "estimator.probes=1"]
SAMPLED = ["estimator.part=sampled", "estimator.probes=7"]
"""A step reaches 0.31 of the layers in the mean."""
MEZO = ["estimator.name=spsa", "estimator.distribution=gaussian", "estimator.cover=full"]
MEZO += ["estimator.directions=1", EPS, "batch.micro=16", "update.clip=null"]


def choose_all(model):
    """Leave all parameters to be trained."""


def choose_lora(model):
    """Add LoRA as ``peft.type=lora`` does."""
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"), model)


@dataclass(frozen=True)
class Method:
    """A way to train."""

    forwards: float
    """Of a step, through the whole network for each of its sequences; a backward counts as two."""
    rates: tuple[float, ...]
    """Learning rates to try."""
    keys: tuple[str, ...] = ()
    """What it changes of the quickstart's recipe."""
    choose: Callable[[torch.nn.Module], None] | None = None
    """What AdamW trains; ``None``: zo trains."""


METHODS = {
    "zero-shot": Method(0, (0.0,), choose=choose_all),
    "MeZO": Method(2, (3e-5, 1e-4, 3e-4, 1e-3), (*ALL, *MEZO)),
    "ours, all parameters": Method(1 + 7 * 0.31, (1e-3, 2e-3, 4e-3), tuple(SAMPLED)),
    "ours, top 4 layers": Method(1 + 15 * 4 / 30, (1e-3, 2e-3, 4e-3, 8e-3)),
    "ours, LoRA": Method(2, (3e-3, 1e-2, 3e-2, 1e-1), (*ALL, "peft.type=lora", EPS)),
    "ours, prefix": Method(2, (1e-4, 1e-3, 1e-2, 1e-1), (*ALL, "peft.type=prefix", EPS)),
    "ours, norms": Method(2, (1e-4, 1e-3, 3e-3, 1e-2, 1e-1), (*ALL, "model.train=*norm*", EPS)),
    "AdamW": Method(3, (2e-6, 6e-6, 2e-5, 6e-5), choose=choose_all),
    "AdamW, LoRA": Method(3, (3e-4, 1e-3, 3e-3), choose=choose_lora),
}
TRIAL, TRIAL_SEEDS = "movie-reviews", (8, 9)
"""Data and seeds of the trial of rates; no table has the seeds."""
TIMED_STEPS, ROUNDS = 3, 2


def write_rows(data, prompt, seed, folder):
    """Write rows to train on and rows held out, drawn by the seed; return the keys of their use."""
    templates, words = PROMPTS[prompt]
    rows = [row for row in snippets(data) if len(row["text"]) <= LONGEST]
    drawn = {rows[i]["text"]: rows[i] for i in permutation(seed, 0, len(rows))}
    classes = [[row for row in drawn.values() if row["label"] == label] for label in (0, 1)]
    even = [row for pair in zip(*classes, strict=False) for row in pair]
    parts = {"dev": even[:HELD_OUT], "name": even[HELD_OUT:][:TRAINED_ON]}
    keys = [f"data.template={json.dumps(templates[data])}", f"data.label_words={json.dumps(words)}"]
    keys += [f"run.seed={seed}", *COMMON]
    for key, part in parts.items():
        file = Path(folder, f"{data}-{key}.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
        keys.append(f"data.{key}={file}")
    return keys


def lines_of(method, keys, lr, schedule, steps, scored, folder):
    """Train; return or yield lines as a run's ``metrics.jsonl`` has them."""
    if method.choose:
        factor = SCHEDULES[schedule]
        falling = lambda step: factor(step / steps) if steps else 1.0  # noqa: E731
        return adamw(keys, method.choose, lr, falling, steps, scored, torch.bfloat16)
    keys = [*keys, *method.keys, f"update.lr={lr}", f"update.schedule={schedule}"]
    keys += [f"run.steps={steps}", "eval.every=0"]
    return [*launch(keys, folder), *scores_of(folder, scored)]


def scores_of(folder, steps):
    """Yield the held-out scores of a run after some steps, computed in bfloat16."""
    if not steps:
        return
    large = BatchConfig(sequences=64, micro=64)
    wide = partial(replace, batch=large, estimator=EstimatorConfig())
    run, (_, entries) = load_run(folder, wide, 0), read(folder / "steps.log")
    for step in sorted(steps):
        for entry in entries[run.replica.log.version : step]:
            run.replica.log.append(entry)
        with torch.autocast("cpu", torch.bfloat16):
            found = evaluate(run.replica, run.problem.task, run.problem.dev_batches, run.mesh, 1)
        yield {"step": step, "eval": found.as_json()}
    run.replica.close()
    run.mesh.close()


def train(data, prompt, name, seed, lr, schedule, marks):
    """Train to the last of some steps; return a record with the scores after each.

    Args:
        data: of :data:`TEMPLATES`.
        prompt: of :data:`PROMPTS`.
        name: of :data:`METHODS`.
        seed: of the split, the batches and the directions.
        lr: learning rate.
        schedule: ``update.schedule``.
        marks: step to score after, by name of the budget.
    """
    method, forwards, scores, spent = METHODS[name], {0: 0.0}, {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        keys, steps = write_rows(data, prompt, seed, folder), {*marks.values()}
        for line in lines_of(method, keys, lr, schedule, max(steps), steps, Path(folder, "run")):
            if "tokens" in line:
                spent += line["tokens"] * method.forwards
                forwards[line["step"]] = spent
            if "eval" in line:
                scores[line["step"]] = {key: line["eval"][key] for key in ("accuracy", "loss")}
    return {"data": data, "method": name, "seed": seed, "lr": lr} | {
        budget: {"step": step, "token_forwards": forwards[step]} | scores[step]
        for budget, step in marks.items()
    }


def marks_of(name, step_s, seconds):
    """Return the step at which each budget is spent."""
    if name not in step_s:  # Zero-shot.
        return {"seconds": 0, "forwards": 0}
    forwards = seconds / step_s["MeZO"] * METHODS["MeZO"].forwards
    spent = {"seconds": seconds / step_s[name], "forwards": forwards / METHODS[name].forwards}
    return {budget: max(1, int(steps)) for budget, steps in spent.items()}


def time_steps(names, prompt):
    """Return the seconds of a step of each method that trains, on one core."""
    times = defaultdict(list)
    for _ in range(ROUNDS):
        for name in names:
            method = METHODS[name]
            if not method.forwards:
                continue
            with tempfile.TemporaryDirectory() as folder:
                keys, lr = write_rows(TRIAL, prompt, TRIAL_SEEDS[0], folder), method.rates[0]
                where = Path(folder, "run")
                lines = lines_of(method, keys, lr, "constant", TIMED_STEPS, (), where)
                times[name] += [line["step_s"] for line in lines if "step_s" in line][1:]
            print(name, times[name], flush=True)
    return {name: round(statistics.median(found), 3) for name, found in times.items()}


def records_of(file):
    """Return the records of a file, which need not exist."""
    return [json.loads(line) for line in file.open()] if file and file.exists() else []


def ends_of(trials):
    """Return for each method and rate the mean accuracy and held-out loss of its trials."""
    ends = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        ends[trial["method"]][trial["lr"]].append(trial["seconds"])
    return {
        name: {
            lr: [statistics.mean(end[key] for end in found) for key in ("accuracy", "loss")]
            for lr, found in sorted(rates.items())
            if len(found) == len(TRIAL_SEEDS)
        }
        for name, rates in ends.items()
    }


def best_rates(trials):
    """Return the rate of each method whose trials ended with the lowest mean loss."""
    return {name: min(e, key=lambda lr: e[lr][1]) for name, e in ends_of(trials).items() if e}


def trial_table(trials):
    """Return a Markdown table of the trials of rates: accuracy and loss at each."""
    lines, ends = ["| | rate: accuracy (loss) |", "|---|---|"], ends_of(trials)
    for name in [name for name in METHODS if ends.get(name)]:
        found = [f"{lr:g}: {100 * a:.1f} ({b:.3f})" for lr, (a, b) in ends[name].items()]
        lines.append(f"| {name} | {'; '.join(found)} |")
    return "\n".join(lines)


def table(records, budget):
    """Return a Markdown table of accuracies at the end of a budget.

    A cell is the mean over seeds, the lowest, the highest and the number of seeds.
    """
    cells = defaultdict(list)
    for record in records:
        cells[record["method"], record["data"]].append(record[budget])
    lines = [f"| equal {budget} | steps | {' | '.join(TEMPLATES)} |", "|---" * 6 + "|"]
    for name in [name for name in METHODS if any(name in cell for cell in cells)]:
        found, steps = [], ""
        for data in TEMPLATES:
            scores = [100 * one["accuracy"] for one in cells[name, data]]
            steps = cells[name, data][0]["step"] if scores else steps
            spread = f"{min(scores):.1f} to {max(scores):.1f}; " if scores[1:] else ""
            found.append(f"{statistics.mean(scores):.1f} ({spread}{len(scores)})" if scores else "")
        lines.append(f"| {name} | {steps} | {' | '.join(found)} |")
    return "\n".join(lines)


def recipes(rates, prompt, schedule):
    """Return the keys of zo's methods over the quickstart's recipe."""
    common = [f"data.label_words={json.dumps(PROMPTS[prompt][1])}", *COMMON]
    common += [f"update.schedule={schedule}", "eval.every=0", "export.at_end=false"]
    lines = [f"common: {shlex.join(common)}"]
    for name, method in METHODS.items():
        if name in rates and not method.choose:
            keys = shlex.join([*method.keys, f"update.lr={rates[name]}"])
            lines.append(f"{name}: {keys}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", action="append", choices=METHODS)
    parser.add_argument("--prompt", default="named", choices=PROMPTS)
    parser.add_argument("--schedule", default="constant", choices=("constant", "linear"))
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--lr", help="rates to try in place of a method's")
    for name in ("time", "timed", "rates", "out", "table"):
        parser.add_argument(f"--{name}", type=Path)
    arguments = parser.parse_args()
    names = arguments.only or [*METHODS]
    if arguments.time:
        found = time_steps(names, arguments.prompt)
        arguments.time.write_text(json.dumps(found, indent=1))
        return
    trials = records_of(arguments.rates)
    rates = best_rates(trials)
    if arguments.table:
        records = [r for r in records_of(arguments.table) if r["lr"] == rates.get(r["method"], 0)]
        budgets = [budget for budget in ("seconds", "forwards") if budget in records[0]]
        tables = [table(records, budget) for budget in budgets]
        lines = recipes(rates, arguments.prompt, arguments.schedule)
        print(trial_table(trials), *tables, lines, sep="\n\n")
        return
    step_s = json.loads(arguments.timed.read_text())
    if arguments.trial:
        given = [float(lr) for lr in arguments.lr.split(",")] if arguments.lr else None
        runs = [
            (TRIAL, seed, name, lr)
            for seed in TRIAL_SEEDS
            for name in names
            for lr in given or METHODS[name].rates
        ]
    else:
        seeds = map(int, arguments.seeds.split(","))
        runs = [(d, seed, n, rates.get(n, 0)) for seed in seeds for d in TEMPLATES for n in names]
    done = {(r["data"], r["seed"], r["method"], r["lr"]) for r in records_of(arguments.out)}
    for data, seed, name, lr in runs:
        if (data, seed, name, lr) in done:
            continue
        marks = marks_of(name, step_s, arguments.seconds)
        if arguments.trial or arguments.schedule != "constant":
            del marks["forwards"]
        record = train(data, arguments.prompt, name, seed, lr, arguments.schedule, marks)
        with arguments.out.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
