"""Photographs in DICOM: VL Photographic and Dermoscopic Photography images, read with pydicom (`dermray[dicom]`).

Only the elements that describe pixels are read: names, dates and numbers of patients never leave the file, also not in
messages. What compresses pixels in a way whose size cannot be told beforehand is refused by name.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

from dermray import image_bounds
from dermray.errors import ImageError

PHOTOGRAPHS = {
    "1.2.840.10008.5.1.4.1.1.77.1.4": "VL Photographic Image",
    "1.2.840.10008.5.1.4.1.1.77.1.7": "Dermoscopic Photography Image",
}
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
DEFLATED = b"1.2.840.10008.1.2.1.99"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
# Begin the items of sequences and the pieces of pixels, of each of which the reader makes a record of its own.
ITEMS, MAX_ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00"), 20_000
STORED_MODES = ("L", "RGB", "I;16")
COLOUR_MODES = {"RGB": "RGB", "YBR_FULL": "YCbCr", "YBR_FULL_422": "YCbCr"}
ELEMENTS = (
    "SOPClassUID", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames", "BurnedInAnnotation",
    "ICCProfile", "PixelData",
)  # fmt: skip


def read(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame of a photograph, loaded: mode RGB, L or I;16; `info` has its profile and significant bits.

    Args:
        data: the file.
        max_pixels: refused beyond, before any pixel is decoded.

    Raises:
        ImageError: pydicom is not installed, no photograph or none that can be read, damaged, or too large.
    """
    try:
        import pydicom
    except ImportError:
        raise ImageError(
            "unsupported_format", "this is a DICOM file: install dermray[dicom], or export it as JPEG or PNG"
        ) from None
    try:
        # Warnings and errors of the reader quote values of the header.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if DEFLATED in data:
                # The reader would unpack the whole of it first, however much that is.
                raise _unsupported("it is deflated")
            if (number := max(data.count(item) for item in ITEMS)) > MAX_ITEMS:
                raise ImageError("too_complex", f"a DICOM file of {number:,} items: export it as JPEG or PNG")
            header = pydicom.dcmread(io.BytesIO(data), specific_tags=list(ELEMENTS))
            syntax = str(header.file_meta.TransferSyntaxUID)
            if syntax not in (*NATIVE, JPEG_BASELINE, *JPEG_2000):
                raise _unsupported("its pixels are stored in a way that is not read here")
            _check(header, syntax, max_pixels)
            return _image(header, syntax)
    except ImageError:
        raise
    except Exception as error:  # whatever the reader or a codec raises; its text may quote the header
        raise ImageError("truncated", f"the DICOM file cannot be decoded: {type(error).__name__}") from None


def _unsupported(why: str) -> ImageError:
    return ImageError("unsupported_format", f"this DICOM file is not taken: {why}; export it as JPEG or PNG")


def _check(header: Any, syntax: str, max_pixels: int) -> None:
    # Of a file that is cut off the reader may give nothing but what stands before the data set.
    said = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID", "")
    if str(said) not in PHOTOGRAPHS:
        raise _unsupported(f"it is no {' or '.join(PHOTOGRAPHS.values())}")
    if any(name not in header for name in ("Rows", "Columns", "PixelData")):
        raise ImageError("truncated", "the DICOM file ends before its picture does: copy or export it again")
    if str(header.get("BurnedInAnnotation", "NO")).strip().upper() == "YES":
        raise ImageError("burned_in_annotation", "the DICOM file says that its pixels show who the patient is")
    width, height = int(header.Columns), int(header.Rows)
    if width * height > max_pixels:
        raise ImageError("too_many_pixels", f"{width} x {height} is more than the {max_pixels:,} pixels allowed")
    image_bounds.check_cost("JPEG2000" if syntax in JPEG_2000 else "DICOM", width, height, max_pixels)
    if syntax not in NATIVE:
        _check_frame(header, syntax, width, height)


def _check_frame(header: Any, syntax: str, width: int, height: int) -> None:
    """The codestream's own header decides what its codec does, so it has to say what the file says."""
    from pydicom.encaps import get_frame

    frame = get_frame(header.PixelData, 0, number_of_frames=int(header.get("NumberOfFrames", 1) or 1))
    kind = "JPEG" if syntax == JPEG_BASELINE else "JPEG2000"
    if kind == "JPEG":
        image_bounds.check_structure(frame)
        image_bounds.jpeg_bytes(frame, width, height)
    elif image_bounds.check_jpeg2000(frame) not in (1, 3):
        raise _unsupported("its colours are not 8-bit RGB, YBR_FULL or grey")
    with Image.open(io.BytesIO(frame), formats=(kind,)) as stored:
        if stored.mode not in STORED_MODES:
            raise _unsupported("its colours are not 8-bit RGB, YBR_FULL or grey")
        if stored.size != (width, height):
            raise ImageError("truncated", f"the DICOM file says {width} x {height}, its frame {stored.size}")


def _image(header: Any, syntax: str) -> Image.Image:
    from pydicom.pixels import get_decoder

    photometric = str(header.PhotometricInterpretation)
    if int(header.BitsAllocated) not in (8, 16) or int(header.get("PixelRepresentation", 0)):
        raise _unsupported("its samples are not unsigned, of 8 or 16 bits")
    values, told = get_decoder(header.file_meta.TransferSyntaxUID).as_array(header, index=0, raw=True)
    photometric = str(told.get("photometric_interpretation", photometric))
    bits = int(header.BitsStored)
    if photometric in ("MONOCHROME1", "MONOCHROME2") and values.ndim == 2:
        image = Image.fromarray(values if photometric == "MONOCHROME2" else np.uint16(2**bits - 1) - values)
    elif photometric in COLOUR_MODES and values.ndim == 3 and values.dtype == np.uint8:
        image = Image.fromarray(values, COLOUR_MODES[photometric])
        image = image if image.mode == "RGB" else image.convert("RGB")
    else:
        raise _unsupported("its colours are not 8-bit RGB, YBR_FULL or grey")
    image.format = "DICOM"
    image.info["significant_bits"] = bits
    if header.get("ICCProfile"):
        image.info["icc_profile"] = bytes(header.ICCProfile)
    return image
