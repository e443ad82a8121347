"""Arguments, ``--help`` and error handling that the commands share."""

import errno
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf

from zo.config.recipes import DEFAULT, FOLDER, OWN, header, keys, recipe_names, resolve
from zo.config.redact import without_secrets
from zo.errors import RankError, UserError, one_line
from zo.io.hardware import name_accelerator
from zo.io.signals import end_with_agent

DONE, RANK_LOST, USER_ERROR = 0, 1, 2


def run(command: Callable[[list[str]], None]) -> int:
    """Run a command on the process's arguments.

    A user's mistake, or too little memory, becomes one line on stderr and exit code 2, the loss of
    another rank one line and exit code 1.
    """
    rank = int(os.environ.get("RANK", 0))
    quiet_libraries()
    try:
        end_with_agent()
        share_cores()
        command(sys.argv[1:])
    except UserError as error:
        # Most mistakes are met by every rank; rank 0 speaks, and its end lets torchrun end the
        # others.
        if rank:
            time.sleep(3)
        end_with(f"error: {error}" if not rank else f"error on rank {rank}: {error}")
        return USER_ERROR
    except RankError as error:
        end_with(f"error on rank {rank}: {error}")
        # A worker may still wait for the lost rank; what it writes is whole under its name or not
        # there.
        os._exit(RANK_LOST)
    except (MemoryError, RuntimeError, OSError) as error:
        if (remedy := out_of_memory(error)) is None:
            raise
        end_with(f"error on rank {rank}: {remedy}" if rank else f"error: {remedy}")
        # Threads may hold what the memory went to, or fail for want of it while Python winds down.
        os._exit(USER_ERROR)
    return DONE


def end_with(line: str) -> None:
    """Print the line that says why a command ends, and leave it for torchrun.

    torchrun prints a traceback of its own below that line, and then a report of the first rank that
    failed, which ends with what that rank left in a file: the format is that of
    ``torch``'s ``ErrorHandler``, which takes seconds to import.
    """
    print(line, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": without_secrets(line), "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": said}), encoding="utf-8")


def out_of_memory(error: Exception) -> str | None:
    """Return one line on what to change if an error means too little memory, else ``None``.

    torch has a class of its own for a GPU's memory and none for the host's.
    """
    said = one_line(error, 200)
    # A command that fails before it has imported torch has not run out of a GPU's memory.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU's memory is too small ({said}); use memory.store=host, a smaller batch.micro "
            "or batch.max_tokens, memory.activations=host, or model.dtype=bfloat16"
        )
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(words in said for words in HOST_MEMORY_WORDS)
    ):
        return (
            f"the host's memory is too small ({said or type(error).__name__}); use "
            "memory.store=disk, a smaller batch.micro or batch.max_tokens, or "
            "model.dtype=bfloat16; fewer ranks on a node share its memory, too"
        )
    return None


HOST_MEMORY_WORDS = (
    "DefaultCPUAllocator: ",
    "Cannot allocate memory",
    "std::bad_alloc",
    "unable to mmap",
    "can't start new thread",
)
"""Words of torch's and the system's errors when the host has no memory left."""


def quiet_libraries() -> None:
    """Silence the warnings and progress bars of libraries, unless the environment sets them.

    Downloads, which may take an hour, keep their bars where somebody looks: on rank 0, at a
        terminal.
    """
    name_accelerator()
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if int(os.environ.get("RANK", 0)) or not sys.stderr.isatty():
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def share_cores() -> None:
    """Share the machine's cores among its ranks; torchrun gives each rank one."""
    if (
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
        and os.environ.get("OMP_NUM_THREADS", "1") == "1"
    ):
        import torch

        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"]))
        )


def split(arguments: Sequence[str], own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split ``key=value`` arguments into a command's own and the rest."""
    mine, rest = {}, []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if sign and key in own:
            mine[key] = value
        else:
            rest.append(argument)
    return mine, rest


def flag(own: Mapping[str, str], key: str, meaning: str) -> bool:
    """Return a command's own argument that is true or false; false where it is not given.

    Raises:
        UserError: it is neither; ``meaning`` ends the message.
    """
    value = own.get(key, "false")
    if value not in ("true", "false"):
        raise UserError(f"{key}={value} is neither true nor false; {meaning}")
    return value == "true"


def step_of(own: Mapping[str, str]) -> int | Literal["best"] | None:
    """Return a command's ``step=``, a step of a run or ``best``; ``None`` where it is not given.

    Raises:
        UserError: it is neither.
    """
    value = own.get("step")
    if value is None:
        return None
    if value == "best":
        return "best"
    if not value.isdecimal():
        raise UserError(
            f"step={value} is not a number; give a step of the run, 0 for the base model, or best"
        )
    return int(value)


def asked_for_text(
    arguments: list[str], recipe: str, overrides: list[str], usage: str
) -> str | None:
    """Return the text of ``--help`` or ``--cfg job``, or ``None`` if neither is asked for."""
    if "--help" in arguments or "-h" in arguments:
        return help_text(usage, recipe, [o for o in overrides if "=" in o])
    if "--cfg" in arguments:
        at = overrides.index("--cfg")
        if overrides[at + 1 : at + 2] != ["job"]:
            raise UserError("--cfg shows one thing: --cfg job, the resolved configuration")
        return OmegaConf.to_yaml(resolve(recipe, overrides[:at] + overrides[at + 2 :])).rstrip()
    return None


def help_text(usage: str, recipe: str, overrides: Sequence[str] = ()) -> str:
    """Return usage, the recipes with their first line, and every key with value and sentence."""
    used = {
        DEFAULT: " (used without arguments)",
        OWN: " (used with model.name or data.name, and without recipe)",
    }
    lines = [usage, "", "recipes:"]
    for name in recipe_names():
        first = header(FOLDER / f"{name}.yaml")
        lines.append(f"  {name:<14} {first}{used.get(name, '')}")
    try:
        resolved, given = resolve(recipe, overrides), " and these arguments" * bool(overrides)
    except UserError:  # Help is for who does not know the keys.
        resolved, given = resolve(recipe), ""
    lines += ["", f"keys (value with recipe={recipe}{given}):"]
    for key, _, sentence in keys():
        value = OmegaConf.select(resolved, key)
        lines.append(f"  {key} ({'' if value is None else value}): {sentence}")
    return "\n".join(lines)


def existing_run(path: str) -> Path:
    """Return the folder of an existing run.

    Raises:
        UserError: there is none.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"run={path} does not hold a run; give the folder that the last line of a training "
            "named run_dir"
        )
    return folder
