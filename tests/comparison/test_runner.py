"""Comparisons on the digits: paired, resumable, honest about what they do not know."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from tests.fakes import forget, killed_after_epoch

import deitkit as dk
from deitkit import cli
from deitkit.comparison import runner
from deitkit.comparison.runner import RunCost
from deitkit.config import DataConfig, FitConfig, RunConfig
from deitkit.data import Dataset, Split, load_data
from deitkit.distill.tape import open_tape
from deitkit.settings import build
from deitkit.terminal import SilentProgress, UserError
from deitkit.training import evaluate as evaluation
from deitkit.training import fit as fitting
from deitkit.training import jobs
from deitkit.training import setup as resolve
from deitkit.training import teaching as taping
from deitkit.training.loop import Trainer

QUICK: dict[str, Any] = {
    "train_images": 96, "epochs": 2, "batch_size": 48, "base_lr": 4e-3, "depth": 1, "progress": SilentProgress(),
}  # fmt: skip


def compare(out: Path, **settings: Any) -> dict[str, Any]:
    return dk.compare("digits", out=out, **{**QUICK, **settings})


def plan(**contenders: Any) -> dict[str, Any]:
    return {"baseline": "none", "contenders": {"none": {"distillation": "none"}, **contenders}}


def weights(out: Path) -> dict[str, bytes]:
    """The bytes of every run's network."""
    return {path.parts[-3]: path.read_bytes() for path in sorted(out.glob("runs/*/model/model.safetensors"))}


def figures(out: Path) -> dict[str, Any]:
    """comparison.json, without all that is time or tells of this folder."""

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: stripped(inner) for key, inner in value.items() if key not in ("clock", "tape", "tapes")}
        return [stripped(inner) for inner in value] if isinstance(value, list) else value

    content: dict[str, Any] = stripped(json.loads((out / "comparison.json").read_text(encoding="utf-8")))
    return content


def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are trained from now on."""
    seen: list[str] = []
    train = Trainer.train

    def watched(self: Trainer, *, resume: bool = False) -> Any:
        seen.append(self.run.path.name)
        return train(self, resume=resume)

    monkeypatch.setattr(Trainer, "train", watched)
    return seen


def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many views are asked of each recording that begins from now on."""
    seen: list[int] = []
    record = taping.record

    def watched(*arguments: Any, views: int, **options: Any) -> None:
        seen.append(views)
        record(*arguments, views=views, **options)

    monkeypatch.setattr(taping, "record", watched)
    return seen


@pytest.fixture(scope="module")
def finished(cnn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The default question, with two seeds, never interrupted. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "cmp"
    return out, compare(out, teacher=cnn, seeds=[0, 1])


def test_every_figure_is_that_of_the_runs(finished: tuple[Path, dict[str, Any]], cnn: Path) -> None:
    out, result = finished
    assert result == json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in result["contenders"]}
    assert list(rows) == ["none", "hard", "zscore"]
    top1 = {}
    for name in rows:
        summaries = [json.loads((out / f"runs/{name}-seed-{seed}/summary.json").read_text()) for seed in (0, 1)]
        assert [summary["seed"] for summary in summaries] == [0, 1]
        head = "cls" if name == "none" else "fused"
        top1[name] = [summary["top1"][head] for summary in summaries]
        assert rows[name]["val"]["compared"] == head
        assert rows[name]["val"]["heads"][head]["mean"] == pytest.approx(sum(top1[name]) / 2)
        assert rows[name]["clock"]["training_minutes"] == pytest.approx(sum(one["seconds"] for one in summaries) / 60)
        assert rows[name]["test"] is None
    gaps = [zscore - none for zscore, none in zip(top1["zscore"], top1["none"], strict=True)]
    margin = stats.t.ppf(0.975, df=1) * statistics.stdev(gaps) / math.sqrt(2)
    difference = rows["zscore"]["val"]["difference"]
    assert difference["low"] == (
        pytest.approx(statistics.mean(gaps) - margin) if statistics.stdev(gaps) > 1e-9 else None
    )
    assert rows["hard"]["teacher"]["name"] == str(cnn)
    assert rows["none"]["teacher"] is None
    assert rows["none"]["val"]["heads"]["dist"] is None
    named = [sentence.partition(": ")[2].split()[0] for sentence in result["findings"]["val"]]
    assert named[:2] == ["hard", "zscore"]
    assert all("distillation head" in sentence for sentence in result["findings"]["val"][2:])
    heads = [run["val"]["top1"] for run in rows["hard"]["runs"]]
    between = statistics.mean(one["dist"] - one["cls"] for one in heads)
    assert rows["hard"]["val"]["between_heads"]["mean"] == pytest.approx(between)
    assert result["environments"][0]["versions"]["torch"]
    assert 0 < rows["hard"]["clock"]["teacher_share"] < 1
    assert result["clock"]["recording_minutes"] == pytest.approx(rows["hard"]["clock"]["recording_minutes"])  # once


def test_one_recording_serves_every_loss_and_seed(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    (tape,) = (out / "tapes").iterdir()
    assert (open_tape(tape).manifest.outputs, open_tape(tape).manifest.views) == ("all", 2)
    assert json.loads((tape / "recording.json").read_text())["seconds"] > 0


def test_contenders_see_the_same_views_and_a_live_teacher_s_outputs(
    finished: tuple[Path, dict[str, Any]], cnn: Path, tmp_path: Path
) -> None:
    """A run of a comparison is, bit for bit, the run that `deit train` makes with the live teacher."""
    dk.train("digits", out=tmp_path / "live", teacher=cnn, distillation="hard", seed=1, **QUICK)
    live = (tmp_path / "live" / "model" / "model.safetensors").read_bytes()
    assert weights(finished[0])["hard-seed-1"] == live


def test_the_page_needs_nothing_but_itself(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    references = re.findall(r"""(?:src|href|url\()\s*=?\s*["']?([^"'\s)>]+)""", page[page.index("<body>") :])
    assert references
    pictures = [reference for reference in references if reference.startswith("data:image/png;base64,")]
    assert 0 < len(pictures) <= 20  # images on which the contenders differ
    assert page.count('<span class="right">') + page.count('<span class="wrong">') == len(result["contenders"]) * len(
        pictures
    )
    references = [reference for reference in references if reference not in pictures]
    assert all(reference.startswith("#") for reference in references)
    assert set(re.findall(r"https?://[^\"'<\s]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    for reference in references:
        assert f'id="{reference[1:]}"' in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert all(sentence in page for sentence in result["findings"]["val"])
    assert ">points vs none (validation accuracy, %)</text>" in page  # text is text
    curves = (out / "plots" / "curves.svg").read_text(encoding="utf-8")
    assert curves.startswith("<svg")
    assert ">largest class<" in curves
    assert ">teacher cnn<" in curves
    table = (out / "comparison.md").read_text(encoding="utf-8")
    assert "| contender | n | accuracy | diff. | 95 % interval | class head | dist. head | min/run |" in table
    assert "nan" not in (page + table).lower().replace("nano", "")


def test_names_and_messages_are_no_html(finished: tuple[Path, dict[str, Any]]) -> None:
    from deitkit.comparison.report import page

    result = {**finished[1], "failed": [{"contender": "x", "seed": None, "why": "<script>alert(1)</script>"}]}
    assert "<script>" not in page(finished[0], result, {}, "contenders: {<script>: {}}")


def test_a_killed_comparison_is_resumed_and_ends_with_the_same_bytes(
    finished: tuple[Path, dict[str, Any]], cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cmp"
    question = {"teacher": cnn, "seeds": [0, 1]}
    with monkeypatch.context() as patched:  # the first run ends, the second is killed within it
        train = jobs.run_training
        seen = trainings(patched)

        def second_is_killed(*arguments: Any, **options: Any) -> dict[str, Any]:
            if len(seen) == 1:
                with killed_after_epoch(1):
                    train(*arguments, **options)
                raise KeyboardInterrupt
            return train(*arguments, **options)

        patched.setattr(runner, "run_training", second_is_killed)
        with pytest.raises(KeyboardInterrupt):
            compare(out, **question)
    first = (out / "runs" / "none-seed-0" / "summary.json").stat().st_mtime_ns
    assert [row["val"] is None for row in figures(out)["contenders"]] == [False, True, True]
    (out / "runs" / "zscore-seed-0" / "checkpoints").mkdir(parents=True)  # killed before its settings were written
    seen, recorded = trainings(monkeypatch), recordings(monkeypatch)
    with pytest.raises(UserError, match="give --resume to continue it"):
        compare(out, **question)
    compare(out, resume=True, **question)
    assert seen == ["hard-seed-0", "zscore-seed-0", "none-seed-1", "hard-seed-1", "zscore-seed-1"]
    assert recorded == []
    assert (out / "runs" / "none-seed-0" / "summary.json").stat().st_mtime_ns == first
    assert weights(out) == weights(finished[0])
    assert figures(out) == figures(finished[0])
    for name in ("plots/curves.svg", "plots/differences-val.svg", "plots/tokens.svg"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes()
    compare(out, resume=True, **question)  # nothing is left to do
    assert len(seen) == 5


def test_a_killed_recording_is_resumed(
    finished: tuple[Path, dict[str, Any]], cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = taping.record

    def half(tape: Any, *arguments: Any, views: int, **options: Any) -> None:
        record(tape, *arguments, views=views // 2, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(taping, "record", half)
        with pytest.raises(KeyboardInterrupt):
            compare(tmp_path / "cmp", teacher=cnn, seeds=[0])
    compare(tmp_path / "cmp", resume=True)
    assert weights(tmp_path / "cmp").items() <= weights(finished[0]).items()


def test_seeds_and_contenders_are_added_to_what_is_there(
    finished: tuple[Path, dict[str, Any]], cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cmp"
    compare(out, plan=plan(hard={"teacher": str(cnn), "distillation": "hard"}), seeds=[0])
    seen, recorded = trainings(monkeypatch), recordings(monkeypatch)
    single = compare(out, plan=plan(hard={"teacher": str(cnn), "distillation": "hard"}), seeds=[0], resume=True)
    row = single["contenders"][1]["val"]
    assert (row["heads"]["fused"]["sd"], row["difference"]["low"], row["difference"]["pairs"]) == (None, None, 1)
    assert "one pair" in (out / "comparison.md").read_text()
    assert "a single pair of runs has no confidence interval" in single["findings"]["val"][0]
    assert (seen, recorded) == ([], [])
    compare(out, seeds=[0, 1], resume=True)
    assert (seen, recorded) == (["none-seed-1", "hard-seed-1"], [])
    more = plan(
        hard={"teacher": str(cnn), "distillation": "hard"},
        longer={"teacher": str(cnn), "distillation": "hard", "epochs": 3},
    )
    compare(out, plan=more, seeds=[0, 1], resume=True)
    assert seen[2:] == ["longer-seed-0", "longer-seed-1"]
    assert recorded == [3]  # the tape grows by a view
    assert len(list((out / "tapes").iterdir())) == 1
    assert {name: content for name, content in weights(out).items() if "longer" not in name} == {
        name: content for name, content in weights(finished[0]).items() if "zscore" not in name
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"epochs": 3}, r"contender 'none' was started with loop\.length = '2ep', now it is '3ep'"),
        ({"seeds": [0]}, "was started with seed 1, now it is left out"),
        ({"losses": ["hard"]}, "was started with contender 'zscore', now it is left out"),
        ({"budget_minutes": 3, "epochs": None}, "was started with budget_minutes = None, now it is 3"),
    ],
)
def test_a_changed_plan_is_refused(
    finished: tuple[Path, dict[str, Any]], cnn: Path, change: dict[str, Any], complaint: str
) -> None:
    before = figures(finished[0])
    with pytest.raises(UserError, match=complaint):
        compare(finished[0], **{"teacher": cnn, "seeds": [0, 1], "resume": True, **change})
    assert figures(finished[0]) == before


def test_what_changes_no_result_may_change(finished: tuple[Path, dict[str, Any]], cnn: Path, tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "cmp")
    compare(tmp_path / "cmp", teacher=cnn, seeds=[0, 1], resume=True, workers=0, max_bad_images=3)
    assert {**figures(tmp_path / "cmp"), "shared": None} == {**figures(finished[0]), "shared": None}


def test_a_contender_that_fails_does_not_stop_the_others(
    cnn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fool = tmp_path / "fool"
    settings = {"model": "cifar-resnet8", "from_scratch": True, "steps": 1, "base_lr": 1e-9}
    fitting.run_fit("digits", build(FitConfig, settings), fool, resume=False, progress=SilentProgress())
    forget(fool)
    (tmp_path / "plan.yaml").write_text(
        f"""
        shared: {{train_images: 96, epochs: 1, batch_size: 48, depth: 1, ema_decay: 0}}
        seeds: [0]
        baseline: none
        contenders:
          wild: {{base_lr: 1.0e+15}}
          fooled: {{teacher: {fool}}}
          none:
          hard: {{teacher: {cnn}}}
        """
    )
    out = tmp_path / "cmp"
    assert cli.main(["compare", "digits", "--plan", str(tmp_path / "plan.yaml"), "--out", str(out)]) == 2
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith("deit: error: 2 of 4 contenders failed, the others are complete")
    assert "hard" in shown.out
    result = json.loads((out / "comparison.json").read_text())
    why = {failure["contender"]: failure["why"] for failure in result["failed"]}
    assert set(why) == {"wild", "fooled"}
    assert "diverged" in why["wild"]
    assert "predicts the same class for every image" in why["fooled"]
    rows = {row["name"]: row["val"] for row in result["contenders"]}
    assert rows["wild"] is None
    assert rows["hard"]["difference"]["pairs"] == 1
    assert "diverged" in (out / "compare.html").read_text()
    seen = trainings(monkeypatch)
    assert cli.main(["compare", "digits", "--out", str(out), "--resume"]) == 2
    assert seen == ["wild-seed-0"]  # tried again, the finished ones are not


def watched_splits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that are opened from now on, by whomever."""
    opened: list[str] = []

    def watching(location: str, config: DataConfig) -> Dataset:
        dataset = load_data(location, config)

        def open_split(name: Any) -> Split:
            opened.append(name)
            return dataset.open_split(name)

        return replace(dataset, open_split=open_split)

    for module in (resolve, evaluation):
        monkeypatch.setattr(module, "load_data", watching)
    return opened


def test_the_test_split_is_opened_when_asked_for_and_once(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = watched_splits(monkeypatch)
    out = tmp_path / "cmp"
    first = compare(out, teacher=cnn, losses=["hard"], seeds=[0, 1])
    assert set(opened) == {"train", "val"}
    assert first["images"] == {"val": 145, "test": None}
    assert all((out / "runs" / f"{name}-seed-1" / "report.html").is_file() for name in ("none", "hard"))
    asked: list[str] = []
    load = evaluation.load_teacher
    monkeypatch.setattr(evaluation, "load_teacher", lambda name, *a, **k: asked.append(name) or load(name, *a, **k))
    second = compare(out, split="test", resume=True)
    assert opened.count("test") == 4
    assert asked == [str(cnn)]  # both runs that it taught
    assert second["images"] == {"val": 145, "test": 359}
    rows = {row["name"]: row for row in second["contenders"]}
    kept = json.loads((out / "runs/hard-seed-1/evaluation-test.json").read_text())
    assert rows["hard"]["runs"][1]["test"]["top1"] == kept["top1"]
    assert rows["hard"]["val"] == next(row for row in first["contenders"] if row["name"] == "hard")["val"]
    assert rows["hard"]["test"]["difference"]["pairs"] == 2
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert "On the test images" in page
    assert "On the validation images" in page
    compare(out, split="test", resume=True)
    third = compare(out, resume=True)
    assert opened.count("test") == 4
    assert third["findings"] == second["findings"]


def test_a_budget_is_frozen_into_the_same_steps_for_all(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[RunCost] = []
    run_cost = runner.run_cost

    def ten_seconds_a_step(*arguments: Any) -> RunCost:
        measured.append(run_cost(*arguments))
        return measured[-1]._replace(step_seconds=10.0, epoch_seconds=0.0, start_seconds=0.0)

    monkeypatch.setattr(runner, "run_cost", ten_seconds_a_step)
    out = tmp_path / "cmp"
    question = {"plan": plan(hard={"teacher": str(cnn)}, half={"train_images": 48}), "epochs": None}
    result = compare(out, budget_minutes=5, seeds=[0], **question)
    frozen = json.loads((out / "budget.json").read_text())
    assert frozen["minutes"] == 5
    # 3 runs: 0.97 · 300 s = 291 s, less what preparing took, is at least 6 and at most 9 steps of 30 s.
    assert 6 <= frozen["steps"] <= 9
    assert {run["steps"] for row in result["contenders"] for run in row["runs"]} == {frozen["steps"]}
    assert all(cost.step_seconds > 0 and cost.epoch_seconds > 0 and cost.start_seconds > 0 for cost in measured)
    (tape,) = (out / "tapes").iterdir()
    assert open_tape(tape).complete_views() == -(-frozen["steps"] // 2)
    compare(out, seeds=[0, 1], epochs=None, resume=True)  # the budget is not spent anew
    assert len(measured) == 3
    with pytest.raises(UserError, match=r"--budget-minutes 0\.01: preparing took .* give more minutes"):
        compare(tmp_path / "short", budget_minutes=0.01, seeds=[0], **question)


def test_teachers_are_ranked_by_what_the_student_reaches(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cnn, tmp_path / "other" / "cnn")
    shutil.copytree(cnn, tmp_path / "third")
    means = {"cnn": 0.5, "cnn-teacher-2": 0.7, "third": 0.6, "none": 0.55}
    teachers = {"cnn": 0.99, "cnn-teacher-2": 0.9, "third": 0.8}

    def trained(
        location: str, config: RunConfig, out: Path, *, resume: bool, progress: Any, **_: Any
    ) -> dict[str, Any]:
        name, seed = out.name.rsplit("-seed-", 1)
        assert (config.teacher.tape is None) == (name == "none")
        share = means[name] + 0.01 * int(seed)
        top1 = {head: None if name == "none" and head != "cls" else share for head in evaluation.HEADS}
        zero = dict.fromkeys(("top5", "agreement", "heads_agree", "nll", "ece", "token_cosine"))
        numbers = dict.fromkeys(("params", "macs", "steps", "epochs", "images_seen", "seconds"), 1)
        teacher = {"name": f"{name} (taped)", "top1": teachers[name]} if name in teachers else None
        folder = jobs.RunFolder(out)
        folder.create(config, {})
        folder.write_summary({"n": 10, "model": "m", "top1": top1, "teacher": teacher, **zero, **numbers})
        return folder.summary()

    monkeypatch.setattr(runner, "run_training", trained)
    names = [str(cnn), str(tmp_path / "other" / "cnn"), str(tmp_path / "third")]
    argv = ["compare", "digits", "--choose-teacher", *names, "--epochs", "1", "--train-images", "48"]
    assert cli.main([*argv, "--seeds", "0", "1", "--out", str(tmp_path / "cmp")]) == 0
    shown = capsys.readouterr()
    rows = [line.split()[0] for line in shown.out.splitlines()[2:]]
    assert rows == ["cnn-teacher-2", "third", "none", "cnn"]
    best = "best teacher: cnn-teacher-2, student accuracy 70.50 %; cnn is more accurate itself (99.00 vs 90.00 %)"
    assert best in shown.err
    result = json.loads((tmp_path / "cmp" / "comparison.json").read_text())
    assert [one["name"] for one in result["ranking"]["val"]] == ["cnn-teacher-2", "third", "cnn"]
    assert len(list((tmp_path / "cmp" / "tapes").iterdir())) == 3
    assert all(open_tape(tape).manifest.outputs == "all" for tape in (tmp_path / "cmp" / "tapes").iterdir())


def test_a_comparison_is_not_resumed_with_another_automatic_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another version of this program may fit it."""
    settings = {"teacher": "auto", "losses": ["hard"], "steps": 2, "epochs": None}
    monkeypatch.setattr(fitting, "AUTOMATIC_SMALL_VIEWS", {16: 1000, 64: 1000})
    compare(tmp_path / "out", seeds=[0], **settings)
    monkeypatch.setattr(fitting, "AUTOMATIC_SMALL_VIEWS", {16: 2000, 64: 2000})
    compare(tmp_path / "out", seeds=[0], resume=True, **settings)  # nothing is to be trained
    with pytest.raises(
        UserError, match=r"hard-seed-0: learned from .*, new runs would learn from .*, of another teacher"
    ):
        compare(tmp_path / "out", seeds=[0, 1], resume=True, **settings)


def test_an_automatic_teacher_is_fitted_once_for_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where contenders differ in their views, which get tapes of their own."""
    monkeypatch.setattr(fitting, "AUTOMATIC_SMALL_VIEWS", {16: 5000, 64: 5000})
    monkeypatch.setattr("deitkit.data.caching.cache_folder", lambda: tmp_path / "cache")
    question = plan(
        hard={"teacher": "auto"},
        other={"teacher": "auto", "augment": "none", "view_seed": 1},
        half={"teacher": "auto", "train_images": 240},
    )
    seen = trainings(monkeypatch)
    result = compare(tmp_path / "cmp", plan=question, seeds=[0], train_images=480, steps=2, epochs=None)
    fitted = sorted(path.name for path in (tmp_path / "cache" / "teachers").iterdir())
    assert sorted(name for name in seen if name.startswith("cifar-resnet8-")) == fitted
    assert len(fitted) == 2  # one for each subset
    assert len(list((tmp_path / "cmp" / "tapes").iterdir())) == 3
    rows = {row["name"]: row for row in result["contenders"]}
    assert rows["hard"]["teacher"]["name"] == rows["other"]["teacher"]["name"] != rows["half"]["teacher"]["name"]
    assert rows["hard"]["clock"]["fitting_minutes"] > 0
    both = rows["hard"]["clock"]["fitting_minutes"] + rows["half"]["clock"]["fitting_minutes"]
    assert result["clock"]["fitting_minutes"] == pytest.approx(both)  # each counted once


def test_comparisons_share_tapes(
    finished: tuple[Path, dict[str, Any]], cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = recordings(monkeypatch)
    settings = {"teacher": cnn, "losses": ["soft"], "tapes": tmp_path / "tapes", "seeds": [0]}
    compare(tmp_path / "one", **settings)
    other = compare(tmp_path / "two", **settings, temperature=1.0)
    assert recorded == [2]
    assert other["clock"]["recording_minutes"] > 0  # counted, whoever recorded it


def test_data_that_changed_between_two_commands_are_noticed(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, cnn: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "cmp")
    for path in (tmp_path / "cmp").glob("runs/*/data.json"):
        path.write_text(path.read_text().replace('"val": 145', '"val": 146'))
    with pytest.raises(UserError, match="the images are not those that this run was started with"):
        compare(tmp_path / "cmp", teacher=cnn, seeds=[0, 1, 2], resume=True)
