"""A student that sees its images small at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes import killed_after_epoch
from tests.training.test_jobs import train, weights

from deitkit.config import StudentConfig
from deitkit.distill.losses import TeacherOutput
from deitkit.distill.step import Plan
from deitkit.distill.teacher import TeacherSource
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import low_res_shape
from deitkit.terminal import UserError
from deitkit.training import job, loop
from deitkit.views.mixup import Batch

SMALL = {"low_res_size": 4}


def test_the_first_steps_see_small_images_and_their_teacher_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    asked: list[tuple[int, ...]] = []
    embed, train_step = ViT.embed, loop.train_step

    def watched_embed(self: ViT, images_BCHW: torch.Tensor) -> torch.Tensor:
        if self.training:
            seen.append(tuple(images_BCHW.shape[2:]))
        return embed(self, images_BCHW)

    def watched_step(state: Any, crops: Any, teacher: TeacherSource, *rest: Any) -> Any:
        def watched_teacher(batch: Batch) -> TeacherOutput | None:
            asked.append(tuple(batch.images_BCHW.shape[2:]))
            return teacher(batch)

        return train_step(state, crops, watched_teacher, *rest)

    monkeypatch.setattr(ViT, "embed", watched_embed)
    monkeypatch.setattr(loop, "train_step", watched_step)
    train(tmp_path / "run", **SMALL)  # 3 epochs of 5 steps
    assert seen == [(4, 4)] * 8 + [(8, 8)] * 7
    assert asked == [(8, 8)] * 15


def test_every_step_has_a_seed_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what draws without a key, such as a teacher's own dropout; a resumed run goes on with that of its step."""
    seeds: list[int] = []
    train_step = loop.train_step

    def watched_step(*given: Any) -> Any:
        seeds.append(torch.initial_seed())
        return train_step(*given)

    monkeypatch.setattr(loop, "train_step", watched_step)
    with killed_after_epoch(1):
        train(tmp_path / "run", seed=7)
    train(tmp_path / "run", seed=7, resume=True)
    assert seeds == [7 * loop.SEED_STRIDE + step for step in range(15)]


def test_a_run_interrupted_between_the_sizes_ends_with_the_same_bits(tmp_path: Path) -> None:
    train(tmp_path / "whole", **SMALL)
    with killed_after_epoch(1):
        train(tmp_path / "broken", **SMALL)
    train(tmp_path / "broken", resume=True, **SMALL)
    assert weights(tmp_path / "whole") == weights(tmp_path / "broken")
    train(tmp_path / "other")
    assert weights(tmp_path / "whole") != weights(tmp_path / "other")


def test_a_budget_counts_small_steps_and_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step with small images is said to take one second, any other three; half of the steps have small images."""

    def mean_step(state: Any, plan: Plan, *_rest: Any) -> float:
        return 1.0 if state.step < plan.low_res_steps else 3.0

    monkeypatch.setattr(loop, "_mean_step", mean_step)
    measured: list[float] = []
    measure = loop.measure_speed

    def measured_speed(*given: Any, **named: Any) -> tuple[float, float]:
        found = measure(*given, **named)
        measured.append(found[0])
        return found

    monkeypatch.setattr(job, "measure_speed", measured_speed)
    train(tmp_path / "run", **SMALL, budget_minutes=0.2)
    assert measured == [pytest.approx(0.5 * 1 + 0.5 * 3)]


def test_an_oblong_image_is_reduced_in_whole_patches() -> None:
    student = ViTConfig(image_size=(32, 48), patch_size=(4, 4), width=16, heads=2)
    assert low_res_shape(StudentConfig(low_res_size=20), student) == (20, 32)
    assert low_res_shape(StudentConfig(), student) is None


@pytest.mark.parametrize("pixels", [3, 8, 10])
def test_a_small_size_that_cannot_be_is_refused(tmp_path: Path, pixels: int) -> None:
    with pytest.raises(
        UserError, match=f"--low-res-size {pixels}: the student sees 8 pixels .* smaller sizes are 2, 4, 6$"
    ):
        train(tmp_path / "run", low_res_size=pixels)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="in patches of 8: there is no smaller size"):
        train(tmp_path / "run", low_res_size=4, patch_size=8)


def test_half_of_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--low-res-size 4: half of one step is none: give more steps"):
        train(tmp_path / "run", low_res_size=4, steps=1)
    assert not (tmp_path / "run" / "config.yaml").exists()
