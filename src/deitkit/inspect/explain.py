"""Which parts of an image an answer rests on: where each token looks, and which patches each head and the teacher need.

Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928) says where a token looks; integrated gradients (Sundararajan et al. 2017,
arXiv 1703.01365, by captum) say what a logit depends on. Neither is the truth: beside each map stand its deletion and insertion scores
(Petsiuk et al. 2018, arXiv 1806.07421) and those of a random order of the same cells.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.nn import functional as F

from deitkit.config import HEADS, Preprocessing, Size
from deitkit.distill.teacher import Teacher
from deitkit.inspect.charts import STYLE
from deitkit.models.network import resize
from deitkit.models.predict import ImageLike, Predictor, fuse, load
from deitkit.models.vit import ViT, attention_rollout
from deitkit.pages import data_address
from deitkit.terminal import UserError, write_atomically, written
from deitkit.training.evaluate import teacher_of_run
from deitkit.views.loader import to_unit_range

GRADIENT_STEPS = 32
"""Points between the grey image and the image at which gradients are taken."""
STAGES = 12
"""So many times, at most, cells are taken away or added."""
CELLS = 8
"""Cells a side into which an image is cut for a network without patches."""
RANDOM_ORDERS = 2
PANEL_INCHES = 2.3

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Images (B, C, H, W) in [0, 1] -> logits (B, K)."""


class Scores(NamedTuple):
    """Mean probability of the explained class, 0 to 1, while cells are replaced by grey or put into a grey image."""

    deletion: float
    """those that count most go first: low is good"""
    insertion: float
    """those that count most come first: high is good"""


@final
@dataclass(frozen=True, kw_only=True)
class Attribution:
    """How much each cell of an image counts for an answer."""

    title: str
    """such as `class token: attention`"""
    pixels_HWC: NDArray[np.uint8]
    """what the network was shown: its evaluation view of the image"""
    class_name: str
    """the class that is explained: the most probable one of that head"""
    weights_hw: NDArray[np.float64]
    """(rows, columns) of patches; at least 0, together 1"""
    scores: Scores
    random: Scores
    """of cells in a random order, mean of several"""

    @property
    def verdict(self) -> str:
        """Whether both scores are better than those of random orders."""
        better = self.scores.deletion < self.random.deletion and self.scores.insertion > self.random.insertion
        return "better than a random order" if better else "no better than a random order"


@final
@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a network and its teacher answer to an image, and on what that rests."""

    name: str
    answers: dict[str, tuple[str, float]]
    """most probable class and its probability, of each head, of both fused, and of the teacher"""
    attributions: tuple[Attribution, ...]

    def with_overlays(self) -> dict[str, Any]:
        """`as_dict`, and with each map the `overlay` of it as a `data:` address (PNG)."""
        facts = self.as_dict()
        for one, fact in zip(self.attributions, facts["attributions"], strict=True):
            fact["overlay"] = data_address(overlay(one.pixels_HWC, one.weights_hw), lossless=True)
        return facts

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the pixels."""
        return {
            "image": self.name,
            "answers": {who: {"class": name, "probability": share} for who, (name, share) in self.answers.items()},
            "attributions": [
                {
                    "title": one.title,
                    "class": one.class_name,
                    "weights": one.weights_hw.round(6).tolist(),
                    **one.scores._asdict(),
                    "random": one.random._asdict(),
                    "verdict": one.verdict,
                }
                for one in self.attributions
            ],
        }


def explain(predictor: Predictor, image: ImageLike, teacher: Teacher | None = None) -> Explanation:
    """Explain what `predictor`, and `teacher` if there is one, answer to an image; each sees its own evaluation view of it. Raises
    UserError for an unreadable image."""
    network, classes = predictor.network, predictor.classes
    view = View.of(predictor, image, predictor.card.preprocessing)
    tokens: list[torch.Tensor | None] = [None]
    with torch.no_grad():
        if isinstance(network.body, ViT):
            heads, rollouts_1Phw = attention_rollout(network, view.image_1CHW)
            tokens = [*rollouts_1Phw[0]]
        else:
            heads = network(view.image_1CHW)
    parts = [answer(HEADS["cls"], lambda images_BCHW: network(images_BCHW).cls_BK, classes, view, tokens[0])]
    if heads.dist_BK is not None:
        best, number = fuse(heads)[0].max(-1)
        parts.append(answer(HEADS["dist"], lambda images_BCHW: network(images_BCHW).dist_BK, classes, view, tokens[1]))
        parts.append(({HEADS["fused"]: (classes[int(number)], float(best))}, []))
    if teacher is not None:
        view = View.of(predictor, image, teacher.preprocessing)
        parts.append(answer("teacher", teacher.with_gradients, classes, view, None))
    return Explanation(
        name=str(image) if isinstance(image, str | Path) else "image",
        answers={who: given for answers, _ in parts for who, given in answers.items()},
        attributions=tuple(one for _, attributions in parts for one in attributions),
    )


def explain_run(
    run: Path,
    images: Iterable[ImageLike],
    warn: Callable[[str], None] = warnings.warn,
    on_unreadable: Callable[[str], None] | None = None,
) -> Iterator[Explanation]:
    """`explain` for a finished run with its teacher, image by image; `warn` is called if that is not there any more, `on_unreadable` with
    what is no image, which otherwise raises. Raises UserError."""
    predictor = load(run)
    try:
        teacher = teacher_of_run(run, predictor.classes)
    except UserError as error:
        warn(f"explained without the teacher: {error}")
        teacher = None
    for image in images:
        try:
            predictor.view(image)
        except UserError as error:
            if on_unreadable is None:
                raise
            on_unreadable(str(error))
            continue
        yield explain(predictor, image, teacher)


class View(NamedTuple):
    """An image as a network sees it."""

    pixels_HWC: NDArray[np.uint8]
    image_1CHW: torch.Tensor
    """the same in [0, 1], on the device"""
    grey_1CHW: torch.Tensor
    """an image of the colour that the network's normalisation turns into zeros"""

    @classmethod
    def of(cls, predictor: Predictor, image: ImageLike, preprocessing: Preprocessing) -> View:
        pixels_HWC = predictor.view(image, preprocessing)
        image_1CHW = to_unit_range(torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1)[None]).to(predictor.device)
        if tuple(image_1CHW.shape[2:]) != preprocessing.image_size:  # a small one, which the network would resize
            image_1CHW = resize(image_1CHW, preprocessing.image_size, preprocessing.interpolation)
        mean, channels = preprocessing.mean, image_1CHW.shape[1]
        mean = mean if len(mean) == channels else (sum(mean) / len(mean),) * channels
        grey_1CHW = image_1CHW.new_tensor(mean)[None, :, None, None].expand_as(image_1CHW).contiguous()
        return cls(pixels_HWC, image_1CHW, grey_1CHW)


def answer(
    who: str, logits: Logits, classes: Sequence[str], view: View, attention_hw: Float[torch.Tensor, "h w"] | None
) -> tuple[dict[str, tuple[str, float]], list[Attribution]]:
    """The most probable class of one head and its probability, and the maps of what it rests on."""
    with torch.no_grad():
        best, number = logits(view.image_1CHW)[0].float().softmax(-1).max(-1)
    cells = (CELLS, CELLS) if attention_hw is None else (attention_hw.shape[0], attention_hw.shape[1])
    maps = {} if attention_hw is None else {f"{who.replace('head', 'token')}: attention": attention_hw}
    maps[f"{who}: gradients"] = integrated_gradients(logits, int(number), view, cells)
    *scores, random = deletion_and_insertion(logits, int(number), [*maps.values()], view)
    attributions = [
        Attribution(
            title=title,
            class_name=classes[int(number)],
            pixels_HWC=view.pixels_HWC,
            weights_hw=weights_hw.double().cpu().numpy(),
            scores=score,
            random=random,
        )
        for (title, weights_hw), score in zip(maps.items(), scores, strict=True)
    ]
    return {who: (classes[int(number)], float(best))}, attributions


# ---------------------------------------------------------------------------------------------------------- maps


def integrated_gradients(logits: Logits, number: int, view: View, cells: Size) -> Float[torch.Tensor, "h w"]:
    """What each of `cells` (rows, columns) adds to the logit of class `number`, compared with a grey image: what speaks for the class, as
    shares that add up to 1."""
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(lambda images_BCHW: logits(images_BCHW)[:, number])
    added_1CHW = method.attribute(
        view.image_1CHW, baselines=view.grey_1CHW, n_steps=GRADIENT_STEPS, internal_batch_size=GRADIENT_STEPS
    )
    positive_11hw = F.adaptive_avg_pool2d(added_1CHW.detach().sum(1, keepdim=True), cells).clamp_min(0)
    total = positive_11hw.sum()
    return (positive_11hw / total if total > 0 else torch.full_like(positive_11hw, 1 / positive_11hw.numel()))[0, 0]


@torch.no_grad()
def deletion_and_insertion(
    logits: Logits, number: int, maps: Sequence[Float[torch.Tensor, "h w"]], view: View
) -> list[Scores]:
    """The scores of each map, then those of random orders of the cells."""
    cells, shape, generator = maps[0].numel(), maps[0].shape, torch.Generator().manual_seed(0)
    _, image_1CHW, grey_1CHW = view
    orders = [weights_hw.flatten().argsort(descending=True, stable=True).cpu() for weights_hw in maps]
    orders += [torch.randperm(cells, generator=generator) for _ in range(RANDOM_ORDERS)]
    counts = torch.linspace(0, cells, min(STAGES, cells) + 1).round().long()
    found = []
    for order in orders:
        taken_SN = torch.zeros(len(counts), cells)
        for stage, count in enumerate(counts):
            taken_SN[stage, order[:count]] = 1
        mask_S1HW = F.interpolate(
            taken_SN.view(-1, 1, *shape).to(image_1CHW.device), image_1CHW.shape[2:], mode="nearest"
        )
        without, only = torch.lerp(image_1CHW, grey_1CHW, mask_S1HW), torch.lerp(grey_1CHW, image_1CHW, mask_S1HW)
        # the mean over the stages, by trapezoids: the first and the last count half
        shares = [logits(images).float().softmax(-1)[:, number] for images in (without, only)]
        found.append([(torch.trapezoid(share_S) / (len(share_S) - 1)).item() for share_S in shares])
    random = np.mean(found[len(maps) :], axis=0).tolist()
    return [Scores(*one) for one in [*found[: len(maps)], random]]


# ------------------------------------------------------------------------------------------------------ pictures


def overlay(pixels_HWC: UInt8[np.ndarray, "H W C"], weights_hw: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "H W 3"]:
    """The image under colours from black (the cell that counts least) to yellow (the one that counts most)."""
    height, width = pixels_HWC.shape[:2]
    span = max(weights_hw.max() - weights_hw.min(), 1e-12)
    relative = torch.from_numpy((weights_hw - weights_hw.min()) / span)[None, None].float()
    smooth_HW1 = F.interpolate(relative, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()[..., None]
    colours_HW3 = mpl.colormaps["inferno"](smooth_HW1[..., 0])[..., :3]
    image_HW3 = np.broadcast_to(pixels_HWC, (height, width, 3)) / 255
    mixed_HW3: NDArray[np.uint8] = np.round(255 * (0.45 * image_HW3 + 0.55 * colours_HW3)).astype(np.uint8)
    return mixed_HW3


def draw(explanation: Explanation, path: Path) -> None:
    """A PNG file: the image, then every map with its scores. Raises UserError."""
    panels = 1 + len(explanation.attributions)
    columns = min(panels, 4)
    rows = -(-panels // columns)
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 8}):
        figure = Figure(figsize=(PANEL_INCHES * columns, (PANEL_INCHES + 0.75) * rows), layout="constrained", dpi=130)
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid:
            axes.axis("off")
        answers = "\n".join(f"{who}: {name} {100 * share:.0f} %" for who, (name, share) in explanation.answers.items())
        pixels_HWC = explanation.attributions[0].pixels_HWC
        small = max(pixels_HWC.shape[:2]) <= 64
        shown: Any = {"interpolation": "nearest" if small else "antialiased", "cmap": "gray"}
        grid[0].imshow(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC, vmin=0, vmax=255, **shown)
        grid[0].set_title(answers, fontsize=8, loc="left")
        for axes, one in zip(grid[1:], explanation.attributions, strict=False):
            axes.imshow(overlay(one.pixels_HWC, one.weights_hw), **shown)
            axes.set_title(
                f"{one.title}\n“{one.class_name}”: deletion {one.scores.deletion:.2f} (random {one.random.deletion:.2f})\n"
                f"insertion {one.scores.insertion:.2f} (random {one.random.insertion:.2f})\n{one.verdict}",
                fontsize=8,
                loc="left",
            )
        with written(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph", UserWarning)  # letters that the font lacks become boxes
            figure.savefig(path, format="png")


def write_explanations(explanations: Iterable[Explanation], out: Path) -> Iterator[tuple[Explanation, Path]]:
    """Write a picture of each into the folder `out` as soon as it is there, and in the end all of them into `explanations.json`. Gives
    each with its picture. Raises UserError."""
    with written(out):
        out.mkdir(parents=True, exist_ok=True)
    facts: dict[Path, dict[str, Any]] = {}
    for one in explanations:
        stem = Path(one.name).stem or "image"
        names = (f"{stem}.png", *(f"{stem}-{number}.png" for number in range(2, len(facts) + 3)))
        file = next(out / name for name in names if out / name not in facts)
        draw(one, file)
        facts[file] = {**one.as_dict(), "picture": file.name}
        yield one, file
    write_atomically(out / "explanations.json", json.dumps(list(facts.values()), indent=2) + "\n")
