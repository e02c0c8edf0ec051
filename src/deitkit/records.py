"""How a teacher's answers to views are written down: fixed-size records, a decision, the likeliest classes, or all logits.

A live teacher that is being recorded passes through the same encoding, so live and replayed training see the same numbers.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field

from deitkit.errors import UserError
from deitkit.operations import to_device
from deitkit.types import Answers

AnswerKind = Literal["hard", "all"] | Annotated[int, Field(gt=0)]
"""`hard`: the decision alone. A number k: the k largest logits. `all`: every logit."""
Records = NDArray[Any]
"""A structured array, one record a view."""


def record_type(answers: AnswerKind, classes: int) -> np.dtype[Any]:
    """What one record holds, for a teacher of so many classes. Little-endian and packed.

    hard: the label, in 1 byte up to 256 classes, 2 up to 65,536, else 4. k: for each of the k likeliest classes its
    number (sized like a label) and its log-probability (2 bytes), then the log-sum-exp of all logits (4 bytes).
    all: 4 bytes a class.
    """
    label = "<u1" if classes <= 2**8 else "<u2" if classes <= 2**16 else "<u4"
    if answers == "hard":
        return np.dtype([("label", label)])
    if answers == "all":
        return np.dtype([("logits", "<f4", (classes,))])
    return np.dtype([("class", label, (int(answers),)), ("log_p", "<f2", (int(answers),)), ("log_sum_exp", "<f4")])


def encode(logits_BK: Float[torch.Tensor, "B K"], answers: AnswerKind) -> Records:
    """The records of B answers. Of equal logits the lower class comes first. Raises UserError where they are not finite: of
    those, a decision would be as good as any other, and nobody would see it."""
    if not logits_BK.isfinite().all():
        raise UserError(
            "the teacher answers views with infinity or NaN: record with --teacher-precision float32, or another one"
        )
    records = np.empty(len(logits_BK), record_type(answers, logits_BK.shape[1]))
    if answers == "hard":
        records["label"] = logits_BK.argmax(-1).cpu().numpy()
    elif answers == "all":
        records["logits"] = logits_BK.float().cpu().numpy()
    else:
        sum_B1 = logits_BK.float().logsumexp(-1, keepdim=True)
        ordered_BK, class_BK = torch.sort(logits_BK.float() - sum_B1, dim=-1, descending=True, stable=True)
        records["class"] = class_BK[:, : int(answers)].cpu().numpy()
        records["log_p"] = np.maximum(ordered_BK[:, : int(answers)].cpu().numpy(), np.finfo(np.float16).min)
        records["log_sum_exp"] = sum_B1[:, 0].cpu().numpy()
    return records


def decode(records: Records, classes: int, device: torch.device | str = "cpu") -> Answers:
    """The answers that were written down. Of the k likeliest classes alone, the probability that is left is shared evenly
    by all other classes, so that logits of all K classes come back: exact for those k, a guess for the rest."""

    def tensor(field: str, kind: type[np.generic]) -> torch.Tensor:
        return to_device(records[field].astype(kind), torch.device(device))

    names = records.dtype.names or ()
    if "label" in names:
        return Answers(tensor("label", np.int64), None)
    if "logits" in names:
        logits_BK = tensor("logits", np.float32)
        return Answers(logits_BK.argmax(-1), logits_BK)
    class_Bk, log_p_Bk, sum_B = (
        tensor("class", np.int64),
        tensor("log_p", np.float32),
        tensor("log_sum_exp", np.float32),
    )
    others = classes - class_Bk.shape[1]
    left_B1 = (1 - log_p_Bk.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    rest_B1 = left_B1.log() - math.log(max(1, others))
    # No other class is likelier than the least likely one that was written down.
    logits_BK = torch.minimum(rest_B1, log_p_Bk[:, -1:]).expand(-1, classes).scatter(1, class_Bk, log_p_Bk)
    return Answers(class_Bk[:, 0], logits_BK + sum_B[:, None])
