"""Artifacts of runs and models to MLflow's store, each looked for there afterwards: a lost one is no success.

MLflow's own client takes a store's word for an upload. Here the store's listing has to show each file with as many
bytes as were sent. A store that lets nobody list is believed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dermray import ledger
from dermray.errors import StorageError
from dermray.tracking import store

REFUSED = ("AccessDenied", "Forbidden", "403")

logger = logging.getLogger(__name__)


class UploadError(OSError):
    """The store of artifacts did not take one, or does not hold it: its record waits as in an outage."""


def text(client: MlflowClient, run_id: str, content: str, path: str) -> None:
    """Upload a text file of a run.

    Raises:
        UploadError: the store refuses, or does not hold it afterwards.
        MlflowException, OSError: MLflow cannot be reached.
    """
    with _named(path):
        client.log_text(run_id, content, path)
        _confirm(partial(client.list_artifacts, run_id), {path: len(content.encode("utf-8"))})


def folder(client: MlflowClient, run_id: str, local: Path, path: str) -> None:
    """Upload the files of a folder below `path` of a run. Raises as `text`.

    Those of a run that is at work in the folder come and go while MLflow reads it, and stay where they are.
    """
    with _named(path), tempfile.TemporaryDirectory(prefix="dermray-") as seen:
        for file in _files(local):
            name = file.relative_to(local)
            if name.parts[0] != ledger.FOLDER and ledger.finished_name(name.name) == name.name:
                link = Path(seen) / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.absolute())
        client.log_artifacts(run_id, seen, path)
        _confirm(partial(client.list_artifacts, run_id), _sizes(Path(seen), path))


def model(client: MlflowClient, model_id: str, local: Path) -> None:
    """Upload the files of a folder of a logged model. Raises as `text`."""
    with _named(f"model {model_id}"):
        client.log_model_artifacts(model_id, str(local))
        _confirm(partial(client.list_logged_model_artifacts, model_id), _sizes(local, ""))


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError, StorageError):
        raise
    except Exception as error:
        # Clients of stores, boto3 among them, raise errors of their own that have nothing in common.
        raise UploadError(f"the artifact store did not take {path}: {store.first_line(error)}") from error


def _sizes(local: Path, path: str) -> dict[str, int]:
    """Bytes of each file of a folder, by the name that it has as an artifact."""
    return {posixpath.join(path, file.relative_to(local).as_posix()): file.stat().st_size for file in _files(local)}


def _files(local: Path) -> Iterator[Path]:
    return (Path(parent) / name for parent, _, names in os.walk(local) for name in names)


def _confirm(list_in: Callable[[str | None], list[Any]], sizes: Mapping[str, int]) -> None:
    """Compare what was sent with what the store shows."""
    for parent in sorted({posixpath.dirname(path) for path in sizes}):
        try:
            held = {info.path: info.file_size for info in list_in(parent or None) if not info.is_dir}
        except Exception as error:
            # MLflow puts words of its own around what a store says.
            if not any(mark in f"{error} {error.__cause__} {error.__context__}" for mark in REFUSED):
                raise
            logger.warning("uploads are not looked for: the artifact store shows no list (%s)", store.first_line(error))
            return
        for path, size in sizes.items():
            if posixpath.dirname(path) == parent and held.get(path, -1) not in (size, None):
                found = f"{held[path]:,} of {size:,} bytes" if path in held else "nothing"
                raise UploadError(f"the artifact store took {path} and holds {found}")
