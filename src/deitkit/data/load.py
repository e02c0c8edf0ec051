"""One call for every place that images come from."""

from __future__ import annotations

import os
from pathlib import Path

from deitkit.config import DataConfig
from deitkit.data.base import Dataset
from deitkit.data.folder import SPLIT_NAMES, load_folder
from deitkit.data.idx import is_idx_folder
from deitkit.data.names import NAMES, load_named
from deitkit.data.parquet import is_parquet_folder, load_parquet
from deitkit.data.resized import is_resized_folder, load_resized
from deitkit.errors import UserError, shortened


def load_data(location: str, config: DataConfig) -> Dataset:
    """The data set at `location`: a path, which wins, or a name (`digits`, `cifar10`, ...).

    Training and validation images are scanned; the test split is opened when it is asked for.
    Raises UserError: what is wrong, where, what to do."""
    if not location.strip():
        raise UserError(f"no data set given: give an existing folder or one of {', '.join(NAMES)}")
    try:
        path = Path(location).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home that nobody has, a null character
        raise UserError(f"{shortened(location)}: no such folder: {error}") from error
    if is_folder:
        return _load_path(path, config)
    if exists:
        raise UserError(f"{path}: is a file; give the folder that holds the images or Parquet files")
    looks_like_path = path.is_absolute() or len(path.parts) > 1 or location.startswith(".") or os.sep in location
    if looks_like_path and location not in NAMES:
        raise UserError(f"{path}: does not exist; give an existing folder or one of {', '.join(NAMES)}")
    return load_named(location, config)


def _load_path(path: Path, config: DataConfig) -> Dataset:
    name = path.resolve().name or str(path)
    if is_resized_folder(path):
        return load_resized(path, config)
    if is_parquet_folder(path):
        return load_parquet(path, config, name=name)
    if is_idx_folder(path):
        raise UserError(
            f"{path}: holds IDX files; set DEITKIT_DATA to the folder above and give its name, such as mnist"
        )
    return load_folder(path, config, name=name)


def refuse_among_images(location: str, out: Path) -> None:
    """Raises UserError where the folder `out`, once it is there, would be taken for a class of the images at `location`."""
    try:
        data = Path(location).expanduser().resolve()
        within = out.resolve().relative_to(data).parts
        if not data.is_dir() or is_resized_folder(data) or is_parquet_folder(data):
            return
    except (OSError, RuntimeError, ValueError):  # it lies elsewhere; or there is no such folder, which others say
        return
    among = within[:1] and (within[0] in SPLIT_NAMES or not (data / "train").is_dir())
    if among and not any(part.startswith(".") for part in within):
        raise UserError(
            f"{out}: lies among the images of {location} and would be taken for a class: give another folder"
        )
