"""A student or teacher as one ExecuTorch file (`.pte`), for telephones and small devices: computed by XNNPACK's kernels on the CPU.

Input: uint8 of shape (1, H, W, C), an image that has the network's size already; it is normalised inside. Output: float32 of shape
(1, classes), probabilities. Resizing stays with the application, because ExecuTorch has no kernel for it that agrees with Pillow's.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from deitkit.config import HeadChoice
from deitkit.deploy.onnx import Answer
from deitkit.deploy.parity import MOST_DISAGREEMENT, Exported, Gate, Parity, open_gate, quiet, write_judged
from deitkit.models.cnn import fold_batchnorm
from deitkit.models.predict import Predictor
from deitkit.terminal import Progress, UserError, file_size, shortened
from deitkit.views.augment import center_view

INSTALL = "pip install 'deitkit[executorch]'"


def export_executorch(
    run: Path,
    out: Path,
    *,
    head: HeadChoice = "fused",
    max_disagreement: float = MOST_DISAGREEMENT,
    progress: Progress | None = None,
) -> tuple[list[str], Parity]:
    """Write the network of a finished run into the new folder `out`: `model.pte`, `classes.json`, `parity.json` and `README.md`. One that
    fails the parity gate is called `rejected.pte`. Returns the names of the files and how the network compares. Raises UserError."""
    with _native_quiet():
        require_package()
    gate, _ = open_gate(run, out, head, max_disagreement)
    (progress or Progress()).say("lowering the network for XNNPACK: about half a minute")
    with _native_quiet():
        content = executorch_program(gate)
        parity = gate.compare(probabilities_of(content, gate.predictor))
    card = gate.predictor.card
    files = write_judged(
        out, ".pte", content, parity, {"precision": "float32", "head": gate.head},
        lambda name: _readme(gate, parity, name, len(content)),
    )  # fmt: skip
    (out / "classes.json").write_text(json.dumps(card.classes, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*files, "classes.json"], parity


def require_package() -> None:
    """Raises UserError if ExecuTorch is missing."""
    try:
        with quiet():
            import executorch.backends.xnnpack.partition.xnnpack_partitioner
            import executorch.runtime  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format executorch needs the package {error.name}: {INSTALL}") from error


@final
class _OfPixels(nn.Module):
    """Views in uint8 as evaluation makes them, (1, H, W, C) -> probabilities."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images_1HWC: torch.Tensor) -> torch.Tensor:
        probabilities_1K: torch.Tensor = self.answer(images_1HWC.permute(0, 3, 1, 2).float() / 255)
        return probabilities_1K


def executorch_program(gate: Gate) -> bytes:
    """The network of the gate as the content of a `.pte` file."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    network = copy.deepcopy(fold_batchnorm(gate.predictor.network)).to(memory_format=torch.contiguous_format)
    example = torch.zeros(1, *network.preprocessing.image_size, network.preprocessing.channels, dtype=torch.uint8)
    with quiet(), torch.no_grad():  # the passes are in Python: deit_photo takes half a minute
        program = torch.export.export(_OfPixels(Answer(network, gate.head)).eval(), (example,))
        try:
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            return bytes(lowered.to_executorch().buffer)
        except Exception as error:  # its passes raise anything
            why = shortened(" ".join(str(error.__cause__ or error).split()), 200)
            raise UserError(f"ExecuTorch cannot hold this network: {why}: --format onnx can") from error


def probabilities_of(content: bytes, predictor: Predictor) -> Exported:
    """A program as an `Exported`: each image is prepared as evaluation prepares it, but a small one, which evaluation leaves to the network
    to resize, is resized before."""
    from executorch.runtime import Runtime

    method: Any = Runtime.get().load_program(content).load_method("forward")

    images = predictor.card.preprocessing

    def answer(images_1HWC: np.ndarray) -> np.ndarray:
        view_HWC = center_view(images_1HWC[0], images.image_size, images.crop_pct, images.interpolation)
        view_1HWC = torch.from_numpy(np.ascontiguousarray(view_HWC[None]))
        found_1K: np.ndarray = method.execute([view_1HWC])[0].numpy().copy()
        return found_1K

    return answer


@contextmanager
def _native_quiet() -> Iterator[None]:
    """Without what libraries in C++ write to the standard error as they look at the processor."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _readme(gate: Gate, parity: Parity, name: str, size: int) -> str:
    preprocessing = gate.predictor.card.preprocessing
    height, width = preprocessing.image_size
    frame_height, frame_width = (math.floor(side / preprocessing.crop_pct) for side in preprocessing.image_size)
    channels, classes = preprocessing.channels, len(gate.predictor.classes)
    return f"""# {gate.predictor.card.name}, ExecuTorch

{parity.line(name)} (validation images).
Largest difference of a probability: {parity.largest_difference:.2g}. {file_size(size)}; head: {gate.head}.

Input: uint8 of shape (1, {height}, {width}, {channels}). Output: float32 of shape (1, {classes}), probabilities of the
classes in `classes.json`. Before: turn the image upright, resize it ({preprocessing.interpolation}, antialiased) until a frame of
{frame_height} x {frame_width} just fits inside, and cut out the centre {height} x {width}.

```python
import json

import numpy as np
import torch
from executorch.runtime import Runtime
from PIL import Image, ImageOps

classes = json.load(open("classes.json", encoding="utf-8"))
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{"RGB" if channels == 3 else "L"}")
scale = max({frame_width} / image.width, {frame_height} / image.height)
sides = [max({frame_width}, int(scale * image.width)), max({frame_height}, int(scale * image.height))]
image = image.resize(sides, Image.Resampling.{preprocessing.interpolation.upper()})
left, top = (image.width - {width}) // 2, (image.height - {height}) // 2
pixels = torch.from_numpy(np.array(image.crop((left, top, left + {width}, top + {height})))).reshape(1, {height}, {width}, {channels})
method = Runtime.get().load_program("{name}").load_method("forward")
(probabilities,) = method.execute([pixels])
print(classes[int(probabilities.argmax())], float(probabilities.max()))
```
"""
