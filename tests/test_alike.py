"""Ranks that differ in what decides bits are told apart."""

from types import SimpleNamespace

import torch

from zo.run.startup import differences
from zo.state.versions import versions

CPU = torch.device("cpu")


def test_unlike_gpus_and_versions_are_named():
    """On unlike GPUs the log would depend on which rank computed a cell."""
    here = versions(CPU) | {"gpu": "A (compute capability 8.0)"}
    assert not differences(here, dict(here))
    assert differences(here, here | {"gpu": "B (compute capability 9.0)"}) == [
        "gpu B (compute capability 9.0), not A (compute capability 8.0)"
    ]
    assert differences(here, versions(CPU)) == ["gpu none, not A (compute capability 8.0)"]
    assert differences(versions(CPU), here) == ["gpu A (compute capability 8.0), not none"]
    assert differences(here, here | {"torch": "0", "gpu": "B"})[-1].startswith("gpu ")


def test_a_run_on_cpu_does_not_depend_on_the_gpus_of_its_nodes(monkeypatch):
    """Two nodes with unlike GPUs would be refused for a run that uses neither."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = SimpleNamespace(name="A", major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert not versions(CPU).keys() & {"gpu", "cuda", "cudnn", "cublas"}
    assert versions(torch.device("cuda", 0))["gpu"] == "A (compute capability 8.0)"
