"""Memory claims in the headers of the OPT recipes, against what a run of that size allocates.

Users choose a machine by these numbers, so they are computed from a skeleton without weights. The
sizes are those of the OPT paper (arXiv:2205.01068, table 1); vocabulary and positions are the same
for all.
"""

import re
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from zo.config.recipes import load_config
from zo.model.blocks import find_layout
from zo.model.layout import WHOLE
from zo.streaming.budget import budget

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SIZES = {
    "opt-125m": (768, 12, 12, 3072),
    "opt-1.3b": (2048, 24, 32, 8192),
    "opt-13b": (5120, 40, 40, 20480),
    "opt-30b": (7168, 48, 56, 28672),
    "opt-66b": (9216, 64, 72, 36864),
    "opt-175b": (12288, 96, 96, 49152),
}
"""Width, layers, heads, feed-forward width."""
VOCABULARY, POSITIONS = 50272, 2048
TOLERANCE = 0.03
CLAIMS = {
    "weights": r"([\d.]+) GB of weights",
    "device": r"([\d.]+) GB of slots and scratch on the GPU",
    "device by module": r"([\d.]+) GB with memory\.unit=module",
    "disk": r"([\d.]+) GB of room in run\.dir",
}


def skeleton(recipe, dtype):
    width, layers, heads, feed_forward = SIZES[recipe]
    sizes = OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=feed_forward,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
    )
    with torch.device("meta"):
        return OPTForCausalLM(sizes).to(dtype)


@pytest.mark.parametrize("recipe", SIZES)
def test_the_header_of_a_recipe_tells_the_memory_it_needs(recipe):
    text = (RECIPES / f"{recipe}.yaml").read_text()
    header = re.sub(r"\n#\s*", " ", text.split("defaults:")[0])
    found = {claim: re.search(words, header) for claim, words in CLAIMS.items()}
    claimed = {claim: float(match[1]) for claim, match in found.items() if match}
    config = load_config(recipe, ["model.name=unused"])
    model = skeleton(recipe, getattr(torch, config.model.dtype))
    buffers = sum(buffer.nbytes for buffer in model.buffers())

    def needs(store, unit):
        layout = find_layout(model, unit)
        return budget(layout, store, config.memory.slots, WHOLE, False, buffers)

    unit = config.memory.unit
    counted = {"weights": sum(p.nbytes for p in model.parameters())}
    if config.memory.store != "device":
        counted["device"] = sum(needs(config.memory.store, unit).device.values())
        counted["device by module"] = sum(needs(config.memory.store, "module").device.values())
        counted["disk"] = needs("disk", unit).disk["blocks"]
        assert needs("host", unit).host["weights"] == counted["weights"]
    assert claimed.keys() == counted.keys()
    for claim, size in counted.items():
        assert claimed[claim] * 1e9 == pytest.approx(size, rel=TOLERANCE), claim
