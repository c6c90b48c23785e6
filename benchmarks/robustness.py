"""What hostile or damaged input does: `python benchmarks/robustness.py [--seconds 15] [NAME …]`, some four minutes.

Each attack runs in a process of its own, bounded by count and by time, so that one which ends the interpreter is seen.
An input counts as answered if it is read, or refused by an error of ours with one line; every other exception, every
silent change of content and every dead process is printed as what it is. Nothing leaves 127.0.0.1.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dermray import images, object_stores, storage
from dermray.errors import DermRayError

MAX_TRIALS = 200_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
# Growth of the peak memory of what is attacked, in KiB, its imports done.
MEMORY = "memory, KiB"
# What became of an input; only the first two are right.
READ, REFUSED, OTHER, CHANGED = "read", "refused", "other exceptions", "silently changed"

Outcomes = Counter[str]


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Bytes with up to eight of them changed, and now and then cut off, repeated or stretched."""
    changed = bytearray(data)
    for place in random.integers(0, len(changed), random.integers(1, 9)):
        changed[place] = random.integers(0, 256)
    kind = random.integers(0, 8)
    if kind == 0:
        return bytes(changed[: random.integers(0, len(changed))])
    if kind == 1:
        start, stop = sorted(random.integers(0, len(changed), 2))
        return bytes(changed[:stop] + changed[start:])
    return bytes(changed)


def outcome(action: Callable[[], object], outcomes: Outcomes) -> object:
    """Run an action and count what became of it; what it returned, or None."""
    try:
        result = action()
    except DermRayError as error:
        outcomes[REFUSED if "\n" not in str(error).strip() else OTHER] += 1
        return None
    except FileNotFoundError:
        outcomes[REFUSED] += 1
        return None
    except Exception as error:
        outcomes[OTHER] += 1
        outcomes[f"{OTHER}: {type(error).__name__}: {str(error)[:60]}"] += 1
        return None
    outcomes[READ] += 1
    return result


def trials(seconds: float, outcomes: Outcomes) -> Iterator[np.random.Generator]:
    """Seeds, until the time or the count is used up; memory counts from the first one on."""
    end, before_kib = time.monotonic() + seconds, _peak_kib()
    for seed in range(MAX_TRIALS):
        if time.monotonic() > end:
            break
        yield np.random.default_rng(seed)
    outcomes[MEMORY] = _peak_kib() - before_kib


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def photograph(kind: str, side: int = 96) -> bytes:
    """A noisy picture in a format."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side + 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def attack_images(seconds: float, folder: Path) -> Outcomes:
    """Mutated pictures of every format, decoded as preparation and serving decode them."""
    outcomes: Outcomes = Counter()
    seeds = [photograph(kind) for kind in FORMATS]
    for number, random in enumerate(trials(seconds, outcomes)):
        data = mutated(seeds[number % len(seeds)], random)
        outcome(lambda data=data: images.decode(data, shorter_side=64), outcomes)
    return outcomes


def attack_archives(seconds: float, folder: Path) -> Outcomes:
    """Mutated zip and tar archives: listed, and every member read in place."""
    from dermray.raw import archives

    packed = folder / "whole.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(6):
            archive.writestr(f"folder/{number}.jpg", photograph("JPEG", 24 + number))
    plain = folder / "whole.tar"
    with tarfile.open(plain, "w") as archive:
        for number in range(6):
            content = photograph("PNG", 24 + number)
            info = tarfile.TarInfo(f"folder/{number}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    whole = [packed.read_bytes(), plain.read_bytes()]

    def read(uri: str) -> None:
        for member in archives.members(uri):
            archives.read_member(uri, member)

    outcomes: Outcomes = Counter()
    for number, random in enumerate(trials(seconds, outcomes)):
        file = folder / ("a.zip" if number % 2 == 0 else "a.tar")
        file.write_bytes(mutated(whole[number % 2], random))
        outcome(lambda file=file: read(str(file)), outcomes)
    return outcomes


def attack_tables(seconds: float, folder: Path) -> Outcomes:
    """Mutated CSV and Parquet tables."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dermray.raw.tables import parse

    rows = [f'{number}.jpg,"a caption, number {number}",nevus' for number in range(60)]
    text = ("image,caption,label\n" + "\n".join(rows) + "\n").encode()
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [f"{n}.jpg" for n in range(60)], "label": ["nevus"] * 60}), buffer)
    outcomes: Outcomes = Counter()
    for number, random in enumerate(trials(seconds, outcomes)):
        name, data = ("t.csv", text) if number % 2 == 0 else ("t.parquet", buffer.getvalue())
        changed = mutated(data, random)
        outcome(lambda name=name, data=changed: parse(name, data), outcomes)
    return outcomes


def attack_shards(seconds: float, folder: Path, *, digests: bool = True) -> Outcomes:
    """Shards of a prepared corpus with one byte changed: read as training reads them, compared with the whole."""
    import pyarrow.parquet as pq

    from dermray.corpus import shards
    from dermray.corpus.manifest import Manifest
    from tests.corpora import write_prepared_corpus

    write_prepared_corpus(folder / "corpus", 24)
    shard = Manifest.load(str(folder / "corpus")).shards[0]
    file = folder / "corpus" / shard.path
    table = pq.read_table(file, page_checksum_verification=True)
    pq.write_table(table, file, row_group_size=8, write_page_checksum=True)
    whole = file.read_bytes()
    sha256 = hashlib.sha256(whole).hexdigest() if digests else None

    def content() -> str:
        shards._open.cache_clear()
        shards._whole.clear()
        columns = ["sample_id", "image", "captions", "labels"]
        groups = [shards.read_row_group(str(file), group, columns, sha256=sha256) for group in range(3)]
        return hashlib.sha256(repr([group.to_pylist() for group in groups]).encode()).hexdigest()

    expected = content()
    outcomes: Outcomes = Counter()
    for random in trials(seconds, outcomes):
        changed = bytearray(whole)
        changed[random.integers(0, len(changed))] ^= int(random.integers(1, 256))
        file.write_bytes(changed)
        found = outcome(content, outcomes)
        if found is not None and found != expected:
            outcomes[READ] -= 1
            outcomes[CHANGED] += 1
    return outcomes


def attack_pages(seconds: float, folder: Path) -> Outcomes:
    """The same with the page checksums alone, as shards in an object store are read: `data.verify=pages`."""
    return attack_shards(seconds, folder, digests=False)


def attack_documents(seconds: float, folder: Path) -> Outcomes:
    """Crafted and mutated JSON and YAML where manifests, trees, models, checkpoints and settings are read."""
    from dermray.config import read_yaml
    from dermray.corpus.manifest import Manifest
    from dermray.corpus.ontology import Ontology
    from dermray.models.layout import read_config
    from dermray.release.gate import load_report
    from dermray.train import checkpoint

    crafted = ["[" * 100_000, '{"a":' * 50_000, "9" * 5_000, "NaN", "null", "[]", '{"root": ["root"]}', '"\\ud800"', ""]
    crafted += ["a: &a [*a, *a]", "1: 2026-02-30", "? [a]\n: b", "- " * 3_000, "\x00", "a: !!python/object:os.system x"]
    step = folder / "run" / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    readers: list[tuple[Path, Callable[[], object]]] = [
        (folder / "manifest.json", lambda: Manifest.load(str(folder))),
        (folder / "ontology.json", lambda: Ontology.load(str(folder))),
        (folder / "open_clip_config.json", lambda: read_config(str(folder))),
        (folder / "report.json", lambda: load_report(str(folder))),
        (folder / "settings.yaml", lambda: read_yaml(str(folder / "settings.yaml"))),
        (step / "manifest.json", lambda: checkpoint.load_latest(str(folder / "run"), trajectory={}, corpus_digest="")),
    ]
    whole = json.dumps({"root": ["a", "b"], "a": ["c"], "shards": [{"path": "data/x.parquet"}], "step": 1}).encode()
    outcomes: Outcomes = Counter()
    for number, random in enumerate(trials(seconds, outcomes)):
        file, read = readers[number % len(readers)]
        place = number // len(readers)
        file.write_bytes(
            crafted[place].encode("utf-8", "surrogatepass") if place < len(crafted) else mutated(whole, random)
        )
        outcome(read, outcomes)
    return outcomes


def attack_paths(seconds: float, folder: Path) -> Outcomes:
    """Rows whose image path leads out of the input: none may be read."""
    from dermray.prepare.plan import leaves_root
    from dermray.raw.fetch import ImageStore

    secret = folder / "secret.jpg"
    secret.write_bytes(b"secret")
    inner = folder / "input" / "deep"
    inner.mkdir(parents=True)
    (inner / "link.jpg").symlink_to(secret)
    (folder / "input" / "out").symlink_to(folder)
    parts = ["..", ".", "deep", "out", "link.jpg", "secret.jpg", "", "..\\", "\\..\\", "%2e%2e", "input", "a.zip!"]
    parts.append(str(folder))
    store = ImageStore(str(folder / "input"), max_bytes=1 << 20, follow_links=False)
    outcomes: Outcomes = Counter()
    for random in trials(seconds, outcomes):
        path = "/".join(parts[place] for place in random.integers(0, len(parts), random.integers(1, 7)))
        if leaves_root(path):
            outcomes[REFUSED] += 1
            continue
        fetched = outcome(lambda path=path: store.fetch(path), outcomes)
        if fetched is not None and fetched.data == b"secret":
            outcomes[READ] -= 1
            outcomes[f"{CHANGED}: {path}"] += 1
            outcomes[CHANGED] += 1
    return outcomes


def attack_uploads(seconds: float, folder: Path) -> Outcomes:
    """Writes to an S3 server that fails: each is there as it was written, or refused by name."""
    import os

    from tests.s3 import BUCKET, RESET, SLOW_DOWN, faulty_s3

    storage.FIRST_BACKOFF_S = 0.001
    object_stores.CLIENT_ATTEMPTS = 1
    outcomes: Outcomes = Counter()
    file = folder / "large.bin"
    file.write_bytes(np.random.default_rng(0).bytes(6 << 20))
    with faulty_s3() as proxy:
        os.environ.update(proxy.environment, AWS_MAX_ATTEMPTS="1", AWS_EC2_METADATA_DISABLED="true")
        faults: list[int | str] = [500, 403, 503, SLOW_DOWN, RESET]
        for number, random in enumerate(trials(seconds, outcomes)):
            uri = f"s3://{BUCKET}/robustness/{number % 16}.bin"
            data = file.read_bytes() if number % 4 == 0 else bytes(random.bytes(2_000))
            proxy.reset()
            proxy.inject(faults[number % len(faults)], int(random.integers(1, 9)), method="PUT", key="robustness")
            before = outcomes[REFUSED]
            outcome(lambda uri=uri, data=data: _written(uri, data, folder), outcomes)
            proxy.reset()
            if outcomes[REFUSED] == before and _stored(uri) != data:
                outcomes[READ] -= 1
                outcomes[CHANGED] += 1
    return outcomes


def _stored(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None


def _written(uri: str, data: bytes, folder: Path) -> None:
    if len(data) < 10_000:
        storage.write_bytes(uri, data)
        return
    with storage.staged(uri) as aside:
        aside.write_bytes(data)


def attack_http(name: str) -> Callable[[float, Path], Outcomes]:
    """An attack of `benchmarks/http_attacks.py`, whose imports nobody else waits for."""

    def attack(seconds: float, folder: Path) -> Outcomes:
        from benchmarks import http_attacks

        before_kib = _peak_kib()
        outcomes = http_attacks.ATTACKS[name](seconds, folder)
        # Those with a server of their own say what it took.
        outcomes.setdefault(MEMORY, _peak_kib() - before_kib)
        return outcomes

    return attack


ATTACKS: dict[str, Callable[[float, Path], Outcomes]] = {
    "images": attack_images,
    "archives": attack_archives,
    "tables": attack_tables,
    "shards": attack_shards,
    "pages": attack_pages,
    "documents": attack_documents,
    "paths": attack_paths,
    "uploads": attack_uploads,
    **{name: attack_http(name) for name in ("requests", "spellings", "bodies", "connections", "mixed")},
}


def main() -> int:
    """Run the attacks, each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ATTACKS)}; all without")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each attack; more finds more")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
            print(json.dumps(ATTACKS[arguments.names[0]](arguments.seconds, Path(folder))))
        return 0
    print("| attack | tried | read | refused | other exceptions | silently changed | processes lost | memory |")
    print("|---|---|---|---|---|---|---|---|")
    failures = 0
    for name in arguments.names or ATTACKS:
        outcomes, lost = _apart(name, arguments.seconds)
        tried = sum(outcomes[kind] for kind in (READ, REFUSED, OTHER, CHANGED))
        cells = " | ".join(f"{outcomes[kind]:,}" for kind in (READ, REFUSED, OTHER, CHANGED))
        print(f"| {name} | {tried:,} | {cells} | {lost} | {outcomes[MEMORY] / 1024:.0f} MB |", flush=True)
        # A footer has no checksum: what page checksums cannot see is a figure here, and no failure.
        failures += outcomes[OTHER] + lost + (outcomes[CHANGED] if name != "pages" else 0)
        for kind, count in outcomes.most_common(20):
            if ":" in kind:
                print(f"    {count:,} x {kind}", file=sys.stderr)
            elif kind.startswith("worst "):
                print(f"    {kind}: {count:,}", flush=True)
    return int(failures > 0)


def _apart(name: str, seconds: float) -> tuple[Outcomes, int]:
    """An attack in a process of its own: outcomes, processes lost."""
    command = [sys.executable, __file__, name, "--inside", "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10 * seconds + 300, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return Counter(), 1
    return Counter(json.loads(done.stdout.splitlines()[-1])), 0


if __name__ == "__main__":
    sys.exit(main())
