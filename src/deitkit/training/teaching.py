"""Where the teacher outputs of a run come from: nowhere, a live teacher, or a tape (cached outputs), perhaps one that is recorded first."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from deitkit.config import LossConfig, RunConfig, Size
from deitkit.data import Dataset, caching
from deitkit.distill.encoding import CODE_FILE, CODE_IMAGES, FeatureCode, OutputKind, fit_code, load_code
from deitkit.distill.record import data_facts, make_manifest, record, replay
from deitkit.distill.tape import (
    Manifest,
    Tape,
    create,
    is_tape,
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
from deitkit.models.network import default_device
from deitkit.terminal import Progress, UserError, file_size, plural
from deitkit.training.evaluate import check_classes, split_logits_of_teacher
from deitkit.training.probe import is_probed
from deitkit.training.run import RunFolder
from deitkit.training.setup import render_size
from deitkit.views.loader import evaluation_batches, views_shown

FORWARD_PASSES = 3
"""As long as so many takes a forward pass with its backward pass and the update."""
TAPED = " (taped)"
FEW_VIEWS, COSTLY = 8, 4
"""Views of an image that a costly live teacher looks at, unless told otherwise; it is costly from so many times the student's pixels on."""
SUSPICIOUS_ACCURACY = 0.995
"""A teacher from elsewhere with this validation accuracy may have been trained on the validation images."""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """A source of teacher outputs, and what is known of the teacher."""

    source: TeacherSource = no_teacher
    description: str = "no teacher"
    """for the plan of a run"""
    features: int = 0
    """numbers in the code of its features, where the student is to learn them"""
    name: str | None = None
    teacher: Teacher | None = None
    """the live one"""
    validation_N: torch.Tensor | None = None
    """the teacher's predictions for the validation images, -1 for one that it could not read"""
    costs: tuple[Mapping[str, int], float | None] = ({}, None)
    """`Teacher.costs` of one that was live at the beginning"""
    accuracy: dict[str, Any] | None = None
    """n, top1, top5, confidence on the validation images"""

    @property
    def facts(self) -> dict[str, Any] | None:
        """Name and accuracy."""
        known = self.accuracy is not None and self.accuracy["n"] > 0
        return {"name": self.name, "top1": self.accuracy["top1"]} if known and self.accuracy else None

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
    code: FeatureCode | None = None,
) -> Teaching:
    """The `given` teacher, or the one that `config` names, as the source of its outputs. Tells its validation accuracy, computed by all
    processes of `accelerator`. Its features are encoded by `code`, which is fitted if not given, unless their weight is 0. Raises
    UserError, ending with `advice`, for a teacher that cannot teach."""
    device = default_device() if accelerator is None else accelerator.device
    share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    settings = config.teacher
    assert settings.teacher is not None
    teacher = given or load_teacher(
        settings.teacher,
        dataset.classes,
        chunk_size=_chunk_size_of(settings.record),
        device=device,
        precision=settings.teacher_precision,
        image_size=settings.size,
        features_only=config.loss.distillation == "features",
    )
    if config.loss.feature_weight != 0 and teacher.feature_count and config.loss.learns_from_teacher:
        teacher.code = (code or feature_code(teacher, dataset, config.loop.workers, progress)).to(teacher.device)
    if config.loss.distillation == "features" and teacher.num_classes != len(dataset.classes):
        progress.say(
            f"teacher {teacher.name}: {teacher.num_classes} classes of its own: its features alone are learned"
        )
        return Teaching(
            teacher=teacher,
            source=live_teacher(teacher, logits=False),
            description="teacher live, its features",
            features=0 if teacher.code is None else teacher.code.size,
            name=teacher.name,
            costs=teacher.costs(),
            validation_N=torch.full((len(dataset.open_split("val")),), -1),
            accuracy={"n": 0, "top1": 0.0},
        )
    if given is not None:
        given.to(device)
        if match_classes(given.name, given.classes, given.num_classes, dataset.classes) is not None:
            raise UserError(f"teacher {given.name}: knows the data's classes in another order: {dataset.classes}")
    logits = split_logits_of_teacher(teacher, dataset.open_split("val"), device, config.loop.workers, share)
    facts = teacher_facts(teacher, logits.heads.cls_BK, logits.labels_N)
    facts["cross_validated"] = is_probed(Path(teacher.name))
    refuse_useless(facts, advice)
    if doubt := doubt_about(facts):
        progress.warn(doubt)
    say_accuracy(teacher.name, facts, teacher.dtype, progress)
    return Teaching(
        teacher=teacher,
        source=live_teacher(teacher, logits=config.loss.needs_logits),
        description="teacher live",
        features=0 if teacher.code is None else teacher.code.size,
        name=teacher.name,
        costs=teacher.costs(),
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
    if missing := _missing(config.loss, tape.manifest.outputs):
        raise UserError(f"{tape.path}: holds {missing}: record with --outputs all")
    return tape


def _missing(loss: LossConfig, outputs: OutputKind) -> str | None:
    """Why recorded `outputs` cannot serve this loss; None where they can. Top-k logits leave the other classes to a guess: good enough
    for probabilities, not for the z-scores, which weigh the unlikely classes too."""
    if outputs == "features" and loss.distillation != "features":
        return f"features only, --distillation {loss.distillation} needs logits or hard labels"
    if outputs == "hard" and loss.needs_logits:
        return f"hard labels only, --distillation {loss.distillation} needs logits"
    if outputs != "all" and loss.distillation in ("zscore", "callable"):
        return f"the top {outputs} logits only, --distillation {loss.distillation} needs all logits"
    return None


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
    return config.changed(view={"views": views})


def replayed(config: RunConfig, tape: Tape, progress: Progress) -> Teaching:
    """A tape in the teacher's place."""
    manifest, complete = tape.manifest, tape.complete_views()
    name = manifest.teacher["name"] + TAPED
    if manifest.accuracy["n"]:
        say_accuracy(name, manifest.accuracy, manifest.teacher["dtype"], progress)
    if complete < manifest.views:
        progress.warn(f"{tape.path}: {complete} of {manifest.views} views are recorded: continue with deit tape record")
    return Teaching(
        source=replay(tape),
        description=f"a tape, cycling through {plural(config.view.views or complete, 'view')}",
        features=manifest.features,
        name=name,
        validation_N=tape.validation_labels(),
        accuracy=manifest.accuracy,
    )


def recorded(
    teaching: Teaching, config: RunConfig, dataset: Dataset, accelerator: Accelerator, steps: int, progress: Progress
) -> Teaching:
    """`teaching` by a live teacher, its outputs for all views of so many steps recorded to `config.teacher.record` before the training.
    Raises UserError."""
    assert config.teacher.record is not None
    path, images = Path(config.teacher.record), len(dataset.open_split("train"))
    views = views_shown(steps, math.ceil(images / config.loop.batch_size), config.view)
    manifest = tape_manifest(teaching, config, dataset, needed_outputs(config), views)
    if not is_tape(path) or open_tape(path).complete_views() < views:
        size = recording_size(views, images, manifest.bytes)
        progress.say(f"teacher: recording its outputs for {size}, to {path} (--teacher {path} trains from it)")
    tape = record_tape(path, manifest, teaching, config, dataset, accelerator, progress)
    description = f"the teacher's outputs for {plural(views, 'view')}, recorded in {path}"
    return replace(teaching, source=replay(tape), description=description, teacher=None)


def tape_manifest(teaching: Teaching, config: RunConfig, dataset: Dataset, outputs: OutputKind, views: int) -> Manifest:
    """That of a tape with so many views by the live teacher of `teaching`. Raises UserError."""
    teacher, _, accuracy = teaching.known()
    facts = data_facts(dataset, config.data.split_settings())
    view = config.view.at(render_size(dataset, teacher.preprocessing.image_size))
    return make_manifest(teacher, facts, dataset.classes, view, outputs, views, accuracy)


def record_tape(
    path: Path, manifest: Manifest, teaching: Teaching, config: RunConfig, dataset: Dataset,
    accelerator: Accelerator, progress: Progress,
) -> Tape:  # fmt: skip
    """The tape at `path`, once what was missing of the views of `manifest` has been recorded. Raises UserError."""
    teacher, validation_N, _ = teaching.known()
    split, workers = dataset.open_split("train"), config.loop.workers
    with contextlib.closing(shared_tape(path, manifest, teacher, validation_N, accelerator)) as tape:
        record(tape, split, teacher, progress, workers=workers, views=manifest.views, accelerator=accelerator)
    return open_tape(path)


def _chunk_size_of(tape: str | None) -> int | None:
    """Images per forward pass of the teacher whose tape is continued, perhaps on a machine with another memory. Raises UserError."""
    return int(read_manifest(Path(tape)).teacher["chunk_size"]) if tape is not None and is_tape(Path(tape)) else None


def shared_tape(
    path: Path, manifest: Manifest, teacher: Teacher, validation_N: torch.Tensor, accelerator: Accelerator
) -> Tape:
    """A tape that all processes write: the first one makes it, or finds it, and locks it for all; its `code` becomes every teacher's.
    Raises UserError."""
    accelerator.wait_for_everyone()  # all have seen what was there before
    tape = create(path, manifest, validation_N, teacher.code) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    tape = tape or open_tape(path, writable=True)
    code = tape.code()
    teacher.code = None if code is None else code.to(teacher.device)
    return tape


def with_few_views(config: RunConfig, dataset: Dataset, teacher_size: Size) -> RunConfig:
    """`config` whose epochs repeat `FEW_VIEWS` views, if a live teacher that sees many times the student's pixels would else look at new
    ones in every epoch: that takes longer than training the student. `--views` and `--record` decide otherwise."""
    view = config.view
    assert view.view_size is not None
    views = max(1, FEW_VIEWS // view.repeated_aug) * view.repeated_aug
    costly = math.prod(teacher_size) >= COSTLY * math.prod(view.view_size)
    if not costly or view.views is not None or config.teacher.record is not None or _epochs(config, dataset) <= views:
        return config
    return config.changed(view={"views": views})


def repeats_views(config: RunConfig, dataset: Dataset) -> bool:
    """Whether epochs show views again, so that it pays to keep what a live teacher says of them."""
    views = config.view.views
    return views is not None and config.teacher.record is None and _epochs(config, dataset) > views


def _epochs(config: RunConfig, dataset: Dataset) -> float:
    """The length of a training in epochs; infinite where it is given in minutes."""
    if config.loop.steps is not None:
        return config.loop.steps / math.ceil(len(dataset.open_split("train")) / config.loop.batch_size)
    return config.loop.amount("ep") or math.inf


def time_needed(
    config: RunConfig,
    dataset: Dataset,
    student_seconds: float,
    teacher_seconds: float,
    processes: int,
    fitting: float = 0.0,
) -> str | None:
    """A line with the stages that are ahead and their minutes, from the seconds of a forward pass of one image by the student and by a live
    teacher, and those of `fitting` it. None for less than a minute, and where a length in minutes leaves open how much is recorded."""
    images, epochs = len(dataset.open_split("train")), _epochs(config, dataset)
    views, live_seconds = 0.0, teacher_seconds
    if config.teacher.record is not None or repeats_views(config, dataset):
        views, live_seconds = min(config.view.views or math.inf, epochs), 0.0
    if views == math.inf:
        return None
    recording = teacher_seconds * images * math.ceil(views) / processes
    training = (FORWARD_PASSES * student_seconds + live_seconds) * epochs * images / processes
    if (minutes := config.loop.amount("min")) is not None:
        training = 60 * minutes
    if fitting + recording + training < 60:
        return None
    stages = {
        "fitting a teacher": fitting,
        "recording the teacher's outputs (unless they are kept)": recording,
        "training the student": training,
    }
    return "time: " + ", ".join(f"{name} about {s / 60:.0f} min" for name, s in stages.items() if s >= 30)


def recorded_first(
    teaching: Teaching, config: RunConfig, dataset: Dataset, accelerator: Accelerator, progress: Progress
) -> Teaching:
    """`teaching` by a live teacher, its outputs for the views that epochs repeat computed once, before the training, and kept for other
    runs. Programs that need the same outputs wait for each other. Raises UserError."""
    views = config.view.views or 1
    manifest = tape_manifest(teaching, config, dataset, needed_outputs(config), views)
    known_by = manifest.model_dump_json(exclude={"views": True, "teacher": {"name"}, "data": {"name"}})
    name = f"{Path(manifest.teacher['name']).name}-{hashlib.sha256(known_by.encode()).hexdigest()[:12]}"
    with RunFolder(caching.cache_folder() / "tapes" / name) as folder:
        path = folder.path / "tape"
        if accelerator.is_main_process:
            folder.lock(on_wait=lambda: progress.say(f"waiting for another program that records {path}"))
        accelerator.wait_for_everyone()
        if is_tape(path) and open_tape(path).complete_views() >= views:
            tape = open_tape(path)
        else:
            size = recording_size(views, manifest.images, manifest.bytes)
            progress.say(f"teacher: recording its outputs for {size}")
            tape = record_tape(path, manifest, teaching, config, dataset, accelerator, progress)
    return replace(
        teaching,
        source=replay(tape),
        description=f"the teacher's outputs for {plural(views, 'view')}, in turn",
        teacher=None,
    )


def needed_outputs(config: RunConfig) -> OutputKind:
    """The least of its logits that has to be recorded for this loss."""
    return "features" if config.loss.distillation == "features" else "all" if config.loss.needs_logits else "hard"


def recording_size(views: int, images: int, size: int) -> str:
    return f"{plural(views, 'view')} of {plural(images, 'image')}: {file_size(size)}"


def feature_code(teacher: Teacher, dataset: Dataset, workers: int, progress: Progress) -> FeatureCode:
    """How the teacher's features are encoded: their principal components over some training images, each seen whole. A fitted teacher
    keeps them in its folder."""
    fitted = Path(teacher.name)
    if (fitted / CODE_FILE).is_file():
        return load_code(fitted)
    code = _fit_code(teacher, dataset, workers, progress)
    if fitted.parent == caching.cache_folder() / "teachers":
        code.save(fitted)
    return code


def _fit_code(teacher: Teacher, dataset: Dataset, workers: int, progress: Progress) -> FeatureCode:
    split = dataset.open_split("train")
    positions = np.unique(np.linspace(0, len(split) - 1, min(CODE_IMAGES, len(split))).astype(np.int64))
    sample = split.subset(positions, split.channels, split.title)
    progress.start(len(sample), "features", unit="images")
    found: list[torch.Tensor] = []
    for images_BCHW, _, weight_B in evaluation_batches(sample, teacher.preprocessing, batch_size=64, workers=workers):
        found.append(teacher.forward_with_features(images_BCHW)[1][weight_B > 0].cpu())
        done = sum(map(len, found))
        progress.step(done, done, 0, 0)
    progress.finish()
    return fit_code(torch.cat(found))
