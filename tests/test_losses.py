"""Losses against numbers worked out by hand, and against the formulas of the paper and of its code."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from deitkit.config import LossConfig
from deitkit.losses import distillation_loss, gradient_ratio, hard_loss, label_loss, soft_loss
from deitkit.types import Answers, Batch, Heads

LN2, LN3 = math.log(2), math.log(3)


def batch_of(labels: list[int], partners: list[int] | None = None, shares: list[float] | None = None) -> Batch:
    labels_B = torch.tensor(labels)
    return Batch(
        images_BCHW=torch.zeros(len(labels), 1, 2, 2),
        labels_B=labels_B,
        partner_labels_B=labels_B if partners is None else torch.tensor(partners),
        label_share_B=torch.ones(len(labels)) if shares is None else torch.tensor(shares),
        weight_B=torch.ones(len(labels)),
        index_B=torch.arange(len(labels)),
        view_B=torch.zeros(len(labels), dtype=torch.long),
    )


def test_label_loss_by_hand() -> None:
    """Logits (ln 3, 0): probabilities 3/4, 1/4."""
    logits = torch.tensor([[LN3, 0.0]])
    one, zero = torch.tensor([1]), torch.tensor([0])
    assert label_loss(logits, zero, zero, torch.ones(1)).item() == pytest.approx(-math.log(0.75))
    mixed = label_loss(logits, zero, one, torch.tensor([0.25])).item()
    assert mixed == pytest.approx(-0.25 * math.log(0.75) - 0.75 * math.log(0.25))
    smoothed = label_loss(logits, zero, zero, torch.ones(1), smoothing=0.1).item()
    assert smoothed == pytest.approx(-0.95 * math.log(0.75) - 0.05 * math.log(0.25))


def test_hard_loss_by_hand() -> None:
    assert hard_loss(torch.tensor([[LN3, 0.0]]), torch.tensor([1])).item() == pytest.approx(math.log(4))


def test_soft_loss_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2) at temperature 1; at 2 the logits are halved first and KL is times 4."""
    teacher, student = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2)
    assert soft_loss(student, teacher, 1.0).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    p = 3**0.5 / (1 + 3**0.5)
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert soft_loss(student, teacher, 2.0).item() == pytest.approx(expected)


def test_label_loss_is_torchs_cross_entropy() -> None:
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    ours = label_loss(logits, labels, labels, torch.ones(8), smoothing=0.1).mean()
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_loss_is_the_papers_and_with_deit_reduction_the_official_codes(temperature: float) -> None:
    """The official code sums KL over classes *and* images, times tau^2, over the number of logits."""
    student, teacher = torch.randn(6, 11), torch.randn(6, 11)
    paper = sum(
        temperature**2 * F.kl_div((s / temperature).log_softmax(0), (t / temperature).softmax(0), reduction="sum")
        for s, t in zip(student, teacher, strict=True)
    )
    config = {"distillation": "soft", "temperature": temperature, "label_weight": 0.0, "teacher_weight": 1.0}
    heads, answers = Heads(torch.randn(6, 11), student), Answers(teacher.argmax(-1), teacher)
    batch = batch_of([0] * 6)
    ours = distillation_loss(heads, batch, answers, LossConfig(**config)).total
    torch.testing.assert_close(ours, paper / 6)
    official = distillation_loss(heads, batch, answers, LossConfig(**config, reduction="deit")).total
    torch.testing.assert_close(official, paper / (6 * 11))


def test_hard_distillation_is_the_papers_equation_3() -> None:
    heads, answers = Heads(torch.randn(6, 4), torch.randn(6, 4)), Answers(torch.randint(4, (6,)), None)
    batch = batch_of([0, 1, 2, 3, 0, 1])
    loss = distillation_loss(heads, batch, answers, LossConfig(distillation="hard", label_smoothing=0.0))
    paper = F.cross_entropy(heads.cls_BK, batch.labels_B) / 2 + F.cross_entropy(heads.dist_BK, answers.labels_B) / 2
    torch.testing.assert_close(loss.total, paper)


def test_teachers_decision_is_never_smoothed_and_labels_are() -> None:
    heads, answers = Heads(torch.randn(3, 4), torch.randn(3, 4)), Answers(torch.tensor([1, 2, 3]), None)
    batch = batch_of([0, 1, 2])
    smooth = distillation_loss(heads, batch, answers, LossConfig(distillation="hard", label_smoothing=0.3))
    sharp = distillation_loss(heads, batch, answers, LossConfig(distillation="hard", label_smoothing=0.0))
    assert torch.equal(smooth.teacher, sharp.teacher)
    assert not torch.equal(smooth.label, sharp.label)


def test_without_distillation_the_label_has_all_the_weight() -> None:
    heads = Heads(torch.randn(3, 4), None)
    terms = distillation_loss(heads, batch_of([0, 1, 2]), None, LossConfig(distillation="none"))
    assert torch.equal(terms.total, terms.label)
    assert terms.teacher == 0


def test_distil_head_cls_teaches_the_class_head() -> None:
    heads, answers = Heads(torch.randn(3, 4), None), Answers(torch.tensor([1, 2, 3]), None)
    config = LossConfig(distillation="hard", distil_head="cls")
    terms = distillation_loss(heads, batch_of([0, 1, 2]), answers, config)
    torch.testing.assert_close(terms.teacher, F.cross_entropy(heads.cls_BK, answers.labels_B))


def test_distil_target_labels_is_a_second_class_token() -> None:
    heads = Heads(torch.randn(3, 4), torch.randn(3, 4))
    config = LossConfig(distillation="none", distil_target="labels")
    batch = batch_of([0, 1, 2])
    terms = distillation_loss(heads, batch, None, config)
    torch.testing.assert_close(terms.teacher, F.cross_entropy(heads.dist_BK, batch.labels_B, label_smoothing=0.1))
    torch.testing.assert_close(terms.total, (terms.label + terms.teacher) / 2)


def test_unreadable_image_counts_nothing() -> None:
    heads, answers = Heads(torch.randn(2, 4), torch.randn(2, 4)), Answers(torch.tensor([1, 2]), None)
    config = LossConfig(distillation="hard")
    batch = batch_of([0, 1])._replace(weight_B=torch.tensor([1.0, 0.0]))
    changed = Heads(heads.cls_BK.clone(), heads.dist_BK.clone())
    changed.cls_BK[1], changed.dist_BK[1] = 100.0, -100.0
    assert torch.equal(
        distillation_loss(heads, batch, answers, config).total, distillation_loss(changed, batch, answers, config).total
    )


def test_missing_head_or_answers_are_refused() -> None:
    batch = batch_of([0])
    answers = Answers(torch.tensor([1]), None)
    with pytest.raises(ValueError, match="distillation token"):
        distillation_loss(Heads(torch.zeros(1, 2), None), batch, answers, LossConfig(distillation="hard"))
    two = Heads(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="needs a teacher's answers"):
        distillation_loss(two, batch, None, LossConfig(distillation="hard"))
    with pytest.raises(ValueError, match="logits"):
        distillation_loss(two, batch, answers, LossConfig(distillation="soft"))


@given(st.integers(2, 12), st.floats(0.5, 10.0), st.integers(0, 10_000))
def test_soft_loss_is_zero_only_for_the_teachers_own_distribution(classes: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(1, classes, generator=generator)
    assert soft_loss(teacher + 5.0, teacher, temperature).item() == pytest.approx(0, abs=1e-4)
    other = teacher.clone()
    other[0, 0] += 2.0
    assert soft_loss(other, teacher, temperature).item() > 1e-4


def test_soft_gradient_does_not_fade_with_temperature() -> None:
    """That is what the factor tau^2 is for (Hinton et al. 2015, section 2.1)."""
    teacher = torch.randn(4, 10)
    norms = []
    for temperature in (1.0, 20.0):
        student = torch.zeros(4, 10, requires_grad=True)
        soft_loss(student, teacher, temperature).sum().backward()
        norms.append(student.grad.norm().item())
    assert norms[1] / norms[0] == pytest.approx(1.0, abs=0.3)


def test_gradient_ratio_is_that_of_the_weighted_terms() -> None:
    heads, answers = Heads(torch.randn(3, 4), torch.randn(3, 4)), Answers(torch.tensor([1, 2, 3]), None)
    config = LossConfig(distillation="hard", label_weight=0.2, teacher_weight=0.8)
    batch = batch_of([0, 1, 2])
    leaves = [head.clone().requires_grad_() for head in heads]
    distillation_loss(Heads(*leaves), batch, answers, config).total.backward()
    expected = leaves[1].grad.norm() / leaves[0].grad.norm()
    torch.testing.assert_close(gradient_ratio(heads, batch, answers, config), expected)
