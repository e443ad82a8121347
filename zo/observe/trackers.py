"""Trackers of experiments: TensorBoard, wandb, MLflow, trackio and others, by way of accelerate.

Only rank 0 has any. A tracker that fails is dropped with one warning, and never ends a run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, patch_environment

from zo.errors import UserError, one_line

PROJECT = "zo"
DEFAULT = "tensorboard"


def _installed() -> set[str]:
    """Return the names of trackers whose library is installed, and of registered classes."""
    with_library = {str(kind) for kind in LoggerType}
    found = {str(kind) for kind in get_available_trackers()}
    return found | {name for name in LOGGER_TYPE_TO_CLASS if name not in with_library}


def check_trackers(names: Sequence[str] | None) -> None:
    """Check that trackers can be used, before a run begins.

    Raises:
        UserError: accelerate has no tracker of a name, or its library is not installed.
    """
    installed = _installed()
    for name in names or ():
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"run.trackers={name} is not known; use some of "
                f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in installed:
            raise UserError(
                f"run.trackers={name} is not installed; pip install {name}, or leave it out"
            )


class Trackers:
    """The trackers of one run."""

    def __init__(
        self,
        names: Sequence[str] | None,
        folder: Path,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Start trackers.

        Args:
            names: of accelerate; ``None`` for TensorBoard where it is installed.
            folder: of the run; a tracker with files of its own has a folder in it.
            settings: of the run, by key.
            warn: takes one line for each tracker that fails.
        """
        self._warn = warn
        self._trackers: list[GeneralTracker] = []
        wanted = ([DEFAULT] if DEFAULT in _installed() else []) if names is None else names
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in settings.items()
        }
        for name in dict.fromkeys(wanted):
            self._attempt(name, partial(self._start, name, folder, plain))

    def _start(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        # accelerate's log needs a state, which would join torchrun's ranks by a group of its own.
        with patch_environment(local_rank=-1):
            PartialState()
        make = LOGGER_TYPE_TO_CLASS[name]
        tracker = make(PROJECT, folder / name) if make.requires_logging_directory else make(PROJECT)
        tracker.main_process_only = False  # This process is rank 0 by our own count.
        tracker.start()
        tracker.store_init_configuration(dict(settings))
        self._trackers.append(tracker)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Give the finite numbers among a step's values to every tracker."""
        numbers = {
            key: value
            for key, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value) and key != "step"
        }
        for tracker in list(self._trackers):
            self._attempt(tracker.name, partial(tracker.log, numbers, step=step), tracker)

    def finish(self) -> None:
        """End every tracker."""
        for tracker in self._trackers:
            self._attempt(tracker.name, tracker.finish)
        self._trackers = []

    def _attempt(
        self, name: str, act: Callable[[], None], tracker: GeneralTracker | None = None
    ) -> None:
        """Call into a tracker; if that fails say so, and drop it."""
        try:
            act()
        except Exception as error:  # Of any library, and none is worth a run.
            said = one_line(f"{type(error).__name__}: {error}", 200)
            self._warn(f"warning: tracker {name} failed and is left out: {said}")
            if tracker in self._trackers:
                self._trackers.remove(tracker)
