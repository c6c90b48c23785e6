"""The linear probe: the logistic regression of the published probes on frozen image vectors, with all labels or few.

One linear layer with bias, its C classes being the distinct training labels. It minimises, over the whole training set,
the mean cross-entropy plus 0.5 / cost times the Frobenius norm of the weight: the norm itself, not its square, with
cost = D C / 100. L-BFGS (PyTorch's: step 1, at most 1,000 iterations, strong Wolfe line search) starts from PyTorch's
usual random layer of the given seed. So do the linear probes of Derm1M (arXiv 2503.14911) and PanDerm, in float32,
where rounding decides when the search stops. Here it runs in float64 and reaches the optimum of the same objective,
which is convex; published probabilities differ from that by some 1e-5. The vectors have the length that the tower gives
them: the penalty on the weights would weigh more on unit vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dermray.errors import EvaluationError

MAX_ITERATIONS = 1000
GRADIENT_TOLERANCE = 1e-7
CHANGE_TOLERANCE = 1e-9
HISTORY = 100
SUBSET_SEED = 42


@dataclass(frozen=True)
class Logistic:
    """A fitted logistic regression; `predict_proba` is what it is for."""

    # float64 `[C, D]` and `[C]`
    weight: torch.Tensor
    bias: torch.Tensor
    # what was minimised, at the end, and after how many iterations
    objective: float
    num_iterations: int

    def predict_proba(self, features: Any) -> Any:
        """Probabilities `[N, C]` of features `[N, D]`, numpy or torch and in the precision that they are given in.

        Raises:
            EvaluationError: another width than the probe was fitted on, or features that are not finite.
        """
        given = _features(features)
        if given.shape[1] != self.weight.shape[1]:
            raise EvaluationError(
                f"the probe was fitted on features of width {self.weight.shape[1]}, these have {given.shape[1]}"
            )
        probabilities = torch.softmax(F.linear(given, self.weight, self.bias), dim=1)
        if isinstance(features, torch.Tensor):
            return probabilities.to(features.dtype)
        return probabilities.numpy().astype(np.asarray(features).dtype)


def fit(features: Any, labels: Any, *, seed: int = 0, cost: float = 1.0) -> Logistic:
    """Fit the published linear probe.

    Args:
        features: `[N, D]`, numpy or torch, taken as they are.
        labels: `[N]` integers; every class 0..C-1 must be among them.
        seed: of the initial weights.
        cost: in units of the published one; the larger, the weaker the penalty.

    Raises:
        EvaluationError: shapes that do not fit, features that are not finite, fewer than two classes, or a class
            without a sample.
    """
    inputs, targets = _features(features), torch.as_tensor(labels).cpu()
    num_classes = _num_classes(inputs, targets)
    targets = targets.long()
    weight, bias = _initial(num_classes, inputs.shape[1], seed)
    penalty = 0.5 / (cost * inputs.shape[1] * num_classes / 100)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        lr=1.0,
        max_iter=MAX_ITERATIONS,
        history_size=HISTORY,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=CHANGE_TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def objective() -> torch.Tensor:
        return F.cross_entropy(F.linear(inputs, weight, bias), targets) + penalty * weight.norm()

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        _settle_at_zero(inputs, targets, penalty, weight, bias)
        final = float(objective())
    iterations = int(optimiser.state[weight]["n_iter"])
    return Logistic(weight.detach(), bias.detach(), final, iterations)


def _settle_at_zero(
    inputs: torch.Tensor, targets: torch.Tensor, penalty: float, weight: torch.Tensor, bias: torch.Tensor
) -> None:
    """Where the penalty outweighs what the features tell, the optimum is the norm's kink at 0: L-BFGS stops nearby."""
    shares = torch.bincount(targets).double() / len(targets)
    residual = shares - F.one_hot(targets).double()
    if (residual.T @ inputs / len(targets)).norm() <= penalty:
        weight.zero_()
        bias.copy_(shares.log())


def label_fraction(labels: np.ndarray, fraction: float, *, seed: int = SUBSET_SEED) -> np.ndarray:
    """Which training samples to keep, the published way: of each class the same share, and at least one.

    Args:
        labels: integers `[N]` of the training split, in the order of its table.
        fraction: of the labels, in (0, 1].
        seed: of every shuffle; the publication's is 42.

    Returns:
        Positions in `labels`, int64, in the published order: shuffled, drawn class by class with a fresh generator
        each, shuffled again. A fraction of 1 is all of them, shuffled once.

    Raises:
        EvaluationError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise EvaluationError(f"a label fraction lies above 0 and at most at 1, not at {fraction}")
    shuffled = _permutation(len(labels), seed)
    if fraction == 1:
        return shuffled
    drawn = []
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        kept = min(len(members), max(1, int(len(members) * fraction)))
        drawn.append(members[_permutation(len(members), seed)[:kept]])
    together = np.concatenate(drawn)
    return together[_permutation(len(together), seed)]


def _permutation(size: int, seed: int) -> np.ndarray:
    # The legacy generator, because the published subsets were drawn with it.
    return np.random.RandomState(seed).permutation(size)


def _initial(num_classes: int, width: int, seed: int) -> tuple[nn.Parameter, nn.Parameter]:
    """What `nn.Linear` draws after seeding PyTorch, without touching the global generator."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.empty(num_classes, width), torch.empty(num_classes)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    nn.init.uniform_(bias, -1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
    return nn.Parameter(weight.double()), nn.Parameter(bias.double())


def _features(features: Any) -> torch.Tensor:
    given = torch.as_tensor(features).detach().cpu().double()
    if given.ndim != 2:
        raise EvaluationError(f"a linear probe takes features [N, D], not {list(given.shape)}")
    finite = torch.isfinite(given).all(dim=1)
    if not finite.all():
        row = int(torch.nonzero(~finite)[0])
        raise EvaluationError(f"the feature of sample {row} is not finite; look for NaN in the model's weights")
    return given


def _num_classes(features: torch.Tensor, labels: torch.Tensor) -> int:
    if labels.ndim != 1 or len(labels) != len(features):
        raise EvaluationError(
            f"a linear probe takes one label a feature, not labels {list(labels.shape)} for {list(features.shape)}"
        )
    if labels.is_floating_point():
        raise EvaluationError(f"labels must be integers, not {labels.dtype}")
    present = set(labels.unique().tolist())
    missing = sorted(set(range(max(present, default=-1) + 1)) - present)
    if missing or min(present, default=0) < 0:
        wrong = f"class {missing[0]} has no sample" if missing else f"the label {min(present)} is negative"
        raise EvaluationError(f"{wrong}: the labels of a linear probe must be 0, 1, … without a gap")
    if len(present) < 2:
        raise EvaluationError("a linear probe needs training samples of at least two classes")
    return len(present)
