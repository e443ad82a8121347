"""Load models of any family with transformers: configuration, tokenizer, skeleton, weights."""

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.core_model_loading import build_glob_alternation
from transformers.utils import logging

from zo.config.peft import PEFT_KEYS, PeftConfig
from zo.config.schema import TASKS, ModelConfig
from zo.errors import UserError
from zo.io import quickstart as assets
from zo.io.engines import Engine
from zo.model.adapters import AdaptedSource, add_adapters, initial_adapters
from zo.model.checkpoint import CheckpointSource, shard_files
from zo.model.info import ModelInfo
from zo.model.source import RandomSource, WeightSource
from zo.model.trained import train_only

# Loading bars would appear between the run's own lines, once per rank.
logging.disable_progress_bar()  # type: ignore[no-untyped-call]

AUTO_CLASS = dict(
    zip(
        TASKS,
        (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForMaskedLM),
        strict=True,
    )
)
"""transformers' auto classes, by value of ``model.task``."""
ATTENTION_WORDS = re.compile(
    "attn_implementation|attention implementation|[Ff]lash ?[Aa]ttention|flash_attn|flex"
)
"""Matches transformers' errors about ``attn_implementation``."""
NARROW_HEAD = 16
"""Width of an attention head in a narrow copy."""
WIDTHS, LENGTHS = (
    re.compile("hidden|emb|model|dim|width"),
    re.compile("max|position|vocab|layers|seq"),
)
"""Configuration keys that are widths, and keys that are not though their values may be equal."""


class ModelLoader:
    """A model's configuration, and from it the tokenizer, the skeleton and the weight source."""

    def __init__(self, config: ModelConfig, peft: PeftConfig | None = None) -> None:
        """Read the model's configuration.

        Raises:
            UserError: the folder or hub id does not exist, its configuration is unknown, or
                virtual tokens are asked for and it is not of a causal language model.
        """
        if not config.name:
            raise UserError(
                "model.name is empty; give a hub id or a folder that holds a config.json"
            )
        self.config = config
        self.path = (
            str(assets.model_folder(config.name)) if config.name in assets.MODELS else config.name
        )
        self.hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        self.hf_config: Any = self._read("model.name", self.path, AutoConfig)
        self.task = self._task()
        self.peft = peft or PeftConfig()
        if self.peft.type in PEFT_KEYS["tokens"] and self.task != "causal-lm":
            raise UserError(
                f"peft.type={self.peft.type} is for causal language models, and model.name="
                f"{config.name} is of model.task={self.task}; use peft.type=lora or ia3, or choose "
                "what to train by model.train"
            )

    def _read(self, key: str, path: str, kind: Any) -> Any:
        """Read a configuration or tokenizer from a folder or the hub."""
        folder = Path(path).expanduser()
        looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
        if looks_local and not folder.is_dir():
            raise UserError(
                f"{key}={path} is not a folder; give an existing folder or a hub id such as "
                "facebook/opt-125m"
            )
        try:
            return kind.from_pretrained(str(folder) if folder.is_dir() else path, **self.hub)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"{key}={path} contains custom code, which is disabled by default; read it, "
                    "then set model.trust_remote_code=true for train.py, or trust_remote_code=true "
                    "for evaluate.py or export.py of a run"
                ) from error
            raise UserError(f"{key}={path} cannot be loaded: {_first_line(error)}") from error

    def _task(self) -> str:
        if self.config.task != "auto":
            return self.config.task
        architectures = self.hf_config.architectures or [""]
        endings = {
            "ForSequenceClassification": "sequence-classification",
            "ForMaskedLM": "masked-lm",
        }
        found = (task for end, task in endings.items() if architectures[0].endswith(end))
        return next(found, "causal-lm")

    def tokenizer(self) -> Any:
        """Load the tokenizer of ``model.tokenizer``, or else of the model.

        Raises:
            UserError: it cannot be loaded.
        """
        name = self.config.tokenizer
        return self._read(
            "model.tokenizer" if name else "model.name", name or self.path, AutoTokenizer
        )

    def set_classes(self, names: list[str], pad_token_id: int) -> None:
        """Set the classes of a classifier's head; no effect on a language model."""
        if self.task == "sequence-classification":
            self.hf_config.num_labels = len(names)
            self.hf_config.id2label = dict(enumerate(names))
            self.hf_config.label2id = {name: i for i, name in enumerate(names)}
            if getattr(self.hf_config, "pad_token_id", None) is None:
                self.hf_config.pad_token_id = pad_token_id

    @property
    def class_names(self) -> list[str]:
        """Class names of a checkpoint that already is a classifier, else empty."""
        if self.config.weights == "random" or not (self.hf_config.architectures or [""])[
            0
        ].endswith("Classification"):
            return []
        return [name for _, name in sorted(self.hf_config.id2label.items())]

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of the weights."""
        return getattr(torch, self.config.dtype)  # type: ignore[no-any-return]

    def skeleton(self) -> nn.Module:
        """Build the model with real buffers and parameters on meta, each of its stored dtype.

        Raises:
            UserError: transformers has no model for this configuration and task.
        """
        try:
            return self._on_meta(self.hf_config)  # type: ignore[no-any-return]
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"model.name={self.config.name} has no {self.task} model: {_first_line(error)}"
            ) from error

    def narrow(self, skeleton: nn.Module) -> nn.Module | None:
        """Build a model of the same structure and a small width; ``None`` if that is not possible.

        For the self-check: a layer of a large model has gigabytes, and the modules that read its
        weights do not depend on its width.
        """
        config, width = (
            copy.deepcopy(self.hf_config),
            getattr(self.hf_config.get_text_config(), "hidden_size", 0),
        )
        heads = getattr(config.get_text_config(), "num_attention_heads", 0)
        if not width or not heads or width <= heads * NARROW_HEAD:
            return None
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            for key, value in list(vars(part).items()):
                if (
                    value == width
                    and type(value) is int
                    and WIDTHS.search(key)
                    and not LENGTHS.search(key)
                ):
                    setattr(part, key, heads * NARROW_HEAD)
            if isinstance(getattr(part, "head_dim", None), int):
                part.head_dim = NARROW_HEAD
        try:
            model = self._on_meta(config)
        except (ValueError, RuntimeError, AttributeError):
            return None  # The self-check uses the full width.
        same = [n for n, _ in model.named_parameters()] == [
            n for n, _ in skeleton.named_parameters()
        ]
        return model if same else None

    def check_positions(self, max_tokens: int, key: str = "batch.max_tokens") -> None:
        """Check that sequences of ``max_tokens``, which ``key`` sets, fit the model's positions.

        Raises:
            UserError: they do not.
        """
        text = self.hf_config.get_text_config()
        # Common configuration keys; a model without any of them has no limit.
        found = (
            (key, getattr(text, key, None))
            for key in ("max_position_embeddings", "n_positions", "n_ctx")
        )
        of, limit = next(
            ((k, n) for k, n in found if isinstance(n, int) and n > 0), ("", max_tokens)
        )
        taken = self.peft.virtual_tokens if key else 0
        if max_tokens > limit - taken:
            beside = f" beside peft.tokens={taken}" if taken else ""
            raise UserError(
                f"{key}={max_tokens} is more than the {limit} positions of "
                f"model.name={self.config.name} ({of}){beside}; use at most {limit - taken}"
            )

    def _on_meta(self, hf_config: Any) -> Any:
        """Build a model on meta with its adapters, and mark what is trained."""
        model = self._bare(hf_config)
        train_only(model, self.config.train)
        if self.peft.type is not None:
            add_adapters(model, self.peft, self.config.name, self.config.revision, self.task)
        return model.eval()

    def _bare(self, hf_config: Any) -> Any:
        asked = self.config.attention
        try:
            with init_empty_weights(include_buffers=False):
                model = AUTO_CLASS[self.task].from_config(  # type: ignore[no-untyped-call]
                    hf_config,
                    dtype=self.dtype,
                    # None: sdpa if the model's class supports it, else eager.
                    attn_implementation=None if asked == "auto" else asked,
                    trust_remote_code=self.config.trust_remote_code,
                )
        except (ValueError, ImportError) as error:
            if asked == "auto" or not ATTENTION_WORDS.search(str(error)):
                raise
            raise UserError(
                f"model.attention={asked} does not work for model.name={self.config.name}: "
                f"{_first_line(error)}; use {' or '.join(self._attentions(hf_config))}"
            ) from error
        # Some families keep some parameters in float32 for any dtype; from_config ignores that.
        if plan := model._get_dtype_plan(self.dtype):
            patterns, by_group, _ = build_glob_alternation(list(plan))
            for name, parameter in model.named_parameters():
                if found := patterns.search(name):
                    parameter.data = parameter.data.to(plan[by_group[str(found.lastgroup)]])
        # init_empty_weights makes a new Parameter for each name, which unties tied ones.
        model.tie_weights()
        return model.eval()

    def _attentions(self, hf_config: Any) -> list[str]:
        """Return the values of ``model.attention`` that the model's class declares support for."""
        auto: Any = AUTO_CLASS[self.task]
        kind: Any = auto._model_mapping.get(type(hf_config), None)
        kind = kind[0] if isinstance(kind, list | tuple) else kind
        flags = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
        flags["flash_attention_2"] = "_supports_flash_attn"
        return [
            "auto",
            "eager",
            *(name for name, flag in flags.items() if getattr(kind, flag, False)),
        ]

    def info(self, skeleton: nn.Module) -> ModelInfo:
        """Return the facts of the model that data and objective need."""
        text = self.hf_config.get_text_config()
        end = getattr(text, "eos_token_id", None)
        return ModelInfo(
            task=self.task,
            vocab_size=text.vocab_size,
            accepts=frozenset(inspect.signature(skeleton.forward).parameters),
            end_tokens=() if end is None else tuple(end) if isinstance(end, list) else (end,),
        )

    def weights(self, skeleton: nn.Module, seed: int, engine: Engine) -> WeightSource:
        """Return the source of the model's weights.

        Args:
            skeleton: from :meth:`skeleton`.
            seed: of random weights, and of a head that the checkpoint lacks.
            engine: reads the shards.

        Raises:
            UserError: there are no weights, or some are missing.
        """
        if self.peft.type is None:
            return self._base(skeleton, seed, engine)
        base = self._base(self._bare(self.hf_config), seed, engine)
        bare = self._bare(self.hf_config)
        return AdaptedSource(base, initial_adapters(bare, self.peft, seed, self.task))

    def _base(self, skeleton: nn.Module, seed: int, engine: Engine) -> WeightSource:
        """Return the source of the weights of a model without adapters."""
        fresh = RandomSource(skeleton, seed)
        if self.config.weights == "random":
            return fresh
        name = self.config.name
        try:
            found = CheckpointSource(skeleton, shard_files(self.path, self.hub), engine, fresh)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the weights of model.name={name} cannot be loaded: {_first_line(error)}; give a "
                "folder with intact safetensors files, or set model.weights=random"
            ) from error
        if found.missing and self.task != "sequence-classification":
            raise UserError(
                f"model.name={name} lacks {len(found.missing)} weights, {found.missing[0]} first; "
                "give a complete checkpoint of a language model, or set model.weights=random"
            )
        return found


def _first_line(error: Exception) -> str:
    """Return an error's message as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
