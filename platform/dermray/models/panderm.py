"""The PanDerm vision tower as DermLIP uses it (Yan et al., 2025): a CAE v2 encoder with a projection head.

Parameter names and shapes are those of the public checkpoints. Shapes: B images, N patches, D width, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dermray.errors import ModelError

NORM_EPS = 1e-6
INIT_STD = 0.02


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

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, D]` → `[B, L, D]`."""
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, row by row."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, S, S]` → `[B, N, D]`."""
        return self.proj(images).flatten(2).transpose(1, 2)


class PanDermTrunk(nn.Module):
    """What PanDerm's networks have in common: patches, class token, fixed positions, blocks and one LayerNorm.

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

    def initialise(self) -> None:
        """Random weights of all linear layers and of the patches, as BEiT begins."""
        nn.init.trunc_normal_(self.cls_token, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def positions(self, rows: int, columns: int) -> Tensor:
        """The table for a grid of patches, `[1, 1 + rows * columns, D]`: of another grid than its own, bilinear."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (rows, columns) == (side, side):
            return self.pos_embed
        patches = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(patches, (rows, columns), mode="bilinear", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` → tokens before the first block `[B, 1 + N, D]`, the class token first."""
        patches = self.patch_embed(images)
        rows, columns = (side // self.patch_embed.proj.stride[0] for side in images.shape[2:])
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.positions(rows, columns)

    def run(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """Tokens after a block, `[B, 1 + N, D]`; recomputed in the backward pass where that is set."""
        recompute = self.grad_checkpointing and self.training
        return checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)


class PanDermVisionTransformer(PanDermTrunk):
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
        super().__init__(image_size, patch_size, width, layers, heads, mlp_ratio, layer_scale)
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

    def forward_tokens(self, images: Tensor) -> Tensor:
"""`[B, 3, H, W]` → normalised tokens `[B, 1 + N, D]`, the class token first; sides are multiples of a patch."""
        x = self.embed(images)
        for block in self.blocks:
            x = self.run(block, x)
        return self.norm(x)

    def forward_features(self, images: Tensor) -> Tensor:
        """`[B, 3, S, S]` → pooled features `[B, D]`, before the head: what a linear probe reads."""
        return self.norm(self.forward_tokens(images)[:, 1:].mean(dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, S, S]` → `[B, output_dim]`, not normalised."""
        return self.head(self.forward_features(images))
