"""A comparison as one HTML page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from deitkit.comparison.plots import plots
from deitkit.comparison.report import cost_line, failure_line, machine_lines, measured_splits, table
from deitkit.comparison.results import SPLITS
from deitkit.comparison.verdicts import percent
from deitkit.files import write_atomically, written

PAGE, PLOTS = "compare.html", "plots"


def write_page(out: Path, result: dict[str, Any], plan: str) -> None:
    """`compare.html`, with the text of the `plan`, and its plots as files of their own. Raises UserError."""
    drawn = plots(out, result)
    with written(out / PLOTS):
        (out / PLOTS).mkdir(exist_ok=True)
    for name, (svg, _) in drawn.items():
        write_atomically(out / PLOTS / f"{name}.svg", svg)
    write_atomically(out / PAGE, page(result, drawn, plan))


def page(result: dict[str, Any], drawn: dict[str, tuple[str, str]], plan: str) -> str:
    """The page; `drawn`: SVG and caption of each plot by name; `plan`: what was compared, as `--plan` reads it."""
    templates = Environment(
        loader=PackageLoader("deitkit.comparison", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    tables = []
    for split in measured_splits(result):
        title, columns, rows = table(result, split)
        tables.append(
            {
                "split": SPLITS[split],
                "title": title,
                "columns": columns,
                "rows": rows,
                "findings": result["findings"][split],
            }
        )
    return templates.get_template("page.html.jinja").render(
        result=result,
        tables=tables,
        figures=[(Markup(svg), caption) for svg, caption in drawn.values()],
        plan=plan,
        runs=[_run_cells(row["name"], run) for row in result["contenders"] for run in row["runs"]],
        failed=[failure_line(failure) for failure in result["failed"]],
        cost=cost_line(result),
        machines=machine_lines(result),
    )


def _run_cells(name: str, run: dict[str, Any]) -> list[str]:
    """A line of the table of single runs."""

    def top1(split: str) -> str:
        if run[split] is None:
            return "-"
        heads = run[split]["top1"]
        return percent(heads["cls"] if heads["fused"] is None else heads["fused"])

    return [
        name,
        str(run["seed"]),
        top1("val"),
        top1("test"),
        str(run["steps"]),
        f"{run['images_seen']:,}",
        f"{run['params'] / 1e6:.2f} M",
        f"{run['clock']['minutes']:.1f}",
        run["run"],
    ]
