"""What is kept of a teacher's output: the code of its features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deitkit.distill.encoding import CODE_FILE, CODE_SIZE, decode, encode, fit_code, load_code, record_type
from deitkit.terminal import UserError


def features(images: int, size: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, size, generator=generator)
    return torch.randn(images, rank, generator=generator) @ mixing + 5 * torch.randn(size, generator=generator)


@pytest.mark.parametrize(
    ("images", "size", "rank", "kept"),
    [(400, 300, 300, CODE_SIZE), (400, 64, 64, 64), (50, 300, 300, 49), (100, 40, 3, 3), (1, 8, 8, 1)],
)
def test_a_code_has_the_components_that_vary_and_at_most_256_bytes(images, size, rank, kept):
    found = features(images, size, rank)
    code = fit_code(found)
    assert code.size == kept
    assert record_type("features", 10, code.size).itemsize <= 256
    encoded = code.encode(found)
    assert encoded.dtype == torch.float16
    assert encoded.shape == (images, kept)
    assert encoded.isfinite().all()


def test_the_code_keeps_the_cosines_of_centred_features():
    """Of features of rank 20, all of them."""
    found = features(300, 100, 20)
    encoded, centred = fit_code(found).encode(found).float(), found - found.mean(0)
    pairs = torch.arange(299), torch.arange(1, 300)
    ours, theirs = (torch.cosine_similarity(one[pairs[0]], one[pairs[1]]) for one in (encoded, centred))
    assert (ours - theirs).abs().max() < 5e-3
    assert encoded.mean(0).abs().max() < 1e-2
    assert encoded.var(0).sum().item() == pytest.approx(20, rel=0.02)


def test_a_code_does_not_depend_on_the_sign_of_an_eigenvector(monkeypatch):
    found = features(60, 30, 10)
    code, eigh = fit_code(found), np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
    assert torch.equal(code.basis_FP, fit_code(found).basis_FP)


def test_a_saved_code_is_the_same_and_a_damaged_one_is_refused(tmp_path: Path):
    code = fit_code(features(60, 30, 10))
    code.save(tmp_path)
    again = load_code(tmp_path, code.checksum())
    assert all(torch.equal(one, other) for one, other in zip(code, again, strict=True))
    with pytest.raises(UserError, match="checksum mismatch"):
        load_code(tmp_path, "0" * 16)
    (tmp_path / CODE_FILE).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_code(tmp_path)


@pytest.mark.parametrize("outputs", ["hard", "all", "features", 2])
def test_records_bring_features_back_bit_for_bit(outputs):
    logits_BK = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    coded = fit_code(features(60, 30, 10)).encode(features(9, 30, 10, seed=2))
    records = encode(logits_BK, outputs, coded)
    found = decode(records, 5)
    assert found.features_BP is not None
    assert torch.equal(found.features_BP, coded.float())
    without = decode(encode(logits_BK, outputs), 5) if outputs != "features" else None
    if without is not None:
        assert without.features_BP is None
        assert torch.equal(found.labels_B, without.labels_B)


def test_features_that_are_not_finite_are_refused():
    coded = torch.zeros(2, 3, dtype=torch.float16)
    coded[1, 1] = torch.nan
    with pytest.raises(UserError, match="infinity or NaN"):
        encode(torch.zeros(2, 4), "hard", coded)
