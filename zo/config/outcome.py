"""Keys of what is made of a run: its scores (``eval``) and its model (``export``)."""

from dataclasses import dataclass

from zo.config.checks import at_least, choice


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during a run."""

    every: int = 0
    """Steps between evaluations; 0: never. Otherwise also before the first and after the last
    step."""
    metric: str | None = None
    """Score that the best step is chosen by, such as ``loss`` or ``macro_f1``; by default accuracy,
    F1 or exact match where the task has one, else the loss."""
    patience: int | None = None
    """Evaluations in a row without a better score after which the run ends; by default it goes on
    to run.steps."""

    def __post_init__(self) -> None:
        at_least("eval.every", self.every, 0)
        if self.patience is not None:
            at_least("eval.patience", self.patience, 1)


@dataclass(frozen=True)
class ExportConfig:
    """Outputs of a finished run."""

    at_end: bool = True
    """Write ``model/``, a Hugging Face folder."""
    step: str = "last"
    """Step whose weights it has: the ``last``, or that of the ``best`` evaluation."""

    def __post_init__(self) -> None:
        choice("export.step", self.step, ("best", "last"))
