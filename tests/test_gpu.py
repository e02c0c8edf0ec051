"""What only a GPU can show: DEITKIT_TEST_GPU=1 .venv/bin/python -m pytest tests/test_gpu.py"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes import HeldImages, killed_after_epoch
from tests.views.test_augment import EVERYTHING, SIZES, pixels

from deitkit.config import AUGMENT_PRESETS, FitConfig, RunConfig
from deitkit.distill.optim import muon_step
from deitkit.distill.teacher import load_teacher
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import load_model
from deitkit.settings import build
from deitkit.terminal import SilentProgress
from deitkit.training import fit as fitting
from deitkit.training import jobs
from deitkit.training.evaluate import evaluate_run
from deitkit.training.jobs import run_record
from deitkit.views.augment import augment
from deitkit.views.loader import augment_and_mix, raw_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and DEITKIT_TEST_GPU=1")

QUICK = {"train_images": 300, "epochs": 3, "batch_size": 64, "augment": "deit", "drop_path": 0.1}
EXACT = {**QUICK, "deterministic": True}
DIGITS = tuple("0123456789")


def train(out: Path, *, resume: bool = False, **settings: Any) -> bytes:
    """The weights that come out."""
    try:
        jobs.run_training("digits", build(RunConfig, settings), out, resume=resume, progress=SilentProgress())
    finally:
        torch.use_deterministic_algorithms(False)
    return (out / "model" / "model.safetensors").read_bytes()


def losses(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"]["total"] for event in events if event["event"] == "epoch"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_ends_with_the_same_bits_whole_and_resumed(
    tmp_path: Path, cnn: Path, optimizer: str, precision: str
) -> None:
    settings = {**EXACT, "teacher": str(cnn), "optimizer": optimizer, "precision": precision}
    whole = train(tmp_path / "whole", **settings)
    with killed_after_epoch(2):
        train(tmp_path / "broken", **settings)
    assert train(tmp_path / "broken", resume=True, **settings) == whole
    assert train(tmp_path / "again", **settings) == whole
    environment = json.loads((tmp_path / "whole" / "environment.json").read_text())
    assert environment["gpus"] == [torch.cuda.get_device_name()]


@pytest.mark.parametrize("loss", ["hard", "soft", "zscore", "dist", "dkd"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_tape_teaches_the_same_bits(tmp_path: Path, cnn: Path, loss: str, precision: str) -> None:
    settings = {**EXACT, "distillation": loss, "batch_size": 50, "optimizer": "muon", "teacher_precision": precision}
    live = train(tmp_path / "live", teacher=str(cnn), **settings)
    config = build(RunConfig, {**settings, "teacher": str(cnn)})
    run_record("digits", config, tmp_path / "tape", views=3, outputs="all", progress=SilentProgress())
    assert train(tmp_path / "taped", tape=str(tmp_path / "tape"), **settings) == live


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_says_the_same_of_an_image_in_any_batch(cnn: Path, precision: Any) -> None:
    teacher = load_teacher(str(cnn), DIGITS, device="cuda", precision=precision)
    images = torch.rand(300, 1, 8, 8, device="cuda")
    whole = teacher.forward(images)
    parts = torch.cat([teacher.forward(part) for part in images.split([1, 7, 64, 128, 100])])
    assert torch.equal(whole, parts)
    exact = load_teacher(str(cnn), DIGITS).forward(images.cpu())
    share = (whole.cpu() - exact).norm() / exact.norm()
    assert share < (2e-3 if precision == "float32" else 3e-2)  # torch lets cuDNN take TF32 for float32


@pytest.mark.parametrize("size", SIZES)
def test_augmented_pixels_are_a_cpus_to_the_bit(size: tuple[int, int, int]) -> None:
    images = pixels(64, *size)
    index, view = np.arange(64), np.arange(64) % 5
    on_gpu = augment(images.cuda(), index, view, EVERYTHING)
    assert torch.equal(on_gpu.cpu(), augment(images, index, view, EVERYTHING))


@pytest.mark.parametrize("preset", ["light", "deit", "deit3"])
def test_views_are_those_of_a_cpu(preset: str) -> None:
    """But for the last bits of mixed pixels, which are floats: all before is uint8."""
    split = HeldImages(64, size=(32, 32), channels=3)
    view = AUGMENT_PRESETS[preset].model_copy(
        update={"view_size": (32, 32), "crop": "pad", "crop_padding": 4 / 32, "flip_prob": 0.5}
    )
    crops = raw_batch(split, view, torch.arange(64).numpy(), torch.arange(64).numpy() % 3)
    here, there = augment_and_mix(crops, view), augment_and_mix(crops, view, "cuda")
    torch.testing.assert_close(there.images_BCHW.cpu(), here.images_BCHW, atol=1e-6, rtol=0)
    assert torch.equal(there.lam_B.cpu(), here.lam_B)


@pytest.mark.parametrize("stem", ["patch", "conv", "residual"])
def test_a_network_computes_what_it_does_on_a_cpu(stem: str) -> None:
    config = ViTConfig(image_size=(32, 32), width=48, depth=3, heads=3, classes=10, stem=stem, patch_size=(4, 4))
    network = ViT(config).eval()
    images = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        here = network(images)
        there = network.cuda()(images.cuda())
    for head, same in zip(here, there, strict=True):
        torch.testing.assert_close(same.cpu(), head, atol=1e-4, rtol=1e-4)


def test_muon_moves_as_on_a_cpu() -> None:
    shapes = [(48, 48), (48, 144), (192, 48), (48, 16, 3, 3)]
    starts, gradients = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    moved = {}
    for device in ("cpu", "cuda"):
        weights = [start.clone().to(device) for start in starts]
        slopes = [gradient.to(device) for gradient in gradients]
        muon_step(weights, slopes, [torch.zeros_like(one) for one in weights], 1e-2, 0.1)
        moved[device] = [weight.cpu() for weight in weights]
    for here, there in zip(moved["cpu"], moved["cuda"], strict=True):
        torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-4)


def test_compiled_it_learns_the_same(tmp_path: Path, cnn: Path) -> None:
    """In processes of their own: here shapes are checked as functions run, which cannot be compiled."""
    common = [sys.executable, "-m", "deitkit.cli", "train", "digits", "--teacher", str(cnn), "--precision", "float32"]
    common += [
        "--epochs",
        "3",
        "--train-images",
        "300",
        "--batch-size",
        "50",
        "--optimizer",
        "muon",
        "--augment",
        "deit",
    ]
    subprocess.run([*common, "--compile", "--out", str(tmp_path / "compiled")], check=True)
    subprocess.run([*common, "--out", str(tmp_path / "eager")], check=True)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=0.02)


def test_a_model_of_a_gpu_answers_as_well_on_a_cpu(tmp_path: Path, cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "run", **{**QUICK, "teacher": str(cnn), "epochs": 10, "base_lr": 2e-2})
    there = evaluate_run(tmp_path / "run", split="test")["top1"]
    monkeypatch.setattr("deitkit.training.evaluate.default_device", lambda: torch.device("cpu"))
    here = evaluate_run(tmp_path / "run", split="test")["top1"]
    assert there == pytest.approx(here, abs=0.006)  # two of 359 images
    network, _ = load_model(tmp_path / "run" / "model")
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}


def test_a_budget_is_kept(tmp_path: Path, cnn: Path) -> None:
    settings = {**QUICK, "teacher": str(cnn), "budget_minutes": 0.2}
    del settings["epochs"]
    train(tmp_path / "run", **settings)
    seconds = json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"]
    assert 6 < seconds < 15


def test_a_teacher_is_fitted_the_same_twice(tmp_path: Path) -> None:
    settings = {"model": "cifar-resnet8", "from_scratch": True, "steps": 20, "deterministic": True}
    weights = []
    for name in ("one", "two"):
        try:
            fitting.run_fit(
                "digits", build(FitConfig, settings), tmp_path / name, resume=False, progress=SilentProgress()
            )
        finally:
            torch.use_deterministic_algorithms(False)
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
