"""The keys under `rewrite` of `jobs/prepare.py`."""

from __future__ import annotations

import os
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dermray.config import Config, Uri
from dermray.errors import ConfigError

Mode = Literal["off", "decompose", "rewrite", "both"]

# Upper case only: a key pasted here by mistake is refused, and never shown.
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_KEY = re.compile(r"[!-~]{1,4096}")
_PATH = "/chat/completions"


class RewriteConfig(Config):
    """What a language model does to raw captions, and how it is asked."""

    mode: Mode = Field(
        "off",
        description="decompose: into sub-captions; rewrite: replace the raw caption; both: the one after the other",
    )
    endpoint: str | None = Field(None, description="base URL of an OpenAI-compatible API (http://host:8000/v1)")
    model: str | None = Field(None, max_length=200, description="model, as the endpoint names it")
    api_key_env: str | None = Field(None, description="name of the environment variable with the key; empty: no key")

    captions_per_request: int = Field(10, ge=1, le=100, description="captions asked for at once")
    requests_per_minute: int = Field(60, ge=1, le=1_000_000, description="never more requests than this")
    num_concurrent: int = Field(8, ge=1, le=1024, description="requests at the same time")
    timeout_s: float = Field(120, gt=0, le=3600, description="an answer that takes longer counts as none")

    max_tokens: int = Field(512, ge=1, le=100_000, description="length of the answer, for each caption of a request")
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the endpoint calls that limit"
    )
    temperature: float | None = Field(0.0, ge=0, le=2, description="empty: what the endpoint takes by itself")
    json_mode: bool = Field(True, description="false: for endpoints that know no response_format json_object")

    max_failed_fraction: float = Field(0.01, ge=0, le=1, description="more captions without an answer stop the run")
    cache: Uri | None = Field(None, description="folder or URI that keeps the answers; empty: rewrites/ under output")

    @field_validator("mode", mode="before")
    @classmethod
    def _off_in_yaml(cls, mode: Any) -> Any:
        # YAML reads a bare `off` as false.
        return "off" if mode is False else mode

    @field_validator("endpoint")
    @classmethod
    def _plain_url(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        parts = urlsplit(endpoint)
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError(
                "must hold no user, password, query or fragment; a key belongs into api_key_env's variable"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{endpoint!r} is not an http or https URL")
        return endpoint.rstrip("/").removesuffix(_PATH)

    @field_validator("api_key_env")
    @classmethod
    def _variable_name(cls, name: str | None) -> str | None:
        if name is not None and not _VARIABLE.fullmatch(name):
            raise ValueError("must be the name of an environment variable in capitals (LLM_API_KEY), not a key")
        return name

    @model_validator(mode="after")
    def _complete(self) -> RewriteConfig:
        if self.mode != "off" and not (self.endpoint and self.model):
            raise ValueError(f"mode={self.mode} needs an endpoint and a model")
        return self

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"{self.endpoint}{_PATH}"

    def parameters(self) -> dict[str, Any]:
        """What decides an answer besides prompt and caption, wherever the model runs."""
        return self.model_dump(mode="json", include={"model", "max_tokens", "temperature", "json_mode"})

    def content(self) -> dict[str, Any]:
        """The keys that decide what the corpus holds, for its provenance."""
        return {"mode": self.mode, **self.parameters()}

    def api_key(self) -> str | None:
        """The key, from the environment.

        Raises:
            ConfigError: the variable is not set, or holds what cannot be a key; the message does not show it.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ConfigError(f"rewrite.api_key_env: the environment variable {self.api_key_env} is not set")
        if not _KEY.fullmatch(key):
            raise ConfigError(f"rewrite.api_key_env: {self.api_key_env} holds characters that no key has")
        return key
