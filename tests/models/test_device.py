"""What this machine computes with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deitkit.config import Preprocessing
from deitkit.models import network as device
from deitkit.models.cnn import CNNConfig, build_cnn
from deitkit.models.network import Network, auto_chunk_size, autocast_dtype, largest_activation
from deitkit.terminal import UserError

CPU = torch.device("cpu")


def cnn(name: str, size: int) -> Network:
    return build_cnn(CNNConfig(name=name, classes=10), image_size=(size, size), pretrained=False)


def test_the_largest_activation_is_that_of_the_paper_s_table() -> None:
    assert largest_activation(cnn("cifar-resnet20", 32)) == 16 * 32 * 32  # He et al. 2015, section 4.2
    assert largest_activation(cnn("resnet50", 224)) == 256 * 56 * 56  # He et al. 2015, table 1: conv1 is as large


def test_slices_shrink_where_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    network, sizes = cnn("cifar-resnet20", 32), []
    for memory in (2**36, 2**27, 2**26, 1):
        monkeypatch.setattr(device, "_memory_bytes", lambda _, memory=memory: memory)
        sizes.append(auto_chunk_size(network, CPU))
    assert sizes == [64, 32, 16, 8]


def test_slices_of_large_activations_stay_in_a_cpu_s_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_memory_bytes", lambda _: 2**40)
    assert auto_chunk_size(cnn("resnet50", 224), CPU) == 8  # 16 of 802,816 numbers would be more than CACHED_NUMBERS


def test_a_network_that_cannot_be_measured_gets_the_most() -> None:
    class Reads(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.new_full((len(images), 2), images.sum().item())

    network = Network(Reads(), Preprocessing(image_size=(4, 4), mean=(0.5,), std=(0.5,)))
    assert largest_activation(network) == 0
    assert auto_chunk_size(network, CPU) == 64


@pytest.mark.parametrize("amx", [True, False, None])
def test_a_cpu_computes_in_bfloat16_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool | None
) -> None:
    if amx is None:  # as in torch 2.9
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    assert autocast_dtype("auto", CPU) is (torch.bfloat16 if amx else torch.float32)


def test_number_formats() -> None:
    assert autocast_dtype("float32", CPU) is torch.float32
    assert autocast_dtype("bfloat16", CPU) is torch.bfloat16
    assert autocast_dtype("float16", torch.device("cuda")) is torch.float16
    with pytest.raises(UserError, match="float16 needs a GPU"):
        autocast_dtype("float16", CPU)
