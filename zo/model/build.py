"""Load models of any family with transformers: configuration, tokenizer, skeleton, weights."""

import inspect
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.core_model_loading import build_glob_alternation
from transformers.utils import logging

from zo.config.peft import PEFT_KEYS, PeftConfig
from zo.config.schema import TASKS, ModelConfig
from zo.errors import UserError, one_line
from zo.io import quickstart as assets
from zo.io.engines import Engine
from zo.model.adapters import AdaptedSource, add_adapters, initial_adapters
from zo.model.checkpoint import CheckpointSource, shard_files
from zo.model.info import ModelInfo
from zo.model.narrow import narrow_configs
from zo.model.positions import check_positions
from zo.model.source import RandomSource, WeightSource
from zo.model.trained import train_only

# Loading bars would appear between the run's own lines, once per rank.
logging.disable_progress_bar()  # type: ignore[no-untyped-call]

AUTO_CLASS: dict[str, Any] = dict(
    zip(
        TASKS,
        (
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            AutoModelForMaskedLM,
            AutoModelForSeq2SeqLM,
        ),
        strict=True,
    )
)
"""transformers' auto classes, by value of ``model.task``."""
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(RecursionError, StrictDataclassError),
)
"""Raised in transformers by a configuration or a tokenizer that it did not write."""
ATTENTION_WORDS = re.compile(
    "attn_implementation|attention implementation|[Ff]lash ?[Aa]ttention|flash_attn|flex"
)
"""Matches transformers' errors about ``attn_implementation``."""


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
        is_virtual = self.peft.type in PEFT_KEYS["tokens"]
        fits = ("causal-lm",) if is_virtual else ("causal-lm", "sequence-classification")
        if self.peft.type is not None and self.task not in fits:
            other = "use peft.type=lora or ia3, or " if self.task in TASKS[:2] else ""
            raise UserError(
                f"peft.type={self.peft.type} is for model.task={' or '.join(fits)}, and model.name="
                f"{config.name} is of {self.task}; {other}choose what to train by model.train"
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
        except UNREADABLE as error:
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"{key}={path} contains custom code, which is disabled by default; read it, "
                    "then set model.trust_remote_code=true for train.py, or trust_remote_code=true "
                    "for evaluate.py or export.py of a run"
                ) from error
            raise UserError(f"{key}={path} cannot be loaded: {one_line(error, 300)}") from error

    def _task(self) -> str:
        """Return the task that is asked for, or else that of the checkpoint's class.

        Raises:
            UserError: a masked language model, which sees the words that it should predict.
        """
        made_for, task = (self.hf_config.architectures or [""])[0], self.config.task
        if task == "auto":
            task = "causal-lm"
            if made_for.endswith("ForSequenceClassification"):
                task = "sequence-classification"
            elif made_for.endswith("ForMaskedLM"):
                task = "masked-lm"
            elif self.hf_config.is_encoder_decoder and _has(AutoModelForSeq2SeqLM, self.hf_config):
                task = "seq2seq-lm"
        if task == "causal-lm" and self._sees_both_sides():
            raise UserError(
                f"model.name={self.config.name} is a masked language model"
                f"{f' ({made_for})' if made_for else ''}: it sees the words on both sides, so it "
                "cannot be trained as a causal one; use model.task=masked-lm with label words, "
                "model.task=sequence-classification with rows that have a label, or another model"
            )
        return task

    def _sees_both_sides(self) -> bool:
        config = self.hf_config
        is_decoder = getattr(config, "is_decoder", False) or config.is_encoder_decoder
        return _has(AutoModelForMaskedLM, config) and not is_decoder

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
        self._check_task()
        try:
            return self._on_meta(self.hf_config)  # type: ignore[no-any-return]
        except UserError:
            raise
        except UNREADABLE as error:
            raise UserError(
                f"model.name={self.config.name} has no {self.task} model: {one_line(error, 300)}"
            ) from error

    def _check_task(self) -> None:
        """Raise a :class:`UserError` for a task that transformers has no model of this type for."""
        config, name = self.hf_config, self.config.name
        if not _has(self._auto_class(), config) and not hasattr(config, "auto_map"):
            others = [
                f"model.task={task}" for task, auto in AUTO_CLASS.items() if _has(auto, config)
            ]
            raise UserError(
                f"model.name={name} is a {config.model_type}, of which transformers has no "
                f"{self.task} model; use {' or '.join(others) or 'a language model'}"
            )
        if self.task == "seq2seq-lm" and getattr(config, "decoder_start_token_id", None) is None:
            raise UserError(
                f"model.name={name} has no decoder_start_token_id, with which its decoder would "
                "begin; add it to the model's config.json"
            )

    def narrow(self, skeleton: nn.Module) -> nn.Module | None:
        """Build a model of the same structure and a small width; ``None`` if that is not possible.

        For the self-check, which otherwise uses the full width.
        """
        names = [name for name, _ in skeleton.named_parameters()]
        for config in narrow_configs(self.hf_config):
            with suppress(ValueError, RuntimeError, AttributeError):
                model = self._on_meta(config)
                if [name for name, _ in model.named_parameters()] == names:
                    return model  # type: ignore[no-any-return]
        return None

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the model knows.

        Raises:
            UserError: it reads none.
        """
        found = getattr(self.hf_config.get_text_config(), "vocab_size", None)
        if not isinstance(found, int):
            raise UserError(
                f"model.name={self.config.name} has no vocab_size in its configuration, so it does "
                "not read tokens of a tokenizer; use a language model"
            )
        return found

    def check_positions(
        self,
        max_tokens: int,
        skeleton: nn.Module | None = None,
        key: str = "batch.max_tokens",
    ) -> None:
        """Check that sequences fit (see :func:`zo.model.positions.check_positions`)."""
        text, virtual = self.hf_config.get_text_config(), self.peft.virtual_tokens
        check_positions(self.config.name, text, max_tokens, skeleton, virtual, key)

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
                model = self._auto_class().from_config(
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
                f"{one_line(error, 300)}; use {' or '.join(self._attentions(hf_config))}"
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

    def _auto_class(self) -> Any:
        """Return transformers' auto class of the task; of a model that sees or hears too, its own.

        Its text is trained (see :func:`zo.model.held.find_held`).
        """
        more = (AutoModelForImageTextToText, AutoModelForSeq2SeqLM)
        is_text = self.task != "causal-lm" or self.hf_config.is_encoder_decoder
        classes = (AUTO_CLASS[self.task], *(() if is_text else more))
        return next((auto for auto in classes if _has(auto, self.hf_config)), classes[0])

    def _attentions(self, hf_config: Any) -> list[str]:
        """Return the values of ``model.attention`` that the model's class declares support for."""
        kind: Any = self._auto_class()._model_mapping.get(type(hf_config), None)
        kind = kind[0] if isinstance(kind, list | tuple) else kind
        flags = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
        flags["flash_attention_2"] = "_supports_flash_attn"
        return [
            "auto",
            "eager",
            *(name for name, flag in flags.items() if getattr(kind, flag, False)),
        ]

    def info(self, skeleton: nn.Module) -> ModelInfo:
        """Return the facts of the model that data and objective need.

        Raises:
            UserError: it needs more than tokens.
        """
        takes = inspect.signature(skeleton.forward).parameters
        needed = [
            name
            for name, parameter in takes.items()
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and name not in ("input_ids", "attention_mask")
        ]
        if needed:
            raise UserError(
                f"model.name={self.config.name} needs {', '.join(needed)} beside tokens, and data "
                "here is text alone; use a model that reads text by itself"
            )
        end = getattr(self.hf_config.get_text_config(), "eos_token_id", None)
        return ModelInfo(
            task=self.task,
            vocab_size=self.vocab_size,
            accepts=frozenset(takes),
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
                f"the weights of model.name={name} cannot be loaded: {one_line(error, 300)}; give "
                "a folder with intact safetensors files, or set model.weights=random"
            ) from error
        if found.missing and self.task != "sequence-classification":
            raise UserError(
                f"model.name={name} lacks {len(found.missing)} weights, {found.missing[0]} first; "
                "give a complete checkpoint of a language model, or set model.weights=random"
            )
        return found


def _has(auto: Any, hf_config: Any) -> bool:
    """Return True if an auto class has a model for a configuration."""
    return type(hf_config) in auto._model_mapping
