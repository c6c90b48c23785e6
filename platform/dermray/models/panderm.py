"""PanDerm's vision tower (Yan et al., 2025), a CAE v2 encoder: with a head as DermLIP uses it, and read by itself.

Parameter names and shapes are those of the public checkpoints. Shapes: B images, N patches, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dermray.errors import ModelError

NORM_EPS = 1e-6
INIT_STD = 0.02
# CAE v2 checkpoints hold the tower as `encoder`, joint ones as `visual`.
VISION_PREFIXES = ("visual.", "encoder.")
# What CAE v2 trains beside the encoder.
COMPANION_PREFIXES = ("teacher.", "regresser.", "decoder.", "mask_token", "rd_pos_embed")

Pooling = Literal["class", "mean"]


def of_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a vision tower alone, out of a checkpoint of its own, of a joint model, or of CAE v2 pretraining.

    `{"encoder.norm.bias": …, "mask_token": …}` → `{"norm.bias": …}`.
    """
    prefix = next((p for p in VISION_PREFIXES if any(key.startswith(p) for key in state)), "")
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def without_companions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `of_tower` gives, less what CAE v2 trains beside an encoder that is named without a prefix."""
    return {key: value for key, value in state.items() if not key.startswith(COMPANION_PREFIXES)}


def sincos_table(grid: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, float32 `[1, 1 + grid², width]`; the class token's row is zero.

    A patch at (row r, column c) has `[sin(r w), cos(r w), sin(c w), cos(c w)]` with `w_k = 10000^(-4k / width)`.
    """
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    half = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = half[:, None].expand(grid, grid, 2 * quarter)
    columns = half[None].expand(grid, grid, 2 * quarter)
    patches = torch.cat([rows, columns], dim=2).reshape(grid * grid, width)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches]).float()[None]


class Attention(nn.Module):
    """Self-attention with one fused projection; queries and values have a bias, keys have none."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, D]` → `[B, L, D]`."""
        batch, length, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """Two linear layers around the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, D]` → `[B, L, D]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; each branch is scaled by channel."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, layer_scale: float) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale))
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """`[B, L, D]` → `[B, L, D]`; `kept`, `[B, 2]`, is what each branch of each image is multiplied with."""
        x = x + scaled(self.gamma_1 * self.attn(self.norm1(x)), kept, 0)
        return x + scaled(self.gamma_2 * self.mlp(self.norm2(x)), kept, 1)


def scaled(branch: Tensor, kept: Tensor | None, number: int) -> Tensor:
    """A residual branch `[B, L, D]`, multiplied image by image with column `number` of `kept` (drop path)."""
    return branch if kept is None else kept[:, number, None, None].to(branch.dtype) * branch


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, row by row."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """`[B, 3, S, S]` → `[B, N, D]`; with numbers of visible patches, int64 `[B, V]`, only these: `[B, V, D]`."""
        if visible is None:
            return self.proj(images).flatten(2).transpose(1, 2)
        side = self.proj.kernel_size[0]
        grid = images.shape[-1] // side
        # [B, 3, S, S] as [B, rows, columns, 3, P, P], of which the visible ones alone are copied.
        tiles = images.unflatten(3, (grid, side)).unflatten(2, (grid, side)).permute(0, 2, 4, 1, 3, 5)
        of_image = torch.arange(len(images), device=images.device)[:, None]
        chosen = tiles[of_image, visible // grid, visible % grid]
        return F.linear(chosen.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


class Trunk(nn.Module):
    """What all of PanDerm's towers begin with, and CAE v2's encoder is: patches, positions, blocks, a last norm.

    Args:
        image_size: side of the image in pixels, a multiple of `patch_size`.
        width: of the tokens, a multiple of 4 and of `heads`.
        layer_scale: initial value of each block's branch scales.

    Raises:
        ModelError: sizes that do not divide.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.1,
    ) -> None:
        super().__init__()
        if image_size % patch_size or width % heads or width % 4:
            raise ModelError(
                f"PanDerm tower: image_size {image_size} must be a multiple of patch_size {patch_size}, and width "
                f"{width} one of 4 and of heads {heads}"
            )
        # open_clip and `models.preprocessing` read the input's side from here.
        self.image_size = image_size
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbedding(patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # A parameter, because checkpoints hold it; fixed, because it is a table.
        self.pos_embed = nn.Parameter(sincos_table(image_size // patch_size, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, layer_scale) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def initialise(self) -> None:
        """Random weights of all linear layers and of the patches, as BEiT begins."""
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The table for a grid of patches, `[1, 1 + rows * columns, D]`: of another grid than its own, bilinear."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (rows, columns) == (side, side):
            return self.pos_embed
        patches = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(patches, (rows, columns), mode="bilinear", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """`[B, 3, H, W]`, sides multiples of a patch, → tokens with positions `[B, 1 + N, D]`, the class token first.

        With the numbers of visible patches, int64 `[B, V]`, `[B, 1 + V, D]` of these alone, in their order.
        """
        patches = self.patch_embed(images, visible)
        positions = self.positions(*(side // self.patch_embed.proj.stride[0] for side in images.shape[2:]))
        first, table = positions[:, :1], positions[:, 1:]
        patches = patches + (table if visible is None else table[0][visible])
        return torch.cat([(self.cls_token + first).expand(len(patches), -1, -1), patches], dim=1)

    def run(self, block: nn.Module, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """Tokens after a block, `[B, L, D]`; recomputed in the backward pass where that is set."""
        recompute = self.grad_checkpointing and self.training
        return checkpoint(block, tokens, kept, use_reentrant=False) if recompute else block(tokens, kept)

    def forward_blocks(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """`[B, L, D]` → `[B, L, D]`, not normalised; `kept`, `[B, 2 * layers]`, scales the branches (drop path)."""
        of_blocks = [None] * len(self.blocks) if kept is None else kept.split(2, dim=1)
        for block, of_block in zip(self.blocks, of_blocks, strict=True):
            x = self.run(block, x, of_block)
        return x

    def forward_tokens(self, images: Tensor) -> Tensor:
        """`[B, 3, S, S]` → normalised tokens `[B, 1 + N, D]`, the class token first."""
        return self.norm(self.forward_blocks(self.embed(images)))

    def forward(self, images: Tensor) -> Tensor:
        """As `forward_tokens`; towers that pool give what they make of it."""
        return self.forward_tokens(images)


class PanDermVisionTransformer(Trunk):
    """Square images, normalised, to the joint embedding space.

    The final LayerNorm is used twice, as published: on every token after the last block, and again on the mean of
    the patch tokens. The class token takes part in attention; its output is not read.

    Args:
        image_size: side of the image in pixels, a multiple of `patch_size`.
        width: of the tokens, a multiple of 4 and of `heads`.
        output_dim: width of the joint space.
        layer_scale: initial value of each block's branch scales.

    Raises:
        ModelError: sizes that do not divide.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        output_dim: int = 512,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.1,
    ) -> None:
        super().__init__(image_size, patch_size, width, layers, heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale)
        self.output_dim = output_dim
        self.head = nn.Linear(width, output_dim)
        self.initialise()

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Keep all weights but those of the last groups, by open_clip's interface; there is no batch norm.

        Groups are the patch embedding with the class token, each block, the head; the last block has the last norm.
        """
        *blocks, last = ([*block.parameters()] for block in self.blocks)
        groups = [
            [*self.patch_embed.parameters(), self.cls_token],
            *blocks,
            [*last, *self.norm.parameters()],
            [*self.head.parameters()],
        ]
        self.requires_grad_(False)
        for group in groups[max(0, len(groups) - unlocked_groups) :]:
            for parameter in group:
                parameter.requires_grad_(True)

    def forward_features(self, images: Tensor) -> Tensor:
        """`[B, 3, S, S]` → pooled features `[B, D]`, before the head: what a linear probe reads."""
        return self.norm(self.forward_tokens(images)[:, 1:].mean(dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, S, S]` → `[B, output_dim]`, not normalised."""
        return self.head(self.forward_features(images))


class PanDermEncoder(Trunk):
    """The tower read by itself, as PanDerm's own repository does.

    Args:
        pooling: `class`: the last norm on every token, then the class token (its linear probe); `mean`: the mean of the
            patch tokens, then the norm, which its checkpoints call `fc_norm` (its fine-tuning).
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        pooling: Pooling = "class",
    ) -> None:
        super().__init__(image_size, patch_size, width, layers, heads, mlp_ratio=mlp_ratio)
        self.pooling = pooling

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, S, S]` → features `[B, D]`, not of length 1."""
        x = self.forward_blocks(self.embed(images))
        return self.norm(x[:, 0] if self.pooling == "class" else x[:, 1:].mean(dim=1))
