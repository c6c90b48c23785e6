"""The score of `tests.distilled`: the cosine of a model's vectors with those of the teacher on held-out images."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics.bootstrap import mean_distribution
from dermray.evaluate.tasks.contract import Context, TaskResult
from dermray.evaluate.tasks.kinds import TaskKind
from dermray.vectors.encoder import Encoder
from tests import distilled, rotation_model

agreement = TaskKind("Agreement with the teacher", __name__)


class Agreement:
    page = ""

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        return []

    def run(self, context: Context) -> TaskResult:
        encoder = Encoder.load(context.config.model)
        found = context.samples.read_images(list(range(len(context.samples))))
        pixels = np.stack([encoder.preprocess(found[index]) for index in sorted(found)])
        wanted = distilled.teacher()(rotation_model.flat(torch.from_numpy(pixels)))
        cosines = F.cosine_similarity(torch.from_numpy(context.features.images), wanted).double().numpy()
        strata, resamples = np.zeros(len(cosines), np.int64), context.config.bootstrap
        score = mean_distribution(cosines, strata, num_resamples=resamples, seed=0).metric()
        return TaskResult({"cosine": score}, ("cosine",), len(cosines), {})


SCORER = Agreement()
