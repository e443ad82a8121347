"""A fine-tune in kilobytes: base and log make the same bits anywhere, and a false log is found."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_llama
from hub_stand_in import hub_in_this_process
from plain import run
from safetensors.torch import load_file

import zo
from zo.errors import UserError
from zo.run.artefact import open_artefact
from zo.run.replay import differing_kernels, rebuild
from zo.run.verify import Audited, verify
from zo.state.log import Log, read
from zo.state.log_diff import differences

pytestmark = pytest.mark.slow  # Whole runs.
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def made(overrides, tmp_path, command):
    """Train, and export the log; return the run's folder, the artefact and the run's summary."""

    def make(*extra):
        summary = run(overrides, tmp_path / "run", *extra)
        code, _, said = command(
            "export", f"run={tmp_path / 'run'}", f"to={tmp_path / 'log'}", "artefact=log"
        )
        assert code == 0, said
        return tmp_path / "run", tmp_path / "log", summary

    return make


def relog(folder, change):
    """Write a log again after a change to its list of entries, with right checksums."""
    header, entries = read(folder / "steps.log")
    (folder / "steps.log").unlink()
    log = Log.create(folder / "steps.log", header)
    log.extend(change(entries))
    log.close()


def test_kilobytes_make_the_weights_of_the_full_export(made, command, tmp_path, monkeypatch):
    trained, artefact, summary = made("model.dtype=bfloat16")
    assert sorted(p.name for p in artefact.iterdir()) == ["README.md", "config.yaml", "steps.log"]
    assert sum(p.stat().st_size for p in artefact.iterdir()) < 16_000
    assert command("export", f"run={trained}", f"to={tmp_path / 'full'}")[0] == 0
    code, out, said = command("replay", f"log={artefact}", f"to={tmp_path / 'again'}")
    assert (code, out.splitlines()[-1]) == (0, summary["fingerprint"]), said
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "full" / name).read_bytes()
    assert (tmp_path / "again" / "tokenizer.json").exists()
    # The card's own snippet, in the folder as it stands.
    card = (artefact / "README.md").read_text()
    facts = yaml.safe_load(card.split("---\n")[1])
    assert facts["library_name"] == "zo"
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    names = {}
    monkeypatch.chdir(artefact)
    exec(code, names)
    full = load_file(tmp_path / "full" / name)
    state = names["model"].state_dict()
    assert all(torch.equal(state[key], value) for key, value in full.items())
    ids = names["tokenizer"]("the film was", return_tensors="pt")
    assert names["model"].generate(**ids, max_new_tokens=2).shape[1] == 5


KINDS = {
    "rank-one, sampled parts, bfloat16": [
        "estimator.distribution=rank-one",
        "estimator.part=sampled",
        "model.dtype=bfloat16",
    ],
    "virtual tokens": ["peft.type=prompt", "peft.tokens=3", "batch.max_tokens=32"],
    "some parameters, decay to the base": ["update.anchor=0.1", "model.train=*mlp*|*norm*"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_log_is_replayed_and_verified_without_its_run(made, kind, tmp_path):
    trained, artefact, summary = made(*KINDS[kind], "run.steps=3")
    trained.rename(tmp_path / "gone")
    found = open_artefact(str(artefact))
    assert rebuild(found).fingerprint == summary["fingerprint"]
    checked = verify(Audited(found), [1, 3], print)
    assert checked["true"] and checked["same_bits"] == 2


OF_PAIRS = {"prompt": "the film was", "chosen": "good", "rejected": "bad"}


def test_a_log_of_preferences_is_verified(made, tmp_path):
    """Its losses need the base's log-probabilities, which an artefact does not hold."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(OF_PAIRS) + "\n" for _ in range(20)))
    own = ["data.template=null", "data.label_words=null", "eval.every=0", "run.steps=2"]
    _, artefact, _ = made(f"data.name={pairs}", *own)
    assert verify(Audited(open_artefact(str(artefact))), [2], print)["same_bits"] == 1


REWARD = """
def reward(prompt, completion, row):
    return completion.count("e") / 10
"""


def test_a_log_of_rewards_is_verified_where_its_code_is_trusted(made, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film was"}\n' * 20)
    own = ["data.template=null", "data.label_words=null", "eval.every=0", "run.steps=2"]
    own += [f"objective.name={tmp_path}/mine.py:reward", "estimator.shape=z"]
    own += ["generation.max_new_tokens=3", "generation.temperature=1"]
    own += ["estimator.directions=4", "estimator.eps=0.1", "batch.max_tokens=32"]
    _, artefact, _ = made(f"data.name={tmp_path}/prompts.jsonl", *own)
    found = open_artefact(str(artefact))
    with pytest.raises(UserError, match="not run by default; read it, then set trust_remote_code"):
        Audited(found)
    assert verify(Audited(found, trust_remote_code=True), [2], print)["same_bits"] == 1
    # An invented scalar of the entry before changes what the model writes or how it is rated.
    relog(artefact, lambda e: [replace(e[0], scalars=tuple(9 * s for s in e[0].scalars)), e[1]])
    forged = verify(Audited(open_artefact(str(artefact)), trust_remote_code=True), [1], print)
    assert not forged["true"]


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    made, command, tmp_path, tiny_model
):
    trained, artefact, _ = made()
    to, log = tmp_path / "to", artefact / "steps.log"
    other, data = tmp_path / "other", tmp_path / "other.jsonl"
    changed = make_llama()
    changed.lm_head.weight.data[0, 0] += 1.0
    changed.save_pretrained(other)
    data.write_text((json.dumps({"text": "a dull plot", "label": "great"}) + "\n") * 40)

    def assert_refused(said, *arguments, name="replay"):
        code, _, error = command(name, *arguments)
        assert code == 2, error
        assert said in error.splitlines()[-1]
        assert not to.exists()

    ask = f"log={artefact}", f"to={to}"
    assert_refused("is not the model that the log was written for", *ask, f"base={other}")
    assert_refused("is not a folder", *ask, "base=./nowhere")
    assert_refused("does not exist", "log=./nowhere", f"to={to}")
    assert_refused("is a log without its config.yaml", f"log={_alone(log, tmp_path)}", f"to={to}")
    assert_refused("is not what the log was written with", artefact, f"data={data}", name="verify")
    code, _, error = command("replay", f"log={artefact}", f"to={other}")
    assert code == 2 and "exists and is not an empty folder" in error

    # A crashed run's log may end in a torn entry; a published one may not.
    whole = log.read_bytes()
    log.write_bytes(whole[:-5])
    assert_refused("is cut short: whole to entry 3 of 4", *ask)
    log.write_bytes(whole + whole[-5:])
    assert_refused("goes on after entry 4", *ask)
    log.write_bytes(whole.replace(b"ZOLOG3", b"ZOLOG9"))
    assert_refused("is a log of another version, ZOLOG9", *ask)
    log.write_bytes(whole)
    (trained / "steps.log").write_bytes(whole[:-5])
    assert len(open_artefact(str(trained)).entries) == 3

    # A log alone, with the base's name and type beside it.
    code, out, error = command(
        "replay", f"log={_alone(log, tmp_path)}", f"base={tiny_model}", ask[1]
    )
    assert code == 0, error
    published = yaml.safe_load((artefact / "config.yaml").read_text())["artefact"]["fingerprint"]
    assert out.splitlines()[-1] == published


def _alone(log, folder):
    (folder / "alone").mkdir(exist_ok=True)
    (folder / "alone" / "only.log").write_bytes(log.read_bytes())
    return folder / "alone" / "only.log"


def test_an_invented_entry_is_found(made, command, tmp_path):
    """Checksums, published fingerprint and all are right for it: only an audit can tell."""
    trained, artefact, _ = made()
    first = read(artefact / "steps.log")[1][0]
    relog(artefact, lambda all: [*all[:1], replace(all[1], scalars=first.scalars), *all[2:]])
    code, out, _ = command("diff", trained, artefact / "steps.log")
    assert code == 1
    assert re.fullmatch(r"entry 2: scalar 0 is \S+ and \S+\n", out)
    assert command("diff", trained, trained)[:2] == (0, "the same to entry 4\n")
    code, out, _ = command("replay", f"log={artefact}", f"to={tmp_path / 'to'}")
    assert code == 2  # Not what the card says.
    config = yaml.safe_load((artefact / "config.yaml").read_text())
    found = open_artefact(str(artefact))
    del found.content["artefact"]["fingerprint"]
    config["artefact"]["fingerprint"] = rebuild(found).fingerprint
    (artefact / "config.yaml").write_text(yaml.safe_dump(config))
    code, out, error = command("verify", artefact, "entries=4")
    assert code == 1, error
    last = json.loads(out.splitlines()[-1])
    assert (last["true"], last["not_true"][0]) == (False, 2)
    assert "entry 1: the same bits" in out
    assert "entry 2 is not true: scalar 0 is" in out


def test_two_headers_are_compared_too():
    one, other = {"seed": 1, "run": "a", "held": ["x"]}, {"seed": 2, "run": "b"}
    said = differences((one, []), (other, []))
    assert said == ["header: held is ['x'] and missing", "header: seed is 1 and 2"]


def test_gaussian_directions_of_another_kind_of_device_are_warned_of(made):
    _, artefact, summary = made("estimator.distribution=gaussian", "run.steps=1")
    found = open_artefact(str(artefact))
    assert differing_kernels(found, torch.device("cpu")) == []
    found.content["versions"]["gpu"] = "NVIDIA H100"
    found.content["artefact"]["fingerprint"] = "0" * 64
    said = []
    assert rebuild(found, say=said.append).fingerprint == summary["fingerprint"]
    assert "was made on NVIDIA H100 with gaussian directions" in said[0]
    assert "the same kind of device alone" in said[1]


def test_a_hub_that_dies_in_a_push_has_nothing_public_and_the_next_one_ends_it(
    made, command, tmp_path, monkeypatch
):
    trained, _, summary = made("run.steps=1")
    ask = [f"run={trained}", "artefact=log", "push=ann/tuned"]
    with hub_in_this_process(monkeypatch) as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("zo.run.hub.SILENCE_S", 0.5)
        for folder, silent_s in (("first", 0.0), ("slow", 2.0)):
            hub.dies_in_commits, hub.silent_s = 1, silent_s
            code, _, error = command("export", *ask, f"to={tmp_path / folder}")
            assert code == 2, error
            assert "push=ann/tuned failed" in error and error.count("\n") <= 2
            assert "timed out" in error or not silent_s
        assert hub.repos["ann/tuned"].private and not hub.repos["ann/tuned"].files
        code, _, error = command("export", *ask, f"to={tmp_path / 'second'}")
        assert code == 0, error
        there = set(hub.repos["ann/tuned"].files)
        assert there == {"README.md", "config.yaml", "steps.log"}
        model = zo.from_log("ann/tuned")
        assert model.state_dict().keys()
        with pytest.raises(UserError, match="cannot be loaded from the hub"):
            zo.from_log("ann/nothing")
    assert summary["steps"] == 1


KERNELS = """
import sys
from zo.method import kernels
from zo.run.artefact import open_artefact
from zo.run.replay import rebuild
kernels.KERNELS["cpu"] = ("zo.method.kernels.triton", "replay_and_perturb_triton")
print(rebuild(open_artefact(sys.argv[1])).fingerprint)
"""


def test_the_kernel_of_a_gpu_replays_the_same_bits(made):
    """By Triton's interpreter, which is chosen when Triton is imported."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    _, artefact, summary = made("model.dtype=bfloat16", "run.steps=2")
    found = subprocess.run(
        [sys.executable, "-c", KERNELS, str(artefact)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip() == summary["fingerprint"], found.stderr
