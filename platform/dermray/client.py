"""A small client of the serving endpoints: `Client("http://localhost:8000").classify("photo.jpg")`.

Every question is free of side effects, so what may succeed a moment later is asked again: 429, 503, connections that
break, and a status from 500 up without an error of the service itself, which a proxy gives when the process that worked
on the request has died.
"""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

from dermray.errors import ServiceError

RETRIED_STATUSES = frozenset({429, 503})
# The code of an answer that is not of the service: its errors are JSON and have codes of their own.
NOT_OURS = "http_error"
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
# The server's own default limit on the inputs of one request.
INPUTS_PER_REQUEST = 32

Image = bytes | str | PathLike[str]


class Client:
    """Asks one service. Thread-safe; use it as a context manager, or call `close`."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        patience_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connect lazily.

        Args:
            base_url: where the service listens.
            token: bearer token, where the service has tokens.
            timeout_s: of one attempt.
            patience_s: how long one question is asked again before it fails; 0: never.
            transport: httpx's, for tests.
            sleep: waits between attempts.
        """
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=timeout_s, transport=transport)
        self._patience_s = patience_s
        self._sleep = sleep

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """The served models, as `/v1/models` lists them.

        Raises:
            ServiceError: refused or out of reach; so do all methods.
        """
        return list(self._ask("GET", "/v1/models")["data"])

    def embed_texts(self, texts: Sequence[str], *, model: str | None = None) -> np.ndarray:
        """Unit vectors of texts, float32 `[N, D]`."""
        return self._embed(list(texts), "text", model)

    def embed_images(self, images: Sequence[Image], *, model: str | None = None) -> np.ndarray:
        """Unit vectors of images (encoded bytes, or paths of files), float32 `[N, D]`."""
        return self._embed([data_uri(image) for image in images], "image", model)

    def classify(
        self,
        image: Image,
        labels: Sequence[str] | None = None,
        *,
        benchmark: str | None = None,
        ontology: str | None = None,
        templates: Sequence[str] | None = None,
        model: str | None = None,
    ) -> dict[str, Any]:
        """The answer of `/v1/classify`: `ranking`, `hierarchy`, `model_info`."""
        body = {"labels": labels, "benchmark": benchmark, "ontology": ontology, "templates": templates, "model": model}
        return self._ask("POST", "/v1/classify", {"image": data_uri(image), **_given(body)})

    def concepts(
        self, image: Image, concepts: Sequence[str] | None = None, *, model: str | None = None
    ) -> dict[str, float]:
        """Presence of each concept in (0, 1), surest first."""
        body = {"image": data_uri(image), **_given({"concepts": concepts, "model": model})}
        return {one["concept"]: one["score"] for one in self._ask("POST", "/v1/concepts", body)["concepts"]}

    def predict(self, image: Image, *, model: str | None = None) -> dict[str, np.ndarray]:
        """What a model whose kind predicts says of an image: float32 arrays by name."""
        body = {"image": data_uri(image), **_given({"model": model})}
        prediction = self._ask("POST", "/v1/predict", body)["prediction"]
        return {name: np.asarray(values, dtype=np.float32) for name, values in prediction.items()}

    def search(
        self,
        query: str | None = None,
        *,
        image: Image | None = None,
        target: Literal["image", "text"] = "image",
        k: int = 10,
        model: str | None = None,
    ) -> list[dict[str, Any]]:
        """The nearest images or captions of the served index to a text or an image."""
        uri = data_uri(image) if image is not None else None
        body = _given({"query": query, "image": uri, "model": model}) | {"target": target, "k": k}
        return list(self._ask("POST", "/v1/search", body)["data"])

    def _embed(self, inputs: list[str], modality: str, model: str | None) -> np.ndarray:
        vectors = []
        for start in range(0, len(inputs), INPUTS_PER_REQUEST):
            body = {"input": inputs[start : start + INPUTS_PER_REQUEST], "modality": modality}
            answer = self._ask(
                "POST", "/v1/embeddings", body | {"encoding_format": "base64"} | _given({"model": model})
            )
            vectors += [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer["data"]]
        return np.stack(vectors).astype(np.float32) if vectors else np.zeros((0, 0), dtype=np.float32)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        deadline_s = time.monotonic() + self._patience_s
        pause_s = FIRST_PAUSE_S
        while True:
            error, wait_s = self._attempt(method, path, body)
            if not isinstance(error, ServiceError):
                return error
            # Spread, so that many clients do not come back at the same moment.
            wait_s = max(wait_s or 0.0, pause_s * random.uniform(0.5, 1.5))
            if not _may_succeed_later(error) or time.monotonic() + wait_s > deadline_s:
                raise error
            self._sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _attempt(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[dict[str, Any] | ServiceError, float | None]:
        """The answer, or the error and how long the server asks to wait."""
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            return ServiceError(f"{self._http.base_url}{path} is out of reach: {type(error).__name__}"), None
        if answer.is_success:
            return answer.json(), None
        after = answer.headers.get("Retry-After", "")
        return _refusal(answer), float(after) if after.isdecimal() else None


def data_uri(image: Image) -> str:
    """An image as a data URI: encoded bytes, the path of a file, or a data URI as it is."""
    if isinstance(image, str) and image.startswith("data:"):
        return image
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    # The server looks at the bytes, not at the announced type.
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _may_succeed_later(error: ServiceError) -> bool:
    bare = error.status >= 500 and error.code == NOT_OURS
    return bare or error.status in (0, *RETRIED_STATUSES)


def _refusal(answer: httpx.Response) -> ServiceError:
    try:
        error = answer.json()["error"]
        return ServiceError(error["message"], status=answer.status_code, code=error["code"], param=error["param"])
    except (ValueError, KeyError, TypeError):
        # A proxy in between.
        return ServiceError(f"HTTP status {answer.status_code}", status=answer.status_code, code=NOT_OURS)
