from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import deitkit
from deitkit import cli
from deitkit.data.listing import image_paths
from deitkit.settings import find_recipe
from deitkit.terminal import UserError
from deitkit.verbs import common as verbs

SOURCE = Path(cli.__file__).parents[1]


def deit(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, "-m", "deitkit", *argv], capture_output=True, text=True, env=environment)


def imported_by(*argv: str) -> set[str]:
    """The modules that `deit argv` has imported when it ends."""
    code = f"import sys, deitkit.cli; deitkit.cli.main({list(argv)}); print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_answers_within_half_a_second_and_imports_nothing_heavy() -> None:
    """Half a second of the processor: on a busy machine the clock says nothing about the program."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = deit("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert answer.returncode == 0
    assert min(spent) < 0.5
    assert not {"torch", "pydantic", "rich", "numpy", "yaml"} & imported_by("--help")


def test_the_parser_of_a_verb_needs_neither_torch_nor_the_training() -> None:
    assert not {"torch", "numpy", "rich", "deitkit.training.loop", "deitkit.data"} & imported_by("train", "--help")


def test_overview_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    page = capsys.readouterr().out
    for name, verb in cli.VERBS.items():
        assert any(line.strip().startswith(name) and line.endswith(verb.help) for line in page.splitlines())
    headings = [line for line in page.splitlines() if line.endswith(":")]
    assert len(headings) == len(set(headings)) == 5


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_no_line_of_help_is_wider_than_the_terminal_and_no_word_is_cut(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = []
    for columns in ("80", "400"):
        monkeypatch.setenv("COLUMNS", columns)
        with contextlib.suppress(SystemExit):
            cli.main([*name.split(), "--help"])
        pages.append(capsys.readouterr().out)
    assert max(map(len, pages[0].splitlines())) <= 80
    assert pages[0].split() == pages[1].split()


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_has_a_page_of_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*name.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: deit {name}")
    assert cli.VERBS[name].help in " ".join(out.split())
    # What the overview shows of a verb is what its parser knows.
    for word in cli.VERBS[name].usage.replace("[", " ").replace("]", " ").split():
        assert word.rstrip(".") in out
    assert err == ""


def test_help_of_a_fit_is_about_convolutional_networks_and_others_flags_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["teacher", "fit", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "adamw; muon for" in page or "--optimizer" in page
    for word in ("lamb", "LAMB", "the student's", "blocks", "--layer-decay", "--trainable"):
        assert word not in page, word
    for flag, why in (
        (
            ["--optimizer", "muon"],
            "--optimizer: muon is for training from scratch: give --from-scratch",
        ),
        (
            ["--trainable", "last-2"],
            "--trainable: does not apply to deit teacher fit",
        ),
    ):
        assert cli.main(["teacher", "fit", "digits", "--out", "unused", *flag]) == 2
        assert capsys.readouterr().err.startswith(f"deit: error: {why}")


def test_help_of_a_verb_with_two_words_lists_its_partners(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["teacher", "--help"]) == 0
    page = capsys.readouterr().out
    assert "teacher fit" in page
    assert "teacher check" in page
    assert "evaluate" not in page


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("deit 0.")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["trian"], "unknown verb 'trian': did you mean train?"),
        (["teacher"], "teacher: which one? teacher fit or teacher check"),
        (["teacher", "chek"], "unknown verb 'teacher chek': did you mean teacher check"),
        (["--quiet"], "unknown flag --quiet: a verb comes first"),
        (["train", "digits", "--out", "x", "--epoch", "2"], "unknown flag --epoch: did you mean --epochs"),
        (["train"], "missing: DATA (deit train --help)"),
        (["train", "digits", "--out", "x", "--recipe", "nowhere/r.yaml"], "nowhere/r.yaml: cannot be read"),
        (["predict", "run"], "missing: PATH... (deit predict --help)"),
        (["predict", "run", "x.png", "--top", "0"], "--top: input should be greater than 0"),
        (["predict", "no-such-run", "x.png"], "error: no-such-run: no such file or folder"),
        (["predict", ".", "x.png"], "error: x.png: no such file or folder"),
        (
            ["compare", "digits", "--out", "x", "--teacher", "lite0", "--budget-minutes", "0"],
            "--budget-minutes: input should be greater",
        ),
        (["evaluate", "no-such-run"], "no such file: is no-such-run the folder of a finished run?"),
        (["train", "no-such-data", "--out", "x"], "no-such-data"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_two(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("deit: error: ")
    assert complaint in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_image_is_named_before_torch_is_imported(tmp_path: Path) -> None:
    code = f"import sys; from deitkit.cli import main; main(['predict', {str(tmp_path)!r}, 'x.png']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SOURCE)}
    )
    assert (done.stdout, done.stderr) == ("False\n", "deit: error: x.png: no such file or folder\n")


def test_a_mistake_through_the_shell_has_no_traceback() -> None:
    answer = deit("trian")
    assert answer.returncode == 2
    assert answer.stderr == "deit: error: unknown verb 'trian': did you mean train?\n"


def _verb_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def models(_call: object) -> int:
        raise error

    monkeypatch.setattr("deitkit.verbs.prepare.models", models)


def test_a_message_of_several_lines_becomes_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _verb_that_raises(monkeypatch, UserError("a\n  b"))
    assert cli.main(["models"]) == 2
    assert capsys.readouterr().err == "deit: error: a b\n"


def test_ctrl_c_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _verb_that_raises(monkeypatch, KeyboardInterrupt())
    assert cli.main(["models"]) == 130
    assert capsys.readouterr().err == "deit: interrupted\n"


def test_a_second_ctrl_c_does_not_disturb_the_end_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    _verb_that_raises(monkeypatch, KeyboardInterrupt())
    monkeypatch.setattr(sys, "argv", ["deit", "models"])
    before = signal.getsignal(signal.SIGINT)
    try:
        assert cli.main(["models"]) == 130
        assert signal.getsignal(signal.SIGINT) is before
        assert cli.main() == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("argv", "function", "file", "advice"),
    [
        (
            ["train", "--recipe", "photos"],
            "jobs.run_training",
            "config.yaml",
            "to continue: deit train --resume --out {}",
        ),
        (["teacher", "fit"], "fit.run_fit", "config.yaml", "to continue: deit teacher fit --resume --out {}"),
        (["tape", "record", "--teacher", "x", "--views", "2"], "jobs.run_record", "tape.json", verbs.AGAIN),
    ],
)
def test_ctrl_c_tells_how_to_continue_once_there_is_something_to_continue_from(
    argv: list[str],
    function: str,
    file: str,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(f"deitkit.training.{function}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    argv = [*argv, "digits", "--out", str(tmp_path)]
    assert cli.main(argv) == 130
    assert capsys.readouterr().err == "deit: interrupted\n"
    (tmp_path / file).touch()
    assert cli.main(argv) == 130
    assert capsys.readouterr().err == f"deit: interrupted: {advice.format(tmp_path)}\n"


def test_ctrl_c_names_the_folder_that_nobody_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def started(_location: str, _config: Any, out: Path, **_: Any) -> None:
        out.mkdir(parents=True)
        (out / "config.yaml").touch()
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deitkit.training.jobs.run_training", started)
    for number in (1, 2):
        assert cli.main(["train", "digits"]) == 130
        line = f"deit: interrupted: to continue: deit train --resume --out runs/digits-{number}\n"
        assert capsys.readouterr().err == line


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _verb_that_raises(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["models"])


def test_models_shows_every_student(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["deit_tiny"]["tokens"] == 198
    assert round(rows["deit_tiny"]["parameters"] / 1e6, 1) == 5.9
    assert cli.main(["models"]) == 0
    page = capsys.readouterr().out
    assert all(name in page for name in rows)


SUMMARY = {
    "n": 100,
    "has_test": True,
    "top1": {"cls": 0.9, "dist": 0.91, "fused": 0.92, "fused_logits": 0.915},
    "teacher": {"name": "lite0", "top1": 0.95},
}


def test_ctrl_c_while_a_teacher_is_fitted_tells_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("deitkit.training.jobs.run_training", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["train", "digits", "--teacher", "auto", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "deit: interrupted: run the same command again to continue\n"


def test_train_hands_over_flags_and_shows_the_teacher_and_every_head(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from deitkit.training import jobs

    told: dict[str, Any] = {}

    def run_training(
        location: str, config: Any, out: Path, *, resume: bool, progress: Any, dataset: Any
    ) -> dict[str, Any]:
        told.update(location=location, config=config, out=out, resume=resume)
        return SUMMARY

    monkeypatch.setattr(jobs, "run_training", run_training)
    out = tmp_path / "run"
    flags = ["--recipe", "photos", "--teacher", "lite0", "--epochs", "2", "--out", str(out), "--resume"]
    assert cli.main(["train", "digits", *flags]) == 0
    assert (told["location"], told["out"], told["resume"]) == ("digits", out, True)
    assert (told["config"].loop.length, told["config"].teacher.teacher) == ("2ep", "lite0")
    printed, said = capsys.readouterr()
    for text in ("teacher lite0", "95.00", "class head", "90.00", "distillation head", "91.00", "92.00"):
        assert text in printed
    assert f"deit evaluate {out}" in said


def test_train_without_a_teacher_shows_one_head(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deitkit.training import jobs

    top1 = {"cls": 0.9, "dist": None, "fused": None, "fused_logits": None}
    monkeypatch.setattr(
        jobs,
        "run_training",
        lambda *_, **__: {"model": "deit_x", "has_test": True, "n": 9, "top1": top1, "teacher": None},
    )
    assert cli.main(["train", "digits", "--out", "x"]) == 0
    printed = capsys.readouterr().out
    assert "deit_x 90.00" in " ".join(printed.split())
    assert "distillation" not in printed


def test_several_processes_run_the_same_command_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from deitkit.training import processes

    told: list[Any] = []
    monkeypatch.setattr(processes, "launch", lambda command, count: told.append((command, count)) or 0)
    argv = ["train", "digits", "--out", "x", "--processes", "2"]
    assert cli.main(argv) == 0
    assert told == [([sys.executable, "-m", "deitkit.cli", *argv], 2)]


def test_recipes_are_found_by_path_and_by_name() -> None:
    assert find_recipe("some/where.yaml") == Path("some/where.yaml")
    assert find_recipe("mine.yaml") == Path("mine.yaml")
    with pytest.raises(UserError, match="recipe"):
        find_recipe("no-such-recipe")


def test_a_recipe_that_is_no_text_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
    assert cli.main(["recipes", str(tmp_path / "r.yaml")]) == 2
    assert capsys.readouterr().err == f"deit: error: {tmp_path / 'r.yaml'}: not a recipe: not a text file\n"


def test_folders_become_the_images_in_them_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt", "sub/c.webp", "d.jfif", "._a.jpg", ".thumbs/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = image_paths([tmp_path, tmp_path / "x.dat"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.jpg", "b.PNG", "d.jfif", "sub/c.webp", "x.dat"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in this folder"):
        image_paths([tmp_path / "empty"])


def shell(command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHON": sys.executable}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)


def test_a_reader_that_goes_away_ends_a_listing_quietly() -> None:
    done = shell('set -o pipefail; "$PYTHON" -m deitkit.cli models | head -1')
    assert (done.returncode, done.stderr) == (0, "")


def test_a_training_goes_on_when_nobody_listens(tmp_path: Path) -> None:
    command = f'"$PYTHON" -m deitkit.cli train digits --train-images 100 --steps 3 --out {tmp_path}/run 2>&1 | head -1'
    shell(f"set -o pipefail; {command}")
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_results_that_cannot_be_printed_are_no_success() -> None:
    done = shell('"$PYTHON" -m deitkit.cli recipes > /dev/full')
    assert done.returncode == 2
    assert done.stderr == "deit: error: the results cannot be printed: No space left on device\n"


def test_closed_streams_are_no_reason_to_fail() -> None:
    done = shell('"$PYTHON" -m deitkit.cli models >&-')
    assert (done.returncode, done.stderr) == (0, "")
    done = shell('"$PYTHON" -m deitkit.cli recipes 2>&-')
    assert done.returncode == 0
    assert "few-photos" in done.stdout


def test_a_terminal_that_cannot_spell_a_name_gets_it_escaped() -> None:
    done = shell('PYTHONIOENCODING=ascii "$PYTHON" -m deitkit.cli train übung --out x')
    assert done.returncode == 2
    assert "\\xfcbung" in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory: give a smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (OSError(12, "Cannot allocate memory"), "error: Cannot allocate memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "give --workers 0"),
        (FileNotFoundError(2, "No such file or directory", "a\nb"), r"error: a\nb: No such file"),
    ],
)
def test_what_the_machine_lacks_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    _verb_that_raises(monkeypatch, error)
    assert cli.main(["models"]) == 2
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1


def test_functions_of_the_package_stay_functions() -> None:
    """A module of the package that is called like one of them would take its place when it is imported."""
    code = (
        "import deitkit as dk, deitkit.api, deitkit.training.jobs; [dk.train, dk.evaluate]; print(*map(callable, {}))"
    )
    names = ", ".join(f"dk.{name}" for name in deitkit.__all__)
    done = subprocess.run(
        [sys.executable, "-c", code.format(f"[{names}]")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    assert done.stdout.split() == ["True"] * len(deitkit.__all__), done.stderr
    modules = {path.stem for path in (SOURCE / "deitkit").iterdir()}
    assert not modules & set(deitkit.__all__)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "deit: interrupted\n"), (signal.SIGTERM, 143, "deit: terminated\n")],
)
def test_a_signal_while_modules_are_imported_is_one_line(number: signal.Signals, code: int, said: str) -> None:
    """As soon as the program can hear it, and a while later."""
    for delay in (0, 0.03, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-m", "deitkit.cli", "models"],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
        while not hears(process.pid):
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == said
        # Python ends itself by SIGINT where that came while it executed a text, as dataclasses do: a shell reports 130
        assert process.returncode in (code, -signal.SIGINT)


def hears(pid: int) -> bool:
    """Whether the program has its handlers: that of SIGTERM comes last."""
    caught = re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
