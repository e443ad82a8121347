"""What a run trains: a model, an objective and batches, from a configuration or from the user's own hands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from zo.config import Config, UserError
from zo.data import Rows, build_data, pad_id
from zo.model import Source
from zo.tasks import Batch, Task


@dataclass(frozen=True)
class Problem:
    """A model before its weights are read, and what it is trained on."""

    skeleton: nn.Module
    """The model's structure; its parameters may be on meta."""
    load: Callable[[], nn.Module]
    """The model with its weights, on CPU."""
    objective: Callable[[nn.Module, Batch], Tensor]
    """Model and batch -> sum of losses and number of terms."""
    batches: Callable[[int, int], Batch]
    """Step, from 0, and column -> micro-batch."""
    data_checksum: str = ""
    task: Task | None = None
    dev_batches: Sequence[Batch] = ()
    tokenizer: Any = None
    exportable: bool = False
    """Whether the model can be written as a Hugging Face folder."""
    facts: dict[str, Any] = field(default_factory=dict)


def own_problem(
    model: nn.Module, objective: Callable[[nn.Module, Batch], Tensor], batches: Callable[[int, int], Batch]
) -> Problem:
    """A user's own model, objective and batches."""
    return Problem(model, model.eval, objective, batches, exportable=hasattr(model, "save_pretrained"))


def build_problem(config: Config) -> Problem:
    """What a configuration names, read from folders or the hub; the weights are not read yet.

    Raises:
        UserError: what is wrong with the model's name, its tokenizer, or the data.
    """
    if not config.data.name:
        raise UserError("data.name is empty; give a file, a hub id, a task or synthetic")
    source, rows = Source(config.model), Rows(config.data)
    tokenizer = None if rows.synthetic else source.tokenizer()
    classes = rows.class_names(source.class_names) if source.task == "sequence-classification" else []
    source.set_classes(classes, pad_id(tokenizer))
    skeleton = source.skeleton()
    data = build_data(rows, config, tokenizer, source.info(skeleton), classes)
    return Problem(
        skeleton=skeleton,
        load=lambda: source.load(config.run.seed),
        objective=data.task.objective,
        batches=data.batches,
        data_checksum=data.checksum,
        task=data.task,
        dev_batches=data.dev_batches,
        tokenizer=tokenizer,
        exportable=True,
    )
