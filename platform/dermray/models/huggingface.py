"""Hugging Face text towers: built from a configuration at hand, with a tokeniser that travels in the model folder.

An architecture names its text model (`hf_model_name`, `hf_tokenizer_name`: a hub id or a local folder, as in
open_clip) and may carry that model's configuration (`hf_config`), which makes it known without network. A model
folder, and the folder of a downloaded language model, hold `config.json` and the tokeniser's files; these go before
names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from open_clip.hf_model import HFTextEncoder, arch_dict
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from dermray import storage
from dermray.errors import ModelError
from dermray.model_uri import HUB_PREFIX
from dermray.models import bounds, weights
from dermray.models.architectures import ARCHITECTURES_FOLDER, PACKAGED_PREFIX

CONFIG_NAME = "config.json"
SAFETENSORS_NAME = "model.safetensors"
# No tokeniser's file is larger; weights, which lie beside them, are.
MAX_TOKENIZER_FILE_BYTES = 64 << 20
TOKENIZER_NAMES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt")
PACKAGED_FOLDER = Path(__file__).parent / "tokenizers"
# Parts of published text checkpoints that an encoder with its own pooling has no place for.
HEAD_PREFIXES = ("pooler.", "cls.", "lm_head.")
POSITION_IDS = "embeddings.position_ids"
# How keys of a text tower begin in a checkpoint of both towers.
JOINT_PREFIX = "text.transformer."


class Tokenizer:
    """N texts → int64 `[N, L]`, cleaned, cut and padded as open_clip does; files are loaded on first use.

    So a model can be had without the network that its tokeniser may need.
    """

    def __init__(self, source: str, *, context_length: int, mode: str | None, options: dict[str, Any]) -> None:
        self._source = source
        self._context_length = context_length
        self._mode = mode
        self._options = options
        self._loaded: HFTokenizer | None = None

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokenise; longer texts are cut at the context length.

        Raises:
            ModelError: the files cannot be had.
        """
        return self.load()(texts)

    def load(self) -> HFTokenizer:
        """Fetch and read the files, once.

        Raises:
            ModelError: the files cannot be had.
        """
        if self._loaded is None:
            try:
                self._loaded = HFTokenizer(
                    self._source,
                    context_length=self._context_length,
                    tokenizer_mode=self._mode,
                    trust_remote_code=False,
                    **self._options,
                )
            except Exception as error:
                raise _unavailable("tokeniser", self._source, error) from error
        return self._loaded

    def files(self) -> dict[str, bytes]:
        """Name → content of what a folder needs to make the same tokeniser.

        Raises:
            ModelError: the files cannot be had.
        """
        with tempfile.TemporaryDirectory(prefix="dermray-") as folder:
            self.load().save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@contextmanager
def language_model_folder(source: str | None) -> Iterator[Path | None]:
    """A local view of what lies beside the weights of a language model: configuration and tokeniser.

    Args:
        source: as for `load_text`; a hub id or a lone file gives None.
    """
    if source is None or source.startswith(HUB_PREFIX) or not storage.exists(storage.join(source, CONFIG_NAME)):
        yield None
    elif storage.is_local(source):
        yield storage.local_path(source)
    else:
        with tempfile.TemporaryDirectory(prefix="dermray-") as folder:
            for file in storage.list_files(source):
                if storage.size_bytes(file) <= MAX_TOKENIZER_FILE_BYTES:
                    (Path(folder) / storage.name_of(file)).write_bytes(storage.read_bytes(file))
            yield Path(folder)


def tokenizer(text_cfg: dict[str, Any], folder: Path | None = None) -> Tokenizer:
    """The tokeniser of an architecture.

    Args:
        text_cfg: the architecture's section.
        folder: of a model or a language model, whose own files win; they are read at once.

    Raises:
        ModelError: the folder's files are malformed.
    """
    source = str(text_cfg.get("hf_tokenizer_name") or text_cfg["hf_model_name"])
    inside = folder is not None and any((folder / name).is_file() for name in TOKENIZER_NAMES)
    if inside:
        source = str(folder)
    elif source.startswith(PACKAGED_PREFIX):
        source = str(PACKAGED_FOLDER / source.removeprefix(PACKAGED_PREFIX))
    made = Tokenizer(
        source,
        context_length=int(text_cfg.get("context_length", 77)),
        mode=text_cfg.get("tokenizer_mode"),
        options=dict(text_cfg.get("tokenizer_kwargs") or {}),
    )
    if inside:
        made.load()
    return made


def text_tower(text_cfg: dict[str, Any], embed_dim: int, folder: Path | None = None) -> HFTextEncoder:
    """The tower with initial weights; `load_text` or a whole checkpoint fills it.

    Args:
        text_cfg: the architecture's section.
        embed_dim: width of the joint space.
        folder: of a model or a language model, which may hold the text model's `config.json`.

    Raises:
        ModelError: the configuration cannot be had, is not one of a text model that open_clip knows, or describes
            many times more than the weights beside it hold.
    """
    config = _config(text_cfg, folder)
    if config.model_type not in arch_dict:
        raise ModelError(
            f"text model type {config.model_type!r} of {text_cfg['hf_model_name']!r} is not supported; known: "
            f"{', '.join(arch_dict)}"
        )
    pooler = text_cfg.get("hf_pooler_type", "mean_pooler")
    with _filled_from(folder):
        tower = HFTextEncoder(
            text_cfg["hf_model_name"],
            output_dim=embed_dim,
            config=config,
            pooler_type=pooler,
            proj_type=text_cfg.get("hf_proj_type", "mlp"),
        )
    if getattr(config, "is_encoder_decoder", False):
        tower.transformer = tower.transformer.encoder
    elif pooler != "cls_pooler":
        tower.transformer.pooler = None
    return tower.float()


def _filled_from(folder: Path | None) -> AbstractContextManager[None]:
    """As `bounds.filled_by`, where a folder has weights whose size is known without unpacking them."""
    file = None if folder is None else folder / SAFETENSORS_NAME
    return nullcontext() if file is None or not file.is_file() else bounds.filled_by(bounds.Size.of_file(file))


def load_text(tower: nn.Module, source: str) -> None:
    """Fill the transformer of a text tower from a published language model; the projection keeps its weights.

    A model folder, or another checkpoint of a model of two towers, fills the projection too.

    Args:
        tower: what `text_tower` made.
        source: as `weights.read` takes it; heads for other tasks are left out.

    Raises:
        ModelError: the tower is no transformers model, or the weights do not fit it.
    """
    if not isinstance(tower, HFTextEncoder):
        raise ModelError("pretrained_text fills Hugging Face text towers; this architecture has none")
    state = weights.read(source)
    if any(key.startswith(JOINT_PREFIX) for key in state):
        own = {key.removeprefix("text."): value for key, value in state.items() if key.startswith("text.")}
        own.pop(f"transformer.{POSITION_IDS}", None)
        weights.load(tower, own, source=source)
        return
    prefix = f"{tower.config.model_type}."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(HEAD_PREFIXES) and key != POSITION_IDS}
    weights.load(tower.transformer, state, source=source, optional=HEAD_PREFIXES)


def folder_files(tower: HFTextEncoder, made: Tokenizer) -> dict[str, bytes]:
    """What a model folder holds besides open_clip's own files, so that it loads without network."""
    return {CONFIG_NAME: tower.config.to_json_string(use_diff=False).encode(), **made.files()}


def _config(text_cfg: dict[str, Any], folder: Path | None) -> PretrainedConfig:
    name = str(text_cfg["hf_model_name"])
    try:
        if text_cfg.get("hf_config"):
            return AutoConfig.for_model(**text_cfg["hf_config"])
        # A hub repository's config.json may describe the whole model to other libraries.
        if folder is not None and (folder / CONFIG_NAME).is_file():
            document = storage.read_json(folder / CONFIG_NAME)
            bounds.require_sizes(document, source=CONFIG_NAME)
            if document.get("model_type") in arch_dict:
                return AutoConfig.for_model(**document)
        return _packaged_config(name) or AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise _unavailable("configuration", name, error) from error


def _packaged_config(name: str) -> PretrainedConfig | None:
    """That of a text model which one of our own architectures names: published folders only name theirs."""
    for file in sorted(ARCHITECTURES_FOLDER.glob("*.json")):
        text_cfg = storage.read_json(file)["text_cfg"]
        if text_cfg.get("hf_config") and text_cfg["hf_model_name"].lower() == name.lower():
            return AutoConfig.for_model(**text_cfg["hf_config"])
    return None


def _unavailable(what: str, source: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    return ModelError(
        f"cannot load the {what} of the text model {source!r}: {type(error).__name__}: {reason}. Without network, "
        "download its folder elsewhere; give that as pretrained_text, or put its config.json and its tokeniser's files "
        "into the model's folder"
    )
