"""What a training needs of a model hub: fetched once, by the driver, or refused within seconds.

The hub's library tries again for minutes where there is no network, file by file, and so would every worker.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import huggingface_hub.constants

from dermray.errors import ModelError
from dermray.model_uri import HUB_PREFIX, folder_uri
from dermray.models import weights
from dermray.models.architectures import open_clip

# For a connection, and for the first byte.
REACH_WITHIN_S = 5.0
OFFLINE_VARIABLE = "HF_HUB_OFFLINE"

logger = logging.getLogger(__name__)


@contextmanager
def settled() -> Iterator[None]:
    """Within the block nothing is asked of a hub that is out of reach: what was fetched before is taken, or missing."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    if not before and (reason := _out_of_reach(huggingface_hub.constants.ENDPOINT)):
        logger.warning("the hub %s is out of reach (%s)", huggingface_hub.constants.ENDPOINT, reason)
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def concerns(name_or_uri: str, *sources: str | None) -> bool:
    """Whether a model or the weights it starts from are in a hub."""
    given = [source for source in sources if source is not None]
    return any(one.startswith(HUB_PREFIX) for one in (name_or_uri, *given)) or any(
        folder_uri(name_or_uri) is None and open_clip().get_pretrained_cfg(name_or_uri, source) for source in given
    )


def fetch(name_or_uri: str, pretrained: str | None, *others: str | None) -> None:
    """Have the weights of a model, and those it starts from, in this machine's cache.

    Args:
        pretrained: open_clip's tag, or a checkpoint of the whole model.
        others: checkpoints of towers.

    Raises:
        ModelError: a hub does not have them, or is out of reach and they were not fetched before.
    """
    for source in (name_or_uri, pretrained, *others):
        if source is not None and source.startswith(HUB_PREFIX):
            weights.fetch(source)
    named = pretrained is not None and not folder_uri(name_or_uri)
    tag = open_clip().get_pretrained_cfg(name_or_uri, pretrained) if named else {}
    if tag:
        _fetch_tag(tag, name_or_uri, str(pretrained))


def environment() -> dict[str, str]:
    """Environment variables of processes on this machine that take from its cache what `fetch` brought there."""
    return {OFFLINE_VARIABLE: "1"}


def _fetch_tag(tag: dict[str, object], name: str, pretrained: str) -> None:
    url = str(tag.get("url") or "")
    reason = _out_of_reach(url) if url and not tag.get("hf_hub") and not _is_cached(url) else None
    try:
        if reason is not None:
            raise ConnectionError(reason)
        open_clip().download_pretrained(tag)
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot fetch the weights pretrained={pretrained} of {name}: {said}. Without network, download them "
            "elsewhere and give the file's path as pretrained"
        ) from error


def _is_cached(url: str) -> bool:
    return os.path.isfile(os.path.join(os.path.expanduser("~/.cache/clip"), os.path.basename(url)))


def _out_of_reach(url: str) -> str | None:
    """Why no answer comes from there; None if one does, whatever it says."""
    try:
        httpx.head(url, timeout=REACH_WITHIN_S, follow_redirects=False)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    return None
