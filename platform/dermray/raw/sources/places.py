"""Where a source's images lie: as files below the input root, or inside .zip and .tar archives there.

A name that several files bear is never guessed: the release's own folders come first, files before archives, a name
with its ending before one without; what is still several is noted in `request.findings.ambiguous`.
"""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable

import pyarrow as pa
import pyarrow.compute as pc

from dermray import storage
from dermray.raw import archives
from dermray.raw.litter import litter
from dermray.raw.sources.rows import Findings, SourceRequest, map_values
from dermray.raw.spelling import folded

# The one list of endings: whoever reads folders or archives takes it from here. JPEG has many.
IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp"),
    *(".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
)
# Of what people photograph with, beside the formats that data sets are published in.
PHOTOGRAPH_ENDINGS = (*IMAGE_ENDINGS, ".heic", ".heif", ".hif", ".avif", ".dcm", ".dicom")
# Of a path whose first part alone does not tell how it is folded, or that may be the address of an archive's member.
_ODD_TOP = r"^[./]|[\\!]|^[^/]*[\s\pZ\x1c-\x1f\x85]"


def images_below(
    request: SourceRequest, folder: str = "", *, endings: tuple[str, ...] = IMAGE_ENDINGS, count_others: bool = False
) -> list[str]:
    """Paths, relative to the input, of all images below a folder of it, members of archives included; nearest first.

    Files that systems leave behind are passed over and counted in `request.findings`.

    Args:
        endings: of images.
        count_others: whether files of other endings are counted there too: where the files are the corpus, and no
            table says which of them are.

    Raises:
        CorpusError: an archive is cut off.
        StorageError: the folder cannot be listed.
    """
    base = storage.join(request.input, folder) if folder else request.input
    files = [_relative(request.input, uri) for uri in storage.list_files(base, recursive=True)]
    not_read = request.findings.not_read if count_others else Counter[str]()
    return sorted(_images(request, files, endings, not_read), key=_nearness)


def locate(
    request: SourceRequest, names: pa.Array, otherwise: Callable[[str], str], *, folders: Collection[str] = ()
) -> pa.Array:
    """The path of each image of which a table gives only the name: with or without folders, with or without ending.

    Every folder and archive below the input is looked through. A name that is nowhere, or that several files bear, gets
    the path `otherwise(name)`; null stays null.

    Args:
        folders: those in which the release keeps its images, archives of these names among them: they come first.

    Raises:
        CorpusError: an archive is cut off.
        StorageError: the input cannot be listed.
    """
    wanted = {name: otherwise(name) for name in set(names.drop_null().to_pylist())}
    found = _match(images_below(request), wanted, folders, request.findings)
    return map_values(names, lambda name: found.get(name) or otherwise(name), pa.string())


def unpacked_or_archived(request: SourceRequest, paths: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Paths of a release's table, each where its image really is: below the input as written, or in an archive.

    Only what lies directly under the input is listed where every path begins with a folder that is there: a release has
    hundreds of thousands of files. What does not is looked for in the archives under the input and in those of its
    folders that no path names (`validation_data/`, …). A path found nowhere, or in several places, stays as it is.

    Raises:
        CorpusError: an archive is cut off.
        StorageError: the input cannot be listed.
    """
    root = request.input
    folders = {storage.name_of(uri) for uri in storage.list_folders(root)}
    files = [_relative(root, uri) for uri in storage.list_files(root)]
    here = {*folders, *files}
    chunks = paths.chunks if isinstance(paths, pa.ChunkedArray) else [paths]
    tops, named = (set[str]().union(*each) for each in zip(*map(_tops, chunks), strict=True)) if chunks else ((), ())
    if here.issuperset(tops):
        return paths
    candidates = [*_images(request, files, IMAGE_ENDINGS, Counter())]
    for folder in sorted(folders.difference(named)):
        candidates.extend(images_below(request, folder))
    if not candidates:
        return paths
    wanted = (path for chunk in chunks for path in chunk.drop_null().unique().to_pylist())
    lacking = {path: path for path in wanted if path.partition("/")[0] not in here and not archives.split_address(path)}
    found = _match(sorted(candidates, key=_nearness), lacking, (), request.findings)
    placed = [map_values(chunk, lambda path: found.get(path, path), pa.string()) for chunk in chunks]
    return pa.chunked_array(placed, pa.string()) if isinstance(paths, pa.ChunkedArray) else placed[0]


def with_images_placed(request: SourceRequest, table: pa.Table) -> pa.Table:
    """Raw rows with the paths of `unpacked_or_archived`.

    Raises:
        CorpusError, StorageError: as there.
    """
    images = unpacked_or_archived(request, table["image"])
    return table.set_column(table.column_names.index("image"), table.schema.field("image"), images)


def _tops(paths: pa.Array) -> tuple[set[str], set[str]]:
    """The first parts of paths that are no members of archives: as written, and of the paths as they are folded."""
    whole = paths.drop_null()
    odd = pc.match_substring_regex(whole, _ODD_TOP)
    plain = pc.replace_substring_regex(whole.filter(pc.invert(odd)), "(?s)/.*", "").unique().to_pylist()
    others = [path for path in whole.filter(odd).to_pylist() if not archives.split_address(path)]
    tops = {*plain, *(path.partition("/")[0] for path in others)}
    return tops, {*map(folded, plain), *(folded(path).partition("/")[0] for path in others)}


def _relative(root: str, uri: str) -> str:
    return uri[len(root.rstrip("/")) + 1 :]


def _images(
    request: SourceRequest, files: Iterable[str], endings: tuple[str, ...], not_read: Counter[str]
) -> Iterable[str]:
    """The images among files, and those inside the archives among them; other files are counted by their ending."""
    passed_over = request.findings.passed_over
    for file in files:
        if (left_behind := litter(file)) is not None:
            passed_over[left_behind] += 1
        elif file.lower().endswith(endings):
            yield file
        elif file.lower().endswith(archives.ENDINGS):
            for member in archives.members(storage.join(request.input, file), not_read):
                if (left_behind := litter(member.name)) is not None:
                    passed_over[left_behind] += 1
                elif member.name.lower().endswith(endings):
                    yield archives.join_address(file, member)
                else:
                    not_read[ending_of(member.name)] += 1
        else:
            not_read[ending_of(file)] += 1


def ending_of(path: str) -> str:
    """What the name of a file ends with, to count it by."""
    return posixpath.splitext(path)[1].lower() or "without an ending"


def _nearness(path: str) -> tuple[bool, int, str]:
    return (archives.split_address(path) is not None, path.count("/"), path)


def _plain(path: str) -> str:
    """A path with the archive as a folder of its own name: `youtube.zip!/a.jpg` is `youtube/a.jpg`."""
    address = archives.split_address(path)
    return f"{posixpath.splitext(address.archive)[0]}/{address.member}" if address else path


def _match(
    candidates: Iterable[str], wanted: dict[str, str], folders: Collection[str], findings: Findings
) -> dict[str, str]:
    """Wanted names → the one candidate whose last parts they are, its ending included or not.

    Args:
        wanted: names, each with the path under which it is noted if several candidates are left.
        folders: the release's own.
    """
    names = {folded(name): name for name in wanted}
    bearing: dict[str, list[tuple[tuple[bool, bool, bool], str]]] = defaultdict(list)
    for path in candidates:
        parts = folded(_plain(path)).split("/")
        elsewhere = not set(parts[:-1]) & set(folders)
        for first in range(len(parts)):
            tail = "/".join(parts[first:])
            for name, without_ending in ((tail, False), (posixpath.splitext(tail)[0], True)):
                if name in names:
                    rank = (elsewhere, archives.split_address(path) is not None, without_ending)
                    bearing[names[name]].append((rank, path))
    found: dict[str, str] = {}
    for name, ranked in bearing.items():
        best = min(rank for rank, _ in ranked)
        paths = dict.fromkeys(path for rank, path in ranked if rank == best)
        if len(paths) == 1:
            found[name] = next(iter(paths))
        else:
            findings.ambiguous[wanted[name]] = tuple(paths)
    return found
