"""What a teacher costs in a training step: none, a tape, a live one, and timm's `TokenDistillationTask`.

    python benchmarks/distill_step.py [--case CASE ...] [--rounds N] [--compile] [--device cuda] [--precision bfloat16]

Every variant trains the same student from the same weights, with the same AdamW, on the same views, in one process, in turn:
round by round, so that all of them see the same weather. A step is: augmentation and mixing of a batch of crops, forward,
loss, backward, AdamW; the precision is that of students and teachers. Networks have random weights; a tape is written before
the first step and read from the disk. Times are medians over rounds; ratios are medians of each round's ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from timm.loss import SoftTargetCrossEntropy
from timm.task import TokenDistillationTask
from torch import nn
from torch.nn import functional as F

from deitkit.config import AUGMENT_PRESETS, LoopConfig, LossConfig, OptimConfig, Precision, ViewConfig
from deitkit.distill.optim import make_optimizer
from deitkit.distill.record import made_with, replay
from deitkit.distill.step import Plan, State, train_step
from deitkit.distill.tape import Manifest, create, open_tape
from deitkit.distill.teacher import Teacher, TeacherSource, live_teacher, no_teacher
from deitkit.models.cnn import CNNConfig, build_cnn
from deitkit.models.network import Network, auto_chunk_size, autocast_dtype, prepare
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import STUDENTS, student_preprocessing
from deitkit.training.processes import make_accelerator
from deitkit.views.augment import augment
from deitkit.views.mixup import Batch, RawBatch, mix


class Case(NamedTuple):
    student: ViTConfig
    teacher: str
    batch_size: int


CASES = {
    "tiny-resnet50": Case(STUDENTS["deit_tiny"], "resnet50", 16),
    "tiny-regnety16": Case(STUDENTS["deit_tiny"], "regnety_160", 16),
    "small-resnet56": Case(
        STUDENTS["deit_nano"].model_copy(update={"classes": 10, "stem": "patch"}), "cifar-resnet56", 128
    ),
}
ROWS = {"none": "(a) no teacher", "tape": "(b) tape", "live": "(c) live teacher", "timm": "(d) timm's task"}


class TimmStudent(nn.Module):
    """The same student with what timm's task asks of a model."""

    def __init__(self, body: ViT, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.body, self.pretrained_cfg = body, {"mean": mean, "std": std}
        self.num_classes, self.in_chans = body.config.classes, body.config.channels

    def set_distilled_training(self, enable: bool = True) -> None:
        assert enable

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.body(images_BCHW))


def view_of(size: tuple[int, int]) -> ViewConfig:
    return AUGMENT_PRESETS["deit"].model_copy(update={"view_size": size, "crop": "none", "flip_prob": 0.5})


def raw_batch(case: Case, number: int) -> RawBatch:
    """A batch of random pixels whose mixing partners are all in it."""
    count, generator = case.batch_size, torch.Generator().manual_seed(number)
    index = torch.arange(count) + number * count
    return RawBatch(
        pixels_MCHW=torch.randint(256, (count, 3, *case.student.image_size), generator=generator, dtype=torch.uint8),
        labels_M=torch.randint(case.student.classes, (count,), generator=generator),
        index_M=index,
        view_M=torch.zeros_like(index),
        weight_M=torch.ones(count),
        partner_B=torch.arange(count) ^ 1,
        global_size=count,
    )


def tape_source(folder: Path, case: Case, teacher: Teacher, images: int) -> TeacherSource:
    """A tape of random hard labels, read back from the disk."""
    classes = case.student.classes
    manifest = Manifest(
        teacher={"name": case.teacher, "state": "", "chunk_size": 1, "dtype": "float32"},
        classes=tuple(map(str, range(classes))),
        data={"name": "random", "settings": {}, "images": images, "train": "", "validation": ""},
        view=view_of(case.student.image_size),
        outputs="hard",
        views=1,
        records_per_chunk=4096,
        made_with=made_with(),
        accuracy={"n": 1, "top1": 1.0},
    )
    tape = create(folder, manifest, torch.zeros(1, dtype=torch.int64))
    records = np.zeros(images, tape.record_type)
    records["label"] = np.random.default_rng(0).integers(0, classes, images)
    tape.write(0, 0, records)
    tape.commit(0, list(range(manifest.chunks)))
    return replay(open_tape(folder))


def our_step(
    network: Network, plan: Plan, source: TeacherSource, accelerator: Accelerator, compiled: bool
) -> Callable[[RawBatch], None]:
    network = copy.deepcopy(network).train()
    if compiled:
        network.compile()
    state = State(network=network, optimizer=make_optimizer(network, plan.optim), ema=None)

    def step(crops: RawBatch) -> None:
        with accelerator.autocast():
            train_step(state, crops, source, plan, accelerator)

    return step


def timm_step(
    network: Network,
    teacher: nn.Module,
    plan: Plan,
    case: Case,
    compiled: bool,
    device: torch.device,
    precision: Precision,
) -> Callable[[RawBatch], None]:
    preprocessing = network.preprocessing
    student = TimmStudent(copy.deepcopy(network.body), preprocessing.mean, preprocessing.std)
    task = TokenDistillationTask(
        student, copy.deepcopy(teacher), criterion=SoftTargetCrossEntropy(), distill_type="hard", task_loss_weight=0.5,
        device=device, verbose=False,
    )  # fmt: skip
    task.train()
    if compiled:
        task.compile()
    optimizer = make_optimizer(student, plan.optim)

    def step(crops: RawBatch) -> None:
        pixels_MCHW = augment(crops.pixels_MCHW.to(device, non_blocking=True), crops.index_M, crops.view_M, plan.view)
        batch = mix(crops._replace(pixels_MCHW=pixels_MCHW), plan.view)
        with torch.autocast(device.type, autocast_dtype(precision, device), enabled=precision != "float32"):
            loss = task(prepare(batch.images_BCHW, preprocessing), soft_targets(batch, case.student.classes))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def soft_targets(batch: Batch, classes: int, smoothing: float = 0.1) -> torch.Tensor:
    own, partner = (F.one_hot(labels, classes).float() for labels in (batch.labels_B, batch.partner_labels_B))
    share = batch.lam_B[:, None]
    return (1 - smoothing) * (share * own + (1 - share) * partner) + smoothing / classes


def measure(
    case: Case, rounds: int, compiled: bool, folder: Path, device: torch.device, precision: Precision
) -> dict[str, list[float]]:
    """Seconds of every round's step, by variant."""
    torch.manual_seed(0)
    network = Network(ViT(case.student), student_preprocessing(case.student, photos=True)).to(device)
    cnn = build_cnn(
        CNNConfig(name=case.teacher, classes=case.student.classes), image_size=case.student.image_size, pretrained=False
    )
    for_timm = copy.deepcopy(cnn.body).to(device).to(memory_format=torch.channels_last)  # as ours
    teacher = Teacher(
        cnn, name=case.teacher, num_classes=case.student.classes, chunk_size=auto_chunk_size(cnn, device), device=device,
        autocast=None if precision == "float32" else autocast_dtype(precision, device),
    )  # fmt: skip
    plan = Plan(
        view=view_of(case.student.image_size),
        loss=LossConfig(distillation="hard"),
        optim=OptimConfig(ema_decay=0),
        loop=LoopConfig(batch_size=case.batch_size, precision=precision),
        total_steps=10**6,
    )
    accelerator = make_accelerator(plan.loop)
    tape = tape_source(folder, case, teacher, (rounds + 2) * case.batch_size)
    no_distillation = replace(plan, loss=LossConfig(distillation="none"))
    steps = {
        "none": our_step(network, no_distillation, no_teacher, accelerator, compiled),
        "tape": our_step(network, plan, tape, accelerator, compiled),
        "live": our_step(network, plan, live_teacher(teacher, logits=False), accelerator, compiled),
        "timm": timm_step(network, for_timm, plan, case, compiled, device, precision),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-2, rounds):  # two rounds to warm up
        crops = raw_batch(case, number + 2)
        if device.type == "cuda":
            crops = crops._replace(pixels_MCHW=crops.pixels_MCHW.pin_memory())  # as the loader does
        names = list(steps) if number % 2 else list(steps)[::-1]
        for name in names:
            started = time.perf_counter()
            steps[name](crops)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch-size", type=int, help="instead of the cases' own, which are for two cores")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = torch.device(given.device)
    for name in given.case:
        case = CASES[name] if given.batch_size is None else CASES[name]._replace(batch_size=given.batch_size)
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(case, given.rounds, given.compile, Path(folder) / "tape", device, given.precision)
        where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name()
        print(f"{name}, batch {case.batch_size}, {where}, {given.precision}, n = {given.rounds} steps each")
        for variant, row in ROWS.items():
            median = statistics.median(seconds[variant])
            print(
                f"  {row:17} {1000 * median:8.2f} ms a step  {case.batch_size / median:7.1f} images/s"
                f"  {ratio(seconds, variant, 'none'):5.2f} x (a)"
            )
        print(f"  (d)/(b) {ratio(seconds, 'timm', 'tape'):.2f}   (d)/(c) {ratio(seconds, 'timm', 'live'):.2f}")
        print(json.dumps({"case": name, "compiled": given.compile, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
