"""Saves a model as a folder; `dermray.models.layout` says what lies in it."""

from __future__ import annotations

import hashlib
from typing import Any

import safetensors.torch
from open_clip.model import get_model_preprocess_cfg
from torch import nn

from dermray import storage
from dermray.models import huggingface
from dermray.models.layout import CLIP, CONFIG_NAME, DERMRAY_NAME, WEIGHTS_NAME
from dermray.models.towers import TwoTowers


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
    write_facts(uri, CLIP, digest, provenance)
    return digest


def write_facts(uri: str, kind: str, digest: str, provenance: dict[str, Any]) -> None:
    """Write `dermray.json`, the last file of a model folder of any kind.

    Args:
        kind: a name that `dermray.models.kinds` finds.
        digest: SHA-256 (hex) of the weights file.
    """
    storage.write_json(storage.join(uri, DERMRAY_NAME), {**provenance, "kind": kind, "weights_sha256": digest})


def _text_files(model: nn.Module) -> dict[str, bytes]:
    if not isinstance(model, TwoTowers) or model.tokenizer is None:
        return {}
    return huggingface.folder_files(model.text, model.tokenizer)


def _preprocess_cfg(model: nn.Module) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in get_model_preprocess_cfg(model).items()
    }
