"""Weights read from a checkpoint's shards equal those that transformers loads, bit for bit."""

import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from test_lockstep import FAMILIES, SIZES, build

from zo.config.schema import MemoryConfig, ModelConfig, PeftConfig
from zo.errors import UserError
from zo.io.block_file import Header, checksum
from zo.io.engines import ENGINES
from zo.model.blocks import find_layout
from zo.model.build import ModelLoader
from zo.model.layout import views
from zo.model.source import RandomSource
from zo.streaming.replica import Replica
from zo.streaming.stores import DeviceStore

CPU = torch.device("cpu")


def loaded(folder, unit="layer", dtype="float32", **memory):
    """Load a checkpoint with our loader; return the model."""
    loader = ModelLoader(
        ModelConfig(
            name=str(folder),
            dtype=dtype,
            **({"task": memory.pop("task")} if "task" in memory else {}),
        )
    )
    skeleton = loader.skeleton()
    model = loader.skeleton()
    layout = find_layout(skeleton, unit)
    replica = Replica(
        model,
        layout,
        lambda e: loader.weights(skeleton, 0, e),
        MemoryConfig(**memory),
        CPU,
        folder / "none",
    )
    assert isinstance(replica.store, DeviceStore)
    for group, segments in zip(layout.groups, replica.store.groups, strict=True):
        replica.binding.bind(group, segments)
    return model


def same(model, expected):
    mine, theirs = model.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "t5"])
def test_every_family_loads_as_transformers_loads_it(tmp_path, name, dtype):
    build(name).save_pretrained(tmp_path, max_shard_size="40KB")
    auto = t.AutoModelForSequenceClassification if name == "bert" else t.AutoModelForCausalLM
    same(loaded(tmp_path, dtype=dtype), auto.from_pretrained(tmp_path, dtype=dtype))


def test_experts_are_converted_on_the_way(tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    model = loaded(tmp_path, unit="module")
    assert len(on_disk) > len(model.state_dict())
    same(model, t.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_head_that_the_checkpoint_lacks_is_made_from_the_seed(tmp_path):
    t.BertModel(t.BertConfig(**SIZES)).save_pretrained(tmp_path)
    one, other = (loaded(tmp_path, task="sequence-classification") for _ in range(2))
    same(one, other)
    assert 0.005 < float(one.classifier.weight.std()) < 0.05
    body = t.BertModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(one.bert.state_dict()[name], tensor) for name, tensor in body.items())


def test_parameters_that_stay_float32_do(tmp_path):
    """Some families require it; one dtype for all parameters would change the model."""
    config = t.T5Config(
        vocab_size=120,
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        d_kv=8,
        decoder_start_token_id=0,
    )
    loader = ModelLoader.__new__(ModelLoader)
    loader.config, loader.hf_config, loader.task = ModelConfig(dtype="float16"), config, "causal-lm"
    loader.peft = PeftConfig()
    from zo.model import build as models

    kept = dict(models.AUTO_CLASS)
    models.AUTO_CLASS["causal-lm"] = t.AutoModelForSeq2SeqLM
    try:
        skeleton = loader.skeleton()
    finally:
        models.AUTO_CLASS.update(kept)
    t.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    expected = t.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype="float16")
    types = {name: p.dtype for name, p in expected.named_parameters()}
    assert set(types.values()) == {torch.float16, torch.float32}
    assert {name: p.dtype for name, p in skeleton.named_parameters()} == types


def test_a_tensor_of_another_shape_is_told(tmp_path):
    build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"model\.norm\.weight has shape \[7\], its parameter model\.norm\.weight \[32\]",
    ):
        loaded(tmp_path)


def with_header(path, change):
    """Rewrite a file's header; leave the tensors' bytes."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header) or json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def entry(key, value):
    return lambda header: header["model.norm.weight"].update({key: value})


HEADERS = {
    "no offsets": lambda h: h["model.norm.weight"].pop("data_offsets") and None,
    "no type": lambda h: h["model.norm.weight"].pop("dtype") and None,
    "no shape": lambda h: h["model.norm.weight"].pop("shape") and None,
    "no object": lambda h: h.update({"model.norm.weight": 7}),
    "a list": lambda h: b"[1, 2]",
    "nothing but a number": lambda h: b"17",
    "nested without end": lambda h: b"[" * 200_000,
    "no UTF-8": lambda h: b'{"\xff": 1}',
    "a type of another kind": entry("dtype", ["F32"]),
    "a type that is unknown": entry("dtype", "F8_E4M3"),
    "one offset": entry("data_offsets", [0]),
    "offsets that are no numbers": entry("data_offsets", ["0", "128"]),
    "offsets that are no integers": entry("data_offsets", [0.0, 128.0]),
    "offsets that are truth values": entry("data_offsets", [False, True]),
    "negative offsets": entry("data_offsets", [-128, 0]),
    "offsets the wrong way round": entry("data_offsets", [128, 0]),
    "offsets beyond the file": entry("data_offsets", [10**12, 10**12 + 128]),
    "too few bytes": entry("data_offsets", [0, 64]),
    "bytes of another tensor": entry("data_offsets", [0, 128]),
    "a negative shape": entry("shape", [-32]),
    "a shape of another size": entry("shape", [2**62]),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_header_that_contradicts_itself_is_one_line(tmp_path, damage):
    """A wrong offset would train on other tensors' bytes, or end in a traceback."""
    build("llama").save_pretrained(tmp_path)
    with_header(tmp_path / "model.safetensors", HEADERS[damage])
    with pytest.raises(
        UserError, match=r"model\.safetensors (has a corrupt header|holds tensors|is truncated)"
    ) as error:
        loaded(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("start", "count"),
    [(0, 4096), (8, 100), (4096, 8192), (4090, 12), (123, 40_000_000), (41_000_007, 70)],
)
def test_an_engine_reads_any_bytes(tmp_path, engine, start, count):
    data = torch.randint(
        0, 256, (41_000_077,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    path = tmp_path / "file"
    path.write_bytes(data.numpy().tobytes())
    made = ENGINES[engine]()
    for into in (torch.zeros(count, dtype=torch.uint8), made.allocate(count)):
        made.read(path, start, into)
        assert torch.equal(into, data[start : start + count])
    with pytest.raises(OSError, match=f"file is .* {len(data)} bytes"):
        made.read(path, len(data) - 5, torch.zeros(6, dtype=torch.uint8))
    with pytest.raises(FileNotFoundError):
        made.read(tmp_path / "none", 0, torch.zeros(6, dtype=torch.uint8))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_reads_what_it_wrote(tmp_path, engine):
    made = ENGINES[engine]()
    for size in (4096, 3 * 2**20):
        data = made.allocate(size)
        data.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8))
        made.write(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data.numpy().tobytes()
        into = made.allocate(size)
        made.read(tmp_path / "file", 0, into)
        assert checksum(into) == checksum(data)


def test_a_header_survives_nothing_but_itself():
    page = Header("model.layers.0", "abc", "f00d", 7, 1000, "0123").page()
    assert Header.parse(page) == Header("model.layers.0", "abc", "f00d", 7, 1000, "0123")
    for place in (0, 9, 40, 100):
        damaged = bytearray(page)
        damaged[place] ^= 1
        assert Header.parse(bytes(damaged)) is None
    assert Header.parse(page[:100]) is None
    assert Header.parse(b"\0" * 4096) is None


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "mixtral"])
def test_random_weights_are_the_same_however_they_are_cut_and_as_transformers_would_have_them(name):
    with torch.device("meta"):
        model = type(build(name))(build(name).config)
    model.tie_weights()
    found = []
    for unit in ("layer", "module"):
        layout, base, weights = find_layout(model, unit), RandomSource(model, 3), {}
        for block in reversed(layout.blocks):
            image = torch.full((block.size_bytes,), 7, dtype=torch.uint8)
            base.read(block, layout, image)
            weights |= {
                part.parameter.name: view.clone() for part, view in views(block, block.carve(image))
            }
        found.append(weights)
    assert all(torch.equal(tensor, found[1][key]) for key, tensor in found[0].items())
    for key, parameter in build(name).named_parameters():
        if parameter.numel() > 1000:
            assert float(found[0][key].std()) == pytest.approx(float(parameter.std()), rel=0.2), key
        elif parameter.dim() == 1:
            assert torch.equal(found[0][key], parameter), key
    assert len({tensor.sum().item() for tensor in found[0].values() if tensor.dim() > 1}) > 3


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc"
)
def test_a_model_larger_than_the_memory_it_may_have_trains_from_its_shards(tmp_path):
    """Weights of 540 MB: the process may grow by at most 3/4 of that, export included."""
    config = t.LlamaConfig(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=8,
    )
    t.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(
        tmp_path / "model", max_shard_size="200MB"
    )
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert size > 500e6
    script = f"""
        import json
        from pathlib import Path
        import zo.run.trainer, zo.method.kernels.cpu
        from plain import plain_config
        from zo import Trainer

        def peak():
            lines = open("/proc/self/status")
            return next(int(l.split()[1]) for l in lines if l.startswith("VmHWM")) * 1024

        before = peak()
        settings = ["model.name={tmp_path}/model", "model.dtype=bfloat16", "data.name=synthetic"]
        settings += ["batch.sequences=1", "batch.micro=1", "batch.max_tokens=16", "run.steps=2"]
        settings += ["eval.every=0", "run.dir={tmp_path}/run", "memory.store=disk"]
        settings += ["memory.unit=module", "memory.lag=1", "export.at_end=true"]
        Trainer(plain_config(settings)).train()
        print(json.dumps(peak() - before))
    """
    code = textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) < 0.75 * size
