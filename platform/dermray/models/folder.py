"""The model folder: open_clip's layout plus `dermray.json`.

    open_clip_config.json         {"model_cfg": {...}, "preprocess_cfg": {...}}
    open_clip_model.safetensors   the state dict, float32; folders of others may have open_clip_pytorch_model.bin
    config.json, tokenizer.json … of a Hugging Face text tower: its configuration and its tokeniser
    dermray.json                  recipe, corpus digest, MLflow run id, code version; written last

Published folders (`huggingface-cli download ORG/NAME`) have the first two.
`open_clip.create_model_and_transforms("local-dir:PATH")` loads it wherever open_clip knows the architecture;
`dermray.models.create(PATH)` loads it always, without network.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from open_clip.model import get_model_preprocess_cfg
from torch import nn

from dermray import storage
from dermray.errors import ModelError
from dermray.models import huggingface, weights
from dermray.models.towers import TwoTowers

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
DERMRAY_NAME = "dermray.json"


def save(model: nn.Module, uri: str, *, model_cfg: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Write a model folder; `dermray.json` comes last and names the digest of the weights.

    Args:
        model: an open_clip model with its preprocessing attached.
        uri: the folder, local or remote.
        model_cfg: the architecture, as `dermray.models.architecture` gives it.
        provenance: JSON-serialisable facts for `dermray.json`.

    Returns:
        SHA-256 (hex) of the weights file.

    Raises:
        ModelError: the tokeniser's files, which go with a Hugging Face text tower, cannot be had.
    """
    extra = _text_files(model)
    state = {key: value.detach().float().cpu().contiguous() for key, value in model.state_dict().items()}
    saved = safetensors.torch.save(state, metadata={"format": "pt"})
    digest = hashlib.sha256(saved).hexdigest()
    storage.write_bytes(storage.join(uri, WEIGHTS_NAME), saved)
    for name, content in extra.items():
        storage.write_bytes(storage.join(uri, name), content)
    storage.write_json(
        storage.join(uri, CONFIG_NAME), {"model_cfg": model_cfg, "preprocess_cfg": _preprocess_cfg(model)}
    )
    storage.write_json(storage.join(uri, DERMRAY_NAME), {"weights_sha256": digest, **provenance})
    return digest


def read_config(uri: str) -> dict[str, Any]:
    """The content of `open_clip_config.json`.

    Raises:
        ModelError: the folder or the file is missing or malformed.
    """
    file = storage.join(uri, CONFIG_NAME)
    try:
        config = storage.read_json(file)
    except FileNotFoundError:
        raise ModelError(f"{uri} is not a model folder: it has no {CONFIG_NAME}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ModelError(f"{file} has no model_cfg; it should hold model_cfg and preprocess_cfg")
    return config


@contextlib.contextmanager
def opened(uri: str) -> Iterator[Path]:
    """A checked local view of a model folder.

    Raises:
        ModelError: files are missing.
    """
    read_config(uri)
    if weights_of(uri) is None:
        raise ModelError(f"{uri} has no weights: none of {', '.join(weights.WEIGHTS_NAMES)}")
    with storage.local_folder(uri) as path:
        yield path


def weights_of(uri: str) -> str | None:
    """The name of the weights file that a folder is loaded from; None where it has none."""
    return next((name for name in weights.WEIGHTS_NAMES if storage.exists(storage.join(uri, name))), None)


def _text_files(model: nn.Module) -> dict[str, bytes]:
    if not isinstance(model, TwoTowers) or model.tokenizer is None:
        return {}
    return huggingface.folder_files(model.text, model.tokenizer)


def _preprocess_cfg(model: nn.Module) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in get_model_preprocess_cfg(model).items()
    }
