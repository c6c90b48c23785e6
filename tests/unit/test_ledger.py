"""One run at a time in an output: claims on a disk and on S3, of drivers that are processes of their own and that die,
stand still and wake, and what may be removed from an output."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from dermray import entry, exclusive, ledger, storage
from dermray.errors import ClaimError, StorageError
from tests import s3
from tests.unit.test_clock import jumping

DEADLINE_S = 60
# Says what it does; commits when it gets a line. Its lease and beat are those of the command line.
DRIVER = """
import sys
from dermray import entry, exclusive, ledger, storage
output, name, lease_s, wait_s = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
ledger.LEASE_S, ledger.BEAT_S, ledger.POLL_S, ledger.PATIENCE_S = lease_s, min(5.0, lease_s / 10), 0.1, 0.3
exclusive.SETTLE_S = 0.2

def main():
    with ledger.claim(output, wait_s=wait_s) as claim:
        print("claimed", flush=True)
        sys.stdin.readline()
        claim.confirm()
        storage.write_text(storage.join(output, "manifest.json"), name)
        print("committed", flush=True)
    return 0

sys.exit(entry.run_job(main))
"""


class Driver:
    """A process that claims an output and commits when it is told."""

    def __init__(self, output: str, name: str, *, lease_s: float = 60, wait_s: float = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, output, name, str(lease_s), str(wait_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until_claimed(self) -> Driver:
        assert self.process.stdout is not None
        lines = []
        while (line := self.process.stdout.readline()) != "claimed\n":
            lines.append(line)
            assert line, (lines, self.process.communicate())
        return self

    def commit(self) -> tuple[int, str, str]:
        """Tell it to commit; exit code and what it said."""
        out, err = self.process.communicate("\n", timeout=DEADLINE_S)
        return self.process.returncode, out, err


@contextlib.contextmanager
def drivers(output: str) -> Iterator[list[Driver]]:
    """What is started inside is ended."""
    started: list[Driver] = []
    try:
        yield started
    finally:
        for driver in started:
            with contextlib.suppress(ProcessLookupError):
                driver.process.kill()
            driver.process.communicate()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "POLL_S", 0.05)
    monkeypatch.setattr(ledger, "PATIENCE_S", 0.2)
    monkeypatch.setattr(exclusive, "SETTLE_S", 0.1)


@pytest.fixture(scope="module")
def store() -> Iterator[s3.FaultyProxy]:
    with s3.faulty_s3() as proxy:
        yield proxy


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.long)])
def output(
    request: pytest.FixtureRequest, tmp_path: Path, store: s3.FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> str:
    """An output on each kind of store."""
    if request.param == "disk":
        return str(tmp_path / "output")
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    storage._remote_filesystem.cache_clear()
    store.reset()
    return f"s3://{s3.BUCKET}/{tmp_path.name}"


def files(output: str) -> list[str]:
    return [storage.name_of(uri) for uri in storage.list_files(output, recursive=True)]


@pytest.mark.parametrize("output", ["disk", "s3"], indirect=True)
def test_the_second_of_two_drivers_is_refused_and_told_of_the_first(output: str) -> None:
    with drivers(output) as started:
        first = Driver(output, "first").until_claimed()
        started.append(first)
        second = Driver(output, "second")
        started.append(second)
        code, _, said = second.commit()
        assert code == ClaimError.exit_code
        assert said.count("\n") == 1
        assert f"{output} is being written by process {first.process.pid} on {os.uname().nodename} since 2" in said
        assert first.commit()[0] == 0
        assert files(output) == ["manifest.json"], "a claim that is over leaves nothing"
        third = Driver(output, "third").until_claimed()
        started.append(third)
        assert third.commit()[0] == 0
    assert storage.read_text(storage.join(output, "manifest.json")) == "third"


def test_a_driver_that_is_told_to_waits_for_the_first(output: str) -> None:
    with drivers(output) as started:
        started.append(Driver(output, "first").until_claimed())
        second = Driver(output, "second", wait_s=DEADLINE_S)
        started.append(second)
        assert second.process.stdout is not None
        assert "waiting up to 60 s" in second.process.stdout.readline()
        assert started[0].commit()[0] == 0
        assert second.until_claimed().commit()[0] == 0
    assert files(output) == ["manifest.json"]
    assert storage.read_text(storage.join(output, "manifest.json")) == "second"


def test_of_many_drivers_at_once_one_goes_on(output: str) -> None:
    with drivers(output) as started:
        started.extend(Driver(output, str(number)) for number in range(4))
        end = time.monotonic() + DEADLINE_S
        while len(left := [driver for driver in started if driver.process.poll() is None]) > 1:
            assert time.monotonic() < end
            time.sleep(0.05)
        (winner,) = left
        assert winner.until_claimed().commit()[0] == 0
        refused = [driver for driver in started if driver is not winner]
        assert [driver.process.returncode for driver in refused] == [ClaimError.exit_code] * 3
        for driver in refused:
            assert f"by process {winner.process.pid} on" in driver.process.communicate()[1]
    assert files(output) == ["manifest.json"]


def test_of_many_that_make_a_file_in_one_moment_one_has_made_it(tmp_path: Path) -> None:
    for number in range(20):
        uri = str(tmp_path / f"{number}.json")
        start = threading.Barrier(8)

        def create(name: bytes, uri: str = uri, start: threading.Barrier = start) -> bool:
            start.wait(DEADLINE_S)
            return exclusive.create(uri, name)

        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(create, (b"%d" % name for name in range(8))))
        assert made.count(True) == 1
        assert storage.read_bytes(uri) == b"%d" % made.index(True)


@pytest.mark.parametrize("output", ["s3"], indirect=True)
def test_an_object_that_is_there_is_not_made_again(output: str) -> None:
    uri = storage.join(output, "x.json")
    assert exclusive.create(uri, b"first")
    assert not exclusive.create(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_a_killed_driver_stands_in_nobodys_way(output: str) -> None:
    """Its process is gone from this machine, so nobody waits out its lease of a minute."""
    with drivers(output) as started:
        first = Driver(output, "first").until_claimed()
        started.append(first)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait(DEADLINE_S)
        assert any(name.endswith(".json") for name in files(output))
        second = Driver(output, "second")
        started.append(second)
        code, told, _ = second.until_claimed().commit()
        assert (code, told) == (0, "committed\n")
    assert files(output) == ["manifest.json"]


def test_a_frozen_driver_that_wakes_commits_nothing(output: str) -> None:
    with drivers(output) as started:
        first = Driver(output, "first", lease_s=3).until_claimed()
        started.append(first)
        first.process.send_signal(signal.SIGSTOP)
        second = Driver(output, "second", lease_s=3)
        started.append(second)
        second.until_claimed()
        # Both are there now; the first wakes before the second has committed.
        first.process.send_signal(signal.SIGCONT)
        code, told, said = first.commit()
        assert code == ClaimError.exit_code
        assert "committed" not in told
        assert f"taken over by process {second.process.pid}" in said
        assert said.count("\n") == 1
        assert "manifest.json" not in files(output)
        assert second.commit()[0] == 0
    assert storage.read_text(storage.join(output, "manifest.json")) == "second"
    assert files(output) == ["manifest.json"]


@pytest.mark.long
def test_a_frozen_driver_that_wakes_when_all_is_over_commits_nothing(tmp_path: Path) -> None:
    """Neither after the other has gone, nor when a third has a claim of the same number as its own."""
    output = str(tmp_path / "output")
    with drivers(output) as started:
        first = Driver(output, "first", lease_s=2).until_claimed()
        started.append(first)
        first.process.send_signal(signal.SIGSTOP)
        started.append(Driver(output, "second", lease_s=2).until_claimed())
        assert started[1].commit()[0] == 0
        assert files(output) == ["manifest.json"]
        third = Driver(output, "third").until_claimed()
        started.append(third)
        first.process.send_signal(signal.SIGCONT)
        code, _, said = first.commit()
        assert code == ClaimError.exit_code
        assert f"taken over by process {third.process.pid}" in said
        assert third.commit()[0] == 0
    assert storage.read_text(storage.join(output, "manifest.json")) == "third"
    assert files(output) == ["manifest.json"]


JOBS = {
    "prepare": ["source=csv", "input=nowhere"],
    "pretrain": ["corpus=nowhere", "optim.lr=2e-3"],
    "export": ["corpus=nowhere", "format=parquet", "replace=true"],
    "embed": ["corpus=nowhere", "model=nowhere/model", "replace=true"],
    "index": ["embeddings=nowhere"],
    "evaluate": ["corpus=nowhere", "model=nowhere/model"],
    "leakage": ["corpus=nowhere", "against=elsewhere"],
    "compare": ["reports=[nowhere,elsewhere]"],
    "sweep": ["corpus=nowhere", "recipe=jobs/configs/demo.yaml", "space.optim.lr={kind: uniform, low: 0.1, high: 1}"],
}


def test_every_job_that_writes_an_output_claims_it_before_anything_else(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pretrainings with another `optim.lr` among them: the second is refused before it looks at its input."""
    with drivers(output) as started:
        first = Driver(output, "first").until_claimed()
        started.append(first)
        before = [name for name in files(output) if name.endswith(".json")]
        store = tmp_path / "of-runs.db"
        common = [f"output={output}", f"tracking.uri=sqlite:///{store}"]
        for name, keys in JOBS.items():
            job = importlib.import_module(f"dermray.commands.{name}")
            assert entry.run_job(lambda job=job, keys=keys: job.main([*common, *keys])) == 1  # type: ignore[misc]
            assert not store.exists(), f"{name} tells MLflow of a run that does not begin"
            said = capsys.readouterr().err
            assert said.startswith(f"error: {output} is being written by process {first.process.pid} on "), name
            assert said.count("\n") == 1
        assert [name for name in files(output) if name.endswith(".json")] == before
        assert not ray.is_initialized()
        assert first.commit()[0] == 0


def elsewhere(output: str, **changed: object) -> ledger.Holder:
    """A claim as another host has made it, whose clock is a day ahead."""
    holder = ledger.Holder.this_process().model_copy(update={"host": "elsewhere", "machine": "another", **changed})
    storage.write_text(storage.join(output, ledger.FOLDER, "00000001.json"), holder.model_dump_json())
    return holder


@pytest.mark.parametrize(
    "clock", [pytest.param("2020-01-01 00:00:00 UTC", marks=pytest.mark.long), "2100-01-01 00:00:00 UTC"]
)
def test_whether_another_host_lives_is_seen_by_its_beat_not_by_its_clock(
    clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path)
    monkeypatch.setattr(ledger, "LEASE_S", 1.5)
    holder = elsewhere(output, since=clock)
    file = storage.join(output, ledger.FOLDER, f"{holder.token}.beat")
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.1):
            count += 1
            storage.write_text(file, str(count))

    other = threading.Thread(target=beat)
    other.start()
    try:
        with (
            pytest.raises(ClaimError, match=rf"process {os.getpid()} on elsewhere since {clock}"),
            ledger.claim(output),
        ):
            pass
        with pytest.raises(ClaimError, match="on elsewhere"), ledger.claim(output, wait_s=2):
            pass
    finally:
        ended.set()
        other.join()
    # It beats no more: after a lease it is taken for dead.
    started = time.monotonic()
    with ledger.claim(output) as claim:
        claim.confirm()
    assert time.monotonic() - started >= 1.5
    assert files(output) == []


@pytest.mark.parametrize("step_s", [-86_400.0, 86_400.0])
def test_a_wall_clock_that_is_set_neither_takes_a_claim_away_nor_keeps_it(
    step_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here and at the holder, whose files get their dates by it."""
    output = str(tmp_path)
    holder = elsewhere(output)
    beat_file = tmp_path / ledger.FOLDER / f"{holder.token}.beat"
    monkeypatch.setattr(ledger, "LEASE_S", 1.5)
    monkeypatch.setattr(time, "time", jumping(step_s))
    count, ended = itertools.count(), threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            storage.write_text(str(beat_file), str(next(count)))
            os.utime(beat_file, (time.time(), time.time()))

    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(ClaimError, match="on elsewhere"), ledger.claim(output, wait_s=3):
            pass
    finally:
        ended.set()
        other.join()
    monkeypatch.setattr(ledger, "BEAT_S", 0.1)
    with ledger.claim(output) as mine:
        before = ledger._seen_claim(output)
        while ledger._seen_claim(output) == before:
            time.sleep(0.05)
        mine.confirm()
    assert files(output) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": 3}', b"\xff\xfe", b"x" * 5000])
def test_a_claim_that_cannot_be_read_is_waited_out(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a driver leaves it that was killed, or ran out of disk, between making and writing it."""
    monkeypatch.setattr(ledger, "LEASE_S", 0.5)
    storage.write_bytes(str(tmp_path / ledger.FOLDER / "00000007.json"), content)
    with ledger.claim(str(tmp_path)) as claim:
        assert claim.number == 8
    assert files(str(tmp_path)) == []


@pytest.mark.parametrize("name", ["999999999999999.json", "00000001.json/x"])
def test_a_claim_that_nobody_can_follow_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest number there is, and a folder in a claim's place: no run may wait for ever, or fill the disk."""
    monkeypatch.setattr(ledger, "LEASE_S", 0.5)
    storage.write_text(str(tmp_path / ledger.FOLDER / name), "{}")
    with pytest.raises(ClaimError, match=rf"cannot be claimed: remove .*{ledger.FOLDER}"), ledger.claim(str(tmp_path)):
        pass


def test_a_place_where_no_folder_can_be_made_is_named() -> None:
    with pytest.raises(StorageError, match="/proc/none is no folder"), ledger.claim("/proc/none"):
        pass


def test_a_number_that_another_process_has_by_now_is_not_the_holder(tmp_path: Path) -> None:
    """The process is there, but it began later than the claim."""
    here = ledger.Holder.this_process()
    assert here.is_running
    assert not here.is_dead
    other = here.model_copy(update={"process_start": "1"})
    storage.write_text(str(tmp_path / ledger.FOLDER / "00000001.json"), other.model_dump_json())
    assert other.is_dead
    with ledger.claim(str(tmp_path)) as claim:
        assert claim.number == 2


def test_a_dead_process_that_nobody_has_buried_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        process = ledger._process(child.pid)
        assert process is not None
        holder = ledger.Holder.this_process().model_copy(update={"pid": child.pid, "process_start": process[1]})
        assert holder.is_running
        psutil.Process(child.pid).suspend()
        while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        assert not holder.is_running
        assert not holder.is_dead
        child.kill()
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert holder.is_dead
    finally:
        child.kill()
        child.communicate()
    assert holder.is_dead


def test_steps_of_a_job_are_part_of_its_claim_and_other_threads_are_not(tmp_path: Path) -> None:
    output = str(tmp_path / "output")
    refused: list[ClaimError] = []

    def other() -> None:
        try:
            with ledger.claim(output):
                pass
        except ClaimError as error:
            refused.append(error)

    with ledger.claim(output) as claim:
        with ledger.claim(f"{output}/") as again:
            assert again is claim
        claim.confirm()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert not Path(output).exists(), "a folder that was made for the claim alone goes with it"


def test_a_claim_whose_files_were_removed_is_lost(tmp_path: Path) -> None:
    with ledger.claim(str(tmp_path)) as claim:
        storage.remove(str(tmp_path / ledger.FOLDER))
        with pytest.raises(ClaimError, match="its claim was removed"):
            claim.confirm()


def test_an_output_that_cannot_be_claimed_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StorageError, match="file is no folder"), ledger.claim(str(file)):
        pass


@pytest.mark.parametrize("answers", ["ignored", pytest.param("not implemented", marks=pytest.mark.long)])
def test_a_store_without_conditional_writes_is_told_of_and_still_claimed(
    answers: str,
    store: s3.FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    storage._remote_filesystem.cache_clear()
    store.reset()
    store.conditional = answers
    output = f"s3://{s3.BUCKET}/{tmp_path.name}"
    with ledger.claim(output) as claim:
        claim.confirm()
        assert capsys.readouterr().out.count("has no conditional writes") == 1
        with drivers(output) as started:
            second = Driver(output, "second")
            started.append(second)
            code, _, said = second.commit()
            assert code == ClaimError.exit_code
            assert f"is being written by process {os.getpid()}" in said
    assert files(output) == []


@pytest.mark.parametrize("output", ["s3"], indirect=True)
def test_an_answer_that_was_lost_does_not_cost_the_claim(store: s3.FaultyProxy, output: str) -> None:
    """The store has made the object, and the repeated request finds it."""
    store.inject(s3.UNANSWERED, 1, method="PUT", key=f"{ledger.FOLDER}/00000001.json")
    with ledger.claim(output) as claim:
        claim.confirm()
    assert store.fired == 1
    store.reset()
    store.inject(503, 2, method="PUT", key=ledger.FOLDER)
    with ledger.claim(output) as claim:
        claim.confirm()
    assert store.fired == 2


LEADING_OUT = [
    "../victim",
    "/etc/x",
    "a/../../b",
    "..",
    "a/..",
    "",
    "a//b",
    "./a",
    "a\\..\\b",
    "C:x",
    "s3://b/k",
    "a\0b",
]


@pytest.mark.parametrize("name", [*LEADING_OUT, "file:///etc/x", "file:x", "a/", "https://h/x"])
def test_names_that_lead_out_of_their_folder_are_refused(name: str) -> None:
    for folder in ("/data/out", "s3://bucket/out", "file:///data/out"):
        with pytest.raises(StorageError, match="is no name of a file inside a folder") as error:
            storage.inside(folder, name)
        assert "\n" not in str(error.value)


@given(st.lists(st.text("ab.%2e~ -_:é", min_size=1, max_size=6), min_size=1, max_size=4).map("/".join))
def test_whatever_is_joined_lies_inside(name: str) -> None:
    for folder in ("/data/out", "file:///data/out"):
        try:
            uri = storage.inside(folder, name)
        except StorageError:
            continue
        assert storage.local_path(uri).is_relative_to("/data/out")
        assert str(storage.local_path(uri)) != "/data/out"


def test_removal_takes_what_is_ours_and_leaves_the_rest(tmp_path: Path) -> None:
    for name in (
        "first",
        "data/a-1.bin",
        "data/.a-2.bin.x1.part",
        "data/mine.txt",
        "deep/er/a-3.bin",
        "last",
        "else/x",
    ):
        storage.write_text(str(tmp_path / name), "")
    with ledger.claim(str(tmp_path)):
        kept = ledger.remove_ours(
            str(tmp_path),
            lambda name: name in ("first", "last") or name.rpartition("/")[2].startswith("a-"),
            first="first",
            last="last",
        )
    assert kept == ["data/mine.txt", "else/x"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        *("data", "data/mine.txt", "else", "else/x")
    ]


def test_removal_does_not_follow_a_link_to_another_folder(tmp_path: Path) -> None:
    output, victim = tmp_path / "out", tmp_path / "victim"
    for name in ("a-1.bin", "deep/a-2.bin", ".a-3.bin.x1.part"):
        storage.write_text(str(victim / name), "")
    storage.write_text(str(output / "data/a-4.bin"), "")
    (output / "linked").symlink_to(victim)
    (output / "data/more").symlink_to(victim / "deep")
    before = sorted(victim.rglob("*"))
    kept = ledger.remove_ours(str(output), lambda name: name.rpartition("/")[2].startswith("a-"))
    ledger.remove_unfinished(str(output))
    assert sorted(victim.rglob("*")) == before
    assert kept == ["data/more/a-2.bin", "linked/.a-3.bin.x1.part", "linked/a-1.bin", "linked/deep/a-2.bin"]
    assert not (output / "data/a-4.bin").exists()
