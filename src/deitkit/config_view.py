"""How an image becomes a view: the settings, and the presets that they start from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deitkit.config_base import (
    MOST_VIEWS,
    Alpha,
    Config,
    Interpolation,
    Pixels,
    Positive,
    Probability,
    Seed,
)


class ViewConfig(Config):
    """How an image becomes a view. All draws depend on (view_seed, view, image) alone."""

    augment: Literal["none", "light", "deit", "deit3"] = "light"
    """preset that the fields below start from"""
    view_seed: Seed = 0
    """seed of what is seen"""
    view_size: tuple[Pixels, Pixels] | None = None
    """height and width of a view; the network's if not given"""
    crop: Literal["none", "pad", "resize", "simple"] | None = None
    """none: whole image; pad: padded and shifted; resize: random area, resized; simple: resized to the view's shorter side,
    padded, random place; from the data if not given"""
    crop_padding: Annotated[int, Field(ge=0, le=4096)] | None = None
    """pad, simple: pixels added on every side, reflected; simple: 4 if not given; pad: an eighth of the image (4 for 32
    pixels)"""
    crop_area: tuple[Probability, Probability] = (0.08, 1.0)
    """resize: least and most share of the image's area"""
    crop_aspect: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """resize: least and most width/height of the area"""
    interpolation: Interpolation = "bicubic"
    """how crops of photos are resized"""
    flip_probability: Probability | None = None
    """left-right flip; 0.5 if not given, 0 for data whose mirror image means something else"""
    randaugment_operations: Annotated[int, Field(ge=0, le=8)] = 0
    """RandAugment: operations per view"""
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """RandAugment: strength, 0 to 10"""
    randaugment_magnitude_sd: Annotated[float, Field(ge=0, le=100)] = 0.5
    """RandAugment: standard deviation of the strength"""
    randaugment_probability: Probability = 0.5
    """RandAugment: probability that a drawn operation is applied"""
    three_augment: bool = False
    """3-Augment: every view is made grey, solarised or blurred"""
    colour_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """brightness, contrast and saturation vary by a factor from 1-x to 1+x"""
    erase_probability: Probability = 0.0
    """random erasing: a rectangle is filled with pixel noise"""
    erase_area: tuple[Probability, Probability] = (0.02, 1 / 3)
    """random erasing: least and most share of the image's area"""
    mixup_alpha: Alpha = 0.0
    """mixup: weights from Beta(alpha, alpha); 0 turns it off"""
    cutmix_alpha: Alpha = 0.0
    """CutMix: areas from Beta(alpha, alpha); 0 turns it off"""
    mix_probability: Probability = 1.0
    """probability that a pair of images is mixed at all"""
    cutmix_probability: Probability = 0.5
    """probability that a mixed pair gets CutMix, where mixup is on too"""
    repeats: Annotated[int, Field(ge=1, le=16)] = 1
    """repeated augmentation: an epoch shows this many views each of 1/repeats of the images"""
    views: Annotated[int, Field(gt=0, le=MOST_VIEWS)] | None = None
    """epochs go round so many views; each shows another one if not given"""

    @model_validator(mode="after")
    def _check(self) -> ViewConfig:
        for name in ("crop_area", "crop_aspect", "erase_area"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} is above {high}")
        if self.crop_area[0] <= 0:
            raise ValueError("crop_area: the least area must be above 0")
        if self.views is not None and self.views % self.repeats:
            raise ValueError(f"views: {self.views} is not a multiple of repeats {self.repeats}")
        return self


AUGMENT_PRESETS: dict[str, ViewConfig] = {
    "none": ViewConfig(augment="none", crop="none", flip_probability=0.0),
    # Short runs: the weakest views that still differ. Resized crops keep at least half of the photo.
    "light": ViewConfig(augment="light", crop_area=(0.5, 1.0)),
    # DeiT, table 9 (arXiv 2012.12877), without its repeated augmentation: that does not change what a view looks like, but
    # how many images an epoch shows (--repeats 3). With RandAugment on, the official code never applies its colour jitter.
    "deit": ViewConfig(
        augment="deit",
        randaugment_operations=2,
        erase_probability=0.25,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
    ),
    # DeiT III (arXiv 2204.07118), section 3; how the image is cropped stays with the data, as in the other presets.
    "deit3": ViewConfig(
        augment="deit3",
        three_augment=True,
        colour_jitter=0.3,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
    ),
}
