"""A view is a pure function of (view_seed, view, index): nothing else may change a pixel."""

from __future__ import annotations

import gc
import json
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tests.fakes import HeldImages, Photos

from deitkit import cli
from deitkit.config import AUGMENT_PRESETS, DataConfig, Preprocessing, ViewConfig
from deitkit.data import Split, UnreadableImage, load_data
from deitkit.views import augment
from deitkit.views.loader import (
    TrainLoader,
    augment_and_mix,
    cut,
    describe,
    epoch_rows,
    evaluation_batches,
    one_of_each_class,
    raw_batch,
    show_views,
    view_sheet,
)
from deitkit.views.mixup import RawBatch

PHOTO_VIEW = AUGMENT_PRESETS["deit"].model_copy(update={"crop": "resize", "view_size": (16, 16), "flip_prob": 0.5})
THREE_VIEW = AUGMENT_PRESETS["deit3"].model_copy(
    update={"crop": "simple", "crop_padding": 4 / 16, "view_size": (16, 16), "flip_prob": 0.5}
)
HELD_VIEW = PHOTO_VIEW.model_copy(update={"crop": "pad", "view_size": (8, 8), "crop_padding": 2 / 8})

View = tuple[int, int]
Shown = dict[View, tuple[bytes, int, int, float]]


def shown(batches: list[RawBatch], config: ViewConfig) -> Shown:
    """Everything that a student would be told, by (index, view)."""
    result: Shown = {}
    for raw in batches:
        batch = augment_and_mix(raw, config)
        for row, key in enumerate(zip(batch.index_B.tolist(), batch.view_B.tolist(), strict=True)):
            assert key not in result
            targets = batch.labels_B[row].item(), batch.partner_labels_B[row].item(), batch.lam_B[row].item()
            result[key] = (batch.images_BCHW[row].numpy().tobytes(), *targets)
    return result


def epoch(split: Split, config: ViewConfig, number: int, **settings: int) -> Shown:
    loader = TrainLoader(split, config, **{"batch_size": 10, "seed": 0, **settings})
    start = number * loader.steps_per_epoch
    return shown(list(loader.batches(start, start + loader.steps_per_epoch)), config)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("augmenting", [False, True])
@pytest.mark.parametrize("config", [PHOTO_VIEW, THREE_VIEW])
def test_workers_change_no_pixel(config: ViewConfig, workers: int, augmenting: bool) -> None:
    photos = Photos(31)
    loader = TrainLoader(photos, config, batch_size=10, seed=0, workers=workers, augmenting=augmenting)
    assert next(loader.batches(0, 1)).augmented is augmenting
    assert epoch(photos, config, 2, workers=workers, augmenting=augmenting) == epoch(photos, config, 2, workers=0)


@pytest.mark.parametrize(
    ("split", "config"), [(HeldImages(53), HELD_VIEW), (Photos(23), PHOTO_VIEW), (Photos(23), THREE_VIEW)]
)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_and_order_change_no_pixel(split: Split, config: ViewConfig, batch_size: int) -> None:
    assert epoch(split, config, 1, batch_size=batch_size, seed=5) == epoch(split, config, 1)


@pytest.mark.parametrize("config", [HELD_VIEW, HELD_VIEW.model_copy(update={"repeated_aug": 3})])
def test_two_processes_see_what_one_sees(config: ViewConfig) -> None:
    split = HeldImages(53)
    halves: Counter[bytes] = Counter()
    sizes: Counter[int] = Counter()
    for rank in (0, 1):
        loader = TrainLoader(split, config, batch_size=10, seed=0, rank=rank, world=2)
        for step in range(loader.steps_per_epoch):
            raw = loader.batch(step)
            halves.update(image.numpy().tobytes() for image in augment_and_mix(raw, config).images_BCHW)
            sizes[step] += len(raw.partner_B)
            assert sizes[step] == raw.global_size or rank == 0
            assert sizes[step] < raw.global_size or rank == 1
    loader = TrainLoader(split, config, batch_size=10, seed=0)
    steps = (augment_and_mix(loader.batch(step), config).images_BCHW for step in range(loader.steps_per_epoch))
    assert halves == Counter(image.numpy().tobytes() for images in steps for image in images)


def test_another_view_seed_or_view_shows_something_else() -> None:
    split = HeldImages(20)
    first, second = epoch(split, HELD_VIEW, 0), epoch(split, HELD_VIEW, 1)
    other = epoch(split, HELD_VIEW.model_copy(update={"view_seed": 1}), 0)
    assert {view for _, view in first} == {0}
    assert {view for _, view in second} == {1}
    assert sum(first[index, 0][0] == second[index, 1][0] for index in range(20)) < 3
    assert sum(first[index, 0][0] == other[index, 0][0] for index in range(20)) < 3


def test_partners_are_mutual_and_share_one_weight() -> None:
    split = HeldImages(20, classes=20)
    config = HELD_VIEW.model_copy(update={"randaugment": None})
    seen = epoch(split, config, 0)
    for index in range(20):
        _, label, partner, share = seen[index, 0]
        assert label == index
        _, partner_label, back, partner_share = seen[partner, 0]
        assert (partner_label, back) == (partner, index)
        assert share == pytest.approx(partner_share)
        assert partner != index


@pytest.mark.parametrize("view", [PHOTO_VIEW, THREE_VIEW])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_teacher_sees_the_students_view_rendered_at_its_own_size(view: ViewConfig, workers: int) -> None:
    photos, size = Photos(23), (40, 40)
    both = TrainLoader(photos, view, batch_size=10, seed=0, workers=workers, teacher_size=size, augmenting=workers > 0)
    students = TrainLoader(photos, view, batch_size=10, seed=0)
    teachers = TrainLoader(photos, view.at(size), batch_size=10, seed=0)
    for step, raw in enumerate(both.batches(0, 4)):
        batch, alone, large = (augment_and_mix(one, view) for one in (raw, students.batch(step), teachers.batch(step)))
        assert torch.equal(batch.images_BCHW, alone.images_BCHW)
        assert torch.equal(batch.seen_by_teacher, large.images_BCHW)
        assert batch.seen_by_teacher.shape[2:] == size
        assert torch.equal(batch.lam_B, alone.lam_B)
    assert alone.seen_by_teacher is alone.images_BCHW


def test_two_sizes_cost_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    photos, read = Photos(20), []
    monkeypatch.setattr(photos, "read", lambda position: read.append(position) or Photos(20).read(position))
    TrainLoader(photos, PHOTO_VIEW, batch_size=20, seed=0, teacher_size=(40, 40)).batch(0)
    assert sorted(read) == list(range(20))


class Smooth(Photos):
    """Photos without detail: rendered at any size, they look alike."""

    def read(self, position: int) -> NDArray[np.uint8]:
        down, across = np.mgrid[0:160, 0:200] / 200
        phase = 0.7 * position + np.arange(3)
        waves = np.sin(4 * down[..., None] + phase) * np.cos(5 * across[..., None] - phase)
        return (127.5 + 120 * waves).astype(np.uint8)


@pytest.mark.parametrize("crop", ["resize", "simple"])
@pytest.mark.parametrize("preset", ["light", "deit", "deit3"])
def test_no_draw_depends_on_the_size_of_a_view(preset: str, crop: str) -> None:
    """Seen from afar, a view of 192 pixels is that of 48: the same area, mirrored, shifted, turned, blurred, erased, mixed alike."""
    photos = Smooth(60)
    view = AUGMENT_PRESETS[preset].model_copy(
        update={"crop": crop, "crop_padding": 0.1, "flip_prob": 0.5, "view_size": (48, 48)}
    )
    small, large = (
        augment_and_mix(TrainLoader(photos, one, batch_size=60, seed=0).batch(0), one)
        for one in (view, view.at((192, 192)))
    )
    reduced = torch.nn.functional.avg_pool2d(large.images_BCHW, 4)
    erased = AUGMENT_PRESETS[preset].random_erasing_prob > 0  # noise is drawn pixel by pixel
    distance_B = (reduced - small.images_BCHW).abs().mean((1, 2, 3))
    other_B = (reduced - small.images_BCHW.roll(1, 0)).abs().mean((1, 2, 3))
    assert distance_B.median() < 0.02
    assert distance_B.quantile(0.9) < (0.1 if erased else 0.04)
    assert other_B.median() > 5 * distance_B.median()
    assert (large.lam_B - small.lam_B).abs().max() < 0.06
    assert torch.equal(large.partner_labels_B, small.partner_labels_B)


def test_the_first_steps_of_photos_are_rendered_small_and_small_images_are_not() -> None:
    small = {"small": (8, 8), "small_steps": 2}
    sizes = [
        tuple(raw.pixels_MCHW.shape[2:])
        for split, view in ((Photos(30), PHOTO_VIEW), (HeldImages(30), HELD_VIEW))
        for raw in TrainLoader(split, view, batch_size=10, seed=0).batches(0, 3, **small)
    ]
    assert sizes == [(8, 8), (8, 8), (16, 16), (8, 8), (8, 8), (8, 8)]
    for size in ((40, 40), (16, 16)):  # also where the student's own size is the teacher's
        loader = TrainLoader(Photos(30), PHOTO_VIEW, batch_size=10, seed=0, teacher_size=size)
        seen = augment_and_mix(loader.batch(0, **small), PHOTO_VIEW).seen_by_teacher
        whole = augment_and_mix(
            TrainLoader(Photos(30), PHOTO_VIEW.at(size), batch_size=10, seed=0).batch(0), PHOTO_VIEW
        )
        assert torch.equal(seen, whole.images_BCHW)
    assert loader.batch(2, **small).teacher_MCHW is None


def test_without_mixing_no_partner_is_read() -> None:
    config = PHOTO_VIEW.model_copy(update={"mixup_alpha": 0.0, "cutmix_alpha": 0.0})
    raw = raw_batch(Photos(10), config, np.array([3]), np.array([0]))
    assert len(raw.pixels_MCHW) == 1
    assert len(raw_batch(Photos(10), PHOTO_VIEW, np.array([3]), np.array([0])).pixels_MCHW) == 2


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 9), st.integers(0, 3))
def test_every_epoch_has_one_view_for_every_image(length: int, repeats: int, number: int, seed: int) -> None:
    index_N, view_N = epoch_rows(ViewConfig(repeated_aug=repeats), seed, number, length)
    assert len(index_N) == len(view_N) == length
    assert set(view_N.tolist()) <= set(range(number // repeats * repeats, (number // repeats + 1) * repeats))
    if repeats == 1:
        assert sorted(index_N.tolist()) == list(range(length))


def test_repeated_augmentation_shows_three_views_of_a_third() -> None:
    rows = [epoch_rows(ViewConfig(repeated_aug=3), 0, number, 60) for number in (0, 1, 2)]
    for index_N, view_N in rows:
        assert len(set(index_N.tolist())) == 20
        assert len(set(zip(index_N.tolist(), view_N.tolist(), strict=True))) == 60
        assert set(view_N.tolist()) == {0, 1, 2}
    together = {key for index_N, view_N in rows for key in zip(index_N.tolist(), view_N.tolist(), strict=True)}
    assert len(together) == 180  # three plain epochs would have shown the same


def test_epochs_that_repeat_a_view_differ_in_order() -> None:
    epochs = [epoch_rows(ViewConfig(views=1), 0, number, 60) for number in range(4)]
    assert len({tuple(index_N.tolist()) for index_N, _ in epochs}) == 4
    assert {tuple(sorted(index_N.tolist())) for index_N, _ in epochs} == {tuple(range(60))}
    assert not any(view_N.any() for _, view_N in epochs)


def test_an_epoch_shuffles_pairs() -> None:
    index_N, _ = epoch_rows(ViewConfig(), 0, 0, 100)
    other_N, _ = epoch_rows(ViewConfig(), 1, 0, 100)
    pairs = {frozenset(pair) for pair in index_N.reshape(-1, 2).tolist()}
    assert pairs == {frozenset(pair) for pair in other_N.reshape(-1, 2).tolist()}
    assert index_N.tolist() != other_N.tolist()


@given(st.integers(1, 300), st.integers(1, 300))
def test_cut_gives_nearly_equal_parts_that_are_never_empty(length: int, batch_size: int) -> None:
    parts = -(-length // batch_size)
    bounds = [cut(length, parts, number) for number in range(parts)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == length
    assert all(left[1] == right[0] for left, right in pairwise(bounds))
    assert all(0 < stop - start <= batch_size + 1 for start, stop in bounds)


@given(st.integers(1, 300), st.integers(1, 60))
def test_parts_start_at_even_rows_if_each_can_have_two(length: int, parts: int) -> None:
    starts = {cut(length, parts, number)[0] for number in range(parts)}
    assert length < 2 * parts or all(start % 2 == 0 for start in starts)


@pytest.mark.parametrize("repeats", [1, 3])
def test_no_pair_is_cut_by_a_step_or_a_process(repeats: int) -> None:
    """So no partner is read twice. 54 images in 6 steps are 9 a step, and 3 processes get 3 of them each."""
    config = HELD_VIEW.model_copy(update={"repeated_aug": repeats})
    for rank in range(3):
        loader = TrainLoader(HeldImages(54), config, batch_size=9, seed=0, rank=rank, world=3)
        for step in range(loader.steps_per_epoch):
            raw = loader.batch(step)
            assert len(raw.index_M) == len(raw.partner_B), (rank, step)


WATCHED = """
import random, numpy as np, torch
from tests.views.test_loader import PHOTO_VIEW, Photos, Preprocessing, TrainLoader, augment_and_mix, evaluation_batches

states = lambda: (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
config = PHOTO_VIEW.model_copy(update={"three_augment": True, "colour_jitter": 0.3, "random_erasing_prob": 1.0})
preprocessing = Preprocessing(image_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
before = states()
for workers in (0, 2):
    for raw in TrainLoader(Photos(20), config, batch_size=10, seed=0, workers=workers).batches(0, 2):
        augment_and_mix(raw, config)
    assert states() == before, f"training, {workers} workers"
    assert len(list(evaluation_batches(Photos(10), preprocessing, batch_size=5, workers=workers))) == 2
    assert states() == before, f"evaluation, {workers} workers"
"""


def test_no_global_random_generator_moves() -> None:
    """Nor is one read. In a process of its own, because the checks of types in this one draw from Python's generator."""
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", WATCHED], cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_unreadable_photo_counts_nothing_and_leaves_its_partner_unmixed() -> None:
    whole, broken = Photos(10), Photos(10, broken=frozenset({4}))
    rows = np.arange(10), np.zeros(10, np.int64)
    batch = augment_and_mix(raw_batch(broken, PHOTO_VIEW, *rows), PHOTO_VIEW)
    assert batch.weight_B.tolist() == [0.0 if index == 4 else 1.0 for index in range(10)]
    (partner,) = set(range(10)) & set(
        np.flatnonzero(raw_batch(whole, PHOTO_VIEW, *rows).partner_B.numpy() == 4).tolist()
    )
    assert batch.lam_B[partner] == 1
    other = augment_and_mix(raw_batch(whole, PHOTO_VIEW, *rows), PHOTO_VIEW)
    for row in set(range(10)) - {4, partner}:
        assert torch.equal(batch.images_BCHW[row], other.images_BCHW[row])


def test_evaluation_gives_every_image_in_order() -> None:
    preprocessing = Preprocessing(image_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875)
    batches = list(evaluation_batches(Photos(10, broken=frozenset({2})), preprocessing, batch_size=4))
    assert [len(images) for images, _, _ in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels, _ in batches]).tolist() == [index % 3 for index in range(10)]
    assert torch.cat([weight for _, _, weight in batches]).tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    assert all(images.min() >= 0 and images.max() <= 1 and images.shape[1:] == (3, 16, 16) for images, _, _ in batches)


def test_evaluation_of_held_photos_shows_what_is_predicted_from() -> None:
    """A network that cuts out the centre gets the centre, wherever the images are."""
    held = HeldImages(6, size=(12, 16), channels=3)
    cut_out = Preprocessing(image_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875)
    images = torch.cat([batch for batch, _, _ in evaluation_batches(held, cut_out, batch_size=4)])
    expected = [augment.center_view(held.read(k), (8, 8), 0.875, "bicubic") for k in range(6)]
    assert torch.equal(images, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2).float() / 255)


def test_shown_views_are_those_of_training() -> None:
    split = HeldImages(20)
    pixels = show_views(split, HELD_VIEW, [3, 7], 2)
    assert pixels.shape == (2, 2, 8, 8, 1)
    seen = np.frombuffer(epoch(split, HELD_VIEW, 1)[7, 1][0], np.float32).reshape(1, 8, 8)
    assert np.array_equal(pixels[1, 1, :, :, 0], np.round(seen[0] * 255).astype(np.uint8))


def test_an_interruption_while_workers_start_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, left = torch.multiprocessing.Queue, list[Any]()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it

    def interrupted_queue() -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return queue()

    monkeypatch.setattr(torch.multiprocessing, "Queue", interrupted_queue)
    monkeypatch.setattr(sys, "unraisablehook", left.append)
    loader = TrainLoader(Photos(31), PHOTO_VIEW, batch_size=10, seed=0, workers=1)
    try:
        with pytest.raises(KeyboardInterrupt):
            loader.batches(0, 3)
    finally:
        signal.signal(signal.SIGINT, before)
    gc.collect()
    assert not left
    assert not multiprocessing.active_children()


# What is in a data set.


class Broken(Split):
    """Six images of three classes; the first of class 0 cannot be read."""

    def __init__(self) -> None:
        self.channels = 3
        self.labels_N = np.array([2, 0, 0, 1, 0, 2])

    def read(self, position: int) -> NDArray[np.uint8]:
        if position == 1:
            raise UnreadableImage("train[1]: broken")
        return np.full((4, 6, 3), position, np.uint8)

    def name(self, position: int) -> str:
        return f"train[{position}]"

    def content_hash(self) -> str:
        return ""


def test_the_first_readable_image_of_every_class_comes_first() -> None:
    assert one_of_each_class(Broken(), 3) == [3, 0, 2]
    assert sorted(one_of_each_class(Broken(), 10)) == [0, 2, 3, 4, 5]


def test_a_description_counts_images_by_class_and_leaves_the_test_split_closed() -> None:
    dataset = load_data("digits", DataConfig())
    opened: list[str] = []
    watched = type(dataset)(
        **{**dataset.__dict__, "open_split": lambda name: (opened.append(name), dataset.open_split(name))[1]}
    )
    facts = describe(watched)
    assert set(opened) == {"train", "val"}
    assert sum(counts["train"] for counts in facts["classes"].values()) == facts["images"]["train"]
    assert list(facts["classes"]) == list(dataset.classes)
    assert facts["sizes"] == {"height": [8, 8], "width": [8, 8]}


def test_a_sheet_shows_each_image_at_its_place_magnified() -> None:
    config = ViewConfig(augment="none", crop="none", flip_prob=0.0, view_size=(4, 6), crop_padding=0)
    picture = view_sheet(Broken(), config, [0, 3, 5], 1)
    height, width = 11 * 4 + 2, 11 * 6 + 2
    assert picture.shape == (3 * height + 2, 2 * width + 2, 3)
    assert (picture[2 + height : 2 * height, 2 + width : 2 * width] == 3).all()
    assert (picture[2 + 2 * height : -2, 2:width] == 5).all()
    assert (picture[:2] == 255).all()


def test_without_augmentation_every_view_is_the_image_itself() -> None:
    split = load_data("digits", DataConfig()).open_split("train")
    config = ViewConfig(augment="none", crop="none", flip_prob=0.0, view_size=(8, 8), crop_padding=0)
    picture = view_sheet(split, config, [3, 5], 2)
    left, middle, right = (picture[2:, 2 + at * 66 : at * 66 + 66] for at in range(3))
    assert (left == middle).all()
    assert (left == right).all()
    assert left.std() > 0


def test_deit_data_show_prints_what_is_there_and_writes_a_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert cli.main(["data", "show", "digits", "--views", "2", "--train-images", "200", "--out", str(out)]) == 0
    page = capsys.readouterr().out
    assert "all      200" in page
    assert "test split: yes (not opened)" in page
    assert "8 x 8 pixels" in page
    with Image.open(out) as picture:
        assert picture.size[0] > 3 * 66 + 2  # names on the left, a title on top
        assert picture.size[1] > 10 * 66 + 2
    assert cli.main(["data", "show", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "digits"


def test_an_unreadable_image_takes_one_line_whatever_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shade, name in enumerate(("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "b/3.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 200 + shade).save(tmp_path / name)
    bad = tmp_path / "a" / "odd\n\x1b[31m.png"
    bad.write_bytes(b"no image")
    assert cli.main(["data", "show", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["unreadable: 1", rf"  {tmp_path}/a/odd\n\x1b[31m.png: not an image of a known format"]


def test_a_sheet_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "no" / "sheet.png"
    assert cli.main(["data", "show", "digits", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"deit: error: --out {out}: cannot be written: No such file or directory\n"
