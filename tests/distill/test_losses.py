"""Losses against numbers worked out by hand, and against the formulas of the paper and of its code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional as F

from deitkit.config import LossConfig
from deitkit.distill.losses import (
    TeacherOutput,
    bce_loss,
    correlation,
    dist_loss,
    distillation_loss,
    dkd_loss,
    gradient_ratio,
    hard_loss,
    label_loss,
    soft_loss,
    standardised,
    zscore_loss,
)
from deitkit.models.network import Heads
from deitkit.views.mixup import Batch

LN2, LN3 = math.log(2), math.log(3)
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


def test_zscore_loss_by_hand() -> None:
    """The teacher's first row has mean 3/4 and variance (13/4)^2 + ..., over four classes, so divided by 4."""
    z = [
        (np.array(rows) - np.mean(rows, 1, keepdims=True)) / np.std(rows, 1, keepdims=True)
        for rows in (STUDENT_BK, TEACHER_BK)
    ]
    assert z[1][0, 0] == pytest.approx((4 - 0.75) / math.sqrt((3.25**2 + 0.25**2 + 0.75**2 + 2.75**2) / 4))
    expected = [4 * divergence(softmax(q / 2), softmax(p / 2)) for p, q in zip(*z, strict=True)]
    ours = zscore_loss(torch.tensor(STUDENT_BK), torch.tensor(TEACHER_BK), 2.0)
    assert ours.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_loss_by_hand(temperature: float) -> None:
    """Correlations by numpy: of the rows, one an image; of the columns, whose mean is the same for all images."""
    p, q = (np.stack([softmax(np.array(row) / temperature) for row in rows]) for rows in (STUDENT_BK, TEACHER_BK))
    of_classes = np.mean([1 - np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(4)])
    expected = [temperature**2 * (1 - np.corrcoef(p[b], q[b])[0, 1] + of_classes) for b in range(3)]
    ours = dist_loss(torch.tensor(STUDENT_BK), torch.tensor(TEACHER_BK), temperature, torch.ones(3))
    assert ours.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 8.0), (4.0, 0.5)])
def test_dkd_loss_by_hand(temperature: float, beta: float) -> None:
    """From probabilities: (label, rest), and the rest scaled up to sum to 1."""
    expected, labels = [], [0, 2, 3]
    for row, said, label in zip(STUDENT_BK, TEACHER_BK, labels, strict=True):
        p, q = softmax(np.array(row) / temperature), softmax(np.array(said) / temperature)
        of_label = divergence(np.array([q[label], 1 - q[label]]), np.array([p[label], 1 - p[label]]))
        others = divergence(np.delete(q, label) / (1 - q[label]), np.delete(p, label) / (1 - p[label]))
        expected.append(temperature**2 * (of_label + beta * others))
    ours = dkd_loss(torch.tensor(STUDENT_BK), torch.tensor(TEACHER_BK), torch.tensor(labels), temperature, beta)
    assert ours.tolist() == pytest.approx(expected, rel=1e-5)


def test_dkd_is_soft_where_beta_is_what_the_teacher_leaves_to_the_others() -> None:
    """The paper's equation 5."""
    student, teacher = torch.tensor(STUDENT_BK[:1]), torch.tensor(TEACHER_BK[:1])
    left = 1 - (teacher / 2).softmax(-1)[0, 1].item()
    decoupled = dkd_loss(student, teacher, torch.tensor([1]), 2.0, left)
    torch.testing.assert_close(decoupled, soft_loss(student, teacher, 2.0))


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
    heads, answers = Heads(torch.randn(6, 11), student), TeacherOutput(teacher.argmax(-1), teacher)
    batch = batch_of([0] * 6)
    ours = distillation_loss(heads, batch, answers, LossConfig(**config)).total
    torch.testing.assert_close(ours, paper / 6)
    official = distillation_loss(heads, batch, answers, LossConfig(**config, reduction="deit")).total
    torch.testing.assert_close(official, paper / (6 * 11))


def test_hard_distillation_is_the_papers_equation_3() -> None:
    heads, answers = Heads(torch.randn(6, 4), torch.randn(6, 4)), TeacherOutput(torch.randint(4, (6,)), None)
    batch = batch_of([0, 1, 2, 3, 0, 1])
    loss = distillation_loss(heads, batch, answers, LossConfig(distillation="hard", label_smoothing=0.0))
    paper = F.cross_entropy(heads.cls_BK, batch.labels_B) / 2 + F.cross_entropy(heads.dist_BK, answers.labels_B) / 2
    torch.testing.assert_close(loss.total, paper)


def test_teachers_decision_is_never_smoothed_and_labels_are() -> None:
    heads, answers = Heads(torch.randn(3, 4), torch.randn(3, 4)), TeacherOutput(torch.tensor([1, 2, 3]), None)
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
    heads, answers = Heads(torch.randn(3, 4), None), TeacherOutput(torch.tensor([1, 2, 3]), None)
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
    heads, answers = Heads(torch.randn(2, 4), torch.randn(2, 4)), TeacherOutput(torch.tensor([1, 2]), None)
    config = LossConfig(distillation="hard")
    batch = batch_of([0, 1])._replace(weight_B=torch.tensor([1.0, 0.0]))
    changed = Heads(heads.cls_BK.clone(), heads.dist_BK.clone())
    changed.cls_BK[1], changed.dist_BK[1] = 100.0, -100.0
    assert torch.equal(
        distillation_loss(heads, batch, answers, config).total, distillation_loss(changed, batch, answers, config).total
    )


def test_missing_head_or_answers_are_refused() -> None:
    batch = batch_of([0])
    answers = TeacherOutput(torch.tensor([1]), None)
    with pytest.raises(ValueError, match="distillation token"):
        distillation_loss(Heads(torch.zeros(1, 2), None), batch, answers, LossConfig(distillation="hard"))
    two = Heads(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="needs a teacher's answers"):
        distillation_loss(two, batch, None, LossConfig(distillation="hard"))
    for loss in ("soft", "zscore", "dist", "dkd"):
        with pytest.raises(ValueError, match=f"{loss} distillation needs the teacher's logits"):
            distillation_loss(two, batch, answers, config_of(loss))


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
    teacher = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    norms = []
    for temperature in (1.0, 20.0):
        student = torch.zeros(4, 10, requires_grad=True)
        soft_loss(student, teacher, temperature).sum().backward()
        norms.append(student.grad.norm().item())
    assert norms[1] / norms[0] == pytest.approx(1.0, abs=0.3)


def test_gradient_ratio_is_that_of_the_weighted_terms() -> None:
    heads, answers = Heads(torch.randn(3, 4), torch.randn(3, 4)), TeacherOutput(torch.tensor([1, 2, 3]), None)
    config = LossConfig(distillation="hard", label_weight=0.2, teacher_weight=0.8)
    batch = batch_of([0, 1, 2])
    leaves = [head.clone().requires_grad_() for head in heads]
    distillation_loss(Heads(*leaves), batch, answers, config).total.backward()
    expected = leaves[1].grad.norm() / leaves[0].grad.norm()
    torch.testing.assert_close(gradient_ratio(heads, batch, answers, config), expected)


@given(st.integers(3, 12), st.floats(-100, 100), st.floats(0.01, 100), st.integers(0, 10_000))
def test_zscore_loss_sees_neither_shift_nor_scale(classes: int, shift: float, scale: float, seed: int) -> None:
    student, teacher = torch.randn(2, 5, classes, generator=torch.Generator().manual_seed(seed))
    loss = zscore_loss(student, teacher, 2.0)
    torch.testing.assert_close(zscore_loss(scale * student + shift, teacher, 2.0), loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(zscore_loss(student, scale * teacher + shift, 2.0), loss, rtol=1e-3, atol=1e-3)


def test_standardised_rows_have_mean_0_and_deviation_1_and_constants_are_0() -> None:
    rows = torch.tensor([[1.0, 2.0, 6.0], [-4e4, -4e4, -4e4], [0.1, 0.1, 0.1]])
    z = standardised(rows)
    torch.testing.assert_close(z[0].mean(), torch.tensor(0.0))
    torch.testing.assert_close(z[0].square().mean(), torch.tensor(1.0))
    assert not z[1:].any()
    weighted = standardised(rows, torch.tensor([1.0, 1.0, 0.0]))[0]
    assert weighted[:2].tolist() == pytest.approx([-1.0, 1.0])
    assert correlation(rows, rows).tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert correlation(rows, -rows).tolist() == pytest.approx([-1.0, 0.0, 0.0])


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


@pytest.mark.parametrize("loss", ["soft", "zscore", "dist", "dkd"])
@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_loss_and_gradient_are_finite_at_the_extremes(loss: str, case: str, temperature: float) -> None:
    student, teacher = EXTREMES[case][0].clone().requires_grad_(), EXTREMES[case][1]
    batch, answers = batch_of([0, 1, 0][: len(student)]), TeacherOutput(teacher.argmax(-1), teacher)
    for weights in (torch.ones(len(student)), torch.zeros(len(student))):
        heads = Heads(torch.zeros_like(teacher), student)
        terms = distillation_loss(
            heads, batch._replace(weight_B=weights), answers, config_of(loss, temperature=temperature)
        )
        (gradient,) = torch.autograd.grad(terms.teacher, student)
        assert terms.teacher.isfinite()
        assert gradient.isfinite().all()
        assert weights.any() or (terms.teacher == 0 and not gradient.any())


@pytest.mark.parametrize("loss", ["soft", "zscore", "dist", "dkd"])
def test_nothing_is_less_than_the_loss_of_the_teachers_own_logits(loss: str) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(16, 6, generator=generator)
    batch = batch_of([0, 1, 2, 3, 4, 5, 0, 1] * 2)

    def of(student: torch.Tensor) -> torch.Tensor:
        answers = TeacherOutput(teacher.argmax(-1), teacher)
        return distillation_loss(Heads(student, student), batch, answers, config_of(loss)).teacher

    own = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of(own), own)
    assert of(own).item() == pytest.approx(0, abs=1e-5)
    assert gradient.abs().max() < 1e-5
    for size in (0.1, 1.0, 10.0):
        other = teacher + size * torch.randn(16, 6, generator=generator)
        assert of(other) > 1e-4


@pytest.mark.parametrize("loss", ["soft", "zscore", "dist", "dkd"])
def test_an_unreadable_image_counts_nothing_in_any_loss(loss: str) -> None:
    """Neither its own answers nor its place in the batch, from which the correlations of `dist` are taken."""
    teacher = torch.tensor(TEACHER_BK)
    student = torch.tensor(STUDENT_BK).requires_grad_()
    whole, config = batch_of([0, 1, 3]), config_of(loss)
    two = Batch(*(part[:2] for part in whole))
    alone = distillation_loss(
        Heads(student[:2], student[:2]), two, TeacherOutput(teacher.argmax(-1)[:2], teacher[:2]), config
    )
    (expected,) = torch.autograd.grad(alone.teacher, student)
    batch = whole._replace(weight_B=torch.tensor([1.0, 1.0, 0.0]))
    terms = distillation_loss(
        Heads(student, student), batch, TeacherOutput(teacher.argmax(-1), teacher), config, batch_size=2
    )
    (gradient,) = torch.autograd.grad(terms.teacher, student)
    torch.testing.assert_close(terms.teacher, alone.teacher)
    torch.testing.assert_close(gradient, expected)


def test_the_label_of_dkd_is_the_one_with_the_greater_share() -> None:
    student, teacher = torch.tensor(STUDENT_BK), torch.tensor(TEACHER_BK)
    batch, config = batch_of([0, 1, 2], [3, 3, 3], [0.5, 0.3, 0.9]), config_of("dkd", temperature=2.0, dkd_beta=1.5)
    terms = distillation_loss(Heads(student, student), batch, TeacherOutput(teacher.argmax(-1), teacher), config)
    expected = dkd_loss(student, teacher, torch.tensor([0, 3, 2]), 2.0, 1.5)
    torch.testing.assert_close(terms.teacher, expected.mean())
    assert not torch.isclose(terms.teacher, dkd_loss(student, teacher, batch.labels_B, 2.0, 1.5).mean())


# Binary cross-entropy.


def multi_hot(labels: list[int], partners: list[int], shares: list[float], classes: int) -> torch.Tensor:
    """Targets as the published code has them: whatever has a share above 0 is right."""
    own, partner = (F.one_hot(torch.tensor(of), classes).float() for of in (labels, partners))
    share_B1 = torch.tensor(shares)[:, None]
    return (share_B1 * own + (1 - share_B1) * partner).gt(0).float()


def test_bce_by_hand() -> None:
    """Logits (ln 3, 0): sigmoids 3/4, 1/2."""
    logits, zero, one = torch.tensor([[LN3, 0.0]]), torch.tensor([0]), torch.tensor([1])
    assert bce_loss(logits, zero, zero, torch.ones(1)).item() == pytest.approx(-math.log(0.75) - math.log(0.5))
    assert bce_loss(logits, one, one, torch.ones(1)).item() == pytest.approx(-math.log(0.25) - math.log(0.5))
    for share in (1e-6, 0.5, 0.999):  # both are right, whatever their shares
        mixed = bce_loss(logits, zero, one, torch.tensor([share])).item()
        assert mixed == pytest.approx(-math.log(0.75) - math.log(0.5))


def test_bce_is_torchs_for_every_label_that_has_a_share() -> None:
    labels, partners, shares = [0, 0, 1, 2, 2, 3], [1, 2, 1, 2, 3, 3], [0.3, 1.0, 0.6, 1.0, 0.0, 0.0]
    generator = torch.Generator().manual_seed(0)
    logits_BK = torch.randn(6, 4, generator=generator) * 5
    expected = F.binary_cross_entropy_with_logits(
        logits_BK, multi_hot(labels, partners, shares, 4), reduction="none"
    ).sum(1)
    found = bce_loss(logits_BK, torch.tensor(labels), torch.tensor(partners), torch.tensor(shares))
    torch.testing.assert_close(found, expected)


def test_bce_of_large_logits_is_finite() -> None:
    logits_BK = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = bce_loss(logits_BK, torch.tensor([1]), torch.tensor([1]), torch.ones(1)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(2e4, rel=1e-3)
    torch.testing.assert_close(logits_BK.grad, torch.tensor([[1.0, -1.0, 0.5]]))


def test_bce_is_in_nats_per_image_or_as_published() -> None:
    """torch's own mean, which the published code takes, is over images and classes."""
    batch = batch_of([0, 1, 3], [1, 1, 2], [0.4, 1.0, 0.5])
    heads = Heads(torch.tensor(STUDENT_BK), None)
    targets_BK = multi_hot([0, 1, 3], [1, 1, 2], [0.4, 1.0, 0.5], 4)
    published = F.binary_cross_entropy_with_logits(heads.cls_BK, targets_BK)
    config = config_of("none", label_loss="bce", label_smoothing=0.0)
    torch.testing.assert_close(distillation_loss(heads, batch, None, config).total, 4 * published)
    config = config.model_copy(update={"bce_reduction": "mean"})
    torch.testing.assert_close(distillation_loss(heads, batch, None, config).total, published)


def test_bce_beside_a_teacher_changes_the_label_term_alone() -> None:
    batch = batch_of([0, 1, 3])
    heads = Heads(torch.tensor(STUDENT_BK), torch.tensor(TEACHER_BK))
    answers = TeacherOutput(torch.tensor([0, 1, 3]), torch.tensor(TEACHER_BK))
    settings = {"label_smoothing": 0.0, "label_weight": 0.25, "teacher_weight": 2.0}
    plain = distillation_loss(heads, batch, answers, config_of("hard", **settings))
    binary = distillation_loss(heads, batch, answers, config_of("hard", label_loss="bce", **settings))
    torch.testing.assert_close(binary.teacher, plain.teacher)
    expected = bce_loss(heads.cls_BK, batch.labels_B, batch.partner_labels_B, batch.lam_B).mean()
    torch.testing.assert_close(binary.label, expected)
    torch.testing.assert_close(binary.total, 0.25 * expected + 2.0 * plain.teacher)


def test_a_second_class_token_learns_labels_by_bce_too() -> None:
    batch, heads = batch_of([0, 1, 3]), Heads(torch.tensor(STUDENT_BK), torch.tensor(TEACHER_BK))
    config = config_of("none", label_loss="bce", label_smoothing=0.0, distil_target="labels")
    terms = distillation_loss(heads, batch, None, config)
    expected = bce_loss(torch.tensor(TEACHER_BK), batch.labels_B, batch.partner_labels_B, batch.lam_B).mean()
    torch.testing.assert_close(terms.teacher, expected)


@pytest.mark.parametrize("loss", ["hard", "soft", "zscore", "dkd"])
def test_unequal_shares_of_a_batch_sum_to_its_mean(loss: str) -> None:
    """Three images in two processes, two and one: the mean over three images, not the mean of two means. `train_step`
    multiplies by the number of processes, by which the averaging of gradients divides."""
    teacher, student = torch.tensor(TEACHER_BK), torch.tensor(STUDENT_BK)
    whole, config = batch_of([0, 1, 3]), config_of(loss)

    def total(part: slice) -> torch.Tensor:
        answers = TeacherOutput(teacher[part].argmax(-1), teacher[part])
        batch = Batch(*(tensor[part] for tensor in whole))
        return distillation_loss(Heads(student[part], student[part]), batch, answers, config, batch_size=3).total

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
    loss_B = label_loss(logits, labels, partners, shares, smoothing)
    whole_B = [label_loss(logits[k : k + 1], *(torch.tensor([n]) for n in (c, c)), torch.ones(1), smoothing).item()
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
    loss_B = bce_loss(logits, labels, partners, shares)
    known_B = bce_loss(
        logits, torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 2]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    )
    assert loss_B.tolist() == pytest.approx([0, 0, known_B[2].item(), known_B[3].item()])
