"""What lies in a model folder, read without loading torch. Of a model of the kind `clip`, open_clip's layout:

    open_clip_config.json         {"model_cfg": {...}, "preprocess_cfg": {...}}
    open_clip_model.safetensors   the state dict, float32; folders of others may have open_clip_pytorch_model.bin
    config.json, tokenizer.json … of a Hugging Face text tower: its configuration and its tokeniser
    dermray.json                  kind, recipe, corpus digest, MLflow run id, code version; written last

Models of other kinds (`dermray.models.kinds`) have a configuration, model.safetensors and `dermray.json`.
Published folders (`huggingface-cli download ORG/NAME`) have the first two.
`open_clip.create_model_and_transforms("local-dir:PATH")` loads it wherever open_clip knows the architecture;
`dermray.models.create(PATH)` loads it always, without network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from dermray import storage
from dermray.errors import ModelError

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
DERMRAY_NAME = "dermray.json"
CLIP, IMAGE_ENCODER = "clip", "image_encoder"
# What a configuration calls that tower.
PANDERM = "panderm"
# What timm and transformers say of a model, and transformers of its images.
LIBRARY_NAMES = ("config.json", "preprocessor_config.json")
# What a folder or a hub repository may call its weights, best first.
WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
# Of every other kind.
SAFE_WEIGHTS_NAME = "model.safetensors"


def kind_of(uri: str) -> str:
    """The kind that a model folder says it is of; folders that say none are those of the libraries they came from.

    Raises:
        ModelError: `dermray.json` names something else than a kind.
        DocumentError: a document is no JSON object.
    """
    file = storage.join(uri, DERMRAY_NAME)
    with contextlib.suppress(FileNotFoundError):
        named = storage.read_object(file).get("kind")
        if isinstance(named, str) and named:
            return named
        if named is not None:
            raise ModelError(f"{file}: kind must be a text, got {named!r}")
    return CLIP if image_encoder(uri) is None else IMAGE_ENCODER


def read_config(uri: str) -> dict[str, Any]:
    """The content of `open_clip_config.json`.

    Raises:
        ModelError: the folder or the file is missing or malformed.
    """
    file = storage.join(uri, CONFIG_NAME)
    try:
        config = storage.read_json(file)
    except FileNotFoundError:
        kind = kind_of(uri)
        what = "is not a model folder" if kind == CLIP else f"holds a model of the kind {kind}, and clip is needed here"
        raise ModelError(f"{uri} {what}: it has no {CONFIG_NAME}") from None
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
        raise ModelError(f"{uri} has no weights: none of {', '.join(WEIGHTS_NAMES)}")
    with local(uri) as path:
        yield path


def local(uri: str) -> AbstractContextManager[Path]:
    """A local view of a model folder, not checked; what we know the names of need not be listed by the store yet."""
    return storage.local_folder(uri, with_names=(CONFIG_NAME, DERMRAY_NAME, *LIBRARY_NAMES, *WEIGHTS_NAMES))


def image_encoder(uri: str) -> dict[str, Any] | None:
    """What a folder says of its image encoder (`dermray.models.image_encoders`); None for any other folder, and a name.

    Raises:
        DocumentError: its configuration is no JSON object.
    """
    if storage.exists(storage.join(uri, CONFIG_NAME)):
        return None
    try:
        config = storage.read_object(storage.join(uri, LIBRARY_NAMES[0]))
    except FileNotFoundError:
        return None
    library = library_of(config)
    return None if library is None else {"kind": IMAGE_ENCODER, "library": library, "config": config}


def library_of(config: dict[str, Any]) -> Literal["timm", "transformers", "panderm"] | None:
    """Whose `config.json` it is; of ours for a PanDerm encoder it is none's but says `"tower": "panderm"`."""
    if config.get("tower") == PANDERM:
        return "panderm"
    if isinstance(config.get("architecture"), str):
        return "timm"
    return "transformers" if isinstance(config.get("model_type"), str) else None


def weights_digest(uri: str) -> str | None:
    """SHA-256 (hex) of a model folder's weights file, computed from its bytes; None where there is no such file.

    Raises:
        ModelError: `dermray.json` beside it names other weights.
    """
    name = weights_of(uri)
    if name is None:
        return None
    found = storage.sha256(storage.join(uri, name))
    try:
        named = storage.read_object(storage.join(uri, DERMRAY_NAME)).get("weights_sha256", found)
    except FileNotFoundError:
        return found
    if named != found:
        raise ModelError(
            f"{storage.join(uri, name)} has the digest {found[:12]}, and {DERMRAY_NAME} beside it names "
            f"{str(named)[:12]}: the weights were replaced; put back what belongs together"
        )
    return found


def weights_of(uri: str) -> str | None:
    """The name of the weights file that a folder is loaded from; None where it has none."""
    names = WEIGHTS_NAMES if kind_of(uri) == CLIP else (SAFE_WEIGHTS_NAME,)
    return next((name for name in names if storage.exists(storage.join(uri, name))), None)
