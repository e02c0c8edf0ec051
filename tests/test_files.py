"""Files appear whole, for whom other new files are, and stay."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deitkit.config import RunConfig
from deitkit.files import Replaced, leftovers
from deitkit.run import RunFolder, save_tensors, write_atomically


def by_replaced(path: Path) -> None:
    with Replaced(path) as temporary:
        temporary.write_text("new")


def by_text(path: Path) -> None:
    write_atomically(path, "new")


def by_tensors(path: Path) -> None:
    save_tensors({"w": torch.ones(2)}, path)


def by_checkpoint(path: Path) -> None:
    run = RunFolder(path.parent / "run")
    run.create(RunConfig())
    run.save_checkpoint(1, {"w": torch.ones(2)}, {})
    (run.checkpoints / "step-000000001" / "state.safetensors").rename(path)


@pytest.fixture(params=[0o022, 0o027, 0o077])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("write", [by_replaced, by_text, by_tensors, by_checkpoint])
def test_a_new_file_is_readable_by_whom_the_user_lets_read(
    tmp_path: Path, mask: int, write: Callable[[Path], None]
) -> None:
    write(tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("write", [by_replaced, by_text, by_tensors])
def test_content_is_on_the_disk_before_the_name_and_the_name_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        done.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write(tmp_path / "file")
    assert done == ["sync file", "rename", "sync folder"]


def test_an_attempt_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def half() -> None:
        with Replaced(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_leftovers_are_those_of_one_file(tmp_path: Path) -> None:
    for name in ("file", ".file.x1", ".file.x2", ".files.x3", "other"):
        (tmp_path / name).touch()
    assert [path.name for path in leftovers(tmp_path / "file")] == [".file.x1", ".file.x2"]
