"""Serving over HTTP on loopback: `python benchmarks/serve.py [model=ViT-B-32] [seconds=6] [rounds=3] [clients=16]`.

JPEG in, vectors out, random weights, on the same cores. First a plain FastAPI server with open_clip that makes one
forward pass a request, once in threads and once on the event loop, of which the better one stays. Then one form of the
service after the other (`forms=A;B`, names of `serving/sides.py`): in turns the bare encoder fed ready batches, the
plain server, and the form; then its latency alone and at half of saturation, and classify over embeddings with a cached
class list. The load generator shares the cores with the server that it measures: core-seconds say who used them.
`model=dermray_tiny` leaves little but the way there and back (and no plain server, which knows open_clip's models).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from serving import load
from serving.accounts import Account
from serving.sides import BATCH_SIZE, DEFAULT_FORMS, INFINITY, NUM_CORES, PLAIN, TOKEN, Server, started

from dermray import entry

LABELS = [f"skin condition number {number}" for number in range(25)]
NUM_IMAGES = 32
BARE = "bare encoder"
# Of an embedding and a ranking each.
NUM_PAIRS = 40
# Requests in a row without an outlier, after which every replica has built its classifier; and when to give up.
SETTLED, MAX_UNSETTLED = 20, 200


@dataclass
class Options:
    """What the command line may change."""

    model: str = "ViT-B-32"
    seconds: float = 6.0
    rounds: int = 3
    clients: int = 16
    # shorter and longer side of the photographs
    side: int = 450
    forms: list[str] = field(default_factory=lambda: list(DEFAULT_FORMS))
    latencies: bool = True
    # PYTHON:MODEL of infinity-emb, measured beside the others; serving/infinity_model.py makes the model
    infinity: str = ""


@dataclass
class Measured:
    """One side's figures, a round each."""

    rates: list[float] = field(default_factory=list)
    grouped: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)
    num_images: int = 0

    def add(self, rate: float, num_images: int, account: Account) -> None:
        """Keep a round."""
        self.rates.append(rate)
        self.num_images += num_images
        self.used += account.used


class Bench:
    """The work, and the sides that stay while forms of the service come and go."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.photographs = [photograph(seed, options.side) for seed in range(NUM_IMAGES)]
        self.bodies = [embeddings_request([one]) for one in self.photographs]
        self.lists = [embeddings_request(self.photographs[at : at + 8]) for at in range(0, NUM_IMAGES, 8)]
        self.bare = bare_encoder(options.model, self.photographs)
        self.plain: Server | None = None
        self.infinity: Server | None = None

    def choose_plain(self, stack: contextlib.ExitStack) -> None:
        """Start the plain servers, keep the better one."""
        rates: dict[str, float] = {}
        servers = {name: stack.enter_context(started(name, self.options.model)) for name in PLAIN}
        for name, server in servers.items():
            if server.wait():
                self.warm(server)
                rates[name] = asyncio.run(self.closed(server, self.bodies, self.options.seconds)).rate
        if rates:
            print("  " + ", ".join(f"{name} {rate:.1f} images/s" for name, rate in rates.items()), flush=True)
            self.plain = servers[max(rates, key=lambda name: rates[name])]

    def start_infinity(self, stack: contextlib.ExitStack) -> None:
        """Another server that stays."""
        server = stack.enter_context(started(INFINITY, self.options.infinity))
        if server.wait():
            self.warm(server)
            self.infinity = server

    def form(self, name: str) -> None:
        """Start one form of the service, measure it beside the others, and end it."""
        with started(name, self.options.model) as server:
            if not server.wait():
                return
            self.warm(server)
            measured = self.saturated(server)
            report(measured, name)
            if self.options.latencies:
                self.latencies(server, statistics.median(measured[name].rates))

    def saturated(self, server: Server) -> dict[str, Measured]:
        """Throughput of the three sides in turns."""
        measured: dict[str, Measured] = defaultdict(Measured)
        sides = [one for one in (self.plain, self.infinity, server) if one is not None]
        pids = {one.name: one.pid for one in sides}
        for _ in range(self.options.rounds):
            with Account.measured(None, pids) as account:
                rate, count = self.bare(self.options.seconds)
            measured[BARE].add(rate, count, account)
            for one in sides:
                with Account.measured(one.pid, pids) as account:
                    done = asyncio.run(self.closed(one, self.bodies, self.options.seconds))
                measured[one.name].add(done.rate, len(done.seconds), account)
                measured[one.name].p99.append(done.percentile(99))
            done = asyncio.run(
                load.closed(server.port, self.lists, self.options.clients // 4, self.options.seconds / 2)
            )
            measured[server.name].grouped.append(8 * done.rate)
        return measured

    def latencies(self, server: Server, rate: float) -> None:
        """Alone, at half of saturation, and classify over embeddings."""
        options, classifying = self.options, [classify_request(one) for one in self.photographs]
        settle(server.port, classifying)
        alone: list[float] = []
        ranked: list[float] = []
        # One after the other, so that both see the same machine.
        for number in range(NUM_PAIRS):
            at = number % NUM_IMAGES
            alone += asyncio.run(load.once(server.port, self.bodies[at])).seconds
            ranked += asyncio.run(load.once(server.port, classifying[at])).seconds
        single = statistics.median(alone)
        half = asyncio.run(load.paced(server.port, self.bodies, rate / 2, options.seconds * options.rounds))
        print(
            f"  alone: {single * 1000:.1f} ms (median of {len(alone)}); classify over embeddings, in turns: "
            f"{statistics.median(ranked) / single:.2f}\n"
            f"  at half of saturation ({rate / 2:.1f} requests/s, evenly paced, {len(half.seconds)} requests): "
            f"p50 {half.percentile(50) * 1000:.1f} ms, p99 {half.percentile(99) * 1000:.1f} ms, "
            f"{half.percentile(99) / single:.1f} times the single request",
            flush=True,
        )

    def warm(self, server: Server) -> None:
        """Let every thread and connection have been used once."""
        asyncio.run(self.closed(server, self.bodies, 2.0))

    def closed(self, server: Server, bodies: list[bytes], seconds: float) -> Coroutine[Any, Any, load.Done]:
        """The load of all clients."""
        return load.closed(server.port, bodies, self.options.clients, seconds)


def main() -> int:
    options = read_options(sys.argv[1:])
    bench = Bench(options)
    kib = statistics.mean(len(one) for one in bench.photographs) / 1024
    work = f"JPEGs of {options.side} pixels ({kib:.0f} KiB)"
    print(f"{options.model}, {NUM_CORES} cores, {options.clients} clients, {work}", flush=True)
    with contextlib.ExitStack() as stack:
        if not options.model.startswith("dermray"):
            bench.choose_plain(stack)
        if options.infinity:
            bench.start_infinity(stack)
        for name in options.forms:
            bench.form(name)
    return 0


def read_options(arguments: Sequence[str]) -> Options:
    options = Options()
    for argument in arguments:
        key, _, text = argument.partition("=")
        kind = type(getattr(options, key))
        setattr(options, key, text.split(";") if kind is list else text == "true" if kind is bool else kind(text))
    return options


def report(measured: dict[str, Measured], form: str) -> None:
    """Images a second, over the bare encoder and the other servers of the same round, and who used the cores."""
    for name, one in measured.items():
        line = f"{name}: {statistics.median(one.rates):.1f} images/s"
        if name != BARE:
            line += f", {over(one.rates, measured[BARE].rates)} of bare, p99 {statistics.median(one.p99) * 1000:.0f} ms"
        others = [other for other in measured if name == form and other not in (BARE, form)]
        line += "".join(f", {over(one.rates, measured[other].rates)} of {other}" for other in others)
        if one.grouped:
            line += f"; eight images a request {over(one.grouped, measured[BARE].rates)} of bare"
        roles = ", ".join(f"{role} {1000 * used / one.num_images:.1f}" for role, used in one.used.most_common())
        print(f"{line}\n  core-ms an image: {roles}", flush=True)


def over(ours: list[float], theirs: list[float]) -> str:
    """Median over the rounds, and the rounds."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(rounds):.2f} ({', '.join(f'{one:.2f}' for one in rounds)})"


def settle(port: int, classifying: list[bytes]) -> None:
    """Ask until every replica has built its classifier."""
    recent: list[float] = []
    while len(recent) < SETTLED or (max(recent[-SETTLED:]) > 2 * min(recent) and len(recent) < MAX_UNSETTLED):
        recent += asyncio.run(load.once(port, classifying[len(recent) % len(classifying)])).seconds


def bare_encoder(model: str, photographs: list[bytes]) -> Callable[[float], tuple[float, int]]:
    """Images a second, and their number, of the encoder alone, decoded batches at hand."""
    import torch

    from dermray.vectors.encoder import Encoder

    torch.set_num_threads(NUM_CORES)
    encoder = Encoder.load(model, device="cpu")
    pixels = np.stack([encoder.preprocess(one) for one in photographs[:BATCH_SIZE]])
    encoder.encode_pixels(pixels)

    def measure(seconds: float) -> tuple[float, int]:
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            count += len(encoder.encode_pixels(pixels))
        return count / (time.perf_counter() - began), count

    return measure


def embeddings_request(images: list[bytes]) -> bytes:
    body = {"input": [load.uri(one) for one in images], "encoding_format": "base64", "modality": "image"}
    return load.request("/v1/embeddings", body, TOKEN)


def classify_request(image: bytes) -> bytes:
    return load.request("/v1/classify", {"image": load.uri(image), "labels": LABELS}, TOKEN)


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
