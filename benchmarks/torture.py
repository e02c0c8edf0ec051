"""What a training survives: kills at random moments, hostile images, full disks, the loss of a process. Prints a table; the exit code is 1
if anything was lost or hung.

    python benchmarks/torture.py [--kills 30] [--images 1000] [--seed 0]      (make torture)

Kills: commands that make a student, a fitted teacher and a tape of the digits are ended by SIGKILL at random moments, again and again,
and resumed each time; the result must have the bits of one that nothing interrupted. Images: of a folder and a table of damaged, odd
and enormous ones exactly those that Pillow reads must be used, and the others counted by kind. Disks: what a command writes lies on a
file system that is too small; one line must say so, and what was saved before must be sound. Processes: one of two is killed, or the
launcher of both; all must end, and the run must resume.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HUNG_SECONDS = 180.0
SMALL = "--student deit_pico --batch-size 32 --precision float32 --train-images 200"
TRAIN = f"train digits --teacher none {SMALL} --augment deit --workers 2 --epochs"
FIT = (
    "teacher fit digits --model cifar-resnet8 --from-scratch --train-images 200 --epochs 8 --batch-size 32 --workers 1"
)
RECORD = "tape record digits --train-images 200 --views 30 --workers 1"
MOUNTS = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
DISKS_KB = (8, 60, 400, 900, 1500, 2200, 4200, 9000)
UNPRIVILEGED = "-dac_override,-dac_read_search"
"""Capabilities without which root, too, is refused a file whose permissions say so."""


class Row(NamedTuple):
    what: str
    injected: int
    survived: int
    lost: int
    hung: int


def deit(words: Sequence[str], *, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`before`: words of a command that runs it."""
    return started([*before, sys.executable, "-m", "deitkit.cli", *words])


def started(command: Sequence[str], errors: int = subprocess.STDOUT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen[str], seconds: float = HUNG_SECONDS) -> tuple[int | None, str]:
    """Exit code and output; None if it hung, and was killed."""
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def digest(folder: Path) -> str:
    """Of the weights, or of the records of a tape, and of all metrics but those of the clock."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".bin") and "checkpoints" not in file.parts:
            found.update(file.read_bytes())
    if (folder / "metrics.jsonl").is_file():
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            event = {name: value for name, value in json.loads(line).items() if name != "clock"}
            found.update(json.dumps(event, sort_keys=True).encode())
    return found.hexdigest()


# ---------------------------------------------------------------------------------------------------------- kills


def kills(place: Path, count: int, draw: random.Random) -> list[Row]:
    teacher = place / "teacher"
    code, output = finished(deit([*FIT.split(), "--out", str(teacher)]))
    assert code == 0, output
    jobs = {
        "SIGKILL while a student trains": ([*TRAIN.split(), "8"], ["--resume"]),
        "SIGKILL while a teacher is fitted": (FIT.split(), ["--resume"]),
        "SIGKILL while a tape is recorded": ([*RECORD.split(), "--teacher", str(teacher)], []),
    }
    return [
        killed(what, place / f"job-{number}", *words, max(1, count // 3), draw)
        for number, (what, words) in enumerate(jobs.items())
    ]


def killed(what: str, place: Path, words: list[str], again: list[str], count: int, draw: random.Random) -> Row:
    began = time.monotonic()
    code, output = finished(deit([*words, "--out", str(place / "whole")]))
    assert code == 0, output
    seconds, expected = time.monotonic() - began, digest(place / "whole")
    injected = survived = lost = hung = number = 0
    while injected < count:
        out, kills_of_this = place / f"run-{number}", 0
        number += 1
        while True:
            resumed = (out / "config.yaml").is_file() or (out / "tape.json").is_file()
            process = deit([*words, *(again if resumed else []), "--out", str(out)])
            if injected < count and kills_of_this < 5:
                try:
                    process.communicate(timeout=draw.uniform(0.2, 0.95) * seconds)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
                    injected, kills_of_this = injected + 1, kills_of_this + 1
                    continue
            code, output = finished(process)
            break
        same = code == 0 and digest(out) == expected
        survived += kills_of_this if same else 0
        hung += kills_of_this if code is None else 0
        lost += kills_of_this if code is not None and not same else 0
        if not same:
            print(f"{what}: exit code {code}\n{output[-2000:]}", file=sys.stderr)
    return Row(what, injected, survived, lost, hung)


# --------------------------------------------------------------------------------------------------------- images


def picture(draw: random.Random, size: tuple[int, int] = (40, 40), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, form: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def bomb() -> bytes:
    """The header of a PNG of 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def hostile_kinds(draw: random.Random) -> dict[str, Callable[[], tuple[str, bytes]]]:
    """Name of a file and its content, by kind."""

    def sixteen() -> Image.Image:
        generator = np.random.default_rng(draw.randrange(2**32))
        return Image.fromarray(generator.integers(0, 65536, (40, 40), dtype=np.uint16))

    jpeg = lambda: encoded(picture(draw), "JPEG")  # noqa: E731
    png = lambda: encoded(picture(draw), "PNG")  # noqa: E731
    return {
        "good": lambda: ("a.png", png()),
        "truncated JPEG": lambda: ("a.jpg", jpeg()[: draw.randrange(2, 900)]),
        "truncated PNG": lambda: ("a.png", png()[: draw.randrange(2, 900)]),
        "empty": lambda: ("a.jpg", b""),
        "noise": lambda: ("a.png", draw.randbytes(500)),
        "flipped bytes": lambda: ("a.jpg", flipped(jpeg(), draw)),
        "wrong suffix": lambda: ("a.jpg", png()),
        "no suffix": lambda: ("a", png()),
        "decompression bomb": lambda: ("a.png", bomb()),
        "16 bits": lambda: ("a.png", encoded(sixteen(), "PNG")),
        "CMYK": lambda: ("a.jpg", encoded(picture(draw, mode="CMYK"), "JPEG")),
        "palette with transparency": lambda: ("a.png", encoded(picture(draw, mode="P"), "PNG", transparency=3)),
        "grey with alpha": lambda: ("a.png", encoded(picture(draw, mode="LA"), "PNG")),
        "one bit": lambda: ("a.png", encoded(picture(draw, mode="1"), "PNG")),
        "animated": lambda: ("a.gif", encoded(picture(draw), "GIF", save_all=True, append_images=[picture(draw)])),
        "1 x 1": lambda: ("a.png", encoded(picture(draw, (1, 1)), "PNG")),
        "1 x 20,000": lambda: ("a.png", encoded(picture(draw, (1, 20_000)), "PNG")),
        "20,000 x 1": lambda: ("a.png", encoded(picture(draw, (20_000, 1)), "PNG")),
        "any alphabet": lambda: ("猫 🐱 ñ [x] #1.png", png()),
        "newline in the name": lambda: ("a\nb.png", png()),
        "text": lambda: ("notes.txt", b"not an image"),
        "hidden": lambda: (".a.png", png()),
    }


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(20):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def hostile_images(place: Path, count: int, draw: random.Random) -> list[Row]:
    """A folder of three classes with files of all kinds is shown, predicted and trained on; one file vanishes meanwhile."""
    photos, kinds = place / "photos", hostile_kinds(draw)
    fates: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    used = set()
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        name, content = kinds[kind]()
        split = "test" if number // len(kinds) % 4 == 3 else "train"
        folder = photos / split / ("cats", "dogs", "<b>birds</b>")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (f".{number}-{name}" if kind == "hidden" else f"{number:04d}-{name}")
        path.write_bytes(content)
        left_out = {"hidden": "hidden or system entry", "text": ".txt"}.get(kind)
        fate = left_out or ("used" if readable(content) else "unreadable")
        fates[split][fate] += 1
        used |= {str(path)} if fate == "used" else set()
    (photos / "train" / "cats" / "circle").symlink_to(photos)
    (photos / "train" / "single").mkdir()
    picture(draw).save(photos / "train" / "single" / "only.png")
    used.add(str(photos / "train" / "single" / "only.png"))
    fates["train"] += Counter({"used": 1, "link to a folder that is read elsewhere": 1})
    told, bad = f"{count:,} hostile files: deit", ["--max-bad-images", str(count)]
    rows = [shown(f"{told} data show", photos, bad, fates["train"])]

    run, settings = (
        place / "run",
        [*bad, "--teacher", "none", *SMALL.split()[:4], "--image-size", "32", "--epochs", "1"],
    )
    process = deit(["train", str(photos), *settings, "--out", str(run)])
    time.sleep(8)
    lost = next(path for path in sorted((photos / "train" / "dogs").glob("*.png")) if str(path) in used)
    content = lost.read_bytes()
    lost.unlink()
    code, output = finished(process, 300)
    lost.write_bytes(content)  # else the run would refuse to be measured on other data
    trained = sum(json.loads((run / "data.json").read_text())[name] for name in ("train", "val")) if code == 0 else 0
    expected = Counter(used=fates["train"]["used"])
    trained += trained == expected["used"] - 1  # the file had vanished before it was looked at
    rows.append(compared(f"{told} train", code, output, expected, Counter(used=trained)))

    code, output, errors = apart(["evaluate", str(run), "--split", "test", "--json"])
    measured = json.loads(output)["n"] if code == 0 else 0
    rows.append(compared(f"{told} evaluate", code, errors, Counter(used=fates["test"]["used"]), Counter(used=measured)))

    code, output, errors = apart(["predict", str(run), str(photos), "--format", "json"])
    answered = {one["image"] for one in json.loads(output)} if code in (0, 2) else set()
    right = Counter(used=len(used) - len(answered ^ used))
    # it names the unreadable ones and exits with 2: what it could read is answered
    rows.append(compared(f"{told} predict", 0 if code == 2 else code, errors, Counter(used=len(used)), right))
    return [*rows, *hostile_rows(place, kinds, draw), *locked(place, draw)]


def readable(content: bytes) -> bool:
    """Whether Pillow reads all of it. A bomb is none for a limit that others have."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > 200_000_000:
                return False
            image.load()
    except Exception:  # its plugins raise anything
        return False
    return True


def hostile_rows(place: Path, kinds: Mapping[str, Callable[[], tuple[str, bytes]]], draw: random.Random) -> list[Row]:
    """Tables whose rows hold damaged images, nothing, or text; whose image column has another type; that are cut off."""
    contents: list[bytes | None] = [kind()[1] for kind in kinds.values() for _ in range(4)]
    contents += [None, None, b"", b"text", *(encoded(picture(draw), "PNG") for _ in range(30))]
    labels = [number % 3 for number in range(len(contents))]
    expected = Counter("used" if content and readable(content) else "unreadable" for content in contents)

    def write(name: str, images: Any) -> Path:
        (place / name).mkdir()
        table = pa.table({"image": images, "label": labels})
        pq.write_table(table, place / name / "train-00000-of-00001.parquet")
        pq.write_table(table.slice(0, 3), place / name / "test-00000-of-00001.parquet")
        return place / name

    damaged = write("rows", pa.array([{"bytes": content, "path": None} for content in contents]))
    rows = [
        shown(
            f"{len(contents)} rows of a hostile table: deit data show", damaged, ["--max-bad-images", "1000"], expected
        )
    ]
    cut = write("cut", pa.array(contents)) / "train-00000-of-00001.parquet"
    cut.write_bytes(cut.read_bytes()[:-1000])
    wrong = [cut.parent, write("numbers", pa.array(labels)), write("texts", pa.array(["a"] * len(labels)))]
    for folder in wrong:
        code, output = finished(deit(["data", "show", str(folder)]))
        rows.append(refused(f"a table: {folder.name}", code, output, str(folder)))
    return rows


def locked(place: Path, draw: random.Random) -> list[Row]:
    """A sound image that may not be read."""
    for number in range(20):
        folder = place / "locked" / ("test" if number < 4 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(draw).save(folder / f"{number}.png")
    (folder / "19.png").chmod(0)
    before = []
    if os.geteuid() == 0:
        before = ["setpriv", f"--bounding-set={UNPRIVILEGED}", f"--inh-caps={UNPRIVILEGED}"]
        if (
            shutil.which("setpriv") is None
            or not subprocess.run([*before, "cat", folder / "19.png"], check=False, capture_output=True).returncode
        ):
            print("a file without permissions: not tried as root", file=sys.stderr)
            return []
    expected = Counter(used=15, unreadable=1)
    return [shown("a file without permissions among 16", place / "locked", ["--max-bad-images", "1"], expected, before)]


def shown(
    what: str, data: Path, settings: Sequence[str], expected: Mapping[str, int], before: Sequence[str] = ()
) -> Row:
    """`deit data show` counts the files as they are `expected`, by their fate."""
    code, output, errors = apart(["data", "show", str(data), *settings, "--json"], before)
    found: Counter[str] = Counter()
    if code == 0:
        said = json.loads(output)
        used = sum(said["images"].values())  # for training and validation: the test images are not opened
        found = Counter({"used": used, "unreadable": len(said["bad_images"]), **said["left_out"]})
    return compared(what, code, errors, expected, found)


def apart(words: Sequence[str], before: Sequence[str] = ()) -> tuple[int | None, str, str]:
    """Exit code, output, errors of `deit`."""
    process = started([*before, sys.executable, "-m", "deitkit.cli", *words], subprocess.PIPE)
    try:
        output, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, "", ""
    return process.returncode, output, errors


def compared(what: str, code: int | None, messages: str, expected: Mapping[str, int], found: Mapping[str, int]) -> Row:
    """Lost are the files whose fate is another than expected; all where the command failed."""
    count = sum(expected.values())
    wrong = sum(abs(expected.get(fate, 0) - found.get(fate, 0)) for fate in {*expected, *found})
    wrong = count if code != 0 or "Traceback" in messages else min(wrong, count)
    if wrong:
        print(
            f"{what}: exit code {code}, expected {dict(expected)}, found {dict(found)}\n{messages[-2000:]}",
            file=sys.stderr,
        )
    return Row(what, count, count - wrong, wrong * (code is not None), wrong * (code is None))


def refused(what: str, code: int | None, output: str, named: str) -> Row:
    """Exit code 2, and one line of error that names what it is about."""
    errors = [line for line in output.splitlines() if line.startswith("deit: error:")]
    fine = code == 2 and len(errors) == 1 and named in errors[0] and "Traceback" not in output
    if not fine:
        print(f"{what}: exit code {code}\n{output[-2000:]}", file=sys.stderr)
    return Row(what, 1, int(fine), int(not fine and code is not None), int(code is None))


# ---------------------------------------------------------------------------------------------------------- disks


def full_disks(place: Path, draw: random.Random) -> list[Row]:
    """The folder of a run on file systems of many sizes: it ends well, or with one line that says why, and what it saved is sound. What
    other commands write on one that is too small: one line that names the file and the disk."""
    if subprocess.run([*MOUNTS, "true"], check=False, capture_output=True).returncode:
        print("full disks: left out, because mounting is not allowed", file=sys.stderr)
        return []
    survived = lost = hung = 0
    for kilobytes in DISKS_KB:
        disk, copy = place / f"disk-{kilobytes}", place / f"copy-{kilobytes}"
        code, output = on_small_disk([*TRAIN.split(), "3", "--out", f"{disk}/run"], disk, kilobytes, copy)
        said = code == 0 or (code == 2 and "error:" in output and "Traceback" not in output)
        out = copy / "run"
        if said and code == 2 and (out / "config.yaml").is_file():
            # on a larger disk the run goes on from what was saved
            code, more = finished(deit(["train", "--resume", "--out", str(out)]))
            said, output = code == 0, output + more
        survived, lost, hung = survived + bool(said), lost + (not said and code is not None), hung + (code is None)
        if not said:
            print(f"disk of {kilobytes} kB: exit code {code}\n{output[-2000:]}", file=sys.stderr)
    rows = [Row("full disks: deit train", len(DISKS_KB), survived, lost, hung)]

    run, teacher = place / "whole", place / "teacher"
    for words in ([*TRAIN.split(), "1", "--out", str(run)], [*FIT.split(), "--out", str(teacher)]):
        code, output = finished(deit(words))
        assert code == 0, output
    disk = place / "disk"
    others = {
        "teacher fit": (FIT.split(), "out", 200),
        "tape record": ([*RECORD.split(), "--teacher", str(teacher)], "out", 12),
        "data cache": (["data", "cache", "digits", "--size", "64"], "out", 80),
        "export": (["export", str(run), "--format", "onnx"], "out", 200),
        "report": (["report", str(run)], "page.html", 12),
    }
    for what, (words, name, kilobytes) in others.items():
        code, output = on_small_disk([*words, "--out", str(disk / name)], disk, kilobytes)
        rows.append(refused(f"a full disk: deit {what}", code, output, str(disk)))
    return rows


def on_small_disk(words: Sequence[str], disk: Path, kilobytes: int, copy: Path | None = None) -> tuple[int | None, str]:
    """Exit code and output of `deit` where `disk` is a file system of this size, whose content is copied afterwards."""
    disk.mkdir(parents=True, exist_ok=True)
    command = shlex.join([sys.executable, "-m", "deitkit.cli", *words])
    keep = shlex.join(["cp", "-r", str(disk), str(copy)]) if copy else "true"
    mount = shlex.join(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)])
    return finished(started([*MOUNTS, "sh", "-c", f"{mount} && {{ {command}; code=$?; {keep}; exit $code; }}"]))


# ------------------------------------------------------------------------------------------------------ processes


def lost_processes(place: Path, draw: random.Random) -> list[Row]:
    """One of two processes, or the launcher of both, is killed: all end within a minute, and the run goes on with one process."""
    rows = []
    for victim in ("a process", "the launcher"):
        out = place / victim.replace(" ", "-")
        process = deit([*TRAIN.split(), "30", "--processes", "2", "--out", str(out)])
        deadline = time.monotonic() + 90
        while not (out / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        os.kill(children[-1] if victim == "a process" else process.pid, signal.SIGKILL)
        code, output = finished(process, 60)
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
            time.sleep(0.2)
        alive = any(Path(f"/proc/{pid}").exists() for pid in children)
        resumed, more = finished(deit(["train", "--resume", "--out", str(out), "--processes", "1"]), 300)
        fine = code not in (None, 0) and not alive and resumed == 0
        rows.append(
            Row(
                f"SIGKILL of {victim} of two",
                1,
                int(fine),
                int(not fine and code is not None),
                int(code is None or alive),
            )
        )
        if not fine:
            print(
                f"{victim}: {code}, alive {alive}, resumed {resumed}\n{output[-1500:]}\n{more[-1500:]}", file=sys.stderr
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kills", "images", "disks", "processes"))
    given = parser.parse_args()
    place, began, draw = Path(tempfile.mkdtemp(prefix="torture-")), time.monotonic(), random.Random(given.seed)
    parts: dict[str, Callable[[], list[Row]]] = {
        "kills": lambda: kills(place / "kills", given.kills, draw),
        "images": lambda: hostile_images(place / "images", given.images, draw),
        "disks": lambda: full_disks(place / "disks", draw),
        "processes": lambda: lost_processes(place / "processes", draw),
    }
    rows = []
    try:
        for name, part in parts.items():
            if given.only in (None, name):
                (place / name).mkdir()
                rows += part()
                print(f"{name}: done after {(time.monotonic() - began) / 60:.1f} min", file=sys.stderr)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print("| fault | injected | survived | lost | hung |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row.what} | {row.injected:,} | {row.survived:,} | {row.lost:,} | {row.hung:,} |")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes, seed {given.seed}")
    return int(any(row.lost or row.hung for row in rows))


if __name__ == "__main__":
    sys.exit(main())
