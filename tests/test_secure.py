"""Files that somebody made to harm whoever opens them are refused, and leave nothing behind."""

import ast
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from conftest import make_tokenizer

from zo.config.plain_yaml import read_yaml, write_yaml
from zo.config.recipes import check_recipe, config_of
from zo.config.schema import ModelConfig
from zo.data.chat import Chat
from zo.data.files import Origin, read_files
from zo.errors import UserError
from zo.io import quickstart
from zo.io.block_file import Header
from zo.io.engines import ENGINES, PAGE
from zo.model.build import ModelLoader
from zo.state.log import read
from zo.state.run_folder import RunFolder
from zo.state.snapshot import Snapshot

ROOT = Path(__file__).resolve().parent.parent
CODE = [
    p for folder in ("zo", "launch", "docker", "benchmarks") for p in (ROOT / folder).rglob("*.py")
]

# --- what the code never does

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pty"}
CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "os.system",
        "os.popen",
        "runpy.run_path",
        "torch.load",
        "torch.save",
    ),
    *("np.load", "numpy.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("shutil.unpack_archive", "hydra.utils.instantiate", "hydra.utils.call", "torch.hub.load"),
}
METHODS = {"extractall", "extract", "all_gather_object", "broadcast_object_list", "gather_object"}
ARCHIVES = {"tarfile": "zo/io/quickstart.py", "zipfile": "zo/io/quickstart.py"}
"""The one reader of archives, whose SHA-256 are pinned; it takes members by name."""


def found_in(text, path):
    """Yield what a source does of all that."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            for name in (name.split(".")[0] for name in names):
                if name in MODULES or ARCHIVES.get(name, path) != path:
                    yield f"{path}: import {name}"
        elif isinstance(node, ast.Call):
            name, keys = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            if name in CALLS or name.split(".")[-1] in METHODS:
                yield f"{path}: {name}()"
            if name == "yaml.load" and path != "zo/config/plain_yaml.py":
                yield f"{path}: yaml.load()"
            for key in ("shell", "allow_pickle"):
                if key in keys and getattr(keys[key], "value", True):
                    yield f"{path}: {name}({key}=...)"


def test_no_code_unpickles_evaluates_unpacks_or_starts_a_shell():
    assert len(CODE) > 100
    found = [f for p in CODE for f in found_in(p.read_text(), str(p.relative_to(ROOT)))]
    # The benchmark of a step measures a program that it holds as text.
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from marshal import loads",
        "import tarfile",
        "torch.load(path, weights_only=True)",
        "eval(text)",
        "yaml.load(text, Loader)",
        "subprocess.run(command, shell=True)",
        "archive.extractall(to)",
        "np.load(path, allow_pickle=False)",
    ],
)
def test_the_search_finds_each(text):
    assert list(found_in(text, "zo/x.py"))


# --- malicious files


class Payload:
    """Leaves a marker wherever it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """A path that exists once some payload has run."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


@pytest.fixture
def pickled(marker):
    return pickle.dumps(Payload(marker))


def refused(match, act, *arguments):
    """Assert a refusal in one line."""
    with pytest.raises(UserError, match=match) as caught:
        act(*arguments)
    assert "\n" not in str(caught.value)


def weights(folder):
    loader = ModelLoader(ModelConfig(name=str(folder)))
    return loader.weights(loader.skeleton(), 0, ENGINES["mmap"]())


@pytest.fixture
def bare(tiny_model, tmp_path):
    """Folder of a model's configuration and tokenizer, without weights."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickled_weights_are_not_read(bare, pickled, name):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as content:  # As torch.save makes it.
        content.writestr("archive/data.pkl", pickled)
    for data in (pickled, archive.getvalue()):
        (bare / name).write_bytes(data)
        refused("cannot be loaded", weights, bare)


LIES = {
    "a length of 2**63": struct.pack("<Q", 2**63),
    "more than the file": struct.pack("<Q", 10**6) + b"{}",
    "offsets beyond the end": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]},
    "another size": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]},
    "a size that takes hours to find": {"shape": [9 * 10**3999] * 3000, "data_offsets": [0, 4]},
    "a negative one": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_file_that_lies_is_refused(bare, lie):
    data = LIES[lie]
    if isinstance(data, dict):
        text = json.dumps({"lm_head.weight": {"dtype": "F32"} | data}).encode()
        data = struct.pack("<Q", len(text)) + text + b"\0" * 16
    (bare / "model.safetensors").write_bytes(data)
    refused("cannot be loaded", weights, bare)


@pytest.mark.parametrize(
    "index",
    [
        {"metadata": {}, "weight_map": {"lm_head.weight": "../other.safetensors"}},
        {"metadata": {}, "weight_map": {"lm_head.weight": "{absolute}"}},
        {"weight_map": 3},
        [],
    ],
)
def test_an_index_names_only_files_of_its_folder(bare, tiny_model, tmp_path, index):
    other = tmp_path / "other.safetensors"
    other.write_bytes((tiny_model / "model.safetensors").read_bytes())
    text = json.dumps(index).replace("{absolute}", str(other))
    (bare / "model.safetensors.index.json").write_text(text)
    refused("outside of its folder|not a file of its folder|is corrupt", weights, bare)


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "llama", "hidden_size": "x"},
        {"model_type": ["llama"]},
        {"model_type": "llama", "num_attention_heads": 0},
        [],
    ],
)
def test_a_models_configuration_of_wrong_types_is_refused(bare, content):
    (bare / "config.json").write_text(json.dumps(content))
    refused("model.name=", lambda: ModelLoader(ModelConfig(name=str(bare))).skeleton())


def test_a_tokenizers_own_code_is_not_run(bare, marker):
    (bare / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    path = bare / "tokenizer_config.json"
    content = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps({**content, "tokenizer_class": "Evil"}))
    refused("contains custom code", ModelLoader(ModelConfig(name=str(bare))).tokenizer)


def test_a_chat_template_stays_in_its_sandbox(marker):
    tokenizer = make_tokenizer()
    escape = "cycler.__init__.__globals__.os.mkdir"
    tokenizer.chat_template = f"{{{{ {escape}({str(marker)!r}) }}}}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = Chat(tokenizer, lambda text: tokenizer(text)["input_ids"], "x")
    refused("chat template rejects", chat.samples, Origin("x", 1), turns)
    tokenizer.chat_template = "{{ 1 // 0 }}"
    refused("chat template rejects", chat.samples, Origin("x", 1), turns)


def test_a_pickle_is_no_log_no_block_and_no_snapshot(tmp_path, pickled):
    path = tmp_path / "steps.log"
    path.write_bytes(pickled)
    refused("is not a log", read, path)
    assert Header.parse(pickled.ljust(PAGE, b"\0")) is None
    with pytest.raises(Exception, match=r"[Hh]eader"):
        Snapshot(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config: !!python/object/apply:os.mkdir [{marker}]", "constructor for the tag"),
        ("config: {{model: !!python/name:os.mkdir x}}", "constructor for the tag"),
        ("config: {{model: {{_target_: os.mkdir, path: {marker}}}}}", "_target_"),
        ("config: {{_target_: os.mkdir, _args_: [{marker}]}}", "_target_"),
        ("config: {{data: {{name: '${{oc.env:HOME}}'}}}}", "interpolation"),
        ("config: &a {{model: *a}}", "aliases"),
        ("config: {{run: {{seed: 0x" + "f" * 5000 + "}}}}", "digits"),
        ("config: {{data: {{columns: " + "[" * 200 + "]" * 200 + "}}}}", "groups in more than"),
    ],
)
def test_a_configuration_makes_no_objects(tmp_path, marker, text, said):
    (tmp_path / "config.yaml").write_text(text.format(marker=marker))
    refused(said, lambda: config_of(RunFolder(tmp_path).read_config()["config"]))


BOMBS = {
    "lists": ("[x, x]", "[{0}]"),
    "merged keys": ("{{k: x}}", "{{'<<': [{0}]}}"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_aliases_that_unfold_to_gigabytes_are_refused(tmp_path, kind):
    first, form = BOMBS[kind]
    lines = ["defaults: [schema, _self_]", f"a0: &a0 {first.format()}"]
    for i in range(1, 30):
        lines.append(f"a{i}: &a{i} " + form.format(", ".join([f"*a{i - 1}"] * 10)))
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    refused("aliases", check_recipe, tmp_path / "recipe.yaml")


def test_what_is_written_has_no_aliases():
    twice = ["a"]
    assert read_yaml(write_yaml({"x": twice, "y": twice})) == {"x": ["a"], "y": ["a"]}
    assert yaml.safe_load(write_yaml({"x": twice, "y": twice})) == {"x": ["a"], "y": ["a"]}


def test_an_archive_is_not_unpacked_whatever_its_name(tmp_path, marker):
    """The reader of tables unpacks what it takes for an archive."""
    folder = tmp_path / "data"
    folder.mkdir()
    table = pyarrow.table({"text": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "whole.parquet")
    with zipfile.ZipFile(folder / "rows.parquet", "w") as archive:
        archive.writestr("../marker", "x")
        archive.write(tmp_path / "whole.parquet", "rows.parquet")
    refused("not a Parquet file", read_files, "data.name", str(folder / "rows.parquet"), "train")
    with tarfile.open(folder / "rows.jsonl", "w:gz") as archive:
        archive.add(tmp_path / "whole.parquet", "../marker")
    refused("not UTF-8", read_files, "data.name", str(folder / "rows.jsonl"), "train")
    (folder / "rows.zip").write_bytes((folder / "rows.parquet").read_bytes())
    refused("known kind", read_files, "data.name", str(folder / "rows.zip"), "train")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "whole.parquet"]


def test_a_member_of_an_archive_is_read_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name in ("../evil", "/tmp/evil", "wanted"):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    assert quickstart._member(made.getvalue(), "wanted") == b"x"
    assert not list(tmp_path.iterdir())


def test_a_loading_script_is_not_run(tmp_path, marker):
    script = f"import os\nos.mkdir({str(marker)!r})\n"
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(script)
    for name in (folder, folder / "set.py"):
        refused("known kind", read_files, "data.name", str(name), "train")
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    rows = read_files("data.name", str(folder), "train")
    assert [row for _, row in rows] == [{"text": "a"}]


def test_a_pickled_type_in_a_table_is_not_loaded(tmp_path, pickled, marker):
    """As pyarrow itself did before 14.0.1 (CVE-2023-47248)."""
    names = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    field = pyarrow.field("text", pyarrow.string())
    field = field.with_metadata({**names, b"ARROW:extension:metadata": pickled})
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows = read_files("data.name", str(tmp_path / "rows.parquet"), "train")
    assert [row for _, row in rows] == [{"text": "a"}]


@pytest.mark.parametrize("text", [b"null\nnull\n", b"[null]", b"3", b"[[" * 100 + b"]]" * 100])
def test_json_without_objects_does_not_end_the_process(tmp_path, text):
    """pyarrow's reader ends with a segmentation fault at the first of these."""
    (tmp_path / "rows.json").write_bytes(text)
    refused("JSON object", read_files, "data.name", str(tmp_path / "rows.json"), "train")
