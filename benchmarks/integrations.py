"""zo's step inside other libraries' loops, on the quickstart's model and data.

    python benchmarks/integrations.py [--steps 20] [--only NAME ...]

Each loop trains SmolLM2-135M-Instruct on movie reviews with MeZO's settings (one dense direction,
16 sequences a step) on the label word alone, and the loss and accuracy of that word are computed on
held-out reviews before and after. One JSON line each. Needs the extra trl.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import cache

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from zo.integrations.optimizer import ZOOptimizer
from zo.integrations.transformers import ZOMixin, ZOTrainer
from zo.io.quickstart import model_folder, movie_reviews

FOLDER = model_folder("smollm2-135m-instruct")
WORDS = (" negative", " positive")
BATCH, HELD_OUT, LONGEST = 16, 128, 100
ZO = {"eps": 1e-3, "directions": 1, "distribution": "gaussian"}
RATE = 1e-5


@cache
def rows():
    """Return prompts and answers, as many of each class; the first are held out."""
    short = [row for row in movie_reviews() if len(row["text"]) <= LONGEST]
    classes = [[row for row in short if row["label"] == label] for label in (0, 1)]
    return [
        {"prompt": f"Review: {row['text']}\nSentiment:", "completion": WORDS[row["label"]]}
        for pair in zip(*classes, strict=False)
        for row in pair
    ]


def tokens(tokenizer, row):
    prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
    ids = prompt + answer
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [-100] * len(prompt) + answer,
    }


def collate(tokenizer):
    return transformers.DataCollatorForSeq2Seq(tokenizer)


@torch.no_grad()
def score(model, tokenizer):
    """Return the accuracy and the loss of the label word on held-out reviews."""
    words = [tokenizer(word)["input_ids"][0] for word in WORDS]
    hits, losses = [], []
    for row in rows()[:HELD_OUT]:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        logits = model(ids).logits[0, -1].float().log_softmax(-1)
        right = WORDS.index(row["completion"])
        hits.append(int(logits[words].argmax()) == right)
        losses.append(-float(logits[words[right]]))
    return {"accuracy": statistics.mean(hits), "loss": statistics.mean(losses)}


def settings(steps, folder):
    return {
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": BATCH,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def by_loop(model, tokenizer, steps, folder):
    """A loop of one's own over ``step(closure)``."""
    optimizer, padded = ZOOptimizer(model, RATE, **ZO), collate(tokenizer)
    train = rows()[HELD_OUT:]
    for step in range(steps):
        some = train[step * BATCH : (step + 1) * BATCH]
        batch = padded([tokens(tokenizer, row) for row in some])
        optimizer.step(lambda batch=batch: model(**batch).loss)


def by_trainer(model, tokenizer, steps, folder):
    """``transformers.Trainer``."""
    args = transformers.TrainingArguments(**settings(steps, folder))
    train = [tokens(tokenizer, row) for row in rows()[HELD_OUT:]]
    ZOTrainer(model, args, train_dataset=train, data_collator=collate(tokenizer), zo=ZO).train()


def by_trl(model, tokenizer, steps, folder, base, config, train):
    plain = {"bf16": False, "gradient_checkpointing": False}
    args = config(**settings(steps, folder), **plain)
    made = type("Trainer", (ZOMixin, base), {})
    made(
        model, args=args, train_dataset=Dataset.from_list(train), processing_class=tokenizer, zo=ZO
    ).train()


def by_sft(model, tokenizer, steps, folder):
    """``trl.SFTTrainer`` on prompts and completions."""
    by_trl(model, tokenizer, steps, folder, trl.SFTTrainer, trl.SFTConfig, rows()[HELD_OUT:])


def by_dpo(model, tokenizer, steps, folder):
    """``trl.DPOTrainer`` on the right word against the other."""
    other = dict(zip(WORDS, WORDS[::-1], strict=True))
    train = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": other[r["completion"]]}
        for r in rows()[HELD_OUT:]
    ]
    by_trl(model, tokenizer, steps, folder, trl.DPOTrainer, trl.DPOConfig, train)


LOOPS = {
    "ZOOptimizer": by_loop,
    "ZOTrainer": by_trainer,
    "trl.SFTTrainer": by_sft,
    "trl.DPOTrainer": by_dpo,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=list(LOOPS), choices=LOOPS)
    asked = parser.parse_args()
    for name in asked.only:
        tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
        before, begun = score(model, tokenizer), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            LOOPS[name](model, tokenizer, asked.steps, folder)
        seconds = time.monotonic() - begun
        found = {"steps": asked.steps, "seconds": round(seconds, 1), "before": before}
        print(json.dumps({"loop": name, **found, "after": score(model, tokenizer)}), flush=True)


if __name__ == "__main__":
    main()
