"""Task and distillation losses: pure functions, in nats per image.

    L = label_weight * CE(task head, label) + teacher_weight * D(distil head, teacher)

In the lecture's notation alpha = label_weight; in the official code's alpha = teacher_weight. Sections and equations
are those of the DeiT paper (arXiv 2012.12877).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch.nn import functional as F

from deitkit.config import LossConfig
from deitkit.types import Answers, Batch, Heads


class LossTerms(NamedTuple):
    """Scalars: the total and its two unweighted terms (the teacher's is 0 without distillation)."""

    total: Float[torch.Tensor, ""]
    label: Float[torch.Tensor, ""]
    teacher: Float[torch.Tensor, ""]


def label_loss(
    logits_BK: Float[torch.Tensor, "B K"],
    labels_B: Int64[torch.Tensor, " B"],
    partner_labels_B: Int64[torch.Tensor, " B"],
    label_share_B: Float[torch.Tensor, " B"],
    smoothing: float = 0.0,
) -> Float[torch.Tensor, " B"]:
    """Cross-entropy to mixed, smoothed labels, one value per image.

    for each image b:  - sum over k of t[b, k] * log softmax(logits[b])[k]
    with t = (1 - smoothing) * (share * onehot(label) + (1 - share) * onehot(partner)) + smoothing / K.
    """
    log_p_BK = F.log_softmax(logits_BK.float(), dim=-1)
    own_B = log_p_BK.gather(1, labels_B[:, None])[:, 0]
    partner_B = log_p_BK.gather(1, partner_labels_B[:, None])[:, 0]
    target_B = label_share_B * own_B + (1 - label_share_B) * partner_B
    return -(1 - smoothing) * target_B - smoothing * log_p_BK.mean(-1)


def hard_loss(
    logits_BK: Float[torch.Tensor, "B K"], teacher_labels_B: Int64[torch.Tensor, " B"]
) -> Float[torch.Tensor, " B"]:
    """Hard distillation (section 4, equation 3): cross-entropy to the teacher's decision, one value per image."""
    return F.cross_entropy(logits_BK.float(), teacher_labels_B, reduction="none")


def soft_loss(
    logits_BK: Float[torch.Tensor, "B K"], teacher_BK: Float[torch.Tensor, "B K"], temperature: float
) -> Float[torch.Tensor, " B"]:
    """Soft distillation (section 4, equation 2): KL(teacher || student) at `temperature`, times its square, summed
    over classes, one value per image."""
    student_BK = F.log_softmax(logits_BK.float() / temperature, dim=-1)
    target_BK = F.log_softmax(teacher_BK.float() / temperature, dim=-1)
    kl_B = (target_BK.exp() * (target_BK - student_BK)).sum(-1)
    return kl_B * temperature**2


def distillation_loss(
    heads: Heads, batch: Batch, answers: Answers | None, config: LossConfig, batch_size: int | None = None
) -> LossTerms:
    """The loss of a batch: images of weight 0 count nothing; the mean is over `batch_size` images (the batch's own
    number if not given; the global number where several processes share a batch).

    Raises ValueError where the configuration wants a head or answers that are not there.
    """
    count = len(batch.labels_B) if batch_size is None else batch_size

    def mean(loss_B: torch.Tensor) -> torch.Tensor:
        return (loss_B * batch.weight_B).sum() / count

    def to_labels(logits_BK: torch.Tensor) -> torch.Tensor:
        labels = (batch.labels_B, batch.partner_labels_B, batch.label_share_B)
        return mean(label_loss(logits_BK, *labels, config.label_smoothing))

    label = to_labels(heads.cls_BK)
    if config.distillation in (None, "none") and config.distil_target == "teacher":
        return LossTerms(label, label, torch.zeros_like(label))
    distil_BK = heads.dist_BK if config.distil_head == "dist" else heads.cls_BK
    if distil_BK is None:
        raise ValueError("distil_head 'dist' needs a network with a distillation token")
    if config.distil_target == "labels":  # the paper's control: a second class token (section 5.2)
        teacher = to_labels(distil_BK)
    elif answers is None:
        raise ValueError(f"distillation {config.distillation!r} needs a teacher's answers")
    elif config.distillation == "hard":
        teacher = mean(hard_loss(distil_BK, answers.labels_B))
    else:
        if answers.logits_BK is None:
            raise ValueError("soft distillation needs the teacher's logits, not its decisions alone")
        teacher = mean(soft_loss(distil_BK, answers.logits_BK, config.temperature))
        if config.reduction == "deit":  # the official code divides the sum by B * K
            teacher = teacher / distil_BK.shape[-1]
    return LossTerms(config.label_weight * label + config.teacher_weight * teacher, label, teacher)


def gradient_ratio(heads: Heads, batch: Batch, answers: Answers | None, config: LossConfig) -> Float[torch.Tensor, ""]:
    """How hard the teacher pulls: norm of the weighted teacher term's gradient with respect to the logits, over that of
    the weighted label term's. 0 without distillation. Costs no pass through the network."""
    leaves = [head.detach().float().requires_grad_() for head in heads if head is not None]
    detached = Heads(leaves[0], leaves[1] if len(leaves) > 1 else None)
    terms = distillation_loss(detached, batch, answers, config)
    if not terms.teacher.requires_grad:
        return torch.zeros_like(terms.label.detach())

    def pull(term: torch.Tensor, weight: float) -> torch.Tensor:
        gradients = torch.autograd.grad(term, leaves, retain_graph=True, materialize_grads=True)
        size: torch.Tensor = torch.linalg.vector_norm(torch.stack(gradients))
        return weight * size

    return pull(terms.teacher, config.teacher_weight) / pull(terms.label, config.label_weight).clamp_min(1e-12)
