"""CLIP and SigLIP: an image and one of its captions, compared with those of the whole global batch."""

from dermray import scales
from dermray.train.objectives.contrastive.texted import texted
from dermray.train.objectives.kinds import ObjectiveConfig, ObjectiveKind

RETRIEVAL_KS = (1, 5, 10)
# Of a model of two towers; `scale` is its temperature and, where it has one, its bias.
PARTS = ("image", "text", "scale")
# Its keys are `loss.*`, `model` and `pretrained*` of the run, where they were before there were kinds.
OBJECTIVE = ObjectiveKind(
    ObjectiveConfig,
    "dermray.train.objectives.contrastive.module",
    scores=scales.best(
        (
            "validation_zero_shot_accuracy",
            *(f"validation_{way}_R_at_{k}" for way in scales.RETRIEVAL_WAYS for k in RETRIEVAL_KS),
        )
    ),
    counts=texted,
    parts=PARTS,
)
