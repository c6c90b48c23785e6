"""`toy=true`: any recipe made small enough for a laptop, over the same code.

What is replaced, and nothing else: the model by a tiny architecture of the same kind, its published weights by random
ones, the batch, the number of steps, the warm-up, and the cadences; and of an objective that says so
(`ObjectiveKind.toy`) its sizes and teacher. Data keys, losses, optimiser, corpus, output, workers and seed stay.
"""

from __future__ import annotations

from dermray import models
from dermray.train.objectives import kinds
from dermray.train.settings import PretrainConfig

TINY = "dermray_tiny"
TINY_PANDERM = "panderm_tiny_bert"
GLOBAL_BATCH_SIZE = 32
MAX_STEPS = 40
WARMUP_STEPS = 4
LOG_EVERY_STEPS = 5
CHECKPOINT_EVERY_STEPS = 20
VALIDATION_SAMPLES = 64


def shrunk(config: PretrainConfig) -> PretrainConfig:
    """The configuration itself, or its toy where `toy` is set: an ordinary configuration, with `toy` off.

    Raises:
        ModelError: the recipe's model is unknown.
    """
    if not config.toy:
        return config
    validates = config.validation.every_steps is not None
    own = kinds.find(config.objective.kind).toy
    return config.model_copy(
        update={
            "toy": False,
            **({"model": tiny_model(config.model)} if own is None else own(config)),
            "pretrained": None,
            "pretrained_image": None,
            "pretrained_text": None,
            "train": config.train.model_copy(
                update={
                    "global_batch_size": GLOBAL_BATCH_SIZE,
                    "max_steps": MAX_STEPS,
                    "log_every_steps": LOG_EVERY_STEPS,
                    "checkpoint_every_steps": CHECKPOINT_EVERY_STEPS,
                }
            ),
            "optim": config.optim.model_copy(update={"warmup_steps": WARMUP_STEPS}),
            "validation": config.validation.model_copy(
                update={
                    "every_steps": CHECKPOINT_EVERY_STEPS,
                    "max_samples": min(config.validation.max_samples, VALIDATION_SAMPLES),
                }
                if validates
                else {}
            ),
        }
    )


def tiny_model(name_or_uri: str) -> str:
    """The tiny architecture with the same kind of towers: PanDerm with BERT, or a vision transformer with CLIP's text.

    Raises:
        ModelError: the model is unknown.
    """
    model_cfg = models.architecture(name_or_uri)
    return TINY_PANDERM if models.has_own_towers(model_cfg) else TINY
