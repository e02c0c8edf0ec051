"""ONNX files: the same predictions as the network, from images as they are; and a gate that refuses what predicts otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tests.fakes import Photos

import deitkit as dk
from deitkit.cli import main
from deitkit.config import DataConfig, Preprocessing
from deitkit.data import load_data
from deitkit.deploy.onnx import _preprocessing_text, export_onnx, onnx_model, session_of, to_int8
from deitkit.deploy.parity import Gate, Parity, probabilities_of, write_parity
from deitkit.models.cnn import CNNConfig
from deitkit.models.network import Network
from deitkit.models.predict import Predictor, fuse, load
from deitkit.models.vit import ViT, ViTConfig, attention_rollout
from deitkit.models.zoo import ModelCard, build, save_model, student_preprocessing
from deitkit.terminal import Progress, UserError
from deitkit.views.augment import center_view

STUDENT = ViTConfig(
    image_size=(16, 16), channels=3, classes=3, patch_size=(8, 8), width=16, depth=1, heads=2, stem="residual"
)
SIZES = [(40, 30), (30, 40), (16, 16), (12, 50), (200, 133), (3, 1500)]


def predictor_of(architecture: ViTConfig | CNNConfig, preprocessing: Preprocessing) -> Predictor:
    classes = tuple("abcdefghij"[: architecture.classes])
    card = ModelCard(name="net", architecture=architecture, classes=classes, preprocessing=preprocessing)
    network = Network(ViT(architecture), preprocessing) if isinstance(architecture, ViTConfig) else build(card)
    return Predictor(network, card, "cpu")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_file_prepares_images_as_evaluation_does(interpolation: Any) -> None:
    """Pillow rounds after each direction, so that a level may differ by one or two (or more where it clips between them); of sizes and
    places nothing may."""
    from onnx import parser

    preprocessing = Preprocessing(
        image_size=(24, 16), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=0.75, interpolation=interpolation
    )
    session = session_of(parser.parse_model(_preprocessing_text(preprocessing)).SerializeToString())
    for number, (height, width) in enumerate(SIZES):
        coarse = np.random.default_rng(number).integers(64, 192, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        pixels = coarse.repeat(4, 0).repeat(4, 1)[:height, :width]
        expected = center_view(pixels, (24, 16), 0.75, interpolation)
        (found,) = session.run(None, {"images": pixels[None]})
        levels = np.round(255 * found[0].transpose(1, 2, 0))
        assert np.abs(levels - expected).max() <= 2, (height, width)


@pytest.fixture(scope="module")
def exported() -> tuple[Predictor, Any]:
    predictor = predictor_of(STUDENT, student_preprocessing(STUDENT, photos=True))
    return predictor, onnx_model(predictor.network, predictor.card, "fused")


def test_a_student_with_a_convolutional_stem_predicts_the_same(exported: tuple[Predictor, Any]) -> None:
    predictor, model = exported
    session = session_of(model.SerializeToString())
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["a", "b", "c"]
    parity = Gate(predictor, Photos(30), "fused", 0.0).compare(probabilities_of(session))
    assert (parity.images, parity.disagree, parity.kept) == (30, 0, True)
    assert parity.largest_difference < 0.01
    # a batch gives what its images give alone
    batch = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), dtype=np.uint8)
    (together,) = session.run(None, {"images": batch})
    alone = np.concatenate([session.run(None, {"images": batch[k : k + 1]})[0] for k in range(3)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-5)


def test_the_page_s_file_also_says_where_the_tokens_look() -> None:
    """As `deit explain` does, in int8 too but for rounding; the plain file does not."""
    config = STUDENT.model_copy(update={"image_size": (16, 24), "depth": 2, "width": 32, "stem": "patch"})
    torch.manual_seed(0)
    predictor = predictor_of(config, student_preprocessing(config, photos=False))
    for block in predictor.network.body.blocks:  # type: ignore[union-attr]
        block.attn.qkv.weight.data *= 20  # so that they look somewhere
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    views = np.stack([predictor.view(one) for one in pixels])
    heads, expected = attention_rollout(predictor.network, torch.from_numpy(views).permute(0, 3, 1, 2) / 255)
    assert expected.max() > 2 * expected.min()
    model = onnx_model(predictor.network, predictor.card, "fused", attention=True)
    session = session_of(model.SerializeToString())
    assert [one.name for one in session.get_outputs()] == ["probabilities", "attention"]
    probabilities, attention = session.run(None, {"images": pixels})
    assert attention.shape == (2, 2, 2, 3)
    np.testing.assert_allclose(attention, expected, atol=1e-4)
    np.testing.assert_allclose(probabilities, fuse(heads), atol=1e-4)
    gate = Gate(predictor, Photos(9), "fused", 1.0)
    rounded, _ = to_int8(model, Photos(9), 3, gate, Progress())
    _, attention = session_of(rounded.SerializeToString()).run(None, {"images": pixels})
    np.testing.assert_allclose(attention.sum((-1, -2)), 1, atol=1e-4)
    np.testing.assert_allclose(attention, expected, atol=0.2)  # such sharp maps are rounded hard


def test_the_gate_counts_what_another_network_predicts(exported: tuple[Predictor, Any], tmp_path: Path) -> None:
    predictor, _ = exported
    gate = Gate(predictor, Photos(20, broken=frozenset({3})), "fused", 0.1)
    assert len(gate.original_NK) == 19
    constant = lambda _images: np.array([[0.0, 0.0, 1.0]], np.float32)  # noqa: E731
    parity = gate.compare(constant)
    assert parity.disagree == int((gate.original_NK.argmax(1) != 2).sum())
    labels = np.delete(np.arange(20) % 3, 3)
    assert parity.accuracy == pytest.approx((labels == 2).mean())
    assert parity.original_accuracy == pytest.approx((gate.original_NK.argmax(1) == labels).mean())
    broken = gate.compare(lambda _images: np.array([[np.nan, 0.0, 1.0]], np.float32))
    assert (broken.disagree, broken.accuracy, broken.largest_difference) == (19, 0.0, np.inf)
    write_parity(tmp_path, broken, {"head": "fused"})
    strict = json.loads((tmp_path / "parity.json").read_text(), parse_constant=pytest.fail)
    assert (strict["largest_difference"], strict["disagree"], strict["kept"]) == (None, 19, False)
    with pytest.raises(UserError, match="none of 2 images can be read"):
        Gate(predictor, Photos(2, broken=frozenset({0, 1})), "fused")


@pytest.mark.parametrize(
    ("disagree", "accuracy", "kept"),
    [(2, 0.8, True), (3, 0.8, False), (0, 0.795, True), (0, 0.79, False), (1, 0.9, True)],
)
def test_the_gate_asks_for_agreement_and_accuracy(disagree: int, accuracy: float, kept: bool) -> None:
    parity = Parity(
        images=200, disagree=disagree, accuracy=accuracy, original_accuracy=0.8, largest_difference=0.1, allowed=0.01
    )
    assert parity.kept == kept


def test_a_teacher_becomes_a_file_that_names_its_accuracy(
    cnn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in float16. The README's lines work."""
    out = tmp_path / "onnx"
    assert main(["export", str(cnn), "--format", "onnx", "--precision", "float16", "--out", str(out)]) == 0
    assert "model.onnx: 0 of 145 images classified differently" in capsys.readouterr().err
    facts = json.loads((out / "parity.json").read_text())
    assert (facts["precision"], facts["head"], facts["kept"], facts["images"]) == ("float16", "cls", True, 145)
    assert facts["original_accuracy"] == pytest.approx(dk.load(cnn).summary["top1"]["cls"])
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (found,) = session.run(None, {"images": pixels[None, ..., None]})
    prediction = dk.load(cnn).predict(pixels, top=1)[0]
    assert found[0].max() == pytest.approx(prediction.probabilities[0], abs=0.02)
    assert "onnxruntime.InferenceSession" in (out / "README.md").read_text()
    assert main(["export", str(cnn), "--format", "onnx", "--out", str(out)]) == 2  # the folder is filled


def test_int8_leaves_float_what_is_needed_and_is_refused_where_that_is_not_enough(
    cnn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hidden channel that is always 1000, and that the next bias takes out again, changes nothing in float, and leaves the others no
    levels in int8. The last try is kept under another name, and the exit code says so."""
    files, parity = export_onnx(cnn, tmp_path / "good", precision="int8", max_disagreement=0.05)
    assert files[0] == "model.onnx"
    assert parity.kept
    card, outlier = load(cnn, "cpu").card, 1000.0
    config = ViTConfig(image_size=(8, 8), channels=1, classes=10, patch_size=(4, 4), width=16, depth=1, heads=2)
    preprocessing = student_preprocessing(config, photos=False)
    torch.manual_seed(0)
    network = Network(ViT(config), preprocessing).eval()
    body: Any = network.body
    first, _, second = body.blocks[0].mlp
    digits = load_data("digits", DataConfig()).open_split("val")
    images = torch.stack([torch.from_numpy(digits.read(k)).permute(2, 0, 1) / 255 for k in range(len(digits))])
    with torch.no_grad():
        for layer in (first, second):
            layer.weight *= 20  # so that the answer depends on the hidden channels
        first.weight[0], first.bias[0] = 0.0, 0.0  # gelu(0) is 0
        before = network(images)
        body.head.bias -= before.cls_BK.mean(0)
        body.head_dist.bias -= before.dist_BK.mean(0)
        before = network(images)
        first.bias[0] = outlier
        second.bias -= outlier * second.weight[:, 0]
        after = network(images)
    torch.testing.assert_close(after.cls_BK, before.cls_BK, atol=1e-3, rtol=0)
    assert len(after.cls_BK.argmax(1).unique()) > 3
    run = tmp_path / "run"
    changes = {"architecture": config, "preprocessing": preprocessing}
    save_model(run / "model", network, card.model_copy(update=changes))
    (run / "config.yaml").write_text("data: {location: digits}\n")
    command = ["export", str(run), "--format", "onnx", "--out", str(tmp_path / "bad")]
    assert main([*command, "--precision", "int8"]) == 1
    said = capsys.readouterr().err
    assert said.count("int8, in float ") == 4
    assert "it does not predict what the network predicts, so it is called rejected.onnx" in said
    assert (tmp_path / "bad" / "rejected.onnx").is_file()
    assert not (tmp_path / "bad" / "model.onnx").exists()


def test_what_only_onnx_has_is_refused_elsewhere(cnn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(cnn), "--format", "timm", "--precision", "int8", "--out", str(tmp_path / "out")]) == 2
    assert "--precision int8: not with --format timm" in capsys.readouterr().err
    assert main(["export", str(cnn), "--format", "onnx", "--head", "dist", "--out", str(tmp_path / "out")]) == 2
    assert "has one head: give --head cls" in capsys.readouterr().err
    assert (
        main(["export", str(cnn), "--format", "deit", "--max-disagreement", "0.5", "--out", str(tmp_path / "out")]) == 2
    )
    assert "--max-disagreement 0.5: not with --format deit" in capsys.readouterr().err
    with pytest.raises(UserError, match="unknown format 'onxx': did you mean onnx"):
        dk.export(cnn, out=tmp_path / "out", format="onxx")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
