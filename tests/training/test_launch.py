from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.fakes import is_running

from deitkit import cli
from deitkit.training.evaluate import evaluate_run
from deitkit.training.processes import _culprit, launch, process_environment

SAY = "import os, sys; rank = os.environ['RANK']; print('rank', rank, os.environ['WORLD_SIZE']); "


def program(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", SAY + code]


def test_only_the_first_process_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(program(""), 3) == 0
    assert capfd.readouterr() == ("rank 0 3\n", "")


def test_a_mistake_that_all_find_is_said_once_with_its_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(program("print('deit: error: no', file=sys.stderr); sys.exit(2)"), 2) == 2
    assert capfd.readouterr().err == "deit: error: no\n"


def test_what_another_process_said_of_its_failure_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import time; rank == '0' and time.sleep(0.5) or rank == '1' and sys.exit('only I know why')"
    assert launch(program(code), 2) == 1
    assert "only I know why" in capfd.readouterr().err


def test_the_cause_is_said_though_the_first_process_ends_of_its_consequence(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, sys; from unittest import mock; from deitkit import cli\n"
        "if os.environ['RANK'] == '1': sys.exit(print('deit: error: not enough memory', file=sys.stderr) or 2)\n"
        "lost = RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1')\n"
        "with mock.patch.object(cli, '_dispatch', side_effect=lost): sys.exit(cli.main(['models']))"
    )
    assert launch([sys.executable, "-c", code], 2) == 2
    said = "deit: error: another process of this training has ended\ndeit: error: not enough memory\n"
    assert capfd.readouterr().err == said


@pytest.mark.parametrize(
    ("codes", "culprit"),
    [
        ((3, 1), 1),  # a traceback, and one that only missed that process
        ((-signal.SIGABRT, 1), 1),
        ((1, 2), 1),
        ((1, -signal.SIGKILL), 1),
        ((0, -signal.SIGTERM), 1),
        ((3, -signal.SIGABRT), 0),
        ((2, 2), 0),
        ((0, 0, 3), 2),
    ],
)
def test_the_process_whose_failure_the_others_followed_is_found(codes: tuple[int, ...], culprit: int) -> None:
    assert _culprit(codes) == culprit


def test_a_process_that_hangs_ends_with_the_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.training.processes.PATIENCE_SECONDS", 0.2)
    assert launch(program("import time; sys.exit(3) if rank == '1' else time.sleep(60)"), 2) == 3


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_is_killed_is_named(rank: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = f"import signal, time; rank == '{rank}' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(1)"
    assert launch(program(code), 2) == 137
    killed = f"deit: error: process {rank} of 2 was ended by signal 9: perhaps there was not enough memory\n"
    assert capfd.readouterr().err.endswith(killed)


def test_processes_share_the_cores_and_know_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    environment = process_environment(1, 4, 1234)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("1", "1", "4")
    assert environment["MASTER_PORT"] == "1234"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert process_environment(0, 4, 1234)["OMP_NUM_THREADS"] == "5"


@pytest.mark.slow
def test_a_step_with_fewer_images_than_processes_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = "--distillation none --train-images 40 --batch-size 1 --processes 2 --steps 2"
    assert cli.main(["train", "digits", *settings.split(), "--out", str(tmp_path / "run")]) == 2
    assert "a step may have 1 images, too few for each process to get one" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_processes_learn_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same views, the same loss, the same weights but for rounding: the gradient is the sum of two halves (of 58 and 59 or
    60 images) instead of one sum, and AdamW divides by the gradient's size, so that a weight whose gradient is next to
    nothing moves by its rounding. After 30 steps the largest difference was 1.2e-6 in a weight, 2e-7 of the loss; five to
    eight times that is allowed. Only the patch stem: a convolutional one has batch statistics of each process's own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    common = ["train", "digits", "--distillation", "none", "--epochs", "3", "--stem", "patch", "--augment", "deit"]
    common += ["--optimizer", "adamw", "--batch-size", "128", "--precision", "float32"]
    weights, losses, accuracies = [], [], []
    for processes in ("1", "2"):
        out = tmp_path / processes
        command = [sys.executable, "-m", "deitkit.cli", *common, "--out", str(out), "--processes", processes]
        assert launch(command, 1) == 0 if processes == "1" else cli.main(command[3:]) == 0
        weights.append(load_file(out / "model" / "model.safetensors"))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses.append([line["loss"]["total"] for line in lines if line["event"] == "epoch"])
        accuracies.append([line["top1"]["cls"] for line in lines if line["event"] == "epoch"])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert accuracies[0] == accuracies[1]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-5, name


def test_one_process_of_a_resumed_run_rewinds_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is one for all: a second writer of it finds its own copy gone, or drops what the first has added."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    settings = "--distillation none --train-images 32 --batch-size 16 --steps 1 --depth 1"
    arguments = ["train", "digits", *settings.split(), "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    (tmp_path / "run" / "summary.json").unlink()
    code = (
        "import os, pathlib, sys; from deitkit import cli; from deitkit.training import run\n"
        "rewind = run.RunFolder.rewind; told = pathlib.Path(sys.argv[1])\n"
        "run.RunFolder.rewind = lambda self, step: [(told / os.environ['RANK']).touch(), rewind(self, step)]\n"
        "sys.exit(cli.main(sys.argv[2:]))"
    )
    (tmp_path / "told").mkdir()
    resumed = [*arguments, "--resume", "--processes", "2"]
    assert launch([sys.executable, "-c", code, str(tmp_path / "told"), *resumed], 2) == 0
    assert [rank.name for rank in (tmp_path / "told").iterdir()] == ["0"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_parent_that_alone_is_told_to_end_takes_its_children_along(tmp_path: Path, number: int, code: int) -> None:
    child = f"import os, time, pathlib; pathlib.Path(r'{tmp_path}', str(os.getpid())).touch(); time.sleep(60)"
    parent = (
        "import sys; from deitkit.training import processes as run; run.INTERRUPT_SECONDS = 0.1; "
        f"sys.exit(run.launch([sys.executable, '-S', '-c', {child!r}], 2))"
    )
    assert ended_by(number, [sys.executable, "-c", parent], tmp_path, 2) == code


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_a_process_of_torchrun_ends_with_it_also_by_sigkill(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import os, sys, time, pathlib\n"
        "from deitkit.config import LoopConfig; from deitkit.training.processes import make_accelerator\n"
        "make_accelerator(LoopConfig()); pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(60)"
    )
    (tmp_path / "begun").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    ended_by(signal.SIGKILL, [*torchrun, str(child), str(tmp_path / "begun")], tmp_path / "begun", 1)


def ended_by(number: int, command: list[str], begun: Path, count: int) -> int:
    """The exit code of `command`, sent this signal alone once its children have written their ids into `begun`: all of them end."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a shell's background jobs ignore it
    process = subprocess.Popen(command, env=environment, preexec_fn=heeds)
    deadline = time.monotonic() + 40
    while len(list(begun.iterdir())) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(path.name) for path in begun.iterdir()]
    process.send_signal(number)
    code = process.wait(15)
    deadline = time.monotonic() + 5
    while (left := [pid for pid in children if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(children) == count
    assert not left
    return code


def test_scores_of_two_processes_are_those_of_the_network_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch statistics are each process's own: all measure with those of the first one, which are saved."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    settings = "--distillation none --student deit_pico --stem conv --epochs 1 --train-images 200 --batch-size 16 --no-calibrate"
    command = [
        "train",
        "digits",
        *settings.split(),
        "--precision",
        "float32",
        "--out",
        str(tmp_path / "run"),
        "--processes",
        "2",
    ]
    assert cli.main(command) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert evaluate_run(tmp_path / "run", workers=0)["nll"] == pytest.approx(summary["nll"], abs=2e-7)
