"""``model.train``: what matches a pattern is trained, and no other byte of the model changes."""

import copy
from collections import Counter

import pytest
import torch
import transformers as t
import yaml
from conftest import make_llama
from logs import same_log
from plain import assert_refused, plain_config, run
from ranks import train
from safetensors.torch import load_file
from test_lockstep import CPU, build, forwards
from test_probes import agree, in_folds, replica_of, written
from torch import nn
from torch.nn import functional

from zo import Trainer
from zo.errors import UserError
from zo.model.blocks import find_layout
from zo.model.form import forward_order, layer_places
from zo.model.trained import train_only
from zo.run.export import write_folder
from zo.run.restore import card_of, load_run
from zo.run.trainer import Run
from zo.state.log import read
from zo.streaming.selfcheck import self_check

VALUES = "model.train=*.v_proj.*|*norm*"
TOP = "model.train=model.layers.2.mlp.*"
RANK_ONE = ["estimator.distribution=rank-one", "batch.fold=2", "estimator.directions=2"]
PLACES = [
    ["memory.store=host", "memory.slots=2", "memory.lag=2"],
    ["memory.store=disk", "memory.unit=module", "memory.slots=2", "memory.lag=1"],
]


def changed(folder, base):
    after, before = (load_file(f / "model.safetensors") for f in (folder / "model", base))
    assert after.keys() == before.keys()
    return {name for name, values in after.items() if not torch.equal(values, before[name])}


def block_files(folder):
    found = sorted((folder / "blocks").rglob("*.block"))
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize("probes", [[], RANK_ONE], ids=["dense", "rank-one"])
def test_exactly_what_matches_changes_in_every_store(overrides, tiny_model, tmp_path, probes):
    settings = [*overrides, *probes, VALUES, "mesh.check_every=1", "run.snapshot_every=2"]
    expected = run(settings, tmp_path / "device", "export.at_end=true")
    names = {n for n in make_llama().state_dict() if ".v_proj." in n or "norm" in n}
    assert changed(tmp_path / "device", tiny_model) == names
    for number, place in enumerate(PLACES):
        found = run(settings, tmp_path / str(number), *place)
        assert found["fingerprint"] == expected["fingerprint"], place
        assert same_log(tmp_path / str(number) / "steps.log", tmp_path / "device" / "steps.log")
    assert read(tmp_path / "0" / "steps.log")[0]["train"] == VALUES.partition("=")[2]


@pytest.mark.slow
def test_ranks_that_share_slices_give_the_same_bits(overrides, tmp_path):
    settings = [*overrides, *RANK_ONE, VALUES]
    expected = run(settings, tmp_path / "alone")
    slices = [*settings, "memory.store=host", "mesh.slice=2", f"run.dir={tmp_path}/ranks"]
    assert train(slices, ranks=2)["fingerprint"] == expected["fingerprint"]
    assert same_log(tmp_path / "ranks" / "steps.log", tmp_path / "alone" / "steps.log")


def test_a_tied_weight_is_trained_by_any_of_its_names(overrides, tiny_model, tmp_path):
    found = run(overrides, tmp_path / "head", "model.train=lm_head.*", "export.at_end=true")
    assert changed(tmp_path / "head", tiny_model) == {"model.embed_tokens.weight"}
    embedding = run(overrides, tmp_path / "embedding", "model.train=*embed_tokens*")
    assert embedding["fingerprint"] == found["fingerprint"]


def test_files_of_frozen_blocks_are_not_touched(overrides, tmp_path):
    """Random weights are kept on disk at version 0: from then on a frozen block is only read."""
    settings = [*overrides, TOP, "model.weights=random", "memory.store=disk", "memory.lag=1"]
    run(settings, tmp_path / "run", "run.steps=2")
    before = block_files(tmp_path / "run")
    run(settings, tmp_path / "run", "run.steps=4")
    after = block_files(tmp_path / "run")
    assert len(after) > 1
    assert {name for name in after if after[name] != before[name]} == {"000003.block"}


def test_a_file_holds_what_is_trained_of_a_block_and_is_rebuilt(overrides, tmp_path):
    """The frozen rest is read from the checkpoint; the file's own bytes are checked as ever."""
    settings = [*overrides, "model.train=*.v_proj.*", "memory.store=disk", "memory.lag=1"]
    run(settings, tmp_path / "run")
    paths = sorted((tmp_path / "run").rglob("*.block"))
    assert [path.stat().st_size for path in paths] == 3 * [2 * 4096]  # A header and 2 KiB.
    data = bytearray(paths[0].read_bytes())
    data[5000] ^= 4
    paths[0].write_bytes(data)
    found = run(settings, tmp_path / "run", "run.steps=6")
    assert found["fingerprint"] == run(settings, tmp_path / "new", "run.steps=6")["fingerprint"]


@pytest.mark.parametrize("probes", [[], RANK_ONE], ids=["dense", "rank-one"])
def test_what_lies_below_the_first_trained_layer_is_computed_once(
    overrides, tmp_path, monkeypatch, probes
):
    """And the result is that of computing it for every probe."""
    calls = []
    forward = t.models.llama.modeling_llama.LlamaDecoderLayer.forward

    def counted(layer, *arguments, **options):
        calls.append(layer.self_attn.layer_idx)
        return forward(layer, *arguments, **options)

    monkeypatch.setattr(t.models.llama.modeling_llama.LlamaDecoderLayer, "forward", counted)
    settings = [*overrides, *probes, TOP, "eval.every=0"]
    expected = run(settings, tmp_path / "fork")
    assert {entry.part for entry in read(tmp_path / "fork" / "steps.log")[1]} == {3}
    # Two micro-batches a step; two probes of each, or two folds of two.
    assert Counter(calls[-8:]) == {0: 2, 1: 2, 2: 4}
    monkeypatch.setattr(Run, "_part", lambda self, step: 0)
    found = run(settings, tmp_path / "whole")
    entries = [read(tmp_path / name / "steps.log")[1] for name in ("fork", "whole")]
    assert [e.scalars for e in entries[0]] == [e.scalars for e in entries[1]]
    assert found["fingerprint"] == expected["fingerprint"]


def test_export_rebuilds_the_run_and_a_resume_goes_on(overrides, tmp_path):
    settings = [*overrides, VALUES, "export.at_end=true"]
    expected = run(settings, tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    fingerprint = loaded.replica.fingerprint()
    assert fingerprint == expected["fingerprint"]
    card = card_of(loaded.content, loaded.header, loaded.steps, {}, fingerprint)
    write_folder(loaded.replica.model, None, tmp_path / "again", card, source=loaded.replica)
    loaded.replica.close()
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    longer = run(settings, tmp_path / "run", "run.steps=6")
    assert longer["fingerprint"] == run(settings, tmp_path / "new", "run.steps=6")["fingerprint"]


def test_another_pattern_is_refused_for_a_run(overrides, tmp_path):
    run([*overrides, VALUES], tmp_path / "run")
    for other in ([TOP], []):
        with pytest.raises(UserError, match=r"holds another run: model\.train \([^\n]*$"):
            run([*overrides, *other], tmp_path / "run", "run.steps=6")
    path = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["config"]["model"]["train"] = "*.mlp.*"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="run") as error:
        load_run(tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            ["model.train=*.v_proj.*|*vproj*"],
            r"\*vproj\* matches no parameter; .*\*\.self_attn\.v_",
        ),
        (["model.train=''"], "has an empty pattern"),
        (["model.train=a||b"], "has an empty pattern"),
        (["model.train=*layers.0*", "estimator.part=top:2"], "steps that reach no trained"),
        (["model.train=*layers.0*", "estimator.part=sampled"], "use estimator.part=all"),
    ],
)
def test_what_trains_nothing_is_refused_in_one_line(overrides, tmp_path, extra, said):
    assert_refused(said, overrides, tmp_path / "run", *extra)


FAMILIES = ["llama", "opt", "gpt2", "t5", "mixtral"]
SOME = {"layers": "*.1.*|*bias", "edges": "*embed*|*wte*|*shared*|*norm*"}


@pytest.mark.parametrize("unit", ["layer", "module"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_corrected_probe_of_some_parameters_is_the_written_one(name, unit, monkeypatch):
    """In float64, with vocabularies in chunks, trained and frozen."""
    monkeypatch.setattr("zo.model.blocks.CHUNK_BYTES", 4096)
    for patterns in SOME.values():
        model, small = build(name, torch.float64), build(name)
        if hasattr(model.config, "num_local_experts"):
            model.set_experts_implementation("eager")  # Grouped products have no float64.
        for each in (model, small):
            try:
                train_only(each, patterns)
            except UserError:  # Not every family has every name.
                train_only(each, "*.1.*")
        cells, reference = forwards(model), copy.deepcopy(model)
        checked = self_check([small], cells, CPU, "rank-one", unit)
        assert checked.meet
        replica = replica_of(model, checked, unit)
        order = forward_order(find_layout(reference), reference, checked.visits)
        for part in (0, layer_places(reference, order)[-2]):
            expected = written(reference, cells, order, part)
            assert agree(in_folds(replica, model, cells, part), expected), (patterns, part)
        replica.close()


def test_a_frozen_weight_that_is_read_elsewhere_stays_with_the_model(tmp_path, reviews, tokenizer):
    """DeBERTa's layers read the embeddings of relative positions, which are outside of them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    model = t.DebertaV2ForSequenceClassification(
        t.DebertaV2Config(**sizes, relative_attention=True, pos_att_type=["p2c", "c2p"])
    )
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = [f"model.name={tmp_path}/base", f"data.name={reviews}", "batch.sequences=4"]
    settings += ["batch.micro=2", "batch.max_tokens=32", "run.steps=2", "eval.every=2"]
    run(settings, tmp_path / "all", "export.at_end=true")
    trained = changed(tmp_path / "all", tmp_path / "base")
    assert trained and not any("rel_embeddings" in name for name in trained)
    only = [*settings, "model.train=*.value_proj.*|classifier.*"]
    found = [
        run(only, tmp_path / str(len(place)), "export.at_end=true", *place)["fingerprint"]
        for place in ([], ["memory.store=host", "memory.unit=module"])
    ]
    assert found[0] == found[1]
    names = changed(tmp_path / "2", tmp_path / "base")
    assert names and all(".value_proj." in name or "classifier" in name for name in names)


def test_a_part_above_the_layers_trains_the_last_norm_alone(overrides, tiny_model, tmp_path):
    settings = [*overrides, *RANK_ONE, "model.train=*norm*", "estimator.part=top:0"]
    run(settings, tmp_path / "run", "export.at_end=true", "run.steps=2")
    assert changed(tmp_path / "run", tiny_model) == {"model.norm.weight"}


def test_rank_one_directions_of_a_model_without_matrices_are_refused(tmp_path):
    model = nn.LayerNorm(8)
    config = plain_config([f"run.dir={tmp_path}/run", "estimator.distribution=rank-one"])
    with pytest.raises(UserError, match="is of matrices, and the model has none"):
        Trainer(
            config,
            model=model,
            objective=lambda net, batch: torch.stack((net(batch["x"]).sum(), torch.tensor(1.0))),
            batches=lambda step, column: {"x": torch.ones(2, 8)},
        ).train()


class ReadElsewhere(nn.Module):
    """A user's model, whose frozen table no module reads by its own forward."""

    def __init__(self):
        super().__init__()
        self.inner, self.table = make_llama(), nn.Linear(32, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, ids):
        hidden = self.inner.model(input_ids=ids, use_cache=False).last_hidden_state
        return functional.linear(hidden, self.table.weight * self.scale)


def test_patterns_choose_among_the_parameters_of_a_users_own_model(tmp_path):
    model, ids = ReadElsewhere(), torch.randint(3, 24, (4, 9))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def objective(model, batch):
        loss = model(batch["ids"]).double().square().sum()
        return torch.stack((loss, torch.tensor(36.0)))

    settings = ["run.steps=2", "batch.sequences=4", "batch.micro=4", "eval.every=0"]
    config = plain_config(
        [*settings, "model.train=inner*up_proj*", "export.at_end=false", f"run.dir={tmp_path}/run"]
    )
    Trainer(
        config, model=model, objective=objective, batches=lambda step, column: {"ids": ids}
    ).train()
    after = {n: p for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert after.keys() == {f"inner.model.layers.{n}.mlp.up_proj.weight" for n in range(3)}
