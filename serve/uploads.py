"""Reading a request about one image: JSON with a data URI, or a multipart form with a file."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serve.errors import Refusal, from_details
from serve.payload import decode_data_uri
from serve.schemas import ImageRequest
from serve.settings import LimitsConfig

IMAGE_FIELDS = ("image", "file")
MAX_FIELD_BYTES = 2**20
_OTHER_FIELDS = 16

LIST_FIELDS = ("labels", "templates", "concepts")


class _InMemory(MultiPartParser):
    """Photographs of patients do not touch a disk, as they would beyond the parser's own limit of 1 MB."""

    spool_max_size = sys.maxsize


RequestT = TypeVar("RequestT", bound=ImageRequest)


def body_schema(request_class: type[ImageRequest]) -> dict[str, Any]:
    """The OpenAPI request body of an endpoint that takes both kinds."""
    schema = request_class.model_json_schema()
    fields = {name: dict(field) for name, field in schema["properties"].items()}
    fields["image"] = {"type": "string", "format": "binary", "description": "the file: JPEG, PNG or WebP"}
    for name in LIST_FIELDS:
        if name in fields:
            fields[name]["description"] += "; the field repeated, or one field with a JSON list or one text a line"
    form = {"type": "object", "required": ["image"], "properties": fields}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


async def read(request: Request, request_class: type[RequestT], limits: LimitsConfig) -> tuple[RequestT, bytes]:
    """The request's fields, and the bytes of its image.

    Raises:
        Refusal: 400, 413, 415 or 422.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _read_form(request, request_class, limits)
    if content_type == "application/json" or content_type.endswith("+json"):
        body = _validate(request_class, await request.body())
        return body, decode_data_uri(body.image, "image")
    message = "send application/json with the image as a data URI, or multipart/form-data with a file named image"
    raise Refusal(415, message, code="unsupported_media_type", param="Content-Type")


def _validate(request_class: type[RequestT], body: bytes | dict[str, Any]) -> RequestT:
    try:
        if isinstance(body, bytes):
            return request_class.model_validate_json(body)
        return request_class.model_validate(body)
    except ValidationError as error:
        raise from_details(error.errors(include_url=False, include_context=False)) from None


async def _read_form(request: Request, request_class: type[RequestT], limits: LimitsConfig) -> tuple[RequestT, bytes]:
    async with _parsed_form(request, limits) as form:
        image = next((form[name] for name in IMAGE_FIELDS if name in form), None)
        if isinstance(image, UploadFile):
            data = await image.read()
        elif image is None:
            message = "image: the form has no file field named image"
            raise Refusal(422, message, code="invalid_field", param="image")
        else:
            data = decode_data_uri(image, "image")
        return _validate(request_class, _form_fields(form)), data


@contextlib.asynccontextmanager
async def _parsed_form(request: Request, limits: LimitsConfig) -> AsyncIterator[FormData]:
    max_fields = limits.labels + limits.templates + _OTHER_FIELDS
    async with contextlib.aclosing(request.stream()) as stream:
        parser = _InMemory(request.headers, stream, max_files=1, max_fields=max_fields, max_part_size=MAX_FIELD_BYTES)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise HTTPException(400, error.message) from None
    try:
        yield form
    finally:
        await form.close()


def _form_fields(form: FormData) -> dict[str, Any]:
    """The form's fields by name; the image's own bytes stay aside."""
    fields: dict[str, Any] = {"image": ""}
    for name in form:
        if name in IMAGE_FIELDS:
            continue
        values = form.getlist(name)
        if name in LIST_FIELDS:
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
