"""Reading a request about one image: JSON with a data URI, or a multipart form with a file."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser, parse_options_header
from starlette.requests import Request

from dermray.service.http import bodies
from dermray.service.http.payload import decode_data_uri
from dermray.service.http.schemas import ImageRequest, Texts
from dermray.service.refusals import Refusal, from_details
from dermray.service.settings import LimitsConfig

IMAGE_FIELDS = ("image", "file")
MAX_FIELD_BYTES = 2**20
_OTHER_FIELDS = 16


class _InMemory(MultiPartParser):
    """Photographs of patients do not touch a disk, as they would beyond the parser's own limit of 1 MB."""

    spool_max_size = sys.maxsize


RequestT = TypeVar("RequestT", bound=ImageRequest)


def body_schema(request_class: type[ImageRequest]) -> dict[str, Any]:
    """The OpenAPI request body of an endpoint that takes both kinds."""
    schema = request_class.model_json_schema()
    fields = {name: dict(field) for name, field in schema["properties"].items()}
    fields["image"] = {"type": "string", "format": "binary", "description": "the file: JPEG, PNG or WebP"}
    for name in _list_fields(request_class):
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
        body = _validate(request_class, await request.json())
        return body, await asyncio.to_thread(decode_data_uri, body.image, "image")
    message = "send application/json with the image as a data URI, or multipart/form-data with a file named image"
    raise Refusal(415, message, code="unsupported_media_type", param="Content-Type")


def _validate(request_class: type[RequestT], body: dict[str, Any]) -> RequestT:
    bodies.check_fields(len(body))
    try:
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
            data = await asyncio.to_thread(decode_data_uri, image, "image")
        return await asyncio.to_thread(_from_form, request_class, form, limits), data


def _from_form(request_class: type[RequestT], form: FormData, limits: LimitsConfig) -> RequestT:
    return _validate(request_class, _form_fields(form, _list_fields(request_class), limits))


def _list_fields(request_class: type[ImageRequest]) -> set[str]:
    """Those of several texts."""
    return {name for name, field in request_class.model_fields.items() if field.annotation == Texts | None}


@contextlib.asynccontextmanager
async def _parsed_form(request: Request, limits: LimitsConfig) -> AsyncIterator[FormData]:
    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        # Python knows codecs that are none for texts, and some that fail in ways of their own.
        raise Refusal(415, "send the form as UTF-8", code="unsupported_media_type", param="Content-Type")
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


def _form_fields(form: FormData, list_fields: set[str], limits: LimitsConfig) -> dict[str, Any]:
    """The form's fields by name; the image's own bytes stay aside."""
    sent: dict[str, list[UploadFile | str]] = {}
    for name, value in form.multi_items():
        if name not in IMAGE_FIELDS:
            sent.setdefault(name, []).append(value)
    fields = {
        name: _text_list(name, values, limits) if name in list_fields else values[-1] for name, values in sent.items()
    }
    return {"image": "", **fields}


def _text_list(name: str, values: list[UploadFile | str], limits: LimitsConfig) -> list[Any]:
    """A field sent several times, or once with a JSON list, one text a line, or commas between labels."""
    if len(values) != 1 or not isinstance(values[0], str):
        return values
    text = values[0].strip()
    if text.startswith("["):
        try:
            parsed = bodies.parse_value(text.encode(), limits)
        except Refusal as refusal:
            if refusal.status_code == 413:
                raise
            message = f"{name}: starts like a JSON list but is none"
            raise Refusal(422, message, code="invalid_field", param=name) from None
        return parsed if isinstance(parsed, list) else [text]
    separator = "\n" if "\n" in text or name == "templates" else ","
    return [line.strip() for line in text.split(separator) if line.strip()]
