"""Whole runs that begin with weights which are there already, and those in which a part of them learns."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.fakes import killed_after_epoch
from tests.models.test_start import SHAPE, changed, saved
from tests.training.test_jobs import settings_of

from deitkit.cli import main
from deitkit.config import DataConfig, FitConfig, RunConfig
from deitkit.data import load_data
from deitkit.models.network import Network
from deitkit.models.zoo import load_model
from deitkit.settings import build, validated
from deitkit.terminal import SilentProgress, UserError, load_yaml
from deitkit.training import fit as fitting
from deitkit.training import jobs, setup

QUICK = {"train_images": 200, "epochs": 2, "batch_size": 50, "base_lr": 4e-3, "drop_path": 0.1}
TINY = {"stem": "patch", "width": 32, "depth": 2, "heads": 2}


class Heard(SilentProgress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def train(data: str, out: Path, *, resume: bool = False, **settings: Any) -> tuple[dict[str, Any], list[str]]:
    config, heard = build(RunConfig, settings_of(QUICK, settings)), Heard()
    return jobs.run_training(data, config, out, resume=resume, progress=heard), heard.lines


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the digits, 8 pixels, from the labels alone."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train("digits", out, **TINY)
    return out


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "cnn"
    settings = {
        "model": "cifar-resnet8",
        "from_scratch": True,
        "epochs": 2,
        "batch_size": 32,
        "base_lr": 4e-2,
    }
    fitting.run_fit("digits", build(FitConfig, settings), out, resume=False, progress=SilentProgress())
    return out


@pytest.mark.parametrize("teacher_size", [None, 16])
def test_run_goes_on_from_another_at_a_larger_size_with_a_teacher(
    tmp_path: Path, plain_run: Path, cnn: Path, teacher_size: int | None
) -> None:
    """The student has twice the pixels, a new token and a teacher, which goes on seeing images at its own 8 pixels, or sees
    as many as the student."""
    shapes = []
    forward = Network.forward

    def watched(self: Network, images_BCHW: torch.Tensor, *rest: Any) -> Any:
        if len(images_BCHW) > 1:  # one image is that of a network that is tried out as it is loaded
            shapes.append((type(self.body).__name__, tuple(images_BCHW.shape[2:]), self.preprocessing.image_size))
        return forward(self, images_BCHW, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Network, "forward", watched)
        settings = {"init": str(plain_run), "image_size": 16, "teacher": str(cnn), "teacher_size": teacher_size}
        summary, lines = train("digits", tmp_path / "second", **settings)
    assert {size for name, _, size in shapes if name == "ViT"} == {(16, 16)}
    assert {size for name, _, size in shapes if name == "CifarResNet"} == {(teacher_size or 8,) * 2}
    assert (
        f"init: loaded 32 of 35 tensors from {plain_run}: deit_pico (deitkit); "
        "position embedding resized from 4x4 to 8x8 patches" in lines
    )
    assert "init: newly initialised: dist_token (not in these weights), head_dist (not in these weights)" in lines
    assert summary["top1"]["dist"] is not None
    _, card = load_model(tmp_path / "second" / "model")
    assert (card.name, card.architecture.grid, card.architecture.width) == ("deit_pico", (8, 8), 32)


def test_photos_fine_tuned_at_a_higher_resolution_have_views_of_that_size(tmp_path: Path) -> None:
    """By the command line; the teacher has its own resolution still."""
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(24):
            pixels = generator.integers(0, 60, (70, 90, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    photos, first, second, cnn = (str(tmp_path / name) for name in ("photos", "first", "second", "cnn"))
    loop = ["--batch-size", "8", "--workers", "0"]
    fit = ["--model", "cifar-resnet8", "--from-scratch", "--image-size", "24", "--epochs", "3", "--lr", "0.04"]
    assert main(["teacher", "fit", photos, *fit, *loop, "--out", cnn]) == 0
    shape = [
        "--image-size",
        "32",
        "--stem",
        "patch",
        "--patch-size",
        "8",
        "--width",
        "32",
        "--depth",
        "2",
        "--heads",
        "2",
    ]
    assert main(["train", photos, *shape, *loop, "--epochs", "2", "--teacher", "none", "--out", first]) == 0
    higher = ["--init", first, "--image-size", "48", "--teacher", cnn]
    assert main(["train", photos, *higher, *loop, "--epochs", "2", "--out", second]) == 0
    config = load_yaml(tmp_path / "second" / "config.yaml")
    assert config["view"]["view_size"] == [48, 48]
    network, card = load_model(tmp_path / "second" / "model")
    assert (card.architecture.grid, card.preprocessing.image_size) == ((6, 6), (48, 48))
    assert network(torch.rand(1, 3, 70, 90)).dist_BK is not None
    assert load_model(Path(cnn) / "model")[1].preprocessing.image_size == (24, 24)


def test_student_begins_where_the_run_ended(tmp_path: Path, plain_run: Path) -> None:
    """One step at a learning rate of nearly nothing: what is kept is what it began with."""
    train("digits", tmp_path / "run", init=str(plain_run), steps=1, base_lr=1e-12, ema_decay=0.0)
    began, ended = (load_file(run / "model" / "model.safetensors") for run in (plain_run, tmp_path / "run"))
    assert began.keys() == ended.keys()
    for name, tensor in ended.items():
        torch.testing.assert_close(tensor, began[name], atol=1e-7, rtol=1e-6)


def test_resumed_run_does_not_need_the_weights_it_began_with(tmp_path: Path, plain_run: Path) -> None:
    """And ends with the same bits. Before its first checkpoint it needs them."""
    weights = tmp_path / "first"
    shutil.copytree(plain_run, weights)
    settings = {"init": str(weights), "distil": "labels", "epochs": 3}
    train("digits", tmp_path / "whole", **settings)
    with killed_after_epoch(1):
        train("digits", tmp_path / "broken", **settings)
    shutil.rmtree(weights)
    _, lines = train("digits", tmp_path / "broken", resume=True, **settings)
    assert not [line for line in lines if line.startswith("init:")]
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "whole" / model).read_bytes() == (tmp_path / "broken" / model).read_bytes()
    assert train("digits", tmp_path / "broken", resume=True, **settings)[0]["steps"] == 12  # finished: nothing to do
    shutil.rmtree(tmp_path / "broken" / "checkpoints")
    (tmp_path / "broken" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"first: no such run folder or file of weights"):
        train("digits", tmp_path / "broken", resume=True, **settings)


def test_resuming_with_other_weights_is_refused(tmp_path: Path, plain_run: Path) -> None:
    with killed_after_epoch(1):
        train("digits", tmp_path / "run", init=str(plain_run))
    with pytest.raises(UserError, match=r"student\.init = "):
        train("digits", tmp_path / "run", init=str(plain_run / "model"), resume=True)


def test_configuration_with_weights_fed_back_gives_the_same_bits(tmp_path: Path, plain_run: Path) -> None:
    train("digits", tmp_path / "first", init=str(plain_run), epochs=1)
    stored = validated(RunConfig, load_yaml(tmp_path / "first" / "config.yaml"), "config.yaml")
    assert stored.student.init == str(plain_run)
    jobs.run_training("digits", stored, tmp_path / "again", resume=False, progress=SilentProgress())
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "first" / model).read_bytes() == (tmp_path / "again" / model).read_bytes()


def test_named_student_has_to_have_the_shape_of_the_weights(tmp_path: Path, plain_run: Path) -> None:
    with pytest.raises(UserError, match=r"--init deit_pico: the weights file has stem patch, the student conv"):
        train("digits", tmp_path / "run", init=str(plain_run), student="deit_pico")
    assert not (tmp_path / "run").exists()


def test_weights_for_colour_see_grey_images_in_all_three(tmp_path: Path) -> None:
    """As a pretrained teacher does: the answers are those to the same image in grey RGB."""
    config = changed(SHAPE, image_size=(8, 8), classes=10, distillation_token=False)
    run = saved(tmp_path / "rgb", config, tuple("0123456789"))
    still = {"steps": 1, "base_lr": 1e-12, "ema_decay": 0.0, "calibrate": False}
    _, lines = train("digits", tmp_path / "run", init=str(run), **still)
    assert any(line.endswith("expect RGB images, the data are grey: images are converted") for line in lines)
    began, card = load_model(run / "model")
    ended, _ = load_model(tmp_path / "run" / "model")
    assert card.architecture.channels == ended.body.config.channels == 3
    grey = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(ended(grey).cls_BK, began(grey.expand(-1, 3, -1, -1)).cls_BK, atol=1e-4, rtol=1e-4)


def test_shape_of_the_student_follows_from_the_weights_wherever_it_is_asked_for(plain_run: Path) -> None:
    """`deit compare` asks before any run is begun."""
    digits = load_data("digits", DataConfig())
    config = setup.resolve(build(RunConfig, {"init": str(plain_run)}), digits, "digits")
    assert config.student.student is None
    expected = load_model(plain_run / "model")[1].architecture
    assert setup.student_architecture(config, digits) == expected
    larger = build(RunConfig, {"init": str(plain_run), "image_size": 24, "distillation": "none"})
    assert setup.student_architecture(larger, digits).grid == (12, 12)


def test_student_that_starts_from_weights_keeps_their_resolution(plain_run: Path, tmp_path: Path) -> None:
    """Of small images, whose size a fresh student takes; a student by name takes it, too."""
    larger = changed(load_model(plain_run / "model")[1].architecture, image_size=(16, 16), channels=1)
    start = str(saved(tmp_path / "larger", larger, tuple("0123456789")))
    digits = load_data("digits", DataConfig())

    def size(**settings: Any) -> tuple[int, int]:
        config = build(RunConfig, {"init": start, "distillation": "none", **settings})
        return setup.student_architecture(config, digits).image_size

    assert size() == (16, 16)
    assert size(image_size=24) == (24, 24)
    assert size(student="deit_pico", stem="patch", **{k: v for k, v in TINY.items() if k != "stem"}) == (8, 8)


def test_plain_students_by_name_refuse_a_teacher_for_their_token(tmp_path: Path, cnn: Path) -> None:
    with pytest.raises(UserError, match=r"--student vit_tiny: has no distillation token .*--distil cls"):
        train("digits", tmp_path / "run", student="vit_tiny", teacher=str(cnn))


# ------------------------------------------------------------------------------------------ a part of the student


@pytest.mark.parametrize(
    "options",
    [
        {"trainable": "attention"}, {"trainable": "last-1", "optimizer": "muon"}, {"layer_decay": 0.6},
        {"layer_decay": 0.6, "optimizer": "muon"},
    ],
)  # fmt: skip
def test_interrupted_fine_tuning_ends_with_the_same_bits(
    tmp_path: Path, plain_run: Path, options: dict[str, Any]
) -> None:
    settings = {"init": str(plain_run), "distil": "labels", "epochs": 3, **options}
    train("digits", tmp_path / "whole", **settings)
    with killed_after_epoch(1):
        train("digits", tmp_path / "broken", **settings)
    train("digits", tmp_path / "broken", resume=True, **settings)
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "whole" / model).read_bytes() == (tmp_path / "broken" / model).read_bytes()


@pytest.mark.parametrize("ema_decay", [0.0, 0.99])
def test_frozen_weights_stay_as_they_were_bit_for_bit(tmp_path: Path, plain_run: Path, ema_decay: float) -> None:
    settings = {"init": str(plain_run), "trainable": "last-1", "distil": "labels", "ema_decay": ema_decay}
    _, lines = train("digits", tmp_path / "run", **settings)
    began, ended = (load_file(run / "model" / "model.safetensors") for run in (plain_run, tmp_path / "run"))
    moved = {name for name in began if name != "pos_embed" and not torch.equal(began[name], ended[name])}
    assert moved == {name for name in began if name.startswith(("blocks.1.", "norm.", "head."))}
    assert torch.equal(ended["pos_embed"][:, 2:], began["pos_embed"][:, 1:])
    (line,) = (line for line in lines if line.startswith("--trainable last-1: "))
    learning = sum(t.numel() for n, t in ended.items() if n in moved or n.startswith(("dist_token", "head_dist")))
    assert line == f"--trainable last-1: {learning:,} of {sum(t.numel() for t in ended.values()):,} parameters learn"


def test_frozen_convolutional_stem_keeps_its_statistics(tmp_path: Path) -> None:
    config = changed(SHAPE, image_size=(8, 8), channels=1, classes=10, stem="conv", distillation_token=False)
    run = saved(tmp_path / "conv", config, tuple("0123456789"))
    train("digits", tmp_path / "run", init=str(run), trainable="attention", ema_decay=0.0)
    began, ended = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path / "run"))
    assert all(torch.equal(began[name], ended[name]) for name in began if name.startswith("stem."))
    assert not torch.equal(began["blocks.0.attn.qkv.weight"], ended["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"trainable": "attention"}, "trainable: attention would keep random weights: give --init"),
        ({"trainable": "last-3", "init": True}, "--trainable last-3: the student has 2 blocks"),
        ({"trainable": "first-1", "init": True}, "trainable: string should match pattern"),
        ({"layer_decay": 0.0}, "layer_decay: input should be greater than 0"),
    ],
)
def test_fine_tuning_that_makes_no_sense_is_refused(
    tmp_path: Path, plain_run: Path, settings: dict[str, Any], complaint: str
) -> None:
    if settings.pop("init", False):
        settings = {**settings, "init": str(plain_run)}
    with pytest.raises(UserError) as caught:
        train("digits", tmp_path / "run", **settings)
    assert complaint in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"trainable": "attention"}, {"layer_decay": 0.5}])
def test_convolutional_teachers_are_not_tuned_by_layers(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is for a transformer's blocks: leave it out"):
        build(FitConfig, settings)
