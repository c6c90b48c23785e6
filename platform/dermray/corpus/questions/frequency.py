"""How often an answer is drawn as a wrong one, so that it is right about as often as it is wrong.

Were wrong answers drawn with like chances, a rare one among them would be wrong nearly always, and who knows how often
each is right would beat chance without a look at the picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from dermray.corpus.questions.body_sites import regions


def of_sites(sites: Mapping[str, int]) -> dict[str, float]:
    """Weights of body sites, sorted by name, of those of a known region, by how many samples each is the site of.

    A weight is these samples over those that have a site in other regions, where alone it can be drawn.
    """
    known = {site: count for site, count in sites.items() if regions(site)}
    of_regions = Counter[frozenset[str]]()
    for site, count in known.items():
        of_regions[regions(site)] += count
    elsewhere = {own: sum(n for each, n in of_regions.items() if not each & own) for own in of_regions}
    return {site: known[site] / max(1, elsewhere[regions(site)]) for site in sorted(known)}


def of_findings(findings: Mapping[str, int], num_marked: int) -> dict[str, float]:
    """Weights of findings, sorted by name, by how many of the `num_marked` samples with any mark each is marked on.

    A weight is these samples over those that have other marks only.
    """
    return {name: findings[name] / max(1, num_marked - findings[name]) for name in sorted(findings)}


def order(draw: np.random.Generator, weights: np.ndarray) -> list[int]:
    """Places in an order drawn by weights, float64 `[N]`, above 0 (Efraimidis and Spirakis, 2006)."""
    found: list[int] = np.argsort(draw.exponential(size=len(weights)) / weights, kind="stable").tolist()
    return found
