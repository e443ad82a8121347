"""Cost and gain of several ranks on one machine, one thread a rank.

    python benchmarks/ranks.py scaling     cells a second of 2 ranks over 1, axes perturb and data
    python benchmarks/ranks.py bytes       scalars that a rank sends a step, by size of the model
    python benchmarks/ranks.py slices      bytes that a rank reads and gathers a step, by slices
    python benchmarks/ranks.py recovery    seconds from a kill -9 of a rank to the next step

Shapes of OPT with random weights in bfloat16 and random tokens. Prints Markdown tables.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from transformers import OPTConfig

from zo.state.log import read

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"opt-125m": (768, 12, 12), "opt-1.3b": (2048, 24, 32)}
"""Width, layers, heads."""


def command(folder, shape, ranks, settings, restarts=0):
    width, layers, heads = SHAPES[shape]
    sizes = {"hidden_size": width, "ffn_dim": 4 * width, "word_embed_proj_dim": width}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    OPTConfig(**sizes, architectures=["OPTForCausalLM"]).save_pretrained(folder / shape)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    torchrun += [
        "--max-restarts",
        str(restarts),
        "--monitor-interval",
        "0.1",
        "--master-port",
        "29777",
    ]
    keys = [
        "recipe=opt-125m",
        f"model.name={folder / shape}",
        "model.weights=random",
        "model.dtype=bfloat16",
    ]
    keys += [
        "data.name=synthetic",
        "data.dev=null",
        "estimator.distribution=rademacher",
        "eval.every=0",
    ]
    keys += [
        "export.at_end=false",
        "run.snapshot_every=0",
        "run.threads=1",
        f"run.dir={folder / 'run'}",
    ]
    return [*torchrun, "launch/train.py", *keys, *settings]


def run(folder, shape, ranks, settings):
    """Train, and return the lines of metrics.jsonl."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    done = subprocess.run(
        command(folder, shape, ranks, settings),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]


def scaling(folder, rounds):
    """Weak scaling: twice the ranks, twice the rows or the columns."""
    one = ["batch.sequences=8", "batch.micro=8", "batch.max_tokens=64", "run.steps=8"]
    cases = {
        "1 rank, 2 x 1 cells": (1, 2, [*one, "estimator.directions=1"]),
        "2 ranks, mesh.perturb=2, 4 x 1 cells": (
            2,
            4,
            [*one, "estimator.directions=2", "mesh.perturb=2"],
        ),
        "2 ranks, mesh.data=2, 2 x 2 cells": (
            2,
            4,
            [*one, "batch.sequences=16", "mesh.perturb=1", "mesh.data=2"],
        ),
    }
    rates = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (ranks, cells, settings) in cases.items():
            steps = run(folder, "opt-125m", ranks, settings)[2:]
            rates[name].append(cells / statistics.median(step["step_s"] for step in steps))
    base = rates[next(iter(cases))]
    print("| mesh | cells a second | over 1 rank |\n|---|---|---|")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        print(f"| {name} | {statistics.median(found):.3f} | {ratio:.2f} |")


def scalars(folder):
    print("| shape | ranks | bytes of scalars a step and rank |\n|---|---|---|")
    one = ["batch.sequences=2", "batch.micro=1", "batch.max_tokens=32", "run.steps=2"]
    for shape in SHAPES:
        found = {step["scalar_bytes"] for step in run(folder, shape, 2, one)}
        print(f"| {shape} | 2 | {', '.join(map(str, sorted(found)))} |")


def slices(folder):
    print(
        "| mesh.slice | MB read a step and rank | share | MB gathered | step, s |\n"
        "|---|---|---|---|---|"
    )
    one = [
        "batch.sequences=4",
        "batch.micro=1",
        "batch.max_tokens=32",
        "run.steps=6",
        "memory.store=host",
    ]
    whole = None
    for of in (1, 2, 4):
        steps = run(folder, "opt-125m", 4, [*one, f"mesh.slice={of}"])[2:]
        median = {
            key: statistics.median(s[key] for s in steps)
            for key in ("read_bytes", "gathered_bytes", "step_s")
        }
        whole = whole or median["read_bytes"]
        print(
            f"| {of} | {median['read_bytes'] / 1e6:.1f} | {median['read_bytes'] / whole:.3f} | "
            f"{median['gathered_bytes'] / 1e6:.1f} | {median['step_s']:.2f} |"
        )


def recovery(folder, rounds):
    """Kill rank 1 after step 5; print the seconds until each event that follows."""
    found = []
    for _ in range(rounds):
        shutil.rmtree(folder / "run", ignore_errors=True)
        settings = [
            "batch.sequences=4",
            "batch.micro=2",
            "batch.max_tokens=32",
            "run.steps=12",
            "mesh.data=1",
        ]
        process = subprocess.Popen(
            command(
                folder, "opt-125m", 2, [*settings, "memory.store=host", "mesh.slice=2"], restarts=1
            ),
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        told = {}

        def listen(stream=process.stderr, told=told):
            for line in stream:
                for word in ("died, or was not there", "parameters in", "resuming"):
                    if word in line:
                        told[word] = time.monotonic()

        threading.Thread(target=listen, daemon=True).start()
        log = folder / "run" / "steps.log"
        wait(lambda log=log: log.exists() and len(read(log)[1]) >= 5)
        victim = next(
            c
            for c in psutil.Process(process.pid).children(recursive=True)
            if c.environ().get("RANK") == "1"
        )
        os.kill(victim.pid, signal.SIGKILL)
        killed, before = time.monotonic(), len(read(log)[1])
        survivor = {c.pid for c in psutil.Process(process.pid).children(recursive=True)}
        wait(
            lambda survivor=survivor: all(
                not psutil.pid_exists(pid) or dead(pid) for pid in survivor
            )
        )
        gone = time.monotonic()
        wait(lambda log=log, before=before: len(read(log)[1]) > before)
        stepped = time.monotonic()
        process.wait()
        loaded = told["resuming"]
        found.append([gone - killed, loaded - gone, stepped - loaded, stepped - killed])
    names = ["detect, end the others", "restart, load", "replay, first step", "in all"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    print(
        "| "
        + " | ".join(f"{statistics.median(column):.1f} s" for column in zip(*found, strict=True))
        + " |"
    )


def dead(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait(until):
    while not until():
        time.sleep(0.01)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("scaling", "bytes", "slices", "recovery"))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scrap:
        folder = Path(scrap)
        if arguments.what == "scaling":
            scaling(folder, arguments.rounds)
        elif arguments.what == "bytes":
            scalars(folder)
        elif arguments.what == "slices":
            slices(folder)
        else:
            recovery(folder, arguments.rounds)


if __name__ == "__main__":
    main()
