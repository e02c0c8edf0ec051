"""What is kept of a teacher's output for a view: a record of its labels or logits, and the code of its features.

Features are a distillation target beside the logits: what the teacher knows of an image besides the scores of ten classes. The pooled
features of a convolutional network (the input of its classifier) are centred, projected on their first principal components and rounded
to float16: at most 256 bytes a view. The student's distillation token predicts them by a linear layer that is dropped after training;
the loss is `losses.features`. A live teacher's features pass through the same code and rounding as those on a tape.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file

from deitkit.distill.losses import TeacherOutput
from deitkit.terminal import UserError, save_tensors
from deitkit.views.image_ops import to_device

OutputKind = Literal["hard", "all", "features"] | Annotated[int, Field(gt=0)]
"""`hard`: hard labels. A number k: the k likeliest classes, log-probabilities in float16. `all`: every logit. `features`: no logits. The
code of the features may come with any of them."""
Records = NDArray[Any]
"""A structured array, one record per view of an image."""
CODE_SIZE = 128
"""Principal components that are kept at most: 256 bytes in float16."""
CODE_IMAGES = 1024
"""Training images that the components are computed from at most."""
CODE_FILE = "features.safetensors"


# --------------------------------------------------------------------------------------------------- features


class FeatureCode(NamedTuple):
    """The map from a teacher's F features to their P first principal components."""

    mean_F: Float32[torch.Tensor, " F"]
    basis_FP: Float32[torch.Tensor, "F P"]

    @property
    def size(self) -> int:
        return self.basis_FP.shape[1]

    def encode(self, features_BF: Float[torch.Tensor, "B F"]) -> Float16[torch.Tensor, "B P"]:
        """The components of B images, scaled so that their variances add up to P on the images of `fit_code`."""
        largest = torch.finfo(torch.float16).max
        return ((features_BF.float() - self.mean_F) @ self.basis_FP).clamp(-largest, largest).half()

    def to(self, device: torch.device) -> FeatureCode:
        """On the device of the features, so that no step has to copy it there."""
        return FeatureCode(self.mean_F.to(device), self.basis_FP.to(device))

    def checksum(self) -> str:
        content = (tensor.cpu().numpy().astype("<f4").tobytes() for tensor in self)
        return hashlib.blake2b(b"".join(content), digest_size=8).hexdigest()

    def save(self, folder: Path) -> None:
        save_tensors({"mean": self.mean_F.cpu(), "basis": self.basis_FP.cpu()}, folder / CODE_FILE)


def fit_code(features_NF: Float[torch.Tensor, "N F"]) -> FeatureCode:
    """The code of a teacher whose features of some images these are: their principal components, by the eigenvectors of their
    covariance in float64. Components without variance are left out."""
    values_NF: NDArray[np.float64] = features_NF.double().cpu().numpy()
    mean_F = values_NF.mean(0)
    variances, vectors_FF = np.linalg.eigh(np.cov(values_NF.T, bias=True).reshape(len(mean_F), -1))
    order = np.argsort(-variances)[: min(CODE_SIZE, max(1, len(values_NF) - 1))]
    kept = order[variances[order] > 1e-9 * max(variances.max(), 1e-30)]
    kept = kept if len(kept) else order[:1]
    basis_FP = vectors_FF[:, kept]
    basis_FP *= np.sign(
        basis_FP[np.abs(basis_FP).argmax(0), np.arange(len(kept))]
    )  # an eigenvector's sign is arbitrary
    scale = np.sqrt(len(kept) / max(variances[kept].sum(), 1e-30))
    return FeatureCode(torch.from_numpy(mean_F).float(), torch.from_numpy(basis_FP * scale).float())


def load_code(folder: Path, checksum: str | None = None) -> FeatureCode:
    """The code that was saved in `folder`. Raises UserError where it is damaged, or not the one of this `checksum`."""
    file = folder / CODE_FILE
    try:
        tensors = load_file(file)
        code = FeatureCode(tensors["mean"], tensors["basis"])
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if checksum is not None and code.checksum() != checksum:
        raise UserError(f"{file}: damaged: checksum mismatch")
    return code


# ---------------------------------------------------------------------------------------------------- records


def record_type(outputs: OutputKind, classes: int, features: int = 0) -> np.dtype[Any]:
    """One record, for a teacher of so many classes and `features` numbers in the code of its features. Little-endian and packed.

    hard: the label, in 1 byte up to 256 classes, 2 up to 65,536, else 4. k: the numbers of the k likeliest classes (sized
    like a label), then their log-probabilities, rounded to float16, then the log-sum-exp of all logits in float32. all: the logits in
    float32. Features follow in float16.
    """
    label = "<u1" if classes <= 2**8 else "<u2" if classes <= 2**16 else "<u4"
    fields: list[Any] = [("class", label, (outputs,)), ("log_p", "<f2", (outputs,)), ("log_sum_exp", "<f4")]
    if outputs in ("hard", "all", "features"):
        known: dict[Any, list[Any]] = {
            "hard": [("label", label)],
            "all": [("logits", "<f4", (classes,))],
            "features": [],
        }
        fields = known[outputs]
    return np.dtype([*fields, ("features", "<f2", (features,))] if features else fields)


def describe_outputs(outputs: OutputKind, features: int = 0) -> str:
    """What a record holds, in words."""
    names = {"hard": "hard labels", "all": "all logits, float32", "features": "no logits"}
    logits = names.get(str(outputs), f"top {outputs} log-probabilities, rounded to float16")
    return f"{logits}; {features} principal components of the features, float16" if features else logits


def encode(
    logits_BK: Float[torch.Tensor, "B K"],
    outputs: OutputKind,
    features_BP: Float16[torch.Tensor, "B P"] | None = None,
) -> Records:
    """The records of B images. Of equal logits the lower class comes first. Raises UserError for infinite logits or NaN: a hard
    label made from them would look like any other."""
    if not logits_BK.isfinite().all() or not (features_BP is None or features_BP.isfinite().all()):
        raise UserError(
            "the teacher's logits have infinity or NaN: use --teacher-precision float32, or another teacher"
        )
    features = 0 if features_BP is None else features_BP.shape[1]
    records = np.empty(len(logits_BK), record_type(outputs, logits_BK.shape[1], features))
    if features_BP is not None:
        records["features"] = features_BP.cpu().numpy()
    if outputs == "hard":
        records["label"] = logits_BK.argmax(-1).cpu().numpy()
    elif outputs == "all":
        records["logits"] = logits_BK.float().cpu().numpy()
    elif outputs != "features":
        sum_B1 = logits_BK.float().logsumexp(-1, keepdim=True)
        ordered_BK, class_BK = torch.sort(logits_BK.float() - sum_B1, dim=-1, descending=True, stable=True)
        records["class"] = class_BK[:, : int(outputs)].cpu().numpy()
        records["log_p"] = np.maximum(ordered_BK[:, : int(outputs)].cpu().numpy(), np.finfo(np.float16).min)
        records["log_sum_exp"] = sum_B1[:, 0].cpu().numpy()
    return records


def decode(records: Records, classes: int, device: torch.device | str = "cpu") -> TeacherOutput:
    """The teacher's outputs. Where only the top k logits are recorded, logits of all K classes come back: those k with
    log-probabilities rounded to float16, the others sharing the remaining probability evenly."""

    def tensor(field: str, kind: type[np.generic]) -> torch.Tensor:
        return to_device(records[field].astype(kind), torch.device(device))

    names = records.dtype.names or ()
    features_BP = tensor("features", np.float32) if "features" in names else None
    if names == ("features",):
        return TeacherOutput(torch.full((len(records),), -1, device=device), None, features_BP)
    if "label" in names:
        return TeacherOutput(tensor("label", np.int64), None, features_BP)
    if "logits" in names:
        logits_BK = tensor("logits", np.float32)
        return TeacherOutput(logits_BK.argmax(-1), logits_BK, features_BP)
    class_Bk, log_p_Bk = tensor("class", np.int64), tensor("log_p", np.float32)
    left_B1 = (1 - log_p_Bk.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    rest_B1 = left_B1.log() - math.log(max(1, classes - class_Bk.shape[1]))
    # No other class is likelier than the least likely recorded one.
    log_p_BK = torch.minimum(rest_B1, log_p_Bk[:, -1:]).expand(-1, classes).scatter(1, class_Bk, log_p_Bk)
    return TeacherOutput(class_Bk[:, 0], log_p_BK + tensor("log_sum_exp", np.float32)[:, None], features_BP)
