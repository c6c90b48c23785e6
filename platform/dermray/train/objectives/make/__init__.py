"""MAKE and O-MAKE: an image, and its patches, compared with several texts of every sample of the global batch."""

from dermray.train.objectives.contrastive import OBJECTIVE as CONTRASTIVE
from dermray.train.objectives.contrastive.texted import texted
from dermray.train.objectives.kinds import ObjectiveKind
from dermray.train.objectives.make.settings import MakeConfig

# Validated as one image and one text are.
OBJECTIVE = ObjectiveKind(MakeConfig, "dermray.train.objectives.make.module", scores=CONTRASTIVE.scores, counts=texted)
