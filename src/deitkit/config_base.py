"""What every configuration class is made of: frozen, unknown keys are errors; and values with their limits."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Size = tuple[int, int]
"""(height, width) in pixels."""
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
LARGE = 1e15
"""More than any rate, weight or temperature that is meant; two of them multiplied are still a number in float32."""
NonNegative = Annotated[float, Field(ge=0, le=LARGE, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=LARGE, allow_inf_nan=False)]
Alpha = Annotated[float, Field(ge=0, le=1000)]
PositiveInt = Annotated[int, Field(gt=0)]
Pixels = Annotated[int, Field(gt=0, le=4096)]
Width = Annotated[int, Field(gt=0, le=16384)]
Depth = Annotated[int, Field(gt=0, le=1000)]
HeadCount = Annotated[int, Field(gt=0, le=1024)]
MANY = 10**9
"""More steps, epochs or images than anyone trains with; a limit, so that a slip of the finger is named at once."""
MOST_VIEWS = 100_000
Workers = Annotated[int, Field(ge=0, le=1024)]
Count = Annotated[int, Field(gt=0, le=MANY)]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Distillation = Literal["none", "hard", "soft", "zscore", "dist", "dkd"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Stem = Literal["patch", "conv", "residual"]
HeadChoice = Literal["cls", "dist", "fused", "fused_logits"]
HEADS: dict[HeadChoice, str] = {
    "cls": "class head",
    "dist": "distillation head",
    "fused": "both, fused",
    "fused_logits": "both, fused logits",
}
"""What a prediction may be from, and what it is called where people read it."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


ConfigT = TypeVar("ConfigT", bound=Config)
