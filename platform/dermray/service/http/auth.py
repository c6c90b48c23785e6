"""Who may ask: bearer tokens from the environment or files, compared in constant time.

Every route says whom it is for (`GuardedRoute`), whatever its path is called. Without any token the service answers
on loopback alone, and nobody administers. Tokens are kept as SHA-256 digests; neither the configuration nor a log ever
holds one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from dermray import storage
from dermray.errors import ConfigError, StorageError
from dermray.service.http.origins import LOOPBACK_ALONE, Origins, is_loopback
from dermray.service.refusals import Refusal
from dermray.service.settings import AuthConfig

TOKENS_VARIABLE = "DERMRAY_SERVE_TOKENS"
ADMIN_TOKENS_VARIABLE = "DERMRAY_SERVE_ADMIN_TOKENS"
MIN_TOKEN_CHARS = 16
_BEARER = "bearer "


class Audience(Enum):
    """Whom a route is for."""

    EVERYBODY = "everybody"
    USERS = "users"
    ADMINISTRATORS = "administrators"


@dataclass(frozen=True, slots=True)
class Access:
    """The digests of the tokens that open the service, and of those that may also change what is served."""

    tokens: tuple[bytes, ...] = ()
    admin_tokens: tuple[bytes, ...] = ()
    origins: Origins = LOOPBACK_ALONE

    @classmethod
    def load(cls, config: AuthConfig, origins: Origins = LOOPBACK_ALONE) -> Access:
        """Read the configured files and the environment.

        Raises:
            ConfigError: a file is missing, or a token is too short.
        """
        tokens = _digests(config.token_file, TOKENS_VARIABLE)
        return cls(tokens, _digests(config.admin_token_file, ADMIN_TOKENS_VARIABLE), origins)

    @property
    def is_open(self) -> bool:
        """Nobody needs a token to ask."""
        return not self.tokens and not self.admin_tokens

    def require_safe_host(self, host: str | None) -> None:
        """Refuse to be reachable from other machines without tokens.

        Raises:
            ConfigError: no token is configured and `host` is not a loopback address.
        """
        if self.is_open and not is_loopback(host):
            raise ConfigError(
                f"the service listens on {host or 'an unknown address'} without tokens: set {TOKENS_VARIABLE} or "
                "auth.token_file, or bind http_options.host to 127.0.0.1"
            )

    def listening_on(self, host: str | None) -> Access:
        """The same at an address: beyond loopback, every address of the machine is one of ours.

        Raises:
            ConfigError: as `require_safe_host`.
        """
        self.require_safe_host(host)
        return replace(self, origins=replace(self.origins, any_address=not is_loopback(host)))

    def check(self, audience: Audience, authorization: str) -> None:
        """Let a request pass or refuse it.

        Raises:
            Refusal: 401 without a known token, 403 for one that may not administer.
        """
        if audience is Audience.EVERYBODY or (audience is Audience.USERS and self.is_open):
            return
        given = authorization[len(_BEARER) :].strip() if authorization[: len(_BEARER)].lower() == _BEARER else ""
        digest = _digest(given)
        may_administer = _among(digest, self.admin_tokens)
        if not (_among(digest, self.tokens) or may_administer or self.is_open):
            raise Refusal(401, "send Authorization: Bearer with a token of this service", code="invalid_api_key")
        if audience is Audience.ADMINISTRATORS and not may_administer:
            message = "this token may ask, but not administer"
            if not self.admin_tokens:
                message = (
                    "nobody administers this service: start it with a token in "
                    f"{ADMIN_TOKENS_VARIABLE} or auth.admin_token_file"
                )
            raise Refusal(403, message, code="not_an_administrator")


class GuardedRoute(APIRoute):
    """A route that asks for a token before anything of the request is read; for administrators, if not said."""

    audience = Audience.ADMINISTRATORS

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request that matched, or refuse it."""
        authorise(scope, self.audience)
        await super().handle(scope, receive, send)


class OpenRoute(GuardedRoute):
    """What probes and browsers fetch before they can know a token; nothing of a model's answers is among it."""

    audience = Audience.EVERYBODY


class UserRoute(GuardedRoute):
    """What a token of any kind opens."""

    audience = Audience.USERS


def authorise(scope: Scope, audience: Audience) -> None:
    """Check a request's token by the application's `Access`.

    Raises:
        Refusal: as `Access.check`.
    """
    access: Access = scope["app"].state.access
    access.check(audience, Headers(scope=scope).get("authorization", ""))


def _among(digest: bytes, known: Iterable[bytes]) -> bool:
    # Every one is compared, so that the time does not tell which one was near.
    return sum([hmac.compare_digest(digest, one) for one in known]) > 0


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _digests(file: str | None, variable: str) -> tuple[bytes, ...]:
    text = os.environ.get(variable, "").replace(",", "\n")
    if file is not None:
        try:
            text += "\n" + storage.read_text(file)
        except (FileNotFoundError, StorageError):
            raise ConfigError(f"auth: the token file {file} cannot be read") from None
    tokens = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if any(len(token) < MIN_TOKEN_CHARS for token in tokens):
        raise ConfigError(f"a token of {file or variable} is shorter than {MIN_TOKEN_CHARS} characters")
    return tuple(_digest(token) for token in dict.fromkeys(tokens))
