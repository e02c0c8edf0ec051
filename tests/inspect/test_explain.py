"""Maps against values by hand, and the explanation of a run's answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import deitkit as dk
from deitkit.cli import main
from deitkit.inspect.explain import (
    Attribution,
    Scores,
    View,
    deletion_and_insertion,
    explain_run,
    integrated_gradients,
    overlay,
    write_explanations,
)
from deitkit.models.network import Network
from deitkit.models.predict import Predictor
from deitkit.models.vit import ViT, ViTConfig, attention_rollout
from deitkit.models.zoo import ModelCard, student_preprocessing
from deitkit.terminal import UserError

CONFIG = ViTConfig(image_size=(8, 12), channels=1, classes=3, patch_size=(4, 4), width=16, depth=2, heads=2)


def view(image_1CHW: torch.Tensor) -> View:
    pixels_HWC = (255 * image_1CHW[0].permute(1, 2, 0)).byte().numpy()
    return View(pixels_HWC, image_1CHW, torch.zeros_like(image_1CHW))


@pytest.mark.parametrize("tokens", [2, 1])
def test_rollout_is_the_product_of_the_blocks_attentions(tokens: int) -> None:
    """Computed again with torch's own attention, whose weights it hands out."""
    torch.manual_seed(0)
    vit = ViT(CONFIG.model_copy(update={"distillation_token": tokens == 2})).eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight.mul_(20)
    network = Network(vit, student_preprocessing(vit.config, photos=False))
    images = torch.rand(2, 1, 8, 12)
    _, rollout = attention_rollout(network, images)
    expected = torch.eye(tokens + 6).expand(2, -1, -1)
    entering = list(vit.intermediates((images - network.preprocessing.mean[0]) / network.preprocessing.std[0]))
    for block, tokens_BTD in zip(vit.blocks, entering[:-1], strict=True):
        theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        theirs.in_proj_weight, theirs.in_proj_bias = block.attn.qkv.weight, block.attn.qkv.bias
        normed = block.norm1(tokens_BTD)
        weights = theirs(normed, normed, normed, average_attn_weights=True)[1]
        expected = (weights + torch.eye(tokens + 6)) / 2 @ expected
    shares = expected[:, :tokens, tokens:]
    assert rollout.shape == (2, tokens, 2, 3)
    torch.testing.assert_close(rollout.flatten(2), shares / shares.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert rollout.flatten(2).std(-1).min() > 1e-3  # else any map would do
    torch.testing.assert_close(rollout.sum((2, 3)), torch.ones(2, tokens))


def test_gradients_of_a_linear_logit_are_its_terms() -> None:
    weights = torch.zeros(1, 4, 4)
    weights[0, 0, 0], weights[0, 3, 3], weights[0, 0, 3] = 3.0, 1.0, -5.0
    logits = lambda images: torch.stack([(images * weights).sum((1, 2, 3)), images.sum((1, 2, 3))], 1)  # noqa: E731
    shares = integrated_gradients(logits, 0, view(torch.ones(1, 1, 4, 4)), (2, 2))
    torch.testing.assert_close(shares, torch.tensor([[0.75, 0.0], [0.0, 0.25]]))
    nothing = integrated_gradients(lambda images: -images.sum((2, 3)), 0, view(torch.ones(1, 1, 4, 4)), (2, 2))
    torch.testing.assert_close(nothing, torch.full((2, 2), 0.25))  # nothing speaks for the class


def test_deletion_and_insertion_by_hand() -> None:
    """The class is certain while the upper left cell is there, and out of the question without it."""
    logits = lambda images: torch.stack([200 * images[:, 0, 0, 0] - 100, torch.zeros(len(images))], 1)  # noqa: E731
    knows, ignores = torch.tensor([[1.0, 0.0], [0.1, 0.2]]), torch.tensor([[0.0, 0.3], [0.2, 0.1]])
    good, bad, random = deletion_and_insertion(logits, 0, [knows, ignores], view(torch.ones(1, 1, 8, 8)))
    assert good == pytest.approx((1 / 8, 7 / 8), abs=1e-6)  # of five stages the first one counts half
    assert bad == pytest.approx((7 / 8, 1 / 8), abs=1e-6)
    assert random.deletion + random.insertion == pytest.approx(1, abs=1e-6)
    shown: dict[str, Any] = {
        "title": "",
        "pixels_HWC": np.zeros((8, 8, 1), np.uint8),
        "class_name": "a",
        "weights_hw": np.ones((2, 2)) / 4,
    }
    mixed, half = Scores(good.deletion, bad.insertion), Scores(0.5, 0.5)
    verdicts = [Attribution(**shown, scores=scores, random=half).verdict for scores in (good, bad, mixed)]
    assert verdicts == ["better than a random order", *["no better than a random order"] * 2]


def test_a_map_over_an_image_is_bright_where_it_counts() -> None:
    shown = overlay(np.full((8, 8, 1), 100, np.uint8), np.array([[0.0, 0.0], [0.0, 1.0]]))
    assert shown.shape == (8, 8, 3)
    assert int(shown[7, 7].sum()) > int(shown[0, 0].sum())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cnn: Path) -> Path:
    out = tmp_path_factory.mktemp("explained") / "student"
    dk.train("digits", out=out, teacher=cnn, steps=30)
    return out


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "seven.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    return file


def test_a_run_explains_its_answers(
    run: Path, cnn: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(run), str(picture), str(picture), "--out", str(tmp_path / "why")]) == 0
    printed = capsys.readouterr().out
    assert "distillation head" in printed
    assert printed.count("better than a random order") == 2 * 5
    assert sorted(file.name for file in (tmp_path / "why").iterdir()) == [
        "explanations.json",
        "seven-2.png",
        "seven.png",
    ]
    first = json.loads((tmp_path / "why" / "explanations.json").read_text())[0]
    assert list(first["answers"]) == ["class head", "distillation head", "both, fused", "teacher"]
    for head, choice in {"class head": "cls", "distillation head": "dist", "both, fused": "fused"}.items():
        prediction = dk.load(run).predict(picture, head=choice, top=1)[0]  # type: ignore[arg-type]
        assert first["answers"][head] == {
            "class": prediction.classes[0],
            "probability": pytest.approx(prediction.probabilities[0], abs=1e-5),
        }
    teacher = dk.load(cnn).predict(picture, top=1)[0]
    assert first["answers"]["teacher"]["class"] == teacher.classes[0]
    assert [one["title"] for one in first["attributions"]] == [
        "class token: attention", "class head: gradients", "distillation token: attention", "distillation head: gradients",
        "teacher: gradients",
    ]  # fmt: skip
    for one in first["attributions"]:
        assert np.sum(one["weights"]) == pytest.approx(1, abs=1e-4)


def test_folders_and_patterns_are_their_images(cnn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "below/b.png"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "photos" / name, "PNG")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    for number, (path, names) in enumerate({"photos": ["a.png", "b.png"], "photos/*.png": ["a.png"]}.items()):
        out = tmp_path / f"why-{number}"
        assert main(["explain", str(cnn), str(tmp_path / path), "--out", str(out), "--json"]) == 0
        assert [Path(one["image"]).name for one in json.loads(capsys.readouterr().out)] == names
        assert sorted(file.name for file in out.glob("*.png")) == names
    assert main(["explain", str(cnn), str(tmp_path / "*.gif"), "--out", str(tmp_path / "why")]) == 2
    assert "no file matches this pattern" in capsys.readouterr().err


def test_pixels_and_a_network_without_tokens_are_explained_too(cnn: Path, tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    (found,) = dk.load(cnn).explain(pixels)
    assert list(found.answers) == ["class head"]
    assert [one.title for one in found.attributions] == ["class head: gradients"]
    assert [file.name for _, file in write_explanations([found], tmp_path)] == ["image.png"]
    assert (tmp_path / "explanations.json").is_file()


def test_pictures_do_not_overwrite_each_other_and_one_pixel_is_an_image(cnn: Path, tmp_path: Path) -> None:
    """The first image is called as the second one's picture would be."""
    for name in ("a-2.png", "a.png", "below/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((1, 1), 7, np.uint8)).save(tmp_path / name)
    found = explain_run(cnn, [tmp_path / name for name in ("a-2.png", "a.png", "below/a.png")])
    files = [file.name for _, file in write_explanations(found, tmp_path / "why")]
    assert files == ["a-2.png", "a.png", "a-3.png"]


def test_a_teacher_that_is_gone_is_left_out_and_said(run: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise UserError("teacher cnn: no such run")

    monkeypatch.setattr("deitkit.inspect.explain.teacher_of_run", gone)
    warned: list[str] = []
    (found,) = explain_run(run, [picture], warned.append)
    assert "teacher" not in found.answers
    assert warned == ["explained without the teacher: teacher cnn: no such run"]


def test_a_tape_that_is_gone_is_said(run: Path, picture: Path, tmp_path: Path) -> None:
    taught = shutil.copytree(run, tmp_path / "taught")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["teacher"] |= {"teacher": None, "tape": "no/tape"}
    (taught / "config.yaml").write_text(yaml.safe_dump(config))
    warned: list[str] = []
    list(explain_run(taught, [picture], warned.append))
    assert warned == ["explained without the teacher: no/tape: the tape of its outputs is not there any more"]


def test_what_is_no_image_is_left_out_and_named(
    run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    why, file = tmp_path / "why", tmp_path / "file"
    file.touch()
    assert main(["explain", str(run), str(tmp_path / "text.png"), str(picture), "--out", str(why)]) == 2
    assert "text.png: not an image of a known format (1 image left out)" in capsys.readouterr().err
    assert sorted(one.name for one in why.iterdir()) == ["explanations.json", "seven.png"]
    assert main(["explain", str(run), str(tmp_path / "none.png"), "--out", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()
    assert main(["explain", str(run), str(picture), "--out", str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("deit: error: ") for line in lines)
    with pytest.raises(UserError, match="not an image of a known format"):
        dk.load(run).explain(tmp_path / "text.png")


def test_a_small_image_is_explained_at_the_network_s_size(tmp_path: Path) -> None:
    """Each patch covers pixels of its own: an image of 4 pixels shown to a network of 2 x 3 patches of 4."""
    config = CONFIG.model_copy(update={"image_size": (8, 8), "channels": 3})
    preprocessing = student_preprocessing(config, photos=False)
    card = ModelCard(name="net", architecture=config, classes=("a", "b", "c"), preprocessing=preprocessing)
    torch.manual_seed(0)
    predictor = Predictor(Network(ViT(config), preprocessing), card, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    seen = View.of(predictor, pixels, preprocessing)
    assert seen.image_1CHW.shape == (1, 3, 8, 8)
    shown = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(predictor.network(seen.image_1CHW).cls_BK, predictor.network(shown).cls_BK)
