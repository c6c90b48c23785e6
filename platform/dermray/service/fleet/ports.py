"""One address, one service: a port that another program listens on is refused.

Serve's proxies share their port (SO_REUSEPORT), so that the system would deal requests at random to two services, and
both would say that they are ready. Ours do not (`proxy.keep_port`), wherever Serve was started with our
`controller_options`; here it is seen earlier, and where it was not.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import psutil

from dermray.errors import ConfigError

PROXY_TITLE = "ray::ProxyActor"
_CLUSTER_ARGUMENT = "--gcs-address="
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
CONNECT_TIMEOUT_S = 1.0


def require_free(host: str, port: int) -> None:
    """Refuse an address that somebody listens on.

    Raises:
        ConfigError: a connection is accepted there, or the address cannot be had for ourselves alone.
    """
    if _answers(host, port) or (not _can_be_bound(host, port) and _is_listened_on(port)):
        raise ConfigError(
            f"port {port} of {host} is taken by another program: stop it, or choose another one (port={port + 1})"
        )


def require_first(port: int | None) -> None:
    """Refuse a port that the proxy of another Ray cluster on this machine listened on before ours.

    For a process of a running cluster, whose own proxy may listen already.

    Raises:
        ConfigError: there is such a proxy.
    """
    proxies = list(_proxies_on(port))
    cluster = _cluster_of(psutil.Process(os.getpid()))
    own = [one.create_time() for one in proxies if _cluster_of(one) == cluster]
    for proxy in proxies:
        other = _cluster_of(proxy)
        if None not in (cluster, other) and other != cluster and proxy.create_time() < min(own, default=float("inf")):
            raise ConfigError(f"port {port} is taken by another service (process {proxy.pid}): set http_options.port")


def bound_address() -> tuple[str | None, int | None]:
    """Host and port that Serve's HTTP side listens on; None where Ray does not say."""
    try:
        # There is no public way to ask from inside a replica.
        from ray.serve.context import _get_global_client

        options = _get_global_client().http_config
        return str(options.host), int(options.port)
    except (ImportError, AttributeError, RuntimeError):
        return None, None


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((_EVERYWHERE.get(host, host), port), CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _can_be_bound(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do. Without SO_REUSEPORT a listener is in the way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _is_listened_on(port: int) -> bool:
    """False when only connections of a server that has ended keep the address, for a minute."""
    try:
        listeners = [
            one.laddr for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.laddr
        ]
        return any(address.port == port for address in listeners)
    except psutil.AccessDenied:
        return True


def _proxies_on(port: int | None) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        # One that ends meanwhile, or is of another user.
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(PROXY_TITLE) and any(
                one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in process.net_connections("tcp")
            ):
                yield process


def _cluster_of(process: psutil.Process) -> str | None:
    """The address of the Ray cluster that a worker belongs to, by the arguments of the process above it."""
    with contextlib.suppress(psutil.Error):
        parent = process.parent()
        arguments = parent.cmdline() if parent is not None else []
        return next((one for one in arguments if one.lower().replace("_", "-").startswith(_CLUSTER_ARGUMENT)), None)
    return None
