"""A tape teaches the same weights as its teacher, step for step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tests.distill.test_record import make_tape, make_teacher
from tests.fakes import HeldImages, Photos
from tests.views.test_loader import HELD_VIEW, PHOTO_VIEW

from deitkit.config import LoopConfig, LossConfig, OptimConfig, Size, ViewConfig
from deitkit.data import Split
from deitkit.distill.encoding import FeatureCode, fit_code
from deitkit.distill.record import make_manifest, record, replay, verify
from deitkit.distill.step import Plan
from deitkit.distill.tape import Tape, create, open_tape, refuse_other_views
from deitkit.distill.teacher import Teacher, TeacherSource, live_teacher
from deitkit.models.cnn import CNNConfig, build_cnn
from deitkit.models.network import Network
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import student_preprocessing
from deitkit.terminal import SilentProgress, UserError
from deitkit.training.loop import Trainer
from deitkit.training.run import RunFolder
from deitkit.views.loader import TrainLoader


def student(
    out: Path,
    split: Split,
    view: ViewConfig,
    classes: int,
    loss: str,
    source: TeacherSource,
    batch_size: int,
    workers: int = 0,
    teacher_size: Size | None = None,
    features: int = 0,
) -> dict[str, torch.Tensor]:
    """The weights of a small student after two epochs."""
    assert view.view_size is not None
    config = ViTConfig(
        image_size=view.view_size,
        channels=split.channels,
        classes=classes,
        patch_size=(4, 4),
        width=16,
        depth=1,
        heads=2,
    )
    torch.manual_seed(0)
    vit = ViT(config)
    if features:
        vit.add_feature_head(features, seed=0)
    network = Network(vit, student_preprocessing(config, photos=False))
    loader = TrainLoader(split, view, batch_size=batch_size, seed=1, workers=workers, teacher_size=teacher_size)
    plan = Plan(
        view=view,
        loss=LossConfig.model_validate({"distillation": loss, "feature_weight": 2.0 if features else 0.0}),
        optim=OptimConfig(ema_decay=0),
        loop=LoopConfig(batch_size=batch_size, seed=1),
        total_steps=2 * loader.steps_per_epoch,
    )
    run = RunFolder(out)
    run.create(plan.loop, {})
    trainer = Trainer(
        network=network,
        plan=plan,
        loader=loader,
        validation=split,
        run=run,
        progress=SilentProgress(),
        accelerator=Accelerator(cpu=True),
        teacher=source,
    )
    return {name: tensor.clone() for name, tensor in trainer.train().state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def recorded_by(path: Path, split: Split, view: ViewConfig, teacher: Teacher, outputs: str) -> Tape:
    tape = make_tape(path, split, view, teacher, outputs)
    record(tape, split, teacher, SilentProgress(), views=2)
    return open_tape(path)


@pytest.mark.parametrize("classes", [2, 10, 200, 70_000])
@pytest.mark.parametrize(("loss", "outputs"), [("hard", "hard"), ("soft", "all")])
@pytest.mark.parametrize("batch_size", [8, 20])
def test_a_tape_teaches_the_same_weights(
    tmp_path: Path, classes: int, loss: str, outputs: str, batch_size: int
) -> None:
    split = HeldImages(40, classes=classes)
    teacher = make_teacher(split, HELD_VIEW, classes)
    tape = recorded_by(tmp_path / "tape", split, HELD_VIEW, teacher, outputs)
    live = live_teacher(teacher, logits=loss != "hard")
    asked = student(tmp_path / "live", split, HELD_VIEW, classes, loss, live, batch_size)
    replayed = student(tmp_path / "replayed", split, HELD_VIEW, classes, loss, replay(tape), batch_size)
    assert same(asked, replayed)


def test_a_tape_of_all_logits_teaches_the_same_weights_by_zscores(tmp_path: Path) -> None:
    split = HeldImages(40)
    teacher = make_teacher(split, HELD_VIEW)
    tape = recorded_by(tmp_path / "tape", split, HELD_VIEW, teacher, "all")
    live = live_teacher(teacher, logits=True)
    asked = student(tmp_path / "live", split, HELD_VIEW, 10, "zscore", live, 8)
    assert same(asked, student(tmp_path / "replayed", split, HELD_VIEW, 10, "zscore", replay(tape), 8))
    soft = student(tmp_path / "soft", split, HELD_VIEW, 10, "soft", replay(tape), 8)
    assert not same(asked, soft)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("loss", "outputs", "batch_size"), [("hard", "hard", 8), ("soft", "all", 8), ("soft", "all", 15)]
)
def test_a_tape_teaches_the_same_weights_on_photos(
    tmp_path: Path, workers: int, loss: str, outputs: str, batch_size: int
) -> None:
    split = Photos(30)
    teacher = make_teacher(split, PHOTO_VIEW, 3)
    tape = recorded_by(tmp_path / "tape", split, PHOTO_VIEW, teacher, outputs)
    live = live_teacher(teacher, logits=loss != "hard")
    asked = student(tmp_path / "live", split, PHOTO_VIEW, 3, loss, live, batch_size)
    replayed = student(tmp_path / "replayed", split, PHOTO_VIEW, 3, loss, replay(tape), batch_size, workers)
    assert same(asked, replayed)


def convolutional_teacher(split: Split, classes: int = 3, side: int = 24) -> Teacher:
    """One with features, and a code of them."""
    torch.manual_seed(0)
    network = build_cnn(CNNConfig(name="cifar-resnet8", classes=classes), image_size=(side, side), pretrained=False)
    teacher = Teacher(network, name="T", num_classes=classes, chunk_size=16)
    images = [split.read(position) for position in range(len(split))]
    inputs = [torch.from_numpy(image_HWC).permute(2, 0, 1)[None] / 255 for image_HWC in images]
    teacher.code = fit_code(torch.cat([teacher.forward_with_features(image)[1] for image in inputs]))
    return teacher


@pytest.mark.parametrize("count", [1, 6, 16, 21])
def test_features_are_encoded_in_whole_chunks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A product of other rows has other last bits on some processors, and rounding to float16 may show them."""
    split = Photos(8)
    teacher = convolutional_teacher(split)
    assert teacher.code is not None
    images, rows = torch.rand(count, 3, 24, 24), []
    _, features = teacher.forward_with_features(images)
    encoded, encode = teacher.code.encode(features), FeatureCode.encode

    def counted(self: FeatureCode, features_BF: torch.Tensor) -> torch.Tensor:
        rows.append(len(features_BF))
        return encode(self, features_BF)

    monkeypatch.setattr(FeatureCode, "encode", counted)
    coded = teacher.coded_outputs(images)[1]
    assert set(rows) == {16}
    assert coded is not None
    torch.testing.assert_close(coded, encoded, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("loss", "outputs"), [("zscore", "all"), ("hard", "hard"), ("features", "features")])
def test_a_tape_with_features_teaches_the_same_weights(tmp_path: Path, loss: str, outputs: str) -> None:
    split, classes = (
        Photos(30),
        7 if loss == "features" else 3,
    )  # features can be learned from a teacher of other classes
    teacher = convolutional_teacher(split, classes)
    assert teacher.code is not None
    size = teacher.code.size
    path = tmp_path / "tape"
    data = {"name": "fakes", "settings": {}, "images": len(split), "train": "a", "validation": "b"}
    names = tuple(str(number) for number in range(classes))
    manifest = make_manifest(teacher, data, names, PHOTO_VIEW.at((24, 24)), outputs, 2, {"n": 1, "top1": 1.0})
    tape = create(path, manifest, torch.arange(5), teacher.code)
    record(tape, split, teacher, SilentProgress(), views=2)
    tape.close()
    tape = open_tape(path)
    assert tape.code() is not None
    assert tape.manifest.record_bytes == 2 * size + {"all": 12, "hard": 1, "features": 0}[outputs]
    arguments = (split, PHOTO_VIEW, 3, loss)
    live = live_teacher(teacher, logits=loss == "zscore")
    asked = student(tmp_path / "live", *arguments, live, 8, teacher_size=(24, 24), features=size)
    assert same(asked, student(tmp_path / "replayed", *arguments, replay(tape), 8, features=size))
    assert asked["body.head_features.weight"].shape == (size, 16)
    if loss != "features":
        without = student(tmp_path / "without", *arguments, replay(tape), 8)
        assert not same(without, {name: asked[name] for name in without})
    found = verify(tape, split, teacher, samples=32)
    assert (found["different"], found["exact"]) == (0, True)
    assert teacher.code is not None
    teacher.code = teacher.code._replace(basis_FP=-teacher.code.basis_FP)
    with pytest.raises(UserError, match="outputs differ from the tape"):
        verify(tape, split, teacher, samples=32)
    other = make_manifest(teacher, data, names, PHOTO_VIEW.at((24, 24)), outputs, 2, {"n": 1, "top1": 1.0})
    with pytest.raises(UserError, match="in another code: give another folder"):
        create(path, other, torch.arange(5), teacher.code)


@pytest.mark.parametrize("outputs", ["all", "hard"])
def test_one_tape_teaches_students_of_two_sizes_as_its_teacher_does(tmp_path: Path, outputs: str) -> None:
    """Recorded at the teacher's 40 pixels, for students of 16 and 24."""
    split, loss = Photos(30), "soft" if outputs == "all" else "hard"
    teacher = make_teacher(split, PHOTO_VIEW.at((40, 40)), 3)
    tape = recorded_by(tmp_path / "tape", split, PHOTO_VIEW.at((40, 40)), teacher, outputs)
    weights = []
    for side in (16, 24):
        view = PHOTO_VIEW.at((side, side))
        refuse_other_views(tape.path, tape.manifest, view)
        arguments = (split, view, 3, loss)
        live = live_teacher(teacher, logits=loss != "hard")
        asked = student(tmp_path / f"live-{side}", *arguments, live, 8, teacher_size=(40, 40))
        weights.append(student(tmp_path / f"replayed-{side}", *arguments, replay(tape), 8))
        assert same(asked, weights[-1])
        reduced = student(tmp_path / f"reduced-{side}", *arguments, live, 8)  # the teacher gets the student's pixels
        assert not same(reduced, weights[-1])
    assert weights[0]["body.pos_embed"].shape != weights[1]["body.pos_embed"].shape


@pytest.mark.parametrize("place", [0, 41, 79])
def test_one_wrong_record_changes_the_weights(tmp_path: Path, place: int) -> None:
    split = HeldImages(40)
    teacher = make_teacher(split, HELD_VIEW)
    tape = recorded_by(tmp_path / "tape", split, HELD_VIEW, teacher, "hard")
    right = student(tmp_path / "right", split, HELD_VIEW, 10, "hard", replay(tape), 8)
    content = bytearray((tape.path / "records.bin").read_bytes())
    content[place] = (content[place] + 1) % 10
    (tape.path / "records.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged: checksum mismatch in view [01], chunk [0-2]"):
        student(tmp_path / "damaged", split, HELD_VIEW, 10, "hard", replay(open_tape(tape.path)), 8)
    again = open_tape(tape.path, writable=True)
    for view in range(2):  # the wrong record, as if it had been recorded
        again.commit(view, list(range(again.manifest.chunks)))
    wrong = student(tmp_path / "wrong", split, HELD_VIEW, 10, "hard", replay(open_tape(tape.path)), 8)
    assert not same(right, wrong)
