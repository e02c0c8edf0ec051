"""Files appear whole, for whom other new files are, and stay."""

from __future__ import annotations

import errno
import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.fakes import holding

from deitkit import terminal as files
from deitkit.config import RunConfig
from deitkit.deploy.export import filled
from deitkit.terminal import Lock, Replaced, UserError, is_filled, leftovers, save_tensors, write_atomically
from deitkit.training.run import RunFolder


def by_replaced(path: Path) -> None:
    with Replaced(path) as temporary:
        temporary.write_text("new")


def by_text(path: Path) -> None:
    write_atomically(path, "new")


def by_tensors(path: Path) -> None:
    save_tensors({"w": torch.ones(2)}, path)


def by_checkpoint(path: Path) -> None:
    run = RunFolder(path.parent / "run")
    run.create(RunConfig(), {})
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


@pytest.mark.parametrize("write", [by_text, by_tensors])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file: cannot be written: No space left on device \(disk: /"):
        write(tmp_path / "file")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("made", "full"), [((), False), ((".lock", "empty/"), False), (("a",), True), (("b/c",), True)]
)
def test_hidden_files_and_empty_folders_fill_nothing(tmp_path: Path, made: tuple[str, ...], full: bool) -> None:
    assert not is_filled(tmp_path / "missing")
    for name in made:
        path = tmp_path / name
        (path if name.endswith("/") else path.parent).mkdir(exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    assert is_filled(tmp_path) == full


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_could_not_be_filled_can_be_filled_again(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        (out / "empty").mkdir(parents=True)

    def write_until_the_disk_is_full() -> None:
        with filled(out):
            (out / "part").mkdir(parents=True)
            write_atomically(out / "part" / "model.onnx", b"half")
            write_atomically(out / "README.md", "half")
            raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        write_until_the_disk_is_full()
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "empty"] if there else [])
    with filled(out):
        out.mkdir(exist_ok=True)
        write_atomically(out / "README.md", "whole")
    with pytest.raises(UserError, match="already exists and is not empty"), filled(out):
        pass
    assert (out / "README.md").read_text() == "whole"


def test_processes_that_want_the_same_take_turns(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from deitkit.terminal import alone; print('waits', flush=True)\n"
        "with alone(pathlib.Path(sys.argv[1])): print('works', flush=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with holding(tmp_path):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"waits\n"
        assert not select.select([process.stdout], [], [], 0.5)[0]
    assert process.communicate(timeout=60)[0] == b"works\n"
    assert process.returncode == 0


def test_leftovers_are_those_of_one_file(tmp_path: Path) -> None:
    for name in ("file", ".file.x1", ".file.x2", ".files.x3", "other"):
        (tmp_path / name).touch()
    assert [path.name for path in leftovers(tmp_path / "file")] == [".file.x1", ".file.x2"]


def test_a_lock_ends_with_its_process_though_a_child_lives_on(tmp_path: Path) -> None:
    """As a killed training's loader workers do for seconds."""
    code = (
        "import os, pathlib, sys, time; from deitkit.terminal import Lock; lock = Lock(pathlib.Path(sys.argv[1]))\n"
        "if os.fork() == 0: time.sleep(60)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    holder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError):
            Lock(tmp_path)
        holder.kill()
        assert holder.wait(20) == -signal.SIGKILL
        Lock(tmp_path).release()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_a_file_is_no_folder_for_results(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="taken: is a file: give a folder's name"):
        files.refuse_filled(tmp_path / "taken", "give another --out")
