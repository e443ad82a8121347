"""Rebuild the weights that a log describes, on any machine: no data is read, no forward is run.

theta = replay(theta_0, entries): each block of the base is brought to the last entry in one visit,
piece by piece, all entries on one piece while it is in the cache.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo.config.schema import MemoryConfig
from zo.data.batches import pad_id
from zo.data.rows import SYNTHETIC
from zo.distributed.process_group import Mesh
from zo.errors import UserError
from zo.io.determinism import make_deterministic
from zo.io.hardware import choose_device
from zo.model.blocks import find_layout
from zo.model.build import ModelLoader
from zo.model.layout import Layout
from zo.run.artefact import Artefact, open_artefact
from zo.run.model_card import Card
from zo.run.restore import card_of
from zo.state.log import Log
from zo.streaming.replica import Replica
from zo.streaming.selfcheck import move_resident

INEXACT = "gaussian"
"""The distribution whose numbers are rounded in another way on another kind of device."""


@dataclass(frozen=True)
class Rebuilt:
    """A model after the entries of a log."""

    artefact: Artefact
    replica: Replica
    tokenizer: Any
    fingerprint: str
    """Of the rebuilt weights."""

    def card(self) -> Card:
        """Return the card of the rebuilt model."""
        artefact, facts = self.artefact, self.artefact.facts
        steps, scores = len(artefact.entries), facts.get("scores")
        found = card_of(
            artefact.content,
            artefact.header,
            steps,
            scores if isinstance(scores, dict) else {},
            self.fingerprint,
        )
        words = facts.get("label_words") or ()
        return replace(found, template=facts.get("template"), label_words=words)


def from_log(
    source: str | Path,
    base: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Rebuild a fine-tuned model from its base and its log.

    Args:
        source: hub id or folder of a log artefact, or the folder of a run.
        base: hub id or folder of the base model, where it is not the one that the artefact names.
        device: to replay and hold the model on, ``cpu`` or ``cuda``.
        trust_remote_code: run code that the base's repository brings.

    Returns:
        The transformers model, in evaluation mode, with its adapters if it was trained with some.

    Raises:
        UserError: the artefact cannot be read, its base cannot be loaded or is another one.
    """
    artefact = open_artefact(str(source), base)
    rebuilt = rebuild(artefact, device, trust_remote_code=trust_remote_code)
    model = rebuilt.replica.model
    rebuilt.replica.close(give_back=True)
    return model


def rebuild(
    artefact: Artefact,
    device: str | None = None,
    store: str = "device",
    say: Callable[[str], object] = warnings.warn,
    trust_remote_code: bool = False,
) -> Rebuilt:
    """Replay a log on its base.

    Args:
        artefact: the log, and what it is of.
        device: to compute on; ``None`` for the one that the run was set to.
        store: where the weights are: ``device``, ``host``, or ``disk``, which replays the log once
            for the fingerprint and once for what reads the weights.
        say: takes a warning.
        trust_remote_code: run code that the base's repository brings.

    Raises:
        UserError: the base cannot be loaded, or its fingerprint is not the log's; too little
            memory; the weights do not have the fingerprint that was published.
    """
    model_config = replace(artefact.config.model, trust_remote_code=trust_remote_code)
    chosen = choose_device(device or artefact.config.run.device)
    make_deterministic(chosen)
    for line in differing_kernels(artefact, chosen):
        say(line)
    loader = ModelLoader(model_config, artefact.config.peft)
    tokenizer = _tokenizer(artefact, loader, say)
    classes = artefact.facts.get("classes", loader.class_names)
    pad = artefact.facts.get("pad")
    loader.set_classes(classes, pad_id(tokenizer, loader.vocab_size) if pad is None else pad)
    skeleton, model = loader.skeleton(), loader.skeleton()
    for one in (skeleton, model):
        _hold(one, artefact)
    seed, memory = artefact.config.run.seed, MemoryConfig(store=store)
    with torch.no_grad():
        replica = Replica(
            model,
            _layout(skeleton, artefact.header),
            lambda engine: loader.weights(skeleton, seed, engine),
            memory,
            Mesh(chosen.type).device,
            Path(),
            writable=False,
        )
        move_resident(model, replica.device)
        check_base(artefact, replica.store.base)
        replica.open(Log(artefact.header, list(artefact.entries)))
        fingerprint = replica.fingerprint()
    _check_result(artefact, fingerprint, say)
    return Rebuilt(artefact, replica, tokenizer, fingerprint)


def differing_kernels(artefact: Artefact, device: torch.device) -> list[str]:
    """Return a line on what may differ on this device, where directions are not signs."""
    if artefact.header["distribution"] != INEXACT:
        return []
    versions = artefact.content.get("versions") or {}
    if versions and ("gpu" in versions) == (device.type == "cuda"):
        return []
    made = f"was made on {versions.get('gpu', 'a CPU')}" if versions else "does not say where"
    return [
        f"the log {made} with {INEXACT} directions, whose last bits depend on the kind of "
        f"device: on {device.type} the weights may differ by rounding, and their fingerprint with "
        "them"
    ]


def check_base(artefact: Artefact, found: str) -> None:
    """Check that weights at version 0 are those that a log is applied to.

    Raises:
        UserError: they are other ones.
    """
    wanted, model = artefact.header["base"], artefact.config.model
    if found != wanted:
        raise UserError(
            f"base={model.name} in {model.dtype} is not the model that the log was written for: "
            f"its fingerprint is {found[:12]}, and {str(wanted)[:12]} in the log; give the base's "
            "own weights and revision by base="
        )


def _check_result(artefact: Artefact, found: str, say: Callable[[str], object]) -> None:
    published = artefact.facts.get("fingerprint", found)
    if published == found:
        return
    said = f"the weights have the fingerprint {found[:12]}, and {str(published)[:12]} was published"
    if artefact.header["distribution"] != INEXACT:
        raise UserError(
            f"{artefact.source}: {said}; take the artefact from its publisher, and the version of "
            "zo that its config.yaml names"
        )
    say(f"{said}; {INEXACT} directions have the same bits on the same kind of device alone")


def _tokenizer(artefact: Artefact, loader: ModelLoader, say: Callable[[str], object]) -> Any:
    if artefact.config.data.name == SYNTHETIC and artefact.facts:
        return None
    try:
        return loader.tokenizer()
    except UserError as error:
        say(f"no tokenizer is written: {error}")
        return None


def _hold(model: nn.Module, artefact: Artefact) -> None:
    """Freeze the parameters that the run held as they were."""
    for name in artefact.header.get("held", []):
        try:
            model.get_parameter(name).requires_grad_(False)
        except AttributeError as error:
            raise UserError(
                f"base={artefact.config.model.name} has no parameter {name}, which the log is of; "
                "give the base model of the log"
            ) from error


def _layout(skeleton: nn.Module, header: dict[str, Any]) -> Layout:
    """Return the blocks of a model whose addresses are those of the run.

    Frozen parameters outside of the layers that no module of the log's order reads are in no block,
    as in the run, whose check of reads found them. A unit of memory moves no address.
    """
    layout, order = find_layout(skeleton), header.get("order")
    if not order:
        return layout
    resident = [
        name
        for group in layout.groups
        if not set(group.modules) <= set(order)
        for part in group.parts
        if part.parameter.spec.frozen
        for name in part.parameter.spec.names
    ]
    return find_layout(skeleton, resident=resident) if resident else layout
