"""Records, the manifest, and the files of a tape."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes import holding

from deitkit.comparison.runner import recorded_views
from deitkit.config import ViewConfig
from deitkit.distill import tape as module
from deitkit.distill.encoding import decode, describe_outputs, encode, record_type
from deitkit.distill.tape import (
    NEEDED,
    VIEW_FORMAT,
    Manifest,
    Tape,
    create,
    open_tape,
    read_manifest,
)
from deitkit.terminal import UserError, save_tensors


@pytest.mark.parametrize(
    ("outputs", "classes", "size"),
    [
        ("hard", 2, 1),
        ("hard", 256, 1),
        ("hard", 257, 2),
        ("hard", 65_536, 2),
        ("hard", 65_537, 4),
        ("all", 10, 40),
        (10, 1000, 44),
        (3, 10, 13),
    ],
)
def test_a_record_is_no_larger_than_promised(outputs: str | int, classes: int, size: int) -> None:
    assert record_type(outputs, classes).itemsize == size
    assert encode(torch.randn(5, classes), outputs).nbytes == 5 * size


@pytest.mark.parametrize("classes", [2, 10, 200, 70_000])
def test_hard_labels_and_all_logits_come_back_bit_for_bit(classes: int) -> None:
    logits_BK = torch.randn(7, classes, generator=torch.Generator().manual_seed(0)) * 20
    hard = decode(encode(logits_BK, "hard"), classes)
    assert torch.equal(hard.labels_B, logits_BK.argmax(-1))
    assert hard.logits_BK is None
    whole = decode(encode(logits_BK, "all"), classes)
    assert torch.equal(whole.labels_B, logits_BK.argmax(-1))
    assert whole.logits_BK is not None
    assert torch.equal(whole.logits_BK, logits_BK)


@given(st.integers(2, 40), st.integers(0, 2**16), st.floats(0.1, 30))
def test_the_likeliest_classes_come_back_and_the_rest_shares_what_is_left(
    classes: int, seed: int, scale: float
) -> None:
    logits_BK = torch.randn(4, classes, generator=torch.Generator().manual_seed(seed)) * scale
    k = 1 + seed % classes
    output = decode(encode(logits_BK, k), classes)
    assert torch.equal(output.labels_B, logits_BK.argmax(-1))
    assert output.logits_BK is not None
    chances_BK, true_BK = output.logits_BK.softmax(-1), logits_BK.softmax(-1)
    kept = logits_BK.topk(k, -1).indices
    # half precision keeps 11 bits of a log-probability: an error of |log p| / 2048 at most
    assert torch.allclose(chances_BK.gather(1, kept), true_BK.gather(1, kept), rtol=0.05, atol=2e-3)
    assert torch.allclose(output.logits_BK.gather(1, kept), logits_BK.gather(1, kept), rtol=1e-3, atol=0.2)
    assert torch.allclose(chances_BK.sum(-1), torch.ones(4), atol=1e-5)


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    logits_BK = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert encode(logits_BK, "hard")["label"].tolist() == [1]
    assert encode(logits_BK, 2)["class"].tolist() == [[1, 2]]


@pytest.mark.parametrize("outputs", ["hard", "all", 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_infinite_logits_and_nan_are_not_recorded(outputs: str | int, bad: float) -> None:
    with pytest.raises(UserError, match="the teacher's logits have infinity or NaN: use --teacher-precision float32"):
        encode(torch.tensor([[1.0, 2.0, 3.0], [1.0, bad, 0.0]]), outputs)


def test_logits_beyond_half_precision_stay_finite() -> None:
    logits_BK = torch.tensor([[0.0, -1e6, 1e6]])
    back = decode(encode(logits_BK, 3), 3).logits_BK
    assert back is not None
    assert back.isfinite().all()
    assert back.softmax(-1)[0, 2] == 1


def test_the_top_k_logits_come_back_rounded_to_float16_and_the_manifest_says_so() -> None:
    logits_BK = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)) * 3
    back_BK = decode(encode(logits_BK, 4), 10).logits_BK
    assert back_BK is not None
    sum_B1 = logits_BK.logsumexp(-1, keepdim=True)
    kept = logits_BK.topk(4, -1).indices
    rounded_BK = (logits_BK - sum_B1).half().float() + sum_B1
    assert torch.equal(back_BK.gather(1, kept), rounded_BK.gather(1, kept))
    assert not torch.equal(back_BK.gather(1, kept), logits_BK.gather(1, kept))
    assert describe_outputs(4) == "top 4 log-probabilities, rounded to float16"
    assert describe_outputs("all") == "all logits, float32"
    assert describe_outputs("hard") == "hard labels"


# ------------------------------------------------------------------------------------------------------ the files


def manifest(**changes: Any) -> Manifest:
    data = {"name": "fakes", "settings": {}, "images": 101, "train": "a", "validation": "b"}
    view = ViewConfig(crop="none", view_size=(8, 8), flip_prob=0.5)
    plain = Manifest(
        teacher={"name": "T", "state": "1234", "chunk_size": 64, "dtype": "float32"},
        classes=tuple("abcdefghij"),
        data=data,
        view=view,
        outputs="hard",
        views=3,
        records_per_chunk=32,
        made_with={},
        accuracy={"n": 5, "top1": 0.9},
    )
    return plain.model_copy(update=changes)


@pytest.fixture
def tape(tmp_path: Path) -> Tape:
    return create(tmp_path / "tape", manifest(), torch.arange(5))


def fill(tape: Tape, view: int, chunk: int) -> None:
    start, stop = tape.manifest.span(chunk)
    logits = torch.randn(stop - start, 10, generator=torch.Generator().manual_seed(100 * view + chunk))
    tape.write(view, start, encode(logits, "hard"))


def test_what_is_written_is_read_back_by_image(tape: Tape) -> None:
    labels = torch.arange(101) % 10
    tape.write(1, 0, encode(torch.nn.functional.one_hot(labels, 10).float(), "hard"))
    tape.commit(1, list(range(tape.manifest.chunks)))
    opened = open_tape(tape.path)
    order = tape.manifest.order(1)
    assert sorted(order) == list(range(101))
    output = opened.outputs(np.full(101, 1), order)
    assert torch.equal(output.labels_B, labels)
    backwards = opened.outputs(np.full(101, 1), order[::-1].copy())
    assert torch.equal(backwards.labels_B, labels.flip(0))
    assert torch.equal(opened.validation_labels(), torch.arange(5))


def test_a_chunk_counts_only_once_it_is_committed(tape: Tape) -> None:
    assert tape.complete_views() == 0
    for chunk in range(tape.manifest.chunks):
        fill(tape, 0, chunk)
    assert not tape.complete().any()
    tape.commit(0, [0])
    assert tape.complete().sum() == 1
    tape.commit(0, list(range(tape.manifest.chunks)))
    assert (tape.complete_views(), open_tape(tape.path).complete_views()) == (1, 1)


def test_one_flipped_byte_is_found(tape: Tape) -> None:
    for chunk in range(tape.manifest.chunks):
        fill(tape, 0, chunk)
    tape.commit(0, list(range(tape.manifest.chunks)))
    assert tape.damaged() == []
    content = bytearray((tape.path / "records.bin").read_bytes())
    content[77] ^= 1
    (tape.path / "records.bin").write_bytes(content)
    assert open_tape(tape.path).damaged() == [(0, 77 // tape.manifest.records_per_chunk)]


def test_more_views_go_on_with_the_same_tape(tape: Tape) -> None:
    for chunk in range(tape.manifest.chunks):
        fill(tape, 0, chunk)
    tape.commit(0, list(range(tape.manifest.chunks)))
    tape.close()
    longer = create(tape.path, manifest(views=5), torch.arange(5))
    assert (longer.manifest.views, longer.complete_views()) == (5, 1)
    longer.close()
    assert create(tape.path, manifest(views=2), torch.arange(5)).manifest.views == 5
    assert (tape.path / "records.bin").stat().st_size == 5 * 101


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher": {**manifest().teacher, "name": "U", "state": "9"}}, r"another teacher \(T\)"),
        ({"teacher": {**manifest().teacher, "chunk_size": 32}}, "teacher chunk_size 64, not 32"),
        (
            {"view": ViewConfig(crop="none", view_size=(8, 8), flip_prob=0.1)},
            "flip_prob = 0.5, not 0.1: views must be the same",
        ),
        ({"outputs": "all"}, "holds hard labels, not all logits, float32: give another folder"),
        (
            {"data": {**manifest().data, "images": 102, "train": "c"}},
            "other training images than fakes has .101 training images",
        ),
        ({"data": {**manifest().data, "validation": "c"}}, "other validation images"),
    ],
)
def test_another_recording_is_refused_naming_what_differs(tape: Tape, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        create(tape.path, manifest(**changes), torch.arange(5))


@pytest.mark.parametrize("other", [{"answers": "hard", "chunk_slots": 64, "seal": "0"}, {}])
def test_views_that_another_version_made_otherwise_are_refused(tape: Tape, other: dict[str, Any]) -> None:
    """Whatever else that version writes; such a tape gets no more views, either."""
    file = tape.path / "tape.json"
    content = {**json.loads(file.read_text()), **other, "view_format": VIEW_FORMAT - 1}
    file.write_text(json.dumps(content))
    for act in (lambda: open_tape(tape.path), lambda: create(tape.path, manifest(views=9), torch.arange(5))):
        with pytest.raises(
            UserError, match=f"its views have format {VIEW_FORMAT - 1}, this program makes {VIEW_FORMAT}"
        ):
            act()
    assert json.loads(file.read_text()) == content


@pytest.mark.parametrize("left", [{"tape.json"}, {"tape.json", "records.bin"}])
def test_a_recording_killed_as_it_began_goes_on(tape: Tape, left: set[str]) -> None:
    for path in tape.path.iterdir():
        if path.name not in left:
            path.unlink()
    tape.close()
    again = create(tape.path, manifest(), torch.arange(5))
    fill(again, 0, 0)
    again.commit(0, [0])
    assert open_tape(tape.path).complete().sum() == 1


def test_the_manifest_is_the_first_file_of_a_tape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", killed)
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "new", manifest(), torch.arange(5))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock", "tape.json"]


def test_names_that_change_no_pixel_may_differ(tape: Tape) -> None:
    same = manifest().view.model_copy(update={"augment": "none", "views": 3})
    tape.close()
    create(tape.path, manifest(view=same), torch.arange(5))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tape.json", "{", "tape.json: "),
        ("tape.json", '{"format": 2}', "tape.json: format"),
        ("records.bin", "short", "records.bin is shorter"),
        ("records.bin", None, "cannot be opened"),
        ("tape.json", None, "no tape here"),
    ],
)
def test_a_damaged_tape_is_one_line(tape: Tape, name: str, content: str | None, complaint: str) -> None:
    if content is None:
        (tape.path / name).unlink()
    else:
        (tape.path / name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        open_tape(tape.path)


def test_a_folder_that_is_no_tape_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is no tape"):
        create(tmp_path, manifest(), torch.arange(5))
    with pytest.raises(UserError, match="no tape here"):
        read_manifest(tmp_path)


def test_a_tape_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"90000 views take 9.1 MB, 1.0 kB are free: record fewer views"):
        create(tape.path, tape.manifest.model_copy(update={"views": 90_000}), torch.zeros(2, dtype=torch.int64))
    assert open_tape(tape.path).manifest.views == tape.manifest.views


@pytest.mark.parametrize(
    ("part", "content", "complaint"),
    [
        ("data", {}, r"data\.name: missing, or no text"),
        ("data", {**manifest().data, "images": "x"}, r"data\.images: missing, or no whole number"),
        ("data", {**manifest().data, "images": 0}, r"data\.images, teacher\.chunk_size: 0 is less than one"),
        ("data", {**manifest().data, "settings": [1]}, r"data\.settings: missing, or no settings"),
        ("data", {"name": "D", "settings": {}, "images": 101}, r"data\.train: missing, or no text"),
        ("teacher", {}, r"teacher\.name: missing"),
        ("teacher", {"name": "T"}, r"teacher\.state: missing"),
        (
            "teacher",
            {**manifest().teacher, "dtype": "int7"},
            r"teacher\.dtype: 'int7' is unknown: float32, bfloat16 or float16",
        ),
        ("accuracy", {"n": 3}, r"accuracy\.top1: missing, or no number"),
        ("outputs", "foo", "outputs"),
        ("classes", [], "classes: none"),
        ("format", 2, "format"),
        ("accuracy", {"n": 5, "top1": 0.99}, r"checksum mismatch: tape\.json was modified"),
        ("records_per_chunk", 64, r"checksum mismatch: tape\.json was modified"),
        ("checksum", "0", r"checksum mismatch: tape\.json was modified"),
        ("checksum", None, r"checksum mismatch: tape\.json was modified"),
    ],
)
def test_an_edited_manifest_is_one_line(tape: Tape, part: str, content: Any, complaint: str) -> None:
    edit(tape.path, **{part: content})
    with pytest.raises(UserError, match=complaint) as caught:
        open_tape(tape.path)
    assert "\n" not in str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    """Change tape.json by hand."""
    file = path / "tape.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("needed", [f"{section}.{name}" for section, names in NEEDED.items() for name in names])
def test_a_manifest_without_what_is_asked_of_it_is_one_line(tape: Tape, needed: str) -> None:
    section, name = needed.split(".")
    edit(tape.path, **{section: {key: value for key, value in getattr(tape.manifest, section).items() if key != name}})
    with pytest.raises(UserError, match=rf"tape\.json: .*{needed}: missing"):
        read_manifest(tape.path)


def test_a_changed_hard_label_of_a_validation_image_is_found(tape: Tape) -> None:
    save_tensors({"labels": torch.tensor([0, 1, 2, 3, 3])}, tape.path / "validation.safetensors")
    with pytest.raises(UserError, match=r"validation\.safetensors: damaged: checksum mismatch of the hard labels"):
        open_tape(tape.path).validation_labels()


def test_one_process_records_while_others_read(tape: Tape) -> None:
    with pytest.raises(AssertionError, match="BlockingIOError"), holding(tape.path):
        pass
    tape.close()
    with holding(tape.path):
        before = (tape.path / "tape.json").read_bytes()
        refusal = "another process is recording this tape: wait, or give another folder"
        with pytest.raises(UserError, match=refusal):
            create(tape.path, manifest(views=7), torch.arange(5))
        assert (tape.path / "tape.json").read_bytes() == before
        assert open_tape(tape.path).complete_views() == 0
    assert create(tape.path, manifest(views=7), torch.arange(5)).manifest.views == 7


def test_a_recording_that_was_refused_does_not_keep_others_away(tmp_path: Path, tape: Tape) -> None:
    tape.close()
    with pytest.raises(UserError, match="another teacher"):
        create(tape.path, manifest(teacher={**manifest().teacher, "state": "9"}), torch.arange(5))
    assert open_tape(tape.path).manifest.teacher["state"] == "1234"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["fsync", "ftruncate", "pwrite"])
def test_a_disk_that_is_full_at_any_call_is_one_line_and_costs_nothing(
    tape: Tape, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    fill(tape, 0, 0)
    tape.commit(0, [0])

    def full(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    def go_on() -> None:
        again = open_tape(tape.path, writable=True)
        fill(again, 0, 1)
        again.commit(0, [1])

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(
            UserError, match="the disk is full: recorded chunks are intact; free some space and run the same command"
        ):
            go_on()
    assert open_tape(tape.path).complete().sum() == 1
    assert open_tape(tape.path).damaged() == []


def test_another_failure_of_the_disk_is_one_line(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(UserError, match="cannot be written: Input/output error: recorded chunks are intact"):
        fill(tape, 0, 0)


def test_records_are_on_the_disk_before_their_chunk_counts(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []

    def name(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").resolve().name

    def watched(call: str) -> Any:
        original = getattr(os, call)

        def wrapped(descriptor: int, *rest: Any) -> Any:
            done.append((call, name(descriptor)))
            return original(descriptor, *rest)

        return wrapped

    for call in ("pwrite", "fsync"):
        monkeypatch.setattr(os, call, watched(call))
    fill(tape, 0, 0)
    tape.commit(0, [0])
    assert done == [
        ("pwrite", "records.bin"), ("fsync", "records.bin"), ("pwrite", "digests.bin"), ("fsync", "digests.bin")
    ]  # fmt: skip


def test_a_tape_that_was_gone_on_with_elsewhere_says_so(tape: Tape) -> None:
    tape.close()
    other = create(tape.path, manifest(made_with={"processor": "another"}), torch.arange(5))
    assert other.manifest.made_with == {"continued_with": {"processor": "another"}}


def test_a_part_of_a_view_counts_by_its_records(tape: Tape) -> None:
    """101 images in chunks of 32: the last has five."""
    assert recorded_views(tape.path) == 0
    for chunk in (0, 3):
        fill(tape, 0, chunk)
    tape.commit(0, [0, 3])
    assert recorded_views(tape.path) == pytest.approx(37 / 101)
