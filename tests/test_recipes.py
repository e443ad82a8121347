"""Every recipe trains: two steps on a tiny random model of its family, with rows in its columns.

Here are those that no other test trains: test_papers.py has the papers' recipes with their tasks,
test_rewards.py those of rewards, test_rates.py ``default`` and test_quickstart.py the quickstart.
"""

import json
import math

import pytest
from conftest import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from zo import Trainer, load_config
from zo.config.recipes import recipe_names
from zo.state.log import read

ELSEWHERE = ("mezo-", "countdown-", "gsm8k-", "default", "quickstart")
RECIPES = [name for name in recipe_names() if not name.startswith(ELSEWHERE)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 24}
SIZES |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GATED = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "llama": GATED,
    "qwen3": GATED,
}
"""Further sizes, by the first part of a recipe's name: the family's in transformers."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a model of each family with a tokenizer."""
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in made.items():
        sizes = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
        AutoModelForCausalLM.from_config(sizes).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return made


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_a_tiny_model_of_its_family(folders, tmp_path, recipe):
    """Model, rows, sizes and steps are changed; all else is the recipe's."""
    model = folders[recipe.partition("-")[0]]
    given = [f"model.name={model}", f"model.tokenizer={model}", f"run.dir={tmp_path}/run"]
    given += ["batch.sequences=2", "batch.micro=1", "batch.max_tokens=16", "run.steps=2"]
    given += ["eval.every=2", "export.at_end=false", "run.trackers=[]"]
    has_rows = load_config(recipe, given).data.name != "synthetic"
    if has_rows:
        given.append(f"data.name={rows_of_sst2(tmp_path / 'rows')}")
    summary = Trainer(load_config(recipe, given), command="test").train()
    assert summary["steps"] == 2 and math.isfinite(summary["loss"])
    assert all(any(entry.scalars) for entry in read(tmp_path / "run" / "steps.log")[1])
    assert not has_rows or 0 <= summary["eval"]["accuracy"] <= 1


def rows_of_sst2(folder):
    """Write a folder with the splits and columns of stanfordnlp/sst2; return its path."""
    folder.mkdir()
    for split, count in (("train", 12), ("validation", 4)):
        rows = ({"idx": i, "sentence": "the film was long ", "label": i % 2} for i in range(count))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
