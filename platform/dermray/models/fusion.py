"""DermFM-Zero's head over several vectors of a case: clinical and dermoscopic image, and a sentence of what is known.

After the released code (arXiv 2602.10624); parameter names and shapes are those of its checkpoints. Shapes: B cases, T
tokens, H width of the image vectors, M of the text's, V width in a layer, K classes.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermray.errors import ModelError
from dermray.models.panderm import Mlp

Modalities = Literal["cdm", "cm", "cd"]
IN_WORDS = {"c": "clinical", "d": "dermoscopic", "m": "meta"}
HEAD_WIDTH = 256
HEAD_DROPOUT = 0.3


class CrossAttention(nn.Module):
    """Queries of one sequence look at both; the queries' own tokens are added before the last projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """`[B, T, V]` and `[B, T', V]` → `[B, T, V]`."""
        keys, values = self.to_kv(torch.cat([x, other], dim=1)).chunk(2, dim=-1)
        queries, keys, values = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.to_q(x), keys, values)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        return self.proj(mixed + x)


class CrossLayer(nn.Module):
    """Cross-attention and an MLP as narrow as the tokens; the first residual is of normalised tokens, as published."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.x_norm1 = nn.LayerNorm(width)
        self.c_norm1 = nn.LayerNorm(width)
        self.attn = CrossAttention(width, heads)
        self.x_norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, width)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """`[B, T, V]` and `[B, T', V]` → `[B, T, V]`."""
        x = self.x_norm1(x)
        x = x + self.attn(x, self.c_norm1(other))
        return x + self.mlp(self.x_norm2(x))


class Residual(nn.Module):
    """Tokens plus what a layer of another width makes of them and of a complement of that width."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        same = width == inner
        self.project_in = nn.Identity() if same else nn.Linear(width, inner)
        self.project_out = nn.Identity() if same else nn.Linear(inner, width)
        self.fn = CrossLayer(inner, heads)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """`[B, T, H]` and `[B, T', V]` → `[B, T, H]`."""
        return x + self.project_out(self.fn(self.project_in(x), other))


class VisualFusion(nn.Module):
    """Clinical and dermoscopic vectors that look at each other, in turns."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Residual(width, width, heads), Residual(width, width, heads)]) for _ in range(depth)
        )

    def forward(self, clinical: Tensor, dermoscopic: Tensor) -> tuple[Tensor, Tensor]:
        """Twice `[B, T, H]` → the same; the dermoscopic one sees the clinical one as it has just become."""
        for pair in self.layers:
            first, second = pair.children()
            clinical = first(clinical, dermoscopic)
            dermoscopic = second(dermoscopic, clinical)
        return clinical, dermoscopic


class MetaFusion(nn.Module):
    """What is known of a case looks at its images, layer by layer."""

    def __init__(self, width: int, inner: int, heads: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(width, inner, heads) for _ in range(depth))

    def forward(self, meta: Tensor, images: Tensor) -> Tensor:
        """`[B, T, H]` and `[B, T', V]` → `[B, T, H]`."""
        for layer in self.layers:
            meta = layer(meta, images)
        return meta


class CrossFusion(nn.Module):
    """Vectors of a case's images and of its facts to its classes. Dropout acts in the head alone.

    Published: H 1,024, M 768 and 8 heads; Derm7pt `cdm` with depth 2 and 4 layers of facts, PAD-UFES-20 `cm` with 2
    layers of facts, MILK `cd` with depth 4.

    Args:
        hidden: H, a multiple of `heads`; times the kinds of images also of `meta_heads`.
        meta: M.
        heads: of the layers between images.
        depth: pairs of these layers.
        meta_heads: of the layers from facts to images.
        meta_depth: these layers.
        num_classes: K.
        modalities: which vectors a case has: c clinical, d dermoscopic, m facts. A model has no weights for others.

    Raises:
        ModelError: modalities that are none, or heads that do not divide.
    """

    def __init__(
        self,
        hidden: int,
        meta: int,
        heads: int,
        depth: int,
        meta_heads: int,
        meta_depth: int,
        num_classes: int,
        modalities: Modalities = "cdm",
    ) -> None:
        super().__init__()
        if modalities not in get_args(Modalities):
            raise ModelError(f"modalities {modalities!r} must be one of {', '.join(get_args(Modalities))}")
        self.modalities = modalities
        # Facts look at the vectors of all images side by side.
        inner = hidden * len(modalities.replace("m", ""))
        if hidden % heads or inner % meta_heads:
            raise ModelError(
                f"hidden {hidden} must be a multiple of heads {heads}, and {inner} one of meta_heads {meta_heads}"
            )
        if "d" in modalities:
            self.fusion = VisualFusion(hidden, heads, depth)
        if "m" in modalities:
            self.meta_proj = nn.Linear(meta, hidden)
            self.meta_fusion = MetaFusion(hidden, inner, meta_heads, meta_depth)
        self.head = nn.Sequential(
            nn.Linear(hidden * len(modalities), HEAD_WIDTH),
            nn.BatchNorm1d(HEAD_WIDTH),
            nn.ReLU(),
            nn.Dropout(HEAD_DROPOUT),
            nn.Linear(HEAD_WIDTH, num_classes),
        )

    def forward(
        self, *, clinical: Tensor | None = None, dermoscopic: Tensor | None = None, meta: Tensor | None = None
    ) -> Tensor:
        """Image vectors `[B, H]` and the facts' `[B, M]`, those of the model's modalities → logits `[B, K]`.

        Raises:
            ModelError: another choice of vectors.
        """
        fused = self.fuse(clinical=clinical, dermoscopic=dermoscopic, meta=meta)
        order = {"cdm": "dmc", "cm": "cm", "cd": "cd"}[self.modalities]
        return self.head(torch.cat([fused[IN_WORDS[letter]] for letter in order], dim=1))

    def fuse(
        self, *, clinical: Tensor | None = None, dermoscopic: Tensor | None = None, meta: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the head sees, by the names of the arguments, `[B, H]` each.

        Raises:
            ModelError: as `forward`.
        """
        given = {"clinical": clinical, "dermoscopic": dermoscopic, "meta": meta}
        # Each vector is a sequence of one token.
        tokens = {name: vector[:, None] for name, vector in given.items() if vector is not None}
        wanted = [IN_WORDS[letter] for letter in self.modalities]
        if sorted(tokens) != sorted(wanted):
            raise ModelError(f"this model takes {', '.join(wanted)}; given are {', '.join(tokens) or 'none'}")
        fused = dict(tokens)
        if "d" in self.modalities:
            fused["clinical"], fused["dermoscopic"] = self.fusion(tokens["clinical"], tokens["dermoscopic"])
        if "m" in self.modalities:
            # The images as they came, not as they have become.
            images = torch.cat([tokens[name] for name in wanted if name != "meta"], dim=-1)
            fused["meta"] = self.meta_fusion(self.meta_proj(tokens["meta"]), images)
        return {name: each[:, 0] for name, each in fused.items()}
