"""jobs/prepare.py under SIGKILL, of the driver and of a worker: run again, it gives what an undisturbed run gives.

Drivers are processes of their own that join the session's cluster, so that a kill costs a driver's start and no more.
The moments are drawn by a seed (DERMRAY_FAULT_SEED) and tied to how far the work has come, so that they spread over all
of a run however fast the machine is. What is left of the killed driver's tasks is not waited for: the next run begins
while Ray still ends them, and they may even finish a shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from dermray.commands import prepare as prepare_job
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.errors import DermRayError
from dermray.prepare import graph
from dermray.prepare.plan import ShardSpec
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import MadeShard, ShardMaker
from tests import raw_corpus
from tests.conftest import ROOT
from tests.raw_corpus import content

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SEED = int(os.environ.get("DERMRAY_FAULT_SEED", "3"))
DEADLINE_S = 120
NUM_IMAGES = 96


class Moment(NamedTuple):
    """When to kill: once `share` of what `stage` counts is there, and a delay after that."""

    stage: str
    share: float
    delay_s: float

    def __str__(self) -> str:
        return f"{self.stage}-{self.share:.2f}-{1000 * self.delay_s:.0f}ms"


def moments() -> list[Moment]:
    """Before the first shard, between shards, while some are written again, and around each step of the commit."""
    draw = random.Random(SEED)
    parts = 2
    return [
        Moment("announced", 1, draw.uniform(0, 1)),
        *(Moment("made", (part + draw.random()) / parts, draw.uniform(0, 0.03)) for part in range(parts)),
        Moment("amended", draw.uniform(0, 0.9), draw.uniform(0, 0.02)),
        Moment("generation", 1, draw.uniform(0, 0.005)),
        Moment("report", 1, draw.uniform(0, 0.1)),
        Moment("part of manifest", 1, 0),
        Moment("manifest", 1, 0),
    ]


# Files of which one is there when a stage has come. What a driver is writing has a name of its own.
FILES = {
    "generation": ("records/generation-*.json",),
    "report": ("report/stats.json",),
    "part of manifest": (".manifest.json.*.part", "manifest.json"),
    "manifest": ("manifest.json",),
}


def arguments(raw: Path, output: Path) -> list[str]:
    """One task at a time, so that a kill finds some shards done and others not."""
    return [
        *("source=csv", f"input={raw}", f"output={output}", "rows_per_shard=6", "split={val: 0.3}"),
        *("max_tasks=1", "tracking.enabled=false"),
    ]


def run(raw: Path, output: Path) -> str:
    """The command, in this process; returns what it says."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert prepare_job.main(arguments(raw, output)) == 0
    return told.getvalue()


@contextlib.contextmanager
def driver(raw: Path, output: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The command as a process that leads a group of its own, and the file with what it says."""
    said = output.parent / "said.txt"
    address = f"cluster.address={ray.get_runtime_context().gcs_address}"
    with said.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "prepare.py"), *arguments(raw, output), address],
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def kill_when(process: subprocess.Popen[bytes], said: Path, come: Callable[[], bool], delay_s: float = 0) -> None:
    """SIGKILL the driver's group once `come`; proves that it was running until then."""
    end = time.monotonic() + DEADLINE_S
    while not come():
        assert process.poll() is None, f"the driver ended before it could be killed: {said.read_text()}"
        assert time.monotonic() < end, f"waited {DEADLINE_S} s: {said.read_text()}"
        time.sleep(0.001)
    time.sleep(delay_s)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"the driver had ended by itself: {said.read_text()}"


def records(output: Path) -> list[Path]:
    return list((output / "records").glob("[!.]*-*-*.parquet"))


def sample_ids(output: Path) -> list[str]:
    shards = Manifest.load(str(output)).shards
    return [
        name for shard in shards for name in pq.read_table(output / shard.path, columns=["sample_id"])[0].to_pylist()
    ]


def assert_equal(output: Path, undisturbed: Path) -> None:
    """Every byte, the manifest's digest, and every sample id."""
    found, expected = content(output), content(undisturbed)
    assert found.keys() == expected.keys()
    assert [name for name, data in found.items() if data != expected[name]] == []
    assert Manifest.load(str(output)).digest == Manifest.load(str(undisturbed)).digest
    assert sample_ids(output) == sample_ids(undisturbed)


def assert_whole(output: Path) -> Manifest:
    """The committed corpus: every shard as its manifest names it, every label in its tree. A commit is read again."""
    while True:
        manifest = Manifest.load(str(output))
        try:
            for shard in manifest.shards:
                assert hashlib.sha256((output / shard.path).read_bytes()).hexdigest() == shard.sha256
        except FileNotFoundError:
            assert Manifest.load(str(output)) != manifest, "a shard of the committed corpus has gone"
            continue
        return manifest


def assert_finished_shards_are_whole(output: Path) -> None:
    """Whatever bears the name of a shard is all of it, record or not."""
    for file in (output / "data").glob("[!.]*.parquet"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert file.stem.rpartition("-")[2] == digest[:16]


@dataclass(frozen=True)
class Undisturbed:
    """A raw corpus with duplicates, and what it gives if nobody kills anything."""

    raw: Path
    output: Path
    num_made: int
    num_amended: int


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    raw_corpus.write_with_duplicates(folder / "raw", range(NUM_IMAGES))
    run(folder / "raw", folder / "corpus")
    (document,) = (folder / "corpus" / "records").glob("generation-*.json")
    generation = json.loads(document.read_text(encoding="utf-8"))
    made, final = set(generation["made"]), set(generation["final"])
    assert len(made) >= 16
    assert len(final - made) >= 10
    return Undisturbed(folder / "raw", folder / "corpus", len(made), len(final - made))


# Of the moments those between shards and of the commit itself each time; CI goes through all.
@pytest.mark.parametrize(
    "moment",
    [
        moment if moment.stage in ("amended", "part of manifest") else pytest.param(moment, marks=pytest.mark.long)
        for moment in moments()
    ],
    ids=str,
)
def test_killed_and_run_again_equals_undisturbed(undisturbed: Undisturbed, moment: Moment, tmp_path: Path) -> None:
    print(f"DERMRAY_FAULT_SEED={SEED}, {moment}")
    raw, output = undisturbed.raw, tmp_path / "corpus"
    counts = {"made": 0, "amended": undisturbed.num_made}
    last = {"made": undisturbed.num_made, "amended": undisturbed.num_amended}.get(moment.stage, 0)
    wanted = counts.get(moment.stage, 0) + max(1, int(moment.share * last))

    def come() -> bool:
        if moment.stage == "announced":
            return b"prepare: " in said.read_bytes()
        if moment.stage in counts:
            return len(records(output)) >= wanted
        return any(any(output.glob(name)) for name in FILES[moment.stage])

    with driver(raw, output) as (process, said):
        kill_when(process, said, come, moment.delay_s)
    made_at = {record: record.stat().st_mtime_ns for record in records(output)}
    assert_finished_shards_are_whole(output)
    print(f"{len(made_at)} shards finished, the output holds {sorted(file.name for file in output.glob('*'))}")
    assert (output / "manifest.json").exists() <= ("manifest" in moment.stage), "killed too late to show anything"
    told = run(raw, output)
    if "unchanged" not in told:
        found = re.search(r"(\d+) shards made, (\d+) found finished", told)
        assert found is not None
        assert int(found[2]) + undisturbed.num_amended >= len(made_at)
    assert {record: record.stat().st_mtime_ns for record in made_at} == made_at, "a finished shard was made again"
    assert_equal(output, undisturbed.output)


@pytest.fixture(scope="module")
def grown(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Another source joined that corpus: other labels, and some of the images again."""
    folder = tmp_path_factory.mktemp("grown")
    raw_corpus.write_with_duplicates(folder / "raw", range(NUM_IMAGES - 20, NUM_IMAGES + 20), label="urticaria")
    shutil.copytree(undisturbed.output, folder / "corpus")
    run(folder / "raw", folder / "corpus")
    manifest = Manifest.load(str(folder / "corpus"))
    before = Manifest.load(str(undisturbed.output))
    assert not {shard.path for shard in before.shards} <= {shard.path for shard in manifest.shards}
    return Undisturbed(folder / "raw", folder / "corpus", 0, 0)


@pytest.mark.parametrize("stage", [pytest.param("shards", marks=pytest.mark.long), "commit"])
def test_a_committed_corpus_is_whole_while_another_source_joins(
    undisturbed: Undisturbed, grown: Undisturbed, stage: str, tmp_path: Path
) -> None:
    output = tmp_path / "corpus"
    shutil.copytree(undisturbed.output, output)
    before, after = Manifest.load(str(output)), Manifest.load(str(grown.output))
    num_before = len(records(output))
    stamp = (output / "report" / "stats.json").stat().st_mtime_ns

    def come() -> bool:
        assert assert_whole(output) in (before, after)
        if stage == "shards":
            return len(records(output)) > num_before + 4
        return (output / "report" / "stats.json").stat().st_mtime_ns != stamp

    with driver(grown.raw, output) as (process, said):
        kill_when(process, said, come)
    assert assert_whole(output) in (before, after)
    run(grown.raw, output)
    assert assert_whole(output) == after
    assert_equal(output, grown.output)


def test_what_a_killed_commit_wrote_is_mended_by_the_source_that_is_there(
    undisturbed: Undisturbed, grown: Undisturbed, tmp_path: Path
) -> None:
    """Killed just before the manifest: report and tree are those of a corpus that does not exist."""
    output = tmp_path / "corpus"
    shutil.copytree(undisturbed.output, output)
    for name in ("ontology.json", *(f"report/{file.name}" for file in (grown.output / "report").iterdir())):
        shutil.copy(grown.output / name, output / name)
    run(undisturbed.raw, output)
    assert_equal(output, undisturbed.output)
    run(grown.raw, output)
    shutil.copy(undisturbed.output / "ontology.json", output)
    shutil.copy(undisturbed.output / "report" / "stats.json", output / "report")
    assert "unchanged" in run(undisturbed.raw, output)
    assert_equal(output, grown.output)
    assert "urticaria" in Ontology.load(str(output))


def kill_a_worker(title: str, stopped: threading.Event, killed: list[psutil.Process]) -> None:
    """SIGKILL one of Ray's workers while it works on a piece of that title. Stopped first, it cannot end the piece."""
    while not stopped.wait(0.005):
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] != [title]:
                    continue
                process.suspend()
                if process.cmdline()[:1] == [title]:
                    process.kill()
                    killed.extend(psutil.wait_procs([process], timeout=DEADLINE_S)[0])
                    return
                process.resume()
            except psutil.NoSuchProcess:
                continue


def test_a_killed_worker_costs_nothing(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw_corpus.write(raw, num_good=36)
    for number in range(36):
        (raw / "images" / f"{number:03d}.jpg").write_bytes(raw_corpus.photograph(number, 1600, 1200))
    run(raw, tmp_path / "undisturbed" / "corpus")
    killed: list[psutil.Process] = []
    stopped = threading.Event()
    killer = threading.Thread(
        target=kill_a_worker, args=("ray::MapWorker(MapBatches(make_shard)).submit", stopped, killed)
    )
    killer.start()
    try:
        run(raw, tmp_path / "killed" / "corpus")
    finally:
        stopped.set()
        killer.join()
    assert len(killed) == 1, "no worker was killed while it made a shard"
    assert_equal(tmp_path / "killed" / "corpus", tmp_path / "undisturbed" / "corpus")


class Dying(ShardMaker):
    """As a decoder that crashes on an image does."""

    def make(self, spec: ShardSpec, *, needs_file: bool = False) -> MadeShard:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_shard_that_kills_its_worker_each_time_is_named(tmp_path: Path) -> None:
    config = PrepareConfig(source="csv", input=str(tmp_path), output=str(tmp_path / "corpus"))
    spec = ShardSpec("train", 7, pa.table({"image": ["a.jpg"]}))
    told = r"shard train-00007: its worker died 2 times, also alone .* crashes a decoder; .*run the same command again"
    with pytest.raises(DermRayError, match=told):
        list(graph.make_shards(config, [spec], Dying(config, Ontology({"root": ["nevus"]}))))
