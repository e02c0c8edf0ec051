"""Make a small table of docs/evidence/losses.md again and hold it against the committed figures: `make results-quick`.

    python benchmarks/results_quick.py --out runs/results-quick
    python benchmarks/results_quick.py --out runs/results-quick --commit      (write the figures instead: after a change that moves them)

Trains the plan `plans/quick.yaml` (scikit-learn's digits, teacher included; six and a half minutes on two cores) and compares every
contender's mean of every head with that in `plans/quick.json`. Another processor rounds otherwise and so trains other networks;
a mean has to lie where one more draw of as many seeds would: within the 99 % interval of the difference of two means, with
Welch's degrees of freedom, and one validation image is always allowed. Exit code 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student_t

from deitkit.api import compare

PLANS = Path(__file__).parent / "plans"
COMMITTED = PLANS / "quick.json"
CONFIDENCE = 0.99


class Figure(NamedTuple):
    """Right validation images, %, over n seeds."""

    n: int
    mean: float
    sd: float


def reach(one: Figure, other: Figure) -> float:
    """How far apart two means of the same thing may be (Welch 1947)."""
    shares = [figure.sd**2 / figure.n for figure in (one, other)]
    if not sum(shares):
        return 0.0
    freedom = sum(shares) ** 2 / sum(s**2 / (f.n - 1) for s, f in zip(shares, (one, other), strict=True))
    return float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(sum(shares))


def figures(result: dict[str, Any]) -> dict[str, dict[str, Figure]]:
    """By contender and head."""
    return {
        row["name"]: {
            head: Figure(spread["n"], 100 * spread["mean"], 100 * spread["sd"])
            for head, spread in row["val"]["heads"].items()
            if spread is not None
        }
        for row in result["contenders"]
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--commit", action="store_true", help="write the figures instead of holding them against old ones"
    )
    given = parser.parse_args()
    result = compare("digits", out=given.out, plan=PLANS / "quick.yaml")
    found = figures(result)
    if given.commit:
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    image = 100 / result["images"]["val"]
    print("\n| contender | head | committed, % | now, % | may differ by | |\n| --- | --- | --- | --- | --- | --- |")
    outside = 0
    for name, heads in committed.items():
        for head, values in heads.items():
            before, now = Figure(*values), found[name][head]
            allowed = max(image, reach(before, now))
            fits = abs(before.mean - now.mean) <= allowed
            outside += not fits
            print(
                f"| {name} | {head} | {before.mean:.2f} ± {before.sd:.2f} | {now.mean:.2f} ± {now.sd:.2f} | {allowed:.2f} | "
                f"{'' if fits else 'OUTSIDE'} |"
            )
    return 1 if outside else 0


if __name__ == "__main__":
    raise SystemExit(main())
