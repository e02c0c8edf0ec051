"""Image folders: layout, order, bad input, and a test split that stays shut. Every kind of image file becomes the right
upright pixels, or an UnreadableImage that says why."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from deitkit.config import DataConfig
from deitkit.data import Dataset, UnreadableImage, load_data, refuse_among_images
from deitkit.data import dataset as scan
from deitkit.data.decode import Shape, decode, probe, with_channels
from deitkit.data.folder import FolderSplit, class_folders, class_folders_split
from deitkit.terminal import UserError

MakeFolder = Callable[[Mapping[str, int]], Path]
SPLITS = {"train/cat": 6, "train/dog": 4, "val/cat": 2, "val/dog": 1, "test/cat": 3, "test/dog": 3}
RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (6, 9, 3), np.uint8)
GREY = RANDOM.integers(0, 256, (6, 9), np.uint8)


def load(root: Path, **config: int) -> Dataset:
    return load_data(str(root), DataConfig(**config))


def names(dataset: Dataset, split: str) -> list[str]:
    opened = dataset.open_split(split)  # type: ignore[arg-type]
    return [opened.name(position) for position in range(len(opened))]


def test_three_splits_are_taken_as_they_are(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    dataset = load(root)
    assert dataset.classes == ("cat", "dog")
    assert dataset.name == "photos"
    assert dataset.mirror_safe
    assert dataset.image_size == (6, 5)
    assert dataset.channels == 3
    assert [len(dataset.open_split(split)) for split in ("train", "val", "test")] == [10, 3, 6]
    train = dataset.open_split("train")
    assert train.labels_N.tolist() == [0] * 6 + [1] * 4
    assert train.name(7) == str(root / "train/dog/001.png")
    np.testing.assert_array_equal(train.read(7), np.asarray(Image.open(train.name(7))))
    assert train.pixels_NHWC is None


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_folder_may_have_three_names(make_folder: MakeFolder, name: str) -> None:
    root = make_folder({key.replace("val/", f"{name}/"): count for key, count in SPLITS.items()})
    assert len(load(root).open_split("val")) == 3


def test_validation_images_are_held_out_of_train_where_there_is_no_folder(make_folder: MakeFolder) -> None:
    dataset = load(make_folder({"train/a": 20, "train/b": 10}))
    train, validation = names(dataset, "train"), names(dataset, "val")
    assert (len(train), len(validation)) == (27, 3)
    assert not set(train) & set(validation)
    assert not dataset.has_test
    with pytest.raises(UserError, match="photos has no test split, only train, val"):
        dataset.open_split("test")


def test_class_folders_alone_are_split_in_three(make_folder: MakeFolder) -> None:
    dataset = load(make_folder({"a": 20, "b": 10}))
    parts = [names(dataset, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [21, 3, 6]
    assert len({name for part in parts for name in part}) == 30
    assert names(load(make_folder({}), data_seed=1), "test") != parts[2]


def test_subset_has_exactly_the_size_asked_for(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 20, "train/b": 10})
    dataset = load(root, train_images=9)
    assert np.bincount(dataset.open_split("train").labels_N).tolist() == [6, 3]
    assert set(names(dataset, "train")) < set(names(load(root, train_images=15), "train"))
    with pytest.raises(UserError, match="train_images is 28, but only 27"):
        load(root, train_images=28)


def test_hidden_and_other_files_are_ignored_and_deeper_images_found(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS | {".hidden/x": 1, "train/.cache": 1, "train/cat/more": 2})
    (root / "train/cat/.secret.png").write_bytes(b"")
    (root / "train/cat/notes.txt").write_text("hello")
    (root / "LICENSE").write_text("free")
    shutil.move(root / "train/cat/000.png", root / "train/cat/UPPER.PNG")
    found = [name.removeprefix(str(root / "train/cat") + os.sep) for name in names(load(root), "train")[:8]]
    assert found == ["001.png", "002.png", "003.png", "004.png", "005.png", "UPPER.PNG", "more/000.png", "more/001.png"]


def test_the_test_split_stays_shut_until_it_is_asked_for(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"garbage")
    (root / "test/cat").chmod(0)  # not even its file names can be listed, unless one is root
    try:
        dataset = load(root, max_bad_images=0)
        assert dataset.bad_images == ()
        dataset.open_split("train").read(0)
        dataset.open_split("val").read(0)
    finally:
        (root / "test/cat").chmod(0o755)
    assert dataset.has_test
    with pytest.raises(UnreadableImage, match=r"000\.png: not an image"):
        dataset.open_split("test").read(0)


def test_no_file_of_the_test_split_is_opened_in_class_folders(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder({"a": 20, "b": 10})
    test_names = names(load(root), "test")
    opened: list[str] = []
    original = Path.open

    def recorded(self: Path, *arguments: Any, **options: Any) -> Any:
        if root in self.parents:
            opened.append(str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", recorded)
    dataset = load(root)
    for split in (dataset.open_split("train"), dataset.open_split("val")):
        split.content_hash()
        split.read(0)
    assert set(opened) == {str(path) for path in root.rglob("*.png")} - set(test_names)


def test_missing_path_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: does not exist"):
        load(tmp_path / "nowhere")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no folders; expected train/"):
        load(tmp_path)


def test_folder_of_loose_images_is_refused(make_folder: MakeFolder) -> None:
    root = make_folder({"train": 3})
    with pytest.raises(UserError, match=r"train: holds no folders; expected one folder of images for each class"):
        load(root)


def test_folders_without_any_image_are_refused(make_folder: MakeFolder) -> None:
    root = make_folder({"train/a": 0, "train/b": 0})
    with pytest.raises(UserError, match=r"no images in its folders; their names end in \.bmp"):
        load(root)


def test_class_without_training_images_is_named(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="train: no readable image of class 'owl'"):
        load(make_folder(SPLITS | {"train/owl": 0, "val/owl": 3, "test/owl": 1}))


@pytest.mark.parametrize("owls", [{}, {"val/owl": 0, "test/owl": 0}])
def test_a_class_that_validation_and_test_lack_is_allowed_and_said(
    make_folder: MakeFolder, owls: Mapping[str, int]
) -> None:
    dataset = load(make_folder(SPLITS | {"train/owl": 3} | owls))
    assert "no validation image of class 'owl': validation figures say nothing of it" in dataset.notes
    assert ("test/ has no folder 'owl'" in dataset.notes) is not bool(owls)
    assert np.bincount(dataset.open_split("val").labels_N, minlength=3).tolist() == [2, 1, 0]
    assert len(dataset.open_split("test")) == 6


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_class_that_only_another_split_has_is_refused(make_folder: MakeFolder, split: str) -> None:
    root = make_folder(SPLITS | {f"{split}/crow": 1})
    with pytest.raises(UserError, match=f"{split}/ has 'crow', which train/ lacks"):
        load(root)


def test_a_pipe_is_no_image_whatever_its_name(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 5, "b": 5})
    os.mkfifo(root / "a" / "pipe.png")
    dataset = load(root)
    assert not dataset.bad_images
    assert not any("pipe.png" in name for split in ("train", "val") for name in names(dataset, split))


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines"])
def test_a_class_that_cannot_be_written_down_is_refused(make_folder: MakeFolder, name: bytes) -> None:
    root = make_folder({"a": 5, "b": 5})
    os.mkdir(os.fsencode(root) + b"/" + name)  # noqa: PTH102
    with pytest.raises(UserError, match="characters that cannot be printed: rename it"):
        load(root)


def test_a_single_class_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="holds a single class, 'cat'"):
        load(make_folder({"train/cat": 5}))


def test_test_folder_without_train_folder_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="no train/ folder"):
        load(make_folder({"test/a": 2, "test/b": 2}))


def test_two_validation_folders_are_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(UserError, match="holds both val and validation"):
        load(make_folder(SPLITS | {"validation/cat": 1}))


def test_bad_images_are_named_counted_and_left_out(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    first = root / "train/cat/002.png"
    first.write_bytes(first.read_bytes()[:-30])
    second = root / "val/cat/000.png"
    second.write_bytes(b"")
    dataset = load(root)
    assert len(dataset.bad_images) == 2
    assert dataset.bad_images[0].startswith(f"{first}: ")
    assert dataset.bad_images[1] == f"{second}: the file is empty"
    assert str(first) not in names(dataset, "train")
    assert (len(dataset.open_split("train")), len(dataset.open_split("val"))) == (9, 2)
    with pytest.raises(UserError, match=r"2 of 13 images cannot be read, more than max_bad_images = 1.*002\.png"):
        load(root, max_bad_images=1)


def test_of_very_many_images_only_the_headers_are_read(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(SPLITS)
    path = root / "train/cat/000.png"
    path.write_bytes(path.read_bytes()[:-30])
    (root / "train/cat/001.png").write_bytes(b"")
    monkeypatch.setattr(scan, "WHOLE_LIMIT", 9)
    dataset = load(root)
    assert dataset.bad_images == (f"{root / 'train/cat/001.png'}: the file is empty",)
    with pytest.raises(UnreadableImage, match=r"000\.png: "):
        dataset.open_split("train").read(0)


def test_class_whose_images_are_all_bad_is_named(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    for path in (root / "train/dog").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="photos, training images: no readable image of class 'dog'"):
        load(root)


def test_an_image_that_vanishes_after_the_scan_is_unreadable_and_named(make_folder: MakeFolder) -> None:
    train = load(make_folder(SPLITS)).open_split("train")
    Path(train.name(3)).unlink()
    with pytest.raises(UnreadableImage, match=r"003\.png: no such file"):
        train.read(3)


def test_grey_only_if_every_scanned_image_is_grey(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert load(root).channels == 1
    assert load(root).open_split("train").read(0).shape == (6, 5, 1)
    Image.new("RGB", (7, 6)).save(root / "train/dog/000.png")
    dataset = load(root)
    assert dataset.channels == 3
    assert dataset.image_size is None
    assert dataset.open_split("train").read(0).shape == (6, 5, 3)
    assert dataset.open_split("train").channels == 3


def test_coloured_test_image_becomes_grey_for_grey_data(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    for path in (*(root / "train").rglob("*.png"), *(root / "val").rglob("*.png")):
        Image.open(path).convert("L").save(path)
    test = load(root).open_split("test")
    expected = np.asarray(Image.open(test.name(0)).convert("L"))[..., None]
    np.testing.assert_array_equal(test.read(0), expected)


def test_split_survives_pickling(make_folder: MakeFolder) -> None:
    train = load(make_folder(SPLITS)).open_split("train")
    copy = pickle.loads(pickle.dumps(train))
    assert copy.name(4) == train.name(4)
    np.testing.assert_array_equal(copy.read(4), train.read(4))
    assert copy.content_hash() == train.content_hash()


def test_names_take_little_more_than_their_letters() -> None:
    names = [f"n{number:08}.JPEG".encode() for number in range(10_000)]
    places = [(Path("/photos/a"), "a/"), (Path("/photos/b"), "b/")]
    table = FolderSplit(Path("/photos"), places, [names, [b"0.png"]], np.repeat([0, 1], [10_000, 1]))
    assert table.key(0) == "a/n00000000.JPEG"
    assert table.path(9_999) == Path("/photos/a/n00009999.JPEG")
    assert len(table) == 10_001
    numbers = [pickle.dumps(array) for array in (table.labels_N, table.rows_N)]
    assert len(pickle.dumps(table)) - sum(map(len, numbers)) < 10_000 * (14 + 8 + 4) + 1000


def test_images_are_in_the_order_of_their_names_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("b.png", "B.png", "a10.png", "a9.png", "ä.png"):
        (tmp_path / "a" / name).touch()
    table = class_folders_split(tmp_path, class_folders(tmp_path), DataConfig())
    assert [table.key(row) for row in range(5)] == ["a/B.png", "a/a10.png", "a/a9.png", "a/b.png", "a/ä.png"]


def test_clothing_photos_are_all_readable(shared_data: Path) -> None:
    dataset = load(shared_data / "clothing", max_bad_images=0)
    assert len(dataset.classes) == 10
    assert dataset.channels == 3
    assert [len(dataset.open_split(split)) for split in ("train", "val", "test")] == [3068, 341, 372]
    assert min(dataset.open_split("train").read(0).shape[:2]) == 256


def test_a_link_to_a_pipe_is_no_image_and_one_in_circles_is_unreadable(make_folder: MakeFolder) -> None:
    root = make_folder(SPLITS)
    os.mkfifo(root / "pipe")
    (root / "train/cat/pipe.png").symlink_to(root / "pipe")
    (root / "train/cat/self.png").symlink_to("self.png")
    dataset = load(root)
    assert len(dataset.open_split("train")) == 10
    assert len(dataset.bad_images) == 1
    assert "train/cat/self.png: too many levels of symbolic links" in dataset.bad_images[0]


@pytest.mark.parametrize("location", ["~nobodyhere/x", "/" + "x" * 5000])
def test_a_path_that_cannot_be_is_one_line(location: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_data(location, DataConfig())


def test_how_many_images_are_set_aside_is_known(make_folder: MakeFolder) -> None:
    assert load(make_folder({"cat": 10, "dog": 10})).set_aside == 4


def test_a_folder_that_would_be_taken_for_a_class_is_refused(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder({"cat": 3, "dog": 3})
    for out in ("run", "runs/first", "cat/run"):
        with pytest.raises(
            UserError, match=rf"{out}: lies among the images of .*photos and would be taken for a class"
        ):
            refuse_among_images(str(root), root / out)
    for out in (".runs/first", "../run", "../photos-run", "."):
        refuse_among_images(str(root), root / out)
    for elsewhere in ("digits", "~nobody-has-this-name", "x" * 9999, str(root / "none")):
        refuse_among_images(elsewhere, root / "run")
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=r"runs/first: lies among the images of \. and"):
        refuse_among_images(".", Path("runs/first"))


def test_beside_a_train_folder_there_is_room_for_other_folders(make_folder: MakeFolder) -> None:
    root = make_folder({"train/cat": 3, "train/dog": 3})
    refuse_among_images(str(root), root / "runs" / "first")
    for out in ("train/run", "test", "val"):
        with pytest.raises(UserError, match="lies among the images"):
            refuse_among_images(str(root), root / out)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bit_depth: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file written by hand, for what Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *(chunk(*entry) for entry in chunks), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_colour_comes_back_pixel_for_pixel(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(saved(Image.fromarray(COLOUR), kind, **options), "x"), COLOUR)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_pixels_are_contiguous_and_writable_as_torch_wants_them(mode: str) -> None:
    image = Image.new(mode, (5, 3)) if mode != "I;16" else Image.fromarray(np.zeros((3, 5), np.uint16))
    for pixels in (decode(saved(image), "x"), with_channels(decode(saved(image), "x"), 1)):
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous


def test_grey_stays_grey_with_one_channel() -> None:
    np.testing.assert_array_equal(decode(saved(Image.fromarray(GREY)), "x"), GREY[..., None])


def test_one_bit_becomes_black_and_white() -> None:
    bits = GREY > 127
    np.testing.assert_array_equal(decode(saved(Image.fromarray(bits)), "x"), (bits * 255)[..., None])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65278, 65407, 65535]], np.uint16)
    pixels = decode(saved(Image.fromarray(values), kind), "x")
    np.testing.assert_array_equal(pixels[0, :, 0], np.rint(values[0] / 257))
    assert pixels.max() == 255


def test_sixteen_bit_pgm_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    content = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(content, "x")[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(dtype: type[np.generic]) -> None:
    content = saved(Image.fromarray(GREY.astype(dtype)), "TIFF")
    for read in (lambda: decode(content, "scan.tif"), lambda: probe(content, "scan.tif", whole=False)):
        with pytest.raises(UnreadableImage, match=r"scan\.tif: .*no known range"):
            read()


def test_cmyk_becomes_rgb() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))  # magenta and yellow ink: red
    for content in (saved(cmyk, "TIFF"), saved(cmyk, "JPEG", quality=95)):
        pixels = decode(content, "x")
        assert pixels.shape == (4, 4, 3)
        np.testing.assert_allclose(pixels[0, 0].astype(int), [255, 0, 0], atol=3)


def test_palette_becomes_its_colours() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    np.testing.assert_array_equal(decode(saved(image), "x")[0], [[10, 20, 30], [40, 50, 60], [70, 80, 90]])


def test_transparent_palette_entry_becomes_white() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    for kind in ("PNG", "GIF"):
        pixels = decode(saved(image, kind, transparency=1), "x")
        np.testing.assert_array_equal(pixels[0], [[10, 20, 30], [255, 255, 255]])


def test_alpha_is_laid_over_white() -> None:
    pixels = np.array([[[0, 100, 200, 255], [0, 100, 200, 0], [0, 100, 200, 51]]], np.uint8)
    expected = [[0, 100, 200], [255, 255, 255], [204, 224, 244]]  # 0.2 * colour + 0.8 * 255
    np.testing.assert_array_equal(decode(saved(Image.fromarray(pixels, "RGBA")), "x")[0], expected)


def test_grey_with_alpha_is_laid_over_white_and_stays_grey() -> None:
    pixels = np.array([[[100, 255], [100, 0], [100, 51]]], np.uint8)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(pixels, "LA")), "x")[0, :, 0], [100, 255, 224])


@pytest.mark.parametrize(("mode", "expected"), [("L", [[9], [255]]), ("RGB", [[9, 9, 9], [255, 255, 255]])])
def test_a_colour_declared_transparent_becomes_white(mode: str, expected: list[list[int]]) -> None:
    image = Image.fromarray(np.array([[9, 7]], np.uint8)).convert(mode)
    key = 7 if mode == "L" else (7, 7, 7)
    np.testing.assert_array_equal(decode(saved(image, transparency=key), "x")[0], expected)


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    row = b"\0" + struct.pack(">6H", 0x1200, 0x34FF, 0xFFFF, 0, 0x80FF, 0x0100)
    pixels = decode(png(2, 1, 16, 2, (b"IDAT", zlib.compress(row))), "x")
    np.testing.assert_array_equal(pixels[0], [[0x12, 0x34, 0xFF], [0, 0x80, 0x01]])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_the_probe_knows(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(COLOUR), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert upright is not None
    pixels = decode(content, "x")
    np.testing.assert_array_equal(pixels, np.asarray(upright.convert("RGB")))
    assert pixels.shape[:2] == ((9, 6) if orientation >= 5 else (6, 9))
    for whole in (True, False):
        assert probe(content, "x", whole=whole) == Shape(*pixels.shape)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow's, from within Image.open
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_counts_as_upright(exif: bytes) -> None:
    assert decode(saved(Image.fromarray(COLOUR), "JPEG", exif=exif), "x").shape == COLOUR.shape


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_probe_and_decode_agree_on_the_shape(mode: str) -> None:
    image = Image.new(mode, (5, 3)) if mode != "I;16" else Image.fromarray(np.zeros((3, 5), np.uint16))
    content = saved(image, "TIFF" if mode == "CMYK" else "PNG")
    shape = Shape(*decode(content, "x").shape)
    assert probe(content, "x", whole=False) == probe(content, "x", whole=True) == shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_file_is_found_by_probe_and_decode_alike(kind: str) -> None:
    content = saved(Image.fromarray(RANDOM.integers(0, 256, (64, 48, 3), np.uint8)), kind)
    decode(content, "x")
    for share in (0.2, 0.5, 0.9, 0.99):
        cut = content[: int(len(content) * share)]
        for read in (lambda cut=cut: decode(cut, "dog.img"), lambda cut=cut: probe(cut, "dog.img", whole=True)):
            with pytest.raises(UnreadableImage, match=r"^dog\.img: "):
                read()


def test_progressive_jpeg_that_is_truncated_is_found() -> None:
    content = saved(Image.fromarray(RANDOM.integers(0, 256, (64, 48, 3), np.uint8)), "JPEG", progressive=True)
    with pytest.raises(UnreadableImage, match="truncated"):
        probe(content[:-40], "x", whole=True)


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "the file is empty"), (b"hello, world", "not an image"), (b"\xff\xd8\xffgarbage", "."), (b"RIFFxxxx", ".")],
)
def test_what_is_no_image_is_named_with_the_reason(content: bytes, why: str) -> None:
    with pytest.raises(UnreadableImage, match=f"^cat/1.jpg: .*{why}"):
        decode(content, "cat/1.jpg")


def test_decompression_bomb_is_refused_by_its_header() -> None:
    content = png(60_000, 60_000, 8, 0, (b"IDAT", zlib.compress(b"\0")))
    for read in (lambda: decode(content, "bomb.png"), lambda: probe(content, "bomb.png", whole=False)):
        with pytest.raises(UnreadableImage, match=r"bomb\.png: too large \(3600000000 pixels, see --max-pixels\)"):
            read()


def test_missing_file_is_an_unreadable_image(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="no such file"):
        decode(tmp_path / "gone.png", "gone.png")


def test_channels_are_changed_both_ways() -> None:
    grey = GREY[..., None]
    np.testing.assert_array_equal(with_channels(grey, 3), np.repeat(grey, 3, -1))
    np.testing.assert_array_equal(with_channels(with_channels(grey, 3), 1), grey)
    assert with_channels(COLOUR, 3) is COLOUR


@pytest.mark.parametrize(("bits", "most"), [(10, 1023), (12, 4095), (14, 16383), (16, 65535)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_more_than_eight_bits_is_divided_by_the_range_that_it_uses(kind: str, bits: int, most: int) -> None:
    values = np.array([[0, most // 3, most // 2, most - 1, most]], np.uint16)
    pixels = decode(saved(Image.fromarray(values), kind), "x")
    np.testing.assert_array_equal(pixels[0, :, 0], np.rint(values[0] * (255 / most)))
    barely = decode(saved(Image.fromarray(np.array([[most + 1 if bits < 16 else most, 0]], np.uint16)), kind), "x")
    assert barely.max() == (255 if bits == 16 else round((most + 1) * 255 / (4 * most + 3)))


def test_images_that_are_nearly_black_are_told(make_folder: MakeFolder) -> None:
    root = make_folder({"a": 6, "b": 6})
    for path in root.rglob("*.png"):
        Image.fromarray(RANDOM.integers(0, 30, (6, 5), np.uint8)).save(path)
    (line,) = load(root).remarks
    assert line.startswith("images are nearly black: 8 of 8 have no value above 31 of 255, such as ")
    for path in root.rglob("*.png"):
        Image.fromarray(RANDOM.integers(0, 30, (6, 5), np.uint16) * 128).save(path)  # of 12 bits
    assert load(root).remarks == []


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "content"),
    [(b"zTXt", b"Comment\0\0"), (b"iCCP", b"x\0\0"), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0")],
)
def test_texts_and_profiles_of_any_size_are_skipped(kind: bytes, content: bytes, place: str) -> None:
    plain = saved(Image.fromarray(COLOUR))
    text = content + zlib.compress(b"a" * 3_000_000)
    chunk = struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text))
    cut = 33 if place == "before" else len(plain) - 12  # behind the header, or in front of the end
    image = plain[:cut] + chunk + plain[cut:]
    np.testing.assert_array_equal(decode(image, "x"), COLOUR)
    assert probe(image, "x", whole=True) == Shape(*COLOUR.shape)
    with pytest.raises(UnreadableImage):
        probe(image[: len(image) // 2] if place == "before" else image[:40], "x", whole=True)


def test_how_large_an_image_may_be_is_a_setting(make_folder: MakeFolder, recwarn: pytest.WarningsRecorder) -> None:
    root = make_folder({"train/a": 5, "train/b": 5})
    Image.new("1", (11_000, 10_000), 1).save(root / "train/a/large.png", compress_level=1)
    dataset = load(root)
    assert dataset.bad_images == ()
    assert not recwarn.list
    (line,) = load(root, max_pixels=109_999_999).bad_images
    assert line == f"{root / 'train/a/large.png'}: too large (110000000 pixels, --max-pixels is 109999999)"
    assert load(root, max_pixels=110_000_000).bad_images == ()
