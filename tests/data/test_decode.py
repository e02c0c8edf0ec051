"""Every kind of image file becomes the right upright pixels, or an UnreadableImage that says why."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from tests.data.test_folder import COLOUR, GREY, RANDOM, MakeFolder, load

from deitkit.data import UnreadableImage
from deitkit.data.decode import Shape, decode, probe, with_channels


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bit_depth: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file written by hand, for what Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *(chunk(*entry) for entry in chunks), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_colour_comes_back_pixel_for_pixel(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(saved(Image.fromarray(COLOUR), kind, **options), "x"), COLOUR)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_pixels_are_contiguous_and_writable_as_torch_wants_them(mode: str) -> None:
    image = Image.new(mode, (5, 3)) if mode != "I;16" else Image.fromarray(np.zeros((3, 5), np.uint16))
    for pixels in (decode(saved(image), "x"), with_channels(decode(saved(image), "x"), 1)):
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous


def test_grey_stays_grey_with_one_channel() -> None:
    np.testing.assert_array_equal(decode(saved(Image.fromarray(GREY)), "x"), GREY[..., None])


def test_one_bit_becomes_black_and_white() -> None:
    bits = GREY > 127
    np.testing.assert_array_equal(decode(saved(Image.fromarray(bits)), "x"), (bits * 255)[..., None])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65278, 65407, 65535]], np.uint16)
    pixels = decode(saved(Image.fromarray(values), kind), "x")
    np.testing.assert_array_equal(pixels[0, :, 0], np.rint(values[0] / 257))
    assert pixels.max() == 255


def test_sixteen_bit_pgm_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    content = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(content, "x")[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(dtype: type[np.generic]) -> None:
    content = saved(Image.fromarray(GREY.astype(dtype)), "TIFF")
    for read in (lambda: decode(content, "scan.tif"), lambda: probe(content, "scan.tif", whole=False)):
        with pytest.raises(UnreadableImage, match=r"scan\.tif: .*no known range"):
            read()


def test_cmyk_becomes_rgb() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))  # magenta and yellow ink: red
    for content in (saved(cmyk, "TIFF"), saved(cmyk, "JPEG", quality=95)):
        pixels = decode(content, "x")
        assert pixels.shape == (4, 4, 3)
        np.testing.assert_allclose(pixels[0, 0].astype(int), [255, 0, 0], atol=3)


def test_palette_becomes_its_colours() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    np.testing.assert_array_equal(decode(saved(image), "x")[0], [[10, 20, 30], [40, 50, 60], [70, 80, 90]])


def test_transparent_palette_entry_becomes_white() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    for kind in ("PNG", "GIF"):
        pixels = decode(saved(image, kind, transparency=1), "x")
        np.testing.assert_array_equal(pixels[0], [[10, 20, 30], [255, 255, 255]])


def test_alpha_is_laid_over_white() -> None:
    pixels = np.array([[[0, 100, 200, 255], [0, 100, 200, 0], [0, 100, 200, 51]]], np.uint8)
    expected = [[0, 100, 200], [255, 255, 255], [204, 224, 244]]  # 0.2 * colour + 0.8 * 255
    np.testing.assert_array_equal(decode(saved(Image.fromarray(pixels, "RGBA")), "x")[0], expected)


def test_grey_with_alpha_is_laid_over_white_and_stays_grey() -> None:
    pixels = np.array([[[100, 255], [100, 0], [100, 51]]], np.uint8)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(pixels, "LA")), "x")[0, :, 0], [100, 255, 224])


@pytest.mark.parametrize(("mode", "expected"), [("L", [[9], [255]]), ("RGB", [[9, 9, 9], [255, 255, 255]])])
def test_a_colour_declared_transparent_becomes_white(mode: str, expected: list[list[int]]) -> None:
    image = Image.fromarray(np.array([[9, 7]], np.uint8)).convert(mode)
    key = 7 if mode == "L" else (7, 7, 7)
    np.testing.assert_array_equal(decode(saved(image, transparency=key), "x")[0], expected)


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    row = b"\0" + struct.pack(">6H", 0x1200, 0x34FF, 0xFFFF, 0, 0x80FF, 0x0100)
    pixels = decode(png(2, 1, 16, 2, (b"IDAT", zlib.compress(row))), "x")
    np.testing.assert_array_equal(pixels[0], [[0x12, 0x34, 0xFF], [0, 0x80, 0x01]])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_the_probe_knows(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(COLOUR), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert upright is not None
    pixels = decode(content, "x")
    np.testing.assert_array_equal(pixels, np.asarray(upright.convert("RGB")))
    assert pixels.shape[:2] == ((9, 6) if orientation >= 5 else (6, 9))
    for whole in (True, False):
        assert probe(content, "x", whole=whole) == Shape(*pixels.shape)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow's, from within Image.open
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_counts_as_upright(exif: bytes) -> None:
    assert decode(saved(Image.fromarray(COLOUR), "JPEG", exif=exif), "x").shape == COLOUR.shape


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_probe_and_decode_agree_on_the_shape(mode: str) -> None:
    image = Image.new(mode, (5, 3)) if mode != "I;16" else Image.fromarray(np.zeros((3, 5), np.uint16))
    content = saved(image, "TIFF" if mode == "CMYK" else "PNG")
    shape = Shape(*decode(content, "x").shape)
    assert probe(content, "x", whole=False) == probe(content, "x", whole=True) == shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_file_is_found_by_probe_and_decode_alike(kind: str) -> None:
    content = saved(Image.fromarray(RANDOM.integers(0, 256, (64, 48, 3), np.uint8)), kind)
    decode(content, "x")
    for share in (0.2, 0.5, 0.9, 0.99):
        cut = content[: int(len(content) * share)]
        for read in (lambda cut=cut: decode(cut, "dog.img"), lambda cut=cut: probe(cut, "dog.img", whole=True)):
            with pytest.raises(UnreadableImage, match=r"^dog\.img: "):
                read()


def test_progressive_jpeg_that_is_truncated_is_found() -> None:
    content = saved(Image.fromarray(RANDOM.integers(0, 256, (64, 48, 3), np.uint8)), "JPEG", progressive=True)
    with pytest.raises(UnreadableImage, match="truncated"):
        probe(content[:-40], "x", whole=True)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "the file is empty"), (b"hello, world", "not an image"), (b"\xff\xd8\xffgarbage", "."), (b"RIFFxxxx", ".")],
)
def test_what_is_no_image_is_named_with_the_reason(content: bytes, why: str) -> None:
    with pytest.raises(UnreadableImage, match=f"^cat/1.jpg: .*{why}"):
        decode(content, "cat/1.jpg")


def test_decompression_bomb_is_refused_by_its_header() -> None:
    content = png(60_000, 60_000, 8, 0, (b"IDAT", zlib.compress(b"\0")))
    for read in (lambda: decode(content, "bomb.png"), lambda: probe(content, "bomb.png", whole=False)):
        with pytest.raises(UnreadableImage, match=r"bomb\.png: too large \(3600000000 pixels, see --max-pixels\)"):
            read()


def test_missing_file_is_an_unreadable_image(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="no such file"):
        decode(tmp_path / "gone.png", "gone.png")


def test_channels_are_changed_both_ways() -> None:
    grey = GREY[..., None]
    np.testing.assert_array_equal(with_channels(grey, 3), np.repeat(grey, 3, -1))
    np.testing.assert_array_equal(with_channels(with_channels(grey, 3), 1), grey)
    assert with_channels(COLOUR, 3) is COLOUR


@pytest.mark.parametrize(("bits", "most"), [(10, 1023), (12, 4095), (14, 16383), (16, 65535)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_more_than_eight_bits_is_divided_by_the_range_that_it_uses(kind: str, bits: int, most: int) -> None:
    values = np.array([[0, most // 3, most // 2, most - 1, most]], np.uint16)
    pixels = decode(saved(Image.fromarray(values), kind), "x")
    np.testing.assert_array_equal(pixels[0, :, 0], np.rint(values[0] * (255 / most)))
    barely = decode(saved(Image.fromarray(np.array([[most + 1 if bits < 16 else most, 0]], np.uint16)), kind), "x")
    assert barely.max() == (255 if bits == 16 else round((most + 1) * 255 / (4 * most + 3)))


def test_images_that_are_nearly_black_are_told(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 6, "b": 6})
    for path in root.rglob("*.png"):
        Image.fromarray(RANDOM.integers(0, 30, (6, 5), np.uint8)).save(path)
    (line,) = load(root).remarks
    assert line.startswith("images are nearly black: 8 of 8 have no value above 31 of 255, such as ")
    for path in root.rglob("*.png"):
        Image.fromarray(RANDOM.integers(0, 30, (6, 5), np.uint16) * 128).save(path)  # of 12 bits
    assert load(root).remarks == []


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "content"),
    [(b"zTXt", b"Comment\0\0"), (b"iCCP", b"x\0\0"), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0")],
)
def test_texts_and_profiles_of_any_size_are_skipped(kind: bytes, content: bytes, place: str) -> None:
    plain = saved(Image.fromarray(COLOUR))
    text = content + zlib.compress(b"a" * 3_000_000)
    chunk = struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text))
    cut = 33 if place == "before" else len(plain) - 12  # behind the header, or in front of the end
    image = plain[:cut] + chunk + plain[cut:]
    np.testing.assert_array_equal(decode(image, "x"), COLOUR)
    assert probe(image, "x", whole=True) == Shape(*COLOUR.shape)
    with pytest.raises(UnreadableImage):
        probe(image[: len(image) // 2] if place == "before" else image[:40], "x", whole=True)


def test_how_large_an_image_may_be_is_a_setting(make_folder: MakeFolder, recwarn: pytest.WarningsRecorder) -> None:
    root = make_folder({"train/a": 5, "train/b": 5})
    Image.new("1", (11_000, 10_000), 1).save(root / "train/a/large.png", compress_level=1)
    dataset = load(root)
    assert dataset.bad_images == ()
    assert not recwarn.list
    (line,) = load(root, max_pixels=109_999_999).bad_images
    assert line == f"{root / 'train/a/large.png'}: too large (110000000 pixels, --max-pixels is 109999999)"
    assert load(root, max_pixels=110_000_000).bad_images == ()
