"""Bytes that are not what they are taken for: what they are instead, and what helps.

Downloads that were never finished, pages in the place of files, formats that nobody here reads: each is told by its
first bytes and named, so that whoever meets it knows what to do.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection
from typing import NamedTuple

# Bytes from the beginning that `describe` needs.
HEAD_BYTES = 512
DICOM_MARK, DICOM_MARK_AT = b"DICM", 128
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
ZIP = "a zip archive"
# Tags of TIFF: that of Adobe's raw format, and places of further pictures.
DNG_VERSION, SUB_IFDS = 50706, 330
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class Foreign(NamedTuple):
    """What bytes are, as it stands after "this is", and what to do about it."""

    name: str
    advice: str


_EXPORT = "export it as JPEG or PNG"
_OFFICE = "save the pictures in it as JPEG or PNG files"
_RAW = "export it as JPEG, PNG or TIFF in the program of the camera or a photo editor"
_DOWNLOAD = "the download answered with a page or a message in place of the file: look at it, and download again"
_BEGINNINGS = (
    (b"II*\x00\x10\x00\x00\x00CR", "a camera's raw file (Canon CR2)", _RAW),
    (b"FUJIFILMCCD-RAW", "a camera's raw file (Fujifilm RAF)", _RAW),
    (b"IIU\x00", "a camera's raw file (Panasonic RW2)", _RAW),
    (b"IIRO", "a camera's raw file (Olympus ORF)", _RAW),
    (b"IIRS", "a camera's raw file (Olympus ORF)", _RAW),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document (.xls, .doc, .ppt)", _OFFICE),
    (LFS_POINTER, "a Git LFS pointer", "run `git lfs pull` in the repository that it is from"),
    (b"\xff\x0a", "a JPEG XL image", _EXPORT),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "a JPEG XL image", _EXPORT),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "a JPEG 2000 image", _EXPORT),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image", _EXPORT),
    (b"%PDF", "a PDF document", "export its picture as JPEG or PNG"),
    (b"%!PS", "a PostScript file", "export it as JPEG or PNG"),
    (b"8BPS", "a Photoshop file", _EXPORT),
    (b"\x1aE\xdf\xa3", "a video (Matroska)", "export a frame as JPEG or PNG"),
    (b"PK\x03\x04", ZIP, "unpack it, or give the archive's member"),
    (b"\x1f\x8b", "a gzip file", "unpack it"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (b"\xff\xd8\xff", "a JPEG image", "give the file that was meant"),
    (b"\x89PNG\r\n", "a PNG image", "give the file that was meant"),
)
_TEXTS = (
    (rb"<!doctype html|<html|<head|<body|<script", "an HTML page"),
    (rb"(<\?xml[^>]*>\s*)?(<!--.{0,200}?-->\s*)?(<!doctype svg[^>]*>\s*)?<svg", "an SVG drawing"),
    (rb"<\?xml|<error", "an XML document"),
    (rb'\{\s*"', "a JSON document"),
)


def describe(head: bytes) -> Foreign | None:
    """Name what begins with these bytes (the first `HEAD_BYTES` will do), where it is known; None otherwise."""
    if head.startswith(b"PK\x03\x04") and b"[Content_Types].xml" in head:
        return Foreign("an Office document (.xlsx, .docx, .pptx)", _OFFICE)
    for beginning, name, advice in _BEGINNINGS:
        if head.startswith(beginning):
            return Foreign(name, advice)
    if is_dicom(head):
        return Foreign("a DICOM file", _EXPORT)
    if head[4:8] == b"ftyp":
        return _of_brand(head[8:12])
    text = head[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, name in _TEXTS:
        if re.match(pattern, text, re.IGNORECASE | re.DOTALL):
            return Foreign(name, _EXPORT if name == "an SVG drawing" else _DOWNLOAD)
    if len(head) >= 16 and not head.strip(b"\x00"):
        return Foreign("a file of zeros", "its download or copy was cut off: fetch it again")
    return Foreign("a text", "give the file that it stands for") if _is_text(head) else None


def camera_raw(make: str, tags: Collection[int], *, is_reduced: bool) -> Foreign | None:
    """What a TIFF is whose first picture is only the small one beside a camera's raw data, or that data itself.

    Args:
        make: what its tag Make says.
        tags: numbers of the first picture's tags.
        is_reduced: whether it says to be a reduced form of another picture (bit 0 of NewSubfileType).
    """
    if DNG_VERSION in tags:
        return Foreign("a camera's raw file (DNG)", _RAW)
    if is_reduced and SUB_IFDS in tags:
        return Foreign(f"a camera's raw file ({make})" if make else "a camera's raw file", _RAW)
    return None


def is_dicom(head: bytes) -> bool:
    """True if the bytes begin as a DICOM file does."""
    return head[DICOM_MARK_AT : DICOM_MARK_AT + 4] == DICOM_MARK


def _is_text(head: bytes) -> bool:
    """Whether bytes are printable UTF-8, the last character perhaps cut."""
    try:
        said = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return len(said) > 1 and all(letter.isprintable() or letter.isspace() for letter in said)


def _of_brand(brand: bytes) -> Foreign:
    if brand == b"crx ":
        return Foreign("a camera's raw file (Canon CR3)", _RAW)
    if brand in HEIC_BRANDS:
        return Foreign("a HEIC image", _EXPORT)
    if brand in AVIF_BRANDS:
        return Foreign("an AVIF image", _EXPORT)
    return Foreign("a video (MP4 or QuickTime)", "export a frame as JPEG or PNG")
