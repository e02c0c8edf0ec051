"""A tape teaches the same weights as its teacher, step for step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tests.distill.test_record import make_tape, make_teacher
from tests.fakes import HeldImages, Photos
from tests.views.test_loader import HELD_VIEW, PHOTO_VIEW

from deitkit.config import LoopConfig, LossConfig, OptimConfig, ViewConfig
from deitkit.data import Split
from deitkit.distill.record import Replay, record
from deitkit.distill.tape import Tape, open_tape
from deitkit.distill.teacher import Teacher
from deitkit.models.network import Network
from deitkit.models.vit import ViT, ViTConfig
from deitkit.models.zoo import student_preprocessing
from deitkit.terminal import SilentProgress, UserError
from deitkit.training.loop import Plan, TeacherSource, Trainer, live_teacher
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
    network = Network(ViT(config), student_preprocessing(config, photos=False))
    loader = TrainLoader(split, view, batch_size=batch_size, seed=1, workers=workers)
    plan = Plan(
        view=view,
        loss=LossConfig.model_validate({"distillation": loss}),
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


def taped(path: Path, split: Split, view: ViewConfig, teacher: Teacher, answers: str) -> Tape:
    tape = make_tape(path, split, view, teacher, answers)
    record(tape, split, teacher, SilentProgress(), views=2)
    return open_tape(path)


@pytest.mark.parametrize("classes", [2, 10, 200, 70_000])
@pytest.mark.parametrize(("loss", "answers"), [("hard", "hard"), ("soft", "all")])
@pytest.mark.parametrize("batch_size", [8, 20])
def test_a_tape_teaches_the_same_weights(
    tmp_path: Path, classes: int, loss: str, answers: str, batch_size: int
) -> None:
    split = HeldImages(40, classes=classes)
    teacher = make_teacher(split, HELD_VIEW, classes)
    tape = taped(tmp_path / "tape", split, HELD_VIEW, teacher, answers)
    live = live_teacher(teacher, LossConfig.model_validate({"distillation": loss}))
    asked = student(tmp_path / "live", split, HELD_VIEW, classes, loss, live, batch_size)
    replayed = student(tmp_path / "replayed", split, HELD_VIEW, classes, loss, Replay(tape), batch_size)
    assert same(asked, replayed)


@pytest.mark.parametrize("loss", ["zscore", "dist", "dkd"])
def test_a_tape_of_all_logits_teaches_the_same_weights_by_every_loss(tmp_path: Path, loss: str) -> None:
    split = HeldImages(40)
    teacher = make_teacher(split, HELD_VIEW)
    tape = taped(tmp_path / "tape", split, HELD_VIEW, teacher, "all")
    live = live_teacher(teacher, LossConfig.model_validate({"distillation": loss}))
    asked = student(tmp_path / "live", split, HELD_VIEW, 10, loss, live, 8)
    assert same(asked, student(tmp_path / "replayed", split, HELD_VIEW, 10, loss, Replay(tape), 8))
    soft = student(tmp_path / "soft", split, HELD_VIEW, 10, "soft", Replay(tape), 8)
    assert not same(asked, soft)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("loss", "answers", "batch_size"), [("hard", "hard", 8), ("soft", "all", 8), ("soft", "all", 15)]
)
def test_a_tape_teaches_the_same_weights_on_photos(
    tmp_path: Path, workers: int, loss: str, answers: str, batch_size: int
) -> None:
    split = Photos(30)
    teacher = make_teacher(split, PHOTO_VIEW, 3)
    tape = taped(tmp_path / "tape", split, PHOTO_VIEW, teacher, answers)
    live = live_teacher(teacher, LossConfig.model_validate({"distillation": loss}))
    asked = student(tmp_path / "live", split, PHOTO_VIEW, 3, loss, live, batch_size)
    replayed = student(tmp_path / "replayed", split, PHOTO_VIEW, 3, loss, Replay(tape), batch_size, workers)
    assert same(asked, replayed)


@pytest.mark.parametrize("place", [0, 41, 79])
def test_one_wrong_record_changes_the_weights(tmp_path: Path, place: int) -> None:
    split = HeldImages(40)
    teacher = make_teacher(split, HELD_VIEW)
    tape = taped(tmp_path / "tape", split, HELD_VIEW, teacher, "hard")
    right = student(tmp_path / "right", split, HELD_VIEW, 10, "hard", Replay(tape), 8)
    content = bytearray((tape.path / "records.bin").read_bytes())
    content[place] = (content[place] + 1) % 10
    (tape.path / "records.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged: view [01], chunk [0-2] is not as it was written"):
        student(tmp_path / "damaged", split, HELD_VIEW, 10, "hard", Replay(open_tape(tape.path)), 8)
    again = open_tape(tape.path, writable=True)
    for view in range(2):  # the wrong record, as if it had been recorded
        again.commit(view, list(range(again.card.chunks)))
    wrong = student(tmp_path / "wrong", split, HELD_VIEW, 10, "hard", Replay(open_tape(tape.path)), 8)
    assert not same(right, wrong)
