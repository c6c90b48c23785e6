"""Keys of the objective `knowledge`."""

from __future__ import annotations

from pydantic import Field

from dermray.config import DecidesWeights
from dermray.train.objectives.kinds import ObjectiveConfig


class KnowledgeConfig(ObjectiveConfig):
    """What is said of the nodes of the disease tree."""

    texts: DecidesWeights[int] = Field(4, ge=2, le=32, description="texts of its node that a sample stands for")
    temperature: DecidesWeights[float] = Field(0.04, gt=0, description="divides similarities of texts")
    samples_per_node: DecidesWeights[int] = Field(
        8, ge=1, description="of a node's samples at most so many stand for it in an epoch, others in the next"
    )
