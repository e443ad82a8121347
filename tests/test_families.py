"""Kinds of models, each trained as what it is, and by any store and unit with the same bits.

One family stands for each mechanism; benchmarks/families.py sweeps over all of transformers.
"""

import json

import pytest
import torch
from conftest import WORDS, make_tokenizer
from plain import assert_refused, run
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from zo.config.schema import ModelConfig
from zo.data import seq2seq
from zo.data.tasks import Example
from zo.model.build import ModelLoader
from zo.state.log import read

QUICK = [
    "estimator.name=one-sided",
    "estimator.distribution=rank-one",
    "estimator.cover=diagonal",
    "estimator.directions=null",
    "estimator.probes=3",
    "estimator.part=top:1",
    "batch.micro=1",
    "run.steps=2",
    "eval.every=2",
    "mesh.check_every=0",
]
ELSEWHERE = ["memory.store=disk", "memory.unit=module", "memory.slots=2"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
IDS = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**SIZES, **IDS, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
SEES = {**SIZES, "image_size": 8, "patch_size": 4}
FAMILIES = {
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 3, "num_heads": 4, "d_kv": 8, **IDS,
           "decoder_start_token_id": 0, "architectures": ["T5ForConditionalGeneration"]},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **IDS,
             "max_position_embeddings": 64},
    "llava": {"text_config": {**TEXT, "model_type": "llama"},
              "vision_config": {**SEES, "model_type": "clip_vision_model"}},
    "qwen2_vl": {"text_config": {**TEXT, "rope_parameters": {
                     "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
                 "vision_config": {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4}},
    "deberta-v2": {**SIZES, **IDS, "relative_attention": True, "max_position_embeddings": 64,
                   "architectures": ["DebertaV2ForSequenceClassification"]},
}  # fmt: skip
HELD = {
    "llava": "the loss does not use it: model.vision_tower, model.multi_modal_projector",
    "qwen2_vl": "the loss does not use it: model.visual",
    "deberta-v2": "is beside the layers: deberta.encoder.rel_embeddings",
}
"""What is not trained, of the families where that is anything."""


def folder_of(tmp_path, family, **changes):
    folder = tmp_path / "model"
    AutoConfig.for_model(family, **{**FAMILIES[family], **changes}).save_pretrained(folder)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return folder


@pytest.fixture
def settings(tmp_path, overrides):
    return [
        *(s for s in overrides if s.partition("=")[0] not in {q.partition("=")[0] for q in QUICK}),
        *QUICK,
        f"model.name={tmp_path / 'model'}",
        f"model.tokenizer={tmp_path / 'tokenizer'}",
        "model.weights=random",
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_by_default_with_the_same_bits_in_any_store(
    settings, tmp_path, family, capsys
):
    folder_of(tmp_path, family)
    if family == "deberta-v2":
        settings += ["data.template=null", "data.label_words=null"]
    found = [run(settings, tmp_path / str(n), *place) for n, place in enumerate(([], ELSEWHERE))]
    assert found[0]["fingerprint"] == found[1]["fingerprint"]
    assert found[0]["eval"]["loss"] > 0
    said = capsys.readouterr().err
    assert said.count("not trained, because") == (2 if family in HELD else 0)
    assert HELD.get(family, "") in said
    header, entries = read(tmp_path / "0" / "steps.log")
    held = header.get("held", [])
    assert bool(held) == (family in HELD)
    layers = [
        at for at, module in enumerate(header["order"]) if module.rpartition(".")[2].isdigit()
    ]
    assert {entry.part for entry in entries} == {max(layers)}
    assert any(any(entry.scalars) for entry in entries)


@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_a_completion_is_the_decoders_with_the_models_own_loss(tmp_path, family):
    """And it does not depend on padding; a label word is the decoder's first one."""
    folder = folder_of(tmp_path, family)
    loader = ModelLoader(ModelConfig(name=str(folder), weights="random"))
    assert loader.task == "seq2seq-lm"
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(loader.hf_config).eval()
    task = seq2seq.completion(pad=0)
    examples = [Example((5, 6, 7, 8, 9, 2), 3), Example((10, 11, 12, 2), 2)]
    together = task.terms(model, task.collate(examples, examples))
    alone = [task.terms(model, task.collate([e], [e])) for e in examples]
    torch.testing.assert_close(together, alone[0] + alone[1], rtol=1e-5, atol=1e-5)
    own = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[8, 9, 2]])).loss
    torch.testing.assert_close(alone[0][0] / 3, own.double(), rtol=1e-5, atol=1e-5)
    short = task.shorten(task.collate(examples, examples))
    assert short["labels"].tolist() == [[8, 9, 2], [12, 2, -100]]

    choice = seq2seq.choice(pad=0, word_ids=[14, 15], lead=[1])
    batch = choice.collate([Example((5, 6, 7), 1)], [Example((5, 6, 7), 1)])
    start = model.config.decoder_start_token_id
    plain = model(batch["input_ids"], decoder_input_ids=torch.tensor([[start, 1]])).logits[:, -1]
    expected = torch.log_softmax(plain[:, [14, 15]], -1)[0, 1]
    torch.testing.assert_close(choice.terms(model, batch)[0], -expected.double())


def test_what_is_no_pair_is_refused_for_an_encoder_and_decoder(settings, tmp_path):
    folder_of(tmp_path, "t5")
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": word}) + "\n" for word in WORDS))
    more = [f"data.name={own}", "data.template=null", "data.label_words=null"]
    said = r"has columns text, and the model has an encoder and a decoder.*prompt and completion"
    assert_refused(said, settings, tmp_path / "run", *more)


MASKED = {**SIZES, **IDS, "max_position_embeddings": 64, "architectures": ["RobertaForMaskedLM"]}


def test_a_masked_model_is_not_trained_as_a_causal_one(settings, tmp_path):
    """Its loss would fall at once: it sees the word that it should predict."""
    AutoConfig.for_model("roberta", **MASKED).save_pretrained(tmp_path / "model")
    said = r"masked language model \(RobertaForMaskedLM\).*model\.task=sequence-classification"
    assert_refused(said, settings, tmp_path / "run", "model.task=causal-lm")


def test_positions_that_an_embedding_reserves_for_padding_are_not_counted(settings, tmp_path):
    AutoConfig.for_model("roberta", **(MASKED | {"pad_token_id": 1})).save_pretrained(
        tmp_path / "model"
    )
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    more = ["model.task=sequence-classification", "data.template=null", "data.label_words=null"]
    said = r"batch\.max_tokens=64 is more than the 62 positions .*; use at most 62"
    assert_refused(said, settings, tmp_path / "run", *more)


def test_a_model_without_the_task_is_told_those_that_it_has(settings, tmp_path):
    folder_of(tmp_path, "t5")
    said = r"is a t5, of which transformers has no causal-lm model; use .*model\.task=seq2seq-lm"
    assert_refused(said, settings, tmp_path / "run", "model.task=causal-lm")


def test_parameters_of_one_element_are_exported_from_any_store(settings, tmp_path):
    """Between visits each is a NaN, as of every shape, but no stride tells it from a weight."""
    small = TEXT | {"num_hidden_layers": 2}
    AutoConfig.for_model("apertus", **small).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    found = []
    for n, place in enumerate(([], ELSEWHERE)):
        run(settings, tmp_path / str(n), *place, "export.at_end=true")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(n) / "model")
        found.append(model.state_dict())
    assert any(tensor.numel() == 1 for tensor in found[0].values())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_a_model_whose_forward_changes_its_weights_is_refused(settings, tmp_path):
    """RWKV divides some at its first evaluation: a resumed run would do it once more."""
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, **IDS}
    AutoConfig.for_model("rwkv", **sizes).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    said = "forward changes its own weights .*turn that off in the model's config.json"
    assert_refused(said, settings, tmp_path / "run")
    AutoConfig.for_model("rwkv", rescale_every=0, **sizes).save_pretrained(tmp_path / "model")
    assert run(settings, tmp_path / "run", *ELSEWHERE)["fingerprint"]


UNFIT = {
    "funnel": {"block_sizes": [4, 4, 4], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 32},
    "ibert": {**SIZES, "max_position_embeddings": 64},
}


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("funnel", "a copy of its first layers does not run by itself"),
        ("ibert", "weight_integer of QuantEmbedding is computed from weights"),
    ],
)
def test_a_model_that_cannot_be_checked_is_refused_in_a_line(settings, tmp_path, family, said):
    AutoConfig.for_model(family, **IDS, **UNFIT[family]).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    more = ["model.task=sequence-classification", "data.template=null", "data.label_words=null"]
    assert_refused(said, settings, tmp_path / "run", *more)
