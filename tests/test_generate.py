"""Generation: greedy and sampled completions, each a function of its own prompt and number."""

from dataclasses import replace

import pytest
import torch
from conftest import make_llama
from transformers import AutoConfig, AutoModelForCausalLM

from zo.model.generate import Decoding, cache_bytes, end_tokens, generate, gumbel, trim
from zo.model.info import ModelInfo

GREEDY = Decoding(max_new_tokens=6, end=(2,), pad=0)
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13], [4]]


def batch_of(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def step_by_step(model, prompt, pick):
    """Generate one completion by whole forwards, without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + GREEDY.max_new_tokens and (ids == prompt or ids[-1] != 2):
        ids.append(int(pick(model(torch.tensor([ids])).logits[0, -1], len(ids) - len(prompt))))
    return trim(ids[len(prompt) :], GREEDY.end)


def completions(model, prompts, decoding, sequences=None):
    found = generate(model, batch_of(prompts), decoding, sequences)
    return [trim(row, decoding.end) for row in found.tolist()]


def test_greedy_completions_in_a_batch_are_those_of_whole_forwards():
    model = make_llama().double()
    expected = [step_by_step(model, p, lambda logits, _: logits.argmax()) for p in PROMPTS]
    assert completions(model, PROMPTS, GREEDY) == expected


def test_a_sample_depends_on_its_own_number_and_not_on_its_batch():
    model, numbers = make_llama().double(), torch.tensor([8, 7, 9])
    sampled = replace(GREEDY, temperature=0.7, seed=5)

    def pick(number):
        return lambda logits, at: (logits / 0.7 + gumbel(5, number, 6 * at, 6, "cpu")).argmax()

    found = completions(model, PROMPTS, sampled, numbers)
    expected = [
        step_by_step(model, p, pick(n)) for p, n in zip(PROMPTS, numbers.tolist(), strict=True)
    ]
    assert found == expected
    assert completions(model, PROMPTS[1:], sampled, numbers[1:]) == found[1:]
    assert completions(model, PROMPTS, replace(sampled, seed=6), numbers) != found


def test_the_largest_of_noisy_logits_is_a_sample_of_their_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).double()
    draws = gumbel(3, 0, 0, 20000, "cpu").view(-1, 4)
    shares = (logits + draws).argmax(-1).bincount(minlength=4) / 20000
    assert (shares - logits.softmax(-1)).abs().max() < 0.015


def test_end_tokens_are_those_of_tokenizer_and_model(tokenizer):
    info = ModelInfo("causal-lm", 24, frozenset(), end_tokens=(5,))
    assert end_tokens(tokenizer, info) == (2, 5)


SMALL = {"vocab_size": 24, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_has_the_bytes_that_were_computed(family, dtype):
    more = {"head_dim": 16, "num_key_value_heads": 1} if family == "gemma" else {}
    config = AutoConfig.for_model(family, **SMALL, **more)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        cache = model(**batch_of(PROMPTS), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model, 3 * 5) == held > 0


def test_a_model_without_heads_has_no_cache():
    config = AutoConfig.for_model("mamba", vocab_size=24, hidden_size=8, num_hidden_layers=1)
    assert cache_bytes(AutoModelForCausalLM.from_config(config), 5) == 0
