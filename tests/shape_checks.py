"""How annotations are checked while the suite runs: pyproject.toml names this to jaxtyping's pytest plugin."""

from __future__ import annotations

from typing import Any

from beartype import BeartypeConf, FrozenDict, beartype
from numpy.typing import ArrayLike

# An int is a float here, as for mypy; what beartype makes of numpy's ArrayLike refuses plain tuples.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({ArrayLike: Any})))
