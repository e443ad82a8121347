"""Runs in new processes: one, several ranks with gloo, or with a kill -9 at a chosen moment.

The processes are forked from a server that has imported zo and loaded its kernels (``warm``), which
saves each of them seven seconds.
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
from functools import cache, reduce
from multiprocessing import forkserver
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["zo.run.trainer", "transformers.models.llama.modeling_llama", "ranks", "warm"]
)


@cache
def server():
    """Start the server that forks, once, and return its context; it finds modules by the
    environment's paths alone."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parent), before))
    try:
        forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = before
    return context


KILLED = -signal.SIGKILL
RECIPE = "recipe=quickstart"
"""In a run's overrides: it is the quickstart, not the plainest run."""


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


def run_rank(overrides, environment, prelude, output, folder):
    """Train as one rank and write the summary or the traceback to a file."""
    os.environ |= environment
    if folder:
        os.chdir(folder)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    import torch

    torch.set_num_threads(1)
    try:
        if prelude:
            prelude[0](*prelude[1:])
        from plain import plain_config

        from zo import Trainer, load_config

        config = load_config("quickstart", overrides) if RECIPE in overrides else None
        result = Trainer(config or plain_config(overrides), command="test").train()
    except BaseException:
        result = traceback.format_exc()
    Path(output).write_text(json.dumps(result))


def train(overrides, ranks=1, prelude=(), nodes=1):
    """Train in new processes; return the summary, the same on every rank, or ``KILLED``."""
    results = lives(overrides, ranks, prelude, nodes)
    if KILLED in results:
        return KILLED
    for result in results:
        assert isinstance(result, dict), result
    assert len({result["fingerprint"] for result in results}) == 1
    return results[0]


def lives(overrides, ranks=1, prelude=(), nodes=1, folders=()):
    """Train in new processes; return each rank's summary, traceback text, or ``KILLED``.

    Args:
        overrides: of the quickstart; a list for each rank, or one for all.
        ranks: processes.
        prelude: a function and its arguments, called first in each process.
        nodes: number of nodes in the ranks' environment.
        folders: working directory of each rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    local = ranks // nodes
    shared |= {"LOCAL_WORLD_SIZE": str(local), "GROUP_WORLD_SIZE": str(nodes)}
    each = overrides if isinstance(overrides[0], list) else [overrides] * ranks
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = [
            server().Process(
                target=run_rank,
                args=(
                    [str(o) for o in each[rank]],
                    shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % local)},
                    prelude,
                    output,
                    folders[rank] if folders else None,
                ),
            )
            for rank, output in enumerate(outputs)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            if process.is_alive():
                process.kill()
                process.join()
        return [
            KILLED if process.exitcode == KILLED else json.loads(output.read_text())
            for process, output in zip(processes, outputs, strict=True)
        ]
