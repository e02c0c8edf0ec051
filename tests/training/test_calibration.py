"""Heads scaled to what they get right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import deitkit as dk
from deitkit.config import DataConfig
from deitkit.data import load_data
from deitkit.models.cnn import CNNConfig
from deitkit.models.network import Heads, Network
from deitkit.models.start import find_init
from deitkit.models.vit import ViT
from deitkit.models.zoo import STUDENTS, load_model, student_preprocessing
from deitkit.terminal import UserError
from deitkit.training.evaluate import SplitLogits, calibrate, fit_scale, score, split_logits_of_network

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_the_size_of_logits_that_labels_were_drawn_from_is_found_again(size: float, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    true_NK = 2 * torch.randn(40_000, classes, generator=generator)
    labels_N = torch.multinomial(true_NK.softmax(-1), 1, generator=generator)[:, 0]
    assert fit_scale(true_NK / size, labels_N) == pytest.approx(size, rel=0.05)


def test_labels_are_nowhere_likelier() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_NK = torch.randn(5000, 7, generator=generator) + 3  # a constant added to all logits changes nothing
    labels_N = torch.randint(7, (5000,), generator=generator)
    labels_N[:2000] = logits_NK[:2000].argmax(-1)
    found = fit_scale(logits_NK, labels_N)

    def loss(scale: float) -> float:
        return F.cross_entropy(scale * logits_NK.double(), labels_N).item()

    assert loss(found) < min(loss(0.98 * found), loss(1.02 * found), loss(1.0))


def test_a_few_images_all_of_them_right_do_not_make_a_network_certain() -> None:
    """One image in eleven counts as wrong: at that confidence the scale stops, whatever the logits' size."""
    labels_N = torch.arange(9) % 3
    for size in (1.0, 40.0):
        logits_NK = size * F.one_hot(labels_N, 3).float()
        confidence_N = (fit_scale(logits_NK, labels_N) * logits_NK).softmax(-1).amax(-1)
        assert confidence_N.tolist() == pytest.approx([10 / 11] * 9, abs=1e-4)


def test_logits_without_difference_are_left_as_they_are() -> None:
    assert fit_scale(torch.full((4, 3), 2.0), torch.zeros(4, dtype=torch.long)) == 1.0


def test_logits_that_say_the_opposite_are_made_small_not_turned_round() -> None:
    labels_N = torch.arange(50) % 5
    assert fit_scale(-F.one_hot(labels_N, 5).float(), labels_N) == pytest.approx(0.01)


def test_logits_that_are_no_numbers_are_left_as_they_are() -> None:
    assert fit_scale(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), torch.tensor([0, 1])) == 1.0
    assert fit_scale(torch.tensor([[1.0, float("inf")], [0.0, 1.0]]), torch.tensor([0, 1])) == 1.0


@pytest.mark.parametrize("token", [True, False])
def test_only_heads_change_and_they_answer_what_is_returned(token: bool) -> None:
    data = load_data("digits", DataConfig())
    torch.manual_seed(0)
    config = STUDENTS["deit_pico"].model_copy(update={"classes": 10, "distillation_token": token})
    network = Network(ViT(config), student_preprocessing(config, photos=False)).eval()
    before = {name: tensor.clone() for name, tensor in network.body.state_dict().items()}
    split = data.open_split("val")
    uncalibrated = split_logits_of_network(network, split, CPU)
    answers, scales = calibrate(network, uncalibrated)
    assert len(scales) == (2 if token else 1)
    for name, tensor in network.body.state_dict().items():
        factor = {"head": scales[0], "head_dist": scales[-1]}.get(name.partition(".")[0], 1.0)
        assert torch.equal(tensor, before[name] * factor), name
    again = split_logits_of_network(network, split, CPU)
    for mine, theirs, first in zip(answers.heads, again.heads, uncalibrated.heads, strict=True):
        if mine is not None and theirs is not None and first is not None:
            torch.testing.assert_close(mine, theirs)
            assert torch.equal(mine.argmax(-1), first.argmax(-1))
    assert score(answers)["nll"] < score(uncalibrated)["nll"]


def drawn(seed: int) -> SplitLogits:
    """Two heads, equally good, that answer 200 images; the second one's logits are smaller."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.randint(10, (200,), generator=generator)
    heads = [torch.randn(200, 10, generator=generator) + 1.5 * F.one_hot(labels_N, 10) for _ in range(2)]
    return SplitLogits(Heads(heads[0], 0.5 * heads[1]), labels_N)


def test_calibration_never_lowers_the_fused_accuracy_and_calibrates_all_the_same() -> None:
    config = STUDENTS["deit_pico"].model_copy(update={"classes": 10})
    lowered = 0
    for seed in range(40):
        logits = drawn(seed)
        network = Network(ViT(config), student_preprocessing(config, photos=False)).eval()
        own = [fit_scale(head_NK, logits.labels_N) for head_NK in logits.heads if head_NK is not None]
        apart = Heads(logits.heads.cls_BK * own[0], logits.heads.dist_BK * own[1])  # type: ignore[operator]
        before, simply = score(logits), score(logits._replace(heads=apart))
        answers, scales = calibrate(network, logits)
        after = score(answers)
        assert after["top1"]["fused"] >= before["top1"]["fused"]
        assert after["nll"] <= before["nll"]
        costs = simply["top1"]["fused"] < before["top1"]["fused"]
        lowered += costs
        assert (scales[0] == scales[1]) if costs else (list(scales) == own)
    assert 3 <= lowered <= 37  # both happen


def test_a_convolutional_network_is_refused() -> None:
    from deitkit.models.cnn import build_cnn

    cnn = build_cnn(CNNConfig(name="cifar-resnet8", classes=3), image_size=(8, 8), pretrained=False)
    answers = split_logits_of_network(cnn.eval(), load_data("digits", DataConfig()).open_split("val"), CPU)
    with pytest.raises(TypeError, match="only a student's heads"):
        calibrate(cnn, answers)


def test_a_run_is_calibrated_unless_told_otherwise(tmp_path: Path) -> None:
    """Nothing else differs: neither the training nor what a head decides."""
    settings = {"steps": 30, "train_images": 200, "distil": "labels", "seed": 3}
    calibrated = dk.train("digits", out=tmp_path / "calibrated", **settings).summary
    plain = dk.train("digits", out=tmp_path / "plain", calibrate=False, **settings).summary
    network, card = load_model(tmp_path / "calibrated" / "model")
    raw, raw_card = load_model(tmp_path / "plain" / "model")
    assert raw_card.head_scales == ()
    assert len(card.head_scales) == 2
    assert min(abs(scale - 1) for scale in card.head_scales) > 0.01
    assert isinstance(network.body, ViT)
    assert isinstance(raw.body, ViT)
    assert torch.equal(network.body.head.weight, raw.body.head.weight * card.head_scales[0])
    assert torch.equal(network.body.norm.weight, raw.body.norm.weight)
    for head in ("cls", "dist"):
        assert calibrated["top1"][head] == plain["top1"][head]
    assert calibrated["nll"] < plain["nll"]
    evaluated = dk.evaluate(tmp_path / "calibrated")
    assert evaluated["nll"] == pytest.approx(calibrated["nll"], rel=1e-5)
    assert evaluated["top1"] == calibrated["top1"]
    went_on, began = find_init(str(tmp_path / "calibrated")).tensors, find_init(str(tmp_path / "plain")).tensors
    assert went_on.keys() == began.keys()
    for name, tensor in went_on.items():  # the next training begins with the heads as they were trained
        torch.testing.assert_close(tensor, began[name], rtol=1e-6, atol=0)
    card_file = tmp_path / "calibrated" / "model" / "model.json"
    for wrong in ([1.0], [1.0, 2.0, 3.0], [1.0, 0.0]):
        card_file.write_text(json.dumps({**json.loads(card_file.read_text()), "head_scales": wrong}))
        with pytest.raises(UserError, match="head_scales"):
            find_init(str(tmp_path / "calibrated"))
    last = json.loads((tmp_path / "calibrated" / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["event"] == "epoch"
    assert last["top1"]["cls"] == calibrated["top1"]["cls"]
