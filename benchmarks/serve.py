"""Serving over HTTP on loopback: `python benchmarks/serve.py [model=ViT-B-32] [seconds=6] [rounds=3] [clients=16]`.

JPEG in, vectors out, random weights. In turns, in one run, on the same cores: the bare encoder fed ready batches; the
service as two deployments, in one process and in a process a core behind Ray's HAProxy; and a plain FastAPI server with
open_clip that makes one forward pass a request (once in threads, once on the event loop: the better one counts). Then,
on the fastest form of the service: latency alone and at half of saturation, and classify over embeddings with a cached
class list. The load generator shares the cores with the server, as everything else does.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dermray import entry

ROOT = Path(__file__).resolve().parent.parent
LABELS = [f"skin condition number {number}" for number in range(100)]
NUM_IMAGES = 32
BATCH_SIZE = 32
# Forms of the service: arguments, environment.
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
NUM_CORES = os.cpu_count() or 1
FORMS: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "two deployments": ({"num_cpus": NUM_CORES}, {}),
    "one process behind HAProxy": ({"single_process": True, "num_cpus": NUM_CORES}, HAPROXY),
    "a process a core behind HAProxy": ({"single_process": True, "num_replicas": NUM_CORES, "num_cpus": 1}, HAPROXY),
}
# The same application over the same engine on uvicorn alone: what is lost to Ray's way in.
WITHOUT_RAY = "uvicorn without Ray"
# HAProxy listens on every address, so the service wants tokens.
TOKEN = "a-token-for-the-benchmark"
PLAIN = ("plain, threads", "plain, event loop")


@dataclass
class Options:
    """What the command line may change."""

    model: str = "ViT-B-32"
    seconds: float = 6.0
    rounds: int = 3
    clients: int = 16
    # shorter and longer side of the photographs
    side: int = 450
    forms: list[str] = field(default_factory=lambda: [*FORMS, WITHOUT_RAY])


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        return serve_form(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    if sys.argv[1:2] == ["--plain"]:
        return serve_plain(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    options = read_options(sys.argv[1:])
    num_threads = NUM_CORES
    photographs = [photograph(seed, options.side) for seed in range(NUM_IMAGES)]
    print(
        f"{options.model}, {num_threads} cores, {options.clients} clients, JPEGs of {options.side} pixels", flush=True
    )
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(started("--serve", name, options.model)) for name in options.forms}
        servers |= {name: stack.enter_context(started("--plain", name, options.model)) for name in PLAIN}
        ports = {name: port for name, server in servers.items() if (port := server()) is not None}
        options.forms = [name for name in options.forms if name in ports]
        saturated(options, photographs, ports, num_threads)
    return 0


def read_options(arguments: Sequence[str]) -> Options:
    options = Options()
    for argument in arguments:
        key, _, text = argument.partition("=")
        kind = type(getattr(options, key))
        setattr(options, key, text.split(",") if kind is list else kind(text))
    return options


def saturated(options: Options, photographs: list[bytes], ports: dict[str, int], num_threads: int) -> None:
    """Throughput of all sides in turns, then the latencies of the fastest form of the service."""
    bodies = [embeddings_request([one]) for one in photographs]
    lists = [embeddings_request(photographs[at : at + 8]) for at in range(0, len(photographs), 8)]
    bare = bare_encoder(options.model, photographs, num_threads)
    for port in ports.values():
        asyncio.run(load(port, bodies, options.clients, 2.0))
    rates: dict[str, list[float]] = {"bare encoder": [], **{name: [] for name in ports}}
    grouped: dict[str, list[float]] = {name: [] for name in options.forms}
    p99: dict[str, list[float]] = {name: [] for name in ports}
    for number in range(options.rounds):
        rates["bare encoder"].append(bare(options.seconds))
        for name, port in ports.items():
            done = asyncio.run(load(port, bodies, options.clients, options.seconds))
            rates[name].append(done.rate)
            p99[name].append(done.percentile(99))
        for name in options.forms:
            done = asyncio.run(load(ports[name], lists, options.clients // 4, options.seconds / 2))
            grouped[name].append(8 * done.rate)
        found = ", ".join(f"{name} {measured[-1]:.1f}" for name, measured in rates.items())
        print(f"  round {number + 1} of {options.rounds}, images/s: {found}", flush=True)
    reference = statistics.median(rates["bare encoder"])
    print(f"bare encoder                     {reference:7.1f} images/s", flush=True)
    for name in ports:
        rate, worst = statistics.median(rates[name]), statistics.median(p99[name])
        line = f"{name:<32} {rate:7.1f} images/s, {rate / reference:.2f} of bare, p99 {worst * 1000:.0f} ms"
        if name in grouped:
            rate = statistics.median(grouped[name])
            line += f"; eight images a request: {rate:.1f} images/s, {rate / reference:.2f} of bare"
        print(line, flush=True)
    best = max(options.forms, key=lambda name: statistics.median(rates[name]))
    plain = max((name for name in PLAIN if name in ports), key=lambda name: statistics.median(rates[name]))
    over = statistics.median(ours / theirs for ours, theirs in zip(rates[best], rates[plain], strict=True))
    print(f"{best} over {plain}: {over:.2f} times the throughput", flush=True)
    latencies(ports[best], bodies, photographs, options, statistics.median(rates[best]))


def latencies(port: int, bodies: list[bytes], photographs: list[bytes], options: Options, rate: float) -> None:
    """Alone, at half of saturation, and classify over embeddings."""
    classifying = [classify_request(one) for one in photographs]
    asyncio.run(load(port, classifying, 1, 2.0))
    alone, ratios = [], []
    for _ in range(options.rounds):
        image = asyncio.run(load(port, bodies, 1, options.seconds / 2))
        ranked = asyncio.run(load(port, classifying, 1, options.seconds / 2))
        alone += image.seconds
        ratios.append(statistics.median(ranked.seconds) / statistics.median(image.seconds))
    single = statistics.median(alone)
    half = asyncio.run(paced(port, bodies, rate / 2, options.seconds * options.rounds))
    print(
        f"alone: {single * 1000:.1f} ms (median); classify over embeddings: {statistics.median(ratios):.2f}", flush=True
    )
    print(
        f"at half of saturation ({rate / 2:.1f} requests/s, evenly paced): p50 {half.percentile(50) * 1000:.1f} ms, "
        f"p99 {half.percentile(99) * 1000:.1f} ms, {half.percentile(99) / single:.1f} times the single request"
    )


# ---- the sides ----


def bare_encoder(model: str, photographs: list[bytes], num_threads: int) -> Callable[[float], float]:
    """Images a second of the encoder alone, decoded batches at hand."""
    import torch

    from dermray.encoder import Encoder

    torch.set_num_threads(num_threads)
    encoder = Encoder.load(model, device="cpu")
    pixels = np.stack([encoder.preprocess(one) for one in photographs[:BATCH_SIZE]])
    encoder.encode_pixels(pixels)

    def measure(seconds: float) -> float:
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            count += len(encoder.encode_pixels(pixels))
        return count / (time.perf_counter() - began)

    return measure


def serve_form(form: str, model: str, port: int) -> int:
    """A process with one form of the service, until it is killed."""
    sys.path.insert(0, str(ROOT))
    if form == WITHOUT_RAY:
        return serve_without_ray(model, port)
    import ray
    from ray import serve

    from serve.app import build

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"model": model, "device": "cpu", "max_batch_size": BATCH_SIZE, **FORMS[form][0]}))
    print("ready", flush=True)
    signal.pause()
    return 0


def serve_without_ray(model: str, port: int) -> int:
    """The application over an engine in this process."""
    from dermray.serving import locate
    from serve.catalogue import Catalogue, Served, Slot
    from serve.engine import Engine
    from serve.replica import LocalBackend
    from serve.routes import create_app
    from serve.settings import LimitsConfig, ServeConfig

    settings = ServeConfig(model=model, device="cpu", max_batch_size=BATCH_SIZE, num_cpus=NUM_CORES)
    engine = Engine(locate(model), settings)
    return listen(create_app(Catalogue([Slot(Served(LocalBackend(engine)))]), LimitsConfig()), port)


def listen(app: Any, port: int) -> int:
    """Serve an ASGI application until the process is killed."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            print("ready", flush=True)

    Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical")).run()
    return 0


def serve_plain(kind: str, model: str, port: int) -> int:
    """What one writes first: FastAPI, open_clip, one request, one forward pass."""
    import open_clip
    import torch
    from fastapi import Body, FastAPI

    torch.set_num_threads(os.cpu_count() or 1)
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

    return listen(app, port)


@contextlib.contextmanager
def started(role: str, name: str, model: str) -> Iterator[Callable[[], int | None]]:
    """A server in a process group of its own; yields what waits until it is ready and gives its port, or None."""
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
    command = [sys.executable, __file__, role, name, model, str(port)]
    log = Path(scratch) / "stderr"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
        )

    def wait() -> int | None:
        assert process.stdout is not None
        if any(line.strip() == b"ready" for line in process.stdout):
            return port
        print(f"{name} did not come up: {log.read_text(errors='replace')[-1500:]}", flush=True)
        return None

    try:
        yield wait
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


# ---- the load ----


@dataclass
class Done:
    """Requests of one measurement: seconds of each, and of the whole."""

    seconds: list[float]
    wall_s: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.seconds) / self.wall_s

    def percentile(self, share: float) -> float:
        """Of the seconds of a request."""
        return float(np.percentile(self.seconds, share))


async def load(port: int, bodies: list[bytes], clients: int, seconds: float) -> Done:
    """Closed loop: each client sends its next request when it has its answer."""
    turn = itertools.cycle(bodies)
    began = time.perf_counter()
    taken: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() - began < seconds:
            taken.append(await exchange(reader, writer, next(turn)))
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return Done(taken, time.perf_counter() - began)


async def paced(port: int, bodies: list[bytes], rate: float, seconds: float) -> Done:
    """Open loop: a request every 1/rate seconds, whether or not the last one is answered."""
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
    taken: list[float] = []

    async def one(body: bytes, due_s: float) -> None:
        connection = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        await exchange(*connection, body)
        taken.append(time.perf_counter() - due_s)
        idle.append(connection)

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(max(1, int(rate * seconds))):
            due_s = began + number / rate
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            group.create_task(one(bodies[number % len(bodies)], due_s))
    for _, writer in idle:
        writer.close()
    return Done(taken, time.perf_counter() - began)


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> float:
    """One request on a kept connection; seconds until its whole answer. As little work as a client can do."""
    began = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"refused: {head[:200]!r}")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    await reader.readexactly(int(fields[b"content-length"]))
    return time.perf_counter() - began


def embeddings_request(images: list[bytes]) -> bytes:
    return http_request("/v1/embeddings", {"input": [uri(one) for one in images], "encoding_format": "base64"})


def classify_request(image: bytes) -> bytes:
    return http_request("/v1/classify", {"image": uri(image), "labels": LABELS})


def http_request(path: str, body: dict) -> bytes:
    content = json.dumps(body).encode()
    fields = {"Host": "a", "Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}Content-Length: {len(content)}\r\n\r\n".encode() + content


def uri(image: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(image).decode()


def photograph(seed: int, side: int) -> bytes:
    """Smooth colour with noise, as large and as hard to decode as a photograph."""
    random = np.random.default_rng(seed)
    width = side * 4 // 3
    coarse = random.uniform(60, 220, (8, 8, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, side), Image.Resampling.BICUBIC), dtype=np.float32)
    pixels = np.clip(smooth + random.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
