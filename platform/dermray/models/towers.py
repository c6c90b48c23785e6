"""Two towers and a temperature: architectures that open_clip cannot build by itself."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import (
    _build_text_tower,
    _build_vision_tower,
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
)
from torch import Tensor, nn

from dermray.models import huggingface, weights
from dermray.models.architectures import is_huggingface, is_panderm
from dermray.models.panderm import PanDermVisionTransformer, of_tower, without_companions
from dermray.models.texts import ShortTextTwoTowers

INIT_LOGIT_SCALE = math.log(1 / 0.07)
DEFAULT_HEAD_WIDTH = 64
TEXT_POSITION_IDS = f"text.transformer.{huggingface.POSITION_IDS}"


class TwoTowers(ShortTextTwoTowers):
    """open_clip's interface over any two towers.

    Attributes:
        tokenizer: of a Hugging Face text tower; saved with the model.
    """

    def __init__(
        self,
        visual: nn.Module,
        text: nn.Module,
        *,
        tokenizer: huggingface.Tokenizer | None = None,
        init_logit_scale: float = INIT_LOGIT_SCALE,
        init_logit_bias: float | None = None,
    ) -> None:
        # The parent's constructor builds towers by name; everything else of it is wanted.
        nn.Module.__init__(self)
        self.output_dict = False
        self.visual = visual
        self.text = text
        self.tokenizer = tokenizer
        self.context_length = text.context_length
        self.vocab_size = text.vocab_size
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(init_logit_bias))


def build(model_cfg: dict[str, Any], folder: Path | None = None) -> TwoTowers:
    """The model with initial weights, on the default device.

    Args:
        model_cfg: the architecture.
        folder: of a model or a language model, for the text tower's configuration and tokeniser.

    Raises:
        ModelError: sizes that do not fit, or a text model that cannot be had.
    """
    config = copy.deepcopy(model_cfg)
    vision_cfg, text_cfg, embed_dim = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    quick_gelu = bool(config.get("quick_gelu", False))
    if is_panderm(config):
        visual = _panderm(vision_cfg, embed_dim)
    else:
        visual = _build_vision_tower(embed_dim, vision_cfg, quick_gelu)
    tokenizer = None
    if is_huggingface(text_cfg):
        text = huggingface.text_tower(text_cfg, embed_dim, folder)
        tokenizer = huggingface.tokenizer(text_cfg, folder)
    else:
        text = _build_text_tower(embed_dim, text_cfg, quick_gelu)
    return TwoTowers(
        visual,
        text,
        tokenizer=tokenizer,
        init_logit_scale=config.get("init_logit_scale", INIT_LOGIT_SCALE),
        init_logit_bias=config.get("init_logit_bias"),
    )


def fill(model: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Load the weights of a whole model, in any of the layouts that open_clip reads.

    Position embeddings of another grid are interpolated, as open_clip does; PanDerm's table is never.

    Args:
        source: what to call the weights in an error.

    Raises:
        ModelError: they do not fit; the message lists what.
    """
    state = convert_state_dict(model, dict(state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    state.pop(TEXT_POSITION_IDS, None)
    scale = model.logit_scale
    assert isinstance(scale, Tensor)
    if "logit_scale" in state and state["logit_scale"].numel() == scale.numel():
        state["logit_scale"] = state["logit_scale"].reshape(scale.shape)
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    # A model trained with the softmax loss may go on with the sigmoid one, which has a bias.
    weights.load(model, state, source=source, optional=("logit_bias",))


def load_image(visual: nn.Module, source: str) -> None:
    """Fill a vision tower from a checkpoint of its own, of a joint model, or of CAE v2 pretraining.

    A PanDerm tower's `head` may be missing: pretraining has none.

    Args:
        visual: the tower.
        source: as `weights.read` takes it.

    Raises:
        ModelError: the checkpoint cannot be read or does not fit.
    """
    state = of_tower(weights.read(source))
    optional: tuple[str, ...] = ()
    if isinstance(visual, PanDermVisionTransformer):
        state, optional = without_companions(state), ("head.",)
    weights.load(visual, state, source=source, optional=optional)


def _panderm(vision_cfg: dict[str, Any], embed_dim: int) -> PanDermVisionTransformer:
    return PanDermVisionTransformer(
        image_size=vision_cfg["image_size"],
        patch_size=vision_cfg["patch_size"],
        width=vision_cfg["width"],
        layers=vision_cfg["layers"],
        heads=vision_cfg["width"] // vision_cfg.get("head_width", DEFAULT_HEAD_WIDTH),
        output_dim=embed_dim,
        mlp_ratio=vision_cfg.get("mlp_ratio", 4.0),
        layer_scale=vision_cfg.get("ls_init_value", 0.1),
    )
