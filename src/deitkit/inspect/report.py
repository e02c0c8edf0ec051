"""`report.html`: one page on a finished run that needs nothing but itself. How accurate it is, where it fails (with pictures), which
labels look wrong, how far its probabilities can be trusted, what it cost.

It is made of what the run folder holds (`summary.json`, `metrics.jsonl`, `predictions.csv`) and of the images of its data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from jinja2 import UndefinedError
from markupsafe import Markup
from numpy.typing import NDArray
from scipy.stats import binomtest

from deitkit.config import HEADS
from deitkit.data import Split
from deitkit.data.dataset import SplitName
from deitkit.data.decode import UnreadableImage
from deitkit.inspect.explain import View, overlay
from deitkit.inspect.plots import (
    accuracy_curve,
    calibration_plot,
    confusion_matrix,
    loss_curves,
    rejection_curve,
    token_plot,
    validation_curve,
)
from deitkit.models.predict import load
from deitkit.models.vit import ViTConfig, attention_rollout
from deitkit.models.zoo import ModelCard, read_card
from deitkit.pages import data_address, template
from deitkit.terminal import UserError, duration, expanded, parse_json, plural, quoted, write_atomically
from deitkit.training.evaluate import data_of_run
from deitkit.training.predictions import NONE, Predictions, read_predictions
from deitkit.training.probe import PROBED
from deitkit.training.run import RunFolder, place_of
from deitkit.training.tables import disappointment, short_teacher, standard_error

MISTAKES, DISAGREEMENTS = 20, 8
"""Pictures that are shown of a kind."""
MOST_CLASSES = 25
"""With more there is no confusion matrix; of more than twice as many a table shows this number alone."""
ASKED_ACCURACIES = (0.95, 0.99)
FEWEST_ANSWERED = 10
"""An accuracy of fewer images than that is no base for a threshold."""
SPLITS: Mapping[str, str] = {"val": "validation", "test": "test"}


@final
@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a report needs of a finished run and one of its splits."""

    path: Path
    split: SplitName
    own: bool
    """whether the images are of the data that the run was trained on"""
    which: str
    """`validation ` or `test `, nothing where the data are not divided"""
    summary: dict[str, Any]
    """of the run; the figures of the split are in `figures`"""
    figures: dict[str, Any]
    card: ModelCard
    images: Split
    predictions: Predictions

    @property
    def classes(self) -> tuple[str, ...]:
        return self.card.classes

    @cached_property
    def recall_K(self) -> NDArray[np.float64]:
        """Accuracy of the images of each class; NaN of a class without images."""
        right_K, images_K = (np.bincount(labels_N, minlength=len(self.classes)) for labels_N in self._right_and_all)
        return np.where(images_K > 0, right_K / np.maximum(images_K, 1), np.nan)

    @property
    def _right_and_all(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.predictions.label_N[self.predictions.right_N], self.predictions.label_N

    @property
    def accuracy(self) -> float:
        return float(self.predictions.right_N.mean())

    @property
    def standard_error(self) -> float:
        return standard_error(self.accuracy, len(self.predictions))

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the classes' accuracies."""
        return float(np.nanmean(self.recall_K))

    @property
    def largest_class(self) -> float:
        return float(np.bincount(self.predictions.label_N).max() / len(self.predictions))

    @property
    def teacher(self) -> tuple[str, float] | None:
        """Its name and its accuracy on these images."""
        return _teacher_of(self.figures)

    @property
    def validation_levels(self) -> dict[str, float]:
        """What stands beside the student's validation accuracy, on whatever split the report is."""
        teacher, largest = _teacher_of(self.summary), self.summary.get("largest_class")
        levels = {} if teacher is None else {f"teacher {teacher[0]}": teacher[1]}
        return levels if largest is None else {**levels, "largest class": float(largest)}


def _teacher_of(figures: Mapping[str, Any]) -> tuple[str, float] | None:
    teacher = figures.get("teacher")
    return None if teacher is None else (short_teacher(teacher["name"]), float(teacher["top1"]))


def write_report(run: Path, split: SplitName = "val", page: Path | None = None, data: str | None = None) -> Path:
    """Write the report of a finished run on a split of its own data, or of other `data`, and return its file: in the run's folder if not
    given. Raises UserError."""
    page = page or RunFolder(run).evaluation(split, data).page
    finished = open_finished(run, split, data)
    with readable_run(run):
        text = report(finished)
    write_atomically(page, text)
    return page


@contextmanager
def readable_run(run: Path) -> Iterator[None]:
    """Turns what a damaged file of a run, or one of another version, leads to into one line."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        raise UserError(
            f"{run}: its files are damaged, or of another version ({type(error).__name__}: {error}): no report can be made"
        ) from error


def try_report(
    run: Path, warn: Callable[[str], None], split: SplitName = "val", data: str | None = None
) -> Path | None:
    """`write_report` for one that follows other work: that is done, whatever happens to the page."""
    try:
        return write_report(run, split, data=data)
    except UserError as error:
        warn(f"no report: {error}")
        return None


def open_finished(run: Path, split: SplitName, data: str | None = None) -> Finished:
    """A run and what was measured on a split of its own data, or of other `data`. Raises UserError if the run is not finished, if
    predictions or figures are missing or damaged, or if the data are not there."""
    folder = RunFolder(run)
    summary, card, files = folder.summary(), read_card(folder.model), folder.evaluation(split, data)
    dataset, _ = data_of_run(run, card.classes, data)
    images = dataset.open_split(split)
    # own validation images were measured at the end of the training, and perhaps again
    measured_once = data is None and split == "val" and not files.figures.is_file()
    figures = summary if measured_once else _evaluation(files.figures)
    predictions = read_predictions(files.predictions, images, card.classes)
    with readable_run(run):
        if figures["n"] != len(predictions):
            raise UserError(
                f"{files.predictions}: has {len(predictions)} images, {figures['n']} were measured: deit evaluate writes it anew"
            )
    return Finished(
        path=run,
        split=split,
        own=data is None,
        which="" if dataset.undivided else f"{SPLITS[split]} ",
        summary=summary,
        figures=figures,
        card=card,
        images=images,
        predictions=predictions,
    )


def _evaluation(file: Path) -> dict[str, Any]:
    try:
        figures: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        return figures
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}): deit evaluate writes it") from error


def report(run: Finished) -> str:
    """The page."""
    predictions, facts = run.predictions, run.summary
    wrong = np.flatnonzero(~predictions.right_N)
    surest = wrong[np.argsort(-predictions.probability_N[wrong], kind="stable")]
    doubted_N = (predictions.suspected_N != NONE) & (predictions.teacher_N != predictions.label_N)
    suspects = np.flatnonzero(doubted_N)
    suspects = suspects[np.argsort(predictions.probability_of_label_N[suspects], kind="stable")]
    folder = RunFolder(run.path)
    events = folder.events()
    data = folder.from_here(str(facts["data"])) if run.own else str(run.figures["data"])
    drawn = {
        "curves": accuracy_curve([("student", validation_curve(events))], run.validation_levels),
        "losses": loss_curves(events),
        "confusion": confusion_matrix(predictions, run.classes) if len(run.classes) <= MOST_CLASSES else None,
        "calibration": calibration_plot(predictions),
        "rejection": rejection_curve(predictions),
        "tokens": token_plot(run.figures.get("token_cosine")),
    }
    return template("deitkit.inspect", "report.html.jinja").render(
        title=f"{run.path.resolve().name}: {facts['model']} on {Path(place_of(data)).name}",
        run=run,
        folder=quoted(run.path),
        summary=facts,
        figures=run.figures,
        verdict=disappointment(run.figures),
        baselines=_baselines(run),
        heads=[(title, run.figures["top1"].get(head)) for head, title in HEADS.items() if head != "fused_logits"],
        classes=class_rows(run),
        shown_classes=len(np.unique(predictions.label_N)),
        confusions=confusions(run),
        mistakes=pictures_of(run, surest[:MISTAKES].tolist()),
        mistaken=len(wrong),
        disagreements=_disagreements(run),
        suspects=pictures_of(run, suspects[:MISTAKES].tolist()),
        suspected=len(suspects),
        thresholds=[(asked, threshold(predictions, asked)) for asked in ASKED_ACCURACIES],
        attention=attention_pictures(run, [*surest[:2].tolist(), *_surest_right(run)]),
        costs=[row for row in cost_rows(run) if row[1]],
        config=_text(run.path / "config.yaml"),
        environment=_text(run.path / "environment.json"),
        pictures={name: None if svg is None else Markup(svg) for name, svg in drawn.items()},
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


# --------------------------------------------------------------------------------------------- figures and rows


def _baselines(run: Finished) -> list[tuple[str, float]]:
    teacher, probe = run.teacher, _probe(run)
    tuned = teacher[1] if teacher else run.figures["top1"]["cls"]
    probed = [] if probe is None or probe == tuned else [("probe before fine-tuning", probe)]
    return [
        *([(f"teacher {teacher[0]}", teacher[1])] if teacher else []),
        *probed,
        ("largest class", run.largest_class),
        *(
            [("probe, cross-validated on the training images", crossed)]
            if (crossed := _cross_validated(run)) is not None
            else []
        ),
    ]


def _cross_validated(run: Finished) -> float | None:
    """That of a teacher that was probed; with few validation images it says more than their accuracy."""
    try:
        return float(parse_json((run.path / PROBED).read_text(encoding="utf-8"))["cv"]["top1"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _probe(run: Finished) -> float | None:
    """The accuracy of the probe of the teacher, or of a teacher itself, if it was measured on the images of this page."""
    teacher = run.figures.get("teacher")
    try:
        folder = expanded(teacher["name"]) if teacher else run.path
        scores = parse_json((folder / PROBED).read_text(encoding="utf-8"))["scores"]
        share: float = scores["top1"]["cls"]
        return share if run.own and run.split == "val" and scores["n"] == run.figures["n"] else None
    except (OSError, ValueError, KeyError, TypeError):  # not a folder, not probed, or damaged: the page can do without
        return None


def class_rows(run: Finished) -> list[dict[str, Any]]:
    """Of each class with images: its accuracy (recall), its precision and the class that its images are most often taken for. The least
    accurate comes first."""
    labels_N, predicted_N = run.predictions.label_N, run.predictions.prediction_N
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(run.classes):
        own_N = labels_N == number
        if not own_N.any():
            continue
        others = predicted_N[own_N & (predicted_N != number)]
        often = np.bincount(others).argmax() if len(others) else None
        said_N = predicted_N == number
        rows.append({
            "name": name,
            "images": int(own_N.sum()),
            "recall": float(run.recall_K[number]),
            "precision": float(own_N[said_N].mean()) if said_N.any() else None,
            "taken_for": None if often is None else run.classes[often],
            "taken": 0 if often is None else int((others == often).sum()),
        })  # fmt: skip
    return sorted(rows, key=lambda row: float(row["recall"]))[: MOST_CLASSES if len(rows) > 2 * MOST_CLASSES else None]


def confusions(run: Finished) -> list[tuple[str, str, int]]:
    """(label, prediction, images) of the most frequent mistakes."""
    wrong_N = ~run.predictions.right_N
    pairs_N2 = np.stack([run.predictions.label_N[wrong_N], run.predictions.prediction_N[wrong_N]], 1)
    pairs_M2, count_M = np.unique(pairs_N2, axis=0, return_counts=True)
    first = np.argsort(-count_M, kind="stable")[:10]
    return [
        (run.classes[label], run.classes[said], int(count))
        for (label, said), count in zip(pairs_M2[first], count_M[first], strict=True)
    ]


class Threshold(NamedTuple):
    """Answering from a probability on."""

    probability: float
    share: float
    """of the images that are answered"""
    answered: int
    right: int

    @property
    def least_accuracy(self) -> float:
        """Lower end of the accuracy's 95 % interval (Clopper and Pearson 1934)."""
        return float(binomtest(self.right, self.answered).proportion_ci(0.95).low)


def threshold(predictions: Predictions, asked: float) -> Threshold | None:
    """The lowest probability from which on answers have at least the accuracy `asked`, in as few digits as tell it from the next lower one,
    with their share of all images and their accuracy; None if no threshold with `FEWEST_ANSWERED` answers has it."""
    probability_N, accuracy_N = predictions.by_confidence()
    enough_N = (accuracy_N >= asked) & (np.arange(1, len(accuracy_N) + 1) >= FEWEST_ANSWERED)
    # of images with the same probability none is answered without the others
    enough_N[:-1] &= probability_N[:-1] > probability_N[1:]
    if not enough_N.any():
        return None
    last = int(np.flatnonzero(enough_N)[-1])
    least, below = float(probability_N[last]), float(probability_N[last + 1]) if last + 1 < len(predictions) else -1.0
    shortest = next(
        (cut for digits in range(2, 6) if (cut := math.floor(least * 10**digits) / 10**digits) > below), least
    )
    return Threshold(shortest, (last + 1) / len(predictions), last + 1, round(float(accuracy_N[last]) * (last + 1)))


def cost_rows(run: Finished) -> list[tuple[str, str]]:
    """What it took and what it is: (what, value), the same lines for every run; a value that is not known is empty."""
    facts = run.summary
    seconds = facts.get("seconds_per_image") or {}
    speed = seconds.get("student")
    return [
        ("images learned from", f"{facts['images_seen']:,} views in {plural(facts['steps'], 'step')} ({facts['epochs']:.3g} epochs)"),
        ("training time", duration(facts["seconds"])),
        ("time with preparation", duration(facts.get("seconds_with_preparation") or facts["seconds"])),
        ("parameters", f"{facts['params']:,}"),
        ("multiply-adds an image", f"{facts['macs'] / 1e9:.3f} G"),
        ("images a second", f"{1 / speed:,.0f}" if speed else ""),
        ("seeds", f"{facts['seed']}, views {facts['view_seed']}, data {facts['data_seed']}"),
        ("folder", str(run.path)),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Picture:
    """An image with what was said of it."""

    source: str
    """a data: address; empty if the image cannot be read any more"""
    file: str
    label: str
    prediction: str
    probability: float
    teacher: str | None
    suspected: str | None


def pictures_of(run: Finished, places: Iterable[int]) -> list[Picture]:
    predictions, names = run.predictions, (*run.classes, None)  # NONE is the last one
    return [
        Picture(
            source=thumbnail(run.images, int(predictions.position_N[place])),
            file=predictions.files[place],
            label=run.classes[predictions.label_N[place]],
            prediction=run.classes[predictions.prediction_N[place]],
            probability=float(predictions.probability_N[place]),
            teacher=names[predictions.teacher_N[place]],
            suspected=names[predictions.suspected_N[place]],
        )
        for place in places
    ]


def _disagreements(run: Finished) -> list[tuple[str, int, list[Picture]]]:
    """Images for which only one of student and teacher is right: title, how many, pictures of some."""
    predictions = run.predictions
    known_N = predictions.teacher_N != NONE
    of_teacher_N = predictions.teacher_N == predictions.label_N
    kinds: list[tuple[str, NDArray[np.bool_]]] = [
        ("Only the student is right", predictions.right_N & ~of_teacher_N & known_N),
        ("Only the teacher is right", ~predictions.right_N & of_teacher_N & known_N),
    ]
    found = []
    for title, those_N in kinds:
        places = np.flatnonzero(those_N)
        surest = places[np.argsort(-predictions.probability_N[places], kind="stable")]
        found.append((title, len(places), pictures_of(run, surest[:DISAGREEMENTS].tolist())))
    return found if known_N.any() else []


def _surest_right(run: Finished) -> list[int]:
    """The images of two classes that are classified correctly with the highest probability."""
    predictions = run.predictions
    right = np.flatnonzero(predictions.right_N)
    right = right[np.argsort(-predictions.probability_N[right], kind="stable")]
    _, first = np.unique(predictions.label_N[right], return_index=True)
    return [int(right[place]) for place in sorted(first)[:2]]


def attention_pictures(run: Finished, places: Iterable[int]) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each image (its answer, pictures with titles): what the network sees, and the attention rollout of each token. None of a
    network without tokens."""
    if not isinstance(run.card.architecture, ViTConfig):
        return []
    try:
        predictor = load(run.path, "cpu")
    except UserError:  # the page can do without
        return []
    found = []
    for place in places:
        try:
            view = View.of(predictor, run.images.read(int(run.predictions.position_N[place])), run.card.preprocessing)
        except UnreadableImage:
            continue
        rollouts = attention_rollout(predictor.network, view.image_1CHW)[1][0].double().numpy()
        pictures = [("what it sees", data_address(view.pixels_HWC))]
        for title, weights_hw in zip(("class token", "distillation token"), rollouts, strict=False):
            pictures.append((title, data_address(overlay(view.pixels_HWC, weights_hw))))
        label, said = (
            run.classes[numbers[place]] for numbers in (run.predictions.label_N, run.predictions.prediction_N)
        )
        found.append((f"labelled {label}, student: {said}", pictures))
    return found


def thumbnail(images: Split, position: int) -> str:
    """The image as a `data:` address, JPEG, or PNG if it is small."""
    try:
        pixels_HWC = images.read(position)
    except UnreadableImage:
        return ""
    return data_address(pixels_HWC)
