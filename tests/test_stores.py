"""Law 1 across stores, units, slots, lag and ranks."""

import json

import pytest
import torch
from conftest import make_llama, make_tokenizer
from logs import same_log
from plain import plain_config, run
from ranks import train
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from zo import Trainer
from zo.errors import UserError
from zo.model import blocks
from zo.observe.timeline import overlap

pytestmark = pytest.mark.slow  # Whole runs, most of them in processes of their own.

BITS = ["model.dtype=bfloat16", "update.weight_decay=0.1", "run.steps=6"]
SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "eos_token_id": 2,
}
MODELS = {
    "untied": lambda: make_llama(tie_word_embeddings=False),
    "experts": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SIZES,
            intermediate_size=64,
            num_key_value_heads=2,
            num_local_experts=4,
            pad_token_id=0,
        )
    ),
    "large vocabulary": lambda: OPTForCausalLM(
        OPTConfig(
            **{**SIZES, "vocab_size": 700},
            ffn_dim=64,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    ),
}
PLACES = [
    ["memory.store=device", "memory.unit=module"],
    ["memory.store=host", "memory.unit=layer", "memory.slots=2", "memory.lag=1"],
    ["memory.store=host", "memory.unit=module", "memory.slots=5", "memory.lag=4"],
    ["memory.store=disk", "memory.unit=layer", "memory.slots=3", "memory.lag=4"],
    ["memory.store=disk", "memory.unit=module", "memory.slots=2", "memory.lag=1"],
    [
        "memory.store=disk",
        "memory.unit=module",
        "memory.slots=3",
        "memory.lag=4",
        "memory.disk_engine=deepnvme",
    ],
]
DISK = ["memory.store=disk", "memory.unit=module", "memory.lag=2"]


@pytest.fixture(scope="module")
def on_device(tmp_path_factory):
    """Folder and summary of the tiny model's run with store device, once for all."""
    return tmp_path_factory.mktemp("device") / "run", {}


@pytest.fixture
def expected(overrides, on_device):
    folder, summary = on_device
    if not summary:
        summary |= run([*overrides, *BITS], folder)
    return folder, summary


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_a_store_is_not_part_of_the_result(overrides, expected, tmp_path, place):
    folder, summary = expected
    found = run([*overrides, *BITS, *place], tmp_path / "run")
    assert (found["fingerprint"], found["eval"]) == (summary["fingerprint"], summary["eval"])
    assert same_log(tmp_path / "run" / "steps.log", folder / "steps.log")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("place", [PLACES[0], PLACES[2], PLACES[4]], ids=" ".join)
def test_nor_is_it_for_other_kinds_of_models(overrides, tmp_path, monkeypatch, model, place):
    """Untied heads, experts that are many tensors on disk, and a vocabulary that is cut into
    chunks."""
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 16_384)
    torch.manual_seed(0)
    MODELS[model]().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    settings = [*overrides, *BITS, f"model.name={tmp_path}/model"]
    expected = run(settings, tmp_path / "device")
    found = run([*settings, *place], tmp_path / "run", "export.at_end=true")
    assert found["fingerprint"] == expected["fingerprint"]
    saved = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "model", dtype="bfloat16"
    ).state_dict()
    assert all(not tensor.isnan().any() for tensor in saved.values())


@pytest.mark.parametrize("store", ["host", "disk"])
def test_two_ranks_have_the_bits_of_one(overrides, expected, tmp_path, store):
    settings = [
        *overrides,
        *BITS,
        f"memory.store={store}",
        "memory.unit=module",
        f"run.dir={tmp_path}/run",
    ]
    assert train(settings, ranks=2)["fingerprint"] == expected[1]["fingerprint"]


@pytest.mark.parametrize("unit", ["layer", "module"])
def test_where_hidden_states_wait_is_not_part_of_the_result(overrides, expected, tmp_path, unit):
    settings = [*overrides, *BITS, "memory.activations=host", f"memory.unit={unit}"]
    assert run(settings, tmp_path / "run")["fingerprint"] == expected[1]["fingerprint"]


@pytest.fixture
def places(why_no_deepnvme):
    """PLACES; the page cache stands in for an engine that this machine cannot build, whose own
    cases say so."""
    return [
        [w.replace("deepnvme", "mmap") if why_no_deepnvme else w for w in place] for place in PLACES
    ]


def test_random_weights_are_the_same_in_every_store(overrides, places, tmp_path):
    settings = [*overrides, *BITS, "model.weights=random"]
    found = {
        run([*settings, *place], tmp_path / str(i))["fingerprint"]
        for i, place in enumerate([[], *places])
    }
    assert len(found) == 1


def test_a_run_may_change_its_store_between_steps(overrides, expected, places, tmp_path):
    settings = [*overrides, *BITS]
    for steps, place in enumerate(places, start=1):
        last = run([*settings, *place], tmp_path / "run", f"run.steps={steps}")
    assert last["fingerprint"] == expected[1]["fingerprint"]


def test_scores_and_folders_are_the_same_from_disk(overrides, tmp_path):
    for store in ("device", "disk"):
        settings = [*overrides, *BITS, f"memory.store={store}", "memory.unit=module"]
        run(settings, tmp_path / store, "export.at_end=true")
    one, other = (
        load_file(tmp_path / store / "model" / "model.safetensors") for store in ("device", "disk")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Adapted(nn.Module):
    """A layer whose large matrix is frozen, and a small trained one beside it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        model = make_llama()
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.requires_grad_(True)
        self.inner = model

    def forward(self, ids):
        return self.inner(input_ids=ids, use_cache=False).logits


def frozen_run(tmp_path, name, *place):
    model, ids = Adapted(), torch.randint(3, 24, (4, 9), generator=torch.Generator().manual_seed(0))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    settings = [
        "run.steps=3",
        "batch.sequences=4",
        "batch.micro=4",
        "update.lr=1e-3",
        "eval.every=0",
        *place,
    ]
    config = plain_config([*settings, f"run.dir={tmp_path}/{name}"])

    def objective(model, batch):
        loss = nn.functional.cross_entropy(
            model(batch["ids"]).flatten(0, 1), batch["ids"].flatten(), reduction="sum"
        )
        return torch.stack((loss, torch.tensor(36.0)))

    summary = Trainer(
        config, model=model, objective=objective, batches=lambda step, column: {"ids": ids}
    ).train()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    return summary["fingerprint"], {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_frozen_parameters_travel_and_never_change(tmp_path, place):
    expected, trained = frozen_run(tmp_path, "device")
    found, model = frozen_run(tmp_path, "run", *place)
    assert found == expected
    assert all(torch.equal(model[name], tensor) for name, tensor in trained.items())


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval" not in line]


def test_metrics_tell_what_was_moved(overrides, tmp_path):
    settings = [*overrides, *BITS, "eval.every=0", "memory.unit=layer", "memory.slots=2"]
    run([*settings, "memory.store=disk", "memory.lag=3"], tmp_path / "run", "run.steps=12")
    weights = make_llama().num_parameters() * 2
    steps = metrics(tmp_path / "run")
    # A block that is prefetched for the next step counts for this one.
    assert all(0.5 * weights < step["read_bytes"] < 1.5 * weights for step in steps[1:])
    # A third of the blocks goes back at each step.
    written = sum(step["written_bytes"] for step in steps[3:]) / len(steps[3:])
    assert 0.2 * weights < written < 0.5 * weights
    assert all(0 <= step["wait_share"] <= 1 for step in steps)
    run(settings, tmp_path / "device", "run.steps=2")
    assert [(s["read_bytes"], s["written_bytes"]) for s in metrics(tmp_path / "device")] == [
        (0, 0)
    ] * 2


def test_a_timeline_is_drawn(overrides, tmp_path):
    run([*overrides, *BITS, *DISK], tmp_path / "run", "profile.steps=3..4")
    events = json.loads((tmp_path / "run" / "timeline.json").read_text())["traceEvents"]
    tracks = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert tracks == [
        "step",
        "read",
        "wait",
        "replay+perturb",
        *(f"forward {i}" for i in range(4)),
        "write-back",
    ]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["tid"] for e in spans} == set(range(len(tracks)))
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans)
    assert [e["name"] for e in spans if e["tid"] == 0] == ["3", "4"]
    assert (tmp_path / "run" / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_the_overlap_of_a_timeline_counts_transfers_while_computing():
    compute = [("forward 0", "a", 1.0, 3.0), ("replay+perturb", "a", 2.0, 4.0)]
    spans = [*compute, ("step", "1", 0.0, 9.0), ("wait", "b", 0.0, 9.0)]
    assert overlap(spans) is None
    spans += [("read", "b", 0.0, 2.0), ("write-back", "a", 3.0, 5.0), ("upload", "b", 7.0, 8.0)]
    assert overlap(spans) == pytest.approx(2 / 5)


MISTAKES = {
    "one slot": (
        ["memory.slots=1"],
        r"memory\.slots=1 is out of range; use a number of at least 2",
    ),
    "no lag": (["memory.lag=0"], r"memory\.lag=0 is out of range"),
    "unknown store": (
        ["memory.store=tape"],
        r"memory\.store='tape' is not known; use one of device, disk, host",
    ),
    "unknown unit": (["memory.unit=head"], r"use one of layer, module"),
    "unknown engine": (["memory.disk_engine=aio"], r"use one of deepnvme, mmap"),
    "profile of nothing": (["profile.steps=3"], r"profile\.steps=3 is not a range of steps"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_is_read(mistake):
    given, said = MISTAKES[mistake]
    with pytest.raises(UserError, match=said):
        plain_config(given)


def test_deepnvme_without_a_compiler_or_libaio_is_one_line(overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(
        UserError, match=r"deepnvme needs libaio.*memory\.disk_engine=mmap"
    ) as caught:
        run([*overrides, *DISK, "memory.disk_engine=deepnvme"], tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_deepnvme_without_deepspeed_is_one_line(overrides, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed.ops.op_builder", None)
    with pytest.raises(UserError, match=r"needs the extra nvme.*pip install"):
        run([*overrides, *DISK, "memory.disk_engine=deepnvme"], tmp_path / "run")


def test_too_little_host_memory_is_told_before_any_is_taken(overrides, tmp_path, monkeypatch):
    from zo.io import hardware

    monkeypatch.setattr(hardware, "available_host_bytes", lambda: 1000)
    with pytest.raises(
        UserError, match=r"memory\.store=host needs \d+ bytes .* of host memory and 1000 "
    ):
        run([*overrides, "memory.store=host"], tmp_path / "run")
