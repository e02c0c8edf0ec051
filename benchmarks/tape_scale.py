"""A tape of ImageNet's size, simulated: writing and reading rates, memory, sizes against the formula.

    python benchmarks/tape_scale.py [--images 1281167] [--views 300] [--outputs hard|10]

The teacher is trivial (its logits are drawn at random beforehand) and there are no images, so that what is timed is the tape:
the order of each view's pairs, records written piece by piece and committed chunk by chunk as `deit tape record` does it, then
batches read as a training reads them (1,024 images of one view in shuffled order). Memory is what the process holds itself
(RssAnon); pages of the mapped file are the system's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from deitkit.config import AUGMENT_PRESETS
from deitkit.distill.encoding import OutputKind, Records, encode
from deitkit.distill.record import made_with, missing_pieces, records_per_chunk, write_pieces
from deitkit.distill.tape import Manifest, Tape, create, open_tape
from deitkit.terminal import SilentProgress

CLASSES, BATCH_SIZE = 1000, 1024


def held_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def manifest_of(images: int, views: int, outputs: OutputKind) -> Manifest:
    manifest = Manifest(
        teacher={"name": "trivial", "state": "", "chunk_size": 1, "dtype": "float32"},
        classes=tuple(map(str, range(CLASSES))),
        data={"name": "none", "settings": {}, "images": images, "train": "", "validation": ""},
        view=AUGMENT_PRESETS["deit"], outputs=outputs, views=views, records_per_chunk=64, made_with=made_with(),
        accuracy={"n": 1, "top1": 1.0},
    )  # fmt: skip
    return manifest.model_copy(update={"records_per_chunk": records_per_chunk(manifest.record_bytes)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--views", type=int, default=300)
    parser.add_argument("--outputs", default="hard")
    parser.add_argument("--folder", type=Path, help="where the tape is made, and removed again")
    given = parser.parse_args()
    outputs = given.outputs if given.outputs == "hard" else int(given.outputs)
    manifest = manifest_of(given.images, given.views, outputs)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        tape = create(Path(folder) / "tape", manifest, torch.zeros(1, dtype=torch.int64))
        chunk = encode(torch.randn(manifest.records_per_chunk, CLASSES), outputs)
        print(f"{given.images:,} images x {given.views} views, {manifest.record_bytes} bytes a record")
        print(f"holding {held_megabytes():.0f} MB before the first record")
        pieces, ordering = missing_pieces(tape, given.views), [0.0]

        def teacher_records() -> Iterator[Records]:
            for piece in pieces:
                if piece.start == 0:  # as the views of the first piece need it
                    began = time.perf_counter()
                    manifest.order(piece.view)
                    ordering[0] += time.perf_counter() - began
                yield chunk[: piece.stop - piece.start]
                if piece.stop == given.images and piece.view in (0, given.views // 2, given.views - 1):
                    print(f"  view {piece.view}: holding {held_megabytes():.0f} MB", flush=True)

        started = time.perf_counter()
        write_pieces(tape, pieces, teacher_records(), SilentProgress())
        writing = time.perf_counter() - started - ordering[0]
        records = given.images * given.views
        size = (tape.path / "records.bin").stat().st_size
        formula = manifest.record_bytes * records
        print(
            f"written: {records / writing:,.0f} records/s, {size / writing / 1e6:,.0f} MB/s, with checksums and fsync"
        )
        print(f"a view's order: {ordering[0] / given.views:.2f} s ({records / ordering[0]:,.0f} images/s)")
        print(f"records.bin: {size:,} bytes; images x views x record = {formula:,} ({size - formula:+,})")
        print(f"digests.bin: {(tape.path / 'digests.bin').stat().st_size:,} bytes")
        read_batches(open_tape(tape.path), given.images, given.views)


def read_batches(tape: Tape, images: int, views: int) -> None:
    generator = np.random.default_rng(0)
    reading, count = 0.0, 0
    for view in generator.integers(0, views, 5).tolist():
        tape.manifest.positions(view)
        shuffled = generator.permutation(images)[: 100 * BATCH_SIZE]
        for start in range(0, len(shuffled), BATCH_SIZE):
            index_B = shuffled[start : start + BATCH_SIZE]
            started = time.perf_counter()
            tape.outputs(np.full(len(index_B), view), index_B)
            reading += time.perf_counter() - started
            count += len(index_B)
    print(f"read at random: {count / reading:,.0f} records/s; holding {held_megabytes():.0f} MB")


if __name__ == "__main__":
    main()
