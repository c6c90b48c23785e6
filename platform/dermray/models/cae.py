"""CAE v2 (Zhang et al., 2022, arXiv 2211.09799), by which PanDerm was pretrained: latents of hidden patches.

An encoder sees the visible patches alone. A regressor predicts from them, by cross-attention, what the encoder would
make of the masked ones. A norm and a linear head, the same for all tokens, lead to the space of a teacher. Parameter
names are those of the public code. Shapes: B images, N patches, M masked and V = N - M visible ones, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermray.errors import ModelError
from dermray.models.panderm import INIT_STD, NORM_EPS, Mlp, Trunk, scaled, sincos_table

FIRST_MLP = "encoder.blocks.0.mlp.fc1.weight"
# Of the hidden layers of MLPs, over the width of tokens.
MLP_RATIO = 4


def visible_then_masked(mask: Tensor) -> Tensor:
    """Numbers of an image's patches, the visible ones first, each part in its order: bool `[B, N]` → int64 `[B, N]`.

    `[[0, 1, 0, 1]]` → `[[0, 2, 1, 3]]`.
    """
    return mask.to(torch.uint8).argsort(dim=1, stable=True)


def reordered(tokens: Tensor, mask: Tensor) -> Tensor:
    """Tokens of class and patches `[B, 1 + N, D]` in the order class, visible, masked, as `CaeV2` predicts them."""
    order = visible_then_masked(mask)
    first = torch.zeros_like(order[:, :1])
    return tokens.gather(1, torch.cat([first, order + 1], dim=1)[:, :, None].expand(-1, -1, tokens.shape[2]))


class CrossAttention(nn.Module):
    """Attention of some tokens to others; queries and values have a bias, keys have none."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`[B, M, D]`, `[B, N, D]`, `[B, N, D]` → `[B, M, D]`."""
        projected = (
            F.linear(queries, self.q.weight, self.q_bias),
            self.k(keys),
            F.linear(values, self.v.weight, self.v_bias),
        )
        # [B, L, D] as [B, H, L, D / H]
        split = [each.unflatten(2, (self.heads, -1)).transpose(1, 2) for each in projected]
        mixed = F.scaled_dot_product_attention(*split)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class RegressorBlock(nn.Module):
    """Masked tokens look at the visible ones and at themselves. The second norm replaces the residual stream."""

    def __init__(self, width: int, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.gamma_1_cross = nn.Parameter(torch.full((width,), layer_scale))
        self.gamma_2_cross = nn.Parameter(torch.full((width,), layer_scale))
        self.norm1_q = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm1_k = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm1_v = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm2_cross = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp_cross = Mlp(width, MLP_RATIO * width)

    def forward(self, x: Tensor, visible: Tensor, positions: Tensor, kept: Tensor | None = None) -> Tensor:
        """Masked tokens `[B, M, D]` → the same.

        Args:
            x: masked tokens, without their positions.
            visible: what the encoder made of visible patches, `[B, V, D]`.
            positions: of visible and then of masked patches, `[B, V + M, D]`; values have none.
            kept: `[B, 2]`, what each branch of each image is multiplied with.
        """
        both = torch.cat([visible, x], dim=1)
        mixed = self.cross_attn(
            self.norm1_q(x + positions[:, -x.shape[1] :]), self.norm1_k(both + positions), self.norm1_v(both)
        )
        x = self.norm2_cross(x + scaled(self.gamma_1_cross * mixed, kept, 0))
        return x + scaled(self.gamma_2_cross * self.mlp_cross(x), kept, 1)


class Regressor(nn.Module):
    """The blocks; its own last norm is in every checkpoint and is applied nowhere, as published."""

    def __init__(self, width: int, layers: int, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.regressor_blocks = nn.ModuleList(RegressorBlock(width, heads, layer_scale) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Tensor, visible: Tensor, positions: Tensor, kept: Tensor | None = None) -> Tensor:
        """As a block; `kept` is `[B, 2 * layers]`."""
        of_blocks = [None] * len(self.regressor_blocks) if kept is None else kept.split(2, dim=1)
        for block, of_block in zip(self.regressor_blocks, of_blocks, strict=True):
            x = block(x, visible, positions, of_block)
        return x


class Decoder(nn.Module):
    """To the teacher's space: a norm and a linear layer."""

    def __init__(self, width: int, teacher_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, teacher_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, L, D]` → `[B, L, D_teacher]`."""
        return self.head(self.norm(tokens))


class CaeV2(nn.Module):
    """Encoder, regressor and head, with CAE v2's initial weights.

    Hidden layers of MLPs begin four times as wide as tokens; a state dict that is loaded decides otherwise.

    Args:
        image_size: side of the image in pixels, a multiple of `patch_size`.
        width: of the tokens, a multiple of 4 and of `heads`.
        layers: blocks of the encoder.
        regressor_layers: blocks of the regressor.
        teacher_width: width of what is predicted.
        layer_scale: initial value of every block's branch scales; published are 0.1 for the base and 1e-5 for the large
            model.

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
        regressor_layers: int = 4,
        teacher_width: int = 512,
        *,
        layer_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_branches = 2 * layers, 2 * regressor_layers
        self.encoder = Trunk(image_size, patch_size, width, layers, heads, mlp_ratio=MLP_RATIO, layer_scale=layer_scale)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # A parameter, because checkpoints hold it; fixed, because it is a table.
        self.rd_pos_embed = nn.Parameter(sincos_table(image_size // patch_size, width), requires_grad=False)
        self.regresser = Regressor(width, regressor_layers, heads, layer_scale)
        self.decoder = Decoder(width, teacher_width)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier's uniform weights in every linear layer, truncated normal ones in what is none, no bias."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for token in (self.encoder.cls_token, self.mask_token):
            nn.init.trunc_normal_(token, std=INIT_STD, a=-INIT_STD, b=INIT_STD)

    def forward(
        self, images: Tensor, mask: Tensor, *, num_masked: int | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """What the teacher is expected to say of every token.

        Args:
            images: normalised, `[B, 3, S, S]`.
            mask: bool `[B, N]`, true where a patch is masked; of as many patches in every image.
            num_masked: how many, for who knows it: counting them waits for the device, and is then left out.
            kept: `[B, 2 * (layers + regressor_layers)]`, what each residual branch of each image is multiplied with:
                0 where drop path leaves it out, and 1 over the share of those that stay elsewhere.

        Returns:
            Unit vectors `[B, 1 + N, D_teacher]` in the order class, visible patches, masked patches, float32 or wider.

        Raises:
            ModelError: another number of patches, none masked or all, or another number of them in some image.
        """
        if mask.shape != (len(images), self.rd_pos_embed.shape[1] - 1):
            raise ModelError(
                f"the mask is {list(mask.shape)}, and must be [{len(images)}, {self.rd_pos_embed.shape[1] - 1}]"
            )
        count = _same_count(mask) if num_masked is None else num_masked
        order = visible_then_masked(mask).to(images.device)
        of_encoder, of_regressor = (None, None) if kept is None else kept.split(self.num_branches, dim=1)
        visible = order[:, :-count]
        seen = self.encoder.norm(self.encoder.forward_blocks(self.encoder.embed(images, visible), of_encoder))
        # Repeated, not expanded: a counter of operations cannot follow a view of a parameter without gradients.
        hidden = self.mask_token.to(seen.dtype).repeat(len(images), count, 1)
        # Its own table, row by row as the order says; the class token is not shown to the regressor.
        positions = self.rd_pos_embed[0, 1:][order]
        hidden = self.regresser(hidden, seen[:, 1:], positions, of_regressor)
        predicted = self.decoder(torch.cat([seen, hidden], dim=1))
        return F.normalize(predicted.to(torch.promote_types(predicted.dtype, torch.float32)), dim=-1)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module, after the MLPs have been made as wide as those of the state dict."""
        first = state_dict.get(FIRST_MLP)
        if isinstance(first, Tensor) and len(first) != len(self.state_dict()[FIRST_MLP]):
            for module in self.modules():
                if isinstance(module, Mlp):
                    width = module.fc2.out_features
                    module.fc1 = nn.Linear(width, len(first)).to(self.mask_token)
                    module.fc2 = nn.Linear(len(first), width).to(self.mask_token)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _same_count(mask: Tensor) -> int:
    """How many patches of every image are masked.

    Raises:
        ModelError: not as many in each, none, or all.
    """
    counts = mask.bool().sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ModelError(f"every image must have as many masked patches: image 0 has {counts[0]}, others {max(counts)}")
    if not 0 < counts[0] < mask.shape[1]:
        raise ModelError(f"{counts[0]} of {mask.shape[1]} patches are masked; some must be, and some must be left")
    return counts[0]


def drop_path_rates(rate: float, layers: int, regressor_layers: int) -> list[float]:
    """How likely each residual branch is left out: from 0 to `rate` over the encoder, and again over the regressor.

    `(0.1, 2, 1)` → `[0, 0, 0.1, 0.1, 0, 0]`: a block has two branches.
    """
    of_blocks = [rate * number / max(1, depth - 1) for depth in (layers, regressor_layers) for number in range(depth)]
    return [each for each in of_blocks for _ in range(2)]
