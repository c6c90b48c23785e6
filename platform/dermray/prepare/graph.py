"""Ray's side of preparation: one task a shard, for making shards and for writing them again.

Plain tasks in a bounded window, so that every core has its next shard waiting. Ray Data, which the searches for
duplicates use, begins with one task for a second and leaves a core idle for a tenth of a second or two after each: on
two cores that was a quarter of the time (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import WorkerCrashedError

from dermray import cluster, images
from dermray.errors import DermRayError, StorageError
from dermray.prepare.amend import Amender
from dermray.prepare.plan import ShardSpec
from dermray.prepare.progress import Progress
from dermray.prepare.reconcile import Amendment
from dermray.prepare.records import ShardRecord
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import Made, ShardMaker

# Times that a shard is begun again after its worker has died.
MAX_RETRIES = 3
# Shards handed out for each that can be at work, so that none waits for the driver.
HANDED_OUT = 2


def make_shards(
    config: PrepareConfig, specs: Sequence[ShardSpec], maker: ShardMaker, *, needs_files: bool = False
) -> Iterator[Made]:
    """Make shards, or find them made, in the order in which they are done.

    Raises:
        DermRayError: the worker of a shard died again and again.
        StorageError: the input or the output fails for good.
    """
    num_images = sum(len(set(spec.rows["image"].to_pylist())) for spec in specs)
    # Small shards last: then no core waits for long on the last of another.
    largest_first = sorted(specs, key=lambda spec: -spec.rows.num_rows)
    with Progress(num_shards=len(specs), num_images=num_images) as progress:
        for made in _run(config, _make_shard, largest_first, ray.put(maker), needs_files):
            progress.add(made.record.num_images)
            yield made


def amend_shards(config: PrepareConfig, amendments: Sequence[Amendment]) -> Iterator[ShardRecord]:
    """Write amended shards, in the order in which they are done.

    Raises:
        DermRayError: the worker of a shard died again and again.
        StorageError: the output fails for good.
    """
    amender = Amender(config.output, config.row_group_size)
    for made in _run(config, _amend_shard, amendments, amender):
        yield made.record


def _run(
    config: PrepareConfig,
    work: Callable[..., Made | str],
    items: Iterable[ShardSpec | Amendment],
    *arguments: Any,
) -> Iterator[Made]:
    """What each item comes to; what is still at work when the caller goes away is cancelled."""
    title = work.__name__.strip("_")
    cpus = cluster.cpus_of_cores(config.cpus_per_task)
    task = ray.remote(work).options(name=title, num_cpus=cpus, max_retries=MAX_RETRIES)
    running: dict[ray.ObjectRef, str] = {}
    try:
        for item in items:
            while len(running) >= _window(config, cpus):
                yield _next(running)
            running[task.remote(item, *arguments)] = item.name
        while running:
            yield _next(running)
    finally:
        for reference in running:
            ray.cancel(reference)


def _window(config: PrepareConfig, cpus_per_task: float) -> int:
    """Tasks to be under way, asked anew each time: a cluster may grow, and does so for tasks that wait."""
    return config.max_tasks or max(1, int(HANDED_OUT * cluster.num_cpus() / cpus_per_task))


def _next(running: dict[ray.ObjectRef, str]) -> Made:
    """Wait for one of the tasks and take it out."""
    (done,), _ = ray.wait(list(running))
    name = running.pop(done)
    try:
        answer = ray.get(done)
    except WorkerCrashedError as error:
        raise DermRayError(
            f"shard {name}: its worker died {MAX_RETRIES + 1} times; it may lack memory (raise cpus_per_task, lower "
            "rows_per_shard), or an image of it crashes a decoder. Finished shards are kept: run the same command "
            "again to go on"
        ) from error
    if isinstance(answer, str):
        raise StorageError(f"shard {name}: {answer}; finished shards are kept: run the same command again to go on")
    return answer


def _make_shard(spec: ShardSpec, maker: ShardMaker, needs_files: bool) -> Made | str:
    images.use_one_core()
    return _answer(lambda: maker.make(spec, needs_file=needs_files))


def _amend_shard(amendment: Amendment, amender: Amender) -> Made | str:
    return _answer(lambda: Made(amender.make(amendment), True, {}))


def _answer(work: Callable[[], Made]) -> Made | str:
    """A full disk or a failing store is an answer: what it says is the message of the driver's error."""
    try:
        return work()
    except (DermRayError, OSError) as error:
        return str(error)
