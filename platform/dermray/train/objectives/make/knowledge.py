"""A frozen text encoder that knows diseases, towards whose vectors of the captions those of the model are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dermray import models
from dermray.errors import ModelError
from dermray.losses import ClipLoss
from dermray.train.objectives.contract import Autocast

# Two tokenisers that make the same of these are taken for the same.
PROBES = [
    "Erythematous, scaly plaques on both elbows: psoriasis vulgaris (ICD-10 L40.0).",
    "basal-cell carcinoma 3 x 2 mm",
]


def require_same_texts(folder: str, model: str, pretrained_text: str | None) -> None:
    """Refuse a knowledge encoder that reads other tokens than the model, or gives vectors of another width.

    Args:
        folder: of the encoder.
        model, pretrained_text: of the run.

    Raises:
        ModelError: names what differs.
    """
    models.check(folder)
    theirs, ours = models.architecture(folder), models.architecture(model)
    if theirs["embed_dim"] != ours["embed_dim"]:
        raise ModelError(
            f"objective.knowledge={folder} gives vectors of {theirs['embed_dim']} numbers, and the model {model!r} of "
            f"{ours['embed_dim']}: they cannot be compared; take an encoder of the same width"
        )
    one, other = models.tokenizer(folder)(PROBES), models.tokenizer(model, pretrained_text)(PROBES)
    if one.shape != other.shape or not torch.equal(one, other):
        raise ModelError(
            f"objective.knowledge={folder} reads texts by another tokeniser, or of another length, than the model "
            f"{model!r}: train it with the same text tower (objective.kind=knowledge), and start from it"
        )


class Distillation:
    """CLIP's loss between a text of each sample and what a frozen encoder makes of the same text.

    Attributes:
        value: of the last call, detached.
    """

    def __init__(self, known: Tensor, first: Tensor, labels: Tensor | None = None) -> None:
        """Keep what a batch is compared with.

        Args:
            known: of the frozen encoder, L2-normalised, `[n, D]`.
            first: which text of each sample it is, int64 `[n]`.
            labels: as `ClipLoss` takes them.
        """
        self._known, self._first, self._labels = known, first, labels
        self._loss = ClipLoss("tiled")
        self.value = known.new_zeros(())

    def __call__(self, texts: Tensor, scale: Tensor) -> Tensor:
        """A scalar whose mean over ranks is the loss of the global batch.

        Args:
            texts: L2-normalised, `[n, N, D]`.
            scale: exponentiated, as of the other terms.
        """
        own = texts[torch.arange(len(texts), device=texts.device), self._first]
        loss = self._loss(own, self._known, scale, self._labels)
        self.value = loss.detach()
        return loss


class KnowledgeEncoder:
    """The text tower of a model folder, frozen and in evaluation mode; it is in no checkpoint."""

    def __init__(self, folder: str, device: torch.device, micro_batch_size: int | None = None) -> None:
        """Load it.

        Args:
            folder: of a model of the kind `clip`.
            device: where it computes.
            micro_batch_size: texts that go through it at once; empty: all.

        Raises:
            ModelError: it cannot be loaded.
        """
        self._model: Any = models.create(folder)[0]
        # Nobody asks for its images.
        self._model.visual = nn.Identity()
        self._model.requires_grad_(False).to(device)
        self._device = device
        self._micro_batch_size = micro_batch_size

    @torch.no_grad()
    def __call__(self, tokens: Tensor, autocast: Autocast) -> Tensor:
        """int64 `[n, L]` on the CPU → L2-normalised `[n, D]`, float32."""
        from dermray.models import texts

        parts = []
        for part in tokens.split(self._micro_batch_size or len(tokens)):
            rows, index = texts.grouped(self._model, part, self._device)
            with autocast():
                parts.append(texts.expanded(self._model.encode_text(rows, normalize=True), index).float())
        return torch.cat(parts)
