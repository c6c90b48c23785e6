"""Strings that are an image in another dress: a text tower would embed them as words, and nobody would notice.

Who means such a string as words says `modality=text`.
"""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote

from dermray.service.refusals import Refusal

WANTED = "an image is sent as data:image/jpeg;base64,…"
# How files begin, and what they are.
_BEGINNINGS = (
    (b"\xff\xd8\xff", "a JPEG"),
    (b"\x89PNG\r\n\x1a\n", "a PNG"),
    (b"GIF8", "a GIF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"%PDF-", "a PDF"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
)
_SUFFIXES = (
    r"jpe?g|jfif|png|webp|gif|bmp|ico|tiff?(\.gz)?|hei[cf]|avif|jxl|jp2|dcm|pdf|svg|cr[23]|nef|arw|dng|orf|rw2|raf|zip"
)
_DATA_URI = re.compile(r"data:([a-z0-9.+-]+/[a-z0-9.+-]+)?(;[^\s,;]*)*,", re.IGNORECASE)
# Inside quotation marks, HTML, Markdown or JSON.
_WRAPPED = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,[a-z0-9+/_-]{16}", re.IGNORECASE)
_MARKS = "'\"`"
_LINK = re.compile(r"((https?|ftp|file|s3|gs|az|abfss?|hf):/?/?/|(blob|cid|attachment|content):(?=\S{4}))\S+", re.I)
# An image or a link inside HTML, Markdown or JSON, without words around it.
_MARKUP = re.compile(
    r"<(img|svg|picture|html|\?xml|!doctype)\b.*>|!\[[^\]]*\]\([^)]+\)|<[a-z0-9]+:[^\s>]+>"
    r'|[{\[].*"(image|image_url|url|b64_json|bytes)"\s*:.*[}\]]',
    re.I | re.S,
)
# Numbers of pixels, and what programs print of an image instead of itself.
_PIXELS = re.compile(r"(array|tensor|list)?\(?\[[\[\]\d\s.,e+-]{12,}(\].*)?", re.I | re.S)
_OBJECT = re.compile(r"<[\w.]+ .*\bat 0x[0-9a-f]+>|\[object \w+\]|(array|tensor)\(.*", re.I | re.S)
_BYTES = re.compile(r"(\\x[0-9a-f]{2}.{0,8}){3}", re.I | re.S)
_HEX = re.compile(r"(0x)?(ffd8ff|89504e47|47494638|49492a00|4d4d002a|25504446)[0-9a-f]{8,}", re.I)
_CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff]|\ufffd{2}")
# Runs of what base64 is written in; and of what no language has so long without a blank.
_RUN = re.compile(r"[A-Za-z0-9+/_-]{40,}")
_NO_WORD = re.compile(r"[!-~]{200,}")
_FEWEST_LETTERS = 12
_ROOTED = re.compile(r"(~|\.{1,2})?/[^\s/]+/\S*|[a-z]:[\\/]\S*|\\\\\S+", re.IGNORECASE)
_FILE = re.compile(rf"(?!.*://).+\.({_SUFFIXES})([?#]\S*)?", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_DATA_URI_CHARS = 200
_LONGEST_PATH = 1024
# Long enough that no word is taken for base64 of nobody knows what; short ones must begin like a known file.
_SURELY_BASE64_CHARS = 200
_SAMPLE_CHARS = 4096


def refuse(text: str, param: str, *, advice: str = "words that look like this with modality=text") -> None:
    """Let words pass, and refuse what is an image, a link or a path; `advice` says what else may be sent.

    Raises:
        Refusal: 400, saying which it is and what to send.
    """
    found = _look(text)
    if found is not None:
        code, what = found
        message = f"{param}: {what}; {WANTED}, and {advice}"
        raise Refusal(400, message, code=code, param=param)


def refuse_as_image(text: str, param: str) -> None:
    """For a string that should be an image and is no data URI of one: say what it is.

    Raises:
        Refusal: 400, always.
    """
    code, what = _look(text) or ("invalid_data_uri", "no image")
    raise Refusal(400, f"{param}: {what}; {WANTED}", code=code, param=param)


def _look(text: str) -> tuple[str, str] | None:
    """The code and the name of what a string is, if it is not words."""
    sample = _unquoted(text)[:_SAMPLE_CHARS].strip()
    if _DATA_URI.match(sample[:_DATA_URI_CHARS]):
        if sample[:11].lower() == "data:image/":
            return (
                "invalid_data_uri",
                "a data URI of an image with a blank or a quotation mark before it, or without ;base64",
            )
        return "invalid_data_uri", "a data URI whose type is no image's"
    if _WRAPPED.search(sample):
        return "invalid_data_uri", "a data URI of an image with something around it"
    if sample.startswith("%PDF-"):
        return "not_an_image", "a PDF"
    if _HEX.search(sample):
        return "not_words", "a file in hexadecimal"
    found = _look_for_base64(sample) or _look_for_bytes(sample)
    if found is not None or len(text) > _LONGEST_PATH:
        return found
    if _LINK.fullmatch(sample):
        return "url", "links are not fetched"
    if _ROOTED.fullmatch(sample) or _FILE.fullmatch(sample):
        return "path", "the path of a file, which is not read here"
    return None


def _unquoted(text: str) -> str:
    """What stands between the quotation marks of a text, as Python, JSON or Markdown would write it."""
    bare = text.strip()
    bare = bare[1:] if bare[:1] == "b" else bare
    return bare[1:-1] if len(bare) > 1 and bare[0] in _MARKS and bare[-1] == bare[0] else text


def _look_for_bytes(sample: str) -> tuple[str, str] | None:
    """The bytes of a file as programs print them, or what they print in their place."""
    if _CONTROL.search(sample) or _BYTES.search(sample):
        return "not_words", "bytes, not words"
    if _OBJECT.fullmatch(sample):
        return "not_words", "what a program prints in place of an image"
    if _MARKUP.fullmatch(sample):
        return "not_words", "HTML, Markdown or JSON around an image or a link"
    if _PIXELS.fullmatch(sample):
        return "not_words", "numbers, not words"
    if any(len(set(run)) >= _FEWEST_LETTERS for run in _NO_WORD.findall(sample)):
        return "not_words", "200 characters and more without a blank"
    return None


def _look_for_base64(sample: str) -> tuple[str, str] | None:
    """Base64, whatever breaks its lines (a shell, blanks, `\\n` of JSON, percent signs of a link) or is around it."""
    plain = unquote(sample) if "%" in sample else sample
    joined = "".join(re.sub(r"\\[nrt]", "", plain).replace("\\/", "/").split())
    if _WRAPPED.search(joined):
        return "invalid_data_uri", "a data URI of an image with something around it"
    runs = [run for run in _RUN.findall(plain) if len(set(run)) >= _FEWEST_LETTERS]
    if not _BASE64.fullmatch(joined) or (len(plain.split()) > 1 and not runs):
        joined = next((run for run in runs if _kind_of_base64(run)), "")
    return _what_base64_is(joined) if joined else None


def _kind_of_base64(joined: str) -> str | None:
    """What the file is that a text in base64 begins with, if it is a known one."""
    beginning = joined[:64].rstrip("=").replace("-", "+").replace("_", "/")
    data = base64.b64decode(beginning[: len(beginning) // 4 * 4])
    kind = next((kind for start, kind in _BEGINNINGS if data.startswith(start)), None)
    if kind is None and data[8:12] == b"WEBP":
        kind = "a WebP"
    if kind is None and data[4:8] == b"ftyp":
        kind = "a HEIC or AVIF"
    if kind is None and data[:2] == b"BM" and data[6:10] == bytes(4):
        kind = "a BMP"
    return kind


def _what_base64_is(joined: str) -> tuple[str, str] | None:
    kind = _kind_of_base64(joined)
    if kind is not None:
        return "invalid_data_uri", f"{kind} in base64 without data:image/…;base64, before it"
    if len(joined) >= _SURELY_BASE64_CHARS and all(re.search(some, joined) for some in ("[a-z]", "[A-Z]", "[0-9]")):
        return "invalid_data_uri", "base64 without data:image/…;base64, before it"
    return None
