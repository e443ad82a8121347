"""Loops of other libraries take zo's step: the same bits, resumed too, and no gradient."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from hub_stand_in import hub_in_this_process
from plain import plain_config
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaForCausalLM, TrainingArguments

from zo import Trainer
from zo.errors import UserError
from zo.integrations.optimizer import ZOOptimizer
from zo.integrations.transformers import REFUSED, ZOMixin, ZOTrainer
from zo.model.blocks import find_layout
from zo.model.layout import views
from zo.model.source import ModelSource
from zo.state.log import Log, read
from zo.state.replay import Replay


def batches_of_reviews(reviews, tokenizer, steps, columns=1, size=4):
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    texts = [f"{row['text']} it was {row['label']}" for row in rows]
    found = []
    for at in range(steps * columns):
        some = [texts[(at * size + i) % len(texts)] for i in range(size)]
        batch = dict(
            tokenizer(some, padding=True, return_tensors="pt", return_token_type_ids=False)
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        found.append({**batch, "labels": labels})
    return found


def loss_of(model, batch):
    return model(**batch, use_cache=False).loss


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one, other):
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_replays(log, base, model):
    """A log and the weights before it make the model's weights."""
    layout, source = find_layout(base), ModelSource(base)
    replay = Replay(Log(*read(log)), layout)
    for block in layout.blocks:
        image = torch.zeros(block.size_bytes, dtype=torch.uint8)
        source.read(block, layout, image)
        replay.visit(block, block.carve(image), 0)
        for part, view in views(block, block.carve(image)):
            assert torch.equal(view, model.get_parameter(part.parameter.name))


@pytest.mark.parametrize(
    ("columns", "distribution", "estimator", "directions"),
    [(1, "rademacher", "spsa", 1), (2, "gaussian", "one-sided", 3), (1, "rank-one", "spsa", 2)],
)
def test_a_loop_of_ones_own_has_the_bits_of_a_run(
    columns, distribution, estimator, directions, tmp_path, reviews, tokenizer
):
    batches = batches_of_reviews(reviews, tokenizer, 3, columns)
    model = make_llama(attention_dropout=0.5).train()
    base = weights(model)
    optimizer = ZOOptimizer(
        model,
        1e-3,
        seed=7,
        estimator=estimator,
        directions=directions,
        distribution=distribution,
        weight_decay=0.1,
        clip=2.0,
        log=tmp_path / "own.log",
    )
    for step in range(3):
        for batch in batches[step * columns : (step + 1) * columns]:
            optimizer.measure(lambda batch=batch: loss_of(model, batch))
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    _, entries = read(tmp_path / "own.log")
    assert_replays(tmp_path / "own.log", make_llama(), model)
    assert not torch.equal(base["model.norm.weight"], model.model.norm.weight)

    if distribution == "rank-one":
        return  # A run evaluates these as corrections, whose rounding differs.
    trained = make_llama()
    settings = [
        f"batch.sequences={4 * columns}",
        "batch.micro=4",
        "run.steps=3",
        "run.seed=7",
        f"estimator.name={estimator}",
        f"estimator.directions={directions}",
        f"estimator.distribution={distribution}",
        "update.lr=1e-3",
        "update.schedule=constant",
        "update.weight_decay=0.1",
        "update.clip=2.0",
        "eval.every=0",
        "export.at_end=false",
        f"run.dir={tmp_path}/run",
    ]
    Trainer(
        plain_config(settings),
        model=trained,
        objective=loss_of,
        batches=lambda step, column: batches[step * columns + column],
    ).train()
    assert [e.scalars for e in entries] == [
        e.scalars for e in read(tmp_path / "run" / "steps.log")[1]
    ]
    assert_same(weights(model), weights(trained))


def test_both_losses_of_a_pair_see_the_same_random_numbers():
    model, drawn = make_llama(), []

    def closure():
        drawn.append(torch.rand(()).item())
        return model.model.norm.weight.sum() * drawn[-1]

    optimizer = ZOOptimizer(model, 1e-3)
    for _ in range(2):
        optimizer.step(closure)
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


def partly_trained():
    model = make_llama()
    model.unused = nn.Linear(8, 8)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("model.layers.2", "unused")))
    return model


def test_weights_are_not_held_twice_and_frozen_ones_do_not_move(
    tmp_path, monkeypatch, reviews, tokenizer
):
    torch.manual_seed(0)
    model = partly_trained()
    given, base = weights(model), copy.deepcopy(model)
    before = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    alive, read_block = [], ModelSource.read

    def watch(*args):
        alive.append(sum(not of.expired() for of in before))
        read_block(*args)

    monkeypatch.setattr(ModelSource, "read", watch)
    optimizer = ZOOptimizer(model, 1e-2, log=tmp_path / "steps.log")
    monkeypatch.undo()
    # A block's memory goes when it has been copied.
    assert alive[0] == len(before)
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] < len(before) / 2
    assert all(of.expired() for of in before)

    (batch,) = batches_of_reviews(reviews, tokenizer, 1)
    optimizer.step(lambda: loss_of(model, batch))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, given[name]) != parameter.requires_grad
    assert_replays(tmp_path / "steps.log", base, model)


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**settings | changes)


def rows_of_reviews(reviews, tokenizer):
    (batch,) = batches_of_reviews(reviews, tokenizer, 1, size=32)
    return [{key: value[i] for key, value in batch.items()} for i in range(32)]


def refuse_training_mode(model):
    def check(*_):
        assert not any(module.training for module in model.modules())

    model.model.register_forward_pre_hook(check)


def trained(folder, rows, resume=None, **changes):
    model = make_llama(attention_dropout=0.5)
    refuse_training_mode(model)
    trainer = ZOTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=rows,
        eval_dataset=rows[:8],
        zo={"log": folder / "steps.log"},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_transformers_trainer_keeps_all_but_the_step(tmp_path, reviews, tokenizer):
    rows = rows_of_reviews(reviews, tokenizer)
    whole = trained(tmp_path / "whole", rows)
    history = whole.state.log_history
    assert len([line for line in history if "loss" in line]) == 6
    assert len([line for line in history if "eval_loss" in line]) == 2
    assert not any("grad_norm" in line for line in history)
    assert all(p.grad is None for p in whole.model.parameters())
    header, entries = read(tmp_path / "whole" / "steps.log")
    assert [e.lr for e in entries] == pytest.approx([1e-3 * (6 - s) / 6 for s in range(6)])

    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "optimizer.pt").stat().st_size < 8192
    resumed = trained(tmp_path / "again", rows, resume=str(checkpoint))
    assert_same(weights(whole.model), weights(resumed.model))
    assert read(tmp_path / "again" / "steps.log") == (header, entries)
    # In the same folder the log goes on where the checkpoint is.
    trained(tmp_path / "whole", rows, resume=str(checkpoint))
    assert read(tmp_path / "whole" / "steps.log") == (header, entries)
    with pytest.raises(UserError, match="holds the log of another run"):
        trained(tmp_path / "whole", rows)


def test_a_trainer_pushes_its_model_to_the_hub(tmp_path, reviews, tokenizer, monkeypatch):
    with hub_in_this_process(monkeypatch) as hub:
        trainer = trained(
            tmp_path / "run",
            rows_of_reviews(reviews, tokenizer),
            max_steps=1,
            push_to_hub=True,
            hub_model_id="ann/tuned",
            hub_private_repo=True,
        )
        trainer.push_to_hub()
        pushed = hub.repos["ann/tuned"]
        (tmp_path / "model.safetensors").write_bytes(pushed.files["model.safetensors"])
    assert pushed.private and {"README.md", "config.json"} <= set(pushed.files)
    assert_same(weights(trainer.model), load_file(tmp_path / "model.safetensors"))


def test_accumulated_micro_batches_are_columns_of_one_step(tmp_path, reviews, tokenizer):
    rows = rows_of_reviews(reviews, tokenizer)
    one = trained(tmp_path / "one", rows, max_steps=2)
    two = trained(
        tmp_path / "two",
        rows,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    for name in ("one", "two"):
        assert len(read(tmp_path / name / "steps.log")[1]) == 2
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (one, two)]
    # The same mean over tokens, summed in another order.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.5},
        {"optim": "sgd"},
        {"neftune_noise_alpha": 5.0},
        {"bf16": True},
        {"torch_compile": True},
        {"adam_beta1": 0.8},
        {"auto_find_batch_size": True},
    ],
)
def test_an_argument_without_a_meaning_is_refused_in_a_line(wrong, tmp_path):
    (name,) = wrong
    with pytest.raises(UserError, match=f"^{name}=") as error:
        ZOTrainer(model=nn.Linear(1, 1), args=arguments(tmp_path, eval_strategy="no", **wrong))
    assert "\n" not in str(error.value)


def test_every_argument_that_is_refused_is_one_of_transformers_or_trl():
    known = set(TrainingArguments.__dataclass_fields__)
    assert set(REFUSED) - known <= {"activation_offloading"}


def test_the_example_of_the_readme_trains(tmp_path, monkeypatch, tiny_model, reviews):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    section = text.split("## Inside a transformers Trainer")[1].split("\n## ")[0]
    code = section.split("```python\n")[1].split("```")[0]
    for given, here in (
        ("HuggingFaceTB/SmolLM2-135M", str(tiny_model)),
        ("reviews.jsonl", str(reviews)),
        ("max_steps=200", "max_steps=2, use_cpu=True, report_to='none'"),
    ):
        assert given in code
        code = code.replace(given, here)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert len(read(tmp_path / "tuned" / "steps.log")[1]) == 2
    assert (tmp_path / "tuned" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["SFT", "SFT with LoRA", "DPO"])
def test_a_trl_trainer_takes_the_mixin(kind, tmp_path, tiny_model, reviews, tokenizer):
    trl = pytest.importorskip("trl", reason="the extra trl is not installed")
    from datasets import Dataset
    from peft import LoraConfig

    rows = [json.loads(line) for line in reviews.read_text().splitlines()][:16]
    other = {"great": " terrible", "terrible": " great"}
    prompts = [{"prompt": f"{row['text']} it was"} for row in rows]
    if kind == "DPO":
        base, config = trl.DPOTrainer, trl.DPOConfig
        answers = [{"chosen": f" {r['label']}", "rejected": other[r["label"]]} for r in rows]
    else:
        base, config = trl.SFTTrainer, trl.SFTConfig
        answers = [{"completion": f" {row['label']}"} for row in rows]
    lora = {"peft_config": LoraConfig(target_modules=["q_proj"])} if "LoRA" in kind else {}
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": 1,
        "disable_tqdm": True,
    }

    def train(**options):
        model = LlamaForCausalLM.from_pretrained(tiny_model)
        refuse_training_mode(model)
        trainer = type("Trainer", (ZOMixin, base), {})(
            model=model,
            args=config(**settings),
            train_dataset=Dataset.from_list(
                [prompt | answer for prompt, answer in zip(prompts, answers, strict=True)]
            ),
            processing_class=tokenizer,
            zo={"directions": 2},
            **lora,
        )
        before = weights(trainer.model)
        trainer.train(**options)
        return before, trainer

    before, first = train()
    for name, parameter in first.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]) != parameter.requires_grad
    lines = [line for line in first.state.log_history if "loss" in line]
    assert len(lines) == 2
    assert all(("rewards/margins" if kind == "DPO" else "entropy") in line for line in lines)
    _, again = train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(weights(first.model), weights(again.model))
