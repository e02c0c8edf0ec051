"""Reports: figures by hand, pages that need nothing outside themselves, names that are no markup, and who writes them."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.fakes import Photos

import deitkit as dk
from deitkit.cli import main
from deitkit.config import Preprocessing
from deitkit.inspect import plots
from deitkit.inspect import report as reports
from deitkit.inspect.plots import accuracy_curve, loss_curves, validation_curve, wilson
from deitkit.inspect.report import Finished, Threshold, class_rows, confusions, report, threshold
from deitkit.inspect.side_by_side import side_by_side
from deitkit.models.cnn import CNNConfig
from deitkit.models.network import Heads
from deitkit.models.zoo import ModelCard
from deitkit.terminal import UserError
from deitkit.training.predictions import (
    NONE,
    Predictions,
    predictions_of,
    read_predictions,
    suspected_labels,
    write_predictions,
)

HOSTILE = ("<script>alert(1)</script>", 'a "quoted", one', "$\\bad$\r5")
"""Names of classes that are no markup, no end of a field or line, and no formula."""


def predictions(labels: list[int], predicted: list[int], probabilities: list[float], **changes: Any) -> Predictions:
    label_N, prediction_N = np.array(labels), np.array(predicted)
    none_N = np.full(len(labels), NONE)
    values = {
        "files": tuple(f"train[{number}]" for number in range(len(labels))),
        "position_N": np.arange(len(labels)),
        "label_N": label_N,
        "prediction_N": prediction_N,
        "probability_N": np.array(probabilities),
        "probability_of_label_N": np.where(label_N == prediction_N, probabilities, 0.01),
        "cls_N": prediction_N,
        "dist_N": none_N,
        "teacher_N": none_N,
        "suspected_N": none_N,
    }
    return Predictions(**{**values, **changes})


def finished(path: Path, found: Predictions, classes: tuple[str, ...] = HOSTILE, **figures: Any) -> Finished:
    top1 = {"cls": float(found.right_N.mean()), "dist": None, "fused": None, "fused_logits": None}
    known = {"model": "deit_pico", "n": len(found), "top1": top1, "nll": 1.0, "ece": 0.1, "teacher": None, **figures}
    summary = {
        **known, "data": "photos", "classes": len(classes), "images_seen": 10, "steps": 5, "epochs": 1.0, "seconds": 3.0, "params": 100,
        "macs": 1000, "seed": 0, "view_seed": 0, "data_seed": 0, "has_test": True,
    }  # fmt: skip
    card = ModelCard(
        name="cnn",
        architecture=CNNConfig(name="cifar-resnet8", classes=len(classes)),
        classes=classes,
        preprocessing=Preprocessing(image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    return Finished(
        path=path, split="val", own=True, which="validation ", summary=summary, figures=known, card=card,
        images=Photos(len(found)), predictions=found,
    )  # fmt: skip


def test_a_swapped_label_is_suspected_and_a_hard_image_is_not() -> None:
    """Twenty images of two classes; one of each is labelled as the other, one is between both."""
    labels = torch.tensor([0] * 10 + [1] * 10)
    of_class = labels.clone()
    of_class[[3, 12]] = torch.tensor([1, 0])
    probabilities = torch.where(torch.eye(2)[of_class] > 0, 0.9, 0.1).double()
    probabilities[5] = torch.tensor([0.52, 0.48])
    assert torch.where(suspected_labels(probabilities, labels) != NONE)[0].tolist() == [3, 12]
    assert suspected_labels(probabilities, labels)[[3, 12]].tolist() == [1, 0]
    assert (suspected_labels(probabilities[:10], labels[:10]) == NONE).all()  # one class alone tells nothing


def test_predictions_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    split, names = Photos(4), HOSTILE
    heads = Heads(torch.eye(3)[[0, 1, 2, 1]] * 3, torch.eye(3)[[0, 2, 2, 0]] * 2)
    teacher = torch.tensor([0, 1, 2, NONE, 0])
    found = predictions_of(heads, torch.tensor([0, 1, 0, 2]), torch.tensor([0, 1, 3, 2]), split, teacher)
    assert found.teacher_N.tolist() == [0, 1, NONE, 2]
    write_predictions(tmp_path / "predictions.csv", found, names)
    again = read_predictions(tmp_path / "predictions.csv", split, names)
    for name in Predictions.__dataclass_fields__:
        assert (
            np.allclose(getattr(again, name), getattr(found, name), atol=1e-6)
            if name != "files"
            else again.files == found.files
        )
    with (tmp_path / "predictions.csv").open(newline="") as lines:
        assert next(csv.DictReader(lines))["label"] == HOSTILE[0]
    with pytest.raises(UserError, match=r"does not fit the run's images .*: deit evaluate writes it anew"):
        read_predictions(tmp_path / "predictions.csv", Photos(2), names)
    with pytest.raises(UserError, match="missing: deit evaluate writes it"):
        read_predictions(tmp_path / "none.csv", split, names)


def test_figures_of_classes_by_hand(tmp_path: Path) -> None:
    run = finished(tmp_path, predictions([0, 0, 0, 0, 1, 1], [0, 0, 1, 2, 1, 1], [0.9] * 6))
    assert run.balanced_accuracy == pytest.approx(0.75)  # the class without images does not count
    assert run.accuracy == pytest.approx(4 / 6)
    first, second = class_rows(run)
    assert (first["name"], first["images"], first["recall"], first["precision"]) == (HOSTILE[0], 4, 0.5, 1.0)
    assert (second["recall"], second["precision"], second["taken_for"]) == (1.0, pytest.approx(2 / 3), None)
    assert set(confusions(run)) == {(HOSTILE[0], HOSTILE[1], 1), (HOSTILE[0], HOSTILE[2], 1)}


def test_thresholds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "FEWEST_ANSWERED", 2)
    found = predictions([0, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0.9, 0.8, 0.7, 0.7, 0.6])
    # one at 0.7 is wrong: those with the same probability belong together
    assert threshold(found, 1.0) == Threshold(0.8, 0.4, answered=2, right=2)
    assert threshold(found, 0.8) == Threshold(0.6, 1.0, answered=5, right=4)
    assert threshold(predictions([0, 0], [1, 1], [0.9, 0.8]), 0.5) is None
    assert threshold(predictions([0], [0], [0.9]), 0.5) is None  # too few answers
    # rounded down, but not to where the next image, which is wrong, would be answered too
    close = predictions([0, 0, 0], [0, 0, 1], [0.99999, 0.99978, 0.9995])
    assert threshold(close, 1.0) == Threshold(0.9997, 2 / 3, 2, 2)
    assert threshold(predictions([0, 0, 0], [0, 0, 1], [0.9, 0.500002, 0.500001]), 1.0) == Threshold(
        0.500002, 2 / 3, 2, 2
    )


def test_the_least_accuracy_of_a_threshold() -> None:
    """Of 16 right answers out of 16: p ** 16 = 2.5 %."""
    assert Threshold(0.7, 0.5, 16, 16).least_accuracy == pytest.approx(0.025 ** (1 / 16))
    assert Threshold(0.7, 0.5, 300, 285).least_accuracy == pytest.approx(0.9189, abs=1e-4)


def test_intervals_of_a_share_by_hand() -> None:
    """Half a standard error of nothing is something: Wilson's interval for z = 1."""
    assert wilson(1, 1) == pytest.approx((0.5, 1.0))
    assert wilson(0, 3) == pytest.approx((0.0, 0.25))
    assert wilson(50, 100) == pytest.approx((0.5 - 0.5 / math.sqrt(101), 0.5 + 0.5 / math.sqrt(101)))


def test_every_line_of_the_curves_has_its_name() -> None:
    curve = validation_curve(
        [{"event": "epoch", "epoch": 0, "top1": {"cls": 0.5, "dist": 0.4}}, {"event": "epoch", "epoch": 1}]
    )
    assert curve == [(1, 0.5)]
    odd = 'id="x" url(#y)'
    drawn = accuracy_curve([("_first", curve), (odd, curve)], {"teacher t": 0.9})
    assert drawn is not None
    for name in ("_first", odd, "teacher t"):
        assert f">{name}<" in drawn
    named = re.findall(r'<[^>]*? id="([^"]*)"', drawn)
    assert all(name.startswith("curves-") for name in named), named
    assert accuracy_curve([("none", [])], {"teacher t": 0.9}) is None


@pytest.mark.parametrize(("total", "negative"), [(1.5, False), (-1.5, True)])
def test_every_term_of_the_loss_is_drawn_and_a_negative_one_too(
    total: float, negative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "as_svg", lambda figure, _: drawn.append(figure))
    loss = {"label": 1.0, "second_token": 2.0, "features": 0.5}
    loss_curves([{"event": "epoch", "epoch": epoch, "loss": {"total": total + epoch, **loss}} for epoch in range(3)])
    ((axes,),) = (figure.axes for figure in drawn)
    assert {line.get_label() for line in axes.lines} == {"loss", "labels", "labels, second token", "teacher's features"}
    assert (axes.get_ylim()[0] < -1.5) if negative else (axes.get_ylim()[0] == 0)


def test_names_are_text_and_the_page_needs_nothing_else(tmp_path: Path) -> None:
    found = predictions(
        [0, 1, 2, 0],
        [1, 1, 0, 0],
        [0.9, 0.8, 0.7, 0.6],
        teacher_N=np.array([0, 1, 0, 1]),
        suspected_N=np.array([1, -1, 0, -1]),
    )
    page = report(finished(tmp_path, found, teacher={"name": "<b>t</b>", "top1": 0.5}, token_cosine=[0.1, 0.9]))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>t</b>" not in page
    addresses = set(re.findall(r'(?:src|href)="([^"#][^"]{0,30})', page))
    assert all(one.startswith(("data:image/", "https://arxiv.org/")) for one in addresses), addresses
    assert "50.0 %" in page
    assert "Only the teacher is right: 1 image<" in page
    assert "Only the student is right: 1 image<" in page


def test_the_probe_of_a_fine_tuned_teacher_stands_beside_the_number(tmp_path: Path) -> None:
    found = predictions([0, 1, 2, 0], [1, 1, 0, 0], [0.9, 0.8, 0.7, 0.6], teacher_N=np.array([0, 1, 0, 0]))
    folder, beside = tmp_path / "teacher", "<li>probe before fine-tuning <b>25.0 %</b></li>"
    folder.mkdir()
    student = finished(tmp_path, found, teacher={"name": str(folder), "top1": 0.75})
    assert beside not in report(student)
    for images, accuracy, shown in ((4, 0.25, True), (9, 0.25, False), (4, 0.75, False)):  # of others; not fine-tuned
        (folder / "probe.json").write_text(json.dumps({"scores": {"n": images, "top1": {"cls": accuracy}}}))
        assert ("probe before fine-tuning" in report(student)) == shown
        assert (beside in report(student)) == shown
    crossed = "probe, cross-validated on the training images <b>92.0 %</b>"
    assert crossed not in report(student)
    (student.path / "probe.json").write_text(json.dumps({"cv": {"top1": 0.92}}))  # a teacher's own page
    assert crossed in report(student)


def test_a_label_that_the_teacher_confirms_is_not_in_doubt(tmp_path: Path) -> None:
    labels, said = [0] * 10, [1, 1, *[0] * 8]
    found = predictions(
        labels, said, [0.9] * 10, teacher_N=np.array([0, *[1] * 9]), suspected_N=np.array([1, 1, *[NONE] * 8])
    )
    page = report(finished(tmp_path, found, teacher={"name": "t", "top1": 0.9}))
    assert "1 image looks like another class" in page


def test_a_page_is_titled_by_the_names_of_folders_and_its_commands_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "my photos"
    (here / "a run").mkdir(parents=True)
    monkeypatch.chdir(here)
    run = finished(Path("a run"), predictions([0, 1, 2], [0, 1, 2], [0.9, 0.8, 0.7]))
    run.summary["data"] = "."
    page = report(run)
    assert "<title>a run: deit_pico on my photos</title>" in page
    assert "(deit evaluate &#39;a run&#39; --split test)" in page


def test_one_head_without_teacher_and_without_a_mistake(tmp_path: Path) -> None:
    page = report(finished(tmp_path, predictions([0, 1, 2], [0, 1, 2], [0.9, 0.8, 0.7])))
    assert "It makes no mistake on these images." in page
    assert "Student and teacher" not in page
    assert "No label of these images looks wrong." in page


def test_many_classes_have_no_matrix(tmp_path: Path) -> None:
    classes = tuple(f"class {number}" for number in range(60))
    found = predictions(list(range(60)), [0] * 60, [0.5] * 60)
    page = report(finished(tmp_path, found, classes))
    assert "Most frequent confusions" in page
    assert "The 25 classes with the lowest accuracy, of 60 that have images." in page


def test_an_unreadable_image_is_said_to_be_one(tmp_path: Path) -> None:
    run = finished(tmp_path, predictions([0, 1, 2], [1, 1, 2], [0.9, 0.8, 0.7]))
    broken = Finished(
        **{**{name: getattr(run, name) for name in Finished.__dataclass_fields__}, "images": Photos(3, frozenset({0}))}
    )
    assert "cannot be read" in report(broken)


def test_side_by_side_counts_what_only_one_knows(tmp_path: Path) -> None:
    one = finished(tmp_path / "one", predictions([0, 1, 2, 0], [0, 1, 0, 0], [0.9] * 4))
    other = finished(tmp_path / "other", predictions([0, 1, 2, 0], [0, 0, 2, 1], [0.9] * 4))
    page = side_by_side([one, other])
    assert "other: alone correct on 1 images, one alone on 2 (McNemar&#39;s exact test: p = 1.000)" in page.replace(
        "'", "&#39;"
    )
    assert "<script" not in page
    assert "images a second" not in page  # neither's is known
    other.summary["seconds_per_image"] = {"student": 0.01}
    row = "<tr><td>images a second</td><td>{}</td><td>{}</td></tr>"
    assert row.format("–", "100") in side_by_side([one, other])
    assert row.format("100", "–") in side_by_side([other, one])
    del other.summary["macs"]
    with pytest.raises(UserError, match=r"other: its files are damaged, or of another version \(KeyError: 'macs'\)"):
        side_by_side([one, other])
    with pytest.raises(UserError, match="knows other classes than"):
        side_by_side([one, finished(tmp_path / "third", other.predictions, ("a", "b", "c"))])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cnn: Path) -> Path:
    out = tmp_path_factory.mktemp("reported") / "student"
    dk.train("digits", out=out, teacher=cnn, epochs=2, seed=1)
    return out


def test_training_and_evaluation_leave_a_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page says what the summary says; the test images are opened by evaluation alone."""
    page = (run / "report.html").read_text(encoding="utf-8")
    found = dk.load(run).summary
    assert f"{100 * found['top1']['fused']:.1f} % <small>" in page
    shown = dk.load(run)._repr_html_()
    assert f"<td>{100 * found['top1']['fused']:.2f} %</td>" in shown
    assert str(run / "report.html") in shown
    assert f"{100 * found['teacher']['top1']:.1f} %" in page
    assert not (run / "report-test.html").exists()
    assert not (run / "predictions-test.csv").exists()
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    assert f"report: {run / 'report-test.html'}" in capsys.readouterr().err
    with (run / "predictions-test.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == 359
    assert reports.open_finished(run, "test").validation_levels == reports.open_finished(run, "val").validation_levels
    (run / "report.html").unlink()
    assert dk.load(run).report() == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8") == page


def test_the_verb_makes_pages_of_one_and_of_several(
    run: Path, cnn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main(["report", str(run), str(cnn), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "Settings that differ" in page
    assert '<tr><td>model</td><td class="any">–</td><td class="any">cifar-resnet' in page
    assert "Images on which they differ" in page
    assert main(["report", str(tmp_path)]) == 2
    assert "not a finished run" in capsys.readouterr().err


def test_damaged_files_get_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    whole = (copy / "predictions.csv").read_text(encoding="utf-8")
    header, first, *_ = whole.splitlines()
    cells = first.split(",")
    other = "0" if cells[1] == "1" else "1"
    lines = {
        "": "",
        "only the columns": "",
        "cut": first,
        "twice": f"{whole.partition(chr(10))[2]}{first}",
        "no label": ",".join([cells[0], "", *cells[2:]]),
        "another label": ",".join([cells[0], other, *cells[2:]]),
        "nan": ",".join([*cells[:3], "nan", *cells[4:]]),
        "above 1": ",".join([*cells[:3], "7", *cells[4:]]),
    }
    for what, rows in lines.items():
        (copy / "predictions.csv").write_text(f"{header}\n{rows}\n" if what else "", encoding="utf-8")
        assert main(["report", str(copy)]) == 2, what
        assert "predictions.csv: " in capsys.readouterr().err
    (copy / "predictions.csv").write_text(whole, encoding="utf-8")
    summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
    for missing in ("nll", "macs", "view_seed", "data"):
        (copy / "summary.json").write_text(json.dumps({key: value for key, value in summary.items() if key != missing}))
        assert main(["report", str(copy)]) == 2
    complaints = capsys.readouterr().err.splitlines()
    assert len(complaints) == 4
    assert all(line.startswith(f"deit: error: {copy}") for line in complaints)
    assert main(["report", str(run), str(copy), f"{copy}/.", "--out", str(tmp_path / "twice.html")]) == 2
    assert f"deit: error: {copy}: give each run once\n" in capsys.readouterr().err


def test_validation_images_that_were_measured_again_are_one_measurement(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert reports.open_finished(copy, "val").figures["nll"] == dk.load(run).summary["nll"]
    again = dk.evaluate(copy)
    (copy / "evaluation-val.json").write_text(json.dumps({**again, "nll": 123.0}))
    assert reports.open_finished(copy, "val").figures["nll"] == 123.0


def test_other_data_have_a_page_of_their_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    own = (copy / "predictions.csv").read_bytes(), (copy / "report.html").read_bytes()
    random = np.random.default_rng(0)
    for place in ("here", "there"):
        for name in ("3", "7"):
            (tmp_path / place / "new photos" / name).mkdir(parents=True)
            for number in range(3):
                pixels_HWC = random.integers(0, 256, (9, 8, 3), np.uint8)
                Image.fromarray(pixels_HWC).save(tmp_path / place / "new photos" / name / f"{number}.png")
    pages = []
    for place in ("here", "there", "here"):
        assert main(["evaluate", str(copy), str(tmp_path / place / "new photos")]) == 0
        said = capsys.readouterr()
        assert "new photos: accuracy (6 images)" in said.out + said.err
        pages.append(re.findall(r"report: .*/(evaluations/.*/report.html)", said.out + said.err)[0])
    assert pages == [f"evaluations/new-photos-val{end}/report.html" for end in ("", "-2", "")]
    text = (copy / pages[0]).read_text(encoding="utf-8")
    assert "6 images, 10 classes; the run was trained on digits" in text
    assert "figure to quote" not in text
    rows = csv.DictReader((copy / pages[1]).with_name("predictions.csv").read_text(encoding="utf-8").splitlines())
    assert sorted(row["label"] for row in rows) == ["3", "3", "3", "7", "7", "7"]
    assert ((copy / "predictions.csv").read_bytes(), (copy / "report.html").read_bytes()) == own
    with pytest.warns(UserWarning, match="has no image of class"):
        assert dk.evaluate(copy, tmp_path / "there" / "new photos")["split"] == "all"


def test_a_run_is_finished_though_its_predictions_cannot_be_written(
    cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UserError("predictions.csv: cannot be written: No space left on device")

    monkeypatch.setattr("deitkit.training.job.write_predictions", full)
    with pytest.warns(UserWarning, match=r"No space left|no report"):
        run = dk.train("digits", out=tmp_path / "run", teacher=cnn, steps=2)
    assert run.summary["n"] == 145


def test_without_its_weights_a_run_has_a_page_all_the_same(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "model" / "model.safetensors").unlink()
    assert 'id="attention"' not in reports.write_report(copy).read_text(encoding="utf-8")


def test_a_page_that_cannot_be_made_stops_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "predictions.csv").rename(tmp_path / "kept.csv")
    warned: list[str] = []
    assert reports.try_report(run, warned.append) is None
    assert warned == [f"no report: {run / 'predictions.csv'}: missing: deit evaluate writes it"]
    assert main(["report", str(run)]) == 2
    (tmp_path / "kept.csv").rename(run / "predictions.csv")
