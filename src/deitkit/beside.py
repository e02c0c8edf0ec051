"""What stands beside a file of weights: a folder's `config.json`, of Hugging Face or of timm, or the name of a timm network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from deitkit.backbones import as_preprocessing
from deitkit.config import Preprocessing
from deitkit.errors import UserError, shortened
from deitkit.layouts import to_ours

FAMILY = ("VisionTransformer", "VisionTransformerDistilled")
"""timm's classes that a student can be."""


class Known(NamedTuple):
    """What stands beside a file of weights."""

    heads: int | None = None
    epsilon: float | None = None
    image_size: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None


# ------------------------------------------------------------------------------------------------------ timm


def beside_timm(folder: Path, source: str) -> Known:
    """What `config.json` says, in the words of timm: `architecture`, `model_args`, and `pretrained_cfg`, which older files have
    without that name around it. Nothing where there is none of timm's. Raises UserError."""
    file = folder / "config.json"
    config = _json(file)
    architecture, arguments = config.get("architecture"), config.get("model_args", {})
    if not isinstance(architecture, str):
        return Known()
    if not isinstance(arguments, dict):
        raise UserError(f"{file}: model_args: is not as expected")
    images = config.get("pretrained_cfg", config)
    try:
        channels, *size = images["input_size"]
        preprocessing = as_preprocessing(
            (size[0], size[1]),
            images["mean"],
            images["std"],
            images["interpolation"],
            images["crop_pct"],
            int(arguments.get("in_chans", channels)),
        )
    except KeyError as error:
        raise UserError(f"{file}: lacks {error}") from error
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{file}: is not as expected: {_why(error)}") from error
    network = timm_network(architecture, {"img_size": tuple(size), **arguments}, source)
    return known_of_timm(network)._replace(preprocessing=preprocessing)


def timm_network(name: str, arguments: dict[str, Any], source: str) -> Any:
    """timm's network of that name and these arguments, without numbers. Raises UserError where it is none, or one that computes
    something that a student does not, though names of tensors may agree."""
    import timm

    try:
        with torch.device("meta"):
            network: Any = timm.create_model(name, **arguments)
    except Exception as error:  # whatever a constructor makes of arguments that somebody wrote
        raise UserError(f"{source}: timm makes no network {shortened(name)}: {_why(error)}") from error
    if type(network).__name__ not in FAMILY or network.global_pool != "token":
        raise UserError(f"{source}: is no ViT, DeiT or DeiT III with a class token: these alone can be a student")
    to_ours(network.state_dict(), source)
    activation = network.blocks[0].mlp.act
    if not isinstance(activation, nn.GELU) or getattr(activation, "approximate", "none") != "none":
        raise UserError(f"{source}: its blocks have {type(activation).__name__}, a student has GELU: take another")
    return network


def known_of_timm(network: Any) -> Known:
    height, across = network.patch_embed.img_size
    return Known(
        heads=int(network.blocks[0].attn.num_heads),
        epsilon=float(network.norm.eps),
        image_size=(int(height), int(across)),
    )


# ----------------------------------------------------------------------------------------------- Hugging Face


def beside_hugging_face(folder: Path) -> Known:
    """What `config.json` and `preprocessor_config.json` say, in the words of transformers. Raises UserError."""
    known = Known()
    config, images = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{folder / 'config.json'}: hidden_act {config['hidden_act']!r}, a student has gelu")
    try:
        if config:
            size = config["image_size"]
            known = known._replace(
                heads=int(config["num_attention_heads"]),
                epsilon=float(config["layer_norm_eps"]),
                image_size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            )
        if images:
            mean, std = images["image_mean"], images["image_std"]
            resized, cropped = _side(images["size"]), _side(images.get("crop_size"))
            fraction = _fraction(cropped, resized) if cropped and resized and images.get("do_center_crop") else 1.0
            way = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(
                images.get("resample", 3), "bicubic"
            )  # Pillow's numbers
            side = cropped or resized or 224
            known = known._replace(preprocessing=as_preprocessing((side, side), mean, std, way, fraction, len(mean)))
    except KeyError as error:
        raise UserError(f"{folder}: config.json or preprocessor_config.json lacks {error}") from error
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(
            f"{folder}: config.json or preprocessor_config.json: is not as expected: {_why(error)}"
        ) from error
    return known


def _fraction(cropped: int, resized: int) -> float:
    """The share of `resized` pixels that the crop has, such that dividing by it and rounding down gives `resized` again."""
    fraction = min(1.0, cropped / resized)
    return math.nextafter(fraction, 0) if math.floor(cropped / fraction) < resized else fraction


def _side(size: Any) -> int | None:
    """Pixels of the shorter side, in any of the ways in which transformers has written it."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return None if size is None else int(size)


def _why(error: Exception) -> str:
    return shortened(" ".join(str(error).split()))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}
