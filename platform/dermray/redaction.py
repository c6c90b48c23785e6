"""What may be read by others without giving a secret away: the one place that hides keys, tokens and passwords.

Everything that is printed, logged or recorded goes through `without_secrets`: what `dermray.secret_forms` knows by its
form, and whatever the environment holds under the name of a secret. Drivers call `install`; a worker of Ray does so as
it starts, where its node was told of it (`OF_RAY_NODES`), and else when it loads this, as nearly all of our code does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any
from urllib.parse import unquote

from dermray import ray_private
from dermray.secret_forms import HIDDEN, INVISIBLE, USERINFO, hide_in_lines, hide_over_lines

MIN_SECRET_CHARS = 6
# What a worker of Ray prints is passed on at the end of a line, or of so many characters.
MAX_LINE_CHARS = 64 * 2**10
MAX_DEPTH_OF_ERRORS = 8
# For the environment of a Ray node: its workers call `install` before anything else. A runtime environment of the job
# would have it so on any cluster, but each worker load Ray twice, for 0.7 s.
OF_RAY_NODES = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "dermray.redaction.install"}
_NAMES = re.compile(
    r"(?i)secret|token|passw|pwd|passphrase|credential|api_?key|access_?key|account_?key|private_?key|auth"
    r"|kennwort|contrasen|mot_?de_?passe|senha|wachtwoord"
)
# Variables of such names whose values are no secrets, or files.
_NO_SECRETS = re.compile(r"(?i)_(?:file|path|env|mode|enabled|profile|dir)$|^(?:pwd|oldpwd|ssh_auth_sock|xauthority)$")
_IN_QUERY = re.compile(r"(?i)[?&](?:sig|x-(?:amz|goog)-signature|[\w-]*(?:token|secret|password))=")


def without_secrets(text: str) -> str:
    """Text with what looks like a key, token or password, or is one of the environment's, replaced by `(hidden)`."""
    if not text:
        return text
    kept = _hide(text)
    plain = INVISIBLE.sub("", kept)
    if plain == kept:
        return kept
    # Codes and characters without a width stay where nothing behind them is a secret.
    without = _hide(plain)
    return kept if without == plain else without


def _hide(text: str) -> str:
    text = hide_over_lines(text)
    for secret in _of_environment():
        text = text.replace(secret, HIDDEN)
    return hide_in_lines(text)


def hidden(tree: Any) -> Any:
    """JSON values with every text in them (keys as well) as `without_secrets` leaves it."""
    if isinstance(tree, Mapping):
        return {_hidden_key(key): _hidden_value(key, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [hidden(value) for value in tree]
    return without_secrets(tree) if isinstance(tree, str) else tree


def _hidden_key(key: Any) -> Any:
    return without_secrets(key) if isinstance(key, str) else key


def _hidden_value(key: Any, value: Any) -> Any:
    if isinstance(value, str) and isinstance(key, str):
        # A value of a name that speaks of secrets is hidden by its name, as it is in a line of a file.
        line = without_secrets(f'{key}: "{value}"') if '"' not in value else without_secrets(f"{key}: '{value}'")
        if line.endswith((f'"{HIDDEN}"', f"'{HIDDEN}'")):
            return HIDDEN
    return hidden(value)


def without_userinfo(uri: str) -> str:
    """A URI without secrets, its user and password taken out and not replaced: the same store has the same one."""
    return without_secrets(uri).replace(f"://{HIDDEN}@", "://")


def holds_credentials(uri: str) -> bool:
    """Whether a remote URI brings a password or a signature along."""
    return "://" in uri and (":" in (USERINFO.search(uri) or [""])[0] or bool(_IN_QUERY.search(uri)))


def _of_environment() -> list[str]:
    """What variables with names of secrets hold, and passwords in those that hold URIs, longest first."""
    return _secrets_in(tuple(os.environ.items()))


@lru_cache(maxsize=4)
def _secrets_in(variables: tuple[tuple[str, str], ...]) -> list[str]:
    found: set[str] = set()
    for name, value in variables:
        if _NAMES.search(name) and not _NO_SECRETS.search(name):
            # A list of tokens may name their users: `anna:TOKEN,bert:TOKEN`.
            items = [value, *re.split(r"[,\s]+", value)]
            found.update([*items, *(item.rpartition(":")[2] for item in items)])
        match = USERINFO.search(value)
        if match is not None and ":" in match[0]:
            password = match[0].removesuffix("@").partition(":")[2]
            found.update([password, unquote(password)])
    return sorted((one for one in found if _is_telling(one)), key=len, reverse=True)


def _is_telling(value: str) -> bool:
    """Long enough, and no word or number that stands everywhere."""
    return len(value) >= MIN_SECRET_CHARS and not value.isdigit() and not os.path.exists(value)


class _Record(logging.LogRecord):
    """A log record that hides secrets whichever handler asks for its text."""

    def getMessage(self) -> str:  # noqa: N802 -- logging's own name
        return without_secrets(super().getMessage())

    def __setattr__(self, name: str, value: Any) -> None:
        # A formatter keeps the traceback that it has written here.
        super().__setattr__(name, without_secrets(value) if name == "exc_text" and value else value)


def install() -> None:
    """Have this process hide secrets in its logs, and in the tracebacks of errors that nobody caught.

    A worker process of Ray hides them in all that it prints, in the text of any traceback, and in errors that it hands
    on: Ray keeps these in the files of its session, and passes them on to the driver.
    """
    logging.setLogRecordFactory(_Record)
    sys.excepthook = _print_uncaught
    threading.excepthook = _print_uncaught_of_thread
    if ray_private.is_worker() and not isinstance(sys.stdout, _Printed):
        sys.stdout, sys.stderr = _Printed(sys.stdout), _Printed(sys.stderr)
        traceback.TracebackException.format = _format_hidden  # type: ignore[assignment,method-assign]
        errors = sys.modules["ray.exceptions"]
        errors.RayTaskError.__init__ = _hiding_cause(errors.RayTaskError.__init__)


class _Printed:
    """A text stream that hides secrets in whole lines: `print` writes each of its arguments by itself."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._begun = ""
        # Whoever is interrupted by a signal here may print in its handler.
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Pass on the lines that have come to an end."""
        with self._lock:
            lines = (self._begun + text).splitlines(keepends=True) or [""]
            ends = lines[-1].endswith(("\n", "\r")) or len(lines[-1]) > MAX_LINE_CHARS
            self._begun = "" if ends else lines.pop()
            if lines:
                self._stream.write(without_secrets("".join(lines)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write one after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Pass on the line that has not come to its end as well."""
        with self._lock:
            begun, self._begun = self._begun, ""
            self._stream.write(without_secrets(begun))
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_format = traceback.TracebackException.format


def _format_hidden(error: traceback.TracebackException, **options: Any) -> Iterator[str]:
    """In the place of the standard library's, through which every text of a traceback comes."""
    yield without_secrets("".join(_format(error, **options)))


def _hiding_cause(init: Callable[..., None]) -> Callable[..., None]:
    """In the place of the constructor of what a worker hands on as its error: Ray logs some of them as pickled."""

    def wrapped(self: Any, name: str, trace: str, cause: BaseException, *rest: Any, **named: Any) -> None:
        _hide_within(cause)
        init(self, name, trace, cause, *rest, **named)

    return wrapped


def _hide_within(error: BaseException, depth: int = 0) -> None:
    """Hide secrets in the arguments and attributes of an error, and of those inside it."""
    # One that forbids to be changed stays; one that holds itself has an end.
    with contextlib.suppress(Exception):
        error.args = tuple(_hidden_argument("", value, depth) for value in error.args)
        for name, value in vars(error).items():
            setattr(error, name, _hidden_argument(name, value, depth))


def _hidden_argument(name: str, value: Any, depth: int) -> Any:
    if isinstance(value, tuple | list) and depth < MAX_DEPTH_OF_ERRORS:
        found = [_hidden_argument(name, one, depth + 1) for one in value]
        return value if found == list(value) else type(value)(found)
    if isinstance(value, BaseException) and depth < MAX_DEPTH_OF_ERRORS:
        _hide_within(value, depth + 1)
    return _hidden_value(name, value) if isinstance(value, str | Mapping) else value


def _print_uncaught_of_thread(unhandled: threading.ExceptHookArgs) -> None:
    # A thread that exits is none that failed: Ray has its own exit so once it has lost its node.
    if not issubclass(unhandled.exc_type, SystemExit):
        _print_uncaught(unhandled.exc_type, unhandled.exc_value or unhandled.exc_type(), unhandled.exc_traceback)


def _print_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


if ray_private.is_worker():
    install()
