"""The laws of the design that can be read off the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path.stem: path for path in sorted((ROOT / "zo").glob("*.py"))}

LAYERS = [
    {"philox", "config", "preemption"},
    {"hardware"},
    {"perturbation", "assets", "metrics", "mesh", "recipe", "disk", "timeline"},
    {"kernels_cpu", "kernels_triton", "layout", "estimator", "tasks", "log", "launcher"},
    {"base", "blocks", "binding", "update", "data", "folder", "export"},
    {"store", "shards", "lockstep", "replay", "roll_call"},
    {"lanes", "model"},
    {"ring", "problem"},
    {"streamer"},
    {"replica"},
    {"evaluate", "selfcheck", "audit"},
    {"finished"},
    {"trainer"},
    {"__init__"},
]
"""Imports point to an earlier row, never to the same or a later one."""


def imports(path):
    """Modules of zo that a module imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "zo":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zo."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down(name):
    layer = {module: i for i, modules in enumerate(LAYERS) for module in modules}
    upward = [other for other in imports(SOURCES[name]) if layer[other] >= layer[name]]
    assert not upward


def users(pattern):
    return {name for name, path in SOURCES.items() if re.search(pattern, path.read_text(), re.MULTILINE)}


def test_only_replay_writes_parameters():
    assert users(r"import .*\bvisit\b(?!_)") == {"replay"}


def test_only_the_mesh_speaks_to_torch_distributed():
    assert users(r"torch\.distributed|init_process_group") == {"mesh"}


def test_only_the_streamers_lanes_know_streams():
    assert users(r"cuda\.(Stream|stream|current_stream)|wait_event") == {"lanes"}


def test_no_pickle():
    assert not users(r"\bpickle\b|torch\.load\(|torch\.save\(|_object_list\(")


def test_no_model_family_is_named_in_code():
    """A family's name in an expression is a branch that the next family will miss."""
    families = "opt|llama|qwen|mistral|gemma|gpt|phi|mixtral|bert|t5|falcon|bloom|deepseek|mamba"
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.If | ast.IfExp | ast.Match):
                assert not re.search(rf"['\"]({families})", ast.unparse(node).split("\n")[0], re.IGNORECASE), path


def test_nothing_of_a_machine_or_a_service_is_named():
    for path in ROOT.rglob("*"):
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt"} and ".venv" not in str(path):
            assert not re.search(r"/ro{2}t/|/hom[e]/\w", path.read_text(errors="replace")), path
