"""What a run needs before its first step: settings that the data decide, the student, the source of the teacher's outputs.

`resolve` fills in every setting that was left open. `student_network` and `student_plan` make what the Trainer trains and how.
A `Teaching` is where teacher outputs come from: nowhere, a live teacher, a tape (cached outputs), or a live teacher that is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from deitkit.config import (
    DataConfig,
    JobConfig,
    LoopConfig,
    LossConfig,
    Preprocessing,
    RunConfig,
    StudentConfig,
    ViewConfig,
)
from deitkit.data import Dataset, load_data
from deitkit.data.dataset import NO_LABEL, is_small
from deitkit.distill.losses import LossFunction
from deitkit.distill.optim import set_trainable, trained_names, warmup_steps
from deitkit.distill.record import RecordingTeacher, data_facts, make_manifest, record, replay
from deitkit.distill.step import Plan
from deitkit.distill.tape import (
    OutputKind,
    Tape,
    create,
    open_tape,
    read_manifest,
    refuse_other_data,
    refuse_other_views,
)
from deitkit.distill.teacher import (
    ANOTHER_TEACHER,
    Teacher,
    TeacherSource,
    accuracy_line,
    doubt_about,
    live_teacher,
    load_teacher,
    match_classes,
    no_teacher,
    refuse_useless,
    teacher_facts,
)
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
from deitkit.terminal import Progress, UserError, file_size, plural
from deitkit.training.evaluate import check_classes, split_logits_of_teacher
from deitkit.views.loader import Rows, TrainLoader, views_shown

SIMPLE_PADDING = 4
"""Pixels that `--crop simple` adds on every side, as in DeiT III's code."""
TAPED = " (taped)"
SUSPICIOUS_ACCURACY = 0.995
"""A teacher from elsewhere with this validation accuracy may have been trained on the validation images."""


# -------------------------------------------------------------------------------------------------- settings


def load(location: str, config: DataConfig, progress: Progress) -> Dataset:
    """`load_data`, with a warning for every image that is left out."""
    dataset = load_data(location, config)
    for bad in dataset.bad_images:
        progress.warn(f"left out: {bad}")
    return dataset


def with_teacher(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=changes)})


def with_precision(loop: LoopConfig) -> LoopConfig:
    """`loop` with the precision that `auto` stands for on this machine; a resumed run keeps it elsewhere. Raises UserError."""
    return loop.model_copy(update={"precision": resolve_precision(loop.precision, default_device())})


def resolve(config: RunConfig, dataset: Dataset, location: str, start: InitFacts | None = None) -> RunConfig:
    """`config` with everything filled in that the data decide. `start`: facts about the weights of `--init`, looked up if not
    given. A student whose shape follows from them gets no name. Raises UserError."""
    loss = _resolve_loss(config, len(dataset.classes))
    student = config.student
    if student.init is None and student.student is None:
        student = student.model_copy(update={"student": fitting_student(dataset.image_size)})
    fraction = None if student.low_res_size is None else student.low_res_fraction or 0.5
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"location": location}),
            "loss": loss,
            "loop": with_precision(config.loop),
            "student": student.model_copy(update={"low_res_fraction": fraction}),
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
    if config.data.unlabelled and (distillation == "none" or loss.teacher_weight == 0):
        why = "--teacher-weight 0 ignores it" if loss.teacher_weight == 0 else "give --teacher"
        raise UserError(
            f"--unlabelled: images without labels are learned from a teacher alone: {why} (or --no-unlabelled)"
        )
    temperature = None if distillation in ("none", "hard") else loss.temperature
    return LossConfig.model_validate({**loss.model_dump(), "distillation": distillation, "temperature": temperature})


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
    config: RunConfig, architecture: ViTConfig, dataset: Dataset, start: InitWeights | None, progress: Progress
) -> Network:
    """A student of this shape with the seed's weights, or those of `start` as far as they fit; only what `--trainable` names is
    trainable. Raises UserError."""
    torch.manual_seed(config.loop.seed)
    vit = ViT(architecture)
    if start is not None:
        for line in load_into_student(vit, start, dataset.classes, dataset.channels):
            progress.say(line)
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


def student_plan(
    network: Network,
    architecture: ViTConfig,
    loss_function: LossFunction | None,
    config: RunConfig,
    steps: int,
    steps_per_epoch: int,
) -> Plan:
    """How `network` is trained in so many steps."""
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    return Plan(
        view=config.view,
        loss=config.loss,
        loss_function=loss_function,
        optim=config.optim,
        loop=config.loop,
        total_steps=steps,
        warmup_steps=warmup_steps(config.optim, steps, steps_per_epoch),
        drop_rates=drop_rates(config.student, architecture.depth),
        low_res_size=low_res_shape(config.student, architecture),
        low_res_fraction=config.student.low_res_fraction or 0.0,
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


def drop_rates(student: StudentConfig, depth: int) -> tuple[float, ...]:
    """Probability of dropping each of the 2 * depth residual branches: rising to `drop_path` (DeiT), or the same for all
    (DeiT III, section 3)."""
    if student.drop_path_rule == "constant":
        return (student.drop_path,) * (2 * depth)
    return tuple(stochastic_depth_rates(depth, student.drop_path))


def train_loader(config: JobConfig, dataset: Dataset, accelerator: Accelerator) -> TrainLoader:
    """This process's share of the training steps. Raises UserError where a process would get no image."""
    loader = TrainLoader(
        dataset.open_split("train"),
        config.view,
        batch_size=config.loop.batch_size,
        seed=config.loop.seed,
        workers=config.loop.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        augmenting=accelerator.device.type == "cpu",
    )
    if loader.smallest_step < loader.world:
        raise UserError(
            f"--processes {loader.world}: a step may have {loader.smallest_step} images, too few for each process to get one: "
            f"give a larger --batch-size or fewer processes"
        )
    return loader


# --------------------------------------------------------------------------------------------------- teacher


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """A source of teacher outputs, and what is known of the teacher."""

    source: TeacherSource = no_teacher
    description: str = "no teacher"
    """for the plan of a run"""
    name: str | None = None
    teacher: Teacher | None = None
    """the live one"""
    validation_N: torch.Tensor | None = None
    """the teacher's predictions for the validation images, -1 for one that it could not read"""
    accuracy: dict[str, Any] | None = None
    """n, top1, top5, confidence on the validation images"""
    on_epoch: Callable[[Rows, set[int]], None] = lambda _rows, _unreadable: None
    finish: Callable[[], None] = lambda: None
    """called once the training is over"""

    @property
    def facts(self) -> dict[str, Any] | None:
        """Name and accuracy, for a summary."""
        return None if self.accuracy is None else {"name": self.name, "top1": self.accuracy["top1"]}

    def known(self) -> tuple[Teacher, torch.Tensor, dict[str, Any]]:
        """A live teacher, its predictions for the validation images and its accuracy there."""
        assert self.teacher is not None and self.validation_N is not None and self.accuracy is not None  # noqa: PT018
        return self.teacher, self.validation_N, self.accuracy


def checked_teacher(
    config: RunConfig,
    dataset: Dataset,
    progress: Progress,
    given: Teacher | None = None,
    advice: str = ANOTHER_TEACHER,
    accelerator: Accelerator | None = None,
) -> Teaching:
    """The `given` teacher, or the one that `config` names, as the source of its outputs. Tells its validation accuracy, computed by all
    processes of `accelerator`. Raises UserError, ending with `advice`, for a teacher that cannot teach."""
    device = default_device() if accelerator is None else accelerator.device
    share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    settings = config.teacher
    assert settings.teacher is not None
    teacher = given or load_teacher(
        settings.teacher,
        dataset.classes,
        chunk_size=settings.teacher_chunk_size,
        device=device,
        precision=settings.teacher_precision,
        image_size=settings.size,
    )
    if given is not None:
        given.to(device)
        if match_classes(given.name, given.classes, given.num_classes, dataset.classes) is not None:
            raise UserError(f"teacher {given.name}: knows the data's classes in another order: {dataset.classes}")
    logits = split_logits_of_teacher(teacher, dataset.open_split("val"), device, config.loop.workers, share)
    facts = teacher_facts(teacher, logits.heads.cls_BK, logits.labels_N)
    refuse_useless(facts, advice)
    if doubt := doubt_about(facts):
        progress.warn(doubt)
    say_accuracy(teacher.name, facts, teacher.dtype, progress)
    return Teaching(
        teacher=teacher,
        source=live_teacher(teacher, logits=config.loss.needs_logits),
        description="teacher live",
        name=teacher.name,
        validation_N=logits.predictions_A,
        accuracy={name: facts[name] for name in ("n", "top1", "top5", "confidence", "largest_class")},
    )


def say_accuracy(name: str, facts: dict[str, Any], precision: str, progress: Progress) -> None:
    """Tell a teacher's validation accuracy, and whether it is too good to be true."""
    progress.say(accuracy_line(name, {**facts, "dtype": precision}))
    whole = name.removesuffix(TAPED)  # as it was called: nothing else may be left of a tape's teacher
    fitted = (Path(whole) / "model").is_dir() or all((Path(one) / "model").is_dir() for one in whole.split("+"))
    if facts["top1"] >= SUSPICIOUS_ACCURACY and not fitted:
        progress.say("if it was trained on these images, its accuracy on others is lower")


def tape_of(config: RunConfig, dataset: Dataset) -> Tape:
    """The tape that `config` names. Raises UserError where it is of other data, or lacks outputs that the loss needs."""
    assert config.teacher.tape is not None
    tape = open_tape(Path(config.teacher.tape))
    refuse_other_data(tape.path, tape.manifest, data_facts(dataset, config.data.split_settings()))
    check_classes(dataset, tape.manifest.classes, str(tape.path))
    if missing := config.loss.unsupported(tape.manifest.outputs):
        raise UserError(f"{tape.path}: holds {missing}: record with --outputs all")
    return tape


def with_views_of_tape(config: RunConfig, tape: Tape, views_before: int | None) -> RunConfig:
    """`config` with the views that are on the tape. `views_before`: how many a resumed run began with.

    Raises UserError where other views were recorded, or fewer than are needed."""
    refuse_other_views(tape.path, tape.manifest, config.view)
    recorded = tape.complete_views() // config.view.repeated_aug * config.view.repeated_aug
    views = views_before or config.view.views or recorded
    if not 0 < views <= recorded:
        raise UserError(
            f"{tape.path}: {recorded} of {tape.manifest.views} views are recorded, {max(1, views)} are needed: "
            f"continue with deit tape record"
        )
    return config.model_copy(update={"view": config.view.model_copy(update={"views": views})})


def replayed(config: RunConfig, tape: Tape, progress: Progress) -> Teaching:
    """A tape in the teacher's place."""
    manifest, complete = tape.manifest, tape.complete_views()
    name = manifest.teacher["name"] + TAPED
    say_accuracy(name, manifest.accuracy, manifest.teacher["dtype"], progress)
    if complete < manifest.views:
        progress.warn(f"{tape.path}: {complete} of {manifest.views} views are recorded: continue with deit tape record")
    return Teaching(
        source=replay(tape),
        description=f"a tape, cycling through {plural(config.view.views or complete, 'view')}",
        name=name,
        validation_N=tape.validation_labels(),
        accuracy=manifest.accuracy,
    )


def recorded(
    teaching: Teaching, config: RunConfig, dataset: Dataset, accelerator: Accelerator, steps: int, progress: Progress
) -> Teaching:
    """`teaching` by a live teacher, with all outputs for so many steps also written to `config.teacher.record`. Raises UserError."""
    teacher, validation_N, accuracy = teaching.known()
    assert config.teacher.record is not None
    split, path = dataset.open_split("train"), Path(config.teacher.record)
    views = views_shown(steps, math.ceil(len(split) / config.loop.batch_size), config.view)
    data = data_facts(dataset, config.data.split_settings())
    manifest = make_manifest(teacher, data, dataset.classes, config.view, needed_outputs(config), views, accuracy)
    tape = None
    if accelerator.is_main_process:  # it locks the tape for all processes of this run
        tape = create(path, manifest, validation_N)
    accelerator.wait_for_everyone()
    tape = tape or open_tape(path, writable=True)
    recording = RecordingTeacher(tape, teacher)

    def on_epoch(rows: Rows, unreadable: set[int]) -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            recording.end_epoch(rows, unreadable)
        accelerator.wait_for_everyone()
        recording.refresh()  # what is committed now may be replayed, by any process

    def finish() -> None:
        if not accelerator.is_main_process:
            return
        try:  # what a kill or a part of an epoch left open
            record(tape, split, teacher, progress, workers=config.loop.workers, views=views)
        except UserError as error:
            progress.warn(f"the training is done, its tape is not complete: {error}")
        else:
            progress.say(f"the tape is complete: to train without running the teacher, give --teacher {path}")
        finally:
            tape.close()

    description = (
        f"{teaching.description}, recorded ({recording_size(manifest.views, manifest.images, manifest.bytes)})"
    )
    return replace(teaching, source=recording, description=description, on_epoch=on_epoch, finish=finish)


def needed_outputs(config: RunConfig) -> OutputKind:
    """The least that has to be recorded for this loss."""
    return "all" if config.loss.needs_logits else "hard"


def recording_size(views: int, images: int, size: int) -> str:
    return f"{plural(views, 'view')} of {plural(images, 'image')}: {file_size(size)}"
