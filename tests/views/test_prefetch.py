"""Items made ahead by workers: the same ones, whatever happens to the workers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from tests.fakes import is_running

from deitkit import cli
from deitkit.terminal import UserError, is_lost_worker
from deitkit.views import prefetch as module
from deitkit.views.prefetch import has_shared_memory, prefetch


class Item(NamedTuple):
    values: torch.Tensor
    other: torch.Tensor | None
    parts: list[tuple[torch.Tensor, int]]


def make(key: int) -> Item:
    return Item(
        torch.full((3, 4), key, dtype=torch.uint8),
        None if key % 2 else torch.tensor([key / 3]),
        [(torch.tensor(key), key)],
    )


def slowly(key: int) -> torch.Tensor:
    time.sleep(0.05)
    return torch.tensor(key)


def numbers(items: Any) -> list[int]:
    return [int(item) for item in items]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_items_come_as_they_were_made_and_in_order(workers: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through pipes and through shared memory; a tensor that comes may be written to."""
    monkeypatch.setattr(module, "has_shared_memory", lambda: shared)
    found = list(prefetch(make, range(7), workers, pin_memory=shared))
    for key, item in enumerate(found):
        expected = make(key)
        assert type(item) is Item
        assert torch.equal(item.values, expected.values)
        assert item.values.dtype == torch.uint8
        assert (item.other is None) == (expected.other is None)
        assert item.other is None or torch.equal(item.other, expected.other)  # type: ignore[arg-type]
        assert (int(item.parts[0][0]), item.parts[0][1]) == (key, key)
        item.values[0] = 255


def test_after_the_loss_of_a_worker_the_rest_is_made_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Said in one line; a second loss is an error."""
    items = prefetch(slowly, range(40), 2)
    first = [int(next(items)) for _ in range(5)]
    os.kill(items._items._workers[0].pid, signal.SIGKILL)  # type: ignore[attr-defined]
    time.sleep(0.3)  # nothing is raised here, where a training step would be interrupted
    assert [*first, *[int(next(items)) for _ in range(20)]] == list(range(25))
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == "deit: warning: a data-loading worker was killed (out of memory?): continuing with 1, one batch ahead"
    )
    os.kill(items._items._workers[0].pid, signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError) as error:
        list(items)
    assert is_lost_worker(error.value)


def test_a_single_item_needs_no_worker() -> None:
    items = prefetch(slowly, [3], 2)
    assert not hasattr(items._items, "_workers")  # type: ignore[attr-defined]
    assert numbers(items) == [3]
    items = prefetch(slowly, [3, 4], 5)
    assert len(items._items._workers) == 2  # type: ignore[attr-defined]
    assert numbers(items) == [3, 4]


def test_workers_end_by_their_parent_s_sigterm_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """One that the whole process group gets is for the program to answer, which may still want the batches of this step."""
    items = prefetch(slowly, range(20), 2)
    first = [int(next(items)) for _ in range(2)]  # one of each worker: both have begun
    workers = items._items._workers  # type: ignore[attr-defined]
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    assert [*first, *numbers(items)] == list(range(20))
    assert capsys.readouterr().err == ""
    items = prefetch(slowly, range(20), 1)
    next(items)
    (worker,) = items._items._workers  # type: ignore[attr-defined]
    worker.terminate()
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_workers_end_with_a_parent_that_is_killed() -> None:
    """Also while they are busy, and look at nothing."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def parent() -> None:
        items = prefetch(lambda _key: time.sleep(60), range(4), 2)
        send.send([worker.pid for worker in items._items._workers])  # type: ignore[attr-defined]
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    workers = receive.recv()
    assert len(workers) == 2
    time.sleep(0.5)  # they have begun
    process.kill()
    process.join()
    until = time.monotonic() + 10
    while (left := [pid for pid in workers if is_running(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left


def test_a_worker_that_is_stuck_is_told_and_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one is that waits for a drive that does not answer. It does not outlive the error."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(module, "NOTICE_SECONDS", 0.3)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 1.0)
    items = prefetch(slowly, range(40), 1)
    next(items)
    (worker,) = items._items._workers  # type: ignore[attr-defined]
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=r"no images for \d s: a disk or network drive does not answer"):
        list(items)
    (line,) = capsys.readouterr().err.splitlines()
    assert "waiting for images for 0 s" in line
    worker.join(5)
    assert not worker.is_alive()


def test_an_error_of_a_worker_is_the_callers() -> None:
    def broken(key: int) -> torch.Tensor:
        raise UserError(f"no {key}")

    with pytest.raises(UserError, match="no 0"):
        list(prefetch(broken, range(3), 1))


@pytest.mark.parametrize(
    ("files", "free", "folder", "found"),
    [
        (4096, 10**10, "/tmp", True),
        (64, 10**10, "/tmp", False),
        (4096, 64 * 2**20, "/tmp", False),
        (4096, 10**10, "/tmp/" + "x" * 80, False),
    ],
)
def test_shared_memory_is_used_only_where_it_can_be(
    files: int, free: int, folder: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(module.resource, "getrlimit", lambda _: (files, files))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(free))
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: folder)
    monkeypatch.setattr(module, "SHARED_MEMORY", Path("/"))
    assert has_shared_memory() == found


SCRIPT = """
import sys, torch
from deitkit.views.prefetch import prefetch
make = lambda key: torch.full((64, 3, int(sys.argv[1]), 96), key, dtype=torch.uint8)
print([int(item[-1, -1, -1, -1]) for item in prefetch(make, range(12), 2)])
"""


@pytest.mark.parametrize("place", ["small shared memory", "few files", "long folder", "missing folder"])
def test_workers_hand_over_batches_in_small_containers(place: str, tmp_path: Path) -> None:
    """64 MB of shared memory, as Docker gives, for 100 MB made ahead; 64 open files; a folder for temporary files that is too long for a
    socket, or that is not there."""
    before = {"small shared memory": [SMALL_MEMORY.format("64m")], "few files": ["ulimit -n 64"]}.get(place, [])
    folder = tmp_path / ("x" * 100) if place == "long folder" else tmp_path / "missing"
    if place == "long folder":
        folder.mkdir()
    height = "720" if place == "small shared memory" else "96"
    environment = {"TMPDIR": str(folder)} if "folder" in place else {}
    assert in_container(before, ["-c", SCRIPT, height], environment) == str(list(range(12)))


def test_a_command_runs_in_the_smallest_container(tmp_path: Path) -> None:
    """All at once: 64 kB of shared memory, 64 open files, no folder for temporary files."""
    for number in range(40):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (150 + number, 160), (6 * number, 0, 0)).save(folder / f"{number}.png")
    run = str(tmp_path / "run")
    settings = "--teacher none --student deit_pico --depth 1 --image-size 128 --patch-size 32 --batch-size 32 --steps 1"
    assert cli.main(["train", str(tmp_path / "photos"), *settings.split(), "--workers", "0", "--out", run]) == 0
    command = ["-m", "deitkit.cli", "evaluate", run, "--split", "test", "--workers", "2", "--json"]
    before = [SMALL_MEMORY.format("64k"), "ulimit -n 64"]
    assert json.loads(in_container(before, command, {"TMPDIR": str(tmp_path / "missing")}))["n"] == 8


SMALL_MEMORY = "mount -t tmpfs -o size={} none /dev/shm"


def in_container(before: list[str], arguments: list[str], more: dict[str, str]) -> str:
    """What Python prints with these arguments after these commands of a shell, and with this environment."""
    script = " && ".join([*before, 'exec "$0" "$@"'])
    command = ["sh", "-c", script, sys.executable, *arguments]
    if any(line.startswith("mount") for line in before):
        mounts = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
        if subprocess.run([*mounts, "true"], capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount, or user namespaces")
        command = [*mounts, *command]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), **more}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
