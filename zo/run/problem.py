"""Problem of a run: a model, an objective and batches, from a configuration or from the user."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zo.config.objective import reward_name
from zo.config.schema import Config
from zo.data.batches import build_data, pad_id
from zo.data.report import DataReport
from zo.data.rows import SYNTHETIC, Rows
from zo.data.tasks import Batch, Task
from zo.errors import UserError
from zo.io.engines import Engine
from zo.model.build import ModelLoader
from zo.model.source import ModelSource, WeightSource
from zo.model.trained import train_only


@dataclass(frozen=True)
class Problem:
    """A model before its weights are read, its objective and its data."""

    skeleton: nn.Module
    """The model's structure; its parameters may be on meta, and stay there."""
    build: Callable[[], nn.Module]
    """Builds the model that computes; its weights come from ``base``."""
    base: Callable[[Engine], WeightSource]
    """Makes the source of the weights, given the engine that reads files."""
    objective: Callable[[nn.Module, Batch], Tensor]
    """Model and batch -> sum of losses and number of terms."""
    batches: Callable[[int, int], Batch]
    """Step, from 0, and column -> micro-batch."""
    data_checksum: str = ""
    report: DataReport | None = None
    task: Task | None = None
    dev_batches: Sequence[Batch] = ()
    tokenizer: Any = None
    exportable: bool = False
    """True if the model can be written as a Hugging Face folder."""
    narrow: nn.Module | None = None
    """A model of the same structure and a small width, on meta."""
    own: bool = False
    """True if the model is the user's object, which receives the trained weights at the end."""


def own_problem(
    model: nn.Module,
    objective: Callable[[nn.Module, Batch], Tensor],
    batches: Callable[[int, int], Batch],
    train: str | None = None,
) -> Problem:
    """Return the problem of a user's own model, objective and batches.

    Args:
        model: with ``train``, ``requires_grad`` of its parameters is *set in place*.
        objective: see :class:`Problem`.
        batches: see :class:`Problem`.
        train: ``model.train``.

    Raises:
        UserError: a pattern of ``train`` matches no parameter.
    """
    train_only(model, train)
    return Problem(
        model,
        model.eval,
        lambda engine: ModelSource(model),
        objective,
        batches,
        exportable=hasattr(model, "save_pretrained"),
        own=True,
    )


def _check_rewarded(config: Config, reward: str, loader: ModelLoader) -> None:
    """Check that a reward can be had of a model's completions.

    Raises:
        UserError: it cannot.
    """
    said, memory = f"objective.name={reward} rewards completions", config.memory
    if loader.task != "causal-lm":
        raise UserError(
            f"{said}, which model.name={config.model.name}, a sequence classifier, does not write; "
            "use a causal language model"
        )
    if memory.store != "device":
        raise UserError(
            f"{said}, for which all weights must be where the model computes; use "
            f"memory.store=device in place of {memory.store}"
        )
    if config.data.name == SYNTHETIC:
        raise UserError(f"{said}, and data.name={SYNTHETIC} has no prompts; give rows with them")
    loader.check_positions(
        config.batch.max_tokens + config.generation.max_new_tokens,
        "batch.max_tokens + generation.max_new_tokens",
    )


def build_problem(config: Config) -> Problem:
    """Return the problem of a configuration, read from folders or the hub; no weights are read yet.

    Raises:
        UserError: the model, its tokenizer or the data cannot be used.
    """
    if not config.data.name:
        raise UserError("data.name is empty; give a file, a hub id, a task or synthetic")
    loader, rows = ModelLoader(config.model, config.peft), Rows(config.data)
    loader.check_positions(config.batch.max_tokens)
    if reward := reward_name(config.objective, config.data.name):
        _check_rewarded(config, reward, loader)
    tokenizer = None if rows.synthetic else loader.tokenizer()
    classes = (
        rows.class_names(loader.class_names) if loader.task == "sequence-classification" else []
    )
    vocab_size = loader.hf_config.get_text_config().vocab_size
    loader.set_classes(classes, pad_id(tokenizer, vocab_size))
    skeleton = loader.skeleton()
    data = build_data(rows, config, tokenizer, loader.info(skeleton), classes)
    return Problem(
        skeleton=skeleton,
        build=loader.skeleton,
        base=lambda engine: loader.weights(skeleton, config.run.seed, engine),
        objective=data.task.objective,
        batches=data.batches,
        data_checksum=data.checksum,
        report=data.report,
        task=data.task,
        dev_batches=data.dev_batches,
        tokenizer=tokenizer,
        exportable=True,
        narrow=loader.narrow(skeleton),
    )
