"""What a student takes from weights that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deitkit.models.network import Network
from deitkit.models.start import find_init, load_into_student
from deitkit.models.vit import ViT, ViTConfig, resized_positions
from deitkit.models.zoo import ModelCard, save_model, student_preprocessing
from deitkit.terminal import UserError

SHAPE = ViTConfig(image_size=(16, 16), classes=5, patch_size=(4, 4), width=64, depth=2, heads=1)
NAMES = tuple("abcde")


def saved(folder: Path, config: ViTConfig, classes: tuple[str, ...] = NAMES, **preprocessing: Any) -> Path:
    """The folder of a finished run that holds nothing but its model."""
    torch.manual_seed(7)
    own = student_preprocessing(config, photos=True).model_copy(update=preprocessing)
    card = ModelCard(name="saved", architecture=config, classes=classes, preprocessing=own)
    save_model(folder / "model", Network(ViT(config), own), card)
    return folder


def fresh(config: ViTConfig) -> ViT:
    torch.manual_seed(8)
    return ViT(config)


def changed(config: ViTConfig, **changes: Any) -> ViTConfig:
    return config.model_copy(update=changes)


def test_same_shape_takes_every_tensor(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    vit = fresh(SHAPE)
    (line,) = load_into_student(vit, source, NAMES)
    assert line == "init: loaded 35 of 35 tensors from saved (deitkit)"
    assert all(torch.equal(tensor, source.tensors[name]) for name, tensor in vit.state_dict().items())


@pytest.mark.parametrize("classes", [tuple("abcdefg"), tuple("vwxyz")], ids=["another number", "other names"])
def test_heads_of_other_classes_stay_fresh(tmp_path: Path, classes: tuple[str, ...]) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    config = changed(SHAPE, classes=len(classes))
    vit, untouched = fresh(config), fresh(config).state_dict()
    lines = load_into_student(vit, source, classes)
    taken = {name for name, tensor in vit.state_dict().items() if not torch.equal(tensor, untouched[name])}
    assert not taken & {"head.weight", "head_dist.weight"}
    assert {"cls_token", "dist_token", "pos_embed", "stem.proj.weight", "blocks.1.mlp.2.weight"} <= taken
    assert "31 of 35" in lines[0]
    assert lines[1].startswith("init: newly initialised: head (")
    assert "head_dist (" in lines[1]


def test_distillation_token_its_position_and_its_head_are_fresh_where_there_was_none(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", changed(SHAPE, distillation_token=False))))
    vit, untouched = fresh(SHAPE), fresh(SHAPE)
    lines = load_into_student(vit, source, NAMES)
    assert torch.equal(vit.dist_token, untouched.dist_token)
    assert torch.equal(vit.pos_embed[:, 1], untouched.pos_embed[:, 1])
    assert torch.equal(vit.head_dist.weight, untouched.head_dist.weight)
    positions = source.tensors["pos_embed"]
    assert torch.equal(vit.pos_embed[:, 0], positions[:, 0])
    assert torch.equal(vit.pos_embed[:, 2:], positions[:, 1:])
    assert torch.equal(vit.head.weight, source.tensors["head.weight"])
    assert lines[1] == "init: newly initialised: dist_token (not there), head_dist (not there)"


def test_plain_student_leaves_the_distillation_token_out(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    config = changed(SHAPE, distillation_token=False)
    vit = fresh(config)
    lines = load_into_student(vit, source, NAMES)
    positions = source.tensors["pos_embed"]
    assert torch.equal(vit.pos_embed, torch.cat([positions[:, :1], positions[:, 2:]], dim=1))
    assert torch.equal(vit.head.weight, source.tensors["head.weight"])
    assert lines[1:] == ["init: not loaded: dist_token, head_dist.bias, head_dist.weight, position of dist_token"]
    other = changed(config, classes=7)
    assert load_into_student(fresh(other), source, tuple("abcdefg"))[1:] == [
        "init: newly initialised: head (5 classes there, 7 here)",
        "init: not loaded: dist_token, head_dist.bias, head_dist.weight, position of dist_token",
    ]


def test_without_a_position_of_the_class_token_only_patches_positions_are_there(tmp_path: Path) -> None:
    plain = changed(SHAPE, distillation_token=False, position_of_prefix=False, layer_scale=1e-4)
    source = find_init(str(saved(tmp_path / "run", plain)))
    vit = fresh(changed(plain, distillation_token=True, image_size=(24, 16)))
    lines = load_into_student(vit, source, NAMES)
    assert vit.pos_embed.shape == (1, 24, 64)
    torch.testing.assert_close(vit.pos_embed, resized_positions(source.tensors["pos_embed"], (4, 4), (6, 4)))
    assert "resized from 4x4 to 6x4 patches" in lines[0]


@pytest.mark.parametrize("token", [True, False])
def test_positions_of_a_grid_that_is_not_square_are_resized_row_by_row(tmp_path: Path, token: bool) -> None:
    """Each channel of the embedding is a linear ramp down and across: so it stays, away from the border."""
    config = changed(SHAPE, image_size=(32, 24), distillation_token=token)
    source = find_init(str(saved(tmp_path / "run", config)))
    down, across = torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij")
    prefix = config.prefix_tokens
    source.tensors["pos_embed"][0, prefix:] = (10 * down + across).flatten()[:, None]
    vit = fresh(changed(config, image_size=(64, 48)))
    load_into_student(vit, source, NAMES)
    assert torch.equal(vit.pos_embed[:, :prefix], source.tensors["pos_embed"][:, :prefix])
    grid = vit.pos_embed[0, prefix:, 0].view(16, 12)[4:-4, 4:-4]
    expected = 10 * ((torch.arange(4, 12) + 0.5) / 2 - 0.5)[:, None] + ((torch.arange(4, 8) + 0.5) / 2 - 0.5)
    torch.testing.assert_close(grid, expected, atol=0.6, rtol=0)  # this kernel bends a ramp a little


def test_positions_are_resized_as_transformers_does_it() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    theirs = transformers.DeiTModel(transformers.DeiTConfig(**shape, image_size=16, patch_size=4)).embeddings
    with torch.no_grad():
        theirs.position_embeddings.copy_(torch.randn(1, 18, 32))
        expected = theirs.interpolate_pos_encoding(torch.zeros(1, 8 * 6 + 2, 32), 32, 24)
    found = resized_positions(theirs.position_embeddings.detach()[:, 2:], (4, 4), (8, 6))
    torch.testing.assert_close(found, expected[:, 2:])


def test_student_of_the_same_weights_at_another_size_answers_nearly_the_same(tmp_path: Path) -> None:
    """A position embedding that was transposed or cut wrongly would not."""
    smooth = torch.linspace(-1, 1, 16)
    source = find_init(str(saved(tmp_path / "run", changed(SHAPE, image_size=(64, 64)))))
    ramp = (smooth[:, None] + 3 * smooth[None, :]).flatten()
    source.tensors["pos_embed"][0, 2:] = ramp[:, None] * torch.randn(64)
    small, large = fresh(changed(SHAPE, image_size=(64, 64))), fresh(changed(SHAPE, image_size=(96, 96)))
    for vit in (small, large):
        load_into_student(vit, source, NAMES)
    images = torch.ones(1, 3, 96, 96) * torch.tensor([0.5, -1, 2]).view(3, 1, 1)
    with torch.no_grad():
        answers = small(images[..., :64, :64]).cls_BK, large(images).cls_BK
    torch.testing.assert_close(*answers, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"width": 128, "heads": 2}, "has width 64, the student width 128"),
        ({"depth": 3}, "has depth 2, the student depth 3"),
        ({"heads": 2}, "has heads 1, the student heads 2"),
        ({"patch_size": (8, 8)}, "has patch size 4x4, the student patch size 8x8"),
        ({"stem": "conv"}, "has stem patch, the student stem conv"),
        ({"mlp_ratio": 2.0}, "has mlp width 256, the student mlp width 128"),
        ({"layer_scale": 0.1}, "has no layer scale, the student a layer scale"),
        ({"position_of_prefix": False}, "has a position of the class token, the student no position"),
    ],
)
def test_student_of_another_shape_is_refused_and_both_are_named(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    with pytest.raises(UserError) as caught:
        load_into_student(fresh(changed(SHAPE, **change)), source, NAMES)
    assert complaint in str(caught.value)


def test_weights_that_lack_a_tensor_or_hold_nan_are_refused(tmp_path: Path) -> None:
    source = find_init(str(saved(tmp_path / "run", SHAPE)))
    lacking = {name: tensor for name, tensor in source.tensors.items() if name != "blocks.1.norm2.bias"}
    with pytest.raises(UserError, match=r"lack blocks\.1\.norm2\.bias"):
        load_into_student(fresh(SHAPE), source._replace(tensors=lacking), NAMES)
    source.tensors["blocks.1.norm2.bias"][3] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.norm2\.bias holds infinity or NaN"):
        load_into_student(fresh(SHAPE), source, NAMES)
