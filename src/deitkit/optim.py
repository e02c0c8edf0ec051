"""AdamW's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn

from deitkit.config import OptimConfig

NO_DECAY_NAMES = frozenset({"cls_token", "dist_token", "pos_embed"})


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices and kernels with `weight_decay`; biases, norms, tokens and position embedding without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        own_name = name.rsplit(".", 1)[-1]
        (plain if parameter.ndim <= 1 or own_name in NO_DECAY_NAMES else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(network, config.weight_decay), lr=0.0, betas=config.betas, eps=1e-8, fused=True
    )


def learning_rate(step: int, total_steps: int, batch_size: int, config: OptimConfig) -> float:
    """Learning rate of step 0..total_steps-1: linear warm-up, then a half cosine down to `lr_end_share` of the peak
    (paper, table 9, whose peak is 5e-4 for a batch of 512; the default here is twice that, for shorter schedules)."""
    peak = config.lr_per_256_images * batch_size / 256
    warmup = round(config.warmup_share * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    low = peak * config.lr_end_share
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Moving average of weights and running statistics: average <- d * average + (1 - d) * network, where d rises to
    `decay` as (1 + step) / (10 + step), so that the first weights are soon forgotten."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), share)
    for mean, value in zip(average.buffers(), network.buffers(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, share)
        else:
            mean.copy_(value)


def freeze(network: nn.Module, trained: Collection[str]) -> None:
    """Let only the named parameters learn."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)
