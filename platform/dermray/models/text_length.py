"""Text towers at the length that their texts need: padding is cut before the pass where it cannot change the vector.

Padding is invisible to a pooled token under a causal mask (CLIP, arXiv 2103.00020) and to a BERT with an attention
mask, so a short label costs its own few positions instead of the context length. Lengths are rounded up to a multiple
of `STEP`, and a text's length is its own: it does not depend on what shares its batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer
from torch import nn

STEP = 16
_POOLED_AT_THE_END = ("argmax", "eos")


class TextTower:
    """`model.encode_text` for token batches of any padding. Thread-safe; shares the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap an open_clip model; a tower whose padding counts (SigLIP's, CoCa's) runs at full length."""
        self._model = model
        self._padding_id = _padding_id(model)
        self._views: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 `[N, L]` padded at the end, on the model's device, to features `[N, D]`."""
        if self._padding_id is None or len(tokens) == 0:
            return self._model.encode_text(tokens)  # type: ignore[operator]
        lengths = self._lengths(tokens)
        parts, order = [], []
        for length in lengths.unique().tolist():
            rows = torch.nonzero(lengths == length).flatten()
            parts.append(self._at(length, tokens.shape[1])(tokens[rows, :length]))
            order.append(rows)
        together = torch.cat(parts)
        return together[torch.argsort(torch.cat(order))]

    def _lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions up to the last one that is no padding, rounded up."""
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        used = (positions * (tokens != self._padding_id)).amax(dim=1).clamp(min=1)
        return ((used + STEP - 1) // STEP * STEP).clamp(max=tokens.shape[1])

    def _at(self, length: int, context_length: int) -> Callable[[torch.Tensor], torch.Tensor]:
        if length == context_length:
            return self._model.encode_text  # type: ignore[return-value]
        if length not in self._views:
            self._views[length] = _view(self._model, length)
        return self._views[length]


def _padding_id(model: nn.Module) -> int | None:
    """The token that may be cut at a text's end; None where padding changes the vector."""
    tower: Any = model if isinstance(model, CLIP) else getattr(model, "text", None)
    if isinstance(tower, CLIP):
        return 0 if tower.attn_mask is not None and tower.text_pool_type in _POOLED_AT_THE_END else None
    if isinstance(tower, TextTransformer):
        fits = tower.attn_mask is not None and tower.cls_emb is None and tower.pool_type in _POOLED_AT_THE_END
        return 0 if fits else None
    return getattr(getattr(tower, "config", None), "pad_token_id", None)


def _view(model: nn.Module, length: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same tower whose positions and causal mask end at `length`."""
    if isinstance(model, CLIP):
        return _shortened(model, length).encode_text  # type: ignore[return-value]
    if isinstance(model.text, TextTransformer):
        view = _copied(model)
        view._modules["text"] = _shortened(model.text, length)
        return view.encode_text  # type: ignore[return-value]
    return model.encode_text  # type: ignore[return-value]


def _shortened(tower: nn.Module, length: int) -> nn.Module:
    view = _copied(tower)
    positions = tower.positional_embedding.detach()[:length]  # type: ignore[operator]
    view._parameters["positional_embedding"] = nn.Parameter(positions, requires_grad=False)
    view._buffers["attn_mask"] = tower.attn_mask[:length, :length]  # type: ignore[index]
    return view


def _copied(module: nn.Module) -> nn.Module:
    """A shallow copy whose tables of parameters, buffers and children are its own, their tensors shared."""
    view = copy.copy(module)
    for table in ("_parameters", "_buffers", "_modules"):
        view.__dict__[table] = dict(module.__dict__[table])
    return view
