"""Who may ask: bearer tokens from the environment or files, compared in constant time.

Without any token the service answers on loopback alone. Tokens are kept as SHA-256 digests; neither the configuration
nor a log ever holds one.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass

from dermray import storage
from dermray.errors import ConfigError, StorageError
from serve.errors import Refusal
from serve.settings import AuthConfig

TOKENS_VARIABLE = "DERMRAY_SERVE_TOKENS"
ADMIN_TOKENS_VARIABLE = "DERMRAY_SERVE_ADMIN_TOKENS"
MIN_TOKEN_CHARS = 16
# What probes and browsers fetch before they can know a token; nothing of a model's answers is among it.
OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/healthz", "/readyz"})
OPEN_FOLDER = "/assets/"
ADMIN_FOLDER = "/v1/admin/"
_BEARER = "bearer "


@dataclass(frozen=True, slots=True)
class Access:
    """The digests of the tokens that open the service, and of those that may also change what is served."""

    tokens: tuple[bytes, ...] = ()
    admin_tokens: tuple[bytes, ...] = ()

    @classmethod
    def load(cls, config: AuthConfig) -> Access:
        """Read the configured files and the environment.

        Raises:
            ConfigError: a file is missing, or a token is too short.
        """
        return cls(
            _digests(config.token_file, TOKENS_VARIABLE), _digests(config.admin_token_file, ADMIN_TOKENS_VARIABLE)
        )

    @property
    def is_open(self) -> bool:
        """Nobody needs a token."""
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

    def check(self, path: str, authorization: str) -> None:
        """Let a request pass or refuse it.

        Raises:
            Refusal: 401 without a known token, 403 for a token that may not administer.
        """
        if self.is_open or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        given = authorization[len(_BEARER) :].strip() if authorization[: len(_BEARER)].lower() == _BEARER else ""
        digest = _digest(given)
        may_administer = _among(digest, self.admin_tokens)
        if not (_among(digest, self.tokens) or may_administer):
            raise Refusal(401, "send Authorization: Bearer with a token of this service", code="invalid_api_key")
        if path.startswith(ADMIN_FOLDER) and not may_administer:
            raise Refusal(403, "this token may ask, but not administer", code="not_an_administrator")


def is_loopback(host: str | None) -> bool:
    """Whether a server bound to `host` can be reached from its own machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


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
