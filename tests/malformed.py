"""Inputs that nobody writes, for everything that reads somebody's file: valid ones, damaged.

A target is a function that reads one input, and a strategy of hypothesis for such inputs. It may
raise :class:`UserError` alone, or what its callers expect (``refusals``).
"""

import json
from dataclasses import asdict
from functools import cache

from conftest import make_tokenizer
from damage import TEXTS, VALUES, as_json, damages_of
from hypothesis import strategies as st
from malformed_binary import (
    FOLDER,
    INDICES,
    LOGS,
    PAGES,
    SHARDS,
    read_index,
    read_log,
    read_page,
    read_shard,
    written,
)

from zo.config import recipes
from zo.config.recipes import check_recipe, config_of, keys, load_config, resolve
from zo.config.redact import without_secrets
from zo.config.schema import Config, DataConfig
from zo.data.batches import build_data
from zo.data.files import number_rows, read_files
from zo.data.rows import Rows
from zo.model.info import ModelInfo
from zo.observe.curve import Metrics
from zo.observe.metrics import MetricsFile, read_history
from zo.observe.report import Report
from zo.state.run_folder import RunFolder

# --- configurations

KEYS = [key for key, _, _ in keys()]
MARKS = [
    "&a ",
    "*a",
    "<<: *a",
    "!!python/object/apply:os.system ['true']",
    "!!binary x",
    "? ",
    "- ",
]
MARKS += [
    "_target_: os.system",
    "2020-01-01",
    "1:2:3:4",
    "0x" + "f" * 5000,
    "${oc.env:HOME}",
    "???",
]
MARKS += [
    "[" * 300,
    "{" * 300,
    "!!set {a}",
    "\t",
    "|",
    ">",
    "%YAML 9",
    "---\n",
    "...",
    "\x00",
    "\x85",
]
DEFAULTS = asdict(Config())


def changed(tree, changes):
    """Return a configuration with some keys set to something else, as JSON, which is YAML too."""
    tree = json.loads(json.dumps(tree))
    for key, value in changes:
        group, _, name = key.rpartition(".")
        if group and isinstance(tree.get(group), dict):
            tree[group][name] = value
        else:
            tree[key] = value
    return as_json({"config": tree})


SMALL = {group: DEFAULTS[group] for group in ("model", "data", "run")}
CONFIGS = st.one_of(
    st.lists(st.tuples(st.sampled_from([*KEYS, "model", "run", "x"]), VALUES), max_size=3).map(
        lambda changes: changed({}, changes)
    ),
    damages_of(st.just(as_json({"config": SMALL}))),
    st.lists(st.sampled_from(MARKS) | TEXTS | st.just("config: {data: {name: "), max_size=5).map(
        lambda parts: "".join(parts).encode(errors="replace")
    ),
    st.tuples(st.sampled_from(KEYS), st.sampled_from(MARKS)).map(
        lambda both: (
            f"config:\n  {both[0].replace('.', chr(58) + chr(10) + '    ')}: {both[1]}\n".encode()
        )
    ),
)


def read_config(data):
    path = written("run/config.yaml", data)
    config_of(RunFolder(path.parent).read_config()["config"])


SIGNS = "[ ] { } , : ' \" \\ $ ${ = + ~ @ * null a 1 1e999 - . ${oc.env:HOME} ${run.dir} range(1,9)"
FRAGMENTS = st.sampled_from([*SIGNS.split(), "\n", " ", "9" * 5000, "[" * 300])
OVERRIDES = st.one_of(
    st.tuples(
        st.sampled_from(["", "", "+", "++", "~"]),
        st.sampled_from([*KEYS, "model", "_target_", "hydra.searchpath", "defaults", "recipe"]),
        VALUES.map(lambda v: as_json(v).decode()) | st.lists(FRAGMENTS, max_size=4).map("".join),
    ).map(lambda parts: f"{parts[0]}{parts[1]}={parts[2]}"),
    st.lists(FRAGMENTS | TEXTS, max_size=6).map("".join),
)


def read_overrides(override):
    load_config("default", [override])


RECIPE = "# A recipe.\ndefaults:\n- schema\n- _self_\nmodel:\n  name: a\nrun:\n  steps: 3\n"
RECIPES = st.one_of(
    damages_of(st.just(RECIPE.encode())),
    st.tuples(
        st.sampled_from(KEYS), st.sampled_from(MARKS) | VALUES.map(lambda v: as_json(v).decode())
    ).map(
        lambda both: (RECIPE + both[0].replace(".", ":\n  ") + f": {both[1]}\n").encode(
            errors="replace"
        )
    ),
    st.sampled_from(["- /etc/passwd", "- ../x", "- override /hydra: x", "- x@_global_: y"]).map(
        lambda line: RECIPE.replace("- _self_", f"- _self_\n{line}").encode()
    ),
)


def read_recipe(data):
    path = written("recipes/x.yaml", data)
    before, recipes.FOLDER = recipes.FOLDER, path.parent
    try:
        check_recipe(path)
        recipes.as_config(resolve("x", []))
    finally:
        recipes.FOLDER = before


# --- data

ROWS = b'{"text": "the film", "label": "great"}\n{"text": "a plot", "label": "bad"}\n'
CELLS = b'text,label\n"a, b",1\nc,2\n'
LISTED = st.lists(VALUES.map(as_json), max_size=3).map(b"\n".join)
JSONS, TEXT_FILES = st.sampled_from([".jsonl", ".json"]), st.sampled_from([".csv", ".tsv", ".txt"])
TABLES = st.one_of(
    st.tuples(JSONS, damages_of(st.just(ROWS))),
    st.tuples(JSONS, LISTED),
    st.tuples(TEXT_FILES, damages_of(st.just(CELLS))),
    st.tuples(st.just(".parquet"), damages_of(st.builds(lambda: parquet()))),
    st.tuples(st.sampled_from([".jsonl", ".csv", ".parquet"]), st.binary(max_size=60)),
)


@cache
def parquet():
    import pyarrow
    import pyarrow.parquet

    path = FOLDER / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [0, 1]}), path)
    return path.read_bytes()


def read_table(table):
    suffix, data = table
    read_files("data.name", str(written(f"rows{suffix}", data)), "train")


class Given(Rows):
    """Rows in memory."""

    def __init__(self, rows, config):
        self.given = rows
        super().__init__(config)

    def _read(self, key, name, split):
        rows = number_rows(key, self.given)
        return [(origin, self._rename(origin, row)) for origin, row in rows]


TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "x"]) | VALUES,
        "content": TEXTS | VALUES,
    }
)
CELL = TEXTS | VALUES | st.lists(TURN | VALUES, max_size=3)
COLUMNS = [
    {"text", "label"},
    {"prompt", "completion"},
    {"prompt", "chosen", "rejected"},
    {"messages"},
]
COLUMNS += [{"conversations"}, {"instruction", "output"}, {"text"}, {"x"}]
KINDS = st.sampled_from(["causal-lm", "sequence-classification", "seq2seq-lm", "masked-lm"])
GIVEN = st.sampled_from(COLUMNS).flatmap(
    lambda names: st.tuples(
        KINDS, st.lists(st.fixed_dictionaries(dict.fromkeys(sorted(names), CELL)), max_size=3)
    )
)
TOKENIZER = make_tokenizer()
BASE = cache(lambda: load_config("default", ["data.name=x.jsonl", "batch.max_tokens=16"]))


def read_rows(given):
    kind, rows = given
    words = {} if kind == "sequence-classification" else {"label_words": ["bad", "great"]}
    made = Given(
        rows, DataConfig(name="x.jsonl", template="{text} it was", **words, dev_examples=0)
    )
    if not rows or "\\ud" in json.dumps(rows):
        return  # Refused by the readers of files.
    classes = made.class_names() if kind == "sequence-classification" else []
    info = ModelInfo(task=kind, vocab_size=24, accepts=frozenset(), end_tokens=(2,))
    build_data(made, BASE(), TOKENIZER, info, classes)


# --- what a run recorded

LINES = st.dictionaries(
    st.sampled_from(
        ["step", "loss", "lr", "scalars", "step_s", "eval", "tokens_per_s", "host_rss_bytes"]
    ),
    VALUES | st.dictionaries(st.sampled_from(["accuracy", "loss", "details"]), VALUES, max_size=3),
    max_size=5,
).map(lambda line: as_json({"step": 1, "loss": 0.5, **line}))
RECORDS = st.lists(LINES | damages_of(LINES, 2), max_size=4).map(
    lambda lines: b"\n".join(lines) + b"\n"
)


def read_metrics(data):
    path = written("run/metrics.jsonl", data)
    read_history(path, 10**9).best()
    Metrics(path).follow()
    file = MetricsFile(path, 10**9)
    file.close()


def read_page_of_run(data):
    path = written("run/metrics.jsonl", data)
    written("run/config.yaml", b"config: {}\n")
    written("run/status.json", data)
    written("run/events.jsonl", data)
    Report(path.parent, lambda line: None).page()


SECRET = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7xY9zA2cE4g"
MARKED = st.sampled_from(["a=", "token=", "key=", "'", '"', "\\", "://", "@", " ", "eyJ-"])
AROUND = st.lists(TEXTS | MARKED, max_size=6).map("".join)


def redact(texts):
    before, after = texts
    assert SECRET not in without_secrets(f"{before} {SECRET} {after}")
    once = without_secrets(before + after)
    assert SECRET not in once


TARGETS = {
    "log": (read_log, LOGS, 2500),
    "block header": (read_page, PAGES, 2000),
    "safetensors header": (read_shard, SHARDS, 1000),
    "index of shards": (read_index, INDICES, 1000),
    "config.yaml": (read_config, CONFIGS, 250),
    "overrides": (read_overrides, OVERRIDES, 25),
    "recipe": (read_recipe, RECIPES, 40),
    "data file": (read_table, TABLES, 60),
    "data rows": (read_rows, GIVEN, 460),
    "metrics.jsonl": (read_metrics, RECORDS, 400),
    "page": (read_page_of_run, RECORDS, 100),
    "redaction": (redact, st.tuples(AROUND, AROUND), 2165),
}
"""Reader, its inputs, and how many of them the tests feed: 10,000 in all."""
