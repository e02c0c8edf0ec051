"""Losses against numbers worked out by hand, and against the formulas of the papers and of their code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import deitkit as dk
from deitkit.config import Distillation, LoopConfig, LossConfig, OptimConfig, ViewConfig
from deitkit.distill import step
from deitkit.distill.losses import (
    LossFunction,
    TeacherOutput,
    batch_mean,
    bce,
    cross_entropy,
    hard,
    soft,
    standardised,
    zscore,
)
from deitkit.distill.step import Plan, State, StepResult, gradient_ratio, train_step
from deitkit.models.network import Heads
from deitkit.terminal import SilentProgress, UserError, load_yaml
from deitkit.views.mixup import Batch, RawBatch

LN3 = math.log(3)
TEACHER_BK = [[4.0, 1.0, 0.0, -2.0], [0.5, 3.0, 2.5, -1.0], [-1.0, 0.0, 0.5, 6.0]]
STUDENT_BK = [[1.0, 0.5, -1.0, 0.0], [2.0, 0.0, 1.0, 1.5], [0.0, -2.0, 1.0, 0.5]]


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(logits) / np.exp(logits).sum()


def divergence(target: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float((target * np.log(target / other)).sum())


def config_of(loss: str, **settings: float | str) -> LossConfig:
    return LossConfig.model_validate({"distillation": loss, **settings})


def batch_of(labels: list[int], partners: list[int] | None = None, shares: list[float] | None = None) -> Batch:
    labels_B = torch.tensor(labels)
    return Batch(
        images_BCHW=torch.zeros(len(labels), 1, 2, 2),
        labels_B=labels_B,
        partner_labels_B=labels_B if partners is None else torch.tensor(partners),
        lam_B=torch.ones(len(labels)) if shares is None else torch.tensor(shares),
        weight_B=torch.ones(len(labels)),
        index_B=torch.arange(len(labels)),
        view_B=torch.zeros(len(labels), dtype=torch.long),
    )


class FixedHeads(nn.Module):
    """A network whose logits are its parameters."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.cls_BK = nn.Parameter(heads.cls_BK.detach().clone())
        self.dist_BK = None if heads.dist_BK is None else nn.Parameter(heads.dist_BK.detach().clone())

    def forward(self, *_: object) -> Heads:
        return Heads(self.cls_BK, self.dist_BK)


def plan_of(config: LossConfig, function: LossFunction | None = None) -> Plan:
    return Plan(
        view=ViewConfig(), loss=config, optim=OptimConfig(), loop=LoopConfig(), total_steps=1, loss_function=function
    )


def step_with(
    heads: Heads, batch: Batch, output: TeacherOutput | None, config: LossConfig, function: LossFunction | None = None
) -> StepResult:
    """A training step in which network, views and teacher give these."""
    size = len(batch.labels_B)
    network = FixedHeads(heads)
    raw = RawBatch(
        pixels_MCHW=torch.zeros(size, 1, 2, 2, dtype=torch.uint8),
        labels_M=batch.labels_B,
        index_M=batch.index_B,
        view_M=batch.view_B,
        weight_M=batch.weight_B,
        partner_B=torch.arange(size),
        global_size=size,
    )
    state = State(network=network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1), ema=None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step, "augment_and_mix", lambda *_: batch)
        return train_step(state, raw, lambda _: output, plan_of(config, function), Accelerator(cpu=True))


class Terms(NamedTuple):
    label: torch.Tensor
    teacher: torch.Tensor


def terms_of(
    heads: Heads, batch: Batch, output: TeacherOutput | None, config: LossConfig, global_size: int | None = None
) -> Terms:
    """Both unweighted terms, with their graph."""
    plan, size = plan_of(config), global_size or len(batch.labels_B)
    return Terms(
        batch_mean(plan.label_loss(heads.cls_BK, batch), batch, size),
        batch_mean(plan.teacher_loss(plan.distilled(heads), output, batch), batch, size),
    )


def test_cross_entropy_by_hand() -> None:
    """Logits (ln 3, 0): probabilities 3/4, 1/4."""
    logits = torch.tensor([[LN3, 0.0]])
    one, zero = torch.tensor([1]), torch.tensor([0])
    assert cross_entropy(logits, zero, zero, torch.ones(1)).item() == pytest.approx(-math.log(0.75))
    mixed = cross_entropy(logits, zero, one, torch.tensor([0.25])).item()
    assert mixed == pytest.approx(-0.25 * math.log(0.75) - 0.75 * math.log(0.25))
    smoothed = cross_entropy(logits, zero, zero, torch.ones(1), smoothing=0.1).item()
    assert smoothed == pytest.approx(-0.95 * math.log(0.75) - 0.05 * math.log(0.25))


def test_hard_by_hand() -> None:
    assert hard(torch.tensor([[LN3, 0.0]]), torch.tensor([1])).item() == pytest.approx(math.log(4))


def test_soft_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2) at temperature 1; at 2 the logits are halved first and KL is times 4."""
    teacher, student = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2)
    assert soft(student, teacher, 1.0).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    p = 3**0.5 / (1 + 3**0.5)
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert soft(student, teacher, 2.0).item() == pytest.approx(expected)


def test_zscore_by_hand() -> None:
    """The teacher's first row has mean 3/4 and variance (13/4)^2 + ..., over four classes, so divided by 4."""
    z = [
        (np.array(rows) - np.mean(rows, 1, keepdims=True)) / np.std(rows, 1, keepdims=True)
        for rows in (STUDENT_BK, TEACHER_BK)
    ]
    assert z[1][0, 0] == pytest.approx((4 - 0.75) / math.sqrt((3.25**2 + 0.25**2 + 0.75**2 + 2.75**2) / 4))
    expected = [4 * divergence(softmax(q / 2), softmax(p / 2)) for p, q in zip(*z, strict=True)]
    ours = zscore(torch.tensor(STUDENT_BK), torch.tensor(TEACHER_BK), 2.0)
    assert ours.tolist() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_is_torchs() -> None:
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    ours = cross_entropy(logits, labels, labels, torch.ones(8), smoothing=0.1).mean()
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation_is_the_papers_equation_2_and_divided_by_the_classes_the_official_codes(
    temperature: float,
) -> None:
    """The official code sums KL over classes *and* images, times tau^2, over the number of logits: a weight K times as small."""
    student, teacher = torch.randn(6, 11), torch.randn(6, 11)
    kl = sum(
        temperature**2 * F.kl_div((s / temperature).log_softmax(0), (t / temperature).softmax(0), reduction="sum")
        for s, t in zip(student, teacher, strict=True)
    )
    heads, output = Heads(torch.randn(6, 11), student), TeacherOutput(teacher.argmax(-1), teacher)
    batch, labels = batch_of([0] * 6), torch.zeros(6, dtype=torch.long)
    weight = 0.1  # the paper's lambda
    settings = {"temperature": temperature, "label_weight": 1 - weight, "label_smoothing": 0.0}
    equation_2 = (1 - weight) * F.cross_entropy(heads.cls_BK, labels) + weight * kl / 6
    result = step_with(heads, batch, output, config_of("soft", **settings, teacher_weight=weight))
    torch.testing.assert_close(result.loss, equation_2)
    official = (1 - weight) * F.cross_entropy(heads.cls_BK, labels) + weight * kl / (6 * 11)
    result = step_with(heads, batch, output, config_of("soft", **settings, teacher_weight=weight / 11))
    torch.testing.assert_close(result.loss, official)


def test_hard_distillation_is_the_papers_equation_3() -> None:
    heads, output = Heads(torch.randn(6, 4), torch.randn(6, 4)), TeacherOutput(torch.randint(4, (6,)), None)
    batch = batch_of([0, 1, 2, 3, 0, 1])
    result = step_with(heads, batch, output, LossConfig(distillation="hard", label_smoothing=0.0))
    paper = F.cross_entropy(heads.cls_BK, batch.labels_B) / 2 + F.cross_entropy(heads.dist_BK, output.labels_B) / 2
    torch.testing.assert_close(result.loss, paper)


def test_a_step_moves_the_weights_down_the_gradient_of_the_weighted_sum() -> None:
    heads, output = Heads(torch.randn(6, 4), torch.randn(6, 4)), TeacherOutput(torch.randint(4, (6,)), None)
    batch = batch_of([0, 1, 2, 3, 0, 1])
    config = LossConfig(distillation="hard", label_weight=0.25, teacher_weight=2.0)
    cls_BK, dist_BK = (head.clone().requires_grad_() for head in (heads.cls_BK, heads.dist_BK))
    terms = terms_of(Heads(cls_BK, dist_BK), batch, output, config)
    (0.25 * terms.label + 2.0 * terms.teacher).backward()
    network = step_with(heads, batch, output, config).heads  # its parameters, after SGD
    rate = step.learning_rate(0, 1, 0, LoopConfig().batch_size, OptimConfig())
    torch.testing.assert_close(network.cls_BK, heads.cls_BK - rate * cls_BK.grad)
    torch.testing.assert_close(network.dist_BK, heads.dist_BK - rate * dist_BK.grad)


def test_teachers_hard_labels_are_never_smoothed_and_labels_are() -> None:
    heads, output = Heads(torch.randn(3, 4), torch.randn(3, 4)), TeacherOutput(torch.tensor([1, 2, 3]), None)
    batch = batch_of([0, 1, 2])
    smooth = step_with(heads, batch, output, LossConfig(distillation="hard", label_smoothing=0.3))
    sharp = step_with(heads, batch, output, LossConfig(distillation="hard", label_smoothing=0.0))
    assert torch.equal(smooth.teacher_loss, sharp.teacher_loss)
    assert not torch.equal(smooth.label_loss, sharp.label_loss)


def test_without_distillation_the_label_has_all_the_weight() -> None:
    heads = Heads(torch.randn(3, 4), None)
    result = step_with(heads, batch_of([0, 1, 2]), None, LossConfig(distillation="none"))
    assert torch.equal(result.loss, result.label_loss)
    assert result.teacher_loss == 0


def test_distil_cls_teaches_the_class_head() -> None:
    heads, output = Heads(torch.randn(3, 4), None), TeacherOutput(torch.tensor([1, 2, 3]), None)
    result = step_with(heads, batch_of([0, 1, 2]), output, LossConfig(distillation="hard", distil="cls"))
    torch.testing.assert_close(result.teacher_loss, F.cross_entropy(heads.cls_BK, output.labels_B))


@pytest.mark.parametrize("loss", ["hard", "soft", "zscore"])
def test_without_labels_both_heads_learn_from_the_teacher(loss: Distillation) -> None:
    heads, batch = Heads(torch.randn(3, 4), torch.randn(3, 4)), batch_of([0, 1, 2])
    output = TeacherOutput(torch.tensor([1, 2, 3]), torch.randn(3, 4))
    config = LossConfig(distillation=loss, label_weight=0.0)
    assert config.distil == "both"
    assert (
        LossConfig(distillation=loss).distil == LossConfig(distillation="features", label_weight=0.0).distil == "token"
    )
    result = step_with(heads, batch, output, config)
    assert not torch.equal(result.heads.cls_BK, heads.cls_BK)
    settings = {"distillation": loss, "label_weight": 0.0, "distil": "token"}
    of_dist = step_with(heads, batch, output, LossConfig(**settings)).teacher_loss
    of_cls = step_with(
        Heads(heads.cls_BK, None), batch, output, LossConfig(**{**settings, "distil": "cls"})
    ).teacher_loss
    torch.testing.assert_close(result.teacher_loss, (of_cls + of_dist) / 2)


def test_distil_labels_is_a_second_class_token() -> None:
    heads, batch = Heads(torch.randn(3, 4), torch.randn(3, 4)), batch_of([0, 1, 2])
    result = step_with(heads, batch, None, LossConfig(distillation="none", distil="labels"))
    expected = F.cross_entropy(heads.dist_BK, batch.labels_B, label_smoothing=0.1)
    torch.testing.assert_close(result.teacher_loss, expected)
    torch.testing.assert_close(result.loss, (result.label_loss + result.teacher_loss) / 2)


def test_unreadable_image_counts_nothing() -> None:
    heads, output = Heads(torch.randn(2, 4), torch.randn(2, 4)), TeacherOutput(torch.tensor([1, 2]), None)
    config = LossConfig(distillation="hard")
    batch = batch_of([0, 1])._replace(weight_B=torch.tensor([1.0, 0.0]))
    changed = Heads(heads.cls_BK.clone(), heads.dist_BK.clone())
    changed.cls_BK[1], changed.dist_BK[1] = 100.0, -100.0
    assert torch.equal(step_with(heads, batch, output, config).loss, step_with(changed, batch, output, config).loss)


def test_missing_head_output_or_logits_are_refused() -> None:
    batch, output = batch_of([0]), TeacherOutput(torch.tensor([1]), None)
    with pytest.raises(ValueError, match="distillation token"):
        step_with(Heads(torch.zeros(1, 2), None), batch, output, LossConfig(distillation="hard"))
    two = Heads(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="needs a teacher's output"):
        step_with(two, batch, None, LossConfig(distillation="hard"))
    for loss in ("soft", "zscore", "callable"):
        with pytest.raises(ValueError, match="needs the teacher's logits"):
            step_with(two, batch, output, config_of(loss), function=lambda student_BK, *_: student_BK.sum(-1))


def test_a_function_of_the_user_is_the_distillation_loss() -> None:
    heads, teacher_BK = Heads(torch.randn(3, 4), torch.randn(3, 4)), torch.randn(3, 4)
    batch, output = batch_of([0, 1, 2]), TeacherOutput(teacher_BK.argmax(-1), teacher_BK)

    def squared(student_BK: torch.Tensor, teacher_BK: torch.Tensor, batch: Batch) -> torch.Tensor:
        return (student_BK - teacher_BK).square().sum(-1) * (1 + batch.labels_B)

    result = step_with(heads, batch, output, config_of("callable", label_weight=0.5, teacher_weight=0.25), squared)
    expected_B = (heads.dist_BK - teacher_BK).square().sum(-1) * torch.tensor([1, 2, 3])
    torch.testing.assert_close(result.teacher_loss, expected_B.mean())
    torch.testing.assert_close(result.loss, 0.5 * result.label_loss + 0.25 * result.teacher_loss)
    with pytest.raises(ValueError, match="needs the function"):
        step_with(heads, batch, output, config_of("callable"))
    with pytest.raises(UserError, match=r"returned a tensor of shape \(\) for 3 images: return one loss per image"):
        step_with(heads, batch, output, config_of("callable"), lambda *arguments: squared(*arguments).mean())
    with pytest.raises(UserError, match="returned float for 3 images: return one loss per image"):
        step_with(heads, batch, output, config_of("callable"), lambda *_: 1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="has no gradient"):
        step_with(heads, batch, output, config_of("callable"), lambda *arguments: squared(*arguments).detach())


@given(st.integers(2, 12), st.floats(0.5, 10.0), st.integers(0, 10_000))
def test_soft_is_zero_only_for_the_teachers_own_distribution(classes: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(1, classes, generator=generator)
    assert soft(teacher + 5.0, teacher, temperature).item() == pytest.approx(0, abs=1e-4)
    other = teacher.clone()
    other[0, 0] += 2.0
    assert soft(other, teacher, temperature).item() > 1e-4


def test_soft_gradient_does_not_fade_with_temperature() -> None:
    """That is what the factor tau^2 is for (Hinton et al. 2015, section 2.1)."""
    teacher = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    norms = []
    for temperature in (1.0, 20.0):
        student = torch.zeros(4, 10, requires_grad=True)
        soft(student, teacher, temperature).sum().backward()
        norms.append(student.grad.norm().item())
    assert norms[1] / norms[0] == pytest.approx(1.0, abs=0.3)


def test_gradient_ratio_is_that_of_the_weighted_terms() -> None:
    heads, output = Heads(torch.randn(3, 4), torch.randn(3, 4)), TeacherOutput(torch.tensor([1, 2, 3]), None)
    config, batch = LossConfig(distillation="hard", label_weight=0.2, teacher_weight=0.8), batch_of([0, 1, 2])
    leaves = [head.clone().requires_grad_() for head in heads]
    terms = terms_of(Heads(*leaves), batch, output, config)
    (0.2 * terms.label + 0.8 * terms.teacher).backward()
    expected = leaves[1].grad.norm() / leaves[0].grad.norm()
    zero = torch.zeros(())
    result = StepResult(zero, zero, zero, heads, batch, output)
    torch.testing.assert_close(gradient_ratio(result, plan_of(config)), expected)


@given(st.integers(3, 12), st.floats(-100, 100), st.floats(0.01, 100), st.integers(0, 10_000))
def test_zscore_sees_neither_shift_nor_scale(classes: int, shift: float, scale: float, seed: int) -> None:
    student, teacher = torch.randn(2, 5, classes, generator=torch.Generator().manual_seed(seed))
    loss = zscore(student, teacher, 2.0)
    torch.testing.assert_close(zscore(scale * student + shift, teacher, 2.0), loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(zscore(student, scale * teacher + shift, 2.0), loss, rtol=1e-3, atol=1e-3)


def test_standardised_rows_have_mean_0_and_deviation_1_and_constants_are_0() -> None:
    rows = torch.tensor([[1.0, 2.0, 6.0], [-4e4, -4e4, -4e4], [0.1, 0.1, 0.1]])
    z = standardised(rows)
    torch.testing.assert_close(z[0].mean(), torch.tensor(0.0))
    torch.testing.assert_close(z[0].square().mean(), torch.tensor(1.0))
    assert not z[1:].any()


EXTREMES = {
    "zeros": (torch.zeros(3, 5), torch.zeros(3, 5)),
    "constants": (torch.full((3, 5), 1e4), torch.full((3, 5), -0.1)),
    "constant student": (torch.full((3, 5), 0.1), 5 * torch.eye(3, 5)),
    "constant teacher": (5 * torch.eye(3, 5), torch.full((3, 5), 0.1)),
    "huge and opposed": (1e4 * torch.eye(3, 5), -1e4 * torch.eye(3, 5)),
    "identical": (1e4 * torch.eye(3, 5), 1e4 * torch.eye(3, 5)),
    "identical images": (torch.ones(3, 1) * torch.arange(5.0), torch.ones(3, 1) * torch.arange(5.0).flip(0)),
    "two classes": (
        torch.tensor([[1.0, -1.0], [3e3, 0.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 2.0], [-1e4, 1e4], [1.0, 0.0]]),
    ),
    "one image": (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[30.0, 2.0, 1.0]])),
}


@pytest.mark.parametrize("loss", ["soft", "zscore"])
@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_loss_and_gradient_are_finite_at_the_extremes(loss: str, case: str, temperature: float) -> None:
    student, teacher = EXTREMES[case][0].clone().requires_grad_(), EXTREMES[case][1]
    batch, output = batch_of([0, 1, 0][: len(student)]), TeacherOutput(teacher.argmax(-1), teacher)
    for weights in (torch.ones(len(student)), torch.zeros(len(student))):
        heads = Heads(torch.zeros_like(teacher), student)
        weighted = batch._replace(weight_B=weights)
        terms = terms_of(heads, weighted, output, config_of(loss, temperature=temperature))
        (gradient,) = torch.autograd.grad(terms.teacher, student)
        assert terms.teacher.isfinite()
        assert gradient.isfinite().all()
        assert weights.any() or (terms.teacher == 0 and not gradient.any())


@pytest.mark.parametrize("loss", ["soft", "zscore"])
def test_nothing_is_less_than_the_loss_of_the_teachers_own_logits(loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(16, 6, generator=generator)
    batch = batch_of([0, 1, 2, 3, 4, 5, 0, 1] * 2)

    def of(student: torch.Tensor) -> torch.Tensor:
        output = TeacherOutput(teacher.argmax(-1), teacher)
        return terms_of(Heads(student, student), batch, output, config_of(loss)).teacher

    own = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of(own), own)
    assert of(own).item() == pytest.approx(0, abs=1e-5)
    assert gradient.abs().max() < 1e-5
    for size in (0.1, 1.0, 10.0):
        other = teacher + size * torch.randn(16, 6, generator=generator)
        assert of(other) > 1e-4


@pytest.mark.parametrize("loss", ["soft", "zscore"])
def test_an_unreadable_image_counts_nothing_in_any_loss(loss: str) -> None:
    teacher = torch.tensor(TEACHER_BK)
    student = torch.tensor(STUDENT_BK).requires_grad_()
    whole, config = batch_of([0, 1, 3]), config_of(loss)
    two = Batch(*(None if part is None else part[:2] for part in whole))
    output = TeacherOutput(teacher.argmax(-1)[:2], teacher[:2])
    alone = terms_of(Heads(student[:2], student[:2]), two, output, config)
    (expected,) = torch.autograd.grad(alone.teacher, student)
    batch = whole._replace(weight_B=torch.tensor([1.0, 1.0, 0.0]))
    output = TeacherOutput(teacher.argmax(-1), teacher)
    terms = terms_of(Heads(student, student), batch, output, config, global_size=2)
    (gradient,) = torch.autograd.grad(terms.teacher, student)
    torch.testing.assert_close(terms.teacher, alone.teacher)
    torch.testing.assert_close(gradient, expected)


# ---------------------------------------------------------------------------------------- binary cross-entropy


def multi_hot(labels: list[int], partners: list[int], shares: list[float], classes: int) -> torch.Tensor:
    """Targets as the published code has them: whatever has a share above 0 is right."""
    own, partner = (F.one_hot(torch.tensor(of), classes).float() for of in (labels, partners))
    share_B1 = torch.tensor(shares)[:, None]
    return (share_B1 * own + (1 - share_B1) * partner).gt(0).float()


def test_bce_by_hand() -> None:
    """Logits (ln 3, 0): sigmoids 3/4, 1/2."""
    logits, zero, one = torch.tensor([[LN3, 0.0]]), torch.tensor([0]), torch.tensor([1])
    assert bce(logits, zero, zero, torch.ones(1)).item() == pytest.approx(-math.log(0.75) - math.log(0.5))
    assert bce(logits, one, one, torch.ones(1)).item() == pytest.approx(-math.log(0.25) - math.log(0.5))
    for share in (1e-6, 0.5, 0.999):  # both are right, whatever their shares
        mixed = bce(logits, zero, one, torch.tensor([share])).item()
        assert mixed == pytest.approx(-math.log(0.75) - math.log(0.5))


def test_bce_is_torchs_for_every_label_that_has_a_share() -> None:
    labels, partners, shares = [0, 0, 1, 2, 2, 3], [1, 2, 1, 2, 3, 3], [0.3, 1.0, 0.6, 1.0, 0.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    logits_BK = torch.randn(6, 4, generator=generator) * 5
    expected = F.binary_cross_entropy_with_logits(
        logits_BK, multi_hot(labels, partners, shares, 4), reduction="none"
    ).sum(1)
    found = bce(logits_BK, torch.tensor(labels), torch.tensor(partners), torch.tensor(shares))
    torch.testing.assert_close(found, expected)


def test_bce_of_large_logits_is_finite() -> None:
    logits_BK = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = bce(logits_BK, torch.tensor([1]), torch.tensor([1]), torch.ones(1)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(2e4, rel=1e-3)
    torch.testing.assert_close(logits_BK.grad, torch.tensor([[1.0, -1.0, 0.5]]))


def test_bce_is_in_nats_per_image_and_a_mean_over_classes_is_a_weight() -> None:
    """torch's own mean, which the published code takes, is over images and classes."""
    batch = batch_of([0, 1, 3], [1, 1, 2], [0.4, 1.0, 0.5])
    heads = Heads(torch.tensor(STUDENT_BK), None)
    targets_BK = multi_hot([0, 1, 3], [1, 1, 2], [0.4, 1.0, 0.5], 4)
    published = F.binary_cross_entropy_with_logits(heads.cls_BK, targets_BK)
    config = config_of("none", label_loss="bce", label_smoothing=0.0)
    torch.testing.assert_close(step_with(heads, batch, None, config).loss, 4 * published)
    config = config_of("none", label_loss="bce", label_smoothing=0.0, label_weight=1 / 4)
    torch.testing.assert_close(step_with(heads, batch, None, config).loss, published)


def test_bce_beside_a_teacher_changes_the_label_term_alone() -> None:
    batch = batch_of([0, 1, 3])
    heads = Heads(torch.tensor(STUDENT_BK), torch.tensor(TEACHER_BK))
    output = TeacherOutput(torch.tensor([0, 1, 3]), torch.tensor(TEACHER_BK))
    settings = {"label_smoothing": 0.0, "label_weight": 0.25, "teacher_weight": 2.0}
    plain = step_with(heads, batch, output, config_of("hard", **settings))
    binary = step_with(heads, batch, output, config_of("hard", label_loss="bce", **settings))
    torch.testing.assert_close(binary.teacher_loss, plain.teacher_loss)
    expected = bce(heads.cls_BK, batch.labels_B, batch.partner_labels_B, batch.lam_B).mean()
    torch.testing.assert_close(binary.label_loss, expected)
    torch.testing.assert_close(binary.loss, 0.25 * expected + 2.0 * plain.teacher_loss)


def test_a_second_class_token_learns_labels_by_bce_too() -> None:
    batch, heads = batch_of([0, 1, 3]), Heads(torch.tensor(STUDENT_BK), torch.tensor(TEACHER_BK))
    config = config_of("none", label_loss="bce", label_smoothing=0.0, distil="labels")
    result = step_with(heads, batch, None, config)
    expected = bce(torch.tensor(TEACHER_BK), batch.labels_B, batch.partner_labels_B, batch.lam_B).mean()
    torch.testing.assert_close(result.teacher_loss, expected)


@pytest.mark.parametrize("loss", ["hard", "soft", "zscore"])
def test_unequal_shares_of_a_batch_sum_to_its_mean(loss: str) -> None:
    """Three images in two processes, two and one: the mean over three images, not the mean of two means. `train_step`
    multiplies by the number of processes, by which the averaging of gradients divides."""
    teacher, student = torch.tensor(TEACHER_BK), torch.tensor(STUDENT_BK)
    whole, config = batch_of([0, 1, 3]), config_of(loss)

    def total(part: slice) -> torch.Tensor:
        output = TeacherOutput(teacher[part].argmax(-1), teacher[part])
        batch = Batch(*(None if tensor is None else tensor[part] for tensor in whole))
        terms = terms_of(Heads(student[part], student[part]), batch, output, config, global_size=3)
        plan = plan_of(config)
        return plan.label_weight * terms.label + plan.teacher_weight * terms.teacher

    together = total(slice(0, 3))
    torch.testing.assert_close(total(slice(0, 2)) + total(slice(2, 3)), together)
    assert (total(slice(0, 2)) * 3 / 2 + total(slice(2, 3)) * 3) / 2 != pytest.approx(together.item(), rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_is_asked_of_an_image_without_a_label(smoothing: float) -> None:
    """Only what its partner brings, with the partner's share; its gradient is 0 where that has no label either."""
    logits = torch.tensor([*STUDENT_BK, STUDENT_BK[0]], requires_grad=True)
    labels, partners, shares = (
        torch.tensor([-1, -1, 2, 1]),
        torch.tensor([-1, 3, -1, 1]),
        torch.tensor([0.7, 0.6, 0.25, 1.0]),
    )
    loss_B = cross_entropy(logits, labels, partners, shares, smoothing)
    whole_B = [cross_entropy(logits[k : k + 1], *(torch.tensor([n]) for n in (c, c)), torch.ones(1), smoothing).item()
               for k, c in enumerate((0, 3, 2, 1))]  # fmt: skip
    assert loss_B.tolist() == pytest.approx([0, 0.4 * whole_B[1], 0.25 * whole_B[2], whole_B[3]], rel=1e-5)
    loss_B.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()


def test_binary_cross_entropy_skips_images_of_which_a_label_is_not_known() -> None:
    logits = torch.tensor([*STUDENT_BK, STUDENT_BK[0]])
    labels, partners, shares = (
        torch.tensor([-1, 1, 1, 0]),
        torch.tensor([2, -1, -1, 2]),
        torch.tensor([0.5, 0.5, 1.0, 0.0]),
    )
    loss_B = bce(logits, labels, partners, shares)
    known_B = bce(logits, torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 2]), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert loss_B.tolist() == pytest.approx([0, 0, known_B[2].item(), known_B[3].item()])


# ------------------------------------------------------------------------------------------ a function through dk.train


def test_dk_train_distills_by_a_function_and_resumes_only_with_it(tmp_path: Path, cnn: Path) -> None:
    shapes = set()

    def squared(student_BK: torch.Tensor, teacher_BK: torch.Tensor, batch: Batch) -> torch.Tensor:
        shapes.add((student_BK.shape, teacher_BK.shape, batch.labels_B.shape, teacher_BK.requires_grad))
        return (student_BK.softmax(-1) - teacher_BK.softmax(-1)).square().sum(-1)

    settings = {"teacher": str(cnn), "student": "deit_pico", "steps": 2, "batch_size": 16, "workers": 0}
    quiet = SilentProgress()
    dk.train("digits", out=tmp_path / "run", distillation=squared, progress=quiet, **settings)
    assert shapes
    for student_size, teacher_size, labels_size, has_gradient in shapes:
        assert student_size == teacher_size == (*labels_size, 10)
        assert not has_gradient
    assert load_yaml(tmp_path / "run" / "config.yaml")["loss"]["distillation"] == "callable"
    zero = dk.train(
        "digits", out=tmp_path / "zero", distillation=lambda own, *_: 0 * own.sum(-1), progress=quiet, **settings
    )
    weights = [load_file(run / "model" / "model.safetensors") for run in (tmp_path / "run", zero.path)]
    assert not torch.equal(weights[0]["head_dist.weight"], weights[1]["head_dist.weight"])
    with pytest.raises(UserError, match=r"distillation: callable: give the loss function to dk\.train"):
        dk.train("digits", out=tmp_path / "run", distillation="callable", resume=True, progress=quiet, **settings)
    with pytest.raises(UserError, match=r"distillation: callable: give the loss function to dk\.train"):
        dk.train("digits", out=tmp_path / "run", resume=True, progress=quiet, **settings)
    with pytest.raises(UserError, match=r"was started with loss\.distillation = 'callable', now it is 'soft'"):
        dk.train("digits", out=tmp_path / "run", distillation="soft", resume=True, progress=quiet, **settings)
    dk.train("digits", out=tmp_path / "run", distillation=squared, resume=True, progress=quiet, **settings)
