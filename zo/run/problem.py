"""Problem of a run: a model, an objective and batches, from a configuration or from the user."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from zo.config.objective import reward_name
from zo.config.schema import AUTO, Config
from zo.data.batches import build_data, pad_id
from zo.data.named import NamedRows
from zo.data.pairs import Reference
from zo.data.papers import TASKS
from zo.data.report import DataReport
from zo.data.rows import SYNTHETIC, Rows
from zo.data.tasks import Batch, Task
from zo.errors import UserError
from zo.io.engines import Engine
from zo.model.build import ModelLoader
from zo.model.source import ModelSource, WeightSource
from zo.model.trained import train_only
from zo.run.objective import Objective, OwnObjective


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
    check: Callable[[nn.Module, Batch], Tensor] | None = None
    """Objective that shows how the model computes, where the run's has few values."""
    data_checksum: str = ""
    report: DataReport | None = None
    task: Task | None = None
    dev_batches: Sequence[Batch] = ()
    reference: Reference | None = None
    """Of pairs: what their answers' log-probabilities were under the base model."""
    tokenizer: Any = None
    exportable: bool = False
    """True if the model can be written as a Hugging Face folder."""
    narrow: nn.Module | None = None
    """A model of the same structure and a small width, on meta."""
    uniform_loss: float | None = None
    """Of predictions that are uniform over the vocabulary or the classes, in nats, where the
    objective is cross-entropy."""
    own: bool = False
    """True if the model is the user's object, which receives the trained weights at the end."""

    @property
    def loss_dtype(self) -> torch.dtype:
        """The coarsest type of a loss so far; zo's own are summed in float64."""
        own = self.objective if isinstance(self.objective, OwnObjective) else None
        return own.dtype if own else torch.float64


def own_problem(
    model: nn.Module,
    objective: Objective,
    batches: Callable[[int, int], Batch],
    train: str | None = None,
) -> Problem:
    """Return the problem of a user's own model, objective and batches.

    Args:
        model: with ``train``, ``requires_grad`` of its parameters is *set in place*.
        objective: see :class:`zo.run.objective.OwnObjective`.
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
        OwnObjective(objective),
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
            f"{said}, which model.name={config.model.name}, of {loader.task}, does not write; "
            "use a causal language model"
        )
    if memory.store != "device":
        raise UserError(
            f"{said}, for which all weights must be where the model computes; use "
            f"memory.store=device in place of {memory.store}"
        )
    if config.update.lr == AUTO:
        raise UserError(
            f"{said}, and update.lr={AUTO} tries rates by a loss of given texts; give a number: "
            "with estimator.shape=z it is the length of a step, and "
            "recipe=countdown-smollm2-135m has one to begin with"
        )
    if config.data.name == SYNTHETIC:
        raise UserError(f"{said}, and data.name={SYNTHETIC} has no prompts; give rows with them")
    loader.check_positions(
        config.batch.max_tokens + config.generation.max_new_tokens,
        key="batch.max_tokens + generation.max_new_tokens",
    )


def build_problem(config: Config) -> Problem:
    """Return the problem of a configuration, read from folders or the hub; no weights are read yet.

    Raises:
        UserError: the model, its tokenizer or the data cannot be used.
    """
    loader = ModelLoader(config.model, config.peft)
    rows = _rows(config, loader.task)
    loader.check_positions(config.batch.max_tokens)
    reward = reward_name(config.objective, config.data.name)
    if reward is not None:
        _check_rewarded(config, reward, loader)
    tokenizer = None if rows.synthetic else loader.tokenizer()
    classes = (
        rows.class_names(loader.class_names) if loader.task == "sequence-classification" else []
    )
    loader.set_classes(classes, pad_id(tokenizer, loader.vocab_size))
    skeleton = loader.skeleton()
    loader.check_positions(config.batch.max_tokens, skeleton)
    data = build_data(rows, config, tokenizer, loader.info(skeleton), classes)
    return Problem(
        skeleton=skeleton,
        build=loader.skeleton,
        base=lambda engine: loader.weights(skeleton, config.run.seed, engine),
        objective=data.task.objective,
        check=data.task.checked,
        batches=data.batches,
        data_checksum=data.checksum,
        report=data.report,
        task=data.task,
        dev_batches=data.dev_batches,
        reference=data.reference,
        tokenizer=tokenizer,
        exportable=True,
        narrow=loader.narrow(skeleton),
        uniform_loss=None if reward else log(max(2, len(classes) or loader.vocab_size)),
    )


def _rows(config: Config, model_task: str) -> Rows:
    if config.task is not None and config.data.name != SYNTHETIC:
        return NamedRows(config.task, TASKS, config.data, config.run.seed, model_task)
    if not config.data.name:
        raise UserError("data.name is empty; give a file, a hub id, a task or synthetic")
    return Rows(config.data)
