"""The laws of the design that can be read off the source."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "zo").rglob("*.py"))
}

PACKAGES = [
    "errors",
    "method",
    "io",
    "config",
    "observe",
    "distributed",
    "model",
    "state",
    "data",
    "streaming",
    "run",
    "integrations",
    "commands",
]
"""Imports point to the same package or to an earlier one."""


def package(module):
    """The package of a module; the top level itself stands above all."""
    name = module.split(".")[1] if "." in module else ""
    return PACKAGES.index(name) if name in PACKAGES else len(PACKAGES)


def imports(path):
    """Modules of zo that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name == "zo" or name.startswith("zo."):
                found.add(next(m for m in (name, name.rpartition(".")[0]) if m in SOURCES))
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    upward = [o for o in imports(SOURCES[module]) if package(o) > package(module)]
    assert not upward


def test_no_module_imports_itself_by_way_of_others():
    order = TopologicalSorter({module: imports(path) for module, path in SOURCES.items()})
    order.prepare()


def test_readme_has_a_line_for_each_package():
    text = (ROOT / "README.md").read_text()
    assert [p for p in PACKAGES[1:] if f"| `zo/{p}/` |" not in text] == []


def test_no_file_and_no_function_has_outgrown_its_idea():
    for path in [*SOURCES.values(), *(ROOT / "launch").glob("*.py")]:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def users(pattern):
    return {
        module
        for module, path in SOURCES.items()
        if re.search(pattern, path.read_text(), re.MULTILINE)
    }


def test_only_replay_writes_parameters():
    """The kernel that changes weights has one caller, and so has what loads them from elsewhere."""
    assert users(r"from zo\.method\.kernels import") == {"zo.state.replay"}


def test_only_the_mesh_speaks_to_torch_distributed():
    assert users(r"torch\.distributed|init_process_group") <= {
        "zo.distributed.process_group",
        "zo.distributed.slices",
        "zo.distributed.failure",
        "zo.distributed.mesh",
    }


def test_only_the_device_knows_streams_and_events():
    pattern = r"cuda\.(Stream|stream|Event|current_stream)|wait_event|cudaHostRegister"
    assert users(pattern) == {"zo.streaming.device"}


def test_no_pickle():
    assert not users(r"\bpickle\b|torch\.load\(|torch\.save\(|_object_list\(")


def test_no_model_family_is_named_in_code():
    """A family's name in an expression is a branch that the next family will miss."""
    families = "opt|llama|qwen|mistral|gemma|gpt|phi|mixtral|bert|t5|falcon|bloom|deepseek|mamba"
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.If | ast.IfExp | ast.Match):
                first = ast.unparse(node).split("\n")[0]
                assert not re.search(rf"['\"]({families})", first, re.IGNORECASE), path


def test_nothing_of_a_machine_or_a_service_is_named():
    for path in ROOT.rglob("*"):
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt"} and ".venv" not in str(path):
            assert not re.search(r"/ro{2}t/|/hom[e]/\w", path.read_text(errors="replace")), path
