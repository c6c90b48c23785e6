"""Checkpoints: read without running what they hold, unwrap, and load only what fits exactly."""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dermray import foreign, storage
from dermray.errors import DermRayError, ModelError
from dermray.model_uri import HUB_PREFIX
from dermray.models.layout import WEIGHTS_NAMES

# The largest published tower (5 B parameters, float32) is about 20 GB; a bomb should not fill the memory of a node.
MAX_CHECKPOINT_BYTES = 32 << 30
SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model", "module")
# What DistributedDataParallel and torch.compile put before every key.
KEY_PREFIXES = ("module.", "_orig_mod.")
NUM_NAMED = 4


def read(source: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint, on the CPU.

    Args:
        source: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file (path or URI), a folder that holds one under
            a usual name, or `hf-hub:ORG/NAME` for the weights of a hub repository. It may be wrapped in
            `{"state_dict": …}`, `{"model": …}` or `{"module": …}`; prefixes that DDP and torch.compile put before
            every key are taken off.

    Raises:
        ModelError: it is not there, too large, damaged, something else (a Git LFS pointer, an HTML page), or holds more
            than tensors.
    """
    file = _hub_file(source) if source.startswith(HUB_PREFIX) else _file_of(source)
    suffix = "." + file.rpartition(".")[2].lower()
    if suffix not in (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES):
        known = ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))
        raise ModelError(f"checkpoint {source!r}: the name must end in one of {known}")
    try:
        if storage.size_bytes(file) > MAX_CHECKPOINT_BYTES:
            raise ModelError(f"checkpoint {source!r} is larger than {MAX_CHECKPOINT_BYTES >> 30} GiB")
        _refuse_foreign(file, source)
        document = _read_safetensors(file) if suffix == SAFETENSORS_SUFFIX else _read_torch(file)
    except FileNotFoundError:
        raise _absent(source) from None
    except DermRayError:
        raise
    except Exception as error:  # what parsers raise at foreign bytes has no common base
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"checkpoint {source!r} is damaged, or holds more than tensors and is not opened for that: {reason}"
        ) from error
    return _unwrapped(document, source)


def require(source: str) -> None:
    """Refuse a checkpoint that is not there, without reading it; what a hub has is not asked.

    Raises:
        ModelError: no such file, or a folder without weights.
    """
    if not source.startswith(HUB_PREFIX):
        try:
            storage.size_bytes(_file_of(source))
        except FileNotFoundError:
            raise _absent(source) from None


def fetch(source: str) -> None:
    """Have the weights of a hub repository in this machine's cache.

    Raises:
        ModelError: the hub does not have them, or they cannot be fetched.
    """
    _hub_file(source)


def load(module: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: Sequence[str] = ()) -> None:
    """Copy a state dict into a module if it fits exactly.

    Args:
        source: what to call the weights in an error.
        optional: prefixes of keys that the weights may lack; the module keeps its own values there.

    Raises:
        ModelError: keys are missing, unexpected or of another shape; counted, and the first few named. The module is
            untouched then.
    """
    require_fit(module, state, source=source, optional=optional)
    module.load_state_dict(dict(state), strict=False)


def require_fit(module: nn.Module, state: Mapping[str, Tensor], *, source: str, optional: Sequence[str] = ()) -> None:
    """Refuse a state dict that `load` would refuse, for a module that may have no memory yet (device `meta`).

    Raises:
        ModelError: as in `load`.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.startswith(tuple(optional))]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} {kind} ({_first(keys)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if keys
    ]
    if problems:
        raise ModelError(f"the weights of {source!r} do not fit the architecture: {'; '.join(problems)}")


def _refuse_foreign(file: str, source: str) -> None:
    """Name what is no checkpoint at all; PyTorch's own files are zip archives."""
    head = storage.read_range(file, 0, foreign.HEAD_BYTES)
    known = foreign.describe(head)
    if known is not None and known.name != foreign.ZIP:
        is_document = known.advice.startswith(("export", "save", "give"))
        advice = "give the file with the weights" if is_document else known.advice
        raise ModelError(f"checkpoint {source!r} is {known.name} and holds no weights: {advice}")


def _absent(source: str) -> ModelError:
    return ModelError(f"checkpoint {source!r} does not exist, or is a folder without weights")


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:NUM_NAMED]) + (", …" if len(keys) > NUM_NAMED else "")


def _file_of(source: str) -> str:
    """The file itself, or the weights inside a folder."""
    if source.lower().endswith((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)):
        return source
    for name in WEIGHTS_NAMES:
        file = storage.join(source, name)
        if storage.exists(file):
            return file
    return source


def _hub_file(source: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    out_of_reach = None
    for name in WEIGHTS_NAMES:
        try:
            return str(hf_hub_download(source.removeprefix(HUB_PREFIX), name))
        except LocalEntryNotFoundError as error:
            # Not in the cache, and the hub was not asked; another name may be there.
            out_of_reach = error
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise _not_fetched(source, error) from error
    if out_of_reach is not None:
        raise _not_fetched(source, out_of_reach) from out_of_reach
    raise ModelError(f"{source!r} has none of the weights files {', '.join(WEIGHTS_NAMES)}")


def _not_fetched(source: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:300]
    return ModelError(
        f"cannot fetch the weights of {source!r}: {type(error).__name__}: {reason}. Without network, download them "
        "elsewhere and give the path"
    )


def _read_safetensors(file: str) -> dict[str, Tensor]:
    if storage.is_local(file):
        return safetensors.torch.load_file(str(storage.local_path(file)))
    return safetensors.torch.load(storage.read_bytes(file, max_bytes=MAX_CHECKPOINT_BYTES))


def _read_torch(file: str) -> Any:
    data: Path | io.BytesIO
    if storage.is_local(file):
        data = storage.local_path(file)
    else:
        data = io.BytesIO(storage.read_bytes(file, max_bytes=MAX_CHECKPOINT_BYTES))
    if zipfile.is_zipfile(data):
        with zipfile.ZipFile(data) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_CHECKPOINT_BYTES:
                raise ModelError(f"checkpoint {file!r} unpacks to more than {MAX_CHECKPOINT_BYTES >> 30} GiB")
    if isinstance(data, io.BytesIO):
        data.seek(0)
    # Published training checkpoints carry their command line; a Namespace is a bag of attributes and runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(data, map_location="cpu", weights_only=True)


def _unwrapped(document: Any, source: str) -> dict[str, Tensor]:
    while isinstance(document, dict):
        inner = next((document[name] for name in WRAPPERS if isinstance(document.get(name), dict)), None)
        if inner is None:
            break
        document = inner
    if not isinstance(document, dict) or not document:
        raise ModelError(f"checkpoint {source!r} is no state dict: it holds a {type(document).__name__}")
    others = [str(key) for key, value in document.items() if not isinstance(value, Tensor)]
    if others:
        raise ModelError(f"checkpoint {source!r} is no state dict: {_first(others)} is no tensor")
    while prefix := next((p for p in KEY_PREFIXES if all(key.startswith(p) for key in document)), ""):
        document = {key.removeprefix(prefix): value for key, value in document.items()}
    return document
