"""Tests that only a real GPU can run: ``python -m pytest tests/gpu [--table FILE]``.

The outcomes are written as a Markdown table, with the GPU and the versions that they hold for.
"""

import platform
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from ranks import context

HERE = Path(__file__).parent
DEFAULT = "gpu-results.md"


def pytest_addoption(parser):
    parser.addoption("--table", default=DEFAULT, help=f"where the results go ({DEFAULT})")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpus(count): needs so many GPUs; one if not given")


def pytest_collection_modifyitems(items):
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if HERE not in item.path.parents:
            continue
        marker = item.get_closest_marker("gpus")
        needed = marker.args[0] if marker else 1
        if found < needed:
            reason = "needs a CUDA device" if not found else f"needs {needed} CUDA devices"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config):
    asked = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    if config.option.collectonly or not all(HERE in (path, *path.parents) for path in asked):
        return
    path = config.getoption("--table")
    rows = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            if HERE.name in Path(report.nodeid.partition("::")[0]).parts:
                seconds = rows.get(report.nodeid, ("", 0.0))[1] + report.duration
                why = report.longrepr[2].replace("Skipped", "") if outcome == "skipped" else ""
                rows[report.nodeid] = outcome + why, seconds
    lines = [f"| {test} | {said} | {seconds:.1f} |" for test, (said, seconds) in rows.items()]
    Path(path).write_text(
        f"# GPU tests, {datetime.now(UTC):%Y-%m-%d}\n\n"
        + "".join(f"- {key}: {value}\n" for key, value in machine().items())
        + "\n| test | outcome | seconds |\n|---|---|---|\n"
        + "".join(f"{line}\n" for line in lines)
    )
    terminalreporter.write_line(f"wrote {path}")


def machine():
    """GPU and versions, as the table's head gives them."""
    found = {"python": platform.python_version()}
    for name in ("zo", "torch", "transformers", "triton", "numba"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    found["CUDA"] = str(torch.version.cuda)
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["GPU"] = ", ".join(f"{gpus.count(name)} x {name}" for name in sorted(set(gpus)))
        driver = Path("/proc/driver/nvidia/version")
        found["driver"] = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
    else:
        found["GPU"] = "none"
    return found


@pytest.fixture
def apart():
    """Call a function in a process of its own: CUDA's settings and contexts are a process's."""

    def call(function, *arguments):
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(function, *arguments).result(timeout=300)

    return call
