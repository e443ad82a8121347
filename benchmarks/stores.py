"""Step time and memory of a run by store, unit, lag and disk engine, each in its own process.

    python benchmarks/stores.py --shape opt-1.3b --tokens 512 \\
        --settings "store=device" "store=disk unit=module lag=4"

The model has the shape of the recipe's and random weights in bfloat16; a setting is a list of keys,
of ``memory`` where they name no other group. Prints for each:

- peak resident memory of the process;
- over the second half of the steps, when all blocks have been written before: medians of step time,
  bytes read and the share of time that the compute waited, and the mean of bytes written;
- of the last step, from its timeline: seconds of reading, of replay and perturbation, of forwards.

``cold`` among a setting's words drops the page cache before every step.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from transformers import OPTConfig

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-13b": (5120, 40, 40),
}
"""Width, layers, heads."""


def drop_caches():
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def seconds_of_tracks(trace):
    events = json.loads(trace.read_text())["traceEvents"]
    tracks = {
        event["tid"]: event["args"]["name"].split()[0] for event in events if event["ph"] == "M"
    }
    seconds = dict.fromkeys(("read", "replay+perturb", "forward", "write-back"), 0.0)
    for event in events:
        if event["ph"] == "X" and tracks[event["tid"]] in seconds:
            seconds[tracks[event["tid"]]] += event["dur"] / 1e6
    return {f"{track}_s": round(value, 3) for track, value in seconds.items()}


def run(shape, tokens, steps, setting, folder):
    words = setting.split()
    cold = "cold" in words
    config = folder / shape
    width, layers, heads = SHAPES[shape]
    sizes = {"hidden_size": width, "ffn_dim": 4 * width, "word_embed_proj_dim": width}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
    OPTConfig(**sizes, architectures=["OPTForCausalLM"]).save_pretrained(config)
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    keys = {
        "recipe": "opt-1.3b",
        "model.name": config,
        "model.weights": "random",
        "model.dtype": "bfloat16",
        "data.name": "synthetic",
        "data.dev": "null",
        "batch.sequences": 1,
        "batch.micro": 1,
        "batch.max_tokens": tokens,
        "estimator.distribution": "rademacher",
        "run.steps": steps,
        "run.dir": run_dir,
        "run.snapshot_every": 0,
        "eval.every": 0,
        "export.at_end": "false",
        "profile.steps": f"{steps}..{steps}",
    }
    chosen = (word.partition("=") for word in words if "=" in word)
    keys |= {key if "." in key else f"memory.{key}": value for key, _, value in chosen}
    command = [sys.executable, "launch/train.py", *(f"{key}={keys[key]}" for key in keys)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    done = threading.Event()
    if cold:
        metrics = run_dir / "metrics.jsonl"

        def chill():
            seen = -1
            while not done.is_set():
                size = metrics.stat().st_size if metrics.exists() else 0
                if size != seen:
                    drop_caches()
                    seen = size
                time.sleep(0.02)

        threading.Thread(target=chill, daemon=True).start()
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    done.set()
    if status:
        raise SystemExit(err)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][
        steps // 2 :
    ]
    median = lambda key: statistics.median(line[key] for line in lines)  # noqa: E731
    tracks = seconds_of_tracks(run_dir / "timeline.json")
    return {
        "shape": shape,
        "tokens": tokens,
        "setting": setting,
        "peak_rss_mb": round(usage.ru_maxrss * 1024 / 1e6),
        "step_s": round(median("step_s"), 3),
        "read_mb": round(median("read_bytes") / 1e6),
        "written_mb_mean": round(statistics.mean(line["written_bytes"] for line in lines) / 1e6),
        "wait_share": round(median("wait_share"), 3),
        "last_step_s": round(lines[-1]["step_s"], 3),
        **tracks,
        "train_s": json.loads(out.splitlines()[-1])["train_s"],
        "fingerprint": json.loads(out.splitlines()[-1])["fingerprint"][:12],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="opt-1.3b", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--settings", nargs="+", required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        for _ in range(arguments.rounds):
            for setting in arguments.settings:
                result = run(
                    arguments.shape, arguments.tokens, arguments.steps, setting, Path(folder)
                )
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
