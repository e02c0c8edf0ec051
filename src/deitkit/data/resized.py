"""A folder of resized images, as `deit data cache` writes it: decoded and resized once, read many times.

    resized.json    what is in it (`ResizedCard`)
    train.arrow     a row for each image: `bytes`, a PPM or PGM file (its pixels, uncompressed), and `label`
    val.arrow       the same
    test.arrow      the same, where the data have a test split

The files are mapped into memory, so loader workers share them. An image that could not be read is a row without bytes: it
is left out, or counts as wrong, exactly as in the original. The split is the one that was asked for when the folder was
written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from deitkit.config import Config, DataConfig, Pixels
from deitkit.data.assemble import assemble
from deitkit.data.base import NO_LABEL, Dataset, Split, SplitName, is_small
from deitkit.data.decoded import SCHEMA, write_decoded
from deitkit.data.encoded import EncodedSource, read_arrow
from deitkit.errors import UserError, shortened
from deitkit.files import Lock, leftovers, refuse_filled
from deitkit.settings import explain

CARD = "resized.json"


class ResizedCard(Config):
    """What resized.json says."""

    format: Literal[1] = 1
    name: str
    classes: tuple[str, ...]
    mirror_safe: bool
    shorter_side: Pixels
    photos: bool
    """whether they were photos before, which they stay at any size"""
    reduced: bool
    """whether any image was larger before"""
    settings: dict[str, Any]
    """data settings that the split was made with"""


def is_resized_folder(folder: Path) -> bool:
    return (folder / CARD).is_file()


def write_resized(
    dataset: Dataset, config: DataConfig, shorter_side: int, out: Path, on_images: Callable[[int], None]
) -> dict[str, int]:
    """Write every split of `dataset` to `out`, each image with a shorter side of at most `shorter_side` pixels.

    `on_images` is told how many are done. Returns the number of images by split. Raises UserError."""
    refuse_filled(out, "give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = Lock(out)
    except BlockingIOError as error:
        raise UserError(f"{out}: another process is writing there: give another --out") from error
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        refuse_filled(out, "give another --out")  # it may have been another process's until now
        for name in splits_of(dataset):
            for part in leftovers(out / f"{name}.arrow"):
                part.unlink()
        return _write_resized(dataset, config, shorter_side, out, on_images)
    finally:
        lock.release()


def _write_resized(
    dataset: Dataset, config: DataConfig, shorter_side: int, out: Path, on_images: Callable[[int], None]
) -> dict[str, int]:
    counts: dict[str, int] = {}
    reduced = dataset.reduced_to is not None  # a cache of a cache

    def change(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        nonlocal reduced
        if min(image_HWC.shape[:2]) > shorter_side:
            reduced = True
        return resize(image_HWC, shorter_side)

    try:
        for name in splits_of(dataset):
            split, before = dataset.open_split(name), sum(counts.values())
            write_decoded(
                split,
                out / f"{name}.arrow",
                lambda done, before=before: on_images(before + done),  # type: ignore[misc]
                change,
            )
            counts[name] = len(split)
    except BaseException:  # interrupted, or the disk is full: the same command is to find the folder as it was
        for whole in counts:
            (out / f"{whole}.arrow").unlink(missing_ok=True)
        raise
    card = ResizedCard(
        name=dataset.name,
        classes=dataset.classes,
        mirror_safe=dataset.mirror_safe,
        shorter_side=min(shorter_side, dataset.reduced_to or shorter_side),
        photos=not is_small(dataset.image_size),
        reduced=reduced,
        settings=config.split_settings(),
    )
    try:
        (out / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")  # last: now it is whole
    except OSError as error:
        raise UserError(f"{out / CARD}: cannot be written: {error.strerror}") from error
    return counts


def splits_of(dataset: Dataset) -> tuple[SplitName, ...]:
    return ("train", "val", "test") if dataset.has_test else ("train", "val")


def load_resized(folder: Path, config: DataConfig) -> Dataset:
    """The data set in a folder of `deit data cache`. Raises UserError."""
    try:
        card = ResizedCard.model_validate_json((folder / CARD).read_bytes())
    except ValidationError as error:
        raise UserError(f"{folder / CARD}: {explain(ResizedCard, error)}") from error
    except OSError as error:
        raise UserError(f"{folder / CARD}: cannot be read: {error.strerror}") from error

    def source(split: SplitName) -> EncodedSource:
        path = folder / f"{split}.arrow"
        return EncodedSource(
            path,
            _cached_labels(path, card, least=NO_LABEL if split == "train" else 0),
            lambda row: f"{path} row {row}",
            decoded=True,
        )

    def test(channels: int) -> Split:
        return source("test").split(None, channels, "test")

    dataset = assemble(
        name=card.name,
        classes=card.classes,
        mirror_safe=card.mirror_safe,
        config=config,
        train=source("train"),
        validation=source("val"),
        test=test if (folder / "test.arrow").is_file() else None,
    )
    if card.photos and is_small(dataset.image_size):
        dataset = replace(dataset, image_size=None)
    return replace(dataset, reduced_to=card.shorter_side) if card.reduced else dataset


def resize(image_HWC: NDArray[np.uint8], shorter_side: int) -> NDArray[np.uint8]:
    """The whole image, its shorter side `shorter_side` pixels; a smaller one as it is."""
    height, width, channels = image_HWC.shape
    scale = shorter_side / min(height, width)
    if scale >= 1:
        return image_HWC
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(image_HWC[..., 0] if channels == 1 else image_HWC)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC)).reshape(size[1], size[0], channels)


def _cached_labels(path: Path, card: ResizedCard, *, least: int) -> NDArray[np.int64]:
    table = read_arrow(path)
    if not table.schema.equals(SCHEMA):
        raise UserError(f"{path}: is not as deit data cache writes it: its columns are {shortened(str(table.schema))}")
    labels_N: NDArray[np.int64] = table.column("label").to_numpy()
    if len(labels_N) and not least <= labels_N.min() <= labels_N.max() < len(card.classes):
        raise UserError(
            f"{path}: labels outside {least}..{len(card.classes) - 1}: it does not belong to {CARD} beside it"
        )
    return labels_N
