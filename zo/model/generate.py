"""Generate completions: greedy, or sampled with noise that is a function of its address.

    token = argmax(logits / temperature + Gumbel noise)

is an exact sample of softmax(logits / temperature), so that transformers' greedy decoding samples
once the noise is added (the Gumbel-max trick). The noise of a token is made of Philox words of
(seed, number of the sequence, position, vocabulary entry): no generator has a state, a resumed run
draws the same, and all probes of a prompt share it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from zo.method.philox import MASK, Purpose, words
from zo.model.info import ModelInfo


@dataclass(frozen=True)
class Decoding:
    """How completions are generated."""

    max_new_tokens: int
    end: tuple[int, ...]
    """Tokens that end a completion; it may have none."""
    pad: int
    """Token after the end of a completion that is shorter than others."""
    temperature: float = 0.0
    """Of the samples; 0: greedy."""
    seed: int = 0
    """Of the samples' noise."""


def end_tokens(tokenizer: Any, info: ModelInfo) -> tuple[int, ...]:
    """Return the tokens that end a completion, by a tokenizer and a model's configuration."""
    return tuple(sorted({tokenizer.eos_token_id, *info.end_tokens} - {None}))


@torch.no_grad()
def generate(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    decoding: Decoding,
    sequences: Tensor | None = None,
) -> Tensor:
    """Return completions of prompts, with a key-value cache.

    Args:
        model: a causal language model of transformers.
        batch: ``input_ids`` and ``attention_mask``, ``[B, T]``, padded on the left; the rest is not
            read.
        decoding: how.
        sequences: number of each sequence, int64 ``[B]`` below 2**32, by which its noise is known;
            needed with a temperature. Equal numbers have equal noise.

    Returns:
        int64 of shape ``[B, N]``, N <= ``max_new_tokens``: each row ends with an end token and
        padding, or is cut.
    """
    prompts = batch["input_ids"]
    noise = LogitsProcessorList()
    if decoding.temperature > 0.0:
        assert sequences is not None
        noise.append(GumbelNoise(decoding, sequences, prompts.shape[1]))
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(decoding.end) or None,
        pad_token_id=decoding.pad,
    )
    found: Tensor = model.generate(  # type: ignore[operator]
        input_ids=prompts,
        attention_mask=batch["attention_mask"],
        generation_config=settings,
        logits_processor=noise,
    )
    return found[:, prompts.shape[1] :]


def cache_bytes(model: nn.Module, tokens: int) -> int:
    """Return the bytes of the keys and values of some tokens.

    By the model's configuration, as if each layer kept all of them; 0 where it has no heads.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    itemsize = next(model.parameters()).dtype.itemsize
    return int(2 * config.num_hidden_layers * kept * width * itemsize * tokens)


def trim(tokens: list[int], end: tuple[int, ...]) -> list[int]:
    """Return the tokens of a completion before its end token."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in end), len(tokens))]


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to logits over the temperature."""

    def __init__(self, decoding: Decoding, sequences: Tensor, start: int) -> None:
        """Keep the numbers of the sequences.

        Args:
            decoding: seed and temperature.
            sequences: int64 ``[B]``.
            start: position of the first token that is generated.
        """
        self._decoding, self._start = decoding, start
        self._distinct, self._which = torch.unique(sequences, return_inverse=True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, ``[B, V]``, with the noise of the next position."""
        position, entries = input_ids.shape[1] - self._start, scores.shape[1]
        calls = -(-entries // 4)
        noise = [
            gumbel(self._decoding.seed, int(number), position * calls, calls, scores.device)
            for number in self._distinct.tolist()
        ]
        drawn = torch.stack(noise)[:, :entries].to(scores.dtype)
        return scores / self._decoding.temperature + drawn[self._which]


def gumbel(seed: int, stream: int, first: int, calls: int, device: torch.device) -> Tensor:
    """Return Gumbel noise, float64 of shape ``[4 * calls]``, of numbered Philox calls."""
    numbers = torch.arange(first, first + calls, dtype=torch.int64, device=device)
    drawn = words(seed, numbers, stream & MASK, Purpose.SAMPLE).flatten()
    uniform = (drawn.to(torch.float64) + 0.5) / (MASK + 1)
    return -torch.log(-torch.log(uniform))
