"""ExecuTorch files: the same predictions as the network, behind the same gate as ONNX files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deitkit.cli import main


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)
    assert main(["export", str(tmp_path), "--format", "executorch", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'deitkit[executorch]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_student_and_a_teacher_predict_the_same_from_an_executorch_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("executorch")
    from executorch.runtime import Runtime

    import deitkit as dk

    run, teacher = tmp_path / "run", tmp_path / "teacher"
    common = ["--train-images", "300", "--epochs", "8", "--workers", "0"]
    assert main(["train", "digits", "--teacher", "none", *common, "--out", str(run)]) == 0
    assert (
        main(["teacher", "fit", "digits", "--model", "cifar-resnet8", *common, "--from-scratch", "--out", str(teacher)])
        == 0
    )
    for folder in (run, teacher):
        out = tmp_path / f"{folder.name}-pte"
        capfd.readouterr()
        assert main(["export", str(folder), "--format", "executorch", "--out", str(out)]) == 0
        said = capfd.readouterr()
        assert said.err.splitlines()[-1].startswith("model.pte: 0 of"), said.err
        parity = json.loads((out / "parity.json").read_text())
        assert parity["images"] > 100
        assert parity["largest_difference"] < 1e-3
        assert parity["kept"]
        predictor = dk.load(folder)
        height, width = predictor.card.preprocessing.image_size
        pixels = np.random.default_rng(0).integers(
            0, 256, (height, width, predictor.card.preprocessing.channels), dtype=np.uint8
        )
        method = Runtime.get().load_program((out / "model.pte").read_bytes()).load_method("forward")
        (found_1K,) = method.execute([torch.from_numpy(pixels)[None]])
        expected_1K = predictor.probabilities(predictor.view(pixels)[None], "fused" if folder == run else "cls")
        torch.testing.assert_close(found_1K, expected_1K, atol=1e-4, rtol=0)
        assert len(json.loads((out / "classes.json").read_text())) == 10
    # the gate holds here too: a program that disagrees is kept under another name, and the exit code says so
    from deitkit.deploy import executorch as exporting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            exporting, "probabilities_of", lambda content, predictor: lambda images: np.eye(10, dtype=np.float32)[[0]]
        )
        assert main(["export", str(run), "--format", "executorch", "--out", str(tmp_path / "bad")]) == 1
    assert (tmp_path / "bad" / "rejected.pte").is_file()
    assert not (tmp_path / "bad" / "model.pte").exists()
