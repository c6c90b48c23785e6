"""Where a request may come from: host names that are ours, and pages that may change something.

A page of another site can make a browser send requests here, by a form, or by a name that its owner points at this
machine. A name is therefore one of a list; a digit address cannot be pointed elsewhere, so where the service listens
beyond loopback, every address will do.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from dermray.service.refusals import Refusal

_HOST = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Origins:
    """The names of this service, and the pages elsewhere that may ask it.

    Attributes:
        allowed_hosts: names beside loopback's, in lower case and without a port.
        cors: origins (`https://page.example`) whose scripts may ask and read answers.
        any_address: every address in digits is taken for ours; for a service that listens beyond loopback.
    """

    allowed_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    any_address: bool = False

    def check(self, method: str, headers: Headers) -> None:
        """Let a request pass or refuse it.

        Raises:
            Refusal: 421 for a host that is not ours, 403 for a page elsewhere that would change something.
        """
        hosts = headers.getlist("host")
        name = _name_of(hosts[0]) if len(hosts) == 1 else None
        if name is None or not self._is_ours(name):
            message = "the Host header names no host of this service; the key allowed_hosts lists more than loopback's"
            raise Refusal(421, message, code="unknown_host", param="Host")
        if method in _SAFE_METHODS:
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin.lower() in self.cors:
            return
        # Browsers say where a request comes from, and other programs send neither header.
        if site in ("same-origin", "none") or (site is None and (origin is None or _same_host(origin, hosts[0]))):
            return
        message = "a page of another site may not send this; the key cors lists pages that may"
        raise Refusal(403, message, code="cross_site", param="Origin")

    def _is_ours(self, name: str) -> bool:
        if is_loopback(name) or name in self.allowed_hosts:
            return True
        return self.any_address and _address(name) is not None


LOOPBACK_ALONE = Origins()


def is_loopback(host: str | None) -> bool:
    """Whether a name or an address stands for this machine alone."""
    address = _address(host or "")
    return host == "localhost" or (address is not None and address.is_loopback)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _name_of(host: str) -> str | None:
    """The name in a `Host` header, in lower case, without port, brackets and last dot; None when it is none."""
    match = _HOST.fullmatch(host)
    return match["name"].lower().strip("[]").removesuffix(".") if match is not None else None


def _same_host(origin: str, host: str) -> bool:
    # The scheme is left out: behind a proxy that speaks TLS, ours is another one.
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
