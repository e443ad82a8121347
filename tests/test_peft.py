"""Adapters by ``peft``: they alone are trained, written and saved, and the base stays as it is."""

import copy
import sys

import pytest
import torch
import transformers as t
from conftest import make_llama
from logs import same_log
from plain import assert_refused, plain_config, run
from ranks import train
from safetensors.torch import load_file
from test_lockstep import CPU, build, forwards
from test_probes import agree, in_folds, replica_of, written
from torch import nn
from transformers import AutoModelForCausalLM

from zo import Trainer
from zo.config.schema import PeftConfig
from zo.errors import UserError
from zo.model.adapters import add_adapters, initial_adapters
from zo.model.blocks import find_layout
from zo.model.build import ModelLoader
from zo.model.form import forward_order, layer_places
from zo.run.restore import load_run
from zo.state.log import read
from zo.streaming.selfcheck import self_check

peft = pytest.importorskip("peft", reason="needs the extra peft")

RANK_ONE = ["estimator.distribution=rank-one", "batch.fold=2", "estimator.directions=2"]
PLACES = [
    ["memory.store=host", "memory.slots=2", "memory.lag=2"],
    ["memory.store=disk", "memory.lag=1"],
    ["memory.store=disk", "memory.unit=module", "memory.slots=2", "memory.lag=2"],
]


def files(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize("probes", [[], RANK_ONE], ids=["dense", "rank-one"])
@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt", "prefix"])
def test_adapters_train_in_every_store_and_load_in_peft(
    overrides, tiny_model, tmp_path, kind, probes
):
    settings = [*overrides, *probes, f"peft.type={kind}", "update.lr=1e-2", "mesh.check_every=1"]
    settings += ["batch.max_tokens=40"]
    before = files(tiny_model)
    expected = run(settings, tmp_path / "device", "export.at_end=true")
    for number, place in enumerate(PLACES):
        found = run(settings, tmp_path / str(number), *place)
        assert found["fingerprint"] == expected["fingerprint"], place
        assert same_log(tmp_path / str(number) / "steps.log", tmp_path / "device" / "steps.log")
    assert files(tiny_model) == before

    saved = tmp_path / "device" / "model"
    names = {path.name for path in saved.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert not any(name.startswith("model") for name in names)
    loaded = load_run(tmp_path / "device")
    ids = torch.randint(3, 24, (2, 9), generator=torch.Generator().manual_seed(0))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        ours = loaded.replica.plain(
            [lambda: loaded.replica.model(input_ids=ids, use_cache=False).logits], 1, 1
        )[0]
        theirs = peft.PeftModel.from_pretrained(base, saved)(input_ids=ids).logits
    loaded.replica.close()
    assert torch.equal(ours, theirs) and not torch.equal(ours[:, -9:], plain)


def test_a_step_writes_nothing_of_the_base(overrides, tmp_path):
    """A block's file holds its adapters; the frozen rest is read from the checkpoint."""
    settings = [*overrides, "peft.type=lora", "peft.rank=2", "memory.store=disk", "memory.lag=1"]
    run(settings, tmp_path / "run")
    found = {path.name: path.stat().st_size for path in (tmp_path / "run").rglob("*.block")}
    page = 4096  # Of header; the adapters of a layer, 1,280 bytes, are in the next one.
    assert found == {f"{layer:06d}.block": 2 * page for layer in (1, 2, 3)}
    again = run(settings, tmp_path / "run", "run.steps=6")
    assert again["fingerprint"] == run(settings, tmp_path / "new", "run.steps=6")["fingerprint"]


@pytest.mark.slow
def test_ranks_that_share_slices_give_the_same_bits(overrides, tmp_path):
    settings = [*overrides, *RANK_ONE, "peft.type=lora", "peft.targets=[all-linear]"]
    expected = run(settings, tmp_path / "alone")
    slices = ["memory.store=disk", "memory.lag=1", "mesh.slice=2", f"run.dir={tmp_path}/ranks"]
    assert train([*settings, *slices], ranks=2)["fingerprint"] == expected["fingerprint"]
    assert same_log(tmp_path / "ranks" / "steps.log", tmp_path / "alone" / "steps.log")


def test_random_bases_and_low_precision_are_served(overrides, tmp_path):
    settings = [*overrides, "peft.type=lora", "peft.targets=[all-linear]", "model.dtype=bfloat16"]
    settings += ["model.weights=random", "update.lr=1e-2"]
    found = [
        run(settings, tmp_path / str(number), *place)["fingerprint"]
        for number, place in enumerate(([], *PLACES[1:]))
    ]
    assert len(set(found)) == 1


def test_adapters_begin_as_peft_has_them(tiny_model):
    loader = ModelLoader(plain_config([f"model.name={tiny_model}"]).model)
    made = [initial_adapters(loader.skeleton(), PeftConfig("lora"), seed) for seed in (0, 0, 1)]
    for name, values in made[0].items():
        assert torch.equal(values, made[1][name]) and values.dtype == torch.float32
        if "lora_B" in name:
            assert not values.any()
        else:
            assert values.std() > 0.05 and not torch.equal(values, made[2][name])
    assert set(made[0]) == {
        f"model.layers.{layer}.self_attn.{module}.lora_{which}.default.weight"
        for layer in range(3)
        for module in ("q_proj", "v_proj")
        for which in "AB"
    }


@pytest.mark.parametrize("unit", ["layer", "module"])
@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_corrected_probe_of_adapters_is_the_written_one(name, kind, unit):
    """In float64, for all blocks and for a part of them."""
    settings = PeftConfig(kind)
    model, small = build(name), build(name)
    for each in (model, small):
        add_adapters(each, settings, name, None)
        for parameter in each.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    model, cells = model.double(), forwards(model)
    reference = copy.deepcopy(model)
    checked = self_check([small], cells, CPU, "rank-one", unit)
    assert checked.meet
    replica = replica_of(model, checked, unit)
    order = forward_order(find_layout(reference), reference, checked.visits)
    # A part of the top layers does not reach virtual tokens.
    parts = [0, layer_places(reference, order)[-2]] if kind in ("lora", "ia3") else [0]
    for part in parts:
        expected = written(reference, cells, order, part)
        assert agree(in_folds(replica, model, cells, part), expected)
        assert not agree(expected[:1], expected[1:2])
    replica.close()


CLASSIFIERS = {
    "score": lambda sizes: t.LlamaForSequenceClassification(t.LlamaConfig(**sizes)),
    "classifier": lambda sizes: t.RobertaForSequenceClassification(t.RobertaConfig(**sizes)),
    "pre_classifier and classifier": lambda sizes: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(
            vocab_size=24, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=66
        )
    ),
}


@pytest.mark.parametrize("head", CLASSIFIERS)
def test_a_classifier_is_adapted_with_its_head(overrides, tokenizer, tmp_path, head):
    """Of a checkpoint of the model below it, whose head is new, or of a classifier."""
    sizes = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 66}
    torch.manual_seed(0)
    base = CLASSIFIERS[head](sizes).eval()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = [*overrides, *RANK_ONE, f"model.name={tmp_path}/base", "peft.type=lora"]
    settings += ["peft.targets=[all-linear]", "update.lr=1e-2", "data.template='{text}'"]
    expected = run(settings, tmp_path / "device", "export.at_end=true")
    found = run(settings, tmp_path / "disk", *PLACES[2])
    assert found["fingerprint"] == expected["fingerprint"]
    saved = load_file(tmp_path / "device" / "model" / "adapter_model.safetensors")
    heads = [name for name in saved if "lora_" not in name]
    assert {name.split(".")[2] for name in heads} == set(head.split(" and "))
    before = base.state_dict()
    assert not any(
        torch.equal(saved[n], before[n.removeprefix("base_model.model.")]) for n in heads
    )

    loaded = load_run(tmp_path / "device")
    ids = torch.randint(3, 24, (2, 9), generator=torch.Generator().manual_seed(0))
    model = loaded.replica.model
    with torch.no_grad():
        ours = loaded.replica.plain([lambda: model(input_ids=ids).logits], 1, 1)[0]
        plain = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "device" / "model")
        assert torch.equal(ours, theirs(input_ids=ids).logits)
    loaded.replica.close()


def test_another_adapter_is_refused_for_a_run(overrides, tmp_path):
    run([*overrides, "peft.type=lora"], tmp_path / "run")
    assert read(tmp_path / "run" / "steps.log")[0]["peft"]["type"] == "lora"
    for other in (["peft.type=lora", "peft.rank=4"], []):
        with pytest.raises(UserError, match=r"holds another run: peft\.[^\n]*$"):
            run([*overrides, *other], tmp_path / "run", "run.steps=6")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["peft.type=bitfit"], r"^peft\.type='bitfit' is not known; use one of ia3, lora, prefix"),
        (["peft.rank=4"], r"^peft\.rank has no effect with peft\.type=None; set peft\.type=lora"),
        (["peft.type=ia3", "peft.alpha=4"], r"^peft\.alpha has no effect with peft\.type=ia3"),
        (["peft.type=lora", "peft.rank=0"], r"^peft\.rank=0 is out of range"),
        (["peft.type=lora", "peft.targets=[]"], r"^peft\.targets is empty"),
        (["peft.type=lora", "model.train=*norm*"], "both say what is trained; leave one"),
        (["peft.type=lora", "peft.targets=[vproj]"], r"cannot be added.*set peft\.targets"),
        (["peft.type=prompt", "model.task=sequence-classification"], "use peft.type=lora or ia3"),
        (["peft.type=lora", "peft.tokens=4"], r"^peft\.tokens has no effect with peft\.type=lora"),
        (["peft.type=prompt"], r"64 positions of .* beside peft\.tokens=20; use at most 44$"),
    ],
)
def test_what_peft_cannot_do_is_refused_in_one_line(overrides, tmp_path, extra, said):
    assert_refused(said, overrides, tmp_path / "run", *extra)


def test_a_family_that_peft_does_not_know_needs_targets(overrides, tokenizer, tmp_path):
    sizes = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
    t.BioGptForCausalLM(t.BioGptConfig(**sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = [*overrides, f"model.name={tmp_path}/base", "peft.type=lora"]
    with pytest.raises(UserError, match=r"^peft\.type=lora cannot be added[^\n]*set peft\.targets"):
        run(settings, tmp_path / "run")
    assert run(settings, tmp_path / "run", "peft.targets=[q_proj,v_proj]")["steps"] == 4


def test_without_the_package_the_extra_is_named(overrides, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs the extra peft .*pip install 'peft>="):
        run([*overrides, "peft.type=lora"], tmp_path / "run")


def test_adapters_of_a_users_own_model_are_trained_and_saved(tmp_path):
    model, ids = make_llama(), torch.randint(3, 24, (4, 9))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["v_proj"], r=2), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def objective(model, batch):
        loss = model(input_ids=batch["ids"], use_cache=False).logits.double().square().sum()
        return torch.stack((loss, torch.tensor(36.0)))

    settings = ["run.steps=3", "batch.sequences=4", "batch.micro=4", "eval.every=0"]
    own = {"model": model, "objective": objective, "batches": lambda step, column: {"ids": ids}}
    with pytest.raises(UserError, match=r"peft\.inject_adapter_in_model"):
        Trainer(plain_config([*settings, "peft.type=lora"]), **own)
    Trainer(plain_config([*settings, f"run.dir={tmp_path}/run"]), **own).train()
    after = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert after == {n for n in before if "lora_" in n}
    saved = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert len(saved) == len(after)
    assert all(name.startswith("base_model.model.model.layers.") for name in saved)
