"""Does every export predict what the network predicts? Real images, each format opened by the program that it is for.

    python benchmarks/exports.py RUN IMAGES [--count 1000] [--out DIR]

RUN is a finished run of a student with a patch embedding and a distillation token (only that can be written in every format), IMAGES a data
set with a test split. Top-1 of `deit predict` is compared with transformers (`hf`), timm, ONNX Runtime (float32, float16, int8) and, where
there is a Chromium, the page of `--format web`; with transformers and timm, which average both heads' logits, that of the head
fused_logits.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from deitkit.config import DataConfig
from deitkit.data import load_data
from deitkit.deploy.export import export_run
from deitkit.models.predict import load
from deitkit.terminal import UserError

Answers = NDArray[np.int64]
ANSWERED = "!document.getElementById('result').hidden && document.getElementById('status').textContent === ''"


def by_transformers(folder: Path, images: list[Image.Image]) -> Answers:
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = [model(**processor(image, return_tensors="pt")).logits[0] for image in images]
    return np.array([int(one.argmax()) for one in logits])


def by_timm(folder: Path, images: list[Image.Image]) -> Answers:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        return np.array([int(model(transform(image)[None]).argmax()) for image in images])


def by_onnx(folder: Path, images: list[Image.Image]) -> Answers:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return np.array([int(session.run(None, {"images": np.asarray(image)[None]})[0].argmax()) for image in images])


def by_chromium(folder: Path, images: list[Image.Image], classes: tuple[str, ...]) -> Answers:
    from playwright.sync_api import sync_playwright

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    answers = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        for image in images:
            stream = io.BytesIO()
            image.save(stream, "PNG")
            page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": stream.getvalue()})
            page.wait_for_function(ANSWERED)
            answers.append(classes.index(page.inner_text("#answer")))
        browser.close()
    server.shutdown()
    return np.array(answers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("images")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp())
    test = load_data(given.images, DataConfig()).open_split("test")
    positions = np.linspace(0, len(test) - 1, given.count).astype(int)
    images = [Image.fromarray(test.read(int(position)).squeeze()).convert("RGB") for position in positions]
    labels = test.labels_N[positions]
    predictor = load(given.run)
    classes = predictor.classes

    def ours(head: str) -> Answers:
        return np.array([classes.index(one.classes[0]) for one in predictor.predict(images, head, 1)])  # type: ignore[arg-type]

    logits, fused = ours("fused_logits"), ours("fused")
    formats: list[tuple[str, str, dict[str, str], Callable[[Path, list[Image.Image]], Answers], Answers]] = [
        ("hf, transformers", "hf", {}, by_transformers, logits),
        ("timm, timm", "timm", {}, by_timm, logits),
        *(
            (f"onnx {kind}, ONNX Runtime", "onnx", {"precision": kind}, by_onnx, fused)
            for kind in ("float32", "float16", "int8")
        ),
    ]
    if shutil.which("chromium"):
        formats.append(("web, Chromium", "web", {}, functools.partial(by_chromium, classes=classes), fused))
    print(f"| export, opened by | same top-1 of {given.count:,} | accuracy, % |\n| --- | --- | --- |")
    print(f"| deit predict, fused | | {100 * np.mean(fused == labels):.2f} |")
    for number, (title, form, settings, opened, expected) in enumerate(formats):
        try:
            if not export_run(given.run, out / str(number), form, **settings)[1]:
                print(f"| {title} | refused by the parity gate | |", flush=True)
                continue
            found = opened(out / str(number), images)
            print(
                f"| {title} | {int((found == expected).sum()):,} | {100 * np.mean(found == labels):.2f} |", flush=True
            )
        except UserError as error:
            print(f"| {title} | refused: {error} | |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
