"""Time of a training step as ``launch/train.py`` reports it, over two bare forwards in other
processes.

    python benchmarks/step_s.py [--shapes 1x32,8x64,1x512] [--dtype float32] [--rounds 3]

OPT-125M's shape with random weights and random tokens. A round is a process of bare forwards, a run
of ``launch/train.py`` with ``run.steps=7``, and bare forwards once more; the run's figure is the
median of ``step_s`` in ``metrics.jsonl`` after the second step, the forwards' the median of both
processes. Prints one JSON object a shape.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import OPTConfig

ROOT = Path(__file__).resolve().parent.parent
BARE = """
import json, statistics, sys, time, torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
folder, dtype, sequences, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = AutoConfig.from_pretrained(folder)
model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
ids = torch.randint(3, config.vocab_size, (sequences, tokens))
mask, times = torch.ones_like(ids), []
with torch.no_grad():
    for _ in range(9):
        begun = time.perf_counter()
        for _ in range(2):
            out = model(input_ids=ids, attention_mask=mask, use_cache=False)
            logits = out.logits[:, :-1].float()
            flat = logits.reshape(-1, logits.shape[-1])
            torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="sum").item()
        times.append(time.perf_counter() - begun)
print(json.dumps(times[2:]))
"""


def bare(folder, dtype, sequences, tokens):
    command = [sys.executable, "-c", BARE, str(folder), dtype, str(sequences), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def step_s(folder, dtype, sequences, tokens, run):
    keys = [
        "recipe=opt-125m",
        f"model.name={folder}",
        "model.weights=random",
        f"model.dtype={dtype}",
        "data.name=synthetic",
        "data.dev=null",
        "data.template=null",
        "data.label_words=null",
        "estimator.distribution=rademacher",
        f"batch.sequences={sequences}",
        f"batch.micro={sequences}",
        f"batch.max_tokens={tokens}",
        "eval.every=0",
        "export.at_end=false",
        "run.snapshot_every=0",
        "run.steps=7",
        f"run.dir={run}",
    ]
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *keys]
    subprocess.run(command, capture_output=True, text=True, check=True)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step_s"] for line in lines if line.get("step", 0) > 2 and "step_s" in line]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="1x32,8x64,1x512")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for shape in arguments.shapes.split(","):
        sequences, tokens = map(int, shape.split("x"))
        ratios, forwards, steps = [], [], []
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "model"
                OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(folder)
                sizes = (folder, arguments.dtype, sequences, tokens)
                before = bare(*sizes)
                step = statistics.median(step_s(*sizes, Path(scratch) / "run"))
                both = statistics.median([*before, *bare(*sizes)])
            forwards.append(both)
            steps.append(step)
            ratios.append(step / both)
        found = {
            "shape": shape,
            "dtype": arguments.dtype,
            "two_forwards_s": round(statistics.median(forwards), 4),
            "step_s": round(statistics.median(steps), 4),
            "ratios": [round(r, 3) for r in ratios],
            "median_ratio": round(statistics.median(ratios), 3),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
