"""The student: a vision transformer with a class token and, if it is a DeiT, a distillation token.

Written from "Training data-efficient image transformers & distillation through attention" (Touvron et al. 2021,
arXiv 2012.12877, "the paper") and "An image is worth 16x16 words" (Dosovitskiy et al. 2021, arXiv 2010.11929).
Letters of tensor dimensions: B images, C channels, H height, W width, T tokens, D width of a token, K classes, L residual
branches.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, final

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import nn
from torch.nn import functional as F

from deitkit import rng
from deitkit.config import Config, Depth, HeadCount, Pixels, Positive, Size, Stem, Width
from deitkit.models.network import Heads, HeadsAndFeatures, Network

MOST_TOKENS = 2**16
QUERY_KEY_SHARE, VALUE_OUTPUT_SHARE = 0.7, -0.4
INIT_STD = 0.02  # of every truncated normal (paper, section 6)


class ViTConfig(Config):
    """The shape of a vision transformer. Plain ViT and DeiT differ in `distillation_token` alone; DeiT III (arXiv 2204.07118) has
    `layer_scale` and no `position_of_prefix`."""

    image_size: tuple[Pixels, Pixels] = (224, 224)
    channels: Annotated[int, Field(ge=1, le=3)] = 3
    classes: Annotated[int, Field(gt=0, le=10**7)] = 1000
    patch_size: tuple[Pixels, Pixels] = (16, 16)
    stem: Stem = "patch"
    """patch: one strided convolution; conv: stride-2 convolutions of 3x3 down to the same grid; residual: with a residual
    block after each of them"""
    width: Width = 192
    depth: Depth = 12
    heads: HeadCount = 3
    mlp_ratio: Annotated[float, Field(gt=0, le=1000)] = 4.0
    distillation_token: bool = True
    norm_epsilon: Positive = 1e-6
    """timm's and the published code's; Hugging Face's networks have 1e-12"""
    layer_scale: Positive | None = None
    """initial value of the learnt factors, one a channel, that each residual branch is multiplied by; None: no factors"""
    position_of_prefix: bool = True
    """whether class and distillation token have a position embedding, too"""

    @model_validator(mode="after")
    def _check(self) -> ViTConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        for side, pixels, patch in zip(("height", "width"), self.image_size, self.patch_size, strict=True):
            if pixels % patch:
                raise ValueError(f"image {side} {pixels} is not a multiple of the patch {side} {patch}")
        down, across = self.patch_size
        if self.stem != "patch" and (down != across or down & (down - 1)):
            raise ValueError(f"the convolutional stem needs a square patch of 2, 4, 8, ... pixels, not {down, across}")
        if self.tokens > MOST_TOKENS:
            raise ValueError(
                f"{self.tokens:,} tokens are too many ({MOST_TOKENS:,} at most): smaller images, or larger patches"
            )
        return self

    @property
    def grid(self) -> Size:
        """Patches (down, across)."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def prefix_tokens(self) -> int:
        return 2 if self.distillation_token else 1

    @property
    def prefix_positions(self) -> int:
        """Rows of the position embedding before those of the patches."""
        return self.prefix_tokens if self.position_of_prefix else 0

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.grid[0] * self.grid[1]


@final
class ViT(nn.Module):
    """Patches, tokens, blocks, heads. Input: normalised images of `config.image_size`, or of another size in whole patches;
    output: `Heads`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        fresh = (
            torch.get_default_device().type != "meta"
        )  # else the weights come from a file, or shapes are all that is asked
        # one draw of torch's global generator, before the layers below draw weights of their own
        seed = int(torch.randint(2**32, (), device="cpu")) if fresh else 0
        self.config = config
        positions = config.prefix_positions + config.grid[0] * config.grid[1]
        self.stem = PatchStem(config) if config.stem == "patch" else ConvStem(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.dist_token = nn.Parameter(torch.empty(1, 1, config.width)) if config.distillation_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, positions, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.head = nn.Linear(config.width, config.classes)
        self.head_dist = nn.Linear(config.width, config.classes) if config.distillation_token else None
        self.head_features: nn.Linear | None = None
        if fresh:
            initialise(self, seed)

    def forward(
        self, images_BCHW: Float[torch.Tensor, "B C H W"], keep_LB: Float[torch.Tensor, "L B"] | None = None
    ) -> Heads | HeadsAndFeatures:
        """Logits of both heads. `keep_LB`: what each of the 2 * depth residual branches is multiplied by, image by
        image (stochastic depth); `None` keeps all."""
        tokens_BTD = self.embed(images_BCHW)
        if keep_LB is not None:
            keep_LB = keep_LB.to(tokens_BTD.device, non_blocking=True)
        # The heads read one token each: the last block computes only these, and only these are normalised.
        read = self.config.prefix_tokens
        for layer, block in enumerate(self.blocks):
            kept_2B = None if keep_LB is None else keep_LB[2 * layer : 2 * layer + 2]
            tokens_BTD = block(tokens_BTD, kept_2B, read if layer == len(self.blocks) - 1 else None)
        return self.apply_heads(tokens_BTD)

    def embed(self, images_BCHW: Float[torch.Tensor, "B C H W"]) -> Float[torch.Tensor, "B T D"]:
        """Class token, distillation token, patches (row by row), with their position embedding. Images may have another size
        in whole patches, at which positions are resampled."""
        (height, width), (down, across) = self.config.image_size, self.config.patch_size
        if images_BCHW.shape[1] != self.config.channels or images_BCHW.shape[2] % down or images_BCHW.shape[3] % across:
            expected = f"(B, {self.config.channels}, {height}, {width}) or another size in patches of {down} x {across}"
            raise ValueError(f"expected images of shape {expected}, got {tuple(images_BCHW.shape)}")
        patches_BTD = self.stem(images_BCHW).flatten(2).transpose(1, 2)
        tokens = [self.cls_token] if self.dist_token is None else [self.cls_token, self.dist_token]
        prefix = [token.expand(patches_BTD.shape[0], -1, -1) for token in tokens]
        positions_1TD = self.positions((images_BCHW.shape[2] // down, images_BCHW.shape[3] // across))
        if not self.config.position_of_prefix:
            return torch.cat([*prefix, patches_BTD + positions_1TD], dim=1)
        return torch.cat([*prefix, patches_BTD], dim=1) + positions_1TD

    def positions(self, grid: Size) -> Float[torch.Tensor, "1 T D"]:
        """The position embedding for a grid of (down, across) patches."""
        if grid == self.config.grid:
            return self.pos_embed
        own, prefix = self.config.grid, self.config.prefix_positions
        # A product with the weights of the resampling, for the backward pass of the resampling itself is random on a GPU.
        each_1nn = torch.eye(own[0] * own[1], device=self.pos_embed.device)[None]
        weights_1Nn = resized_positions(each_1nn, own, grid, smooth=True)  # smooth: so that every position learns
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            patches_1TD = weights_1Nn @ self.pos_embed[:, prefix:]
        return torch.cat([self.pos_embed[:, :prefix], patches_1TD], dim=1)

    def apply_heads(self, tokens_BTD: Float[torch.Tensor, "B T D"]) -> Heads | HeadsAndFeatures:
        """Logits of both heads from the last block's tokens (B, T, D), or from its first tokens alone."""
        prefix_BTD = self.norm(tokens_BTD[:, : self.config.prefix_tokens])
        cls_BK = self.head(prefix_BTD[:, 0])
        dist_BK = None if self.head_dist is None else self.head_dist(prefix_BTD[:, 1])
        if self.head_features is None or not self.training:
            return Heads(cls_BK, dist_BK)
        return HeadsAndFeatures(cls_BK, dist_BK, self.head_features(prefix_BTD[:, -1]))

    def add_feature_head(self, size: int, seed: int) -> None:
        """A linear layer that predicts `size` features of a teacher from the distillation token (from the class token if there is no
        other), in training alone."""
        self.head_features = nn.Linear(self.config.width, size, device="cpu")
        with torch.no_grad():
            _draw(partial(nn.init.trunc_normal_, std=INIT_STD), seed, "head_features", self.head_features.weight)
            nn.init.zeros_(self.head_features.bias)

    def drop_feature_head(self) -> None:
        self.head_features = None

    @torch.no_grad()
    def scale_heads(self, factors: Sequence[float]) -> None:
        """Multiply the logits of each head, class head first, by its factor."""
        heads = [head for head in (self.head, self.head_dist) if head is not None]
        for head, factor in zip(heads, factors, strict=True):
            head.weight.mul_(factor)
            head.bias.mul_(factor)

    def intermediates(self, images_BCHW: Float[torch.Tensor, "B C H W"]) -> Iterator[Float[torch.Tensor, "B T D"]]:
        """The tokens that enter the first block, then the output of every block (before the last norm)."""
        tokens_BTD = self.embed(images_BCHW)
        yield tokens_BTD
        for block in self.blocks:
            tokens_BTD = block(tokens_BTD)
            yield tokens_BTD


def resized_positions(
    patches_1ND: Float[torch.Tensor, "1 n D"], old: Size, new: Size, *, smooth: bool = False
) -> Float[torch.Tensor, "1 N D"]:
    """The position embedding of `old` (rows, columns) patches at `new` ones, bicubic and without antialiasing, as the published
    code of DeiT and Hugging Face do it (paper, section 3: bicubic, which nearly keeps the norm of the vectors). timm does it
    with antialiasing (`smooth`) and therefore gets other numbers, also when it enlarges."""
    if old == new:
        return patches_1ND
    grid_1DHW = patches_1ND.transpose(1, 2).reshape(1, -1, *old)
    resized_1DHW = F.interpolate(grid_1DHW, size=new, mode="bicubic", align_corners=False, antialias=smooth)
    return resized_1DHW.flatten(2).transpose(1, 2)


class PatchStem(nn.Module):
    """Patch embedding: one linear map of each patch's pixels. (B, C, H, W) -> (B, D, rows, columns)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.proj(images_BCHW)
        return projected


class ConvStem(nn.Module):
    """Convolutions of 3x3 in place of the patch embedding: one at full size, then one of stride 2 for every halving,
    channels doubling up to the width, then a 1x1 projection ("Early convolutions help transformers see better",
    Xiao et al. 2021, arXiv 2106.14881). With `stem: residual`, a residual block after every halving.
    (B, C, H, W) -> (B, D, rows, columns)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        halvings = config.patch_size[0].bit_length() - 1
        layers: list[nn.Module] = []
        channels = config.channels
        for left in range(halvings, -1, -1):
            width = max(8, config.width >> left)
            stride = 1 if left == halvings else 2
            layers += [
                nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            if config.stem == "residual" and stride == 2:
                layers.append(ResidualBlock(width))
            channels = width
        # Channels last is the layout in which convolutions are fastest, and tokens come out without a copy. Kernels have it too,
        # for then their gradients lie as several processes exchange them.
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, config.width, 1)).to(memory_format=torch.channels_last)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(images_BCHW.contiguous(memory_format=torch.channels_last))
        return features


class ResidualBlock(nn.Module):
    """relu(x + two convolutions of 3x3 with batch normalisation) (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, features_BCHW: torch.Tensor) -> torch.Tensor:
        inner_BCHW = F.relu(self.norm1(self.conv1(features_BCHW)))
        return F.relu(features_BCHW + self.norm2(self.conv2(inner_BCHW)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)). With LayerScale (Touvron et al. 2021, arXiv
    2103.17239), what is added is first multiplied by a learnt factor a channel."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_epsilon)
        self.mlp = nn.Sequential(nn.Linear(config.width, hidden), nn.GELU(), nn.Linear(hidden, config.width))
        scaled = config.layer_scale is not None
        self.scale1 = nn.Parameter(torch.empty(config.width)) if scaled else None
        self.scale2 = nn.Parameter(torch.empty(config.width)) if scaled else None

    def forward(
        self, tokens_BTD: torch.Tensor, keep_2B: torch.Tensor | None = None, read: int | None = None
    ) -> torch.Tensor:
        """`read`: only this many first tokens are computed, with the same values; `None`: all."""
        keep_2B11 = (None, None) if keep_2B is None else keep_2B[:, :, None, None]
        attended_BTD = self.attn(self.norm1(tokens_BTD), read)
        tokens_BTD = tokens_BTD[:, :read] + _scaled(attended_BTD, self.scale1, keep_2B11[0])
        return tokens_BTD + _scaled(self.mlp(self.norm2(tokens_BTD)), self.scale2, keep_2B11[1])


def _scaled(branch_BTD: torch.Tensor, scale_D: torch.Tensor | None, keep_B11: torch.Tensor | None) -> torch.Tensor:
    if scale_D is not None:
        branch_BTD = branch_BTD * scale_D
    return branch_BTD if keep_B11 is None else branch_BTD * keep_B11


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(query key' / sqrt(D)) value, each of shape (B, heads, T, D), by torch's fused kernel - but for bfloat16 on a CPU, where
    that kernel's backward pass takes a dozen times as long as in float32 (torch 2.14), and a few plain products do not."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value)
    likeness = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    mixed: torch.Tensor = likeness.softmax(-1).to(value.dtype) @ value
    return mixed


class Attention(nn.Module):
    """Multi-head self-attention: every token attends to all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BTD: torch.Tensor, read: int | None = None) -> torch.Tensor:
        """The outputs of the first `read` tokens (`None`: of all)."""
        if read is None:
            query_BTD, key_BTD, value_BTD = self.qkv(tokens_BTD).chunk(3, dim=-1)
        else:
            width = tokens_BTD.shape[-1]
            query_weight, key_value_weight = torch.split(self.qkv.weight, [width, 2 * width])
            query_bias, key_value_bias = torch.split(self.qkv.bias, [width, 2 * width])
            query_BTD = F.linear(tokens_BTD[:, :read], query_weight, query_bias)
            key_BTD, value_BTD = F.linear(tokens_BTD, key_value_weight, key_value_bias).chunk(2, dim=-1)
        query, key, value = (self._by_head(part_BTD) for part_BTD in (query_BTD, key_BTD, value_BTD))
        mixed = attend(query, key, value)
        projected: torch.Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected

    def _by_head(self, part_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) as (B, heads, T, D / heads)."""
        batch, tokens, width = part_BTD.shape
        return part_BTD.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)


@torch.no_grad()
def attention_rollout(
    network: Network, images_BCHW: Float[torch.Tensor, "B C H W"]
) -> tuple[Heads, Float[torch.Tensor, "B P h w"]]:
    """The logits of a network whose body is a ViT, and how much each of its P tokens before the patches (class token, distillation token)
    draws on each patch (Abnar and Zuidema 2020, arXiv 2005.00928): the product over the blocks of (attention, mean of the heads, +
    identity) / 2; the shares of the patches, which add up to 1."""
    vit = network.body
    assert isinstance(vit, ViT)
    layers: list[torch.Tensor] = []

    def record(module: Any, given: Any, _output: Any) -> None:
        query_BTD, key_BTD, _ = module.qkv(given[0]).chunk(3, dim=-1)
        query, key = (module._by_head(part_BTD) for part_BTD in (query_BTD, key_BTD))
        likeness = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        layers.append(likeness.softmax(-1).mean(1))

    handles = [block.attn.register_forward_hook(record) for block in vit.blocks]  # type: ignore[union-attr]
    try:
        heads: Heads = network(images_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    identity_TT = torch.eye(layers[0].shape[-1], device=layers[0].device)
    rollout_BTT = identity_TT.expand_as(layers[0])
    for attention_BTT in layers:
        rollout_BTT = (attention_BTT + identity_TT) / 2 @ rollout_BTT
    prefix = vit.config.prefix_tokens
    patches_BPN = rollout_BTT[:, :prefix, prefix:]
    shares_BPN: torch.Tensor = patches_BPN / patches_BPN.sum(-1, keepdim=True)
    return heads, shares_BPN.view(*shares_BPN.shape[:2], *vit.config.grid)


@torch.no_grad()
def initialise(vit: ViT, seed: int) -> None:
    """Fresh weights: truncated normals of std 0.02, biases 0, norms 1; the stem's 3x3 kernels as He et al.; LayerScale as configured.

    What is drawn for a tensor depends on `seed` and the tensor's name alone. So students of one seed that differ in a part, such
    as the distillation token, begin with the same weights in all others.
    Every parameter is NaN first, so that one which this function forgets cannot go unnoticed.
    """
    for parameter in vit.parameters():
        parameter.fill_(float("nan"))
    normal = partial(_draw, partial(nn.init.trunc_normal_, std=INIT_STD), seed)
    he = partial(_draw, partial(nn.init.kaiming_normal_, mode="fan_in", nonlinearity="relu"), seed)
    normal("cls_token", vit.cls_token)
    prefix = vit.config.prefix_positions
    normal("pos_embed.cls", vit.pos_embed[:, : min(1, prefix)])
    normal("pos_embed.patches", vit.pos_embed[:, prefix:])
    if vit.dist_token is not None:
        normal("dist_token", vit.dist_token)
        normal("pos_embed.dist", vit.pos_embed[:, 1:prefix])
    for name, module in vit.named_modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:  # a convolution of the stem, before norm and ReLU
            he(name, module.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            # A patch embedding is a linear map too, so 0.02 as well. The usual spread by the number of inputs would give small
            # patches an embedding a hundred times as large as that of their position, which then takes many steps to be seen.
            normal(name, module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Block) and module.scale1 is not None and module.scale2 is not None:
            for scale_D in (module.scale1, module.scale2):
                nn.init.constant_(scale_D, vit.config.layer_scale or 0.0)
    for module in vit.modules():
        if isinstance(module, ResidualBlock):  # each block begins as the identity (Goyal et al. 2017, arXiv 1706.02677)
            nn.init.zeros_(module.norm2.weight)


@torch.no_grad()
def mimic_trained_attention(vit: ViT, seed: int) -> None:
    """Give the attention of fresh blocks the look of a trained one (mimetic initialisation: Trockman and Kolter 2023, arXiv
    2305.09828): the product of a head's query and key weights is near the identity, so that a token attends to those like itself, that
    of value and output weights near its negative. Each product is a share of a random matrix and the same share of the identity."""
    width = vit.config.width
    attentions = [module for module in vit.modules() if isinstance(module, Attention)]
    for number, attention in enumerate(attentions):
        name = f"blocks.{number}.attn"
        query_DD, key_DD, value_DD = attention.qkv.weight.chunk(3)
        by_head = (part_DD.chunk(vit.config.heads) for part_DD in (query_DD, key_DD))
        for head, (query_KD, key_KD) in enumerate(zip(*by_head, strict=True)):
            left_DD, right_DD = _near_identity(QUERY_KEY_SHARE, width, seed, f"{name}.query-key.{head}")
            query_KD.copy_(left_DD[:, : len(query_KD)].T)
            key_KD.copy_(right_DD[: len(key_KD)])
        left_DD, right_DD = _near_identity(VALUE_OUTPUT_SHARE, width, seed, f"{name}.value-output")
        value_DD.copy_(left_DD.T)
        attention.proj.weight.copy_(right_DD.T)


def _near_identity(share: float, width: int, seed: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices whose product is `share` of the identity and as much of a random matrix; the first columns of one and rows of the other
    have most of it."""
    product_DD = torch.empty(width, width)
    _draw(partial(nn.init.normal_, std=width**-0.5), seed, name, product_DD)
    left_DD, scale_D, right_DD = torch.linalg.svd(abs(share) * product_DD + share * torch.eye(width))
    return left_DD * scale_D.sqrt(), scale_D.sqrt()[:, None] * right_DD


def _draw(fill: Callable[..., torch.Tensor], seed: int, name: str, weight: torch.Tensor) -> None:
    """Fill `weight` with random numbers of this seed and name, drawn on the host: the same on every device."""
    high, low = rng.words(seed, rng.Purpose.INITIAL_WEIGHTS, 0, zlib.crc32(name.encode()), 2).tolist()
    drawn = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    weight.copy_(fill(drawn, generator=torch.Generator().manual_seed(high << 32 | low)))


def stochastic_depth_rates(depth: int, drop_path: float) -> list[float]:
    """Probability of dropping each of the 2 * depth residual branches: rising linearly from 0 to `drop_path`
    (Huang et al. 2016, arXiv 1603.09382), the same for both branches of a block."""
    return [drop_path * (layer // 2) / max(1, depth - 1) for layer in range(2 * depth)]
