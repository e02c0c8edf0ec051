"""Files from strangers: no door of the program runs what a pickle says, and nothing waits for a pipe, a socket or a device."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deitkit import cli
from deitkit.config import DataConfig
from deitkit.data import load_data
from deitkit.distill.teacher import load_teacher
from deitkit.models.start import find_init
from deitkit.terminal import UserError

SUFFIXES = (
    ".pt",
    ".pth",
    ".bin",
    ".ckpt",
    ".safetensors",
    ".npy",
    ".npz",
    ".pkl",
    ".tar",
    ".json",
    ".parquet",
    ".arrow",
    "",
)
DIGITS = tuple("0123456789")


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.sprung,)


def raw(path: Path, sprung: Path) -> None:
    path.write_bytes(pickle.dumps({"linear.weight": Trap(sprung)}))


def zipped(path: Path, sprung: Path) -> None:
    torch.save({"linear.weight": Trap(sprung)}, path)


def legacy(path: Path, sprung: Path) -> None:
    torch.save({"linear.weight": Trap(sprung)}, path, _use_new_zipfile_serialization=False)


def test_the_trap_works(tmp_path: Path) -> None:
    for number, plant in enumerate((raw, zipped, legacy)):
        plant(tmp_path / "trap", tmp_path / str(number))
        if plant is raw:
            pickle.loads((tmp_path / "trap").read_bytes())
        else:
            torch.load(tmp_path / "trap", weights_only=False)
        assert (tmp_path / str(number)).exists()


@pytest.mark.parametrize("plant", [raw, zipped, legacy])
@pytest.mark.parametrize(
    "door",
    [
        lambda file: find_init(str(file)),
        lambda file: find_init(f"test_vit.r160_in1k@{file}"),
        lambda file: load_teacher(f"cifar-resnet8@{file}", DIGITS),
        lambda file: load_teacher(str(file), DIGITS),
        lambda file: load_data(str(file), DataConfig()),
    ],
    ids=["student", "student's file", "teacher's file", "teacher", "data"],
)
def test_a_file_is_never_unpickled_whatever_it_is_called(
    tmp_path: Path, door: Callable[[Path], object], plant: Callable[[Path, Path], None]
) -> None:
    for suffix in SUFFIXES:
        plant(tmp_path / f"trap{suffix}", tmp_path / "sprung")
        with pytest.raises(UserError):
            door(tmp_path / f"trap{suffix}")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture(scope="module")
def tape(cnn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tape") / "tape"
    settings = "--views 1 --train-images 60 --workers 0"
    assert cli.main(["tape", "record", "digits", "--teacher", str(cnn), *settings.split(), "--out", str(out)]) == 0
    return out


TRAIN = "train digits --steps 1 --student deit_pico --workers 0 --out OUT --teacher none"
TAUGHT = "train digits --train-images 60 --steps 1 --student deit_pico --workers 0 --out OUT --teacher"


@pytest.mark.parametrize(
    ("copied", "planted", "command"),
    [
        ("cnn", "model/model.safetensors", "evaluate HERE"),
        ("cnn", "model/model.safetensors", f"{TAUGHT} HERE"),
        ("cnn", "model/model.json", f"{TRAIN} --init HERE"),
        ("cnn", "config.yaml", "teacher fit --resume --out HERE"),
        ("cnn", "data.json", "evaluate HERE"),
        ("cnn", "checkpoints/*/state.safetensors", "teacher fit digits --resume --out HERE"),
        ("cnn", "checkpoints/*/state.json", "teacher fit digits --resume --out HERE"),
        ("tape", "tape.json", f"{TAUGHT} HERE"),
        ("tape", "records.bin", f"{TAUGHT} HERE"),
        ("tape", "digests.bin", f"{TAUGHT} HERE"),
        ("tape", "validation.safetensors", f"{TAUGHT} HERE"),
        ("tape", "features.safetensors", "tape verify HERE digits --teacher CNN"),
        (None, "pytorch_model.bin", f"{TRAIN} --init HERE"),
        (None, "train.parquet", "data show HERE"),
        (None, "train.arrow", "data show HERE"),
        (None, "resized.json", "data show HERE"),
        (None, "list.csv", "data show HERE/list.csv"),
        (None, "recipe.yaml", f"{TRAIN} --recipe HERE/recipe.yaml"),
        (None, "a/x.jpg", "data show HERE"),
        (None, "package.tgz", "export CNN --format web --runtime HERE/package.tgz --out OUT"),
    ],
)
@pytest.mark.parametrize("plant", [raw, zipped])
def test_a_pickle_behind_any_door_is_one_line(
    cnn: Path, tape: Path, tmp_path: Path, copied: str | None, planted: str, command: str,
    plant: Callable[[Path, Path], None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    here, sprung = tmp_path / "here", tmp_path / "sprung"
    if copied is None:
        for folder in ("a", "b"):
            (here / folder).mkdir(parents=True)
        (here / "config.json").write_text("{}")
    else:
        shutil.copytree({"cnn": cnn, "tape": tape}[copied], here)
    for file in sorted(here.glob(planted)) or [here / planted]:
        plant(file, sprung)
        (file.parent / "SHA256SUMS").unlink(missing_ok=True)
    if "checkpoints" in planted:
        (here / "summary.json").unlink()
    said = command.replace("HERE", str(here)).replace("OUT", str(tmp_path / "out")).replace("CNN", str(cnn))
    assert cli.main(said.split()) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("deit: ")]
    assert line.startswith("deit: error: ")
    assert not sprung.exists()


def test_nothing_waits_for_a_pipe_a_socket_or_a_device_among_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever they are called, and links to them; all is done in this process, without workers that could be given up."""
    photos, run = tmp_path / "photos", str(tmp_path / "run")
    for brightness, name in ((0, "a"), (130, "b")):
        (photos / name).mkdir(parents=True)
        pixels_NHWC = np.random.default_rng(brightness).integers(0, 120, (10, 24, 24, 3)) + brightness
        for number, pixels_HWC in enumerate(pixels_NHWC.astype(np.uint8)):
            Image.fromarray(pixels_HWC).save(photos / name / f"{number}.png")
    monkeypatch.chdir(photos / "a")  # a socket's path has 108 characters at most
    hostile = ["pipe.jpg", "pipe.txt", "pipe.parquet", "pipe.csv", "pipe"]
    for name in hostile:
        os.mkfifo(name)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
    for name, target in (("zero.jpg", "/dev/zero"), ("link.png", "pipe.jpg"), ("lost.jpg", "nowhere.jpg")):
        Path(name).symlink_to(target)
    images = ["pipe.jpg", "socket.png", "zero.jpg", "link.png", "lost.jpg"]
    for name in ("pipe.parquet", "pipe.csv"):
        os.mkfifo(photos / name)
    rows = [
        "file,label",
        *(f"a/{number}.png,a" for number in range(10)),
        *(f"b/{number}.png,b" for number in range(10)),
    ]
    listed = tmp_path / "photos" / "listed.csv"
    listed.write_text("\n".join([*rows, *(f"a/{name},a" for name in images)]) + "\n")

    commands = [
        f"data show {photos}",
        f"data show {listed}",
        f"teacher fit {photos} --model cifar-resnet8 --from-scratch --steps 1 --workers 0 --out {tmp_path / 'cnn'}",
        f"train {photos} --teacher none --steps 1 --student deit_pico --workers 0 --out {run}",
        f"evaluate {run} {photos} --workers 0",
        f"predict {run} {photos / 'b'} {photos / 'a' / '0.png'}",
    ]
    for command in commands:
        assert cli.main(command.split()) == 0, capsys.readouterr().err
    assert "left out: 10 pipes or devices" in capsys.readouterr().err
    for name in images:
        assert cli.main(["predict", run, name]) == 2
        assert cli.main(["explain", run, name, "--out", str(tmp_path / "explained.png")]) == 2
