"""Label and distillation losses: pure functions, one value in nats per image.

    loss = label_weight * label_loss(class head) + teacher_weight * teacher_loss(distillation head)

    equation 2   soft distillation         `soft`: KL divergence to the teacher's distribution at a temperature
    equation 3   hard-label distillation   `hard`: cross-entropy to the teacher's hard labels

A third term, feature_weight * `features`, is 1 - cosine between the teacher's features and what the student predicts of them.

Sections and equations are those of the DeiT paper (arXiv 2012.12877) where no other is named. Its lambda is teacher_weight and 1 - lambda
is label_weight: two weights here, free of each other. A loss at a temperature is multiplied by its square, so that its gradient does
not fade (Hinton et al. 2015, section 2.1). `label_loss` and `teacher_loss` pick the two functions of a run from its configuration, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch.nn import functional as F

from deitkit.config import LossConfig
from deitkit.terminal import UserError
from deitkit.views.mixup import Batch

SMALLEST_SD = 1e-6
"""Logits that vary less count as constant: their z-scores tend to 0 instead of magnifying rounding errors."""

Logits = Float[torch.Tensor, "B K"]
PerImage = Float[torch.Tensor, " B"]
Labels = Int64[torch.Tensor, " B"]


class TeacherOutput(NamedTuple):
    """A teacher's output for a batch of views: hard labels (-1 where only features are known), logits unless only hard labels are
    recorded or needed, and the code of its features (`encoding.FeatureCode`) where they are learned."""

    labels_B: Labels
    logits_BK: Logits | None
    features_BP: Float[torch.Tensor, "B P"] | None = None


LabelLoss = Callable[[Logits, Batch], PerImage]
"""(logits_BK of the class head, batch) -> loss_B."""
TeacherLoss = Callable[[Logits, TeacherOutput | None, Batch], PerImage]
"""(logits_BK of the distillation head, teacher output, batch) -> loss_B."""
LossFunction = Callable[[Logits, Logits, Batch], PerImage]
"""A user's distillation loss: (student_logits_BK, teacher_logits_BK, batch) -> loss_B."""


def label_loss(config: LossConfig, class_weights: Sequence[float] = ()) -> LabelLoss:
    """The loss of the class head of a run; `class_weights`, one a class, weigh the labels' cross-entropy."""
    if config.label_loss == "bce":
        return lambda logits_BK, batch: bce(logits_BK, batch.labels_B, batch.partner_labels_B, batch.lam_B)
    smoothing, weights_K = config.label_smoothing, torch.tensor(class_weights) if class_weights else None
    return lambda logits_BK, batch: cross_entropy(
        logits_BK, batch.labels_B, batch.partner_labels_B, batch.lam_B, smoothing, weights_K
    )


def teacher_loss(
    config: LossConfig, function: LossFunction | None = None, class_weights: Sequence[float] = ()
) -> TeacherLoss:
    """The loss of the distillation head of a run; 0 if it learns from labels alone. `function` is the user's, for `distillation:
    callable`; `class_weights` count where labels are learned. The loss raises ValueError if it gets no teacher output, or needs logits
    and gets hard labels alone."""
    if config.second_token_learns_labels:  # the paper's control (section 4, "Distillation token"): a second class token
        to_labels = label_loss(config, class_weights)
        return lambda logits_BK, _, batch: to_labels(logits_BK, batch)
    if not config.has_distill_term:
        return lambda logits_BK, _output, _batch: logits_BK.new_zeros(len(logits_BK))
    if config.distillation == "hard":
        return lambda logits_BK, output, _: hard(logits_BK, _present(output).labels_B)
    if config.distillation == "callable":
        if function is None:
            raise ValueError("distillation 'callable' needs the function that it stands for")
        return lambda logits_BK, output, batch: _one_per_image(function(logits_BK, _logits_of(output), batch), batch)
    divergence, temperature = {"soft": soft, "zscore": zscore}[config.distillation or ""], config.temperature or 1.0
    return lambda logits_BK, output, _: divergence(logits_BK, _logits_of(output), temperature)


def batch_mean(loss_B: PerImage, batch: Batch, global_size: int) -> Float[torch.Tensor, ""]:
    """The part of this process in the mean over the `global_size` images of all processes. An unreadable image (weight 0) adds 0."""
    return (loss_B * batch.weight_B).sum() / global_size


# ------------------------------------------------------------------------------------------------- label losses


def cross_entropy(
    logits_BK: Logits,
    labels_B: Labels,
    partner_labels_B: Labels,
    lam_B: PerImage,
    smoothing: float = 0.0,
    weights_K: Float[torch.Tensor, " K"] | None = None,
) -> PerImage:
    """Cross-entropy to mixed, smoothed labels, one value per image.

    for each image b:  - sum over k of t[b, k] * log softmax(logits[b])[k]
    with t = (1 - smoothing) * (lam * onehot(label) + (1 - lam) * onehot(partner)) + smoothing / K.

    An image without a label (`NO_LABEL`) adds nothing to the target or to its smoothing. With `weights_K` either label's part of the
    loss is multiplied by the weight of its class.
    """
    log_p_BK = F.log_softmax(logits_BK.float(), dim=-1)
    own_B, partner_B = _at_label(log_p_BK, labels_B), _at_label(log_p_BK, partner_labels_B)
    share_B, rest_B, known_B = lam_B, 1 - lam_B, torch.ones_like(lam_B)
    if weights_K is not None:
        weights_K = weights_K.to(logits_BK.device, non_blocking=True)
        share_B = share_B * weights_K[labels_B.clamp_min(0)]
        rest_B = rest_B * weights_K[partner_labels_B.clamp_min(0)]
        known_B = share_B + rest_B
    target_B = share_B * own_B + rest_B * partner_B
    known_B = known_B - (share_B * (labels_B < 0) + rest_B * (partner_labels_B < 0))
    return -(1 - smoothing) * target_B - smoothing * known_B * log_p_BK.mean(-1)


def _at_label(values_BK: Logits, labels_B: Labels) -> PerImage:
    """The value at each image's label; 0 for an image without one."""
    value_B = values_BK.gather(1, labels_B.clamp_min(0)[:, None])[:, 0]
    return torch.where(labels_B < 0, 0, value_B)


def bce(logits_BK: Logits, labels_B: Labels, partner_labels_B: Labels, lam_B: PerImage) -> PerImage:
    """Binary cross-entropy of every class, summed (DeiT III, arXiv 2204.07118, section 3), one value per image:

    for each image b:  - sum over k of t[b, k] * log sigmoid(logits[b, k]) + (1 - t[b, k]) * log sigmoid(-logits[b, k])

    with t[b, k] = 1 for the label and for the partner's label, each if its share is above 0, and 0 for all other classes: a mixed
    image shows both. At the start the sum is K * log 2, where cross-entropy is log K. (The published code takes the mean over
    classes: that is a label_weight of 1 / K.) 0 if a label with a share is unknown (`NO_LABEL`), which may be any class.
    """
    logits_BK = logits_BK.float()
    own_B, partner_B = _at_label(logits_BK, labels_B), _at_label(logits_BK, partner_labels_B)
    other_B = (lam_B < 1) & ((labels_B != partner_labels_B) | (lam_B <= 0))
    right_B = torch.where(lam_B > 0, own_B, 0) + torch.where(other_B, partner_B, 0)
    unknown_B = ((lam_B > 0) & (labels_B < 0)) | (other_B & (partner_labels_B < 0))
    return torch.where(unknown_B, 0, F.softplus(logits_BK).sum(-1) - right_B)


# ------------------------------------------------------------------------------------------ distillation losses


def hard(logits_BK: Logits, teacher_labels_B: Labels) -> PerImage:
    """Teacher term of equation 3 (section 4, hard-label distillation): cross-entropy to the teacher's hard labels, one value per image."""
    return F.cross_entropy(logits_BK.float(), teacher_labels_B, reduction="none")


def soft(logits_BK: Logits, teacher_BK: Logits, temperature: float) -> PerImage:
    """Teacher term of equation 2 (section 4, soft distillation): temperature^2 * KL(teacher || student), both softened by
    `temperature`, summed over classes, one value per image. (The paper prints the arguments the other way round; this is the
    published code's direction. That code also divides by K: a teacher_weight K times as small.)"""
    student_BK, teacher_BK = (F.log_softmax(z_BK.float() / temperature, dim=-1) for z_BK in (logits_BK, teacher_BK))
    return temperature**2 * (teacher_BK.exp() * (teacher_BK - student_BK)).sum(-1)


def zscore(logits_BK: Logits, teacher_BK: Logits, temperature: float) -> PerImage:
    """Logit standardisation (Sun et al. 2024, arXiv 2403.01427): the soft loss of z-scores, one value per image. The student learns
    how the teacher's logits relate to each other, not how large they are.

    Each network's logits of an image are standardised over the classes, so that `temperature` counts in standard deviations (the
    paper has 2, and weight 9 beside a cross-entropy of weight 0.1 or 1). The deviation is that of the K logits, as printed; the
    published code divides by K - 1, which is a temperature higher by 5 % for 10 classes. With two classes the z-scores are 1 and
    -1 whatever the logits: nothing is learned.
    """
    return soft(standardised(logits_BK.float()), standardised(teacher_BK.float()), temperature)


def features(predicted_BP: Float[torch.Tensor, "B P"] | None, output: TeacherOutput | None) -> PerImage:
    """1 - cosine between the student's prediction and the code of the teacher's features, one value per image. Raises ValueError where one
    of them is missing."""
    target_BP = _present(output).features_BP
    if predicted_BP is None or target_BP is None:
        raise ValueError("learning features needs a student with a feature head and a teacher's features")
    return 1 - F.cosine_similarity(predicted_BP.float(), target_BP, dim=-1)


def standardised(values_BK: Logits) -> Logits:
    """Each row's z-scores: (value - mean) / standard deviation."""
    share_K = values_BK.new_ones(values_BK.shape[1]) / values_BK.shape[1]
    values_BK = values_BK - values_BK[:, :1].detach()  # a constant is then 0, whatever its size, with no rounding
    centred_BK = values_BK - (values_BK * share_K).sum(-1, keepdim=True)
    variance_B1 = (centred_BK.square() * share_K).sum(-1, keepdim=True)
    return centred_BK * variance_B1.clamp_min(SMALLEST_SD**2).rsqrt()


def _present(output: TeacherOutput | None) -> TeacherOutput:
    if output is None:
        raise ValueError("distillation needs a teacher's output")
    return output


def _logits_of(output: TeacherOutput | None) -> torch.Tensor:
    logits_BK = _present(output).logits_BK
    if logits_BK is None:
        raise ValueError("this distillation loss needs the teacher's logits, not only its hard labels")
    return logits_BK


def _one_per_image(loss_B: Any, batch: Batch) -> PerImage:
    if not isinstance(loss_B, torch.Tensor) or loss_B.shape != batch.labels_B.shape:
        what = f"a tensor of shape {tuple(loss_B.shape)}" if isinstance(loss_B, torch.Tensor) else type(loss_B).__name__
        raise UserError(
            f"distillation: the function returned {what} for {len(batch.labels_B)} images: return one loss per image, not their mean"
        )
    if torch.is_grad_enabled() and not (loss_B.is_floating_point() and loss_B.requires_grad):
        raise UserError(
            "distillation: what the function returned has no gradient: compute it from the student's logits"
        )
    return loss_B
