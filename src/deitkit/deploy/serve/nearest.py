"""The training images that a network finds most alike: the cosine of its last token to theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch.nn import functional as F

from deitkit.data import Split
from deitkit.data.decode import UnreadableImage
from deitkit.models.network import prepare
from deitkit.models.predict import Predictor
from deitkit.models.vit import ViT
from deitkit.pages import data_address
from deitkit.training.evaluate import data_of_run
from deitkit.views.loader import stack_by_shape, to_unit_range

State = Literal["loading", "ready", "none"]
"""none: there are none, or they could not be looked at."""
MOST_IMAGES = 3000
"""Training images that are looked at; of more, so many evenly spread ones."""
CHUNK = 16
"""Images between which somebody else may use the thread."""


@final
class Nearest:
    """The tokens of a run's training images; `build` computes them. There is nothing to find in a network without tokens."""

    def __init__(self, predictor: Predictor, run: Path) -> None:
        self.predictor, self.run = predictor, run
        self.state: State = "loading"
        self.split: Split
        self.positions: list[int] = []
        self.tokens_ND = torch.empty(0, 0)

    def build(self) -> Iterator[None]:
        """Compute all tokens, a step for each chunk of images. Raises UserError if the data are not there any more."""
        try:
            yield from self._build()
        finally:
            self.state = "ready" if self.positions else "none"

    def _build(self) -> Iterator[None]:
        if not isinstance(self.predictor.network.body, ViT):
            return
        dataset, _ = data_of_run(self.run, self.predictor.classes)
        self.split = dataset.open_split("train")
        spread = np.linspace(0, len(self.split) - 1, min(MOST_IMAGES, len(self.split))).astype(int).tolist()
        readable, tokens = [], []
        for start in range(0, len(spread), CHUNK):
            yield
            views = []
            for position in spread[start : start + CHUNK]:
                try:
                    views.append(self.predictor.view(self.split.read(position)))
                except UnreadableImage:
                    continue
                readable.append(position)
            tokens += [last_token(self.predictor, images_BHWC) for images_BHWC in stack_by_shape(views)]
        if tokens:
            self.tokens_ND, self.positions = torch.cat(tokens), readable

    def find(self, view_HWC: NDArray[np.uint8], most: int) -> list[dict[str, Any]]:
        """The nearest images, the most alike first: name, class, cosine, a small picture. Only where the `state` is ready."""
        cosine_N = self.tokens_ND @ last_token(self.predictor, view_HWC[None])[0]
        found: list[dict[str, Any]] = []
        for number in cosine_N.argsort(descending=True).tolist():
            if len(found) == most:
                break
            position = self.positions[number]
            try:
                picture = data_address(self.split.read(position))
            except UnreadableImage:
                continue
            label = int(self.split.labels_N[position])
            found.append({
                "image": self.split.key(position),
                "class": self.predictor.classes[label] if label >= 0 else None,  # unlabelled images have no class
                "cosine": round(float(cosine_N[number]), 4),
                "picture": picture,
            })  # fmt: skip
        return found


@torch.no_grad()
def last_token(predictor: Predictor, images_BHWC: NDArray[np.uint8]) -> Float[torch.Tensor, "B D"]:
    """The distillation token (the class token where there is no other) that its head reads, of length 1, on the CPU."""
    network = predictor.network
    vit = network.body
    assert isinstance(vit, ViT)
    images_BCHW = to_unit_range(torch.from_numpy(images_BHWC.copy()).permute(0, 3, 1, 2)).to(predictor.device)
    *_, tokens_BTD = vit.intermediates(prepare(images_BCHW, network.preprocessing))
    return F.normalize(vit.norm(tokens_BTD[:, vit.config.prefix_tokens - 1]), dim=-1).cpu()
