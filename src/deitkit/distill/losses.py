"""Label and distillation losses: pure functions, in nats per image.

    loss = label_weight * label_loss(class head) + teacher_weight * teacher_loss(distillation head)

`label_loss` and `teacher_loss` pick the two functions of a run from its configuration, once. Sections and equations are those of
the DeiT paper (arXiv 2012.12877) where no other is named; in its code alpha = teacher_weight and 1 - alpha = label_weight. A loss
at a temperature is multiplied by its square, so that its gradient does not fade.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch.nn import functional as F

from deitkit.config import LossConfig
from deitkit.views.mixup import Batch

SMALLEST_SD = 1e-6
"""What varies less counts as a constant: its z-scores tend to 0 instead of blowing up rounding errors."""


class TeacherOutput(NamedTuple):
    """A teacher's output for a batch of views: hard labels and, unless only those were recorded, logits."""

    labels_B: Int64[torch.Tensor, " B"]
    logits_BK: Float[torch.Tensor, "B K"] | None


LabelLoss = Callable[[torch.Tensor, Batch], torch.Tensor]
"""(logits_BK of the class head, batch) -> loss_B."""
TeacherLoss = Callable[[torch.Tensor, TeacherOutput | None, Batch], torch.Tensor]
"""(logits_BK of the distillation head, teacher output, batch) -> loss_B."""
LossFunction = Callable[[torch.Tensor, torch.Tensor, Batch], torch.Tensor]
"""A distillation loss of the user: (student_logits_BK, teacher_logits_BK, batch) -> loss_B."""


def label_loss(config: LossConfig) -> LabelLoss:
    """The loss of a run to the labels."""
    if config.label_loss == "bce":
        return lambda logits_BK, batch: bce(logits_BK, batch.labels_B, batch.partner_labels_B, batch.lam_B)
    smoothing = config.label_smoothing
    return lambda logits_BK, batch: cross_entropy(
        logits_BK, batch.labels_B, batch.partner_labels_B, batch.lam_B, smoothing
    )


def teacher_loss(config: LossConfig, function: LossFunction | None = None) -> TeacherLoss:
    """The distillation loss of a run; 0 where there is none. `function` is the user's, for `distillation: callable`.

    The loss raises ValueError where it gets no teacher output, or lacks logits."""
    if config.distil == "labels":  # the paper's control: a second class token (section 5.2)
        to_labels = label_loss(config)
        return lambda logits_BK, _, batch: to_labels(logits_BK, batch)
    if not config.has_distill_term:
        return lambda logits_BK, _output, _batch: logits_BK.new_zeros(len(logits_BK))
    if config.distillation == "hard":
        return lambda logits_BK, output, _: hard(logits_BK, _given(output).labels_B)
    if config.distillation == "callable":
        if function is None:
            raise ValueError("distillation 'callable' needs the function that it stands for")
        return lambda logits_BK, output, batch: function(logits_BK, _logits(output), batch)
    divergence, temperature = {"soft": soft, "zscore": zscore}[config.distillation or ""], config.temperature or 1.0
    return lambda logits_BK, output, _: divergence(logits_BK, _logits(output), temperature)


def _given(output: TeacherOutput | None) -> TeacherOutput:
    if output is None:
        raise ValueError("distillation needs a teacher's output")
    return output


def _logits(output: TeacherOutput | None) -> torch.Tensor:
    logits_BK = _given(output).logits_BK
    if logits_BK is None:
        raise ValueError("this distillation loss needs the teacher's logits, not only its hard labels")
    return logits_BK


def batch_mean(loss_B: Float[torch.Tensor, " B"], batch: Batch, global_size: int) -> Float[torch.Tensor, ""]:
    """Mean over a batch of `global_size` images (over all processes); images of weight 0 count nothing."""
    return (loss_B * batch.weight_B).sum() / global_size


# ------------------------------------------------------------------------------------------------ to the labels


def cross_entropy(
    logits_BK: Float[torch.Tensor, "B K"],
    labels_B: Int64[torch.Tensor, " B"],
    partner_labels_B: Int64[torch.Tensor, " B"],
    lam_B: Float[torch.Tensor, " B"],
    smoothing: float = 0.0,
) -> Float[torch.Tensor, " B"]:
    """Cross-entropy to mixed, smoothed labels, one value per image.

    for each image b:  - sum over k of t[b, k] * log softmax(logits[b])[k]
    with t = (1 - smoothing) * (lam * onehot(label) + (1 - lam) * onehot(partner)) + smoothing / K.

    An image without a label (`NO_LABEL`) contributes nothing: neither its share of the target nor of the smoothing.
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


def bce(
    logits_BK: Float[torch.Tensor, "B K"],
    labels_B: Int64[torch.Tensor, " B"],
    partner_labels_B: Int64[torch.Tensor, " B"],
    lam_B: Float[torch.Tensor, " B"],
) -> Float[torch.Tensor, " B"]:
    """Binary cross-entropy of each class by itself (DeiT III, arXiv 2204.07118, section 3), one value per image:

    for each image b:  - sum over k of t[b, k] * log sigmoid(logits[b, k]) + (1 - t[b, k]) * log sigmoid(-logits[b, k])

    with t[b, k] = 1 for the label and the partner's label, each if it has a share above 0, however small, and 0 for all
    other classes: a mixed image shows both. Summed over the classes: at the start K * log 2, where cross-entropy is log K.
    (The published code takes the mean over classes: a label_weight of 1 / K.)
    0 where a label with a share is not known (`NO_LABEL`): any class might be the one.
    """
    logits_BK = logits_BK.float()
    own_B, partner_B = of_label(logits_BK, labels_B), of_label(logits_BK, partner_labels_B)
    other_B = (lam_B < 1) & ((labels_B != partner_labels_B) | (lam_B <= 0))
    right_B = torch.where(lam_B > 0, own_B, 0) + torch.where(other_B, partner_B, 0)
    unknown_B = ((lam_B > 0) & (labels_B < 0)) | (other_B & (partner_labels_B < 0))
    return torch.where(unknown_B, 0, F.softplus(logits_BK).sum(-1) - right_B)


# ----------------------------------------------------------------------------------------------- to the teacher


def hard(
    logits_BK: Float[torch.Tensor, "B K"], teacher_labels_B: Int64[torch.Tensor, " B"]
) -> Float[torch.Tensor, " B"]:
    """Hard distillation (section 4, equation 3): cross-entropy to the teacher's hard labels, one value per image."""
    return F.cross_entropy(logits_BK.float(), teacher_labels_B, reduction="none")


def soft(
    logits_BK: Float[torch.Tensor, "B K"], teacher_BK: Float[torch.Tensor, "B K"], temperature: float
) -> Float[torch.Tensor, " B"]:
    """Soft distillation (section 4, equation 2): KL(teacher || student) at `temperature`, times its square, summed over classes,
    one value per image. (The published code divides by K too: a teacher_weight K times as small.)"""
    return kl(logits_BK.float() / temperature, teacher_BK.float() / temperature) * temperature**2


def zscore(
    logits_BK: Float[torch.Tensor, "B K"], teacher_BK: Float[torch.Tensor, "B K"], temperature: float
) -> Float[torch.Tensor, " B"]:
    """Logit standardisation (Sun et al. 2024, arXiv 2403.01427): the soft loss of z-scores. The student learns how the teacher's
    logits relate to each other, not how large they are. One value per image.

    Each network's logits of an image are standardised over the classes: `temperature` counts in standard deviations (the
    paper has 2, and weight 9 beside a cross-entropy of weight 0.1 or 1). The deviation is that of the K logits, as printed;
    the published code divides by K - 1, which is a temperature higher by 5 % at 10 classes. For two classes the z-scores are
    1 and -1 whatever the logits: nothing is learned.
    """
    return soft(standardised(logits_BK.float()), standardised(teacher_BK.float()), temperature)


def kl(logits_BK: Float[torch.Tensor, "B K"], target_BK: Float[torch.Tensor, "B K"]) -> Float[torch.Tensor, " B"]:
    """KL(softmax(target) || softmax(logits)), summed over classes, one value per image."""
    student_BK, target_BK = F.log_softmax(logits_BK, dim=-1), F.log_softmax(target_BK, dim=-1)
    return (target_BK.exp() * (target_BK - student_BK)).sum(-1)


def standardised(values_BK: Float[torch.Tensor, "B K"]) -> Float[torch.Tensor, "B K"]:
    """Each row's z-scores: less its mean, over its standard deviation."""
    share_K = values_BK.new_ones(values_BK.shape[1]) / values_BK.shape[1]
    values_BK = values_BK - values_BK[:, :1].detach()  # a constant is then 0, whatever its size, with no rounding
    centred_BK = values_BK - (values_BK * share_K).sum(-1, keepdim=True)
    variance_B1 = (centred_BK.square() * share_K).sum(-1, keepdim=True)
    return centred_BK * variance_B1.clamp_min(SMALLEST_SD**2).rsqrt()
