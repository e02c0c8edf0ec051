"""Students written for timm, transformers and the original DeiT: loaded by these, they give the same logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, safe_open
from tests.models.test_weights import DEIT3, PLAIN, SMALL, TOLERANCE, perturbed

import deitkit as dk
from deitkit.cli import main
from deitkit.config import Preprocessing
from deitkit.deploy import formats
from deitkit.deploy.formats import Format, export_weights
from deitkit.models.cnn import CNNConfig
from deitkit.models.network import Network, prepare
from deitkit.models.predict import load
from deitkit.models.start import find_init
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import STUDENTS, ModelCard, build, load_model, save_model
from deitkit.terminal import UserError
from deitkit.views.augment import center_view

WIDE = ViTConfig(
    image_size=(16, 24), channels=1, classes=5, patch_size=(4, 2), width=48, depth=2, heads=3, mlp_ratio=2.5
)
SCALED = SMALL.model_copy(update={"layer_scale": 0.1})
UNPLACED = PLAIN.model_copy(update={"position_of_prefix": False})
CONV = SMALL.model_copy(update={"stem": "conv"})
FINE = SMALL.model_copy(update={"norm_epsilon": 1e-12})


def run_of(folder: Path, config: ViTConfig, **preprocessing: Any) -> Path:
    """The folder of a finished run with nothing but its model, of which every tensor is perturbed."""
    own = Preprocessing(
        **{
            "image_size": config.image_size,
            "mean": (0.4, 0.5, 0.6)[: config.channels],
            "std": (0.2, 0.3, 0.1)[: config.channels],
            "crop_pct": 0.9,
            "interpolation": "bilinear",
            **preprocessing,
        }
    )
    torch.manual_seed(3)
    classes = tuple(f"class {number}" for number in range(config.classes))
    card = ModelCard(name="small", architecture=config, classes=classes, preprocessing=own)
    save_model(folder / "model", Network(perturbed(ViT(config)), own), card)
    return folder


def images_of(config: ViTConfig) -> torch.Tensor:
    shape = (3, config.channels, *config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def close(theirs: list[torch.Tensor], run: Path, images: torch.Tensor) -> bool:
    """Whether each head gives the logits of the run's, which are far apart themselves."""
    with torch.no_grad():
        ours = [head for head in load_model(run / "model")[0].body(images) if head is not None]
    assert len(ours) == len(theirs)
    assert all(head.std() > 0.1 for head in ours)
    return all((mine - other).abs().max() < TOLERANCE for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "config",
    [SMALL, PLAIN, DEIT3, SCALED, UNPLACED, WIDE],
    ids=["deit", "plain", "deit3", "scaled", "unplaced", "wide"],
)
@torch.no_grad()
def test_timm_loads_the_folder_and_gives_our_logits(tmp_path: Path, config: ViTConfig) -> None:
    run, out = run_of(tmp_path / "run", config), tmp_path / "out"
    assert export_weights(run, out, "timm")[0] == ["README.md", "config.json", "model.safetensors"]
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True)
    images = images_of(config)
    if config.distillation_token:
        theirs.train().set_distilled_training(True)
        assert close(list(theirs(images)), run, images)
        cls_BK, dist_BK = load_model(run / "model")[0].body(images)
        torch.testing.assert_close(theirs.eval()(images), (cls_BK + dist_BK) / 2)
    else:
        assert close([theirs.eval()(images)], run, images)


def test_timm_sees_images_as_we_do(tmp_path: Path) -> None:
    export_weights(run_of(tmp_path / "run", SMALL), tmp_path / "out", "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    seen = timm.data.resolve_model_data_config(theirs)
    said = [list(seen[name]) for name in ("input_size", "mean", "std")]
    assert said == [[3, 16, 16], [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]]
    assert (seen["crop_pct"], seen["interpolation"], seen["crop_mode"]) == (0.9, "bilinear", "center")
    assert list(theirs.pretrained_cfg["label_names"]) == [f"class {number}" for number in range(5)]


@pytest.mark.parametrize("student", ["deit_small", "deit_base_384", "deit_base_plain", "deit3_medium", "deit3_huge"])
def test_published_shapes_have_their_name_in_timm(student: str, tmp_path: Path) -> None:
    """Of nothing but shapes: the names of their tensors are timm's own."""
    from deitkit.deploy import formats as exporting

    config = STUDENTS[student].model_copy(update={"classes": 5})
    card = load_model(run_of(tmp_path, SMALL) / "model")[1].model_copy(update={"architecture": config})
    said = exporting._timm_config(card, config)
    assert said["architecture"].split("_")[:2] == student.split("_")[:2]
    assert said["architecture"].endswith(f"patch{config.patch_size[0]}_{config.image_size[0]}")
    with torch.device("meta"):
        theirs = timm.create_model(said["architecture"], num_classes=5, **said["model_args"])
        ours = ViT(config)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize("config", [SMALL, PLAIN, FINE, WIDE], ids=["deit", "plain", "epsilon", "wide"])
@torch.no_grad()
def test_transformers_loads_the_folder_and_gives_our_logits(tmp_path: Path, config: ViTConfig) -> None:
    run, out = run_of(tmp_path / "run", config), tmp_path / "out"
    assert export_weights(run, out, "hf")[0] == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    theirs, loading = transformers.AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    images = images_of(config)
    if config.distillation_token:
        kind = transformers.DeiTForImageClassificationWithTeacher
        theirs, loading = kind.from_pretrained(out, output_loading_info=True)
        answer = theirs.eval()(images)
        heads = [answer.cls_logits, answer.distillation_logits]
    else:
        assert type(theirs) is transformers.ViTForImageClassification
        heads = [theirs.eval()(images).logits]
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert close(heads, run, images)
    assert theirs.config.id2label == {number: f"class {number}" for number in range(5)}
    assert theirs.config.label2id["class 3"] == 3
    assert theirs.config.layer_norm_eps == config.norm_epsilon
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_pipeline_of_transformers_answers_as_predict_does_and_the_card_says_how_good_it_is(tmp_path: Path) -> None:
    """Names with markup stay names."""
    config = SMALL.model_copy(update={"image_size": (32, 32)})
    run = run_of(tmp_path / "run", config, crop_pct=1.0, interpolation="bicubic")
    card = json.loads((run / "model" / "model.json").read_text())
    card["classes"][0] = "<b>`bold`</b>\n# title"
    (run / "model" / "model.json").write_text(json.dumps(card))
    top1 = {"cls": 0.5, "dist": 0.6, "fused": 0.7, "fused_logits": 0.75}
    summary = {
        "n": 40,
        "model": "small",
        "largest_class": 0.25,
        "top1": top1,
        "teacher": {"name": "lite0", "top1": 0.9},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    export_weights(run, tmp_path / "out", "hf")
    generator = np.random.default_rng(0)
    files = [tmp_path / f"{number}.png" for number in range(8)]
    for file in files:
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    pipeline = transformers.pipeline("image-classification", str(tmp_path / "out"))
    for file, ours in zip(files, dk.load(run).predict(files, head="fused_logits", top=1), strict=True):
        theirs = pipeline(str(file), top_k=1)[0]
        assert theirs["label"] == ours.classes[0]
        assert theirs["score"] == pytest.approx(ours.probabilities[0], abs=1e-4)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: image-classification\n")
    assert all(
        line in text
        for line in ("| teacher lite0 | 90.00 |", "| largest class | 25.00 |", "| both, fused logits | 75.00 |")
    )
    assert "`<b>?bold?</b>\\n# title`, `class 1`" in text


@pytest.mark.parametrize("fraction", [0.8, 1.0])  # at 0.9 their centre is half a pixel from ours
def test_transformers_sees_images_as_we_do(tmp_path: Path, fraction: float) -> None:
    config = SMALL.model_copy(update={"image_size": (32, 32)})
    run = run_of(tmp_path / "run", config, crop_pct=fraction, interpolation="bicubic")
    export_weights(run, tmp_path / "out", "hf")
    own = load_model(run / "model")[1].preprocessing
    waves = np.add.outer(np.sin(np.arange(80) / 1.5), np.cos(np.arange(120) / 2))[..., None] * np.array([40, 50, 60])
    photo = (127 + waves).astype(np.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    seen = theirs(Image.fromarray(photo), return_tensors="pt")["pixel_values"]
    view = center_view(photo, own.image_size, own.crop_pct, own.interpolation)
    expected = prepare(torch.from_numpy(view).permute(2, 0, 1)[None] / 255, own)
    torch.testing.assert_close(
        seen, expected, atol=2 / 255 / 0.1, rtol=0
    )  # uint8 levels: their resize rounds otherwise


@pytest.mark.parametrize("config", [SMALL, PLAIN, DEIT3], ids=["deit", "plain", "deit3"])
@torch.no_grad()
def test_names_of_the_original_load_into_timm(tmp_path: Path, config: ViTConfig) -> None:
    """Which knows the published files, too."""
    run, out = run_of(tmp_path / "run", config), tmp_path / "out"
    assert export_weights(run, out, "deit")[0] == ["model.safetensors"]
    weights = load_file(out / "model.safetensors")
    assert ("blocks.1.gamma_1" in weights) == (config.layer_scale is not None)
    name = "deit3_small_patch16_224" if config.layer_scale else "deit_tiny_patch16_224"
    if config.distillation_token:
        name = "deit_tiny_distilled_patch16_224"
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    theirs = timm.create_model(name, **shape)
    theirs.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn({"model": weights}, theirs, True))
    images = images_of(config)
    if config.distillation_token:
        theirs.train().set_distilled_training(True)
    answer = theirs(images) if config.distillation_token else theirs.eval()(images)
    assert close(list(answer) if config.distillation_token else [answer], run, images)


@pytest.mark.parametrize(
    ("form", "config"),
    [
        *(pytest.param(form, SMALL, id=f"{form}-deit") for form in ("timm", "hf", "deit")),
        *(pytest.param(form, PLAIN, id=f"{form}-plain") for form in ("timm", "hf", "deit")),
        *(pytest.param(form, DEIT3, id=f"{form}-deit3") for form in ("timm", "deit")),
        *(pytest.param(form, WIDE, id=f"{form}-wide") for form in ("timm", "hf")),
    ],
)
def test_way_back_through_init_keeps_every_bit(tmp_path: Path, form: Format, config: ViTConfig) -> None:
    run, out = run_of(tmp_path / "run", config), tmp_path / "out"
    export_weights(run, out, form)
    network, card = load_model(run / "model")
    source = find_init(str(out / "model.safetensors" if form == "deit" else out), config.heads)
    ours = network.body.state_dict()
    assert source.tensors.keys() == ours.keys()
    assert all(torch.equal(source.tensors[name], ours[name]) for name in ours)
    if form != "deit":
        assert source.facts.assumed == ()
        assert source.facts.architecture == config
        found = source.facts.preprocessing
        if form == "hf":  # which knows whole pixels, no shares
            found = found.model_copy(update={"crop_pct": card.preprocessing.crop_pct})
        assert found == card.preprocessing


def test_share_of_the_crop_comes_back_to_the_same_pixels(tmp_path: Path) -> None:
    """Though 9 / (9 / 14) is a little less than 14."""
    size = (36, 36)
    run = run_of(tmp_path / "run", SMALL.model_copy(update={"image_size": size}), crop_pct=36 / 56.5)
    export_weights(run, tmp_path / "out", "hf")
    fraction = find_init(str(tmp_path / "out")).facts.preprocessing.crop_pct
    assert 36 / (36 / 56) < 56
    assert int(36 / fraction) == 56


@pytest.mark.parametrize(
    ("config", "form", "complaint"),
    [
        (CONV, "timm", "timm cannot hold this student: its stem is convolutional"),
        (CONV, "hf", "Hugging Face cannot hold this student: its stem is convolutional"),
        (CONV, "deit", "the original DeiT cannot hold this student: its stem is convolutional"),
        (DEIT3, "hf", "its blocks have LayerScale"),
        (UNPLACED, "hf", "its class token has no position embedding"),
        (FINE, "timm", "its norms have epsilon 1e-12, theirs 1e-06 (hf stores it)"),
        (FINE, "deit", "its norms have epsilon 1e-12"),
        (DEIT3.model_copy(update={"distillation_token": True}), "timm", "it is a DeiT III with a distillation token"),
        (DEIT3.model_copy(update={"distillation_token": True}), "deit", "it is a DeiT III with a distillation token"),
        (WIDE, "deit", "its grid of patches is not square"),
        (SCALED, "deit", "there, LayerScale and a class token without position only occur together"),
    ],
)
def test_what_a_format_cannot_hold_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: ViTConfig, form: Format, complaint: str
) -> None:
    run, out = run_of(tmp_path / "run", config), tmp_path / "out"
    assert main(["export", str(run), "--format", form, "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert complaint in line
    assert line.count("\n") == 1
    assert not out.exists()


def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, full = run_of(tmp_path / "run", SMALL), tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    images = Preprocessing(image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    card = ModelCard(
        name="cnn", architecture=CNNConfig(name="cifar-resnet8", classes=2), classes=("a", "b"), preprocessing=images
    )
    save_model(tmp_path / "cnn" / "model", build(card), card)
    for words, complaint in (
        ([str(tmp_path / "none"), "--format", "timm"], "no such file"),
        (
            [str(tmp_path / "cnn"), "--format", "timm"],
            "cnn is a convolutional network: only vision transformers are exported so: give --format onnx",
        ),
        ([str(run), "--format", "caffe"], "--format"),
        ([str(run), "--format", "onnx"], "does not say which data it was trained on"),
        ([str(run)], "--format"),
    ):
        assert main(["export", *words, "--out", str(tmp_path / "out")]) == 2
        assert complaint in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["export", str(run), "--format", "hf", "--out", str(full)]) == 2
    assert "already exists and is not empty: give another --out" in capsys.readouterr().err

    def half_written(_run: Path, out: Path, *_: object, **__: object) -> None:
        out.mkdir()
        (out / "model.safetensors").touch()
        raise UserError("disk full")

    monkeypatch.setattr("deitkit.deploy.export.export_weights", half_written)
    with pytest.raises(UserError, match="disk full"):
        dk.export(run, out=tmp_path / "out", format="hf")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="unknown format 'caffe'"):
        dk.export(run, out=tmp_path / "out", format="caffe")


def with_data(run: Path, config: ViTConfig, place: Path) -> Path:
    """The run, trained (so it says) on photos of its classes, with biases so that its answers depend on the photo."""
    generator = np.random.default_rng(2)
    for number in range(config.classes):
        for image in range(8):
            file = place / f"class {number}" / f"{image}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            colours = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            photo = colours.resize((3 * config.image_size[1], 3 * config.image_size[0]), Image.Resampling.BICUBIC)
            photo.convert("RGB" if config.channels == 3 else "L").save(file)
    (run / "config.yaml").write_text(f"data: {{location: {place}, val_fraction: 0.5}}\n")
    predictor = load(run, "cpu")
    views = np.stack([predictor.view(file) for file in place.rglob("*.png")])
    with torch.no_grad():
        found = predictor.network(torch.from_numpy(views).permute(0, 3, 1, 2) / 255)
        body: Any = predictor.network.body
        body.head.bias -= found.cls_BK.mean(0)
        body.head_dist.bias -= found.dist_BK.mean(0)
    save_model(run / "model", predictor.network, predictor.card)
    return run


@pytest.mark.parametrize("form", ["timm", "hf"])
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["deit", "grey"])
def test_the_library_is_shown_the_validation_images_as_it_prepares_them(
    form: Format, config: ViTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that come back to the bit are not enough where the library makes other pixels of an image."""
    run = with_data(run_of(tmp_path / "run", config, crop_pct=1.0), config, tmp_path / "photos")
    export = ["export", str(run), "--format", form, "--out"]
    assert main([*export, str(tmp_path / "good")]) == 0
    facts = json.loads((tmp_path / "good" / "parity.json").read_text())
    assert (facts["images"], facts["disagree"], facts["head"], facts["kept"]) == (15, 0, "fused_logits", True)
    assert facts["checked_by"].startswith({"timm": "timm ", "hf": "transformers "}[form])
    assert 0 < facts["largest_difference"] < 0.1  # their resizing rounds otherwise
    line = "model.safetensors: 0 of 15 images classified differently"
    assert line in capsys.readouterr().err
    assert line in (tmp_path / "good" / "README.md").read_text()
    wrong = {"mean": (0.0,) * config.channels, "std": (0.05,) * config.channels}
    name = {"timm": "_timm_config", "hf": "_hugging_face_processor"}[form]
    usual = getattr(formats, name)

    def spoilt(first: Any, *more: Any) -> Any:
        own = first if form == "hf" else first.preprocessing
        changed = own.model_copy(update=wrong)
        return usual(changed if form == "hf" else first.model_copy(update={"preprocessing": changed}), *more)

    monkeypatch.setattr(formats, name, spoilt)
    assert main([*export, str(tmp_path / "bad")]) == 1
    assert "so it is called rejected.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "bad" / "model.safetensors").exists()
    assert not json.loads((tmp_path / "bad" / "parity.json").read_text())["kept"]
    assert main([*export, str(tmp_path / "allowed"), "--max-disagreement", "1"]) in (0, 1)
    assert json.loads((tmp_path / "allowed" / "parity.json").read_text())["allowed"] == 1


def test_without_data_or_library_one_line_says_that_no_image_was_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_data(run_of(tmp_path / "run", SMALL), SMALL, tmp_path / "photos")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "a")]) == 0
    assert "not checked on images: the package transformers is not installed" in capsys.readouterr().err
    (tmp_path / "photos").rename(tmp_path / "gone")
    assert main(["export", str(run), "--format", "timm", "--out", str(tmp_path / "b")]) == 0
    assert "model.safetensors: not checked on images: " in capsys.readouterr().err
    assert "Not checked on images: " in (tmp_path / "b" / "README.md").read_text()
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_command_and_function_write_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", SMALL)
    assert main(["export", str(run), "--format", "timm", "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a'}: README.md, config.json, model.safetensors\n"
    names = dk.export(run / "model", out=tmp_path / "b", format="timm")
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architecture"] == "deit_tiny_distilled_patch16_224"
