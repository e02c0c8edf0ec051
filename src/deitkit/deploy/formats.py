"""Write a student for other programs: its tensors under their names, with the configuration files that they read.

    timm    `model.safetensors`, `config.json`, `README.md` (the model card): `timm.create_model("local-dir:FOLDER", pretrained=True)`
    hf      the same and `preprocessor_config.json`: `transformers.pipeline("image-classification", FOLDER)`
    deit    `model.safetensors` alone, with the names of the original repository

No number changes. A student that a format cannot hold is refused before anything is written. What timm and transformers make of
the folder is shown the validation images (`deploy.parity`), each prepared as that library prepares it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from deitkit.config import HeadChoice, Preprocessing
from deitkit.deploy.parity import MOST_DISAGREEMENT, Exported, Gate, Parity, quiet, write_parity
from deitkit.models.network import Network
from deitkit.models.predict import Predictor
from deitkit.models.start import PILLOW_FILTERS, TIMM_EPSILON, find_init
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.weights import Tensors, from_ours
from deitkit.models.zoo import SHAPES, ModelCard, load_model, parameter_count
from deitkit.terminal import (
    Progress,
    UserError,
    one_line,
    percent,
    save_tensors,
    write_atomically,
    written,
)
from deitkit.training.evaluate import data_of_run
from deitkit.training.run import RunFolder
from deitkit.training.tables import head_rows

Format = Literal["timm", "hf", "deit"]
TITLES: dict[Format, str] = {"timm": "timm", "hf": "Hugging Face", "deit": "the original DeiT"}
WEIGHTS, REJECTED, CARD = "model.safetensors", "rejected.safetensors", "README.md"
USE: dict[Format, str] = {
    "timm": """import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
    "hf": """from transformers import pipeline

classify = pipeline("image-classification", "FOLDER")
print(classify("photo.jpg"))""",
}
"""Python for the model card."""
MOST_CLASSES = 100
"""Of a model card."""
HEAD: HeadChoice = "fused_logits"
"""What timm and transformers predict with two heads: the mean of their logits."""
SIZES = {width: name for name, (width, *_) in SHAPES.items()}


def export_weights(
    run: Path,
    out: Path,
    form: Format,
    *,
    max_disagreement: float = MOST_DISAGREEMENT,
    progress: Progress | None = None,
) -> tuple[list[str], Parity | None]:
    """Write the student of a finished run into the new folder `out`, and read it back to check it. For timm and hf, the library is also
    shown the validation images; weights with which it predicts something else are called `rejected.safetensors`. Returns the names of the
    files and how the library's network compares; None where it was not shown any images, which a line says. Raises UserError."""
    progress = progress or Progress()
    folder = run.parent if (run / "model.json").is_file() else run
    network, card = load_model(run if folder != run else run / "model")
    config = card.architecture
    if not isinstance(config, ViTConfig):
        raise UserError(
            f"{run}: {card.name} is a convolutional network: only vision transformers are exported so: give --format onnx"
        )
    if (why := unsupported(config, form)) is not None:
        raise UserError(f"{run}: {TITLES[form]} cannot hold this student: {why}; --format onnx can")
    with written(out):
        out.mkdir(parents=True, exist_ok=True)
    ours = network.body.state_dict()
    files: dict[str, dict[str, Any]] = {}
    if form == "timm":
        files = {"config.json": _timm_config(card, config)}
    elif form == "hf":
        processor = _hugging_face_processor(card.preprocessing)
        files = {"config.json": _hugging_face_config(card, config), "preprocessor_config.json": processor}
    for name, content in files.items():
        write_atomically(out / name, json.dumps(content, indent=2) + "\n")
    layouts = {"timm": "timm", "hf": "hf-teacher" if config.distillation_token else "hf-vit", "deit": "original"}
    save_tensors(from_ours(ours, layouts[form]), out / WEIGHTS, {"format": "pt"})  # transformers requires it
    _read_again(out, ours, config, form)
    if form == "deit":
        return [WEIGHTS], None
    try:
        parity, checked = _compared(folder, out, form, network, card, max_disagreement)
    except UserError as error:
        parity, checked = None, f"Not checked on images: {error}"
    weights = WEIGHTS if parity is None or parity.kept else REJECTED
    if parity is not None:
        (out / WEIGHTS).rename(out / weights)
        write_parity(out, parity, {"checked_by": checked, "head": HEAD})
        checked = f"{parity.line(weights)} (validation images, by {checked})."
    else:
        progress.say(f"{weights}: {checked[0].lower()}{checked[1:]}")
    write_atomically(out / CARD, model_card(folder, card, config, form, checked))
    return sorted([*files, weights, CARD, *(["parity.json"] if parity is not None else [])]), parity


def _compared(
    run: Path, out: Path, form: Format, network: Network, card: ModelCard, allowed: float
) -> tuple[Parity, str]:
    """How what a library makes of the folder compares with the network on the validation images, and name and version of the library.
    Raises UserError where one of them is not there."""
    try:
        library = importlib.import_module({"timm": "timm", "hf": "transformers"}[form])
    except ImportError as error:
        raise UserError(f"the package {error.name} is not installed") from error
    dataset, _ = data_of_run(run, card.classes)
    gate = Gate(Predictor(network, card, "cpu"), dataset.open_split("val"), HEAD, allowed)
    with quiet(), torch.inference_mode():
        parity = gate.compare(answers_of_timm(out) if form == "timm" else answers_of_transformers(out))
    return parity, f"{library.__name__} {library.__version__}"


def answers_of_timm(folder: Path) -> Exported:
    """What timm makes of an exported folder, with the transform that it makes of it."""
    import timm  # here, because it is slow to import

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data: Any = timm.data
    transform = data.create_transform(**data.resolve_model_data_config(model))
    return lambda images_1HWC: _probabilities(model(transform(_picture(images_1HWC))[None]))


def answers_of_transformers(folder: Path) -> Exported:
    """What transformers makes of an exported folder, with the image processor that it makes of it."""
    import transformers

    with contextlib.redirect_stderr(io.StringIO()):  # bars
        model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    reader: Any = transformers.AutoImageProcessor
    processor = reader.from_pretrained(folder)
    return lambda images_1HWC: _probabilities(model(**processor(_picture(images_1HWC), return_tensors="pt")).logits)


def _picture(images_1HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(images_1HWC[0, ..., 0] if images_1HWC.shape[-1] == 1 else images_1HWC[0])


def _probabilities(logits_1K: torch.Tensor) -> np.ndarray:
    found_1K: np.ndarray = logits_1K.float().softmax(-1).numpy()
    return found_1K


def unsupported(config: ViTConfig, form: Format) -> str | None:
    """The part of a student of this shape that the format cannot hold; None if it holds all."""
    if config.stem != "patch":
        return "its stem is convolutional, theirs is a patch embedding (deit train --stem patch)"
    if form == "hf":
        if config.layer_scale is not None:
            return "its blocks have LayerScale"
        return None if config.position_of_prefix else "its class token has no position embedding"
    if config.norm_epsilon != TIMM_EPSILON:
        return f"its norms have epsilon {config.norm_epsilon:g}, theirs {TIMM_EPSILON:g} (hf stores it)"
    if config.distillation_token and not config.position_of_prefix:
        return "it is a DeiT III with a distillation token, theirs have none"
    if form == "deit" and config.position_of_prefix == (config.layer_scale is not None):
        return "there, LayerScale and a class token without position only occur together"
    if form == "deit" and config.grid[0] != config.grid[1]:
        return "its grid of patches is not square, which the weights alone do not show (timm and hf store it)"
    return None


def _read_again(out: Path, ours: Tensors, config: ViTConfig, form: Format) -> None:
    """Compares the files with the student, bit for bit."""
    found = find_init(str(out / WEIGHTS if form == "deit" else out), config.heads)
    shape = found.facts.architecture
    same = found.tensors.keys() == ours.keys() and all(torch.equal(found.tensors[name], ours[name]) for name in ours)
    stored = all(getattr(shape, field) == getattr(config, field) for field in ("heads", "norm_epsilon", "image_size"))
    if not same or not (stored or form == "deit"):
        raise RuntimeError(f"{out}: the exported student differs from the one in the run")


def model_card(run: Path, card: ModelCard, config: ViTConfig, form: Format, checked: str) -> str:
    """A hub's page: metadata, what the network is, how good it is, how it was checked, how it is used. Class names are escaped."""
    library = {"timm": "timm", "hf": "transformers"}[form]
    token = (
        "with a distillation token, taught by knowledge distillation"
        if config.distillation_token
        else "without a distillation token"
    )
    heads = " Its prediction is the mean of the logits of both heads." if config.distillation_token else ""
    folder, lines = RunFolder(run), []
    if folder.finished:
        summary = folder.summary()
        for title, share in [
            ("largest class", summary.get("largest_class")),
            *((row.title, row.top1) for row in head_rows(summary)),
        ]:
            lines += [f"| {title} | {percent(share)} |"] if share is not None else []
    measured = (
        ["", f"| {summary['n']:,} validation images | accuracy, % |", "| --- | --- |", *lines]
        if lines
        else ["", "Not measured."]
    )
    height, width = config.image_size
    with torch.device("meta"):
        parameters = parameter_count(ViT(config))
    classes = ", ".join(f"`{one_line(name).replace('`', '?')}`" for name in card.classes[:MOST_CLASSES])
    more = f" and {len(card.classes) - MOST_CLASSES} more" if len(card.classes) > MOST_CLASSES else ""
    return "\n".join([
        "---",
        f"library_name: {library}",
        "pipeline_tag: image-classification",
        "tags: [image-classification, vision-transformer, deit, knowledge-distillation]",
        "---",
        "",
        f"# {card.name}",
        "",
        f"A vision transformer {token} (DeiT, arXiv 2012.12877), trained with deitkit.{heads}",
        f"{parameters / 1e6:.2f} M parameters, images of {height} x {width} pixels.",
        "",
        f"Classes: {classes}{more}",
        *measured,
        "",
        checked,
        "",
        "```python",
        USE[form],
        "```",
        "",
    ])  # fmt: skip


# ------------------------------------------------------------------------------------------------------ timm


def _timm_config(card: ModelCard, config: ViTConfig) -> dict[str, Any]:
    """As timm writes it for a hub: the network's name, its arguments, its preprocessing."""
    images = card.preprocessing
    arguments: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.channels,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "no_embed_class": not config.position_of_prefix,
    }
    if config.layer_scale is not None:
        arguments["init_values"] = config.layer_scale
    return {
        "architecture": _timm_name(config),
        "num_classes": config.classes,
        "num_features": config.width,
        "global_pool": "token",
        "label_names": card.classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": (config.channels, *config.image_size),
            "fixed_input_size": True,
            "interpolation": images.interpolation,
            "crop_pct": images.crop_pct,
            "crop_mode": "center",
            "mean": images.mean,
            "std": images.std,
            "num_classes": config.classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.distillation_token else "head",
            "custom_load": False,
        },
    }


def _timm_name(config: ViTConfig) -> str:
    """The published network of the same kind and size, else a small one of that kind: the arguments say what differs."""
    import timm  # here, because it is slow to import

    deit3 = config.layer_scale is not None and not config.distillation_token
    kind, smallest = ("deit3_{}", "small") if deit3 else ("deit_{}", "tiny")
    kind += "_distilled" if config.distillation_token else ""
    same = f"{kind.format(SIZES.get(config.width, smallest))}_patch{config.patch_size[0]}_{config.image_size[0]}"
    return same if timm.is_model(same) else f"{kind.format(smallest)}_patch16_224"


# ----------------------------------------------------------------------------------------------- Hugging Face


def _hugging_face_config(card: ModelCard, config: ViTConfig) -> dict[str, Any]:
    distilled = config.distillation_token
    return {
        "architectures": ["DeiTForImageClassificationWithTeacher" if distilled else "ViTForImageClassification"],
        "model_type": "deit" if distilled else "vit",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_epsilon,
        "qkv_bias": True,
        "image_size": config.image_size[0] if len(set(config.image_size)) == 1 else config.image_size,
        "patch_size": config.patch_size[0] if len(set(config.patch_size)) == 1 else config.patch_size,
        "num_channels": config.channels,
        "id2label": {str(number): name for number, name in enumerate(card.classes)},
        "label2id": {name: number for number, name in enumerate(card.classes)},
    }


def _hugging_face_processor(images: Preprocessing) -> dict[str, Any]:
    """An image processor that resizes the shorter side and cuts out the centre, as evaluation does here. For a network whose
    images are not square it resizes both sides: the same for images of that aspect ratio."""
    height, width = (math.floor(side / images.crop_pct) for side in images.image_size)
    square = images.image_size[0] == images.image_size[1]
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": height} if square else {"height": height, "width": width},
        "resample": PILLOW_FILTERS[images.interpolation],
        "do_center_crop": True,
        "crop_size": dict(zip(("height", "width"), images.image_size, strict=True)),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images.mean,
        "image_std": images.std,
        "do_convert_rgb": images.channels == 3,
    }
