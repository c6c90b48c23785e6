"""Times to an event: the likelihood and the scores against their plain definitions, for any sizes, ties and dtypes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dermray.errors import ConfigError, CorpusError, EvaluationError
from dermray.evaluate import survival
from dermray.evaluate.statistics.survival import censoring_survival
from dermray.losses.survival import cox


def draw(seed: int, size: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, events and scores; with ties on a coarse grid, else all different."""
    rng = np.random.default_rng(seed)
    time = rng.exponential(5.0, size)
    score = -time + rng.normal(0, 3, size)
    return (np.ceil(time), rng.random(size) < 0.5, np.round(score)) if ties else (time, rng.random(size) < 0.5, score)


def plain_cox(risk: torch.Tensor, time: torch.Tensor, event: torch.Tensor, *, efron: bool) -> torch.Tensor:
    total = risk.sum() * 0.0
    for moment in torch.unique(time[event]):
        dying = risk[event & (time == moment)]
        for k in range(len(dying)):
            share = k / len(dying) if efron else 0.0
            total = total + (risk[time >= moment].exp().sum() - share * dying.exp().sum()).log()
        total = total - dying.sum()
    return total


def plain_concordance(time: np.ndarray, event: np.ndarray, score: np.ndarray, weight: np.ndarray) -> float:
    right = compared = 0.0
    for i in np.flatnonzero(event):
        later = (time > time[i]) | ((time == time[i]) & ~event)
        right += weight[i] * ((score[i] > score[later]).sum() + 0.5 * (score[i] == score[later]).sum())
        compared += weight[i] * later.sum()
    return right / compared


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rule", ["efron", "breslow"])
@pytest.mark.parametrize("size", [1, 2, 37, 150])
def test_the_likelihood_is_the_plain_one_in_any_order(size, rule, ties):
    time, event, score = (torch.from_numpy(each) for each in draw(size, size, ties=ties))
    event[0] = True
    risk = (0.3 * score).requires_grad_()
    values = [plain_cox(risk, time, event, efron=rule == "efron"), cox(risk, time, event, ties=rule)]
    (plain, mine) = (torch.autograd.grad(value, risk)[0] for value in values)
    assert values[1].item() == pytest.approx(values[0].item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-12)
    assert mine.sum().abs() < 1e-9, "a risk that everybody shares changes nothing"
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    again = cox(risk[order], time[order], event[order].long(), ties=rule)
    assert again.item() == pytest.approx(values[1].item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("rule", ["efron", "breslow"])
def test_without_events_there_is_no_loss_and_no_gradient(rule):
    risk = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = cox(risk, torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), ties=rule)
    loss.backward()
    assert loss.item() == 0.0
    assert risk.grad is not None
    assert risk.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "returned"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_the_loss_is_exact_whatever_its_dtype(given, returned):
    time, event, score = (torch.from_numpy(each) for each in draw(3, 200, ties=True))
    risk = score.to(getattr(torch, given)).requires_grad_()
    loss = cox(risk, time.float(), event)
    loss.backward()
    assert loss.dtype == getattr(torch, returned)
    assert risk.grad is not None
    assert risk.grad.dtype == risk.dtype
    assert loss.item() == pytest.approx(plain_cox(risk.detach().double(), time, event, efron=True).item(), rel=1e-6)


def test_log_risks_far_beyond_the_exponential_do_not_overflow():
    risk = torch.tensor([2000.0, -2000.0, 1999.0], requires_grad=True)
    loss = cox(risk, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1, 1, 1]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert risk.grad is not None
    assert torch.isfinite(risk.grad).all()


def test_a_bad_time_or_event_is_named_with_its_row():
    risk, time, event = torch.zeros(3), torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([0, 1, 2])
    with pytest.raises(CorpusError, match="time nan of row 1"):
        cox(risk, time, event)
    with pytest.raises(CorpusError, match="event 2 of row 2"):
        cox(risk, torch.ones(3), event)
    with pytest.raises(ConfigError, match=r"\[3\], \[2\]"):
        cox(risk, time[:2], event)
    with pytest.raises(ConfigError, match="'exact'"):
        cox(risk, torch.ones(3), torch.ones(3), ties="exact")  # type: ignore[arg-type]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [2, 3, 64, 333])
def test_concordance_is_the_share_of_pairs(size, ties):
    time, event, score = draw(size, size, ties=ties)
    event[np.argmin(time)], event[np.argmax(time)] = True, False
    ones = np.ones(size)
    assert survival.harrell_c(time, event, score) == pytest.approx(
        plain_concordance(time, event, score, ones), abs=1e-12
    )
    assert survival.harrell_c(time, event, -score) == pytest.approx(
        1 - survival.harrell_c(time, event, score), abs=1e-12
    )
    assert survival.harrell_c(time, event.astype(int), ones) == 0.5
    tau = float(np.quantile(time, 0.8))
    chance = censoring_survival(time, event)
    weight = np.divide(1.0, chance**2, out=np.zeros(size), where=(time < tau) & (chance > 0))
    mine = survival.uno_c(time, event, score, tau=tau)
    assert mine == pytest.approx(plain_concordance(time, event, score, weight), abs=1e-12)


def test_without_censoring_uno_is_harrell_and_the_area_is_that_of_a_roc_curve():
    from sklearn.metrics import roc_auc_score

    time, _, score = draw(8, 120, ties=True)
    everybody = np.ones(120, dtype=bool)
    mine = survival.uno_c(time, everybody, score)
    assert mine == pytest.approx(survival.harrell_c(time, everybody, score), abs=1e-12)
    areas = survival.dynamic_auc(time, everybody, score, [2.0, 5.0])
    np.testing.assert_allclose(areas, [roc_auc_score(time <= moment, score) for moment in (2.0, 5.0)], atol=1e-12)


def test_the_area_counts_cases_by_their_chance_to_be_seen():
    time, event, score = draw(4, 90, ties=True)
    chance = censoring_survival(time, event)
    for moment, area in zip((1.0, 3.0, 6.0), survival.dynamic_auc(time, event, score, [1.0, 3.0, 6.0]), strict=True):
        right = total = 0.0
        for i in np.flatnonzero(event & (time <= moment)):
            for j in np.flatnonzero(time > moment):
                right += ((score[i] > score[j]) + 0.5 * (score[i] == score[j])) / chance[i]
                total += 1 / chance[i]
        assert area == pytest.approx(right / total, abs=1e-12)


def test_a_survival_curve_to_the_end():
    curve = survival.kaplan_meier([2, 1, 2, 4], [1, 1, 0, 1])
    np.testing.assert_allclose(curve.survival, [1, 3 / 4, 1 / 2, 0], atol=1e-15)
    assert curve.times.tolist() == [0, 1, 2, 4]
    assert (curve.at_risk.tolist(), curve.events.tolist()) == ([4, 4, 3, 1], [0, 1, 1, 1])
    assert (curve.low[0], curve.high[0], curve.low[-1], curve.high[-1]) == (1, 1, 0, 0)
    assert (curve.low[1:-1] < curve.survival[1:-1]).all()
    assert (curve.high[1:-1] > curve.survival[1:-1]).all()
    assert curve.median == 2
    assert survival.kaplan_meier([1, 2], [0, 0]).median == float("inf")
    assert survival.kaplan_meier([0, 2], [1, 1]).survival.tolist() == [0.5, 0]


def test_the_log_rank_test_knows_names_and_equal_groups():
    time, event, score = draw(6, 80, ties=True)
    names = np.where(score > np.median(score), "high", "low")
    statistic, p = survival.log_rank(time, event, names)
    assert statistic == pytest.approx(survival.log_rank(time, event, names == "low")[0], rel=1e-12)
    assert statistic > 10
    assert p < 0.01
    twice = np.repeat([0, 1], 80)
    assert survival.log_rank(np.tile(time, 2), np.tile(event, 2), twice) == pytest.approx((0.0, 1.0), abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: survival.harrell_c([1.0, 2.0], [1, 1], [0.0]), "finite score"),
        (lambda: survival.harrell_c([1.0, 2.0], [1, 1], [0.0, float("nan")]), "finite score"),
        (lambda: survival.harrell_c([1.0, 1.0], [1, 1], [0.0, 1.0]), "no two samples"),
        (lambda: survival.uno_c([1.0, 2.0], [0, 0], [0.0, 1.0]), "no two samples"),
        (lambda: survival.uno_c([1.0, 2.0, 2.0], [1, 1, 0], [0.0, 1.0, 1.0]), "beyond time 2.0"),
        (lambda: survival.dynamic_auc([1.0, 2.0], [1, 1], [0.0, 1.0], [2.0]), "0 observed beyond"),
        (lambda: survival.dynamic_auc([1.0, 2.0], [1, 1], [0.0, 1.0], [0.5]), "0 with the event"),
        (lambda: survival.kaplan_meier([], []), r"\[N\]"),
        (lambda: survival.kaplan_meier([1.0, -1.0], [1, 1]), "time -1.0 of row 1"),
        (lambda: survival.kaplan_meier([1.0, 2.0], [1, 3]), "event 3 of row 1"),
        (lambda: survival.log_rank([1.0, 2.0], [1, 1], ["a", "a"]), "two groups"),
        (lambda: survival.log_rank([1.0, 2.0], [0, 0], ["a", "b"]), "needs an event"),
    ],
)
def test_what_cannot_be_scored_is_said(call, message):
    with pytest.raises(EvaluationError, match=message):
        call()
