"""What networks are: a vision transformer's shape, a CNN's name, how images reach them, the card beside saved weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deitkit.config_base import (
    Config,
    Depth,
    Finite,
    HeadCount,
    Interpolation,
    Pixels,
    Positive,
    PositiveInt,
    Size,
    Stem,
    Width,
)


class Preprocessing(Config):
    """What a network does to an image in [0, 1] before its first layer, and how test images reach it."""

    image_size: tuple[Pixels, Pixels]
    mean: Annotated[tuple[Finite, ...], Field(min_length=1, max_length=3)]
    std: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=3)]
    interpolation: Interpolation = "bicubic"
    crop_fraction: Annotated[float, Field(ge=0.1, le=1)] = 1.0
    """evaluation: the centre crop's share of the resized image's shorter side"""

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations")
        return self

    @property
    def channels(self) -> int:
        return len(self.mean)


class ViTConfig(Config):
    """The shape of a vision transformer. Plain ViT and DeiT differ in `distillation_token` alone; DeiT III (arXiv 2204.07118) has
    `layer_scale` and no `position_of_prefix`."""

    image_size: tuple[Pixels, Pixels] = (224, 224)
    channels: Annotated[int, Field(ge=1, le=3)] = 3
    classes: Annotated[int, Field(gt=0, le=10**7)] = 1000
    patch_size: tuple[Pixels, Pixels] = (16, 16)
    stem: Stem = "patch"
    """patch: one strided convolution; conv: stride-2 convolutions of 3x3 down to the same grid; residual: with a residual
    block after each of them"""
    width: Width = 192
    depth: Depth = 12
    heads: HeadCount = 3
    mlp_ratio: Annotated[float, Field(gt=0, le=1000)] = 4.0
    distillation_token: bool = True
    norm_epsilon: Positive = 1e-6
    """timm's and the published code's; Hugging Face's networks have 1e-12"""
    layer_scale: Positive | None = None
    """what every residual branch's outputs are multiplied by at the beginning, one learnt factor a channel; None: no factors"""
    position_of_prefix: bool = True
    """whether class and distillation token have a position embedding, too"""

    @model_validator(mode="after")
    def _check(self) -> ViTConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        for side, pixels, patch in zip(("height", "width"), self.image_size, self.patch_size, strict=True):
            if pixels % patch:
                raise ValueError(f"image {side} {pixels} is not a multiple of the patch {side} {patch}")
        if self.stem != "patch" and (
            self.patch_size[0] != self.patch_size[1] or self.patch_size[0] & (self.patch_size[0] - 1)
        ):
            raise ValueError(
                f"the convolutional stem needs a square patch of 2, 4, 8, ... pixels, not {self.patch_size}"
            )
        return self

    @property
    def grid(self) -> Size:
        """Patches (down, across)."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def prefix_tokens(self) -> int:
        return 2 if self.distillation_token else 1

    @property
    def prefix_positions(self) -> int:
        """How many rows of the position embedding stand before those of the patches."""
        return self.prefix_tokens if self.position_of_prefix else 0

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.grid[0] * self.grid[1]


class InitFacts(Config):
    """What weights to start from say of themselves, or what is assumed of them."""

    name: str
    architecture: ViTConfig
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None
    """the names of its classes, where they are known"""
    assumed: tuple[str, ...] = ()
    """what the weights do not show and nothing beside them says"""


class CNNConfig(Config):
    """A convolutional network by name: `cifar-resnetN` (N = 6n + 2), a timm name, or `torchvision:NAME`."""

    name: str
    classes: PositiveInt
    channels: PositiveInt = 3


class ModelCard(Config):
    """What `model/model.json` says about the weights beside it."""

    name: str
    architecture: ViTConfig | CNNConfig
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    weights: Literal["ema", "last"] = "last"
    """the moving average of the weights, or the last ones"""
    dataset: str = ""
    """what it was trained on"""
    head_scales: tuple[Positive, ...] = ()
    """what each head was multiplied by after the training, so that its probabilities fit the validation images"""

    @model_validator(mode="after")
    def _check(self) -> ModelCard:
        if len(self.classes) != self.architecture.classes:
            raise ValueError(f"classes: {len(self.classes)} names for a head of {self.architecture.classes} classes")
        heads = self.architecture.prefix_tokens if isinstance(self.architecture, ViTConfig) else 1
        if len(self.head_scales) not in (0, heads):
            raise ValueError(f"head_scales: {len(self.head_scales)} of a network with {heads}")
        if isinstance(self.architecture, ViTConfig) and self.architecture.channels != self.preprocessing.channels:
            raise ValueError(
                f"preprocessing: of {self.preprocessing.channels} channels, the network has {self.architecture.channels}"
            )
        if isinstance(self.architecture, ViTConfig) and self.architecture.image_size != self.preprocessing.image_size:
            raise ValueError(
                f"preprocessing: images of {self.preprocessing.image_size}, the network wants {self.architecture.image_size}"
            )
        return self
