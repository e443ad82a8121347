"""A transformers Trainer whose step computes no gradient.

Everything but the step is the Trainer's: data, schedules, callbacks, logging, evaluation,
checkpoints, the hub. Overridden are ``training_step`` (measures the probes on a micro-batch),
``create_optimizer`` (makes a :class:`zo.integrations.optimizer.ZOOptimizer`), ``log`` (the norm of
gradients that do not exist is left out) and ``__init__`` (checks the arguments). The same mixin
serves trl::

    class ZOSFTTrainer(ZOMixin, trl.SFTTrainer): ...
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainingArguments

from zo.errors import UserError
from zo.integrations.optimizer import ZOOptimizer

ADAM = "the rule is SGD along directions, without moments; leave it out"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "gradient_checkpointing": (
        (False, None),
        "there is no backward pass to save memory for; use gradient_checkpointing=False",
    ),
    "activation_checkpointing": (
        (False, None),
        "there is no backward pass to save memory for; leave it out",
    ),
    "activation_offloading": (
        (False, None),
        "no activation waits for a backward pass; leave it out",
    ),
    "max_grad_norm": (
        (1.0, 0.0, 0, None),
        "there is no gradient to clip; leave it out, and limit projected gradients with "
        "zo={'clip': 2.0}",
    ),
    "optim": (
        (TrainingArguments.__dataclass_fields__["optim"].default, "adamw_torch"),
        "the optimizer is zo's; leave it out",
    ),
    "optim_args": ((None, ""), "the optimizer is zo's; give its settings as zo={...}"),
    "optim_target_modules": (
        (None,),
        "the optimizer is zo's; set requires_grad of the parameters to train",
    ),
    "adam_beta1": ((0.9,), ADAM),
    "adam_beta2": ((0.999,), ADAM),
    "adam_epsilon": ((1e-8,), ADAM),
    "torch_empty_cache_steps": ((None,), "no backward pass leaves memory behind; leave it out"),
    "fp16": (
        (False,),
        "losses are not scaled and weights are not cast; load the model with dtype=torch.float16 "
        "and use fp16=False",
    ),
    "bf16": (
        (False, None),
        "there is no second copy of the weights to keep in float32; load the model with "
        "dtype=torch.bfloat16 and use bf16=False",
    ),
    "torch_compile": (
        (False, None),
        "a compiled forward does not see the weights of probes; use torch_compile=False",
    ),
    "use_liger_kernel": ((False,), "it fuses losses with their backward passes; leave it out"),
    "neftune_noise_alpha": (
        (None,),
        "it adds noise in training mode, and probes are evaluated without; leave it out",
    ),
    "auto_find_batch_size": (
        (False,),
        "it begins again with smaller batches after steps were logged; give "
        "per_device_train_batch_size",
    ),
    "deepspeed": (
        (None,),
        "its engine owns the step; for many ranks use zo train with mesh.data",
    ),
    "fsdp": (
        (None, "", [], False),
        "it shards gradients and weights; for large models use zo train with "
        "memory.store=host and mesh.slice",
    ),
    "parallelism_config": ((None,), "use zo train with the keys of mesh"),
}
"""For each training argument that has no meaning without gradients, the values that leave it off,
and what to do."""


def check_arguments(args: TrainingArguments) -> None:
    """Check that no argument asks for what a step without gradients does not have.

    Raises:
        UserError: one does.
    """
    for name, (off, remedy) in REFUSED.items():
        value = getattr(args, name, None)
        if not any(value == kept for kept in off):
            raise UserError(f"{name}={getattr(value, 'value', value)}: {remedy}")
    if args.world_size > 1 or args.n_gpu > 1:
        count = max(args.world_size, args.n_gpu)
        raise UserError(
            f"{count} processes or GPUs: this step runs on one; set CUDA_VISIBLE_DEVICES to one "
            "GPU, or use torchrun -m zo.train, which gives the same bits on any mesh"
        )


@contextmanager
def _said_to_train(model: nn.Module) -> Iterator[None]:
    """Let a model say that it trains, except while it computes.

    trl's trainers ask the model itself whether a loss belongs to training or to evaluation.
    """

    def say(training: bool) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            module.training = training

        return hook

    hooks = (
        model.register_forward_pre_hook(say(False)),
        model.register_forward_hook(say(True), always_call=True),
    )
    model.training = True
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.training = False


class ZOMixin:
    """Mixin for a ``transformers.Trainer``: put it first among the bases.

    ``zo`` takes the settings of :class:`zo.integrations.optimizer.ZOOptimizer` (``eps``,
    ``directions``, ``distribution``, ``estimator``, ``clip``, ``log``). Learning rate, weight decay
    and seed are those of the training arguments. With ``gradient_accumulation_steps`` a step's
    directions see all of its micro-batches.
    """

    def __init__(self, *args: Any, zo: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Take what the Trainer takes, and ``zo``.

        Raises:
            UserError: an argument makes no sense without gradients.
        """
        for value in (*args, *kwargs.values()):
            if isinstance(value, TrainingArguments):
                check_arguments(value)
        self._zo = dict(zo or {})
        super().__init__(*args, **kwargs)
        check_arguments(self.args)  # type: ignore[attr-defined]
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:  # type: ignore[has-type, attr-defined]
            raise UserError(
                "optimizers=: the optimizer is zo's; leave it out, and give its settings as "
                "zo={...}; a scheduler is chosen by lr_scheduler_type"
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, made of the model as it is now."""
        if self.optimizer is None:  # type: ignore[has-type]
            args: TrainingArguments = self.args  # type: ignore[attr-defined]
            self.optimizer = ZOOptimizer(
                self.model if model is None else model,  # type: ignore[attr-defined]
                args.learning_rate,
                **{"seed": args.seed, "weight_decay": args.weight_decay} | self._zo,
            )
        return self.optimizer

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Evaluate the step's probes on a micro-batch; ``optimizer.step()`` moves the weights."""
        own: Any = self
        model.train()
        inputs, parts = own._prepare_inputs(inputs), own.current_gradient_accumulation_steps
        scaled = own.loss_is_scaled_for_ga
        if scaled is None:
            accepts = own.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = accepts or own.compute_loss_func is not None

        def loss() -> Tensor:
            with _said_to_train(own.model):
                found: Tensor = own.compute_loss(
                    model, dict(inputs), num_items_in_batch=num_items_in_batch
                )
            return found * parts if scaled else found

        optimizer = getattr(own.optimizer, "optimizer", own.optimizer)
        mean = optimizer.measure(loss) / parts
        return torch.tensor(mean, device=own.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log without ``grad_norm``."""
        kept = {key: value for key, value in logs.items() if key != "grad_norm"}
        super().log(kept, *args, **kwargs)  # type: ignore[misc]


class ZOTrainer(ZOMixin, transformers.Trainer):  # type: ignore[misc]
    """A ``transformers.Trainer`` that trains with forward passes only."""
