"""A folder that classifies images in a browser: a page, the ONNX file and ONNX Runtime for the web. Any server of files will do.

ONNX Runtime comes as the npm package `onnxruntime-web`: from where the caller says, from this program's cache, or through `npm`.
"""

from __future__ import annotations

import lzma
import math
import re
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from deitkit.data.caching import cache_folder
from deitkit.deploy.onnx import export_onnx
from deitkit.deploy.parity import Parity
from deitkit.models.vit import ViTConfig
from deitkit.models.zoo import ModelCard, read_card
from deitkit.pages import template
from deitkit.terminal import Progress, Replaced, UserError, shortened, write_atomically, written

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
"""Of the package's folder `dist`: the CPU's kernels, with one thread or several; the page asks for one, which needs no special headers."""
TOKENS = ("class token", "distillation token")
COLOURS = 32
"""Of the overlay, from dark (the patch that counts least) to yellow; those between are mixed."""
NPM_SECONDS = 600
NO_NETWORK = frozenset({
    "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH", "ENOTFOUND", "ERR_SOCKET_TIMEOUT", "ETIMEDOUT",
})  # fmt: skip
"""npm's codes for a registry that cannot be reached."""
NPM_PATIENCE = ("--fetch-retries=1", "--fetch-timeout=60000")
USAGE = f"""
# The page

`python -m http.server` in this folder, then http://localhost:8000 in a browser. Any server of files will do; a page that a browser reads
from the disk (`file://`) may not open the network. Images stay in the browser.
A student's file has a second output, `attention`: float32 of shape (N, tokens, rows, columns), where its tokens look (attention rollout).
`{FILES[0]}` and `{FILES[1]}` are {PACKAGE} {VERSION} (MIT licence).
"""


def export_web(
    run: Path, out: Path, *, runtime: Path | None = None, progress: Progress, **settings: Any
) -> tuple[list[str], Parity]:
    """`export_onnx` into the new folder `out`, with a student's attention, and the page and ONNX Runtime beside it; without them if the
    network fails the parity gate. `runtime`: the package `onnxruntime-web`, its folder or its archive. Raises UserError."""
    contents = find_runtime(runtime, progress)
    files, parity = export_onnx(run, out, attention=True, progress=progress, **settings)
    if not parity.kept:
        return files, parity
    write_page(out, read_card(run / "model"), contents)
    return ["index.html", *files, *contents], parity


def write_page(out: Path, card: ModelCard, runtime: dict[str, bytes]) -> None:
    """The page of the network in `out / "model.onnx"`, with ONNX Runtime, and how to serve them. Raises UserError."""
    import matplotlib as mpl  # here, because it is slow to import

    script, wasm = (f"./{name}" for name in FILES)
    shape, images = card.architecture, card.preprocessing
    facts = {
        "classes": card.classes,
        "channels": images.channels,
        "size": images.image_size,
        "frame": [math.floor(side / images.crop_pct) for side in images.image_size],
        "tokens": TOKENS[: shape.prefix_tokens] if isinstance(shape, ViTConfig) else [],
        "colours": np.round(255 * mpl.colormaps["inferno"](np.linspace(0, 1, COLOURS))[:, :3]).tolist(),
        "runtime": script,
        "wasm": wasm,
    }
    page = template("deitkit.deploy", "page.html.jinja").render(card=card, script="browser.js", facts=facts)
    for name, content in runtime.items():
        write_atomically(out / name, content)
    readme = out / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    write_atomically(readme, before + USAGE)
    write_atomically(out / "index.html", page)


def find_runtime(given: Path | None, progress: Progress) -> dict[str, bytes]:
    """The files of ONNX Runtime by name: from `given`, else from the cache, else fetched by npm into the cache. Raises UserError."""
    if given is not None:
        if (found := _read(given)) is None:
            raise UserError(
                f"--runtime {given}: holds no {' and '.join(FILES)}: give the folder or the archive of {PACKAGE} {VERSION}"
            )
        return found
    folder = cache_folder() / PACKAGE / VERSION
    found = _read(folder)
    if found is None:
        progress.say(f"fetching {PACKAGE} {VERSION} by npm (33 MB, once)")
        found = _fetch()
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in found.items():
                with Replaced(folder / name) as temporary:
                    temporary.write_bytes(content)
    return found


def _read(place: Path) -> dict[str, bytes] | None:
    """The files from a folder of the package, or from its archive; None if one is not there."""
    try:
        if place.is_file():
            with tarfile.open(place) as archive:
                members = [archive.extractfile(f"package/dist/{name}") for name in FILES]
                found = {name: member.read() for name, member in zip(FILES, members, strict=True) if member is not None}
                return found if len(found) == len(FILES) else None
        folder = next((one for one in (place, place / "dist") if all((one / name).is_file() for name in FILES)), None)
        return None if folder is None else {name: (folder / name).read_bytes() for name in FILES}
    except (OSError, tarfile.TarError, KeyError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return None


def _fetch() -> dict[str, bytes]:
    """The files, through npm. Raises UserError, which says how else to get them."""
    package = f"{PACKAGE}@{VERSION}"
    otherwise = f"run `npm pack {package}` where that works and give the file by --runtime"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "npm",
            "pack",
            package,
            "--ignore-scripts",
            "--loglevel=error",
            "--pack-destination",
            folder,
            *NPM_PATIENCE,
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=NPM_SECONDS, stdin=subprocess.DEVNULL)
        except FileNotFoundError as error:
            raise UserError(f"--format web needs {package}, and there is no npm here: {otherwise}") from error
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{package}: npm did not get it within {NPM_SECONDS} s: {otherwise}") from error
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error).encode()
            raise UserError(
                f"{package}: npm cannot get it: {_why(said.decode(errors='replace'))}: {otherwise}"
            ) from error
        archive = next(Path(folder).glob("*.tgz"), None)
        found = None if archive is None else _read(archive)
    if found is None:
        raise UserError(f"{package}: npm brought no {' and '.join(FILES)}: {otherwise}")
    return found


def _why(said: str) -> str:
    """Why npm failed, from what it said."""
    code = re.search(r"\bcode (E[A-Z_]+)", said)
    if code is not None and code[1] in NO_NETWORK:
        return f"no network, or a proxy that npm does not know ({code[1]})"
    return shortened(" ".join(re.sub(r"^npm (error|ERR!)", "", said, flags=re.MULTILINE).split()) or "npm failed", 200)
