"""Python that runs an exported model, for its card: executed in the model's folder as it stands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from zo.config.checks import template_columns
from zo.io import quickstart
from zo.model.adapters import has_adapters

HERE = '"."  # this folder, or its id on the hub'
PROMPT = "Once upon a time"

CHOICE = """\
import torch
{imports}

folder = {here}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model}.from_pretrained(folder)
words = {words}
prompt = tokenizer({template}.format_map({values}))["input_ids"]


@torch.no_grad()
def score(word):
    ids = prompt + tokenizer(word, add_special_tokens=False)["input_ids"]
    found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(prompt), len(ids))
    return sum(found[i - 1, ids[i]] for i in places) / len(places)


print(max(words, key=score))
"""

GENERATE = """\
{imports}

folder = {here}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model}.from_pretrained(folder)
inputs = {inputs}
found = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(found[0], skip_special_tokens=True))
"""

CHAT = """tokenizer.apply_chat_template(
    [{{"role": "user", "content": {prompt}}}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)"""

CLASSIFY = """\
from transformers import pipeline

classify = pipeline("text-classification", model={here}
print(classify({prompt}))
"""

LOAD = """\
{imports}

model = {model}.from_pretrained({here}
"""

FROM_LOG = """\
import zo
{imports}
folder = {here}
model = zo.from_log(folder)
{words}"""

TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained({base}{given})\n"


@dataclass(frozen=True)
class Use:
    """How an exported model is used."""

    pipeline: str | None
    """The hub's ``pipeline_tag``, if it is known."""
    library: str
    """``transformers``, ``peft`` or ``zo``."""
    code: str


def use_of(
    model: nn.Module, tokenizer: Any, template: str | None, words: Sequence[str] | None
) -> Use:
    """Return how a model is used.

    Args:
        model: of transformers, perhaps with adapters.
        tokenizer: its tokenizer, or None.
        template: ``data.template`` of a run that chooses among label words.
        words: its label words.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    adapted = has_adapters(model)
    library = "peft" if adapted else "transformers"
    if kind.endswith("ForSequenceClassification"):
        pipeline, auto = "text-classification", "AutoModelForSequenceClassification"
    elif getattr(config, "is_encoder_decoder", False):
        pipeline, auto = None, "AutoModelForSeq2SeqLM"
    elif getattr(model, "can_generate", lambda: False)():
        pipeline, auto = "text-generation", "AutoModelForCausalLM"
    else:
        return Use(None, library, _load(kind))
    if adapted:
        auto = auto.replace("Auto", "AutoPeft", 1)
    if tokenizer is None:
        return Use(pipeline, library, _load(auto, library))
    return Use(pipeline, library, _code(auto, pipeline, tokenizer, template, words))


def _load(model: str, library: str = "transformers") -> str:
    here = HERE.replace('"."', '".")')
    return LOAD.format(imports=f"from {library} import {model}", model=model, here=here)


def _code(
    auto: str,
    pipeline: str | None,
    tokenizer: Any,
    template: str | None,
    words: Sequence[str] | None,
) -> str:
    if pipeline == "text-classification":
        return CLASSIFY.format(here=HERE.replace('"."', '".")'), prompt=repr(PROMPT))
    imports = f"from transformers import {auto}, AutoTokenizer"
    if auto.startswith("AutoPeft"):
        imports = f"from peft import {auto}\nfrom transformers import AutoTokenizer"
    given = {"imports": imports, "model": auto, "here": HERE}
    if template and words:
        values = dict.fromkeys(template_columns(template), PROMPT)
        return CHOICE.format(**given, words=list(words), template=repr(template), values=values)
    prompt = repr(PROMPT)
    inputs = f'tokenizer({prompt}, return_tensors="pt")'
    if getattr(tokenizer, "chat_template", None):
        inputs = CHAT.format(prompt=prompt)
    return GENERATE.format(**given, inputs=inputs)


def log_use(
    model: nn.Module,
    tokenizer: Any,
    base: str,
    base_card: Mapping[str, str],
    revision: str | None = None,
) -> Use:
    """Return how a log artefact is used: the base's weights and the log make the model.

    Args:
        model: of transformers, perhaps with adapters.
        tokenizer: its tokenizer, or None.
        base: ``model.name`` of the run.
        base_card: see :func:`zo.run.base_card.read_base_card`.
        revision: of the base on the hub.
    """
    found = use_of(model, None, None, None)
    name = base_card.get("base_model", base) if base in quickstart.MODELS else base
    given = f", revision={revision!r}" if revision and name == base else ""
    words = TOKENIZER.format(base=repr(name), given=given) if tokenizer is not None else ""
    imports = "from transformers import AutoTokenizer\n" if words else ""
    return Use(found.pipeline, "zo", FROM_LOG.format(imports=imports, here=HERE, words=words))
