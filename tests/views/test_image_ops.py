"""Every image operation gives Pillow's own pixels: the tolerance of each is in TOLERANCE, and it is 0."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from deitkit.views import image_ops as ops

# Largest difference from Pillow in any pixel, by operation; what `deitkit.views.image_ops` promises.
TOLERANCE = {
    "invert": 0,
    "posterize": 0,
    "solarize": 0,
    "solarize_add": 0,
    "autocontrast": 0,
    "equalize": 0,
    "brightness": 0,
    "contrast": 0,
    "colour": 0,
    "sharpness": 0,
    "rotate": 0,
    "shear": 0,
    "translate": 0,
    "grey": 0,
    "blur": 0,
}
FILL = {"L": (117,), "RGB": (124, 116, 104)}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Real photos (two of scikit-learn's, and ImageNet's where the foolbox package is there) and hard synthetic ones."""
    from sklearn.datasets import load_sample_images

    images = [Image.fromarray(image) for image in load_sample_images().images]
    package = importlib.util.find_spec("foolbox")
    if package is not None and package.origin is not None:
        files = sorted((Path(package.origin).parent / "data").glob("imagenet_*.jpg"))[:6]
        images += [Image.open(path).convert("RGB") for path in files]
    images = [image.resize((97, 64), Image.Resampling.BICUBIC) for image in images]
    noise = np.random.default_rng(0).integers(0, 256, (64, 97, 3), dtype=np.uint8)
    two_values = np.where(noise > 200, 255, 3).astype(np.uint8)
    synthetic = (noise, noise // 25 + 100, two_values, np.full_like(noise, 77))
    return images + [Image.fromarray(image) for image in synthetic]


def check(name, photos, strengths, ours, theirs):
    """`ours(pixels, strength)` of the whole batch against `theirs(photo, strength)` of each, in RGB and grey."""
    for mode in ("RGB", "L"):
        images = [photo.convert(mode) for photo in photos]
        arrays = np.stack([np.asarray(image).reshape(64, 97, -1) for image in images])
        pixels_MCHW = torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()
        for strength in strengths:
            expected = np.stack([np.asarray(theirs(image, strength)).reshape(64, 97, -1) for image in images])
            found = ours(pixels_MCHW, strength).permute(0, 2, 3, 1).numpy()
            difference = np.abs(found.astype(int) - expected.astype(int)).max()
            assert difference <= TOLERANCE[name], f"{name} at {strength} in mode {mode}: {difference}"


def each(pixels_MCHW, strength):
    return torch.full((len(pixels_MCHW),), float(strength))


def matrix(pixels_MCHW, values):
    return torch.tensor([values] * len(pixels_MCHW), dtype=torch.float64)


def tabled(build):
    return lambda pixels, strength: ops.look_up(pixels, build(pixels, strength))


TABLES = {
    "invert": ([None], lambda p, _: ops.invert_table(p), lambda i, _: ImageOps.invert(i)),
    "autocontrast": ([None], lambda p, _: ops.autocontrast_table(p), lambda i, _: ImageOps.autocontrast(i)),
    "equalize": ([None], lambda p, _: ops.equalize_table(p), lambda i, _: ImageOps.equalize(i)),
    "posterize": ([1, 2, 4, 8], lambda p, s: ops.posterize_table(p, each(p, s)), ImageOps.posterize),
    "solarize": ([0, 26, 128, 256], lambda p, s: ops.solarize_table(p, each(p, s)), ImageOps.solarize),
    "solarize_add": (
        [0, 55, 110],
        lambda p, s: ops.solarize_add_table(p, each(p, s)),
        lambda i, s: i.point([min(255, v + s) if v < 128 else v for v in range(256)] * len(i.getbands())),
    ),
    "brightness": (
        [0.1, 0.37, 1.0, 1.9],
        lambda p, s: ops.brightness_table(p, each(p, s)),
        lambda i, s: ImageEnhance.Brightness(i).enhance(s),
    ),
    "contrast": (
        [0.1, 0.37, 1.0, 1.9],
        lambda p, s: ops.contrast_table(p, each(p, s)),
        lambda i, s: ImageEnhance.Contrast(i).enhance(s),
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_operations_by_table_equal_pillow(name, photos):
    strengths, build, theirs = TABLES[name]
    check(name, photos, strengths, tabled(build), theirs)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [("colour", ops.colour, ImageEnhance.Color), ("sharpness", ops.sharpness, ImageEnhance.Sharpness)],
)
def test_colour_and_sharpness_equal_pillow(name, ours, theirs, photos):
    strengths = [0.0, 0.1, 0.37, 1.0, 1.63, 1.9]
    check(name, photos, strengths, lambda p, s: ours(p, each(p, s)), lambda i, s: theirs(i).enhance(s))


def move(image, values):
    fill = FILL[image.mode] if image.mode == "RGB" else FILL["L"][0]
    return image.transform(image.size, Image.Transform.AFFINE, values, Image.Resampling.BILINEAR, fillcolor=fill)


@pytest.mark.parametrize("affine", [ops.affine, ops.affine_of_tensors])
def test_shearing_equals_pillow(photos, affine):
    def ours(pixels_MCHW, values):
        return affine(pixels_MCHW, matrix(pixels_MCHW, values), FILL["L" if pixels_MCHW.shape[1] == 1 else "RGB"])

    check("shear", photos, [ops.shear(s, 0.0) for s in (-0.3, 0.1, 0.27)], ours, move)
    check("shear", photos, [ops.shear(0.0, s) for s in (-0.3, 0.1, 0.27)], ours, move)


@pytest.mark.parametrize("offset", [(0, 0), (0, 13), (0, -44), (29, 0), (-5, 7), (64, 0), (-70, 0), (0, 97), (3, -120)])
def test_translating_equals_pillow(photos, offset):
    def ours(pixels_MCHW, values):
        fill = FILL["L" if pixels_MCHW.shape[1] == 1 else "RGB"]
        return ops.translate(pixels_MCHW, np.array([values] * len(pixels_MCHW)), fill)

    check("translate", photos, [offset], ours, lambda image, values: move(image, (1, 0, values[1], 0, 1, values[0])))


@pytest.mark.parametrize("affine", [ops.affine, ops.affine_of_tensors])
def test_rotating_equals_pillow(photos, affine):
    def ours(pixels_MCHW, degrees):
        turned = matrix(pixels_MCHW, ops.rotation(degrees, 97, 64))
        return affine(pixels_MCHW, turned, FILL["L" if pixels_MCHW.shape[1] == 1 else "RGB"])

    def theirs(image, degrees):
        fill = FILL[image.mode] if image.mode == "RGB" else FILL["L"][0]
        return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)

    check("rotate", photos, [-30.0, -13.37, 0.0, 5.0, 27.123], ours, theirs)


def test_grey_equals_pillow(photos):
    check("grey", photos, [None], lambda p, _: ops.grey(p), lambda i, _: ImageOps.grayscale(i).convert(i.mode))


def each_radius(pixels_MCHW, radius):
    return np.full(len(pixels_MCHW), radius)


def test_blurring_equals_pillow(photos):
    """3-Augment's radii from end to end, those where the box grows by a pixel, and larger ones."""
    radii = [*np.linspace(0.1, 2.0, 39).tolist(), 0.8164965, 0.8164967, 1.4142135, 1.4142137, 3.3, 20.0]
    check("blur", photos, radii, lambda p, s: ops.blur(p, each_radius(p, s)), lambda i, s: blurred(i, s))


def blurred(image, radius):
    return image.filter(ImageFilter.GaussianBlur(radius))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 2), (4, 4)])
def test_blurring_images_smaller_than_the_box_equals_pillow(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for radius in (0.1, 0.9, 2.0, 9.0):
        ours = ops.blur(torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(), np.array([radius]))
        assert np.array_equal(ours[0].permute(1, 2, 0).numpy(), np.asarray(blurred(Image.fromarray(pixels), radius)))


def test_each_image_is_blurred_by_its_own_radius():
    pixels_MCHW = torch.randint(0, 256, (30, 3, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    radii = np.linspace(0.1, 2.0, 30)[np.random.default_rng(0).permutation(30)]
    together = ops.blur(pixels_MCHW, radii)
    alone = [ops.blur(pixels_MCHW[row : row + 1], radii[row : row + 1]) for row in range(30)]
    assert torch.equal(together, torch.cat(alone))
    assert ops.blur(pixels_MCHW[:0], radii[:0]).shape == (0, 3, 9, 11)


def test_images_too_small_to_sharpen_stay():
    pixels_MCHW = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    assert torch.equal(ops.sharpness(pixels_MCHW, torch.tensor([1.9])), pixels_MCHW)


def test_images_keep_their_places_whatever_their_groups_do():
    pixels_MCHW = torch.randint(0, 100, (10, 1, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    group = np.array([2, 2, 0, 2, 2, 2, 2, 0, 2, 2])  # nothing is in group 1
    seen = []

    def add(amount):
        return lambda chosen, rows: (seen.extend(rows.tolist()), chosen + amount)[1]

    result = ops.in_groups(pixels_MCHW, [(group == number, add(number + 1)) for number in range(3)])
    assert torch.equal(result, pixels_MCHW + torch.from_numpy(group + 1)[:, None, None, None].to(torch.uint8))
    assert sorted(seen) == list(range(10))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), st.integers(-20, 20), st.integers(-20, 20))
@settings(max_examples=100, deadline=None)
def test_a_shift_sees_what_numpys_reflecting_pad_shows(height, width, padding, down, right):
    padding = max(padding, abs(down), abs(right))
    image = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    padded = np.pad(image, padding, mode="reflect")
    expected = padded[padding + down :, padding + right :][:height, :width]
    ours = ops.window(torch.from_numpy(image)[None, None], np.array([[down, right]]), (height, width))
    assert np.array_equal(ours[0, 0].numpy(), expected)
