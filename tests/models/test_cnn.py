"""The residual network for small images, and networks by name."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deitkit.models import cnn
from deitkit.models.cnn import (
    CifarResNet,
    CNNConfig,
    blocks_per_stage,
    build_cnn,
    card_config,
    feature_count,
    find_classifier,
    forward_with_features,
    has_pretrained,
    head_parameters,
    pretrained_classes,
)
from deitkit.models.network import Network, ensemble, resize
from deitkit.models.vit import ViT, ViTConfig
from deitkit.terminal import UserError


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameter_counts_are_those_of_the_paper(depth: int, millions: float) -> None:
    count = sum(parameter.numel() for parameter in CifarResNet(depth, 10).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01 if millions < 1 else 0.05)  # table 6 of arXiv 1512.03385


@pytest.mark.parametrize("depth", [2, 7, 9, 21, 57])
def test_depths_other_than_6n_plus_2_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth {depth} is not 6n \+ 2: take \d+ or \d+"):
        blocks_per_stage(depth)


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (3, (33, 47)), (1, (8, 8))])
def test_any_image_size_and_grey_images_work(channels: int, size: tuple[int, int]) -> None:
    assert CifarResNet(8, 7, channels)(torch.rand(2, channels, *size)).shape == (2, 7)


def test_shortcut_keeps_every_second_position_and_adds_zero_channels_on_both_sides() -> None:
    features = torch.rand(2, 4, 5, 6)
    shortened = cnn.shortcut(features, 8, 2)
    assert shortened.shape == (2, 8, 3, 3)
    assert torch.equal(shortened[:, 2:6], features[:, :, ::2, ::2])
    assert not shortened[:, :2].any()
    assert not shortened[:, 6:].any()


def test_a_stage_without_residuals_is_the_identity_on_positive_features() -> None:
    block = cnn.ResidualBlock(6, 6, 1)
    torch.nn.init.zeros_(block.bn2.weight)
    features = torch.rand(2, 6, 4, 4)
    assert torch.equal(block(features), features)


def cifar10_test(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first test images in [0, 1] and their labels."""
    rows = pq.ParquetFile(folder / "cifar10" / "test-00000-of-00001.parquet").read_row_group(0).slice(0, count)
    pixels = [np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB")) for image in rows["img"].to_pylist()]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255, torch.tensor(rows["label"].to_pylist())


@pytest.mark.parametrize(("depth", "right"), [(20, 913), (56, 923)])
def test_published_cifar10_weights_are_right_as_often_as_published(shared_data: Path, depth: int, right: int) -> None:
    """Here of the first 1,000; of all 10,000 9,173 are right with 20 layers, 9,339 with 56 (91.73 %, 93.39 %).
    With every zero channel at the end of the shortcut 56 layers fall to 10 %."""
    images, labels = cifar10_test(shared_data, 1000)
    network = CifarResNet(depth, 10).eval().to(memory_format=torch.channels_last)
    loaded = network.load_state_dict(
        load_file(shared_data / "cifar10-resnet" / f"resnet{depth}.safetensors"), strict=False
    )
    assert not loaded.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in loaded.missing_keys)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        logits = network((images - mean[:, None, None]) / std[:, None, None])
    assert abs(int((logits.argmax(1) == labels).sum()) - right) <= 2  # rounding may turn a close decision elsewhere


def build(
    name: str, classes: int = 10, channels: int = 3, size: int | None = None, pretrained: bool = False
) -> Network:
    config = CNNConfig(name=name, classes=classes, channels=channels)
    return build_cnn(config, image_size=None if size is None else (size, size), pretrained=pretrained)


@pytest.fixture
def no_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitkit.data.sources.hub_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nowhere")

    def fail(*_args: object, **_options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("cifar-resnet8", {"body.linear.weight", "body.linear.bias"}),
        ("resnet18", {"body.fc.weight", "body.fc.bias"}),
        ("lite0", {"body.classifier.weight", "body.classifier.bias"}),
        ("deit_tiny_distilled_patch16_224",
         {"body.head.weight", "body.head.bias", "body.head_dist.weight", "body.head_dist.bias"}),
        ("torchvision:squeezenet1_1", {"body.classifier.1.weight", "body.classifier.1.bias"}),
    ],
)  # fmt: skip
def test_every_family_answers_the_wanted_classes_and_knows_its_head(name: str, head: set[str]) -> None:
    network = build(name, classes=7, size=64).train()
    assert network(torch.rand(2, 3, 50, 40)).cls_BK.shape == (2, 7)
    assert head_parameters(network) == head
    assert head < {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("lite0", 1280),
        ("cifar-resnet8", 64),
        ("torchvision:resnet18", 512),
        ("torchvision:vgg11", 4096),
        ("resnet18", 512),
    ],
)
def test_the_classifier_makes_the_logits_of_the_features(name: str, features: int) -> None:
    network = build(name, classes=7, size=64).eval()
    images = torch.rand(3, 3, 50, 40)
    heads, features_BF = forward_with_features(network, images)
    assert features_BF.shape == (3, feature_count(network)) == (3, features)
    classifier = find_classifier(network)
    assert classifier is not None
    assert torch.equal(classifier(features_BF), heads.cls_BK)
    assert torch.equal(network(images).cls_BK, heads.cls_BK)
    assert not classifier._forward_pre_hooks
    heads.cls_BK.sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())


def test_networks_without_one_linear_classifier_have_no_features() -> None:
    names = ("torchvision:squeezenet1_1", "deit_tiny_distilled_patch16_224")
    networks = [build(name, classes=7, size=64) for name in names]
    networks.append(ensemble([build("cifar-resnet8"), build("cifar-resnet8")], [None, None]))
    student = ViT(ViTConfig(image_size=(32, 32), patch_size=(8, 8), width=64, depth=1, heads=1, classes=7))
    networks.append(Network(student, networks[-1].preprocessing))
    for network in networks:
        assert feature_count(network) is find_classifier(network) is None
        with pytest.raises(UserError, match="its logits are not made of pooled features by one linear layer"):
            forward_with_features(network.eval(), torch.rand(2, 3, 32, 32))


def test_preprocessing_is_the_networks_own() -> None:
    of_timm = build("regnety_002").preprocessing
    assert (of_timm.image_size, of_timm.interpolation, of_timm.crop_pct) == ((224, 224), "bicubic", 0.875)
    of_torchvision = build("torchvision:mobilenet_v3_small").preprocessing
    assert of_torchvision.interpolation == "bilinear"
    assert of_torchvision.crop_pct == pytest.approx(224 / 256)
    assert of_torchvision.std == (0.229, 0.224, 0.225)
    assert build("lite0").preprocessing.mean == (0.5, 0.5, 0.5)
    assert build("cifar-resnet8").preprocessing.image_size == (32, 32)


def test_image_size_reaches_a_transformer_too() -> None:
    network = build("deit_tiny_patch16_224", size=64)
    assert network.preprocessing.image_size == (64, 64)
    assert network(torch.rand(1, 3, 32, 32)).cls_BK.shape == (1, 10)


def test_grey_networks_from_scratch_have_one_channel() -> None:
    for name in ("cifar-resnet8", "resnet18"):
        network = build(name, channels=1, size=28)
        assert next(network.parameters()).shape[1] == 1
        assert network.preprocessing.mean == pytest.approx((0.449,))
        assert network(torch.rand(2, 1, 28, 28)).cls_BK.shape == (2, 10)


def test_torchvision_networks_keep_three_channels_for_grey_data() -> None:
    network = build("torchvision:squeezenet1_1", channels=1, size=64)
    assert card_config(CNNConfig(name="torchvision:squeezenet1_1", classes=10, channels=1), network).channels == 3
    assert network(torch.rand(2, 1, 28, 28)).cls_BK.shape == (2, 10)


def test_an_unknown_network_with_a_file_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(10, 4)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"did you mean .*torchvision:resnet"):
        pretrained_classes(f"torchvision:resnet52@{tmp_path / 'weights.safetensors'}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "unknown network 'resnet5O': did you mean .*resnet50"),
        ("torchvision:resnet52", "did you mean .*torchvision:resnet"),
        ("torchvision:inception_v3", "unknown network 'torchvision:inception_v3'"),
        ("resnet50.a1_in1kk", r"unknown weights .*did you mean resnet50\.a1_in1k"),
        ("qqqqqqqq", "unknown network 'qqqqqqqq': give a timm or torchvision:NAME network, such as cifar-resnet20"),
        ("cifar-resnet21", r"unknown network 'cifar-resnet21': depth 21 is not 6n \+ 2: take 20 or 26"),
        ("cifar-resnet", "write the number of layers"),
    ],
)
def test_unknown_names_get_one_line_with_what_is_near(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_sizes_that_a_network_cannot_take_are_refused_when_it_is_built() -> None:
    with pytest.raises(UserError, match=r"deit_tiny_patch16_224 .*8x8"):
        build("deit_tiny_patch16_224", size=8)
    with pytest.raises(UserError, match=r"torchvision:alexnet cannot take images of 16x16 pixels"):
        build("torchvision:alexnet", size=16)
    with pytest.raises(UserError, match=r"torchvision:vit_b_16 cannot take images of 64x64 pixels"):
        build("torchvision:vit_b_16", size=64)


@pytest.mark.parametrize("name", ["resnet18", "torchvision:squeezenet1_1"])
@pytest.mark.usefixtures("no_internet")
def test_a_failed_download_is_one_line_that_says_what_to_do(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} cannot be downloaded.*{name}@FILE, or --from-scratch.*lite0"):
        build(name, pretrained=True)


def test_networks_without_published_weights_say_so() -> None:
    for name in ("cifar-resnet20", "resnetaa34d"):
        with pytest.raises(UserError, match="has no published weights"):
            build(name, pretrained=True)
    assert not has_pretrained("cifar-resnet20")
    assert has_pretrained("cifar-resnet20@x.safetensors")
    assert has_pretrained("lite0")
    assert has_pretrained("resnet50")
    assert pretrained_classes("resnet50") == pretrained_classes("torchvision:resnet50") == 1000
    assert pretrained_classes("vit_small_patch14_dinov2") is None  # weights without a classifier


@pytest.mark.parametrize("name", ["cifar-resnet8", "resnet18", "torchvision:squeezenet1_1"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_come_from_a_file_and_only_the_last_layer_may_differ(tmp_path: Path, name: str, suffix: str) -> None:
    source = build(name, classes=5)
    for buffer in source.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    file = tmp_path / f"weights.{suffix}"
    state = {key: value.contiguous() for key, value in source.body.state_dict().items()}
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, file)
    else:
        save_file(state, file)
    assert pretrained_classes(f"{name}@{file}") == 5
    same = build(f"{name}@{file}", classes=5, pretrained=True)
    assert all(torch.equal(value, state[key]) for key, value in same.body.state_dict().items())
    other = build(f"{name}@{file}", classes=3, pretrained=True)
    head = {key.removeprefix("body.") for key in head_parameters(other)}
    assert all(torch.equal(value, state[key]) for key, value in other.body.state_dict().items() if key not in head)
    assert other.eval()(torch.rand(1, 3, 64, 64)).cls_BK.shape == (1, 3)
    file.unlink()
    config = CNNConfig(name=f"{name}@{file}", classes=3)
    assert card_config(config, other) == CNNConfig(name=name, classes=3)
    build_cnn(config, image_size=None, pretrained=False)  # does not need the file


def test_a_network_with_pretrained_weights_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    for name in ("cifar-resnet8", "resnet18", "torchvision:squeezenet1_1"):
        file = tmp_path / "weights.safetensors"
        save_file({key: value.contiguous() for key, value in build(name, classes=5).body.state_dict().items()}, file)
        random_state = torch.get_rng_state()
        for classes in (5, 3):
            build(f"{name}@{file}", classes=classes, pretrained=True)
            assert torch.equal(torch.get_rng_state(), random_state)


def test_the_first_loss_of_a_replaced_classifier_is_that_of_equal_probabilities(tmp_path: Path) -> None:
    save_file(
        {key: value.contiguous() for key, value in build("resnet18", classes=5).body.state_dict().items()},
        tmp_path / "five.safetensors",
    )
    labels = torch.arange(4)
    for name in ("lite0", f"resnet18@{tmp_path / 'five.safetensors'}"):
        network = build(name, classes=7, size=64, pretrained=True).train()
        loss = torch.nn.functional.cross_entropy(network(torch.rand(4, 3, 64, 64)).cls_BK, labels)
        assert loss.item() == pytest.approx(math.log(7))
        loss.backward()
        assert any(weight.grad is not None and weight.grad.any() for weight in network.parameters())


def test_a_replaced_classifier_behind_a_relu_can_learn(tmp_path: Path) -> None:
    name = "torchvision:squeezenet1_1"
    save_file(
        {key: value.contiguous() for key, value in build(name, classes=5).body.state_dict().items()},
        tmp_path / "five.safetensors",
    )
    network = build(f"{name}@{tmp_path / 'five.safetensors'}", classes=7, size=64, pretrained=True)
    network(torch.rand(4, 3, 64, 64)).cls_BK.logsumexp(-1).sum().backward()
    gradients = [weight.grad for key, weight in network.named_parameters() if key in head_parameters(network)]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_files_that_do_not_fit_are_refused_naming_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "resnet8.safetensors"
    save_file(CifarResNet(8, 5).state_dict(), file)
    with pytest.raises(UserError, match="weights of another network: they lack layer1"):
        build(f"cifar-resnet14@{file}", classes=5, pretrained=True)
    with pytest.raises(UserError, match="weights of another network"):
        build(f"resnet18@{file}", classes=5, pretrained=True)
    with pytest.raises(UserError, match="no such file of weights"):
        build(f"cifar-resnet8@{tmp_path}/none.safetensors", pretrained=True)
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        build(f"cifar-resnet8@{file}", pretrained=True)


def test_the_new_head_of_a_pretrained_network_is_fresh_and_the_rest_is_not() -> None:
    full, replaced = build("lite0", classes=1000, pretrained=True), build("lite0", classes=10, pretrained=True)
    theirs, ours = full.body.state_dict(), replaced.body.state_dict()
    differing = {key for key, value in ours.items() if value.shape != theirs[key].shape or not value.equal(theirs[key])}
    assert differing == {"classifier.weight", "classifier.bias"}


def test_lite0_names_17_of_20_imagenet_photos() -> None:
    foolbox = pytest.importorskip("foolbox")
    files = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))
    assert len(files) == 20
    network = build("lite0", classes=1000, pretrained=True).eval().to(memory_format=torch.channels_last)
    photos = [
        torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None] / 255 for file in files
    ]
    labels = torch.tensor([int(file.stem.rpartition("_")[2]) for file in files])
    with torch.inference_mode():
        logits = network(torch.cat([resize(photo, (224, 224), "bicubic") for photo in photos])).cls_BK
    assert int((logits.argmax(1) == labels).sum()) == 17
