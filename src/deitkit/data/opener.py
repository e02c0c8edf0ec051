"""Opening a split when it is asked for, and only then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

from deitkit.data.base import Split, SplitName
from deitkit.errors import UserError, unknown_name


@final
class Opener:
    """`Dataset.open_split`: makes a split on first demand and keeps it, so that it is read and hashed once."""

    def __init__(self, where: str, makers: Mapping[SplitName, Callable[[], Split]]) -> None:
        self._where = where
        self._makers = makers
        self._opened: dict[SplitName, Split] = {}

    def __call__(self, split: SplitName) -> Split:
        if split not in ("train", "val", "test"):
            raise unknown_name("split", split, ("train", "val", "test"))
        if split not in self._makers:
            has = ", ".join(self._makers)
            raise UserError(f"{self._where} has no {split} split, only {has}: choose one of them")
        if split not in self._opened:
            self._opened[split] = self._makers[split]()
        return self._opened[split]
