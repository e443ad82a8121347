"""Serving of a run in progress: the weights that vLLM is given, and what it then writes."""

import pytest
import torch
from conftest import make_llama, make_tokenizer
from plain import run
from safetensors.torch import load_file

from zo.data.tasks import Example
from zo.errors import UserError
from zo.integrations.vllm import Weights, complete, follow, probing
from zo.method.passes import Probe
from zo.method.perturbation import rank_one
from zo.model.blocks import find_layout
from zo.model.generate import Decoding, generate, trim
from zo.run.artefact import open_artefact
from zo.run.restore import load_run
from zo.streaming.streamer import UNPERTURBED

RANK_ONE = ["estimator.distribution=rank-one", "estimator.directions=2"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_weights_follow_a_log_and_a_probe_leaves_them_as_they_were(overrides, tmp_path):
    """At each version they are the exported ones, by the names of a checkpoint; so after probes."""
    run([*overrides, "export.at_end=true"], tmp_path / "run", "run.steps=2", *RANK_ONE)
    weights = Weights(open_artefact(str(tmp_path / "run")))
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert same(weights.checkpoint(), exported)

    model, probe = make_llama(), Probe(17, -0.5)
    written = weights.checkpoint(probe)
    for placed in find_layout(model).parameters:
        matrices = next(
            s.matrices
            for group in find_layout(model).groups
            for s in group.segments
            if s.start <= placed.start < s.start + s.numel
        )
        z = rank_one(0, 17, placed.start, placed.numel, matrices=matrices)
        stored = exported[placed.name]
        assert torch.equal(written[placed.name], stored - 0.5 * z.view(stored.shape))
    assert same(weights.checkpoint(), exported)
    at = {name: torch.equal(t, exported[name]) for name, t in weights.checkpoint(probe, 2).items()}
    assert at["model.layers.0.mlp.up_proj.weight"]
    assert not at["model.layers.2.mlp.up_proj.weight"]

    summary = run([*overrides, "export.at_end=true"], tmp_path / "run", "run.steps=4", *RANK_ONE)
    artefact = open_artefact(str(tmp_path / "run"))
    assert weights.leads_to(artefact)
    weights.advance(artefact)
    assert weights.fingerprint == summary["fingerprint"]
    assert same(weights.checkpoint(), load_file(tmp_path / "run" / "model" / "model.safetensors"))
    run(overrides, tmp_path / "other", "run.seed=1")
    assert not weights.leads_to(open_artefact(str(tmp_path / "other")))


PROMPTS = [Example((3, *range(4, 4 + n)), 0) for n in (1, 2, 5, 9)]
DECODING = Decoding(8, (2,), 0)


def own(folder, step=None, probe=UNPERTURBED):
    """What zo itself writes."""
    replica = load_run(folder, step=step).replica

    def compute(cells):
        ids = torch.tensor([PROMPTS[cells[0]].ids])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return [trim(generate(replica.model, batch, DECODING)[0].tolist(), DECODING.end)]

    count = len(PROMPTS)
    found = replica.whole([probe], [0] * count, [[i] for i in range(count)], 0, compute)
    replica.close()
    return found


@pytest.mark.slow
def test_vllm_writes_what_zo_does_at_each_version_and_probe(overrides, tmp_path, monkeypatch):
    vllm = pytest.importorskip(
        "vllm", reason="vLLM pins its torch, so it is in an environment of its own (README)"
    )
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    base, folder = tmp_path / "base", tmp_path / "run"
    make_llama(hidden_size=128, intermediate_size=256).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    settings = [
        *overrides,
        f"model.name={base}",
        "update.lr=0.1",
        "run.divergence=warn",
        "eval.every=0",
    ]
    run(settings, folder, "run.steps=2")
    llm = vllm.LLM(
        str(base),
        dtype="float32",
        max_model_len=32,
        enforce_eager=True,
        worker_extension_cls="zo.integrations.vllm.Follower",
    )

    def writes():
        return complete(llm, DECODING, PROMPTS)

    with pytest.raises(UserError, match="follow one"), probing(llm, Probe(0, 1.0)):
        pass
    assert writes() == own(folder, 0)
    assert follow(llm, folder)["version"] == 2
    assert writes() == own(folder)
    summary = run(settings, folder, "run.steps=4")
    assert follow(llm, folder)["fingerprint"] == summary["fingerprint"]
    after = own(folder)
    assert writes() == after != own(folder, 0)
    for scale in (0.05, -0.05):
        with probing(llm, Probe(9, scale)):
            assert writes() == own(folder, probe=Probe(9, scale)) != after
        assert writes() == after
    assert follow(llm, folder, version=0)["version"] == 0
    assert writes() == own(folder, 0)

    run(settings, tmp_path / "half", "run.steps=1", "model.dtype=bfloat16")
    for wrong, said in ((tmp_path / "half", "start it with dtype=bfloat16"), ("no", "not exist")):
        with pytest.raises(UserError, match=said):
            follow(llm, wrong)
    with pytest.raises(UserError, match=r"version=5 is not in .* whose last is 4"):
        follow(llm, folder, version=5)
    assert writes() == own(folder, 0)
