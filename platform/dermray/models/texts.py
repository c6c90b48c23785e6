"""No more text than counts: padding that cannot reach a text's features is cut off, equal texts are encoded once.

Neither changes what is computed, only its rounding. A causal tower that pools at the end-of-text token never looks
beyond it; a Hugging Face tower masks its padding. Texts of like length go through the tower together, so that one long
text does not lengthen all. Towers that do look at padding get their tokens as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler
from open_clip.model import CustomTextCLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

# Lengths are multiples of this, so that few shapes occur: of compiled graphs, and of blocks of memory.
LENGTH_STEP = 8
# What one more pass through the tower costs beside its positions, in positions: a GPU has kernels to start.
PASS_COST = {"cpu": 64}
PASS_COST_ON_GPU = 2048

Rows = Tensor | list[Tensor]


class ShortTextCLIP(CLIP):
    """open_clip's CLIP, whose text tower also takes texts shorter than the context length, and several lengths."""

    def encode_text(self, text: Rows, normalize: bool = False) -> Tensor:
        """int64 `[n, L]`, or several of these → `[n, D]`, as in the parent, which adds its whole table of positions."""
        if isinstance(text, list):
            return torch.cat([self.encode_text(rows, normalize) for rows in text])
        length = text.shape[1]
        cast_dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(cast_dtype) + self.positional_embedding[:length].to(cast_dtype)
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        x = self.ln_final(self.transformer(x, attn_mask=mask))
        x = text_global_pool(x, text, self.text_pool_type, eos_token_id=self.text_eos_id)
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x


class ShortTextTwoTowers(CustomTextCLIP):
    """open_clip's model with a text tower of its own, which takes texts of several lengths."""

    def encode_text(self, text: Rows, normalize: bool = False) -> Tensor:
        """int64 `[n, L]`, or several of these → `[n, D]`."""
        if isinstance(text, list):
            return torch.cat([self.encode_text(rows, normalize) for rows in text])
        return super().encode_text(text, normalize)


class ShortTextTransformer(TextTransformer):
    """open_clip's text tower, whose causal mask fits texts shorter than the context length too."""

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)
        return x, mask[: x.shape[1], : x.shape[1]] if mask is not None and mask.ndim == 2 else mask


def accept_short(model: nn.Module) -> None:
    """Let a model of open_clip's take what `grouped` gives, in place.

    Parameters, their names and the figures for whole texts stay.
    """
    short: dict[type[nn.Module], type[nn.Module]] = {CLIP: ShortTextCLIP, CustomTextCLIP: ShortTextTwoTowers}
    model.__class__ = short.get(type(model), type(model))
    text = getattr(model, "text", None)
    if type(text) is TextTransformer:
        text.__class__ = ShortTextTransformer


def grouped(model: nn.Module, tokens: Tensor, device: torch.device) -> tuple[Rows, Tensor | None]:
    """The distinct texts of int64 `[n, L]`, as short as they may be, for `model.encode_text` or `model.forward`.

    Args:
        model: made by `dermray.models.create`, not wrapped; another model gets whole texts.
        tokens: on the CPU.
        device: where the model is; rows are moved there.

    Returns:
        `(rows, index)`: one tensor `[m, l]`, or several of different length `l`, each a multiple of 8 or `L` itself;
        and for `expanded` which row each text is, int64 `[n]`, or None where it is its own.
    """
    rows, index = distinct(tokens)
    lengths = _needed_lengths(model, rows)
    if lengths is None or len(rows) == 0:
        return rows.to(device, non_blocking=True), index
    lengths = (-(-lengths // LENGTH_STEP) * LENGTH_STEP).clamp(max=tokens.shape[1])
    order = lengths.argsort(stable=True)
    ends = _cuts(lengths[order].tolist(), PASS_COST.get(device.type, PASS_COST_ON_GPU))
    if len(ends) == 1:
        return rows[:, : int(lengths.max())].to(device, non_blocking=True), index
    parts = [
        rows[order[begin:end], : int(lengths[order[end - 1]])].to(device, non_blocking=True)
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return parts, place if index is None else place[index]


def distinct(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """The distinct rows of int64 `[n, L]` in the order of their first occurrence, and which of them each row is.

    Returns:
        `(rows [m, L], index int64 [n])` with `tokens == rows[index]`; the index is None where no two rows are equal.
    """
    keys = [row.tobytes() for row in tokens.numpy()]
    first: dict[bytes, int] = {}
    for position, key in enumerate(keys):
        first.setdefault(key, position)
    if len(first) == len(keys):
        return tokens, None
    number_of = {key: number for number, key in enumerate(first)}
    return tokens[list(first.values())], torch.tensor([number_of[key] for key in keys])


def expanded(features: Tensor, index: Tensor | None) -> Tensor:
    """Features of distinct texts `[m, D]` to those of all `[n, D]`; gradients of equal texts add up."""
    # Unlike an index in brackets, this adds gradients in a fixed order on a CPU.
    return features if index is None else features.index_select(0, index.to(features.device))


def num_positions(rows: Rows) -> int:
    """How many token positions the tower goes over."""
    return sum(part.numel() for part in (rows if isinstance(rows, list) else [rows]))


def _needed_lengths(model: nn.Module, tokens: Tensor) -> Tensor | None:
    """For every text the length on which its features depend, int64 `[n]`; None: the whole."""
    text = getattr(model, "text", None)
    if isinstance(model, ShortTextCLIP) and model.attn_mask is not None:
        return _length_to_pooled(tokens, model.text_pool_type, model.text_eos_id)
    if isinstance(text, ShortTextTransformer) and text.attn_mask is not None and text.cls_emb is None:
        return _length_to_pooled(tokens, text.pool_type, text.eos_id)
    if isinstance(text, HFTextEncoder) and isinstance(text.pooler, MeanPooler | ClsPooler | ClsLastHiddenStatePooler):
        is_text = tokens != text.config.pad_token_id
        return (is_text * torch.arange(1, tokens.shape[1] + 1)).amax(dim=1).clamp(min=1)
    return None


def _length_to_pooled(tokens: Tensor, pool_type: str, eos_id: int) -> Tensor | None:
    """Of causal towers, up to the position where `text_global_pool` takes the features from."""
    if pool_type == "argmax":
        return tokens.argmax(dim=1) + 1
    if pool_type == "eos":
        return (tokens == eos_id).int().argmax(dim=1) + 1
    return None


def _cuts(lengths: Sequence[int], pass_cost: int) -> list[int]:
    """Where to cut texts of ascending length into passes, so that positions and passes cost least: the passes' ends."""
    ends = [n for n in range(1, len(lengths)) if lengths[n] > lengths[n - 1]] + [len(lengths)]
    best: list[tuple[int, list[int]]] = [(0, [])]
    for number, end in enumerate(ends):
        begins = [0, *ends[:number]]
        best.append(
            min(
                (cost + (end - begin) * lengths[end - 1] + pass_cost, [*cuts, end])
                for begin, (cost, cuts) in zip(begins, best, strict=True)
            )
        )
    return best[-1][1]
