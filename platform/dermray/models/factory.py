"""From a name or a URI to a model, its image transform and its tokenizer.

A name is an open_clip architecture, one of ours (`configs/*.json`, same format), or an `hf-hub:` id. A URI is a
folder in open_clip's layout, local or remote. Weights are read as safetensors or with `weights_only=True`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import get_model_preprocess_cfg
from torch import nn

from dermray.errors import ModelError
from dermray.model_uri import HUB_PREFIX, LOCAL_PREFIX, folder_uri
from dermray.models import folder

CONFIG_FOLDER = Path(__file__).parent / "configs"

ImageTransform = Callable[[Any], torch.Tensor]
Tokenizer = Callable[[list[str]], torch.Tensor]


def create(name_or_uri: str, pretrained: str | None = None) -> tuple[nn.Module, ImageTransform, Tokenizer]:
    """Build a model on the CPU in float32, in evaluation mode.

    Args:
        name_or_uri: an architecture name, `hf-hub:ORG/NAME`, `local-dir:PATH`, or the URI of a model folder.
        pretrained: for an architecture name: an open_clip tag (`openai`) or a path to a checkpoint; ignored by
            folders and hub ids, which bring their weights.

    Returns:
        `(model, image_transform, tokenizer)`: PIL image → float32 `[3, S, S]`; list of N texts → int64 `[N, L]`.

    Raises:
        ModelError: unknown name, missing or malformed files, or weights that do not fit the architecture.
    """
    _register_own_configs()
    uri = folder_uri(name_or_uri)
    if uri is not None:
        with folder.opened(uri) as path:
            return _create(f"{LOCAL_PREFIX}{path}", None, shown_as=uri)
    if not name_or_uri.startswith(HUB_PREFIX):
        _require_known(name_or_uri)
    return _create(name_or_uri, pretrained, shown_as=name_or_uri)


def architecture(name_or_uri: str) -> dict[str, Any]:
    """The `model_cfg` of a name or folder: what `open_clip_config.json` describes.

    Raises:
        ModelError: as in `create`.
    """
    _register_own_configs()
    uri = folder_uri(name_or_uri)
    if uri is not None:
        return folder.read_config(uri)["model_cfg"]
    if name_or_uri.startswith(HUB_PREFIX):
        return open_clip.factory._get_hf_config(name_or_uri.removeprefix(HUB_PREFIX))["model_cfg"]
    _require_known(name_or_uri)
    return copy.deepcopy(open_clip.get_model_config(name_or_uri))


def located(name_or_uri: str) -> str:
    """A folder's URI made absolute, for processes that run elsewhere; a name stays as it is."""
    return folder_uri(name_or_uri) or name_or_uri


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
def tokenizer(name_or_uri: str) -> Tokenizer:
    """The tokeniser of a model without its weights; made once per process.

    Raises:
        ModelError: as in `create`.
    """
    _register_own_configs()
    uri = folder_uri(name_or_uri)
    if uri is None:
        if not name_or_uri.startswith(HUB_PREFIX):
            _require_known(name_or_uri)
        return open_clip.get_tokenizer(name_or_uri)
    with folder.opened(uri) as path:
        return open_clip.get_tokenizer(f"{LOCAL_PREFIX}{path}")


def _create(name: str, pretrained: str | None, *, shown_as: str) -> tuple[nn.Module, ImageTransform, Tokenizer]:
    try:
        # No init of random weights beyond the architecture's own; a checkpoint on disk is never unpickled.
        model, _, image_transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:600]
        raise ModelError(
            f"cannot load the model {shown_as!r}: {type(error).__name__}: {reason}. Without network, download the "
            "model's folder elsewhere and give its path"
        ) from error
    return model.eval(), image_transform, tokenizer


def _require_known(name: str) -> None:
    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see open_clip.list_models()"
        raise ModelError(f"unknown model {name!r}: not an architecture's name and not a folder{hint}")


@cache
def _register_own_configs() -> None:
    open_clip.add_model_config(CONFIG_FOLDER)
