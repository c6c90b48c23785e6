"""Every key that `serve run serve.app:build key=value …` and the `args` of `serve/config.yaml` accept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import click
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from dermray import config
from dermray.config import Config, TrackingConfig
from dermray.errors import ConfigError
from dermray.printable import printable

Lowercase = AfterValidator(str.lower)
HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,253}$|^[0-9A-Fa-f:.]{2,45}$"), Lowercase]
Origin = Annotated[str, StringConstraints(pattern=r"^[Hh][Tt][Tt][Pp][Ss]?://[^/?#@\s]{1,261}$"), Lowercase]


class LimitsConfig(Config):
    """What one request may ask for; beyond it the answer is 400, 413, 429 or 504, never a crash."""

    body_bytes: int = Field(20 * 2**20, ge=1024, description="largest request body, in bytes (413)")
    pending_bytes: int = Field(2**30, ge=1024, description="request bodies held at one time, in bytes (429)")
    pixels: int = Field(50_000_000, ge=1, description="largest image, width x height from its header (400)")
    items: int = Field(32, ge=1, description="most inputs of one embeddings request (413)")
    labels: int = Field(1000, ge=1, description="most candidate classes of one classify request (400)")
    templates: int = Field(32, ge=1, description="most prompt templates of one classify request (400)")
    prompts: int = Field(
        8000, ge=1, description="most labels x templates of one classify request; every 256 characters count (400)"
    )
    pending_classifiers: int = Field(8, ge=1, description="class lists that one encoder prepares at a time (429)")
    text_chars: int = Field(8192, ge=1, description="longest text, label or template, in characters (400)")
    queued_requests: int = Field(256, ge=1, description="requests that may wait for the encoders (429)")
    request_timeout_s: float = Field(60.0, gt=0, description="time one request may take, in seconds (504)")

    @model_validator(mode="after")
    def _one_body_fits(self) -> LimitsConfig:
        if self.pending_bytes < self.body_bytes:
            raise ValueError("pending_bytes is below body_bytes, so that not even one body of that size is taken")
        return self


class AuthConfig(Config):
    """Where the tokens are; the tokens themselves are never keys, so that no config or log holds one."""

    token_file: str | None = Field(
        None, description="file with a bearer token a line; $DERMRAY_SERVE_TOKENS holds more, separated by commas"
    )
    admin_token_file: str | None = Field(
        None, description="the same for tokens that may change what is served; also $DERMRAY_SERVE_ADMIN_TOKENS"
    )


class RolloutConfig(Config):
    """How a new version behind `models:/NAME@ALIAS` is taken up."""

    poll_s: float = Field(30.0, ge=0, description="seconds between two looks at the alias; 0: on request only")


class ServeConfig(Config):
    """The served models, the encoders' replicas and batches, and the limits of a request."""

    model: str = Field(
        description="model folder (path or URI), local-dir:PATH, models:/NAME@ALIAS, models:/NAME/VERSION, "
        "or an open_clip architecture"
    )
    models: tuple[str, ...] = Field((), description="further models, in the same spelling; requests name them")
    name: str | None = Field(None, description="name to serve it under; empty: the registry's or the folder's")
    device: str | None = Field(None, description="cpu, cuda, …; empty: a GPU where there is one")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the forward pass")
    labels: tuple[str, ...] | None = Field(
        None, description="classes to rank when a request names none; empty: the model's own list"
    )
    ontology: str | None = Field(None, description="ontology.json; empty: the model folder's own, if any")
    compile: bool = Field(False, description="torch.compile for the image tower; slow to start")
    index: str | None = Field(None, description="folder of jobs/index.py, for /v1/search")
    max_batch_size: int = Field(32, ge=1, description="most images (or texts) of one forward pass")
    batch_wait_ms: float = Field(5.0, ge=0, description="how long a batch waits to fill, in milliseconds")
    num_replicas: int = Field(1, ge=1, description="encoder replicas")
    max_replicas: int | None = Field(
        None, ge=1, description="replicas added while requests queue, up to this many; empty: always num_replicas"
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="port of `serve run`, on loopback; empty: 8000; a file has http_options.port"
    )
    num_gateways: int = Field(2, ge=1, description="HTTP replicas, so that one may die; not with single_process")
    single_process: bool = Field(False, description="encoders inside the HTTP replicas: one hop fewer")
    num_cpus: float = Field(1.0, gt=0, description="CPUs of one encoder replica")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of one encoder replica")
    decode_threads: int = Field(2, ge=1, description="threads that decode images in one encoder replica")
    classifier_cache: int = Field(64, ge=1, description="text classifiers that one replica keeps")
    allowed_hosts: tuple[HostName, ...] = Field(
        (), description="names that requests may call this service by, beside localhost and loopback addresses"
    )
    cors: tuple[Origin, ...] = Field(
        (), description="pages elsewhere whose scripts may ask, as https://page.example; empty: none"
    )
    limits: LimitsConfig = LimitsConfig()
    auth: AuthConfig = AuthConfig()
    rollout: RolloutConfig = RolloutConfig()
    tracking: TrackingConfig = TrackingConfig()


class ServeArgumentError(ConfigError, click.ClickException):
    """A bad argument: `serve run` prints it as one line; `serve status` shows it for a deployed config."""

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, f"serve.app: {printable(message)}")

    def __reduce__(self) -> tuple[type[ServeArgumentError], tuple[str]]:
        return type(self), (self.message.removeprefix("serve.app: "),)


def parse_arguments(arguments: Mapping[str, Any]) -> ServeConfig:
    """Validate what Ray Serve hands to the builder: `key=value` texts, or the YAML values of `args`.

    Raises:
        ServeArgumentError: an unknown key, a wrong value or no model, in one line that names the key.
    """
    try:
        return config.parse(ServeConfig, [], arguments)
    except ConfigError as error:
        # A builder has no command line of its own to ask for help.
        raise ServeArgumentError(str(error).replace("--help lists", "docs/serving.md lists")) from None
