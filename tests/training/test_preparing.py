"""What a network is made ready with before its first step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deitkit.config import DataConfig, RunConfig
from deitkit.data import load_data
from deitkit.settings import build
from deitkit.training.setup import preprocessing_of_student, resolve, student_architecture


@pytest.mark.parametrize(
    ("student", "mean"), [("vit_tiny", (0.5, 0.5, 0.5)), ("deit_tiny_plain", (0.485, 0.456, 0.406))]
)
def test_a_student_sees_images_as_the_one_of_its_name_does(student: str, mean: tuple[float, ...]) -> None:
    """The two are one shape: without its name, a plain ViT would be taken for a plain DeiT."""
    photos = replace(load_data("digits", DataConfig()), image_size=None, channels=3)
    config = resolve(build(RunConfig, {"student": student}), photos, "x")
    preprocessing = preprocessing_of_student(config, student_architecture(config, photos))
    assert (preprocessing.mean, preprocessing.crop_pct) == (mean, 0.875)
