"""Task and distillation losses: pure functions, in nats per image (but for `dist`, which is made of correlations).

    L = label_weight * CE(task head, label) + teacher_weight * D(distil head, teacher)

In the official code alpha = teacher_weight and 1 - alpha = label_weight. Sections and equations are those of the DeiT paper
(arXiv 2012.12877) where no other is named. Whatever D softens by a temperature it multiplies by
its square, so that the gradient does not fade with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch.nn import functional as F

from deitkit.config import LossConfig
from deitkit.models.network import Heads
from deitkit.views.mixup import Batch


class TeacherOutput(NamedTuple):
    """What a teacher said about a batch of views: its decision and, unless only that was kept, its logits."""

    labels_B: Int64[torch.Tensor, " B"]
    logits_BK: Float[torch.Tensor, "B K"] | None


SMALLEST_SD = 1e-6
"""What varies less counts as a constant: its z-scores tend to 0 instead of blowing up rounding errors."""


class LossTerms(NamedTuple):
    """Scalars: the total and its two unweighted terms (the teacher's is 0 without distillation)."""

    total: Float[torch.Tensor, ""]
    label: Float[torch.Tensor, ""]
    teacher: Float[torch.Tensor, ""]


def label_loss(
    logits_BK: Float[torch.Tensor, "B K"],
    labels_B: Int64[torch.Tensor, " B"],
    partner_labels_B: Int64[torch.Tensor, " B"],
    lam_B: Float[torch.Tensor, " B"],
    smoothing: float = 0.0,
) -> Float[torch.Tensor, " B"]:
    """Cross-entropy to mixed, smoothed labels, one value per image.

    for each image b:  - sum over k of t[b, k] * log softmax(logits[b])[k]
    with t = (1 - smoothing) * (share * onehot(label) + (1 - share) * onehot(partner)) + smoothing / K.

    Of an image without a label (`NO_LABEL`) nothing is asked: its share, and the smoothing's for it, count nothing.
    """
    log_p_BK = F.log_softmax(logits_BK.float(), dim=-1)
    own_B, partner_B = of_label(log_p_BK, labels_B), of_label(log_p_BK, partner_labels_B)
    target_B = lam_B * own_B + (1 - lam_B) * partner_B
    unknown_B = lam_B * (labels_B < 0) + (1 - lam_B) * (partner_labels_B < 0)
    return -(1 - smoothing) * target_B - smoothing * (1 - unknown_B) * log_p_BK.mean(-1)


def of_label(values_BK: Float[torch.Tensor, "B K"], labels_B: Int64[torch.Tensor, " B"]) -> Float[torch.Tensor, " B"]:
    """The value of each image's label, 0 where it has none."""
    value_B = values_BK.gather(1, labels_B.clamp_min(0)[:, None])[:, 0]
    return torch.where(labels_B < 0, 0, value_B)


def bce_loss(
    logits_BK: Float[torch.Tensor, "B K"],
    labels_B: Int64[torch.Tensor, " B"],
    partner_labels_B: Int64[torch.Tensor, " B"],
    lam_B: Float[torch.Tensor, " B"],
) -> Float[torch.Tensor, " B"]:
    """Binary cross-entropy of each class for itself (DeiT III, arXiv 2204.07118, section 3), one value per image:

    for each image b:  - sum over k of t[b, k] * log sigmoid(logits[b, k]) + (1 - t[b, k]) * log sigmoid(-logits[b, k])

    with t[b, k] = 1 for the label and the partner's label, each if it has a share above 0, however small, and 0 for all
    other classes: a mixed image shows both. Summed over the classes: at the start K * log 2, where cross-entropy is log K.
    0 where a label with a share is not known (`NO_LABEL`): any class might be the one.
    """
    logits_BK = logits_BK.float()
    own_B, partner_B = of_label(logits_BK, labels_B), of_label(logits_BK, partner_labels_B)
    other_B = (lam_B < 1) & ((labels_B != partner_labels_B) | (lam_B <= 0))
    right_B = torch.where(lam_B > 0, own_B, 0) + torch.where(other_B, partner_B, 0)
    unknown_B = ((lam_B > 0) & (labels_B < 0)) | (other_B & (partner_labels_B < 0))
    return torch.where(unknown_B, 0, F.softplus(logits_BK).sum(-1) - right_B)


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
    return kl(logits_BK.float() / temperature, teacher_BK.float() / temperature) * temperature**2


def zscore_loss(
    logits_BK: Float[torch.Tensor, "B K"], teacher_BK: Float[torch.Tensor, "B K"], temperature: float
) -> Float[torch.Tensor, " B"]:
    """Logit standardisation (Sun et al. 2024, arXiv 2403.01427): the soft loss of z-scores, so that the student learns how
    the teacher's logits lie to each other, not how large they are. One value per image.

    Each network's logits of an image are standardised over the classes: `temperature` counts in standard deviations (the
    paper has 2, and weight 9 beside a cross-entropy of weight 0.1 or 1). The deviation is that of the K logits, as printed;
    the published code divides by K - 1, which is a temperature higher by 5 % at 10 classes. Of two classes the z-scores are
    1 and -1 whatever the logits: nothing is learned.
    """
    return soft_loss(standardised(logits_BK.float()), standardised(teacher_BK.float()), temperature)


def dist_loss(
    logits_BK: Float[torch.Tensor, "B K"],
    teacher_BK: Float[torch.Tensor, "B K"],
    temperature: float,
    weight_B: Float[torch.Tensor, " B"],
) -> Float[torch.Tensor, " B"]:
    """DIST (Huang et al. 2022, arXiv 2205.10536): 1 - Pearson's correlation of both networks' probabilities at
    `temperature`, times its square. One value per image, no nats:

    for each image b:  1 - correlation over the classes of p[b, :] with q[b, :]             (inter-class)
                       + mean over k of 1 - correlation over the batch of p[:, k] with q[:, k]   (intra-class)

    The second line is a property of the batch, the same for all its images: of this process's share where several
    processes have one, and without images of weight 0. So, unlike that of the other losses, its gradient depends on batch
    size and process count. Both lines weigh 1, as by default in the published code (which takes temperature 1, and multiplies
    by its square as well). What is constant correlates with nothing: it counts 1 and has no gradient. Of two classes the
    first line says no more than which is likelier.
    """
    student_BK = (logits_BK.float() / temperature).softmax(-1)
    target_BK = (teacher_BK.float() / temperature).softmax(-1)
    inter_B = 1 - correlation(student_BK, target_BK)
    intra_K = 1 - correlation(student_BK.T, target_BK.T, weight_B)
    return (inter_B + intra_K.mean()) * temperature**2


def dkd_loss(
    logits_BK: Float[torch.Tensor, "B K"],
    teacher_BK: Float[torch.Tensor, "B K"],
    labels_B: Int64[torch.Tensor, " B"],
    temperature: float,
    beta: float,
) -> Float[torch.Tensor, " B"]:
    """Decoupled distillation (Zhao et al. 2022, arXiv 2203.08679, equation 7 with alpha = 1), one value per image:

    KL of (label's class, all others together) + beta * KL over the other classes among themselves

    both at `temperature`, times its square. The soft loss has the teacher's own 1 - p[label] in the place of beta: there a
    teacher that is sure says next to nothing about the other classes.
    """
    rank_k = torch.arange(logits_BK.shape[1] - 1, device=labels_B.device)
    others_Bk = rank_k + (rank_k >= labels_B[:, None])  # all classes but the label's

    def decoupled(logits_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_BK = logits_BK.float() / temperature
        own_B1, rest_Bk = logits_BK.gather(1, labels_B[:, None]), logits_BK.gather(1, others_Bk)
        return torch.cat([own_B1, rest_Bk.logsumexp(-1, keepdim=True)], dim=1), rest_Bk

    (student_B2, student_Bk), (target_B2, target_Bk) = decoupled(logits_BK), decoupled(teacher_BK)
    return (kl(student_B2, target_B2) + beta * kl(student_Bk, target_Bk)) * temperature**2


def kl(logits_BK: Float[torch.Tensor, "B K"], target_BK: Float[torch.Tensor, "B K"]) -> Float[torch.Tensor, " B"]:
    """KL(softmax(target) || softmax(logits)), summed over classes, one value per image."""
    student_BK, target_BK = F.log_softmax(logits_BK, dim=-1), F.log_softmax(target_BK, dim=-1)
    return (target_BK.exp() * (target_BK - student_BK)).sum(-1)


def standardised(
    values_RN: Float[torch.Tensor, "R N"], weight_N: Float[torch.Tensor, " N"] | None = None
) -> Float[torch.Tensor, "R N"]:
    """Each row's z-scores: less its (weighted) mean, over its (weighted) standard deviation."""
    share_N = _shares(values_RN, weight_N)
    values_RN = values_RN - values_RN[:, :1].detach()  # a constant is then 0, whatever its size, with no rounding
    centred_RN = values_RN - (values_RN * share_N).sum(-1, keepdim=True)
    variance_R1 = (centred_RN.square() * share_N).sum(-1, keepdim=True)
    return centred_RN * variance_R1.clamp_min(SMALLEST_SD**2).rsqrt()


def correlation(
    one_RN: Float[torch.Tensor, "R N"],
    other_RN: Float[torch.Tensor, "R N"],
    weight_N: Float[torch.Tensor, " N"] | None = None,
) -> Float[torch.Tensor, " R"]:
    """Pearson's correlation of each row with the other's, between -1 and 1; 0 where one of them is constant."""
    product_RN = standardised(one_RN, weight_N) * standardised(other_RN, weight_N)
    return (product_RN * _shares(one_RN, weight_N)).sum(-1)


def _shares(values_RN: torch.Tensor, weight_N: torch.Tensor | None) -> torch.Tensor:
    weight_N = values_RN.new_ones(values_RN.shape[1]) if weight_N is None else weight_N
    return weight_N / weight_N.sum().clamp_min(1)


def teacher_loss(
    logits_BK: Float[torch.Tensor, "B K"], batch: Batch, answers: TeacherOutput, config: LossConfig
) -> Float[torch.Tensor, " B"]:
    """The distillation loss that `config` names, one value per image. Raises ValueError where the answers lack logits."""
    if config.distillation == "hard":
        return hard_loss(logits_BK, answers.labels_B)
    said_BK, temperature = answers.logits_BK, config.softening
    if said_BK is None:
        raise ValueError(f"{config.distillation} distillation needs the teacher's logits, not its decisions alone")
    match config.distillation:
        case "soft":
            loss_B = soft_loss(logits_BK, said_BK, temperature)
            # The official code divides the sum over images and classes by B * K.
            return loss_B / logits_BK.shape[1] if config.reduction == "deit" else loss_B
        case "zscore":
            return zscore_loss(logits_BK, said_BK, temperature)
        case "dist":
            return dist_loss(logits_BK, said_BK, temperature, batch.weight_B)
        case "dkd":
            # Of a mixed image, the label with the greater share; its own where both have half.
            likelier_B = torch.where(batch.lam_B >= 0.5, batch.labels_B, batch.partner_labels_B)
            return dkd_loss(logits_BK, said_BK, likelier_B, temperature, config.dkd_beta)
    raise ValueError(f"no distillation loss is called {config.distillation!r}")


def distillation_loss(
    heads: Heads, batch: Batch, answers: TeacherOutput | None, config: LossConfig, batch_size: int | None = None
) -> LossTerms:
    """The loss of a batch: images of weight 0 count nothing; the mean is over `batch_size` images (the batch's own
    number if not given; the global number where several processes share a batch).

    Raises ValueError where the configuration wants a head or answers that are not there.
    """
    count = len(batch.labels_B) if batch_size is None else batch_size

    def mean(loss_B: torch.Tensor) -> torch.Tensor:
        return (loss_B * batch.weight_B).sum() / count

    def to_labels(logits_BK: torch.Tensor) -> torch.Tensor:
        labels = (batch.labels_B, batch.partner_labels_B, batch.lam_B)
        if config.label_loss == "bce":
            loss_B = bce_loss(logits_BK, *labels)
            # The official code divides the sum over images and classes by B * K.
            return mean(loss_B / logits_BK.shape[1] if config.bce_reduction == "mean" else loss_B)
        return mean(label_loss(logits_BK, *labels, config.label_smoothing))

    label = to_labels(heads.cls_BK)
    if not config.two_terms:
        return LossTerms(label, label, torch.zeros_like(label))
    distil_BK = heads.dist_BK if config.distil_head == "dist" else heads.cls_BK
    if distil_BK is None:
        raise ValueError("distil_head 'dist' needs a network with a distillation token")
    if config.distil_target == "labels":  # the paper's control: a second class token (section 5.2)
        teacher = to_labels(distil_BK)
    elif answers is None:
        raise ValueError(f"distillation {config.distillation!r} needs a teacher's answers")
    else:
        teacher = mean(teacher_loss(distil_BK, batch, answers, config))
    return LossTerms(config.label_weight * label + config.pull * teacher, label, teacher)


def gradient_ratio(
    heads: Heads, batch: Batch, answers: TeacherOutput | None, config: LossConfig
) -> Float[torch.Tensor, ""]:
    """How hard the teacher pulls: norm of the weighted teacher term's gradient with respect to the logits, over that of
    the weighted label term's. 0 without one of the two. Costs no pass through the network."""
    if not config.two_terms or not config.label_weight:
        return heads.cls_BK.new_zeros(())
    leaves = [head.detach().float().requires_grad_() for head in heads if head is not None]
    detached = Heads(leaves[0], leaves[1] if len(leaves) > 1 else None)
    terms = distillation_loss(detached, batch, answers, config)

    def pull(term: torch.Tensor, weight: float) -> torch.Tensor:
        gradients = torch.autograd.grad(term, leaves, retain_graph=True, materialize_grads=True)
        size: torch.Tensor = torch.linalg.vector_norm(torch.stack(gradients))
        return weight * size

    to_labels = pull(terms.label, config.label_weight)
    return torch.where(to_labels > 0, pull(terms.teacher, config.pull) / to_labels, 0)
