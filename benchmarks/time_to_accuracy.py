"""How long this package takes to the accuracy that timm reaches in a given time, on CIFAR-10 with a ResNet-56 as the teacher.

    python benchmarks/time_to_accuracy.py CIFAR10 --teacher cifar-resnet56@FILE --minutes 10 --out FOLDER [--device cuda]

timm's side: its `VisionTransformerDistilled`, `TokenDistillationTask`, optimizer, schedule and loader; it trains until the minutes
are over (its learning rate follows the clock, so that the schedule ends with them), and neither start nor evaluation counts.
Ours: `deit train` as a command, from its start to its end, in a third of the minutes. Both sides see crops padded by 4 pixels
and flips of the same training images, have students of about as many weights and as many trials, on one thread each (on a GPU
timm's loader has eight processes, pinned memory and its prefetcher), and are measured with both heads fused on the same
validation images. A trial that has its file in FOLDER is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_loader
from timm.data.transforms import ToNumpy
from timm.models.deit import VisionTransformerDistilled
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import TokenDistillationTask
from torch import nn
from torchvision import transforms

from deitkit.config import DataConfig
from deitkit.data import Split, load_data
from deitkit.models.cnn import CNNConfig, build_cnn

SHARE = 1 / 3
"""The goal: this package's minutes over timm's."""
STARTING = 0.35
"""Minutes of `deit train` that its `--budget-minutes` leaves out: start, reading, checking the teacher, the last evaluation."""
TICKS = 10_000
"""Steps of the learning rate's schedule, spread over the minutes."""

TIMM: dict[str, dict[str, Any]] = {
    "adamw-1e-3": {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "batch_size": 128, "distill_type": "hard"},
    "adamw-3e-3": {"opt": "adamw", "lr": 3e-3, "weight_decay": 0.05, "batch_size": 128, "distill_type": "hard"},
    "adamw-2e-3-small-batch": {
        "opt": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "batch_size": 64,
        "distill_type": "hard",
    },
    "adamw-2e-3-soft": {"opt": "adamw", "lr": 2e-3, "weight_decay": 0.05, "batch_size": 64, "distill_type": "soft"},
    "muon-soft": {"opt": "muon", "lr": 6e-3, "weight_decay": 0.5, "batch_size": 64, "distill_type": "soft"},
    "muon-12e-3-soft": {"opt": "muon", "lr": 12e-3, "weight_decay": 0.05, "batch_size": 64, "distill_type": "soft"},
}
ZSCORE = ["--distillation", "zscore", "--temperature", "2", "--teacher-weight", "5"]
OURS: dict[str, list[str]] = {
    "hard": ["--distillation", "hard"],
    "zscore": ZSCORE,
    "zscore-lr-0.048": [*ZSCORE, "--lr", "0.048"],
    "zscore-wd-0.05": [*ZSCORE, "--weight-decay", "0.05"],
    "zscore-batch-128": [*ZSCORE, "--batch-size", "128"],
    "zscore-wd-0.05-small": [*ZSCORE, "--weight-decay", "0.05", "--low-res-size", "24"],
}


class Held(torch.utils.data.Dataset[Any]):
    """Images in memory as Pillow's, and their labels."""

    def __init__(self, split: Split) -> None:
        self.images = [Image.fromarray(np.asarray(split.read(position))) for position in range(len(split))]
        self.labels = [int(label) for label in split.labels_N]
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        return self.transform(self.images[position]), self.labels[position]


def timm_teacher(name: str, classes: int) -> nn.Module:
    """The teacher's network with the normalisation that timm's task looks for, as fast as timm's user can have it."""
    network = build_cnn(CNNConfig(name=name, classes=classes), image_size=None, pretrained=True)
    body = network.body.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    body.pretrained_cfg = {"mean": network.preprocessing.mean, "std": network.preprocessing.std}
    return body


def endless(loader: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        yield from loader


def timm_trial(
    location: str, teacher_name: str, minutes: float, trial: dict[str, Any], precision: str, device: torch.device
) -> dict[str, Any]:
    torch.manual_seed(0)
    gpu = device.type == "cuda"
    data = load_data(location, DataConfig())
    teacher = timm_teacher(teacher_name, len(data.classes)).to(device)
    student = VisionTransformerDistilled(
        img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=len(data.classes)
    ).to(device)
    student.pretrained_cfg = teacher.pretrained_cfg
    normal = {"mean": teacher.pretrained_cfg["mean"], "std": teacher.pretrained_cfg["std"]}
    loader = create_loader(
        Held(data.open_split("train")), (3, 32, 32), trial["batch_size"], is_training=True, num_workers=8 if gpu else 0,
        use_prefetcher=gpu, pin_memory=gpu, device=device, **normal,
    )  # fmt: skip
    loader.dataset.transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            *(
                [ToNumpy()] if gpu else [transforms.ToTensor(), transforms.Normalize(**normal)]
            ),  # the prefetcher normalises
        ]
    )
    task = TokenDistillationTask(
        student, teacher, criterion=nn.CrossEntropyLoss(label_smoothing=0.1), distill_type=trial["distill_type"],
        task_loss_weight=0.5, temperature=3.0, device=device, verbose=False,
    )  # fmt: skip
    task.train()
    optimizer = create_optimizer_v2(student, trial["opt"], lr=trial["lr"], weight_decay=trial["weight_decay"])
    schedule = CosineLRScheduler(
        optimizer, t_initial=TICKS, warmup_t=TICKS // 20, warmup_lr_init=1e-6, lr_min=1e-5, t_in_epochs=False
    )
    batches = endless(loader)
    if gpu:  # as timm's train script has it; the start of workers and libraries does not count
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
        task(*next(batches))["loss"].backward()
        optimizer.zero_grad()
    shown, started = 0, time.perf_counter()
    for images, labels in batches:
        tick = math.floor(TICKS * (time.perf_counter() - started) / (60 * minutes))
        if tick >= TICKS:
            break
        schedule.step_update(tick)
        with torch.autocast(
            device.type, torch.bfloat16, enabled=precision == "bfloat16"
        ):  # as timm's train script has it
            loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown += len(images)
    if gpu:
        torch.cuda.synchronize()
    spent = (time.perf_counter() - started) / 60
    validation = Held(data.open_split("val"))
    validation.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(**normal)])
    return {
        "top1": timm_accuracy(student.eval(), validation, device),
        "minutes": spent,
        "images": shown,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
    }


@torch.inference_mode()
def timm_accuracy(student: nn.Module, validation: Held, device: torch.device) -> float:
    right = 0
    for images, labels in torch.utils.data.DataLoader(validation, batch_size=500):
        right += int((student(images.to(device)).argmax(-1).cpu() == labels).sum())
    return 100 * right / len(validation)


def our_trial(
    location: str, teacher: str, minutes: float, flags: list[str], run: Path, precision: str
) -> dict[str, Any]:
    deit = [sys.executable, "-m", "deitkit.cli"]
    budget = f"{minutes - STARTING:.3f}"
    started = time.perf_counter()
    subprocess.run(
        [*deit, "train", location, "--teacher", teacher, "--teacher-precision", "bfloat16", "--budget-minutes", budget,
         "--precision", precision, "--out", str(run), *flags],
        check=True,
    )  # fmt: skip
    spent = (time.perf_counter() - started) / 60
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "top1": 100 * summary["top1"]["fused"],
        "minutes": spent,
        "images": summary["images_seen"],
        "parameters": summary["params"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--minutes", type=float, default=10, help="timm's")
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of both sides' students, and of timm's teacher; ours is in bfloat16, so on a GPU give bfloat16",
    )
    parser.add_argument(
        "--device", default="cpu", choices=["cpu", "cuda"], help="timm's; ours takes a GPU where there is one"
    )
    parser.add_argument("--share", type=float, default=SHARE, help="of them, ours")
    parser.add_argument("--out", type=Path, required=True)
    trials = [f"timm-{name}" for name in TIMM] + [f"ours-{name}" for name in OURS]
    parser.add_argument("--trials", nargs="+", choices=trials, default=trials, metavar="TRIAL", help="all of them")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for trial in given.trials:
        side, _, name = trial.partition("-")
        kind = "".join(f"-{one}" for one in (given.device, given.precision) if one not in ("cpu", "float32"))
        file = given.out / f"{trial}{kind}.json"
        if not file.exists():
            if side == "timm":
                result = timm_trial(
                    given.data, given.teacher, given.minutes, TIMM[name], given.precision, torch.device(given.device)
                )
            else:
                minutes = given.share * given.minutes
                result = our_trial(given.data, given.teacher, minutes, OURS[name], given.out / trial, given.precision)
            file.write_text(json.dumps(result), encoding="utf-8")
        found[trial] = json.loads(file.read_text(encoding="utf-8"))
        print(f"{trial:28} {found[trial]}", flush=True)
    where = "one thread" if given.device == "cpu" else torch.cuda.get_device_name()
    print(f"timm {timm.__version__}, torch {torch.__version__}, {where}, one run each, seed 0, validation images")
    for name, result in found.items():
        print(f"| {name} | {result['minutes']:.1f} | {result['images']:,} | {result['top1']:.2f} |")


if __name__ == "__main__":
    main()
