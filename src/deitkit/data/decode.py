"""The bytes of an image file as upright pixels.

Every file is decoded by one rule. Grey (C = 1) are the modes that hold no colour: 1-bit, 8-bit and 16-bit grey, with or
without alpha. Everything else is RGB (C = 3), palettes included. Transparency is laid over white. Of several frames the first counts.

Grey of more than 8 bits is divided by the largest value of 10, 12, 14 or 16 bits, whichever is the smallest that holds the image's
brightest pixel: files of 16 bits do not say how many of them the camera or scanner has used.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from deitkit.config import MAX_PIXELS
from deitkit.waiting import waiting_for

with contextlib.suppress(ImportError):  # HEIC, the photos of telephones, where it is installed
    importlib.import_module("pillow_heif").register_heif_opener()

ResultT = TypeVar("ResultT")
ImageFile = Path | bytes | memoryview
"""An image file, or its content."""
NOT_PIXELS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow recognises and does not decode, or only by another program."""
_ORIENTATION = 0x0112  # the tag's number in EXIF 2.3, table 4
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I"})
_GREY_BITS = (10, 12, 14, 16)
_MAY_HOLD_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_PIXMAP = re.compile(rb"P([56]) (\d{1,5}) (\d{1,5}) 255\n")
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (
    b"iCCP",
    b"iTXt",
    b"tEXt",
    b"zTXt",
)  # chunks of a PNG that say nothing of its pixels, see PNG specification, chapter 11

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_open` has a limit that can be set


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message names it and says why."""


class Shape(NamedTuple):
    """The shape that an image will have when it is read."""

    height: int
    width: int
    channels: int


def with_channels(pixels_HWC: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """The image with 1 or 3 channels; colour becomes grey by ITU-R BT.601, as Pillow does it."""
    if pixels_HWC.shape[-1] == channels:
        return pixels_HWC
    if channels == 3:
        return np.repeat(pixels_HWC, 3, axis=-1)
    return np.array(Image.fromarray(pixels_HWC).convert("L"))[..., None]


def decode(source: ImageFile, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The upright pixels: uint8 of shape (H, W, C), C = 1 where the file holds no colour, else 3.

    Raises UnreadableImage, whose message is `name: why`."""
    if not isinstance(source, Path) and (pixmap := _plain_pixmap(source)) is not None:
        return pixmap
    try:
        return _opened(source, max_pixels, upright_pixels)
    except Exception as error:  # Pillow's plugins raise anything from OSError to SyntaxError and struct.error
        raise _unreadable(error, name) from error


def upright_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """`decode` for an image that Pillow has opened or made. Raises whatever Pillow does, ValueError for unknown ranges."""
    image.load()
    if not image.width * image.height:
        raise ValueError("it has no pixels")
    # Pillow's memory is read-only, which torch.from_numpy warns about.
    return np.require(_upright(_pixels(image), _orientation(image)), requirements=["C", "W"])


def probe(source: ImageFile, name: str, *, whole: bool, max_pixels: int = MAX_PIXELS) -> Shape:
    """What `decode` would return the shape of. Raises UnreadableImage.

    `whole=False` reads the header alone; `whole=True` also runs through all of the file's data, and so finds
    truncated ones. JPEGs are run through at an eighth of their size, which reads every byte all the same."""
    try:
        return _opened(source, max_pixels, lambda image: _shape(image, whole=whole))
    except Exception as error:
        raise _unreadable(error, name) from error


def _shape(image: Image.Image, *, whole: bool) -> Shape:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        whole = True  # only decoding tells whether the range is known
    (width, height), mode = image.size, image.mode
    if whole:
        if image.format in ("JPEG", "MPO"):
            image.draft(image.mode, (max(width // 8, 1), max(height // 8, 1)))
        image.load()
        if image.format == "TIFF":  # Pillow turns these itself while it loads them
            width, height = image.size
        if mode in ("I", "F"):
            _pixels(image)
    if _orientation(image) >= 5:
        width, height = height, width
    return Shape(height, width, 1 if mode in _GREY_MODES else 3)


def stored_size(content: bytes, formats: tuple[str, ...]) -> tuple[int, int]:
    """Width and height by the header of an image file in one of these formats (Pillow's names); no pixel is decoded. Raises whatever
    Pillow does."""

    def size(source: ImageFile) -> tuple[int, int]:
        assert not isinstance(source, Path)
        with Image.open(io.BytesIO(source), formats=formats) as image:
            return image.size

    return _or_without_texts(content, size)


def _opened(source: ImageFile, max_pixels: int, use: Callable[[Image.Image], ResultT]) -> ResultT:
    """`use` of the image."""

    def opened(source: ImageFile) -> ResultT:
        with _open(source, max_pixels) as image:
            return use(image)

    with waiting_for(source) if isinstance(source, Path) else contextlib.nullcontext():
        return _or_without_texts(source, opened)


def _or_without_texts(source: ImageFile, read: Callable[[ImageFile], ResultT]) -> ResultT:
    """`read` of the file. Of a PNG whose texts or colour profile are larger than Pillow unpacks, these are skipped."""
    try:
        return read(source)
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
    return read(_without_texts(source.read_bytes() if isinstance(source, Path) else bytes(source)))


def _without_texts(content: bytes) -> bytes:
    """A PNG without its texts and colour profile. What is no chunk any more stays as it is."""
    kept, place = [content[: len(_PNG)]], len(_PNG)
    while place + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        if kind not in _TEXTS:
            kept.append(content[place : place + size + 12])
        place += size + 12
    return b"".join(kept)


@contextmanager
def _open(source: ImageFile, max_pixels: int) -> Iterator[Image.Image]:
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    with open(source, "rb", opener=regular_file) if isinstance(source, Path) else io.BytesIO(source) as stream:
        if not stream.read(1):
            raise OSError("the file is empty")
        stream.seek(0)
        with Image.open(stream) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(_too_large(image.width * image.height, max_pixels))
            yield image


def _too_large(pixels: int | str, limit: int) -> str:
    return f"too large ({pixels} pixels, --max-pixels is {limit})"


def portable_pixmap(image_HWC: NDArray[np.uint8]) -> bytes:
    """The image as a PGM (grey) or PPM (colour) file: a line of text, then the pixels."""
    height, width, channels = image_HWC.shape
    return f"P{5 if channels == 1 else 6} {width} {height} 255\n".encode() + image_HWC.tobytes()


def _plain_pixmap(content: bytes | memoryview) -> NDArray[np.uint8] | None:
    """The pixels of what `portable_pixmap` wrote, six times as fast as through Pillow; None for any other content."""
    header = _PIXMAP.match(content)
    if header is None:
        return None
    channels, width, height = 1 if header[1] == b"5" else 3, int(header[2]), int(header[3])
    if not width * height or len(content) - header.end() != width * height * channels:
        return None
    return np.frombuffer(content, np.uint8, offset=header.end()).reshape(height, width, channels).copy()


def regular_file(path: str, flags: int) -> int:
    """An opener that does not wait for what a pipe may bring."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no file but a folder, a pipe or a device")
    return descriptor


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16"):
        return _eight_bits(np.asarray(image))
    if image.mode == "I":
        # 32-bit integers: PNG and PGM store 16-bit grey in them, in other formats the range is anyone's guess.
        values = np.asarray(image)
        if image.format not in ("PNG", "PPM") or values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no known range: convert the image to 8 bits")
        return _eight_bits(values)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: convert the image to 8 bits")
    grey = image.mode in _GREY_MODES
    if image.has_transparency_data:
        image = image.convert("LA" if grey else "RGBA")
        return _over_white(np.asarray(image))
    mode = "L" if grey else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if grey else pixels


def _eight_bits(values_HW: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Grey of 10 to 16 bits, by the smallest range of `_GREY_BITS` that holds the brightest pixel; rounded."""
    brightest = int(values_HW.max())
    most = next(2**bits - 1 for bits in _GREY_BITS if brightest < 2**bits)
    scaled_HW: NDArray[np.uint32] = (values_HW.astype(np.uint32) * 255 + most // 2) // most
    return scaled_HW.astype(np.uint8)[..., None]


def _over_white(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    colour, alpha = pixels_HWC[..., :-1].astype(np.uint32), pixels_HWC[..., -1:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where it is missing or damaged."""
    if image.format == "TIFF" or not any(key in image.info for key in _MAY_HOLD_ORIENTATION):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error, Warning):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    if orientation >= 5:
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    # What is left to mirror after the transposition, as (top-bottom, left-right).
    down, across = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return pixels_HWC[::down, ::across]


def _unreadable(error: Exception, name: str) -> UnreadableImage:
    if isinstance(error, UnidentifiedImageError):
        why = "not an image of a known format"
    elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        found = re.search(r"\d+", str(error))
        why = f"too large ({found.group() if found else 'too many'} pixels, see --max-pixels)"
    elif isinstance(error, OSError) and error.strerror:
        why = error.strerror.lower()
    else:
        why = " ".join(str(error).split()) or type(error).__name__
    return UnreadableImage(f"{name}: {why}")
