"""A load generator that takes as little of the cores as it can: it shares them with the server it measures."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from dataclasses import dataclass

import numpy as np


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


async def closed(port: int, bodies: list[bytes], clients: int, seconds: float) -> Done:
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


async def once(port: int, body: bytes) -> Done:
    """One request on a connection of its own, which is open before the clock runs."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds = await exchange(reader, writer, body)
    writer.close()
    return Done([seconds], seconds)


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
    """One request on a kept connection; seconds until its whole answer."""
    began = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"refused: {head[:200]!r}")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    await reader.readexactly(int(fields[b"content-length"]))
    return time.perf_counter() - began


def request(path: str, body: dict, token: str) -> bytes:
    """A whole HTTP/1.1 request."""
    content = json.dumps(body).encode()
    fields = {"Host": "a", "Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}Content-Length: {len(content)}\r\n\r\n".encode() + content


def uri(image: bytes) -> str:
    """A JPEG as a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(image).decode()
