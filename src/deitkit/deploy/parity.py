"""The parity gate: an exported network is shown the validation images, and kept only if it predicts what the original predicts."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import NonNegativeFloat

from deitkit.config import Config, HeadChoice
from deitkit.data import Dataset, Split
from deitkit.data.decode import UnreadableImage, with_channels
from deitkit.models.predict import Predictor, load
from deitkit.terminal import UserError, write_atomically, written
from deitkit.training.evaluate import data_of_run

MOST_DISAGREEMENT = 0.01
"""Share of the images for which another class may be predicted."""
MOST_LOST = 0.005
"""Share of the images that may be classified worse in the end."""

NO_CLASS = -1
"""What an exported network predicts whose probabilities are infinite or NaN."""

Exported = Callable[[UInt8[np.ndarray, "1 h w C"]], Float[np.ndarray, "1 K"]]
"""An exported network: one image as it is -> probabilities."""


@final
class Parity(Config):
    """How an exported network compares with the one it came from, on the same images."""

    images: int
    disagree: int
    """images for which it predicts another class"""
    accuracy: float
    original_accuracy: float
    largest_difference: NonNegativeFloat
    """of a probability; infinite where one is NaN"""
    allowed: float
    """share of the images that may disagree"""

    @property
    def kept(self) -> bool:
        """Whether it disagrees on no more images than allowed, and loses no more accuracy than `MOST_LOST`."""
        lost = self.original_accuracy - self.accuracy
        return self.disagree <= self.allowed * self.images and lost <= MOST_LOST + 1e-9

    def line(self, name: str) -> str:
        """`model.onnx: 1 of 341 images classified differently (0.3 %, allowed 1.0 %), accuracy 86.2 %, the network's own 86.5 %`."""
        share = f"{100 * self.disagree / self.images:.1f} %, allowed {100 * self.allowed:.1f} %"
        return (
            f"{name}: {self.disagree} of {self.images} images classified differently ({share}), accuracy "
            f"{100 * self.accuracy:.1f} %, the network's own {100 * self.original_accuracy:.1f} %"
        )


def readable(split: Split, channels: int, most: int | None = None) -> Iterator[tuple[UInt8[np.ndarray, "H W C"], int]]:
    """(pixels with so many channels, label) of the readable images; of `most` of them, evenly spread."""
    count = len(split) if most is None else min(most, len(split))
    for position in np.linspace(0, len(split) - 1, count).astype(int):
        try:
            yield with_channels(split.read(int(position)), channels), int(split.labels_N[position])
        except UnreadableImage:
            continue


@final
class Gate:
    """The images of a split with the probabilities that the original network gives them.

    Raises UserError if none can be read."""

    def __init__(
        self, predictor: Predictor, split: Split, head: HeadChoice, allowed: float = MOST_DISAGREEMENT
    ) -> None:
        self.predictor, self.split, self.head, self.allowed = predictor, split, head, allowed
        self.channels = predictor.card.preprocessing.channels
        original = [
            predictor.probabilities(predictor.view(pixels_HWC)[None], head)[0].numpy()
            for pixels_HWC, _ in self._images()
        ]
        if not original:
            raise UserError(f"none of {len(split)} images can be read, such as {split.name(0)}")
        self.original_NK: Float[np.ndarray, "N K"] = np.stack(original)

    def _images(self) -> Iterator[tuple[UInt8[np.ndarray, "H W C"], int]]:
        return readable(self.split, self.channels)

    def compare(self, exported: Exported) -> Parity:
        """Show all images to an exported network."""
        disagree = right = right_before = 0
        largest = 0.0
        for (pixels_HWC, label), original_K in zip(self._images(), self.original_NK, strict=True):
            exported_K = exported(pixels_HWC[None])[0]
            before = int(original_K.argmax())
            after = int(exported_K.argmax()) if np.isfinite(exported_K).all() else NO_CLASS
            disagree += before != after
            right_before += before == label
            right += after == label
            difference = float(np.abs(exported_K - original_K).max()) if np.isfinite(exported_K).all() else math.inf
            largest = max(largest, difference)
        count = len(self.original_NK)
        return Parity(
            images=count, disagree=disagree, accuracy=right / count, original_accuracy=right_before / count, largest_difference=largest,
            allowed=self.allowed,
        )  # fmt: skip


def probabilities_of(session: Any) -> Exported:
    """A session of ONNX Runtime as an `Exported`."""
    return lambda images_1HWC: np.asarray(
        session.run(None, {"images": np.ascontiguousarray(images_1HWC)})[0], np.float32
    )


def open_gate(run: Path, out: Path, head: HeadChoice, allowed: float) -> tuple[Gate, Dataset]:
    """The gate for the network of a finished run, and the data it was trained on; `out` is made. Raises UserError."""
    predictor = load(run, "cpu")
    if not getattr(predictor.card.architecture, "distillation_token", False):
        if head not in ("fused", "cls"):
            raise UserError(f"--head {head}: {predictor.card.name} has one head: give --head cls")
        head = "cls"
    dataset, _ = data_of_run(run, predictor.classes)
    with written(out):
        out.mkdir(parents=True, exist_ok=True)
    return Gate(predictor, dataset.open_split("val"), head, allowed), dataset


def write_judged(
    out: Path, suffix: str, content: bytes, parity: Parity, facts: dict[str, Any], readme: Callable[[str], str]
) -> list[str]:
    """Write the exported network as `model` and `suffix`, or as `rejected` if it failed, with `parity.json` and `README.md`, the text of
    which depends on the file's name. Returns the names of the files. Raises UserError."""
    name = f"{'model' if parity.kept else 'rejected'}{suffix}"
    write_atomically(out / name, content)
    write_parity(out, parity, facts)
    write_atomically(out / "README.md", readme(name))
    return [name, "parity.json", "README.md"]


def write_parity(out: Path, parity: Parity, facts: dict[str, Any]) -> None:
    """`parity.json`; an infinite difference is null there, for JSON has no other word. Raises UserError."""
    figures = json.loads(parity.model_dump_json())
    write_atomically(out / "parity.json", json.dumps({**facts, **figures, "kept": parity.kept}, indent=2) + "\n")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters and quantisers say about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
