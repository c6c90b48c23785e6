"""Images inside zip and tar archives: found, read in place, and never trusted."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.errors import CorpusError
from dermray.raw import archives
from dermray.raw.fetch import NO_STAMP, Fetched, ImageStore
from dermray.raw.sources import webdataset
from dermray.raw.sources.rows import SourceRequest

FILES = {
    "youtube/a.jpg": b"first" * 300,
    "edu/皮肤病 图谱_1.png": bytes(range(256)) * 9,
    "empty.jpg": b"",
    "deep/er/b c.jpg": b"x",
}


def write_zip(file: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.mkdir("youtube")
        for name, content in files.items():
            archive.writestr(name, content)
    return file


def write_tar(file: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def content(uri: Path) -> dict[str, bytes]:
    return {member.name: archives.read_member(str(uri), member) for member in archives.members(str(uri))}


def fetch(root: Path, path: str, max_bytes: int = 1 << 20) -> Fetched:
    store = ImageStore(str(root), max_bytes=max_bytes, follow_links=False)
    fetched = store.fetch(path)
    assert store.stamp(path) == fetched.stamp
    return fetched


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_members_come_out_as_they_went_in(tmp_path: Path, method: int) -> None:
    assert content(write_zip(tmp_path / "a.zip", FILES, method)) == FILES


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_members_come_out_as_they_went_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: int) -> None:
    monkeypatch.setattr(tarfile, "DEFAULT_FORMAT", format)
    files = {**FILES, f"{'long/' * 40}name.jpg": b"long"}
    assert content(write_tar(tmp_path / "a.tar", files)) == files


def test_zip_with_things_before_it_comments_and_long_headers(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    info = zipfile.ZipInfo("a.jpg")
    info.extra = b"\x99\x99" + (2000).to_bytes(2, "little") + bytes(2000)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(info, b"content")
        archive.comment = b"a comment"
    file.write_bytes(b"#!/bin/sh\n" + file.read_bytes())
    assert content(file) == {"a.jpg": b"content"}


def test_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    assert content(write_zip(tmp_path / "a.zip", FILES)) == FILES


def test_names_without_the_flag_are_read_as_utf8(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"edu/皮肤.jpg": b"x"})
    raw = bytearray(file.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = -1
        while (position := raw.find(mark, position + 1)) >= 0:
            raw[position + at + 1] &= 0xF7
    file.write_bytes(raw)
    assert content(file) == {"edu/皮肤.jpg": b"x"}


def test_names_that_lead_out_are_not_in_the_directory(tmp_path: Path) -> None:
    bad = {"../x.jpg": b"1", "/etc/x.jpg": b"2", "a/../../x.jpg": b"3", "./b//c.jpg": b"4"}
    for file in (write_zip(tmp_path / "a.zip", bad), write_tar(tmp_path / "a.tar", bad)):
        assert content(file) == {"b/c.jpg": b"4"}
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        archive.addfile(link)
    assert content(tmp_path / "links.tar") == {}


@pytest.mark.parametrize("name", ["a.zip", "folder/b.tar"])
def test_images_are_fetched_from_archives(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (write_zip if name.endswith("zip") else write_tar)(tmp_path / name, FILES)
    for member, expected in FILES.items():
        assert fetch(tmp_path, f"{name}!/{member}").data == expected
    lacking = fetch(tmp_path, f"{name}!/nowhere.jpg")
    assert (lacking.reason, lacking.stamp) == ("missing_file", NO_STAMP)
    assert "holds no nowhere.jpg" in lacking.detail
    assert fetch(tmp_path, f"no-{name}!/youtube/a.jpg").reason == "missing_file"
    assert fetch(tmp_path, f"{name}!/youtube/a.jpg", max_bytes=100).reason == "too_many_bytes"


def test_an_archive_outside_the_root_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    write_zip(tmp_path / "a.zip", FILES)
    (tmp_path / "root" / "a.zip").symlink_to(tmp_path / "a.zip")
    assert fetch(tmp_path / "root", "a.zip!/youtube/a.jpg").reason == "path_outside_root"


def test_a_replaced_archive_is_read_again(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"a.jpg": b"old"})
    before = fetch(tmp_path, "a.zip!/a.jpg")
    write_zip(tmp_path / "a.zip", {"a.jpg": b"newer"})
    after = fetch(tmp_path, "a.zip!/a.jpg")
    assert (before.data, after.data) == (b"old", b"newer")
    assert before.stamp != after.stamp


def test_truncated_archives_say_so(tmp_path: Path) -> None:
    for file, message in (
        (write_zip(tmp_path / "a.zip", FILES), "its end is missing"),
        (write_tar(tmp_path / "b.tar", {"a.jpg": bytes(5000), "b.jpg": bytes(5000)}), "tar archive"),
    ):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 3])
        with pytest.raises(CorpusError, match=message):
            archives.members(str(file))
        fetched = fetch(tmp_path, f"{file.name}!/a.jpg")
        assert fetched.reason == "unreadable"
        assert file.name in fetched.detail


def test_compressed_tars_and_foreign_files_say_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", FILES, "w:gz")
    (tmp_path / "b.zip").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "c.tar").write_bytes(b"")
    for name in ("a.tar", "b.zip", "c.tar"):
        with pytest.raises(CorpusError, match=name):
            archives.members(str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        archives.members(str(tmp_path / "nowhere.zip"))


def head(name: str, size: int, kind: bytes) -> bytes:
    """A header of a tar, also with sizes that Python's writer refuses."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    # Base 256, two's complement.
    block[124:136] = bytes([0xFF if size < 0 else 0x80]) + (size % (1 << 88)).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(record: bytes, kind: bytes = b"x") -> bytes:
    """A pax header of one record."""
    body = b"%d %s\n" % (len(record) + 4, record)
    assert len(body) == len(record) + 4
    return head("pax", len(body), kind) + body.ljust(512, b"\0")


GOOD = head("a.jpg", 3, b"0") + b"abc".ljust(512, b"\0")
CRAFTED = {
    "many long names": (head("././@LongLink", 5, b"L") + b"name\0".ljust(512, b"\0")) * 2000 + GOOD,
    "many global headers": extended(b"comment=x", b"g") * 3000 + GOOD,
    "a size below zero": head("a", -1024, b"0") + GOOD,
    "a loop": GOOD + extended(b"size=-1536") + GOOD,
    "a size beyond all": head("a", 1 << 80, b"0") + GOOD,
    "an endless pax header": head("p", 1 << 40, b"x") + GOOD,
    "a pax header below zero": GOOD + head("p", -512, b"x") + GOOD,
    "a map that is none": extended(b"GNU.sparse.map=a,b") + GOOD,
    "no header in the middle": GOOD + b"?" * 512 + GOOD,
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_tars_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.tar"
    file.write_bytes(CRAFTED[name] + bytes(1024))
    with pytest.raises(CorpusError, match=r"a\.tar is (damaged|not a complete)") as caught:
        archives.members(str(file))
    assert "\n" not in str(caught.value)
    with pytest.raises(CorpusError, match=r"a\.tar is (damaged|not a complete)"):
        webdataset.read(SourceRequest(str(tmp_path)))


def test_sizes_of_a_zip_that_are_none_are_refused(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"a.jpg": b"x"})
    raw = bytearray(file.read_bytes())
    first, start = raw.find(b"PK\x01\x02"), raw.rfind(b"PK\x01\x02")
    wide = struct.pack("<2H3Q", 1, 24, *[(1 << 64) - 1] * 3)
    raw[start + 20 : start + 28] = b"\xff" * 8
    raw[start + 30 : start + 32] = len(wide).to_bytes(2, "little")
    raw[start + 51 : start + 51] = wide
    end = raw.find(b"PK\x05\x06")
    raw[end + 12 : end + 16] = (end - first).to_bytes(4, "little")
    file.write_bytes(raw)
    with pytest.raises(CorpusError, match="a size in its directory is none"):
        archives.members(str(file))
    assert fetch(tmp_path, "a.zip!/a.jpg").reason == "unreadable"


def test_a_damaged_member_costs_itself_alone(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"a.jpg": b"AAAA" * 50, "b.jpg": b"BBBB" * 50}, zipfile.ZIP_STORED)
    file.write_bytes(file.read_bytes().replace(b"AAAAAA", b"AAAxAA", 1))
    assert fetch(tmp_path, "a.zip!/a.jpg").reason == "unreadable"
    assert fetch(tmp_path, "a.zip!/b.jpg").data == b"BBBB" * 50


def test_a_zip_bomb_is_not_inflated(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.zip", {"a.jpg": bytes(1 << 22)})
    raw = bytearray(file.read_bytes())
    at = raw.rfind(b"PK\x01\x02", 0, raw.find(b"a.jpg", raw.find(b"PK\x01\x02")))
    raw[at + 24 : at + 28] = (100).to_bytes(4, "little")
    file.write_bytes(raw)
    assert fetch(tmp_path, "a.zip!/a.jpg", max_bytes=1000).reason == "unreadable"


def test_methods_that_are_not_read_in_place_say_so(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", FILES, zipfile.ZIP_BZIP2)
    assert "packed by method 12" in fetch(tmp_path, "a.zip!/youtube/a.jpg").detail


def test_addresses() -> None:
    assert archives.split_address("a/b.zip!/c d.jpg") == ("a/b.zip", "c d.jpg", None, None)
    assert archives.split_address("a.TAR!12+345/c!/d.jpg") == ("a.TAR", "c!/d.jpg", (12, 345), None)
    assert archives.split_address("a.parquet!12+345/image/b.jpg") == ("a.parquet", "image/b.jpg", (12, 345), None)
    assert archives.split_address("a.parquet!g2r17/image/b.jpg") == ("a.parquet", "image/b.jpg", None, (2, 17))
    for plain in ("a.jpg", "a.zip", "a.zip/b.jpg", "a.zip!", "a.zip!/", "a!/b.jpg", "a.zip!12+345/b.jpg", ""):
        assert archives.split_address(plain) is None
    assert archives.split_address("a.tar!g2r17/b.jpg") is None


def test_directories_are_kept_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = archives._Directories()
    monkeypatch.setattr(archives, "MAX_KEPT_ENTRIES", 9)
    uris = [str(write_zip(tmp_path / f"{number}.zip", FILES)) for number in range(3)]
    first = kept.get(uris[0], 1)
    assert kept.get(uris[0], 1) is first
    assert kept.get(uris[0], 2) is not first
    for uri in uris[1:]:
        kept.get(uri, 1)
    assert len(kept._kept) == 2
    assert kept.get(uris[0], 1) is not first


names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1, max_size=12)
contents = st.dictionaries(names.filter(lambda name: name.strip(".")), st.binary(max_size=200), max_size=8)


@settings(deadline=None, max_examples=40)
@given(contents)
def test_any_names_and_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    folder = tmp_path_factory.mktemp("any")
    written = content(write_zip(folder / "a.zip", files))
    assert written == files == content(write_tar(folder / "a.tar", files))
    directory = archives.Directory(archives.members(str(folder / "a.zip")))
    assert {name for name in files if directory.find(name) is not None} == set(files)
    assert directory.find("not/there") is None
