"""ClipLoss equals the published figures on one process and on two, forwards and backwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dermray.losses import ClipLoss

GOLDEN = Path(__file__).parent / "clip_siglip_loss.npz"
TOLERANCE = 1e-6


def load(name: str) -> torch.Tensor:
    with np.load(GOLDEN) as arrays:
        return torch.from_numpy(arrays[name])


def test_one_process():
    image = load("image_features").requires_grad_()
    text = load("text_features").requires_grad_()
    scale = load("logit_scale").clone().requires_grad_()
    loss = ClipLoss()(image, text, scale)
    loss.backward()
    torch.testing.assert_close(loss.detach(), load("clip.loss"), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(image.grad, load("clip.grad_image"), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(text.grad, load("clip.grad_text"), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(scale.grad, load("clip.grad_logit_scale"), atol=TOLERANCE, rtol=0)


def _rank(rank: int, rendezvous: str, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    rows = slice(rank * 6, (rank + 1) * 6)
    image = load("image_features")[rows].clone().requires_grad_()
    text = load("text_features")[rows].clone().requires_grad_()
    scale = load("logit_scale").clone().requires_grad_()
    loss = ClipLoss()(image, text, scale)
    loss.backward()
    torch.save(
        {"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad}, f"{results}/{rank}.pt"
    )
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_match_the_reference_with_local_loss_and_differentiable_gather(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for key, name in (("loss", "loss"), ("image", "grad_image"), ("text", "grad_text")):
            expected = load(f"ddp.clip_local1_gathergrad1.rank{rank}.{name}")
            torch.testing.assert_close(got[key], expected, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(
            got["scale"], load(f"ddp.clip_local1_gathergrad1.rank{rank}.grad_logit_scale"), atol=TOLERANCE, rtol=0
        )
