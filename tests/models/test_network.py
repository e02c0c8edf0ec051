"""Preprocessing, ensembles, ranks of labels, and what this machine computes with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_fit import fit
from tests.training.test_jobs import train, weights
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deitkit.config import Preprocessing
from deitkit.distill.teacher import load_teacher, members_of
from deitkit.models import network as device
from deitkit.models.cnn import CifarResNet, CNNConfig, build_cnn
from deitkit.models.network import (
    Ensemble,
    Heads,
    Network,
    auto_chunk_size,
    autocast_dtype,
    ensemble,
    label_ranks,
    largest_activation,
    prepare,
)
from deitkit.terminal import UserError
from deitkit.training.evaluate import SplitLogits, score
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


DIGITS = tuple("0123456789")


def network(seed: int, size: int = 8, mean: float = 0.3) -> Network:
    torch.manual_seed(seed)
    preprocessing = Preprocessing(image_size=(size, size), mean=(mean,), std=(0.5,))
    return Network(CifarResNet(8, 3, 1), preprocessing).eval()


def test_answer_is_the_mean_of_log_probabilities_each_behind_its_own_preprocessing() -> None:
    one, other = network(0), network(1, size=12, mean=0.1)
    both = ensemble([one, other], [None, (2, 0, 1)])
    images = torch.rand(5, 1, 12, 12)
    expected = [F.log_softmax(one(images).cls_BK, -1), F.log_softmax(other(images).cls_BK[:, [2, 0, 1]], -1)]
    torch.testing.assert_close(both(images).cls_BK, (expected[0] + expected[1]) / 2)
    assert both.preprocessing.image_size == (12, 12)
    assert isinstance(both.body, Ensemble)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A fitted network and a student."""
    folder = tmp_path_factory.mktemp("pair")
    fit(folder / "cnn", from_scratch=True, epochs=8)
    train(folder / "vit", epochs=8)
    return str(folder / "cnn"), str(folder / "vit")


def test_two_runs_teach_as_one_and_from_a_tape_as_live(tmp_path: Path, pair: tuple[str, str]) -> None:
    both = load_teacher("+".join(pair), DIGITS)
    images = torch.rand(7, 1, 8, 8)
    alone = [F.log_softmax(load_teacher(name, DIGITS).forward(images), -1) for name in pair]
    torch.testing.assert_close(both.forward(images), (alone[0] + alone[1]) / 2, atol=1e-5, rtol=1e-5)
    train(tmp_path / "live", teacher="+".join(pair), distillation="soft")
    train(tmp_path / "taped", teacher="+".join(pair), record=str(tmp_path / "tape"), distillation="soft")
    assert weights(tmp_path / "live") == weights(tmp_path / "taped")


def test_whoever_is_averaged_is_part_of_what_it_is_known_by(pair: tuple[str, str]) -> None:
    hashes = [load_teacher(name, DIGITS).state_hash() for name in (pair[0], "+".join(pair), "+".join(pair[::-1]))]
    assert len(set(hashes)) == 3


def test_names_are_parted_where_no_folder_is_called_so(tmp_path: Path, pair: tuple[str, str]) -> None:
    assert members_of("lite0+resnet18@w.pth") == ["lite0", "resnet18@w.pth"]
    shutil.copytree(pair[0], tmp_path / "a+b")
    assert members_of(str(tmp_path / "a+b")) == [str(tmp_path / "a+b")]
    (tmp_path / "w.pth").touch()
    (tmp_path / "v+w.pth").touch()
    assert members_of(f"run+resnet18@{tmp_path}/w.pth") == ["run", f"resnet18@{tmp_path}/w.pth"]
    assert members_of(f"resnet18@{tmp_path}/v+w.pth") == [f"resnet18@{tmp_path}/v+w.pth"]
    with pytest.raises(UserError, match="give a name or a run folder on both sides of each"):
        load_teacher(f"{pair[0]}+", DIGITS)
    with pytest.raises(UserError, match="nowhere: neither a network's name nor a run folder"):
        load_teacher(f"{pair[0]}+{tmp_path}/nowhere", DIGITS)


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
