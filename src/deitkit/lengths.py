"""Lengths with their unit, one converter for all of them: `30ep`, `500st`, `20min`; a warm-up of `5%`; a final rate of `2%` of the peak."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

MANY = 10**9
"""Upper limit of steps, epochs and images: catches typing errors."""
LARGE = 1e15
"""Upper limit of rates, weights and temperatures; the product of two fits float32."""
_LENGTH = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)(ep|st|min|%)", re.IGNORECASE)


def parse_length(text: str, units: tuple[str, ...] = ("ep", "st", "min")) -> tuple[float, str]:
    """`30ep` -> (30.0, "ep"): epochs, steps (st), minutes (min) or percent (%). Raises ValueError for another unit, or a number
    that no training has."""
    found = _LENGTH.fullmatch(text.replace(" ", ""))
    examples = [one for one in ("30ep", "500st", "20min", "5%") if one.endswith(units)]
    if found is None or found[2].lower() not in units:
        raise ValueError(f"give a number with its unit, such as {' or '.join(examples)}")
    amount, unit = float(found[1]), found[2].lower()
    if amount > (99.999 if unit == "%" else MANY):
        raise ValueError("is too much")
    if unit == "st" and amount != int(amount):
        raise ValueError("give a whole number of steps")
    return amount, unit


def _length(text: str) -> str:
    amount, unit = parse_length(text)
    if amount <= 0:
        raise ValueError("must be more than 0")
    return f"{amount:.15g}{unit}"


def _warmup(text: str) -> str:
    amount, unit = parse_length(text, ("ep", "st", "%"))
    return f"{amount:.15g}{unit}"


def _rate_or_percent(value: Any) -> Any:
    percent = isinstance(value, str) and value.strip().endswith("%")
    try:
        number = float(value.strip()[:-1] if percent else value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= (100 if percent else LARGE):
        raise ValueError("give a learning rate, at least 0, or a percentage of the peak such as 2%")
    return value.strip() if percent else number


def _text(value: Any) -> Any:
    return (
        f"{value}" if isinstance(value, int | float) and not isinstance(value, bool) else value
    )  # whose unit is missed then


Length = Annotated[str, AfterValidator(_length), BeforeValidator(_text)]
"""How long to train: `30ep`, `500st` or `20min`."""
Warmup = Annotated[str, AfterValidator(_warmup), BeforeValidator(_text)]
"""`5%` (of all steps), `3ep` or `100st`."""
MinLr = Annotated[float | str, BeforeValidator(_rate_or_percent)]
"""A learning rate, or a percentage of the peak."""


def in_words(text: str) -> str:
    """`500st` -> `500 steps`, `1ep` -> `1 epoch`."""
    amount, unit = parse_length(text)
    return f"{amount:,.15g} {({'ep': 'epoch', 'st': 'step', 'min': 'minute'})[unit]}{'' if amount == 1 else 's'}"


def length_in_steps(text: str, steps_per_epoch: int, total_steps: int = 0) -> int:
    """Steps that a length (not in minutes) stands for; a percentage is of `total_steps`."""
    amount, unit = parse_length(text, ("ep", "st", "%"))
    return round(amount * steps_per_epoch if unit == "ep" else amount if unit == "st" else amount / 100 * total_steps)
