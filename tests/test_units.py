"""Unit ``module``: each module that owns parameters is a block, or part of its parent's."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import transformers as t
from test_lockstep import CPU, FAMILIES, SIZES, build, forwards, replica_of
from torch import nn

from zo.errors import UserError
from zo.method.perturbation import Probe
from zo.model import blocks
from zo.model.blocks import find_layout, pattern
from zo.streaming.selfcheck import self_check

GROUPED = {**SIZES, "num_key_value_heads": 2}
ELSEWHERE = {
    "gpt-oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4)
    ),
    "qwen3-next": lambda: t.Qwen3NextForCausalLM(
        t.Qwen3NextConfig(**GROUPED | {"num_hidden_layers": 4}, head_dim=8, num_experts=4,
                          num_experts_per_tok=2, moe_intermediate_size=16,
                          shared_expert_intermediate_size=16,
                          linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
                          linear_num_value_heads=4)
    ),
    "mamba-2": lambda: t.Mamba2ForCausalLM(
        t.Mamba2Config(vocab_size=120, hidden_size=32, num_hidden_layers=3, num_heads=8,
                       head_dim=8, state_size=8, n_groups=1, chunk_size=16,
                       pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
}  # fmt: skip
"""Families that read a weight outside the module that owns it, but inside its layer."""


@pytest.mark.parametrize("name", FAMILIES)
def test_most_families_are_served_module_by_module(name):
    model = build(name)
    merged = self_check([model], forwards(model), CPU, "rademacher", "module").merged
    layout = find_layout(model, "module", merged)
    owners = {n.rpartition(".")[0] for n, _ in model.named_parameters()}
    assert len(layout.blocks) >= 0.8 * len(owners)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_weight_that_is_read_elsewhere_coarsens_its_block_alone(name):
    torch.manual_seed(0)
    model = ELSEWHERE[name]().eval()
    merged = self_check([model], forwards(model), CPU, "rademacher", "module").merged
    assert merged
    fine, coarse = find_layout(model, "module"), find_layout(model, "module", merged)
    assert len(coarse.groups) < len(coarse.blocks) < len(fine.blocks)


@pytest.mark.parametrize("unit", ["layer", "module"])
def test_a_weight_that_is_read_outside_its_layer_is_refused_by_name(unit):
    torch.manual_seed(0)
    model = t.DebertaV2ForSequenceClassification(
        t.DebertaV2Config(**SIZES, relative_attention=True)
    ).eval()
    with pytest.raises(UserError, match="rel_embeddings"):
        self_check([model], forwards(model), CPU, "rademacher", unit)


class Layer(t.modeling_layers.GradientCheckpointingLayer):
    """Keeps a view of a weight and uses it after another module ran, which no watch can see."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        kept = self.kept_by(self.first)
        return self.second(x) @ kept

    @staticmethod
    def kept_by(module):
        return module.weight.T


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_the_watch_cannot_see_the_bits_tell():
    torch.manual_seed(0)
    model, x = Keeps(), torch.randn(2, 8)
    merged = self_check([model], [lambda m: m(x)], CPU, "rademacher", "module").merged
    assert merged == {"layers.*"}


@pytest.mark.parametrize("name", FAMILIES)
def test_units_change_no_address(name):
    model = build(name)
    layer, module = find_layout(model), find_layout(model, "module")
    assert {(p.name, p.start) for p in layer.parameters} == {
        (p.name, p.start) for p in module.parameters
    }
    parts = sorted((part.start, part.stop) for b in module.blocks for part in b.parts)
    assert all(stop == start for (_, stop), (start, _) in pairwise(parts))
    assert len(module.blocks) > len(layer.blocks)


def test_a_pattern_is_the_same_module_of_every_layer():
    lists = ["model.layers"]
    assert pattern("model.layers.12.mlp.experts.3", lists) == "model.layers.*.mlp.experts.3"
    assert pattern("model.embed_tokens", lists) == "model.embed_tokens"


@dataclass
class Shapes:
    vocabulary: int
    dtype: torch.dtype


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_vocabulary_in_chunks_has_the_bits_of_the_whole(monkeypatch, dtype, tie):
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 40_000)

    def make():
        torch.manual_seed(0)
        return t.LlamaForCausalLM(
            t.LlamaConfig(**{**GROUPED, "vocab_size": 1500}, tie_word_embeddings=tie)
        ).to(dtype)

    found = []
    for unit in ("layer", "module"):
        model = make().eval()
        replica = replica_of(model, find_layout(model, unit))
        ids = torch.randint(3, 1500, (3, 11), generator=torch.Generator().manual_seed(0))
        cells = [lambda m=model, i=ids: m(input_ids=i, use_cache=False).logits] * 4
        found.append(replica.table([Probe(0, 0.5), Probe(0, -0.5)], [0, 0, 1, 1], cells))
        replica.close()
        found.append([model(input_ids=ids, use_cache=False).logits])
    chunked = find_layout(make(), "module")
    assert sum(b.parts[0].rows is not None for b in chunked.blocks) >= (
        5 if dtype == torch.float32 else 3
    )
    whole, plain, in_chunks, after = found
    assert all(torch.equal(a, b) for a, b in zip(whole, in_chunks, strict=True))
    assert torch.equal(plain[0], after[0])


def test_a_scaled_lookup_is_not_chunked(monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 1000)
    model = build("gemma3")
    assert all(part.rows is None for b in find_layout(model, "module").blocks for part in b.parts)
    self_check([model], forwards(model), CPU, "rademacher", "module")


@torch.no_grad()
def test_offloaded_hidden_states_take_no_device_memory_and_come_back():
    """Waiting cells would otherwise need device memory for every cell of the table."""
    from zo.model.lockstep import _offload_activation

    hidden = torch.randn(3, 5)
    kept, view = hidden.clone(), hidden[1]
    restore = _offload_activation(hidden)
    assert hidden.untyped_storage().nbytes() == 0
    restore()
    assert torch.equal(hidden, kept)
    assert torch.equal(view, kept[1])


def test_a_head_whose_chunks_have_other_bits_is_not_chunked(monkeypatch):
    """A GPU may choose its kernel by the matrix's shape."""
    from zo.model import lockstep

    monkeypatch.setattr(blocks, "CHUNK_BYTES", 4000)
    original = lockstep.Lockstep._head

    def inexact(self, chunks):
        forward = original(self, chunks)
        return lambda x: forward(x) * (1 + 2**-10)

    monkeypatch.setattr(lockstep.Lockstep, "_head", inexact)
    model = build("qwen3")
    merged = self_check([model], forwards(model), CPU, "rademacher", "module").merged
    layout = find_layout(model, "module", merged)
    assert "lm_head" in merged
    assert all(part.rows is None for block in layout.blocks for part in block.parts)
    assert len(layout.blocks) > 3 * len(layout.groups)
