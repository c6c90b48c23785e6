"""Folders of images: splits wherever their folders stand, and nothing of an archive left out in silence."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from dermray.raw import archives, sources
from dermray.raw.fetch import ImageStore
from dermray.raw.sources import SourceRequest
from tests.raw_corpus import photograph
from tests.raw_sources import write_images

SPLIT_FOLDERS = {
    "an archive around them": (
        ["d.zip!/train/BCC/a.jpg", "d.zip!/test/BCC/b.jpg"],
        [("train", "BCC"), ("test", "BCC")],
    ),
    "folders around them": (["d/e/train/BCC/a.jpg", "d/e/Testing/AK/b.jpg"], [("train", "BCC"), ("test", "AK")]),
    "several archives": (["d.zip!/val/BCC/a.jpg", "e.zip!/train/AK/b.jpg"], [("val", "BCC"), ("train", "AK")]),
    "below the classes": (["BCC/train/a.jpg", "AK/test/b.jpg"], [("train", "BCC"), ("test", "AK")]),
    "no class": (["d.zip!/train/a.jpg", "d.zip!/test/b.jpg"], [("train", None), ("test", None)]),
    "a class or none": (
        ["d/train/a.jpg", "d/test/AK/b.jpg", "e/val/AK/c.jpg"],
        [("train", None), ("test", "AK"), ("val", "AK")],
    ),
}


@pytest.mark.parametrize("layout", SPLIT_FOLDERS)
def test_image_folder_finds_splits_wherever_their_folders_stand(tmp_path: Path, layout: str) -> None:
    paths, expected = SPLIT_FOLDERS[layout]
    for number, path in enumerate(paths):
        archive, mark, member = path.rpartition("!/")
        if mark:
            with zipfile.ZipFile(tmp_path / archive, "a") as sink:
                sink.writestr(member, photograph(number))
        else:
            write_images(tmp_path, path)
    request = SourceRequest(str(tmp_path))
    found = {row["image"]: row for row in sources.read("image_folder", request).table.to_pylist()}
    assert [(found[path]["split"], next(iter(found[path]["labels"]), None)) for path in paths] == expected
    assert not any(row["hierarchy"] for row in found.values())
    told = "around those of splits, which names no class"
    assert any(text.endswith(told) for text in request.findings.unused) == (layout != "below the classes")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("ending", ["zip", "tar"])
def test_files_of_an_archive_that_are_left_out_are_told(tmp_path: Path, ending: str) -> None:
    names = ["BCC/a.jpg", "BCC/b.jpg", "BCC/a.jpg", "../c.jpg", "/d.jpg"]
    file = tmp_path / f"x.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            for number, name in enumerate(names):
                archive.writestr(name, photograph(number))
    else:
        with tarfile.open(file, "w") as archive:
            for number, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = len(photograph(number))
                archive.addfile(info, io.BytesIO(photograph(number)))
            link = tarfile.TarInfo("BCC/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
            archive.addfile(link)
    request = SourceRequest(str(tmp_path))
    raw = sources.read("image_folder", request)
    store = ImageStore(str(tmp_path), max_bytes=1 << 20, follow_links=False)
    images = [store.fetch(row["image"]).data for row in raw.table.to_pylist()]
    assert sorted(images) == sorted([photograph(2), photograph(1)]), "of two of one name the later one counts"
    assert request.findings.not_read == {archives.LEFT_OUT: 2 + (ending == "tar"), archives.REPLACED: 1}
