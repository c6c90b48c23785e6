"""Pieces of work on Ray Data whose workers die, lack memory or room, or raise: one message each, and an end."""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError

from dermray import pieces, storage
from dermray.errors import CorpusError, DermRayError, ImageError, StorageError
from tests.fault.conftest import Disk
from tests.s3 import BUCKET, faulty_s3

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NAMES = [f"train-{number:05d}" for number in range(12)]
BAD = NAMES[5]
POOL = pieces.Pool(
    noun="shard",
    operator="square",
    needs={"CPU": 1.0},
    advice="raise cpus_per_task",
    otherwise="an image of it crashes a decoder",
    kept="finished shards are kept",
)
DEADLINE_S = 60


@pytest.fixture(autouse=True)
def _no_worker_is_left(ray_cluster: None) -> Iterator[None]:
    """Whatever came of the pieces, their workers give back what they had reserved."""
    yield
    # The errors that the test has held.
    gc.collect()
    wait_for_their_end()


def wait_for_their_end() -> None:
    end = time.monotonic() + DEADLINE_S
    while workers(POOL.operator):
        assert time.monotonic() < end
        time.sleep(0.05)


def numbered(names: list[str] = NAMES) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def results(work: Callable[[int], Any], names: list[str] = NAMES) -> tuple[dict[str, Any], list[str]]:
    """What each piece came to, and what was said."""
    said: list[str] = []
    return dict(pieces.run(numbered(names), work, POOL, say=said.append)), said


class Squares:
    """Counts what it does, as a worker that keeps something from piece to piece."""

    def __init__(self) -> None:
        self.num_done = 0

    def __call__(self, number: int) -> tuple[int, int, int]:
        self.num_done += 1
        return number**2, self.num_done, os.getpid()


def test_pieces_are_done_by_workers_that_stay() -> None:
    stats: list[str] = []
    found = dict(pieces.run(numbered(), Squares(), POOL, tell_stats=stats.append))
    assert {name: square for name, (square, *_) in found.items()} == {name: n**2 for name, n in numbered().items()}
    pids = {pid for *_, pid in found.values()}
    assert sum(max(done for _, done, by in found.values() if by == pid) for pid in pids) == len(NAMES)
    assert os.getpid() not in pids
    assert len(stats) == 1
    assert "MapBatches(square): 12 tasks executed" in stats[0]
    assert dict(pieces.run({}, Squares(), POOL)) == {}
    (alone,) = pieces.run({"one": 3}, Squares(), POOL)
    assert alone[1][0] == 9


class Weighty:
    """Few bytes here, and 4 MiB where it is sent."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (bytes(4 << 20),)


def test_pieces_are_pickled_one_at_a_time() -> None:
    tracemalloc.start()
    try:
        assert set(dict(pieces.run({name: Weighty() for name in NAMES}, len, POOL)).values()) == {4 << 20}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(NAMES) / 2 * (4 << 20)


def raising(number: int) -> int:
    if number == 5:
        raise CorpusError("data/train-00005.parquet is damaged; restore it")
    return number


def refusing(number: int) -> int:
    raise ImageError("truncated", f"image {number} ends early")


def broken(number: int) -> int:
    return {0: 0}[number + 1]


def test_what_the_work_raises_is_raised_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CorpusError) as raised:
        results(raising)
    assert str(raised.value) == "data/train-00005.parquet is damaged; restore it"
    with pytest.raises(ImageError, match=r"^image 0 ends early$") as refused:
        results(refusing, NAMES[:1])
    assert refused.value.reason == "truncated"
    with pytest.raises(KeyError) as bug:
        results(broken, NAMES[:1])
    assert "in broken" in bug.value.__notes__[0]
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


class KilledOnce:
    """Dies at one piece, the first time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, number: int) -> int:
        if number == 5 and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def die_at_five(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.long
def test_what_a_lost_worker_had_in_hand_is_done_by_another(tmp_path: Path) -> None:
    found, said = results(KilledOnce(tmp_path))
    assert found == numbered()
    (line,) = said
    assert line.startswith("a shard's worker is lost (ActorDiedError); others go on with the ")


@pytest.mark.long
def test_a_piece_that_kills_its_workers_is_named_once_it_was_alone(caplog: pytest.LogCaptureFixture) -> None:
    done, said = list[str](), list[str]()
    with pytest.raises(DermRayError) as raised:
        done.extend(name for name, _ in pieces.run(numbered(), die_at_five, POOL, say=said.append))
    assert counted(str(raised.value)) == (
        f"shard {BAD}: its worker died N times, also alone (ActorDiedError); it may lack memory (raise cpus_per_task), "
        "or an image of it crashes a decoder; finished shards are kept"
    )
    assert 1 <= len(said) <= 3
    # Those before it were done, each once, also those that were in hand with it.
    assert set(NAMES[:5]) <= set(done)
    assert len(done) == len(set(done))
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]
    with pytest.raises(DermRayError, match=rf"^shard {BAD}: its worker died 2 times, also alone "):
        list(pieces.run({BAD: 5}, die_at_five, POOL, say=said.append))


def counted(message: str) -> str:
    """Without the number of losses: what was in hand at the first depends on which results had come."""
    return re.sub(r"\b[2-4] times", "N times", message)


@ray.remote
def lose(error: Exception) -> None:
    raise error


class Losing:
    """Meets at one piece what Ray raises for a loss, by the way that Ray's own error takes."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, number: int) -> int:
        if number == 5:
            ray.get(lose.options(num_cpus=0, max_retries=0).remote(self.error))
        return number


@pytest.mark.long
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OutOfMemoryError("Task was killed due to the node running low on memory."),
            "its worker was killed for want of memory N times, also alone (OutOfMemoryError); it lacks memory (raise "
            "cpus_per_task)",
        ),
        (
            NodeDiedError("Task failed because the node it was running on is dead or unavailable."),
            "its node was lost N times, also alone (NodeDiedError); it may lack memory (raise cpus_per_task), or an "
            "image of it crashes a decoder",
        ),
    ],
    ids=["memory", "node"],
)
def test_a_piece_that_costs_memory_or_nodes_is_named(error: Exception, told: str) -> None:
    with pytest.raises(DermRayError) as raised:
        results(Losing(error))
    assert counted(str(raised.value)) == f"shard {BAD}: {told}; finished shards are kept"


class Writer:
    """Writes what it is given."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, number: int) -> int:
        storage.write_bytes(f"{self.folder}/{number}.bin", bytes(300 << 10))
        return number


class PlainWriter(Writer):
    """Goes past our storage, as foreign code may."""

    def __call__(self, number: int) -> int:
        Path(self.folder, f"{number}.bin").write_bytes(bytes(300 << 10))
        return number


@pytest.mark.long
def test_a_full_disk_is_one_message(disk: Disk) -> None:
    with pytest.raises(StorageError, match=rf"^{disk.path}/\d+\.bin: .*No space left on device.*; free some space"):
        results(Writer(str(disk.path)))
    with pytest.raises(StorageError, match=r"^\[Errno 28\] No space left on device$"):
        results(PlainWriter(str(disk.path)))
    disk.resize(64 << 20)
    assert results(Writer(str(disk.path)))[0] == numbered()


class StoreWriter(Writer):
    """Writes into object storage, with what a node's environment says of it."""

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__(f"s3://{BUCKET}/out")
        self.environment = environment

    def __call__(self, number: int) -> int:
        os.environ.update(self.environment)
        return super().__call__(number)


@pytest.mark.long
def test_a_store_that_refuses_is_one_message() -> None:
    with faulty_s3() as server:
        server.inject(403, 1000, method="PUT", key="out/5.bin")
        with pytest.raises(StorageError, match=rf"^s3://{BUCKET}/out/5\.bin: ") as raised:
            results(StoreWriter(server.environment))
        assert len(str(raised.value).splitlines()) == 1
        server.reset()
        assert results(StoreWriter(server.environment))[0] == numbered()


def test_a_caller_that_stops_leaves_no_worker() -> None:
    for name, _ in pieces.run(numbered(), Squares(), POOL):
        assert name in NAMES
        break


@pytest.mark.parametrize(
    ("work", "error"), [(raising, CorpusError), pytest.param(die_at_five, DermRayError, marks=pytest.mark.long)]
)
def test_workers_end_with_their_pieces_though_somebody_holds_the_error(
    work: Callable[[int], int], error: type[Exception]
) -> None:
    """As where whoever has caught it waits for a training that needs their CPUs."""
    gc.disable()
    try:
        with pytest.raises(error) as held:
            results(work)
        wait_for_their_end()
    finally:
        gc.enable()
    assert held.value.__traceback__ is not None


def workers(operator: str) -> list[psutil.Process]:
    """Processes that work on pieces."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"({operator})" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
