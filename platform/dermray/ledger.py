"""Who writes into an output: one run at a time, and what may be removed there.

    OUTPUT/.claim/00000001.json   one file a claim, made by whoever finds no such file; never written again
    OUTPUT/.claim/TOKEN.beat      a number that its holder counts up every BEAT_S seconds

The highest number holds the output. A claim is over when its process is known to be dead (it ran on this machine), or
when its beat has stood still for LEASE_S by the clock of the run that waits: no two clocks are compared. The next run
then makes the next number; of several only one can. Who stood still and wakes sees by the higher number that its claim
has gone: it looks before every commit.

On S3 a file is made by a conditional PUT (`If-None-Match: *`). A store without them, or another kind of store, is told
of in one line: there, two runs that begin in the same second may both start, and the one that wrote first learns of
it at its next look.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermray import exclusive, storage
from dermray.errors import ClaimError, StorageError

FOLDER = ".claim"
# A run whose beat stands still for so long is taken for dead.
LEASE_S = 60.0
BEAT_S = 5.0
POLL_S = 0.5
TRY_AGAIN_S = 0.02
# A run that is just ending gets so long to let go, also when nobody asked to wait.
PATIENCE_S = 2.0
NUM_NAMED = 3
# Moments in which others are faster than this run; more of them, and what is there is no claim that ever ends.
MAX_TRIES = 50
CLAIM_NAME = re.compile(r"[0-9]{8,15}\.json")
LEFT_OVER = re.compile(rf"{CLAIM_NAME.pattern}|[0-9a-f]{{32}}\.beat")

WaitForOutput = Annotated[
    float, Field(ge=0, description="seconds to wait while another run writes into output; 0: it is refused")
]


class Holder(BaseModel):
    """Which process has made a claim; `since` is by its own clock, for people to read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    token: str = Field(pattern=r"^[0-9a-f]{32}$")
    host: str = Field(max_length=255)
    pid: int = Field(ge=1, le=2**31)
    since: str = Field(max_length=40)
    machine: str = Field("", max_length=100, description="boot and process namespace; empty: not known")
    process_start: str = Field("", max_length=30, description="ticks from the machine's boot to the process's start")

    @classmethod
    def this_process(cls) -> Holder:
        """A new claim of this process."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname()[:255],
            pid=os.getpid(),
            since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            machine=_machine(),
            process_start=(_process(os.getpid()) or ("", ""))[1],
        )

    def __str__(self) -> str:
        text = f"process {self.pid} on {self.host} since {self.since}"
        return "".join(letter if letter.isprintable() else "?" for letter in text)

    @property
    def is_here(self) -> bool:
        """Whether its process can be looked at from this one."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to have ended. Its number alone says nothing: it may be another's by now."""
        process = _process(self.pid)
        return self.is_here and (process is None or process[1] != self.process_start)

    @property
    def is_running(self) -> bool:
        """Whether its process is known to be there and not stopped."""
        process = _process(self.pid)
        return self.is_here and process is not None and process[1] == self.process_start and process[0] not in "tT"


@cache
def _machine() -> str:
    """What two processes have in common that can see each other; empty where that cannot be told (no Linux)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, str] | None:
    """State and start (in ticks since boot) of a process of this machine; None if there is none, or it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZXx" else (state, start)


@dataclass(frozen=True)
class _SeenClaim:
    """The claim with the highest number as it is seen; `holder` is None where its file cannot be read."""

    number: int
    holder: Holder | None
    beat: bytes


@dataclass(frozen=True)
class Claim:
    """The right to write into an output. Workers get a copy, to look before they commit something."""

    output: str
    number: int
    holder: Holder

    def confirm(self) -> None:
        """The last look before a commit.

        Raises:
            ClaimError: another run has taken the output over, or the claim was removed.
            StorageError: the store does not say.
        """
        found = _seen_claim(self.output)
        if found is not None and found.number == self.number and found.holder == self.holder:
            return
        by = "its claim was removed" if found is None else f"taken over by {found.holder or 'another run'}"
        raise ClaimError(
            f"{self.output} is no longer this run's ({by}): it stood still, or could not reach the output, for too "
            "long, and commits nothing more. To go on here, run the same command again"
        )

    def write_together(self, files: Mapping[str, str | Callable[[Path], object]]) -> None:
        """Publish files, by URI a text or what writes it to a local path, in order, once there is room for all.

        Raises:
            ClaimError: as `confirm`; each place keeps what it has.
            StorageError: the disk is full, may not be written to, …; likewise.
        """
        with contextlib.ExitStack() as places:
            # Left, and so published, in the opposite order.
            for uri, content in reversed(list(files.items())):
                aside = places.enter_context(storage.staged(uri))
                content(aside) if callable(content) else aside.write_text(content, "utf-8")
            self.confirm()


# Outputs that the running thread has claimed, so that a step of a job can claim what the job has claimed.
_claimed: ContextVar[Mapping[str, Claim]] = ContextVar("claimed", default={})  # noqa: B039 -- it is never changed


@contextlib.contextmanager
def claim(output: str, *, wait_s: float = 0.0) -> Iterator[Claim]:
    """Within the block no other run writes into `output`. Inside a block of the same thread it is that block's claim.

    Args:
        output: URI of a folder.
        wait_s: how long to wait for another run to end.

    Raises:
        ClaimError: another run writes into it.
        StorageError: the claim cannot be written.
    """
    uri = storage.normalise(output)
    held = _claimed.get()
    if uri in held:
        yield held[uri]
        return
    try:
        fresh = storage.is_local(uri) and not storage.exists(uri)
        mine = _acquire(uri, wait_s)
    except (NotADirectoryError, FileNotFoundError):
        raise StorageError(f"{uri} is no folder, and none can be made: give another output") from None
    token = _claimed.set({**held, uri: mine})
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(mine, ended), name="claim", daemon=True)
    heart.start()
    try:
        yield mine
    finally:
        _claimed.reset(token)
        ended.set()
        heart.join(BEAT_S)
        _release(mine, fresh)


def _acquire(output: str, wait_s: float) -> Claim:
    """Take the output as soon as nobody has it; say what is waited for."""
    started = time.monotonic()
    watch = _Watch()
    told, tries = False, 0
    while True:
        found, now = _seen_claim(output), time.monotonic()
        watch.look(found, now)
        if watch.is_over(now):
            mine = _take(output, 1 if found is None else found.number + 1)
            if mine is not None:
                return mine
            tries += 1
            if tries >= MAX_TRIES:
                claims = storage.join(output, FOLDER)
                raise ClaimError(f"{output} cannot be claimed: remove {claims} once no run writes there")
            time.sleep(TRY_AGAIN_S)
            continue
        holder = found.holder if found is not None else None
        if watch.lives and now - started >= max(wait_s, PATIENCE_S):
            raise ClaimError(
                f"{output} is being written by {holder}: end that run, give another output, or let this one wait "
                "(wait_for_output_s=SECONDS)"
            )
        if not told and (wait_s or not watch.lives):
            told = True
            last = f"up to {wait_s:g} s" if watch.lives else f"{LEASE_S:g} s at most, to see whether it lives"
            print(f"{output} is claimed by {holder or 'another run'}; waiting {last}", flush=True)
        time.sleep(POLL_S)


class _Watch:
    """What a run that wants the output has seen of the claim that is there."""

    def __init__(self) -> None:
        self.lives = False
        self._seen: _SeenClaim | None = None
        self._since = 0.0

    def look(self, found: _SeenClaim | None, now: float) -> None:
        """Take in what is there `now` (monotonic seconds)."""
        holder = found.holder if found is not None else None
        before = self._seen.holder if self._seen is not None else None
        if found != self._seen:
            self._seen, self._since = found, now
            self.lives = holder is not None and holder == before
        self.lives = self.lives or (holder is not None and holder.is_running)

    def is_over(self, now: float) -> bool:
        """Whether nobody holds the output any more."""
        if self._seen is None:
            return True
        holder = self._seen.holder
        return now - self._since >= LEASE_S or (holder is not None and holder.is_dead)


def _take(output: str, number: int) -> Claim | None:
    """Make the claim of this number; None if another run was faster."""
    mine = Claim(output, number, Holder.this_process())
    uri = _uri(output, _name(number))
    if not exclusive.create(uri, mine.holder.model_dump_json().encode()):
        return None
    found = _seen_claim(output)
    if found is None or found.number != number or found.holder != mine.holder:
        return None
    try:
        _write_beat(mine, 0)
    except StorageError:
        with contextlib.suppress(StorageError, OSError):
            exclusive.remove(uri)
        raise
    return mine


def _seen_claim(output: str) -> _SeenClaim | None:
    """The highest claim; None if there is none.

    A store may list what has gone, and not yet what is there; what it reads is true. Numbers have no gaps.
    """
    listed = sorted(
        (int(name.partition(".")[0]) for name in _names(output) if CLAIM_NAME.fullmatch(name)), reverse=True
    )
    found = next((claim for number in listed if (claim := _claim_of(output, number)) is not None), None)
    while later := _claim_of(output, found.number + 1 if found is not None else 1):
        found = later
    return found


def _claim_of(output: str, number: int) -> _SeenClaim | None:
    """The claim of a number, None if there is none or can be none; one that is damaged has no holder."""
    holder, beat = None, b""
    uri = _uri(output, _name(number))
    if not CLAIM_NAME.fullmatch(storage.name_of(uri)) or (storage.is_local(uri) and storage.local_path(uri).is_dir()):
        return None
    try:
        data = storage.read_range(uri, 0, exclusive.MAX_BYTES)
    except FileNotFoundError:
        return None
    with contextlib.suppress(FileNotFoundError, ValidationError):
        holder = Holder.model_validate_json(data)
        beat = storage.read_range(_uri(output, f"{holder.token}.beat"), 0, exclusive.MAX_BYTES)
    return _SeenClaim(number, holder, beat)


def _names(output: str) -> list[str]:
    """The files of all claims."""
    return [storage.name_of(uri) for uri in storage.list_files(storage.join(output, FOLDER))]


def _beat(mine: Claim, ended: threading.Event) -> None:
    """Count up until the claim ends or is lost. What the store refuses now it may take the next time."""
    count = 0
    while not ended.wait(BEAT_S):
        count += 1
        try:
            mine.confirm()
            _write_beat(mine, count)
        except ClaimError:
            return
        except (StorageError, OSError):
            continue


def _write_beat(mine: Claim, count: int) -> None:
    storage.write_bytes(_uri(mine.output, f"{mine.holder.token}.beat"), str(count).encode())


def _release(mine: Claim, fresh: bool) -> None:
    """Remove the claim and what killed runs have left of theirs; where the store fails, the next run waits a lease."""
    with contextlib.suppress(StorageError, OSError):
        names, own, beat = _names(mine.output), _name(mine.number), f"{mine.holder.token}.beat"
        gone = [beat]
        with contextlib.suppress(ClaimError):
            mine.confirm()
            # Of what was there before the look: a claim made since then is not ours.
            gone += [name for name in names if name not in (own, beat) and LEFT_OVER.fullmatch(finished_name(name))]
            # Last: until then the output is held.
            gone.append(own)
        for name in gone:
            exclusive.remove(_uri(mine.output, name))
        if storage.is_local(mine.output):
            os.rmdir(storage.local_path(storage.join(mine.output, FOLDER)))
            if fresh:
                os.rmdir(storage.local_path(mine.output))


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _uri(output: str, name: str) -> str:
    return storage.join(output, FOLDER, name)


def remove_ours(
    output: str,
    is_ours: Callable[[str], bool],
    *,
    keep: Collection[str] = (),
    first: str = "",
    last: str = "",
    recursive: bool = True,
) -> list[str]:
    """Remove files that this program has written and nothing names, and folders that are empty then.

    Args:
        output: URI of the folder.
        is_ours: tells by the name relative to `output`; of a file that was being written, by the name it would have.
        keep: names of files that stay.
        first: name of the file that goes before all others.
        last: name of the file that goes after them.
        recursive: false: files directly in the folder alone.

    Returns:
        The names of the files that stay because they are not ours.
    """
    names = [uri[len(output) :].lstrip("/") for uri in storage.list_files(output, recursive=recursive)]
    others = [name for name in names if name not in keep and not name.startswith(f"{FOLDER}/")]
    linked = _behind_links(output, others)
    ours = {name for name in others if name not in linked and is_ours(finished_name(name))}
    for name in sorted(ours, key=lambda name: (name == last, name != first, name)):
        storage.remove(storage.inside(output, name))
    if storage.is_local(output):
        parts = [name.split("/")[:-1] for name in ours]
        folders = {"/".join(each[:depth]) for each in parts for depth in range(1, len(each) + 1)}
        for folder in sorted(folders, reverse=True):
            with contextlib.suppress(OSError):
                os.rmdir(storage.local_path(storage.inside(output, folder)))
    return [name for name in others if name not in ours]


def remove_unfinished(output: str, *, recursive: bool = True) -> None:
    """Remove files that a killed run was writing. Call it inside a claim: nobody else writes then."""
    names = [uri[len(output) :].lstrip("/") for uri in storage.list_files(output, recursive=recursive)]
    linked = _behind_links(output, names)
    for name in names:
        if finished_name(name) != name and not name.startswith(f"{FOLDER}/") and name not in linked:
            storage.remove(storage.join(output, name))


def _behind_links(output: str, names: Collection[str]) -> set[str]:
    """Those of the files in a local folder that a linked folder brings in: they lie, and belong, elsewhere."""
    if not storage.is_local(output):
        return set()
    root = os.path.realpath(storage.local_path(output))
    folders = {name.rpartition("/")[0] for name in names} - {""}
    linked = {folder for folder in folders if os.path.realpath(f"{root}/{folder}") != f"{root}/{folder}"}
    return {name for name in names if name.rpartition("/")[0] in linked}


def finished_name(name: str) -> str:
    """The name that a file will have when it is written: of `a/.b.parquet.x1y2.part` it is `a/b.parquet`."""
    folder, slash, last = name.rpartition("/")
    match = re.fullmatch(rf"\.(.+)\.[a-z0-9_-]+{re.escape(storage.PART)}", last)
    return f"{folder}{slash}{match[1]}" if match else name


def say_kept(output: str, names: list[str]) -> None:
    """Tell of files that stay in an output because nobody here wrote them."""
    if names:
        more = ", …" if len(names) > NUM_NAMED else ""
        shown = ", ".join(repr(name) for name in names[:NUM_NAMED])
        print(f"{output} keeps {len(names):,} files that are not of this program's making: {shown}{more}", flush=True)
