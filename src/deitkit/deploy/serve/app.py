"""The routes: images in, predictions, explanations and the nearest training images out; the page that uses them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any

import numpy as np
import torch
from fastapi import FastAPI, File, HTTPException, Query, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from numpy.typing import NDArray
from starlette.datastructures import UploadFile as Upload
from starlette.requests import Request
from starlette.types import ASGIApp
from typing_extensions import TypedDict

from deitkit.config import HeadChoice
from deitkit.deploy.serve import Limits, NoTeacher
from deitkit.deploy.serve.batching import Batcher
from deitkit.deploy.serve.guard import Guard, decode_safely
from deitkit.deploy.serve.nearest import Nearest, State
from deitkit.models.predict import Predictor
from deitkit.pages import template
from deitkit.terminal import UserError, complain, one_line, shortened

MOST_IMAGES = 64
"""In one request."""
NEAREST = 6
Explain = Callable[[NDArray[np.uint8], bool], dict[str, Any]]
"""Pixels (H, W, C) of an image, and whether the teacher is asked, too -> its explanation, in plain values."""
CONTENT_POLICY = "; ".join((
    "default-src 'none'", "script-src 'unsafe-inline'", "style-src 'unsafe-inline'", "img-src data: blob:", "connect-src 'self'",
))  # fmt: skip
"""The page fetches nothing from elsewhere, whatever stands in it."""
DONE = object()

Ranked = TypedDict("Ranked", {"class": str, "probability": float})


class Answer(TypedDict):
    """The most probable classes of one image."""

    image: str
    answer: str | None
    predictions: list[Ranked]


class Neighbours(TypedDict):
    """The training images that the network finds most alike; `state` is none where they are not there any more."""

    state: State
    images: list[dict[str, Any]]


Images = Annotated[list[UploadFile], File(description="image files")]
OneImage = Annotated[list[UploadFile], File(description="one image file")]
Top = Annotated[int, Query(ge=1, description="classes for each image")]
MinConfidence = Annotated[float, Query(ge=0, le=1, description="answer null where no class is so probable")]
WithTeacher = Annotated[
    bool, Query(alias="teacher", description="also what the teacher answers, and on what that rests: slower")
]
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "not a form that can be read"},
    408: {"description": "the request does not arrive"},
    413: {"description": "too many bytes, images or pixels"},
    415: {"description": "not an image"},
    422: {
        "description": "a wrong or missing value",
        "content": {"application/json": {"schema": {"type": "object", "properties": {"detail": {"type": "string"}}}}},
    },
    503: {"description": "too many requests at a time"},
    504: {"description": "the answer takes too long"},
}


def _complaint(error: Mapping[str, Any]) -> str:
    """What FastAPI finds wrong with a request: `top: Input should be greater than or equal to 1`."""
    place, *names = error["loc"]
    if place == "body":
        return f"{names[0] if names else 'image'}: send a file, as `curl -F image=@photo.jpg` does"
    return f"{'.'.join(map(str, names))}: {error['msg']}"


def create_app(
    predictor: Predictor,
    limits: Limits,
    *,
    explain: Explain,
    nearest: Nearest,
    teacher: str | None = None,
) -> ASGIApp:
    """The service of a network. `explain` and `nearest` are used by one thread of their own, so that predictions do not wait for them:
    their network has to be another copy, for explaining hooks into its layers. `teacher`: the name of the one that can be asked."""
    batcher = Batcher(predictor, limits.max_batch, limits.max_delay_ms)
    decoders = ThreadPoolExecutor(os.cpu_count() or 1, "decode")
    slow = ThreadPoolExecutor(1, "explain")

    async def find_nearest() -> None:
        steps, loop = nearest.build(), asyncio.get_running_loop()
        try:
            while await loop.run_in_executor(slow, next, steps, DONE) is not DONE:
                pass
        except Exception as error:  # the service can do without
            complain(f"warning: nearest training images are not shown: {error}")

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        background = asyncio.create_task(find_nearest())
        async with batcher.running():
            yield
        background.cancel()
        for threads in (decoders, slow):
            threads.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title=f"deitkit: {predictor.card.name}", version=version("deitkit"), lifespan=lifespan)

    @app.exception_handler(RequestValidationError)
    async def refuse(_request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": one_line("; ".join(dict.fromkeys(map(_complaint, error.errors()))))}, 422)

    @app.exception_handler(Exception)
    async def apologise(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "an error of the service: its log has it"}, 500)

    def only(uploads: Sequence[Upload]) -> Upload:
        if len(uploads) != 1:
            raise HTTPException(422, f"send one image in the field `image` of a form, not {len(uploads)}")
        return uploads[0]

    async def within_time(work: Any) -> Any:
        try:
            async with asyncio.timeout(limits.timeout_s):
                return await work
        except TimeoutError as error:
            raise HTTPException(504, f"no answer within {limits.timeout_s:g} s (the service's --timeout-s)") from error
        except NoTeacher as error:
            raise HTTPException(404, str(error)) from error
        except UserError as error:  # such as the distillation head of a network without one
            raise HTTPException(422, str(error)) from error

    def pixels_of(upload: Upload, name: str) -> NDArray[np.uint8]:
        return decode_safely(upload.file.read(), one_line(shortened(name)), limits.max_pixels)

    async def view_of(upload: Upload, name: str) -> NDArray[np.uint8]:
        look = lambda: predictor.view(pixels_of(upload, name))  # noqa: E731
        return await asyncio.get_running_loop().run_in_executor(decoders, look)

    @app.post("/predict", responses=ERRORS)
    async def predict(
        image: Images = [],  # noqa: B006  # FastAPI copies it
        images: Images = [],  # noqa: B006
        top: Top = 5,
        min_confidence: MinConfidence = 0.0,
        head: HeadChoice = "fused",
    ) -> list[Answer]:
        """The most probable classes of each image, as `deit predict --format json` gives them."""
        uploads = [*image, *images]
        if not uploads:
            raise HTTPException(422, "send an image, or several, in the field `image` of a form")
        if len(uploads) > MOST_IMAGES:
            raise HTTPException(413, f"{len(uploads)} images, more than {MOST_IMAGES}")
        names = [upload.filename or f"image {number}" for number, upload in enumerate(uploads)]

        async def probabilities(upload: Upload, name: str) -> torch.Tensor:
            return await batcher.probabilities(await view_of(upload, name), head)

        found = await within_time(asyncio.gather(*map(probabilities, uploads, names)))
        return [one.as_dict() for one in predictor.ranked(names, torch.stack(found), top, min_confidence)]  # type: ignore[misc]

    @app.post("/explain", responses={**ERRORS, 404: {"description": "there is no teacher"}})
    async def explanation(image: OneImage = [], with_teacher: WithTeacher = False) -> dict[str, Any]:  # noqa: B006
        """Where both tokens look, and which patches each head needs: maps over the patches, each with an overlay (PNG)."""
        if with_teacher and teacher is None:
            raise HTTPException(404, "this network has no teacher")
        upload = only(image)
        name = upload.filename or "image"
        look = lambda: explain(pixels_of(upload, name), with_teacher)  # noqa: E731
        return {
            **await within_time(asyncio.get_running_loop().run_in_executor(slow, look)),
            "image": name,
        }

    @app.post("/nearest", responses=ERRORS)
    async def neighbours(image: OneImage = [], most: Annotated[int, Query(ge=1, le=50)] = NEAREST) -> Neighbours:  # noqa: B006
        """The training images that the network finds most alike."""
        upload = only(image)
        if nearest.state != "ready":
            return {"state": nearest.state, "images": []}
        view_HWC = await within_time(view_of(upload, upload.filename or "image"))
        look = lambda: nearest.find(view_HWC, most)  # noqa: E731
        found = await within_time(asyncio.get_running_loop().run_in_executor(slow, look))
        return {"state": "ready", "images": found}

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        """Whether the service answers, and how many images the network was given in how many batches."""
        counts = {"images": batcher.images, "batches": batcher.batches, "nearest": nearest.state}
        return {"status": "ok", "network": predictor.card.name, "classes": len(predictor.classes), **counts}

    facts = {"max_bytes": limits.max_bytes, "teacher": teacher}
    page = template("deitkit.deploy", "page.html.jinja").render(card=predictor.card, script="served.js", facts=facts)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": CONTENT_POLICY})

    return Guard(app, limits)
