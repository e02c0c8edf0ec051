"""Where the right class stands, with equals and with what is no number."""

from __future__ import annotations

import torch

from deitkit.models.network import Heads, label_ranks
from deitkit.training.evaluate import SplitLogits, score


def test_of_equal_scores_the_lower_class_comes_first() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.4, 0.1], [0.25, 0.25, 0.25, 0.25]])
    for number, row in enumerate(scores):
        ranks = [int(label_ranks(row[None], torch.tensor([label]))) for label in range(4)]
        assert ranks == [[2, 0, 1, 3], [0, 1, 2, 3]][number]
        assert ranks[int(row.argmax())] == 0


def test_what_is_no_number_is_never_right() -> None:
    scores = torch.tensor([[float("nan"), 0.2, 0.1]] * 2)
    assert label_ranks(scores, torch.tensor([0, 1])).tolist() == [3, 0]


def test_every_image_counts_for_one_class_whatever_is_equal() -> None:
    """As with answers in half precision, of which two are often alike: the shares of all labels add up to 1."""
    logits = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)).round()
    shares = []
    for label in range(10):
        labels = torch.full((500,), label)
        shares.append(score(SplitLogits(Heads(logits, None), labels))["top1"]["cls"])
        assert shares[-1] == (logits.argmax(-1) == label).double().mean().item()
    assert abs(sum(shares) - 1) < 1e-12
