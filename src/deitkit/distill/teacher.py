"""A teacher: any function from images to logits with a declared list of classes, frozen.

It is no `nn.Module`, so that nobody's `.train()`, optimizer, EMA or checkpoint reaches it. It computes chunks of a fixed number of
images: the logits of an image do not depend on the batch that it came in.
"""

from __future__ import annotations

import copy
import hashlib
import re
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Float16, Int64, Shaped
from torch import nn

from deitkit.config import Precision, Preprocessing, Size
from deitkit.distill.encoding import FeatureCode
from deitkit.distill.losses import TeacherOutput
from deitkit.models.cnn import (
    CNNConfig,
    build_cnn,
    feature_count,
    find_classifier,
    fold_batchnorm,
    forward_with_features,
    pretrained_classes,
    try_out,
)
from deitkit.models.network import (
    Ensemble,
    Network,
    auto_chunk_size,
    autocast_dtype,
    ensemble,
    label_ranks,
    single_logits,
)
from deitkit.models.vit import ViTConfig
from deitkit.models.weights import split_name
from deitkit.models.zoo import ModelCard, network_costs
from deitkit.terminal import UserError, expanded, plural
from deitkit.views.mixup import Batch

FEW_IMAGES = 20
"""With fewer images to check it on, a low accuracy is a warning, not an error."""
ANOTHER_TEACHER = "give another one, or fit one to these data (deit teacher fit)"
ROW_MULTIPLE = 8
"""Chunks are computed in multiples of this many images. In matrix products of 5-7, 9-11, 17-19, ... rows the last rows come
out with other last bits (seen with MKL in torch 2.14 on 2, 8 and 16 threads); with a multiple of four rows they do not."""


Columns = tuple[int, ...] | None
"""Which of a network's logits are taken, in which order; all of them if None."""
Names = tuple[str, ...] | None


@final
class Teacher:
    """`network`, frozen, as a source of logits. Made by `load_teacher` or `teacher_from_callable`.

    Parameters
    ----------
    network : is taken over: its weights are frozen where they are
    name : what the user calls it
    num_classes : number of its logits
    classes : their names in this order, if known
    chunk_size : images per forward pass; short chunks are filled up and the surplus is dropped
    autocast : the number format that the network computes in; float32 if None
    """

    def __init__(
        self,
        network: Network,
        *,
        name: str,
        num_classes: int,
        classes: Names = None,
        chunk_size: int = 64,
        device: torch.device | str = "cpu",
        columns: Columns = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size {chunk_size} must be at least 1")
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"{len(classes)} class names for {num_classes} classes")
        self.name = name
        self.num_classes = num_classes
        self.classes = classes
        self.preprocessing: Preprocessing = network.preprocessing
        self.chunk_size = chunk_size
        self.columns = columns
        self.autocast = autocast
        self.code: FeatureCode | None = None
        """how its features are encoded, on its device; without it only logits are computed"""
        self.taken_off = network.taken_off
        self._network = network.eval()
        self._folded = fold_batchnorm(network)
        """computes: the same function, its batch norms folded into convolutions where that can be"""
        self._freeze()
        self.to(device)

    def to(self, device: torch.device | str) -> Teacher:
        """Move the weights; returns the teacher itself."""
        self.device = torch.device(device)
        # worth a factor of 1.3 to 1.8 to a convolutional network on a CPU, and as much on a GPU in half precision
        self._folded.to(self.device).to(memory_format=torch.channels_last)
        self.code = None if self.code is None else self.code.to(self.device)
        return self

    def forward(self, images_BCHW: Shaped[torch.Tensor, "B C h w"]) -> Float[torch.Tensor, "B K"]:
        """float32 logits for images in [0, 1], grey or RGB, of any size, on the teacher's device.

        The teacher resizes and normalises them as its own training did. Without gradients, in evaluation mode whatever anyone
        called before; batch statistics do not move, and no random number is drawn.
        """
        return self._computed(images_BCHW)[0]

    def with_gradients(self, images_BCHW: Shaped[torch.Tensor, "B C h w"]) -> Float[torch.Tensor, "B K"]:
        """Logits as of `forward`, but for the last bits, through which gradients reach the images."""
        self._freeze()
        logits_BK = single_logits(self._folded(images_BCHW))
        return logits_BK if self.columns is None else logits_BK[:, list(self.columns)]

    def forward_with_features(
        self, images_BCHW: Shaped[torch.Tensor, "B C h w"]
    ) -> tuple[Float[torch.Tensor, "B K"], Float[torch.Tensor, "B F"]]:
        """`forward`, and the pooled features that the logits were made of (not encoded). Raises UserError without a linear
        classifier."""
        logits_BK, features_BF = self._computed(images_BCHW, torch.Tensor.float)
        assert features_BF is not None
        return logits_BK, features_BF

    def coded_outputs(
        self, images_BCHW: Shaped[torch.Tensor, "B C h w"]
    ) -> tuple[Float[torch.Tensor, "B K"], Float16[torch.Tensor, "B P"] | None]:
        """`forward` and, if they have a code, the features in it. Whole chunks are encoded too, for a product of other rows has other
        last bits."""
        return self._computed(images_BCHW, None if self.code is None else self.code.encode)

    @cached_property
    def feature_count(self) -> int:
        """Numbers in the features of an image; 0 where the teacher has none: an ensemble, a transformer with a
        distillation token, a Python function."""
        return 0 if isinstance(self._network.body, _Function) else feature_count(self._network) or 0

    def _computed(
        self, images_BCHW: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not images_BCHW.is_floating_point():
            raise ValueError(f"images must be floating-point numbers in [0, 1], not {images_BCHW.dtype}")
        self._freeze()
        images_BCHW = images_BCHW.to(self.device, torch.float32)
        rows = -(-self.chunk_size // ROW_MULTIPLE) * ROW_MULTIPLE
        # Freshly allocated, so that neither the size nor the memory layout of the batch chooses other arithmetic.
        chunk_SCHW = torch.empty(rows, *images_BCHW.shape[1:], device=self.device)
        logits_BK = torch.empty(len(images_BCHW), self.num_classes, device=self.device)
        features = []
        for start in range(0, len(images_BCHW), self.chunk_size):
            part_NCHW = images_BCHW[start : start + self.chunk_size]
            row_S = torch.arange(rows, device=self.device) % len(part_NCHW)
            with torch.inference_mode():
                chunk_SCHW.copy_(part_NCHW if len(part_NCHW) == rows else part_NCHW[row_S])
                logits_SK, features_SF = self._forward_chunk(chunk_SCHW, features=encode is not None)
                coded_SP = None if encode is None or features_SF is None else encode(features_SF)
            # copied outside inference mode: a loss may save these logits for its backward pass
            logits_BK[start : start + self.chunk_size] = logits_SK[: len(part_NCHW)]
            if coded_SP is not None:
                features.append(coded_SP[: len(part_NCHW)].clone())
        return logits_BK, torch.cat(features) if features else None

    def state_hash(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all weights and buffers, whatever device they are on. A callable, whose
        weights nobody sees, is known by its logits of a few fixed images of noise."""
        digest = hashlib.sha256()
        tensors = {**dict(self._network.body.named_parameters()), **dict(self._network.body.named_buffers())}
        if isinstance(self._network.body, _Function):
            shape = (4, self.preprocessing.channels, *self.preprocessing.image_size)
            noise = np.random.Generator(np.random.Philox(0)).random(shape).astype(np.float32)
            tensors = {f"answers of {self.name}": self.forward(torch.from_numpy(noise))}  # named as in version 0.1
        if isinstance(self._network.body, Ensemble):
            digest.update(self._network.body.config_hash().encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Everything that its logits depend on besides images, processor and library versions; plain values."""
        return {
            "name": self.name,
            "state": self.state_hash(),
            "classes": None if self.classes is None else list(self.classes),
            "num_classes": self.num_classes,
            "columns": None if self.columns is None else list(self.columns),
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "chunk_size": self.chunk_size,
            "dtype": self.dtype,
            "layout": "channels_last" if self._folded is self._network else "channels_last, batch norms folded",
        }

    def costs(self) -> tuple[dict[str, int], float]:
        """(`network_costs`, seconds of one image in a whole chunk of grey ones). Nothing is counted of a Python function, or of a network
        that cannot be counted."""
        images_BCHW = torch.full((self.chunk_size, self.preprocessing.channels, *self.preprocessing.image_size), 0.5)
        began = time.perf_counter()
        self.forward(images_BCHW).cpu()  # .cpu() waits for the device
        seconds = (time.perf_counter() - began) / self.chunk_size
        try:
            return {} if isinstance(self._network.body, _Function) else network_costs(self._network), seconds
        except Exception:  # a figure in a table stops no training
            return {}, seconds

    @property
    def dtype(self) -> str:
        """The number format that it computes in, by name."""
        return str(self.autocast or torch.float32).removeprefix("torch.")

    def _freeze(self) -> None:
        for network in (self._network, self._folded):
            network.eval()
            network.requires_grad_(False)

    def _forward_chunk(self, images_SCHW: torch.Tensor, *, features: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        features_SF = None
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if features:
                heads, features_SF = forward_with_features(self._folded, images_SCHW)
            else:
                heads = self._folded(images_SCHW)
        if heads.cls_BK.shape != (len(images_SCHW), self.num_classes):
            raise UserError(
                f"teacher {self.name}: returned a tensor of shape {tuple(heads.cls_BK.shape)} for {len(images_SCHW)} images, "
                f"not ({len(images_SCHW)}, {self.num_classes})"
            )
        logits_SK = single_logits(heads)
        return logits_SK if self.columns is None else logits_SK[:, list(self.columns)], features_SF


TeacherSource = Callable[[Batch], TeacherOutput | None]
"""Where the teacher's output for a batch comes from: a live teacher, a tape, or nowhere."""


def live_teacher(teacher: Teacher, *, logits: bool) -> TeacherSource:
    """A source that runs `teacher` on every batch; `logits`: whether the loss needs them. Features come along if they have a code."""

    def output(batch: Batch) -> TeacherOutput:
        logits_BK, features_BP = teacher.coded_outputs(batch.seen_by_teacher)
        features_BP = None if features_BP is None else features_BP.float()
        return TeacherOutput(logits_BK.argmax(-1), logits_BK if logits else None, features_BP)  # ties: the lowest class

    return output


def no_teacher(_batch: Batch) -> None:
    """A source without a teacher: training on labels alone."""


def load_teacher(
    name: str,
    data_classes: tuple[str, ...],
    *,
    chunk_size: int | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    image_size: Size | None = None,
    features_only: bool = False,
) -> Teacher:
    """The teacher that `name` stands for, for data with these classes.

    `name`: a run folder (of `deit train` or `deit teacher fit`), or a network of `models.cnn` with its pretrained weights: `lite0`, a
    timm name, `torchvision:NAME`, each optionally with `@FILE`. A student's logits are those of its fused prediction. Several
    teachers, joined by `+`, give the mean of their log-probabilities.
    `chunk_size`: what fits into the device's memory if not given. `image_size`: (height, width) of the teacher's input, its own if
    not given. `features_only`: any classes will do, because nothing is learned from its logits.

    Raises UserError where the classes do not match (other names, where names are known; the same names in another order are put in
    order), for networks without pretrained weights (a random network teaches nothing), and for an image size that the network
    cannot take.
    """
    members = [_member(one, None if features_only else data_classes, image_size) for one in members_of(name)]
    network, columns, classes = members[0]
    if len(members) > 1:
        network, columns = ensemble([one[0] for one in members], [one[1] for one in members]), None
    computed_in = autocast_dtype(precision, torch.device(device))
    return Teacher(
        network,
        name=name,
        num_classes=_classes_of(network, name) if features_only else len(data_classes),
        classes=classes,
        chunk_size=chunk_size or auto_chunk_size(network, torch.device(device)),
        device=device,
        columns=columns,
        autocast=None if computed_in == torch.float32 else computed_in,
    )


def members_of(name: str) -> list[str]:
    """The teachers that `name` joins by `+`, or `name` itself, also where a file or folder is called so. Raises UserError where one is
    missing."""
    parts, members = name.split("+"), list[str]()
    while parts:
        joined = ["+".join(parts[:count]) for count in range(len(parts), 1, -1)]
        members.append(next(filter(_is_called_so, joined), parts[0]))
        parts = parts[members[-1].count("+") + 1 :]
    if len(members) > 1 and ("" in members or "auto" in members):
        raise UserError(f"teacher {name}: give a name or a run folder on both sides of each +")
    return members


def _is_called_so(name: str) -> bool:
    """Whether a file or folder has this name with a `+` in it, or the file of a network's weights."""
    model, _, file = name.partition("@")
    return Path(name).exists() or ("+" not in model and expanded(file).exists())


def _member(name: str, data_classes: Names, image_size: Size | None) -> tuple[Network, Columns, Names]:
    """A network, the columns of its logits that stand for the classes of the data (None: any will do), and their names if it knows
    names."""
    if _is_run(name):
        from deitkit.models.zoo import load_model

        network, card = load_model(Path(name) / "model")
        network = _at_size(network, card, name, image_size or network.preprocessing.image_size)
        classes: Names = card.classes
        count = len(card.classes)
    else:
        pretrained = pretrained_classes(name)
        if pretrained is None:
            raise UserError(
                f"teacher {name}: there are no pretrained weights with a classifier: fit one to the data "
                f"(deit teacher fit DATA --model {name} --from-scratch --out DIR) and give DIR as the teacher"
            )
        count, classes = pretrained, _imagenet_names(name, pretrained, data_classes or ())
        if data_classes is not None:
            match_classes(name, classes, count, data_classes)  # before anything is downloaded
        network = build_cnn(CNNConfig(name=name, classes=count), image_size=image_size, pretrained=True)
    if data_classes is None:
        return network, None, None
    columns = match_classes(name, classes, count, data_classes)
    return network, columns, None if classes is None else data_classes


def _classes_of(network: Network, name: str) -> int:
    """How many logits a network with features has. Raises UserError for one without."""
    classifier = find_classifier(network)
    if classifier is None:
        raise UserError(f"teacher {name}: has no features that could be learned: give a convolutional network")
    return classifier.out_features


def teacher_from_callable(
    function: Callable[[torch.Tensor], torch.Tensor],
    *,
    name: str,
    num_classes: int,
    preprocessing: Preprocessing,
    classes: Names = None,
    chunk_size: int = 64,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> Teacher:
    """A Python function as a teacher.

    `function` gets float32 images (chunk_size, C, H, W) on `device`, resized and normalised as in `preprocessing`, and returns logits
    (chunk_size, num_classes). An `nn.Module` is copied and frozen. Any other function must run on its own device and be the same
    every time: nobody can look inside.
    """
    body = copy.deepcopy(function) if isinstance(function, nn.Module) else _Function(function)
    return Teacher(
        Network(body, preprocessing),
        name=name,
        num_classes=num_classes,
        classes=classes,
        chunk_size=chunk_size,
        device=device,
        autocast=autocast,
    )


def match_classes(name: str, teacher_classes: Names, count: int, data_classes: tuple[str, ...]) -> Columns:
    """The teacher's column for each class of the data; None where they agree already, or the teacher's names are not known. Raises
    UserError where they cannot be matched."""
    fit = "fit a teacher to these data (deit teacher fit DATA --model NAME --out DIR) and give DIR as the teacher"
    if count != len(data_classes):
        raise UserError(f"teacher {name} knows {count} classes, the data have {len(data_classes)}: {fit}")
    if teacher_classes is None or teacher_classes == data_classes:
        return None
    if sorted(teacher_classes) != sorted(data_classes):
        of_teacher, of_data = set(teacher_classes), set(data_classes)
        unknown = next((one for one in data_classes if one not in of_teacher), data_classes[0])
        other = next((one for one in teacher_classes if one not in of_data), teacher_classes[0])
        raise UserError(
            f"teacher {name} does not know the data's class {unknown!r}, the data lack its class {other!r}: {fit}"
        )
    return tuple(teacher_classes.index(one) for one in data_classes)


def teacher_facts(
    teacher: Teacher, logits_NK: Float[torch.Tensor, "N K"], labels_N: Int64[torch.Tensor, " N"]
) -> dict[str, Any]:
    """What a teacher's input is, and how good its logits of N labelled images are; plain values.

    Shares lie between 0 and 1; of equal logits the lower class comes first. largest_class: share of the most frequent label.
    confidence: mean of the largest softmax probability. non_finite: images with infinite or NaN logits, which count as wrong.
    predicted_classes: how many classes were ever predicted. Raises UserError if N is 0.
    """
    n = len(labels_N)
    if n == 0:
        raise UserError(f"teacher {teacher.name}: there is no image to check it on")
    largest = int(labels_N.bincount().max())
    finite_N = logits_NK.isfinite().all(-1)
    logits_NK, labels_N = logits_NK[finite_N].double(), labels_N[finite_N]
    rank_N = label_ranks(logits_NK, labels_N)
    return {
        "name": teacher.name,
        "classes": teacher.num_classes,
        **teacher.preprocessing.model_dump(mode="json", exclude={"crop_pct"}),
        "parameters": sum(weights.numel() for weights in teacher._network.parameters()),
        "dtype": teacher.dtype,
        "taken_off": list(teacher.taken_off),
        "n": n,
        "top1": int((rank_N < 1).sum()) / n,
        "top5": int((rank_N < 5).sum()) / n,
        "largest_class": largest / n,
        "confidence": logits_NK.softmax(-1).amax(-1).mean().item() if len(labels_N) else None,
        "non_finite": n - len(labels_N),
        "predicted_classes": len(set(logits_NK.argmax(-1).tolist())),
    }


def accuracy_line(name: str, facts: Mapping[str, Any]) -> str:
    """`teacher X: 41.1 % validation accuracy (341 images; largest class 21.0 %)`, with the teacher's number format unless it is
    float32, and what wrapped its weights. `largest_class`, `dtype` and `taken_off` may be missing."""
    largest, dtype = facts.get("largest_class"), facts.get("dtype", "float32")
    baseline = "" if largest is None else f"; largest class {100 * largest:.1f} %"
    rounded = "" if dtype == "float32" else f" in {dtype}"
    share, images = f"{100 * facts['top1']:.1f} %", plural(facts["n"], "image")
    wrapped = f"; taken off its weights: {', '.join(facts['taken_off'])}" if facts.get("taken_off") else ""
    return f"teacher {name}: {share} validation accuracy{rounded} ({images}{baseline}){wrapped}"


def refuse_useless(facts: Mapping[str, Any], advice: str = ANOTHER_TEACHER) -> None:
    """Raises UserError, ending with the `advice`, where there is a reason (`why_useless`)."""
    why = why_useless(facts)
    if why is not None:
        raise UserError(f"{why}: {advice}")


def why_useless(facts: Mapping[str, Any]) -> str | None:
    """Why a teacher with these `teacher_facts` cannot teach; None if it can. It cannot with infinite or NaN logits; nor, as far as
    `FEW_IMAGES` images or more tell, if it predicts one class for all of them or is no more accurate than that would be.
    `non_finite`, `predicted_classes` and `largest_class` may be missing."""
    name, n = facts["name"], facts["n"]
    if facts.get("non_finite"):
        return f"teacher {name}: {facts['non_finite']} of {plural(n, 'image')} have infinite or NaN logits"
    if n < FEW_IMAGES or facts["top1"] == 1:
        return None
    if facts.get("predicted_classes") == 1:
        return f"teacher {name} predicts the same class for every image, {_figures(facts)}"
    if facts["top1"] <= facts.get("largest_class", 1 / facts["classes"]):
        return f"teacher {name} is no better than predicting the largest class, {_figures(facts)}"
    return None


def doubt_about(facts: Mapping[str, Any]) -> str | None:
    """A warning where a teacher was checked on so few images that its accuracy may be luck, and is not known from cross-validation."""
    if facts["n"] >= FEW_IMAGES or facts.get("cross_validated"):
        return None
    return f"teacher {facts['name']}: too few images to be sure that it can teach, {_figures(facts)}"


def _figures(facts: Mapping[str, Any]) -> str:
    largest = "" if facts.get("largest_class") is None else f", largest class {100 * facts['largest_class']:.1f} %"
    images = plural(facts["n"], "image")
    return f"{100 * facts['top1']:.1f} % accuracy on {images} (chance {100 / facts['classes']:.1f} %{largest})"


def _is_run(name: str) -> bool:
    """Whether `name` is the folder of a finished run. Raises UserError for another folder, or a path to nothing."""
    file = split_name(name)[1]
    if name in ("", "auto"):
        raise UserError(f"teacher {name!r}: give a network's name or the folder of a run (auto: only with deit train)")
    if file is None and (Path(name) / "model" / "model.json").is_file():
        return True
    if file is None and (Path(name) / "config.yaml").is_file():
        raise UserError(f"teacher {name}: this run is not finished: rerun its command with --resume")
    if file is None and (Path(name).is_dir() or "/" in name or "\\" in name):
        raise UserError(
            f"teacher {name}: neither a network's name nor a run folder: {Path(name) / 'model' / 'model.json'} is missing"
        )
    return False


def _at_size(network: Network, card: ModelCard, name: str, size: Size) -> Network:
    """The network of a run behind a resize to `size` (height, width). Raises UserError where it cannot take such images."""
    own = network.preprocessing.image_size
    if size == own:
        return network
    if isinstance(card.architecture, ViTConfig):
        (own_height, own_width), (height, width) = own, size
        raise UserError(
            f"teacher {name}: is a transformer with positions for images of {own_height}x{own_width} pixels, "
            f"not {height}x{width}: "
            + (f"give --teacher-size {own_height}" if own_height == own_width else "leave out --teacher-size")
        )
    network = Network(network.body, network.preprocessing.model_copy(update={"image_size": size}))
    try_out(network, f"teacher {name}", len(card.classes))
    return network


def _imagenet_names(name: str, count: int, data_classes: tuple[str, ...]) -> Names:
    """The WordNet numbers of ImageNet's classes where the data have such numbers too. Other data may name the same classes otherwise:
    then only their number is compared."""
    has_numbers = bool(data_classes) and all(re.fullmatch(r"n\d{8}", one) for one in data_classes)
    if count != 1000 or split_name(name)[1] is not None or not has_numbers:
        return None
    import timm.data

    imagenet: Any = timm.data.ImageNetInfo("imagenet-1k")  # type: ignore[attr-defined]
    return tuple(imagenet.label_names())


@final
class _Function(nn.Module):
    """A plain function where a module is expected."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.function(images_BCHW)
