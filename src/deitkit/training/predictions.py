"""What a network and its teacher predict for every image of a split, as `predictions.csv` has it, and which labels look wrong.

The file is written at the end of a training and by `deit evaluate`. It is for spreadsheets, and for `deitkit.inspect.report`.
"""

from __future__ import annotations

import csv
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from deitkit.data import Split
from deitkit.models.network import Heads
from deitkit.models.predict import fuse
from deitkit.terminal import UserError, one_line, write_atomically

COLUMNS = (
    "file",
    "label",
    "prediction",
    "probability",
    "probability_of_label",
    "class_head",
    "distillation_head",
    "teacher",
    "suspected_label",
)
NONE = -1
"""For a class that is not there: of a network without distillation head, without a teacher, of a label that nobody suspects."""


@final
@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The readable images of a split. Classes are numbers, `NONE` where there is none."""

    files: tuple[str, ...]
    position_N: NDArray[np.int64]
    """of the images in their split"""
    label_N: NDArray[np.int64]
    prediction_N: NDArray[np.int64]
    """of both heads fused, or of the only one"""
    probability_N: NDArray[np.float64]
    """of the prediction"""
    probability_of_label_N: NDArray[np.float64]
    cls_N: NDArray[np.int64]
    dist_N: NDArray[np.int64]
    teacher_N: NDArray[np.int64]
    suspected_N: NDArray[np.int64]
    """the class that an image probably has if its label is wrong (`suspected_labels`)"""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def right_N(self) -> NDArray[np.bool_]:
        return np.equal(self.prediction_N, self.label_N)

    def by_confidence(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Probabilities, the highest first, and the accuracy of the images up to each."""
        order = np.argsort(-self.probability_N, kind="stable")
        right_N = self.right_N[order]
        return self.probability_N[order], np.cumsum(right_N) / np.arange(1, len(right_N) + 1)


def predictions_of(
    heads: Heads,
    label_N: Int64[torch.Tensor, " N"],
    position_N: Int64[torch.Tensor, " N"],
    split: Split,
    teacher_A: Int64[torch.Tensor, " A"] | None = None,
) -> Predictions:
    """Of the images at these positions of a split, from the logits of a network's heads. `teacher_A`: the teacher's predictions for all
    images of the split, -1 where there is none."""
    two = heads.dist_BK is not None
    probabilities_NK = fuse(heads, "fused" if two else "cls").double()
    probability_N, prediction_N = probabilities_NK.max(-1)
    none_N = torch.full_like(label_N, NONE)
    return Predictions(
        files=tuple(split.name(position) for position in position_N.tolist()),
        position_N=position_N.numpy(),
        label_N=label_N.numpy(),
        prediction_N=prediction_N.numpy(),
        probability_N=probability_N.numpy(),
        probability_of_label_N=probabilities_NK.gather(1, label_N[:, None])[:, 0].numpy(),
        cls_N=heads.cls_BK.argmax(-1).numpy(),
        dist_N=(none_N if heads.dist_BK is None else heads.dist_BK.argmax(-1)).numpy(),
        teacher_N=(none_N if teacher_A is None else teacher_A[position_N]).numpy(),
        suspected_N=suspected_labels(probabilities_NK, label_N).numpy(),
    )


def suspected_labels(
    probabilities_NK: Float[torch.Tensor, "N K"], labels_N: Int64[torch.Tensor, " N"]
) -> Int64[torch.Tensor, " N"]:
    """The predicted class where an image's label is probably wrong, -1 elsewhere: confident learning (Northcutt et al. 2021,
    arXiv 1911.00068) as cleanlab has it. The images must not have been trained on."""
    none_N = torch.full_like(labels_N, NONE)
    if len(np.unique(labels_N.numpy())) < 2:
        return none_N
    from cleanlab.filter import find_label_issues

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes of few images are not judged
        doubted_N = find_label_issues(labels_N.numpy(), probabilities_NK.numpy(), n_jobs=1)
    return torch.where(torch.from_numpy(doubted_N), probabilities_NK.argmax(-1), none_N)


def shown(name: str) -> str:
    """A name in one line of UTF-8, whatever bytes it is made of."""
    return one_line(name).encode(errors="backslashreplace").decode()


def write_predictions(path: Path, predictions: Predictions, classes: tuple[str, ...]) -> None:
    """Raises UserError."""
    names = [*classes, ""]  # NONE is the last one
    content = io.StringIO()
    names = [shown(name) for name in names]
    rows = csv.writer(content, lineterminator="\n")
    rows.writerow(COLUMNS)
    columns = (
        map(shown, predictions.files),
        (names[label] for label in predictions.label_N),
        (names[number] for number in predictions.prediction_N),
        (f"{share:.6f}" for share in predictions.probability_N),
        (f"{share:.6f}" for share in predictions.probability_of_label_N),
        (names[number] for number in predictions.cls_N),
        (names[number] for number in predictions.dist_N),
        (names[number] for number in predictions.teacher_N),
        (names[number] for number in predictions.suspected_N),
    )
    rows.writerows(zip(*columns, strict=True))
    write_atomically(path, content.getvalue())


def read_predictions(path: Path, split: Split, classes: tuple[str, ...]) -> Predictions:
    """What `write_predictions` wrote of this split. Raises UserError if the file is missing, damaged, or of other images."""
    number = {shown(name): place for place, name in enumerate(classes)} | {"": NONE}
    positions = {shown(split.name(k)): k for k in range(len(split))}
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))

        def column(name: str) -> NDArray[np.int64]:
            return np.array([number[row[name]] for row in rows], np.int64)

        if not rows or any("" in (row["label"], row["prediction"]) for row in rows):
            raise ValueError("no images, or some without label or prediction")
        position_N, label_N = np.array([positions[row["file"]] for row in rows], np.int64), column("label")
        if len(np.unique(position_N)) < len(rows) or not np.array_equal(label_N, split.labels_N[position_N]):
            raise ValueError("an image stands there twice, or with another label")
        shares = {
            name: np.array([float(row[name]) for row in rows]) for name in ("probability", "probability_of_label")
        }
        if not all(((share_N >= 0) & (share_N <= 1)).all() for share_N in shares.values()):
            raise ValueError("a probability is below 0 or above 1")
        return Predictions(
            files=tuple(row["file"] for row in rows),
            position_N=position_N,
            label_N=label_N,
            prediction_N=column("prediction"),
            probability_N=shares["probability"],
            probability_of_label_N=shares["probability_of_label"],
            cls_N=column("class_head"),
            dist_N=column("distillation_head"),
            teacher_N=column("teacher"),
            suspected_N=column("suspected_label"),
        )
    except FileNotFoundError:
        raise UserError(f"{path}: missing: deit evaluate writes it") from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: does not fit the run's images ({error}): deit evaluate writes it anew") from error
