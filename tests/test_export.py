"""An exported model is the run's weights, complete or absent.

Models are tiny and random, and lie in memory as in a run: a block's parameters are views of one
flat tensor.
"""

import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers as tf
from plain import CARD, contents
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from zo.errors import UserError
from zo.run import export
from zo.run.export import write_folder

pytestmark = pytest.mark.slow  # Whole runs, most of them in processes of their own.

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama-tied": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **SMALL, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True
        )
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4)
    ),
    "bert": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(**SMALL, intermediate_size=48, num_labels=3)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=96,
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            tie_word_embeddings=True,
        )
    ),
}
AUTO = (tf.AutoModelForCausalLM, tf.AutoModelForSequenceClassification, tf.AutoModelForSeq2SeqLM)


def into_flat_buffers(model):
    """Move a block's parameters into one tensor, at multiples of 128, tied ones on one view."""
    blocks = {}
    for name, parameter in model.named_parameters():
        blocks.setdefault(".".join(name.split(".")[:4]), []).append(parameter)
    views = {}
    for parameters in blocks.values():
        flat = torch.full((sum(-(-p.numel() // 128) * 128 for p in parameters) + 12800,), 7.0).to(
            parameters[0].dtype
        )
        start = 0
        for p in parameters:
            view = flat[start : start + p.numel()].view(p.shape)
            views[id(p)] = view.copy_(p.data)
            start += -(-p.numel() // 128) * 128
    # Two Parameters on one view for each tie, not one Parameter twice.
    for module in model.modules():
        for key, p in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(views[id(p)], requires_grad=False))
    return model.eval()


def build(family, dtype=torch.float32):
    torch.manual_seed(0)
    return into_flat_buffers(MODELS[family]().to(dtype))


def tokenizer():
    words = Tokenizer(WordLevel({"<unk>": 0, "good": 1, "bad": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def own_bytes(model):
    return sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


def assert_same_when_loaded(model, folder):
    """Any tensor missing, cast, mixed up or untied would show."""
    auto = next(a for a in AUTO if type(model) in a._model_mapping.values())
    loaded = auto.from_pretrained(folder)
    assert type(loaded) is type(model)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name

    def ties(state):
        at = {}
        for name, tensor in state.items():
            at.setdefault(tensor.data_ptr(), set()).add(name)
        return sorted(map(sorted, at.values()))

    assert ties(before) == ties(after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", MODELS)
def test_a_folder_loads_as_the_same_model(tmp_path, family, dtype):
    model = build(family, dtype)
    to = tmp_path / "new" / "model"
    write_folder(model, tokenizer(), to, CARD)
    assert_same_when_loaded(model, to)
    # Only a model's own bytes: no padding or neighbours of its storage, no tied tensor twice.
    assert (
        own_bytes(model) <= (to / "model.safetensors").stat().st_size <= own_bytes(model) + 16_384
    )
    assert tf.AutoTokenizer.from_pretrained(to)("good bad").input_ids == [1, 2]
    assert names_in(to.parent) == ["model"]


def test_any_reader_finds_it_by_its_configuration(tmp_path):
    model = build("llama-tied", torch.bfloat16)
    write_folder(model, None, tmp_path / "model", CARD)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(8).view(1, 8)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_mixture_of_experts_is_saved_under_the_hubs_names(tmp_path):
    model = build("mixtral")
    write_folder(model, None, tmp_path / "model", CARD)
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == 41
        first = file.get_tensor("model.layers.1.block_sparse_moe.experts.2.w1.weight")
    assert torch.equal(first, model.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][2, :48])


def test_no_pickle_is_written(tmp_path):
    write_folder(build("bert"), tokenizer(), tmp_path / "model", CARD)
    for path in (tmp_path / "model").iterdir():
        assert path.suffix in (".safetensors", ".json", ".md", ".txt"), path
        # A pickle of protocol 2 or later, and the zip archive that torch.save makes.
        assert not path.read_bytes().startswith((b"\x80", b"PK")), path


@pytest.mark.parametrize("family", MODELS)
def test_parts_make_the_same_model_as_the_whole(tmp_path, family, monkeypatch):
    """A large model leaves a few layers at a time: no weight may be lost or converted by half."""
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    model = build(family)
    write_folder(model, None, tmp_path / "model", CARD)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    assert_same_when_loaded(model, tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == own_bytes(model)
    assert set(index["weight_map"].values()) == {p.name for p in shards}
    assert (
        own_bytes(model)
        <= sum(p.stat().st_size for p in shards)
        <= own_bytes(model) + 8_192 * len(shards)
    )
    others = [n for n in names_in(tmp_path / "model") if not n.endswith(".safetensors")]
    has_generation = ["generation_config.json"] if family != "bert" else []
    assert others == ["README.md", "config.json", *has_generation, "model.safetensors.index.json"]


def test_a_conversion_that_joins_layers_is_not_cut(monkeypatch):
    """A converter may read two layers; converting either alone would save half a weight."""
    model = build("llama-tied")
    assert len(export._Content(model).parts(model, 40_000)) > 1
    joined = "model.both_norms"
    monkeypatch.setattr(
        export,
        "revert_weight_conversion",
        lambda _, state: {
            joined if "input_layernorm" in name else name: tensor for name, tensor in state.items()
        },
    )
    assert len(export._Content(model).parts(model, 40_000)) == 1


def test_a_tie_between_layers_is_not_cut():
    model = build("llama-tied")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert len(export._Content(model).parts(model, 40_000)) == 1


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc"
)
def test_no_second_copy_of_the_model_is_made(tmp_path):
    """Memory beyond a model of 110 MiB: dense, experts at once, experts in parts."""
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import torch, transformers as tf
        import test_export as t
        from zo.run import export

        def status(key):
            lines = open("/proc/self/status")
            return next(int(l.split()[1]) for l in lines if l.startswith(key)) * 1024

        def over(model, name):
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            export.write_folder(model, None, Path({str(tmp_path)!r}) / name, t.CARD)
            return (status("VmHWM") - before) / 2**20

        shape = dict(vocab_size=96, hidden_size=512, num_attention_heads=4, num_key_value_heads=4)
        export.write_folder(t.build("mixtral"), None, Path({str(tmp_path)!r}) / "warm", t.CARD)
        llama = tf.LlamaConfig(**shape, intermediate_size=4096, num_hidden_layers=4)
        llama = tf.LlamaForCausalLM(llama)
        dense = over(t.into_flat_buffers(llama), "dense")
        del llama
        experts = dict(intermediate_size=1024, num_local_experts=4)
        mixtral = tf.MixtralConfig(**shape, **experts, num_hidden_layers=4)
        mixtral = t.into_flat_buffers(tf.MixtralForCausalLM(mixtral))
        whole = over(mixtral, "whole")
        export.SHARD_BYTES = 32 * 2**20
        print(dense, whole, over(mixtral, "parts"))
    """
    # glibc must give back at once what is freed, or a copy hides in memory that it kept.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    code = textwrap.dedent(script)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    dense, whole, parts = map(float, run.stdout.split())
    assert (tmp_path / "dense" / "model.safetensors").stat().st_size > 110 * 2**20
    assert dense < 8
    assert parts < 32 < whole  # The whole converts 64 MiB at once: that is what parts are for.


KILLED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
import torch, transformers as tf
import test_export as t
from zo.run.export import write_folder

torch.set_num_threads(1)  # A child that was forked has no pool of threads.
small, words, to = t.build("llama-tied"), t.tokenizer(), Path({to!r})
events = 0

def die_at(number):
    def hook(event, arguments):
        global events
        if event in ("open", "os.rename", "os.mkdir") and ".unfinished" in str(arguments[0]):
            events += 1
            if events == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def child(model, number):
    pid = os.fork()
    if pid == 0:
        die_at(number)
        write_folder(model, words, to, t.CARD)
        os._exit(events if number == 0 else 0)
    return pid

def checked(pid):
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    assert not to.exists()
    for path in to.parent.iterdir():
        assert path.name == ".model.unfinished", path

total = os.WEXITSTATUS(os.waitpid(child(small, 0), 0)[1])
assert (to / "model.safetensors").exists()
to.rename(to.parent.parent / "whole")
for number in range(1, total + 1):
    checked(child(small, number))
# And in the middle of the weights, which no event marks.
large = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=40_000, hidden_size=512, intermediate_size=64,
                                           num_hidden_layers=1, num_attention_heads=4))
pid, weights = child(large, -1), to.parent / ".model.unfinished" / "model.safetensors"
while not (weights.exists() and weights.stat().st_size):
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    time.sleep(0.0002)
os.kill(pid, signal.SIGKILL)
checked(pid)
write_folder(small, words, to, t.CARD)
print(total)
"""


def test_a_killed_export_leaves_nothing_that_looks_like_a_model(tmp_path):
    """SIGKILL before each file, folder and rename of an export, and amid the weights."""
    to = tmp_path / "out" / "model"
    to.parent.mkdir()
    script = KILLED.format(root=str(Path(__file__).parent), to=str(to))
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 8
    # The export after them is whole, and swept up what they left.
    assert names_in(to.parent) == ["model"]
    assert names_in(to) == names_in(tmp_path / "whole")
    assert_same_when_loaded(build("llama-tied"), to)


def test_a_full_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        write_folder(build("bert"), None, tmp_path, CARD)
    with pytest.raises(UserError, match="not an empty folder"):
        write_folder(build("bert"), None, tmp_path / "keep.txt", CARD, replace=True)
    assert names_in(tmp_path) == ["keep.txt"]
    (tmp_path / "empty").mkdir()
    write_folder(build("bert"), None, tmp_path / "empty", CARD)
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_replace_leaves_no_file_of_the_old_folder(tmp_path):
    to = tmp_path / "model"
    write_folder(build("gpt2"), tokenizer(), to, CARD)
    (to / "model-00001-of-00002.safetensors").write_text("stale")
    model = build("bert")
    write_folder(model, None, to, CARD, replace=True)
    assert names_in(to) == ["README.md", "config.json", "model.safetensors"]
    assert names_in(tmp_path) == ["model"]
    assert_same_when_loaded(model, to)


@pytest.mark.parametrize("mine", ["notes.txt", "README.md", "config.json", "checkpoints/step-1"])
def test_replace_refuses_what_zo_did_not_write(tmp_path, mine):
    to = tmp_path / "model"
    if mine in ("notes.txt", "checkpoints/step-1"):
        write_folder(build("bert"), None, to, CARD)
    (to / mine).parent.mkdir(parents=True, exist_ok=True)
    (to / mine).write_text("a month of work")
    before = names_in(to)
    with pytest.raises(UserError, match=f"zo did not write {mine.partition('/')[0]} in it"):
        write_folder(build("bert"), None, to, CARD, replace=True)
    assert (to / mine).read_text() == "a month of work"
    assert names_in(to) == before
    assert names_in(tmp_path) == ["model"]


def test_replace_refuses_a_link_to_a_folder_of_files(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_folder(build("bert"), None, tmp_path / "elsewhere" / "model", CARD)
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere" / "model")
    before = contents(tmp_path / "elsewhere" / "model")
    with pytest.raises(UserError, match="is a symbolic link"):
        write_folder(build("gpt2"), None, tmp_path / "model", CARD, replace=True)
    assert contents(tmp_path / "elsewhere" / "model") == before


@pytest.mark.parametrize(
    "limit", [300, 20_000, 170_000], ids=["configuration", "weights", "tokenizer"]
)
def test_a_disk_that_fills_is_one_line_and_leaves_nothing(tmp_path, limit):
    """A limit on the file's size is the kernel's own refusal in the middle of a write."""
    model, words = build("gpt2"), tokenizer()
    if limit == 170_000:
        words.add_tokens([f"word{i}" for i in range(3_000)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written") as caught:
            write_folder(model, words, tmp_path / "model", CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(27) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    model = build("gpt2")
    monkeypatch.setattr(
        export.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})
    )
    with pytest.raises(
        UserError, match=rf"needs {own_bytes(model) + export.ROOM_BYTES} bytes .* 1000000 free"
    ):
        write_folder(model, None, tmp_path / "model", CARD)
    assert names_in(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for to in (tmp_path / "file" / "model", Path("/proc/none/model")):
        with pytest.raises(UserError, match="cannot be written") as caught:
            write_folder(build("bert"), None, to, CARD)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is a mount point"):
        write_folder(build("bert"), None, Path("/proc"), CARD, replace=True)
