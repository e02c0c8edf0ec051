"""`deit serve` against a plain FastAPI handler around timm's model, and ONNX Runtime against timm's model: DeiT-Ti, 224 pixels.

    python benchmarks/serve.py [--part serve|onnx] [--clients 32] [--seconds 20] [--rounds 3] [--threads 2]

serve: one server process at a time with as many threads for torch, clients in this process that each send the same JPEG file again as
soon as they have an answer; in turn, round by round. The processor time of the server for an image does not depend on who else uses the
machine; the other figures do. timm's handler decodes, transforms and runs one image a request, in the threads of
the framework. Weights are random; both sides classify into 1,000 classes. onnx: the same images of 224 pixels in uint8, normalised by each
side; float32 and int8 by ONNX Runtime, float32 by torch and timm, in turn. Medians over rounds; ratios are medians of each round's, of
images a second (serve) and of processor time (onnx).
"""

from __future__ import annotations

import argparse
import http.client
import io
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from deitkit.data.dataset import MemorySplit
from deitkit.deploy.onnx import onnx_model, to_int8
from deitkit.deploy.parity import Gate
from deitkit.models.network import Network
from deitkit.models.predict import Predictor
from deitkit.models.vit import ViT
from deitkit.models.zoo import STUDENTS, ModelCard, save_model, student_preprocessing
from deitkit.terminal import Progress

TIMM = "deit_tiny_distilled_patch16_224"
WARM_SECONDS = 3.0
BATCHES = (1, 32)


class Load(NamedTuple):
    """What clients saw of a server."""

    images_per_second: float
    p50_ms: float
    p99_ms: float
    processor_ms: float
    """of the server, for an image"""


def our_predictor() -> Predictor:
    config = STUDENTS["deit_tiny"]
    preprocessing = student_preprocessing(config, photos=True, name="deit_tiny")
    classes = tuple(f"class {number}" for number in range(config.classes))
    card = ModelCard(name="deit_tiny", architecture=config, classes=classes, preprocessing=preprocessing)
    return Predictor(Network(ViT(config), preprocessing), card, "cpu")


def photo() -> bytes:
    """A JPEG file of 320 x 240 pixels."""
    file = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).resize((320, 240)).save(file, "JPEG", quality=90)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------- serve


def run_timm(threads: int) -> None:
    """The other side, as it is written in an afternoon. Prints its address."""
    import uvicorn
    from fastapi import FastAPI, UploadFile

    torch.set_num_threads(threads)
    model = timm.create_model(TIMM, pretrained=False).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    names = [f"class {number}" for number in range(model.num_classes)]
    app = FastAPI()

    def predict(image: UploadFile) -> list[dict[str, object]]:
        pixels = transform(Image.open(image.file).convert("RGB"))
        with torch.inference_mode():
            best = model(pixels[None]).softmax(-1)[0].topk(5)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"class": names[number], "probability": share} for number, share in pairs]

    predict.__annotations__["image"] = UploadFile  # it is imported in here
    app.post("/predict")(predict)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


@contextmanager
def started(command: list[str], threads: int) -> Iterator[tuple[tuple[str, int], psutil.Process]]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            address = re.search(r"http://([\d.]+):(\d+)", server.stdout.readline())
            assert address is not None
            yield (address[1], int(address[2])), psutil.Process(server.pid)
        finally:
            server.terminate()


def measure(address: tuple[str, int], server: psutil.Process, clients: int, seconds: float, content: bytes) -> Load:
    """`clients` that each send `content` again and again; the first seconds do not count."""
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    body, headers = head + content + b"\r\n--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}
    begin = time.perf_counter() + WARM_SECONDS
    taken: list[float] = []
    answered = 0
    before = sum(server.cpu_times()[:2])

    def client() -> None:
        nonlocal answered
        connection = http.client.HTTPConnection(*address, timeout=120)
        while (start := time.perf_counter()) < begin + seconds:
            connection.request("POST", "/predict", body, headers)
            response = connection.getresponse()
            response.read()
            assert response.status == 200, response.status
            answered += 1
            if start >= begin:
                taken.append(time.perf_counter() - start)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent, processor = time.perf_counter() - begin, sum(server.cpu_times()[:2]) - before
    return Load(len(taken) / spent, *(1000 * np.percentile(taken, [50, 99])), 1000 * processor / answered)


def compare_servers(clients: int, seconds: float, rounds: int, threads: int) -> None:
    content = photo()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        (run / "model").mkdir(parents=True)
        predictor = our_predictor()
        save_model(run / "model", predictor.network, predictor.card)
        commands = {
            "deit serve": [sys.executable, "-m", "deitkit.cli", "serve", str(run), "--port", "0"],
            "FastAPI and timm": [sys.executable, __file__, "--threads", str(threads), "--handler"],
        }
        found: dict[str, list[Load]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                with started(command, threads) as (address, server):
                    found[name].append(measure(address, server, clients, seconds, content))
    print(f"{clients} clients, {threads} threads, {rounds} rounds of {seconds:g} s")
    for name, loads in found.items():
        rate, p50, p99, processor = (statistics.median(column) for column in zip(*loads, strict=True))
        ratio = statistics.median(
            ours.images_per_second / theirs.images_per_second
            for ours, theirs in zip(found["deit serve"], loads, strict=True)
        )
        print(
            f"{name:16} {rate:6.1f} images/s   p50 {p50:6.0f} ms   p99 {p99:6.0f} ms   "
            f"processor {processor:5.1f} ms an image   deit serve / this {ratio:.2f}"
        )


# ---------------------------------------------------------------------------------------------------------- onnx


def sessions(threads: int) -> dict[str, Callable[[NDArray[np.uint8]], object]]:
    """Functions of images in uint8 (N, 224, 224, 3)."""
    import onnxruntime

    predictor = our_predictor()
    preprocessing = predictor.card.preprocessing.model_copy(update={"crop_pct": 1.0})
    predictor = Predictor(Network(predictor.network.body, preprocessing), predictor.card, "cpu")
    float32 = onnx_model(predictor.network, predictor.card, "fused")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    images = MemorySplit(pixels, np.full(8, 999))
    int8, _ = to_int8(float32, images, 3, Gate(predictor, images, "fused", 1.0), Progress())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    model = timm.create_model(TIMM, pretrained=False).eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))

    def through(network: torch.nn.Module) -> Callable[[NDArray[np.uint8]], object]:
        def run(images_BHWC: NDArray[np.uint8]) -> object:
            with torch.inference_mode():
                images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float() / 255
                return network((images_BCHW - mean) / std)

        return run

    found = {"timm, eager": through(model), "deitkit, eager": through(predictor.network.body.eval())}
    for name, graph in (("ONNX float32", float32), ("ONNX int8", int8)):
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found[name] = lambda images_BHWC, session=session: session.run(None, {"images": images_BHWC})
    return found


def compare_networks(seconds: float, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    networks = sessions(threads)
    for batch in BATCHES:
        images = np.random.default_rng(1).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
        for _ in range(rounds):
            for name, network in networks.items():
                network(images)
                done, begin, before = 0, time.perf_counter(), time.process_time()
                while time.perf_counter() < begin + seconds:
                    network(images)
                    done += batch
                rate = done / (time.perf_counter() - begin)
                found[name].append((rate, 1000 * (time.process_time() - before) / done))
        print(f"batch {batch}, {threads} threads, {rounds} rounds of {seconds:g} s")
        for name, each in found.items():
            rate, processor = (statistics.median(column) for column in zip(*each, strict=True))
            ratio = statistics.median(
                theirs[1] / one[1] for one, theirs in zip(each, found["timm, eager"], strict=True)
            )
            print(f"{name:16} {rate:6.1f} images/s   processor {processor:5.1f} ms an image   timm / this {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("serve", "onnx"), default="serve")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--handler", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.handler:
        run_timm(given.threads)
    elif given.part == "serve":
        compare_servers(given.clients, given.seconds, given.rounds, given.threads)
    else:
        compare_networks(given.seconds, given.rounds, given.threads)


if __name__ == "__main__":
    main()
