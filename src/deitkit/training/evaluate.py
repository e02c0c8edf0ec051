"""How good a network is, head by head: accuracy, calibration, agreement with its teacher, likeness of its tokens.

Probabilities that can be believed: each head of a trained network scaled to what it gets right (temperature scaling).

A head's decisions do not depend on the size of its logits; its probabilities, and the mean of two heads' probabilities,
do. What a network learned by (smoothed or mixed labels, a loss of z-scores, which fixes no size at all) leaves them too modest or
too sure. One factor per head, fitted to images that the network has not learned from, sets that right (Guo et al. 2017, arXiv
1706.04599, section 4.2). It is multiplied into the head's weights, so that every export has it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional as F

from deitkit.config import HEADS, DataConfig, Precision, Preprocessing, Size, TeacherConfig
from deitkit.data import Dataset, Split, load_data
from deitkit.data.dataset import SplitName
from deitkit.distill.tape import is_tape, read_manifest
from deitkit.distill.teacher import Teacher, load_teacher
from deitkit.models.network import Heads, Network, default_device, label_ranks
from deitkit.models.predict import fuse
from deitkit.models.vit import ViT
from deitkit.models.zoo import load_model
from deitkit.settings import load_yaml, validated
from deitkit.terminal import UserError, write_atomically
from deitkit.training.run import RunFolder
from deitkit.views.loader import evaluation_batches

CALIBRATION_BINS = 15
MOST_NAMED = 5
"""Unreadable images that are named one by one."""


class SplitLogits(NamedTuple):
    """What a network said about the readable images of a split."""

    heads: Heads  # logits (N, K) on the CPU
    labels_N: Int64[torch.Tensor, " N"]
    unreadable: tuple[int, ...] = ()
    """positions of the images that could not be read"""
    token_cosine: list[float] | None = None
    """mean cosine between class and distillation token: of the learned embeddings, then of every block's output (paper, section
    5.2); None for a network without a distillation token"""

    @property
    def readable_N(self) -> Int64[torch.Tensor, " N"]:
        """Positions of the images that the figures are of."""
        readable_A = torch.ones(len(self.labels_N) + len(self.unreadable), dtype=torch.bool)
        readable_A[list(self.unreadable)] = False
        return readable_A.nonzero()[:, 0]

    @property
    def decisions_A(self) -> Int64[torch.Tensor, " A"]:
        """The only head's first choice for every image of the split by position; -1 where it could not be read."""
        chosen_A = torch.full((len(self.labels_N) + len(self.unreadable),), -1)
        chosen_A[self.readable_N] = self.heads.cls_BK.argmax(-1)
        return chosen_A

    @property
    def finite(self) -> bool:
        return all(bool(head.isfinite().all()) for head in self.heads if head is not None)


Asked = dict[tuple[object, ...], SplitLogits]
"""What teachers said of a split, by name, hash of their weights where it is known, slice, precision and image size."""


@torch.no_grad()
def split_logits(
    network: Callable[[torch.Tensor], Heads],
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    batch_size: int = 256,
    workers: int = 0,
) -> SplitLogits:
    """`network` (images in [0, 1] -> Heads) on every readable image of `split`. Raises UserError if there is none."""
    cls, dist, labels = [], [], []
    lost: list[int] = []
    start = 0
    for images_BCHW, labels_B, weight_B in evaluation_batches(
        split, preprocessing, batch_size=batch_size, workers=workers
    ):
        heads = network(images_BCHW.to(device, non_blocking=True))
        readable_B = weight_B > 0
        lost += (np.flatnonzero(weight_B.numpy() == 0) + start).tolist()
        start += len(weight_B)
        cls.append(heads.cls_BK.float().cpu()[readable_B])
        if heads.dist_BK is not None:
            dist.append(heads.dist_BK.float().cpu()[readable_B])
        labels.append(labels_B[readable_B])
    if not sum(map(len, labels)):
        raise UserError(f"none of {len(split)} images can be read, such as {split.name(0)}")
    return SplitLogits(Heads(torch.cat(cls), torch.cat(dist) if dist else None), torch.cat(labels), tuple(lost))


def split_logits_of_network(network: Network, split: Split, device: torch.device, workers: int = 0) -> SplitLogits:
    """`split_logits` in evaluation mode; the mode is put back afterwards."""
    training = network.training
    network.eval()
    try:
        with record_token_cosine(network.body) as noted:
            answers = split_logits(network, split, network.preprocessing, device, workers=workers)
    finally:
        network.train(training)
    body = network.body
    if not isinstance(body, ViT) or body.dist_token is None:
        return answers
    learned = F.cosine_similarity(body.cls_token, body.dist_token, dim=-1).item()
    means = [torch.cat(cosines).cpu()[answers.readable_N].double().mean().item() for cosines in noted]
    return answers._replace(token_cosine=[learned, *means])


@contextmanager
def record_token_cosine(body: nn.Module) -> Iterator[list[list[Float[torch.Tensor, " B"]]]]:
    """Within this `with`, a student's cosine between its two tokens is noted after each of its blocks, for every image, batch by
    batch. Nothing of a network without a distillation token."""
    blocks: list[nn.Module] = [*body.blocks] if isinstance(body, ViT) and body.dist_token is not None else []
    noted: list[list[torch.Tensor]] = [[] for _ in blocks]

    def note(block: nn.Module, _given: Any, tokens_BTD: torch.Tensor) -> None:
        noted[places[block]].append(F.cosine_similarity(tokens_BTD[:, 0], tokens_BTD[:, 1], dim=-1))

    places = {block: place for place, block in enumerate(blocks)}
    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def split_logits_of_teacher(teacher: Teacher, split: Split, device: torch.device, workers: int = 0) -> SplitLogits:
    """The teacher on the same images, each prepared as the teacher wants it."""
    answer = lambda images_BCHW: Heads(teacher.forward(images_BCHW), None)  # noqa: E731
    return split_logits(answer, split, teacher.preprocessing, device, workers=workers)


def score(answers: SplitLogits, teacher_A: Int64[torch.Tensor, " A"] | None = None) -> dict[str, Any]:
    """Figures of a split, shares between 0 and 1; what does not apply is None. `teacher_A`: the teacher's decisions on all
    images of the split, -1 where it could not read one: no agreement is counted there.

    top1, top5: by head. agreement: share of images where the head's first choice is the teacher's. heads_agree: where
    both heads choose alike. nll: nats per image. ece: expected calibration error over 15 bins of equal width (Guo et
    al. 2017, arXiv 1706.04599). The last two are of the fused prediction, or of the only head.
    """
    heads, labels_N = answers.heads, answers.labels_N
    two = heads.dist_BK is not None
    chances = {choice: fuse(heads, choice) for choice in HEADS if two or choice == "cls"}
    best = chances["fused" if two else "cls"]
    agreement = None
    if teacher_A is not None:
        teacher_N = teacher_A[answers.readable_N]
        seen_N = teacher_N >= 0
        agreement = {
            head: _top(chances[head][seen_N], teacher_N[seen_N], 1) if head in chances else None for head in HEADS
        }
    return {
        "n": len(labels_N),
        "top1": {head: _top(chances.get(head), labels_N, 1) for head in HEADS},
        "top5": {head: _top(chances.get(head), labels_N, 5) for head in HEADS},
        "agreement": agreement,
        "heads_agree": _top(chances["cls"], chances["dist"].argmax(-1), 1) if two else None,
        "nll": F.nll_loss(best.clamp_min(1e-12).log(), labels_N).item(),
        "ece": calibration_error(best, labels_N),
    }


def calibration_error(probabilities_NK: Float[torch.Tensor, "N K"], labels_N: Int64[torch.Tensor, " N"]) -> float:
    """Mean over images of |accuracy - confidence| of the image's confidence bin."""
    confidence_N, choice_N = probabilities_NK.double().max(-1)
    right_N = (choice_N == labels_N).double()
    bin_N = (confidence_N * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bin_N, right_N - confidence_N)
    return (gap.abs().sum() / len(labels_N)).item()


def evaluate_run(
    run: Path,
    location: str | None = None,
    split: SplitName = "val",
    workers: int = 2,
    warn: Callable[[str], None] = warnings.warn,
    asked: Asked | None = None,
    home: str | None = None,
) -> dict[str, Any]:
    """Everything `score` knows about a run's network on a split of its own or other data, with its teacher beside it.

    A result on the run's own data is also kept in its folder, as `evaluation-SPLIT.json`; where that cannot be written,
    and where images cannot be read, `warn` is told. `asked`: what teachers said of the split before, where several runs on
    the same data are evaluated; it is added to. `home`: where the run's own data are, if not where it says. Raises UserError."""
    network, card = load_model(run / "model")
    device = default_device()
    network.to(device)
    config = load_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    data_config = validated(DataConfig, config.get("data") or {}, str(run / "config.yaml"))
    where = location or home or data_config.location
    if location is not None:
        of_its_own_data = {"train_images": None, "unlabelled": False}
        data_config = data_config.model_copy(update=of_its_own_data)
    if not where:
        raise UserError(f"{run}: does not say which data it was trained on: name them")
    dataset = load_data(where, data_config)
    if location is None:
        RunFolder(run).refuse_other_data(dataset.names_hash())
    check_classes(dataset, card.classes, str(run))
    warn_of_reduced(dataset, network.preprocessing, str(run), warn)
    images = dataset.open_split(split)
    answers = split_logits_of_network(network, images, device, workers)
    if not answers.finite:
        raise UserError(f"{run}: the network answers with infinity or NaN: it is of no use")
    teacher_config = validated(TeacherConfig, config.get("teacher") or {}, str(run / "config.yaml"))
    teacher_name, taught = teacher_config.teacher, None
    try:
        teacher_name, state, chunk_size, precision, image_size = _who_taught(teacher_config)
        key = (teacher_name, state, chunk_size, precision, image_size)
        if asked is not None and key in asked:
            taught = asked[key]
        elif teacher_name:
            teacher = load_teacher(
                teacher_name,
                dataset.classes,
                chunk_size=chunk_size,
                device=device,
                precision=precision,
                image_size=image_size,
            )
            if state not in (None, teacher.state_hash()):
                raise UserError(f"{teacher_name}: its weights are not those of the teacher of {teacher_config.tape}")
            taught = split_logits_of_teacher(teacher, images, device, workers)
            if asked is not None:
                asked[key] = taught
    except UserError as error:  # it may have been moved: no reason to say nothing about the student
        warn(f"evaluated without the teacher: {error}")
    result = {
        "run": str(run),
        "model": card.name,
        "data": where,
        "split": split,
        **score(answers, None if taught is None else taught.decisions_A),
        "teacher": None if taught is None else {"name": teacher_name, "top1": score(taught)["top1"]["cls"]},
        "token_cosine": answers.token_cosine,
    }
    for position in answers.unreadable[:MOST_NAMED]:
        warn(f"{images.name(position)}: cannot be read")
    if answers.unreadable:
        warn(f"{len(answers.unreadable)} of {len(images)} images cannot be read and are left out")
    if location is None:
        try:
            write_atomically(run / f"evaluation-{split}.json", json.dumps(result, indent=2) + "\n")
        except UserError as error:
            warn(str(error))
    return result


def _who_taught(config: TeacherConfig) -> tuple[str | None, str | None, int | None, Precision, Size | None]:
    """Name of a run's teacher, hash of its weights where a tape tells, slice and precision that it answered with, size of the
    image that it saw (None: its own). Raises UserError where the tape cannot be read."""
    if config.tape is None or not is_tape(Path(config.tape)):
        return config.teacher, None, config.teacher_chunk_size, config.teacher_precision, config.size
    manifest = read_manifest(Path(config.tape))
    teacher = manifest.teacher
    return teacher["name"], teacher["state"], teacher["chunk_size"], teacher["dtype"], manifest.teacher_size


def evaluated_side(preprocessing: Preprocessing) -> int:
    """Pixels of the shorter side to which a network's test images are resized before their centre is cut out."""
    return math.floor(max(preprocessing.image_size) / preprocessing.crop_pct)


def warn_of_reduced(dataset: Dataset, preprocessing: Preprocessing, who: str, warn: Callable[[str], None]) -> None:
    """Say so where `who`'s figures on images that were made smaller before are not those of the originals."""
    wanted = evaluated_side(preprocessing)
    if dataset.reduced_to is not None and dataset.reduced_to < wanted:
        warn(
            f"{dataset.name}: its images were reduced to {dataset.reduced_to} pixels, to evaluate {who} they are enlarged to "
            f"{wanted}: figures of the originals need deit data cache --size {wanted}"
        )


def check_classes(dataset: Dataset, classes: tuple[str, ...], owner: str) -> None:
    """Raises UserError where `dataset` has other classes than those that `owner` knows."""
    if dataset.classes == classes:
        return
    if len(dataset.classes) != len(classes):
        raise UserError(f"{owner} knows {len(classes)} classes, {dataset.name} has {len(dataset.classes)}")
    first = next((ours, theirs) for ours, theirs in zip(classes, dataset.classes, strict=True) if ours != theirs)
    raise UserError(f"{owner} knows class {first[0]!r} where {dataset.name} has {first[1]!r}")


def _top(chances_NK: torch.Tensor | None, labels_N: torch.Tensor, k: int) -> float | None:
    if chances_NK is None:
        return None
    return (label_ranks(chances_NK, labels_N) < k).double().mean().item()


GREATEST_SCALE = 100.0
"""Beyond it a head knows nothing, or its logits differ by rounding alone."""
HALVINGS = 50


def calibrate(network: Network, answers: SplitLogits) -> tuple[SplitLogits, tuple[float, ...]]:
    """Multiply each head of a `ViT` by the factor that suits its `answers`. Returns what it answers now, and the factors."""
    body = network.body
    if not isinstance(body, ViT):
        raise TypeError(f"only a student's heads are known here, not those of {type(body).__name__}")
    said = [head_BK for head_BK in answers.heads if head_BK is not None]
    scales = tuple(fitting_scale(head_BK, answers.labels_N) for head_BK in said)
    body.scale_heads(scales)
    scaled = [head_BK * scale for head_BK, scale in zip(said, scales, strict=True)]
    return answers._replace(heads=Heads(scaled[0], scaled[1] if len(scaled) > 1 else None)), scales


def fitting_scale(logits_NK: Float[torch.Tensor, "N K"], labels_N: Int64[torch.Tensor, " N"]) -> float:
    """The factor s, 1/100 to 100, for which softmax(s * logits) makes the labels likeliest: 1 / temperature.

    Labels count as if two images more had been seen, one of them wrong (after Platt 1999, for two classes), so that a few images,
    all of them right, do not make the network certain. The mean loss is convex in s: its slope, the mean of
    sum over k of (softmax(s * z)[k] - target[k]) * z[k], is halved in. 1 where the logits of every image are all equal,
    or not finite.
    """
    z_NK = logits_NK.double()
    z_NK = z_NK - z_NK.mean(-1, keepdim=True)
    if not z_NK.any() or not z_NK.isfinite().all():
        return 1.0
    count, classes = z_NK.shape
    wrong = 1 / (count + 2)
    right_N = z_NK.gather(1, labels_N[:, None])[:, 0]
    others_N = -right_N / (classes - 1)  # the mean of the other classes' logits, of which all together have the sum 0
    wanted = ((1 - wrong) * right_N + wrong * others_N).mean()
    low, high = -math.log(GREATEST_SCALE), math.log(GREATEST_SCALE)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        expected = ((math.exp(middle) * z_NK).softmax(-1) * z_NK).sum(-1).mean()
        low, high = (low, middle) if expected > wanted else (middle, high)
    return math.exp((low + high) / 2)
