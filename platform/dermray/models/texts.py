"""No more text than counts: padding that cannot reach a text's features is cut off, equal texts are encoded once.

Neither changes what is computed, only its rounding. A causal tower that pools at the end-of-text token never looks
beyond it; a Hugging Face tower masks its padding. Towers that do look at padding get their tokens as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

# Lengths are multiples of this, so that few shapes occur: of compiled graphs, and of blocks of memory.
LENGTH_STEP = 8


class ShortTextCLIP(CLIP):
    """open_clip's CLIP, whose text tower also takes texts shorter than the context length."""

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """int64 `[n, L]` → `[n, D]`, as in the parent, which adds its whole table of positions."""
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


class ShortTextTransformer(TextTransformer):
    """open_clip's text tower, whose causal mask fits texts shorter than the context length too."""

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)
        return x, mask[: x.shape[1], : x.shape[1]] if mask is not None and mask.ndim == 2 else mask


def accept_short(model: nn.Module) -> None:
    """Let the text tower of a model of open_clip's take texts shorter than its context length, in place.

    Parameters, their names and the figures for whole texts stay.
    """
    if type(model) is CLIP:
        model.__class__ = ShortTextCLIP
    text = getattr(model, "text", None)
    if type(text) is TextTransformer:
        text.__class__ = ShortTextTransformer


def trimmed(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cut off what no text of the batch needs: int64 `[n, L]` → `[n, l]`, `l` a multiple of 8 or `L` itself.

    Args:
        model: made by `dermray.models.create`, not wrapped; of another model nothing is cut off.
        tokens: best on the CPU, since the result's shape depends on them.
    """
    needed = _needed_length(model, tokens) if len(tokens) else 1
    return tokens[:, : -(-needed // LENGTH_STEP) * LENGTH_STEP]


def distinct(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """The distinct rows of int64 `[n, L]` in the order of their first occurrence, and which of them each row is.

    Returns:
        `(rows [m, L], index int64 [n])` with `tokens == rows[index]`; the index is None where no two rows are equal.
    """
    keys = [row.tobytes() for row in tokens.cpu().numpy()]
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


def _needed_length(model: nn.Module, tokens: Tensor) -> int:
    """Positions from the first to the last that some text's features depend on."""
    text = getattr(model, "text", None)
    if isinstance(model, ShortTextCLIP):
        return _pooled_length(tokens, model.text_pool_type, model.text_eos_id, causal=model.attn_mask is not None)
    if isinstance(text, ShortTextTransformer) and text.cls_emb is None:
        return _pooled_length(tokens, text.pool_type, text.eos_id, causal=text.attn_mask is not None)
    if isinstance(text, HFTextEncoder) and isinstance(text.pooler, MeanPooler | ClsPooler | ClsLastHiddenStatePooler):
        is_text = (tokens != text.config.pad_token_id).any(dim=0)
        return int(is_text.nonzero().max()) + 1 if is_text.any() else 1
    return tokens.shape[1]


def _pooled_length(tokens: Tensor, pool_type: str, eos_id: int, *, causal: bool) -> int:
    if causal and pool_type == "argmax":
        return int(tokens.argmax(dim=-1).max()) + 1
    if causal and pool_type == "eos":
        return int((tokens == eos_id).int().argmax(dim=-1).max()) + 1
    return tokens.shape[1]
