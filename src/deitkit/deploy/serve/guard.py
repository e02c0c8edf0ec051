"""What a request may cost: bytes, time to arrive, how many at once, pixels."""

from __future__ import annotations

import asyncio
from typing import final

import numpy as np
from fastapi import HTTPException
from numpy.typing import NDArray
from PIL import Image
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deitkit.data.decode import UnreadableImage, decode, stored_size
from deitkit.deploy.serve import Limits
from deitkit.terminal import file_size

CLOSE = {"connection": "close"}
"""A connection whose client still sends a body that nobody reads ends with the answer."""

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
        body = _Body(receive, send, self.limits, self._too_large())
        try:
            await self.app(scope, body.receive, body.send)
        except asyncio.CancelledError:  # the server stops, and has waited long enough
            if body.answered:
                raise
            await JSONResponse({"detail": "the server is being stopped"}, 503, CLOSE)(scope, receive, send)
        finally:
            self.in_flight -= 1

    def _too_large(self) -> str:
        return f"the request is larger than {file_size(self.limits.max_bytes)}"


@final
class _Body:
    """The body of one request as it arrives: no more bytes and no longer than allowed."""

    def __init__(self, receive: Receive, send: Send, limits: Limits, too_large: str) -> None:
        self._receive, self._send, self._limits, self._too_large = receive, send, limits, too_large
        self._taken, self._whole = 0, False
        self.answered = False
        self._deadline = asyncio.get_running_loop().time() + limits.timeout_s

    async def receive(self) -> Message:
        """The next part. Raises HTTPException."""
        if self._whole:  # what comes now is that the client has gone
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the request did not arrive within {self._limits.timeout_s:g} s") from error
        self._taken += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._taken > self._limits.max_bytes:
            raise HTTPException(413, self._too_large)
        return message

    async def send(self, message: Message) -> None:
        self.answered = True
        if message["type"] == "http.response.start" and not self._whole:
            message["headers"] = [*message["headers"], (b"connection", b"close")]
        await self._send(message)


def decode_safely(content: bytes, name: str, max_pixels: int) -> NDArray[np.uint8]:
    """`data.decode.decode`, for content that anybody may have sent: its size is read from its header before it is decoded, and formats
    that run other programs are none. Raises HTTPException: 413 for too many pixels, 415 for what is no image."""
    try:
        width, height = stored_size(content, FORMATS)
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
