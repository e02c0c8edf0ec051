"""A network as the rest of the program sees it: images in [0, 1] in, `Heads` out, preprocessing inside.

What this machine computes with: its device, the number format, and how many images a network may take at a time.

Networks that answer with one voice: the heads of one, or several networks.

Where the right class stands among a network's answers.
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


class Heads(NamedTuple):
    """What a network answers: logits of the class head and, where there is one, the distillation head."""

    cls_BK: Float[torch.Tensor, "B K"]
    dist_BK: Float[torch.Tensor, "B K"] | None


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


@final
class Network(nn.Module):
    """`body` behind its preprocessing. A body answers `Heads`, or plain logits if it has one head.

    Only `body` has parameters and buffers; its names are the names in saved files.
    """

    def __init__(self, body: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.body = body
        self.preprocessing = preprocessing

    def forward(
        self, images_BCHW: torch.Tensor, keep_LB: torch.Tensor | None = None, size: Size | None = None
    ) -> Heads:
        """Images in [0, 1], of any size, to logits. A ViT's only: `keep_LB`, stochastic depth, see `vit.ViT`; `size`, that the
        body is to see instead of its own."""
        prepared = prepare(images_BCHW, self.preprocessing, size)
        answer = self.body(prepared) if keep_LB is None else self.body(prepared, keep_LB)
        return answer if isinstance(answer, Heads) else Heads(answer, None)


MEMORY_SHARE = 1 / 16
"""Of the device's memory, what the activations of one slice of images may take."""
ALIVE = 4
"""So many tensors of the size of the largest activation are thought to be alive at a time."""
MOST_IMAGES = {"cpu": 64, "cuda": 128}
"""More at a time is hardly faster, and a batch smaller than this is filled up to it."""
CACHED_NUMBERS = 2**23
"""On a CPU, the largest activation of one slice: more of them leave its caches. (Images a second by images at a time, two
cores: ResNet-56 at 32 pixels 378 by 16, 453 by 32, 501 by 64; Lite0 at 96 365, 448, 367; ResNet-50 at 224 19.0 by 8, 17.1 by
16.)"""
LEAST_IMAGES = 8


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The format that matrix products are computed in. auto: bfloat16 on a GPU or a CPU that has instructions for it (on CPUs: AMX),
    else float32.

    Raises UserError where the device lacks it."""
    if precision == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if precision == "float16" and device.type != "cuda":
        raise UserError("precision float16 needs a GPU: use float32 or bfloat16 here")
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return formats[precision]


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """`precision`, or what `auto` stands for on this device. Raises UserError where the device lacks it."""
    names: dict[torch.dtype, Precision] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return names[autocast_dtype(precision, device)]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are much faster than in float32 here."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.9
    return bool(capabilities.get("amx_bf16", False))


def auto_chunk_size(network: Network, device: torch.device) -> int:
    """How many images `network` is given at a time so that its activations fit: a power of two. A function of the network
    and of the machine, not of what happens to be free, so that it is the same tomorrow."""
    largest = max(1, largest_activation(network))
    room = MEMORY_SHARE * _memory_bytes(device) / (ALIVE * 4 * largest)
    if device.type == "cpu":
        room = min(room, CACHED_NUMBERS / largest)
    fitting = LEAST_IMAGES
    while 2 * fitting <= min(room, MOST_IMAGES.get(device.type, MOST_IMAGES["cpu"])):
        fitting *= 2
    return fitting


def largest_activation(network: Network) -> int:
    """Numbers in the largest tensor that a module puts out for one image; 0 where the network cannot tell."""
    sizes = [0]

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel())

    try:
        shadow = copy.deepcopy(network.body).to("meta").eval()
        for module in shadow.modules():
            module.register_forward_hook(look)
        with torch.no_grad():
            shadow(torch.empty(1, network.preprocessing.channels, *network.preprocessing.image_size, device="meta"))
    except (RuntimeError, NotImplementedError):  # a module that does more than tensor operations
        return 0
    return max(sizes)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33


def single_logits(heads: Heads) -> Float[torch.Tensor, "B K"]:
    """One set of logits: the only head's, or the logarithm of the mean of both softmaxes (DeiT, section 4)."""
    if heads.dist_BK is None:
        return heads.cls_BK.float()
    cls_BK, dist_BK = heads.cls_BK.float(), heads.dist_BK.float()
    return torch.logaddexp(F.log_softmax(cls_BK, -1), F.log_softmax(dist_BK, -1)) - math.log(2)


@final
class Ensemble(nn.Module):
    """The mean of what several networks say, as log-probabilities (their geometric mean but for a constant, so that how classes
    lie to each other is kept). Each sees the images behind its own preprocessing, so this body wants them in [0, 1].

    `columns`: of each network, which of its logits stand for the classes, in which order; all of them if None.
    """

    def __init__(self, networks: Sequence[Network], columns: Sequence[tuple[int, ...] | None]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.columns = tuple(columns)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        said = []
        for network, columns in zip(self.networks, self.columns, strict=True):
            logits_BK = single_logits(network(images_BCHW))
            said.append(F.log_softmax(logits_BK if columns is None else logits_BK[:, list(columns)], -1))
        return torch.stack(said).mean(0)

    def config_hash(self) -> str:
        """A hash of what stands before and behind the networks' weights."""
        facts = [network.preprocessing.model_dump_json() for network in self.networks]  # type: ignore[union-attr, operator]
        return hashlib.sha256(repr((facts, self.columns)).encode()).hexdigest()


def ensemble(networks: Sequence[Network], columns: Sequence[tuple[int, ...] | None]) -> Network:
    """`Average` as a network of the first one's preprocessing; images have the size of the largest."""
    seen = [network.preprocessing for network in networks]
    outer = seen[0].model_copy(
        update={
            "image_size": max((one.image_size for one in seen), key=lambda size: size[0] * size[1]),
            "mean": (0.0,) * len(seen[0].mean),
            "std": (1.0,) * len(seen[0].std),
        }
    )
    return Network(Ensemble(networks, columns), outer)


def label_ranks(
    scores_NK: Float[torch.Tensor, "N K"], labels_N: Int64[torch.Tensor, " N"]
) -> Int64[torch.Tensor, " N"]:
    """How many classes stand before the label's: those with a higher score, and of equal ones the lower classes, as
    `torch.argmax` has it. A label whose score is no number stands last."""
    of_label_N1 = scores_NK.gather(1, labels_N[:, None])
    lower_NK = torch.arange(scores_NK.shape[1], device=labels_N.device) < labels_N[:, None]
    ranks_N = ((scores_NK > of_label_N1) | ((scores_NK == of_label_N1) & lower_NK)).sum(-1)
    return ranks_N.masked_fill(of_label_N1[:, 0].isnan(), scores_NK.shape[1])
