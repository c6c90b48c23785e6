"""PanDerm's segmentation network (Yan et al., 2025): four of a tower's layers as a pyramid, read by a UPerNet head.

After UPerNet (Xiao et al., 2018, arXiv 1807.10221) as mmsegmentation builds it on a plain vision transformer. Parameter
names and shapes are those of the released code. Shapes: B images, S side in pixels, G = S / patch size, D width of the
tokens, C channels of the head, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermray.errors import ModelError
from dermray.models.panderm import Trunk

POOL_SCALES = (1, 2, 3, 6)
NUM_SCALES = 4


class PyramidBackbone(Trunk):
    """A PanDerm tower whose tokens after four blocks become maps of 4, 2, 1 and 1/2 times the patches' grid."""

    def __init__(
        self, image_size: int, patch_size: int, width: int, layers: int, heads: int, taps: Sequence[int]
    ) -> None:
        super().__init__(image_size, patch_size, width, layers, heads)
        if len(taps) != NUM_SCALES or list(taps) != sorted({*taps}) or not 0 <= taps[0] <= taps[-1] < layers:
            raise ModelError(
                f"taps {list(taps)} must be {NUM_SCALES} ascending numbers of blocks between 0 and {layers - 1}"
            )
        if image_size < 2 * patch_size:
            raise ModelError(f"image_size {image_size} must be two patches of {patch_size} or more, to be halved once")
        self.taps = tuple(taps)
        self.initialise()
        self.fpn1 = nn.Sequential(_doubled(width), nn.BatchNorm2d(width), nn.GELU(), _doubled(width))
        self.fpn2 = nn.Sequential(_doubled(width))

    def pyramid(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`[B, 3, S, S]` → maps `[B, D, 4G, 4G]`, `[B, D, 2G, 2G]`, `[B, D, G, G]`, `[B, D, G // 2, G // 2]`."""
        tokens, tapped = self.embed(images), []
        # Blocks above the last tap change nothing.
        for number in range(self.taps[-1] + 1):
            tokens = self.run(self.blocks[number], tokens)
            if number in self.taps:
                tapped.append(self._as_map(self.norm(tokens)))
        first, second, third, fourth = tapped
        return self.fpn1(first), self.fpn2(second), third, F.max_pool2d(fourth, 2)

    def _as_map(self, tokens: Tensor) -> Tensor:
        """Patch tokens, row by row, as an image `[B, D, G, G]`: of G = 2 token 3 is at row 1, column 0."""
        batch, length, width = tokens.shape
        side = int((length - 1) ** 0.5)
        return tokens[:, 1:].transpose(1, 2).reshape(batch, width, side, side)


class Unit(nn.Module):
    """Convolution without bias that keeps the size, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs, H, W]` → `[B, outputs, H, W]`."""
        return F.relu(self.bn(self.conv(x)))


class PyramidHead(nn.Module):
    """UPerNet's head: the coarsest map pooled at several scales, then added downwards to the finer ones."""

    def __init__(self, width: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), Unit(width, channels, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = Unit(width + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(Unit(width, channels, 1) for _ in range(NUM_SCALES - 1))
        self.fpn_convs = nn.ModuleList(Unit(channels, channels, 3) for _ in range(NUM_SCALES - 1))
        self.fpn_bottleneck = Unit(NUM_SCALES * channels, channels, 3)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.get_parameter("bias"))

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Maps `[B, D, …]`, finest first → logits of the finest's size `[B, K, 4G, 4G]`."""
        *finer, coarsest = pyramid
        pooled = [_resized(module(coarsest), like=coarsest) for module in self.psp_modules]
        laterals = [unit(each) for unit, each in zip(self.lateral_convs, finer, strict=True)]
        laterals.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for level in range(NUM_SCALES - 1, 0, -1):
            laterals[level - 1] = laterals[level - 1] + _resized(laterals[level], like=laterals[level - 1])
        outputs = [unit(each) for unit, each in zip(self.fpn_convs, laterals[:-1], strict=True)] + [laterals[-1]]
        joined = torch.cat([_resized(each, like=outputs[0]) for each in outputs], dim=1)
        return self.conv_seg(self.fpn_bottleneck(joined))


class PanDermSegmenter(nn.Module):
    """Square images, normalised, to a class of every pixel.

    Published with a ViT-L/16 at 224 pixels, taps 7, 11, 15 and 23, and 1,024 channels; it is trained with batch norm
    over all processes and a drop path of 0.15. Here batch norm is a process's own, of two images or more in training
    (`torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes the published one of it, on GPUs), and there is no drop path;
    in evaluation mode the two networks are the same.

    Args:
        image_size: side in pixels, a multiple of `patch_size`, two patches at least.
        patch_size: in pixels.
        width: of the tokens, a multiple of 4 and of `heads`.
        layers: blocks.
        heads: of the attention.
        taps: four blocks, counted from 0, ascending; the first becomes the finest map. Blocks above the last rest.
        channels: of the head.
        num_classes: of a pixel.

    Raises:
        ModelError: sizes that do not divide, or taps that are no four ascending blocks.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        taps: Sequence[int],
        channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.backbone = PyramidBackbone(image_size, patch_size, width, layers, heads, taps)
        self.decode_head = PyramidHead(width, channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, S, S]` → logits `[B, K, S, S]`."""
        return _resized(self.decode_head(self.backbone.pyramid(images)), like=images)


def _doubled(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _resized(x: Tensor, *, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
