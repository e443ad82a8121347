"""Virtual tokens by ``peft``: trained numbers that every sequence has in front of it.

    prompt    embeddings before those of the text          (Lester et al. 2021)
    prefix    keys and values before those of each layer   (Li and Liang 2021)

They are the weights of one embedding, a module of the model that its forward calls first; the rest
of the forward is the model's own, given ``inputs_embeds`` or ``past_key_values``. ``peft`` makes
the keys and values of a family, and has the format that they are saved in.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zo.config.peft import PeftConfig
from zo.errors import UserError, one_line

NAME = "default"
"""The name of the adapter in the model; files do not hold it."""
MODULE = "prompt_encoder"
"""The module of the model that owns the virtual tokens."""
NEEDS = {"prompt": "inputs_embeds", "prefix": "past_key_values"}
"""Argument of the model's forward that takes the virtual tokens."""


def add_virtual_tokens(model: Any, settings: PeftConfig, options: Mapping[str, Any]) -> None:
    """Let a model's forward put virtual tokens before its sequences, and train them alone.

    Args:
        model: a causal language model of transformers; *modified in place*.
        settings: ``peft.type`` is ``prompt`` or ``prefix``.
        options: more of the configuration of ``peft``.

    Raises:
        UserError: the model takes no virtual tokens.
    """
    import peft

    kinds: dict[str, Any] = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    config = kinds[settings.type or ""](num_virtual_tokens=settings.virtual_tokens, **options)
    accepts = inspect.signature(model.forward)
    if (needed := NEEDS[settings.type or ""]) not in accepts.parameters:
        raise UserError(
            f"peft.type={settings.type} needs a model that takes {needed}, and the forward of "
            f"{type(model).__name__} does not; use peft.type=lora, or choose parameters by "
            "model.train"
        )
    model.requires_grad_(False)
    try:
        tokens = peft.get_peft_model(model, config, NAME)
    except (ValueError, TypeError, AttributeError) as error:
        said = one_line(error, 300)
        raise UserError(
            f"peft.type={settings.type} cannot be added to a {type(model).__name__}: {said}; use "
            "peft.type=lora with peft.targets, or choose parameters by model.train"
        ) from error
    config.base_model_name_or_path = options["base_model_name_or_path"]
    model.add_module(MODULE, tokens.prompt_encoder[NAME])
    model.peft_config = {NAME: config}
    model.forward = _Prompted(tokens, model.forward, accepts)


class _Prompted:
    """The forward of a model with virtual tokens. It can be copied together with the model."""

    def __init__(self, tokens: Any, forward: Any, accepts: inspect.Signature) -> None:
        """Take a ``peft.PeftModel`` around the model, and the model's own forward."""
        self._tokens, self._forward, self.__signature__ = tokens, forward, accepts

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Compute with the virtual tokens in front; their logits come first."""
        config, rows = self._tokens.active_peft_config, len(input_ids)
        if options.get("past_key_values") is not None:
            raise UserError(
                "a model with virtual tokens (peft.type=prompt or prefix) computes whole sequences "
                "and takes no past_key_values; use peft.type=lora, or load its model/ with peft"
            )
        count = config.num_virtual_tokens
        if attention_mask is not None:
            options["attention_mask"] = nn.functional.pad(attention_mask, (count, 0), value=1)
        positions = torch.arange(count, device=input_ids.device).expand(rows, count)
        made = self._tokens.get_prompt(rows)
        if config.peft_type == "PROMPT_TUNING":
            embedded = self._tokens.base_model.get_input_embeddings()(input_ids)
            options["inputs_embeds"] = torch.cat((made.to(embedded.dtype), embedded), 1)
            if position_ids is not None:
                options["position_ids"] = torch.cat((positions, position_ids + count), 1)
            return self._forward(**options)
        if position_ids is not None:
            options["position_ids"] = position_ids + count
        return self._forward(input_ids=input_ids, past_key_values=made, **options)


def save_virtual_tokens(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``adapter_model.safetensors`` of ``peft``'s format; ``state`` has one tensor."""
    (values,) = state.values()
    named = {"prompt_embeddings": values.contiguous()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
