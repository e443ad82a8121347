"""A model's own code runs when whoever starts a command asks for it then, never because a file says
so."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import make_tokenizer

CODE = """
from pathlib import Path

Path({marker!r}).write_text("was here")
from transformers import LlamaConfig, LlamaForCausalLM


class StrangeConfig(LlamaConfig):
    model_type = "strange"


class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""
SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """Folder of a model that brings code, and the marker that this code leaves wherever it runs."""
    folder, marker = tmp_path / "strange", tmp_path / "marker"
    folder.mkdir()
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    (folder / "strange.py").write_text(CODE.format(marker=str(marker)))
    classes = {
        "AutoConfig": "strange.StrangeConfig",
        "AutoModelForCausalLM": "strange.StrangeForCausalLM",
    }
    config = {
        "model_type": "strange",
        "architectures": ["StrangeForCausalLM"],
        "auto_map": classes,
        **SIZES,
    }
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)
    return folder, marker


@pytest.fixture
def run_folder(command, overrides, strange, tmp_path):
    """A run of such a model, which its owner trusted; the marker is gone again."""
    folder, marker = strange
    settings = [*overrides[1:], "model.weights=random", "run.steps=1", "eval.every=0"]
    code, _, err = command(
        "train",
        f"model.name={folder}",
        *settings,
        f"run.dir={tmp_path}/run",
        "model.trust_remote_code=true",
    )
    assert code == 0, err
    assert marker.exists()
    marker.unlink()
    for path in (tmp_path / "modules").rglob("*.py*"):
        path.unlink()
    return tmp_path / "run", [f"model.name={folder}", *settings]


COMMANDS = {"export": ["to={to}"], "evaluate": []}


def forget_imports(monkeypatch):
    """As in a new process: the code of a module that was imported does not run again."""
    for name in [name for name in sys.modules if "transformers_modules" in name]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_strangers_run_runs_no_code(command, run_folder, strange, tmp_path, name, monkeypatch):
    folder, marker = run_folder[0], strange[1]
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["config"]["model"]["trust_remote_code"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    arguments = [a.format(to=tmp_path / "to") for a in COMMANDS[name]]
    forget_imports(monkeypatch)
    code, _, err = command(name, f"run={folder}", *arguments)
    assert not marker.exists()
    assert (code, err.count("\n")) == (2, 1), err
    assert "trust_remote_code=true" in err
    assert not (tmp_path / "to").exists()

    forget_imports(monkeypatch)
    code, _, err = command(name, f"run={folder}", *arguments, "trust_remote_code=true")
    assert code == 0, err
    assert marker.exists()


def test_a_resume_runs_code_only_where_its_own_command_says_so(
    command,
    run_folder,
    strange,
    monkeypatch,
):
    folder, settings = run_folder
    forget_imports(monkeypatch)
    code, _, err = command("train", *settings, f"run.dir={folder}", "run.steps=2")
    assert not Path(strange[1]).exists()
    assert (code, err.count("\n")) == (2, 1), err


@pytest.mark.parametrize("name", COMMANDS)
def test_trust_is_true_or_false(command, name):
    code, _, err = command(name, "run=nowhere", "to=x", "trust_remote_code=yes")
    assert (code, err.count("\n")) == (2, 1)
