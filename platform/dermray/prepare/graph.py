"""Ray's side of preparation: one item and one task a shard, for making shards and for writing them again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import pyarrow as pa
import ray
import ray.data

from dermray.errors import DermRayError, StorageError
from dermray.prepare.amend import Amender
from dermray.prepare.plan import ShardSpec
from dermray.prepare.progress import Progress
from dermray.prepare.reconcile import Amendment, Output, Ref
from dermray.prepare.records import ShardRecord
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import Made, ShardMaker


def make_shards(
    config: PrepareConfig, specs: Sequence[ShardSpec], maker: ShardMaker, *, needs_files: bool = False
) -> Iterator[Made]:
    """Make shards, or find them made, in the order in which they are done.

    Raises:
        StorageError: the input or the output fails for good.
    """
    counter = _ImageCounter.remote()  # type: ignore[attr-defined]
    items = [_packed_spec(spec) for spec in specs]
    answers = _run(config, items, _make_shard, {"maker": maker, "counter": counter, "needs_files": needs_files})
    progress = Progress(
        num_shards=len(specs),
        num_images=sum(len(set(spec.rows["image"].to_pylist())) for spec in specs),
        images_done=lambda: ray.get(counter.total.remote()),
    )
    with progress:
        for answer in answers:
            progress.shards_done += 1
            yield Made(ShardRecord.from_bytes(answer["record"]), answer["fresh"], json.loads(answer["seconds"]))


def amend_shards(config: PrepareConfig, amendments: Sequence[Amendment]) -> Iterator[ShardRecord]:
    """Write amended shards, in the order in which they are done.

    Raises:
        StorageError: the output fails for good.
    """
    amender = Amender(config.output, config.row_group_size)
    for answer in _run(config, [_packed_amendment(each) for each in amendments], _amend_shard, {"amender": amender}):
        yield ShardRecord.from_bytes(answer["record"])


def _run(
    config: PrepareConfig, items: list[dict[str, Any]], task: Callable[..., dict[str, Any]], arguments: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    answers = ray.data.from_items(items, override_num_blocks=len(items)).map(
        task,
        fn_kwargs=arguments,
        num_cpus=config.cpus_per_task,
        compute=ray.data.TaskPoolStrategy(size=config.max_tasks),
    )
    for answer in answers.iter_rows():
        if answer["error"]:
            raise StorageError(f"{answer['error']}; finished shards are kept: run the same command again to go on")
        yield answer


def _make_shard(item: dict[str, Any], *, maker: ShardMaker, counter: Any, needs_files: bool) -> dict[str, Any]:
    spec = ShardSpec(item["split"], item["index"], _table(item["rows"]))
    # The cores are shared out by Ray; OpenCV would take them all for each task.
    cv2.setNumThreads(1)
    return _answer(spec.name, lambda: maker.make(spec, counter.add.remote, needs_file=needs_files))


def _amend_shard(item: dict[str, Any], *, amender: Amender) -> dict[str, Any]:
    amendment = _unpacked_amendment(item)
    return _answer(amendment.key, lambda: Made(amender.make(amendment), True, {}))


def _answer(name: str, work: Callable[[], Made]) -> dict[str, Any]:
    """A full disk or a failing store is an answer, not a lost task that Ray tries again."""
    try:
        record, fresh, seconds = work()
    except (DermRayError, OSError) as error:
        return {"record": b"", "fresh": False, "seconds": "{}", "error": f"shard {name}: {error}"}
    return {"record": record.to_bytes(), "fresh": fresh, "seconds": json.dumps(seconds), "error": ""}


def _packed_spec(spec: ShardSpec) -> dict[str, Any]:
    return {"split": spec.split, "index": spec.index, "rows": _bytes(spec.rows)}


def _packed_amendment(amendment: Amendment) -> dict[str, Any]:
    return {
        "split": amendment.split,
        "index": amendment.index,
        "outputs": json.dumps(amendment.outputs),
        "notes": _bytes(amendment.notes),
        "origins": json.dumps(amendment.origins),
    }


def _unpacked_amendment(item: dict[str, Any]) -> Amendment:
    outputs = tuple(
        Output(Ref(*ref), tuple(Ref(*other) for other in merged), group)
        for ref, merged, group in json.loads(item["outputs"])
    )
    origins = tuple(json.loads(item["origins"]))
    return Amendment(item["split"], item["index"], outputs, _table(item["notes"]), origins)


def _bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _ImageCounter:
    """Images done, over all tasks; counts from zero again should its process die."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, count: int) -> None:
        self._total += count

    def total(self) -> int:
        return self._total
