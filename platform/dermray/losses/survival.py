"""Cox's partial likelihood of times to an event (Cox, 1972), with Breslow's and Efron's (1977) rule for tied times."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dermray.errors import ConfigError, CorpusError

Ties = Literal["efron", "breslow"]


def cox(log_risk: Tensor, time: Tensor, event: Tensor, *, ties: Ties = "efron") -> Tensor:
    """The negative logarithm of the partial likelihood, summed over events, differentiable in `log_risk`.

    At each time u with m events D, everybody whose time is u or later is at risk, R. From the sum of the events'
    log-risks Breslow takes `m · log Σ_R exp(r)`, Efron `Σ_k log(Σ_R exp(r) - k/m · Σ_D exp(r))`, k from 0 to m - 1.
    Two patients with log-risks `[1, 0]` and events at times `[1, 2]`: `log(e + 1) - 1`.

    Computed in float64 and in memory of N: sums over R run along the sorted times. Without events it is 0, and so is
    its gradient.

    Args:
        log_risk: `[N]`, floating point; higher is an earlier event.
        time: `[N]`, to the event or to the end of observation, in any one unit.
        event: `[N]`, 1 or true where the event was seen, 0 where observation ended first.
        ties: the rule for several events at one time.

    Returns:
        A scalar of `log_risk`'s dtype, float32 at least.

    Raises:
        ConfigError: a rule that is none, or tensors of other shapes.
        CorpusError: times that are not finite, events other than 0 and 1.
    """
    if ties not in get_args(Ties):
        raise ConfigError(f"ties are treated by one of {', '.join(get_args(Ties))}, not by {ties!r}")
    _check(log_risk, time, event)
    order = torch.argsort(time, descending=True, stable=True)
    risk, seen = log_risk.double()[order], event[order].bool()
    _, group, sizes = torch.unique_consecutive(time[order], return_inverse=True, return_counts=True)
    if not seen.any():
        return (risk.sum() * 0.0).to(torch.promote_types(log_risk.dtype, torch.float32))
    # Of each event: everybody at risk, to the last one of its own time.
    at_risk = torch.logcumsumexp(risk, dim=0)[sizes.cumsum(0) - 1][group[seen]]
    if ties == "efron":
        at_risk = at_risk + _efron_corrections(risk[seen], group[seen], at_risk)
    return (at_risk - risk[seen]).sum().to(torch.promote_types(log_risk.dtype, torch.float32))


def _efron_corrections(risk: Tensor, group: Tensor, at_risk: Tensor) -> Tensor:
    """`log(1 - k/m · Σ_D exp(r) / Σ_R exp(r))` of each event `[E]`, the k-th of the m of its time; sorted by time."""
    _, index, counts = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    share = (torch.arange(len(risk), device=risk.device) - first[index]).double() / counts[index]
    # Events are among those at risk, so that no exponent is above 0.
    dying = torch.zeros(len(counts), dtype=risk.dtype, device=risk.device)
    dying = dying.index_add(0, index, torch.exp(risk - at_risk))
    return torch.log1p(-share * dying[index])


def _check(log_risk: Tensor, time: Tensor, event: Tensor) -> None:
    if log_risk.ndim != 1 or not log_risk.shape == time.shape == event.shape:
        raise ConfigError(
            f"log-risks, times and events must have one shape [N], not {list(log_risk.shape)}, {list(time.shape)} and "
            f"{list(event.shape)}"
        )
    for what, wrong in (("time", ~torch.isfinite(time)), ("event", (event != 0) & (event != 1))):
        if wrong.any():
            row = int(torch.nonzero(wrong)[0])
            value = (time if what == "time" else event)[row].item()
            raise CorpusError(f"{what} {value} of row {row}: times must be finite and events 0 or 1; mend the table")
