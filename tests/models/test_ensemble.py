"""Several teachers that answer as one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.training.test_fit import fit
from tests.training.test_jobs import train, weights
from torch.nn import functional as F

from deitkit.config import Preprocessing
from deitkit.distill.teacher import load_teacher, members_of
from deitkit.models.cnn import CifarResNet
from deitkit.models.network import Ensemble, Network, ensemble
from deitkit.terminal import UserError

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
    train(tmp_path / "live", teacher="+".join(pair), record=str(tmp_path / "tape"), distillation="soft")
    train(tmp_path / "taped", tape=str(tmp_path / "tape"), distillation="soft")
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
    with pytest.raises(UserError, match="give the names or run folders of all"):
        load_teacher(f"{pair[0]}+", DIGITS)
    with pytest.raises(UserError, match="nowhere: neither a network's name nor a run folder"):
        load_teacher(f"{pair[0]}+{tmp_path}/nowhere", DIGITS)
