"""From the bytes of an image file to upright pixels, grey or RGB, by one rule for every file.

Grey (C = 1) are the modes that hold no colour: 1-bit, 8-bit and 16-bit grey, with or without alpha. Everything
else is RGB (C = 3), palettes included. Transparency is laid over white. 16-bit grey is divided by 257 and rounded,
so that 65535 becomes 255. Of several frames the first counts.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Source = Path | bytes | memoryview
"""An image file, or its content."""

_ORIENTATION = 0x0112  # the tag's number in EXIF 2.3, table 4
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I"})
_MAY_HOLD_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"RIFF", "WEBP"),
    (b"P5 ", "PPM"),  # as `decoded` writes them
    (b"P6 ", "PPM"),
)


_PIXMAP = re.compile(rb"P([56]) (\d{1,5}) (\d{1,5}) 255\n")


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message names it and says why."""


class Shape(NamedTuple):
    """What an image will have when it is read."""

    height: int
    width: int
    channels: int


def decode(source: Source, name: str) -> NDArray[np.uint8]:
    """The upright pixels: uint8 of shape (H, W, C), C = 1 where the file holds no colour, else 3.

    Raises UnreadableImage, whose message is `name: why`."""
    if not isinstance(source, Path):
        pixmap = _plain_pixmap(source)
        if pixmap is not None:
            return pixmap
    try:
        with _open(source) as image:
            return upright_pixels(image)
    except Exception as error:  # Pillow's plugins raise anything from OSError to SyntaxError and struct.error
        raise _unreadable(error, name) from error


def upright_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """`decode` for an image that Pillow has opened or made. Raises whatever Pillow does, ValueError for unknown ranges."""
    image.load()
    if not image.width * image.height:
        raise ValueError("it has no pixels")
    # Pillow's memory is read-only, which torch.from_numpy warns about.
    return np.require(_upright(_pixels(image), _orientation(image)), requirements=["C", "W"])


def probe(source: Source, name: str, *, whole: bool) -> Shape:
    """What `decode` would return the shape of. Raises UnreadableImage.

    `whole=False` reads the header alone; `whole=True` also runs through all of the file's data, and so finds
    truncated ones. JPEGs are run through at an eighth of their size, which reads every byte all the same."""
    try:
        with _open(source) as image:
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
    except Exception as error:
        raise _unreadable(error, name) from error


def with_channels(pixels_HWC: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """The image with 1 or 3 channels; colour becomes grey by ITU-R BT.601, as Pillow does it."""
    if pixels_HWC.shape[-1] == channels:
        return pixels_HWC
    if channels == 3:
        return np.repeat(pixels_HWC, 3, axis=-1)
    return np.array(Image.fromarray(pixels_HWC).convert("L"))[..., None]


@contextmanager
def _open(source: Source) -> Iterator[Image.Image]:
    with open(source, "rb", opener=_regular_file) if isinstance(source, Path) else io.BytesIO(source) as stream:
        start = stream.read(8)
        if not start:
            raise OSError("the file is empty")
        stream.seek(0)
        # A known format keeps Pillow from trying its plugins in turn: 0.1 ms of a small image's 0.25 ms.
        known = [kind for signature, kind in _SIGNATURES if start.startswith(signature)]
        with Image.open(stream, formats=known or None) as image:
            yield image


def _plain_pixmap(content: bytes | memoryview) -> NDArray[np.uint8] | None:
    """The pixels of a pixmap as `decoded` writes it, six times as fast as through Pillow; None for any other content."""
    header = _PIXMAP.match(content)
    if header is None:
        return None
    channels, width, height = 1 if header[1] == b"5" else 3, int(header[2]), int(header[3])
    if not width * height or len(content) - header.end() != width * height * channels:
        return None
    return np.frombuffer(content, np.uint8, offset=header.end()).reshape(height, width, channels).copy()


def _regular_file(path: str, flags: int) -> int:
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
    return ((values_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None]


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
        why = f"too large to be opened safely ({found.group() if found else 'too many'} pixels)"
    elif isinstance(error, OSError) and error.strerror:
        why = error.strerror.lower()
    else:
        why = " ".join(str(error).split()) or type(error).__name__
    return UnreadableImage(f"{name}: {why}")
