"""Pooled features of images, and the classifier that fits them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from deitkit.config import DataConfig
from deitkit.data import load_data
from deitkit.models.cnn import CNNConfig, build_cnn, fold_batchnorm, forward_with_features
from deitkit.models.network import Network
from deitkit.terminal import Progress, SilentProgress
from deitkit.training import probe
from deitkit.views.loader import evaluation_batches


def network(name: str, size: int) -> Network:
    torch.manual_seed(0)
    built = build_cnn(CNNConfig(name=name, classes=10), image_size=(size, size), pretrained=False).eval()
    for module in built.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return built


@pytest.mark.parametrize(("name", "size"), [("cifar-resnet8", 8), ("lite0", 32), ("torchvision:resnet18", 32)])
def test_a_folded_network_has_the_same_features_without_batch_norms(name: str, size: int) -> None:
    given = network(name, size)
    folded = fold_batchnorm(given)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    images = torch.rand(3, 3, size, size)
    before, after = (forward_with_features(one, images)[1] for one in (given, folded))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in given.modules())


def test_a_network_that_folding_would_change_is_left_as_it_is() -> None:
    """A batch norm that stands after a convolution, and is used elsewhere."""

    class Crossed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1)
            self.norm = torch.nn.BatchNorm2d(3)
            self.linear = torch.nn.Linear(3, 10)
            self.norm.running_mean.fill_(1)  # type: ignore[union-attr]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.linear(torch.relu(self.conv(self.norm(images))).mean((2, 3)))
            return logits

    torch.manual_seed(0)
    crossed = Network(Crossed(), network("cifar-resnet8", 8).preprocessing).eval()
    assert fold_batchnorm(crossed) is crossed


def test_features_are_those_of_all_images_in_order_and_progress_is_shown() -> None:
    split, given = load_data("digits", DataConfig(train_images=70)).open_split("train"), network("cifar-resnet8", 8)
    seen: list[int] = []

    class Watched(Progress):
        def step(self, done: int, images: int, waiting_seconds: float, teacher_seconds: float) -> None:
            seen.append(done)

    features, labels = probe.split_features(given, split, torch.device("cpu"), Watched())
    ((images, expected_labels, _),) = evaluation_batches(split, given.preprocessing)
    torch.testing.assert_close(features, forward_with_features(given, images)[1].detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(labels, expected_labels)
    assert seen[-1] == 70
    assert len(seen) > 1
    halves = [
        probe.split_features(given, split, torch.device("cpu"), SilentProgress(), share=(0, 1))[0] for _ in range(2)
    ]
    assert torch.equal(halves[0], halves[1])


def clusters(images: int, features: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = np.random.default_rng(0)
    labels = drawn.integers(classes, size=images)
    centres = drawn.normal(size=(classes, features))
    values = centres[labels] + 2 * drawn.normal(size=(images, features))
    values = values * drawn.uniform(0.01, 10, features) + drawn.normal(size=features)
    return torch.from_numpy(values).float(), torch.from_numpy(labels)


@pytest.mark.parametrize(("images", "features"), [(150, 20), (40, 80)])
def test_the_classifier_is_scikit_learns_on_standardised_features(images: int, features: int) -> None:
    values, labels = clusters(images, features, 3)
    head = probe.fit_head(values, labels, 3, SilentProgress())
    mean, scale = values.mean(0), values.std(0, correction=0)
    strength = 1 / (head.penalty * images)
    other = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(
        ((values - mean) / scale).numpy(), labels.numpy()
    )
    expected = torch.from_numpy(other.predict_proba(((values - mean) / scale).numpy())).float()
    torch.testing.assert_close(head.logits(values).softmax(-1), expected, rtol=0, atol=5e-3)


def test_cross_validation_tells_the_accuracy_on_new_images() -> None:
    values, labels = clusters(1000, 30, 4)
    known, new = (values[:200], labels[:200]), (values[200:], labels[200:])
    head = probe.fit_head(*known, 4, SilentProgress())
    fitted, real = ((head.logits(x).argmax(1) == y).float().mean().item() for x, y in (known, new))
    assert head.top1 == pytest.approx(real, abs=0.06)
    assert head.nll == pytest.approx(F.cross_entropy(head.logits(new[0]), new[1]).item(), abs=0.1)
    assert fitted > real + 0.02


def test_labels_without_pattern_are_predicted_at_chance() -> None:
    values, labels = clusters(300, 30, 4)
    head = probe.fit_head(
        values, labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))], 4, SilentProgress()
    )
    assert head.top1 < 0.35
    assert head.penalty == probe.PENALTIES[0]


def test_every_fold_has_its_share_of_every_class() -> None:
    labels = torch.tensor([0] * 53 + [1] * 20 + [2] * 4)
    folds = probe.fold_numbers(labels, 0)
    assert torch.equal(folds, probe.fold_numbers(labels, 0))
    assert not torch.equal(folds, probe.fold_numbers(labels, 1))
    for one in range(3):
        sizes = folds[labels == one].bincount(minlength=probe.FOLDS)
        assert sizes.max() - sizes.min() <= 1
    sizes = folds.bincount(minlength=probe.FOLDS)
    assert sizes.max() - sizes.min() <= 1


def test_a_class_with_one_image_and_features_that_never_vary_are_no_trouble() -> None:
    values, labels = clusters(50, 8, 3)
    values[:, 3] = 2.0
    labels[0] = 3
    head = probe.fit_head(values, labels, 5, SilentProgress())
    assert head.logits(values).isfinite().all()
    assert head.weight_KF.shape == (5, 8)
