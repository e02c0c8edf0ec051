"""A path may hold any sign: what exists is what was meant, and `~` is the home folder wherever a path is given."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deitkit as dk
from deitkit import cli
from deitkit.config import DataConfig, RunConfig
from deitkit.data import load_data
from deitkit.data.listing import image_paths
from deitkit.distill.teacher import members_of
from deitkit.models.weights import split_name
from deitkit.settings import build, find_recipe
from deitkit.terminal import UserError, expanded
from deitkit.training.run import default_out

ODD = ["a@b", "a+b", "~a", "#1", "[x] y", "写真", "naïve", "a'b", "100%", "a=b,c;d"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder; the current one is another."""
    folder, here = tmp_path / "home", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(here)
    return folder


def photos(root: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(12):
        path = root / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (9, 8, 3), np.uint8)).save(path)
    return root


@pytest.mark.parametrize("name", ODD)
def test_a_folder_may_have_any_name(home: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    photos(Path(name))
    assert load_data(name, DataConfig()).name == name
    assert len(image_paths([name])) == 12
    assert cli.main(["data", "cache", "--size", "4", f"--out=small/{name}", name]) == 0
    assert load_data(f"small/{name}", DataConfig()).classes == ("ant", "bee")
    assert f"next: deit train {shlex.quote(f'small/{name}')} --teacher auto" in capsys.readouterr().err


def test_folders_whose_names_are_no_utf8(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = (os.fsdecode(name) for name in (b"fotos\xe4", b"runs/\xe4"))
    photos(Path(data))
    train = [
        "train",
        data,
        "--teacher",
        "none",
        "--steps",
        "1",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--student",
        "deit_pico",
    ]
    assert cli.main([*train, "--out", "run"]) == 0
    assert Path("run/report.html").is_file()
    assert cli.main(["evaluate", "run"]) == 0
    assert cli.main([*train, "--out", out]) == 2
    assert "is no UTF-8, so weights cannot be kept there: give another --out" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--out=~/cached", "--out ~/cached"])
def test_what_the_shell_did_not_expand_is_in_the_home_folder(home: Path, form: str) -> None:
    photos(home / "photos")
    assert cli.main(["data", "cache", "~/photos", "--size", "4", *form.split()]) == 0
    assert (home / "cached" / "resized.json").is_file()
    assert not Path("~").exists()


def test_python_takes_the_home_folder_too(home: Path) -> None:
    with pytest.raises(UserError, match=f"{home}/run/model/model.json"):
        dk.load("~/run")
    assert dk.Run("~/run").path == home / "run"
    assert find_recipe("~/mine.yaml") == home / "mine.yaml"
    photos(home / "photos")
    assert image_paths(["~/photos/ant/*.png"]) == sorted((home / "photos/ant").glob("*.png"))


def test_what_exists_under_that_very_name_is_no_home_folder(home: Path) -> None:
    photos(Path("~") / "photos")
    assert expanded("~/photos") == Path("~/photos")
    assert load_data("~/photos", DataConfig()).classes == ("ant", "bee")
    with pytest.raises(UserError, match="~nobody-of-this-name/x: no such folder: nobody has such a home folder"):
        expanded("~nobody-of-this-name/x")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("~/runs/t", "{home}/runs/t"),
        ("lite0+~/runs/t", "lite0+{home}/runs/t"),
        ("cifar-resnet56@~/w.pth", "cifar-resnet56@{home}/w.pth"),
        ("~/a+~/b@c", "{home}/a+{home}/b@c"),
        ("lite0", "lite0"),
    ],
)
def test_a_teacher_may_lie_in_the_home_folder(home: Path, given: str, meant: str) -> None:
    assert build(RunConfig, {"teacher": given}).teacher.teacher == meant.format(home=home)


@pytest.mark.parametrize("setting", ["init", "record"])
def test_other_settings_may_be_places_in_the_home_folder(home: Path, setting: str) -> None:
    config = build(RunConfig, {setting: "~/x", "teacher": "lite0"})
    assert str(home / "x") in (config.student.init, config.teacher.record)


def test_a_run_with_a_plus_or_an_at_in_its_name_is_one_teacher(home: Path) -> None:
    for name in ("runs/a+b", "runs/c@d+e", "w+x.pth"):
        Path(name).mkdir(parents=True)
    assert members_of("runs/a+b") == ["runs/a+b"]
    assert members_of("lite0+runs/a+b") == ["lite0", "runs/a+b"]
    assert members_of("runs/c@d+e+runs/a+b+lite0") == ["runs/c@d+e", "runs/a+b", "lite0"]
    assert members_of("cifar-resnet8@w+x.pth+lite0") == ["cifar-resnet8@w+x.pth", "lite0"]
    assert split_name("runs/c@d+e") == ("runs/c@d+e", None)
    assert split_name("resnet18@runs/none") == ("resnet18", Path("runs/none"))


def test_a_run_is_named_after_its_data(home: Path) -> None:
    (home / "labels.csv").write_text("file,label\n")
    assert default_out(str(home / "labels.csv")).parent == Path("runs")


@pytest.mark.skipif(
    os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_data_may_be_read_only(home: Path) -> None:
    root = photos(home / "photos")
    for folder in (root, root / "ant", root / "bee"):
        folder.chmod(0o555)
    assert load_data(str(root), DataConfig()).bad_images == ()
