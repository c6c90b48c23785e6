"""The objective of `tests.rotation` that draws some samples twice and cannot use others."""

from __future__ import annotations

import numpy as np

from dermray.corpus.manifest import Manifest
from dermray.ingest.plan import Counts
from dermray.train.objectives.kinds import ObjectiveKind
from dermray.train.settings import PretrainConfig
from tests import rotation


def twice_and_never(config: PretrainConfig, manifest: Manifest) -> Counts:
    """Every third sample twice, every third not at all, other ones each epoch."""
    counts = np.arange(manifest.num_samples) % 3
    return lambda epoch: np.roll(counts, epoch * len(counts) // 2)


OBJECTIVE = ObjectiveKind(rotation.RotationConfig, rotation.__name__, counts=twice_and_never)
