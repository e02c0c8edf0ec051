"""Classes of unequal size: class weights, oversampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from tests.training.test_jobs import weights

from deitkit.config import DataConfig, LossConfig, RunConfig
from deitkit.data import Dataset, Split, load_data
from deitkit.distill.losses import cross_entropy
from deitkit.settings import build
from deitkit.terminal import SilentProgress, UserError, load_yaml
from deitkit.training import fit as fitting
from deitkit.training import jobs
from deitkit.training.probe import fit_head
from deitkit.training.setup import class_weights

SIZES = {"many": 12, "some": 6, "rare": 3}


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    generator = np.random.default_rng(0)
    for label, (name, count) in enumerate(SIZES.items()):
        for split in ("train", "val"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8) + np.uint8(60 * label)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{number}.png")
    return str(tmp_path / "photos")


def with_labels(labels: list[int], classes: int) -> Dataset:
    class Labelled:
        labels_N = np.array(labels)

    def opened(_split: str) -> Split:
        return Labelled()  # type: ignore[return-value]

    return Dataset(
        name="x",
        classes=tuple("abc"[:classes]),
        channels=1,
        image_size=(8, 8),
        mirror_safe=True,
        open_split=opened,
        has_test=False,
    )


def test_balanced_classes_weigh_the_same_together_and_the_mean_image_weighs_1() -> None:
    weights_K = np.array(class_weights("balanced", with_labels([0] * 8 + [1] * 2 + [-1] * 5, 2)))
    assert weights_K.tolist() == pytest.approx(
        [10 / 16, 10 / 4]
    )  # n / (classes * images of the class), unlabelled ones apart
    assert weights_K @ [8, 2] == pytest.approx(10)
    assert class_weights("none", with_labels([0, 1, 1], 2)) == ()
    assert class_weights("balanced", with_labels([0, 2, 2], 3))[0] == pytest.approx(
        3 / 2
    )  # of the classes that there are


def test_weighted_cross_entropy_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BK, weights_K = torch.randn(50, 4, generator=generator), torch.tensor([0.5, 1.0, 2.0, 4.0])
    labels_B, partner_B = (torch.randint(0, 4, (50,), generator=generator) for _ in range(2))
    for smoothing in (0.0, 0.1):
        mixed_B = cross_entropy(logits_BK, labels_B, partner_B, torch.full((50,), 0.7), smoothing, weights_K)
        each_B = [cross_entropy(logits_BK, one_B, one_B, torch.ones(50), smoothing) for one_B in (labels_B, partner_B)]
        expected_B = 0.7 * weights_K[labels_B] * each_B[0] + 0.3 * weights_K[partner_B] * each_B[1]
        torch.testing.assert_close(mixed_B, expected_B)
    expected_B = torch.nn.functional.cross_entropy(logits_BK, labels_B, weights_K, reduction="none")
    torch.testing.assert_close(cross_entropy(logits_BK, labels_B, labels_B, torch.ones(50), 0.0, weights_K), expected_B)
    nothing_B = cross_entropy(logits_BK, labels_B * 0 - 1, labels_B * 0 - 1, torch.ones(50), 0.1, weights_K)
    assert not nothing_B.any()  # images without labels


def test_a_balanced_probe_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    values_NF = torch.randn(100, 6, generator=generator, dtype=torch.float64) + labels_N[:, None] / 2
    balanced = [100 / (3 * count) for count in (80, 15, 5)]
    head = fit_head(values_NF, labels_N, 3, SilentProgress(), class_weights=balanced)
    scaled_NF = ((values_NF - values_NF.mean(0)) / values_NF.std(0, correction=0)).numpy()
    other = LogisticRegression(C=1 / (head.penalty * 100), class_weight="balanced", max_iter=5000, tol=1e-8)
    other.fit(scaled_NF, labels_N.numpy())
    ours_NK = head.logits(values_NF).softmax(-1).numpy()
    np.testing.assert_allclose(ours_NK, other.predict_proba(scaled_NF), atol=2e-3)


def test_oversampled_classes_are_equally_large_and_copies_have_views_of_their_own(uneven: str) -> None:
    plain, repeated = load_data(uneven, DataConfig()), load_data(uneven, DataConfig(oversample=True))
    assert np.bincount(plain.open_split("train").labels_N).tolist() == [12, 3, 6]
    train = repeated.open_split("train")
    assert np.bincount(train.labels_N).tolist() == [12, 12, 12]
    names = [train.name(position) for position in range(len(train))]
    assert {names.count(name) for name in names if "rare" in name} == {4}
    assert len(set(names)) == 21
    assert len(repeated.open_split("val")) == len(plain.open_split("val"))
    assert repeated.names_hash() != plain.names_hash()


def test_class_weights_and_oversampling_change_what_is_learned_and_are_kept(uneven: str, tmp_path: Path) -> None:
    config = {"epochs": 1, "student": "deit_pico", "image_size": 32, "batch_size": 8, "workers": 0}

    def run(name: str, *, resume: bool = False, **settings: object) -> None:
        configured = build(RunConfig, {**config, **settings})
        jobs.run_training(uneven, configured, tmp_path / name, resume=resume, progress=SilentProgress())

    for name, settings in (
        ("plain", {}),
        ("weighted", {"class_weights": "balanced"}),
        ("repeated", {"oversample": True}),
    ):
        run(name, **settings)
    assert weights(tmp_path / "plain") != weights(tmp_path / "weighted") != weights(tmp_path / "repeated")
    assert load_yaml(tmp_path / "weighted" / "config.yaml")["loss"]["class_weights"] == "balanced"
    run("repeated", resume=True, oversample=True)  # the data are recognised
    with pytest.raises(UserError, match=r"images are not those|oversample = True, now it is False"):
        run("repeated", resume=True)


def test_the_automatic_teacher_of_uneven_classes_is_balanced_too_and_never_sees_copies(uneven: str) -> None:
    config = build(RunConfig, {"oversample": True, "teacher": "auto"})
    (fit,) = fitting.automatic_fits(load_data(uneven, DataConfig()), config)[:1]
    assert (fit.class_weights, fit.data.oversample) == ("balanced", False)
    (fit,) = fitting.automatic_fits(load_data(uneven, DataConfig()), build(RunConfig, {"class_weights": "balanced"}))[
        :1
    ]
    assert fit.class_weights == "balanced"


def test_class_weights_of_binary_cross_entropy_are_refused() -> None:
    with pytest.raises(ValueError, match="class_weights: are for cross-entropy"):
        LossConfig(label_loss="bce", label_smoothing=0, class_weights="balanced")
