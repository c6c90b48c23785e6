"""From a name or a URI to a model, its image transform and its tokenizer.

A name is an open_clip architecture, one of ours (`configs/*.json`, same format), or an `hf-hub:` id. A URI is a
folder in open_clip's layout, local or remote. open_clip builds what it knows; `dermray.models.towers` builds PanDerm
and Hugging Face towers. Weights are read as safetensors or with `weights_only=True`, and must fit exactly.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from open_clip.model import get_model_preprocess_cfg, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import nn

from dermray.errors import ModelError
from dermray.model_uri import HUB_PREFIX, LOCAL_PREFIX, folder_uri
from dermray.models import bounds, huggingface, layout, texts, towers, weights
from dermray.models.architectures import (
    architecture,
    explained,
    hub_config,
    is_ours,
    open_clip,
    published_form,
    require_known,
)

# Width and height of the picture that a transform is tried with: no square, so that it must become one.
PICTURE = (67, 49)
ImageTransform = Callable[[Any], torch.Tensor]
Tokenizer = Callable[[list[str]], torch.Tensor]


def create(
    name_or_uri: str,
    pretrained: str | None = None,
    *,
    pretrained_image: str | None = None,
    pretrained_text: str | None = None,
) -> tuple[nn.Module, ImageTransform, Tokenizer]:
    """Build a model on the CPU in float32, in evaluation mode.

    Args:
        name_or_uri: an architecture name, `hf-hub:ORG/NAME`, `local-dir:PATH`, or the URI of a model folder.
        pretrained: for an architecture name: an open_clip tag (`openai`), or a checkpoint of the whole model as a
            path, a URI or `hf-hub:ORG/NAME`; without it the weights are random. Ignored by folders and hub ids,
            which bring their weights.
        pretrained_image: checkpoint of the vision tower alone, loaded last (`towers.load_image`).
        pretrained_text: checkpoint of the language model inside a Hugging Face text tower, loaded last
            (`huggingface.load_text`). A folder also gives its tokeniser.

    Returns:
        `(model, image_transform, tokenizer)`: PIL image → float32 `[3, S, S]`; list of N texts → int64 `[N, L]`. The
        tokenizer of a Hugging Face text tower reads its files on first use.

    Raises:
        ModelError: unknown name, missing or malformed files, or weights that do not fit the architecture.
    """
    uri = folder_uri(name_or_uri)
    if uri is not None:
        with layout.opened(uri) as path, explained(uri):
            made = _from_folder(path)
    else:
        if not name_or_uri.startswith(HUB_PREFIX):
            require_known(name_or_uri)
        with explained(name_or_uri), huggingface.language_model_folder(pretrained_text) as text_folder:
            made = _from_name(name_or_uri, pretrained, text_folder)
    model, image_transform, tokenizer = made
    texts.accept_short(model)
    with explained(uri or name_or_uri):
        if pretrained_image is not None:
            towers.load_image(model.get_submodule("visual"), pretrained_image)
        if pretrained_text is not None:
            huggingface.load_text(getattr(model, "text", model), pretrained_text)
    return model.eval(), image_transform, tokenizer


def load(path: Path) -> tuple[nn.Module, ImageTransform, Tokenizer]:
    """A model of the kind `clip` in a local folder: `create`."""
    return create(str(path))


@dataclass(frozen=True)
class Preprocessing:
    """What a tower expects of its input: side of the square in pixels; mean and std of RGB values in [0, 1]."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def preprocessing(model: nn.Module) -> Preprocessing:
    """The preprocessing that a model made by `create` carries."""
    config = get_model_preprocess_cfg(model)
    size = config["size"]
    return Preprocessing(
        size=int(size[0] if isinstance(size, tuple | list) else size),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


@lru_cache(maxsize=8)
def tokenizer(name_or_uri: str, pretrained_text: str | None = None) -> Tokenizer:
    """The tokeniser of a model without its weights, as `create` would return it; made once per process.

    Raises:
        ModelError: as in `create`.
    """
    model_cfg = architecture(name_or_uri)
    ours = is_ours(model_cfg)
    uri = folder_uri(name_or_uri)
    with explained(uri or name_or_uri):
        if uri is None and ours:
            with huggingface.language_model_folder(pretrained_text) as text_folder:
                return huggingface.tokenizer(model_cfg["text_cfg"], text_folder)
        if uri is None:
            return open_clip().get_tokenizer(name_or_uri)
        with layout.opened(uri) as path:
            if ours:
                return huggingface.tokenizer(model_cfg["text_cfg"], path)
            return open_clip().get_tokenizer(f"{LOCAL_PREFIX}{path}")


def _from_folder(path: Path) -> tuple[nn.Module, ImageTransform, Tokenizer]:
    config = layout.read_config(str(path))
    config["model_cfg"] = published_form(config["model_cfg"], name="")
    name = layout.weights_of(str(path)) or layout.WEIGHTS_NAME
    state = weights.read(str(path / name))
    bounds.require_sizes(config["model_cfg"], source=layout.CONFIG_NAME)

    def build() -> tuple[nn.Module, ImageTransform, Tokenizer]:
        if is_ours(config["model_cfg"]):
            return _built(config, path)
        return _open_clip(f"{LOCAL_PREFIX}{path}", load_weights=False)

    # Without memory first: a folder may describe more than there is.
    held = bounds.Size.of_state(state)
    bounds.outlined(build, held)
    with bounds.filled_by(held):
        made = build()
    towers.fill(made[0], state, source=name)
    _require_pixels(made[1], preprocessing(made[0]).size)
    return made


def _require_pixels(transform: ImageTransform, side: int) -> None:
    """Refuse a transform that no image would come through: each would be taken for a damaged one.

    Raises:
        ModelError: it fails, or what it makes of a picture is not float32 `[3, side, side]`, or no numbers.
    """
    try:
        pixels = transform(Image.new("RGB", PICTURE, (200, 140, 110)))
    except Exception as error:  # what torchvision and Pillow raise at odd settings has no common base
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"preprocess_cfg of {layout.CONFIG_NAME} fails on a picture: {reason}") from error
    if pixels.dtype != torch.float32 or tuple(pixels.shape) != (3, side, side) or not pixels.isfinite().all():
        given = f"{pixels.dtype} {list(pixels.shape)}".removeprefix("torch.")
        raise ModelError(
            f"preprocess_cfg of {layout.CONFIG_NAME} makes {given} of a picture, and must make finite float32 "
            f"[3, {side}, {side}]"
        )


def _from_name(
    name: str, pretrained: str | None, text_folder: Path | None
) -> tuple[nn.Module, ImageTransform, Tokenizer]:
    in_hub = name.startswith(HUB_PREFIX)
    config = hub_config(name) if in_hub else {"model_cfg": copy.deepcopy(open_clip().get_model_config(name))}
    tag = {} if in_hub or pretrained is None else open_clip().get_pretrained_cfg(name, pretrained)
    if not is_ours(config["model_cfg"]):
        if in_hub or tag or pretrained is None:
            return _open_clip(name, pretrained=pretrained)
        made = _open_clip(name, load_weights=False)
    else:
        made = _built({**config, "preprocess_cfg": tag} if tag else config, text_folder)
    source = name if in_hub else pretrained
    if source is not None:
        file = open_clip().download_pretrained(tag) if tag else source
        towers.fill(made[0], weights.read(file), source=source)
    return made


def _open_clip(name: str, **options: Any) -> tuple[nn.Module, ImageTransform, Tokenizer]:
    root = logging.getLogger()
    root.addFilter(_is_no_word_of_random_weights)
    try:
        # A checkpoint on disk is never unpickled.
        model, _, image_transform = open_clip().create_model_and_transforms(name, weights_only=True, **options)
    finally:
        root.removeFilter(_is_no_word_of_random_weights)
    return model, image_transform, open_clip().get_tokenizer(name)


def _is_no_word_of_random_weights(record: logging.LogRecord) -> bool:
    """open_clip warns that a model is random when we are about to fill it, or when random weights were asked for."""
    return "initialized randomly" not in record.getMessage()


def _built(config: dict[str, Any], path: Path | None = None) -> tuple[nn.Module, ImageTransform, Tokenizer]:
    """An architecture that open_clip cannot build by itself, with initial weights."""
    model = towers.build(config["model_cfg"], path)
    defaults = {**asdict(PreprocessCfg()), "size": model.visual.image_size}
    settings = merge_preprocess_dict(defaults, config.get("preprocess_cfg") or {})
    set_model_preprocess_cfg(model, {**settings, "size": model.visual.image_size})
    tokenizer = model.tokenizer or open_clip().SimpleTokenizer(context_length=model.context_length)
    return model, image_transform_v2(PreprocessCfg(**settings), is_train=False), tokenizer
