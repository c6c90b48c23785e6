"""Cox's likelihood and the scores of times to an event equal the published libraries' figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.evaluate import survival
from dermray.evaluate.statistics.survival import censoring_survival
from dermray.losses.survival import cox

FOLDER = Path(__file__).parent
FACTS = json.loads((FOLDER / "survival.json").read_text())


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "survival.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def observed(arrays):
    return arrays["time"], arrays["event"], arrays["risk_score"]


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_the_partial_likelihood_and_its_derivatives(arrays, ties):
    covariates, time, event = (torch.from_numpy(arrays[name]) for name in ("covariates", "time", "event"))

    def value(beta: torch.Tensor) -> torch.Tensor:
        return cox(covariates @ beta, time, event, ties=ties)

    for row, point in enumerate(torch.from_numpy(arrays["beta_points"])):
        beta = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(beta), beta)
        hessian = torch.autograd.functional.hessian(value, point)
        for name, mine in (
            ("neg_log_partial_likelihood", value(point)),
            ("gradient", gradient),
            ("hessian", hessian),
        ):
            np.testing.assert_allclose(mine, arrays[f"{ties}_{name}"][row], rtol=1e-9, atol=1e-11, err_msg=name)


def test_newton_steps_find_the_published_coefficients(arrays):
    covariates, time, event = (torch.from_numpy(arrays[name]) for name in ("covariates", "time", "event"))

    def value(beta: torch.Tensor) -> torch.Tensor:
        return cox(covariates @ beta, time, event)

    beta = torch.zeros(3, dtype=torch.float64)
    for _ in range(8):
        hessian = torch.autograd.functional.hessian(value, beta)
        beta = beta - torch.linalg.solve(hessian, torch.autograd.functional.jacobian(value, beta))
    np.testing.assert_allclose(beta, arrays["efron_beta_hat"], atol=1e-6)
    np.testing.assert_allclose(torch.linalg.inv(hessian).diagonal().sqrt(), arrays["efron_se"], atol=1e-6)
    assert -float(value(beta)) == pytest.approx(FACTS["efron_log_likelihood_at_optimum"], abs=1e-9)


def test_concordance(observed):
    assert survival.harrell_c(*observed) == pytest.approx(FACTS["harrell_sksurv"]["c"], abs=1e-12)
    assert survival.uno_c(*observed) == pytest.approx(FACTS["uno_without_tau"], abs=1e-9)
    assert survival.uno_c(*observed, tau=FACTS["uno"]["tau"]) == pytest.approx(FACTS["uno"]["c"], abs=1e-9)


def test_time_dependent_auc(observed, arrays):
    areas = survival.dynamic_auc(*observed, arrays["auc_times"])
    np.testing.assert_allclose(areas, arrays["cumulative_dynamic_auc"], atol=1e-9)
    mean = survival.mean_dynamic_auc(*observed, arrays["auc_times"])
    assert mean == pytest.approx(FACTS["cumulative_dynamic_auc_mean"], abs=1e-9)


def test_the_chance_to_be_observed(observed, arrays):
    curve = dict(zip(arrays["censoring_times"], arrays["censoring_survival"], strict=True))
    mine = censoring_survival(observed[0], observed[1].astype(bool))
    np.testing.assert_allclose(mine, [curve[time] for time in observed[0]], atol=1e-12)


def test_the_survival_curve(observed, arrays):
    curve = survival.kaplan_meier(*observed[:2])
    for mine, theirs in (
        ("times", "km_times"),
        ("survival", "km_survival"),
        ("low", "km_lower_loglog"),
        ("high", "km_upper_loglog"),
        ("at_risk", "km_at_risk"),
        ("events", "km_events"),
    ):
        np.testing.assert_allclose(getattr(curve, mine), arrays[theirs], atol=1e-9, err_msg=mine)
    assert curve.median == FACTS["km_median"]


@pytest.mark.parametrize(("group", "published"), [("group2", "two"), ("group3", "three")])
def test_the_log_rank_test(observed, arrays, group, published):
    statistic, p = survival.log_rank(*observed[:2], arrays[group])
    assert statistic == pytest.approx(FACTS[f"logrank_{published}_groups"]["chi2"], rel=1e-9)
    assert p == pytest.approx(FACTS[f"logrank_{published}_groups"]["p"], rel=1e-9)
