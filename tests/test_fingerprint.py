"""Equal fingerprints mean equal bits, frozen parameters included, for any split of the hashing."""

import pytest
import torch
from conftest import make_llama
from plain import plain_config
from test_stores import Adapted
from torch import nn

from zo import Trainer
from zo.errors import UserError
from zo.model import blocks, fingerprint
from zo.model.blocks import find_layout
from zo.model.fingerprint import Fingerprint
from zo.model.layout import Slice
from zo.model.source import ModelSource
from zo.streaming.stores import DeviceStore, HostStore


class Counted(ModelSource):
    """A weight source that counts the bytes read."""

    read_bytes = 0

    def read(self, block, layout, image, start=0):
        self.read_bytes += image.numel()
        super().read(block, layout, image, start)


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch):
    """Leaves and chunks so small that borders of leaves, chunks and slices do not coincide."""
    monkeypatch.setattr(fingerprint, "LEAF_BYTES", 3000)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 16_384)


def large_vocabulary(dtype=torch.float32):
    model = make_llama(vocab_size=900, tie_word_embeddings=False).to(dtype)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    return model


def reference(model):
    store = DeviceStore(find_layout(model), ModelSource(model), torch.device("cpu"))
    return store.found.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", ["layer", "module"])
@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_slices_give_the_fingerprint_of_the_whole_and_read_every_byte_once(
    dtype, unit, slices, threads
):
    model, layout = large_vocabulary(dtype), find_layout(large_vocabulary(dtype), unit)
    whole, base, before = Fingerprint(layout), Counted(model), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for index in range(slices):
            store = HostStore(layout, base, slice=Slice(index, slices))
            known = whole.digests.any(1)
            assert not (known & store.found.digests.any(1)).any()
            torch.maximum(whole.digests, store.found.digests, out=whole.digests)
    finally:
        torch.set_num_threads(before)
    assert whole.hexdigest() == reference(large_vocabulary(dtype))
    cuts = slices * len(layout.blocks)
    assert (
        base.read_bytes
        <= sum(b.size_bytes for b in layout.blocks) + 3 * cuts * fingerprint.LEAF_BYTES
    )


def test_any_bit_name_shape_or_dtype_makes_another_fingerprint():
    found = {reference(large_vocabulary()), reference(large_vocabulary(torch.bfloat16))}
    for change in (0, 1):
        for name, parameter in list(large_vocabulary().named_parameters())[:6]:
            model = large_vocabulary()
            values = model.get_parameter(name).data.view(-1).view(torch.uint8)
            values[-1 if change else 0] ^= 1
            assert parameter.shape == model.get_parameter(name).shape
            found.add(reference(model))
    assert len(found) == 14
    one, other = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
    other.weight.data = one.weight.data.view(4, 6)
    assert reference(one) != reference(other)


def adapted_run(tmp_path, change, steps):
    model, ids = Adapted(), torch.randint(3, 24, (4, 9), generator=torch.Generator().manual_seed(0))
    change(model)
    settings = [
        f"run.steps={steps}",
        "batch.sequences=4",
        "batch.micro=4",
        "eval.every=0",
        "export.at_end=false",
    ]
    settings += ["update.schedule=constant", "update.warmup_steps=0"]
    config = plain_config([*settings, f"run.dir={tmp_path}/run"])

    def objective(model, batch):
        loss = nn.functional.cross_entropy(
            model(batch["ids"]).flatten(0, 1), batch["ids"].flatten(), reduction="sum"
        )
        return torch.stack((loss, torch.tensor(36.0)))

    return Trainer(
        config, model=model, objective=objective, batches=lambda step, column: {"ids": ids}
    ).train()


@pytest.mark.parametrize(
    "name",
    ["inner.model.layers.0.mlp.up_proj.weight", "inner.model.embed_tokens.weight"],
    ids=["in a layer", "around"],
)
def test_a_resume_on_another_frozen_base_is_refused(tmp_path, name):
    """Otherwise the log would silently be replayed on weights it was not made with."""

    def change(model):
        model.get_parameter(name).data.view(-1)[5] += 1

    adapted_run(tmp_path, lambda model: None, 2)
    with pytest.raises(UserError, match="was started from a different base model"):
        adapted_run(tmp_path, change, 4)
    assert adapted_run(tmp_path, lambda model: None, 4)["steps"] == 4
