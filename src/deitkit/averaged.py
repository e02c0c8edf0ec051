"""Networks that answer with one voice: the heads of one, or several networks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional as F

from deitkit.network import Network
from deitkit.types import Heads


def single_logits(heads: Heads) -> Float[torch.Tensor, "B K"]:
    """One set of logits: the only head's, or the logarithm of the mean of both softmaxes (DeiT, section 4)."""
    if heads.dist_BK is None:
        return heads.cls_BK.float()
    cls_BK, dist_BK = heads.cls_BK.float(), heads.dist_BK.float()
    return torch.logaddexp(F.log_softmax(cls_BK, -1), F.log_softmax(dist_BK, -1)) - math.log(2)


@final
class Average(nn.Module):
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

    def behind(self) -> str:
        """A hash of what stands before and behind the networks' weights."""
        facts = [network.preprocessing.model_dump_json() for network in self.networks]  # type: ignore[union-attr, operator]
        return hashlib.sha256(repr((facts, self.columns)).encode()).hexdigest()


def averaged(networks: Sequence[Network], columns: Sequence[tuple[int, ...] | None]) -> Network:
    """`Average` as a network of the first one's preprocessing; images have the size of the largest."""
    seen = [network.preprocessing for network in networks]
    outer = seen[0].model_copy(
        update={
            "image_size": max((one.image_size for one in seen), key=lambda size: size[0] * size[1]),
            "mean": (0.0,) * len(seen[0].mean),
            "std": (1.0,) * len(seen[0].std),
        }
    )
    return Network(Average(networks, columns), outer)
