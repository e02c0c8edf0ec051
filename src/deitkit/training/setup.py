"""What a run needs before its first step: settings that the data decide, the student, its images.

`resolve` fills in every setting that was left open. `student_network` and `student_plan` make what the Trainer trains and how.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from deitkit.config import (
    AUTO,
    FEATURE_WEIGHT,
    MIMETIC,
    SCRATCH,
    SHAPE,
    ClassWeights,
    DataConfig,
    JobConfig,
    LoopConfig,
    LossConfig,
    Preprocessing,
    RunConfig,
    Size,
    ViewConfig,
)
from deitkit.data import Dataset, load_data, refuse_among_images
from deitkit.data.dataset import NO_LABEL, is_small
from deitkit.distill.losses import LossFunction
from deitkit.distill.optim import set_trainable, trained_names, warmup_steps
from deitkit.distill.step import Plan
from deitkit.distill.tape import read_manifest
from deitkit.distill.teacher import Teacher
from deitkit.models.network import Network, default_device, resolve_precision
from deitkit.models.start import (
    InitFacts,
    InitWeights,
    check_same_shape,
    find_start,
    load_into_student,
    start_preprocessing,
)
from deitkit.models.vit import ViT, ViTConfig, mimic_trained_attention, stochastic_depth_rates
from deitkit.models.zoo import (
    choose_student,
    fitting_student,
    is_deit3,
    low_res_shape,
    never_distils,
    parameter_count,
    student_preprocessing,
)
from deitkit.settings import own_weights
from deitkit.terminal import Progress, UserError, plural
from deitkit.training.run import RunFolder
from deitkit.views.loader import TrainLoader

PADDING = {"simple": 4 / 224, "pad": 1 / 8}
"""Share of the view that a crop adds on every side; for `simple` as in DeiT III's code, 4 pixels of 224."""


# -------------------------------------------------------------------------------------------------- settings


def load(location: str, config: DataConfig, progress: Progress) -> Dataset:
    """`load_data`, with a warning for every image that is left out, and for what else the user should know."""
    dataset = load_data(location, config)
    for line in (*(f"left out: {bad}" for bad in dataset.bad_images), *dataset.remarks):
        progress.warn(line)
    return dataset


CHOICES = {
    "student",
    "init",
    "tape",
    "optimizer",
    "augment",
    "low_res_size",
    *SHAPE,
}
"""Who sets one of these has a recipe in mind."""
RECIPE_ALL_THE_SAME = (("init", AUTO), ("init", SCRATCH), ("init", MIMETIC))
"""Settings with values that do not mean another recipe."""
FEW_IMAGES, FEW_PHOTOS = 10_000, 1_500
"""Up to so many small images, or photos, the recipe few-images, or few-photos, is taken."""


def opened_unasked(
    location: str, config: RunConfig, out: Path, *, resume: bool, given: Mapping[str, Any], progress: Progress
) -> tuple[Dataset, str | None]:
    """The images of a run for which no recipe was asked, and `recipe_unasked`. Raises UserError; what is wrong with the folder of the run
    is told before any image is read."""
    if resume:
        RunFolder(out).config(RunConfig)
    else:
        RunFolder(out).refuse_existing(RunConfig)
    refuse_among_images(location, out)
    dataset = load(location, config.data, progress)
    return dataset, recipe_unasked(dataset, given, progress)


def recipe_unasked(dataset: Dataset, given: Mapping[str, Any], progress: Progress) -> str | None:
    """The shipped recipe for these images, where the `given` settings leave the choice open. It is told."""
    size, count = dataset.image_size, len(dataset.open_split("train"))
    few = count <= FEW_IMAGES and len(dataset.classes) > 2  # the recipe few-images has z-scores
    name = "few-images" if is_small(size) and max(size) > 16 and few else None
    if not is_small(size):
        name = "few-photos" if count <= FEW_PHOTOS else "photos"
    chosen = CHOICES & {setting for setting, value in given.items() if (setting, value) not in RECIPE_ALL_THE_SAME}
    if name is None or chosen:
        return None
    progress.say(f"recipe: {name} (deit recipes {name} shows it; flags change it)")
    return name


def with_precision(loop: LoopConfig) -> LoopConfig:
    """`loop` with the precision that `auto` stands for on this machine; a resumed run keeps it elsewhere. Raises UserError."""
    return loop.model_copy(update={"precision": resolve_precision(loop.precision, default_device())})


def with_init(config: RunConfig, dataset: Dataset) -> RunConfig:
    """`config` with the weights that `--init auto` stands for, and the student that they belong to. Raises UserError."""
    if config.student.init != AUTO:
        return config
    name = config.student.student or fitting_student(dataset.image_size)
    init = own_weights(name, config.student.model_dump())
    if init is None and config.optim.trainable != "all":
        raise UserError(
            f"--init auto: there are no pretrained weights of the student {name} in this shape: give --init"
        )
    return config.changed(student={"student": name, "init": init})


def resolve(config: RunConfig, dataset: Dataset, location: str, start: InitFacts | None = None) -> RunConfig:
    """`config` with everything filled in that the data decide. `start`: facts about the weights of `--init`, looked up if not
    given. A student whose shape follows from them gets no name. Raises UserError."""
    config = with_init(config, dataset)
    loss = _resolve_loss(config, len(dataset.classes))
    student = config.student
    if student.is_fresh and student.student is None:
        student = student.model_copy(update={"student": fitting_student(dataset.image_size)})
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"location": location}),
            "loss": loss,
            "loop": with_precision(config.loop),
            "student": student,
        }
    )
    architecture = student_architecture(config, dataset, start)
    return config.model_copy(update={"view": resolve_view(config.view, dataset, architecture.image_size)})


def _resolve_loss(config: RunConfig, classes: int) -> LossConfig:
    """The loss with its distillation loss and what that implies. By default z-scored logits are learned from a teacher; its hard labels
    if there are two classes, or a tape without all logits. Raises UserError."""
    loss, distillation = config.loss, config.loss.distillation
    if distillation is None and not config.teacher.present:
        distillation = "none"
    elif distillation is None:
        tape = config.teacher.tape
        every_logit = classes > 2 and (tape is None or read_manifest(Path(tape)).outputs == "all")
        distillation = "zscore" if every_logit else "hard"
        if loss.temperature is not None and not every_logit:
            raise UserError(
                f"--temperature {loss.temperature:g}: with two classes, or a tape without all logits, hard labels are learned, "
                "which have none: give --distillation soft, or leave it out"
            )
    if distillation == "zscore" and classes < 3:
        raise UserError(
            "--distillation zscore needs three classes: of two, z-scores are 1 and -1 whatever the logits: give hard or soft "
            "(to compare: --losses hard soft)"
        )
    ignored = loss.teacher_weight == 0 and not (loss.feature_weight or distillation == "features")
    if config.data.unlabelled and (distillation == "none" or ignored):
        why = "--teacher-weight 0 ignores it" if ignored else "give --teacher"
        raise UserError(
            f"--unlabelled: images without labels are learned from a teacher alone: {why} (or --no-unlabelled)"
        )
    temperature = None if distillation in ("none", "hard", "features") else loss.temperature
    resolved = LossConfig.model_validate(
        {**loss.model_dump(), "distillation": distillation, "temperature": temperature}
    )
    if loss.distillation is None and distillation != "none" and loss.feature_weight is None:
        return resolved.model_copy(update={"feature_weight": None})  # as the teacher allows: `with_feature_weight`
    return resolved


def with_feature_weight(config: RunConfig, features: int, teacher: str) -> RunConfig:
    """`config` with the weight of the feature loss, now that the teacher is known to have `features` of an image. Raises UserError where
    it has none and they are to be learned."""
    weight = config.loss.feature_weight
    if weight is None:
        weight = FEATURE_WEIGHT if features else 0.0
    elif weight > 0 and not features:
        raise UserError(
            f"teacher {teacher}: has no features to learn: give a convolutional network (or a tape with features), or --feature-weight 0"
        )
    return config.changed(loss={"feature_weight": weight})


def resolve_view(view: ViewConfig, dataset: Dataset, network_size: tuple[int, int]) -> ViewConfig:
    """Small images keep their size and are shifted; photos are cropped to the student's size. Raises UserError."""
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
        "view_size": view.view_size or render_size(dataset, network_size),
        "flip_prob": view.flip_prob if view.flip_prob is not None else (0.5 if dataset.mirror_safe else 0.0),
    }
    padding = PADDING.get(crop) if view.crop_padding is None else view.crop_padding
    if crop == "pad" and (size is None or changes["view_size"] != size):
        raise UserError(f"--crop pad needs images of one size that is the view's: {dataset.name} is to be resized")
    return view.model_copy(update={**changes, "crop_padding": padding})


def render_size(dataset: Dataset, network_size: Size) -> Size:
    """The (height, width) at which a network's views are made: small images keep their own, and the network resizes them."""
    return dataset.image_size if is_small(dataset.image_size) else network_size


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


def say_unlabelled(dataset: Dataset, progress: Progress) -> None:
    """Tell how many images have no label, or that such images are left out."""
    labels_N = dataset.open_split("train").labels_N
    without = int((labels_N == NO_LABEL).sum())
    if without:
        shown = plural(without, "training image")
        progress.say(f"{shown} of {len(labels_N):,} have no label: they are learned from the teacher alone")
    elif dataset.more_unlabelled:
        progress.say(
            "images without labels are left out: with --unlabelled the student learns from its teacher on them too"
        )


# --------------------------------------------------------------------------------------------------- student


def student_network(
    config: RunConfig,
    architecture: ViTConfig,
    dataset: Dataset,
    start: InitWeights | None,
    progress: Progress,
    features: int = 0,
) -> Network:
    """A student of this shape with the seed's weights, or those of `start` as far as they fit; only what `--trainable` names is
    trainable. `features`: how many numbers it learns to predict of a teacher's features. Raises UserError."""
    torch.manual_seed(config.loop.seed)
    vit = ViT(architecture)
    if start is not None:
        for line in load_into_student(vit, start, dataset.classes, dataset.channels):
            progress.say(line)
    if config.student.init == MIMETIC:
        mimic_trained_attention(vit, config.loop.seed)
    if features:
        vit.add_feature_head(features, config.loop.seed)
    network = Network(vit, preprocessing_of_student(config, architecture, start and start.facts))
    trainable, depth = config.optim.trainable, architecture.depth
    if trainable == "all":
        return network
    if trainable.startswith("last-") and int(trainable.removeprefix("last-")) > depth:
        raise UserError(f"--trainable {trainable}: the student has {depth} blocks")
    set_trainable(network, trained_names(network, trainable, depth))
    learning = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    progress.say(f"--trainable {trainable}: {learning:,} of {parameter_count(network):,} parameters learn")
    return network


def class_weights(kind: ClassWeights, dataset: Dataset) -> tuple[float, ...]:
    """The weight of every class in the label loss. Balanced: all classes together weigh the same, and the mean over the images is 1."""
    if kind == "none":
        return ()
    labels_N = dataset.open_split("train").labels_N
    counts_K = np.bincount(labels_N[labels_N != NO_LABEL], minlength=len(dataset.classes))
    weights_K = counts_K.sum() / (np.count_nonzero(counts_K) * counts_K.clip(1))
    return tuple(weights_K.tolist())


def student_plan(
    network: Network,
    architecture: ViTConfig,
    loss_function: LossFunction | None,
    weights: tuple[float, ...],
    config: RunConfig,
    steps: int,
    steps_per_epoch: int,
) -> Plan:
    """How `network` is trained in so many steps. `weights`: of the classes, none if they all weigh the same."""
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    return Plan(
        view=config.view,
        loss=config.loss,
        loss_function=loss_function,
        class_weights=weights,
        optim=config.optim,
        loop=config.loop,
        total_steps=steps,
        warmup_steps=warmup_steps(config.optim, steps, steps_per_epoch),
        drop_rates=drop_rates(config.student.drop_path, architecture),
        low_res_size=low_res_shape(config.student, architecture),
        trained_names=None if config.optim.trainable == "all" else frozenset(names),
    )


def preprocessing_of_student(
    config: RunConfig, architecture: ViTConfig, facts: InitFacts | None = None
) -> Preprocessing:
    """How a student sees test images: as its weights (`facts`) or its training require, or cropped as the configuration says."""
    photos = config.view.crop in ("resize", "simple")
    if facts is None:
        preprocessing = student_preprocessing(architecture, photos=photos, name=config.student.student)
    else:
        preprocessing = start_preprocessing(architecture, facts, photos=photos)
    if config.student.crop_pct is None:
        return preprocessing
    return preprocessing.model_copy(update={"crop_pct": config.student.crop_pct})


def drop_rates(drop_path: float, architecture: ViTConfig) -> tuple[float, ...]:
    """Probability of dropping each of the 2 * depth residual branches: rising to `drop_path` (DeiT), or the same for all
    (DeiT III, section 3)."""
    if is_deit3(architecture):
        return (drop_path,) * (2 * architecture.depth)
    return tuple(stochastic_depth_rates(architecture.depth, drop_path))


def train_loader(
    config: JobConfig, dataset: Dataset, accelerator: Accelerator, teacher: Teacher | None = None
) -> TrainLoader:
    """This process's share of the training steps; a live `teacher` gets the views at its own size. Raises UserError where a process
    would get no image."""
    loader = TrainLoader(
        dataset.open_split("train"),
        config.view,
        batch_size=config.loop.batch_size,
        seed=config.loop.seed,
        workers=config.loop.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        augmenting=accelerator.device.type == "cpu",
        teacher_size=None if teacher is None else render_size(dataset, teacher.preprocessing.image_size),
    )
    if loader.smallest_step < loader.world:
        raise UserError(
            f"--processes {loader.world}: a step may have {loader.smallest_step} images, too few for each process to get one: "
            f"give a larger --batch-size or fewer processes"
        )
    return loader
