"""The recipes that are shipped: YAML files, each beginning with a card of what it is for and what it reaches.

In a checkout they stand in `recipes/`, in an installed package in a folder of the package.
"""

from __future__ import annotations

from pathlib import Path

from deitkit.errors import UserError, unknown_name

PACKAGED = Path(__file__).parent / "shipped_recipes"
IN_CHECKOUT = Path(__file__).parents[2] / "recipes"


def shipped() -> dict[str, Path]:
    """The files of the shipped recipes by name."""
    folder = PACKAGED if PACKAGED.is_dir() else IN_CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that is shipped. Raises UserError."""
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        return Path(name)
    known = shipped()
    if name in known:
        return known[name]
    if not known:
        raise UserError(f"--recipe {name}: none is shipped: give the path of a YAML file")
    raise unknown_name("recipe", name, known)


def card(path: Path) -> list[str]:
    """The lines of the comment that a recipe begins with, without their signs; the first one is its title."""
    lines = path.read_text(encoding="utf-8").splitlines()
    last = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:last]]
