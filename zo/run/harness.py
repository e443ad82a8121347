"""Scores by the tasks of lm-eval (EleutherAI's evaluation harness), for a run's model as it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo.errors import UserError, one_line
from zo.model.build import ModelLoader
from zo.run.restore import FinishedRun


def check_harness(tasks: Sequence[str], own_tasks: Path | None) -> Any:
    """Return lm-eval's task manager, for tasks that it knows.

    Args:
        tasks: names.
        own_tasks: folder of more tasks, as YAML.

    Raises:
        UserError: lm-eval is missing, or a task is not known.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"lm_eval={','.join(tasks)} needs the extra eval ({one_line(error)}); "
            "pip install 'lm-eval>=0.4.13'"
        ) from error
    if own_tasks is not None and not own_tasks.is_dir():
        raise UserError(f"lm_eval_tasks={own_tasks} is not a folder; give one with tasks as YAML")
    manager = TaskManager(include_path=None if own_tasks is None else str(own_tasks))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise UserError(
            f"lm_eval={','.join(unknown)} is not a task of lm-eval; `lm-eval ls tasks` lists them, "
            "and lm_eval_tasks=FOLDER adds your own"
        )
    return manager


def harness_scores(
    loaded: FinishedRun, tasks: Sequence[str], manager: Any, batch: int
) -> dict[str, dict[str, float]]:
    """Return the scores of tasks by name, and close the model's weights, which it holds itself.

    Args:
        loaded: the model; in host memory where its store is not the device.
        tasks: names.
        manager: from :func:`check_harness`.
        batch: sequences of a forward.

    Raises:
        UserError: the model does not write text, or a task cannot be scored.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    config, tokenizer = loaded.config, loaded.problem.tokenizer
    loader = ModelLoader(config.model, config.peft)
    if loader.task != "causal-lm":
        raise UserError(f"lm_eval= is for language models, and {config.model.name} is none")
    tokenizer = loader.tokenizer() if tokenizer is None else tokenizer  # Of synthetic data.
    loaded.replica.pass_over()  # The last entries of the log, too.
    loaded.replica.close(give_back=True)
    model = HFLM(pretrained=loaded.replica.model, tokenizer=tokenizer, batch_size=batch)
    try:
        found = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, log_samples=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"lm_eval={','.join(tasks)} cannot be scored: {one_line(error)}") from error
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in scores.items()
            if isinstance(value, int | float)
        }
        for task, scores in found["results"].items()
    }
