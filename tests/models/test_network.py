"""What a network does to images before its first layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deitkit.config import Preprocessing
from deitkit.models.network import Network, prepare
from deitkit.views.image_ops import per_channel

RGB = Preprocessing(image_size=(4, 4), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.2))
GREY = Preprocessing(image_size=(4, 4), mean=(0.5,), std=(0.25,))


def test_each_channel_has_its_mean_and_standard_deviation() -> None:
    prepared = prepare(torch.full((1, 3, 4, 4), 0.6), RGB)
    torch.testing.assert_close(prepared[0, :, 0, 0], torch.tensor([1.0, 1.6, 1.5]))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_constants_are_made_where_the_images_are_with_the_same_bits(kind: torch.dtype) -> None:
    values = (0.485, 0.456, 0.406, 0.299, 0.587, 1 / 3)
    assert torch.equal(per_channel(values, torch.empty(1, dtype=kind))[:, 0, 0], torch.tensor(values).to(kind))
    assert per_channel(values, torch.empty(1, device="meta")).device.type == "meta"
    prepared = prepare(images := torch.rand(2, 3, 4, 4), RGB)
    mean, std = (torch.tensor(part)[:, None, None] for part in (RGB.mean, RGB.std))
    assert torch.equal(prepared, (images - mean) / std)


@pytest.mark.parametrize("preprocessing", [RGB, GREY])
def test_nothing_is_copied_from_the_host_to_prepare_images(preprocessing: Preprocessing) -> None:
    with Watch() as watch:
        prepare(torch.rand(2, 3, 4, 4), preprocessing)
    assert not watch.copies


class Watch(TorchDispatchMode):
    """Takes down what makes a tensor of numbers that Python holds, which lie on the host first."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(function) for word in ("lift_fresh", "_to_copy", "aten.copy_")):
            self.copies.append(str(function))
        return function(*args, **(kwargs or {}))


def test_grey_images_reach_an_rgb_network_three_times() -> None:
    grey = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(prepare(grey, RGB), prepare(grey.expand(-1, 3, -1, -1), RGB))


def test_rgb_images_reach_a_grey_network_as_luma() -> None:
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    torch.testing.assert_close(prepare(red, GREY), torch.full((1, 1, 4, 4), (0.299 - 0.5) / 0.25))


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 channels"):
        prepare(torch.rand(1, 2, 4, 4), RGB)


def test_images_of_any_size_are_resized_and_stay_between_0_and_1() -> None:
    checkers = (torch.arange(64).view(1, 1, 8, 8) % 2).float()
    plain = Preprocessing(image_size=(5, 7), mean=(0.0,), std=(1.0,))
    prepared = prepare(checkers, plain)
    assert prepared.shape == (1, 1, 5, 7)
    assert prepared.min() >= 0
    assert prepared.max() <= 1


def test_saved_names_are_those_of_the_body() -> None:
    network = Network(torch.nn.Linear(4, 2), GREY)
    assert all(name.startswith("body.") for name in network.state_dict())
    answer = network(torch.rand(3, 1, 4, 4))
    assert answer.dist_BK is None
