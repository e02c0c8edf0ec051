"""Both pages in a browser: an image is dropped, the answer is there. Needs a Chromium; the page without a server also ONNX Runtime."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tests.deploy.serving import NoNearest, encoded, png, serving, small_predictor, wait_for

from deitkit.data.decode import decode
from deitkit.deploy.onnx import onnx_model
from deitkit.deploy.web import find_runtime, write_page
from deitkit.distill.teacher import teacher_from_callable
from deitkit.inspect.explain import explain, overlay
from deitkit.inspect.report import write_report
from deitkit.models.predict import Predictor
from deitkit.terminal import Progress, UserError

EVIL = "<img src=x onerror=document.title='hacked'>"
DROP = """content => {
  const data = new DataTransfer();
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  data.items.add(new File([bytes], "<b>dropped</b>.png", {type: "image/png"}));
  return data;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *camera])
        yield launched
        launched.close()


@contextmanager
def opened(browser: Any, address: str, width: int = 1000) -> Iterator[Any]:
    """A page that asks for nothing from elsewhere and has nothing to complain about."""
    page = browser.new_page(viewport={"width": width, "height": 800})
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    yield page
    assert not [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))]
    assert not complaints
    page.close()


def drop(page: Any, content: bytes) -> None:
    data = page.evaluate_handle(DROP, base64.b64encode(content).decode())
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})


def shown(page: Any) -> dict[str, float]:
    """Classes and their probabilities on the page."""
    page.wait_for_selector("#bars .row", timeout=60_000)
    rows = [row.split("\n") for row in page.locator("#bars .row").all_inner_texts()]
    return {name: float(share.removesuffix(" %")) / 100 for name, share in rows}


def expected(predictor: Predictor, content: bytes) -> dict[str, float]:
    (found,) = predictor.predict(decode(content, ""))
    return dict(zip(found.classes, found.probabilities, strict=True))


@pytest.mark.parametrize("width", [1000, 390])
def test_a_dropped_image_is_answered_and_explained(browser: Any, width: int) -> None:
    predictor, looker = small_predictor((EVIL, "hat", "shoe")), small_predictor((EVIL, "hat", "shoe"))
    first = lambda images_BCHW: 5 * torch.eye(3)[:1] + 0 * images_BCHW.mean((1, 2, 3))[:, None]  # noqa: E731  # always EVIL
    teacher = teacher_from_callable(first, name="t", num_classes=3, preprocessing=predictor.card.preprocessing)

    def answered(pixels_HWC: NDArray[np.uint8], ask: bool) -> dict[str, Any]:
        return explain(looker, pixels_HWC, teacher if ask else None).with_overlays()

    with (
        serving(predictor, explain=answered, teacher="t") as (host, port),
        opened(browser, f"http://{host}:{port}/", width) as page,
    ):
        assert page.is_hidden("#result")
        drop(page, png())
        assert shown(page) == pytest.approx(expected(predictor, png()), abs=1e-3)
        answer = next(iter(shown(page)))
        assert page.inner_text("#answer") == answer
        page.fill("#least", "99")  # these weights are sure of nothing
        assert (page.inner_text("#answer"), page.inner_text("#below")) == ("none of these", "99 %")
        page.fill("#least", "0")
        assert page.inner_text("#answer") == answer
        page.wait_for_selector("#patches img", timeout=60_000)
        titles = page.locator("#tokens figcaption b").all_inner_texts()
        assert titles == ["class token", "distillation token"]
        assert page.locator("#tokens img").evaluate_all("all => all.map((one) => one.naturalWidth)") == [16, 16]
        page.click("#teacher")
        page.wait_for_selector("#taught:not(:empty)", timeout=60_000)
        assert page.inner_text("#taught") == f"The teacher says “{EVIL}”, 98.7 %."
        assert page.locator("#patches figcaption b").all_inner_texts()[-1] == "teacher"
        assert page.is_hidden("#teacher")
        assert page.title() == "net: classify an image"  # no name was taken for markup
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
        assert page.is_hidden("#nearest")


def test_an_image_is_sent_once_however_long_the_nearest_ones_take(browser: Any) -> None:
    class Slow(NoNearest):
        def find(self, _view_HWC: object, _most: int) -> list[dict[str, Any]]:
            picture = f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"
            return [{"image": "a.png", "class": "hat", "cosine": 0.5, "picture": picture}]

    nearest = Slow()
    nearest.state = "loading"
    with (
        serving(small_predictor(), nearest=nearest) as (host, port),
        opened(browser, f"http://{host}:{port}/") as page,
    ):
        sent: list[str] = []
        page.on("request", lambda request: sent.append(f"{request.method} {request.url.rpartition('/')[2]}"))
        drop(page, png())
        page.wait_for_timeout(3000)
        assert sent.count("GET healthz") > 1
        nearest.state = "ready"
        page.wait_for_selector("#nearest img", timeout=60_000)
        assert page.locator("#nearest figcaption").all_inner_texts() == ["hat\ncosine 0.50"]
        assert [one for one in sent if one.startswith("POST ")].count("POST nearest") == 1


def test_a_report_fits_a_phone_and_prints_its_settings(browser: Any, cnn: Path, tmp_path: Path) -> None:
    file = write_report(cnn, "val", page=tmp_path / "report.html")
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(f"file://{file}")
    assert "val_fraction:" not in page.inner_text("body")  # folded
    for media in ("screen", "print"):
        page.emulate_media(media=media)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "val_fraction:" in page.inner_text("body")
    seen = "all => all.map((one) => one.checkVisibility({contentVisibilityAuto: true}) && one.scrollWidth <= one.clientWidth)"
    assert page.locator("details pre").evaluate_all(seen) == [True, True]
    page.close()


def test_the_camera_s_picture_is_answered(browser: Any) -> None:
    with serving(small_predictor()) as (host, port), opened(browser, f"http://{host}:{port}/") as page:
        page.click("#camera")
        wait_for(lambda: page.evaluate("document.getElementById('video').videoWidth > 0"))
        page.click("#shoot")
        assert len(shown(page)) == 3
        assert page.is_hidden("#video")


def test_what_is_no_image_is_said_on_the_page(browser: Any) -> None:
    with serving(small_predictor()) as (host, port):
        page = browser.new_page()
        page.goto(f"http://{host}:{port}/")
        drop(page, b"no image")
        page.wait_for_selector("#status.bad")
        assert page.inner_text("#status") == "<b>dropped</b>.png: not an image of a known format"
        page.close()


@contextmanager
def files_served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def runtime() -> dict[str, bytes]:
    try:
        return find_runtime(None, Progress())
    except UserError as error:
        pytest.skip(str(error))


def overlays(page: Any) -> list[Any]:
    """The pictures of where the tokens look: (H, W, 3)."""
    sources = page.locator("#tokens img").evaluate_all("all => all.map((one) => one.src)")
    return [decode(base64.b64decode(one.partition(",")[2]), "").astype(float) for one in sources]


def see_through(order: tuple[int, ...] = (0, 1, 2)) -> bytes:
    """A PNG of colours that go over into each other, half of it transparent."""
    down, across = np.mgrid[0:60, 0:40]
    colours = np.stack([4 * down, 6 * across, 240 - 4 * down, np.where(across < 20, 255, 40)], -1).astype(np.uint8)
    return encoded(colours[..., [*order, 3]])


@pytest.mark.parametrize("channels", [3, 1])
def test_the_page_without_a_server_predicts_what_the_network_predicts(
    browser: Any, runtime: dict[str, bytes], tmp_path: Path, channels: int
) -> None:
    predictor = small_predictor((EVIL, "</script>", "shoe"), channels=channels)
    with torch.no_grad():  # so that colours and transparency make a difference
        for head in (predictor.network.body.head, predictor.network.body.head_dist):
            head.weight.mul_(150)  # type: ignore[union-attr, operator]
    image, answer = see_through(), expected(predictor, see_through())
    swapped = expected(predictor, see_through((2, 1, 0)))
    assert max(abs(answer[name] - swapped[name]) for name in answer) > 0.02
    for block in predictor.network.body.blocks:  # type: ignore[union-attr]
        block.attn.qkv.weight.data *= 5
    answer = expected(predictor, image)
    model = onnx_model(predictor.network, predictor.card, "fused", attention=True)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    write_page(tmp_path, predictor.card, runtime)
    assert json.dumps("</script>") not in (tmp_path / "index.html").read_text()
    with files_served(tmp_path) as address, opened(browser, address) as page:
        drop(page, image)
        assert shown(page) == pytest.approx(answer, abs=0.01)
        assert page.title() == "net: classify an image"
        page.wait_for_selector("#tokens img")
        assert page.locator("#tokens figcaption b").all_inner_texts() == ["class token", "distillation token"]
        first = overlays(page)
        for found, ours in zip(first, explain(predictor, decode(image, "")).attributions[::2], strict=True):
            assert found.shape == (256, 256, 3)
            drawn = np.asarray(Image.fromarray(overlay(ours.pixels_HWC, ours.weights_hw)).resize((256, 256)), float)
            assert np.abs(found - drawn).mean() < 12  # of 255: the browser draws more than 16 pixels a side
        drop(page, png(3, (40, 40)))
        wait_for(lambda: page.is_visible("#tokens img") and np.abs(overlays(page)[0] - first[0]).mean() > 10)
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/index.html")
    page.wait_for_selector("#status.bad")
    assert "python -m http.server" in page.inner_text("#status")
    page.close()
