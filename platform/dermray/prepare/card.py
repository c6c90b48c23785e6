"""`README.md` of a prepared corpus: for people, and for `datasets.load_dataset`, which finds the shards by it.

Without it `datasets` reads every Parquet file below the folder, the records of preparation too, which are no samples.
"""

from __future__ import annotations

import pyarrow as pa

from dermray import storage
from dermray.corpus.manifest import Manifest
from dermray.corpus.schema import WHOLE
from dermray.prepare.shard import DATA

CARD_NAME = "README.md"
_SIGN = "Prepared by DermRay"
# What `datasets` calls otherwise than Arrow.
_DTYPES = {pa.float32(): "float32"}


def write(uri: str, manifest: Manifest) -> None:
    """Write the card of the corpus at `uri`; a README that somebody else has put there stays."""
    file = storage.join(uri, CARD_NAME)
    if storage.exists(file) and _SIGN not in storage.read_text(file):
        return
    storage.write_text(file, text(manifest))


def text(manifest: Manifest) -> str:
    """The card: which files are which split, and what an image is."""
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in manifest.splits:
        # Names of splits hold no hyphen, so that none is the beginning of another's files.
        lines += [f"  - split: {split}", f"    path: {DATA}/{split}-*.parquet"]
    if manifest.modalities:
        # Shards from before a source said it lack the column, which `datasets` then fills: it must not go by the first.
        lines += ["dataset_info:", "  features:", *(f"  {line}" for line in _features(WHOLE))]
    sizes = ", ".join(f"{count:,} {split}" for split, count in manifest.splits.items())
    lines += [
        "---",
        "",
        f"{_SIGN}: {manifest.num_samples:,} samples ({sizes}), one row an image with all its captions.",
        "",
        '`datasets.load_dataset(FOLDER).cast_column("image", datasets.Image())` shows the images, which are stored as',
        "JPEG bytes. `manifest.json` lists shards and digests; `report/report.html` tells what became of each row.",
    ]
    return "\n".join(lines) + "\n"


def _features(fields: pa.Schema | pa.StructType) -> list[str]:
    """Columns as `datasets` declares them."""
    lines = []
    for field in fields:
        kind, lists = (field.type.value_type, True) if pa.types.is_list(field.type) else (field.type, False)
        lines.append(f"- name: {field.name}")
        if pa.types.is_struct(kind):
            lines += [f"  {'list' if lists else 'struct'}:", *(f"  {line}" for line in _features(kind))]
        else:
            lines.append(f"  {'list' if lists else 'dtype'}: {_DTYPES.get(kind, str(kind))}")
    return lines
