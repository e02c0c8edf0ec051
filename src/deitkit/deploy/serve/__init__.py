"""A network as a service: images over HTTP in, predictions out, and a page for people. Imports what `deploy` imports.

app.py        the routes
server.py     from a run to a server that stops cleanly
guard.py      what a request may cost: bytes, time, how many at once
batching.py   images of many requests as one batch
nearest.py    the training images that a network finds most alike

FastAPI and uvicorn are an extra: `require_packages` comes before an import of `app`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ByteSize, Field, PositiveFloat

from deitkit.config import Config, Count
from deitkit.terminal import UserError

MOST_PIXELS = 89_000_000
"""An image of more pixels is one that Pillow warns of."""


class Limits(Config):
    """What a request may cost, and how requests are put together."""

    max_batch: Count = 32
    """images that the network is given at a time, at most (32)"""
    max_delay_ms: Annotated[float, Field(ge=0, le=10_000)] = 5.0
    """how long an image waits for others, at most (5)"""
    max_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(20_000_000)
    """of the body of a request, at most (20MB)"""
    max_pixels: Annotated[int, Field(gt=0, le=MOST_PIXELS)] = 50_000_000
    """of an image, at most (50 million); one that has more is not decoded"""
    max_in_flight: Count = 128
    """requests at a time, at most (128)"""
    timeout_s: PositiveFloat = 30.0
    """for a request to arrive, and for its answer to be found (30)"""


class NoTeacher(UserError):
    """The teacher is asked, and is not there."""


def require_packages() -> None:
    """Raises UserError if the packages of the server are missing."""
    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"deit serve needs the package {error.name}: pip install 'deitkit[serve]'") from error
