"""Time of a training step as ``launch/train.py`` reports it, over two bare forwards in other
processes.

    python benchmarks/step_s.py [--shapes 1x32,8x64,1x512] [--dtype float32] [--rounds 3]
        [--distribution rank-one] [--directions 16] [--interleaved]

OPT-125M's shape with random weights and random tokens. A round is a process of bare forwards, a run
of ``launch/train.py`` with ``run.steps=7``, and bare forwards once more; the run's figure is the
median of ``step_s`` in ``metrics.jsonl`` after the second step, the forwards' the median of both
processes. There are two forwards a direction, one after the other; ``stacked`` is the same rows in
one call. Prints one JSON object a shape.

With ``--interleaved`` a round is a process that trains and runs the bare forwards after every step,
so that both meet the same noise.
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

INTERLEAVED = """
import json, sys, time
code, sizes, keys = sys.argv[1], sys.argv[2:7], sys.argv[7:]
sys.argv = ["bare", *sizes]
scope = {}
exec(code, scope)
from zo import Trainer, load_config
from zo.run.trainer import Run
times, step = [], Run.step

def step_and_forwards(run, *arguments):
    begun = time.perf_counter()
    result = step(run, *arguments)
    taken = time.perf_counter() - begun
    times.append((taken, scope["seconds"](scope["probes"]), scope["seconds"](1)))
    return result

Run.step = step_and_forwards
Trainer(load_config(keys[0].removeprefix("recipe="), keys[1:])).train()
print(json.dumps(times[2:]))
"""


def interleaved(sizes, keys):
    """Return seconds of (step, forwards, stacked forward) in turn, in one process."""
    code = BARE.split("with torch.no_grad")[0]
    command = [sys.executable, "-c", INTERLEAVED, code, *map(str, sizes), *keys]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def bare(*sizes):
    command = [sys.executable, "-c", BARE, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def keys_of(folder, dtype, sequences, tokens, probes, distribution, steps, run):
    return [
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
        f"run.steps={steps}",
        f"run.dir={run}",
    ]


def step_s(*sizes, run):
    keys = keys_of(*sizes, 7, run)
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
    parser.add_argument("--interleaved", action="store_true")
    arguments = parser.parse_args()
    for shape in arguments.shapes.split(","):
        sequences, tokens = map(int, shape.split("x"))
        rounds = []
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "model"
                OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(folder)
                sizes = (folder, arguments.dtype, sequences, tokens, 2 * arguments.directions)
                run = Path(scratch) / "run"
                if arguments.interleaved:
                    keys = keys_of(*sizes, arguments.distribution, 14, run)
                    rounds += interleaved(sizes, keys)
                    continue
                before = bare(*sizes)
                step = statistics.median(step_s(*sizes, arguments.distribution, run=run))
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
