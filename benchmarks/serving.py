"""Completions and rewards of a run's held-out prompts by vLLM that follows it, and by zo itself.

    python benchmarks/serving.py RUN [--probes 2] [--compiled]

RUN is the folder of a run with a reward (recipe=countdown-smollm2-135m); the environment is that of
vLLM. Of the base, of the last version, of probes of the next step, and of the last version again,
greedy completions are written by both. Prints a Markdown table: rewards, and how many rewards and
completions are the same.
"""

import argparse
import operator
import time
from functools import cache
from pathlib import Path

import torch

from zo.data.tasks import Example
from zo.integrations.vllm import complete, follow, probing, reward
from zo.method.estimator import probes
from zo.model.generate import generate, trim
from zo.run.restore import load_run
from zo.run.rewarded import load
from zo.streaming.streamer import UNPERTURBED

FOLLOWER = "zo.integrations.vllm.Follower"


def prompts(batches):
    """The rows of batches that are padded on the left."""
    return [
        Example(tuple(ids[mask.bool()].tolist()), int(number))
        for batch in batches
        for ids, mask, number in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]


class Own:
    """A version of a run, generating by itself."""

    def __init__(self, run, step):
        self.run = load_run(run, step=step)
        self.batches = self.run.problem.dev_batches
        self.rewards = load(self.run.problem.task)

    @cache  # noqa: B019
    @torch.no_grad()
    def complete(self, probe=UNPERTURBED):
        """Tokens of each completion."""
        replica, decoding = self.run.replica, self.rewards.decoding

        def compute(cells):
            (cell,) = cells
            written = generate(replica.model, self.batches[cell], decoding).tolist()
            return [[trim(tokens, decoding.end) for tokens in written]]

        count = len(self.batches)
        alone = [[cell] for cell in range(count)]
        found = replica.whole([probe], [0] * count, alone, 0, compute)
        return [tokens for some in found for tokens in some]


def timed(function, *arguments):
    begun = time.perf_counter()
    return function(*arguments), time.perf_counter() - begun


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--probes", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the model")
    given = parser.parse_args()
    import vllm

    base, last = Own(given.run, 0), Own(given.run, None)
    config, log = last.run.config, last.run.replica.log
    rows = probes(
        config.estimator.name, log.version + 1, log.header["directions"], config.estimator.eps
    )[: given.probes]
    llm = vllm.LLM(
        base.run.problem.tokenizer.name_or_path,
        dtype=config.model.dtype,
        max_model_len=config.batch.max_tokens + config.generation.max_new_tokens,
        max_num_seqs=16,
        enforce_eager=not given.compiled,
        worker_extension_cls=FOLLOWER,
    )
    examples, rewards = prompts(last.batches), last.rewards

    def compare(name, own, given_s, probe=UNPERTURBED):
        expected, own_s = timed(own.complete, probe)
        found, engine_s = timed(complete, llm, rewards.decoding, examples)
        ours, theirs = (reward(rewards, examples, some) for some in (expected, found))
        same = [sum(map(operator.eq, *pair)) for pair in ((ours, theirs), (expected, found))]
        print(
            f"| {name} | {sum(ours) / len(ours):.4f} | {sum(theirs) / len(theirs):.4f} | "
            f"{same[0]} of {len(ours)} | {same[1]} of {len(ours)} | {given_s:.1f} | "
            f"{engine_s:.1f} | {own_s:.1f} |",
            flush=True,
        )
        return found

    print(
        "| weights | mean reward, zo | vLLM | same rewards | same completions | s to hand over "
        "| s to write, vLLM | zo |"
    )
    print("|---|---|---|---|---|---|---|---|")
    compare("the engine's own", base, 0.0)
    told, seconds = timed(follow, llm, given.run, 0)
    assert told["fingerprint"] == log.header["base"], told
    compare("version 0", base, seconds)
    told, seconds = timed(follow, llm, given.run)
    assert told["fingerprint"] == last.run.replica.fingerprint(), told
    before = compare(f"version {told['version']}", last, seconds)
    for probe in rows:
        begun = time.perf_counter()
        with probing(llm, probe):
            seconds = time.perf_counter() - begun
            compare(f"its probe {probe.direction}, {probe.scale:+g}", last, seconds, probe)
    after = compare(f"version {told['version']} again", last, 0.0)
    print(f"\nbefore and after the probes: {'the same' if before == after else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
