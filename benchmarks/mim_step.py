"""A step of masked latent alignment over the straightforward one: `python benchmarks/mim_step.py [--quick]`.

The straightforward step encodes all patches and hides the masked ones by an attention mask, so that what comes out for
the visible ones is the same, which is checked with loss and gradients; its teacher runs without gradients too. Both
sides train copies of one model, an encoder of PanDerm's depth for its width with four regressor blocks, on the same
images in memory, float32, in interleaved rounds; `teacher` with the encoder's average, which is as large as the encoder
is, and `latents` with targets that are there already. Half of 196 patches are masked. By operations alone the ratios
come to what is printed beside them.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dermray import entry
from dermray.ingest import patch_masks
from dermray.losses import MaskedLatentAlignmentLoss
from dermray.models.cae import CaeV2, reordered, visible_then_masked
from dermray.models.panderm import Block

IMAGE_SIZE, PATCH_SIZE, NUM_MASKED = 224, 16, 98
# Width, blocks, heads, images of a step, steps of a round.
SHAPE, QUICK_SHAPE = (384, 12, 6, 8, 2), (96, 4, 3, 4, 1)
ROUNDS = 5
CLOSE = 1e-4

Step = Callable[[bool], Tensor]


def main() -> int:
    quick = "--quick" in sys.argv
    width, layers, heads, batch, num_steps = QUICK_SHAPE if quick else SHAPE
    torch.manual_seed(0)
    ours = CaeV2(IMAGE_SIZE, PATCH_SIZE, width, layers, heads, 4, width)
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    randoms = [np.random.default_rng([0, number]) for number in range(batch)]
    mask = torch.from_numpy(patch_masks.block_masks(randoms, IMAGE_SIZE // PATCH_SIZE, NUM_MASKED))
    theirs, teacher = copy.deepcopy(ours), copy.deepcopy(ours.encoder).requires_grad_(False)
    sides = {"ours": stepping(ours, visible_alone, teacher, images, mask)}
    sides["plain"] = stepping(theirs, all_patches, teacher, images, mask)
    check(sides, ours, theirs)
    print(f"{'case':<8}  {'plain s':>8}  {'ours s':>8}  {'ratio':>6}  rounds, by operations")
    for case in ("teacher", "latents"):
        with_teacher = case == "teacher"
        rounds = [measured(sides, with_teacher, num_steps) for _ in range(1 if quick else ROUNDS)]
        ratios = [one["plain"] / one["ours"] for one in rounds]
        plain, own = (statistics.median(one[side] for one in rounds) for side in ("plain", "ours"))
        told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        expected = operations(sides["plain"], with_teacher) / operations(sides["ours"], with_teacher)
        print(
            f"{case:<8}  {plain:>8.2f}  {own:>8.2f}  {statistics.median(ratios):>6.2f}  {told}; {expected:.2f}",
            flush=True,
        )
    return 0


def visible_alone(model: CaeV2, images: Tensor, mask: Tensor) -> Tensor:
    """As training does it."""
    return model(images, mask, num_masked=NUM_MASKED)


def all_patches(model: CaeV2, images: Tensor, mask: Tensor) -> Tensor:
    """All patches go through the encoder, and nobody attends to masked ones; the rest as in `CaeV2.forward`."""
    order = visible_then_masked(mask)
    seen_by = torch.cat([torch.ones_like(mask[:, :1]), ~mask], dim=1)[:, None, None, :]
    x = model.encoder.embed(images)
    for block in model.encoder.blocks:
        assert isinstance(block, Block)
        x = x + block.gamma_1 * attention(block, block.norm1(x), seen_by)
        x = x + block.gamma_2 * block.mlp(block.norm2(x))
    tokens = reordered(model.encoder.norm(x), mask)[:, :-NUM_MASKED]
    hidden = model.mask_token.expand(len(images), NUM_MASKED, -1)
    hidden = model.regresser(hidden, tokens[:, 1:], model.rd_pos_embed[0, 1:][order])
    return F.normalize(model.decoder(torch.cat([tokens, hidden], dim=1)), dim=-1)


def attention(block: Block, x: Tensor, seen_by: Tensor) -> Tensor:
    """A block's self-attention under a mask of keys."""
    own = block.attn
    bias = torch.cat([own.q_bias, torch.zeros_like(own.q_bias), own.v_bias])
    queries, keys, values = F.linear(x, own.qkv.weight, bias).unflatten(2, (3, own.heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen_by)
    return own.proj(mixed.transpose(1, 2).flatten(2))


def stepping(
    model: CaeV2,
    forward: Callable[[CaeV2, Tensor, Tensor], Tensor],
    teacher: torch.nn.Module,
    images: Tensor,
    mask: Tensor,
) -> Step:
    """What takes a step, with or without the teacher, and returns the loss."""
    loss, optimiser = MaskedLatentAlignmentLoss(), torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    with torch.no_grad():
        kept = F.normalize(reordered(teacher(images), mask), dim=-1)

    def step(with_teacher: bool) -> Tensor:
        target = kept
        if with_teacher:
            with torch.no_grad():
                target = F.normalize(reordered(teacher(images), mask), dim=-1)
        optimiser.zero_grad()
        value = loss(forward(model, images, mask), target, mask)
        value.backward()
        optimiser.step()
        return value.detach()

    return step


def check(sides: dict[str, Step], ours: CaeV2, theirs: CaeV2) -> None:
    """Both have the same loss and gradients in the first step."""
    losses = [step(True) for step in sides.values()]
    assert abs(float(losses[0] - losses[1])) < CLOSE
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if one.grad is not None and other.grad is not None:
            assert (one.grad - other.grad).abs().max() < CLOSE, name


def measured(sides: dict[str, Step], with_teacher: bool, num_steps: int) -> dict[str, float]:
    """Seconds of a step of each side, one after the other."""
    seconds = {}
    for name, step in sides.items():
        begun = time.perf_counter()
        for _ in range(num_steps):
            step(with_teacher)
        seconds[name] = (time.perf_counter() - begun) / num_steps
    return seconds


def operations(step: Step, with_teacher: bool) -> int:
    """Floating-point operations of a step."""
    with FlopCounterMode(display=False) as counter:
        step(with_teacher)
    return counter.get_total_flops()


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
