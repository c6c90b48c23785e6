"""What architecture a name or a URI stands for, and whether all is there to build it; a folder's without loading torch.

A `model_cfg` is open_clip's, with two additions: `"tower": "panderm"` in `vision_cfg`, and `hf_config` in `text_cfg`
(`dermray.models.huggingface`). The published PanDerm configurations say `pretrain_path` instead.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from dermray import storage
from dermray.errors import ModelError
from dermray.model_uri import HUB_PREFIX, folder_uri
from dermray.models import kinds, layout

_OFFLINE = (
    f"Without network, download the model's folder elsewhere ({layout.CONFIG_NAME} and {layout.WEIGHTS_NAME} or "
    "open_clip_pytorch_model.bin) and give its path"
)

ARCHITECTURES_FOLDER = Path(__file__).parent / "configs"
# Tokenisers that the package brings along are named `dermray:NAME`.
PACKAGED_PREFIX = "dermray:"
# A model's two towers, as `train.lock` names them.
Tower = Literal["image", "text"]
PANDERM_KEYS = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "ls_init_value")


def architecture(name_or_uri: str) -> dict[str, Any]:
    """The `model_cfg` of a name or folder: what `open_clip_config.json` describes.

    Raises:
        ModelError: as in `create`.
    """
    uri = folder_uri(name_or_uri)
    if uri is not None:
        return published_form(layout.read_config(uri)["model_cfg"], name="")
    if name_or_uri.startswith(HUB_PREFIX):
        with explained(name_or_uri):
            return hub_config(name_or_uri)["model_cfg"]
    require_known(name_or_uri)
    return copy.deepcopy(open_clip().get_model_config(name_or_uri))


def described(name_or_uri: str) -> dict[str, Any]:
    """What a model is, of whichever kind, without its weights: `architecture`, or the kind with its configuration.

    Raises:
        ModelError: as in `create`, or of a kind that is not known.
    """
    uri = folder_uri(name_or_uri)
    if uri is None or layout.kind_of(uri) == layout.CLIP:
        return architecture(name_or_uri)
    alone = layout.image_encoder(uri)
    return alone if alone is not None else kinds.configuration(uri)


def check(
    name_or_uri: str,
    pretrained: str | None = None,
    *,
    pretrained_image: str | None = None,
    pretrained_text: str | None = None,
) -> None:
    """Refuse what `create` would refuse for want of a file, without building the model; what is in a hub is fetched.

    Raises:
        ModelError: an unknown architecture, a tokeniser that cannot be had, or weights that are not there.
    """
    from dermray.models import hub

    asks_hub = hub.concerns(name_or_uri, pretrained, pretrained_image, pretrained_text)
    with hub.settled() if asks_hub or _tokeniser_is_remote(name_or_uri) else nullcontext():
        _check(name_or_uri, pretrained, pretrained_image, pretrained_text)
        hub.fetch(name_or_uri, pretrained, pretrained_image, pretrained_text)


def _check(name_or_uri: str, pretrained: str | None, pretrained_image: str | None, pretrained_text: str | None) -> None:
    from dermray.models import weights

    architecture(name_or_uri)
    in_folder = folder_uri(name_or_uri) is not None
    named = pretrained is not None and (in_folder or not open_clip().get_pretrained_cfg(name_or_uri, pretrained))
    for source in (pretrained if named else None, pretrained_image, pretrained_text):
        if source is not None:
            weights.require(source)
    if not in_folder:
        from dermray.models.factory import tokenizer

        tokenizer(name_or_uri, pretrained_text)([""])


def _tokeniser_is_remote(name: str) -> bool:
    """Whether the text tower of an architecture names a tokeniser that does not come with a package."""
    text_cfg = (open_clip().get_model_config(name) or {}).get("text_cfg", {}) if folder_uri(name) is None else {}
    source = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name") or ""
    return bool(source) and not str(source).startswith(PACKAGED_PREFIX)


def located(name_or_uri: str) -> str:
    """A folder's URI made absolute, for processes that run elsewhere; a name stays as it is."""
    return folder_uri(name_or_uri) or name_or_uri


def located_weights(source: str | None) -> str | None:
    """A checkpoint's path made absolute; tags, hub ids and URIs stay as they are."""
    if source is None or source.startswith(HUB_PREFIX) or not ("/" in source or storage.exists(source)):
        return source
    return storage.normalise(source)


def published_form(model_cfg: dict[str, Any], *, name: str) -> dict[str, Any]:
    """A `model_cfg` in which a PanDerm tower is marked as such.

    The published loader goes by the name of the model; its configurations also hold the author's `pretrain_path`.
    """
    vision_cfg = model_cfg["vision_cfg"]
    published = "pretrain_path" in vision_cfg or (layout.PANDERM in name.lower() and "tower" not in vision_cfg)
    if not published:
        return model_cfg
    known = {key: vision_cfg[key] for key in PANDERM_KEYS if vision_cfg.get(key) is not None}
    return {**model_cfg, "vision_cfg": {"tower": layout.PANDERM, **known}}


def is_ours(model_cfg: dict[str, Any]) -> bool:
    """Whether `build` makes the architecture, and not open_clip: a tower of ours or of transformers."""
    text_cfg = model_cfg["text_cfg"]
    plain = "multimodal_cfg" not in model_cfg
    return is_panderm(model_cfg) or (plain and is_huggingface(text_cfg))


def is_huggingface(text_cfg: dict[str, Any]) -> bool:
    """Whether an architecture's text tower is a transformers model."""
    return bool(text_cfg.get("hf_model_name"))


def hub_config(name: str) -> dict[str, Any]:
    """The configuration of a hub id's repository, in the layout of `open_clip_config.json`."""
    repository = name.removeprefix(HUB_PREFIX)
    config = open_clip().factory._get_hf_config(repository)
    return {**config, "model_cfg": published_form(config["model_cfg"], name=repository)}


@contextmanager
def explained(shown_as: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one line about the model."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"cannot load the model {shown_as!r}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:600]
        raise ModelError(f"cannot load the model {shown_as!r}: {type(error).__name__}: {reason}. {_OFFLINE}") from error


def require_known(name: str) -> None:
    """Refuse a name that is no architecture's.

    Raises:
        ModelError: it is none; names the nearest ones.
    """
    known = open_clip().list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see open_clip.list_models()"
        raise ModelError(f"unknown model {name!r}: not an architecture's name and not a folder{hint}")


@cache
def open_clip() -> ModuleType:
    """The package, which takes seconds to import, knowing our architectures by name too."""
    import open_clip as package

    package.add_model_config(ARCHITECTURES_FOLDER)
    return package


def is_panderm(model_cfg: dict[str, Any]) -> bool:
    """Whether an architecture's vision tower is PanDerm's."""
    return model_cfg["vision_cfg"].get("tower") == layout.PANDERM
