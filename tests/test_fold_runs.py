"""Whole runs of folds and parts: one result on any mesh, store, slice and lag, and after a kill."""

import pytest
import test_units
import torch
from logs import same_log
from plain import plain_config
from ranks import KILLED, kill_at, lives, train

from zo import Trainer
from zo.errors import UserError
from zo.state.log import read
from zo.streaming import selfcheck

pytestmark = pytest.mark.slow  # Whole runs, most of them in processes of their own.

PROBES = ["estimator.distribution=rank-one", "estimator.cover=diagonal", "batch.micro=1"]
PROBES.append("estimator.directions=null")
RUNS = {
    "all": [*PROBES, "model.dtype=bfloat16", "memory.lag=2"],
    "top": [*PROBES, "estimator.part=top:1", "estimator.probes=3", "memory.lag=3"],
    "sampled": [*PROBES, "estimator.part=sampled", "estimator.name=one-sided", "run.seed=3"],
    "wide": [*PROBES, "batch.fold=4", "estimator.part=top:1", "memory.lag=1"],
    "full": [PROBES[0], "estimator.directions=2", "update.weight_decay=0.1", "update.clip=1.5"],
}
PLACES = {
    "host": (["memory.store=host", "memory.activations=host"], 1),
    "disk": (["memory.store=disk", "memory.unit=module", "memory.slots=2"], 1),
    "ranks": (["mesh.data=2"], 2),
    "slices": (["memory.store=host", "mesh.slice=2"], 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_same_bits_on_any_mesh_and_store(overrides, tmp_path, name):
    """Two places a run, in turn: each has two kinds of run or more."""
    settings = [*overrides, *RUNS[name], "run.steps=6", "mesh.check_every=2"]
    expected = train([*settings, f"run.dir={tmp_path}/alone"])
    first = list(RUNS).index(name)
    for place, (extra, ranks) in [*PLACES.items(), *PLACES.items()][first % 4 :][:2]:
        found = train([*settings, *extra, f"run.dir={tmp_path}/{place}"], ranks=ranks)
        assert found["fingerprint"] == expected["fingerprint"], place
        assert same_log(tmp_path / place / "steps.log", tmp_path / "alone" / "steps.log"), place


@pytest.mark.parametrize("name", ["top", "sampled"])
def test_a_killed_run_goes_on_to_the_same_bits(overrides, tmp_path, name):
    settings = [*overrides, *RUNS[name], "run.steps=6", "memory.store=disk", "memory.lag=1"]
    expected = train([*settings, f"run.dir={tmp_path}/alone"])
    settings.append(f"run.dir={tmp_path}/run")
    moment = ("zo.streaming.disk_store", "DiskStore.keep", 3, True)
    assert train(settings, prelude=(kill_at, *moment)) == KILLED
    assert train(settings)["fingerprint"] == expected["fingerprint"]


def test_a_block_that_a_part_does_not_reach_is_never_written(overrides, tmp_path):
    settings = [*overrides, *RUNS["top"], "run.steps=4", "memory.store=disk", "memory.lag=1"]
    train([*settings, f"run.dir={tmp_path}/run"])
    entries = read(tmp_path / "run" / "steps.log")[1]
    assert {entry.part for entry in entries} == {3}  # After the embedding and two layers.
    written = {path.name for path in (tmp_path / "run").rglob("*.block")}
    assert "000003.block" in written and not written & {"000001.block", "000002.block"}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["estimator.part=top:9"], "estimator.part=top:9 is more than the 3 layers"),
        (["mesh.perturb=2"], "batch.fold=1"),
    ],
)
def test_what_does_not_fit_ends_in_one_line_and_nothing_is_written(
    overrides, tmp_path, extra, said
):
    ranks = 2 if "mesh" in extra[0] else 1
    settings = [*overrides, *PROBES, *extra, f"run.dir={tmp_path}/run"]
    for result in lives(settings, ranks=ranks):
        assert "UserError" in result and said in result, result
    assert not (tmp_path / "run" / "steps.log").exists()


def test_a_model_that_reads_weights_elsewhere_is_trained_and_says_so_once(tmp_path, capsys):
    """The rows of its mixers cannot be corrected: each cell runs them with written probes."""
    torch.manual_seed(0)
    test_units.ELSEWHERE["mamba-2"]().save_pretrained(tmp_path / "model")
    settings = [f"model.name={tmp_path}/model", "data.name=synthetic", "data.dev=null"]
    settings += ["data.template=null", "data.label_words=null", "batch.sequences=2", *PROBES]
    settings += ["batch.max_tokens=8", "run.steps=2", "eval.every=0", "export.at_end=false"]
    summary = Trainer(plain_config([*settings, f"run.dir={tmp_path}/run"])).train()
    assert summary["steps"] == 2
    said = capsys.readouterr().err
    assert said.count("written at backbone.layers.*.mixer") == 1
    assert {len(entry.scalars) for entry in read(tmp_path / "run" / "steps.log")[1]} == {2}
    assert any(read(tmp_path / "run" / "steps.log")[1][0].scalars)


def test_rank_one_directions_need_a_matrix(tmp_path):
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.weight

    trainer = Trainer(
        plain_config(["estimator.distribution=rank-one", f"run.dir={tmp_path}/run"]),
        model=Scale(),
        objective=lambda net, batch: torch.stack((net(batch["x"]).sum(), torch.tensor(1.0))),
        batches=lambda step, column: {"x": torch.ones(2, 4)},
    )
    with pytest.raises(UserError, match="rank-one is of matrices") as error:
        trainer.train()
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "steps.log").exists()


@pytest.mark.parametrize("name", ["top", "sampled"])
def test_where_nothing_can_be_corrected_written_probes_have_the_same_losses(
    overrides, tmp_path, monkeypatch, name
):
    """A fold of cells whose probes are written must not become one probe."""
    settings = [*overrides, *RUNS[name], "run.steps=1"]
    Trainer(plain_config([*settings, f"run.dir={tmp_path}/corrected"])).train()
    monkeypatch.setattr(selfcheck, "choose_meeting", lambda *arguments: "")
    Trainer(plain_config([*settings, f"run.dir={tmp_path}/written"])).train()
    logs = [read(tmp_path / way / "steps.log") for way in ("corrected", "written")]
    assert [header["meet"] for header, _ in logs] == ["layer", ""]
    corrected, written = (torch.tensor(entries[0].scalars) for _, entries in logs)
    assert corrected.abs().min() > 0
    torch.testing.assert_close(written, corrected, rtol=0.02, atol=2e-3)
