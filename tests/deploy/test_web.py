"""ONNX Runtime for the web comes from where it is, or through npm; the folder of a page holds all that the page needs."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import onnxruntime
import pytest

from deitkit.cli import main
from deitkit.deploy import web
from deitkit.deploy.web import FILES, PACKAGE, VERSION, find_runtime
from deitkit.terminal import Progress, UserError

CONTENTS = {name: f"the content of {name}".encode() for name in FILES}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(web, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def archive(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as made:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return path


def folder(path: Path, contents: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return path


def npm(path: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name, the only one on the way."""
    path.mkdir()
    (path / "npm").write_text(f"#!/bin/sh\n{lines}\n")
    (path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_the_package_is_read_from_its_folder_or_its_archive(tmp_path: Path) -> None:
    whole = folder(tmp_path / "onnxruntime-web" / "dist", CONTENTS)
    for place in (whole, whole.parent, archive(tmp_path / "package.tgz", CONTENTS)):
        assert find_runtime(place, Progress()) == CONTENTS
    part = {FILES[0]: b"x"}
    (tmp_path / "text.tgz").write_text("no archive")
    for place in (
        folder(tmp_path / "part", part), archive(tmp_path / "part.tgz", part), tmp_path / "text.tgz", tmp_path / "none",
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"holds no {FILES[0]} and {FILES[1]}: give the folder or the archive of"):
            find_runtime(place, Progress())


def test_npm_is_asked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = archive(tmp_path / "package.tgz", CONTENTS)
    npm(tmp_path / "bin", f'echo "$@" >> {tmp_path}/asked; cp {made} "$6/{PACKAGE}-{VERSION}.tgz"', monkeypatch)
    for _ in range(2):
        assert find_runtime(None, Progress()) == CONTENTS
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert asked.startswith(f"pack {PACKAGE}@{VERSION} ")
    assert sorted(file.name for file in (cache / PACKAGE / VERSION).iterdir()) == sorted(FILES)


def test_without_it_one_line_says_how_to_get_it(
    cnn: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is computed."""
    command = ["export", str(cnn), "--format", "web", "--out", str(tmp_path / "out")]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(command) == 2
    assert "there is no npm here: run `npm pack onnxruntime-web@" in capsys.readouterr().err
    offline = (
        "npm error code ENOTFOUND\nnpm error network request failed, reason: getaddrinfo ENOTFOUND registry.npmjs.org"
    )
    for number, (lines, why) in enumerate(
        {
            "echo 'npm error no way\nto the registry' >&2; exit 1": "npm cannot get it: no way to the registry",
            f"echo '{offline}' >&2; exit 1": "npm cannot get it: no network, or a proxy that npm does not know (ENOTFOUND)",
            "exec sleep 20": "npm did not get it within 1 s",
            "exit 0": "npm brought no ort.wasm.bundle.min.mjs and ort-wasm-simd-threaded.wasm",
        }.items()
    ):
        npm(tmp_path / f"bin{number}", lines, monkeypatch)
        monkeypatch.setattr(web, "NPM_SECONDS", 1 if "sleep" in lines else 60)
        assert main(command) == 2
        (_, line) = capsys.readouterr().err.splitlines()
        assert f"{why}: run `npm pack" in line
    assert not (tmp_path / "out").exists()
    assert not cache.exists()
    assert main([*command, "--runtime", str(tmp_path / "none")]) == 2
    assert main(["export", str(cnn), "--format", "onnx", "--runtime", "x", "--out", str(tmp_path / "out")]) == 2
    assert "--runtime x: only with --format web" in capsys.readouterr().err


def test_the_folder_holds_the_page_the_network_and_the_runtime(
    cnn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime, out = folder(tmp_path / "dist", CONTENTS), tmp_path / "out"
    assert main(["export", str(cnn), "--format", "web", "--runtime", str(runtime), "--out", str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == sorted(
        ["README.md", "index.html", "model.onnx", "parity.json", *FILES]
    )
    assert "model.onnx: 0 of 145 images classified differently" in capsys.readouterr().err
    assert (out / FILES[1]).read_bytes() == CONTENTS[FILES[1]]
    assert "python -m http.server" in (out / "README.md").read_text()
    (output,) = onnxruntime.InferenceSession(out / "model.onnx").get_outputs()
    assert output.name == "probabilities"  # a teacher has no tokens that look
    assert '"tokens": []' in (out / "index.html").read_text()


def test_a_network_that_fails_the_gate_gets_no_page(cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, out = folder(tmp_path / "dist", CONTENTS), tmp_path / "out"
    monkeypatch.setattr("deitkit.deploy.parity.MOST_LOST", -1.0)
    assert main(["export", str(cnn), "--format", "web", "--runtime", str(runtime), "--out", str(out)]) == 1
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "parity.json", "rejected.onnx"]
