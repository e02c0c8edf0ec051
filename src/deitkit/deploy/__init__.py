"""Leaving the house: a network for other programs, checked against the one it came from. Imports training and everything below it.

formats.py   a student's weights for timm, Hugging Face and the original DeiT, bit for bit
onnx.py      students and teachers as one ONNX file that takes images as they are
executorch.py  the same as a program for telephones
parity.py    does the exported file predict what the network predicts?
web.py       a folder that classifies in a browser
serve/       classifying over HTTP
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from deitkit.deploy.executorch import export_executorch
from deitkit.deploy.formats import Format as WeightsFormat
from deitkit.deploy.formats import export_weights
from deitkit.deploy.onnx import export_onnx
from deitkit.deploy.parity import MOST_DISAGREEMENT, Parity
from deitkit.deploy.web import export_web
from deitkit.terminal import Progress, UserError, unknown_name

Format = Literal["onnx", "web", "executorch"] | WeightsFormat
FORMATS = ("onnx", "web", "executorch", *get_args(WeightsFormat))


def export_run(
    run: Path, out: Path, form: str, *, progress: Progress | None = None, **settings: Any
) -> tuple[list[str], bool]:
    """Write the network of a finished run into the new folder `out`. `settings`: of `export_onnx`, `export_web` and
    `export_executorch`. Returns the names of
    the files, and whether the network passed the parity gate. Raises UserError."""
    if form not in FORMATS:
        raise unknown_name("format", str(form), FORMATS)
    runtime = settings.pop("runtime", None)
    if form == "web":
        settings["runtime"] = runtime
    elif runtime is not None:
        raise UserError(f"--runtime {runtime}: only with --format web")
    weights: WeightsFormat | None = next((one for one in get_args(WeightsFormat) if one == form), None)
    if weights is not None:
        for name, usual in (("precision", "float32"), ("head", "fused"), ("max_disagreement", MOST_DISAGREEMENT)):
            if settings.get(name, usual) != usual:
                raise UserError(f"--{name.replace('_', '-')} {settings[name]}: not with --format {form}")
        return export_weights(run, out, weights), True  # read again and compared bit by bit
    progress = progress or Progress()
    if form == "executorch" and (precision := settings.pop("precision", "float32")) != "float32":
        raise UserError(f"--precision {precision}: not with --format {form}")
    writers: dict[str, Callable[..., tuple[list[str], Parity]]] = {
        "onnx": export_onnx,
        "web": export_web,
        "executorch": export_executorch,
    }
    files, parity = writers[form](run, out, progress=progress, **settings)
    file = next(name for name in files if name.endswith((".onnx", ".pte")))
    progress.say(parity.line(file))
    if not parity.kept:
        progress.warn(f"it does not predict what the network predicts, so it is called {file}")
    return files, parity.kept
