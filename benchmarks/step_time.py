"""Time of a training step against a plain MeZO step and against two bare forwards, in one process.

    python benchmarks/step_time.py [--shapes 1x32,8x64] [--dtypes float32,bfloat16] [--rounds 7]

The model has the shape of OPT-125M and random weights. Each round times the three in turn; medians
of times and of the ratios within a round are printed as JSON lines.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import OPTConfig, OPTForCausalLM

from zo.config.schema import MemoryConfig
from zo.method import estimator
from zo.method.entry import Entry
from zo.method.table import LossTable
from zo.model.blocks import find_layout
from zo.model.source import ModelSource
from zo.state.log import Log
from zo.streaming.replica import Replica

EPS, LR = 1e-3, 1e-6


def loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)
    )


class Mezo:
    """The step of the paper's code: one seed, four passes of normal, multiply, add."""

    def __init__(self, model):
        self.model, self.step_number = model, 0

    def perturb(self, scale):
        torch.manual_seed(self.step_number)
        for parameter in self.model.parameters():
            z = torch.normal(0, 1, size=parameter.shape, dtype=parameter.dtype)
            parameter.data = parameter.data + scale * z * EPS

    def step(self, ids):
        self.step_number += 1
        self.perturb(1)
        plus = loss(self.model, ids)
        self.perturb(-2)
        minus = loss(self.model, ids)
        self.perturb(1)
        g = ((plus - minus) / (2 * EPS)).item()
        torch.manual_seed(self.step_number)
        for parameter in self.model.parameters():
            z = torch.normal(0, 1, size=parameter.shape, dtype=parameter.dtype)
            parameter.data = parameter.data - LR * g * z


class Zo:
    """This project's step, from the parts that the trainer uses."""

    def __init__(self, model, distribution):
        header = {
            "directions": 1,
            "seed": 1,
            "distribution": distribution,
            "rule": "sgd",
            "weight_decay": 0.0,
        }
        self.model, self.log, self.layout = model, Log(header), find_layout(model)
        source = ModelSource(model)
        cpu = torch.device("cpu")
        self.replica = Replica(
            model, self.layout, lambda engine: source, MemoryConfig(), cpu, Path()
        )
        self.replica.open(self.log)

    def step(self, ids):
        number = self.log.version + 1
        table = LossTable(estimator.probes("spsa", number, 1, EPS), columns=1)
        losses = self.replica.table(table.probes, [0, 1], [lambda: loss(self.model, ids)] * 2)
        values = torch.tensor(
            [[value.item(), 1, ids.numel()] for value in losses], dtype=torch.float64
        )
        scalars, _ = estimator.estimate("spsa", table.fill(values), EPS)
        self.log.append(Entry(number, number, LR, scalars))


def forwards(model, ids):
    return loss(model, ids), loss(model, ids)


def measure(shape, dtype, distribution, rounds):
    config = OPTConfig()  # its defaults are OPT-125M's sizes
    torch.manual_seed(0)
    plain, mezo_model, zo_model = (OPTForCausalLM(config).to(dtype).eval() for _ in range(3))
    sequences, tokens = map(int, shape.split("x"))
    ids = torch.randint(4, config.vocab_size, (sequences, tokens))
    mezo, zo = Mezo(mezo_model), Zo(zo_model, distribution)
    runs = {
        "forwards": lambda: forwards(plain, ids),
        "mezo": lambda: mezo.step(ids),
        "zo": lambda: zo.step(ids),
    }
    times = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:  # the first round compiles and warms
                times[name].append(time.perf_counter() - start)
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))  # noqa: E731
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "distribution": distribution,
        **{f"{name}_s": round(statistics.median(values), 4) for name, values in times.items()},
        "mezo_over_zo": round(ratio("mezo", "zo"), 2),
        "zo_over_forwards": round(ratio("zo", "forwards"), 3),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="1x32,8x64,1x512")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--distributions", default="rademacher,gaussian")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({"cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions}))
    with torch.no_grad():
        for dtype in arguments.dtypes.split(","):
            for distribution in arguments.distributions.split(","):
                for shape in arguments.shapes.split(","):
                    print(
                        json.dumps(
                            measure(shape, getattr(torch, dtype), distribution, arguments.rounds)
                        ),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
