"""``model.attention`` follows what a model's class supports; sequences fit a model's positions."""

import pytest
from transformers import AutoConfig

from zo.config.schema import ModelConfig
from zo.errors import UserError
from zo.model.build import ModelLoader

COMMON = {"vocab_size": 64}
FAMILIES = {
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "eager"),
    "gpt_oss": (
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 2,
        },
        "eager",
    ),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2}, None),
    "rwkv": ({"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}, None),
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}, None),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "sdpa"),
    "opt": (
        {
            "hidden_size": 32,
            "ffn_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
        },
        "sdpa",
    ),
}


def source(tmp_path, family, attention="auto"):
    AutoConfig.for_model(family, **COMMON, **FAMILIES[family][0]).save_pretrained(tmp_path)
    return ModelLoader(ModelConfig(name=str(tmp_path), weights="random", attention=attention))


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_builds_every_family(tmp_path, family):
    model = source(tmp_path, family).skeleton()
    assert FAMILIES[family][1] in (None, model.config._attn_implementation)


@pytest.mark.parametrize(("family", "asked"), [("bloom", "sdpa"), ("gpt2", "quick")])
def test_attention_that_a_model_lacks_is_named_with_what_it_has(tmp_path, family, asked):
    with pytest.raises(
        UserError, match=rf"model\.attention={asked} does not work .*; use auto or eager"
    ) as caught:
        source(tmp_path, family, asked).skeleton()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gptj"])
def test_sequences_longer_than_the_positions_are_refused(tmp_path, family):
    found = source(tmp_path, family)
    found.check_positions(64)
    with pytest.raises(
        UserError, match=r"batch\.max_tokens=65 is more than the 64 positions .*; use at most 64"
    ):
        found.check_positions(65)


def test_a_model_without_positions_has_no_limit(tmp_path):
    source(tmp_path, "mamba").check_positions(10**6)
