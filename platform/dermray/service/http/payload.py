"""Images and texts in the fields of requests: what is looked at before a model is asked. No Ray, no torch."""

from __future__ import annotations

import base64
import binascii

from dermray.service.http import stray_images
from dermray.service.refusals import Refusal
from dermray.service.settings import LimitsConfig

IMAGE_PREFIX = "data:image/"


def decode_data_uri(text: str, param: str) -> bytes:
    """The bytes of `data:image/…;base64,…`. What they hold is the decoder's business.

    Raises:
        Refusal: 400 when it is a link, a path, another kind of data URI, or not base64.
    """
    head, comma, payload = text.partition(",")
    if not comma or not head.lower().startswith(IMAGE_PREFIX) or not head.lower().endswith(";base64"):
        stray_images.refuse_as_image(text, param)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(
            400, f"{param}: what follows base64, is not valid base64", code="invalid_base64", param=param
        ) from None


def check_text(text: str, param: str, limits: LimitsConfig) -> None:
    """A text that says something and is not too long.

    Raises:
        Refusal: 400.
    """
    if not text.strip():
        raise Refusal(400, f"{param}: the text is empty", code="empty_input", param=param)
    if len(text) > limits.text_chars:
        message = f"{param}: {len(text):,} characters; the limit is {limits.text_chars:,}"
        raise Refusal(400, message, code="text_too_long", param=param)
    if not is_unicode(text):
        message = f"{param}: the text has half a surrogate pair; send whole Unicode characters"
        raise Refusal(400, message, code="invalid_text", param=param)


def is_unicode(text: str) -> bool:
    """False for a text that JSON escapes can make and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
