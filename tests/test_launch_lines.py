"""Every launch line that the repository shows has keys and values that are known, and fills the
ranks that it starts."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from zo.config.recipes import load_config, recipe_for
from zo.distributed.mesh import fit
from zo.run.reporter import idle_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "launch/slurm.sbatch", "launch/kubernetes.yaml", "docker/Dockerfile"]
GPUS_PER_NODE = 8
"""Of a node of a cluster, where the script asks for it (SLURM_GPUS_ON_NODE)."""


def texts():
    for path in [
        *(ROOT / page for page in PAGES),
        *ROOT.glob("recipes/*.yaml"),
        *ROOT.glob("docs/**/*.md"),
    ]:
        yield path.relative_to(ROOT), path.read_text()
    command = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["train"][
        "command"
    ]
    yield Path("docker/compose.yaml"), shlex.join(command)


def launch_lines():
    for page, text in texts():
        joined = re.sub(r"\\\n[#\s]*|(?<=\S)\n {14}(?=\S)", " ", text)
        for line in joined.splitlines():
            line = line.split("  #")[0].strip("# `")
            named = re.search(r"recipe=(?!NAME)[a-z0-9.-]+", line)
            if named or re.search(r"launch/train\.py [a-z_.]+=", line):
                yield pytest.param(line, id=f"{page}:{line[:60]}")


def number(words, option, default):
    return words[words.index(option) + 1] if option in words else default


def worlds(words):
    """Numbers of nodes that a line may run on, and ranks of a node."""
    if "sbatch" in words:
        return [int(number(words, "--nodes", "1"))], GPUS_PER_NODE
    nodes = [int(n) for n in number(words, "--nnodes", "1").split(":")]
    return range(nodes[0], nodes[-1] + 1), int(number(words, "--nproc-per-node", "1"))


def test_lines_are_found():
    found = [param.id for param in launch_lines()]
    assert all(
        any(page in line for line in found)
        for page in [*PAGES, "docker/compose.yaml", "recipes/opt-66b.yaml"]
    )
    assert len(found) > 12


@pytest.mark.parametrize("line", launch_lines())
def test_a_launch_line_leaves_no_rank_idle(line):
    words = shlex.split(line.split("(or:")[0])
    keys = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)+=", word)]
    named = [word.removeprefix("recipe=") for word in words if re.match("recipe=.", word)]
    config = load_config(named[0] if named else recipe_for(keys), keys)
    nodes, local = worlds(words)
    for count in nodes:
        shape = fit(config.mesh, count * local, config.grid, local)
        assert idle_of(config, shape) is None, count
