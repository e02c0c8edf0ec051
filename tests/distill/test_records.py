from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deitkit.distill.tape import decode, encode, record_type
from deitkit.terminal import UserError


@pytest.mark.parametrize(
    ("answers", "classes", "size"),
    [
        ("hard", 2, 1),
        ("hard", 256, 1),
        ("hard", 257, 2),
        ("hard", 65_536, 2),
        ("hard", 65_537, 4),
        ("all", 10, 40),
        (10, 1000, 44),
        (3, 10, 13),
    ],
)
def test_a_record_is_no_larger_than_promised(answers: str | int, classes: int, size: int) -> None:
    assert record_type(answers, classes).itemsize == size
    assert encode(torch.randn(5, classes), answers).nbytes == 5 * size


@pytest.mark.parametrize("classes", [2, 10, 200, 70_000])
def test_decisions_and_all_logits_come_back_bit_for_bit(classes: int) -> None:
    logits_BK = torch.randn(7, classes, generator=torch.Generator().manual_seed(0)) * 20
    hard = decode(encode(logits_BK, "hard"), classes)
    assert torch.equal(hard.labels_B, logits_BK.argmax(-1))
    assert hard.logits_BK is None
    whole = decode(encode(logits_BK, "all"), classes)
    assert torch.equal(whole.labels_B, logits_BK.argmax(-1))
    assert whole.logits_BK is not None
    assert torch.equal(whole.logits_BK, logits_BK)


@given(st.integers(2, 40), st.integers(0, 2**16), st.floats(0.1, 30))
def test_the_likeliest_classes_come_back_and_the_rest_shares_what_is_left(
    classes: int, seed: int, scale: float
) -> None:
    logits_BK = torch.randn(4, classes, generator=torch.Generator().manual_seed(seed)) * scale
    k = 1 + seed % classes
    answers = decode(encode(logits_BK, k), classes)
    assert torch.equal(answers.labels_B, logits_BK.argmax(-1))
    assert answers.logits_BK is not None
    chances_BK, true_BK = answers.logits_BK.softmax(-1), logits_BK.softmax(-1)
    kept = logits_BK.topk(k, -1).indices
    # half precision keeps 11 bits of a log-probability: an error of |log p| / 2048 at most
    assert torch.allclose(chances_BK.gather(1, kept), true_BK.gather(1, kept), rtol=0.05, atol=2e-3)
    assert torch.allclose(answers.logits_BK.gather(1, kept), logits_BK.gather(1, kept), rtol=1e-3, atol=0.2)
    assert torch.allclose(chances_BK.sum(-1), torch.ones(4), atol=1e-5)


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    logits_BK = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert encode(logits_BK, "hard")["label"].tolist() == [1]
    assert encode(logits_BK, 2)["class"].tolist() == [[1, 2]]


@pytest.mark.parametrize("answers", ["hard", "all", 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_answers_that_are_no_numbers_are_not_written_down(answers: str | int, bad: float) -> None:
    with pytest.raises(UserError, match="the teacher answers views with infinity or NaN"):
        encode(torch.tensor([[1.0, 2.0, 3.0], [1.0, bad, 0.0]]), answers)


def test_logits_beyond_half_precision_stay_finite() -> None:
    logits_BK = torch.tensor([[0.0, -1e6, 1e6]])
    back = decode(encode(logits_BK, 3), 3).logits_BK
    assert back is not None
    assert back.isfinite().all()
    assert back.softmax(-1)[0, 2] == 1
