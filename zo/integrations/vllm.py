"""A run that is served while it trains: vLLM's workers follow its log and evaluate its probes.

    theta_t = replay(theta_0, entries 1..t)    computed by each worker; a probe is theta_t + c eps z

    llm = vllm.LLM(base, dtype="float32", worker_extension_cls="zo.integrations.vllm.Follower")
    follow(llm, "runs/mine")                   # and again, for the entries that are new by then
    with probing(llm, Probe(direction, scale)):
        reward(rewards, examples, complete(llm, rewards.decoding, examples))

No weights are sent: a worker reads the base once, and then the log, some dozen bytes a step. It
keeps the weights at that version in host memory, beside those that the engine computes with, which
are fused, padded or packed in ways of the engine's own. The engine is given them by names of a
checkpoint, through its own reload; so it is with a probe, which is a copy, and the end of a probe
restores the stored weights exactly.

vLLM is not imported before an engine is used.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from zo.data.rewards import Rewards
from zo.data.tasks import Example
from zo.errors import UserError
from zo.method.estimator import float32
from zo.method.passes import Probe
from zo.method.philox import MASK
from zo.model.form import Form
from zo.model.generate import Decoding, trim
from zo.model.layout import views
from zo.run.artefact import Artefact, open_artefact
from zo.run.replay import rebuild
from zo.state.replay import Replay
from zo.streaming.streamer import UNPERTURBED

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
"""Of a model's configuration: another model's weights are refused before any is written."""


class Weights:
    """The weights that a log describes, in host memory, at one version after another."""

    def __init__(self, artefact: Artefact) -> None:
        """Replay a log on its base.

        Raises:
            UserError: as :func:`zo.run.replay.rebuild`.
        """
        self.artefact = artefact
        rebuilt = rebuild(artefact, device="cpu")
        self._replica, self.fingerprint = rebuilt.replica, rebuilt.fingerprint
        layout, self.log = self._replica.layout, self._replica.log
        self.model: Any = self._replica.model
        self._replay = Replay(self.log, layout, self._replica.base)
        self._positions = Form.of(self.log.header, layout).positions
        parameters = [part.parameter.spec for group in layout.groups for part in group.parts]
        specs = [*parameters, *self._replica.resident]
        self._tied = {name for spec in specs for name in spec.names[1:]}

    def leads_to(self, artefact: Artefact) -> bool:
        """Return True if a log begins with the entries that these weights have."""
        begun = list(artefact.entries[: self.log.version])
        return artefact.header == self.log.header and begun == self.log.entries

    @torch.no_grad()
    def advance(self, artefact: Artefact) -> None:
        """Apply the entries of a log that are new."""
        if entries := artefact.entries[self.log.version :]:
            self.log.extend(entries)
            self.fingerprint = self._replica.fingerprint()

    @torch.no_grad()
    def checkpoint(self, probe: Probe = UNPERTURBED, part: int = 0) -> dict[str, Tensor]:
        """Return the weights by the names of a checkpoint, as views where that is possible.

        Args:
            probe: added to a copy of what it reaches, in the stored dtype.
            part: first position, in the model's order of layers, that it reaches.
        """
        state = {n: t for n, t in self.model.state_dict().items() if n not in self._tied}
        for block, stored in self._replica.weights() if probe.scale != 0.0 else ():
            if self._positions[block.index] < part:
                continue
            rows = [torch.empty(1, s.numel, dtype=s.dtype) for s in block.trainable]
            self._replay.visit(block, stored, self.log.version, [probe], rows)
            written = views(block, [row[0] for row in rows])
            state |= {one.parameter.name: view for one, view in written}
        found: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        return found


class Follower:
    """Methods for vLLM's workers, named by ``worker_extension_cls``, called by ``collective_rpc``.

    Each returns ``version`` and ``fingerprint`` of the weights, and the ``probe`` that is added to
    them (``direction``, ``scale``); or ``error``, a line, and then the engine is as it was.
    No request may be running, and the caller resets the engine's cache of prefixes.
    """

    _zo: Weights | None = None

    def zo_follow(
        self, source: str, version: int | None = None, base: str | None = None
    ) -> dict[str, Any]:
        """Give the engine the weights of a version of a log.

        Args:
            source: folder of a run, also of one in progress, or a log artefact.
            version: entries that are applied; ``None``: all that there are by now.
            base: hub id or folder of the base model, where it is not the one that is named there.
        """
        try:
            artefact = _cut(open_artefact(source, base), version)
            self._zo_check(artefact)
            if self._zo is None or not self._zo.leads_to(artefact):
                self._zo = None  # Its memory, before the next one takes its own.
                self._zo = Weights(artefact)
            else:
                self._zo.advance(artefact)
            return self._zo_give(UNPERTURBED)
        except UserError as error:
            return {"error": str(error)}

    def zo_probe(self, direction: int, scale: float, part: int = 0) -> dict[str, Any]:
        """Give the engine a probe of the version that it follows; scale 0: no probe, exactly.

        Args:
            direction: number of the direction.
            scale: of it, such as +eps.
            part: first position, in the model's order of layers, that it reaches.
        """
        try:
            if not (0 <= direction <= MASK and isfinite(scale)):
                raise UserError(
                    f"direction={direction}, scale={scale} is no probe; give a number from 0 and "
                    "below 2**32, and a finite one"
                )
            return self._zo_give(Probe(direction, float32(scale)), part)
        except UserError as error:
            return {"error": str(error)}

    def _zo_check(self, artefact: Artefact) -> None:
        """Check that the engine stores weights as the log does."""
        worker: Any = self
        engine, ours = worker.model_config, artefact.config
        if ours.peft.type is not None:
            raise UserError(
                f"{artefact.source} is a log of adapters (peft.type={ours.peft.type}), whose "
                "weights the engine does not have; follow a run without, or export its model"
            )
        stored = str(engine.dtype).removeprefix("torch.")
        if engine.quantization is not None or stored != ours.model.dtype:
            how = engine.quantization or stored
            raise UserError(
                f"the engine holds weights in {how}, and {artefact.source} is of {ours.model.dtype}"
                f": start it with dtype={ours.model.dtype} and no quantization"
            )

    def _zo_give(self, probe: Probe, part: int = 0) -> dict[str, Any]:
        worker: Any = self
        if self._zo is None:
            raise UserError("the engine follows no log, so there is nothing to probe; follow one")
        held = self._zo
        engine, ours = worker.model_config.hf_config, held.model.config
        if _sizes(engine) != _sizes(ours):
            raise UserError(
                f"the engine serves another model than {held.artefact.source} is of; start it "
                f"with {held.artefact.config.model.name}"
            )
        checkpoint = held.checkpoint(probe, part)
        worker.reload_weights(weights_iterator=iter(checkpoint.items()))
        _prepare_tied(worker.get_model())
        return {
            "version": held.log.version,
            "fingerprint": held.fingerprint,
            "probe": {"direction": probe.direction, "scale": probe.scale},
        }


def follow(
    llm: Any, source: str | Path, version: int | None = None, base: str | None = None
) -> dict[str, Any]:
    """Give an engine the weights of a version of a log.

    Args:
        llm: ``vllm.LLM`` whose ``worker_extension_cls`` is :class:`Follower`; it is generating
            nothing.
        source: as :meth:`Follower.zo_follow` has it, and the rest.
        version: entries that are applied; ``None``: all that there are by now.
        base: hub id or folder of the base model, where it is not the one that is named there.

    Returns:
        ``version`` and ``fingerprint`` of the weights; and ``probe``, whose scale is 0.

    Raises:
        UserError: the log or its base cannot be read, or the engine is not of its model or dtype.
    """
    return _on_all(llm, "zo_follow", str(source), version, base)


@contextmanager
def probing(llm: Any, probe: Probe, part: int = 0) -> Iterator[None]:
    """Let an engine compute with a probe inside a ``with`` block; see :func:`follow`.

    Args:
        llm: it follows a log.
        probe: direction and scale.
        part: first position, in the model's order of layers, that it reaches.

    Raises:
        UserError: it follows none.
    """
    _on_all(llm, "zo_probe", probe.direction, probe.scale, part)
    try:
        yield
    finally:
        _on_all(llm, "zo_probe", UNPERTURBED.direction, UNPERTURBED.scale)


def complete(llm: Any, decoding: Decoding, examples: Sequence[Example]) -> list[list[int]]:
    """Return what an engine writes, greedily, after each prompt: tokens before the end token."""
    from vllm import SamplingParams

    how = SamplingParams(
        temperature=0.0,
        max_tokens=decoding.max_new_tokens,
        stop_token_ids=list(decoding.end),
        ignore_eos=True,  # Ends are those of zo alone.
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": list(example.ids)} for example in examples]
    answers = llm.generate(prompts, how, use_tqdm=False)
    return [trim(list(answer.outputs[0].token_ids), decoding.end) for answer in answers]


def reward(
    rewards: Rewards, examples: Sequence[Example], completions: Sequence[Sequence[int]]
) -> list[float]:
    """Return the reward of each completion, as a run computes it.

    Args:
        rewards: of a task, loaded.
        examples: prompts of that task.
        completions: tokens, of each of them.

    Raises:
        UserError: as :class:`zo.data.rewards.Reward`.
    """
    pairs = zip(examples, completions, strict=True)
    return [rewards.rate(example.target, tokens) for example, tokens in pairs]


def _on_all(llm: Any, method: str, *arguments: Any) -> dict[str, Any]:
    """Call a method of all workers, which find the same, and forget the keys of other weights."""
    found: list[dict[str, Any]] = llm.collective_rpc(method, args=arguments)
    for one in found:
        if "error" in one:
            raise UserError(one["error"])
    assert all(one == found[0] for one in found)
    if not llm.reset_prefix_cache():
        raise UserError(
            "the engine is generating, so that keys and values of other weights are in use; wait "
            "until it has no request"
        )
    return found[0]


def _prepare_tied(model: nn.Module) -> None:
    """Let modules that share a parameter prepare it again, as a tied head does.

    vLLM's reload prepares a parameter for the module that it was loaded into alone; on CPU the head
    has a packed copy of it, which would stay that of other weights.
    """
    seen: set[int] = set()
    for module in model.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        if own & seen and (method := getattr(module, "quant_method", None)) is not None:
            method.process_weights_after_loading(module)
        seen |= own


def _cut(artefact: Artefact, version: int | None) -> Artefact:
    """Return a log up to a version; what was published of its end no longer holds then."""
    entries = artefact.entries
    if version is None or version == len(entries):
        return artefact
    if not 0 <= version <= len(entries):
        raise UserError(
            f"version={version} is not in {artefact.source}, whose last is {len(entries)}"
        )
    content = {key: value for key, value in artefact.content.items() if key != "artefact"}
    return replace(artefact, content=content, entries=entries[:version])


def _sizes(config: Any) -> list[Any]:
    text = config.get_text_config()
    return [config.model_type, *(getattr(text, size, None) for size in SIZES)]
