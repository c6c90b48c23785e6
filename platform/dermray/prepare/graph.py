"""Ray's side of preparation: shards, made and written again as pieces on Ray Data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from dermray import cluster, images, pieces
from dermray.errors import DermRayError, StorageError
from dermray.prepare.amend import Amender
from dermray.prepare.plan import ShardSpec
from dermray.prepare.reconcile import Amendment
from dermray.prepare.records import ShardRecord
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import MadeShard, ShardMaker
from dermray.prepare.sides import SideMade, SideMaker, SideRows
from dermray.progress import Progress

ResultT = TypeVar("ResultT")

# Of a table, 16 MB each, which lie in Ray's store together.
PIECES_AT_ONCE = 128
KEPT = "finished shards are kept: run the same command again to go on"


def make_shards(
    config: PrepareConfig,
    specs: Sequence[ShardSpec],
    maker: ShardMaker,
    *,
    needs_files: bool = False,
    tell_stats: Callable[[str], None] = lambda stats: None,
) -> Iterator[MadeShard]:
    """Make shards, or find them made, in the order in which they are done.

    Raises:
        DermRayError: a shard lost its worker again and again, also alone.
        StorageError: the input or the output fails for good.
    """
    num_images = sum(spec.num_images for spec in specs)
    # Small shards last: then no core waits for long on the last of another.
    largest_first = {spec.name: spec for spec in sorted(specs, key=lambda spec: -spec.num_rows)}
    work = partial(_make_shard, maker=maker, needs_file=needs_files)
    pool = _pool(config.cpus_per_task, config.max_tasks, "make_shard")
    counted = Progress("prepare", num_images, "images", pieces=(len(specs), "shards"), waits_for=pool.waits_for())
    with counted as progress:
        for _, made in pieces.run(largest_first, work, pool, tell_stats=tell_stats):
            progress.advance(made.record.num_images)
            yield made


def amend_shards(
    config: PrepareConfig, amendments: Sequence[Amendment], amender: Amender, tell_stats: Callable[[str], None]
) -> Iterator[ShardRecord]:
    """Write amended shards, in the order in which they are done.

    Raises:
        DermRayError: a shard lost its worker again and again, also alone.
        StorageError: the output fails for good.
    """
    work = partial(_amend_shard, amender=amender)
    pool = _pool(config.cpus_per_task, config.max_tasks, "amend_shard")
    named = {each.name: each for each in amendments}
    counted = Progress("prepare: written again", len(amendments), "shards", waits_for=pool.waits_for())
    with counted as progress:
        for _, record in pieces.run(named, work, pool, tell_stats=tell_stats):
            progress.advance()
            yield record


def make_sides(
    config: PrepareConfig, rows: Sequence[SideRows], tell_stats: Callable[[str], None]
) -> Iterator[tuple[str, SideMade]]:
    """Write the files of side tables, each with its name, in the order in which they are done.

    Raises:
        DermRayError: a file lost its worker again and again, also alone.
        StorageError: the input or the output fails for good.
    """
    work = partial(_make_side, maker=SideMaker(config))
    pool = _pool(config.cpus_per_task, config.max_tasks, "make_side")
    counted = Progress("prepare: side tables", len(rows), "files", waits_for=pool.waits_for())
    with counted as progress:
        for name, made in pieces.run({each.name: each for each in rows}, work, pool, tell_stats=tell_stats):
            progress.advance()
            yield name, made


def read_pieces(
    config: PrepareConfig,
    tell_stats: Callable[[str], None],
    table: Mapping[str, Any],
    work: Callable[[Any], ResultT],
) -> Iterator[tuple[str, ResultT]]:
    """Have pieces of a long table read, in the order in which they are done; connects to the cluster if nothing has.

    Raises:
        DermRayError: a piece lost its worker again and again, also alone.
        StorageError: the table cannot be read.
    """
    cluster.connect(config.cluster)
    pool = pieces.Pool(
        noun="piece of the table",
        operator="read_table",
        needs={"CPU": cluster.cpus_of_cores(config.cpus_per_task)},
        limit=config.max_tasks,
        advice="raise cpus_per_task",
        kept="nothing is written yet: run the same command again",
    )
    counted = Progress("prepare: the table", len(table), "pieces", waits_for=pool.waits_for())
    with counted as progress:
        for begin in range(0, len(table), PIECES_AT_ONCE):
            some = dict(itertools.islice(table.items(), begin, begin + PIECES_AT_ONCE))
            for name, found in pieces.run(some, work, pool, tell_stats=tell_stats):
                progress.advance()
                yield name, found


def _pool(cpus_per_task: float, max_tasks: int | None, operator: str) -> pieces.Pool:
    pool = pieces.Pool(
        noun="shard",
        operator=operator,
        needs={"CPU": cluster.cpus_of_cores(cpus_per_task)},
        limit=max_tasks,
        advice="raise cpus_per_task, lower rows_per_shard",
        otherwise="an image of it crashes a decoder",
        kept=KEPT,
    )
    cluster.require(pool.of_worker, pool.needs, advice="lower cpus_per_task")
    return pool


def _make_shard(spec: ShardSpec, *, maker: ShardMaker, needs_file: bool) -> MadeShard:
    images.use_one_core()
    return _answer(spec.name, lambda: maker.make(spec, needs_file=needs_file))


def _amend_shard(amendment: Amendment, *, amender: Amender) -> ShardRecord:
    return _answer(amendment.name, lambda: amender.make(amendment))


def _make_side(rows: SideRows, *, maker: SideMaker) -> SideMade:
    images.use_one_core()
    return _answer(rows.name, lambda: maker.make(rows))


def _answer(name: str, work: Callable[[], ResultT]) -> ResultT:
    """A full disk or a failing store names the shard that met it."""
    try:
        return work()
    except (DermRayError, OSError) as error:
        raise StorageError(f"shard {name}: {error}; {KEPT}") from None
