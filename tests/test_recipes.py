"""The shipped recipes: held to the figures that were published, complete, runnable, documented."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import deitkit as dk
from deitkit import cli
from deitkit import settings as recipes
from deitkit.config import DataConfig, Preprocessing, RunConfig
from deitkit.data import Dataset, load_data
from deitkit.distill.optim import learning_rate, warmup_steps
from deitkit.flags import Call
from deitkit.lengths import length_in_steps
from deitkit.models.vit import ViTConfig
from deitkit.settings import build, validated
from deitkit.terminal import SilentProgress, UserError, load_yaml
from deitkit.training.setup import drop_rates, preprocessing_of_student, resolve, student_architecture
from deitkit.verbs import common as verbs

ROOT = Path(__file__).parents[1]
NAMES = ["deit", "deit-1000", "deit-finetune-384", "deit3", "deit3-finetune-224", "deit3-small"]
OWN = ["cifar10", "fashion-mnist", "few-images", "few-photos", "function-matching", "photos", "pretrain"]
"""Of this project, run here."""
ARGUMENTS = [verbs.DATA, verbs.folder("folder of the run", None), verbs.RESUME, verbs.RECIPE]
IMAGENET = 1_281_167
"""Training images of ImageNet-1k: epochs and warm-ups are counted in these."""

# What the views of DeiT are: arXiv 2012.12877, table 9.
DEIT_VIEWS: dict[str, Any] = {
    "crop": "resize", "randaugment": "rand-m9-n2-mstd0.5-p0.5", "three_augment": False, "jitter": 0.0,
    "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "switch": 0.5, "repeated_aug": 3, "crop_area": (0.08, 1.0),
}  # fmt: skip
DEIT: dict[str, Any] = {
    "size": 224, "epochs": 300, "batch_size": 1024, "optimizer": "adamw", "peak_lr": 5e-4 * 1024 / 512, "first_lr": 1e-6,
    "last_lr": 1e-5, "warmup_epochs": 5.0, "weight_decay": 0.05, "max_grad_norm": None, "ema": 0.99996, "drop_path": 0.1,
    "drop_path_first": 0.0, "label_loss": "ce", "smoothing": 0.1, "crop_pct": 0.875, "init": None, **DEIT_VIEWS,
    # section 4: half of the loss to the labels, half to the teacher's decisions, by a token of its own
    "student": "deit_base", "layer_scale": None, "distillation": "hard", "label_weight": 0.5, "teacher_weight": 0.5,
    "distil": "token",
}  # fmt: skip
# DeiT III: arXiv 2204.07118, section 3, and the commands that its authors published for ImageNet-1k (README_revenge.md of
# facebookresearch/deit): those have no `--src`, the simple random crop, so that images are cropped as DeiT crops them.
DEIT3: dict[str, Any] = {
    **DEIT, "size": 192, "epochs": 800, "batch_size": 2048, "optimizer": "lamb", "peak_lr": 3e-3, "max_grad_norm": 1.0, "ema": 0.0,
    "drop_path": 0.2, "drop_path_first": 0.2, "label_loss": "bce", "smoothing": 0.0, "crop_pct": 1.0,
    "randaugment": None, "three_augment": True, "jitter": 0.3, "erasing": 0.0, "student": "deit3_base",
    "layer_scale": 1e-4, "distillation": "none", "label_weight": 1e-3, "teacher_weight": None, "distil": None,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "deit": DEIT,
    "deit-1000": {**DEIT, "epochs": 1000},
    "deit-finetune-384": {
        **DEIT, "size": 384, "epochs": 30, "batch_size": 512, "peak_lr": 5e-6, "last_lr": 5e-6, "weight_decay": 1e-8,
        "init": "required", "student": None,
    },
    "deit3": DEIT3,
    "deit3-small": {**DEIT3, "student": "deit3_small", "size": 224, "peak_lr": 4e-3, "drop_path": 0.05, "drop_path_first": 0.05},
    "deit3-finetune-224": {
        **DEIT3, "size": 224, "epochs": 20, "batch_size": 512, "optimizer": "adamw", "peak_lr": 1e-5, "last_lr": 1e-5,
        "weight_decay": 0.1, "max_grad_norm": None, "label_loss": "ce", "smoothing": 0.1,
        "randaugment": "rand-m9-n2-mstd0.5-p0.5", "three_augment": False, "jitter": 0.0, "repeated_aug": 1, "init": "required",
        "label_weight": 1.0,
        "student": None,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def photos() -> Dataset:
    """What is known of photos of many sizes before one is read."""
    return replace(load_data("digits", DataConfig()), image_size=None, channels=3)


def resolved(name: str, photos: Dataset, **settings: Any) -> tuple[RunConfig, ViTConfig]:
    """A recipe as it would run on `photos`, DeiT's with a teacher; one that goes on from weights as if from none, with the base
    student in their place."""
    own: dict[str, Any] = {"init": "scratch"}
    if load_yaml(recipes.find_recipe(name))["student"].get("student") is None:
        own["student"] = "deit3_base" if name.startswith("deit3") else "deit_base"
    if not name.startswith("deit3"):
        own["teacher"] = "a teacher"
    config = resolve(build(RunConfig, {**own, **settings}, recipe=recipes.find_recipe(name)), photos, "x")
    return config, student_architecture(config, photos)


def figures(config: RunConfig, architecture: ViTConfig) -> dict[str, Any]:
    """What a resolved run does, by the names of the tables above; rates as the loop asks for them."""
    view, optim, loop, loss = config.view, config.optim, config.loop, config.loss
    distilled = loss.distillation != "none"
    steps_per_epoch = -(-IMAGENET // loop.batch_size)
    total = length_in_steps(loop.length, steps_per_epoch)
    warmup = warmup_steps(optim, total, steps_per_epoch)
    rates = {step: learning_rate(step, total, warmup, loop.batch_size, optim) for step in (0, warmup, total - 1)}
    drops = drop_rates(config.student.drop_path, architecture)
    return {
        "size": architecture.image_size[0],
        "epochs": loop.amount("ep"),
        "batch_size": loop.batch_size,
        "optimizer": optim.optimizer,
        "peak_lr": rates[warmup],
        "first_lr": rates[0],
        "last_lr": rates[total - 1],
        "warmup_epochs": warmup / steps_per_epoch,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "ema": optim.ema_decay,
        "drop_path": drops[-1],
        "drop_path_first": drops[0],
        "student": config.student.student,
        "layer_scale": architecture.layer_scale,
        "label_loss": loss.label_loss,
        "smoothing": loss.label_smoothing,
        "distillation": loss.distillation,
        "label_weight": loss.label_weight,
        "teacher_weight": loss.teacher_weight if distilled else None,
        "distil": loss.distil if distilled else None,
        "crop_pct": preprocessing_of_student(config, architecture).crop_pct,
        "crop": view.crop,
        "crop_area": view.crop_area,
        "randaugment": view.randaugment,
        "three_augment": view.three_augment,
        "jitter": view.colour_jitter,
        "erasing": view.random_erasing_prob,
        "mixup": view.mixup_alpha,
        "cutmix": view.cutmix_alpha,
        "mixup_prob": view.mixup_prob,
        "switch": view.mixup_switch_prob,
        "repeated_aug": view.repeated_aug,
    }


def test_the_shipped_recipes_are_these() -> None:
    assert sorted(PUBLISHED) == NAMES
    assert list(recipes.shipped()) == sorted([*NAMES, *OWN])


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_the_published_figures(name: str, photos: Dataset) -> None:
    published = dict(PUBLISHED[name])
    written = load_yaml(recipes.find_recipe(name))["student"]
    assert written.get("init") == published.pop("init")
    assert written.get("student") == published.pop("student")
    found = figures(*resolved(name, photos))
    assert found.pop("student") == (
        written.get("student") or ("deit3_base" if name.startswith("deit3") else "deit_base")
    )
    assert found.keys() == published.keys()
    for figure, value in published.items():
        assert found[figure] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), figure


def test_the_teacher_of_a_fine_tuning_sees_as_many_pixels_as_the_student(photos: Dataset) -> None:
    """Touvron et al. 2021, section 4: the teacher has the target resolution, too."""
    for name in ("deit", "deit-1000", "deit-finetune-384"):
        config, architecture = resolved(name, photos, teacher="a teacher")
        assert config.teacher.size == (architecture.image_size if name == "deit-finetune-384" else None)
    config, _ = resolved("deit-finetune-384", photos, teacher="a teacher", teacher_size=224)
    assert config.teacher.teacher_size == 224
    untaught = {"student": "deit_base", "init": "scratch", "distillation": "none"}
    assert build(RunConfig, untaught, recipe=recipes.find_recipe("deit-finetune-384")).teacher.teacher_size is None


def test_the_rates_of_deit_follow_the_batch_and_the_ends_do_not(photos: Dataset) -> None:
    """5e-4 for 512 images, 1e-6 at first and 1e-5 at last for any number."""
    config, architecture = resolved("deit", photos, batch_size=256)
    found = figures(config, architecture)
    assert (found["peak_lr"], found["first_lr"], found["last_lr"]) == pytest.approx((2.5e-4, 1e-6, 1e-5))


def test_the_simple_crop_of_deit3_is_a_flag_away_and_pads_by_four(photos: Dataset) -> None:
    config, _ = resolved("deit3", photos, crop="simple")
    assert (config.view.crop, config.view.crop_padding) == ("simple", 4 / 224)


def test_a_preset_and_the_recipes_views_are_the_same() -> None:
    """`--augment deit` and `--augment deit3` look like the recipes' views; these add how images are cropped and repeated."""
    for name in ("deit", "deit3"):
        view = build(RunConfig, {"distillation": "none"}, recipe=recipes.find_recipe(name)).view
        plain = build(RunConfig, {"augment": name}).view
        own = {"repeated_aug", "crop"}
        assert view.model_dump(exclude=own) == plain.model_dump(exclude=own)


# Two steps of each.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of red and of blue pictures of many sizes."""
    folder = tmp_path_factory.mktemp("recipes") / "pictures"
    generator = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 60, (30 + number, 45 - number, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def redness(images_BCHW: torch.Tensor) -> torch.Tensor:
    """A teacher of the two classes, blue and red."""
    red_B, _, blue_B = images_BCHW.mean((2, 3)).unbind(1)
    return torch.stack([blue_B, red_B], dim=1) * 10


TINY: dict[str, Any] = {
    "student": "deit_pico", "image_size": 16, "length": "2st", "warmup": "1ep", "workers": 0,
}  # fmt: skip
"""All of the data are one batch here, so that two steps are two epochs: one of warm-up, one at the peak and the end."""


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_makes_two_steps(name: str, pictures: Path, tmp_path: Path) -> None:
    teacher = None
    if name.startswith("deit-") or name == "deit":
        as_they_are = Preprocessing(image_size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
        teacher = dk.teacher_from_callable(redness, name="redness", num_classes=2, preprocessing=as_they_are)
    out = tmp_path / "run"
    start: dict[str, Any] = {}
    if load_yaml(recipes.find_recipe(name))["student"].get("init"):
        smaller = {"student": "deit_pico", "image_size": 8, "steps": 1, "workers": 0}
        dk.train(pictures, out=tmp_path / "start", teacher=teacher or "none", progress=SilentProgress(), **smaller)
        start = {
            "init": str(tmp_path / "start"),
            "base_lr": 1e-3,
        }  # so few images: the peak is else below the ends
    summary = dk.train(
        pictures, out=out, recipe=name, teacher=teacher, progress=SilentProgress(), **TINY, **start
    ).summary
    assert (summary["steps"], summary["teacher"] is not None) == (2, teacher is not None)
    assert (summary["top1"]["dist"] is not None) == (teacher is not None)
    weights = load_file(out / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    # What ran is what the recipe says, but for what was made smaller, and the batch: there are fewer images.
    ran = validated(RunConfig, load_yaml(out / "config.yaml"), "config.yaml").model_dump()
    for section, values in load_yaml(recipes.find_recipe(name)).items():
        for key, value in values.items():
            if key not in (*TINY, *start, "batch_size", "teacher_size") and value is not None:
                assert ran[section][key] == value, f"{section}.{key}"


def test_a_recipe_s_name_is_found_from_any_folder(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "--recipe deit --student deit_pico --image-size 16 --steps 2 --warmup 1ep --workers 0 --out run"
    assert cli.main(["train", str(pictures), *flags.split()]) == 2
    assert "--distillation: 'hard' needs a teacher: give --teacher, or --distillation none" in capsys.readouterr().err
    flags += " --distillation none"
    assert cli.main(["train", str(pictures), *flags.split()]) == 0
    assert load_yaml(tmp_path / "run" / "config.yaml")["optim"]["ema_decay"] == 0.99996


# Finding, listing, refusing.


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins_with_its_card(name: str) -> None:
    """A title, the command, hardware, time and score: published ones with their source, those of this project if there are
    any. The command is one that `deit train` understands."""
    lines = recipes.card(recipes.find_recipe(name))
    text = "\n".join(lines)
    assert re.search(r"arXiv \d{4}\.\d{5}", lines[0])
    entries = dict(re.findall(r"^(command|hardware|time|score) +(.+)$", text, re.MULTILINE))
    assert set(entries) == {"command", "hardware", "time", "score"}
    assert re.search(r"the paper.*\d\d\.\d|not run here", entries["score"])
    command = shlex.split(entries["command"])
    assert command[:3] == ["deit", "train", "IMAGENET"]
    assert command[command.index("--recipe") + 1] == name
    config, _ = Call(command[2:], "deit train", "").configured(RunConfig, *ARGUMENTS)
    given = {"init": config.student.init, **teacher_of(config)}
    assert config.loop == build(RunConfig, given, recipe=recipes.find_recipe(name)).loop


@pytest.mark.parametrize("name", OWN)
def test_a_recipe_of_our_own_says_what_it_reached_and_how(name: str) -> None:
    text = "\n".join(recipes.card(recipes.find_recipe(name)))
    entries = dict(re.findall(r"^(command|hardware|time|score) +(.+)$", text, re.MULTILINE))
    assert set(entries) == {"command", "hardware", "time", "score"}
    assert re.search(r"test.*\d\d\.\d\d", entries["score"])
    evidence = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "evidence").glob("*.md"))
    assert entries["score"].rpartition(" ")[2] in evidence
    command = shlex.split(entries["command"])
    config, _ = Call(command[2:], "deit train", "").configured(RunConfig, *ARGUMENTS)
    teacher = {"teacher": "x"} if "--teacher" in command else {}
    given = {**teacher, "processes": config.loop.processes}
    assert config.loop == build(RunConfig, given, recipe=recipes.find_recipe(name)).loop


def teacher_of(config: RunConfig) -> dict[str, Any]:
    return {"teacher": config.teacher.teacher} if config.teacher.present else {}


def test_an_unknown_recipe_is_one_line_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "digits", "--recipe", "xyz", "--out", "x"]) == 2
    assert capsys.readouterr().err == f"deit: error: unknown recipe 'xyz': known: {', '.join(recipes.shipped())}\n"
    with pytest.raises(UserError, match="unknown recipe 'deit4': did you mean deit"):
        recipes.find_recipe("deit4")


def test_fine_tuning_without_weights_to_go_on_from_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("deit-finetune-384", "deit3-finetune-224"):
        assert cli.main(["train", "digits", "--recipe", name, "--out", "x"]) == 2
        line = capsys.readouterr().err
        assert line == "deit: error: --init: this recipe goes on from pretrained weights: give --init\n"


def test_fine_tuning_at_384_keeps_the_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "digits", "--recipe", "deit-finetune-384", "--init", "weights", "--out", "x"]
    assert cli.main(argv) == 2
    assert "--distillation: 'hard' needs a teacher: give --teacher" in capsys.readouterr().err


def test_a_comparison_starts_from_a_recipe_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Its length gives way to another one, like every setting of it."""
    from deitkit.comparison.plan import asked_for, contender_config

    nothing: dict[str, Any] = {"plan": None, "choose_teacher": [], "losses": [], "seeds": None, "budget_minutes": None}
    settings = {"teacher": "x", "steps": 10, "warmup": "50%", "student": "deit_pico"}
    plan = asked_for(
        Path("x"), **nothing, recipe=recipes.find_recipe("deit"), resume=False, settings=settings
    )  # fmt: skip
    config = contender_config(plan, "hard")
    assert (config.loop.steps, config.optim.warmup) == (10, "50%")
    assert (config.optim.ema_decay, config.view.repeated_aug, config.student.student) == (0.99996, 3, "deit_pico")


def test_the_verb_lists_them_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    page = capsys.readouterr().out
    for name, path in recipes.shipped().items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(recipes.card(path)[0][:30])}", page, re.MULTILINE)
    assert cli.main(["recipes", "deit3"]) == 0
    assert capsys.readouterr().out == recipes.find_recipe("deit3").read_text(encoding="utf-8")
    assert cli.main(["recipes", "deit4"]) == 2


def test_an_installed_package_has_them_too(tmp_path: Path) -> None:
    """As the wheel lays them out, and with no checkout around it."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    ((source, target),) = build["wheel"]["force-include"].items()
    assert {"/recipes", "/benchmarks"} <= set(build["sdist"]["include"])
    assert all((ROOT / name.strip("/")).exists() for name in build["sdist"]["include"])
    shutil.copytree(ROOT / "src" / "deitkit", tmp_path / "deitkit", ignore=shutil.ignore_patterns("__pycache__"))
    script = "import deitkit.settings as r; print(*r.shipped(), r.find_recipe('deit'))"

    def printed() -> str:
        command = [sys.executable, "-c", script]
        run = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        return run.stdout.strip() or run.stderr

    assert "none is shipped: give the path of a YAML file" in printed()
    shutil.copytree(ROOT / source, tmp_path / target)
    assert printed() == f"{' '.join(recipes.shipped())} {tmp_path / target / 'deit.yaml'}"


def test_every_module_that_states_shapes_is_checked_by_the_suite() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"][
        "addopts"
    ]
    (text,) = (option for option in options if option.startswith("--jaxtyping-packages="))
    names = text.partition("=")[2].split(",")
    for path in sorted((ROOT / "src").rglob("*.py")):
        if "from jaxtyping" in path.read_text(encoding="utf-8"):
            module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
            assert any(f"{module}.".startswith(f"{name}.") for name in names), module


# The documentation.

ROWS = {
    "pixels": "size", "epochs": "epochs", "batch size": "batch_size", "optimizer": "optimizer", "learning rate": "peak_lr",
    "first": "first_lr", "last": "last_lr", "warm-up, epochs": "warmup_epochs", "weight decay": "weight_decay",
    "clipped to norm": "max_grad_norm", "moving average": "ema", "drop-path, first block": "drop_path_first",
    "drop-path, last block": "drop_path", "loss to the labels": "label_loss", "label smoothing": "smoothing", "crop": "crop",
    "RandAugment": "randaugment", "3-Augment": "three_augment", "colour jitter": "jitter", "erasing": "erasing",
    "mixup": "mixup", "CutMix": "cutmix", "repeated augmentation": "repeated_aug", "evaluation crop": "crop_pct",
}  # fmt: skip


def cell(value: Any) -> str:
    if value is None or value is False or value == 0:
        return "-"
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def settings_table(photos: Dataset) -> str:
    columns = {name: figures(*resolved(name, photos)) for name in NAMES}
    lines = [["", *(f"`{name}`" for name in NAMES)], ["---"] * (1 + len(NAMES))]
    lines += [[title, *(cell(columns[name][key]) for name in NAMES)] for title, key in ROWS.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_table_in_the_docs_is_that_of_the_recipes(photos: Dataset) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert settings_table(photos) in page
    for name in NAMES:
        assert f"`{name}`" in page.replace(settings_table(photos), "")
