"""A small raw corpus in the `csv` layout, with a row of every bad kind if asked for."""

from __future__ import annotations

import csv
import io
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from dermray.prepare.settings import PrepareConfig

LABELS = ("melanoma", "psoriasis", "eczema")


def photograph(seed: int, width: int = 120, height: int = 90) -> bytes:
    """A JPEG unlike that of any other seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=92)
    return sink.getvalue()


def recompressed(seed: int) -> bytes:
    """A near-duplicate of `photograph(seed)`."""
    sink = io.BytesIO()
    Image.open(io.BytesIO(photograph(seed))).save(sink, "JPEG", quality=60)
    return sink.getvalue()


def blank() -> bytes:
    """A JPEG that is grey all over."""
    sink = io.BytesIO()
    Image.new("RGB", (120, 90), (127, 127, 127)).save(sink, "JPEG")
    return sink.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 100 megapixels."""
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def write(folder: Path, *, num_good: int, bad: bool = False) -> dict[str, str]:
    """Write `metadata.csv` and its images; returns the reason of each bad row by its id.

    Good rows are `good-000`, … with image `images/000.jpg`, …; every fifth has a second row with another caption.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows: list[list[str]] = []
    for number in range(num_good):
        (images / f"{number:03d}.jpg").write_bytes(photograph(number))
        fields = [f"images/{number:03d}.jpg", LABELS[number % 3], "II", f"patient {number // 2}"]
        rows.append([f"good-{number:03d}", f"caption {number}", *fields])
        if number % 5 == 0:
            rows.append([f"again-{number:03d}", f"another caption {number}", *fields])
    reasons: dict[str, str] = {}
    if bad:
        rows, reasons = _with_bad_rows(folder, rows)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["source_id", "caption", "image", "label", "skin_type", "patient_id"])
        writer.writerows(rows)
    return reasons


def write_with_duplicates(folder: Path, numbers: Iterable[int], *, label: str = "melanoma") -> None:
    """Photographs, of which every fourth is there again byte for byte and every third as a near-duplicate."""
    folder.mkdir(parents=True)
    rows: list[list[str]] = []
    for number in numbers:
        files = {"first": photograph(number)}
        if number % 4 == 0:
            files["equal"] = files["first"]
        if number % 3 == 0:
            files["near"] = recompressed(number)
        for kind, content in files.items():
            name = f"{kind}-{number:03d}"
            (folder / f"{name}.jpg").write_bytes(content)
            rows.append([name, f"{kind} caption {number}", f"{name}.jpg", label])
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["source_id", "caption", "image", "label"])
        writer.writerows(rows)


def _with_bad_rows(folder: Path, rows: list[list[str]]) -> tuple[list[list[str]], dict[str, str]]:
    images = folder / "images"
    files = {
        "zero_byte": b"",
        "not_an_image": b"<!doctype html>404",
        "truncated": photograph(900)[:-900],
        "too_many_pixels": bomb(),
        "too_small": photograph(901, 20, 20),
        "blank": blank(),
        "too_many_bytes": photograph(903),
    }
    paths = {"missing_file": "images/nowhere.jpg", "no_image_path": ""}
    for reason, content in files.items():
        (images / f"{reason}.jpg").write_bytes(content)
        paths[reason] = f"images/{reason}.jpg"
    # One byte more than is allowed, of which the disk keeps next to nothing.
    os.truncate(images / "too_many_bytes.jpg", PrepareConfig.model_fields["max_image_bytes"].default + 1)
    outside = folder.parent / f"{folder.name}-outside.jpg"
    outside.write_bytes(photograph(902))
    os.symlink(outside, images / "link.jpg")
    bad = {f"bad-{reason}": (reason, path, "a caption") for reason, path in paths.items()}
    bad["bad-absolute"] = ("path_outside_root", str(outside), "a caption")
    bad["bad-dots"] = ("path_outside_root", f"images/../../{outside.name}", "a caption")
    bad["bad-link"] = ("path_outside_root", "images/link.jpg", "a caption")
    bad["bad-folder"] = ("missing_file", "images", "a caption")
    bad["bad-long-name"] = ("unreadable", f"images/{'x' * 300}.jpg", "a caption")
    bad["bad-caption"] = ("empty_caption", "images/000.jpg", "  ")
    for number, (name, (_, path, caption)) in enumerate(bad.items()):
        rows.insert(2 * number, [name, caption, path, "melanoma", "", ""])
    rows.insert(3, ["bad-cells", "too few cells"])
    return rows, {name: reason for name, (reason, _, _) in bad.items()}


def content(output: Path) -> dict[str, bytes]:
    """Every byte of a prepared corpus, except where the last run tells of its own times."""
    timed = ("report/report.html", "report/timing.json")
    files = {str(file.relative_to(output)): file.read_bytes() for file in output.rglob("*") if file.is_file()}
    return {name: data for name, data in files.items() if name not in timed}
