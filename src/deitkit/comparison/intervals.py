"""Means, spreads and paired differences over seeds: pure functions of plain numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.stats import t as student_t

CONFIDENCE = 0.95
NO_SPREAD = 1e-9
"""Shares of images that are this close are the same."""


class Spread(NamedTuple):
    """n figures of one contender."""

    n: int
    mean: float
    sd: float | None
    """with n - 1 below; None for a single figure"""


class Difference(NamedTuple):
    """How far a contender is above the baseline, seed by seed."""

    pairs: int
    mean: float
    sd: float | None
    low: float | None
    """the interval's ends; None for a single pair, and where no pair differs from another (accuracies go by whole images):
    that says nothing about another seed"""
    high: float | None

    @property
    def sure(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation; None where there is nothing."""
    if not values:
        return None
    return Spread(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def paired_difference(own: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Mean of own - baseline over the seeds that both have, with its two-sided t interval (`CONFIDENCE`): mean ± t(n - 1)
    · sd / √n. None where they share no seed.

    The interval is about what a seed changes - initial weights, order, stochastic depth - for these images and views."""
    gaps = [own[seed] - baseline[seed] for seed in own if seed in baseline]
    found = spread(gaps)
    if found is None:
        return None
    n, mean, sd = found
    if sd is None or sd < NO_SPREAD:
        return Difference(n, mean, sd, None, None)
    reach = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Difference(n, mean, sd, mean - reach, mean + reach)


def finding(name: str, baseline: str, difference: Difference | None, unit: str = "points") -> str:
    """In words what a difference says, and what it does not. The figures are percentages already."""
    if difference is None:
        return f"{name} and {baseline} have no finished seed in common"
    pairs, mean, _, low, high = difference
    where = f"{abs(mean):.2f} {unit} {'above' if mean >= 0 else 'below'}"
    if low is None or high is None:
        seeds = (
            "the one seed that both have: one pair has"
            if pairs == 1
            else f"each of {pairs} seeds: pairs without a spread have"
        )
        return f"{name} is {where} {baseline} in {seeds} no interval, and say{'s' if pairs == 1 else ''} little"
    interval = f"95 % interval {low:.2f} to {high:.2f}, {pairs} seeds"
    if difference.sure:
        return f"{name} is {where} {baseline} ({interval})"
    return f"{name} cannot be told from {baseline}: {where} it ({interval})"
