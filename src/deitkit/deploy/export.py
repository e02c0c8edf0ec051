"""A network in any of the formats, by its name."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from deitkit.deploy.executorch import export_executorch
from deitkit.deploy.formats import Format as WeightsFormat
from deitkit.deploy.formats import export_weights
from deitkit.deploy.onnx import export_onnx
from deitkit.deploy.parity import MOST_DISAGREEMENT, Parity
from deitkit.deploy.web import export_web
from deitkit.terminal import Progress, UserError, refuse_filled, unknown_name, written

Format = Literal["onnx", "web", "executorch"] | WeightsFormat
FORMATS = ("onnx", "web", "executorch", *get_args(WeightsFormat))


def export_run(
    run: Path, out: Path, form: str, *, progress: Progress | None = None, **settings: Any
) -> tuple[list[str], bool]:
    """Write the network of a finished run into the new folder `out`. `settings`: of `export_onnx`, `export_web`, `export_executorch` and
    `export_weights`. Returns the names of the files, and False if the network failed the parity gate. Raises UserError."""
    if form not in FORMATS:
        raise unknown_name("format", str(form), FORMATS)
    runtime = settings.pop("runtime", None)
    if form == "web":
        settings["runtime"] = runtime
    elif runtime is not None:
        raise UserError(f"--runtime {runtime}: only with --format web")
    progress = progress or Progress()
    weights: WeightsFormat | None = next((one for one in get_args(WeightsFormat) if one == form), None)
    fixed: dict[str, Any] = {"precision": "float32"} if weights or form == "executorch" else {}
    fixed |= {"head": "fused"} if weights else {}
    fixed |= {"max_disagreement": MOST_DISAGREEMENT} if weights == "deit" else {}
    for name, usual in fixed.items():
        if (given := settings.pop(name, usual)) != usual:
            raise UserError(f"--{name.replace('_', '-')} {given}: not with --format {form}")
    files: list[str]
    parity: Parity | None
    writers: dict[str, Callable[..., tuple[list[str], Parity]]] = {
        "onnx": export_onnx,
        "web": export_web,
        "executorch": export_executorch,
    }
    with filled(out):
        if weights is not None:
            files, parity = export_weights(run, out, weights, progress=progress, **settings)
        else:
            files, parity = writers[form](run, out, progress=progress, **settings)
    if parity is None:
        return files, True  # compared bit by bit alone
    file = next(name for name in files if name.endswith((".onnx", ".pte", ".safetensors")))
    progress.say(parity.line(file))
    if not parity.kept:
        progress.warn(f"it does not predict what the network predicts, so it is called {file}")
    return files, parity.kept


@contextlib.contextmanager
def filled(out: Path) -> Iterator[None]:
    """Within this block the new folder `out` is filled. If that fails, nothing of it stays. Raises UserError where it holds something."""
    with written(out):
        refuse_filled(out, "give another --out")
        before = set(out.iterdir()) if out.is_dir() else None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in set(out.iterdir()) - (before or set()):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            if before is None:
                out.rmdir()
        raise
