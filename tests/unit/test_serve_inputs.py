"""What inputs are: images in another dress are no words, token numbers are no texts, null is absent."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig
from tests.serving import LOCAL, DummyBackend, data_uri, photograph


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(Catalogue.of(DummyBackend()), LimitsConfig()), base_url=LOCAL) as client:
        yield client


def error_of(response) -> dict:
    return response.json()["error"]


IN_BASE64 = base64.b64encode(photograph()).decode()
DISGUISED = [
    (IN_BASE64, "invalid_data_uri", "a JPEG in base64"),
    (IN_BASE64[:24], "invalid_data_uri", "a JPEG in base64"),
    ("\n".join(IN_BASE64[at : at + 76] for at in range(0, len(IN_BASE64), 76)), "invalid_data_uri", "a JPEG in base64"),
    (base64.b64encode(photograph(kind="PNG")).decode(), "invalid_data_uri", "a PNG in base64"),
    (base64.b64encode(photograph(kind="WEBP")).decode(), "invalid_data_uri", "a WebP in base64"),
    (base64.urlsafe_b64encode(b"\0\0\0\x20ftypheic" + bytes(200)).decode(), "invalid_data_uri", "HEIC"),
    (base64.b64encode(b"%PDF-1.7 and more").decode(), "invalid_data_uri", "a PDF in base64"),
    (base64.b64encode(bytes(range(256))).decode(), "invalid_data_uri", "base64 without"),
    (data_uri(photograph(), "application/octet-stream"), "invalid_data_uri", "no image's"),
    (data_uri(photograph()).replace("image/jpeg", ""), "invalid_data_uri", "no image's"),
    (data_uri(b"%PDF-1.7", "application/pdf"), "invalid_data_uri", "no image's"),
    (" " + data_uri(photograph()), "invalid_data_uri", "a blank or a quotation mark before it"),
    (f'"{data_uri(photograph())}"', "invalid_data_uri", "a blank or a quotation mark before it"),
    (f"![lesion]({data_uri(photograph())})", "invalid_data_uri", "with something around it"),
    (f"<img src='{data_uri(photograph())}'>", "invalid_data_uri", "with something around it"),
    (f'{{"url": "{data_uri(photograph())}"}}', "invalid_data_uri", "with something around it"),
    (f"b'{IN_BASE64}'", "invalid_data_uri", "a JPEG in base64"),
    ("'images/lesion.jpg'", "path", "path of a file"),
    ("%PDF-1.7\n%binary", "not_an_image", "a PDF"),
    ("https://host.example/lesion.jpg", "url", "not fetched"),
    ("s3://bucket/lesion", "url", "not fetched"),
    ("file:///home/me/lesion.jpg", "url", "not fetched"),
    ("lesion.JPG", "path", "path of a file"),
    ("/home/me/photographs/lesion", "path", "path of a file"),
    ("C:\\My Pictures\\lesion 2.png", "path", "path of a file"),
    ("~/scans/a.dcm", "path", "path of a file"),
    ("my photos/lesion 1.jpg", "path", "path of a file"),
    ("Screenshot 2026-01-01 at 10.00.png", "path", "path of a file"),
    ("cdn.host.example/a.jpg?w=200", "path", "path of a file"),
    ("IMG_1.CR2", "path", "path of a file"),
    ("blob:https://host.example/0b1c", "url", "not fetched"),
    (quote(data_uri(photograph()), safe=""), "invalid_data_uri", "with something around it"),
    (quote(IN_BASE64, safe=""), "invalid_data_uri", "a JPEG in base64"),
    *(
        (
            mark.join(IN_BASE64[at : at + 76] for at in range(0, len(IN_BASE64), 76)),
            "invalid_data_uri",
            "a JPEG in base64",
        )
        for mark in (" ", "\t", "\\n", "\r\n")
    ),
    (IN_BASE64.replace("/", "\\/"), "invalid_data_uri", "a JPEG in base64"),
    *(
        (f"{before}{IN_BASE64}{behind}", "invalid_data_uri", "a JPEG in base64")
        for before, behind in (("base64,", ""), ("image/jpeg;base64,", ""), ("data:base64,", ""), ("", " what is it?"))
    ),
    (json.dumps({"image": IN_BASE64}), "invalid_data_uri", "a JPEG in base64"),
    (base64.b64encode(b"BM" + bytes(60)).decode(), "invalid_data_uri", "a BMP in base64"),
    (photograph().hex(), "not_words", "hexadecimal"),
    (f"0x{photograph().hex().upper()}", "not_words", "hexadecimal"),
    (repr(photograph()), "not_words", "bytes, not words"),
    (f"bytearray({photograph()!r})", "not_words", "bytes, not words"),
    (photograph().decode("latin-1"), "not_words", "bytes, not words"),
    (photograph().decode("utf-8", errors="replace"), "not_words", "bytes, not words"),
    (base64.b32encode(photograph()).decode(), "not_words", "without a blank"),
    (base64.b85encode(photograph()).decode(), "not_words", "without a blank"),
    (str(list(photograph())), "not_words", "numbers, not words"),
    ("tensor([[[0.1, 0.2]]])", "not_words", "in place of an image"),
    ("<PIL.JpegImagePlugin.JpegImageFile image mode=RGB size=64x64 at 0x7F10>", "not_words", "in place of an image"),
    ("[object Blob]", "not_words", "in place of an image"),
    ("<img src='https://host.example/a'>", "not_words", "HTML, Markdown or JSON"),
    ("![a lesion](https://host.example/a)", "not_words", "HTML, Markdown or JSON"),
    ("<svg xmlns='http://www.w3.org/2000/svg'></svg>", "not_words", "HTML, Markdown or JSON"),
    ('{"type": "image_url", "image_url": {"url": "x"}}', "not_words", "HTML, Markdown or JSON"),
]


@pytest.mark.parametrize(("text", "code", "says"), DISGUISED)
def test_what_is_an_image_in_another_dress_is_not_embedded_as_words(client, text, code, says):
    for sent, param in ((text, "input"), (["acne", text], "input.1")):
        answer = client.post("/v1/embeddings", json={"input": sent})
        error = error_of(answer)
        assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
        assert says in error["message"]
        assert "modality=text" in error["message"]
    assert error_of(client.post("/v1/embeddings", json={"input": text, "modality": "image"}))["code"] == code
    assert says in error_of(client.post("/v1/classify", json={"image": text}))["message"]
    # Who means these characters as words says so.
    assert client.post("/v1/embeddings", json={"input": text[:8192], "modality": "text"}).status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        *("psoriasis/eczema/dermatitis", "and/or", "he/she/they", "1/2", "/", "~", "..", "T2N0M0", "ABCDE rule"),
        *("see https://host.example for lesion.jpg", "data: none", "data:12,5 mm", "red.papules", "A" * 300, "'acne'"),
        *(
            "[1] red, [2] scaly",
            "<5 mm, see text",
            "deadbeef",
            "naevus\x0cpage 2",
            "50 % of b64",
            "content: 5 mg",
            "\n".join(map("Eczema{}".format, range(60))),
        ),
        *(
            "Pneumonoultramicroscopicsilicovolcanoconiosis",
            "\u57fa\u5e95\u7d30\u80de\u764c",
            "a photo, image.jpg, of acne",
        ),
    ],
)
def test_words_stay_words(client, text):
    assert client.post("/v1/embeddings", json={"input": text}).status_code == 200


@pytest.mark.parametrize("sent", [[1, 2, 3], [[1, 2], [3]], [101], ["acne", 7], ["acne", [7]]])
def test_token_numbers_are_refused_with_the_way_out(client, sent):
    answer = client.post("/v1/embeddings", json={"input": sent})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "token_numbers", "input")
    assert "check_embedding_ctx_length=False" in error["message"]


def test_null_is_as_absent(client):
    absent = client.post("/v1/embeddings", json={"input": "acne"}).json()
    fields = ("encoding_format", "dimensions", "modality", "model", "user")
    assert client.post("/v1/embeddings", json={"input": "acne"} | dict.fromkeys(fields)).json() == absent
    body = {"image": data_uri(photograph())}
    fields = ("labels", "templates", "benchmark", "ontology", "model")
    answers = [client.post("/v1/classify", json=body | one) for one in ({}, dict.fromkeys(fields))]
    assert answers[0].json() == answers[1].json()
