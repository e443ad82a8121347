"""A GPU run repeats only if every setting that changes bits is fixed before it begins."""

import os
import subprocess
import sys

import pytest
import torch
from plain import plain_config
from torch import nn

from zo import Trainer
from zo.errors import UserError

CHECK = """
import os, torch
from zo.io.determinism import make_deterministic
make_deterministic("cpu")
assert not torch.are_deterministic_algorithms_enabled()
make_deterministic("cuda")
assert torch.are_deterministic_algorithms_enabled()
assert not torch.is_deterministic_algorithms_warn_only_enabled()
assert not torch.utils.deterministic.fill_uninitialized_memory
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
assert torch.get_float32_matmul_precision() == "highest"
assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.benchmark
assert not torch.backends.cuda.matmul.allow_tf32
assert not torch.cuda.is_initialized()
"""


def test_a_gpu_run_sets_what_decides_its_bits_and_a_cpu_run_nothing():
    """The settings belong to the process, so they are looked at in one of their own."""
    run = subprocess.run(
        [sys.executable, "-c", CHECK], env=os.environ, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_an_operation_without_a_deterministic_form_is_named(deterministic, tmp_path):
    """Else the first step ends in PyTorch's stack trace, with a remedy that makes runs differ.

    ``put_`` is refused on CPU too, so this is PyTorch's own message.
    """

    def objective(model, batch):
        loss = model(batch["x"]).sum()
        places, ones = torch.tensor([0, 0]), torch.ones(2)
        return torch.zeros(2).put_(places, ones) + torch.stack((loss, torch.ones(())))

    config = plain_config(
        [f"run.dir={tmp_path}/run", "run.steps=1", "run.device=cpu", "eval.every=0"]
    )
    batches = lambda step, column: {"x": torch.ones(2, 4)}  # noqa: E731
    with pytest.raises(UserError, match=r"calls put_, which has no deterministic .*; use ") as told:
        Trainer(config, model=nn.Linear(4, 4), objective=objective, batches=batches).train()
    assert "\n" not in str(told.value)
