"""One tape for all contenders that ask the same teacher about the same views: recorded once, whatever their loss or seed."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deitkit.compare.plan import Contender, short_name
from deitkit.config import RunConfig
from deitkit.distill.tape import NAMES_ONLY, AnswerKind, is_tape, open_tape, read_card
from deitkit.distill.teacher import load_teacher, members_of
from deitkit.models.network import default_device
from deitkit.terminal import Progress, UserError, is_filled, write_atomically
from deitkit.training.jobs import fit_automatically, fit_key, run_record
from deitkit.training.setup import automatic_fit, with_teacher
from deitkit.training.teaching import needed_answers

TAPES = "tapes"
"""In the folder of a comparison."""
LEARNED = "teachers.json"
"""In the folder of a comparison: which networks its runs learned from."""
CLOCK = "recording.json"
"""In a tape's folder: how long its recording took."""


@dataclass(frozen=True, kw_only=True)
class TapeNeed:
    """A tape that contenders learn from."""

    path: Path
    members: tuple[Contender, ...]
    answers: AnswerKind

    def views(self, frozen: int | None) -> int:
        """As many as the longest run shows."""
        return max(member.views(frozen) for member in self.members)

    def complete(self, views: int) -> bool:
        return complete_views(self.path) >= views


def tape_needs(contenders: Sequence[Contender], folder: Path) -> list[TapeNeed]:
    """The tapes in `folder` that `contenders` learn from, each with the richest answers that one of them needs."""
    groups: dict[str, list[Contender]] = {}
    for contender in contenders:
        if contender.config.teacher.present:
            groups.setdefault(_key(contender), []).append(contender)
    needs = []
    for key, members in groups.items():
        answers: AnswerKind = "all" if any(needed_answers(one.config) == "all" for one in members) else "hard"
        name = f"{short_name(str(members[0].config.teacher.teacher))}-{key}-{answers}"
        needs.append(TapeNeed(path=folder / name, members=tuple(members), answers=answers))
    return needs


def teacher_of(tape: Path) -> str:
    """What the name of a tape says of its teacher, views and images; not how much of its answers is kept."""
    return tape.name.rpartition("-")[0]


def _key(contender: Contender) -> str:
    """A hash of all that a tape depends on but its length and the kind of its answers."""
    config, dataset = contender.config, contender.dataset
    fit = None if contender.automatic is None else fit_key(automatic_fit(dataset, contender.automatic))
    what = {
        "teacher": config.teacher.model_dump(),
        "fit": fit,
        "view": config.view.model_dump(exclude=NAMES_ONLY),
        "data": config.data.split_settings(),
        "names_hash": contender.names_hash,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]


def check_teachers(needs: Sequence[TapeNeed], out: Path, frozen: int | None) -> None:
    """Raises UserError naming a contender whose teacher cannot be loaded, knows other classes, or is no longer the one whose
    answers are on the tape that bears its name, or from which runs in `out` have learned. A tape that is whole stands for a
    teacher that is gone or elsewhere; teachers that are yet to be fitted are not looked at."""
    learned = _learned_from(out)
    for need in needs:
        contender = need.members[0]
        teacher = contender.config.teacher
        whole = need.complete(need.views(frozen))
        if contender.automatic is not None or (whole and not _is_here(str(teacher.teacher))):
            continue
        try:
            loaded = load_teacher(
                str(teacher.teacher),
                contender.dataset.classes,
                chunk_size=teacher.teacher_chunk_size,
                device=default_device(),
                image_size=teacher.size,
            )
        except UserError as error:
            raise UserError(f"contender {contender.name!r}: {error}") from error
        state = loaded.state_hash()
        other = f"contender {contender.name!r}: {teacher.teacher} is now another network than the one"
        if learned.get(need.path.name, state) != state:
            raise UserError(f"{other} that runs in {out} have learned from: give that one, or another --out")
        if is_tape(need.path) and read_card(need.path).teacher["state"] != state:
            raise UserError(
                f"{other} whose answers are on {need.path}: give that one, or remove that folder to record it again"
            )


def _is_here(teacher: str) -> bool:
    """Whether a teacher, or all that are averaged, can be looked at without asking a hub."""
    return all(Path(one.partition("@")[2] or one).exists() for one in members_of(teacher))


def _learned_from(out: Path) -> dict[str, str]:
    """Hash of the teacher's weights by name of the tape, of all tapes that were recorded for the comparison in `out`."""
    try:
        found = json.loads((out / LEARNED).read_text(encoding="utf-8"))
        return {str(name): str(state) for name, state in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def record_tape(need: TapeNeed, location: str, out: Path, views: int, progress: Progress) -> None:
    """Record what is missing of the first `views` views, fitting the teacher first where that is asked for. How long it
    took is kept in the tape's folder. Raises UserError."""
    if is_filled(need.path) and not is_tape(need.path):
        raise UserError(
            f"{need.path}: is no tape any more (tape.json is missing): remove that folder to record it again"
        )
    if not need.complete(views):
        _record_missing(need, location, out, views, progress)
    learned = {**_learned_from(out), need.path.name: read_card(need.path).teacher["state"]}
    write_atomically(out / LEARNED, json.dumps(learned, indent=2) + "\n")


def _record_missing(need: TapeNeed, location: str, out: Path, views: int, progress: Progress) -> None:
    config = taught_by(need, location, out, progress)
    if is_tape(need.path) and config.teacher.teacher_precision == "auto":  # as it was begun, perhaps on another machine
        config = with_teacher(config, teacher_precision=read_card(need.path).teacher["dtype"])
    began = time.perf_counter()
    clock = recording_clock(need.path)
    before = recorded_views(need.path)
    try:
        info = run_record(location, config, need.path, views=views, answers=need.answers, progress=progress)
        clock["view_seconds"] = info["seconds"] / (recorded_views(need.path) - before)
        clock["start_seconds"] = time.perf_counter() - began - info["seconds"]
    finally:  # also what an interrupted recording took
        clock["seconds"] += time.perf_counter() - began
        if is_tape(need.path):
            write_atomically(need.path / CLOCK, json.dumps(clock, indent=2) + "\n")


def taught_by(need: TapeNeed, location: str, out: Path, progress: Progress) -> RunConfig:
    """The settings that a tape is recorded with; the teacher that `auto` stands for is fitted beside `out`, or found."""
    contender = need.members[0]
    if contender.automatic is None:
        return contender.config
    fitted = fit_automatically(location, contender.dataset, contender.automatic, out, progress)
    return with_teacher(contender.config, teacher=str(fitted))


def complete_views(path: Path) -> int:
    """Views that are recorded whole; 0 where there is no tape."""
    if not is_tape(path):
        return 0
    tape = open_tape(path)
    try:
        return tape.complete_views()
    finally:
        tape.close()


def recorded_views(path: Path) -> float:
    """Like `complete_views`, with parts of views: the share of their slots that is recorded."""
    if not is_tape(path):
        return 0
    tape = open_tape(path)
    try:
        slots_C = [stop - start for start, stop in map(tape.slots, range(tape.card.chunks))]
        return float((tape.complete() @ slots_C).sum()) / tape.card.images
    finally:
        tape.close()


def recording_clock(path: Path) -> dict[str, float]:
    """seconds: what the recording has taken so far; view_seconds: what another view takes, start_seconds: what going on with it
    takes besides. Zeros where that is not known."""
    unknown = {"seconds": 0.0, "view_seconds": 0.0, "start_seconds": 0.0}
    try:
        found = json.loads((path / CLOCK).read_text(encoding="utf-8"))
        clock = {key: float(found.get(key) or 0.0) for key in unknown}
        return clock if all(map(math.isfinite, clock.values())) else unknown
    except (OSError, ValueError, AttributeError, TypeError, OverflowError):
        return unknown
