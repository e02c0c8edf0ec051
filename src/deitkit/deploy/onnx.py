"""A student or teacher as one ONNX file: images as they are go in, probabilities come out.

Input `images`: uint8 of shape (N, H, W, C), any N, H and W. The file resizes, crops and normalises them as evaluation does. Output
`probabilities`: float32 of shape (N, classes). The names of the classes are in the file's metadata. The page's file has a second output of
a student, `attention`: float32 of shape (N, tokens, rows, columns), where each token before the patches looks.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import nn

from deitkit.config import HeadChoice, Preprocessing
from deitkit.data import Split
from deitkit.deploy.parity import (
    MOST_DISAGREEMENT,
    Gate,
    Parity,
    open_gate,
    probabilities_of,
    quiet,
    readable,
    write_judged,
)
from deitkit.models.network import Network
from deitkit.models.predict import fuse
from deitkit.models.vit import ViT, attention_rollout
from deitkit.models.zoo import ModelCard
from deitkit.terminal import Progress, UserError, file_size
from deitkit.views.augment import LONGEST

OnnxPrecision = Literal["float32", "float16", "int8"]
OPSET = 20
CALIBRATION_IMAGES = 128
"""Training images whose activations decide the ranges of int8."""
INSTALL = "pip install 'deitkit[export]'"

PREPROCESSING = """
<ir_version: 10, opset_import: ["" : {opset}]>
preprocessing (uint8[N, H, W, C] images) => (float[N, {channels}, {height}, {width}] pixels)
<int64[1] frame_height = {{{frame_height}}}, int64[1] frame_width = {{{frame_width}}}, int64[2] size = {{{height}, {width}}},
 int64[2] axes = {{2, 3}}, int64[2] sides = {{1, 2}},
 int64[1] longest = {{{longest}}}, int64[1] one = {{1}}, int64[1] pair = {{2}}, float zero = {{0}}, float most = {{255}}, float two = {{2}}>
{{
  batch = Shape<start = 0, end = 1>(images)
  whole_height = Shape<start = 1, end = 2>(images)
  whole_width = Shape<start = 2, end = 3>(images)
  longest_height_0 = Mul(longest, whole_width)
  longest_height_1 = Mul(longest_height_0, frame_height)
  longest_height_2 = Div(longest_height_1, frame_width)
  longest_height = Max(longest_height_2, one)
  height = Min(whole_height, longest_height)
  longest_width_0 = Mul(longest, whole_height)
  longest_width_1 = Mul(longest_width_0, frame_width)
  longest_width_2 = Div(longest_width_1, frame_height)
  longest_width = Max(longest_width_2, one)
  width = Min(whole_width, longest_width)
  whole_size = Concat<axis = 0>(whole_height, whole_width)
  kept_size = Concat<axis = 0>(height, width)
  ends = Sub(whole_size, kept_size)
  kept_start = Div(ends, pair)
  kept_end = Add(kept_start, kept_size)
  kept = Slice(images, kept_start, kept_end, sides)
  channels = Shape<start = 3, end = 4>(images)
  wide = Mul(width, frame_height)
  wide_frame = Mul(height, frame_width)
  fits_height = GreaterOrEqual(wide, wide_frame)
  width_by_height = Div(wide, height)
  width_at_least = Max(width_by_height, frame_width)
  scaled_width = Where(fits_height, width_at_least, frame_width)
  height_by_width = Div(wide_frame, width)
  height_at_least = Max(height_by_width, frame_height)
  scaled_height = Where(fits_height, frame_height, height_at_least)
  scaled = Concat<axis = 0>(batch, channels, scaled_height, scaled_width)
  numbers = Cast<to = 1>(kept)
  planes = Transpose<perm = [0, 3, 1, 2]>(numbers)
  resized = Resize<mode = "{mode}", antialias = {antialias}, cubic_coeff_a = -0.5, exclude_outside = {exclude_outside},
                   coordinate_transformation_mode = "half_pixel", nearest_mode = "floor">(planes, , , scaled)
  whole = Round(resized)
  levels = Clip(whole, zero, most)
  scaled_size = Concat<axis = 0>(scaled_height, scaled_width)
  spare = Sub(scaled_size, size)
  spare_numbers = Cast<to = 1>(spare)
  half = Div(spare_numbers, two)
  half_whole = Round(half)
  start = Cast<to = 7>(half_whole)
  end = Add(start, size)
  cropped = Slice(levels, start, end, axes)
  pixels = Div(cropped, most)
}}
"""
"""`views.augment.center_view` in ONNX's text format: the far ends of a very long image cut off, resized until the frame just fits
inside, its centre cut out."""


def export_onnx(
    run: Path,
    out: Path,
    *,
    precision: OnnxPrecision = "float32",
    head: HeadChoice = "fused",
    max_disagreement: float = MOST_DISAGREEMENT,
    attention: bool = False,
    progress: Progress | None = None,
) -> tuple[list[str], Parity]:
    """Write the network of a finished run into the new folder `out`: `model.onnx`, `parity.json` and `README.md`. One that fails the parity
    gate is called `rejected.onnx`. `attention`: with the second output. Returns the names of the files and how the network compares. Raises
    UserError."""
    require_packages()
    progress = progress or Progress()
    gate, dataset = open_gate(run, out, head, max_disagreement)
    card = gate.predictor.card
    model = onnx_model(gate.predictor.network, card, gate.head, attention=attention)
    if precision == "int8":
        model, parity = to_int8(model, dataset.open_split("train"), card.preprocessing.channels, gate, progress)
    else:
        model = to_float16(model) if precision == "float16" else model
        parity = gate.compare(probabilities_of(session_of(model.SerializeToString())))
    content = model.SerializeToString()
    facts = {"precision": precision, "head": gate.head}
    text = lambda name: _readme(card, precision, gate.head, parity, name, len(content))  # noqa: E731
    return write_judged(out, ".onnx", content, parity, facts, text), parity


def require_packages() -> None:
    """Raises UserError if the packages for ONNX are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs the package {error.name}: {INSTALL}") from error


# --------------------------------------------------------------------------------------------------------- graph


@final
class Answer(nn.Module):
    """Views in [0, 1], as evaluation makes them -> probabilities, and where a student's tokens look if `attention`."""

    def __init__(self, network: Network, head: HeadChoice, *, attention: bool = False) -> None:
        super().__init__()
        self.network, self.head = network, head
        self.attention = attention and isinstance(network.body, ViT)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if self.attention:
            heads, rollout_BPhw = attention_rollout(self.network, pixels)
            return fuse(heads, self.head), rollout_BPhw
        heads = self.network(pixels)
        return fuse(heads, self.head)


def onnx_model(network: Network, card: ModelCard, head: HeadChoice, *, attention: bool = False) -> Any:
    """The network behind its preprocessing, as an `onnx.ModelProto` in float32; with the second output if `attention`."""
    from onnx import checker, compose, helper, parser

    preprocessing = network.preprocessing
    example = torch.zeros(2, preprocessing.channels, *preprocessing.image_size)
    answer = Answer(network, head, attention=attention).eval()
    with quiet():
        exported = torch.onnx.export(
            answer,
            (example,),
            dynamo=True,
            input_names=["pixels"],
            output_names=["probabilities", "attention"] if answer.attention else ["probabilities"],
            dynamic_shapes={"pixels": {0: torch.export.Dim("N")}},
            opset_version=OPSET,
            verbose=False,
        )
    assert exported is not None
    body = exported.model_proto
    for value in [*body.graph.node, *body.graph.input, *body.graph.output, *body.graph.value_info]:
        del value.metadata_props[:]  # where in the source each node comes from
    before = parser.parse_model(_preprocessing_text(preprocessing))
    before.ir_version = body.ir_version
    model = compose.merge_models(before, body, io_map=[("pixels", "pixels")])
    del model.opset_import[:]  # each part brought its own
    model.opset_import.append(helper.make_opsetid("", OPSET))
    facts = {"classes": json.dumps(card.classes), "network": card.name, "head": head}
    helper.set_model_props(model, facts)
    model.producer_name = "deitkit"
    checker.check_model(model)
    return model


def _preprocessing_text(preprocessing: Preprocessing) -> str:
    height, width = preprocessing.image_size
    frame_height, frame_width = (math.floor(side / preprocessing.crop_pct) for side in preprocessing.image_size)
    nearest = preprocessing.interpolation == "nearest"
    return PREPROCESSING.format(
        opset=OPSET,
        longest=LONGEST,
        channels=preprocessing.channels,
        height=height,
        width=width,
        frame_height=frame_height,
        frame_width=frame_width,
        mode={"bicubic": "cubic", "bilinear": "linear", "nearest": "nearest"}[preprocessing.interpolation],
        antialias=0 if nearest else 1,
        exclude_outside=1 if preprocessing.interpolation == "bicubic" else 0,
    )


def session_of(content: bytes) -> Any:
    """An ONNX Runtime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


# ----------------------------------------------------------------------------------------------------- precision


def to_float16(model: Any) -> Any:
    """Weights and activations in float16 where ONNX Runtime can; images, preprocessing and probabilities stay as they are."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    kept = [
        node.name
        for node in model.graph.node
        if node.op_type in ("Resize", "Round", "Clip", "Slice", "Cast", "Transpose")
    ]
    with quiet():
        return convert_float_to_float16(model, keep_io_types=True, node_block_list=kept)


def to_int8(model: Any, training: Split, channels: int, gate: Gate, progress: Progress) -> tuple[Any, Parity]:
    """Products and convolutions in int8, the ranges of activations from training images. What is most sensitive stays float until the
    gate lets it pass: first the stem and the classifiers, then the products of attention, then all convolutions. Returns the last try."""
    for kept, what in _sensitive(model):
        quantised = _quantised(model, training, channels, kept)
        parity = gate.compare(probabilities_of(session_of(quantised.SerializeToString())))
        progress.say(f"int8, in float {what}: {parity.disagree} of {parity.images} images classified differently")
        if parity.kept:
            break
    return quantised, parity


def _sensitive(model: Any) -> list[tuple[list[str], str]]:
    """Names of the nodes that stay float, fewer to more, with a description. What comes after the classifiers multiplies attention for the
    second output, and always does."""
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    weights = {one.name for one in model.graph.initializer}
    last = max(number for number, node in enumerate(products) if weights & set(node.input))
    products, shown = products[: last + 1], [node.name for node in products[last + 1 :]]
    convolutions = [node.name for node in products if node.op_type == "Conv"]
    attention = [node.name for node in products if node.op_type == "MatMul" and not weights & set(node.input)]
    ends = [*convolutions[:1], *(node.name for node in products[-2:] if node.op_type != "Conv")]
    return [
        (shown, "nothing"),
        ([*shown, *ends], "the first convolution and the classifiers"),
        ([*shown, *ends, *attention], "these and the products of attention"),
        ([*shown, *ends, *attention, *convolutions], "these and all convolutions"),
    ]


def _quantised(model: Any, training: Split, channels: int, kept: Sequence[str]) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._images = readable(training, channels, CALIBRATION_IMAGES)

        def get_next(self) -> dict[str, Any] | None:
            pixels = next(self._images, None)
            return None if pixels is None else {"images": np.ascontiguousarray(pixels[0][None])}

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            source, target, Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul", "Gemm", "Conv"], per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=list(kept),
        )  # fmt: skip
        return onnx.load(target)


def _readme(card: ModelCard, precision: str, head: str, parity: Parity, name: str, size: int) -> str:
    shape = f"(N, H, W, {card.preprocessing.channels})"
    return f"""# {card.name}, {precision}

{parity.line(name)} (validation images).
Largest difference of a probability: {parity.largest_difference:.2g}. {file_size(size)}; head: {head}.

Input `images`: uint8 (8 bits a channel) of shape {shape}, any size; output `probabilities`: float32 of shape (N, {len(card.classes)}).

```python
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{name}")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
image = ImageOps.exif_transpose(Image.open("photo.jpg"))  # upright
image = np.asarray(image.convert("{"RGB" if card.preprocessing.channels == 3 else "L"}"))
image = image.reshape(1, *image.shape[:2], {card.preprocessing.channels})
(probabilities,) = session.run(["probabilities"], {{"images": image}})
print(classes[probabilities[0].argmax()], probabilities[0].max())
```

Transparent images belong on white, images of 16 bits have to be scaled to 8 before.
"""
