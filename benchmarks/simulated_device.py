"""The pipeline of a GPU on the simulated device, over many seeds.

    python benchmarks/simulated_device.py [--seeds 1000]

Each seed is a run of a tiny Llama with another store, unit, number of slots and lag; it must end
without a race and with the fingerprint of store ``device``. Prints one JSON object.
"""

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from conftest import make_llama, make_tokenizer
from simulated_device import simulated

from zo import Trainer, load_config

SETTINGS = list(itertools.product(("host", "disk"), ("layer", "module"), (2, 3, 6), (1, 2, 4)))
"""Store, unit, slots, lag."""


def run(folder, model, data, *memory):
    settings = [
        f"model.name={model}",
        "model.dtype=bfloat16",
        f"data.name={data}",
        "batch.sequences=4",
        "batch.micro=2",
        "batch.max_tokens=64",
        "update.lr=1e-3",
        "update.weight_decay=0.1",
        "run.steps=4",
        "mesh.check_every=2",
        "eval.every=0",
        "export.at_end=false",
        f"run.dir={folder}",
    ]
    with contextlib.redirect_stderr(io.StringIO()):
        return Trainer(load_config("quickstart", [*settings, *memory])).train()["fingerprint"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    seeds, begun, copies, accesses = parser.parse_args().seeds, time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        model, data = Path(scratch) / "model", Path(scratch) / "text.jsonl"
        make_llama().save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        words = [
            "the",
            "film",
            "was",
            "a",
            "bad",
            "good",
            "great",
            "terrible",
            "dull",
            "bright",
            "long",
            "short",
            "it",
            "story",
        ]
        texts = [" ".join(words[i % 7 : i % 7 + 4 + i % 3]) for i in range(40)]
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        expected = run(Path(scratch) / "device", model, data)
        for seed in range(seeds):
            store, unit, slots, lag = SETTINGS[seed % len(SETTINGS)]
            memory = [
                f"memory.store={store}",
                f"memory.unit={unit}",
                f"memory.slots={slots}",
                f"memory.lag={lag}",
            ]
            with simulated(seed) as made, tempfile.TemporaryDirectory() as folder:
                found = run(Path(folder) / "run", model, data, *memory)
            assert found == expected, (seed, memory)
            copies += sum(device.counts["copies"] for device in made)
            accesses += sum(device.counts["accesses"] for device in made)
    seconds = round(time.monotonic() - begun, 1)
    print(
        json.dumps(
            {"seeds": seeds, "races": 0, "copies": copies, "accesses": accesses, "seconds": seconds}
        )
    )


if __name__ == "__main__":
    main()
