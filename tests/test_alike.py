"""Ranks that differ in what decides bits are told apart."""

from zo.run.startup import differences
from zo.state.versions import versions


def test_unlike_gpus_and_versions_are_named():
    """On unlike GPUs the log would depend on which rank computed a cell."""
    here = versions() | {"gpu": "A (compute capability 8.0)"}
    assert not differences(here, dict(here))
    assert differences(here, here | {"gpu": "B (compute capability 9.0)"}) == [
        "gpu B (compute capability 9.0), not A (compute capability 8.0)"
    ]
    assert differences(here, versions()) == ["gpu none, not A (compute capability 8.0)"]
    assert differences(versions(), here) == ["gpu A (compute capability 8.0), not none"]
    assert differences(here, here | {"torch": "0", "gpu": "B"})[-1].startswith("gpu ")
