"""What a training survives: kills at random moments, hostile images, full disks, the loss of a process. Prints a table; the exit code is 1
if anything was lost or hung.

    python benchmarks/torture.py [--kills 30] [--images 1000] [--seed 0]      (make torture)

Kills: commands that make a student, a fitted teacher and a tape of the digits are ended by SIGKILL at random moments, again and again, and
resumed each time; the result must have the bits of one that nothing interrupted. Images: a folder of damaged, odd and enormous files
must be shown and trained on. Disks: the folder of a run lies on a file system that is too small; what was saved before must be sound.
Processes: one of two is killed, or the launcher of both; all must end, and the run must resume.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

HUNG_SECONDS = 180.0
SMALL = "--student deit_pico --batch-size 32 --precision float32 --train-images 300"
TRAIN = f"train digits --teacher none {SMALL} --augment deit --epochs 12 --workers 2"
FIT = (
    "teacher fit digits --model cifar-resnet8 --from-scratch --train-images 300 --epochs 12 --batch-size 32 --workers 1"
)
RECORD = "tape record digits --train-images 300 --views 40 --workers 1"


class Row(NamedTuple):
    what: str
    injected: int
    survived: int
    lost: int
    hung: int


def deit(words: Sequence[str], *, before: str = "", **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deitkit.cli", *words]
    if before:
        command = ["unshare", "--mount", "sh", "-c", f'{before} && exec "$0" "$@"', *command]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True, **quiet)  # type: ignore[call-overload,no-any-return]


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
        "SIGKILL while a student trains": (TRAIN.split(), ["--resume"]),
        "SIGKILL while a teacher is fitted": (FIT.split(), ["--resume"]),
        "SIGKILL while a tape is recorded": ([*RECORD.split(), "--teacher", str(teacher)], []),
    }
    return [
        killed(what, place / f"job-{number}", *words, count // 3, draw)
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
                    process.communicate(timeout=draw.uniform(0.1, 0.95) * seconds)
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
    """A folder of three classes with files of all kinds is shown, trained on and predicted; one file vanishes meanwhile."""
    photos, kinds = place / "photos", hostile_kinds(draw)
    names = list(kinds)
    for number in range(count):
        name, content = kinds[names[number % len(names)]]()
        folder = photos / ("cats", "dogs", "<b>birds</b>")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}-{name}" if not name.startswith(".") else folder / f".{number}-{name}").write_bytes(
            content
        )
    (photos / "cats" / "circle").symlink_to(photos)
    (photos / "single").mkdir()
    picture(draw).save(photos / "single" / "only.png")
    (photos / "cats" / "0000-locked.png").write_bytes(b"")
    (photos / "cats" / "0000-locked.png").chmod(0)
    settings = [
        "--max-bad-images",
        str(count),
        "--teacher",
        "none",
        *SMALL.split()[:4],
        "--image-size",
        "32",
        "--epochs",
        "1",
    ]
    commands = {
        "data show": ["data", "show", str(photos), "--max-bad-images", str(count)],
        "train": ["train", str(photos), *settings, "--out", str(place / "run")],
        "predict": ["predict", str(place / "run"), str(photos), "--format", "json"],
        "evaluate": ["evaluate", str(place / "run"), "--split", "test"],
    }
    rows = []
    for name, words in commands.items():
        process = deit(words)
        if name == "train":
            time.sleep(8)
            next(path for path in sorted((photos / "dogs").glob("*.png"))).unlink(missing_ok=True)
        code, output = finished(process, 300)
        # predict names the unreadable ones and exits with 2: what it could read is answered
        fine = code in ((0, 2) if name == "predict" else (0,)) and "Traceback" not in output
        rows.append(
            Row(
                f"{count:,} hostile images: deit {name}",
                count,
                count if fine else 0,
                0 if fine or code is None else count,
                count * (code is None),
            )
        )
        if not fine:
            print(f"{name}: exit code {code}\n{output[-2000:]}", file=sys.stderr)
    return rows


# ---------------------------------------------------------------------------------------------------------- disks


def full_disks(place: Path, draw: random.Random) -> list[Row]:
    """The folder of a run on file systems of many sizes: it ends well, or with one line that says why, and what it saved is sound."""
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        print("full disks: left out, because mounting needs root", file=sys.stderr)
        return []
    survived = lost = hung = 0
    sizes = [8, 60, 400, 900, 1500, 2200, 4200, 9000]
    for kilobytes in sizes:
        disk, copy = place / f"disk-{kilobytes}", place / f"copy-{kilobytes}"
        disk.mkdir(parents=True)
        keep = f'cp -r "{disk}" "{copy}"'
        command = f'"{sys.executable}" -m deitkit.cli {TRAIN.replace("12", "3")} --out "{disk}/run"'
        script = f'mount -t tmpfs -o size={kilobytes}k none "{disk}" && {{ {command}; code=$?; {keep}; exit $code; }}'
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        code, output = finished(process)
        said = code == 0 or (code == 2 and "error:" in output and "Traceback" not in output)
        out = copy / "run"
        if (
            said and code == 2 and (out / "config.yaml").is_file()
        ):  # on a larger disk the run goes on from what was saved
            code, more = finished(deit(["train", "--resume", "--out", str(out)]))
            said, output = code == 0, output + more
        survived, lost, hung = survived + bool(said), lost + (not said and code is not None), hung + (code is None)
        if not said:
            print(f"disk of {kilobytes} kB: exit code {code}\n{output[-2000:]}", file=sys.stderr)
    return [Row("full disks", len(sizes), survived, lost, hung)]


# ------------------------------------------------------------------------------------------------------ processes


def lost_processes(place: Path, draw: random.Random) -> list[Row]:
    """One of two processes, or the launcher of both, is killed: all end within a minute, and the run goes on with one process."""
    rows = []
    for victim in ("a process", "the launcher"):
        out = place / victim.replace(" ", "-")
        words = TRAIN.replace("--epochs 12", "--epochs 60 --processes 2").split()
        process = deit([*words, "--out", str(out)])
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
