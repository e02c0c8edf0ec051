"""The strength of RandAugment as timm writes it, one converter: `rand-m9-n2-mstd0.5-p0.5`."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BeforeValidator


class RandAugment(NamedTuple):
    """What timm's string of RandAugment says."""

    m: float = 9.0
    """magnitude, 0 to 10"""
    n: int = 2
    """operations per view"""
    mstd: float = 0.5
    """standard deviation of the magnitude"""
    p: float = 0.5
    """probability that a drawn operation is applied"""

    def __str__(self) -> str:
        return "-".join(["rand", *(f"{name}{value!r}".removesuffix(".0") for name, value in self._asdict().items())])


MOST = {"m": 10.0, "n": 8.0, "mstd": 100.0, "p": 1.0}


@lru_cache
def parse_randaugment(text: str) -> RandAugment:
    """`rand-m9-mstd0.5`, its parts in any order; one that is missing has DeiT's value. `inc1`, the set of operations, may stand there:
    there is no other. Raises ValueError naming the part."""
    head, *parts = re.split(r"-(?=[a-z])", text.strip())
    if head != "rand":
        raise ValueError("give timm's string, such as rand-m9-n2-mstd0.5-p0.5")
    found: dict[str, float] = {}
    for part in parts:
        read = re.fullmatch(r"(m|n|mstd|p)(\d+(?:\.\d*)?(?:e-?\d+)?)", part)
        if part != "inc1" and (read is None or read[1] in found):
            raise ValueError(
                f"the part {part!r} is {'there twice' if read else 'none of m9, n2, mstd0.5, p0.5 and inc1'}"
            )
        if read is not None:
            found[read[1]] = float(read[2])
            if found[read[1]] > MOST[read[1]]:
                raise ValueError(f"the part {part!r} is above {MOST[read[1]]:g}")
    count = found.pop("n", RandAugment().n)
    if count < 1 or count != int(count):
        raise ValueError(f"the part 'n{count:g}' is no whole number of operations from 1 to 8")
    return RandAugment(n=int(count), **found)


RandAugmentText = Annotated[
    Annotated[str, AfterValidator(lambda text: str(parse_randaugment(text)))] | None,
    BeforeValidator(lambda text: None if text == "none" else text),
]
"""`rand-m9-mstd0.5`, kept with all its parts; `none` for None."""
