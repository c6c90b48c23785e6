"""Independent pieces of work on Ray Data: shards, parts, row groups, whatever can be done anywhere and in any order.

    pieces ─▶ from_items, one block a piece ─▶ map_batches on a pool of actors ─▶ results as they come

The work is a callable that travels to each worker once and stays there, so it may keep what is dear to load. An error
that it raises is an answer, and the driver raises it as it is. What Ray loses (a worker, one that is killed for want of
memory, a node) ends a dataset, and another one goes on with what is missing: Ray's own repetition has no end and does
not tell which piece it was. Pieces that were in hand when a worker was lost are suspects; after a second time each of
them is tried alone, and one that loses its worker there as well is named.
"""

from __future__ import annotations

import gc
import pickle
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import pyarrow as pa
import ray.data
from ray import cloudpickle
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.annotations import RayDeprecationWarning

from dermray import cluster, interrupts, redaction
from dermray.errors import DermRayError, StorageError
from dermray.progress import Say, print_line

PieceT = TypeVar("PieceT")
ResultT = TypeVar("ResultT")

# Pieces that a worker has in hand, the one that it works on included, so that it never waits for the driver.
IN_HAND = 2
# How often a piece may have been in hand when a worker was lost before it is tried alone.
ALONE_AFTER = 2
# What Ray raises for what it has lost; siblings, not one class.
_LOSSES = (WorkerCrashedError, RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
# Ray has no class of its own for an actor whose node is gone, only these words.
_NODE_IS_GONE = "its node has died"


@dataclass(frozen=True)
class Pool:
    """Workers of one kind.

    Attributes:
        noun: what a piece is, for messages: "shard".
        worker: what does one: "encoder"; empty: the piece's worker.
        operator: the work's name in Ray's dashboard and in the names of its processes: "make_shard".
        needs: logical resources (`CPU`, `GPU`) that each worker reserves.
        size: workers, also if some of them have to wait for room; empty: as many as fit, more when the cluster grows.
        limit: with `size` empty, workers at most.
        advice: which keys give a piece more memory or need less: "raise cpus_per_task".
        otherwise: what else may have ended the worker of a piece again and again.
        kept: what is not lost by an error, and how to go on.
    """

    noun: str
    operator: str
    worker: str = ""
    needs: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    size: int | None = None
    limit: int | None = None
    advice: str = ""
    otherwise: str = ""
    kept: str = "what is finished is kept: run the same command again to go on"

    @classmethod
    def of_models(cls, worker: str, num_workers: int | None, *, noun: str, operator: str, kept: str) -> Pool:
        """Workers with a model each, of which `batch_size` decides the memory.

        Args:
            worker, noun, operator, kept: as the attributes.
            num_workers: empty: one per GPU, else one per two logical CPUs of the connected cluster. A GPU that joins is
                used; the cores of a node that joins may be wanted for other things.
        """
        num_gpus = cluster.num_gpus()
        return cls(
            noun=noun,
            operator=operator,
            worker=worker,
            needs={"CPU": 1.0, "GPU": 1.0 if num_gpus else 0.0},
            size=num_workers or (None if num_gpus else max(1, int(cluster.num_cpus() // 2))),
            advice="lower batch_size",
            kept=kept,
        )

    @property
    def of_worker(self) -> str:
        """What a worker is called."""
        return self.worker or f"{self.noun}'s worker"

    def waits_for(self) -> Callable[[], str]:
        """What progress says is waited for."""
        return cluster.waiting(cluster.in_words(self.of_worker, self.needs))

    def num_workers(self, num_pieces: int) -> int:
        """Workers to begin with, for so many pieces."""
        return max(1, min(num_pieces, self.size or min(self._num_fitting(), self.limit or num_pieces)))

    def _num_fitting(self) -> int:
        there = {"CPU": cluster.num_cpus(), "GPU": cluster.num_gpus()}
        return min(int(there[name] / amount + 1e-9) for name, amount in self.needs.items() if amount)


class _Lost(NamedTuple):
    """What Ray has lost, and why a piece may have brought that about."""

    kind: str
    what: str
    why: str


def run(
    pieces: Mapping[str, PieceT],
    work: Callable[[PieceT], ResultT],
    pool: Pool,
    *,
    say: Say = print_line,
    tell_stats: Callable[[str], None] = lambda stats: None,
) -> Iterator[tuple[str, ResultT]]:
    """Do pieces on the connected Ray cluster; gives the name and the result of each as soon as it is done.

    A caller that stops early leaves it to the workers to end what they have begun; no more is handed out.

    Args:
        pieces: picklable, by names for messages, in the order in which they are handed out.
        work: does one; picklable, with the results and errors it gives. A worker keeps one copy for all its pieces.
        pool: of workers.
        say: takes a line when something is lost.
        tell_stats: takes Ray Data's own account (`Dataset.stats`), once for each dataset.

    Raises:
        DermRayError: a piece lost its worker again and again, also alone.
        StorageError: the work met an `OSError`, such as a full disk.
        Exception: what the work raises, as it is; a note holds the worker's traceback.
    """
    left, num_lost = dict(pieces), Counter[str]()
    while left:
        suspects = [name for name in left if num_lost[name] >= ALONE_AFTER]
        names = suspects or list(left)
        alone = bool(suspects) or len(names) == 1
        num_workers = 1 if alone else pool.num_workers(len(names))
        try:
            dataset = _dataset({name: left[name] for name in names}, work, pool, alone)
            for name, result in _results(dataset, tell_stats):
                del left[name]
                yield name, result
        except Exception as error:
            lost = _what_is_lost(error)
            if lost is None or interrupts.loss() is not None:
                raise
            # They are handed out in their order, so the first of those that are left were in hand.
            in_hand = 1 if alone else IN_HAND * max(num_workers, pool.num_workers(len(names)))
            held = [name for name in names if name in left][:in_hand]
            num_lost.update(held)
            if alone and num_lost[held[0]] >= ALONE_AFTER:
                raise _named(pool, held[0], lost, num_lost[held[0]]) from _without_frames(error)
            say(_told(pool, lost, len(left)))


def _dataset(pieces: Mapping[str, Any], work: Callable[[Any], Any], pool: Pool, alone: bool) -> ray.data.Dataset:
    """Names and answers of pieces, not begun yet; one after the other if they are to be `alone`."""
    size = 1 if alone else pool.num_workers(len(pieces))
    grows = pool.size is None and not alone
    dataset = ray.data.from_items(cast(list[Any], _Pickled(pieces)), override_num_blocks=len(pieces))
    dataset.set_name(pool.operator)
    context = dataset.context
    # Of this dataset alone: pieces have progress of their own, and what dies at its start is not tried again unseen.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    context.max_consecutive_actor_init_deaths = 0
    context.raise_original_map_exception = True
    strategy = ray.data.ActorPoolStrategy(
        min_size=1 if grows else size,
        initial_size=size,
        max_size=min(len(pieces), pool.limit or len(pieces)) if grows else size,
        max_tasks_in_flight_per_actor=1 if alone else IN_HAND,
    )
    with warnings.catch_warnings():
        # Ray 2.60 wants named parameters, and has none for restarts.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
        return dataset.map_batches(
            type(pool.operator, (_Worker,), {}),
            fn_constructor_args=(work,),
            batch_size=1,
            batch_format="pyarrow",
            compute=strategy,
            num_cpus=pool.needs.get("CPU", 0.0),
            num_gpus=pool.needs.get("GPU", 0.0),
            max_restarts=0,
            max_task_retries=0,
        )


class _Pickled(Sequence[dict[str, Any]]):
    """Pieces as Ray Data's rows, each pickled when it is asked for.

    `from_items` puts one after the other into Ray's store, which spills to disk by itself, so that this process never
    holds more than one pickled piece.
    """

    def __init__(self, pieces: Mapping[str, Any]) -> None:
        self._names, self._pieces = list(pieces), pieces

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, place: Any) -> Any:
        name = self._names[place]
        return {"name": name, "piece": cloudpickle.dumps(self._pieces[name])}


def _results(dataset: ray.data.Dataset, tell_stats: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    """Have a dataset done; names and results as they come."""
    bundles = dataset.iter_internal_ref_bundles()
    bundle = None
    try:
        for bundle in bundles:
            for name, answer in _answers(bundle):
                yield name, _result(answer)
        tell_stats(dataset.stats())
    finally:
        # Ray Data ends its workers once nobody can ask for more, nor for what they have given again. The traceback of
        # an error holds this frame, and whoever catches it may wait for their CPUs; Ray's executor lies in a circle.
        del bundles, bundle
        gc.collect()


def _answers(bundle: Any) -> list[tuple[str, bytes]]:
    rows = (row for entry in bundle.blocks for row in ray.get(entry.ref).to_pylist())
    return [(row["name"], row["answer"]) for row in rows]


class _Worker:
    """Ray's side: one piece in, one answer out."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        redaction.install()
        self._work = work

    def __call__(self, batch: pa.Table) -> pa.Table:
        answers = [_answer(self._work, piece) for piece in batch["piece"].to_pylist()]
        return pa.table({"name": batch["name"], "answer": pa.array(answers, type=pa.large_binary())})


def _answer(work: Callable[[Any], Any], piece: bytes) -> bytes:
    """The pickled result and error of a piece, one of which is None. What Ray has lost meanwhile is left to Ray."""
    try:
        return cloudpickle.dumps((work(pickle.loads(piece)), None))
    except (DermRayError, *_LOSSES) as error:
        if isinstance(error, _LOSSES):
            raise
        return cloudpickle.dumps((None, error))
    except OSError as error:
        return cloudpickle.dumps((None, StorageError(str(error))))
    except Exception as error:
        error.add_note(traceback.format_exc())
        return cloudpickle.dumps((None, error))


def _result(answer: bytes) -> Any:
    result, error = pickle.loads(answer)
    if error is not None:
        raise error
    return result


def _what_is_lost(error: BaseException) -> _Lost | None:
    """What Ray has lost; None for an error of the work."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if not isinstance(error, _LOSSES):
        return None
    kind = type(error).__name__
    if isinstance(error, OutOfMemoryError):
        return _Lost(kind, "worker was killed for want of memory", "it lacks memory")
    if isinstance(error, NodeDiedError | ObjectLostError) or _NODE_IS_GONE in str(error):
        return _Lost(kind, "node was lost", "it may lack memory")
    return _Lost(kind, "worker died", "it may lack memory")


def _without_frames(error: Exception) -> Exception:
    """An error of Ray's less the places it went through, which hold the workers of its dataset and so their CPUs."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    gc.collect()
    return error


def _named(pool: Pool, name: str, lost: _Lost, num_lost: int) -> DermRayError:
    why = f"{lost.why} ({pool.advice})" if pool.advice else lost.why
    if pool.otherwise and not lost.why.startswith("it lacks"):
        why += f", or {pool.otherwise}"
    times = f"{num_lost} times, also alone ({lost.kind})"
    return DermRayError(f"{pool.noun} {name}: its {lost.what} {times}; {why}; {pool.kept}")


def _told(pool: Pool, lost: _Lost, num_left: int) -> str:
    article = "an" if pool.of_worker[0] in "aeiou" else "a"
    left = f"the {num_left:,} {pool.noun}s that are left" if num_left > 1 else f"the {pool.noun} that is left"
    return f"{article} {pool.of_worker} is lost ({lost.kind}); others go on with {left}"
