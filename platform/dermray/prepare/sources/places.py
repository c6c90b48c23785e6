"""Where a source's images lie: as files below the input root, or inside .zip and .tar archives there."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection, Iterable

import pyarrow as pa

from dermray import storage
from dermray.prepare import archives
from dermray.prepare.sources.rows import map_values

# What folders and files are called after the splits they hold.
SPLITS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val"},
}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def images_below(root: str, folder: str = "") -> list[str]:
    """Paths, relative to `root`, of all images below a folder of it, members of archives included; nearest first.

    Raises:
        CorpusError: an archive is cut off.
        StorageError: the folder cannot be listed.
    """
    base = storage.join(root, folder) if folder else root
    files = [_relative(root, uri) for uri in storage.list_files(base, recursive=True)]
    return sorted(_images(root, files), key=_nearness)


def locate(root: str, names: pa.Array, otherwise: Callable[[str], str]) -> pa.Array:
    """The path of each image of which a table gives only the name: with or without folders, with or without ending.

    Every folder and archive below `root` is looked through. A name that is nowhere gets the path `otherwise(name)`,
    and will be a missing file; null stays null.

    Raises:
        CorpusError: an archive is cut off.
        StorageError: the input cannot be listed.
    """
    found = _match(images_below(root), set(names.drop_null().to_pylist()))
    return map_values(names, lambda name: found.get(name) or otherwise(name), pa.string())


def unpacked_or_archived(root: str, paths: pa.Array) -> pa.Array:
    """Paths of a release's table, each where its image really is: below `root` as written, or in an archive.

    Only what lies directly under `root` is listed where every path begins with a folder that is there: a release has
    hundreds of thousands of files. What does not is looked for in the archives under `root` and in those of its
    folders that no path names (`validation_data/`, …). A path found nowhere stays as it is.

    Raises:
        CorpusError: an archive is cut off.
        StorageError: the input cannot be listed.
    """
    folders = {storage.name_of(uri) for uri in storage.list_folders(root)}
    files = [_relative(root, uri) for uri in storage.list_files(root)]
    wanted = {path for path in paths.drop_null().unique().to_pylist() if not archives.split_address(path)}
    tops = {path.partition("/")[0] for path in wanted}
    lacking = {path for path in wanted if path.partition("/")[0] not in folders.union(files)}
    if not lacking:
        return paths
    candidates = [*_images(root, files)]
    for folder in sorted(folders - tops):
        candidates.extend(images_below(root, folder))
    found = _match(sorted(candidates, key=_nearness), lacking)
    return map_values(paths, lambda path: found.get(path, path), pa.string())


def _relative(root: str, uri: str) -> str:
    return uri[len(root.rstrip("/")) + 1 :]


def _images(root: str, files: Iterable[str]) -> Iterable[str]:
    """The images among files, and those inside the archives among them."""
    for file in files:
        if file.lower().endswith(IMAGE_ENDINGS):
            yield file
        elif file.lower().endswith(archives.ENDINGS):
            for member in archives.members(storage.join(root, file)):
                if member.name.lower().endswith(IMAGE_ENDINGS):
                    yield archives.join_address(file, member)


def _nearness(path: str) -> tuple[bool, int, str]:
    return (archives.split_address(path) is not None, path.count("/"), path)


def _match(candidates: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """Wanted names → the first candidate whose last parts they are, its ending included or not.

    An archive counts as a folder of its own name: `youtube.zip!/a.jpg` is `youtube/a.jpg`.
    """
    found: dict[str, str] = {}
    for path in candidates:
        address = archives.split_address(path)
        plain = f"{posixpath.splitext(address.archive)[0]}/{address.member}" if address else path
        parts = plain.split("/")
        for first in range(len(parts)):
            tail = "/".join(parts[first:])
            for name in (tail, posixpath.splitext(tail)[0]):
                if name in wanted:
                    found.setdefault(name, path)
    return found
