"""What an ImageNet-1k costs: GPU hours, tape, memory, loader, computed; and an index of 1,281,167 images, measured.

    python benchmarks/imagenet_plan.py plan [--epochs 300] [--gpus 8]
    python benchmarks/imagenet_plan.py index [--headers 20000] [--folder WHERE]

`plan` multiplies: nothing in it was run on a GPU. Its constants say where they come from: *measured* by this project
(docs/evidence/), *published*, or *assumed*. `index` makes a folder of 1000 classes, lets the package list, sort, split and know
it again, and removes it. Its files are hard links to a few small JPEG files: names are as many as in ImageNet, but content and
inodes lie in memory, and a cold disk adds its own time. Headers, which a run's start reads of every image, are read of
`--headers` images alone.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from deitkit.config import DataConfig
from deitkit.data.caching import in_threads
from deitkit.data.dataset import train_and_validation
from deitkit.data.folder import class_folders, class_folders_split
from deitkit.distill.encoding import OutputKind, record_type
from deitkit.distill.record import records_per_chunk
from deitkit.distill.tape import DIGEST_BYTES
from deitkit.models.network import Network
from deitkit.models.vit import ViT
from deitkit.models.zoo import STUDENTS, multiply_adds, student_preprocessing

IMAGES, VALIDATION_IMAGES, CLASSES = 1_281_167, 50_000, 1000

# Published: images a second on an RTX 3090, mixed precision, channels last, timm's results/benchmark-{train,infer}-amp-nhwc-
# pt112-cu113-rtx3090.csv. The teacher was timed at 288 pixels; at 224 it has (224 / 288)² of the work.
TRAINED = {"deit_tiny": 2248.67, "deit_small": 1028.80, "deit_base": 384.06}
TEACHER, TEACHER_GMAC, ANSWERED = "RegNetY-16GF", 15.96, 422.88 * (288 / 224) ** 2
# Published: dense tensor-core TFLOPS with float32 sums, and TB/s of memory, by NVIDIA's data sheets.
PUBLISHED_ON, GPUS = (71.0, 0.936), {"RTX 3090": (71.0, 0.936), "A100 80 GB": (312.0, 2.039), "H100 SXM": (989.0, 3.35)}
# Assumed: another GPU is faster than the RTX 3090 by something between its memory's ratio and its tensor cores' ratio.

# Measured (docs/evidence/speed.md, "Input pipeline"): milliseconds of one core for a photo of 256 x 256 pixels. What a GPU does itself
# where there is one: RandAugment, mixing, erasing.
PHOTO_MS, DECODING_MS, ON_THE_DEVICE_MS = 3.3, 0.7, 0.8 + 0.5 + 0.25
# Published: ImageNet's average image. Assumed: decoding takes time in proportion to pixels.
PIXELS, PIXELS_OF_PHOTOS = 469 * 387, 256 * 256
BATCH_OF_A_GPU, PREFETCHED = 128, 4  # batches that every worker reads ahead: `deitkit.loader`

LINKS_OF_A_FILE = 60_000  # ext4 allows 65,000

ResultT = TypeVar("ResultT")


def make_folder(root: Path, images: int) -> None:
    """`root`/train with 1000 class folders, named as ImageNet's are."""
    pool = root / "content"
    (root / "train").mkdir(parents=True)
    pool.mkdir()
    noise_HW3 = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    links, content = 0, pool / "0"
    Image.fromarray(noise_HW3).save(content, "JPEG", quality=5)
    for number in range(CLASSES):
        name = f"n{1440764 + 13 * number:08d}"
        folder = root / "train" / name
        folder.mkdir()
        for image in range(images // CLASSES + (number < images % CLASSES)):
            if links and links % LINKS_OF_A_FILE == 0:
                fresh = pool / str(links)
                fresh.write_bytes(content.read_bytes())
                content = fresh
            os.link(content, folder / f"{name}_{image * 7919 % 100003}.JPEG")
            links += 1


def megabytes(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def timed(what: str, function: Callable[[], ResultT]) -> ResultT:
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    held, peak = megabytes("RssAnon"), megabytes("VmHWM")
    print(
        f"{what:<34} {wall:7.1f} s, {processor:6.2f} s of processor; holds {held:.0f} MB, peak {peak:.0f} MB",
        flush=True,
    )
    return result


def index(root: Path, headers: int) -> None:
    """What the package does with an image folder before a run, step by step."""
    print(f"before the first file: holds {megabytes('RssAnon'):.0f} MB, peak {megabytes('VmHWM'):.0f} MB", flush=True)
    train = root / "train"
    files = timed("listed and sorted", lambda: class_folders_split(train, class_folders(train), DataConfig()))
    rows_N, _ = timed(
        "held out, a tenth", lambda: train_and_validation(files.labels_N, DataConfig(), has_validation=False)
    )
    split = files.subset(rows_N, 3)
    print(f"{len(files):,} images, {len(split):,} of them for training")
    timed("names_hash (names and labels)", split.names_hash)
    every_N = np.linspace(0, len(files) - 1, min(headers, len(files))).astype(np.int64)
    timed(f"headers of {len(every_N):,}", lambda: in_threads(lambda k: files.probe(k, False), every_N.tolist()))
    timed("mtime_hash (sizes and times)", split.mtime_hash)


def gmac(student: str) -> float:
    config = STUDENTS[student]
    with torch.device("meta"):
        body = ViT(config)
    return multiply_adds(Network(body, student_preprocessing(config, photos=True)), config.channels) / 1e9


def plan(epochs: int, gpus: int) -> None:
    shown = epochs * IMAGES
    print(f"{epochs} epochs of {IMAGES:,} images: {shown / 1e6:,.1f} million views; hours are those of one GPU")
    print(f"\nteacher {TEACHER}, {TEACHER_GMAC} GMAC; 'from the tape' leaves its recording out")
    print("| student | GMAC | GPU | images/s | share of peak, % | from the tape, h | live teacher, h | live : tape |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for student, rate in TRAINED.items():
        macs = gmac(student)
        for gpu, (peak, memory) in GPUS.items():
            by_memory, by_cores = memory / PUBLISHED_ON[1], peak / PUBLISHED_ON[0]
            factors = sorted({by_memory, by_cores})  # slowest first
            rates = [rate * factor for factor in factors]
            tape = [shown / each / 3600 for each in rates]
            live = [hours + shown / (ANSWERED * factor) / 3600 for hours, factor in zip(tape, factors, strict=True)]
            share = [6 * macs * each / 1e3 / peak * 100 for each in rates]

            def span(values: list[float]) -> str:
                return " to ".join(f"{value:,.0f}" for value in values)

            ratio = live[0] / tape[0]
            print(
                f"| {student} | {macs:.2f} | {gpu} | {span(rates)} | {span(share)} | {span(tape)} | {span(live)} | {ratio:.2f} |"
            )
    print(
        f"a validation after every epoch: {VALIDATION_IMAGES / IMAGES / 3:.1%} more (a third of a step's work an image)"
    )
    for gpu, (peak, memory) in GPUS.items():
        factors = sorted({memory / PUBLISHED_ON[1], peak / PUBLISHED_ON[0]})
        spent = " to ".join(f"{shown / (ANSWERED * factor) / 3600:,.0f}" for factor in factors)
        print(f"recording {epochs} views, {gpu}: {spent} hours of one GPU, once")

    print("\ntape: a record, all records, their digests, one view")
    kinds: tuple[OutputKind, ...] = ("hard", 10, "all")
    for kind in kinds:
        size = record_type(kind, CLASSES).itemsize
        digests = epochs * -(-IMAGES // records_per_chunk(size)) * DIGEST_BYTES
        print(f"| {kind} | {size:,} B | {size * shown:,} B | {digests:,} B | {size * IMAGES / 1e6:,.1f} MB |")

    photo_ms = PHOTO_MS - ON_THE_DEVICE_MS
    real_ms = photo_ms + DECODING_MS * (PIXELS / PIXELS_OF_PHOTOS - 1)
    cached_ms = photo_ms - DECODING_MS
    print("\nloader: ms of one core a photo, the device augmenting, and the cores that keep one GPU busy")
    print(
        f"256 x 256 JPEG {photo_ms:.2f}, ImageNet's files {real_ms:.2f}, decoded by `deit data cache` {cached_ms:.2f}"
    )
    print("| student | GPU | images/s | cores, ImageNet's files | cores, cache |")
    print("| --- | --- | --- | --- | --- |")
    for student, rate in TRAINED.items():
        for gpu, (_, memory) in GPUS.items():
            needed = rate * memory / PUBLISHED_ON[1]
            files, cache = needed * real_ms / 1e3, needed * cached_ms / 1e3
            print(f"| {student} | {gpu} | {needed:,.0f} | {files:.1f} | {cache:.1f} |")
    print(f"cache of 256 x 256 pixels: {IMAGES * 256 * 256 * 3 / 1e9:,.0f} GB of disk")

    batch = BATCH_OF_A_GPU * 3 * 224 * 224
    print("\nmemory of the host")
    print(f"batches read ahead: {PREFETCHED} x {batch / 1e6:.1f} MB for each worker")
    print(f"labels and order: {IMAGES * 8 / 1e6:.1f} MB an array of int64 (labels, rows, an epoch's images, its views)")
    print(f"{gpus} GPUs: {gpus} processes, each with an index of its own; the pages of the tape are shared")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plan", "index"])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--headers", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where the images are made, and removed again")
    given = parser.parse_args()
    if given.what == "plan":
        plan(given.epochs, given.gpus)
        return
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        make_folder(Path(folder), given.images)
        index(Path(folder), given.headers)


if __name__ == "__main__":
    main()
