"""A student's weights written for others: the names of their tensors, and beside them what their programs want to know.

    timm    `model.safetensors`, `config.json`: `timm.create_model("local-dir:FOLDER", pretrained=True)`
    hf      the same and `preprocessor_config.json`: transformers' `DeiTForImageClassificationWithTeacher.from_pretrained(FOLDER)`,
            or `ViTForImageClassification` for a student without a distillation token
    deit    `model.safetensors` alone, with the names of the original repository

No number changes. What a format cannot hold is refused before anything is written.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from deitkit.config import Preprocessing
from deitkit.models.start import TIMM_EPSILON, find_init
from deitkit.models.vit import ViTConfig
from deitkit.models.weights import Tensors, from_ours
from deitkit.models.zoo import ModelCard, load_model
from deitkit.terminal import UserError, refuse_filled, save_tensors, write_atomically, written

Format = Literal["timm", "hf", "deit"]
TITLES: dict[Format, str] = {"timm": "timm", "hf": "Hugging Face", "deit": "the original DeiT"}
WEIGHTS = "model.safetensors"
RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # Pillow's numbers, which transformers writes
SIZES = {192: "tiny", 384: "small", 512: "medium", 768: "base", 1024: "large", 1280: "huge"}


def export_run(run: Path, out: Path, form: Format) -> list[str]:
    """Write the student of a finished run into the new folder `out`, and read it again. Returns the names of the files. Raises
    UserError."""
    if form not in get_args(Format):
        raise UserError(f"format {form!r}: give {', '.join(get_args(Format))}")
    network, card = load_model(run if (run / "model.json").is_file() else run / "model")
    config = card.architecture
    if not isinstance(config, ViTConfig):
        raise UserError(f"{run}: {card.name} is a convolutional network: only students are exported")
    if (why := not_held(config, form)) is not None:
        raise UserError(f"{run}: {TITLES[form]} cannot hold this student: {why}")
    with written(out):
        refuse_filled(out, "give another --out")
        out.mkdir(parents=True, exist_ok=True)
    ours = network.body.state_dict()
    files = descriptions(card, config, form)
    for name, content in files.items():
        write_atomically(out / name, json.dumps(content, indent=2) + "\n")
    theirs = from_ours(ours, _layout(config, form))
    save_tensors(theirs, out / WEIGHTS, {"format": "pt"})  # transformers wants to be told
    _read_again(out, ours, config, form)
    return [*files, WEIGHTS]


def not_held(config: ViTConfig, form: Format) -> str | None:
    """What of a student of this shape the format has no place for; None where it holds all."""
    if config.stem != "patch":
        return "its stem is of convolutions, theirs is a patch embedding (deit train --stem patch)"
    if form == "hf":
        if config.layer_scale is not None:
            return "its blocks have LayerScale"
        return None if config.position_of_prefix else "its class token has no position embedding"
    if config.norm_epsilon != TIMM_EPSILON:
        return f"its norms have epsilon {config.norm_epsilon:g}, theirs {TIMM_EPSILON:g} (hf can say so)"
    if config.distillation_token and not config.position_of_prefix:
        return "it is a DeiT III with a distillation token, theirs are without"
    if form == "deit" and config.position_of_prefix == (config.layer_scale is not None):
        return "there LayerScale goes with a class token without a position, and only with that"
    if form == "deit" and config.grid[0] != config.grid[1]:
        return "its patches are no square, and nothing beside the weights could say so (timm and hf can)"
    return None


def descriptions(card: ModelCard, config: ViTConfig, form: Format) -> dict[str, dict[str, Any]]:
    """The content of the JSON files beside the weights, by name."""
    if form == "timm":
        return {"config.json": _timm_config(card, config)}
    if form == "hf":
        network = _hugging_face_config(card, config)
        return {"config.json": network, "preprocessor_config.json": _processor(card.preprocessing)}
    return {}


def _layout(config: ViTConfig, form: Format) -> str:
    if form == "hf":
        return "hf-teacher" if config.distillation_token else "hf-vit"
    return "original" if form == "deit" else "timm"


def _read_again(out: Path, ours: Tensors, config: ViTConfig, form: Format) -> None:
    """Holds what was written against the student, bit for bit."""
    found = find_init(str(out / WEIGHTS if form == "deit" else out), config.heads)
    shape = found.facts.architecture
    same = found.tensors.keys() == ours.keys() and all(torch.equal(found.tensors[name], ours[name]) for name in ours)
    told = (shape.heads, shape.norm_epsilon, shape.image_size) == (config.heads, config.norm_epsilon, config.image_size)
    if not same or not (told or form == "deit"):
        raise RuntimeError(f"{out}: holds another student than was to be written")


# ------------------------------------------------------------------------------------------------------ timm


def _timm_config(card: ModelCard, config: ViTConfig) -> dict[str, Any]:
    """As timm writes it for a hub: the network's name, the arguments in which this one differs, how it sees images."""
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
    """Of the published network of the same kind and size, or of a small one of that kind: the arguments say what differs."""
    import timm  # here, for timm brings a thousand networks along

    if config.distillation_token:
        kind, smallest = "deit_{}_distilled", "tiny"
    elif config.layer_scale is not None:
        kind, smallest = "deit3_{}", "small"
    else:
        kind, smallest = "deit_{}", "tiny"
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
        "image_size": _one_or_two(config.image_size),
        "patch_size": _one_or_two(config.patch_size),
        "num_channels": config.channels,
        "id2label": {str(number): name for number, name in enumerate(card.classes)},
        "label2id": {name: number for number, name in enumerate(card.classes)},
    }


def _one_or_two(size: tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else size


def _processor(images: Preprocessing) -> dict[str, Any]:
    """An image processor that resizes the shorter side and cuts out the centre, as evaluation does it here. Where images are not
    square it resizes both sides: the same for images of one shape."""
    height, width = (math.floor(side / images.crop_pct) for side in images.image_size)
    square = images.image_size[0] == images.image_size[1]
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": height} if square else {"height": height, "width": width},
        "resample": RESAMPLE[images.interpolation],
        "do_center_crop": True,
        "crop_size": dict(zip(("height", "width"), images.image_size, strict=True)),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images.mean,
        "image_std": images.std,
        "do_convert_rgb": images.channels == 3,
    }
