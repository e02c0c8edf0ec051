"""A view depends on (view_seed, view, index) and on nothing else; crops and erasing follow their published rules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision import transforms

from deitkit import rng
from deitkit.config import AUGMENT_PRESETS, ViewConfig
from deitkit.randaugment import RandAugment, parse_randaugment
from deitkit.views import augment as aug
from deitkit.views import loader as feed
from deitkit.views import mixup as mixing
from deitkit.views.image_ops import resample

EVERYTHING = ViewConfig(
    augment="deit",
    view_seed=3,
    randaugment="rand-n4-p0.9",
    three_augment=True,
    colour_jitter=0.4,
    random_erasing_prob=0.6,
)
SIZES = [(3, 32, 32), (1, 28, 28), (3, 40, 24), (1, 8, 8), (3, 2, 5), (1, 1, 1)]


def pixels(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return np.array(load_sample_image("china.jpg"))


@pytest.mark.parametrize("size", SIZES)
def test_a_view_is_the_same_in_any_batch(size):
    images = pixels(16, *size)
    index, view = np.arange(16) * 17, np.arange(16) % 5
    whole = aug.augment(images, index, view, EVERYTHING)
    for batch in (1, 7):
        for start in range(0, 16, batch):
            part = slice(start, start + batch)
            assert torch.equal(aug.augment(images[part], index[part], view[part], EVERYTHING), whole[part])
    order = np.random.default_rng(0).permutation(16)
    shuffled = aug.augment(images[torch.from_numpy(order)], index[order], view[order], EVERYTHING)
    assert torch.equal(shuffled, whole[torch.from_numpy(order)])


def test_a_view_is_the_same_with_any_number_of_threads():
    images = pixels(48, 3, 48, 48)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(aug.augment(images, np.arange(48), np.zeros(48, int), EVERYTHING))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_seed_view_and_index_each_change_the_view():
    images = pixels(1, 3, 32, 32).expand(40, -1, -1, -1)
    base = aug.augment(images, np.arange(40), np.zeros(40, int), EVERYTHING)
    other_view = aug.augment(images, np.arange(40), np.ones(40, int), EVERYTHING)
    other_seed = aug.augment(images, np.arange(40), np.zeros(40, int), EVERYTHING.model_copy(update={"view_seed": 4}))
    assert len(torch.unique(base.flatten(1), dim=0)) == 40
    assert not (base == other_view).flatten(1).all(1).any()
    assert not (base == other_seed).flatten(1).all(1).any()


@pytest.mark.parametrize("config", [EVERYTHING, *AUGMENT_PRESETS.values()])
def test_the_input_is_left_as_it_is(config):
    images = pixels(16, 3, 16, 16)
    before = images.clone()
    aug.augment(images, np.arange(16), np.zeros(16, int), config)
    assert torch.equal(images, before)


def test_nothing_switched_on_changes_nothing():
    images = pixels(16, 3, 16, 16)
    assert torch.equal(aug.augment(images, np.arange(16), np.zeros(16, int), AUGMENT_PRESETS["none"]), images)


def test_index_and_view_may_be_tensors():
    images = pixels(8, 3, 16, 16)
    arrays = aug.augment(images, np.arange(8), np.ones(8, int), EVERYTHING)
    assert torch.equal(aug.augment(images, torch.arange(8), torch.ones(8, dtype=torch.int64), EVERYTHING), arrays)


def test_half_of_the_images_are_mirrored_unless_told_otherwise():
    images = pixels(1, 1, 4, 6).expand(2000, -1, -1, -1)
    for probability, expected in ((None, 0.5), (0.1, 0.1), (0.0, 0.0), (1.0, 1.0)):
        config = ViewConfig(flip_prob=probability)
        result = aug.augment(images, np.arange(2000), np.zeros(2000, int), config)
        mirrored = (result == images.flip(-1)).flatten(1).all(1)
        assert (mirrored | (result == images).flatten(1).all(1)).all()
        assert abs(mirrored.double().mean().item() - expected) < 0.05


def test_images_of_two_channels_are_refused():
    with pytest.raises(ValueError, match="grey or RGB"):
        aug.augment(pixels(2, 2, 8, 8), [0, 1], [0, 0], EVERYTHING)


# Stage one.


def boxes(config, index_M, sizes_M2):
    """View 0's areas of images of these sizes (height, width)."""
    drawn = aug.crop_draws(config.model_copy(update={"crop": "resize"}), 0, index_M)
    sizes = np.asarray(sizes_M2).tolist()
    return np.array([aug.crop_box(row, tuple(size), config) for row, size in zip(drawn, sizes, strict=True)])


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_crop_boxes_lie_inside_the_image(height, width, index):
    left, top, box_width, box_height = boxes(ViewConfig(), [index], [(height, width)])[0]
    assert 0 <= left <= left + box_width <= width
    assert 0 <= top <= top + box_height <= height
    assert box_width >= 1
    assert box_height >= 1


def test_crop_boxes_have_the_settings_areas_and_shapes():
    n = 5000
    config = ViewConfig(crop_area=(0.08, 0.5))
    left, top, width, height = boxes(config, np.arange(n), np.full((n, 2), 1000)).T
    share, aspect = width * height / 1e6, width / height
    assert share.min() > 0.079
    assert share.max() < 0.501
    assert abs(share.mean() - 0.29) < 0.01
    assert 0.74 < aspect.min() < 0.76
    assert 1.32 < aspect.max() < 1.34
    assert abs(np.log(aspect).mean()) < 0.01
    assert abs((left / (1000 - width)).mean() - 0.5) < 0.02
    assert abs((top / (1000 - height)).mean() - 0.5) < 0.02


def test_images_that_no_box_fits_get_the_largest_centred_one():
    found = boxes(ViewConfig(crop_area=(0.9, 1.0)), [0, 1], np.array([(10, 1000), (900, 10)]))
    assert found.tolist() == [[493, 0, 13, 10], [0, 443, 10, 13]]


def test_boxes_do_not_depend_on_their_batch():
    sizes = np.random.default_rng(0).integers(20, 500, (50, 2))
    whole = boxes(EVERYTHING, np.arange(50), sizes)
    alone = [boxes(EVERYTHING, [i], sizes[i : i + 1])[0] for i in range(50)]
    assert np.array_equal(whole, np.stack(alone))


@pytest.mark.parametrize(
    ("interpolation", "size"),
    [
        ("nearest", (48, 64)),
        ("bilinear", (48, 64)),
        ("bilinear", (600, 280)),
        ("bicubic", (48, 64)),
        ("bicubic", (600, 280)),
    ],
)
def test_a_resized_image_is_nearly_pillows(photo, interpolation, size):
    ours = resample(torch.from_numpy(photo).permute(2, 0, 1)[None], size, interpolation)[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(photo).resize(size[::-1], Image.Resampling[interpolation.upper()]))
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.mean() < 0.2
    assert difference.max() <= 15


def test_a_crop_shows_the_area_that_was_drawn(photo):
    config = ViewConfig(crop="resize", view_size=(24, 36))
    drawn = aug.crop_draws(config, [1], [5])[0]
    left, top, width, height = aug.crop_box(drawn, photo.shape[:2], config)
    area = torch.from_numpy(photo[top : top + height, left : left + width]).permute(2, 0, 1)[None]
    assert torch.equal(aug.crop_image(photo, drawn, config), resample(area, (24, 36), "bicubic")[0])


@pytest.mark.parametrize("crop", ["none", "pad", "resize", "simple"])
def test_a_cropped_image_has_the_views_size_and_its_own_channels(photo, crop):
    config = ViewConfig(crop=crop, crop_padding=4 / 24, view_size=(24, 36))
    drawn = aug.crop_draws(config, [1], [5])[0]
    assert aug.crop_image(photo, drawn, config).shape == (3, 24, 36)
    assert aug.crop_image(photo[..., :1], drawn, config).shape == (1, 24, 36)


def test_one_image_is_padded_and_cut_as_in_a_batch():
    images = pixels(6, 3, 16, 16)
    config = ViewConfig(crop="pad", crop_padding=4 / 16, view_size=(16, 16))
    batch = aug.padded_crop(images, np.arange(6), np.full(6, 2), config)
    drawn = aug.crop_draws(config, np.full(6, 2), np.arange(6))
    alone = [aug.crop_image(image.permute(1, 2, 0).numpy(), drawn[i], config) for i, image in enumerate(images)]
    assert torch.equal(batch, torch.stack(alone))


def shifts(config, view_M, index_M):
    """How far (down, right) images are shifted that are padded by 4 pixels: an image whose pixels are numbered shows it."""
    down, right = np.indices((9, 9), np.uint8)
    images = torch.from_numpy(np.stack([down, right, right])).expand(len(index_M), -1, -1, -1)
    padded = config.model_copy(update={"crop": "pad", "crop_padding": 4 / 9})
    return aug.padded_crop(images, index_M, view_M, padded)[:, :2, 4, 4].numpy().astype(np.int64) - 4


def test_shifts_reach_all_of_the_padding():
    values, counts = np.unique(shifts(ViewConfig(), np.zeros(3000, int), np.arange(3000)), return_counts=True)
    assert values.tolist() == list(range(-4, 5))
    assert counts.min() > 550


@pytest.mark.parametrize(("size", "fraction"), [(224, 0.875), (96, 1.0), (33, 0.9), (33, 0.97)])
def test_an_evaluation_view_is_torchvisions(photo, size, fraction):
    theirs = transforms.Compose(
        [
            transforms.Resize(int(size / fraction), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
        ]
    )
    for image in (photo, photo.transpose(1, 0, 2), photo[:301, :301]):
        ours = aug.center_view(image, (size, size), fraction, "bicubic")
        assert np.array_equal(ours, np.asarray(theirs(Image.fromarray(image))))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_an_evaluation_view_has_the_size_asked_for(height, width, out_height, out_width):
    image = np.zeros((height, width, 1), np.uint8)
    assert aug.center_view(image, (out_height, out_width), 0.875).shape == (out_height, out_width, 1)


# RandAugment.

TWO = RandAugment(n=2)
DRAWN = 6000


@pytest.fixture(scope="module")
def drawn() -> aug.Draws:
    return aug.draws(TWO, 0, np.zeros(DRAWN, np.int64), np.arange(DRAWN))


def test_half_of_the_operations_are_applied_and_all_are_equally_likely(drawn):
    applied = drawn.operation >= 0
    assert abs(applied.mean() - 0.5) < 4 * 0.5 / np.sqrt(2 * DRAWN)
    counts = np.bincount(drawn.operation[applied], minlength=15)
    assert len(counts) == len(aug.OPERATIONS) == 15
    assert stats.chisquare(counts).pvalue > 1e-3


def test_magnitudes_are_normal_about_nine_and_clipped_at_ten(drawn):
    assert drawn.magnitude.max() == 10.0
    assert stats.kstest(drawn.magnitude[drawn.magnitude < 10], stats.truncnorm(-18, 2, 9, 0.5).cdf).pvalue > 1e-3
    assert set(np.unique(drawn.sign)) == {-1.0, 1.0}
    assert abs(drawn.sign.mean()) < 4 / np.sqrt(2 * DRAWN)


def test_both_operations_of_an_image_are_drawn_apart(drawn):
    table = np.zeros((16, 16))
    np.add.at(table, (drawn.operation[:, 0], drawn.operation[:, 1]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_one_more_operation_leaves_those_before_it():
    more = aug.draws(RandAugment(n=5), 0, np.zeros(50, np.int64), np.arange(50))
    fewer = aug.draws(TWO, 0, np.zeros(50, np.int64), np.arange(50))
    assert all(np.array_equal(long[:, :2], short) for long, short in zip(more, fewer, strict=True))


def test_strengths_are_those_of_timm():
    timm = pytest.importorskip("timm.data.auto_augment")
    names = dict(zip(aug.OPERATIONS, timm._RAND_INCREASING_TRANSFORMS, strict=True))
    for operation, name in names.items():
        scale = timm.LEVEL_TO_ARG[name]
        if scale is None:
            continue
        for magnitude in (0.0, 2.6, 5.0, 8.3, 9.0, 9.99):
            allowed = {
                round(
                    float(scale(magnitude, {})[0] if isinstance(scale(magnitude, {}), tuple) else scale(magnitude, {})),
                    9,
                )
                for _ in range(40)
            }
            signs = np.array([-1.0, 1.0])
            ours = {
                round(float(value), 9)
                for value in aug.OPERATIONS[operation].strength(np.full(2, magnitude) / 10, signs)
            }
            assert ours == allowed, (operation, magnitude)


def test_posterize_never_asks_for_no_bits():
    assert aug.OPERATIONS["posterize"].strength(np.array([1.0]), np.array([1.0])) == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mixed_batch_gets_each_images_own_operation(channels):
    generator = torch.Generator().manual_seed(0)
    pixels_MCHW = torch.randint(20, 200, (32, channels, 20, 24), dtype=torch.uint8, generator=generator)
    numbers = np.arange(32) % 16 - 1
    level, sign = np.array([0.9]), np.array([1.0])
    operations = [None, *aug.OPERATIONS.values()]
    strength = np.array([0 if n < 0 else operations[n + 1].strength(level, sign)[0] for n in numbers.tolist()])
    together = aug.apply(pixels_MCHW, numbers, strength)
    for row, number in enumerate(numbers.tolist()):
        alone = aug.apply(pixels_MCHW[row : row + 1], numbers[row : row + 1], strength[row : row + 1])
        assert torch.equal(together[row], alone[0]), number
        unchanged = number < 0 or (channels == 1 and number == list(aug.OPERATIONS).index("colour"))
        assert torch.equal(together[row], pixels_MCHW[row]) == unchanged, number


# Erasing and jitter.


def test_erasing_fills_one_rectangle_of_the_settings_area():
    n, side = 1500, 64
    config = ViewConfig(flip_prob=0.0, random_erasing_prob=0.25)
    images = torch.zeros(n, 3, side, side, dtype=torch.uint8)
    changed = (aug.augment(images, np.arange(n), np.zeros(n, int), config) > 0).any(1)
    boxes = aug.erase_boxes(config, np.zeros(n, np.int64), np.arange(n), (side, side))
    erased = boxes[:, 2] > 0
    assert abs(erased.mean() - 0.25) < 0.05
    share = (boxes[:, 2] * boxes[:, 3] / side**2)[erased]
    assert share.min() > 0.018
    assert share.max() < 0.35
    for row, (left, top, width, height) in enumerate(boxes):
        inside = torch.zeros(side, side, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert not changed[row][~inside].any()
        assert changed[row][inside].all() or not inside.any() or changed[row][inside].double().mean() > 0.99


@pytest.mark.parametrize("channels", [1, 3])
def test_erasing_noise_is_normal_in_the_units_of_normalised_images(channels, monkeypatch):
    monkeypatch.setattr(aug, "_ERASE_AREA", (0.3, 0.33))
    config = ViewConfig(flip_prob=0.0, random_erasing_prob=1.0)
    images = torch.zeros(60, channels, 64, 64, dtype=torch.uint8)
    boxes = aug.erase_boxes(config, np.zeros(60, np.int64), np.arange(60), (64, 64))
    result = aug.augment(images, np.arange(60), np.zeros(60, int), config)
    noise = torch.cat(
        [image[:, y : y + h, x : x + w].flatten(1) for image, (x, y, w, h) in zip(result, boxes, strict=True)], 1
    )
    expected = {1: ((0.459, 0.226),), 3: ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))}[channels]
    for channel, (mean, std) in zip(noise.double() / 255, expected, strict=True):
        assert abs(channel.median() - mean) < 0.005
        assert abs((channel.quantile(0.8413) - channel.quantile(0.1587)) / 2 - std) < 0.005
    assert len(torch.unique(result.flatten(1), dim=0)) == 60
    if channels == 3:
        assert np.abs(np.corrcoef(noise.numpy()) - np.eye(3)).max() < 0.02


def test_jitter_is_pillows_brightness_then_contrast_then_colour(photo):
    from PIL import ImageEnhance

    from deitkit import rng

    config = ViewConfig(flip_prob=0.0, colour_jitter=0.4, view_seed=1)
    image = Image.fromarray(photo).resize((64, 48))
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].expand(5, -1, -1, -1)
    result = aug.augment(images, np.arange(5), np.zeros(5, int), config)
    factors = 0.6 + 0.8 * rng.uniform(1, rng.Purpose.COLOUR_JITTER, 0, np.arange(5), 3)
    for row, (brightness, contrast, saturation) in zip(result, factors.tolist(), strict=True):
        expected = ImageEnhance.Brightness(image).enhance(brightness)
        expected = ImageEnhance.Contrast(expected).enhance(contrast)
        expected = ImageEnhance.Color(expected).enhance(saturation)
        assert np.array_equal(row.permute(1, 2, 0).numpy(), np.asarray(expected))


# 3-Augment and the simple crop of DeiT III.


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_three_augment_is_pillows_grey_solarise_or_blur(photo, mode):
    from PIL import ImageFilter, ImageOps

    n, width, height = 100, 240, 224  # the published radii are those of 224 pixels
    config = ViewConfig(flip_prob=0.0, three_augment=True, view_seed=2)
    image = Image.fromarray(photo).resize((width, height)).convert(mode)
    pixels_HWC = np.array(image).reshape(height, width, -1)
    images = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None].expand(n, -1, -1, -1)
    result = aug.augment(images, np.arange(n), np.full(n, 5), config)
    choice, radius = rng.uniform(2, rng.Purpose.THREE_AUGMENT, 5, np.arange(n), 2).T
    for row, number, blur in zip(result, (3 * choice).astype(int).tolist(), (0.1 + 1.9 * radius).tolist(), strict=True):
        made = (
            ImageOps.grayscale(image).convert(mode),
            ImageOps.solarize(image, 128),
            image.filter(ImageFilter.GaussianBlur(blur)),
        )[number]
        assert np.array_equal(row.permute(1, 2, 0).numpy(), np.asarray(made).reshape(height, width, -1))
    assert min(np.bincount((3 * choice).astype(int), minlength=3)) > 20


def test_three_augment_goes_before_the_jitter(photo):
    """As published: a grey image then stays grey, for the jitter of a grey one is that of its brightness and contrast."""
    config = ViewConfig(flip_prob=0.0, three_augment=True, colour_jitter=0.3)
    images = torch.from_numpy(photo[::8, ::8].copy()).permute(2, 0, 1)[None].expand(60, -1, -1, -1)
    arguments = np.arange(60), np.zeros(60, int)
    made = aug.augment(images, *arguments, config.model_copy(update={"colour_jitter": 0.0}))
    both = aug.augment(images, *arguments, config)
    jittered = aug.augment(made, *arguments, config.model_copy(update={"three_augment": False}))
    assert torch.equal(both, jittered)
    grey = (made == made[:, :1]).flatten(1).all(1)
    assert 8 < grey.sum() < 35
    assert (both[grey] == both[grey][:, :1]).all()


def cropped(image, index, view, config):
    """(H, W, C)"""
    drawn = aug.crop_draws(config, [view], [index])[0]
    return aug.crop_image(image, drawn, config).permute(1, 2, 0).numpy()


def simple(view_size, padding=4, **changes):
    return ViewConfig(crop="simple", crop_padding=padding / min(view_size), view_size=view_size, **changes)


@pytest.mark.parametrize("size", [(48, 48), (96, 96)])
def test_a_simple_crop_is_torchvisions_resize_and_a_window_of_its_reflecting_pad(photo, size):
    for image in (photo, photo.transpose(1, 0, 2), photo[:31, :57]):
        resize = transforms.Resize(size[0], transforms.InterpolationMode.BICUBIC)
        whole = np.asarray(transforms.Pad(4, padding_mode="reflect")(resize(Image.fromarray(image))))
        windows = np.lib.stride_tricks.sliding_window_view(whole, (*size, 3)).squeeze(2)
        for index in range(5):
            ours = cropped(image, index, 0, simple(size))
            places = np.argwhere((windows[:, :, 0, 0] == ours[0, 0]).all(-1))
            assert any(np.array_equal(windows[top, left], ours) for top, left in places)


def test_simple_crops_reach_every_place_equally_often():
    """An image whose pixels are numbered shows where it was cut: 5 + 2 * 2 rows and 9 + 2 * 2 columns for a view of 5 x 5."""
    columns = np.tile(np.arange(9, dtype=np.uint8), (5, 1))
    rows = np.tile(np.arange(5, dtype=np.uint8)[:, None], (1, 9))
    image = np.stack([rows, columns, columns], axis=-1)
    crops = [cropped(image, index, 1, simple((5, 5), 2)) for index in range(4000)]
    seen, counts = np.unique([(*crop[:2, 2, 0], *crop[2, :2, 1]) for crop in crops], axis=0, return_counts=True)
    assert len(seen) == 5 * 9
    assert counts.min() > 4000 / 45 / 2


def test_a_simple_crop_of_an_image_of_the_views_size_is_a_padded_one():
    images = pixels(6, 3, 16, 16)
    padded = aug.padded_crop(images, np.arange(6), np.full(6, 2), ViewConfig(crop="pad", crop_padding=4 / 16))
    alone = [cropped(image.permute(1, 2, 0).numpy(), i, 2, simple((16, 16))) for i, image in enumerate(images)]
    assert np.array_equal(padded.permute(0, 2, 3, 1).numpy(), np.stack(alone))


def test_an_endless_image_is_cut_before_it_is_scaled_up():
    image = np.zeros((1, 200_000, 1), np.uint8)  # whole, at 64 rows, it would take 820 MB
    assert cropped(image, 0, 0, simple((64, 64))).shape == (64, 64, 1)
    assert aug._covering(image, (64, 64), "bicubic").shape[1] <= aug.LONGEST * 64


# What is drawn for a key stays what it is: a tape answers to views that are not stored, but made again.

THREE_OF_SIX = ViewConfig(view_seed=3, repeated_aug=3, views=6)
INDEX, VIEW = np.arange(40) * 1017, np.arange(40) % 7
NUMBERED = torch.from_numpy((np.arange(40 * 3 * 24 * 32) ** 2 % 251).astype(np.uint8)).view(40, 3, 24, 32)


def sha256(*whole: np.ndarray) -> str:
    """Of whole numbers, however many bytes each has here."""
    assert all(array.dtype.kind in "iub" for array in whole)
    return hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in whole)).hexdigest()


def drawn_operations() -> str:
    drawn = aug.draws(parse_randaugment(EVERYTHING.randaugment), EVERYTHING.view_seed, VIEW, INDEX)
    return sha256(drawn.operation, drawn.sign.astype(np.int64))


def mirrored_shifted_pixels() -> str:
    config = ViewConfig(view_seed=3, crop="pad", crop_padding=4 / 24)
    return sha256(aug.augment(aug.padded_crop(NUMBERED, INDEX, VIEW, config), INDEX, VIEW, config).numpy())


def grey_or_solarised_pixels() -> str:
    """But for those that 3-Augment blurs: the widths of its boxes are made of floats."""
    config = ViewConfig(view_seed=3, three_augment=True)
    kept = rng.uniform(3, rng.Purpose.THREE_AUGMENT, VIEW, INDEX, 2)[:, 0] < 2 / 3
    return sha256(aug.augment(NUMBERED, INDEX, VIEW, config).numpy()[kept])


def pixels_after(operation: str, strength: float) -> str:
    number = list(aug.OPERATIONS).index(operation)
    return sha256(aug.apply(NUMBERED, np.full(40, number), np.full(40, float(strength))).numpy())


COMPUTED: dict[str, Callable[[], str]] = {
    "words": lambda: sha256(*(rng.words(3, rng.Purpose(number), VIEW, INDEX, 6) for number in range(1, 17))),
    "noise": lambda: sha256(
        rng.noise_words(3, rng.Purpose.ERASE_NOISE, *map(torch.from_numpy, (VIEW, INDEX, INDEX))).numpy()
    ),
    "order": lambda: sha256(rng.permutation(3, rng.Purpose.ORDER, 5, 101)),
    "partners": lambda: sha256(mixing.pairing(3, 5, 101)),
    "epochs": lambda: sha256(*(part for epoch in range(7) for part in feed.epoch_rows(THREE_OF_SIX, 1, epoch, 101))),
    "mixup or CutMix": lambda: sha256(mixing.mix_draws(AUGMENT_PRESETS["deit"], VIEW, INDEX).cut),
    "shifts": lambda: sha256(shifts(ViewConfig(view_seed=3), VIEW, INDEX)),
    "cropped boxes": lambda: sha256(boxes(ViewConfig(view_seed=3), INDEX, np.full((40, 2), (120, 160)))),
    "erased boxes": lambda: sha256(aug.erase_boxes(EVERYTHING, VIEW, INDEX, (120, 160))),
    "operations": drawn_operations,
    "mirrored and shifted": mirrored_shifted_pixels,
    "grey or solarised": grey_or_solarised_pixels,
    "equalize": lambda: pixels_after("equalize", 0),
    "invert": lambda: pixels_after("invert", 0),
    "posterize": lambda: pixels_after("posterize", 3),
    "solarize": lambda: pixels_after("solarize", 90),
    "solarize_add": lambda: pixels_after("solarize_add", 60),
    "translate_x": lambda: pixels_after("translate_x", 0.3),
    "translate_y": lambda: pixels_after("translate_y", -0.3),
}
GOLDEN = {
    "words": "c84d9aa75bfcc5949bd791a0e3c10dcf2b8112c4b935831df23baffd65c43c30",
    "noise": "2d3c6b39e604702c1dbd9c1a46d892abb6730bd953cd65ac294f815de6f2eb58",
    "order": "1fac4833353c0cae9d213de059439bf8a3019129de6288ab2bd965125874ceb4",
    "partners": "315d67be9b9bd47aa1ba260048824543d34bf685ff7d78eb2a262f13d3466cc6",
    "epochs": "e9c3165ffa402b6f82e2e8e08b951b990932a7c2747878b508d5971a59e231a5",
    "mixup or CutMix": "e435b3a79a9555281e7b0ffbc055634c1e1e390765c1a067a0de33c9773eede5",
    "shifts": "ef395f80f3862cb51bb5b17197d8e0a26ee4990f33bb381928099a9d4b369f2d",
    "cropped boxes": "a547f2cf92d31cda8c75f7559ef1a738bfacea36dfce07fa3d1647f15a2740c6",
    "erased boxes": "397b7ef66888c10b29b7352d5eb5e494a6f955c987a830c253fd22a2222e09fa",
    "operations": "291e1557ad6720cb0dd342c5091454cad1cce2f34c906cac0ab4d89e123529e1",
    "mirrored and shifted": "954ee4604eed391fbcab0cb679feed00c21162dea3a30d470392d67279e82602",
    "grey or solarised": "38982d95f324d1921eceb3f0091974188d39b9381af302fd473cd6fe1bd436e1",
    "equalize": "c429979482f9a99909dc04bdcc1265e9e2ece8d58b8bfa0f91f4789d80faa6e9",
    "invert": "502c89ba1258520c3f7c03bc8227b0df863e79c2a7aadd7a42d0c18bdbfb58fd",
    "posterize": "fbc9be40d83c3c0f442deab7de392930fc3866100e03cd352aaa11ed75c64088",
    "solarize": "9097358876ecfaf5e5965b3342e7be44c649d18cb7dfddb5f04b8812a10b1fe3",
    "solarize_add": "75beea825ae522a6c5bc8da58c32ec15fb23788143dd41fb46368708e0bd2161",
    "translate_x": "f978dae86ff500ca6a936e12a31d8c32b3189b2fee29b569cbad597ccc2be431",
    "translate_y": "4e38922e736d7e99957595a9f522775f4a69d848d9bc92208b6f244068793949",
}


@pytest.mark.parametrize("name", COMPUTED)
def test_views_of_a_key_stay_what_they_are(name):
    """Whole numbers alone, of whole numbers or of single, exactly rounded operations on floats: any processor has the same. Boxes
    come of logarithms and roots, but are rounded; none of these lies within 1e-4 of where it would be rounded otherwise."""
    assert COMPUTED[name]() == GOLDEN[name]
