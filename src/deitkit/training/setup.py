"""Settings from what was asked for: flat ones put where they belong, those that the data decide filled in, the teacher that
`auto` stands for.

The loop made ready for a network: a student, fresh or with weights to start from, or a convolutional teacher.

How long a step and an evaluation take on this machine, for a time limit that becomes steps before the first one.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from deitkit.config import (
    DataConfig,
    Distillation,
    FitConfig,
    LoopConfig,
    LossConfig,
    Preprocessing,
    RunConfig,
    StudentConfig,
    ViewConfig,
)
from deitkit.data import Dataset, load_data
from deitkit.data.dataset import NO_LABEL, SMALL_IMAGE, is_small
from deitkit.distill.losses import LossFunction
from deitkit.distill.optim import make_optimizer, set_trainable, trained_names
from deitkit.distill.step import Plan, State, train_step
from deitkit.distill.tape import read_manifest
from deitkit.models.network import Network, default_device, resolve_precision
from deitkit.models.start import (
    InitFacts,
    InitWeights,
    check_same_shape,
    find_start,
    load_into_student,
    start_preprocessing,
)
from deitkit.models.vit import ViT, ViTConfig, stochastic_depth_rates
from deitkit.models.zoo import (
    choose_student,
    fitting_student,
    low_res_shape,
    never_distils,
    parameter_count,
    student_preprocessing,
)
from deitkit.settings import MUON
from deitkit.terminal import Progress, UserError, plural
from deitkit.training.evaluate import split_logits_of_network
from deitkit.training.loop import Trainer
from deitkit.training.run import RunFolder
from deitkit.training.teaching import Teaching
from deitkit.views.loader import TrainLoader

SIMPLE_PADDING = 4
"""Pixels that `--crop simple` adds on every side, as in DeiT III's code."""
AUTOMATIC_SMALL_VIEWS = {16: 60_000, SMALL_IMAGE: 500_000}
"""Views that an automatic teacher of small images learns from, by the images' greatest side."""
AUTOMATIC_PHOTO_EPOCHS, AUTOMATIC_PHOTO_STEPS, MOST_AUTOMATIC_EPOCHS = 6, 150, 60
"""An automatic teacher of photos sees them so often, or oftener until it has made so many steps; few photos are not shown
for ever."""


def with_teacher(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=changes)})


def default_distillation(config: RunConfig, classes: int) -> Distillation:
    """What is learned from a teacher where nobody says: how its logits lie to each other, where there are more than two and
    the answers that are recorded have them all; else its decisions. Raises UserError where the tape cannot be read."""
    if not config.teacher.present:
        return "none"
    zscore = classes > 2
    if config.teacher.tape is not None:
        zscore = zscore and read_manifest(Path(config.teacher.tape)).outputs == "all"
    return "zscore" if zscore else "hard"


def refuse_lost_temperature(asked: LossConfig, resolved: LossConfig) -> None:
    """Raises UserError where a temperature is given and the loss that the data or the tape chose has none."""
    if asked.distillation is None and asked.temperature is not None and resolved.distillation == "hard":
        raise UserError(
            f"--temperature {asked.temperature:g}: of two classes, and from a tape without all logits, decisions are learned, "
            "which have none: give --distillation soft, or leave it out"
        )


def with_precision(loop: LoopConfig) -> LoopConfig:
    """`loop` with the number format that `auto` stands for on this machine: a run goes on in it on any other. Raises UserError."""
    return loop.model_copy(update={"precision": resolve_precision(loop.precision, default_device())})


def fill_loss_defaults(loss: LossConfig, distillation: Distillation) -> LossConfig:
    """`loss` with this distillation loss, and what that implies; without a temperature where there is none."""
    values = {**loss.model_dump(), "distillation": distillation}
    if distillation in ("none", "hard"):
        values["temperature"] = None
    return LossConfig.model_validate(values)


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
            "loss": fill_loss_defaults(config.loss, distillation),
            "loop": with_precision(config.loop),
            "student": _completed_student(config.student, dataset),
        }
    )
    architecture = student_architecture(config, dataset, start)
    return config.model_copy(update={"view": resolve_view(config.view, dataset, architecture.image_size)})


def _completed_student(student: StudentConfig, dataset: Dataset) -> StudentConfig:
    """With the name that fits the images, but for one that follows from weights, and the share of small images."""
    named = student.student if student.init is not None else student.student or fitting_student(dataset.image_size)
    share = None if student.low_res_size is None else student.low_res_fraction or 0.5
    return student.model_copy(update={"student": named, "low_res_fraction": share})


def _refuse_unlabelled(loss: LossConfig, distillation: Distillation) -> None:
    """Raises UserError where nobody says anything of images without labels, or where a label is needed to hear it."""
    if distillation == "none" or loss.teacher_weight == 0:
        why = "--teacher-weight 0 does not listen to it" if loss.teacher_weight == 0 else "give --teacher"
        raise UserError(
            f"--unlabelled: of images without labels only a teacher can say what they are: {why} (or --no-unlabelled)"
        )


def resolve_view(view: ViewConfig, dataset: Dataset, network_size: tuple[int, int]) -> ViewConfig:
    """Small images keep their size and are shifted; photos are cropped to the network's size. Raises UserError."""
    size = dataset.image_size
    pairs = -(-len(dataset.open_split("train")) // 2)
    if view.repeated_aug > pairs:
        raise UserError(
            f"--repeated-aug {view.repeated_aug}: an epoch takes 1/{view.repeated_aug} of the pairs, and there are "
            f"{pairs} pairs of training images"
        )
    small = is_small(size)
    crop = view.crop or ("pad" if small else "resize")
    changes: dict[str, Any] = {
        "crop": crop,
        "view_size": view.view_size or (size if small else network_size),
        "flip_prob": view.flip_prob if view.flip_prob is not None else (0.5 if dataset.mirror_safe else 0.0),
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
    token = config.loss.has_distill_term and config.loss.distil != "cls"
    if token and never_distils(config.student.student):
        raise UserError(
            f"--student {config.student.student}: has no distillation token for the teacher to teach: take one without "
            f"_plain or vit_ in its name, or give --distil cls"
        )
    architecture = base.model_copy(update={"distillation_token": token})
    if start is not None:
        check_same_shape(architecture, start)
    low_res_shape(config.student, architecture)
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
        shown = plural(without, "training image")
        progress.say(f"{shown} of {len(labels_N):,} without a label: there the teacher alone says what they are")
    elif dataset.more_unlabelled:
        progress.say(
            "images without labels are left out: with --unlabelled a student learns from them, too, by its teacher"
        )


def automatic_fit(dataset: Dataset, config: RunConfig) -> FitConfig:
    """The CNN that `--teacher auto` fits: the packaged EfficientNet-Lite0 for photos, a CIFAR-style ResNet from scratch for
    small images. It sees the images that the student sees, no others, at the size that `--teacher-size` says."""
    view = {"view_seed": config.view.view_seed, "flip_prob": config.view.flip_prob}
    defaults = FitConfig()
    size, images = dataset.image_size, int((dataset.open_split("train").labels_N != NO_LABEL).sum())
    small = is_small(size)
    if is_small(size):
        tiny = max(size) <= 16
        model, image_size = "cifar-resnet8" if tiny else "cifar-resnet20", None
        epochs = math.ceil(AUTOMATIC_SMALL_VIEWS[16 if tiny else SMALL_IMAGE] / images)
        batch_size, optim = 64, MUON
    else:
        assert config.view.view_size is not None
        model, image_size = "lite0", config.view.view_size[0]
        batch_size, optim = 32, {"base_lr": 4e-3}
        epochs = max(AUTOMATIC_PHOTO_EPOCHS, math.ceil(AUTOMATIC_PHOTO_STEPS / math.ceil(images / batch_size)))
    loop = {"length": f"{min(MOST_AUTOMATIC_EPOCHS, epochs)}ep", "batch_size": batch_size}
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


def student_trainer(
    config: RunConfig,
    architecture: ViTConfig,
    dataset: Dataset,
    folder: RunFolder,
    progress: Progress,
    accelerator: Accelerator,
    teaching: Teaching,
    start: InitWeights | None = None,
    loss_function: LossFunction | None = None,
) -> Trainer:
    """The loop for a student of this shape, fresh or with the weights of `start`; how many steps it makes is not yet said."""
    torch.manual_seed(config.loop.seed)
    vit = ViT(architecture)
    if start is not None:
        for line in load_into_student(vit, start, dataset.classes, dataset.channels):
            progress.say(line)
    network = Network(vit, preprocessing_of_student(config, architecture, start and start.facts))
    trained = _set_trainable(network, config.optim.trainable, architecture.depth, progress)
    plan = Plan(
        view=config.view,
        loss=config.loss,
        loss_function=loss_function,
        optim=config.optim,
        loop=config.loop,
        total_steps=0,
        drop_rates=drop_rates(config.student, architecture.depth),
        low_res_size=low_res_shape(config.student, architecture),
        low_res_fraction=config.student.low_res_fraction or 0.0,
        trained_names=trained,
    )
    return make_trainer(network, plan, dataset, folder, progress, accelerator, teaching)


def preprocessing_of_student(
    config: RunConfig, architecture: ViTConfig, facts: InitFacts | None = None
) -> Preprocessing:
    """How a student sees test images: as its weights (`facts`) or its training ask, or cropped as the configuration says."""
    photos = config.view.crop in ("resize", "simple")
    if facts is None:
        preprocessing = student_preprocessing(architecture, photos=photos, name=config.student.student)
    else:
        preprocessing = start_preprocessing(architecture, facts, photos=photos)
    if config.student.crop_pct is None:
        return preprocessing
    return preprocessing.model_copy(update={"crop_pct": config.student.crop_pct})


def drop_rates(student: StudentConfig, depth: int) -> tuple[float, ...]:
    """Probability of dropping each of the 2 * depth residual branches: rising to `drop_path` (DeiT), or the same for all
    (DeiT III, section 3)."""
    if student.drop_path_rule == "constant":
        return (student.drop_path,) * (2 * depth)
    return tuple(stochastic_depth_rates(depth, student.drop_path))


def _set_trainable(network: Network, trainable: str, depth: int, progress: Progress) -> frozenset[str] | None:
    """The names of the parameters that learn, the others frozen; None where all learn. Raises UserError."""
    if trainable == "all":
        return None
    if trainable.startswith("last-") and int(trainable.removeprefix("last-")) > depth:
        raise UserError(f"--trainable {trainable}: the student has {depth} blocks")
    trained = trained_names(network, trainable, depth)
    set_trainable(network, trained)
    learning = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    progress.say(f"--trainable {trainable}: {learning:,} of {parameter_count(network):,} parameters learn")
    return trained


def make_trainer(
    network: Network,
    plan: Plan,
    dataset: Dataset,
    folder: RunFolder,
    progress: Progress,
    accelerator: Accelerator,
    teaching: Teaching,
) -> Trainer:
    loader = TrainLoader(
        dataset.open_split("train"),
        plan.view,
        batch_size=plan.loop.batch_size,
        seed=plan.loop.seed,
        workers=plan.loop.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        augmenting=accelerator.device.type == "cpu",
    )
    if loader.smallest_step < loader.world:
        raise UserError(
            f"--processes {loader.world}: a step may have {loader.smallest_step} images, too few for each process to get one: "
            f"give a larger --batch-size or fewer processes"
        )
    return Trainer(
        network=network,
        plan=plan,
        loader=loader,
        validation=dataset.open_split("val"),
        run=folder,
        progress=progress,
        accelerator=accelerator,
        teacher=teaching.source,
        teacher_on_validation=teaching.validation_N,
    )


def measure_speed(trainer: Trainer, *, steps: int = 10, most_seconds: float = 30.0) -> tuple[float, float]:
    """Seconds of a step, the mean over the whole run, and of one evaluation, measured on copies: nothing of the run changes.
    With small images at first, both kinds of steps are measured, so many or so long of each."""
    accelerator, plan = trainer.accelerator, replace(trainer.plan, total_steps=10**6)
    network = copy.deepcopy(trainer.network).to(accelerator.device).train()
    ema = copy.deepcopy(network) if plan.optim.ema_decay > 0 else None
    state = State(network=network, optimizer=make_optimizer(network, plan.optim), ema=ema)
    if plan.loop.compile:
        network.compile()
    seconds = 0.0
    for first_step, share in plan.phases():
        state.step = first_step
        seconds += share * mean_step(trainer, state, plan, steps, most_seconds)
    started = time.perf_counter()
    evaluated = Network(network.body, network.preprocessing)  # as a run evaluates it: not compiled
    split_logits_of_network(evaluated, trainer.validation, accelerator.device, trainer.loader.workers)
    return seconds, time.perf_counter() - started


def mean_step(trainer: Trainer, state: State, plan: Plan, steps: int, most_seconds: float) -> float:
    """Seconds of a step, over so many of them, from where `state` is. The first ones do not count: workers have to start, and
    what is compiled is compiled, for up to two sizes of a batch."""
    accelerator, first = trainer.accelerator, 3 if plan.loop.compile else 1
    seconds: list[float] = []
    started = time.perf_counter()
    for crops in trainer.loader.batches(0, min(steps, trainer.loader.steps_per_epoch)):
        with accelerator.autocast():
            train_step(state, crops, trainer.teacher, plan, accelerator, plan.loop.batch_size)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)  # since the last batch was done: waiting for data counts
        started = time.perf_counter()
        if sum(seconds[first:]) > most_seconds:
            break
    return float(np.mean(seconds[first:] or seconds[-1:]))  # the mean, for workers hand over their batches in bursts
