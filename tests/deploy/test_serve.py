"""The service: the predictions of `deit predict`, in batches; nobody can make it hold, decode or wait for more than its limits."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.torture import hostile_kinds
from tests.deploy.serving import encoded, form, health, png, post, request, serving, small_predictor, wait_for

import deitkit as dk
from deitkit.cli import main
from deitkit.data.decode import UnreadableImage, decode
from deitkit.deploy.serve import Limits, NoTeacher
from deitkit.deploy.serve.nearest import Nearest
from deitkit.inspect.explain import explain
from deitkit.models.predict import Predictor, load
from deitkit.models.zoo import save_model

DOCUMENT = Path(__file__).parents[2] / "docs" / "serve.md"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a network, as a run has it."""
    folder = tmp_path_factory.mktemp("served") / "run"
    predictor = small_predictor()
    (folder / "model").mkdir(parents=True)
    save_model(folder / "model", predictor.network, predictor.card)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cnn: Path) -> Path:
    out = tmp_path_factory.mktemp("served") / "student"
    dk.train("digits", out=out, teacher=cnn, steps=30)
    return out


class Gate:
    """Holds a network back until it is opened."""

    def __init__(self, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.shapes = threading.Event(), []  # type: ignore[var-annotated]
        usual = Predictor.probabilities

        def probabilities(one: Predictor, images_BHWC: Any, head: Any) -> torch.Tensor:
            if one is predictor:
                self.shapes.append(images_BHWC.shape)
                assert self.open.wait(20)
            return usual(one, images_BHWC, head)

        monkeypatch.setattr(Predictor, "probabilities", probabilities)


def test_answers_are_those_of_deit_predict(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(png(number, (40 + number, 30)))
    sent = [(str(file), file.read_bytes()) for file in files]
    with serving(load(saved)) as address:
        for query, flags in [
            ("", []),
            ("?top=2&head=dist&min_confidence=0.9", ["--top", "2", "--head", "dist", "--min-confidence", "0.9"]),
        ]:
            assert main(["predict", str(saved), *map(str, files), "--format", "json", *flags]) == 0
            expected = json.loads(capsys.readouterr().out)
            for field in ("image", "images"):
                status, found = post(address, f"/predict{query}", *sent, field=field)
                assert status == 200
                for ours, theirs in zip(found, expected, strict=True):
                    assert [one["class"] for one in ours["predictions"]] == [
                        one["class"] for one in theirs["predictions"]
                    ]
                    assert (ours["image"], ours["answer"]) == (theirs["image"], theirs["answer"])
                    probabilities = [[one["probability"] for one in each["predictions"]] for each in (ours, theirs)]
                    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-6)


def test_the_network_is_shown_the_pixels_that_deit_predict_shows_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    predictor = small_predictor()
    shown: list[Any] = []
    usual = predictor.probabilities
    monkeypatch.setattr(
        Predictor, "probabilities", lambda _, images, head: (shown.append(images), usual(images, head))[1]
    )
    (tmp_path / "a.png").write_bytes(png(7, (131, 90)))
    with serving(predictor) as address:
        assert post(address, "/predict", ("a.png", png(7, (131, 90))))[0] == 200
    np.testing.assert_array_equal(shown[0][0], predictor.view(tmp_path / "a.png"))


def test_many_clients_at_once_get_their_own_answers_from_few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those above the limit are sent away; nobody waits for ever."""
    predictor = small_predictor()
    gate = Gate(predictor, monkeypatch)
    clients_at_once, limit = 200, 128
    contents = [png(number) for number in range(clients_at_once)]
    limits = Limits(max_batch=16, max_in_flight=limit)
    with serving(predictor, limits) as address, ThreadPoolExecutor(clients_at_once) as clients:
        answers = [
            clients.submit(post, address, "/predict?top=3", (str(k), content)) for k, content in enumerate(contents)
        ]
        wait_for(lambda: sum(one.done() for one in answers) == clients_at_once - limit)  # the others wait
        gate.open.set()
        found = [answer.result() for answer in answers]
        counted = health(address)
    assert [status for status, _ in found].count(200) == limit
    assert counted["images"] == limit
    assert counted["batches"] <= 16  # of 16 but for the first ones
    assert max(shape[0] for shape in gate.shapes) == 16
    for number, (status, answer) in enumerate(found):
        if status == 503:
            assert "requests are being answered" in answer["detail"]
            continue
        (one,) = answer
        assert (status, one["image"]) == (200, str(number))
        view = predictor.view(decode(contents[number], ""))
        expected = predictor.ranked([""], predictor.probabilities(view[None], "fused"), 3)[0]
        assert [each["class"] for each in one["predictions"]] == list(expected.classes)
        assert one["predictions"][0]["probability"] == pytest.approx(expected.probabilities[0], abs=1e-5)


@pytest.mark.parametrize("kind", ["announced", "an image", "no form"])
def test_a_body_is_cut_off_at_the_limit_and_kept_nowhere(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(small_predictor(), Limits(max_bytes=10**6)) as address, socket.create_connection(address) as client:
        client.sendall(_start_of_a_post(10**9 if kind == "announced" else None))
        sent = 0
        if kind != "announced":
            if kind == "an image":
                _send_chunk(client, form(("a.png", b"?"))[0].partition(b"?")[0])
            with contextlib.suppress(OSError):
                for _ in range(1000):  # a gigabyte
                    _send_chunk(client, bytes(10**6))
                    sent += 10**6
        response = client.recv(300)
        assert response.startswith(b"HTTP/1.1 400 " if kind == "no form" else b"HTTP/1.1 413 ")
        assert b"connection: close" in response
        assert sent <= 20 * 10**6  # what fits into the sockets
        assert not list(tmp_path.iterdir())
        assert post(address, "/predict", ("a", png()))[0] == 200


def _start_of_a_post(length: int | None, path: str = "/predict") -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary==-=\r\n{size}\r\n\r\n".encode()
    )


def _send_chunk(client: socket.socket, content: bytes) -> None:
    client.sendall(f"{len(content):x}\r\n".encode() + content + b"\r\n")


def test_an_image_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("deitkit.deploy.serve.guard.decode", decoded)
    with serving(small_predictor(), Limits(max_pixels=1199)) as address:
        assert post(address, "/predict", ("a.png", png())) == (
            413, {"detail": "a.png: has 30 x 40 pixels, more than 1199"},
        )  # fmt: skip
        for side in (1000, 10_000, 60_000):  # Pillow warns of the second, and refuses the third
            status, found = post(address, "/predict", ("bomb.png", _bomb(side)))
            assert (status, found["detail"][:13]) == (413, "bomb.png: has")


def _bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"no image", "a: not an image of a known format"),
        (b"", "a: not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a: not an image of a known format"),
        (png()[:300], "a: "),
    ],
    ids=["text", "empty", "a program for a printer", "cut short"],
)
def test_what_is_no_image_is_refused_in_one_line(content: bytes, why: str) -> None:
    with serving(small_predictor()) as address:
        status, found = post(address, "/predict", ("a", content))
        assert status == 415
        assert found["detail"].startswith(why)
        assert post(address, "/predict", ("b", png()), ("a", content))[0] == 415
        assert post(address, "/predict", ("b", png()))[0] == 200


def _with_a_long_text() -> bytes:
    """A PNG with a compressed text of two megabytes, more than Pillow unpacks."""
    text = b"Comment\0\0" + zlib.compress(bytes(2 * 10**6))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    content = png()
    return content[:33] + chunk + content[33:]


def test_files_of_every_hostile_kind_are_answered_as_documented() -> None:
    """Those on which `make torture` trains; what `deit predict` reads is read."""
    kinds = {**hostile_kinds(random.Random(0)), "long text": lambda: ("a.png", _with_a_long_text())}
    predictor = small_predictor()
    with serving(predictor) as address:
        found = {}
        for kind, make in kinds.items():
            name, content = make()
            found[kind] = post(address, "/predict", (name.replace("\n", " "), content))[0]
            try:
                decode(content, name, Limits().max_pixels)
                readable = 200
            except UnreadableImage:
                readable = 413 if kind == "decompression bomb" else 415
            assert found[kind] == readable, kind
        assert len(found) > 20
        assert found["long text"] == 200
        assert health(address)["status"] == "ok"


def test_what_a_service_cannot_do_is_said() -> None:
    with serving(small_predictor(distilled=False)) as address:
        assert post(address, "/predict")[0] == 422  # no image
        assert post(address, "/predict?head=dist", ("a", png())) == (
            422, {"detail": "head 'dist': this network has no distillation head: choose cls or fused"},
        )  # fmt: skip
        for query in ("top=0", "head=tail", "min_confidence=2"):
            status, found = post(address, f"/predict?{query}", ("a", png()))
            assert status == 422
            assert found["detail"].startswith(f"{query.partition('=')[0]}: Input should be ")
        urlencoded = {"content-type": "application/x-www-form-urlencoded"}
        for path in ("/predict", "/explain", "/nearest"):
            status, _, body = request(address, path, b"image=hello", urlencoded)
            assert (status, json.loads(body)["detail"]) == (
                422,
                "image: send a file, as `curl -F image=@photo.jpg` does",
            )
        assert post(address, "/nearest", ("a", png()), ("b", png())) == (
            422, {"detail": "send one image in the field `image` of a form, not 2"},
        )  # fmt: skip
        assert post(address, "/predict", *[("a", png(size=(2, 2)))] * 65)[0] == 413
        assert post(address, "/nearest", ("a", png())) == (200, {"state": "none", "images": []})
        assert request(address, "/predict", b"{}", {"content-type": "application/json"})[0] == 422


def test_a_client_whose_request_does_not_arrive_is_let_go() -> None:
    limits = Limits(timeout_s=0.4)
    with serving(small_predictor(), limits) as address:
        with socket.create_connection(address, timeout=10) as client:
            client.sendall(_start_of_a_post(1000) + b"--=-=\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(address, timeout=10) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nhost:")  # the headers never end
            for _ in range(30):
                try:
                    client.sendall(b"x")
                    time.sleep(0.05)
                except OSError:
                    break
            else:
                pytest.fail("the connection stays open")
        with socket.create_connection(address, timeout=10) as client:
            assert client.recv(1) == b""  # nothing is ever sent
        assert post(address, "/predict", ("a", png()))[0] == 200


def test_a_client_that_goes_leaves_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(small_predictor()) as address:
        for part in (_start_of_a_post(1000), _start_of_a_post(1000) + b"--=-=\r\n", b"POST /pre", b"\x16\x03\x01\x00"):
            with socket.create_connection(address) as client:
                client.sendall(part)
        assert post(address, "/predict", ("a", png()))[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_too_many_requests_at_once_are_sent_away_and_slow_answers_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = small_predictor()
    gate = Gate(predictor, monkeypatch)
    with (
        serving(predictor, Limits(max_in_flight=2, timeout_s=1.5)) as address,
        ThreadPoolExecutor(2) as clients,
    ):
        waiting = [clients.submit(post, address, "/predict", ("a", png())) for _ in range(2)]
        wait_for(lambda: gate.shapes)
        time.sleep(0.3)
        status, headers, _ = request(address, "/predict", *form(("a", png())))
        assert (status, headers["retry-after"]) == (503, "1")
        assert health(address)["status"] == "ok"
        assert [one.result() for one in waiting] == [
            (504, {"detail": "no answer within 1.5 s (the service's --timeout-s)"})
        ] * 2
        gate.open.set()
        assert post(address, "/predict", ("a", png()))[0] == 200


def test_who_waits_while_the_server_stops_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.deploy.serve.server.GRACE_SECONDS", 1)
    begun, end = threading.Event(), threading.Event()

    def slow(*_: Any) -> dict[str, Any]:
        begun.set()
        return {"late": end.wait(20)}

    with ThreadPoolExecutor(1) as clients:
        with serving(small_predictor(), explain=slow) as address:
            waiting = clients.submit(post, address, "/explain", ("a", png()))
            assert begun.wait(10)
        end.set()
        assert waiting.result() == (503, {"detail": "the server is being stopped"})


def test_an_error_of_the_network_is_of_those_who_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = small_predictor()
    usual = predictor.probabilities

    def probabilities(_: Predictor, images_BHWC: Any, head: Any) -> torch.Tensor:
        if head == "cls":
            raise RuntimeError("broken")
        return usual(images_BHWC, head)

    monkeypatch.setattr(Predictor, "probabilities", probabilities)
    with serving(predictor, Limits(max_delay_ms=300)) as address, ThreadPoolExecutor(2) as clients:
        good = clients.submit(post, address, "/predict", ("a", png()))
        bad = clients.submit(request, address, "/predict?head=cls", *form(("a", png())))
        assert bad.result()[0] == 500
        assert good.result()[0] == 200
        assert post(address, "/predict", ("a", png()))[0] == 200


def test_names_with_markup_are_text() -> None:
    evil = "<img src=x onerror=alert(1)>"
    with serving(small_predictor((evil, "</script>", "c & d"))) as address:
        status, headers, page = request(address, "/")
        assert status == 200
        assert evil.encode() not in page
        assert page.count(b"</script>") == 1
        assert b"&lt;img src=x" in page
        assert "default-src 'none'" in headers["content-security-policy"]
        _, _, content = request(address, "/predict", *form((evil, png())))
        assert request(address, "/predict", *form((evil, png())))[1]["content-type"] == "application/json"
        assert json.loads(content)[0]["image"] == evil
        assert not re.search(rb"""(?:src|href)=["']?(?:https?:)?//""", page)  # nothing from elsewhere


def test_the_description_of_the_service_lists_its_routes() -> None:
    with serving(small_predictor()) as address:
        described = json.loads(request(address, "/openapi.json")[2])
        assert sorted(described["paths"]) == ["/explain", "/healthz", "/nearest", "/predict"]
        assert {"408", "413", "415", "503", "504"} <= described["paths"]["/predict"]["post"]["responses"].keys()
        assert request(address, "/docs")[0] == 200


def test_a_teacher_that_is_gone_is_not_found_and_an_error_of_ours_is_one_line_of_json_too() -> None:
    def fails(_pixels: object, with_teacher: bool) -> dict[str, Any]:
        raise NoTeacher("teacher t: not there") if with_teacher else RuntimeError("a secret")

    with serving(small_predictor(), explain=fails, teacher="t") as address:
        assert post(address, "/explain?teacher=true", ("a", png())) == (404, {"detail": "teacher t: not there"})
        assert post(address, "/explain", ("a", png())) == (500, {"detail": "an error of the service: its log has it"})
        assert health(address)["status"] == "ok"


def test_a_run_explains_and_shows_the_nearest_training_images(run: Path) -> None:
    looker = load(run)
    nearest = Nearest(looker, run)
    with serving(
        load(run), explain=lambda pixels, _: explain(looker, pixels).with_overlays(), nearest=nearest
    ) as address:
        wait_for(lambda: health(address)["nearest"] != "loading")
        digit = nearest.split.read(nearest.positions[5])
        sent = ("seven.png", encoded(digit))
        status, found = post(address, "/explain", sent)
        assert (status, found["image"]) == (200, "seven.png")
        titles = [one["title"] for one in found["attributions"]]
        assert titles[0] == "class token: attention"
        assert "distillation token: attention" in titles
        for one in found["attributions"]:
            assert np.sum(one["weights"]) == pytest.approx(1, abs=1e-4)
            assert one["overlay"].startswith("data:image/png;base64,")
        assert post(address, "/explain?teacher=true", sent) == (404, {"detail": "this network has no teacher"})
        status, found = post(address, "/nearest?most=3", sent)
        assert (status, found["state"], len(found["images"])) == (200, "ready", 3)
        assert found["images"][0]["cosine"] == pytest.approx(1, abs=1e-3)  # the image itself
        cosines = [one["cosine"] for one in found["images"]]
        assert cosines == sorted(cosines, reverse=True)
        label = int(nearest.split.labels_N[nearest.positions[5]])
        assert found["images"][0]["class"] == looker.classes[label]


def test_without_its_data_a_run_has_no_nearest_images(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(load(saved), nearest=Nearest(load(saved), saved)) as address:
        wait_for(lambda: health(address)["nearest"] == "none")
        assert post(address, "/nearest", ("a", png())) == (200, {"state": "none", "images": []})
    assert "warning: nearest training images are not shown" in capfd.readouterr().err


def test_a_taken_port_and_an_unknown_host_are_one_line(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(saved), "--port", str(port)]) == 2
    assert main(["serve", str(saved), "--host", "no.such.host.invalid", "--port", "0"]) == 2
    assert main(["serve", str(saved), "--max-bytes", "many"]) == 2
    assert main(["serve", str(saved / "none")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert f"--port {port}: address already in use" in lines[0]
    assert all(line.startswith("deit: error: ") for line in lines)


def test_a_missing_package_is_named_with_what_installs_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(saved)]) == 2
    assert "deit serve needs the package uvicorn: pip install 'deitkit[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_holds_no_large_post_in_memory_and_stops_cleanly(
    saved: Path, run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    served = saved if number == signal.SIGTERM else run
    command = [sys.executable, "-m", "deitkit", "serve", str(served), "--port", "0", "--max-bytes", "200MB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        found = re.search(r"http://(127\.0\.0\.1):(\d+)", server.stdout.readline())
        assert found is not None
        address = found[1], int(found[2])
        assert post(address, "/predict", ("a.png", png()))[0] == 200
        if shutil.which("curl"):
            (tmp_path / "photo.jpg").write_bytes(png())
            (line,) = re.findall(r"^curl .*", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
            words = shlex.split(line.replace(":8000", f":{address[1]}"))
            (answer,) = json.loads(subprocess.run(words, cwd=tmp_path, capture_output=True, check=True).stdout)
            assert len(answer["predictions"]) == 3
        if served == run:
            code, explained = post(address, "/explain?teacher=true", ("a.png", png()))
            assert code == 200
            assert "teacher" in explained["answers"]
            assert explained["attributions"][-1]["title"] == "teacher: gradients"
        status = Path(f"/proc/{server.pid}/status")
        if number == signal.SIGTERM and status.is_file():
            before = _peak(status)
            connection = http.client.HTTPConnection(*address, timeout=60)
            head, tail = form(("a.png", b"?"))[0].split(b"?")
            connection.request(
                "POST", "/predict", iter([head, *[bytes(10**6)] * 150, tail]), form()[1], encode_chunked=True
            )
            assert connection.getresponse().status == 415
            connection.close()
            # the content is held once, while it is looked at; what arrives lies in a file
            assert _peak(status) - before < 300 * 10**6
        server.send_signal(number)
        assert server.wait(20) == 0
        assert "Traceback" not in server.stderr.read()


def _peak(status: Path) -> int:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1000
