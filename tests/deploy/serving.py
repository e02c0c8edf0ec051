"""A service in a thread of this process, and clients for it."""

from __future__ import annotations

import http.client
import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from deitkit.config import Preprocessing
from deitkit.deploy.serve import Limits
from deitkit.deploy.serve.app import create_app
from deitkit.deploy.serve.nearest import Nearest
from deitkit.deploy.serve.server import listening_socket, make_server
from deitkit.models.network import Network
from deitkit.models.predict import Predictor
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import ModelCard, student_preprocessing

STUDENT = ViTConfig(image_size=(16, 16), channels=3, classes=3, patch_size=(8, 8), width=16, depth=2, heads=2)


def small_predictor(
    classes: Sequence[str] = ("a", "b", "c"), *, distilled: bool = True, channels: int = 3
) -> Predictor:
    torch.manual_seed(0)
    changes = {"distillation_token": distilled, "classes": len(classes), "channels": channels}
    config = STUDENT.model_copy(update=changes)
    preprocessing: Preprocessing = student_preprocessing(config, photos=True)
    card = ModelCard(name="net", architecture=config, classes=tuple(classes), preprocessing=preprocessing)
    return Predictor(Network(ViT(config), preprocessing), card, "cpu")


def encoded(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels_HWC[..., 0] if pixels_HWC.shape[2] == 1 else pixels_HWC).save(file, "PNG")
    return file.getvalue()


def png(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    return encoded(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


class NoNearest(Nearest):  # type: ignore[misc]  # a stand-in
    """Of a network that has looked at no training images."""

    def __init__(self) -> None:
        self.state = "none"

    def build(self) -> Iterator[None]:
        yield from ()


def nothing(_pixels_HWC: NDArray[np.uint8], _with_teacher: bool) -> dict[str, Any]:
    """An explanation without anything in it."""
    return {"answers": {}, "attributions": []}


@contextmanager
def serving(
    predictor: Predictor, limits: Limits | None = None, *, explain: Any = nothing, nearest: Any = None, **others: Any
) -> Iterator[tuple[str, int]]:
    """The address of a service within the block."""
    limits = limits or Limits()
    listener = listening_socket("127.0.0.1", 0)
    app = create_app(predictor, limits, explain=explain, nearest=nearest or NoNearest(), **others)
    server = make_server(app, limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        host, port = listener.getsockname()[:2]
        yield host, port
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()


def form(*files: tuple[str, bytes], field: str = "image") -> tuple[bytes, dict[str, str]]:
    """(name, content) of files as the body and the headers of a request."""
    parts = [
        f'--=-=\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in files
    ]
    return b"".join(parts) + b"--=-=--\r\n", {"content-type": "multipart/form-data; boundary==-="}


def request(
    address: tuple[str, int], path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the response; a POST if there is a body."""
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def post(address: tuple[str, int], path: str, *files: tuple[str, bytes], field: str = "image") -> tuple[int, Any]:
    """Status and content of the answer to a form with these files."""
    status, _, content = request(address, path, *form(*files, field=field))
    return status, json.loads(content)


def health(address: tuple[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request(address, "/healthz")[2])
    return found


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    """Wait until `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
