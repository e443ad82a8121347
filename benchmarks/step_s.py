"""Time of a training step as ``launch/train.py`` reports it, over two bare forwards in other
processes.

    python benchmarks/step_s.py [--shapes 1x32,8x64,1x512] [--dtype float32] [--rounds 3]
        [--distribution rank-one] [--directions 16]

OPT-125M's shape with random weights and random tokens. A round is a process of bare forwards, a run
of ``launch/train.py`` with ``run.steps=7``, and bare forwards once more; the run's figure is the
median of ``step_s`` in ``metrics.jsonl`` after the second step, the forwards' the median of both
processes. There are two forwards a direction, one after the other; ``stacked`` is the same rows in
one call. Prints one JSON object a shape.
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
folder, dtype = sys.argv[1:3]
sequences, tokens, probes = map(int, sys.argv[3:])
config = AutoConfig.from_pretrained(folder)
model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
ids = torch.randint(3, config.vocab_size, (probes * sequences, tokens))

def seconds(count):
    begun = time.perf_counter()
    for some in ids.chunk(count):
        out = model(input_ids=some, attention_mask=torch.ones_like(some), use_cache=False)
        logits = out.logits[:, :-1].float()
        flat = logits.reshape(-1, logits.shape[-1])
        torch.nn.functional.cross_entropy(flat, some[:, 1:].reshape(-1), reduction="sum").item()
    return time.perf_counter() - begun

with torch.no_grad():
    times = [(seconds(probes), seconds(1)) for _ in range(7)]
print(json.dumps(times[2:]))
"""


def bare(*sizes):
    command = [sys.executable, "-c", BARE, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def step_s(folder, dtype, sequences, tokens, probes, distribution, run):
    keys = [
        "recipe=opt-125m",
        f"model.name={folder}",
        "model.weights=random",
        f"model.dtype={dtype}",
        "data.name=synthetic",
        "data.dev=null",
        "data.template=null",
        "data.label_words=null",
        f"estimator.distribution={distribution}",
        f"estimator.directions={probes // 2}",
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
    parser.add_argument("--distribution", default="rademacher")
    parser.add_argument("--directions", type=int, default=1)
    arguments = parser.parse_args()
    for shape in arguments.shapes.split(","):
        sequences, tokens = map(int, shape.split("x"))
        rounds = []
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "model"
                OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(folder)
                sizes = (folder, arguments.dtype, sequences, tokens, 2 * arguments.directions)
                before = bare(*sizes)
                run = Path(scratch) / "run"
                step = statistics.median(step_s(*sizes, arguments.distribution, run))
                apart, stacked = map(statistics.median, zip(*before, *bare(*sizes), strict=True))
            rounds.append((step, apart, stacked))
        step, apart, stacked = (statistics.median(column) for column in zip(*rounds, strict=True))
        found = {
            "shape": shape,
            "dtype": arguments.dtype,
            "distribution": arguments.distribution,
            "directions": arguments.directions,
            "forwards_s": round(apart, 4),
            "stacked_s": round(stacked, 4),
            "step_s": round(step, 4),
            "over_forwards": [round(s / a, 3) for s, a, _ in rounds],
            "over_stacked": [round(s / t, 3) for s, _, t in rounds],
            "median_over_forwards": round(statistics.median(s / a for s, a, _ in rounds), 3),
            "median_over_stacked": round(statistics.median(s / t for s, _, t in rounds), 3),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
