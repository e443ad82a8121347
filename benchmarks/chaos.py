"""Runs of a tiny model under torchrun, each with a kill -9 of a random rank at a random moment.

    python benchmarks/chaos.py --runs 30

Each must end with the fingerprint of an uninterrupted run. Prints a Markdown table, a line a run.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import fates
from conftest import make_llama, make_tokenizer
from ranks import train


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scrap:
        folder = Path(scrap)
        make_llama().save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
        settings = [
            f"model.name={folder}/model",
            "data.name=synthetic",
            "data.dev=null",
            "batch.max_tokens=16",
        ]
        settings += [
            "batch.sequences=4",
            "batch.micro=2",
            "update.lr=1e-3",
            "update.schedule=constant",
        ]
        settings += [
            "update.warmup_steps=0",
            "model.dtype=bfloat16",
            "eval.every=0",
            "export.at_end=false",
        ]
        settings += ["data.template=null", "data.label_words=null"]
        expected = train([*settings, f"run.steps={fates.STEPS}", f"run.dir={folder}/alone"])[
            "fingerprint"
        ]
        same = 0
        print(
            "| run | killed | of ranks | store, slices | when | same bits | s |\n"
            "|---|---|---|---|---|---|---|"
        )
        for seed in range(arguments.first, arguments.first + arguments.runs):
            begun = time.monotonic()
            drawn, summary, restarted = fates.run(settings, folder / f"run{seed}", seed)
            good = summary["fingerprint"] == expected and restarted
            same += good
            when = (
                f"at step {drawn['step']}"
                if drawn["moment"] == "any"
                else f"{drawn['moment']} no. {drawn['step']}"
            )
            print(
                f"| {seed} | {drawn['rank']} | {drawn['ranks']} | "
                f"{drawn['store']}, {drawn['slices']} | {when} | "
                f"{'yes' if good else 'NO'} | {time.monotonic() - begun:.0f} |",
                flush=True,
            )
        print(f"\n{same} of {arguments.runs} end with the uninterrupted fingerprint")


if __name__ == "__main__":
    main()
