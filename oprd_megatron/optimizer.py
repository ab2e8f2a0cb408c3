"""The student's optimiser: mcore's DDP, AdamW (fp32 master weights under bf16) and learning-rate schedule."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model

from checkpoints_conversion.live.weights import canonical_parameters, stream_hf_tensors
from oprd_megatron.config.schema import OptimizerConfig
from oprd_megatron.models import Model
from oprd_megatron.parallel.activity import here
from oprd_megatron.parallel.grid import as_world
from oprd_megatron.platform import Platform
from oprd_megatron.representation.space import add_over_tensor_parallel, state_maps


@dataclass(frozen=True)
class StudentOptimizer:
    """The trainable student.

    Attributes:
        chunks: the model's chunks wrapped in mcore's DDP.
        optimizer, scheduler: mcore's.
        clip_grad: as configured; 0 is off.
        platform: of this run.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    clip_grad: float
    platform: Platform

    def zero_grad(self) -> None:
        """Clear gradients before a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def finish_gradients(self, factor: float) -> None:
        """Reduce over ranks the gradients of passes that were left unfinished, and scale them. Collective over the grid."""
        models = [chunk.module for chunk in self.chunks]
        with self.platform.scope():
            models[0].config.finalize_model_grads_func(self.chunks, None, pg_collection=models[0].pg_collection)
        for chunk in self.chunks:
            chunk.scale_gradients(factor)

    def grad_norm(self) -> float:
        """Norm of the gradients as they are, over the whole model. Collective over the grid."""
        with self.platform.scope():
            self.optimizer.prepare_grads()
            return float(self.optimizer.get_grad_norm())

    def step(self) -> float:
        """Advance the learning rate, clip, update. Returns the gradient norm before clipping, over the whole model."""
        with self.platform.scope():
            self.scheduler.step(increment=1)
            norm = None if self.clip_grad else self.grad_norm()
            _, clipped_norm, _ = self.optimizer.step()
        return float(clipped_norm if norm is None else norm)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def first_bad_gradient(self) -> str | None:
        """Where on this rank a gradient is not finite ("student layer 3, mlp.linear_fc2.weight", "student layer 3, state map"),
        None if nowhere."""
        models = [chunk.module for chunk in self.chunks]
        for name, parameter in canonical_parameters(models).items():
            if _is_bad(parameter):
                layer = re.match(r"decoder\.layers\.(\d+)\.(.+)", name)
                return f"student layer {int(layer[1]) + 1}, {layer[2]}" if layer else name
        maps = [item for model in models for item in state_maps(model).items()]
        return next((f"student layer {layer}, state map" for layer, weight in maps if _is_bad(weight)), None)


def _is_bad(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad and not torch.isfinite(parameter.main_grad).all()  # type: ignore[attr-defined]


def build_optimizer(
    student: Model, config: OptimizerConfig, steps: int, platform: Platform, trains_head: bool = False
) -> StudentOptimizer:
    """Wrap the student for training. Only on ranks of the student's grid.

    The representation loss carries its own global denominator, so gradients are SUMMED over data-parallel ranks
    (`calculate_per_token_loss` in the model's config) and mcore's division by a token count is left out. Unless
    `trains_head`, an untied LM head is frozen: the loss never reaches it, and weight decay must not shrink it.

    Args:
        student: built with `frozen=False`.
        config: optimiser section.
        steps: steps of the whole run, which the schedule spans.
        platform: of this run.
        trains_head: there is a term in output space.
    """
    bf16 = student.config.bf16
    for chunk in student.chunks:
        if chunk.post_process and not student.architecture.tie_word_embeddings and not trains_head:
            chunk.output_layer.weight.requires_grad_(False)
    student.config.finalize_model_grads_func = functools.partial(_finalize_without_rescaling, platform)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=config.distributed,
        average_in_collective=False,
    )
    mcore_config = McoreOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=student.config.params_dtype,
        use_distributed_optimizer=config.distributed,
    )
    groups = student.grid.groups
    with platform.scope():
        chunks = [
            DistributedDataParallel(
                student.config, ddp_config, chunk, disable_bucketing=number > 0, pg_collection=groups
            )
            for number, chunk in enumerate(student.chunks)
        ]
        with as_world(student.grid):
            optimizer = get_megatron_optimizer(
                mcore_config, chunks, use_gloo_process_groups=False, pg_collection=groups
            )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=min(round(config.warmup_fraction * steps), steps - 1),
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return StudentOptimizer(chunks, optimizer, scheduler, config.clip_grad, platform)


def stream_gradients(student: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole gradients under Hugging Face names, in fp32, on every rank; zeros for what is frozen. Collective over the grid, as
    `stream_hf_weights`. Only with the replicated optimizer: the distributed one has each rank's share alone."""
    gradients = {
        name: parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        for name, parameter in canonical_parameters(student.chunks).items()
    }
    groups = student.grid.groups
    yield from stream_hf_tensors(gradients, student.architecture, student.sharding, groups.tp, groups.pp)


def _finalize_without_rescaling(platform, model, num_tokens=None, pg_collection=None, force_all_reduce=False) -> None:  # type: ignore[no-untyped-def]
    """mcore's gradient finalisation (data-parallel reduction, sequence-parallel norms, tied embeddings), without dividing
    by a number of tokens."""
    platform.synchronize()  # this rank's own work is done, and what follows is waiting
    with here.waiting():
        for chunk in unwrap_model(model):
            add_over_tensor_parallel(chunk, pg_collection.tp)
        finalize_model_grads(model, None, pg_collection=pg_collection, force_all_reduce=bool(force_all_reduce))
        platform.synchronize()
