"""Classify images with a trained network: files, Pillow images or arrays in, the most probable classes out.

Images are prepared as evaluation prepares them (`views.augment.evaluation_view`), to the bit.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, final, get_args

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image

from deitkit.config import MAX_PIXELS, HeadChoice, Preprocessing
from deitkit.data.decode import UnreadableImage, decode, upright_pixels, with_channels
from deitkit.data.listing import follows, image_paths
from deitkit.models.network import Heads, Network, default_device
from deitkit.models.zoo import ModelCard, load_model
from deitkit.terminal import UserError, expanded, unknown_name
from deitkit.views.augment import evaluation_view
from deitkit.views.loader import stack_by_shape, to_unit_range

ImageLike = str | Path | Image.Image | NDArray[Any]
"""A file, a Pillow image, or uint8 pixels of shape (H, W) or (H, W, C)."""


NONE_OF_THESE = "none of these"


def fuse(heads: Heads, choice: HeadChoice = "fused") -> Float[torch.Tensor, "B K"]:
    """Probabilities from a network's logits.

    cls, dist: softmax of that head. fused: mean of the two softmaxes (paper, section 4). fused_logits: softmax of the mean logits, as in
    the published code. Of a network with one head, that head's softmax; it has no `dist`: raises UserError.
    """
    if choice not in get_args(HeadChoice):
        raise unknown_name("head", str(choice), get_args(HeadChoice))
    cls_BK = heads.cls_BK.float()
    if heads.dist_BK is None:
        if choice == "dist":
            raise UserError("head 'dist': this network has no distillation head: choose cls or fused")
        return cls_BK.softmax(-1)
    dist_BK = heads.dist_BK.float()
    if choice in ("cls", "dist"):
        return (cls_BK if choice == "cls" else dist_BK).softmax(-1)
    if choice == "fused":
        return (cls_BK.softmax(-1) + dist_BK.softmax(-1)) / 2
    return ((cls_BK + dist_BK) / 2).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable classes of one image, the most probable first."""

    name: str
    """the file, or `image 3` for one without a name"""
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    min_confidence: float = 0.0

    @property
    def answer(self) -> str | None:
        """The most probable class; None if its probability is below `min_confidence`: none of these."""
        return self.classes[0] if self.probabilities[0] >= self.min_confidence else None

    def as_dict(self) -> dict[str, Any]:
        pairs = zip(self.classes, self.probabilities, strict=True)
        ranked = [{"class": c, "probability": p} for c, p in pairs]
        return {"image": self.name, "answer": self.answer, "predictions": ranked}

    def as_rows(self) -> list[list[object]]:
        """Rows (image, rank, class, probability), the likeliest class first."""
        ranked = enumerate(zip(self.classes, self.probabilities, strict=True), 1)
        return [[self.name, rank, label, f"{probability:.6f}"] for rank, (label, probability) in ranked]

    def as_text(self) -> str:
        ranked = ", ".join(
            f"{label} {100 * x:.1f} %" for label, x in zip(self.classes, self.probabilities, strict=True)
        )
        return ranked if self.answer is not None else f"{NONE_OF_THESE} ({ranked})"


class PredictionList(list[Prediction]):
    """Predictions in the order of their images; in a notebook a table."""

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(one.name)}</td><td><b>{html.escape(one.answer or NONE_OF_THESE)}</b></td>"
            f"<td>{html.escape(one.as_text())}</td></tr>"
            for one in self
        )
        return f"<table><thead><tr><th>image</th><th>answer</th><th>probabilities</th></tr></thead><tbody>{rows}</tbody></table>"


@final
class Predictor:
    """A trained network with the names of its classes. `load` makes one from a run folder."""

    def __init__(self, network: Network, card: ModelCard, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device) if device else default_device()
        self.network = network.eval().to(self.device)
        self.card = card

    @property
    def classes(self) -> tuple[str, ...]:
        return self.card.classes

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        head: HeadChoice = "fused",
        top: int = 5,
        *,
        batch_size: int = 64,
        min_confidence: float = 0.0,
        max_pixels: int = MAX_PIXELS,
        on_unreadable: Callable[[str], None] | None = None,
    ) -> PredictionList:
        """The `top` most probable classes of every image, in order; of a folder or a pattern such as `photos/*.jpg`, of all images that it
        stands for. `min_confidence`: where the most probable class is less probable than that, the answer is None.
        `max_pixels`: larger images are unreadable.

        An unreadable image raises UserError; with `on_unreadable`, that is called with `path: why` and the image is left out.
        """
        if isinstance(images, str | Path | Image.Image | np.ndarray):
            images = [images]
        least: object = min_confidence
        if not isinstance(least, Real) or not 0 <= float(least) <= 1:
            raise UserError(f"min_confidence {min_confidence!r}: give a probability, 0 to 1")
        given: dict[str, object] = {"top": top, "batch_size": batch_size, "max_pixels": max_pixels}
        for word, number in given.items():
            if not isinstance(number, int) or number < 1:
                raise UserError(f"{word} {number!r}: give a whole number, at least 1")
        found = PredictionList()
        views = self._views(images, max_pixels, on_unreadable)
        while batch := list(islice(views, batch_size)):
            parts = stack_by_shape([view_HWC for _, view_HWC in batch])
            probabilities_BK = torch.cat([self.probabilities(images_BHWC, head) for images_BHWC in parts])
            found += self.ranked([name for name, _ in batch], probabilities_BK, top, float(min_confidence))
        return found

    def ranked(
        self, names: Sequence[str], probabilities_BK: Float[torch.Tensor, "B K"], top: int, min_confidence: float = 0.0
    ) -> list[Prediction]:
        """The `top` most probable classes of images with these names; of equally probable ones, the lower first."""
        best_BT, class_BT = torch.sort(probabilities_BK, dim=-1, descending=True, stable=True)
        return [
            Prediction(
                name=name,
                classes=tuple(self.classes[number] for number in class_T.tolist()),
                probabilities=tuple(best_T.tolist()),
                min_confidence=min_confidence,
            )
            for name, best_T, class_T in zip(names, best_BT[:, :top], class_BT[:, :top], strict=True)
        ]

    def view(self, image: ImageLike, preprocessing: Preprocessing | None = None) -> NDArray[np.uint8]:
        """The evaluation view (H, W, C) of an image: what the network, or another one with this `preprocessing`, is shown. Raises
        UserError."""
        try:
            return _view(image, _name(image, "image"), preprocessing or self.card.preprocessing)
        except UnreadableImage as error:
            raise UserError(str(error)) from error

    @torch.no_grad()
    def probabilities(self, images_BHWC: UInt8[np.ndarray, "B H W C"], head: HeadChoice) -> Float[torch.Tensor, "B K"]:
        """Probabilities of all classes, on the CPU, for a batch of evaluation views."""
        images_BCHW = to_unit_range(torch.from_numpy(images_BHWC).permute(0, 3, 1, 2))
        return fuse(self.network(images_BCHW.to(self.device)), head).cpu()

    def _views(
        self, images: Iterable[ImageLike], max_pixels: int, on_unreadable: Callable[[str], None] | None
    ) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Name and evaluation view of every readable image, one by one: no more than a batch is held in memory."""
        for number, image in enumerate(_each(images)):
            name = _name(image, f"image {number}")
            try:
                yield name, _view(image, name, self.card.preprocessing, max_pixels)
            except UnreadableImage as error:
                if on_unreadable is None:
                    raise UserError(str(error)) from error
                on_unreadable(str(error))


def load(run: str | Path, device: torch.device | str | None = None) -> Predictor:
    """The network of a finished run, ready to predict: on the GPU if there is one. Raises UserError."""
    folder = expanded(run)
    network, card = load_model(folder if (folder / "model.json").is_file() else folder / "model")
    return Predictor(network, card, device)


def _each(images: Iterable[ImageLike]) -> Iterator[ImageLike]:
    """The images, each folder and pattern replaced by the files that it stands for."""
    for image in images:
        # a Path is a file or a folder; a str may be a pattern too
        several = isinstance(image, str) or (isinstance(image, Path) and follows(image.is_dir))
        yield from image_paths([image]) if several else [image]  # type: ignore[list-item]


def _name(image: ImageLike, otherwise: str) -> str:
    return str(image) if isinstance(image, str | Path) else otherwise


def _view(image: ImageLike, name: str, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The evaluation view (H, W, C). Raises UnreadableImage for a file, UserError for anything else."""
    pixels_HWC = _pixels(image, name, max_pixels)
    if preprocessing.channels == 3:  # a grey network takes the luma of colours itself
        pixels_HWC = with_channels(pixels_HWC, 3)
    return evaluation_view(pixels_HWC, preprocessing)


def _pixels(image: ImageLike, name: str, max_pixels: int) -> NDArray[np.uint8]:
    """uint8 of shape (H, W, C), upright. Raises UnreadableImage for a file, UserError for anything else."""
    if isinstance(image, str | Path):
        return decode(expanded(image), name, max_pixels)
    if isinstance(image, Image.Image):
        try:
            return upright_pixels(image)
        except Exception as error:  # Pillow raises anything
            raise UserError(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not isinstance(image, np.ndarray):
        raise UserError(f"{name}: give a path, a Pillow image or an array, not {type(image).__name__}")
    pixels_HWC = image[..., None] if image.ndim == 2 else image
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] not in (1, 3) or not pixels_HWC.size:
        raise UserError(
            f"{name}: an array must be uint8 of shape (H, W), (H, W, 1) or (H, W, 3), "
            f"not {image.dtype} of shape {image.shape}"
        )
    return np.ascontiguousarray(pixels_HWC)
