"""Where the right class stands among a network's answers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64


def label_ranks(
    scores_NK: Float[torch.Tensor, "N K"], labels_N: Int64[torch.Tensor, " N"]
) -> Int64[torch.Tensor, " N"]:
    """How many classes stand before the label's: those with a higher score, and of equal ones the lower classes, as
    `torch.argmax` has it. A label whose score is no number stands last."""
    of_label_N1 = scores_NK.gather(1, labels_N[:, None])
    lower_NK = torch.arange(scores_NK.shape[1], device=labels_N.device) < labels_N[:, None]
    ranks_N = ((scores_NK > of_label_N1) | ((scores_NK == of_label_N1) & lower_NK)).sum(-1)
    return ranks_N.masked_fill(of_label_N1[:, 0].isnan(), scores_NK.shape[1])
