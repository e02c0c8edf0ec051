"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line has it; read when torch is loaded
if os.environ.get("DEITKIT_TEST_GPU", "0") == "0":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite's figures and bits are a CPU's, also where there is a GPU

if "PYTEST_XDIST_WORKER" in os.environ:
    # a process for every core: one thread each, in the programs that tests start too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from deitkit.config import FitConfig
from deitkit.settings import build
from deitkit.terminal import SilentProgress
from deitkit.training import fit as fitting

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def fingerprints_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests remember of their images is forgotten with them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("deitkit.data.caching.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def float32_unless_asked_for() -> Iterator[None]:
    """`--precision auto` is float32 in tests, also on a CPU that has bfloat16: their figures are those of any machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture(autouse=True)
def plots_where_they_are_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training leaves a page, and half the time of a page goes into its plots: tests of trainings have empty ones."""
    if request.path.parent.name in ("training", "distill", "comparison"):
        monkeypatch.setattr("deitkit.inspect.plots.as_svg", lambda *_: "<svg></svg>")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images for tests, in the folder that DEITKIT_SHARED_DATA names; without it the test is skipped."""
    folder = os.environ.get("DEITKIT_SHARED_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set DEITKIT_SHARED_DATA to a folder with cifar10/, cifar10-resnet/ and clothing/")
    return Path(folder)


@pytest.fixture(scope="session")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a small teacher of the digits. Not to be changed."""
    out = tmp_path_factory.mktemp("teacher") / "cnn"
    settings = {"model": "cifar-resnet8", "from_scratch": True, "steps": 40, "base_lr": 2e-2}
    fitting.run_fit("digits", build(FitConfig, settings), out, resume=False, progress=SilentProgress())
    return out
