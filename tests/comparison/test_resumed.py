"""A comparison that is resumed: what may have changed since, and what may not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tests.comparison.test_runner import QUICK, compare, plan, trainings

import deitkit as dk
from deitkit import cli
from deitkit.comparison import runner
from deitkit.comparison.runner import RunCost
from deitkit.config import FitConfig
from deitkit.settings import build
from deitkit.terminal import LOST_WORKER, SilentProgress, UserError
from deitkit.training import fit as fitting


def fit(out: Path, **changes: Any) -> Path:
    settings = {"model": "cifar-resnet8", "from_scratch": True, "steps": 40, "base_lr": 2e-2, **changes}
    fitting.run_fit("digits", build(FitConfig, settings), out, resume=False, progress=SilentProgress())
    return out


HALF = plan(half={"distillation": "none", "train_images": 48})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "cmp"
    compare(out, plan=HALF, seeds=[0])
    return out


class Clock:
    """Time as it is, and what is added to it."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.added, real = 0.0, module.time.perf_counter
        monkeypatch.setattr(module.time, "perf_counter", lambda: real() + self.added)


def test_fitting_a_teacher_is_no_part_of_what_resuming_its_tape_takes(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(runner, monkeypatch)

    def fitted(*_arguments: Any) -> Path:
        clock.added += 1000
        return cnn

    monkeypatch.setattr(runner, "fit_automatically", fitted)
    monkeypatch.setattr(runner, "run_cost", lambda *_arguments: RunCost(1, 2, 10.0, 0.0, 0.0))
    question = {"teacher": "auto", "losses": ["hard"], "seeds": [0], "epochs": None}
    with pytest.raises(UserError, match=r"--budget-minutes 5: preparing took 1\d minutes"):
        compare(tmp_path / "cmp", **question, budget_minutes=5)
    (tape,) = (tmp_path / "cmp" / "tapes").iterdir()
    assert 0 < json.loads((tape / "recording.json").read_text())["start_seconds"] < 1000
    result = compare(tmp_path / "cmp", **question, budget_minutes=4, resume=True)  # the minutes may be others yet
    # 0.97 · 240 s, less what reading took: at most 11 steps of 20 s.
    assert {run["steps"] for row in result["contenders"] for run in row["runs"]} <= set(range(6, 12))
    with pytest.raises(UserError, match=r"was started with budget_minutes = 4(\.0)?, now it is 5"):
        compare(tmp_path / "cmp", **question, budget_minutes=5, resume=True)


def test_measuring_speed_is_paid_from_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(runner, monkeypatch)

    def slowly(*_arguments: Any) -> RunCost:
        clock.added += 60
        return RunCost(runs=1, steps_per_epoch=2, step_seconds=100.0, epoch_seconds=0.0, start_seconds=0.0)

    monkeypatch.setattr(runner, "run_cost", slowly)
    compare(tmp_path / "cmp", plan=plan(half={"train_images": 48}), seeds=[0], epochs=None, budget_minutes=36)
    # 0.97 · 2160 s, less 2 · 60 s, is 1975 s, reading takes a few of them: 9 steps of 200 s. Without the margin it would be 10.
    assert json.loads((tmp_path / "cmp" / "budget.json").read_text())["steps"] == 9


def test_a_tape_does_not_replace_another_teacher_of_its_name(cnn: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(cnn, teacher)
    settings = {"teacher": teacher, "losses": ["hard"], "seeds": [0], "tapes": tmp_path / "tapes"}
    compare(tmp_path / "one", **settings)
    shutil.rmtree(teacher)
    compare(tmp_path / "gone", **settings)  # the tape replaces it
    fit(teacher, seed=1)
    with pytest.raises(
        UserError, match=r"contender 'hard': .*teacher is now another network than the one that was recorded to"
    ):
        compare(tmp_path / "two", **settings)
    assert not (tmp_path / "two").exists()
    compare(tmp_path / "one", **settings, resume=True)  # nothing is to be learned any more


def test_seeds_are_not_added_by_a_version_with_other_defaults(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cmp"
    compare(out, teacher=cnn, losses=["hard"], seeds=[0])
    path = out / "runs" / "none-seed-0" / "config.yaml"
    written = path.read_text()
    assert "weight_decay: 0.5" in written
    path.write_text(written.replace("weight_decay: 0.5", "weight_decay: 0.05"))
    seen = trainings(monkeypatch)
    with pytest.raises(
        UserError,
        match=r"none-seed-0: was made with optim\.weight_decay = 0\.05, new runs would have 0\.5: use the version",
    ):
        compare(out, teacher=cnn, losses=["hard"], seeds=[0, 1], resume=True)
    assert seen == []
    path.write_text(written)
    compare(out, teacher=cnn, losses=["hard"], seeds=[0, 1], resume=True)
    assert seen == ["none-seed-1", "hard-seed-1"]


def test_runs_that_learned_from_a_teacher_are_not_pooled_with_those_of_another(cnn: Path, tmp_path: Path) -> None:
    """Also where its tape has been removed."""
    teacher = tmp_path / "teacher"
    shutil.copytree(cnn, teacher)
    settings = {"teacher": teacher, "losses": ["hard"]}
    compare(tmp_path / "cmp", **settings, seeds=[0])
    shutil.rmtree(teacher)
    fit(teacher, seed=1)
    shutil.rmtree(tmp_path / "cmp" / "tapes")
    with pytest.raises(UserError, match=r"is now another network than the one that runs in .*cmp have learned from"):
        compare(tmp_path / "cmp", **settings, seeds=[0, 1], resume=True)
    shutil.rmtree(teacher)
    shutil.copytree(cnn, teacher)
    assert compare(tmp_path / "cmp", **settings, seeds=[0, 1], resume=True)["failed"] == []


def test_a_comparison_of_fewer_images_than_a_batch_is_resumed(tmp_path: Path) -> None:
    question = plan(half={"distillation": "none", "train_images": 20})
    compare(tmp_path / "cmp", plan=question, seeds=[0], train_images=40, batch_size=64)
    result = compare(tmp_path / "cmp", plan=question, seeds=[0, 1], train_images=40, batch_size=64, resume=True)
    assert [len(row["runs"]) for row in result["contenders"]] == [2, 2]


def test_finished_runs_are_looked_at_by_any_version(tmp_path: Path) -> None:
    question = plan(half={"distillation": "none", "train_images": 48})
    compare(tmp_path / "cmp", plan=question, seeds=[0])
    path = tmp_path / "cmp" / "runs" / "none-seed-0" / "config.yaml"
    path.write_text(path.read_text().replace("weight_decay: 0.5", "weight_decay: 0.05"))
    assert compare(tmp_path / "cmp", plan=question, seeds=[0], resume=True, split="test")["images"]["test"] == 359


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "summary.json",
            '{"n": 1, "model": "m", "top1": {"cls": 0.5}, "teacher": null}',
            "none-seed-0: damaged files",
        ),
        ("summary.json", "NaN", "summary.json"),
        (
            "evaluation-test.json",
            "null",
            r"evaluation-test\.json: damaged: remove it, and --split test evaluates again",
        ),
        ("evaluation-test.json", '{"teacher": "x"}', r"evaluation-test\.json: damaged"),
        ("environment.json", "[1, 2]", None),
    ],
)
def test_damaged_files_of_a_run_are_one_line(
    finished: Path, tmp_path: Path, name: str, content: str, complaint: str | None
) -> None:
    shutil.copytree(finished, tmp_path / "cmp")
    (tmp_path / "cmp" / "runs" / "none-seed-0" / name).write_text(content)
    again = {"plan": HALF, "seeds": [0], "resume": True}
    if complaint is None:
        assert compare(tmp_path / "cmp", **again)["failed"] == []
    else:
        with pytest.raises(UserError, match=complaint):
            compare(tmp_path / "cmp", **again)


def test_what_is_damaged_is_named_and_the_rest_is_trained(cnn: Path, tmp_path: Path) -> None:
    settings = {"teacher": cnn, "losses": ["hard"]}
    compare(tmp_path / "cmp", **settings, seeds=[0])
    (tmp_path / "cmp" / "runs" / "none-seed-0" / "config.yaml").unlink()
    (tmp_path / "cmp" / "runs" / "none-seed-0" / "summary.json").unlink()
    (tape,) = (tmp_path / "cmp" / "tapes").iterdir()
    (tape / "tape.json").unlink()
    result = compare(tmp_path / "cmp", **settings, seeds=[0, 1], resume=True)
    why = {(one["contender"], one["seed"]): one["why"] for one in result["failed"]}
    assert "tape.json is missing: remove that folder" in why["hard", None]
    assert why["none", 0].endswith("config.yaml is missing: remove that folder")


def test_the_steps_of_a_budget_are_known_by_the_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_cost", lambda *_arguments: RunCost(1, 2, 10.0, 0.0, 0.0))
    question = {"plan": HALF, "epochs": None, "budget_minutes": 2}
    first = compare(tmp_path / "cmp", **question, seeds=[0])
    (tmp_path / "cmp" / "budget.json").unlink()
    monkeypatch.setattr(runner, "run_cost", lambda *_arguments: RunCost(1, 2, 1.0, 0.0, 0.0))
    second = compare(tmp_path / "cmp", **question, seeds=[0, 1], resume=True)
    steps = {run["steps"] for result in (first, second) for row in result["contenders"] for run in row["runs"]}
    assert len(steps) == 1


def test_another_format_is_refused_also_where_nothing_is_to_be_trained(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "cmp")
    with pytest.raises(UserError, match="none-seed-0: was computed in float32: leave out --precision, or give float32"):
        compare(tmp_path / "cmp", plan=HALF, seeds=[0], resume=True, precision="bfloat16")
    assert "precision" not in (tmp_path / "cmp" / "plan.yaml").read_text()


def test_tapes_are_not_kept_among_runs(finished: Path, tmp_path: Path) -> None:
    for tapes_at in (finished / "runs" / "none-seed-0", tmp_path / "cmp" / "runs" / "x"):
        with pytest.raises(UserError, match="lies among runs: give a folder of its own"):
            compare(tmp_path / "cmp", plan=HALF, seeds=[0], tapes=tapes_at)
    with pytest.raises(UserError, match="not a folder"):
        compare(tmp_path / "cmp", plan=HALF, seeds=[0], tapes=finished / "plan.yaml")
    assert not (tmp_path / "cmp").exists()


def test_losses_beside_a_comparison_that_is_resumed_are_refused(cnn: Path, tmp_path: Path) -> None:
    compare(tmp_path / "cmp", teacher=cnn, losses=["hard"], seeds=[0])
    with pytest.raises(UserError, match="--losses: the comparison has them already"):
        compare(tmp_path / "cmp", losses=["soft"], seeds=[0], resume=True)


def test_a_run_s_config_is_a_recipe_of_a_comparison(cnn: Path, tmp_path: Path) -> None:
    settings = {key: value for key, value in QUICK.items() if key != "epochs"}
    dk.train("digits", out=tmp_path / "run", teacher=cnn, steps=3, **settings)
    result = dk.compare(
        "digits", out=tmp_path / "cmp", recipe=tmp_path / "run" / "config.yaml", teacher=cnn, losses=["hard"], seeds=[5],
        progress=SilentProgress(),
    )  # fmt: skip
    assert [run["steps"] for row in result["contenders"] for run in row["runs"]] == [3, 3]
    assert result["shared"]["batch_size"] == 48


def test_against_may_be_added_later(tmp_path: Path) -> None:
    contenders = {
        "short": {"distillation": "none"},
        "long": {"distillation": "none", "epochs": 3},
        "long-half": {"distillation": "none", "epochs": 3, "train_images": 48},
    }
    question: dict[str, Any] = {"baseline": "short", "contenders": contenders}
    first = compare(tmp_path / "cmp", plan=question, seeds=[0, 1])
    against = {**question, "against": {"long-half": "long"}}
    second = compare(tmp_path / "cmp", plan=against, seeds=[0, 1], resume=True)
    one, other = (
        {row["name"]: row["val"]["difference"]["mean"] for row in result["contenders"][1:]}
        for result in (first, second)
    )
    assert other["long"] == one["long"]
    assert other["long-half"] == pytest.approx(one["long-half"] - one["long"])
    assert "long-half" in second["findings"]["val"][1]
    assert " long " in second["findings"]["val"][1].replace(":", " ")
    assert "| long: " in (tmp_path / "cmp" / "comparison.md").read_text()
    assert ">long-half - long</text>" in (tmp_path / "cmp" / "compare.html").read_text()
    assert yaml.safe_load((tmp_path / "cmp" / "plan.yaml").read_text())["against"] == {"long-half": "long"}


def test_the_test_split_of_images_that_were_moved_is_opened_where_they_are(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        for name in ("ant", "bee", "cat"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(drawn.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    question = plan(half={"distillation": "none", "train_images": 18})
    settings = {**QUICK, "train_images": None, "batch_size": 9, "plan": question, "seeds": [0], "out": tmp_path / "cmp"}
    dk.compare(tmp_path / "images", **settings)
    (tmp_path / "images").rename(tmp_path / "moved")
    result = dk.compare(tmp_path / "moved", **settings, resume=True, split="test")
    assert result["failed"] == []
    assert result["images"]["test"] == 18


def test_what_recording_took_is_still_known_once_all_has_been_moved(cnn: Path, tmp_path: Path) -> None:
    first = compare(tmp_path / "here" / "cmp", teacher=cnn, losses=["hard"], seeds=[0])
    (tmp_path / "here").rename(tmp_path / "there")
    second = compare(tmp_path / "there" / "cmp", teacher=cnn, losses=["hard"], seeds=[0], resume=True)
    assert second["clock"]["recording_minutes"] == first["clock"]["recording_minutes"] > 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried", "not enough memory"),
        ("CUDA out of memory. Tried", "not enough memory"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", LOST_WORKER),
    ],
)
def test_too_little_memory_for_one_contender_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    def fails(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError(text)

    monkeypatch.setattr(runner, "run_training", fails)
    out = tmp_path / "cmp"
    argv = ["compare", "digits", "--plan", str(tmp_path / "plan.yaml"), "--out", str(out), "--seeds", "0"]
    (tmp_path / "plan.yaml").write_text(json.dumps(plan(half={"distillation": "none", "train_images": 48})))
    assert cli.main(argv) == 2
    failed = json.loads((out / "comparison.json").read_text())["failed"]
    assert [one["why"] for one in failed] == [why] * 2
    text = "shapes do not match"
    with pytest.raises(RuntimeError, match="shapes"):  # a defect is none of these
        cli.main([*argv, "--resume"])
