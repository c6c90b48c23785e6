"""Which evaluation images count as copies of training images equals DermFM-Zero's rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dermray.audit.leakage import top1

FILE = Path(__file__).parent / "leakage_top1.npz"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_published_copies(dtype):
    facts = json.loads(FILE.with_suffix(".json").read_text())
    with np.load(FILE) as arrays:
        found = top1(arrays["queries"].astype(dtype), arrays["bank"].astype(dtype), threshold=0.75)
        np.testing.assert_array_equal(found.index, arrays["best_bank"])
        np.testing.assert_allclose(found.similarity, arrays["best_similarity"], atol=1e-6)
        np.testing.assert_array_equal(np.flatnonzero(found.flagged), arrays["match_query"])
        np.testing.assert_array_equal(found.index[found.flagged], arrays["match_bank"])
        assert 100 * found.flagged.mean() == pytest.approx(float(arrays["overlap_rate_percent"]))
    assert np.flatnonzero(~found.flagged).tolist() == facts["deduplicated_query_rows"]
