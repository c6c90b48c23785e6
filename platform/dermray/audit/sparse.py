"""A sparse autoencoder over a tower's vectors, whose units are concepts: DermFM-Zero's (arXiv 2602.10624).

Shapes: B vectors of width D, E = expansion x D units.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermray.errors import ModelError


class SparseCode(NamedTuple):
    """Activations of the units `[B, E]`, and the vectors that they stand for `[B, D]`."""

    activations: Tensor
    reconstruction: Tensor


class SparseLoss(NamedTuple):
    """Scalars: what is minimised, and its two parts, the first before its coefficient."""

    total: Tensor
    l1: Tensor
    reconstruction: Tensor


class SparseAutoencoder(nn.Module):
    """`a = ReLU(W_e (x - b) + c)` and `x ≈ W_d a + b` with one bias b, the columns of W_d of length 1.

    The gradient of W_d has no part along its columns; after each step of an optimiser `normalise` gives them their
    length again. Weights begin as in the released code, whose encoder is drawn from ±√(6 / (E D)).

    Args:
        width: D.
        expansion: units for each dimension; published: 8.

    Raises:
        ModelError: one of them is below 1.
    """

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        if width < 1 or expansion < 1:
            raise ModelError(f"sparse autoencoder: width {width} and expansion {expansion} must be 1 or more")
        units = width * expansion
        self.tied_bias = nn.Parameter(torch.zeros(width))
        self.encoder_weight = nn.Parameter(torch.empty(units, width).uniform_(-1, 1) * math.sqrt(6 / (units * width)))
        self.encoder_bias = nn.Parameter(torch.empty(units).uniform_(-1, 1) / math.sqrt(units))
        self.decoder_weight = nn.Parameter(torch.randn(width, units))
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        """Brings each unit's column of the decoder back to length 1; to be called after each step of an optimiser."""
        self.decoder_weight.copy_(F.normalize(self.decoder_weight, dim=0))

    def encode(self, vectors: Tensor) -> Tensor:
        """`[B, D]`, of length 1 as published → activations `[B, E]`, 0 or more."""
        return F.relu(F.linear(vectors - self.tied_bias, self.encoder_weight, self.encoder_bias))

    def decode(self, activations: Tensor) -> Tensor:
        """`[B, E]` → `[B, D]`."""
        return F.linear(activations, _Tangential.apply(self.decoder_weight), self.tied_bias)

    def forward(self, vectors: Tensor) -> SparseCode:
        """`[B, D]` → activations and reconstruction."""
        activations = self.encode(vectors)
        return SparseCode(activations, self.decode(activations))

    def loss(self, vectors: Tensor, *, l1: float = 3e-5) -> SparseLoss:
        """Mean over `[B, D]` of `Σ|a|`, times `l1`, plus the mean square of what is not reconstructed."""
        code = self(vectors)
        sparsity = code.activations.abs().sum(dim=1).mean()
        missed = F.mse_loss(code.reconstruction, vectors)
        return SparseLoss(l1 * sparsity + missed, sparsity, missed)


class _Tangential(torch.autograd.Function):
    """The weight as it is, with a gradient that leaves the length of its columns alone."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        directions = F.normalize(ctx.saved_tensors[0], dim=0)
        return gradient - directions * (directions * gradient).sum(dim=0)


def fit(
    vectors: Tensor,
    *,
    expansion: int = 8,
    l1: float = 3e-5,
    learning_rate: float = 5e-4,
    batch_size: int = 4096,
    epochs: int = 200,
    seed: int = 0,
) -> SparseAutoencoder:
    """An autoencoder of these vectors, by the published settings: Adam, dead units stay dead.

    Args:
        vectors: floating point `[N, D]`, of length 1 as published; also decides the device.
        expansion: as of `SparseAutoencoder`.
        l1: as of `SparseAutoencoder.loss`.
        learning_rate: of Adam.
        batch_size: vectors a step; the last step of an epoch has what is left.
        epochs: passes over all vectors, each in an order of its own.
        seed: of the weights and of the orders.

    Raises:
        ModelError: no vectors, or some that are not finite.
    """
    if vectors.ndim != 2 or not len(vectors) or not torch.isfinite(vectors).all():
        raise ModelError(f"sparse autoencoder: needs finite vectors [N, D], got {list(vectors.shape)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SparseAutoencoder(vectors.shape[1], expansion).to(vectors)
        optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
        for _ in range(epochs):
            for batch in vectors[torch.randperm(len(vectors)).to(vectors.device)].split(batch_size):
                optimiser.zero_grad()
                model.loss(batch, l1=l1).total.backward()
                optimiser.step()
                model.normalise()
    return model.eval()
