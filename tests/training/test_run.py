"""The run folder survives kills and is refused where it would overwrite something."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.fakes import holding

from deitkit.config import RunConfig
from deitkit.settings import validated
from deitkit.terminal import UserError, load_yaml
from deitkit.training import run as run_module
from deitkit.training.run import RunFolder, place_of


def test_config_fed_back_is_the_same(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    config = RunConfig()
    run.create(config, {})
    assert run.config(RunConfig) == config
    assert validated(RunConfig, load_yaml(run.path / "config.yaml"), "file") == config


def test_what_a_run_was_given_by_a_relative_path_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("there/photos", "there/teacher", "there/weights", "here/photos"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    run = RunFolder(Path("run").resolve())
    run.create(RunConfig(), {})
    monkeypatch.chdir(tmp_path / "here")
    there = tmp_path / "there"
    assert run.from_here("teacher") == f"{there}/teacher"
    assert run.from_here("teacher+vit@weights+photos") == f"{there}/teacher+vit@{there}/weights+photos"
    unchanged = [
        "photos",
        "photos+nothing@photos",
        "n" * 300,
        "nothing",
        "/nothing",
        "run",
    ]  # the last is the run itself, so it must be the name of something else
    assert [run.from_here(path) for path in unchanged] == unchanged
    for damaged in ("", "[]", "{}", '{"folder": 3}'):
        (run.path / "environment.json").write_text(damaged)
        assert run.from_here("teacher") == "teacher"
    assert RunFolder(tmp_path / "none").from_here("teacher") == "teacher"


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        RunFolder(tmp_path).create(RunConfig(), {})
    RunFolder(tmp_path / "run").create(RunConfig(), {})
    with pytest.raises(UserError, match="--resume"):
        RunFolder(tmp_path / "run").create(RunConfig(), {})


def test_what_a_command_leaves_that_could_write_nothing_is_in_nobodys_way(tmp_path: Path) -> None:
    """A full disk, or a kill, before the settings are there: the same command works once there is room."""
    run = RunFolder(tmp_path / "run")
    for path in (run.checkpoints, run.path / "runs"):
        path.mkdir(parents=True)
    for name in (".lock", ".config.yaml.a1b2", "data.json", "environment.json"):
        (run.path / name).touch()
    run.create(RunConfig(), {})
    assert run.config(RunConfig) == RunConfig()


def test_settings_are_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With them a folder is a run's, so that what tells its images apart has to be there."""
    names: list[str] = []
    monkeypatch.setattr(run_module, "write_atomically", lambda path, _: names.append(path.name))
    RunFolder(tmp_path / "run").create(RunConfig(), {})
    assert names == ["data.json", "environment.json", "config.yaml"]


def test_half_written_checkpoint_is_never_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(RunConfig(), {})
    run.save_checkpoint(10, {"w": torch.ones(2)}, {"seconds": 1.0})
    half = run.checkpoints / ".step-000000020.tmp"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"cut sho")
    tensors, state = run.latest_checkpoint()
    assert state["step"] == 10
    assert torch.equal(tensors["w"], torch.ones(2))
    run.save_checkpoint(20, {"w": torch.zeros(2)}, {"seconds": 2.0})
    run.save_checkpoint(30, {"w": torch.zeros(2)}, {"seconds": 3.0})
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["step-000000020", "step-000000030"]


def test_damaged_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(RunConfig(), {})
    run.save_checkpoint(10, {"w": torch.ones(2)}, {"seconds": 1.0})
    for file in ("state.safetensors", "state.json"):
        (run.checkpoints / "step-000000010" / file).write_bytes(b"{cut")
        with pytest.raises(
            UserError, match=r"step-000000010: damaged .*: remove it to start this run from the beginning"
        ):
            run.latest_checkpoint()
    run.save_checkpoint(20, {"w": torch.ones(2)}, {"seconds": 1.0})
    assert run.latest_checkpoint() is not None
    wrong = str(run.damaged_checkpoint(ValueError("no weights")))  # its files are sound, what they hold is not
    assert wrong.endswith("step-000000020: damaged (no weights): remove it to continue from step-000000010")
    (run.checkpoints / "step-000000020" / "state.json").write_bytes(b"{cut")
    both = r"step-000000020: damaged .*: remove it and step-000000010 to start this run from the beginning"
    with pytest.raises(UserError, match=both):
        RunFolder(run.path).latest_checkpoint()


def test_metrics_cut_short_by_a_kill_are_still_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(RunConfig(), {})
    run.log("epoch", step=10)
    run.log("epoch", step=20)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "epo')
    assert [event["step"] for event in run.events()] == [10, 20]
    run.rewind(10)
    assert [event["step"] for event in run.events()] == [10]


@pytest.mark.parametrize("line", ["[]", "3", '{"event": "epoch", "step": "x"}', "{", "\udcff"])
def test_a_damaged_line_of_metrics_is_left_out(tmp_path: Path, line: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(RunConfig(), {})
    run.log("epoch", step=3)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    run.log("epoch", step=6)
    assert [event["step"] for event in run.events()] == [3, 6]
    run.rewind(3)
    assert [event["step"] for event in run.events()] == [3]


def test_metrics_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(RunConfig(), {})
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: Is a directory"):
        run.log("epoch", step=3)


@pytest.mark.parametrize(
    "content",
    [
        "{", "3", "", "{}", '{"n": 1, "top1": {"cls": 0.5}, "teacher": null}',
        '{"n": 1, "model": "x", "top1": {"cls": 0.5}, "teacher": 5}', '{"n": 1, "model": "x", "top1": {"cls": 0.5}, "teacher": {}}',
        '{"n": 1, "model": "x", "top1": {"cls": "0.5"}, "teacher": null}', '{"n": 1, "model": "x", "top1": [1], "teacher": null}',
        pytest.param("[" * 100_000 + "]" * 100_000, id="deep"),
        '{"n": 1, "model": "x", "top1": 3, "teacher": null}', '{"n": 1, "model": "x", "top1": {}, "teacher": null}',
    ],
)  # fmt: skip
def test_a_damaged_summary_is_one_line(tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(RunConfig(), {})
    (run.path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"summary\.json: "):
        run.summary()


def test_what_is_known_of_the_images_may_be_damaged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(RunConfig(), {})
    (run.path / "data.json").write_text("[]")
    with pytest.raises(UserError, match=r"data\.json: damaged: remove it if you know that"):
        run.refuse_other_data({"train": 3, "val": 1})
    (run.path / "data.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match=r"data\.json: cannot be read: nested too deeply"):
        run.refuse_other_data({"train": 3, "val": 1})


def test_evaluations_of_data_of_one_name_in_two_places_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the program is started, and whatever a file of figures holds."""
    run = RunFolder(tmp_path / "run")
    for place in ("here", "there"):
        (tmp_path / place / "photos").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / place)
        figures = run.evaluation("val", "photos").figures
        figures.parent.mkdir(parents=True)
        figures.write_text(json.dumps({"place": place_of("photos")}))
    assert run.evaluation("val", str(tmp_path / "here" / "photos")).figures.parent.name == "photos-val"
    assert run.evaluation("val", "../there/photos").figures.parent.name == "photos-val-2"
    for damaged in ("", '{"place": 5}', '{"place": "a\\u0000b"}', "[" * 100_000):
        figures.write_text(damaged)
        assert run.evaluation("val", "photos").figures.parent.name == "photos-val-3"


def test_data_json_of_an_older_version_is_understood(tmp_path: Path) -> None:
    data = {"train": 3, "val": 1, "names_hash": {"train": "a", "val": "b"}}
    run = RunFolder(tmp_path / "run")
    run.create(RunConfig(), data)
    path = run.path / "data.json"
    path.write_text(path.read_text().replace("names_hash", "outline"))
    run.refuse_other_data(data)
    with pytest.raises(UserError, match="the images are not those"):
        run.refuse_other_data(data | {"names_hash": {"train": "a", "val": "c"}})


def test_without_git_or_outside_a_checkout_no_revision_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_module.environment()["git_revision"] is None
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "site-packages" / "deitkit" / "training" / "run.py"))
    assert run_module.environment()["git_revision"] is None


def test_a_changed_source_is_told_from_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src" / "deitkit" / "training" / "run.py"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(run_module, "__file__", str(source))
    commit = run_module.environment()["git_revision"]
    assert len(commit) == 40
    (tmp_path / "notes.txt").write_text("not a part of the program")
    assert run_module.environment()["git_revision"] == commit
    source.write_text("two")
    assert run_module.environment()["git_revision"] == f"{commit}-dirty"


def test_a_folder_is_locked_against_this_process_too(tmp_path: Path) -> None:
    """The system's locks are between processes, and a second one would take the first away as it is let go."""
    with RunFolder(tmp_path / "run") as first:
        first.lock()
        with pytest.raises(UserError, match="another process is working"), RunFolder(tmp_path / "run") as second:
            second.lock()
        with pytest.raises(AssertionError, match="BlockingIOError"), holding(tmp_path / "run"):
            pass
        with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="another process is working"):
            pool.submit(RunFolder(tmp_path / "run").lock).result()
    with RunFolder(tmp_path / "run") as third:
        third.lock()


def test_settings_of_version_0_1_are_read_by_their_old_names(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create(RunConfig(), {})
    (run.path / "config.yaml").write_text(
        "data: {location: digits, validation_share: 0.2}\noptim: {lr_per_256_images: 0.004, warmup_share: 0.1}\n"
        "loop: {epochs: 3, steps: 15, budget_minutes: null}\nloss: {distillation: none, distil_head: dist, label_weight: 0.5}\n"
    )
    config = run.config(RunConfig)
    assert (config.data.val_fraction, config.optim.base_lr, config.optim.warmup) == (0.2, 0.004, "10%")
    assert (config.loop.length, config.loss.label_weight) == ("15st", 1.0)
