"""Side tables: dealt to the samples' shards, kept without loss in their order, every row in or told. Without Ray."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dermray import config as configuration
from dermray import images, masks, storage
from dermray.corpus.manifest import Manifest
from dermray.corpus.shards import ShardIndex
from dermray.corpus.side_tables import side_index
from dermray.errors import ConfigError, CorpusError, ImageError
from dermray.ingest import decoding
from dermray.ingest.corpora import Corpora
from dermray.prepare import pipeline, report
from dermray.prepare.commit import commit
from dermray.prepare.generations import Generation, content, identity
from dermray.prepare.pipeline import read
from dermray.prepare.records import ShardRecord
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import ShardMaker
from dermray.prepare.sides import SideMaker, Sides, gathered, join
from dermray.release import verification
from dermray.tracking.lineage import Node
from tests import without_ray
from tests.conftest import ROOT
from tests.corpora import add_side_table, write_prepared_corpus
from tests.raw_corpus import photograph

NUM = 11
SHAPE = (90, 120)


def png(pixels: np.ndarray, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", **options)
    return sink.getvalue()


def palette(pixels: np.ndarray, form: str, **options: Any) -> bytes:
    """With a palette of greys, each of which is its number."""
    sink, image = io.BytesIO(), Image.fromarray(pixels, "P")
    image.putpalette([level for level in range(256) for _ in range(3)])
    image.save(sink, form, **options)
    return sink.getvalue()


def few_bits(pixels: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 2 bits, as no library here writes one: packed by hand."""
    height, width = pixels.shape
    packed = np.zeros((height, width // 4), np.uint8)
    for place in range(4):
        packed |= pixels[:, place::4] << (6 - bits * place)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "TIFF")
    return sink.getvalue()


def mask_of(number: int) -> np.ndarray:
    """Numbers of classes in squares of 10 pixels, so that halving them loses none."""
    return np.kron(np.random.default_rng(number).integers(0, 4, (9, 12), dtype=np.uint8), np.ones((10, 10), np.uint8))


def write(folder: Path) -> None:
    """A corpus of NUM photographs with a table of masks and one of times."""
    (folder / "masks").mkdir(parents=True)
    for number in range(NUM):
        (folder / f"{number}.jpg").write_bytes(photograph(number))
        (folder / "masks" / f"{number}.png").write_bytes(png(mask_of(number)))
    (folder / "masks" / "narrow.png").write_bytes(png(mask_of(0)[:, :60]))
    table(folder / "metadata.csv", ["image", "source_id", "caption"], [[f"{n}.jpg", f"s{n}", "x"] for n in range(NUM)])
    rows = [[f"s{number}", f"masks/{number}.png"] for number in (9, 1, 4, 0)]
    bad = [["", "masks/2.png"], ["s1", "masks/3.png"], ["elsewhere", "masks/2.png"], ["s2", "masks/narrow.png"]]
    table(folder / "masks.csv", ["id", "mask"], [*rows, *bad, ["s3", "masks/gone.png"], ["s5", "../m.png"], ["s6"]])
    times = [[f"{number}.jpg", str(number * 30.5), "dead" if number % 2 else "n/a"] for number in range(NUM)]
    table(folder / "times.csv", ["file", "days", "state"], times)


def table(file: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as sink:
        csv.writer(sink).writerows([names, *rows])


MASKS = ("side_tables.masks.uri=masks.csv", "side_tables.masks.key=id", "side_tables.masks.masks=[mask]")
TIMES = (
    *("side_tables.times.uri=times.csv", "side_tables.times.key=file", "side_tables.times.by=image"),
    *("side_tables.times.numbers=[days]", "side_tables.times.texts=[state]"),
)


def settings(raw: Path, output: Path, *keys: str) -> PrepareConfig:
    sizes = ["image_size=45", "rows_per_shard=4", "row_group_size=3", "split={val: 0.3}"]
    return configuration.parse(PrepareConfig, ["source=csv", f"input={raw}", f"output={output}", *sizes, *keys])


def prepared(config: PrepareConfig) -> tuple[Manifest, Sides, dict[str, Any]]:
    """What the pipeline does, without Ray."""
    work = read(config)
    maker, beside = ShardMaker(config, work.ontology), SideMaker(config)
    records: list[ShardRecord] = [maker.make(spec).record for spec in work.plan.shards]
    held = work.committed
    final = [*held.held, *records]
    joined = {name: join(config, name, cells, final) for name, cells in work.side_tables.items()}
    made = {rows.name: beside.make(rows) for each in joined.values() for rows in each.shards}
    sides = gathered(config, joined, made)
    keys = tuple(record.key for record in final)
    generation = Generation(
        number=len(held.generations) + 1,
        identity=identity(config),
        content=content(config),
        made=tuple(record.key for record in records),
        final=keys,
        num_rows=work.plan.num_rows,
        dropped=work.plan.dropped,
        ontology=work.ontology.to_json(),
        figures={"merged": 0, "left_out": 0, "moved": 0},
    )
    timing: dict[str, Any] = {"stages": {}, "tasks": {}, "ray_data": []}
    manifest, stats, _ = commit(config, held, generation, records, final, {}, timing, sides)
    return manifest, sides, stats


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sides") / "raw"
    write(folder)
    return folder


def test_a_row_group_of_a_side_table_is_that_of_the_samples(raw: Path, tmp_path: Path) -> None:
    config = settings(raw, tmp_path / "corpus", *MASKS, *TIMES)
    manifest, sides, stats = prepared(config)
    assert Manifest.load(config.output) == manifest
    assert stats["side_tables"] == sides.figures
    for part in (manifest, manifest.select("val"), manifest.select("train")):
        samples = ShardIndex.of(config.output, part)
        found, times = (side_index(config.output, part, name, "digests") for name in ("masks", "times"))
        for group, _ in enumerate(samples.locations):
            rows = samples.read_row_group(group, ["sample_id", "source_id", "width", "height"]).to_pylist()
            said = found.read_row_group(group, ["sample_id", "mask"]).to_pylist()
            told = times.read_row_group(group, ["days", "state"]).to_pylist()
            for row, beside, time in zip(rows, said, told, strict=True):
                number = int(row["source_id"][1:])
                assert beside["sample_id"] == row["sample_id"]
                assert time == {"days": number * 30.5, "state": "dead" if number % 2 else None}
                assert (beside["mask"] is not None) == (number in (9, 1, 4, 0))
                if beside["mask"]:
                    decoded = masks.decode_mask(beside["mask"])
                    assert decoded.shape == (row["height"], row["width"]) == (45, 60)
                    np.testing.assert_array_equal(decoded, mask_of(number)[::2, ::2])


def test_the_documented_lines_read_masks(raw: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "corpus.md").read_text(encoding="utf-8")
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "side_index" in code]
    config = settings(raw, tmp_path / "corpus", *MASKS)
    prepared(config)
    names: dict[str, Any] = {}
    exec(example.replace("/data/pad-prepared", config.output), names)
    assert len(names["masks"]) == names["samples"].num_rows == 3
    assert any(mask is not None and mask.shape == (45, 60) for mask in names["masks"])


def test_every_row_is_joined_or_told_with_where(raw: Path, tmp_path: Path) -> None:
    _, sides, _ = prepared(config := settings(raw, tmp_path / "corpus", *MASKS))
    reasons = {
        **{"no_key": 5, "key_stood_above": 6, "no_sample": 7, "mask_size": 8, "missing_file": 9},
        **{"path_outside_root": 10, "malformed_row": 11},
    }
    assert sides.figures["masks"] == {"in": 11, "used": 4, "told": dict.fromkeys(sorted(reasons), 1)}
    assert {row.reason: row.row for row in sides.dropped["masks"]} == reasons
    assert set(reasons) <= set(report.REASONS)
    # Two images of one id: which of them is meant, nobody says.
    table(raw / "one.csv", ["key", "is"], [["x", "y"]])
    one = ["side_tables.one.uri=one.csv", "side_tables.one.key=key", "side_tables.one.texts=[is]"]
    work = read(twice := settings(raw, tmp_path / "twice", *one, "columns.source_id=caption"))
    records = [ShardMaker(twice, work.ontology).make(spec).record for spec in work.plan.shards]
    reason = "several_samples"
    with pytest.raises(CorpusError, match=f"none of its 1 rows .*{reason} 1"):
        join(twice, "one", work.side_tables["one"], records)
    listed = pq.read_table(Path(config.output) / report.SIDES_DROPPED).to_pylist()
    assert {(row["input"], row["reason"], row["row"]) for row in listed} == {
        ("masks", *each) for each in reasons.items()
    }
    page = storage.read_text(storage.join(config.output, report.REPORT))
    assert "Side tables" in page
    assert "mask_size 1" in page


def test_the_same_again_is_the_same_and_others_go(raw: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    plain, _, stats = prepared(settings(raw, output))
    document = json.loads((output / "manifest.json").read_text())
    # Nobody can tell that side tables exist from a corpus that has none.
    assert "side_tables" not in document
    assert "side_tables" not in stats
    assert not (output / "sides").exists()
    assert "side_tables" not in settings(raw, output).content()

    first, _, _ = prepared(settings(raw, output, *MASKS, "if_exists=replace"))
    assert first.shards == plain.shards
    assert first.digest != plain.digest
    again, _, _ = prepared(settings(raw, output, *MASKS, "if_exists=replace"))
    assert again.side_tables == first.side_tables
    (raw / "masks" / "4.png").write_bytes(png(mask_of(40)))
    changed, _, _ = prepared(settings(raw, output, *MASKS, "if_exists=replace"))
    (raw / "masks" / "4.png").write_bytes(png(mask_of(4)))
    assert changed.shards == plain.shards
    assert changed.digest != first.digest
    files = {f"sides/masks/{file.name}" for file in (output / "sides" / "masks").iterdir()}
    assert files == {shard.path for shard in changed.side_tables[0].shards}
    prepared(settings(raw, output, "if_exists=replace"))
    assert not list((output / "sides" / "masks").iterdir())


def test_other_side_tables_plan_no_row_of_a_grown_corpus_anew(tmp_path: Path) -> None:
    folder, output = tmp_path / "raw", tmp_path / "corpus"
    write(folder)
    rows = [[f"{number}.jpg", f"s{number}", "x"] for number in range(NUM)]
    table(folder / "metadata.csv", ["image", "source_id", "caption"], rows[:6])
    prepared(settings(folder, output, *MASKS))
    table(folder / "metadata.csv", ["image", "source_id", "caption"], rows)
    grown, _, _ = prepared(settings(folder, output, *MASKS))
    assert (grown.version, grown.num_samples) == (2, NUM)
    for keys, tables in (((*MASKS, *TIMES), ["masks", "times"]), (TIMES, ["times"]), ((), [])):
        changed, _, _ = prepared(config := settings(folder, output, *keys))
        assert changed.shards == grown.shards
        assert [each.name for each in changed.side_tables] == tables
        assert Manifest.load(config.output) == changed
        assert set(changed.provenance["config"].get("side_tables", {})) == set(tables)
    # Settings of the rows do.
    assert read(settings(folder, output, "jpeg_quality=80")).committed.generations == ()


def said(output: str, manifest: Manifest, name: str, column: str) -> dict[str, Any]:
    """What a side table says of each sample, by its image: ids of the two sources are alike."""
    ids = [each for group in ShardIndex.of(output, manifest).row_groups(["sample_id"]) for each in group[0].to_pylist()]
    cells = [each for group in side_index(output, manifest, name).row_groups([column]) for each in group[0].to_pylist()]
    return {each: cell for each, cell in zip(ids, cells, strict=True) if cell is not None}


def test_a_second_source_joins_with_side_tables_of_its_own(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ids are those of the first one's samples; one of its images is the first one's, by another name."""
    without_ray.use(monkeypatch)
    output, other = tmp_path / "corpus", tmp_path / "other"
    first = settings(raw, output, *MASKS)
    masks_alone = said(first.output, pipeline.prepare(first).manifest, "masks", "mask")
    assert len(masks_alone) == 4
    other.mkdir()
    for number in range(3):
        (other / f"{number}.jpg").write_bytes(photograph(77 + number))
    (other / "3.jpg").write_bytes(photograph(1))
    (other / "m.png").write_bytes(png(mask_of(7)))
    table(other / "metadata.csv", ["image", "source_id", "caption"], [[f"{n}.jpg", f"s{n}", "x"] for n in range(4)])
    table(
        other / "masks.csv", ["id", "mask", "by"], [["s1", "m.png", "Ada"], ["s3", "", "Bob"], ["s9", "m.png", "Ada"]]
    )
    second = settings(other, output, *MASKS, "side_tables.masks.texts=[by]")
    result = pipeline.prepare(second)
    assert result.manifest.num_samples == NUM + 3
    assert result.manifest.side_tables[0].columns == {"mask": "mask", "by": "text"}
    both = said(second.output, result.manifest, "masks", "mask")
    by = said(second.output, result.manifest, "masks", "by")
    (added,) = both.keys() - masks_alone.keys()
    # What both have is the first one's sample: s3 of the second is nobody, as s9 is.
    assert masks_alone.items() < both.items()
    assert by == {added: "Ada"}
    told = {"in": 3 + 4, "used": 1 + 4, "told": {"no_sample": 2}}
    assert result.stats["side_tables"]["masks"] == told

    again = pipeline.prepare(second)
    assert (again.unchanged, again.manifest) == (True, result.manifest)
    # What the second says of its own stays when the first comes again without its table, or with others.
    without = pipeline.prepare(settings(raw, output)).manifest
    assert without.shards == result.manifest.shards
    assert said(second.output, without, "masks", "mask") == {added: both[added]}
    assert said(second.output, without, "masks", "by") == by
    timed = pipeline.prepare(settings(raw, output, *MASKS, *TIMES)).manifest
    assert [each.name for each in timed.side_tables] == ["masks", "times"]
    assert len(said(second.output, timed, "times", "days")) == NUM
    assert pipeline.prepare(settings(raw, output, *MASKS, *TIMES)).unchanged
    table(raw / "masks_of_numbers.csv", ["id", "by"], [["s1", "1"]])
    with pytest.raises(CorpusError, match="the column 'by' is a number here, and a text in the corpus"):
        pipeline.prepare(
            settings(
                *(raw, output, "side_tables.masks.uri=masks_of_numbers.csv", MASKS[1], "side_tables.masks.numbers=[by]")
            )
        )


def test_what_is_asked_wrongly_is_refused_by_name(raw: Path, tmp_path: Path) -> None:
    output = tmp_path / "corpus"
    for keys, message in (
        (
            (*MASKS[:2], "side_tables.masks.numbers=[mask]"),
            r"masks\.csv, row 1, column 'mask': 'masks/9\.png' is no number",
        ),
        ((*MASKS[:2], "side_tables.masks.texts=[size]"), r"has no column 'size'.*side_tables\.masks"),
        (("side_tables.masks.uri=no.csv", *MASKS[1:]), r"side_tables\.masks\.uri: no\.csv is no file"),
    ):
        with pytest.raises(CorpusError, match=message):
            read(settings(raw, output, *keys))
    with pytest.raises(CorpusError, match="none of its 11 rows has the image of a sample in column 'id'"):
        prepared(settings(raw, output, *MASKS, "side_tables.masks.by=image"))
    for keys, message in (
        (MASKS[:2], "name the columns to keep"),
        ((*MASKS, "side_tables.masks.texts=[mask]"), "name each column once"),
        (
            ("side_tables.My Masks.uri=a", "side_tables.My Masks.key=b", "side_tables.My Masks.texts=[c]"),
            "no name of a",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            settings(raw, output, *keys)
    manifest, _, _ = prepared(config := settings(raw, output, *MASKS))
    with pytest.raises(CorpusError, match="has no side table 'times'; it has: masks"):
        side_index(config.output, manifest, "times")
    short = manifest.model_copy(update={"shards": manifest.shards[:1]})
    short.save(config.output)
    with pytest.raises(CorpusError, match="side table 'masks' has other shards than the samples"):
        Manifest.load(config.output)


@pytest.mark.parametrize("width", [45, 60, 61, 97, 200, 640])
@pytest.mark.parametrize("height", [46, 83, 480])
def test_a_mask_of_any_image_fits_what_is_stored_of_it(width: int, height: int) -> None:
    stored = images.standardise(
        cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))[1].tobytes(),
        image_size=45,
        jpeg_quality=90,
    )
    mask = np.full((height, width), 7, np.uint8)
    fitted = masks.fitted(mask, stored.width, stored.height)
    assert fitted.shape == (stored.height, stored.width)
    assert (masks.decode_mask(masks.encode_mask(fitted)) == 7).all()
    with pytest.raises(ImageError, match="not those of its image"):
        masks.fitted(mask.repeat(2, axis=1), stored.width, stored.height)
    with pytest.raises(ImageError, match="not those of its image"):
        masks.fitted(mask[:20, : 20 * width // height], stored.width, stored.height)


def test_masks_that_are_no_numbers_are_refused() -> None:
    grey = mask_of(1)
    np.testing.assert_array_equal(masks.decode_mask(png(np.stack([grey] * 3, axis=2))), grey)
    assert set(np.unique(masks.decode_mask(png(grey > 1)))) == {0, 255}
    for data, message in (
        (png(np.stack([grey, grey, grey + 1], axis=2)), "in colours"),
        (png(grey.astype(np.uint16)), "16 bits"),
        (png(np.stack([grey] * 4, axis=2)), "transparency"),
        (png(grey, transparency=0), "a number is transparent"),
        (palette(grey, "PNG", transparency=0), "a number is transparent"),
        (palette(grey, "GIF", transparency=0), "a number is transparent"),
        (few_bits(grey, 2), "2, 4 or 16 bits"),
        (tiff(grey), "no mask of one of PNG, BMP, GIF, JPEG; save it as 8-bit grey PNG"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            masks.decode_mask(data)
        assert caught.value.reason in ("unsupported_format", "not_an_image")
    np.testing.assert_array_equal(masks.decode_mask(palette(grey, "PNG")), grey)
    np.testing.assert_array_equal(masks.decode_mask(palette(grey, "GIF")), grey)
    with pytest.raises(ImageError):
        masks.decode_mask(png(grey)[:60])
    with pytest.raises(ImageError) as caught:
        masks.decode_mask(png(grey), max_pixels=100)
    assert caught.value.reason == "too_many_pixels"


def test_the_loader_finds_what_side_tables_say_among_the_columns_of_a_row(tmp_path: Path) -> None:
    """Of one corpus as of several; a view that asks for what no table says is told so."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_prepared_corpus(folder, {"train": 10}, row_group_size=4, samples_per_shard=6)
        add_side_table(folder, "times", "days", "number", lambda index: None if index == 2 else index + 0.5)
        add_side_table(folder, "states", "state", "text", lambda index: f"state {index}")
    columns = ["sides.times.days", "source_id", "sides.states.state"]
    for chosen in (folders[:1], folders):
        corpora = Corpora.load([str(folder) for folder in chosen]).select("train")
        index = corpora.index("digests", columns)
        # Shards of 4 + 2 and 4 samples.
        assert index.starts.tolist() == [0, 4, 6, 10, 14, 16, 20][: 3 * len(chosen) + 1]
        groups = [decoding.unpacked(group) for group in decoding.read(index, range(3 * len(chosen)), columns)]
        assert all({*group.schema.names} == {*columns, "sample_id"} for group in groups)
        assert index.read_row_group(0, ["meta.lesion_id", "sides.times.days"]).column_names == [
            *("meta", "sides.times.days"),
        ]
        days = [day for group in groups for day in group["sides.times.days"].to_pylist()]
        assert days == [0.5, 1.5, None, 3.5, 4.5, 5.5, 0.5, 1.5, None, 3.5] * len(chosen)
        assert groups[1]["sides.states.state"].to_pylist() == ["state 4", "state 5"]
    assert isinstance(Corpora.load([str(folders[0])]).index(), ShardIndex)
    with pytest.raises(
        CorpusError, match=r"a has no side table 'time', .*; it has: times \(days\), states \(state\); prepare"
    ):
        corpora.index(columns=["sides.time.days"])
    with pytest.raises(
        CorpusError, match=r"a: the side table 'times' has no column 'day', as sides.times.day is wanted; it has: days"
    ):
        corpora.index(columns=["sides.times.day"])


def test_a_side_file_of_other_samples_is_refused(tmp_path: Path) -> None:
    manifest = write_prepared_corpus(tmp_path, {"train": 8}, row_group_size=4, samples_per_shard=4)
    manifest = add_side_table(tmp_path, "times", "days", "number", float)
    (table,) = manifest.side_tables
    turned = table.model_copy(update={"shards": table.shards[::-1]})
    index = Corpora.of(str(tmp_path), manifest.model_copy(update={"side_tables": (turned,)})).index(
        columns=["sides.times.days"]
    )
    with pytest.raises(CorpusError, match=r"row group 0 of sides/times/train-00001.parquet is not about the samples"):
        index.read_row_group(0, ["sides.times.days"])


def test_a_number_of_minus_one_is_one_and_paths_meet_however_they_are_written(raw: Path, tmp_path: Path) -> None:
    rows = [[f"./{number}.jpg", change] for number, change in enumerate(["-1", "-1.0", "-2", "n/a", "", "0"])]
    table(raw / "change.csv", ["file", "change"], rows)
    keys = ["side_tables.c.uri=change.csv", "side_tables.c.key=file", "side_tables.c.by=image"]
    manifest, sides, _ = prepared(config := settings(raw, tmp_path / "corpus", *keys, "side_tables.c.numbers=[change]"))
    ids = [name for group in ShardIndex.of(config.output, manifest).row_groups(["source_id"]) for name in group[0]]
    said = [value for group in side_index(config.output, manifest, "c").row_groups(["change"]) for value in group[0]]
    found = {str(name): value.as_py() for name, value in zip(ids, said, strict=True)}
    assert [found[f"s{number}"] for number in range(6)] == [-1.0, -1.0, -2.0, None, None, 0.0]
    assert sides.figures["c"] == {"in": 6, "used": 6, "told": {}}
    for odd in ("12_5", "\uff11\uff12", "0x10", "1,5"):
        table(raw / "change.csv", ["file", "change"], [["0.jpg", odd]])
        with pytest.raises(CorpusError, match=f"row 1, column 'change': '{odd}' is no number"):
            prepared(config)


def test_masks_of_which_none_can_be_used_stop_the_run(raw: Path, tmp_path: Path) -> None:
    table(raw / "gone.csv", ["id", "mask"], [["s1", "elsewhere/1.png"], ["s2", "elsewhere/2.png"]])
    keys = ("side_tables.masks.uri=gone.csv", *MASKS[1:])
    with pytest.raises(
        CorpusError, match=r"none of its 2 rows can be used; row 1: column mask: .*run the same command"
    ):
        prepared(settings(raw, tmp_path / "corpus", *keys))


def test_a_table_under_another_name_leaves_nothing_and_a_changed_file_is_found(raw: Path, tmp_path: Path) -> None:
    prepared(settings(raw, tmp_path / "corpus", *MASKS))
    renamed = [key.replace("side_tables.masks", "side_tables.lesions") for key in MASKS]
    manifest, _, _ = prepared(config := settings(raw, tmp_path / "corpus", *renamed, "if_exists=replace"))
    assert not list((tmp_path / "corpus" / "sides" / "masks").iterdir())
    node = Node("corpus", "corpus", "corpus", config.output, manifest.digest)
    assert verification._corpus(node)[0] is verification.State.SAME
    (side, *_) = manifest.side_tables[0].shards
    (tmp_path / "corpus" / side.path).write_bytes(b"other")
    state, told = verification._corpus(node)
    assert state is verification.State.CHANGED
    assert side.path in told
