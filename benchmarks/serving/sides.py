"""The servers that are compared, each a process: `python benchmarks/serving/sides.py NAME MODEL PORT`, until killed."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BATCH_SIZE = 32
NUM_CORES = os.cpu_count() or 1
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
THROUGHPUT = {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
# On a CPU, a replica of one core each against one that computes on all of them.
A_CORE_EACH: dict[str, object] = {"num_replicas": NUM_CORES, "num_cpus": 1}
ALL_CORES: dict[str, object] = {"num_cpus": NUM_CORES}
ONE_PROCESS: dict[str, object] = {"single_process": True}
# Forms of the service: arguments, environment.
FORMS: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "two deployments": (ALL_CORES, {}),
    "two deployments, throughput optimised": (ALL_CORES, THROUGHPUT),
    "two deployments behind HAProxy": (ALL_CORES, HAPROXY),
    "two deployments behind HAProxy, throughput optimised": (ALL_CORES, HAPROXY | THROUGHPUT),
    "two deployments, a replica a core": (A_CORE_EACH, {}),
    "one process": (ONE_PROCESS | ALL_CORES, {}),
    "one process behind HAProxy": (ONE_PROCESS | ALL_CORES, HAPROXY),
    "a process a core behind HAProxy": (ONE_PROCESS | A_CORE_EACH, HAPROXY),
}
DEFAULT_FORMS = ("two deployments", "two deployments, a replica a core", "a process a core behind HAProxy")
# The same application over the same engine on uvicorn alone: what is lost to Ray's way in.
WITHOUT_RAY = "uvicorn without Ray"
PLAIN = ("plain, threads", "plain, event loop")
INFINITY = "infinity-emb"
# HAProxy listens on every address, so the service wants tokens.
TOKEN = "a-token-for-the-benchmark"
READY = "ready"


class Server:
    """A server in a process group of its own."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.port = port
        self.pid = process.pid
        self._process = process
        self._log = log

    def wait(self) -> bool:
        """True once it answers; False, with the end of its log printed, when it did not come up."""
        assert self._process.stdout is not None
        if any(line.strip() == READY.encode() for line in self._process.stdout):
            return True
        print(f"{self.name} did not come up: {self._log.read_text(errors='replace')[-500:]}", flush=True)
        return False


@contextlib.contextmanager
def started(name: str, model: str) -> Iterator[Server]:
    """A server that is coming up; it is ended with the block."""
    port, metrics_port, stats_port = free_ports(3)
    scratch = tempfile.mkdtemp(prefix="dermray-bench-")
    environment = {**os.environ, **(FORMS[name][1] if name in FORMS else {}), "DERMRAY_SERVE_TOKENS": TOKEN}
    # Several of them run side by side on this machine.
    environment |= {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{scratch}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{scratch}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": scratch,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{scratch}/server-state",
    }
    log = Path(scratch) / "stderr"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, __file__, name, model, str(port)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        yield Server(name, port, process, log)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def main() -> None:
    name, model, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    sys.path.insert(0, str(ROOT))
    if name in PLAIN:
        serve_plain(name, model, port)
    elif name == INFINITY:
        serve_infinity(model, port)
    elif name == WITHOUT_RAY:
        serve_without_ray(model, port)
    else:
        serve_form(name, model, port)


def serve_form(form: str, model: str, port: int) -> None:
    """One form of the service, on a Ray of its own."""
    import ray
    from ray import serve

    from serve.app import build

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"model": model, "device": "cpu", "max_batch_size": BATCH_SIZE, **FORMS[form][0]}))
    print(READY, flush=True)
    signal.pause()


def serve_without_ray(model: str, port: int) -> None:
    """The application over an engine in this process."""
    from dermray.predict import locate
    from dermray.service.engine.engine import Engine
    from dermray.service.fleet.catalogue import Catalogue, Served, Slot
    from dermray.service.fleet.replica import LocalBackend
    from dermray.service.http.routes import create_app
    from dermray.service.settings import LimitsConfig, ServeConfig

    settings = ServeConfig(model=model, device="cpu", max_batch_size=BATCH_SIZE, num_cpus=NUM_CORES)
    engine = Engine(locate(model), settings)
    listen(create_app(Catalogue([Slot(Served(LocalBackend(engine)))]), LimitsConfig()), port)


def serve_plain(kind: str, model: str, port: int) -> None:
    """What one writes first: FastAPI, open_clip, one request, one forward pass."""
    import open_clip
    import torch
    from fastapi import Body, FastAPI

    torch.set_num_threads(NUM_CORES)
    network, _, transform = open_clip.create_model_and_transforms(model)
    network.eval()
    app = FastAPI()

    def answer(body: dict) -> dict:
        data = base64.b64decode(body["input"][0].partition(",")[2])
        pixels = transform(Image.open(io.BytesIO(data)).convert("RGB"))[None]
        with torch.inference_mode():
            vector = network.encode_image(pixels, normalize=True)[0]
        return {"embedding": vector.tolist()}

    if kind == "plain, threads":

        @app.post("/v1/embeddings")
        def in_threads(body: dict = Body()) -> dict:  # noqa: B008
            return answer(body)

    else:

        @app.post("/v1/embeddings")
        async def on_the_loop(body: dict = Body()) -> dict:  # noqa: B008
            return answer(body)

    listen(app, port)


def serve_infinity(where: str, port: int) -> None:
    """infinity-emb of an environment of its own: `PYTHON:MODEL`, a model in Hugging Face's layout."""
    python, _, model = where.partition(":")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
    options = ["--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--url-prefix", "/v1"]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    program = "from infinity_emb.cli import cli; cli()"
    command = [python, "-c", program, "v2", "--model-id", model, "--batch-size", str(BATCH_SIZE), *options, *address]
    server = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    while server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            print(READY, flush=True)
            server.wait()
        time.sleep(0.5)


def listen(app: Any, port: int) -> None:
    """Serve an ASGI application until the process is killed."""
    import uvicorn

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            print(READY, flush=True)

    Announcing(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical")).run()


if __name__ == "__main__":
    main()
