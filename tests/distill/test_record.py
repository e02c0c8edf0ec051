"""Recording, replaying and verifying."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.fakes import HeldImages, Photos
from tests.views.test_loader import HELD_VIEW, PHOTO_VIEW
from torch import nn

from deitkit.config import Preprocessing, ViewConfig
from deitkit.data import Split
from deitkit.data.arrow import write_decoded
from deitkit.distill import record as recording
from deitkit.distill.encoding import encode
from deitkit.distill.losses import TeacherOutput
from deitkit.distill.record import (
    Piece,
    Pieces,
    made_with,
    make_manifest,
    missing_pieces,
    record,
    replay,
    verify,
    write_pieces,
)
from deitkit.distill.tape import Tape, create, open_tape
from deitkit.distill.teacher import Teacher, teacher_from_callable
from deitkit.terminal import SilentProgress, UserError, save_tensors
from deitkit.views.loader import TrainLoader, augment_and_mix
from deitkit.views.mixup import Batch

CASES = [
    (HeldImages(131), HELD_VIEW),
    (Photos(37), PHOTO_VIEW),
    (HeldImages(40), HELD_VIEW.model_copy(update={"repeated_aug": 2})),
]


def make_teacher(split: Split, recipe: ViewConfig, classes: int = 10, seed: int = 0) -> Teacher:
    torch.manual_seed(seed)
    assert recipe.view_size is not None
    pixels = split.channels * recipe.view_size[0] * recipe.view_size[1]
    preprocessing = Preprocessing(
        image_size=recipe.view_size, mean=(0.5,) * split.channels, std=(0.5,) * split.channels
    )
    network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    return teacher_from_callable(network, name="T", num_classes=classes, preprocessing=preprocessing)


def make_tape(
    path: Path,
    split: Split,
    recipe: ViewConfig,
    teacher: Teacher,
    outputs: Any = "all",
    views: int = 2,
    chunk: int = 32,
) -> Tape:
    data = {"name": "fakes", "settings": {}, "images": len(split), "train": "a", "validation": "b"}
    classes = tuple(str(number) for number in range(teacher.num_classes))
    manifest = make_manifest(teacher, data, classes, recipe, outputs, views, {"n": 1, "top1": 1.0})
    return create(path, manifest.model_copy(update={"records_per_chunk": chunk}), torch.arange(5))


def outputs_of(
    source: Any, split: Split, recipe: ViewConfig, epochs: int, batch_size: int, seed: int = 3
) -> dict[Any, TeacherOutput]:
    """What a source gives for every view that a training shows, by (index, view)."""
    loader = TrainLoader(split, recipe, batch_size=batch_size, seed=seed)
    found = {}
    for crops in loader.batches(0, epochs * loader.steps_per_epoch):
        batch: Batch = augment_and_mix(crops, recipe)
        output = source(batch)
        for row, key in enumerate(zip(batch.index_B.tolist(), batch.view_B.tolist(), strict=True)):
            found[key] = output.labels_B[row], None if output.logits_BK is None else output.logits_BK[row]
    return found


def live(teacher: Teacher) -> Any:
    return lambda batch: TeacherOutput((logits := teacher.forward(batch.images_BCHW)).argmax(-1), logits)


def test_case_views_are_mixed_and_erased() -> None:
    assert all(recipe.mixup_alpha and recipe.cutmix_alpha and recipe.random_erasing_prob for _, recipe in CASES)
    assert all(recipe.randaugment for _, recipe in CASES)


@pytest.mark.parametrize(("split", "recipe"), CASES)
@pytest.mark.parametrize("batch_size", [7, 64])
def test_a_tape_gives_the_live_teachers_outputs_bit_for_bit(
    tmp_path: Path, split: Split, recipe: ViewConfig, batch_size: int
) -> None:
    teacher = make_teacher(split, recipe)
    tape = make_tape(tmp_path / "tape", split, recipe, teacher)
    record(tape, split, teacher, SilentProgress(), views=2)
    replayed = outputs_of(replay(open_tape(tape.path)), split, recipe, 2, batch_size)
    asked = outputs_of(live(teacher), split, recipe, 2, batch_size, seed=8)
    assert replayed.keys() == asked.keys()
    for key, (label, logits) in replayed.items():
        assert torch.equal(label, asked[key][0])
        assert torch.equal(logits, asked[key][1])


def test_photos_are_decoded_once_for_all_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Counted(Photos):
        def read(self, position: int) -> NDArray[np.uint8]:
            read.append(position)
            return super().read(position)

    split, teacher = Counted(40), make_teacher(Photos(40), PHOTO_VIEW)
    once = make_tape(tmp_path / "once", split, PHOTO_VIEW, teacher, views=3)
    record(once, split, teacher, SilentProgress(), views=3)
    assert len(read) == 40 + 32  # and a sample, to know how large the copy would be
    assert sorted(path.name for path in once.path.iterdir()) == [
        ".lock", "digests.bin", "records.bin", "tape.json", "validation.safetensors"
    ]  # fmt: skip
    monkeypatch.setattr(recording, "worth_decoding", lambda *_, **__: False)
    again = make_tape(tmp_path / "again", split, PHOTO_VIEW, teacher, views=3)
    record(again, split, teacher, SilentProgress(), views=3)
    assert (once.path / "records.bin").read_bytes() == (again.path / "records.bin").read_bytes()


def test_a_copy_that_a_killed_recording_left_is_used(tmp_path: Path) -> None:
    split, teacher = Photos(40), make_teacher(Photos(40), PHOTO_VIEW)
    whole = make_tape(tmp_path / "whole", split, PHOTO_VIEW, teacher, views=2)
    record(whole, split, teacher, SilentProgress(), views=2)
    begun = make_tape(tmp_path / "begun", split, PHOTO_VIEW, teacher, views=2)
    write_decoded(split, begun.path / "decoded.arrow", lambda _: None)
    lost = Photos(40, broken=frozenset(range(40)))  # whatever is read now is read from the copy
    record(begun, lost, teacher, SilentProgress(), views=2)
    assert (whole.path / "records.bin").read_bytes() == (begun.path / "records.bin").read_bytes()
    assert not (begun.path / "decoded.arrow").exists()


def test_what_killed_decodings_left_is_removed(tmp_path: Path) -> None:
    split, teacher = Photos(40), make_teacher(Photos(40), PHOTO_VIEW)
    tape = make_tape(tmp_path / "tape", split, PHOTO_VIEW, teacher, views=2)
    (tape.path / ".decoded.arrow.k1ll3d").write_bytes(b"half")
    record(tape, split, teacher, SilentProgress(), views=2)
    assert not [path.name for path in tape.path.iterdir() if "decoded" in path.name]


def test_room_that_the_records_will_take_is_not_taken_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(recording, "worth_decoding", lambda *_, reserved: asked.append(reserved))
    split, teacher = Photos(40), make_teacher(Photos(40), PHOTO_VIEW)
    tape = make_tape(tmp_path / "tape", split, PHOTO_VIEW, teacher, views=300)
    monkeypatch.setattr(recording, "write_pieces", lambda *_: None)
    record(tape, split, teacher, SilentProgress(), views=300)
    assert asked == [tape.manifest.bytes] == [300 * 40 * 40]


def test_pieces_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    split, recipe = HeldImages(1100), HELD_VIEW
    tape = make_tape(tmp_path / "tape", split, recipe, make_teacher(split, recipe), "hard")
    manifest = tape.manifest.model_copy(update={"records_per_chunk": 768})
    pieces = Pieces(manifest, np.array([[0, 0], [0, 1], [1, 1]]))
    expected = [
        (0, 0, 256),
        (0, 256, 512),
        (0, 512, 768),
        (0, 768, 1024),
        (0, 1024, 1100),
        (1, 768, 1024),
        (1, 1024, 1100),
    ]
    assert list(pieces) == expected
    assert (len(pieces), pieces.records) == (7, 1100 + 332)
    huge = manifest.model_copy(update={"data": {**manifest.data, "images": 1_281_167}, "records_per_chunk": 4096})
    chunks_M2 = np.argwhere(np.ones((300, huge.chunks), bool))
    before = tracemalloc_peak(lambda: Pieces(huge, chunks_M2))
    assert before < 10 * 2**20  # 1.5 million pieces of 100 bytes and more would not fit
    assert (pieces := Pieces(huge, chunks_M2))[len(pieces) - 1] == Piece(299, 1_281_024, 1_281_167)


def tracemalloc_peak(make: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        make()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class Interrupt(SilentProgress):
    """Stops a recording after so many pieces."""

    def __init__(self, pieces: int) -> None:
        self.left = pieces

    def step(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("pieces", [1, 3, 7])
def test_an_interrupted_recording_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, pieces: int) -> None:
    split, recipe = CASES[0]
    teacher = make_teacher(split, recipe)
    whole, broken = (make_tape(tmp_path / name, split, recipe, teacher, "hard") for name in ("whole", "broken"))
    record(whole, split, teacher, SilentProgress(), views=2)
    with pytest.raises(KeyboardInterrupt):
        record(broken, split, teacher, Interrupt(pieces), views=2)
    assert broken.complete().sum() == pieces
    record(broken, split, teacher, SilentProgress(), views=2)
    for name in ("records.bin", "digests.bin", "tape.json"):
        assert (whole.path / name).read_bytes() == (broken.path / name).read_bytes()


def whole(tape: Tape) -> NDArray[np.bool_]:
    """Which records lie in complete chunks, by view and position."""
    return np.repeat(tape.complete(), tape.manifest.records_per_chunk, 1)[:, : tape.manifest.images]


@settings(max_examples=25)
@given(
    images=st.integers(1, 90),
    groups=st.integers(1, 3),
    repeated=st.integers(1, 2),
    chunk=st.integers(1, 40),
    piece=st.integers(1, 40),
    stopped=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=3),
)
def test_a_view_and_an_image_find_their_own_record_however_it_was_recorded(
    images: int, groups: int, repeated: int, chunk: int, piece: int, stopped: list[tuple[int, int]]
) -> None:
    """Chunks and pieces of any size; recordings by several processes that are stopped after some pieces each, and gone on with by
    another number of them. What is committed is recorded once."""
    split, recipe = HeldImages(images), HELD_VIEW.model_copy(update={"repeated_aug": repeated})
    views = groups * repeated
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(recording, "PIECE_RECORDS", piece)
        patched.setattr("os.fsync", lambda _: None)
        teacher = make_teacher(split, recipe, classes=2)
        tape = make_tape(Path(folder) / "tape", split, recipe, teacher, views=views, chunk=chunk)
        for count, pieces in [*stopped, (1, 10**6)]:
            shares = [missing_pieces(tape, views, (rank, count)) for rank in range(count)]
            shared = [(view, place) for share in shares for view, start, stop in share for place in range(start, stop)]
            assert sorted(shared) == [tuple(one) for one in np.argwhere(~whole(tape)).tolist()]
            for mine in shares:
                encoded = []
                for view, start, stop in itertools.islice(mine, pieces):
                    index_B = tape.manifest.order(view)[start:stop]
                    encoded.append(encode(torch.tensor([[view, image] for image in index_B]).float(), "all"))
                with contextlib.suppress(ValueError):  # as a process that is killed: fewer records than pieces
                    write_pieces(tape, mine, encoded, SilentProgress())
        view_M, index_M = (part.ravel() for part in np.indices((views, images)))
        found = tape.outputs(view_M, index_M).logits_BK
        assert found is not None
        assert found.int().tolist() == np.stack([view_M, index_M], 1).tolist()


def test_workers_record_the_same_bytes(tmp_path: Path) -> None:
    split, recipe = CASES[1]
    teacher = make_teacher(split, recipe)
    tapes = [make_tape(tmp_path / str(workers), split, recipe, teacher) for workers in (0, 2)]
    for workers, tape in zip((0, 2), tapes, strict=True):
        record(tape, split, teacher, SilentProgress(), workers=workers, views=2)
    assert (tapes[0].path / "records.bin").read_bytes() == (tapes[1].path / "records.bin").read_bytes()


@pytest.fixture
def recorded(tmp_path: Path) -> Tape:
    split, recipe = CASES[0]
    teacher = make_teacher(split, recipe)
    tape = make_tape(tmp_path / "tape", split, recipe, teacher)
    record(tape, split, teacher, SilentProgress(), views=2)
    return tape


def test_verify_finds_nothing_where_nothing_is_wrong(recorded: Tape) -> None:
    split, recipe = CASES[0]
    found = verify(recorded, split, make_teacher(split, recipe), samples=64)
    assert found == {"chunks": 10, "sampled": found["sampled"], "different": 0, "exact": True}
    assert found["sampled"] >= 32


def test_verify_catches_one_flipped_byte(recorded: Tape) -> None:
    content = bytearray((recorded.path / "records.bin").read_bytes())
    content[len(content) // 3] ^= 64
    (recorded.path / "records.bin").write_bytes(content)
    split, recipe = CASES[0]
    with pytest.raises(UserError, match=r"damaged: checksum mismatch in records .* of view 0"):
        verify(open_tape(recorded.path), split, make_teacher(split, recipe))


def test_verify_catches_another_teacher_and_another_recipe(recorded: Tape) -> None:
    split, recipe = CASES[0]
    with pytest.raises(UserError, match=r"the teacher's outputs differ from the tape's for .* views"):
        verify(recorded, split, make_teacher(split, recipe, seed=1))
    other = recorded.manifest.model_copy(
        update={"view": recorded.manifest.view.model_copy(update={"mixup_alpha": 0.4})}
    )
    with pytest.raises(UserError, match="outputs differ from the tape"):
        verify(Tape(recorded.path, other, writable=False), split, make_teacher(split, recipe))


def test_verify_catches_a_changed_hard_label_of_a_validation_image(recorded: Tape) -> None:
    split, recipe = CASES[0]
    save_tensors({"labels": torch.tensor([0, 1, 2, 3, 3])}, recorded.path / "validation.safetensors")
    with pytest.raises(UserError, match=r"validation\.safetensors: damaged"):
        verify(open_tape(recorded.path), split, make_teacher(split, recipe))


def test_nan_differs_from_every_logit() -> None:
    recorded = encode(torch.zeros(3, 4), "all")
    computed = recorded.copy()
    computed["logits"][1, 2] = np.nan
    computed["logits"][2] += recording.LOGIT_TOLERANCE / 2
    assert recording._differing(recorded, computed, recording.LOGIT_TOLERANCE) == 1
    assert recording._differing(computed, computed, recording.LOGIT_TOLERANCE) == 1


def test_verify_of_an_empty_tape_says_so(tmp_path: Path) -> None:
    split, recipe = CASES[0]
    teacher = make_teacher(split, recipe)
    with pytest.raises(UserError, match="nothing is recorded yet"):
        verify(make_tape(tmp_path / "tape", split, recipe, teacher), split, teacher)


def test_an_image_that_is_lost_ends_the_recording_by_its_name(tmp_path: Path) -> None:
    broken = Photos(37, broken=frozenset({5}))
    teacher = make_teacher(broken, PHOTO_VIEW)
    tape = make_tape(tmp_path / "tape", broken, PHOTO_VIEW, teacher)
    with pytest.raises(UserError, match=r"photo-5\.jpg: cannot be read any more"):
        record(tape, broken, teacher, SilentProgress(), views=2)


def test_more_logits_than_classes_are_refused(tmp_path: Path) -> None:
    split, recipe = CASES[0]
    with pytest.raises(UserError, match="--outputs 11: there are 10 classes"):
        make_tape(tmp_path, split, recipe, make_teacher(split, recipe), 11)


def test_a_manifest_names_the_versions_that_draws_depend_on() -> None:
    assert {"torch", "timm", "pillow", "numpy", "scipy"} <= made_with().keys()
