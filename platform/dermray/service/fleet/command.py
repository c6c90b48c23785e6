"""What `serve run` leaves to its application: a port of its own, and an end that finishes what was accepted.

Ray Serve stops its proxies at once when it is shut down, and with them every request that is being answered.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import click
import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException

from dermray import ray_private, redaction
from dermray.errors import ConfigError
from dermray.service.fleet.ports import require_free
from dermray.service.settings import ServeConfig

_SEEN = "dermray.command"
_FILE = "scripts.py"
# Beyond the time that a request may take.
GRACE_S = 5.0
SHUTDOWN_TIMEOUT_S = 60.0
LOOK_EVERY_S = 0.1
# Serve looks at its proxies every 2 s, not 10, and replaces one at the third failure; it does not wait until a
# replica that hangs has finished its requests; and its proxies, which have the controller's environment, are guarded.
# `serve/config.yaml` says the same.
CONTROLLER_OPTIONS = {
    "runtime_env": {
        "env_vars": {
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
            "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "dermray.service.fleet.proxy:guard",
        }
    }
}
CONTROLLER, NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"


def attend(settings: ServeConfig, gateway: str) -> None:
    """Refuse a taken port, and have the command end well; does nothing in any other process than `serve run`'s.

    Args:
        settings: `port`, and how long a request may take, which the end may take too.
        gateway: the deployment that answers.

    Raises:
        ConfigError: another program listens on the port.
    """
    context = click.get_current_context(silent=True)
    if context is None or not _is_serve_run(context.command):
        if settings.port is not None:
            raise ConfigError("port: is for `serve run serve.app:build`; here, http_options has the port")
        return
    # With --reload the builder is called again, while its own service is up.
    if _SEEN in context.meta:
        return
    context.meta[_SEEN] = True
    options = HTTPOptions() if settings.port is None else HTTPOptions(port=settings.port)
    if not _joins_a_cluster(context.params.get("address")):
        require_free(options.host or "127.0.0.1", options.port)
        # Ray starts behind this, and its processes have our environment: Serve's own hide secrets too.
        os.environ.update(redaction.OF_RAY_NODES)
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        # Once more means now.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stopped.set()
        sys.exit(0)

    # With --non-blocking the command returns, and the service stays.
    context.call_on_close(lambda: _end(settings.limits.request_timeout_s, gateway) if stopped.is_set() else None)
    signal.signal(signal.SIGINT, stop)
    # Ray sets a handler of its own for SIGTERM when it starts, under which its C++ side prints its stack.
    ray_private.after_init(lambda: signal.signal(signal.SIGTERM, stop))
    ray_private.after_init(lambda: start_serve(options))


def start_serve(options: HTTPOptions) -> None:
    """Start Serve on the connected cluster; does nothing where it runs already."""
    serve.start(http_options=options, controller_options=CONTROLLER_OPTIONS)


def stop_serve() -> None:
    """End Serve on the connected cluster, and return when it has ended.

    `serve.shutdown()` waits for a call that the controller never answers, which Ray then reports as failed.
    """
    with contextlib.suppress(ValueError):
        controller = ray.get_actor(CONTROLLER, namespace=NAMESPACE)
        with contextlib.suppress(RayActorError):
            ray.get(controller.graceful_shutdown.remote(False))
        deadline_s = time.monotonic() + SHUTDOWN_TIMEOUT_S
        while time.monotonic() < deadline_s:
            ray.get_actor(CONTROLLER, namespace=NAMESPACE)
            time.sleep(LOOK_EVERY_S)


def finish_requests(request_timeout_s: float, gateway: str) -> int:
    """Have the gateways of all applications take no more requests, and wait for those that have begun.

    Returns:
        How many were still open after `request_timeout_s`.
    """
    # In a process of its own that ends first: a handle keeps calls open at the controller, and those of a process that
    # lives would fail with it.
    asker = ray.remote(num_cpus=0)(_Asker).remote()
    try:
        return ray.get(asker.finish.remote(request_timeout_s, gateway))
    finally:
        # Held until it is gone: Ray lets an actor whose last handle is dropped wait for its open calls, and that order
        # may overtake the kill.
        gone = asker.linger.remote()
        ray.kill(asker)
        with contextlib.suppress(RayActorError, GetTimeoutError):
            ray.get(gone, timeout=SHUTDOWN_TIMEOUT_S)


class _Asker:
    def finish(self, request_timeout_s: float, gateway: str) -> int:
        asked = [
            serve.get_deployment_handle(gateway, name).broadcast("finish", request_timeout_s)
            for name, application in serve.status().applications.items()
            if gateway in application.deployments
        ]
        answers = [one.results(timeout_s=request_timeout_s + GRACE_S, return_exceptions=True) for one in asked]
        return sum(count for one in answers for count in one if isinstance(count, int))

    def linger(self) -> None:
        """Answer never: whoever waits for it learns when this process has been killed."""
        threading.Event().wait()


def _end(request_timeout_s: float, gateway: str) -> None:
    if not ray.is_initialized():
        return
    print("dermray: finishing the requests that have begun (once more to end at once)", file=sys.stderr, flush=True)
    try:
        try:
            num_left = finish_requests(request_timeout_s, gateway)
        except (RayError, RayServeException, TimeoutError) as error:
            print(f"dermray: the gateways could not be asked ({type(error).__name__})", file=sys.stderr, flush=True)
            num_left = 0
        if num_left:
            print(f"dermray: {num_left} requests were not answered in time", file=sys.stderr, flush=True)
        stop_serve()
    except KeyboardInterrupt:
        print("dermray: ended at once", file=sys.stderr, flush=True)


def _is_serve_run(command: click.Command) -> bool:
    code = getattr(command.callback, "__code__", None)
    return code is not None and command.name == "run" and Path(code.co_filename) == Path(serve.__file__).parent / _FILE


def _joins_a_cluster(address: str | None) -> bool:
    """Whether Ray will join a running cluster, whose Serve may well listen already; its gateways look then."""
    if address is not None:
        return address != "local"
    return ray_private.finds_cluster()
