"""The residual network for small images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from deitkit.models import cnn
from deitkit.models.cnn import CifarResNet, blocks_per_stage


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameter_counts_are_those_of_the_paper(depth: int, millions: float) -> None:
    count = sum(parameter.numel() for parameter in CifarResNet(depth, 10).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01 if millions < 1 else 0.05)  # table 6 of arXiv 1512.03385


@pytest.mark.parametrize("depth", [2, 7, 9, 21, 57])
def test_depths_other_than_6n_plus_2_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth {depth} is not 6n \+ 2: take \d+ or \d+"):
        blocks_per_stage(depth)


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (3, (33, 47)), (1, (8, 8))])
def test_any_image_size_and_grey_images_work(channels: int, size: tuple[int, int]) -> None:
    assert CifarResNet(8, 7, channels)(torch.rand(2, channels, *size)).shape == (2, 7)


def test_shortcut_keeps_every_second_position_and_adds_zero_channels_on_both_sides() -> None:
    features = torch.rand(2, 4, 5, 6)
    shortened = cnn.shortcut(features, 8, 2)
    assert shortened.shape == (2, 8, 3, 3)
    assert torch.equal(shortened[:, 2:6], features[:, :, ::2, ::2])
    assert not shortened[:, :2].any()
    assert not shortened[:, 6:].any()


def test_a_stage_without_residuals_is_the_identity_on_positive_features() -> None:
    block = cnn.ResidualBlock(6, 6, 1)
    torch.nn.init.zeros_(block.bn2.weight)
    features = torch.rand(2, 6, 4, 4)
    assert torch.equal(block(features), features)


def cifar10_test(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first test images in [0, 1] and their labels."""
    rows = pq.ParquetFile(folder / "cifar10" / "test-00000-of-00001.parquet").read_row_group(0).slice(0, count)
    pixels = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in rows["img"].to_pylist()]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255, torch.tensor(rows["label"].to_pylist())


@pytest.mark.parametrize(("depth", "right"), [(20, 913), (56, 923)])
def test_published_cifar10_weights_are_right_as_often_as_published(shared_data: Path, depth: int, right: int) -> None:
    """Here of the first 1,000; of all 10,000 9,173 are right with 20 layers, 9,339 with 56 (91.73 %, 93.39 %).
    With every zero channel at the end of the shortcut 56 layers fall to 10 %."""
    images, labels = cifar10_test(shared_data, 1000)
    network = CifarResNet(depth, 10).eval().to(memory_format=torch.channels_last)
    loaded = network.load_state_dict(
        load_file(shared_data / "cifar10-resnet" / f"resnet{depth}.safetensors"), strict=False
    )
    assert not loaded.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in loaded.missing_keys)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        logits = network((images - mean[:, None, None]) / std[:, None, None])
    assert abs(int((logits.argmax(1) == labels).sum()) - right) <= 2  # rounding may turn a close decision elsewhere
