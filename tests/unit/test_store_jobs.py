"""Whole jobs on a store that lists late, loses what is being read, or takes no credentials any more: each ends right,
or with one error that names the object; and the same command again ends right.

Jobs run in this process, see `tests.without_ray`; requests are those of a real client to a real S3 server.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dermray import exclusive, ledger, object_stores, storage
from dermray.config import parse
from dermray.corpus.shards import read_row_group
from dermray.errors import CorpusError, ModelError, StorageError
from dermray.evaluate import suite
from dermray.evaluate.settings import EvaluateConfig
from dermray.prepare import pipeline
from dermray.prepare.settings import PrepareConfig
from dermray.train.settings import PretrainConfig
from tests import raw_corpus, without_ray
from tests.corpora import write_model
from tests.s3 import BUCKET, EXPIRED, EXPIRED_403, FaultyProxy, faulty_s3

STORE = f"s3://{BUCKET}"
LASTING = 1_000_000
OUTPUTS = {"prepare": ("corpus",), "pretrain": ("run",), "evaluate": ("report", "cache")}


def prepare() -> str:
    keys = ("source=csv", f"input={STORE}/raw", f"output={STORE}/corpus", "split={val: 0.3}", "rows_per_shard=4")
    return pipeline.prepare(parse(PrepareConfig, keys)).manifest.digest


def pretrain() -> str:
    keys = (
        f"corpus={STORE}/corpus", f"output={STORE}/run", f"model={STORE}/model", "train.global_batch_size=4",
        "train.epochs=1.5", "train.checkpoint_every_steps=1", "train.keep_checkpoints=1", "optim.warmup_steps=1",
    )  # fmt: skip
    return str(without_ray.train(parse(PretrainConfig, keys))["weights_sha256"])


def evaluate() -> str:
    keys = (
        f"corpus={STORE}/corpus", f"model={STORE}/model", f"output={STORE}/report", f"cache={STORE}/cache", "split=val",
        "tasks=[zero_shot,retrieval]", "bootstrap=10",
    )  # fmt: skip
    config = parse(EvaluateConfig, keys)
    suite.check_inputs(config, model_uri=config.model)
    report = suite.evaluate(config, model_uri=config.model, say=lambda _: None)
    report.save(config.output)
    return " ".join(report.headline())


JOBS: dict[str, Callable[[], str]] = {"prepare": prepare, "pretrain": pretrain, "evaluate": evaluate}


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A store with raw rows and a model in it; no client tries again by itself."""
    folder = tmp_path_factory.mktemp("donor")
    raw_corpus.write(folder / "raw", num_good=12)
    write_model(folder / "model")
    without_ray.use(patch)
    with faulty_s3() as proxy:
        for name, value in {**proxy.environment, "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1"}.items():
            patch.setenv(name, value)
        patch.setattr(storage, "FIRST_BACKOFF_S", 0.0005)
        patch.setattr(exclusive, "SETTLE_S", 0.01)
        # The claim of a job that could not let go: its process lives on, as the test's does.
        patch.setattr(ledger, "LEASE_S", 0.3)
        patch.setattr(ledger, "POLL_S", 0.1)
        patch.setattr(object_stores, "CLIENT_ATTEMPTS", 1)
        storage._remote_filesystem.cache_clear()
        for name in ("raw", "model"):
            storage.copy_tree(folder / name, f"{STORE}/{name}")
        yield proxy
    # Batches that nobody took are given up now, while no cluster is asked to cancel them.
    gc.collect()
    storage._remote_filesystem.cache_clear()


@pytest.fixture(scope="module")
def undisturbed(store: FaultyProxy) -> dict[str, tuple[str, int]]:
    """What each job comes to where nothing goes wrong, and how many requests it takes."""
    found = {}
    for name, job in JOBS.items():
        store.reset()
        found[name] = (job(), len(store.requests))
    return found


@pytest.fixture(autouse=True)
def clean(store: FaultyProxy, undisturbed: Any) -> Iterator[None]:
    store.reset()
    yield
    store.reset()


def clear(*jobs: str) -> None:
    for job in jobs:
        for output in OUTPUTS[job]:
            storage.remove(f"{STORE}/{output}")


def whole_again(undisturbed: dict[str, tuple[str, int]], *jobs: str) -> None:
    """Outputs that a test has taken away, or that its failed jobs have left, for the tests that follow."""
    for job in jobs:
        assert JOBS[job]() == undisturbed[job][0]


@pytest.mark.parametrize(
    "lag", [pytest.param(1, marks=pytest.mark.long), 3, pytest.param(LASTING, marks=pytest.mark.long)]
)
def test_a_chain_on_a_store_that_lists_late_comes_to_the_same(
    lag: int, store: FaultyProxy, undisturbed: dict[str, tuple[str, int]]
) -> None:
    """The last changes are not in the listings yet: objects are missing there, and deleted ones are named."""
    clear(*JOBS)
    store.listing_lag = lag
    for name, job in JOBS.items():
        assert job() == undisturbed[name][0]
        # Started again at once it finds what it has written.
        assert job() == undisturbed[name][0]


@pytest.mark.parametrize(
    ("name", "key", "spared", "error"),
    [
        ("prepare", "raw/metadata.csv", 1, CorpusError),
        ("prepare", "corpus/data/train-00000", 6, CorpusError),
        pytest.param("pretrain", "corpus/data/train-00001", 1, CorpusError, marks=pytest.mark.long),
        ("evaluate", "corpus/data/val-00000", 1, CorpusError),
        ("evaluate", "model/open_clip_model.safetensors", 1, StorageError),
        ("evaluate", "model/dermray.json", 1, StorageError),
        ("evaluate", "model/open_clip_config.json", 1, ModelError),
        ("evaluate", "model/open_clip_config.json", 4, StorageError),
    ],
)
def test_what_is_deleted_while_a_job_reads_it_is_named(
    name: str,
    key: str,
    spared: int,
    error: type[Exception],
    store: FaultyProxy,
    undisturbed: dict[str, tuple[str, int]],
) -> None:
    """Gone from one request to the next."""
    clear(name)
    store.inject(404, LASTING, method="", key=key, spared=spared)
    with pytest.raises(error, match=key.rpartition("/")[0]) as caught:
        JOBS[name]()
    assert type(caught.value) is error
    assert store.fired
    assert "\n" not in str(caught.value)
    store.reset()
    whole_again(undisturbed, name)


def expire(name: str, part: float, kind: str, store: FaultyProxy, undisturbed: dict[str, tuple[str, int]]) -> None:
    """Credentials come to their end after a part of a job's requests."""
    clear(name)
    store.reset()
    store.inject(kind, LASTING, method="", key="", spared=int(part * undisturbed[name][1]))
    with pytest.raises(
        StorageError, match=r"s3://corpora/\S+: .*(?:have expired: renew them|or have expired)"
    ) as caught:
        JOBS[name]()
    assert type(caught.value) is StorageError
    assert "\n" not in str(caught.value)
    # One that is not tried again, and what follows it: the claim's end, a checkpoint behind training.
    assert store.fired <= 20
    store.reset()
    whole_again(undisturbed, name)


@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [
        ("prepare", 0.2, EXPIRED),
        ("prepare", 0.6, EXPIRED_403),
        ("pretrain", 0.35, EXPIRED),
        ("evaluate", 0.5, EXPIRED_403),
    ],
)
def test_credentials_that_expire_in_the_middle_end_a_job_by_name_and_the_next_goes_on(
    name: str, part: float, kind: str, store: FaultyProxy, undisturbed: dict[str, tuple[str, int]]
) -> None:
    expire(name, part, kind, store, undisturbed)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [EXPIRED, EXPIRED_403])
@pytest.mark.parametrize("name", JOBS)
def test_credentials_that_expire_anywhere(
    name: str, kind: str, store: FaultyProxy, undisturbed: dict[str, tuple[str, int]]
) -> None:
    for part in range(10):
        expire(name, part / 14, kind, store, undisturbed)


def test_a_store_that_refuses_is_no_damage_of_the_corpus(store: FaultyProxy) -> None:
    """Else a training would give up at the second time, where the credentials may be renewed by then."""
    (uri, *_) = storage.list_files(f"{STORE}/corpus/data")
    store.inject(EXPIRED, LASTING, method="", key=storage.name_of(uri))
    with pytest.raises(StorageError, match=storage.name_of(uri)):
        read_row_group(uri, 0, ["sample_id"])
