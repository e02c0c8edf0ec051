"""What a request may cost: bytes, time to arrive, how many at once, pixels."""

from __future__ import annotations

import asyncio
import io
from typing import final

import numpy as np
from fastapi import HTTPException
from numpy.typing import NDArray
from PIL import Image
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deitkit.data.dataset import UnreadableImage
from deitkit.data.folder import decode
from deitkit.deploy.serve import Limits
from deitkit.terminal import file_size

CLOSE = {"connection": "close"}
"""The rest of a body that is not read cannot be told from the next request."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Of images, by Pillow's names."""


@final
class Guard:
    """Around an application: requests with a body are counted, and their bodies cut off at the limits. 413: too many bytes; 408: they do
    not arrive; 503: too many requests at a time."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        if self.in_flight >= self.limits.max_in_flight:
            detail = f"{self.in_flight} requests are being answered: try again in a second"
            await JSONResponse({"detail": detail}, 503, {"retry-after": "1", **CLOSE})(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.limits.max_bytes:
            await JSONResponse({"detail": self._too_large()}, 413, CLOSE)(scope, receive, send)
            return
        self.in_flight += 1
        try:
            await self.app(scope, self._limited(receive), send)
        finally:
            self.in_flight -= 1

    def _limited(self, receive: Receive) -> Receive:
        """`receive`, but no more bytes and no longer than allowed. Raises HTTPException."""
        taken, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self.limits.timeout_s

        async def limited() -> Message:
            nonlocal taken, whole
            if whole:  # what comes now is that the client has gone
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                late = f"the request did not arrive within {self.limits.timeout_s:g} s"
                raise HTTPException(408, late, CLOSE) from error
            taken, whole = taken + len(message.get("body", b"")), not message.get("more_body", False)
            if taken > self.limits.max_bytes:
                raise HTTPException(413, self._too_large(), CLOSE)
            return message

        return limited

    def _too_large(self) -> str:
        return f"the request is larger than {file_size(self.limits.max_bytes)}"


def decode_safely(content: bytes, name: str, max_pixels: int) -> NDArray[np.uint8]:
    """`data.folder.decode`, for content that anybody may have sent: its size is read from its header before it is decoded, and formats
    that run other programs are none. Raises HTTPException: 413 for too many pixels, 415 for what is no image."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # far more than `max_pixels` can be
        raise HTTPException(413, f"{name}: has more than {max_pixels} pixels") from error
    except Exception as error:  # Pillow's plugins raise anything
        raise HTTPException(415, f"{name}: not an image of a known format") from error
    if width * height > max_pixels:
        raise HTTPException(413, f"{name}: has {width} x {height} pixels, more than {max_pixels}")
    try:
        return decode(content, name)
    except UnreadableImage as error:
        raise HTTPException(415, str(error)) from error
