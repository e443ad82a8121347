"""Runs in processes of their own: alone, as several ranks with gloo, or with a kill -9 at a chosen moment.

The processes are forked from a server that has imported zo and nothing else has run in, which saves its five seconds of
imports in each of them.
"""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from functools import reduce
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["zo.trainer", "zo.recipe", "transformers.models.llama.modeling_llama"])

KILLED = -signal.SIGKILL


def kill_at(module, function, call, before):
    """In this process, end by SIGKILL before or after the n-th call of a function."""
    *owner, function = function.split(".")
    owner = reduce(getattr, owner, importlib.import_module(module))
    original, calls = getattr(owner, function), []

    def killed(*arguments, **options):
        calls.append(0)
        if len(calls) == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, function, killed)


def run_rank(overrides, environment, prelude, output):
    """One rank's whole life: summary or traceback into a file."""
    os.environ |= environment
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    import torch

    torch.set_num_threads(1)
    try:
        if prelude:
            prelude[0](*prelude[1:])
        from zo import Trainer, load_config

        result = Trainer(load_config("quickstart", overrides), command="test").train()
    except BaseException:
        result = traceback.format_exc()
    Path(output).write_text(json.dumps(result))


def train(overrides, ranks=1, prelude=()):
    """Train in new processes: the summary, the same on every rank, or ``KILLED``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    overrides = [str(o) for o in overrides]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = [
            context.Process(target=run_rank, args=(overrides, shared | {"RANK": str(rank)}, prelude, output))
            for rank, output in enumerate(outputs)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            if process.is_alive():
                process.kill()
                process.join()
        if any(process.exitcode == KILLED for process in processes):
            return KILLED
        results = [json.loads(output.read_text()) for output in outputs]
    for result in results:
        assert isinstance(result, dict), result
    assert len({result["fingerprint"] for result in results}) == 1
    return results[0]
