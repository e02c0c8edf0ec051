"""Images per second: from the disk to a finished batch, and through a whole training, against timm's loader.

    python benchmarks/input_pipeline.py photos PHOTOS CACHE     an image folder, and the same from `deit data cache`
    python benchmarks/input_pipeline.py small CIFAR10           a folder of Parquet files, held in memory by both
    python benchmarks/input_pipeline.py training CIFAR10        a ViT of width 64, depth 6, patch 4, batch 128

Preset `deit` on both sides: crop, flip, RandAugment, erasing with pixel noise, mixup and CutMix. (timm's strength does not
vary, `rand-m9-inc1`: with `mstd0.5` it asks Pillow 13 to posterise to 0 bits, which ends the run.) The same number of
workers and threads; both sides in turn, in one process, round by round. timm is given decoded images of CIFAR-10, too.
The training is timm's parts put together as its train.py does: loader, Mixup, model, AdamW, soft-target cross-entropy,
moving average of the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import Mixup, create_loader
from timm.data.dataset import ImageDataset
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torchvision import transforms

from deitkit.api import configured
from deitkit.augment import augment
from deitkit.config import AUGMENT_PRESETS, DataConfig, RunConfig
from deitkit.data import Dataset, Split, load_data
from deitkit.feed import TrainFeed
from deitkit.jobs import run_training
from deitkit.mixing import mix
from deitkit.progress import SilentProgress
from deitkit.resolve import resolve_view

BATCH_SIZE = 128


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
    feed = TrainFeed(dataset.open_split("train"), view, batch_size=BATCH_SIZE, seed=0, workers=workers)
    # The feed goes on after the last batch that is timed: its workers have to be as busy then as timm's are.
    for crops in islice(feed.batches(0, 10 * steps), steps):
        batch = mix(augment(crops.pixels_MCHW, crops.index_M, crops.view_M, view), crops, view)
        yield len(batch.images_BCHW)


def timm_loader(dataset: Any, size: int, workers: int) -> Any:
    loader = create_loader(
        dataset, (3, size, size), BATCH_SIZE, is_training=True, use_prefetcher=False, num_workers=workers,
        auto_augment="rand-m9-inc1", re_prob=0.25, re_mode="pixel", interpolation="bicubic", pin_memory=False,
        persistent_workers=False,
    )  # fmt: skip
    if size <= 32:  # as DeiT's own code for small images: padded and shifted
        loader.dataset.transform.transforms[0] = transforms.RandomCrop(size, padding=4)
    return loader


def timm_batches(loader: Any, mixup: Mixup, steps: int) -> Iterator[int]:
    done = 0
    while done < steps:
        for images, labels in loader:
            images, _targets = mixup(images, labels)
            yield len(images)
            done += 1
            if done == steps:
                break


def timed(batches: Iterator[int], skipped: int = 3) -> float:
    """Images per second, without the first batches, in which workers start."""
    images, started = 0, 0.0
    for number, count in enumerate(batches):
        if number == skipped:
            started = time.perf_counter()
        elif number > skipped:
            images += count
    return images / (time.perf_counter() - started)


def compare(name: str, contenders: dict[str, Callable[[], float]], rounds: int, base: str) -> None:
    """Run all in turn, forwards and backwards, and print medians and ratios."""
    rates: dict[str, list[float]] = {key: [] for key in contenders}
    for number in range(rounds):
        for key in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            rates[key].append(contenders[key]())
    print(f"{name}: images per second, median of {rounds}, {torch.get_num_threads()} threads")
    for key, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates[base], strict=True))
        print(f"  {key:24} {statistics.median(values):8.1f}   {ratio:5.2f} x {base}   {[round(v, 1) for v in values]}")


def our_training(location: str, steps: int, workers: int) -> float:
    """As the run's own log has it: steps with all that belongs to them, without the evaluation after them."""
    settings = {
        "student": "deit_nano", "stem": "patch", "augment": "deit", "batch_size": BATCH_SIZE, "steps": steps,
        "workers": workers, "distillation": "none",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run_training(location, configured(RunConfig, settings), out, resume=False, progress=SilentProgress())
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rate: float = next(line for line in lines if line["event"] == "epoch")["clock"]["images_per_second"]
    return rate


def timm_training(dataset: Any, steps: int, workers: int) -> float:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=2, num_classes=10).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=5e-4, weight_decay=0.05)
    average, loss_of = ModelEmaV3(model, decay=0.999), SoftTargetCrossEntropy()
    loader = timm_loader(dataset, 32, workers)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    started, images_seen, done = time.perf_counter(), 0, 0
    for images, labels in loader:
        images, targets = mixup(images, labels)
        loss = loss_of(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=done)
        images_seen, done = images_seen + len(images), done + 1
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
    print(f"timm {timm.__version__}, torch {torch.__version__}, {given.workers} workers, batch {BATCH_SIZE}")
    dataset = load_data(given.data[0], DataConfig())
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=len(dataset.classes))
    size, steps, workers = given.image_size, given.steps, given.workers
    if given.what == "photos":
        files = timm_loader(ImageDataset(str(Path(given.data[0]) / "train")), size, workers)
        cached = load_data(given.data[1], DataConfig())
        compare(
            f"photos, {size} pixels",
            {
                "timm, files": lambda: timed(timm_batches(files, mixup, steps)),
                "deitkit, files": lambda: timed(our_batches(dataset, size, workers, steps)),
                "deitkit, cache": lambda: timed(our_batches(cached, size, workers, steps)),
            },
            given.rounds,
            "timm, files",
        )
    elif given.what == "small":
        loader = timm_loader(HeldForTimm(dataset.open_split("train")), 32, workers)
        compare(
            "small, 32 pixels",
            {
                "timm": lambda: timed(timm_batches(loader, mixup, steps)),
                "deitkit": lambda: timed(our_batches(dataset, 32, workers, steps)),
            },
            given.rounds,
            "timm",
        )
    else:
        held = HeldForTimm(dataset.open_split("train"))
        compare(
            "training",
            {
                "timm": lambda: timm_training(held, steps, workers),
                "deitkit": lambda: our_training(given.data[0], steps, workers),
            },
            given.rounds,
            "timm",
        )


if __name__ == "__main__":
    main()
