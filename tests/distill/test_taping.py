"""Training from a tape is training with the live teacher, bit for bit; a killed recording goes on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.training.test_jobs import train, weights

from deitkit import cli
from deitkit.config import DataConfig, RunConfig
from deitkit.data import load_data
from deitkit.data.folder import FolderSplit
from deitkit.distill import teacher as teachers
from deitkit.distill.encoding import OutputKind
from deitkit.distill.tape import create, open_tape, settings_of
from deitkit.distill.teacher import Teacher
from deitkit.models.zoo import load_model
from deitkit.settings import build
from deitkit.terminal import SilentProgress, UserError, save_tensors
from deitkit.training import fit as fitting
from deitkit.training import jobs, teaching
from deitkit.training import jobs as taping
from deitkit.training import setup as resolve
from deitkit.training.evaluate import evaluate_run


def record_digits(
    out: Path, cnn: Path, views: int = 3, outputs: OutputKind | None = None, **settings: Any
) -> dict[str, Any]:
    config = build(RunConfig, {"train_images": 300, "augment": "deit", "teacher": str(cnn), **settings})
    return taping.run_record("digits", config, out, views=views, outputs=outputs, progress=SilentProgress())


def tape_config(tape: str | Path, **settings: Any) -> RunConfig:
    return build(RunConfig, {"tape": str(tape), **settings}, tape_settings=settings_of)


def test_all_logits_of_few_classes_are_recorded_where_nobody_says(
    tmp_path: Path, cnn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training from them learns as it would from the teacher itself; a tape that was begun stays as it is."""
    assert record_digits(tmp_path / "few", cnn, 1, None)["outputs"] == "all"
    assert record_digits(tmp_path / "few", cnn, 2, None)["complete_views"] == 2
    monkeypatch.setattr(taping, "MOST_RECORDED_CLASSES", 9)
    assert record_digits(tmp_path / "few", cnn, 3, None)["outputs"] == "all"
    assert record_digits(tmp_path / "many", cnn, 1, None)["outputs"] == "hard"
    for tape, loss in (("few", "zscore"), ("many", "hard")):
        config = tape_config(tmp_path / tape)
        found = resolve.resolve(config, load_data("digits", config.data), "digits")
        assert found.loss.distillation == loss


def test_live_recorded_and_replayed_runs_end_with_the_same_bytes(tmp_path: Path, cnn: Path) -> None:
    record_digits(tmp_path / "tape", cnn)
    live = train(tmp_path / "live", teacher=str(cnn))
    taping_run = train(tmp_path / "recording", teacher=str(cnn), record=str(tmp_path / "second"))
    replayed = train(tmp_path / "replayed", tape=str(tmp_path / "tape"))
    assert weights(tmp_path / "live") == weights(tmp_path / "recording") == weights(tmp_path / "replayed")
    assert live["agreement"] == taping_run["agreement"] == replayed["agreement"]
    assert live["teacher"]["top1"] == replayed["teacher"]["top1"]
    for name in ("records.bin", "digests.bin", "tape.json"):
        assert (tmp_path / "tape" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_training_with_a_tape_of_its_own_asks_the_teacher_once_for_each_view(
    tmp_path: Path, cnn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    answer = Teacher.coded_outputs

    def counted(teacher: Teacher, images_BCHW: torch.Tensor) -> Any:
        asked.append(len(images_BCHW))
        return answer(teacher, images_BCHW)

    monkeypatch.setattr(Teacher, "coded_outputs", counted)
    train(tmp_path / "run", teacher=str(cnn), record=str(tmp_path / "tape"), views=1)
    assert sum(asked) == open_tape(tmp_path / "tape").manifest.images  # in three epochs, which read the tape


def test_a_training_that_ends_within_an_epoch_leaves_a_whole_tape(tmp_path: Path, cnn: Path) -> None:
    summary = train(tmp_path / "recording", teacher=str(cnn), record=str(tmp_path / "tape"), epochs=None, steps=7)
    assert summary["images_seen"] == 7 * 60
    assert open_tape(tmp_path / "tape").complete_views() == 2
    train(tmp_path / "replayed", tape=str(tmp_path / "tape"), epochs=None, steps=7)
    assert weights(tmp_path / "recording") == weights(tmp_path / "replayed")


def test_a_training_with_a_tape_of_its_own_begins_once_that_is_whole(
    tmp_path: Path, cnn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording that ends early leaves no run; the same command goes on with the tape, and a finished run leaves it alone."""
    settings = {"teacher": str(cnn), "record": str(tmp_path / "tape"), "epochs": None, "steps": 3}

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(teaching, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
    assert not open_tape(tmp_path / "tape").complete().any()
    train(tmp_path / "run", **settings)
    assert open_tape(tmp_path / "tape").complete().all()
    create(
        tmp_path / "tape", open_tape(tmp_path / "tape").manifest, open_tape(tmp_path / "tape").validation_labels()
    ).close()
    monkeypatch.setattr(
        jobs, "checked_teacher", killed
    )  # nobody asks the teacher again, and nobody keeps the tape locked
    train(tmp_path / "run", resume=True, **settings)


def test_fewer_views_are_gone_round(tmp_path: Path, cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_digits(tmp_path / "tape", cnn, views=2)
    monkeypatch.setattr(jobs, "repeats_views", lambda *_: False)  # the teacher stays live
    train(tmp_path / "replayed", tape=str(tmp_path / "tape"), epochs=5)
    train(tmp_path / "live", teacher=str(cnn), views=2, epochs=5)
    assert weights(tmp_path / "live") == weights(tmp_path / "replayed")


def test_a_half_recorded_tape_teaches_with_the_views_that_are_whole_and_says_so(
    tmp_path: Path, cnn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    said: list[str] = []
    monkeypatch.setattr(SilentProgress, "warn", lambda _, line: warned.append(line))
    monkeypatch.setattr(SilentProgress, "say", lambda _, line: said.append(line))
    record_digits(tmp_path / "tape", cnn, views=2, outputs="hard")
    manifest = (tmp_path / "tape" / "tape.json").read_text()  # as a killed recording of six leaves it
    (tmp_path / "tape" / "tape.json").write_text(manifest.replace('"views": 2', '"views": 6'))
    for name, size in (("records.bin", 6 * 300), ("digests.bin", 6 * 8)):
        os.truncate(tmp_path / "tape" / name, size)
    train(tmp_path / "run", tape=str(tmp_path / "tape"))
    assert any("2 of 6 views are recorded: continue with deit tape record" in line for line in warned)
    assert any("a tape, cycling through 2 views" in line for line in said)
    with pytest.raises(UserError, match="2 of 6 views are recorded, 4 are needed"):
        train(tmp_path / "other", tape=str(tmp_path / "tape"), views=4)


def test_settings_come_from_the_tape_and_others_are_refused(tmp_path: Path, cnn: Path) -> None:
    record_digits(tmp_path / "tape", cnn, views=1, outputs="hard")
    tape = str(tmp_path / "tape")
    assert tape_config(tape).view.mixup_alpha == 0.8
    assert tape_config(tape).data.train_images == 300
    for settings, named in (
        ({"augment": "light"}, "was recorded with crop_area"),
        ({"view_seed": 4}, "was recorded with view_seed = 0, not 4"),
        ({"data_seed": 4}, "other training images"),
        ({"train_images": 200}, "300 training images, here 200"),
        ({"distillation": "soft"}, "hard labels only, --distillation soft needs logits: record with --outputs all"),
        ({"distillation": "zscore"}, "hard labels only, --distillation zscore needs logits"),
    ):
        config = tape_config(tape, epochs=1, **settings)
        with pytest.raises(UserError, match=named):
            jobs.run_training("digits", config, tmp_path / "run", resume=False, progress=SilentProgress())


def test_a_tape_of_other_data_is_called_one(tmp_path: Path, cnn: Path, digit_images: Path) -> None:
    tape = tmp_path / "tape"
    record_images(digit_images, tape, cnn)
    for number in range(8):  # of several sizes: the tape's --crop pad would not do for them either
        path = tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80 + number, 80)).save(path)
    config = tape_config(tape, epochs=1)
    with pytest.raises(
        UserError, match="tape: is a tape of digits, not of pets: give the tape's data, or record another tape"
    ):
        jobs.run_training(str(tmp_path / "pets"), config, tmp_path / "run", resume=False, progress=SilentProgress())
    shutil.copytree(digit_images, tmp_path / "moved")  # the same images under another name are the same data
    jobs.run_training(str(tmp_path / "moved"), config, tmp_path / "run", resume=False, progress=SilentProgress())


def test_a_tape_of_other_outputs_is_refused_before_the_teacher_is_asked(
    tmp_path: Path, cnn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_digits(tmp_path / "tape", cnn, views=1, outputs="hard")
    monkeypatch.setattr(teaching, "load_teacher", None)
    with pytest.raises(UserError, match="tape: holds hard labels, not all logits, float32: give another folder"):
        train(tmp_path / "run", teacher=str(cnn), record=str(tmp_path / "tape"), distillation="soft", epochs=1)
    with pytest.raises(UserError, match="tape: holds hard labels, not all logits, float32: give another folder"):
        record_digits(tmp_path / "tape", cnn, views=1, outputs="all")


def test_the_likeliest_classes_teach_probabilities_alone(tmp_path: Path, cnn: Path) -> None:
    record_digits(tmp_path / "tape", cnn, views=1, outputs=3)
    manifest = open_tape(tmp_path / "tape").manifest
    assert manifest.record_format == "top 3 log-probabilities, rounded to float16"
    taught = train(tmp_path / "soft", tape=str(tmp_path / "tape"), distillation="soft", epochs=1)
    assert taught["agreement"] is not None
    with pytest.raises(UserError, match="the top 3 logits only, --distillation zscore needs all logits"):
        train(tmp_path / "zscore", tape=str(tmp_path / "tape"), distillation="zscore", epochs=1)


def test_verbs_of_the_tape(tmp_path: Path, cnn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tape = str(tmp_path / "tape")
    argv = ["digits", "--teacher", str(cnn), "--views", "1", "--train-images", "100", "--out", tape]
    assert cli.main(["tape", "record", *argv, "--outputs", "hard"]) == 0
    said = capsys.readouterr().err
    assert "1 view of 100 images: 100 bytes" in said
    assert "recording: 100 outputs" in said
    assert re.search(r"teacher .*cnn: \d+\.\d % validation accuracy \(145 images; largest class 1\d\.\d %\)", said)
    assert cli.main(["tape", "info", tape]) == 0
    assert "1 of 1" in capsys.readouterr().out
    assert cli.main(["tape", "verify", tape, "digits", "--teacher", str(cnn)]) == 0
    assert cli.main(["tape", "verify", tape, "fashion", "--teacher", str(cnn)]) == 2
    assert cli.main(["tape", "record", *argv, "--outputs", "some"]) == 2
    assert cli.main(["tape", "record", "digits", "--views", "1", "--out", tape]) == 2
    said = capsys.readouterr().err
    assert "--outputs: input should be 'hard', 'all' or 'features' (got 'some')" in said
    assert "--teacher: give the teacher to record" in said


def test_a_tape_at_one_size_of_the_teacher_s_image_is_not_taken_for_another(tmp_path: Path, cnn: Path) -> None:
    """Its outputs are others, and are those of a live teacher at that size; `verify` and `evaluate` know the size from it."""
    record_digits(tmp_path / "own", cnn)
    record_digits(tmp_path / "tape", cnn, teacher_size=12)
    own, other = open_tape(tmp_path / "own"), open_tape(tmp_path / "tape")
    assert (own.manifest.teacher_size, other.manifest.teacher_size) == ((8, 8), (12, 12))
    assert (own.path / "records.bin").read_bytes() != (other.path / "records.bin").read_bytes()
    for path, settings, sees in (
        (other.path, {}, "12x12 pixels, not 8x8"),
        (own.path, {"teacher_size": 12}, "8x8 pixels, not 12x12"),
    ):
        with pytest.raises(UserError, match=f"was recorded with a teacher that sees {sees}: give another folder"):
            record_digits(path, cnn, **settings)
        with pytest.raises(UserError, match=f"a teacher that sees {sees}"):
            train(tmp_path / "refused", teacher=str(cnn), record=str(path), **settings)
    live = train(tmp_path / "live", teacher=str(cnn), teacher_size=12)
    replayed = train(tmp_path / "replayed", tape=str(other.path))
    assert weights(tmp_path / "live") == weights(tmp_path / "replayed")
    assert live["teacher"]["top1"] == replayed["teacher"]["top1"] == other.manifest.accuracy["top1"]
    found = taping.run_verify(other.path, "digits", str(cnn), samples=64, workers=0, progress=SilentProgress())
    assert found["different"] == 0
    for name, same_teacher in (("live", live), ("replayed", replayed)):
        assert evaluate_run(tmp_path / name)["teacher"]["top1"] == same_teacher["teacher"]["top1"], name
    assert taping.tape_info(other.path)["teacher_size"] == (12, 12)


def test_an_automatic_teacher_is_recorded_as_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "AUTOMATIC_SMALL_VIEWS", {16: 6000, 64: 6000})
    config = build(RunConfig, {"teacher": "auto", "teacher_size": 12})
    info = taping.run_record("digits", config, tmp_path / "tape", views=1, outputs="hard", progress=SilentProgress())
    manifest = open_tape(tmp_path / "tape").manifest
    assert info["teacher_size"] == (12, 12)
    fitted = Path(manifest.teacher["name"])
    assert load_model(fitted / "model")[1].preprocessing.image_size == (12, 12)
    # a machine with another memory goes on with the chunks of this one
    chunk = manifest.teacher["chunk_size"]
    monkeypatch.setattr(teachers, "auto_chunk_size", lambda *_: chunk // 2)
    taping.run_record("digits", config, tmp_path / "tape", views=2, outputs="hard", progress=SilentProgress())
    assert (
        open_tape(tmp_path / "tape").complete_views(),
        open_tape(tmp_path / "tape").manifest.teacher["chunk_size"],
    ) == (2, chunk)


@pytest.fixture(scope="module")
def digit_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some digits as an image folder."""
    root = tmp_path_factory.mktemp("images") / "digits"
    digits = load_data("digits", DataConfig())
    for name, count in (("train", 100), ("val", 60)):
        split = digits.open_split("train" if name == "train" else "val")
        for position, label in enumerate(split.labels_N[:count].tolist()):
            (root / name / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.read(position)[..., 0]).save(root / name / str(label) / f"{position:03}.png")
    return root


def record_images(images: Path, out: Path, cnn: Path) -> None:
    config = build(RunConfig, {"augment": "light", "teacher": str(cnn)})
    taping.run_record(str(images), config, out, views=1, outputs="hard", progress=SilentProgress())


def verify_images(images: Path, tape: Path, cnn: Path) -> dict[str, Any]:
    return taping.run_verify(tape, str(images), str(cnn), samples=32, workers=0, progress=SilentProgress())


def test_verify_and_training_refuse_views_of_another_format(tmp_path: Path, cnn: Path) -> None:
    record_digits(tmp_path / "tape", cnn, views=1)
    file = tmp_path / "tape" / "tape.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "view_format": 1}))
    for act in (
        lambda: taping.run_verify(
            tmp_path / "tape", "digits", str(cnn), samples=32, workers=0, progress=SilentProgress()
        ),
        lambda: train(tmp_path / "run", tape=str(tmp_path / "tape")),
    ):
        with pytest.raises(UserError, match=r"its views have format 1, .* remove the folder and record the tape again"):
            act()


@pytest.mark.parametrize("split", ["train", "val"])
def test_verify_and_training_refuse_data_with_one_image_more(
    tmp_path: Path, cnn: Path, digit_images: Path, split: str
) -> None:
    shutil.copytree(digit_images, tmp_path / "images")
    record_images(tmp_path / "images", tmp_path / "tape", cnn)
    assert verify_images(tmp_path / "images", tmp_path / "tape", cnn)["different"] == 0
    # The last image of all: whoever does not count finds every other one where it was.
    shutil.copy(next((digit_images / "train" / "9").iterdir()), tmp_path / "images" / split / "9" / "zzz.png")
    which = {"train": "training", "val": "validation"}[split]
    with pytest.raises(UserError, match=f"was recorded from other {which} images than images has"):
        verify_images(tmp_path / "images", tmp_path / "tape", cnn)
    config = tape_config(tmp_path / "tape", epochs=1)
    with pytest.raises(UserError, match=f"was recorded from other {which} images than images has"):
        jobs.run_training(str(tmp_path / "images"), config, tmp_path / "run", resume=False, progress=SilentProgress())
    assert not (tmp_path / "run").exists()


def test_training_from_a_tape_reads_no_image_twice_to_know_it_and_verify_reads_all(
    tmp_path: Path, cnn: Path, digit_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_images(digit_images, tmp_path / "tape", cnn)
    hashed: list[int] = []
    once = FolderSplit._content
    monkeypatch.setattr(FolderSplit, "_content", lambda self, position: hashed.append(position) or once(self, position))
    config = tape_config(tmp_path / "tape", epochs=1)
    jobs.run_training(str(digit_images), config, tmp_path / "run", resume=False, progress=SilentProgress())
    assert not hashed
    verify_images(digit_images, tmp_path / "tape", cnn)
    assert len(hashed) == 160


def test_a_refused_recording_leaves_no_run_and_the_same_command_works_once_it_is_mended(
    tmp_path: Path, cnn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(why: str, **settings: Any) -> None:
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(UserError, match=why):
            train(tmp_path / "run", teacher=str(cnn), epochs=1, **{"record": str(tmp_path / "tape"), **settings})
        assert {path.name for path in tmp_path.iterdir()} == before

    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    refused("already exists and is no tape", record=str(tmp_path / "letters"))
    with monkeypatch.context() as patch:
        patch.setattr("deitkit.distill.tape.free_bytes", lambda _: 10)
        refused(" are free: record fewer views, or free some space")
    record_digits(tmp_path / "tape", cnn, views=1, data_seed=4)
    refused("was recorded from other training images")
    shutil.rmtree(tmp_path / "tape")
    assert train(tmp_path / "run", teacher=str(cnn), epochs=1, record=str(tmp_path / "tape"))["steps"] > 0
    assert open_tape(tmp_path / "tape").complete_views() == 1


def test_a_run_is_not_evaluated_with_another_teacher_than_that_of_its_tape(tmp_path: Path, cnn: Path) -> None:
    shutil.copytree(cnn, tmp_path / "cnn")
    record_digits(tmp_path / "tape", tmp_path / "cnn", views=1)
    train(tmp_path / "run", tape=str(tmp_path / "tape"), epochs=1)
    warned: list[str] = []
    found = evaluate_run(tmp_path / "run", warn=warned.append, workers=0)
    assert (found["teacher"]["name"], warned) == (str(tmp_path / "cnn"), [])
    network = load_file(tmp_path / "cnn" / "model" / "model.safetensors")
    name = next(name for name, weight in network.items() if weight.ndim == 4)
    save_tensors({**network, name: network[name] * 1.01}, tmp_path / "cnn" / "model" / "model.safetensors")
    found = evaluate_run(tmp_path / "run", warn=warned.append, workers=0)
    assert found["teacher"] is None
    assert found["agreement"] is None
    assert warned == [
        f"evaluated without the teacher: {tmp_path / 'cnn'}: its weights are not those that the run learned from"
    ]


def test_bad_input_to_the_tape_s_verbs_is_one_line(
    tmp_path: Path, cnn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tape = tmp_path / "tape"
    record_digits(tape, cnn, views=2)
    (tmp_path / "file").touch()
    shutil.copytree(tape, tmp_path / "newer")
    content = json.loads((tape / "tape.json").read_text())
    (tmp_path / "newer" / "tape.json").write_text(json.dumps({**content, "format": 2, "more": 1}))
    shutil.copytree(tape, tmp_path / "short")
    os.truncate(tmp_path / "short" / "records.bin", 100)
    shutil.copytree(tape, tmp_path / "halved")
    del content["data"]["train"]
    (tmp_path / "halved" / "tape.json").write_text(json.dumps(content))
    record = ["tape", "record", "digits", "--teacher", str(cnn), "--train-images", "300", "--views", "1", "--out"]
    for argv, complaint in (
        (["tape", "info", str(tmp_path / "none")], "none: no tape here: tape.json: No such file or directory"),
        (["tape", "info", str(tmp_path / "file")], "file: no tape here: tape.json: Not a directory"),
        (["tape", "verify", str(tmp_path / "none"), "digits", "--teacher", str(cnn)], "none: no tape here"),
        (["tape", "info", str(tmp_path / "newer")], "tape.json: format"),
        (
            ["tape", "info", str(tmp_path / "short")],
            "short: damaged: records.bin is shorter than tape.json says: remove",
        ),
        (["tape", "info", str(tmp_path / "halved")], "tape.json: data.train: missing, or no text"),
        (
            ["train", "digits", "--teacher", str(tmp_path / "halved"), "--out", str(tmp_path / "run")],
            "data.train: missing",
        ),
        ([*record, str(tmp_path / "file")], "file: already exists and is no tape: give another folder"),
        ([*record, str(tape), "--augment", "none"], "was recorded with"),
        (
            ["train", "digits", "--teacher", str(tape), "--views", "3", "--out", str(tmp_path / "run")],
            "2 of 2 views are",
        ),
    ):
        assert cli.main(argv) == 2, argv
        said = [line for line in capsys.readouterr().err.splitlines() if "deit: error" in line]
        assert len(said) == 1, said
        assert complaint in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_of_one_training_record_one_tape(tmp_path: Path, cnn: Path) -> None:
    command = [
        *(sys.executable, "-m", "deitkit.cli", "train", "digits", "--teacher", str(cnn), "--train-images", "300"),
        *(
            "--epochs",
            "3",
            "--views",
            "2",
            "--batch-size",
            "64",
            "--record",
            str(tmp_path / "tape"),
            "--processes",
            "2",
        ),
        *("--augment", "deit", "--out", str(tmp_path / "run")),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    record_digits(tmp_path / "alone", cnn, views=2)
    for name in ("records.bin", "digests.bin"):
        assert (tmp_path / "tape" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def committed(tape: Path) -> bytes:
    """The checksums of the chunks that are whole."""
    path = tape / "digests.bin"
    return path.read_bytes().rstrip(b"\0") if path.is_file() else b""


def killed_and_continued(tape: Path, cnn: Path, kills: int, processes: int, views: int) -> None:
    """Record in processes that are killed at random moments, then to the end. Of several one is killed, and takes the others along."""
    command = [
        *(sys.executable, "-m", "deitkit.cli", "tape", "record", "digits", "--teacher", str(cnn), "--out", str(tape)),
        *("--views", str(views), "--augment", "deit", "--processes", str(processes)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    chance = random.Random(0)
    for number in range(kills):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before, began = committed(tape), time.monotonic()
        if number % 2:  # while it starts, asks the teacher or makes the tape
            time.sleep(chance.uniform(0, 10))
        while (
            number % 2 == 0 and committed(tape) == before and process.poll() is None and time.monotonic() - began < 60
        ):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        if processes == 1:
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
            os.kill(int(children[-1]), signal.SIGKILL)
            assert process.wait(60) == 128 + signal.SIGKILL
            assert not any(Path("/proc", child).exists() for child in children)
    subprocess.run(command, env=environment, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("kills", "processes", "views"),
    [
        (0, 2, 2),
        pytest.param(1, 2, 12, marks=pytest.mark.slow),
        pytest.param(20, 1, 40, marks=pytest.mark.slow),
    ],
)
def test_a_recording_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, cnn: Path, kills: int, processes: int, views: int
) -> None:
    """Also one that several processes share: the tape is that of one process, which has as many threads as each of them."""
    killed_and_continued(tmp_path / "killed", cnn, kills, processes, views)
    killed_and_continued(tmp_path / "whole", cnn, 0, 1, views)
    for name in ("records.bin", "digests.bin", "tape.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
