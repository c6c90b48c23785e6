"""What a step costs, by counting: three forward passes (one forward, two backward; Kaplan et al., 2020).

A forward pass is what `torch.utils.flop_counter` counts for one image and one text of full length (a multiply-add is
two). Texts count in proportion to the positions that are encoded: trimmed, and equal ones once. Recomputed activations
and the loss count nothing. Backward passes of a locked tower count by the share of its matrices that is trained.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dermray.train.objectives.contrastive.parts import part_of

PASSES_PER_STEP = 3


@dataclass(frozen=True)
class FlopModel:
    """Forward FLOPs of one sample.

    Attributes:
        image: of the vision tower for one image.
        text: of the text tower for one text of `context_length` tokens.
        image_passes, text_passes: of a training step, each as dear as a forward one; 1 of a tower that is locked.
    """

    image: float
    text: float
    context_length: int
    image_passes: float = PASSES_PER_STEP
    text_passes: float = PASSES_PER_STEP

    def of_step(self, num_samples: float, num_tokens: float, image_area: float = 1.0) -> float:
        """FLOPs of a training step on `num_samples` pairs with `num_tokens` text positions encoded for each.

        Images of another size cost by their area over the model's own, though attention costs more.
        """
        of_text = self.text_passes * self.text * num_tokens / self.context_length
        return num_samples * (self.image_passes * self.image * image_area + of_text)


def flop_model(model: nn.Module, *, image_size: int, context_length: int) -> FlopModel:
    """Count the towers of a model of open_clip's interface, without computing anything.

    Args:
        image_size: side of an image in pixels.
        context_length: tokens of a full text.
    """
    shape_only = copy.deepcopy(model).to("meta").train()
    counts = []
    # Transformers looks into a mask for padding unless its tensors are fake ones.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        # A batch norm refuses a single sample.
        pixels = torch.empty(2, 3, image_size, image_size, device="meta")
        tokens = torch.ones(2, context_length, dtype=torch.int64, device="meta")
        for encode, value in ((shape_only.encode_image, pixels), (shape_only.encode_text, tokens)):
            with FlopCounterMode(display=False) as counter:
                encode(value)  # type: ignore[operator]
            counts.append(counter.get_total_flops() / 2)
    return FlopModel(counts[0], counts[1], context_length, _passes(model, "image"), _passes(model, "text"))


def _passes(model: nn.Module, tower: str) -> float:
    """One forward, and two backward by the share of the tower's matrices that is trained; tables are no matrices."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if part_of(name) == tower
        and parameter.ndim in (2, 4)
        and id(parameter) not in tables
        and "positional_embedding" not in name
    ]
    trained = sum(parameter.numel() for parameter in matrices if parameter.requires_grad)
    return 1 + (PASSES_PER_STEP - 1) * trained / sum(parameter.numel() for parameter in matrices)
