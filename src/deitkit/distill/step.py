"""The training step of DeiT (Touvron et al. 2021, arXiv 2012.12877) on one screen. Start here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import nn

from deitkit import rng
from deitkit.config import LoopConfig, LossConfig, OptimConfig, Size, ViewConfig
from deitkit.distill import losses
from deitkit.distill.losses import LabelLoss, Logits, LossFunction, PerImage, TeacherLoss, TeacherOutput, batch_mean
from deitkit.distill.optim import ema_update, learning_rate
from deitkit.distill.teacher import TeacherSource
from deitkit.models.network import Heads, Network
from deitkit.rng import Purpose
from deitkit.views.loader import augment_and_mix
from deitkit.views.mixup import Batch, RawBatch


def train_step(state: State, raw: RawBatch, teacher: TeacherSource, plan: Plan, accelerator: Accelerator) -> StepResult:
    """View -> mix -> student -> loss terms -> backward -> update."""
    lr = learning_rate(state.step, plan.total_steps, plan.warmup_steps, plan.loop.batch_size, plan.optim)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    keep_LB = stochastic_depth(plan, state.step, raw.index_M[: len(raw.partner_B)])
    size = plan.low_res_size if state.step < plan.low_res_steps else None

    # views of the batch, the teacher's output for them, the student's heads
    batch = augment_and_mix(raw, plan.view, accelerator.device)
    output = teacher(batch)
    cls_BK, dist_BK, *predicted = state.network(batch.images_BCHW, keep_LB, size)
    heads = Heads(cls_BK, dist_BK)

    # equation 2 with `losses.soft` as the teacher's term, equation 3 with `losses.hard`: `plan.teacher_loss`, picked once per run;
    # by default it is `losses.zscore`, which is not in the paper
    label_loss = batch_mean(plan.label_loss(heads.cls_BK, batch), batch, raw.global_size)
    teacher_loss = batch_mean(plan.distillation_loss(heads, output, batch), batch, raw.global_size)
    loss = plan.label_weight * label_loss + plan.teacher_weight * teacher_loss
    feature_loss = None
    if plan.feature_weight:  # beyond the paper: the teacher's features, which the distillation token predicts
        feature_loss = batch_mean(losses.features(predicted[0] if predicted else None, output), batch, raw.global_size)
        loss = loss + plan.feature_weight * feature_loss

    accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
    finite, overflowed = update(state, loss, plan, accelerator)
    if finite and state.ema is not None:
        ema_update(*state.ema_tensors, plan.optim.ema_decay, state.step)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return StepResult(loss, label_loss, teacher_loss, heads, batch, output, feature_loss, finite, overflowed)


class StepResult(NamedTuple):
    """The loss, its unweighted terms (the teacher's is 0 without distillation), and what they were computed from."""

    loss: torch.Tensor
    label_loss: torch.Tensor
    teacher_loss: torch.Tensor
    heads: Heads
    batch: Batch
    output: TeacherOutput | None
    feature_loss: torch.Tensor | None = None
    finite: bool = True
    """whether the weights were updated: not after an infinite or NaN loss or gradient"""
    overflowed: bool = False
    """float16: whether they were not though the loss is finite, because the gradients times the loss scale overflowed; the scale is now
    smaller"""


LOW_RES_SHARE = 0.5
"""Share of the steps at the low resolution, where there is one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the trained weights; what the settings left open (steps, resolution, class weights) is resolved."""

    view: ViewConfig
    loss: LossConfig
    optim: OptimConfig
    loop: LoopConfig
    total_steps: int
    warmup_steps: int = 0
    """first steps, in which the learning rate rises"""
    loss_function: LossFunction | None = None
    """the user's distillation loss, for `distillation: callable`"""
    class_weights: tuple[float, ...] = ()
    """weight of each class in the label loss; empty: all the same"""
    drop_rates: tuple[float, ...] = ()
    """stochastic depth: probability of dropping each residual branch; empty for none"""
    low_res_size: Size | None = None
    """height and width of the network's input in the first `low_res_steps`; None: always its own"""
    head_steps: int = 0
    """first steps, in which only `head_names` train"""
    head_names: frozenset[str] = frozenset()
    trained_names: frozenset[str] | None = None
    """the parameters that train; None: all"""

    @cached_property
    def label_loss(self) -> LabelLoss:
        return losses.label_loss(self.loss, self.class_weights)

    @cached_property
    def teacher_loss(self) -> TeacherLoss:
        return losses.teacher_loss(self.loss, self.loss_function, self.class_weights)

    @property
    def label_weight(self) -> float:
        return 1.0 if self.loss.label_weight is None else self.loss.label_weight

    @property
    def teacher_weight(self) -> float:
        return self.loss.teacher_weight or 0.0

    @property
    def feature_weight(self) -> float:
        return self.loss.feature_weight or 0.0

    def distillation_loss(self, heads: Heads, output: TeacherOutput | None, batch: Batch) -> PerImage:
        """`teacher_loss` of the head that learns from the teacher; for `distil: both` the mean over the two."""
        loss_B = self.teacher_loss(self.distilled(heads), output, batch)
        return (self.teacher_loss(heads.cls_BK, output, batch) + loss_B) / 2 if self.loss.distil == "both" else loss_B

    def distilled(self, heads: Heads) -> Logits:
        """Logits of the (second) head that learns from the teacher. Raises ValueError if the network lacks it."""
        if self.loss.distil == "cls" or not self.loss.has_distill_term:
            return heads.cls_BK
        if heads.dist_BK is None:
            raise ValueError("distillation by token needs a network with a distillation token")
        return heads.dist_BK

    @property
    def low_res_steps(self) -> int:
        return 0 if self.low_res_size is None else round(LOW_RES_SHARE * self.total_steps)

    def phases(self) -> list[tuple[int, float]]:
        """First step and share of all steps of each resolution."""
        if not self.low_res_steps:
            return [(0, 1.0)]
        return [(0, LOW_RES_SHARE), (self.low_res_steps, 1 - LOW_RES_SHARE)]


@dataclass(kw_only=True)
class State:
    """Everything that changes from step to step."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Network | None
    step: int = 0

    @cached_property
    def ema_tensors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Weights and statistics of the EMA and of the network. Found once: walking through all modules takes a millisecond, and on a
        GPU a whole step of a small student takes twenty."""
        assert self.ema is not None
        means, values = ([*network.parameters(), *network.buffers()] for network in (self.ema, self.network))
        return means, values


def stochastic_depth(plan: Plan, step: int, index_B: Int64[torch.Tensor, " B"]) -> Float32[torch.Tensor, "L B"] | None:
    """The factor of each residual branch (L) for each image (B): 0, or 1 / (1 - rate). Drawn by (seed, step, image, branch), so that
    neither the batch nor the number of processes matters. None without stochastic depth."""
    if not any(plan.drop_rates):
        return None
    rates_L = np.asarray(plan.drop_rates)
    drawn_BL = rng.uniform(plan.loop.seed, Purpose.STOCHASTIC_DEPTH, step, index_B.numpy(), len(rates_L))
    kept_LB: NDArray[np.float64] = ((drawn_BL >= rates_L) / (1 - rates_L)).T
    return torch.from_numpy(np.ascontiguousarray(kept_LB, np.float32))


def update(state: State, loss: torch.Tensor, plan: Plan, accelerator: Accelerator) -> tuple[bool, bool]:
    """Clip the gradients and update the weights, unless the loss or a gradient is infinite or NaN. Returns `finite` and `overflowed` of
    the step's result, the same in all processes. Waits for a GPU."""
    norm = None
    if plan.optim.max_grad_norm is not None:
        norm = accelerator.clip_grad_norm_(state.network.parameters(), plan.optim.max_grad_norm)
    if accelerator.scaler is not None:
        state.optimizer.step()  # the scaler looks at the gradients
        if not accelerator.optimizer_step_was_skipped:
            return True, False
        finite_losses = accelerator.reduce(loss.detach().isfinite().float(), "sum")
        return False, int(finite_losses) == accelerator.num_processes
    # several processes look at the gradients alone, which they have averaged: they must agree
    if accelerator.num_processes == 1 and not loss.isfinite():
        return False, False
    if norm is None:
        weights = [weight for group in state.optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    finite = bool(norm.isfinite())
    if finite:
        state.optimizer.step()
    return finite, False


def gradient_ratio(result: StepResult, plan: Plan) -> Float[torch.Tensor, ""]:
    """Norm of the weighted teacher term's gradient with respect to the logits, divided by that of the weighted label term: a scalar,
    0 if one of the two is missing. Needs no pass through the network."""
    if not plan.loss.has_distill_term or not plan.label_weight:
        return result.heads.cls_BK.new_zeros(())
    leaves = [head.detach().float().requires_grad_() for head in result.heads if head is not None]
    heads = Heads(leaves[0], leaves[1] if len(leaves) > 1 else None)
    size = len(result.batch.labels_B)
    label_loss = batch_mean(plan.label_loss(heads.cls_BK, result.batch), result.batch, size)
    teacher_loss = batch_mean(plan.distillation_loss(heads, result.output, result.batch), result.batch, size)

    def norm(term: torch.Tensor, weight: float) -> torch.Tensor:
        gradients = torch.autograd.grad(term, leaves, retain_graph=True, materialize_grads=True)
        length: torch.Tensor = torch.linalg.vector_norm(torch.stack(gradients))
        return weight * length

    to_labels = norm(label_loss, plan.label_weight)
    return torch.where(to_labels > 0, norm(teacher_loss, plan.teacher_weight) / to_labels, 0)
