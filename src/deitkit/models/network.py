"""A network as the rest of the program uses it: images in [0, 1] in, `Heads` out, preprocessing inside.

With it the device it computes on, its precision and how many images it is given at a time; ensembles; the rank of a label.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional as F

from deitkit.config import Interpolation, Precision, Preprocessing, Size
from deitkit.terminal import UserError
from deitkit.views.image_ops import per_channel, resample

MEMORY_SHARE = 1 / 16
"""Of the device's memory, what the activations of one chunk of images may take."""
LIVE_TENSORS = 4
"""Tensors of the largest activation's size that are assumed to be alive at a time."""
MAX_IMAGES = {"cpu": 64, "cuda": 128}
"""More at a time is hardly faster, and a batch smaller than this is filled up to it."""
CACHED_NUMBERS = 2**23
"""On a CPU, the largest activation of one chunk: more of them leave its caches. (Images a second by images at a time, two
cores: ResNet-56 at 32 pixels 378 by 16, 453 by 32, 501 by 64; Lite0 at 96 365, 448, 367; ResNet-50 at 224 19.0 by 8, 17.1 by
16.)"""
MIN_IMAGES = 8


class Heads(NamedTuple):
    """A network's output: logits of the class head and, if it has one, of the distillation head."""

    cls_BK: Float[torch.Tensor, "B K"]
    dist_BK: Float[torch.Tensor, "B K"] | None


class HeadsAndFeatures(NamedTuple):
    """What a student returns in training while it learns a teacher's features: its `Heads`, and its prediction of them."""

    cls_BK: Float[torch.Tensor, "B K"]
    dist_BK: Float[torch.Tensor, "B K"] | None
    features_BP: Float[torch.Tensor, "B P"]


@final
class Network(nn.Module):
    """`body` behind its preprocessing. A body returns `Heads` (in training perhaps `HeadsAndFeatures`), or plain logits if it has one head.

    Only `body` has parameters and buffers; its names are the names in saved files.
    """

    def __init__(self, body: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.body = body
        self.preprocessing = preprocessing
        self.taken_off: tuple[str, ...] = ()
        """wrappers that its weights had in their file"""

    def forward(
        self, images_BCHW: torch.Tensor, keep_LB: torch.Tensor | None = None, size: Size | None = None
    ) -> Heads | HeadsAndFeatures:
        """Images in [0, 1], of any size, to logits. For a ViT only: `keep_LB`, stochastic depth, see `vit.ViT`; `size`, to which
        images are resized instead of its own."""
        prepared = prepare(images_BCHW, self.preprocessing, size)
        output: Any = self.body(prepared) if keep_LB is None else self.body(prepared, keep_LB)
        return output if isinstance(output, Heads | HeadsAndFeatures) else Heads(output, None)


def prepare(
    images_BCHW: Float[torch.Tensor, "B c h w"], preprocessing: Preprocessing, size: Size | None = None
) -> Float[torch.Tensor, "B C H W"]:
    """Images in [0, 1], grey or RGB and of any size, as `preprocessing` wants them: channels matched (grey is
    repeated, RGB becomes ITU-R 601-2 luma), resized (to `size` instead, if given), normalised."""
    size = size or preprocessing.image_size
    channels = images_BCHW.shape[1]
    if channels == 1 and preprocessing.channels == 3:
        images_BCHW = images_BCHW.expand(-1, 3, -1, -1)
    elif channels == 3 and preprocessing.channels == 1:
        luma_311 = per_channel((0.299, 0.587, 0.114), images_BCHW)
        images_BCHW = (images_BCHW * luma_311).sum(1, keepdim=True)
    elif channels != preprocessing.channels:
        raise ValueError(f"images have {channels} channels, the network wants {preprocessing.channels}")
    if tuple(images_BCHW.shape[2:]) != size:
        images_BCHW = resize(images_BCHW, size, preprocessing.interpolation)
    return (images_BCHW - per_channel(preprocessing.mean, images_BCHW)) / per_channel(preprocessing.std, images_BCHW)


def resize(
    images_BCHW: Float[torch.Tensor, "B C h w"], size: Size, interpolation: Interpolation
) -> Float[torch.Tensor, "B C H W"]:
    """Images of another size, antialiased, still in [0, 1]."""
    return resample(images_BCHW, size, interpolation).clamp(0, 1)


def single_logits(heads: Heads) -> Float[torch.Tensor, "B ..."]:
    """One set of logits: the only head's, or the logarithm of the mean of both softmaxes (DeiT, section 4). (A function of the
    user's may return another shape, which the caller has to refuse.)"""
    if heads.dist_BK is None:
        return heads.cls_BK.float()
    cls_BK, dist_BK = heads.cls_BK.float(), heads.dist_BK.float()
    return torch.logaddexp(F.log_softmax(cls_BK, -1), F.log_softmax(dist_BK, -1)) - math.log(2)


@final
class Ensemble(nn.Module):
    """The mean of several networks' log-probabilities (their geometric mean but for a constant, which keeps the order of and
    the distances between classes). Each network has its own preprocessing, so this body wants images in [0, 1].

    `columns`: for each network, the indices of its logits that belong to the classes, in their order; None: all.
    """

    def __init__(self, networks: Sequence[Network], columns: Sequence[tuple[int, ...] | None]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.columns = tuple(columns)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        log_probabilities = []
        for network, columns in zip(self.networks, self.columns, strict=True):
            logits_BK = single_logits(network(images_BCHW))
            log_probabilities.append(F.log_softmax(logits_BK if columns is None else logits_BK[:, list(columns)], -1))
        return torch.stack(log_probabilities).mean(0)

    def config_hash(self) -> str:
        """A hash of everything but the networks' weights: their preprocessing, the columns."""
        dumped = [network.preprocessing.model_dump_json() for network in self.networks]  # type: ignore[union-attr, operator]
        facts = [
            text.replace('"crop_pct"', '"crop_fraction"') for text in dumped
        ]  # the name that tapes of version 0.1 hash
        return hashlib.sha256(repr((facts, self.columns)).encode()).hexdigest()


def ensemble(networks: Sequence[Network], columns: Sequence[tuple[int, ...] | None]) -> Network:
    """`Ensemble` as a network of the first one's preprocessing; images have the size of the largest."""
    each = [network.preprocessing for network in networks]
    channels = each[0].channels
    changes = {
        "image_size": max((one.image_size for one in each), key=lambda size: size[0] * size[1]),
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
    }
    both = Network(Ensemble(networks, columns), each[0].model_copy(update=changes))
    both.taken_off = tuple(one for network in networks for one in network.taken_off)
    return both


def label_ranks(
    scores_NK: Float[torch.Tensor, "N K"], labels_N: Int64[torch.Tensor, " N"]
) -> Int64[torch.Tensor, " N"]:
    """How many classes rank before the label: those with a higher score and, of equal ones, the lower classes, as in
    `torch.argmax`. A label whose score is NaN ranks last."""
    of_label_N1 = scores_NK.gather(1, labels_N[:, None])
    lower_NK = torch.arange(scores_NK.shape[1], device=labels_N.device) < labels_N[:, None]
    ranks_N = ((scores_NK > of_label_N1) | ((scores_NK == of_label_N1) & lower_NK)).sum(-1)
    return ranks_N.masked_fill(of_label_N1[:, 0].isnan(), scores_NK.shape[1])


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """`precision`; for auto, bfloat16 on a GPU or a CPU with instructions for products in it (AMX, AVX-512 BF16), else float32.

    Raises UserError for a precision that the device lacks."""
    if precision == "auto":
        if device.type == "cuda":
            fast = bool(torch.cuda.is_bf16_supported())
        else:
            capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.9
            fast = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
        return "bfloat16" if fast else "float32"
    if precision == "float16" and device.type != "cuda":
        raise UserError("precision float16 needs a GPU: use float32 or bfloat16 here")
    return precision


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in, see `resolve_precision`. Raises UserError."""
    dtype: torch.dtype = getattr(torch, resolve_precision(precision, device))
    return dtype


def auto_chunk_size(network: Network, device: torch.device) -> int:
    """How many images `network` is given at a time so that its activations fit into memory: a power of two. It depends on the
    network and the machine, not on the memory that is free now, so it is the same tomorrow."""
    largest = max(1, largest_activation(network))
    room = MEMORY_SHARE * _memory_bytes(device) / (LIVE_TENSORS * 4 * largest)
    if device.type == "cpu":
        room = min(room, CACHED_NUMBERS / largest)
    images = MIN_IMAGES
    while 2 * images <= min(room, MAX_IMAGES.get(device.type, MAX_IMAGES["cpu"])):
        images *= 2
    return images


def largest_activation(network: Network) -> int:
    """Numbers in the largest output of a module for one image; 0 for a network that cannot run on shapes alone."""
    sizes = [0]

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel())

    try:
        body = on_meta(network)
        for module in body.modules():
            module.register_forward_hook(record)
        with torch.no_grad():
            body(torch.empty(1, network.preprocessing.channels, *network.preprocessing.image_size, device="meta"))
    except (RuntimeError, NotImplementedError):  # a module that does more than tensor operations
        return 0
    return max(sizes)


def on_meta(network: Network) -> nn.Module:
    """A copy of the body without numbers, in eval mode: it computes shapes."""
    return copy.deepcopy(network.body).to("meta").eval()


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33
