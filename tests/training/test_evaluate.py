"""Figures against counts made by hand."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from tests.fakes import HeldImages, Photos
from torch.nn import functional as F

from deitkit.config import Preprocessing
from deitkit.distill.teacher import teacher_from_callable
from deitkit.models.network import Heads, Network
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import student_preprocessing
from deitkit.terminal import UserError
from deitkit.training import evaluate
from deitkit.training.evaluate import (
    SplitLogits,
    balanced_accuracy,
    calibration_error,
    score,
    split_logits,
    split_logits_of_network,
    split_logits_of_teacher,
)
from deitkit.training.tables import coarseness, disappointment, result_table
from deitkit.views.augment import center_view

CPU = torch.device("cpu")
CONFIG = ViTConfig(image_size=(8, 8), channels=1, classes=10, patch_size=(4, 4), width=16, depth=3, heads=2)


def student(**changes: object) -> Network:
    config = CONFIG.model_copy(update=changes)
    return Network(ViT(config), student_preprocessing(config, photos=False))


def test_heads_are_scored_one_by_one_and_fused_two_ways() -> None:
    """One image of class 2. The class head is sure of 0, the distillation head likes 1 and 2; the mean of the
    probabilities is for 0, the mean of the logits for 1."""
    cls = torch.tensor([[0.98, 0.015, 0.005]]).log()
    dist = torch.tensor([[0.0001, 0.55, 0.4499]]).log()
    scores = score(SplitLogits(Heads(cls, dist), torch.tensor([1])))
    assert scores["top1"] == {"cls": 0.0, "dist": 1.0, "fused": 0.0, "fused_logits": 1.0}
    assert scores["heads_agree"] == 0.0
    assert scores["top5"]["cls"] == 1.0
    assert scores["nll"] == pytest.approx(-np.log((0.015 + 0.55) / 2), rel=1e-4)


def test_five_likeliest_of_seven() -> None:
    logits = torch.arange(7.0).flip(0).expand(3, 7)
    assert score(SplitLogits(Heads(logits, None), torch.tensor([0, 4, 5])))["top5"]["cls"] == pytest.approx(2 / 3)


def test_agreement_is_with_the_teacher_not_with_the_labels() -> None:
    logits = F.one_hot(torch.tensor([0, 1, 2, 2]), 3).float()
    teacher = torch.tensor([0, 1, 2, 0])
    scores = score(SplitLogits(Heads(logits, None), torch.zeros(4).long()), teacher)
    assert scores["agreement"]["cls"] == 0.75
    assert scores["agreement"]["dist"] is None
    assert scores["top1"]["cls"] == 0.25


def test_calibration_error_by_hand() -> None:
    """Two images at confidence 0.9, one right: |0.5 - 0.9|; two at 0.6, both right: |1 - 0.6|."""
    chances = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert calibration_error(chances, torch.tensor([0, 1, 0, 0])) == pytest.approx(0.4)


def test_calibration_error_has_fifteen_bins_and_knows_certainty() -> None:
    """Confidences 0.61 (right) and 0.65 (wrong) share one of 15 bins, not one of 20; one image at 1 and wrong counts whole."""
    chances = torch.tensor([[0.61, 0.39], [0.65, 0.35]])
    assert calibration_error(chances, torch.tensor([0, 1])) == pytest.approx(abs(0.39 - 0.65) / 2)
    assert calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == pytest.approx(1)


def test_calibrated_answers_have_no_error() -> None:
    chances = torch.tensor([[0.75, 0.25]] * 4)
    assert calibration_error(chances, torch.tensor([0, 0, 0, 1])) == pytest.approx(0)


def test_a_teacher_sees_the_middle_that_it_asks_for() -> None:
    seen: list[torch.Tensor] = []

    def network(images_BCHW: torch.Tensor) -> torch.Tensor:
        seen.append(images_BCHW)
        return torch.zeros(len(images_BCHW), 3)

    own = Preprocessing(image_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.5)
    teacher = teacher_from_callable(network, name="half", num_classes=3, preprocessing=own)
    photos = Photos(5)
    split_logits_of_teacher(teacher, photos, CPU)
    views = [torch.from_numpy(center_view(photos.read(k), (8, 8), 0.5)).permute(2, 0, 1) for k in range(5)]
    torch.testing.assert_close(torch.cat(seen)[:5], (torch.stack(views) / 255 - 0.5) / 0.5)


def test_unreadable_images_are_left_out_and_mode_is_put_back() -> None:
    network = student(channels=3)
    network.train()
    answers = split_logits_of_network(network, Photos(10, broken=frozenset({3})), CPU)
    assert len(answers.labels_N) == len(answers.heads.cls_BK) == 9
    assert answers.labels_N.tolist() == [index % 3 for index in range(10) if index != 3]
    assert network.training


def test_batch_statistics_do_not_move_while_a_student_is_evaluated() -> None:
    network = student(stem="conv").train()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    split_logits_of_network(network, HeldImages(20), CPU)
    assert before
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())


def test_token_cosine_starts_at_the_learned_embeddings() -> None:
    network = student()
    body = network.body
    with torch.no_grad():
        body.dist_token.copy_(body.cls_token)
    cosines = split_logits_of_network(network, HeldImages(20), CPU).token_cosine
    assert len(cosines) == 4
    assert cosines[0] == pytest.approx(1.0)
    with torch.no_grad():
        body.dist_token.neg_()
    assert split_logits_of_network(network, HeldImages(20), CPU).token_cosine[0] == pytest.approx(-1.0)


def test_token_cosine_of_the_last_layer_by_hand() -> None:
    network = student()
    split = HeldImages(6)
    images = torch.from_numpy(split.pixels_NHWC).permute(0, 3, 1, 2).float() / 255
    mean, std = network.preprocessing.mean[0], network.preprocessing.std[0]
    *_, tokens = network.body.intermediates((images - mean) / std)
    expected = F.cosine_similarity(tokens[:, 0], tokens[:, 1], dim=-1).mean().item()
    assert split_logits_of_network(network, split, CPU).token_cosine[-1] == pytest.approx(expected, abs=1e-6)


def test_token_cosines_are_of_the_images_that_can_be_read() -> None:
    network = student(channels=3)
    readable = split_logits_of_network(network, Photos(10, broken=frozenset({3})), CPU).token_cosine
    assert readable != split_logits_of_network(network, Photos(10), CPU).token_cosine
    everything = frozenset(range(10))
    alone = [
        split_logits_of_network(network, Photos(10, broken=everything - {k}), CPU).token_cosine
        for k in range(10)
        if k != 3
    ]
    assert readable == pytest.approx([sum(layer) / 9 for layer in zip(*alone, strict=True)], abs=1e-6)
    assert not any(block._forward_hooks for block in network.body.blocks)


def test_plain_networks_have_no_token_cosine() -> None:
    assert split_logits_of_network(student(distillation_token=False), HeldImages(4), CPU).token_cosine is None


def test_a_split_without_a_readable_image_has_no_score() -> None:
    split = Photos(3, broken=frozenset({0, 1, 2}))
    preprocessing = Preprocessing(image_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    network = lambda images: Heads(images.flatten(1)[:, :3], None)  # noqa: E731
    with pytest.raises(UserError, match=r"none of 3 images can be read, such as photo-0\.jpg"):
        split_logits(network, split, preprocessing, torch.device("cpu"))
    answers = split_logits(
        network, Photos(5, broken=frozenset({1, 4})), preprocessing, torch.device("cpu"), batch_size=2
    )
    assert (answers.unreadable, len(answers.labels_N)) == ((1, 4), 3)


@pytest.mark.parametrize("count", [1, 5, 145])
def test_processes_share_a_split_and_count_every_image_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, split, computed = student(channels=3), Photos(count, broken=frozenset({3})), []
    whole = split_logits_of_network(network, split, CPU)
    shares: list[list[object]] = []

    def keep(batches: list[object]) -> list[object]:
        shares.append(batches)
        computed.append(sum(len(batch[1]) for batch in batches))  # type: ignore[index]
        return [batch for share in shares for batch in share]

    monkeypatch.setattr(evaluate, "gather_object", keep)
    for rank in (0, 1):
        with contextlib.suppress(ValueError):  # the first of two has no image where there is only one
            together = split_logits_of_network(network, split, CPU, 0, (rank, 2))
    assert sum(computed) == count
    assert max(computed) - min(computed) <= 2
    assert torch.equal(together.labels_N, whole.labels_N)
    assert together.unreadable == whole.unreadable
    for ours, theirs in zip(together.heads, whole.heads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert together.token_cosine == pytest.approx(whole.token_cosine, abs=1e-6)


RESULT = {
    "n": 100,
    "model": "deit_photo",
    "largest_class": 0.2,
    "top1": {"cls": 0.8, "dist": 0.81, "fused": 0.82, "fused_logits": 0.8},
    "teacher": {"name": "lite0", "top1": 0.9, "params": 3_400_000, "macs": 385_000_000},
    "params": 2_900_000,
    "macs": 193_000_000,
    "seconds_per_image": {"student": 0.004, "teacher": 0.02},
}


def test_the_table_of_a_run_has_what_an_accuracy_is_compared_with_and_what_it_costs() -> None:
    columns, rows = result_table(RESULT)
    assert columns == ["network", "top-1 %", "± s.e.", "params", "GMAC", "images/s"]
    assert [row[0] for row in rows] == [
        *("largest class", "teacher lite0", "class head", "distillation head", "both, fused"),
    ]
    assert rows[1] == ["teacher lite0", "90.00", "3.00", "3.40 M", "0.385", "50"]  # sqrt(0.9 * 0.1 / 100)
    assert rows[0][1:3] == ["20.00", "4.00"]
    all_right = {**RESULT, "n": 12, "top1": {**RESULT["top1"], "fused": 1.0}}
    assert result_table(all_right)[1][-1][1:3] == ["100.00", "8.27"]  # sqrt(14 * 2 / 16**3)
    assert rows[-1][-3:] == ["2.90 M", "0.193", "250"]
    assert all(cell == "" for row in rows[2:-1] for cell in row[3:])
    plain = {**RESULT, "teacher": None, "top1": {"cls": 0.8, "dist": None, "fused": None, "fused_logits": None}}
    assert result_table(plain)[1] == [
        ["largest class", "20.00", "4.00", "", "", ""],
        ["deit_photo", "80.00", "4.00", "2.90 M", "0.193", "250"],
    ]


def test_balanced_accuracy_stands_beside_accuracy_where_classes_are_uneven() -> None:
    labels_N = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 3])  # no image of class 2
    assert balanced_accuracy(torch.zeros(10, dtype=torch.int64), labels_N) == pytest.approx(1 / 3)
    assert balanced_accuracy(torch.tensor([0] * 8 + [1, 2]), labels_N) == pytest.approx(2 / 3)
    heads = Heads(torch.eye(4)[[0] * 8 + [1, 2]], None)
    figures = score(SplitLogits(heads=heads, labels_N=labels_N), teacher_A=torch.tensor([0] * 9 + [-1]))
    assert figures["predicted_classes"] == 3
    assert figures["balanced"]["cls"] == pytest.approx(2 / 3)
    assert figures["balanced"]["teacher"] == pytest.approx(1 / 2)  # of the nine images that it could read
    assert (figures["largest_class"], figures["smallest_class"]) == (0.8, 0.1)
    columns, rows = result_table({**RESULT, "balanced": {"fused": 0.5, "teacher": 0.25}, "smallest_class": 0.1})
    assert [row[columns.index("balanced %")] for row in rows] == ["-", "25.00", "-", "-", "50.00"]
    assert "balanced %" not in result_table({**RESULT, "balanced": {"fused": 0.5}, "smallest_class": 0.15})[0]


def test_few_validation_images_are_said() -> None:
    assert coarseness(50) is None
    assert coarseness(8) == "8 validation images: one is 12.5 points; add some, or hold out more (--val-fraction 0.3)"


@pytest.mark.parametrize(
    ("fused", "teacher", "found"),
    [
        (0.2, 0.9, "no better than predicting the largest class"),
        (0.7, 0.9, "the teacher is 20.0 points more accurate than the student"),
        (0.82, 0.9, "the teacher is 8.0 points more accurate, which 100 images do not prove"),
        (0.87, 0.9, None),  # within what 100 images can tell
        (0.9, 0.8, None),
    ],
)
def test_a_student_that_is_not_worth_its_training_is_told(fused: float, teacher: float, found: str | None) -> None:
    result = {**RESULT, "top1": {**RESULT["top1"], "fused": fused}, "teacher": {"name": "T", "top1": teacher}}
    line = disappointment(result)
    assert (line is None) if found is None else (line is not None and found in line)
    assert "all images one class" in str(disappointment({**result, "predicted_classes": 1}))
    assert disappointment({**result, "predicted_classes": 2}) == line
