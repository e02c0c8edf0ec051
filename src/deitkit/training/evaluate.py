"""How good a network is on a split: accuracy of each head, calibration, agreement with its teacher, cosine of its tokens.

`split_logits` computes a network's logits for every image of a split (shared among the processes of a run), `score` makes figures of
them, `evaluate_run` does both for a finished run. `calibrate` fits one temperature per head to the validation images.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional as F

from deitkit.config import HEADS, ConfigT, DataConfig, Precision, Preprocessing, Size, TeacherConfig
from deitkit.data import Dataset, Split, load_data, load_known
from deitkit.data.dataset import SplitName, repeated
from deitkit.data.listing import left_out_line
from deitkit.distill.tape import is_tape, read_manifest
from deitkit.distill.teacher import Teacher, load_teacher, teacher_facts
from deitkit.models.network import Heads, Network, default_device, label_ranks
from deitkit.models.predict import fuse
from deitkit.models.vit import ViT
from deitkit.models.zoo import load_model
from deitkit.settings import upgraded, validated
from deitkit.terminal import UserError, expanded, load_yaml, write_atomically, written
from deitkit.training.predictions import predictions_of, write_predictions
from deitkit.training.run import RunFolder, place_of
from deitkit.views.loader import EVALUATION_BATCH, evaluation_batches

CALIBRATION_BINS = 15
MOST_NAMED = 5
"""Unreadable images that are named one by one."""
LARGEST_SCALE = 100.0
"""Upper limit of the calibration factor: a head that needs more tells classes apart by rounding errors, if at all."""
BISECTIONS = 50
COMMON_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Exponents of the calibration factor that two heads have in common, where a factor each costs the fused prediction accuracy. The last
one leaves them as they are."""


class SplitLogits(NamedTuple):
    """A network's logits for the readable images of a split."""

    heads: Heads  # logits (N, K) on the CPU
    labels_N: Int64[torch.Tensor, " N"]
    unreadable: tuple[int, ...] = ()
    """positions of the images that could not be read"""
    token_cosine: list[float] | None = None
    """mean cosine between class and distillation token: of the learned embeddings, then of every block's output (paper, section 4);
    None for a network without a distillation token"""

    @property
    def readable_N(self) -> Int64[torch.Tensor, " N"]:
        """Positions of the readable images."""
        readable_A = torch.ones(len(self.labels_N) + len(self.unreadable), dtype=torch.bool)
        readable_A[list(self.unreadable)] = False
        return readable_A.nonzero()[:, 0]

    @property
    def predictions_A(self) -> Int64[torch.Tensor, " A"]:
        """Predictions of the class head (a teacher's only one) for all images of the split; -1 for an unreadable one."""
        predicted_A = torch.full((len(self.labels_N) + len(self.unreadable),), -1)
        predicted_A[self.readable_N] = self.heads.cls_BK.argmax(-1)
        return predicted_A

    @property
    def finite(self) -> bool:
        return all(bool(head.isfinite().all()) for head in self.heads if head is not None)


@torch.no_grad()
def split_logits(
    network: Callable[[torch.Tensor], Heads],
    split: Split,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    batch_size: int = EVALUATION_BATCH,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> SplitLogits:
    """`network` (images in [0, 1] -> Heads) on every readable image of `split`. `share` (r, n): this process, r of n, computes part
    of the batches and gets the others' logits from the other processes. Raises UserError if no image can be read."""
    batch_size = max(1, min(batch_size, -(-len(split) // share[1])))
    batches: list[tuple[torch.Tensor | None, ...]] = []
    with record_token_cosine(network) as cosines:
        for images_BCHW, labels_B, weight_B in evaluation_batches(
            split, preprocessing, batch_size=batch_size, workers=workers, share=share
        ):
            heads = network(images_BCHW.to(device, non_blocking=True))
            cls_BK, dist_BK = (None if head_BK is None else head_BK.float().cpu() for head_BK in heads)
            cosine_BL = torch.stack(cosines, 1).cpu() if cosines else None
            cosines.clear()
            batches.append((weight_B > 0, labels_B, cls_BK, dist_BK, cosine_BL))
    if share[1] > 1:
        batches = gather_object(batches)  # in the order of the processes, which is that of the images
    readable_A, labels_A, cls_AK, dist_AK, cosine_AL = (
        None if column[0] is None else torch.cat(column) for column in zip(*batches, strict=True)
    )
    assert readable_A is not None and labels_A is not None and cls_AK is not None  # noqa: PT018
    if not readable_A.any():
        raise UserError(f"none of {len(split)} images can be read, such as {split.name(0)}")
    cosine = None
    if cosine_AL is not None:
        tokens = network.body  # type: ignore[attr-defined]
        learned = F.cosine_similarity(tokens.cls_token, tokens.dist_token, dim=-1).item()
        cosine = [learned, *(layer_N.double().mean().item() for layer_N in cosine_AL[readable_A].T.contiguous())]
    return SplitLogits(
        heads=Heads(cls_AK[readable_A], None if dist_AK is None else dist_AK[readable_A]),
        labels_N=labels_A[readable_A],
        unreadable=tuple(torch.where(~readable_A)[0].tolist()),
        token_cosine=cosine,
    )


@contextmanager
def record_token_cosine(network: object) -> Iterator[list[Float[torch.Tensor, " B"]]]:
    """Within this block a list to which each forward pass of a student appends the cosines between its two tokens, after each of its
    blocks in turn. Nothing is appended by a network without a distillation token."""
    body = network.body if isinstance(network, Network) else None
    blocks: list[nn.Module] = [*body.blocks] if isinstance(body, ViT) and body.dist_token is not None else []
    cosines: list[torch.Tensor] = []

    def append(_block: nn.Module, _given: Any, tokens_BTD: torch.Tensor) -> None:
        cosines.append(F.cosine_similarity(tokens_BTD[:, 0], tokens_BTD[:, 1], dim=-1))

    handles = [block.register_forward_hook(append) for block in blocks]
    try:
        yield cosines
    finally:
        for handle in handles:
            handle.remove()


def split_logits_of_network(
    network: Network, split: Split, device: torch.device, workers: int = 0, share: tuple[int, int] = (0, 1)
) -> SplitLogits:
    """`split_logits` in evaluation mode; the mode is restored afterwards."""
    training = network.training
    network.eval()
    try:
        return split_logits(network, split, network.preprocessing, device, workers=workers, share=share)
    finally:
        network.train(training)


def split_logits_of_teacher(
    teacher: Teacher, split: Split, device: torch.device, workers: int = 0, share: tuple[int, int] = (0, 1)
) -> SplitLogits:
    """The teacher's logits for the same images, each prepared as the teacher wants it."""
    forward = lambda images_BCHW: Heads(teacher.forward(images_BCHW), None)  # noqa: E731
    return split_logits(forward, split, teacher.preprocessing, device, workers=workers, share=share)


def score(logits: SplitLogits, teacher_A: Int64[torch.Tensor, " A"] | None = None) -> dict[str, Any]:
    """Figures of a split, shares between 0 and 1; what does not apply is None. `teacher_A`: the teacher's predictions for all
    images of the split, -1 where it could not read one: no agreement is counted there.

    largest_class, smallest_class: shares of the most and the least frequent label. predicted_classes: how many are predicted at all.
    top1, top5: by head. balanced: the mean over classes of the share of a class's images that are predicted right, by head and of the
    teacher. agreement: share of images for which the head predicts what the teacher predicts. heads_agree: share for which both heads
    predict the same class. nll: log loss, nats per image. ece: expected calibration error over 15 bins of equal width (Guo et al. 2017,
    arXiv 1706.04599). predicted_classes, nll and ece are of the fused prediction, or of the only head.
    """
    heads, labels_N = logits.heads, logits.labels_N
    two = heads.dist_BK is not None
    probabilities = {choice: fuse(heads, choice) for choice in HEADS if two or choice == "cls"}
    best = probabilities["fused" if two else "cls"]
    agreement = None
    if teacher_A is not None:
        teacher_N = teacher_A[logits.readable_N]
        known_N = teacher_N >= 0
        agreement = {
            head: _top(probabilities[head][known_N], teacher_N[known_N], 1) if head in probabilities else None
            for head in HEADS
        }
    counts_K = labels_N.bincount()
    balanced: dict[str, float | None] = {
        head: balanced_accuracy(probabilities[head].argmax(-1), labels_N) if head in probabilities else None
        for head in HEADS
    }
    if teacher_A is not None:
        balanced["teacher"] = balanced_accuracy(teacher_N[known_N], labels_N[known_N])
    return {
        "n": len(labels_N),
        "largest_class": int(counts_K.max()) / len(labels_N),
        "smallest_class": int(counts_K[counts_K > 0].min()) / len(labels_N),
        "predicted_classes": int((best.argmax(-1).bincount() > 0).sum()),
        "top1": {head: _top(probabilities.get(head), labels_N, 1) for head in HEADS},
        "balanced": balanced,
        "top5": {head: _top(probabilities.get(head), labels_N, 5) for head in HEADS},
        "agreement": agreement,
        "heads_agree": _top(probabilities["cls"], probabilities["dist"].argmax(-1), 1) if two else None,
        "nll": F.nll_loss(best.clamp_min(1e-12).log(), labels_N).item(),
        "ece": calibration_error(best, labels_N),
    }


def _top(probabilities_NK: torch.Tensor | None, labels_N: torch.Tensor, k: int) -> float | None:
    if probabilities_NK is None:
        return None
    return (label_ranks(probabilities_NK, labels_N) < k).double().mean().item()


def balanced_accuracy(predicted_N: Int64[torch.Tensor, " N"], labels_N: Int64[torch.Tensor, " N"]) -> float | None:
    """The mean over classes of the share of a class's images that are predicted right; classes without an image do not count."""
    counts_K = labels_N.bincount()
    right_K = labels_N[predicted_N == labels_N].bincount(minlength=len(counts_K))
    return (right_K[counts_K > 0] / counts_K[counts_K > 0]).double().mean().item() if len(labels_N) else None


def calibration_error(probabilities_NK: Float[torch.Tensor, "N K"], labels_N: Int64[torch.Tensor, " N"]) -> float:
    """Mean over images of |accuracy - confidence| of the image's confidence bin."""
    confidence_N, choice_N = probabilities_NK.double().max(-1)
    right_N = (choice_N == labels_N).double()
    bin_N = (confidence_N * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add_(0, bin_N, right_N - confidence_N)
    return (gap.abs().sum() / len(labels_N)).item()


# ------------------------------------------------------------------------------------------------ temperature scaling


def calibrate(network: Network, logits: SplitLogits) -> tuple[SplitLogits, tuple[float, ...]]:
    """Multiply each head of a `ViT` by the factor that fits its `logits` to the labels. Returns the scaled logits, and the factors.

    A head's predictions do not depend on the size of its logits; its probabilities, and the mean of two heads' probabilities,
    do. Smoothed or mixed labels, and a loss of z-scores, which fixes no size at all, leave them too modest or too sure. One factor
    per head, fitted to images that the network has not learned from, corrects that (temperature scaling: Guo et al. 2017, arXiv
    1706.04599, section 4.2). It is multiplied into the head's weights, so that every export has it.

    Two factors weigh the heads against each other in the fused prediction. If that costs it accuracy on these images, both heads get the
    same factor, the one that fits both or one between it and 1: the first that costs nothing.
    """
    body = network.body
    if not isinstance(body, ViT):
        raise TypeError(f"only a student's heads can be scaled, not those of {type(body).__name__}")
    heads = [head_NK for head_NK in logits.heads if head_NK is not None]
    scales = tuple(fit_scale(head_NK, logits.labels_N) for head_NK in heads)
    scaled = [head_NK * scale for head_NK, scale in zip(heads, scales, strict=True)]
    if len(heads) > 1:
        before = _fused_top1(heads, logits.labels_N)
        common = fit_scale(torch.cat(heads), logits.labels_N.repeat(2))
        shares = iter(COMMON_SHARES)
        while _fused_top1(scaled, logits.labels_N) < before:
            scales = (common ** next(shares),) * 2
            scaled = [head_NK * scales[0] for head_NK in heads]
    body.scale_heads(scales)
    return logits._replace(heads=Heads(scaled[0], scaled[1] if len(scaled) > 1 else None)), scales


def _fused_top1(heads: list[torch.Tensor], labels_N: Int64[torch.Tensor, " N"]) -> float:
    return _top(fuse(Heads(*heads), "fused"), labels_N, 1) or 0.0


def fit_scale(logits_NK: Float[torch.Tensor, "N K"], labels_N: Int64[torch.Tensor, " N"]) -> float:
    """The factor s, 1/100 to 100, for which softmax(s * logits) makes the labels likeliest: 1 / temperature.

    Labels count as if two more images had been seen, one of them wrong (after Platt 1999, for two classes), so that a few images,
    all of them right, do not make the network certain. The mean loss is convex in s: the zero of its slope, the mean of
    sum over k of (softmax(s * z)[k] - target[k]) * z[k], is found by bisection. 1 if every image's logits are all equal, or any is
    not finite.
    """
    z_NK = logits_NK.double()
    z_NK = z_NK - z_NK.mean(-1, keepdim=True)
    if not z_NK.any() or not z_NK.isfinite().all():
        return 1.0
    count, classes = z_NK.shape
    wrong = 1 / (count + 2)
    right_N = z_NK.gather(1, labels_N[:, None])[:, 0]
    others_N = -right_N / (classes - 1)  # the mean of the other classes' logits: all logits of an image add up to 0
    target = ((1 - wrong) * right_N + wrong * others_N).mean()
    low, high = -math.log(LARGEST_SCALE), math.log(LARGEST_SCALE)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        expected = ((math.exp(middle) * z_NK).softmax(-1) * z_NK).sum(-1).mean()
        low, high = (low, middle) if expected > target else (middle, high)
    return math.exp((low + high) / 2)


# ----------------------------------------------------------------------------------------------------- finished runs


def evaluate_run(
    run: Path,
    location: str | None = None,
    split: SplitName = "val",
    workers: int = 2,
    warn: Callable[[str], None] = warnings.warn,
    teacher_cache: TeacherCache | None = None,
    home: str | None = None,
) -> dict[str, Any]:
    """Everything that `score` knows about a run's network on a split of its own or other data, and its teacher's accuracy.

    The figures and what is predicted for each image are also kept in the run's folder (`RunFolder.evaluation`); where they cannot be
    written, and where images cannot be read, `warn` is called. `teacher_cache`: teachers' logits for this split, where several runs on
    the same data are evaluated; it is added to. `home`: where the run's own data are, if they were moved. Raises UserError."""
    network, card = load_model(run / "model")
    device = default_device()
    network.to(device)
    dataset, where = data_of_run(run, card.classes, location, home)
    warn_of_reduced(dataset, network.preprocessing, str(run), warn)
    images = dataset.open_split(split)
    remarks: list[str] = []  # of own validation images the training has told
    if location is not None:
        remarks = [*dataset.notes, left_out_line(images.left_out)]
    elif split == "test":
        remarks = [repeated(dataset.open_split("train"), images, "test"), left_out_line(images.left_out)]
    for line in filter(None, remarks):
        warn(line)
    logits = split_logits_of_network(network, images, device, workers)
    if not logits.finite:
        raise UserError(f"{run}: the network's logits are infinite or NaN: it is of no use")
    teacher, of_teacher, cache = None, None, {} if teacher_cache is None else teacher_cache
    try:
        teacher = _teacher_of(_section(run, "teacher", TeacherConfig))
        if teacher is not None and teacher not in cache:
            cache[teacher] = split_logits_of_teacher(teacher.load(dataset.classes, device), images, device, workers)
        of_teacher = None if teacher is None else cache[teacher]
    except UserError as error:  # it may have been moved: no reason not to evaluate the student
        warn(f"evaluated without the teacher: {error}")
    result = {
        "run": str(run),
        "model": card.name,
        "data": where,
        **({} if location is None else {"place": place_of(location)}),
        "split": "all" if dataset.undivided else split,
        **score(logits, None if of_teacher is None else of_teacher.predictions_A),
        **({"untrained_heads": True} if _untrained(run) else {}),
        "teacher": teacher and of_teacher and {"name": teacher.name, "top1": score(of_teacher)["top1"]["cls"]},
        "token_cosine": logits.token_cosine,
    }
    for position in logits.unreadable[:MOST_NAMED]:
        warn(f"{images.name(position)}: cannot be read")
    if logits.unreadable:
        warn(f"{len(logits.unreadable)} of {len(images)} images cannot be read and are left out")
    kept = RunFolder(run).evaluation(split, location)
    teacher_A = None if of_teacher is None else of_teacher.predictions_A
    predictions = predictions_of(logits.heads, logits.labels_N, logits.readable_N, images, teacher_A)
    try:
        with written(kept.figures):
            kept.figures.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept.figures, json.dumps(result, indent=2) + "\n")
        write_predictions(kept.predictions, predictions, card.classes)
    except UserError as error:
        warn(str(error))
    return result


def _untrained(run: Path) -> bool:
    """Whether a run says that no head has learned anything."""
    try:
        return bool(RunFolder(run).summary().get("untrained_heads"))
    except UserError:
        return False


def data_of_run(
    run: Path, classes: tuple[str, ...], location: str | None = None, home: str | None = None
) -> tuple[Dataset, str]:
    """The data of a finished run that knows these classes, or all of those at `location`, and where they are. `home`: where the run's own
    data are, if they were moved. Raises UserError if they are not there, or others than the run was started with."""
    config = _section(run, "data", DataConfig)
    where = location or home or config.location
    if not where:
        raise UserError(
            f"{run}: does not say which data it was trained on: name them in {run / 'config.yaml'} (data: location)"
        )
    if location is not None and not _is_own(run, config, location):
        config = config.model_copy(update={"train_images": None, "unlabelled": False, "oversample": False})
        return load_known(location, config, classes), where
    dataset = load_data(where, config)
    RunFolder(run).refuse_other_data(dataset.names_hash())
    check_classes(dataset, classes, str(run))
    return dataset, where


def _is_own(run: Path, config: DataConfig, location: str) -> bool:
    """Whether the data at `location` are those that the run was trained on, perhaps moved: then only their validation and test images are
    new to it. Equal names alone do not tell, where the run's data are still there."""
    try:
        there = load_data(location, config)
        RunFolder(run).refuse_other_data(there.names_hash())
    except UserError:
        return False
    if expanded(location).resolve() == expanded(config.location).resolve():
        return True
    try:
        own = load_data(config.location, config)
    except UserError:  # they were moved
        return (run / "data.json").is_file()
    return own.open_split("train").cached_content_hash() == there.open_split("train").cached_content_hash()


def _section(run: Path, name: str, kind: type[ConfigT]) -> ConfigT:
    """One section of a run's config.yaml, the defaults if there is none: others may be those of an older version. Paths of data, teacher
    and tape are those that can be opened from here. Raises UserError."""
    file = run / "config.yaml"
    values = load_yaml(file).get(name) if file.is_file() else None
    config = validated(kind, upgraded({name: values}, str(file))[name] or {}, str(file))
    paths = {
        key: value for key in ("location", "teacher", "tape") if isinstance(value := getattr(config, key, None), str)
    }
    return config.model_copy(update={key: RunFolder(run).from_here(value) for key, value in paths.items()})


class RunTeacher(NamedTuple):
    """The teacher of a finished run, as its settings or its tape describe it."""

    name: str
    precision: Precision
    image_size: Size | None
    """None: its own"""
    state: str | None = None
    """hash of its weights, where a tape knows it"""
    chunk_size: int | None = None

    def load(self, classes: tuple[str, ...], device: torch.device) -> Teacher:
        """Raises UserError where it is not there any more, or has other weights."""
        teacher = load_teacher(
            self.name,
            classes,
            chunk_size=self.chunk_size,
            device=device,
            precision=self.precision,
            image_size=self.image_size,
        )
        if self.state not in (None, teacher.state_hash()):
            raise UserError(f"{self.name}: its weights are not those that the run learned from")
        return teacher


TeacherCache = dict[RunTeacher, SplitLogits]
"""Teachers' logits for a split."""


def _teacher_of(config: TeacherConfig) -> RunTeacher | None:
    """None for a run without a teacher. Raises UserError where the tape cannot be read."""
    if config.tape is not None and is_tape(Path(config.tape)):
        manifest = read_manifest(Path(config.tape))
        taught = manifest.teacher
        return RunTeacher(taught["name"], taught["dtype"], manifest.teacher_size, taught["state"], taught["chunk_size"])
    if config.teacher is not None:
        return RunTeacher(config.teacher, config.teacher_precision, config.size)
    if config.tape is not None:
        raise UserError(f"{config.tape}: the tape of its outputs is not there any more")
    return None


def name_of_teacher(run: Path) -> str | None:
    """What a finished run calls its teacher, or the tape of its outputs; None if it had none. Neither need be there any more."""
    config = _section(run, "teacher", TeacherConfig)
    return config.teacher or config.tape


def teacher_of_run(run: Path, classes: tuple[str, ...]) -> Teacher | None:
    """The teacher of a finished run, None if it had none. Raises UserError if it is not there any more."""
    teacher = _teacher_of(_section(run, "teacher", TeacherConfig))
    return None if teacher is None else teacher.load(classes, default_device())


def evaluated_side(preprocessing: Preprocessing) -> int:
    """Pixels of the shorter side to which a network's test images are resized before the centre crop."""
    return math.floor(max(preprocessing.image_size) / preprocessing.crop_pct)


def warn_of_reduced(dataset: Dataset, preprocessing: Preprocessing, who: str, warn: Callable[[str], None]) -> None:
    """Warn if the data's images were reduced to fewer pixels than `who` needs: its figures are not those of the originals."""
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


def check_teacher_on(
    location: str,
    config: DataConfig,
    name: str,
    pixels: int | None,
    split: SplitName,
    workers: int,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """`teacher_facts` of the teacher `name` on a split of the data at `location`, and images_per_second; `pixels`: side of its input, its
    own if not given. Raises UserError."""
    dataset = load_data(location, config)
    size = None if pixels is None else (pixels, pixels)
    teacher = load_teacher(name, dataset.classes, device=default_device(), image_size=size)
    warn_of_reduced(dataset, teacher.preprocessing, name, warn)
    logits = split_logits_of_teacher(teacher, dataset.open_split(split), teacher.device, workers)
    facts = teacher_facts(teacher, logits.heads.cls_BK, logits.labels_N)
    return {**facts, "images_per_second": 1 / max(teacher.costs()[1], 1e-9)}
