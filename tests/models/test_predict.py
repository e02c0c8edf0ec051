from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.fakes import HeldImages

from deitkit import cli
from deitkit.config import DataConfig, Preprocessing
from deitkit.data import Split, load_data
from deitkit.models.network import Heads, Network
from deitkit.models.predict import Predictor, fuse, load
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import ModelCard, save_model
from deitkit.terminal import UserError
from deitkit.training.evaluate import split_logits

CLASSES = ("cat", "dog", "owl")
HEADS = Heads(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]]))


def made(*, channels: int = 3, token: bool = True) -> tuple[Network, ModelCard]:
    torch.manual_seed(0)
    architecture = ViTConfig(
        image_size=(16, 16), patch_size=(8, 8), channels=channels, classes=3, width=16, depth=1, heads=2,
        distillation_token=token,
    )  # fmt: skip
    preprocessing = Preprocessing(image_size=(16, 16), mean=(0.5,) * channels, std=(0.25,) * channels, crop_pct=0.875)
    network = Network(ViT(architecture), preprocessing)
    for parameter in network.parameters():  # heads start at zero otherwise, and every answer is the same
        torch.nn.init.normal_(parameter, std=0.3)
    card = ModelCard(name="tiny", architecture=architecture, classes=CLASSES, preprocessing=preprocessing)
    return network, card


@pytest.fixture
def run(tmp_path: Path) -> Path:
    network, card = made()
    save_model(tmp_path / "run" / "model", network, card)
    return tmp_path / "run"


def photo(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_fused_is_the_mean_of_the_softmaxes_and_fused_logits_the_softmax_of_the_mean() -> None:
    cls, dist = HEADS.cls_BK.softmax(-1), HEADS.dist_BK.softmax(-1)  # type: ignore[union-attr]
    torch.testing.assert_close(fuse(HEADS, "cls"), cls)
    torch.testing.assert_close(fuse(HEADS, "dist"), dist)
    torch.testing.assert_close(fuse(HEADS, "fused"), (cls + dist) / 2)
    torch.testing.assert_close(fuse(HEADS, "fused_logits"), torch.tensor([[1.0, 2.0, 0.0]]).softmax(-1))
    assert not torch.allclose(fuse(HEADS, "fused"), fuse(HEADS, "fused_logits"), atol=0.02)


def test_fused_answers_are_probabilities() -> None:
    for choice in ("cls", "dist", "fused", "fused_logits"):
        torch.testing.assert_close(fuse(HEADS, choice).sum(-1), torch.ones(1))


def test_a_network_with_one_head_answers_with_it_and_has_no_dist() -> None:
    plain = Heads(HEADS.cls_BK, None)
    for choice in ("cls", "fused", "fused_logits"):
        torch.testing.assert_close(fuse(plain, choice), HEADS.cls_BK.softmax(-1))
    with pytest.raises(UserError, match="no distillation head"):
        fuse(plain, "dist")


def test_predictions_are_sorted_and_named(run: Path, tmp_path: Path) -> None:
    Image.fromarray(photo(0)).save(tmp_path / "a.png")
    first, second = load(run).predict([tmp_path / "a.png", photo(1)], top=2)
    assert first.name == str(tmp_path / "a.png")
    assert second.name == "image 1"
    for prediction in (first, second):
        assert len(prediction.classes) == len(prediction.probabilities) == 2
        assert prediction.probabilities[0] >= prediction.probabilities[1]
        assert set(prediction.classes) <= set(CLASSES)
    everything = load(run).predict(photo(1), top=10)[0]
    assert sum(everything.probabilities) == pytest.approx(1)
    assert set(everything.classes) == set(CLASSES)


def test_a_path_a_pillow_image_and_pixels_get_the_same_answer(run: Path, tmp_path: Path) -> None:
    pixels = photo(2)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    predictor = load(run)
    answers = [predictor.predict(image)[0] for image in (tmp_path / "a.png", Image.fromarray(pixels), pixels)]
    assert answers[0].probabilities == answers[1].probabilities == answers[2].probabilities


def test_a_pillow_image_is_turned_upright(run: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(2)).save(tmp_path / "a.png", exif=exif)
    predictor = load(run)
    with Image.open(tmp_path / "a.png") as image:
        turned = predictor.predict(image)[0]
    assert turned.probabilities == predictor.predict(tmp_path / "a.png")[0].probabilities
    assert turned.probabilities == predictor.predict(np.rot90(photo(2), -1))[0].probabilities
    assert turned.probabilities != predictor.predict(photo(2))[0].probabilities


def test_an_answer_does_not_depend_on_its_batch(run: Path) -> None:
    predictor = load(run)
    images = [photo(seed, 20 + seed, 30) for seed in range(5)]
    together = predictor.predict(images, batch_size=4)
    for image, prediction in zip(images, together, strict=True):
        alone = predictor.predict(image)[0]
        assert alone.classes == prediction.classes
        assert alone.probabilities == pytest.approx(prediction.probabilities, abs=1e-6)


def files(folder: Path, sizes: list[tuple[int, int]], channels: int) -> Split:
    """Images of these sizes in a folder of classes, as `deit evaluate` reads them."""
    for number, size in enumerate(sizes):
        (folder / CLASSES[number % 3]).mkdir(parents=True, exist_ok=True)
        pixels = photo(number, *size)
        Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(
            folder / CLASSES[number % 3] / f"{number:02}.png"
        )
    return load_data(str(folder), DataConfig()).open_split("train")


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["held", "small files", "photos"])
def test_evaluate_and_predict_prepare_an_image_to_the_same_bits(
    tmp_path: Path, kind: str, channels: int, crop_pct: float
) -> None:
    split: Split = HeldImages(12, (24, 24), channels)
    if kind != "held":
        split = files(
            tmp_path, [(24, 24)] * 12 if kind == "small files" else [(24, 24), (90, 90), (70, 40)] * 4, channels
        )
    network, card = made(channels=channels)
    network.preprocessing = network.preprocessing.model_copy(update={"crop_pct": crop_pct})
    card = card.model_copy(update={"preprocessing": network.preprocessing})
    seen: list[torch.Tensor] = []
    network.body.register_forward_pre_hook(lambda _, given: seen.extend(given[0].cpu()))
    evaluated = split_logits(network.eval(), split, network.preprocessing, torch.device("cpu"))
    of_evaluation = seen.copy()
    expected = fuse(evaluated.heads).sort(descending=True, stable=True).values.tolist()
    held = [split.read(position) for position in range(len(split))]
    for images in [held] if kind == "held" else [held, [split.name(position) for position in range(len(split))]]:
        seen.clear()
        predictions = Predictor(network, card, "cpu").predict(images)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, of_evaluation, strict=True))
        assert [list(prediction.probabilities) for prediction in predictions] == expected


def test_answers_are_those_of_the_evaluation_view() -> None:
    from deitkit.views.augment import center_view

    network, card = made()
    view = center_view(photo(3), (16, 16), 0.875, "bicubic")
    with torch.no_grad():
        heads = network.eval()(torch.from_numpy(view.copy()).permute(2, 0, 1)[None].float() / 255)
    expected = fuse(heads, "dist")[0].sort(descending=True).values.tolist()
    assert Predictor(network, card, "cpu").predict(photo(3), "dist")[0].probabilities == pytest.approx(expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_images_go_to_any_network(channels: int) -> None:
    predictor = Predictor(*made(channels=channels), "cpu")
    grey = photo(4)[..., 0]
    flat, deep = predictor.predict([grey, np.stack([grey] * 3, -1)])
    assert flat.probabilities == pytest.approx(deep.probabilities, abs=1e-4)
    assert len(predictor.predict([photo(5), grey[..., None]])) == 2


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_arrays_that_are_no_images_are_refused(run: Path, pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match="image 0: an array must be uint8 of shape"):
        load(run).predict(pixels)


def test_an_unreadable_image_is_named_and_the_rest_predicted(run: Path, tmp_path: Path) -> None:
    Image.fromarray(photo(0)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths = [tmp_path / "bad.png", tmp_path / "good.png", tmp_path / "gone.png"]
    named: list[str] = []
    found = load(run).predict(paths, on_unreadable=named.append)
    assert [prediction.name for prediction in found] == [str(tmp_path / "good.png")]
    assert [line.partition(": ")[0] for line in named] == [str(paths[0]), str(paths[2])]
    with pytest.raises(UserError, match=r"bad\.png"):
        load(run).predict(paths)


def test_how_large_an_image_may_be_is_said_and_can_be_set(run: Path, tmp_path: Path) -> None:
    Image.fromarray(photo(0)).save(tmp_path / "scan.png")
    pixels = photo(0).shape[0] * photo(0).shape[1]
    assert len(load(run).predict([tmp_path / "scan.png"], max_pixels=pixels)) == 1
    with pytest.raises(UserError, match=rf"scan\.png: too large \({pixels} pixels, --max-pixels is {pixels - 1}\)"):
        load(run).predict([tmp_path / "scan.png"], max_pixels=pixels - 1)


def test_load_takes_a_run_or_its_model_folder_and_names_what_is_missing(run: Path, tmp_path: Path) -> None:
    assert load(run).predict(photo(0)) == load(run / "model").predict(photo(0))
    with pytest.raises(UserError, match=r"is .*nowhere the folder of a finished run"):
        load(tmp_path / "nowhere")


def test_deit_predict_prints_json_csv_and_a_table(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(photo(0)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    expected = load(run).predict(path, top=2)[0]
    assert cli.main(["predict", str(run), path, "--top", "2", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == [expected.as_dict()]
    assert cli.main(["predict", str(run), path, "--top", "2", "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "image,rank,class,probability,answer"
    assert lines[1] == f"{path},1,{expected.classes[0]},{expected.probabilities[0]:.6f},{expected.classes[0]}"
    assert len(lines) == 3
    assert cli.main(["predict", str(run), path]) == 0
    assert expected.classes[0] in capsys.readouterr().out


def test_folders_patterns_and_lists_stand_for_their_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What exists is taken as it is, whatever signs are in its name."""
    odd = tmp_path / "a[1].png"
    files = [odd, tmp_path / "b.png", tmp_path / "below" / "c.png"]
    (tmp_path / "below").mkdir()
    for number, file in enumerate(files):
        Image.fromarray(photo(number)).save(file)
    names = lambda found: [one.name for one in found]  # noqa: E731
    network = load(run)
    assert names(network.predict(tmp_path)) == [str(file) for file in files]
    assert names(network.predict(str(tmp_path / "*.png"))) == [str(odd), str(files[1])]
    assert names(network.predict(str(tmp_path / "**" / "*.png"))) == [str(odd), str(files[1]), str(files[2])]
    assert names(network.predict(str(odd))) == [str(odd)]
    (tmp_path / "empty").mkdir()
    assert names(network.predict(str(tmp_path / "*"))) == [str(odd), str(files[1]), str(files[2])]
    assert sorted(names(network.predict(str(tmp_path / "**")))) == sorted(map(str, files))  # each once
    with pytest.raises(UserError, match="no file matches this pattern"):
        network.predict(str(tmp_path / "*.gif"))
    assert names(network.predict([tmp_path / "below", str(odd)])) == [str(files[2]), str(odd)]

    def listing(lines: bytes) -> int:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
        return cli.main(["predict", str(run), "-", "--format", "json"])

    assert listing(f"{files[1]}\n\n{odd}\r\n".encode()) == 0
    assert [row["image"] for row in json.loads(capsys.readouterr().out)] == [str(files[1]), str(odd)]
    # one that is missing is left out, whatever signs or bytes are in its name
    assert listing(f"{odd}\n{tmp_path}/gone[1].png\n".encode() + b"\xff.png\n" + b"x" * 99_999) == 2
    out, err = capsys.readouterr()
    assert [row["image"] for row in json.loads(out)] == [str(odd)]
    assert "(3 images left out)" in err
    for nothing in (b"", b"\n\n"):
        assert listing(nothing) == 2
        assert "standard input lists no image" in capsys.readouterr().err


def test_an_answer_below_the_least_confidence_is_none_of_these(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(photo(0)).save(tmp_path / "a.png")
    path, network = str(tmp_path / "a.png"), load(run)
    (sure,) = network.predict(path, top=2)
    best = sure.probabilities[0]
    assert network.predict(path, min_confidence=best)[0].answer == sure.classes[0]
    (unsure,) = network.predict(path, top=2, min_confidence=best + 1e-4)
    assert (unsure.answer, unsure.classes) == (None, sure.classes)
    assert unsure.as_text() == f"none of these ({sure.as_text()})"
    assert "<b>none of these</b>" in network.predict(path, min_confidence=1)._repr_html_()
    assert cli.main(["predict", str(run), path, "--min-confidence", "1", "--format", "csv", "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(",none of these")
    assert cli.main(["predict", str(run), path, "--min-confidence", "2"]) == 2
    with pytest.raises(UserError, match="min_confidence 2: give a probability, 0 to 1"):
        network.predict(path, min_confidence=2)


def test_deit_predict_names_unreadable_images_predicts_the_rest_and_exits_with_two(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(photo(0)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "worse.png").write_bytes(b"")
    assert cli.main(["predict", str(run), str(folder), "--format", "json"]) == 2
    out, err = capsys.readouterr()
    assert [row["image"] for row in json.loads(out)] == [str(folder / "good.png")]
    assert str(folder / "bad.png") in err.splitlines()[0]
    assert err.splitlines()[1].startswith(f"deit: error: {folder / 'worse.png'}: ")
    assert "(2 images left out)" in err
    assert len(err.splitlines()) == 2


def test_deit_predict_refuses_a_head_that_the_run_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "run" / "model", *made(token=False))
    Image.fromarray(photo(0)).save(tmp_path / "a.png")
    assert cli.main(["predict", str(tmp_path / "run"), str(tmp_path / "a.png"), "--head", "dist"]) == 2
    assert "no distillation head" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["I;16", "LA", "P", "1", "CMYK", "RGBA"])
def test_a_pillow_image_of_any_mode_is_read_by_the_rule_for_files(run: Path, tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (20, 30), np.uint16))
    image = grey if mode == "I;16" else Image.fromarray(photo(2)).convert(mode)
    image.save(tmp_path / "image.tiff")
    predictor = load(run)
    with Image.open(tmp_path / "image.tiff") as opened:
        (of_image,) = predictor.predict(opened)
    (of_file,) = predictor.predict(tmp_path / "image.tiff")
    assert of_image.probabilities == of_file.probabilities


def test_what_is_no_image_is_one_line(run: Path) -> None:
    predictor = load(run)
    for image in (Image.new("RGB", (0, 0)), Image.new("F", (4, 4))):
        with pytest.raises(UserError, match="image 0: "):
            predictor.predict([image])
    for wrong in ({"top": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match="give a whole number, at least 1"):
            predictor.predict(photo(1), **wrong)


def test_a_pipe_is_no_image_and_nobody_waits_for_it(run: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="it is no file but a folder, a pipe or a device"):
        load(run).predict(tmp_path / "pipe.png")


def test_a_very_long_image_takes_no_more_memory_than_others(run: Path) -> None:
    predictor = load(run)
    long = np.tile(photo(3, 1, 1000), (1, 3000, 1))  # a pixel high, scaled to the network's size: 100 million columns
    (prediction,) = predictor.predict(long)
    middle = long[:, 1_500_000 - 200 : 1_500_000 + 200]
    assert prediction.probabilities == pytest.approx(predictor.predict(middle)[0].probabilities, abs=1e-3)
