"""Settings from what was asked for: flat ones put where they belong, those that the data decide filled in, the teacher that
`auto` stands for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from deitkit.config import (
    FROM_SCRATCH,
    Config,
    ConfigT,
    DataConfig,
    FitConfig,
    InitFacts,
    LoopConfig,
    LossConfig,
    RunConfig,
    StudentConfig,
    ViewConfig,
    ViTConfig,
)
from deitkit.config_base import Distillation
from deitkit.data import Dataset, load_data
from deitkit.data.base import NO_LABEL, SMALL_IMAGE, is_small
from deitkit.device import default_device, settled
from deitkit.errors import UserError, unknown_name
from deitkit.progress import Progress, counted
from deitkit.settings import merge, recipe_defaults, turned_off, under_tape, validated
from deitkit.starting import find_start, refuse_misfit
from deitkit.tapecard import read_card, settings_of
from deitkit.zoo import choose_student, fitting_student, never_distils, size_at_first

SIMPLE_PADDING = 4
"""Pixels that `--crop simple` adds on every side, as in DeiT III's code."""
AUTOMATIC_SMALL_VIEWS = {16: 60_000, SMALL_IMAGE: 500_000}
"""Views that an automatic teacher of small images learns from, by the images' greatest side."""
AUTOMATIC_PHOTO_EPOCHS, AUTOMATIC_PHOTO_STEPS, MOST_AUTOMATIC_EPOCHS = 6, 150, 60
"""An automatic teacher of photos sees them so often, or oftener until it has made so many steps; few photos are not shown
for ever."""


def configured(kind: type[ConfigT], settings: dict[str, Any], recipe: Path | None = None) -> ConfigT:
    """`kind` from flat settings: each goes to the section that has a field of that name; the file of a `recipe` has the
    defaults that they change, `augment` chooses the preset of the views, `tape` the views and the split. Raises UserError,
    naming close settings where one is unknown."""
    values: dict[str, Any] = {}
    sections = {name: section for name, section in kind() if isinstance(section, Config)}
    for key, value in settings.items():
        home = next((name for name, section in sections.items() if key in type(section).model_fields), None)
        if home is None and key not in kind.model_fields:
            within = [name for section in sections.values() for name in type(section).model_fields]
            raise unknown_name("setting", key, [*kind.model_fields, *within])
        values = merge(values, {key: value} if home is None else {home: {key: value}})
    defaults = recipe_defaults(kind, recipe, settings)
    defaults = merge(defaults, turned_off(defaults, settings))
    if settings.get("tape") is not None:
        defaults = under_tape(defaults, settings_of(Path(str(settings["tape"]))), settings)
    return validated(kind, merge(defaults, values), "settings")


def with_teacher(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=changes)})


def default_distillation(config: RunConfig, classes: int) -> Distillation:
    """What is learned from a teacher where nobody says: how its logits lie to each other, where there are more than two and
    the answers that are recorded have them all; else its decisions. Raises UserError where the tape cannot be read."""
    if not config.teacher.present:
        return "none"
    answers = config.teacher.answers
    if config.teacher.tape is not None:
        answers = read_card(Path(config.teacher.tape)).answers
    all_there = answers is None or LossConfig(distillation="zscore").shortage(answers) is None
    return "zscore" if classes > 2 and all_there else "hard"


def refuse_lost_temperature(asked: LossConfig, resolved: LossConfig) -> None:
    """Raises UserError where a temperature is given and the loss that the data or the tape chose has none."""
    if asked.distillation is None and asked.temperature is not None and resolved.distillation == "hard":
        raise UserError(
            f"--temperature {asked.temperature:g}: of two classes, and from a tape without all logits, decisions are learned, "
            "which have none: give --distillation soft, or leave it out"
        )


def with_precision(loop: LoopConfig) -> LoopConfig:
    """`loop` with the number format that `auto` stands for on this machine: a run goes on in it on any other. Raises UserError."""
    return loop.model_copy(update={"precision": settled(loop.precision, default_device())})


def completed(loss: LossConfig, distillation: Distillation) -> LossConfig:
    """`loss` with what it leaves open, and without what does not apply to it."""
    loss = loss.model_copy(update={"distillation": distillation})
    return loss.model_copy(
        update={
            "temperature": loss.softening if loss.needs_logits else None,
            "teacher_weight": loss.pull if loss.two_terms else None,
        }
    )


def resolve(config: RunConfig, dataset: Dataset, location: str, start: InitFacts | None = None) -> RunConfig:
    """`config` with everything filled in that the data decide. `start`: of the weights that `--init` names, looked up if not
    given. A student that follows from them keeps no name of its own. Raises UserError."""
    distillation = config.loss.distillation or default_distillation(config, len(dataset.classes))
    if distillation == "zscore" and len(dataset.classes) < 3:
        raise UserError(
            "--distillation zscore needs three classes: of two, z-scores are 1 and -1 whatever the logits: give hard or soft "
            "(to compare: --losses hard soft)"
        )
    if config.data.unlabelled:
        _refuse_unlabelled(config.loss, distillation)
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"location": location}),
            "loss": completed(config.loss, distillation),
            "loop": with_precision(config.loop),
            "student": _completed_student(config.student, dataset),
        }
    )
    architecture = student_architecture(config, dataset, start)
    return config.model_copy(update={"view": resolve_view(config.view, dataset, architecture.image_size)})


def _completed_student(student: StudentConfig, dataset: Dataset) -> StudentConfig:
    """With the name that fits the images, but for one that follows from weights, and the share of small images."""
    named = student.student if student.init is not None else student.student or fitting_student(dataset.image_size)
    share = None if student.small_size is None else student.small_share or 0.5
    return student.model_copy(update={"student": named, "small_share": share})


def _refuse_unlabelled(loss: LossConfig, distillation: Distillation) -> None:
    """Raises UserError where nobody says anything of images without labels, or where a label is needed to hear it."""
    if distillation == "none" or loss.teacher_weight == 0:
        why = "--teacher-weight 0 does not listen to it" if loss.teacher_weight == 0 else "give --teacher"
        raise UserError(
            f"--unlabelled: of images without labels only a teacher can say what they are: {why} (or --no-unlabelled)"
        )
    if distillation == "dkd":
        raise UserError(
            "--unlabelled: dkd looks at the label's class apart: give --distillation soft, zscore, dist or hard"
        )


def resolve_view(view: ViewConfig, dataset: Dataset, network_size: tuple[int, int]) -> ViewConfig:
    """Small images keep their size and are shifted; photos are cropped to the network's size. Raises UserError."""
    size = dataset.image_size
    pairs = -(-len(dataset.open_split("train")) // 2)
    if view.repeats > pairs:
        raise UserError(
            f"--repeats {view.repeats}: there are {pairs} pairs of training images, an epoch cannot take 1/{view.repeats} of them"
        )
    small = is_small(size)
    crop = view.crop or ("pad" if small else "resize")
    changes: dict[str, Any] = {
        "crop": crop,
        "view_size": view.view_size or (size if small else network_size),
        "flip_probability": view.flip_probability
        if view.flip_probability is not None
        else (0.5 if dataset.mirror_safe else 0.0),
    }
    eighth = round(min(changes["view_size"]) / 8)
    padding = view.crop_padding if view.crop_padding is not None else SIMPLE_PADDING if crop == "simple" else eighth
    if crop == "simple" and padding >= min(changes["view_size"]):
        height, width = changes["view_size"]
        raise UserError(f"--crop-padding {padding}: views of {height} x {width} pixels can be padded by less than that")
    if crop == "pad" and (size is None or changes["view_size"] != size):
        raise UserError(f"--crop pad needs images of one size that is the view's: {dataset.name} is to be resized")
    if crop == "pad" and size is not None and padding >= min(size):
        raise UserError(
            f"--crop-padding {padding}: images of {size[0]} x {size[1]} pixels can be padded by less than that"
        )
    return view.model_copy(update={**changes, "crop_padding": padding})


def student_architecture(config: RunConfig, dataset: Dataset, start: InitFacts | None = None) -> ViTConfig:
    """The student's shape. It has a distillation token where its loss teaches one, and only there. One that starts from
    weights (`start`, looked up if not given) keeps their channels: `Network` shows it a grey image in all three, as it does
    to a pretrained teacher. Raises UserError."""
    if start is None and (found := find_start(config.student)) is not None:
        start = found.facts
    channels = dataset.channels if start is None else start.architecture.channels
    base = choose_student(
        config.student,
        dataset.image_size,
        channels,
        len(dataset.classes),
        None if start is None else start.architecture,
    )
    token = config.loss.distillation != "none" and config.loss.distil_head == "dist"
    token = token or config.loss.distil_target == "labels"
    if token and never_distils(config.student.student):
        raise UserError(
            f"--student {config.student.student}: has no distillation token for the teacher to teach: take one without "
            f"_plain or vit_ in its name, or give --distil-head cls"
        )
    architecture = base.model_copy(update={"distillation_token": token})
    if start is not None:
        refuse_misfit(architecture, start)
    size_at_first(config.student, architecture)
    return architecture


def load(location: str, config: DataConfig, progress: Progress) -> Dataset:
    dataset = load_data(location, config)
    for bad in dataset.bad_images:
        progress.warn(f"left out: {bad}")
    return dataset


def say_unlabelled(dataset: Dataset, progress: Progress) -> None:
    """How many images have no label, or that such images are left out."""
    labels_N = dataset.open_split("train").labels_N
    without = int((labels_N == NO_LABEL).sum())
    if without:
        shown = counted(without, "training image")
        progress.say(f"{shown} of {len(labels_N):,} without a label: there the teacher alone says what they are")
    elif dataset.more_unlabelled:
        progress.say(
            "images without labels are left out: with --unlabelled a student learns from them, too, by its teacher"
        )


def automatic_fit(dataset: Dataset, config: RunConfig) -> FitConfig:
    """The CNN that `--teacher auto` fits: the packaged EfficientNet-Lite0 for photos, a CIFAR-style ResNet from scratch for
    small images. It sees the images that the student sees, no others, at the size that `--teacher-size` says."""
    view = {"view_seed": config.view.view_seed, "flip_probability": config.view.flip_probability}
    defaults = FitConfig()
    size, images = dataset.image_size, int((dataset.open_split("train").labels_N != NO_LABEL).sum())
    small = is_small(size)
    if is_small(size):
        tiny = max(size) <= 16
        model, image_size = "cifar-resnet8" if tiny else "cifar-resnet20", None
        epochs = math.ceil(AUTOMATIC_SMALL_VIEWS[16 if tiny else SMALL_IMAGE] / images)
        batch_size, optim = FROM_SCRATCH["loop"]["batch_size"], FROM_SCRATCH["optim"]
    else:
        assert config.view.view_size is not None
        model, image_size = "lite0", config.view.view_size[0]
        batch_size, optim = 32, {"lr_per_256_images": 4e-3}
        epochs = max(AUTOMATIC_PHOTO_EPOCHS, math.ceil(AUTOMATIC_PHOTO_STEPS / math.ceil(images / batch_size)))
    loop = {
        "epochs": min(MOST_AUTOMATIC_EPOCHS, epochs),
        "batch_size": batch_size,
        "steps": None,
        "budget_minutes": None,
    }
    return defaults.model_copy(
        update={
            "model": model,
            "from_scratch": small,
            "image_size": config.teacher.teacher_size or image_size,
            "data": config.data.model_copy(update={"unlabelled": False}),
            "view": defaults.view.model_copy(update=view),
            "loop": config.loop.model_copy(update=loop),
            "optim": defaults.optim.model_copy(update=optim),
        }
    )
