"""Formats that need an extra, bytes that are no image, sensors of few bits, and codecs that raise anything."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pillow_heif
import pydicom
import pytest
import simplejpeg
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit

from dermray import dicom, images, reporting
from dermray.errors import ImageError, ModelError
from dermray.models import weights
from dermray.prepare import report
from tests import raw_corpus
from tests.unit.test_image_bounds import chunk, encoded, small
from tests.unit.test_prepare_shard import make, reported, settings

CANARY = "CANARY^PATIENT"
# Of each format.
NUM_MUTATIONS = 60


def photograph() -> Image.Image:
    return Image.open(io.BytesIO(raw_corpus.photograph(3, 160, 120))).convert("RGB")


def dicom_file(picture: Image.Image, *, compressed: bool = False, **elements: Any) -> bytes:
    """A dermoscopic photograph that names its patient wherever it can."""
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if compressed else ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.7"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.PatientName, data.PatientID, data.OtherPatientNames = CANARY, CANARY, CANARY
    data.ImageComments = data.StudyDescription = CANARY
    data.private_block(0x0099, CANARY, create=True).add_new(1, "LO", CANARY)
    pixels = np.asarray(picture)
    data.Rows, data.Columns, data.SamplesPerPixel, data.PlanarConfiguration = *pixels.shape[:2], 3, 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PhotometricInterpretation = "YBR_FULL_422" if compressed else "RGB"
    data.PixelData = pixels.tobytes()
    if compressed:
        data.PixelData = pydicom.encaps.encapsulate([encoded(picture, "JPEG", quality=95)])
        data["PixelData"].VR = "OB"
    for name, value in elements.items():
        setattr(data, name, value)
    sink = io.BytesIO()
    data.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def refused(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        images.decode(data)
    return caught.value


def test_heic_and_avif_are_read_upright() -> None:
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[images.ORIENTATION_TAG] = 6
    pillow_heif.from_pillow(photograph()).save(sink, quality=95, exif=exif.tobytes())
    heic, avif = sink.getvalue(), encoded(photograph(), "AVIF", quality=95, exif=exif.tobytes())
    upright = np.asarray(photograph().transpose(Image.Transpose.ROTATE_270)).astype(int)
    for data in (heic, avif):
        pixels = images.decode(data)
        assert pixels.shape == upright.shape
        assert np.abs(pixels - upright).mean() < 6
        with pytest.raises(ImageError):
            images.inspect(data, accepted=("JPEG", "PNG", "WEBP"))


@pytest.mark.parametrize("compressed", [False, True])
def test_dicom_photographs_are_read(compressed: bool) -> None:
    picture = photograph()
    pixels = images.decode(dicom_file(picture, compressed=compressed))
    assert np.abs(pixels.astype(int) - np.asarray(picture)).mean() < (6 if compressed else 0.01)
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 16
    deep = dicom_file(picture, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME1", BitsAllocated=16)
    header = pydicom.dcmread(io.BytesIO(deep))
    header.BitsStored, header.HighBit, header.PixelData = 12, 11, (4095 - grey).tobytes()
    sink = io.BytesIO()
    header.save_as(sink)
    assert np.abs(images.decode(sink.getvalue())[..., 0].astype(int) - grey / 16).mean() < 1


def test_other_dicom_is_refused_by_name() -> None:
    scan = dicom_file(photograph(), SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    assert refused(scan).reason == "unsupported_format"
    assert refused(dicom_file(photograph(), BurnedInAnnotation="YES")).reason == "burned_in_annotation"
    assert refused(dicom_file(photograph(), Rows=9000, Columns=9000)).reason == "too_many_pixels"
    assert refused(dicom_file(photograph(), compressed=True, Rows=60)).reason == "truncated"
    for compressed in (False, True):
        whole = dicom_file(photograph(), compressed=compressed)
        cut = refused(whole[: len(whole) * 2 // 3])
        assert cut.reason == "truncated", cut


def test_no_patient_name_gets_into_a_corpus(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    files = {
        "good": dicom_file(photograph()),
        "jpeg": dicom_file(photograph(), compressed=True),
        "cut": dicom_file(photograph())[:20_000],
        "other": dicom_file(photograph(), SOPClassUID="1.2.840.10008.5.1.4.1.1.2"),
        "odd": dicom_file(photograph()).replace(b"RGB ", CANARY[:4].encode()),
    }
    for name, data in files.items():
        assert CANARY.encode() in data
        (raw / f"{name}.dcm").write_bytes(data)
    table = "image,label\n" + "".join(f"{name}.dcm,psoriasis\n" for name in files)
    (raw / "metadata.csv").write_text(table)
    config = settings(raw, tmp_path / "out", table="metadata.csv")
    records, _ = make(config)
    stats = reported(config, records)
    assert stats["rows"] == {"in": 5, "in_samples": 2, "dropped": 3}
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 4
    told = capfd.readouterr()
    for content in (*written, told.out.encode(), told.err.encode(), repr(records).encode()):
        assert CANARY[:6].encode() not in content


FOREIGN = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n",
    "an HTML page": b"\xef\xbb\xbf\n<!DOCTYPE HTML><html>Sign in</html>",
    "an XML document": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a JSON document": b'{"message": "Not Found"}',
    "a JPEG XL image": b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(40),
    "a JPEG 2000 image": encoded(small(), "JPEG2000"),
    "a PDF document": b"%PDF-1.7\n",
    "a video (MP4 or QuickTime)": b"\x00\x00\x00\x18ftypmp42" + bytes(40),
    "a file of zeros": bytes(4096),
    "a camera's raw file (Canon CR2)": b"II*\x00\x10\x00\x00\x00CR\x02\x00" + bytes(200),
    "a camera's raw file (Canon CR3)": b"\x00\x00\x00\x18ftypcrx " + bytes(40),
    "a camera's raw file (Fujifilm RAF)": b"FUJIFILMCCD-RAW 0201" + bytes(40),
    "a camera's raw file (Panasonic RW2)": b"IIU\x00\x08\x00\x00\x00" + bytes(40),
    "a camera's raw file (Olympus ORF)": b"IIRO\x08\x00\x00\x00" + bytes(40),
    "an Office document (.xls, .doc, .ppt)": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "an Office document (.xlsx, .docx, .pptx)": b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml" + bytes(40),
    "a text": "see the folder of März\n".encode(),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_image_and_no_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    assert f"this is {name}: " in str(refused(FOREIGN[name]))
    for ending in (".safetensors", ".pt"):
        file = tmp_path / f"model{ending}"
        file.write_bytes(FOREIGN[name])
        with pytest.raises(ModelError, match="holds no weights") as caught:
            weights.read(str(file))
        assert name in str(caught.value)


@pytest.mark.parametrize("tags", [{50706: b"\1\4\0\0"}, {254: 1, 271: "NIKON CORPORATION", 330: 0}], ids=["DNG", "NEF"])
def test_the_small_picture_of_a_raw_file_is_not_taken_for_the_photograph(tags: dict[int, Any]) -> None:
    plain = encoded(photograph(), "TIFF", tiffinfo={271: "NIKON CORPORATION", 254: 1})
    assert images.decode(plain).shape == (120, 160, 3)
    error = refused(encoded(photograph(), "TIFF", tiffinfo=tags))
    assert error.reason == "unsupported_format"
    assert "a camera's raw file" in str(error)


def test_formats_of_absent_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    heic = b"\x00\x00\x00\x18ftypheic" + bytes(200)
    monkeypatch.setattr(images, "_take_heif", lambda: None)
    assert "install dermray[heic]" in str(refused(heic))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ImageError, match=r"install dermray\[dicom\]"):
        dicom.read(dicom_file_bytes(), 1000)


def dicom_file_bytes() -> bytes:
    return bytes(128) + b"DICM" + bytes(100)


def deep_png(values: np.ndarray, significant: int | None) -> bytes:
    """A 16-bit PNG, grey or colour, with the depth of its sensor if that is given."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if channels == 1 else 2, 0, 0, 0)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    depth = chunk(b"sBIT", bytes([significant] * channels)) if significant else b""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + depth + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("told", [False, True])
def test_sensors_of_few_bits_are_not_black(bits: int, channels: int, told: bool) -> None:
    levels = np.linspace(0, 2**bits - 1, 96 * 64 * channels).reshape(64, 96, channels).astype(np.uint16)
    expected = levels / (2**bits - 1) * 255
    decoded = images.decode(deep_png(levels, bits if told else None))
    assert np.abs(decoded - expected).max() <= 1
    if channels == 1 and not told:
        tiff = images.decode(encoded(Image.fromarray(levels[..., 0]), "TIFF"))
        assert np.abs(tiff[..., :1] - expected).max() <= 1


def test_dark_by_its_own_depth_stays_dark_and_is_counted(tmp_path: Path) -> None:
    dark = np.full((64, 64, 1), 900, np.uint16)
    dark[::2] += 200
    data = deep_png(dark, 16)
    assert images.decode(data).max() < 6
    assert images.standardise(data, image_size=64, jpeg_quality=90).is_dark
    raw_corpus.write(tmp_path / "raw", num_good=4)
    config = settings(tmp_path / "raw", tmp_path / "out")
    records, _ = make(config)
    assert reported(config, records)["dark"] == 0


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), struct.error("x"), RecursionError(), zlib.error("x"), cv2.error("x")]
)
def test_a_codec_may_raise_anything(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    data = {kind: encoded(small(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
    for owner, name in (
        (Image, "open"), (Image.Image, "load"), (Image.Image, "convert"), (simplejpeg, "decode_jpeg"),
        (simplejpeg, "encode_jpeg"), (cv2, "resize"), (cv2, "dct"), (cv2, "cvtColor"),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            for one in data.values():
                for run in (
                    images.inspect,
                    images.decode,
                    images.perceptual_hash,
                    lambda bytes_: images.standardise(bytes_, image_size=32, jpeg_quality=90),
                    reporting.thumbnail,
                ):
                    with contextlib.suppress(ImageError):
                        run(one)


def formats() -> dict[str, bytes]:
    """A small file of each format that is read here, some in several forms."""
    picture, heic = photograph().resize((40, 30)), io.BytesIO()
    pillow_heif.from_pillow(picture).save(heic, quality=80)
    files = {kind: encoded(picture, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")}
    return files | {
        "progressive": encoded(picture, "JPEG", progressive=True),
        "CMYK": encoded(picture.convert("CMYK"), "JPEG"),
        "palette": encoded(picture.quantize(16), "PNG"),
        "16 bits": deep_png(np.arange(1200, dtype=np.uint16).reshape(30, 40, 1), 12),
        "deflated": encoded(picture, "TIFF", compression="tiff_adobe_deflate"),
        "HEIC": heic.getvalue(),
        "DICOM": dicom_file(picture),
        "DICOM of JPEG": dicom_file(picture, compressed=True),
    }


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Some bytes changed, in the header more often than behind it; or a piece cut out, doubled or ended."""
    changed = bytearray(data)
    place = int(random.integers(0, min(len(data), 256) if random.random() < 0.6 else len(data)))
    match int(random.integers(0, 5)):
        case 0:
            del changed[place:]
        case 1:
            del changed[place : place + int(random.integers(1, 40))]
        case 2:
            changed[place:place] = changed[place : place + int(random.integers(1, 40))]
        case 3:
            changed[place : place + 4] = random.choice([b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff"])
        case _:
            for _ in range(int(random.integers(1, 8))):
                changed[min(place + int(random.integers(0, 64)), len(changed) - 1)] ^= int(random.integers(1, 256))
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_files_are_pixels_or_one_error() -> None:
    random, num_read = np.random.default_rng(7), dict.fromkeys(formats(), 0)
    for name, data in formats().items():
        assert images.decode(data).shape == (30, 40, 3)
        for _ in range(NUM_MUTATIONS):
            with contextlib.suppress(ImageError):
                pixels = images.decode(mutated(data, random), max_pixels=1_000_000)
                assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
                num_read[name] += 1
    assert len(num_read) * NUM_MUTATIONS >= 300
    assert all(number < NUM_MUTATIONS for number in num_read.values()), num_read


def test_a_dark_photograph_in_a_corpus_is_counted_and_shown(tmp_path: Path) -> None:
    raw_corpus.write(tmp_path / "raw", num_good=6)
    night = np.random.default_rng(0).integers(0, 24, (64, 80, 3), dtype=np.uint8)
    (tmp_path / "raw" / "images" / "002.jpg").write_bytes(encoded(Image.fromarray(night), "PNG"))
    config = settings(tmp_path / "raw", tmp_path / "out")
    records, _ = make(config)
    stats = reported(config, records)
    assert (stats["dark"], stats["rows"]["dropped"]) == (1, 0)
    page = (tmp_path / "out" / report.REPORT).read_text()
    assert "1 original is nearly black" in page
