"""WebDataset tars as img2dataset names them: `train/00000.tar` with `000000000.jpg`, `.json` and `.txt`.

`.txt` is the caption that comes first (a sample without one has none, and open_clip passes over it); `.json` is the
whole sample. Beside each tar lies `00000_stats.json` with img2dataset's counts.
"""

from __future__ import annotations

import io
import json
import tarfile

from dermray import storage
from dermray.corpus.exchange import to_document
from dermray.export.manifest import PartRecord
from dermray.export.parts import (
    CAPTIONS,
    SAMPLES,
    UNCAPTIONED,
    Part,
    Samples,
    key,
    publish_bytes,
    published,
    ranges,
    titles,
)
from dermray.export.settings import ExportConfig

KIND = "tar"


def plan(split: str, num_samples: int, config: ExportConfig) -> list[Part]:
    """One part a tar."""
    return [
        Part(KIND, split, index, first, last, (f"{split}/{index:05d}.tar", f"{split}/{index:05d}_stats.json"))
        for index, (first, last) in enumerate(ranges(num_samples, config.samples_per_file))
    ]


def write(part: Part, samples: Samples, config: ExportConfig) -> PartRecord:
    """Write a tar and its counts; the same bytes each time.

    Raises:
        CorpusError: a shard is gone or damaged.
        StorageError, OSError: the output cannot be written.
    """
    assert part.split is not None
    tar, stats = part.paths
    captioned = 0
    with storage.staged(storage.join(config.output, tar)) as aside:
        with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as archive:
            rows = samples.rows(part.split, part.first, part.last, samples.columns.names)
            for place, sample in enumerate(rows):
                name = key(part.index, place, config.samples_per_file)
                texts = titles(sample["captions"], config.aspects)
                captioned += bool(texts)
                document = {"key": name, "caption": texts[0] if texts else None, **to_document(sample)}
                _add(archive, f"{name}.jpg", sample["image"])
                _add(archive, f"{name}.json", json.dumps(document, ensure_ascii=False).encode())
                if texts:
                    _add(archive, f"{name}.txt", texts[0].encode())
        file = published(tar, aside)
    num_samples = part.last - part.first
    return PartRecord(
        files=(file, publish_bytes(config.output, stats, _stats(num_samples))),
        counts={SAMPLES: num_samples, CAPTIONS: captioned, UNCAPTIONED: num_samples - captioned},
    )


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    # TarInfo's own time, owner and mode are always the same.
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _stats(num_samples: int) -> bytes:
    stats = {
        "count": num_samples,
        "successes": num_samples,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        # How long it took would not be the same each time.
        "duration": 0,
        "status_dict": {"success": num_samples},
    }
    return (json.dumps(stats, indent=4) + "\n").encode()
