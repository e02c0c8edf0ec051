"""Parameter groups and optimizers (AdamW, Muon, LAMB), the learning rate as a pure function of the step, the EMA."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import nn

from deitkit.config import OptimConfig
from deitkit.lengths import length_in_steps

Tensors = Sequence[Float[torch.Tensor, "_ ..."]]
BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
NO_DECAY_NAMES = frozenset({"cls_token", "dist_token", "pos_embed"})
STATE_NAMES = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})
"""State of a weight in AdamW and LAMB, and in Muon."""
BETAS = (0.9, 0.999)
"""AdamW's and LAMB's decay of the running means of gradients and of their squares: torch's, timm's and the papers'."""
MUON_MOMENTUM = 0.95  # Jordan's and torch's default
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steepest at 0, so that small singular values grow fast
NEWTON_SCHULZ_STEPS = 5
MOST_AT_ONCE = {"cpu": 2**20, "cuda": 2**24}
"""Elements of the matrices that Muon orthogonalises together: many small products then cost one call, and large ones neither leave
a CPU's caches nor take more memory."""
ADAMW_RMS = 0.2  # usual root mean square of an entry of AdamW's update (Liu et al. 2025, section 2.2)


def parameter_groups(network: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels with `weight_decay`; biases, norms, tokens and position embedding without. With a
    `layer_decay` below 1, two for each layer, whose learning rate is `lr_scale` times the network's (Bao et al. 2021, arXiv
    2106.08254): 1 for heads, last norm and distillation token, times `layer_decay` for the last block, and so on down to patches
    and positions. Frozen parameters are in none."""
    parameters = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
    above = {name: 0 for name, _ in parameters}
    if layer_decay < 1:
        depth = 1 + max((block_number(name) or 0 for name, _ in network.named_parameters()), default=0)
        above = {name: layers_above(name, depth) for name, _ in parameters}
    plain = {name for name, weight in parameters if weight.ndim <= 1 or name.rsplit(".", 1)[-1] in NO_DECAY_NAMES}
    groups = []
    for layers in sorted(set(above.values()), reverse=True):
        for is_plain, decay in ((False, weight_decay), (True, 0.0)):
            own = [weight for name, weight in parameters if above[name] == layers and (name in plain) == is_plain]
            groups.append({"params": own, "weight_decay": decay, "lr_scale": layer_decay**layers})
    return groups


def block_number(name: str) -> int | None:
    """Number of the transformer block that a parameter is in, from 0; None for one outside."""
    found = BLOCK.search(name)
    return None if found is None else int(found[1])


def layers_above(name: str, depth: int) -> int:
    """How many layers stand between this parameter and the logits: 0 for heads and last norm, `depth` + 1 for patches, class
    token and positions. A distillation token counts as a head, for like a head it may be fresh."""
    number = block_number(name)
    if number is not None:
        return depth - number
    return 0 if any(part in ("norm", "head", "head_dist", "dist_token") for part in name.split(".")) else depth + 1


def trained_names(network: nn.Module, trainable: str, depth: int) -> frozenset[str]:
    """The parameters that learn. attention: those of every block's attention (Touvron et al. 2022, arXiv 2203.09795);
    last-N: the last N of `depth` blocks and the last norm; both: heads and distillation token too, for these may be
    fresh."""
    names = [name for name, _ in network.named_parameters()]
    if trainable == "all":
        return frozenset(names)
    last = 0 if trainable == "attention" else int(trainable.removeprefix("last-"))

    def learns(name: str) -> bool:
        number, parts = block_number(name), name.split(".")
        if number is not None:
            return "attn" in parts if trainable == "attention" else number >= depth - last
        return any(part in ("head", "head_dist", "dist_token") or (part == "norm" and last > 0) for part in parts)

    return frozenset(filter(learns, names))


def muon_params(network: nn.Module) -> list[nn.Parameter]:
    """The trainable weights that Muon updates: the matrices of a transformer's blocks, and the convolutions that a norm follows (in
    its stem, or of a CNN), but for depthwise ones; no patch projection, token, position embedding, norm, bias or head."""

    def moved(name: str, weight: nn.Parameter) -> bool:
        layer = network.get_submodule(name.rpartition(".")[0])
        kernel = isinstance(layer, nn.Conv2d) and layer.bias is None and layer.groups == 1
        return weight.requires_grad and (kernel or (weight.ndim == 2 and "blocks" in name.split(".")))

    return [weight for name, weight in network.named_parameters() if moved(name, weight)]


def make_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(network, config.weight_decay, config.layer_decay)
    if config.optimizer == "muon":
        return MuonAndAdamW(muon_params(network), groups, config)
    if config.optimizer == "lamb":
        return ResumableLamb(groups, config)
    return adamw(groups, config)


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=1e-8, fused=True)


@final
class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for `hidden`, AdamW for everything else in `groups`: one optimizer with one list of groups and one state.

    Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), scaled as by Liu et al. 2025 (arXiv 2502.16982) so that both
    take steps of the same size at the same `lr`."""

    def __init__(self, hidden: list[nn.Parameter], groups: list[dict[str, Any]], config: OptimConfig) -> None:
        taken = {id(weight) for weight in hidden}
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
        own = [{**group, "params": [p for p in group["params"] if id(p) in taken]} for group in groups]
        own = [group for group in own if group["params"]]
        self._adamw = adamw(rest, config)
        self._own_groups = len(own)
        super().__init__([*own, *self._adamw.param_groups], {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        owns, rest = self.param_groups[: self._own_groups], self.param_groups[self._own_groups :]
        for own in owns:
            for alike in group_by_short_side([weight for weight in own["params"] if weight.grad is not None]):
                for weight in alike:
                    if not self.state[weight]:
                        self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
                gradients = [weight.grad for weight in alike if weight.grad is not None]
                momenta = [self.state[weight]["momentum_buffer"] for weight in alike]
                muon_step(alike, gradients, momenta, own["lr"], own["weight_decay"])
        self._adamw.param_groups, self._adamw.state = rest, self.state  # `load_state_dict` makes new ones
        self._adamw.step()


@final
class ResumableLamb(torch.optim.Optimizer):
    """timm's LAMB (You et al. 2020, arXiv 1904.00962): AdamW's update, weight decay included, at a length that is `lr` times
    that of the weight itself, tensor by tensor. Weights without decay (biases, norms, tokens, positions) move as AdamW's
    do, at `lr`, as in the FusedLAMB that DeiT III trained with.

    Its own clipping to norm 1 is off: `max_grad_norm` clips, or nothing does (FusedLAMB clips to 1: `max_grad_norm: 1`). timm counts
    the steps by group, where a checkpoint of the weights' states does not find them; here each weight has them too."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        from timm.optim.lamb import Lamb  # here, for timm brings a thousand networks along

        self._lamb: torch.optim.Optimizer = Lamb(groups, lr=0.0, betas=BETAS, eps=1e-8, max_grad_norm=None)
        super().__init__(self._lamb.param_groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            counted = [self.state[weight]["step"] for weight in group["params"] if self.state.get(weight)]
            if counted:
                group["step"] = counted[0].detach().cpu().clone()
        self._lamb.param_groups, self._lamb.state = self.param_groups, self.state  # `load_state_dict` makes new ones
        self._lamb.step()
        for group in self.param_groups:
            for weight in group["params"]:
                if self.state.get(weight):
                    self.state[weight]["step"] = group["step"]


def group_by_short_side(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Groups of weights whose matrices have the same shorter side, equal shapes next to each other; no group has more elements than
    `MOST_AT_ONCE`, unless it is a single weight."""

    def sides(weight: nn.Parameter) -> list[int]:
        return sorted(weight.flatten(1).shape)

    for _, group in itertools.groupby(sorted(weights, key=sides), lambda weight: sides(weight)[0]):
        alike: list[nn.Parameter] = []
        for weight in group:
            most = MOST_AT_ONCE.get(weight.device.type, MOST_AT_ONCE["cpu"])
            if alike and sum(other.numel() for other in alike) + weight.numel() > most:
                yield alike
                alike = []
            alike.append(weight)
        yield alike


@torch.no_grad()
def muon_step(weights: Tensors, gradients: Tensors, momenta: Tensors, lr: float, weight_decay: float) -> None:
    """One step of Muon, in place, for weights with the same shorter side: decoupled weight decay, then the orthogonalised Nesterov
    momentum of the gradient. A kernel (O, I, height, width) is a matrix from all its inputs, (O, I * height * width)."""
    torch._foreach_lerp_(list(momenta), list(gradients), 1 - MUON_MOMENTUM)
    ahead = torch._foreach_lerp(list(gradients), list(momenta), MUON_MOMENTUM)
    matrices = newton_schulz([one.flatten(1) for one in ahead])
    # An orthogonal matrix has entries of root mean square 1 / sqrt(its longer side).
    sizes = [ADAMW_RMS * math.sqrt(max(matrix.shape)) for matrix in matrices]
    updates = torch._foreach_mul(
        [matrix.reshape(weight.shape) for matrix, weight in zip(matrices, weights, strict=True)], sizes
    )
    torch._foreach_mul_(list(weights), 1 - lr * weight_decay)
    torch._foreach_add_(list(weights), updates, alpha=-lr)


def newton_schulz(matrices: Sequence[Float[torch.Tensor, "_ _"]]) -> list[Float[torch.Tensor, "_ _"]]:
    """About U V^T of each matrix = U S V^T, by Newton-Schulz: all but the smallest singular values come out between 0.7 and 1.2
    rather than as 1, which does as well. In float32: the usual bfloat16 is slow where the processor lacks it. The matrices have one
    shorter side.

    The steps x <- P x, P = a + b x x^T + c (x x^T)^2, are made on the smaller Gram matrix x x^T and on the product of all P alone
    (Zhang et al. 2026, dao-lab.ai/blog/2026/gram-newton-schulz); in float32 that needs none of their restarts. Gram matrices are of
    one size whatever the longer sides are, so that all go through the steps together."""
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT for matrix in matrices]
    a, b, c = NEWTON_SCHULZ
    with torch.autocast(wide[0].device.type, enabled=False):  # in half precision the Gram matrix's errors would grow
        stacks = [torch.stack(list(alike)).float() for _, alike in itertools.groupby(wide, lambda matrix: matrix.shape)]
        gram_NRR = torch.cat([x_nRC @ x_nRC.mT for x_nRC in stacks])
        norm_N = gram_NRR.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().clamp_min(1e-7)
        gram_NRR = gram_NRR / norm_N.square()[:, None, None]
        product_NRR = torch.eye(gram_NRR.shape[1], device=gram_NRR.device)
        for left in reversed(range(NEWTON_SCHULZ_STEPS)):
            step_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
            step_NRR.diagonal(dim1=-2, dim2=-1).add_(a)
            product_NRR = step_NRR @ product_NRR
            if left:
                gram_NRR = step_NRR @ gram_NRR @ step_NRR
        products = torch.split(product_NRR / norm_N[:, None, None], [len(x_nRC) for x_nRC in stacks])
        levelled = [matrix for part, x_nRC in zip(products, stacks, strict=True) for matrix in part @ x_nRC]
    return [one if one.shape == matrix.shape else one.mT for one, matrix in zip(levelled, matrices, strict=True)]


def check_optimizer_state(weight: torch.Tensor, moments: Mapping[str, torch.Tensor]) -> bool:
    """Whether `moments` can be an optimizer's state of `weight`: names of AdamW, LAMB or Muon, means in the weight's shape."""
    means = [mean for name, mean in moments.items() if name != "step"]
    return set(moments) in STATE_NAMES and all(mean.shape == weight.shape for mean in means)


def warmup_steps(config: OptimConfig, total_steps: int, steps_per_epoch: int) -> int:
    """The length of the warm-up in steps, whichever unit the configuration has it in."""
    return length_in_steps(config.warmup, steps_per_epoch, total_steps)


def learning_rate(step: int, total_steps: int, warmup: int, batch_size: int, config: OptimConfig) -> float:
    """Learning rate of step 0..total_steps-1: a linear rise in the first `warmup` steps, then a half cosine down to the end
    (paper, table 9, whose peak is 5e-4 for a batch of 512; the default here is twice that, for shorter schedules).

    Departure: the published code changes it once an epoch, and its cosine counts from the first epoch, so that the warm-up
    hides the cosine's beginning and the rate never quite reaches the peak."""
    peak = config.base_lr * batch_size / 256
    if step < warmup:
        if config.warmup_lr is not None:
            return config.warmup_lr + (peak - config.warmup_lr) * step / warmup
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    low = config.lowest_lr(peak)
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def ema_update(means: Sequence[torch.Tensor], values: Sequence[torch.Tensor], decay: float, step: int) -> None:
    """Exponential moving average of weights and running statistics: mean <- d * mean + (1 - d) * value, where d rises to `decay` as
    (1 + step) / (10 + step), so that the first weights are soon forgotten. Counters are copied."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    pairs = list(zip(means, values, strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([mean for mean, _ in floats], [value for _, value in floats], share)
    counters = [pair for pair in pairs if not pair[0].is_floating_point()]
    if counters:
        torch._foreach_copy_([mean for mean, _ in counters], [value for _, value in counters])


def set_trainable(network: nn.Module, trained: Collection[str]) -> None:
    """Only the named parameters get gradients."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)


def eval_frozen_batchnorm(network: nn.Module) -> None:
    """Put frozen batch norms into eval mode: else they would use the batch's statistics, and update their own."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()
