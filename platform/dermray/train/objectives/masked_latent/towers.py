"""Which encoder a run trains, and whether its teacher can be had; the driver needs no open_clip for it."""

from __future__ import annotations

from dermray import models
from dermray.errors import ConfigError, ModelError
from dermray.models import weights
from dermray.train.objectives.make.towers import may_give_patches
from dermray.train.objectives.masked_latent.settings import EMA, ENCODERS, EncoderSize, MaskedLatentConfig
from dermray.train.settings import PretrainConfig


def encoder_of(config: PretrainConfig) -> EncoderSize:
    """The encoder that the key `model` names.

    Raises:
        ConfigError: it names none; says which there are.
    """
    if config.model not in ENCODERS:
        raise ConfigError(
            f"objective.kind=masked_latent trains an image encoder, and model={config.model} names none: give one of "
            f"{', '.join(ENCODERS)}, and weights to start from as pretrained_image"
        )
    return ENCODERS[config.model]


def no_patches(name: str) -> ModelError:
    """The error for a teacher whose tower has none.

    Args:
        name: of the model.
    """
    return ModelError(
        f"objective.teacher={name}: its vision tower gives no features of patches; vision transformers of open_clip "
        "that pool by class token or mean do (ViT-B-16, ViT-L-14), and PanDerm"
    )


def check_teacher(settings: MaskedLatentConfig) -> None:
    """Refuse a teacher that is not there.

    Raises:
        ModelError: names it.
    """
    if settings.teacher == EMA:
        return
    models.check(settings.teacher, settings.teacher_pretrained)
    if not may_give_patches(models.architecture(settings.teacher)):
        raise no_patches(settings.teacher)


def check_start(source: str | None) -> None:
    """Refuse weights to start from that are not there.

    Raises:
        ModelError: names them.
    """
    if source is not None:
        weights.require(source)
