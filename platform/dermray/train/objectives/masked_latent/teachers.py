"""What says of an image's tokens what is to be learned: a frozen CLIP's image tower, or the encoder's own average."""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from dermray import models
from dermray.errors import ModelError
from dermray.losses.gather import gather_rows
from dermray.models.panderm import PanDermVisionTransformer, Trunk, sincos_table
from dermray.train.objectives.make.patches import image_and_patches, require_patches
from dermray.train.objectives.masked_latent.towers import no_patches

# How much the common part of targets follows those of a step.
CENTRE_RATE = 0.1
# The average follows steps faster in the beginning: at step t by the decay (1 + t) / (10 + t) at most.
RAMP = 10


class Teacher(Protocol):
    """Tokens of whole images.

    Attributes:
        width: of a token.
        size: side in pixels of the images that it takes; None: those of the encoder.
    """

    width: int
    size: int | None

    @property
    def visual(self) -> nn.Module:
        """Its tower."""

    def __call__(self, levels: Tensor) -> Tensor:
        """Unit vectors `[B, 1 + N, D]` of class and patches, of RGB levels 0 to 255, float32 `[B, 3, T, T]`."""
        ...


class ClipTeacher:
    """The image tower of a CLIP model: its last norm and projection on every token.

    Its images are so large that its patches are as many as the encoder's. A learned position table of another grid is
    resized bicubically, antialiased, as open_clip resizes those of checkpoints; PanDerm's is computed.

    Args:
        name: an architecture, a folder or a hub id.
        pretrained: its weights (`models.create`).
        grid: patches on a side.

    Raises:
        ModelError: no such model, or its tower gives no patches.
    """

    def __init__(self, name: str, pretrained: str | None, grid: int, device: torch.device) -> None:
        model, _, _ = models.create(name, pretrained)
        self.visual = model.get_submodule("visual")
        try:
            require_patches(self.visual, name)
        except ModelError:
            raise no_patches(name) from None
        preprocessing = models.preprocessing(model)
        self.size: int | None = grid * _patch_size(self.visual)
        fit_to_grid(self.visual, grid)
        self.visual.requires_grad_(False).eval().to(device)
        if device.type == "cuda":
            self.visual.to(torch.bfloat16)
        self._mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1) * 255
        with torch.no_grad():
            self.width = self(torch.zeros(1, 3, self.size, self.size, device=device)).shape[2]

    def __call__(self, levels: Tensor) -> Tensor:
        """As `Teacher`."""
        pixels = (levels - self._mean) / self._std
        image, patches = image_and_patches(self.visual, pixels.to(next(self.visual.parameters()).dtype))
        return F.normalize(torch.cat([image[:, None], patches], dim=1).float(), dim=-1)


def _patch_size(visual: nn.Module) -> int:
    if isinstance(visual, PanDermVisionTransformer):
        return int(visual.patch_embed.proj.kernel_size[0])
    assert isinstance(visual, VisionTransformer)
    return int(visual.patch_size[0])


def fit_to_grid(visual: nn.Module, grid: int) -> None:
    """Let a tower take images of another number of patches, in place."""
    if isinstance(visual, PanDermVisionTransformer):
        visual.image_size = grid * _patch_size(visual)
        visual.pos_embed = nn.Parameter(sincos_table(grid, visual.pos_embed.shape[2]), requires_grad=False)
        return
    assert isinstance(visual, VisionTransformer)
    table = visual.positional_embedding
    old = math.isqrt(len(table) - 1)
    if old != grid:
        # [1 + old², D] as a picture [1, D, old, old], and back
        picture = table[1:].T.reshape(1, -1, old, old)
        resized = F.interpolate(picture, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
        visual.positional_embedding = nn.Parameter(torch.cat([table[:1], resized[0].flatten(1).T]))
    visual.grid_size = (grid, grid)
    visual.image_size = (grid * _patch_size(visual),) * 2


class AverageTeacher:
    """The moving average of the encoder, on whole images, as in data2vec (Baevski et al., 2022).

    A token's latent is the mean of the last blocks' results, each normalised, less what the latents of all images have
    in common (a moving mean, of class and patch tokens apart): if all images looked the same to the encoder, nothing
    would be left to agree on.

    Args:
        encoder: what is averaged.
        decay: of the average, a step.
        layers: how many of the last blocks.
        mean, std: of RGB levels 0 to 255.
    """

    def __init__(self, encoder: Trunk, decay: float, layers: int, mean: Tensor, std: Tensor) -> None:
        self.visual: Trunk = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.width: int = encoder.pos_embed.shape[2]
        self.size: int | None = None
        self._decay, self._layers, self._mean, self._std = decay, layers, mean, std
        self.centre = torch.zeros(2, self.width, device=mean.device)
        self.num_updates = torch.zeros((), device=mean.device)
        self._seen: list[Tensor] = []

    def __call__(self, levels: Tensor) -> Tensor:
        """As `Teacher`."""
        x = self.visual.embed((levels - self._mean) / self._std)
        latents = torch.zeros((), device=x.device)
        for number, block in enumerate(self.visual.blocks):
            x = block(x)
            if number >= len(self.visual.blocks) - self._layers:
                latents = latents + F.layer_norm(x.float(), (self.width,))
        latents = latents / min(self._layers, len(self.visual.blocks))
        first, patches = latents[:, :1], latents[:, 1:]
        self._seen.append(torch.stack([first.mean(dim=(0, 1)), patches.mean(dim=(0, 1))]) * len(levels))
        centred = torch.cat([first - self.centre[0], patches - self.centre[1]], dim=1)
        return F.normalize(centred, dim=-1)

    def forget(self) -> None:
        """What was seen since the last step counts nothing: it was no training."""
        self._seen = []

    @torch.no_grad()
    def follow(self, encoder: Trunk, num_samples: int, taken: Tensor) -> None:
        """Move towards the encoder after a step.

        Args:
            num_samples: of this rank in the step.
            taken: 1, or 0 for a step that was skipped.
        """
        # Every rank has as many samples.
        mean = gather_rows((sum(self._seen, torch.zeros_like(self.centre)) / num_samples)[None]).mean(dim=0)
        self._seen = []
        self.centre = torch.where(taken > 0, self.centre.lerp(mean, CENTRE_RATE), self.centre)
        decay = torch.clamp((1 + self.num_updates) / (RAMP + self.num_updates), max=self._decay)
        weight = taken * (1 - decay)
        for own, parameter in zip(self.visual.parameters(), encoder.parameters(), strict=True):
            own.lerp_(parameter.detach(), weight.to(own.dtype))
        self.num_updates = self.num_updates + taken

    def state(self) -> dict[str, Any]:
        """What changes with the steps."""
        return {"average": self.visual.state_dict(), "centre": self.centre, "num_updates": self.num_updates}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint.

        Raises:
            KeyError, RuntimeError: it does not fit.
        """
        self.visual.load_state_dict(state["average"])
        self.centre.copy_(state["centre"])
        self.num_updates.copy_(state["num_updates"])
