"""Lockstep against plain forwards, with the same bits, for families that differ in structure."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers as t
from logs import HEADER
from torch import nn

from zo.config.schema import MemoryConfig
from zo.errors import UserError
from zo.method.estimator import float32
from zo.method.perturbation import Probe, rademacher
from zo.model import blocks
from zo.model.blocks import find_layout, layer_lists
from zo.model.lockstep import Lockstep
from zo.model.source import ModelSource
from zo.state.log import Log
from zo.streaming.replica import Replica
from zo.streaming.selfcheck import miniature, self_check

SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = {
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(**{**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16})
    ),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=4)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, head_dim=8)),
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=120, n_embd=32, n_layer=3, n_head=4, n_positions=64, **IDS)
    ),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**GROUPED)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)),
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**SIZES)),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=120,
            d_model=32,
            d_ff=64,
            num_layers=3,
            num_heads=4,
            d_kv=8,
            decoder_start_token_id=0,
        )
    ),
}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    return FAMILIES[name]().to(dtype).eval()


def forwards(model):
    """Two micro-batches of different shapes, the first with padding on the left."""
    cells = []
    for shape, padding in (((3, 12), 5), ((2, 7), 0)):
        ids = torch.randint(3, 120, shape, generator=torch.Generator().manual_seed(shape[0]))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["attention_mask"][0, :padding] = 0
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids
        if model.config.get_text_config().to_dict().get("use_cache"):
            batch["use_cache"] = False
        cells.append(lambda m, batch=batch: m(**batch).logits)
    return cells


CPU = torch.device("cpu")


def replica_of(model, layout=None, **memory):
    layout = layout or find_layout(model)
    replica = Replica(
        model, layout, lambda engine: ModelSource(model), MemoryConfig(**memory), CPU, Path()
    )
    replica.open(Log(HEADER))
    return replica


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_lockstep_is_plain_forwards(name, dtype):
    """Several probes on two micro-batches: each cell sees all of its own weights and no others."""
    model, reference = build(name, dtype), build(name, dtype)
    replica = replica_of(model)
    eps = float32(0.01)
    probes = [Probe(0, 0.0), Probe(0, eps), Probe(0, -eps), Probe(1, eps), Probe(2, eps)]
    cells = [(row, forward) for row in range(len(probes)) for forward in forwards(model)]
    together = replica.table(
        probes, [row for row, _ in cells], [lambda f=f: f(model) for _, f in cells]
    )
    parameters = dict(reference.named_parameters(remove_duplicate=False))
    placed = list(find_layout(reference).parameters)
    stored = {p.name: parameters[p.name].data.clone() for p in placed}
    for row, probe in enumerate(probes):
        for p in placed:
            z = rademacher(HEADER["seed"], probe.direction, p.start, p.numel).view(p.spec.shape)
            for n in p.spec.names:
                parameters[n].data = (stored[p.name].float() + z * probe.scale).to(dtype)
        for cell, (cell_row, forward) in enumerate(cells):
            if cell_row == row:
                assert torch.equal(together[cell], forward(reference))
    assert all(torch.equal(tensor, stored[name]) for name, tensor in replica.tensors())
    assert not torch.equal(together[0], together[2])


@pytest.mark.parametrize("name", FAMILIES)
def test_self_check_passes(name):
    model = build(name)
    self_check([model], forwards(model), CPU, "gaussian")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_one_address(name):
    model = build(name)
    layout = find_layout(model)
    placed = [n for p in layout.parameters for n in p.spec.names]
    assert sorted(placed) == sorted(n for n, _ in model.named_parameters(remove_duplicate=False))
    starts = [(p.start, p.stop) for p in layout.parameters]
    assert starts[0][0] == 0
    assert all(stop == start for (_, stop), (start, _) in pairwise(starts))
    assert all(start % 128 == 0 for start, _ in starts)
    assert layout.numel == sum(p.numel() for p in model.parameters())


def test_layers_are_blocks_and_tied_weights_one_block():
    layout = find_layout(build("llama"))
    assert [b.modules for b in layout.blocks] == [
        ("model.embed_tokens", "lm_head"),
        ("model.layers.0",),
        ("model.layers.1",),
        ("model.layers.2",),
        ("model.norm",),
    ]
    assert layout.blocks[1].parts[-1].parameter.name.endswith("layernorm.weight")


def test_frozen_parameters_have_no_address_and_are_left_alone():
    model = build("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    names = {p.name for p in find_layout(model).parameters}
    assert "model.embed_tokens.weight" not in names
    self_check([model], forwards(model), CPU, "rademacher")


def test_the_miniature_of_a_model_on_meta_is_small_and_real():
    with torch.device("meta"):
        large = t.LlamaForCausalLM(t.LlamaConfig(**{**GROUPED, "num_hidden_layers": 40}))
    large.model.rotary_emb = build("llama").model.rotary_emb
    small = miniature(large)
    assert len(next(iter(layer_lists(small).values()))) == 2
    assert all(p.device.type == "cpu" for p in small.parameters())
    assert len(large.model.layers) == 40


class ReadsElsewhere(nn.Module):
    """Uses a weight outside the module that owns it, after that module's forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x)) @ self.first.weight


def test_a_weight_read_outside_its_module_is_found():
    """Without the self-check this model would train on the wrong losses, in silence."""
    x = torch.randn(2, 8)
    with pytest.raises(UserError, match="lockstep differs"):
        self_check([ReadsElsewhere()], [lambda m: m(x)], CPU, "rademacher")


def test_a_weight_outside_any_visited_block_is_refused_by_name():
    torch.manual_seed(0)
    model = t.DebertaV2ForSequenceClassification(
        t.DebertaV2Config(**SIZES, relative_attention=True)
    ).eval()
    with pytest.raises(UserError, match="rel_embeddings"):
        self_check([model], forwards(model), CPU, "rademacher")


def test_a_forward_that_fails_ends_the_others_and_leaves_the_weights_in_place():
    model = build("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    replica = replica_of(model)

    def fails():
        forwards(model)[0](model)
        raise RuntimeError("objective")

    with torch.no_grad(), pytest.raises(RuntimeError, match="objective"):
        replica.table(
            [Probe(0, 1.0), Probe(0, -1.0)], [0, 1], [lambda: forwards(model)[0](model), fails]
        )
    replica.close()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@torch.no_grad()
def test_the_number_of_threads_is_not_part_of_the_result():
    """Ranks share cores: if bits depended on threads, the mesh would be part of the result."""
    model = build("llama")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append([forward(model) for forward in forwards(model)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_lookup_without_data_dependent_shapes_has_the_same_bits(monkeypatch, dtype):
    """The GPU's form of a lookup in chunks, which nothing waits for, against the CPU's.

    The ids lie on the borders of chunks, and some chunks have none.
    """
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 40_000)
    probes, found = [Probe(0, 0.0), Probe(0, 0.5), Probe(0, -0.5)], []
    for fixed_shapes in (False, True):
        torch.manual_seed(0)
        model = t.LlamaForCausalLM(t.LlamaConfig(**{**GROUPED, "vocab_size": 1500})).to(dtype)
        layout = find_layout(model.eval(), "module")
        replica = replica_of(model, layout)
        replica._lockstep.detach()
        replica._lockstep = Lockstep(replica.binding, fixed_shapes=fixed_shapes)
        chunks = [p.rows for b in layout.blocks for p in b.parts if p.rows is not None]
        assert len(chunks) > 4
        first, second = chunks[:2]
        ids = torch.tensor([[0, first[1] - 1, second[0], 1499], [5, 5, second[1] - 1, 0]])
        cell = lambda m=model, ids=ids: m(input_ids=ids, use_cache=False).logits  # noqa: E731
        found.append(replica.table(probes, [0, 1, 2], [cell] * 3))
        replica.close()
        assert torch.equal(found[-1][0], model(input_ids=ids, use_cache=False).logits)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][1], found[0][2])
