"""Megatron's distributed optimizer and schedule from our settings. It knows nothing of losses."""

import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_opd import config


def wrap(model: GPTModel) -> DistributedDataParallel:
    """Gradient buffers in float32, reduce-scattered over the data-parallel ranks."""
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(model.config, settings, model)


def build(
    settings: config.OptimizerConfig, model: DistributedDataParallel, *, dtype: torch.dtype, steps: int
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """AdamW with float32 master weights, sharded over the data-parallel ranks, and its learning-rate schedule."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.lr * settings.min_lr_ratio,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [model],
    )
    return optimizer, schedule(settings, optimizer, steps=steps)


def schedule(settings: config.OptimizerConfig, optimizer: ChainedOptimizer, *, steps: int) -> OptimizerParamScheduler:
    """The learning rate of step n of `steps`: lr n / warmup_steps, then from lr to lr min_lr_ratio along the decay; set before the step."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(steps, settings.warmup_steps + 1),  # a run may end before its warm-up does
        lr_decay_style=settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def step(optimizer: ChainedOptimizer) -> tuple[bool, float]:
    """(whether weights changed, gradient norm before clipping): Megatron's own step, and its rule for loss scales applied without one.

    A gradient that is not finite anywhere changes nothing, on any rank: the norm is over all of them.
    """
    if optimizer.prepare_grads():
        return False, math.inf
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return False, norm
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    return optimizer.step_with_ready_grads(), norm
