"""Images per second: from the disk to a finished batch, and through a whole training, against timm's loader.

    python benchmarks/input_pipeline.py photos PHOTOS CACHE     an image folder, and the same from `deit data cache`
    python benchmarks/input_pipeline.py small CIFAR10           a folder of Parquet files, held in memory by both
    python benchmarks/input_pipeline.py training CIFAR10        a ViT of width 64, depth 6, patch 4, batch 128

Preset `deit` on both sides: crop, flip, RandAugment, erasing with pixel noise, mixup and CutMix. (timm's strength does not
vary, `rand-m9-inc1`: with `mstd0.5` it asks Pillow 13 to posterise to 0 bits, which ends the run.) Every measurement in a
process of its own, both sides in turn, round by round, each set up as its own command does it: timm with its prefetcher and
FastCollateMixup, ours with glibc told to keep freed memory. Threads are the same; of the workers, ours has none where images
lie in memory, for it crops them by indexing. The training is timm's parts as well: loader, model, AdamW, soft-target
cross-entropy, moving average of the weights. Both sides read photos from files, or decoded (timm: Pillow's images in
memory; ours: the mapped cache), and images of CIFAR-10 from memory. The first steps, in which workers start, are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_loader
from timm.data.dataset import ImageDataset
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torchvision import transforms

from deitkit.cli import keep_freed_memory
from deitkit.config import AUGMENT_PRESETS, DataConfig, RunConfig
from deitkit.data import Dataset, Split, load_data
from deitkit.settings import build
from deitkit.terminal import SilentProgress
from deitkit.training.jobs import run_training
from deitkit.training.setup import resolve_view
from deitkit.views.loader import TrainLoader, augment_and_mix

BATCH_SIZE = 128
SKIPPED = 3
"""Steps before the first that is timed."""


class HeldForTimm(torch.utils.data.Dataset[Any]):
    """Images that are decoded already, as Pillow's, which timm's transforms want."""

    def __init__(self, split: Split) -> None:
        self.images = [Image.fromarray(split.read(position)) for position in range(len(split))]
        self.labels = split.labels_N.tolist()
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Any:
        return self.transform(self.images[position]), self.labels[position]


def our_batches(dataset: Dataset, size: int, workers: int, steps: int) -> Iterator[int]:
    """Finished batches; yields how many images each has."""
    view = resolve_view(AUGMENT_PRESETS["deit"], dataset, (size, size))
    loader = TrainLoader(
        dataset.open_split("train"), view, batch_size=BATCH_SIZE, seed=0, workers=workers, augmenting=True
    )
    # The feed goes on after the last batch that is timed: its workers have to be as busy then as timm's are.
    for crops in islice(loader.batches(0, 10 * steps), steps):
        yield len(augment_and_mix(crops, view).images_BCHW)


def timm_loader(dataset: Any, size: int, workers: int, classes: int) -> Any:
    mixup = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=classes)
    loader = create_loader(
        dataset, (3, size, size), BATCH_SIZE, is_training=True, num_workers=workers, collate_fn=mixup,
        auto_augment="rand-m9-inc1", re_prob=0.25, re_mode="pixel", interpolation="bicubic", pin_memory=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    if size <= 32:  # as DeiT's own code for small images: padded and shifted
        loader.dataset.transform.transforms[0] = transforms.RandomCrop(size, padding=4)
    return loader


def timm_batches(loader: Any, steps: int) -> Iterator[int]:
    done = 0
    while done < steps:
        for images, _targets in loader:
            yield len(images)
            done += 1
            if done == steps:
                break


def timed(batches: Iterator[int], skipped: int = SKIPPED) -> float:
    """Images per second, without the first batches, in which workers start."""
    images, started = 0, 0.0
    for number, count in enumerate(batches):
        if number == skipped:
            started = time.perf_counter()
        elif number > skipped:
            images += count
    return images / (time.perf_counter() - started)


def in_a_process(measure: Callable[..., float], *arguments: Any) -> float:
    """What `measure` returns, run in a fresh process: neither side finds the other's memory or workers."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def compare(name: str, contenders: dict[str, tuple[Any, ...]], rounds: int, base: str) -> None:
    """Run all in turn, forwards and backwards, and print medians and ratios. A contender is a function and its arguments."""
    rates: dict[str, list[float]] = {key: [] for key in contenders}
    for number in range(rounds):
        for key in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            rates[key].append(in_a_process(*contenders[key]))
    print(f"{name}: images per second, median of {rounds}, {torch.get_num_threads()} threads")
    for key, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates[base], strict=True))
        print(f"  {key:24} {statistics.median(values):8.1f}   {ratio:5.2f} x {base}   {[round(v, 1) for v in values]}")


def our_pipeline(location: str, size: int, workers: int, steps: int) -> float:
    keep_freed_memory()  # as the command does
    return timed(our_batches(load_data(location, DataConfig()), size, workers, steps))


def timm_pipeline(location: str, size: int, workers: int, steps: int, in_memory: bool) -> float:
    if in_memory:
        dataset = load_data(location, DataConfig())
        loader = timm_loader(HeldForTimm(dataset.open_split("train")), size, workers, len(dataset.classes))
    else:
        folder = ImageDataset(str(Path(location) / "train"))
        loader = timm_loader(folder, size, workers, len(folder.reader.class_to_idx))
    return timed(timm_batches(loader, steps))


def our_training(location: str, steps: int, workers: int) -> float:
    """As the run's own log has it: steps with all that belongs to them, without the evaluation after them."""
    keep_freed_memory()
    settings = {
        "student": "deit_nano", "stem": "patch", "augment": "deit", "optimizer": "adamw", "batch_size": BATCH_SIZE,
        "steps": steps, "workers": workers, "distillation": "none",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run_training(location, build(RunConfig, settings), out, resume=False, progress=SilentProgress())
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rate: float = next(line for line in lines if line["event"] == "epoch")["clock"]["images_per_second"]
    return rate


def timm_training(location: str, steps: int, workers: int) -> float:
    data = load_data(location, DataConfig())
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=2, num_classes=10).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=5e-4, weight_decay=0.05)
    average, loss_of = ModelEmaV3(model, decay=0.999), SoftTargetCrossEntropy()
    loader = timm_loader(HeldForTimm(data.open_split("train")), 32, workers, len(data.classes))
    started, images_seen, done = 0.0, 0, -SKIPPED
    for images, targets in loader:
        if done == 0:
            started = time.perf_counter()
        loss = loss_of(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=max(0, done))
        done += 1
        images_seen += len(images) if done > 0 else 0
        if done == steps:
            break
    return images_seen / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["photos", "small", "training"])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=224)
    given = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command sets it; for both sides
    print(f"timm {timm.__version__}, torch {torch.__version__}, {given.workers} workers, batch {BATCH_SIZE}")
    pipeline = (given.image_size, given.workers, given.steps)
    if given.what == "photos":
        contenders = {
            "timm, files": (timm_pipeline, given.data[0], *pipeline, False),
            "deitkit, files": (our_pipeline, given.data[0], *pipeline),
            "timm, decoded": (timm_pipeline, given.data[1], *pipeline, True),
            "deitkit, cache": (our_pipeline, given.data[1], *pipeline),
        }
        compare(f"photos, {given.image_size} pixels", contenders, given.rounds, "timm, files")
    elif given.what == "small":
        small = (given.data[0], 32, given.workers, given.steps)
        compare(
            "small, 32 pixels",
            {"timm": (timm_pipeline, *small, True), "deitkit": (our_pipeline, *small)},
            given.rounds,
            "timm",
        )
    else:
        training = (given.data[0], given.steps, given.workers)
        compare(
            "training", {"timm": (timm_training, *training), "deitkit": (our_training, *training)}, given.rounds, "timm"
        )


if __name__ == "__main__":
    main()
