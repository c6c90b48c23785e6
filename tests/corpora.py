"""Tiny prepared corpora and model folders that tests of several stages share; made in a moment, the same every time."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dermray.corpus.manifest import Manifest, Shard, SideKind, SideShard, SideTable
from dermray.corpus.ontology import ONTOLOGY_NAME
from dermray.corpus.schema import SAMPLE, sample_id
from dermray.corpus.side_tables import schema_of

# Two levels; one node holds synonyms, as published ontologies do.
ONTOLOGY = {
    "root": ["inflammatory", "neoplastic"],
    "inflammatory": ["eczema, dermatitis", "psoriasis"],
    "neoplastic": ["melanoma", "nevus"],
}
CONDITIONS = ("eczema, dermatitis", "psoriasis", "melanoma", "nevus")
COLOURS = {"eczema, dermatitis": "red", "psoriasis": "pink", "melanoma": "black", "nevus": "brown"}
RGB = {"red": (200, 60, 50), "pink": (235, 150, 160), "black": (30, 25, 25), "brown": (120, 75, 40)}
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def jpeg(colour: tuple[int, int, int], *, width: int = 48, height: int = 40, seed: int = 0) -> bytes:
    """A noisy patch of one colour as JPEG bytes."""
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sample(
    index: int, split: str, *, image: bytes | None = None, labelled: bool = True, raw: bool = True
) -> dict[str, Any]:
    """One row of a prepared corpus; the condition, and with it the colour, goes round with `index`."""
    condition = CONDITIONS[index % len(CONDITIONS)]
    colour = COLOURS[condition]
    data = jpeg(RGB[colour], seed=index) if image is None else image
    name = condition.partition(",")[0]
    captions = [{"aspect": "ontology", "text": f"This is a skin photo diagnosed as {name}."}]
    if raw:
        captions.insert(0, {"aspect": "raw", "text": f"A {colour} patch of {name}, case {index // 8}."})
    return {
        "sample_id": sample_id(f"test {index}", data),
        "image": data,
        "width": 48,
        "height": 40,
        "captions": captions,
        "labels": [condition] if labelled else [],
        "concepts": [colour],
        "skin_type": index % 6 + 1,
        "source": "test",
        "source_id": f"image-{index}.jpg",
        "meta": None,
        "split": split,
    }


def write_prepared_corpus(
    folder: Path,
    num_samples: Mapping[str, int] | int = 48,
    *,
    row_group_size: int = 8,
    samples_per_shard: int = 24,
    broken: Collection[int] = (),
    unlabelled: Collection[int] = (),
    without_raw: Collection[int] = (),
    draw: Callable[[int], bytes] | None = None,
) -> Manifest:
    """Write a prepared corpus of coloured patches with four conditions.

    Args:
        folder: where to write it.
        num_samples: of each split; a number alone means `train` has so many and `val` half as many.
        row_group_size: samples of a row group.
        samples_per_shard: samples of a shard; the last may have fewer.
        broken: indices inside each split whose image bytes are no image.
        unlabelled: indices inside each split without labels.
        without_raw: indices inside each split without a raw caption.
        draw: the encoded image of an index; None: a patch of its condition's colour.
    """
    sizes = {"train": num_samples, "val": num_samples // 2} if isinstance(num_samples, int) else num_samples
    (folder / "data").mkdir(parents=True)
    shards: list[Shard] = []
    for split, size in sizes.items():
        rows = [
            sample(
                index,
                split,
                image=b"not an image" if index in broken else None if draw is None else draw(index),
                labelled=index not in unlabelled,
                raw=index not in without_raw,
            )
            for index in range(size)
        ]
        for start in range(0, size, samples_per_shard):
            name = f"data/{split}-{start // samples_per_shard:05d}.parquet"
            shards.append(write_shard(folder, name, split, rows[start : start + samples_per_shard], row_group_size))
    ontology = json.dumps(ONTOLOGY).encode()
    (folder / ONTOLOGY_NAME).write_bytes(ontology)
    manifest = Manifest(shards=tuple(shards), ontology_sha256=hashlib.sha256(ontology).hexdigest())
    manifest.save(str(folder))
    return manifest


def write_shard(folder: Path, name: str, split: str, rows: list[dict[str, Any]], row_group_size: int) -> Shard:
    """Write a shard of samples and say what a manifest says of it."""
    path = folder / name
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE), path, row_group_size=row_group_size)
    metadata = pq.ParquetFile(path).metadata
    return Shard(
        path=name,
        split=split,
        num_samples=len(rows),
        num_bytes=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        row_groups=tuple(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)),
    )


def add_side_table(folder: Path, name: str, column: str, kind: SideKind, said: Callable[[int], Any]) -> Manifest:
    """Give a corpus of `write_prepared_corpus` a side table of one column, by the index of a sample in its shard."""
    manifest, sides = Manifest.load(str(folder)), []
    (folder / "sides" / name).mkdir(parents=True)
    for shard in manifest.shards:
        ids = pq.read_table(folder / shard.path, columns=["sample_id"])["sample_id"].to_pylist()
        rows = [{"sample_id": each, column: said(index)} for index, each in enumerate(ids)]
        path = f"sides/{name}/{Path(shard.path).name}"
        table = pa.Table.from_pylist(rows, schema=schema_of({column: kind}))
        pq.write_table(table, folder / path, row_group_size=shard.row_groups[0])
        content = (folder / path).read_bytes()
        sides.append(SideShard(path=path, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    tables = (*manifest.side_tables, SideTable(name=name, columns={column: kind}, shards=tuple(sides)))
    manifest = manifest.model_copy(update={"side_tables": tables})
    manifest.save(str(folder))
    return manifest


def write_model(
    folder: Path,
    *,
    seed: int = 0,
    model_cfg: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write a tiny open_clip model with random weights in the model folder's layout."""
    import open_clip
    import torch
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    from dermray import models

    config = MODEL_CFG if model_cfg is None else model_cfg
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    size = config["vision_cfg"]["image_size"]
    set_model_preprocess_cfg(model, vars(PreprocessCfg(size=size)))
    models.save(model, str(folder), model_cfg=config, provenance=provenance or {})
    return folder


def write_image_encoder(folder: Path, library: str) -> Path:
    """Write a tiny image classifier with random weights as timm or transformers saves one."""
    import torch

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    if library == "timm":
        import timm
        from timm.models import save_for_hf

        save_for_hf(timm.create_model("test_vit", pretrained=False, num_classes=5), folder, safe_serialization=True)
    else:
        from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
