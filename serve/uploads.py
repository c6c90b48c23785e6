"""Reading a classify request: JSON with a data URI, or a multipart form with a file."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from serve.errors import Refusal, from_details
from serve.payload import decode_data_uri
from serve.schemas import EXAMPLE_IMAGE, ClassifyRequest
from serve.settings import LimitsConfig

IMAGE_FIELDS = ("image", "file")
MAX_FIELD_BYTES = 2**20
_OTHER_FIELDS = 16

CLASSIFY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": ClassifyRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {
                            "type": "string",
                            "format": "binary",
                            "description": "the file: JPEG, PNG or WebP",
                        },
                        "labels": {
                            "type": "array",
                            "items": {"type": "string"},
                            "description": "the field repeated, or one field with a JSON list or one label a line",
                        },
                        "ontology": {"type": "string"},
                        "templates": {"type": "array", "items": {"type": "string"}},
                        "model": {"type": "string"},
                    },
                },
            },
        },
    }
}


async def read_classify(request: Request, limits: LimitsConfig) -> tuple[ClassifyRequest, bytes]:
    """The request's fields, and the bytes of its image.

    Raises:
        Refusal: 400, 413, 415 or 422.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _read_form(request, limits)
    if content_type == "application/json" or content_type.endswith("+json"):
        body = _validate(await request.body())
        return body, decode_data_uri(body.image, "image")
    message = "send application/json with the image as a data URI, or multipart/form-data with a file named image"
    raise Refusal(415, message, code="unsupported_media_type", param="Content-Type")


def _validate(body: bytes | dict[str, Any]) -> ClassifyRequest:
    try:
        if isinstance(body, bytes):
            return ClassifyRequest.model_validate_json(body)
        return ClassifyRequest.model_validate(body)
    except ValidationError as error:
        raise from_details(error.errors(include_url=False, include_context=False)) from None


async def _read_form(request: Request, limits: LimitsConfig) -> tuple[ClassifyRequest, bytes]:
    max_fields = limits.labels + limits.templates + _OTHER_FIELDS
    async with request.form(max_files=1, max_fields=max_fields, max_part_size=MAX_FIELD_BYTES) as form:
        image = next((form[name] for name in IMAGE_FIELDS if name in form), None)
        if isinstance(image, UploadFile):
            data = await image.read()
        elif image is None:
            message = "image: the form has no file field named image"
            raise Refusal(422, message, code="invalid_field", param="image")
        else:
            data = decode_data_uri(image, "image")
        return _validate(_form_fields(form)), data


def _form_fields(form: FormData) -> dict[str, Any]:
    """The form as a classify request; the image's own bytes stay aside."""
    fields: dict[str, Any] = {"image": ""}
    for name in form:
        if name in IMAGE_FIELDS:
            continue
        values = form.getlist(name)
        if name in ("labels", "templates"):
            fields[name] = _text_list(name, values)
        else:
            fields[name] = values[-1]
    return fields


def _text_list(name: str, values: list[UploadFile | str]) -> list[UploadFile | str]:
    """A field sent several times, or once with a JSON list, one text a line, or commas between labels."""
    if len(values) != 1 or not isinstance(values[0], str):
        return values
    text = values[0].strip()
    if text.startswith("["):
        try:
            parsed = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            message = f"{name}: starts like a JSON list but is none"
            raise Refusal(422, message, code="invalid_field", param=name) from None
        return parsed if isinstance(parsed, list) else [text]
    separator = "\n" if "\n" in text or name == "templates" else ","
    return [line.strip() for line in text.split(separator) if line.strip()]


__all__ = ["CLASSIFY_BODY", "EXAMPLE_IMAGE", "read_classify"]
