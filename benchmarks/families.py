"""Train a tiny random model of every architecture of transformers for two steps.

    python benchmarks/families.py RESULTS.jsonl --kind causal [--only NAME ...] [--seconds 200]
    python benchmarks/families.py RESULTS.jsonl --table

A configuration is made small by the names of its keys. One that does not run by itself, in a plain
forward of transformers, is not counted. Known results are kept, so that the command can be repeated
until all are there. Each architecture trains with the quickstart's directions (one-sided, rank-one,
diagonal, the top layer) from memory, layer by layer, then from disk, module by module; the weights
must have the same bits. Then so with one dense direction.
"""

import argparse
import json
import random
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers as t
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto import modeling_auto as auto

from zo import Trainer, load_config
from zo.errors import UserError

KINDS = {
    "causal": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, t.AutoModelForCausalLM),
    "classes": (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        t.AutoModelForSequenceClassification,
    ),
    "seq2seq": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, t.AutoModelForSeq2SeqLM),
    "images": (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, t.AutoModelForImageTextToText),
}
DENSE = ["estimator.name=spsa", "estimator.distribution=rademacher", "estimator.part=all",
         "estimator.cover=full", "estimator.probes=1", "estimator.directions=1",
         "batch.micro=2"]  # fmt: skip
QUICK = ["estimator.part=top:1", "estimator.probes=3", "batch.micro=1"]
DISK = ["memory.store=disk", "memory.unit=module"]
CASES = {
    "quick": QUICK,
    "quick from disk": [*QUICK, *DISK],
    "dense": DENSE,
    "dense from disk": [*DENSE, *DISK],
}
SMALL = {
    64: r"vocab_size|num_embeddings|.*(intermediate|ffn|inner|mlp)_(size|dim|hidden_size).*|d_ff|"
        r"n_inner|d_inner|(encoder|decoder)_ffn_dim|block_ff_dim|feed_forward_size|mamba_d_ssm",
    4: r"(num|n)_(hidden_)?layers?|(num_)?(encoder|decoder)_layers|depth|layers|num_head|"
       r"(num_|n_|encoder_|decoder_|num_encoder_|num_decoder_)?(attention_|attn_)?heads?|"
       r"qk_nope_head_dim|qk_rope_head_dim|index_head_dim|rotary_dim|time_step_rank|mamba_dt_rank|"
       r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|linear_num_value_heads|"
       r"patch_size",
    2: r"(num|n)_key_value_heads|num_kv_heads|multi_query_group_num|index_n_heads|eos_token_id|"
       r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|linear_num_key_heads|sep_token_id",
    8: r"d_kv|head_dim|head_size|attention_head_size|global_head_dim|swa_head_dim|v_head_dim|"
       r"kv_channels|index_topk|.*lora_rank|linear_(key|value)_head_dim|state_size|(mamba_)?d_state|"
       r"ssm_state_size|mamba_d_head|mamba_head_dim|mamba_headdim|mamba_n_heads|mamba_num_heads|"
       r"n_mamba_heads|sliding_window|attention_window_size|local_window|block_size",
    1: r"n_shared_experts|num_shared_experts|n_group|topk_group|first_k_dense_replace|n_groups|"
       r"mamba_n_groups|mamba_ngroups|bos_token_id",
    32: r"hidden_size|d_model|n_embd|embed_dim|embedding_size|word_embed_proj_dim|embedding_dim|"
        r"attention_hidden_size|dim|lru_width|emb_dim|input_size|projection_dim|hidden_dim|d_embed",
    128: r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|"
         r"max_(source|target)_positions",
    16: r"(mamba_)?chunk_size|image_size",
    3: r"num_channels|in_channels|in_chans",
    0: r"pad_token_id",
}  # fmt: skip
"""Values, and the keys of configurations that are given them."""
EXTRA = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "ctrl": {"dff": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "rwkv": {"rescale_every": 0},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
LEFT_AS_THEY_ARE = ("^$", "head_dim", "index_|v_head_dim|qk_", "head_dim|key_value_heads",
                    "head|qk|index|rank|group", "head|rank|group|expert|moe|state")  # fmt: skip
"""Keys that are not made small, tried in turn until the values fit together."""
WORDS = [f"w{i}" for i in range(40)]
LIMIT_S = 90


def small_values(config):
    found = {}
    for key, value in vars(config).items():
        if isinstance(value, t.PreTrainedConfig):
            found[key] = small_values(value) | {"model_type": value.model_type}
        elif type(value) is int or key.endswith("_token_id"):
            fits = [number for number, keys in SMALL.items() if re.fullmatch(keys, key)]
            if fits:
                found[key] = fits[0]
    return found


def tiny(name, kind):
    """Return a small configuration that runs in transformers."""
    default, first_error = t.AutoConfig.for_model(name), None
    small = small_values(default)
    if kind == "causal" and (
        hasattr(default, "is_decoder")
        or (type(default) in auto.MODEL_FOR_MASKED_LM_MAPPING and not default.is_encoder_decoder)
    ):
        small["is_decoder"] = True
    if kind == "seq2seq" and default.is_encoder_decoder:
        small["decoder_start_token_id"] = 0
    small |= EXTRA.get(name, {})
    for left in LEFT_AS_THEY_ARE:
        values = {key: value for key, value in small.items() if not re.search(left, key)}
        try:
            config = t.AutoConfig.for_model(name, **values)
            check_plain(config, kind)
            return config
        except Exception as error:
            first_error = first_error or error
    raise first_error


def check_plain(config, kind):
    make = KINDS[kind][1].from_config
    with torch.device("meta"):
        if sum(p.numel() for p in make(config).parameters()) > 30e6:
            raise ValueError("not small")
    ids = torch.randint(3, 40, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    more = {"decoder_input_ids": ids} if kind == "seq2seq" else {}
    with torch.no_grad():
        make(config).eval()(input_ids=ids, attention_mask=mask, **more).logits.sum()


def write_inputs(kind, name, folder):
    tiny(name, kind).save_pretrained(folder / "model")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<bos>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder / "tokenizer")
    chance = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(24):
            text, answer = (
                " ".join(chance.choices(WORDS, k=chance.randint(*n))) for n in ((3, 20), (1, 4))
            )
            pair = {"prompt": text, "completion": answer}
            row = {"text": text, "label": chance.randint(0, 1)} if kind == "classes" else pair
            file.write(json.dumps(row) + "\n")


def train(kind, case, folder):
    settings = [f"model.name={folder}/model", f"model.tokenizer={folder}/tokenizer",
                f"data.name={folder}/data.jsonl", "data.dev_examples=4", "model.weights=random",
                "batch.sequences=4", "batch.max_tokens=32", "run.steps=2", "eval.every=1",
                "run.trackers=[]", "mesh.check_every=0", *CASES[case],
                f"run.dir={folder}/run"]  # fmt: skip
    if kind == "classes":
        settings.append("model.task=sequence-classification")
    try:
        summary = Trainer(load_config("quickstart", settings), command="x").train()
    except UserError as error:
        return {"result": "refused", "said": str(error).replace(str(folder), "FOLDER")}
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({at.filename[-50:]}:{at.lineno})"
        return {"result": "crashed", "said": said}
    events = (folder / "run" / "events.jsonl").read_text().splitlines()
    lines = [json.loads(line)["text"] for line in events]
    said = [s for s in lines if s.startswith(("probes are", "not trained"))]
    if summary["loss"] is None or summary["fingerprint"] is None:
        return {"result": "crashed", "said": "no loss, or stopped by a signal"}
    return {"result": "trained", "said": said, "fingerprint": summary["fingerprint"]}


def one(kind, name, case):
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_inputs(kind, name, Path(folder))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            return {"result": "no small configuration", "said": " ".join(said.split())[:200]}
        return train(kind, case, Path(folder))


def late(*_):
    raise TimeoutError(f"{LIMIT_S} s")


def table(results):
    """Print the counts of each kind, and what is refused or crashes."""
    columns = "kind", "architectures", "small and running", "trained", "same bits from disk"
    print("|", " | ".join((*columns, "refused", "crashed")), "|")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        by_case = {case: {} for case in CASES}
        for r in results:
            if r["kind"] == kind:
                by_case[r["case"]][r["name"]] = r
        quick = by_case["quick"]
        count = Counter(r["result"] for r in quick.values())
        pairs = [
            (r["fingerprint"], by_case[disk].get(name, {}).get("fingerprint"))
            for case, disk in (("quick", "quick from disk"), ("dense", "dense from disk"))
            for name, r in by_case[case].items()
            if r["result"] == "trained" and name in by_case[disk]
        ]
        same = f"{sum(a == b for a, b in pairs)} of {len(pairs)}"
        runs = len(quick) - count["no small configuration"]
        print(f"| {kind} | {len(quick)} | {runs} | {count['trained']} | {same} | "
              f"{count['refused']} | {count['crashed']} |")  # fmt: skip
    for r in results:
        if r["result"] in ("refused", "crashed"):
            print(f"- {r['kind']} {r['name']} ({r['case']}) {r['result']}: {r['said']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="causal")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    known = {(r["kind"], r["name"], r["case"]): r for r in map(json.loads, lines)}
    if args.table:
        return table(known.values())
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGALRM, late)
    begun = time.monotonic()
    with args.results.open("a") as file:
        for name in args.only or sorted(KINDS[args.kind][0]):
            for case in args.cases:
                before = known.get((args.kind, name, case))
                if before or time.monotonic() - begun > args.seconds:
                    continue
                signal.alarm(LIMIT_S)
                found = one(args.kind, name, case)
                signal.alarm(0)
                file.write(json.dumps({"kind": args.kind, "name": name, "case": case, **found}))
                file.write("\n")
                file.flush()
                if found["result"] == "no small configuration":
                    break
    return None


if __name__ == "__main__":
    main()
