from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes import holding

from deitkit.comparison.runner import recorded_views
from deitkit.config import ViewConfig
from deitkit.distill import tape as module
from deitkit.distill.tape import (
    NEEDED,
    VIEW_FORMAT,
    Tape,
    TapeCard,
    create,
    encode,
    open_tape,
    read_card,
    refuse_other_views,
)
from deitkit.terminal import UserError, save_tensors


def card(**changes: Any) -> TapeCard:
    data = {"name": "fakes", "settings": {}, "images": 101, "train": "a", "validation": "b"}
    view = ViewConfig(crop="none", view_size=(8, 8), flip_prob=0.5)
    plain = TapeCard(
        teacher={"name": "T", "state": "1234", "chunk_size": 64, "dtype": "float32"},
        classes=tuple("abcdefghij"),
        data=data,
        view=view,
        answers="hard",
        views=3,
        chunk_slots=32,
        made_with={},
        accuracy={"n": 5, "top1": 0.9},
    )
    return plain.model_copy(update=changes)


@pytest.fixture
def tape(tmp_path: Path) -> Tape:
    return create(tmp_path / "tape", card(), torch.arange(5))


def fill(tape: Tape, view: int, chunk: int) -> None:
    start, stop = tape.slots(chunk)
    logits = torch.randn(stop - start, 10, generator=torch.Generator().manual_seed(100 * view + chunk))
    tape.write(view, start, encode(logits, "hard"))


def test_what_is_written_is_read_back_by_image(tape: Tape) -> None:
    labels = torch.arange(101) % 10
    tape.write(1, 0, encode(torch.nn.functional.one_hot(labels, 10).float(), "hard"))
    tape.commit(1, list(range(tape.card.chunks)))
    opened = open_tape(tape.path)
    order = tape.card.order(1)
    assert sorted(order) == list(range(101))
    answers = opened.answers(np.full(101, 1), order)
    assert torch.equal(answers.labels_B, labels)
    backwards = opened.answers(np.full(101, 1), order[::-1].copy())
    assert torch.equal(backwards.labels_B, labels.flip(0))
    assert torch.equal(opened.validation_labels(), torch.arange(5))


def test_a_chunk_counts_only_once_it_is_committed(tape: Tape) -> None:
    assert tape.complete_views() == 0
    for chunk in range(tape.card.chunks):
        fill(tape, 0, chunk)
    assert not tape.complete().any()
    tape.commit(0, [0])
    assert tape.complete().sum() == 1
    tape.commit(0, list(range(tape.card.chunks)))
    assert (tape.complete_views(), open_tape(tape.path).complete_views()) == (1, 1)


def test_one_flipped_byte_is_found(tape: Tape) -> None:
    for chunk in range(tape.card.chunks):
        fill(tape, 0, chunk)
    tape.commit(0, list(range(tape.card.chunks)))
    assert tape.damaged() == []
    content = bytearray((tape.path / "records.bin").read_bytes())
    content[77] ^= 1
    (tape.path / "records.bin").write_bytes(content)
    assert open_tape(tape.path).damaged() == [(0, 77 // tape.card.chunk_slots)]


def test_more_views_go_on_with_the_same_tape(tape: Tape) -> None:
    for chunk in range(tape.card.chunks):
        fill(tape, 0, chunk)
    tape.commit(0, list(range(tape.card.chunks)))
    longer = create(tape.path, card(views=5), torch.arange(5))
    assert (longer.card.views, longer.complete_views()) == (5, 1)
    assert create(tape.path, card(views=2), torch.arange(5)).card.views == 5
    assert (tape.path / "records.bin").stat().st_size == 5 * 101


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher": {**card().teacher, "name": "U", "state": "9"}}, r"another teacher \(T\)"),
        ({"teacher": {**card().teacher, "chunk_size": 32}}, "teacher chunk_size 64, not 32"),
        (
            {"view": ViewConfig(crop="none", view_size=(8, 8), flip_prob=0.1)},
            "flip_prob = 0.5, now it is 0.1",
        ),
        ({"answers": "all"}, "holds answers 'hard', not 'all'"),
        (
            {"data": {**card().data, "images": 102, "train": "c"}},
            "other training images than fakes has .101 training images",
        ),
        ({"data": {**card().data, "validation": "c"}}, "other validation images"),
    ],
)
def test_another_recording_is_refused_naming_what_differs(tape: Tape, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        create(tape.path, card(**changes), torch.arange(5))


def test_views_that_another_version_made_otherwise_are_refused(tape: Tape) -> None:
    older = card(view_format=tape.card.view_format - 1)
    with pytest.raises(
        UserError, match=f"its views are of format {VIEW_FORMAT - 1}, this program makes those of format {VIEW_FORMAT}"
    ):
        refuse_other_views(tape.path, older, card().view)


@pytest.mark.parametrize("left", [{"tape.json"}, {"tape.json", "records.bin"}])
def test_a_recording_killed_as_it_began_goes_on(tape: Tape, left: set[str]) -> None:
    for path in tape.path.iterdir():
        if path.name not in left:
            path.unlink()
    again = create(tape.path, card(), torch.arange(5))
    fill(again, 0, 0)
    again.commit(0, [0])
    assert open_tape(tape.path).complete().sum() == 1


def test_the_card_is_the_first_file_of_a_tape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", killed)
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "new", card(), torch.arange(5))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock", "tape.json"]


def test_names_that_change_no_pixel_may_differ(tape: Tape) -> None:
    same = card().view.model_copy(update={"augment": "none", "views": 3})
    create(tape.path, card(view=same), torch.arange(5))


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
        create(tmp_path, card(), torch.arange(5))
    with pytest.raises(UserError, match="no tape here"):
        read_card(tmp_path)


def test_a_tape_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match=r"90000 views take 9.1 MB, 1.0 kB are free: record fewer views"):
        create(tape.path, tape.card.model_copy(update={"views": 90_000}), torch.zeros(2, dtype=torch.int64))
    assert open_tape(tape.path).card.views == tape.card.views


@pytest.mark.parametrize(
    ("part", "content", "complaint"),
    [
        ("data", {}, r"data\.name: missing, or no text"),
        ("data", {**card().data, "images": "x"}, r"data\.images: missing, or no whole number"),
        ("data", {**card().data, "images": 0}, r"data\.images, teacher\.chunk_size: 0 is less than one"),
        ("data", {**card().data, "settings": [1]}, r"data\.settings: missing, or no settings"),
        ("data", {"name": "D", "settings": {}, "images": 101}, r"data\.train: missing, or no text"),
        ("teacher", {}, r"teacher\.name: missing"),
        ("teacher", {"name": "T"}, r"teacher\.state: missing"),
        ("teacher", {**card().teacher, "dtype": "int7"}, r"teacher\.dtype: 'int7' is no format of numbers"),
        ("accuracy", {"n": 3}, r"accuracy\.top1: missing, or no number"),
        ("answers", "foo", "answers"),
        ("classes", [], "classes: none"),
        ("format", 2, "format"),
        ("accuracy", {"n": 5, "top1": 0.99}, "is not as it was written"),
        ("chunk_slots", 64, "is not as it was written"),
        ("seal", "0", "is not as it was written"),
        ("seal", None, "is not as it was written"),
    ],
)
def test_an_edited_card_is_one_line(tape: Tape, part: str, content: Any, complaint: str) -> None:
    edit(tape.path, **{part: content})
    with pytest.raises(UserError, match=complaint) as caught:
        open_tape(tape.path)
    assert "\n" not in str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    """Change tape.json by hand."""
    file = path / "tape.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("needed", [f"{section}.{name}" for section, names in NEEDED.items() for name in names])
def test_a_card_without_what_is_asked_of_it_is_one_line(tape: Tape, needed: str) -> None:
    section, name = needed.split(".")
    edit(tape.path, **{section: {key: value for key, value in getattr(tape.card, section).items() if key != name}})
    with pytest.raises(UserError, match=rf"tape\.json: .*{needed}: missing"):
        read_card(tape.path)


def test_a_changed_decision_on_a_validation_image_is_found(tape: Tape) -> None:
    save_tensors({"labels": torch.tensor([0, 1, 2, 3, 3])}, tape.path / "validation.safetensors")
    with pytest.raises(
        UserError, match=r"validation\.safetensors: damaged: the decisions are not as they were written"
    ):
        open_tape(tape.path).validation_labels()


def test_one_process_records_while_others_read(tape: Tape) -> None:
    with pytest.raises(AssertionError, match="BlockingIOError"), holding(tape.path):
        pass
    tape.close()
    with holding(tape.path):
        before = (tape.path / "tape.json").read_bytes()
        refusal = "another process is recording this tape: wait for it, or give another folder"
        with pytest.raises(UserError, match=refusal):
            create(tape.path, card(views=7), torch.arange(5))
        assert (tape.path / "tape.json").read_bytes() == before
        assert open_tape(tape.path).complete_views() == 0
    assert create(tape.path, card(views=7), torch.arange(5)).card.views == 7


def test_a_recording_that_was_refused_does_not_keep_others_away(tmp_path: Path, tape: Tape) -> None:
    tape.close()
    with pytest.raises(UserError, match="another teacher"):
        create(tape.path, card(teacher={**card().teacher, "state": "9"}), torch.arange(5))
    assert open_tape(tape.path).card.teacher["state"] == "1234"


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
            UserError, match="the disk is full: what was recorded is intact; make room and give the same"
        ):
            go_on()
    assert open_tape(tape.path).complete().sum() == 1
    assert open_tape(tape.path).damaged() == []


def test_another_failure_of_the_disk_is_one_line(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(UserError, match="cannot be written: Input/output error: what was recorded is intact"):
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
    other = create(tape.path, card(made_with={"processor": "another"}), torch.arange(5))
    assert other.card.made_with == {"continued_with": {"processor": "another"}}


def test_a_part_of_a_view_counts_by_its_slots(tape: Tape) -> None:
    """101 images in chunks of 32: the last has five."""
    assert recorded_views(tape.path) == 0
    for chunk in (0, 3):
        fill(tape, 0, chunk)
    tape.commit(0, [0, 3])
    assert recorded_views(tape.path) == pytest.approx(37 / 101)
