"""Where each true partner stands among all candidates, in tiles of scores: exact, mostly at the price of float32.

A tile is first computed in float32. Its rounding error has a bound (Higham, Accuracy and Stability of Numerical
Algorithms, 3.1), so most scores are above or below their partner's for certain; the few in between are computed again
in float64. Where that is not so (other devices, reduced precision, many near ties), the tile itself is float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dermray.errors import EvaluationError

# Reports are compared by ranks that were saved, without torch.
if TYPE_CHECKING:
    import torch

# In float64 equal pairs differ by rounding below this, others hardly ever do.
TIE_TOLERANCE = 1e-12
# Scores of a tile's side (float32: 64 MiB a tile), whatever the number of pairs.
TILE = 4096
# Share of a tile's scores that may be looked at again one by one; with more, the whole tile is done again.
MAX_DOUBTFUL = 1 / 64
# Pairs that are looked at again at a time.
_PAIRS = 1 << 13
_UNIT_ROUNDOFF = 2.0**-24
# Above this length float32 might overflow.
_MAX_LENGTH = 1e6


@dataclass(frozen=True)
class Ranks:
    """For each query of one direction, int64 `[N]`: candidates that score higher, and others that score the same."""

    higher: np.ndarray
    tied: np.ndarray

    def expected(self) -> np.ndarray:
        """0-based rank of the true partner, ties counted half, float64 `[N]`."""
        return self.higher + self.tied / 2.0

    def hits(self, k: int) -> np.ndarray:
        """Chance that the true partner is among the first k, float64 `[N]`; 0 or 1 where nothing ties."""
        return np.clip((k - self.higher) / (self.tied + 1.0), 0.0, 1.0)


def pair_ranks(image_features: Any, text_features: Any) -> tuple[Ranks, Ranks]:
    """Ranks of the true partners, image-to-text and text-to-image.

    Memory: the features as they are, and some tiles.

    Args:
        image_features: `[N, D]`, numpy or torch; row i belongs to row i of the texts.
        text_features: `[N, D]`.

    Raises:
        EvaluationError: shapes that do not fit, no pairs, or features that are not finite.
    """
    images, texts = checked(image_features, text_features)
    scores = _Scores.of(images, texts)
    num_pairs = len(images)
    # Direction → how many candidates are higher, and how many are higher or the same.
    counts = np.zeros((2, 2, num_pairs), dtype=np.int64)
    for rows in _blocks(num_pairs):
        for columns in _blocks(num_pairs):
            counts[0, :, rows] += (tile := scores.tile(rows, columns))[0]
            counts[1, :, columns] += tile[1]
    # The partner itself is among those that are not lower.
    to_text, to_image = (Ranks(higher=higher, tied=not_lower - higher - 1) for higher, not_lower in counts)
    return to_text, to_image


def checked(image_features: Any, text_features: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as tensors on one device, float32 or float64 `[N, D]`.

    Raises:
        EvaluationError: as `pair_ranks`.
    """
    import torch

    images, texts = torch.as_tensor(image_features), torch.as_tensor(text_features)
    if images.ndim != 2 or images.shape != texts.shape:
        raise EvaluationError(
            "retrieval needs image and text features of one shape [N, D], "
            f"not {list(images.shape)} and {list(texts.shape)}"
        )
    if len(images) == 0:
        raise EvaluationError("retrieval needs at least one pair of image and text")
    for kind, features in (("image", images), ("text", texts)):
        finite = torch.isfinite(features).all(dim=1)
        if not finite.all():
            row = int(torch.nonzero(~finite)[0])
            raise EvaluationError(
                f"the {kind} feature of pair {row} is not finite; look for NaN in the model's weights"
            )
    dtype = torch.float32 if images.dtype == texts.dtype == torch.float32 else torch.float64
    return images.detach().to(dtype), texts.detach().to(images.device, dtype)


@dataclass(frozen=True)
class _Scores:
    """The matrix of scores that nobody holds whole; its diagonal are the partners'."""

    images: torch.Tensor
    texts: torch.Tensor
    # float64 `[N]`: scores of the partners, and how far from the truth float32 scores of a row, of a column may be
    own: torch.Tensor
    margins: tuple[torch.Tensor, torch.Tensor]
    # float32 `[N, D]`, None where float32 is no help
    rough: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def of(cls, images: torch.Tensor, texts: torch.Tensor) -> _Scores:
        import torch

        own = torch.cat([_products(images[rows], texts[rows]) for rows in _blocks(len(images))])
        lengths = [torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in (images, texts)]
        longest = [float(each.max()) for each in lengths]
        # D roundings of the sum, and some of the inputs and of the thresholds.
        bound = (images.shape[1] + 8) * _UNIT_ROUNDOFF * 1.01
        helps = (
            images.device.type == "cpu"
            and torch.get_float32_matmul_precision() == "highest"
            and max(longest) < _MAX_LENGTH
        )
        return cls(
            images,
            texts,
            own,
            (bound * longest[1] * lengths[0], bound * longest[0] * lengths[1]),
            (images.float(), texts.float()) if helps else None,
        )

    def tile(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        """Of a tile's scores, those above the partner's and those not below it: by row, by column, int64 `[2, …]`."""
        if self.rough is not None:
            scores = self.rough[0][rows] @ self.rough[1][columns].T
            own = (self.own[rows, None], self.own[columns])
            margins = (self.margins[0][rows, None], self.margins[1][columns])
            found = [self._screen(scores, own[axis], margins[axis], rows, columns, axis=axis) for axis in (0, 1)]
            if found[0] is not None and found[1] is not None:
                return found[0], found[1]
        return self._exactly(rows, columns)

    def _screen(
        self, scores: torch.Tensor, own: torch.Tensor, margin: torch.Tensor, rows: slice, columns: slice, *, axis: int
    ) -> np.ndarray | None:
        """The counts of one direction from rough scores; None where too many are doubtful."""
        doubt = margin + TIE_TOLERANCE
        above = scores > (own + doubt).float()
        doubtful = np.flatnonzero(((scores >= (own - doubt).float()) ^ above).numpy())
        if len(doubtful) > MAX_DOUBTFUL * scores.numel() + len(scores):
            return None
        counts = np.tile(np.count_nonzero(above.numpy(), axis=1 - axis), (2, 1)).astype(np.int64)
        for start in range(0, len(doubtful), _PAIRS):
            row, column = np.divmod(doubtful[start : start + _PAIRS], scores.shape[1])
            pairs = (self.images[rows][row], self.texts[columns][column])
            query = (row, column)[axis]
            difference = (_products(*pairs) - own.reshape(-1)[query]).numpy()
            for kind, threshold in enumerate((TIE_TOLERANCE, -TIE_TOLERANCE)):
                hits = difference > threshold if kind == 0 else difference >= threshold
                counts[kind] += np.bincount(query[hits], minlength=counts.shape[1])
        return counts

    def _exactly(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        import torch

        scores = self.images[rows].double() @ self.texts[columns].double().T
        found = []
        for axis, own in enumerate((self.own[rows, None], self.own[columns])):
            above, not_below = scores > own + TIE_TOLERANCE, scores >= own - TIE_TOLERANCE
            found.append(torch.stack([above.sum(dim=1 - axis), not_below.sum(dim=1 - axis)]).cpu().numpy())
        return found[0], found[1]


def _products(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return (images.double() * texts.double()).sum(dim=1)


def _blocks(num_pairs: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE, num_pairs)) for start in range(0, num_pairs, TILE))
