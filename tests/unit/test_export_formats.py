"""What export writes: names and bytes that other programs expect, and samples that come back as they were."""

from __future__ import annotations

import csv
import hashlib
import json
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dermray import images, storage
from dermray.corpus import exchange
from dermray.corpus.manifest import MANIFEST_NAME, Manifest, Shard
from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology
from dermray.corpus.schema import CAPTION_ASPECTS, META, SAMPLE, WHOLE, sample_id
from dermray.errors import CorpusError
from dermray.export.formats import FORMATS
from dermray.export.manifest import EXPORT_NAME, STATE, PartRecord
from dermray.export.parts import Part, key, titles
from dermray.export.settings import ExportConfig
from dermray.export.work import Work, begin, commit, plan
from dermray.prepare.plan import plan_shards, usable_rows
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import ShardMaker
from dermray.raw.sources import READERS, SourceRequest
from tests import raw_corpus
from tests.corpora import add_side_table, write_prepared_corpus
from tests.s3 import BUCKET, faulty_s3

# A node whose name holds synonyms, two that differ in case only, and one below another.
TREE = {
    "root": ["inflammatory", "Nevus", "nevus"],
    "inflammatory": ["eczema, dermatitis", "银屑病"],
    "eczema, dermatitis": ["hand eczema"],
}
SOURCES = {"webdataset": "webdataset", "open_clip_csv": "csv", "parquet": "parquet"}
JPEGS = [
    images.standardise(raw_corpus.photograph(number, 80, 60), image_size=48, jpeg_quality=90).jpeg
    for number in range(8)
]

words = st.sampled_from(
    ["red", "皮疹", "2 cm.", 'a "quoted" word', "tab\\t", "a,b;c", "naïve", "😀", "N/A", "'", "unknown"]
)
texts = st.lists(words, min_size=1, max_size=5).map(" ".join)
metas = st.none() | st.fixed_dictionaries(
    {
        "age": st.none() | st.floats(0, 130, width=32),
        **{name: st.none() | texts for name in META.names if name not in ("age", "extra")},
        "extra": st.none() | st.dictionaries(texts, texts, max_size=2).map(lambda d: json.dumps(d, ensure_ascii=False)),
    }
)
prepared_samples = st.lists(
    st.fixed_dictionaries(
        {
            "captions": st.lists(
                st.tuples(st.sampled_from(CAPTION_ASPECTS), texts), min_size=1, max_size=6, unique=True
            ),
            "labels": st.lists(st.sampled_from([name for name in TREE if name != "root"] + ["Nevus"]), unique=True),
            "concepts": st.lists(texts, max_size=3, unique=True),
            "skin_type": st.none() | st.integers(1, 6),
            "source": texts,
            "source_id": st.sampled_from(["图 片/皮肤_1.jpg", "a b.png", "../x", "c"]) | texts,
            "meta": metas,
            "split": st.sampled_from(["train", "val", "test_2"]),
        }
    ),
    min_size=1,
    max_size=len(JPEGS),
)


def write_corpus(folder: Path, drawn: list[dict[str, Any]]) -> Manifest:
    """A prepared corpus of drawn samples, each with an image of its own, in row groups of two."""
    shards = []
    for split in dict.fromkeys(each["split"] for each in drawn):
        rows = [
            {
                **each,
                "sample_id": sample_id(each["source"], JPEGS[number]),
                "image": JPEGS[number],
                "width": 64,
                "height": 48,
                "captions": [{"aspect": aspect, "text": text} for aspect, text in each["captions"]],
                # As if taken of the pixels before they were compressed.
                "phash": images.perceptual_hash(JPEGS[number]) ^ 1,
                "duplicate_group": None,
            }
            for number, each in enumerate(drawn)
            if each["split"] == split
        ]
        path = folder / f"{split}.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE), path, row_group_size=2)
        groups = tuple(min(2, len(rows) - first) for first in range(0, len(rows), 2))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size
        shards.append(
            Shard(path=path.name, split=split, num_samples=len(rows), num_bytes=size, sha256=digest, row_groups=groups)
        )
    tree = json.dumps(TREE).encode()
    (folder / ONTOLOGY_NAME).write_bytes(tree)
    manifest = Manifest(shards=tuple(shards), ontology_sha256=hashlib.sha256(tree).hexdigest())
    manifest.save(str(folder))
    return manifest


def planned(corpus: Path | str, output: Path | str, **options: Any) -> Work:
    return plan(ExportConfig(corpus=str(corpus), output=str(output), **options))


def export(corpus: Path | str, output: Path | str, **options: Any) -> Work:
    """What the pipeline does, without Ray."""
    work = planned(corpus, output, **options)
    found = begin(work)
    commit(work, {part: found.get(part) or work.write(part) for part in work.parts})
    return work


def imported(folder: Path | str, output: Path, source: str, **options: Any) -> list[dict[str, Any]]:
    """The samples that `prepare` makes of a raw corpus, without Ray."""
    config = PrepareConfig(
        source=source, input=str(folder), output=str(output), image_size=48, min_side=8, jpeg_quality=90, **options
    )
    raw = READERS[source](SourceRequest(config.input, config.table, config.columns, config.limit))
    assert raw.dropped == ()
    assert raw.ontology is not None
    work = plan_shards(usable_rows(raw), split=config.split, seed=0, rows_per_shard=4)
    assert work.dropped == ()
    maker = ShardMaker(config, raw.ontology)
    made = []
    for spec in work.shards:
        record, _, _ = maker.make(spec)
        assert record.dropped == ()
        assert record.shard is not None
        made.extend(pq.read_table(output / record.shard.path).to_pylist())
    return made


def prepared(corpus: Path) -> list[dict[str, Any]]:
    return [
        row for shard in Manifest.load(str(corpus)).shards for row in pq.read_table(corpus / shard.path).to_pylist()
    ]


def comparable(samples: list[dict[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Samples by id."""
    assert len({sample["sample_id"] for sample in samples}) == len(samples)
    return {sample["sample_id"]: sample for sample in samples}


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("format", sorted(SOURCES))
@examples(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    # An example takes a tenth of a second: shrinking one would take minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(drawn=prepared_samples, samples_per_file=st.sampled_from([1, 3, 100]))
def test_export_and_import_give_the_same_samples(
    format: str, tmp_path: Path, drawn: list[dict[str, Any]], samples_per_file: int
) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    write_corpus(folder / "corpus", drawn)
    export(folder / "corpus", folder / "export", format=format, samples_per_file=samples_per_file)
    back = imported(folder / "export", folder / "back", SOURCES[format])
    assert comparable(back) == comparable(prepared(folder / "corpus"))


@pytest.mark.parametrize("format", sorted(SOURCES))
def test_side_tables_are_carried_or_told_as_left_out(format: str, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    write_prepared_corpus(corpus, {"train": 10, "val": 3}, row_group_size=4)
    add_side_table(corpus, "masks", "mask", "mask", lambda index: b"png" if index % 2 else None)
    add_side_table(corpus, "times", "days", "number", float)
    work = export(corpus, out, format=format, samples_per_file=3)
    tables = {"masks": ["mask"], "times": ["days"]}
    document = json.loads((out / "export.json").read_text())
    assert len(imported(out, tmp_path / "back", SOURCES[format])) == 13
    if format != "parquet":
        assert document["side_tables"] == {"carried": {}, "left_out": tables}
        (told,) = work.left_out
        assert f"format={format}" in told
        assert "leaves out 2, masks (mask), times (days)" in told
        return
    assert (document["side_tables"], work.left_out) == ({"carried": tables, "left_out": {}}, [])
    for split, size in (("train", 10), ("val", 3)):
        files = sorted((out / "data").glob(f"{split}-*.parquet"))
        assert len(files) == -(-size // 3)
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
        # The file of a shard says it by places in it.
        assert [row["sides.times.days"] for row in rows] == [float(index) for index in range(size)]
        assert [row["sides.masks.mask"] for row in rows] == [b"png" if index % 2 else None for index in range(size)]


def test_a_prepared_corpus_is_itself_a_source(tmp_path: Path) -> None:
    write_prepared_corpus(tmp_path / "corpus", {"train": 10, "val": 3})
    back = imported(tmp_path / "corpus", tmp_path / "back", "parquet")
    # These corpora name their samples by another rule.
    assert sorted((row["image"], row["source_id"], row["split"]) for row in back) == sorted(
        (row["image"], row["source_id"], row["split"]) for row in prepared(tmp_path / "corpus")
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_prepared_corpus(tmp_path / "corpus", {"train": 25, "val": 10}, row_group_size=4, without_raw=[3])
    return tmp_path / "corpus"


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_the_same_bytes_each_time_and_listed(format: str, corpus: Path, tmp_path: Path) -> None:
    export(corpus, tmp_path / "a", format=format, samples_per_file=10)
    export(corpus, tmp_path / "b", format=format, samples_per_file=10)
    written = content(tmp_path / "a")
    assert written == content(tmp_path / "b")
    manifest = json.loads(written[EXPORT_NAME])
    assert manifest["corpus_digest"] == Manifest.load(str(corpus)).digest
    assert {split: counts["samples"] for split, counts in manifest["splits"].items()} == {"train": 25, "val": 10}
    listed = 0
    for file in manifest["files"]:
        if "num_files" in file:
            names = sorted(name for name in written if name.startswith(f"{file['path']}/"))
            lines = "".join(f"{hashlib.sha256(written[name]).hexdigest()}  {Path(name).name}\n" for name in names)
            assert (file["num_files"], file["sha256"]) == (len(names), hashlib.sha256(lines.encode()).hexdigest())
            assert file["num_bytes"] == sum(len(written[name]) for name in names)
            listed += len(names)
        else:
            data = written[file["path"]]
            assert (file["num_bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            listed += 1
    assert listed + 2 == sum(not name.startswith(STATE) for name in written)
    assert written[ONTOLOGY_NAME] == (corpus / ONTOLOGY_NAME).read_bytes()


def test_tars_are_named_as_img2dataset_names_them(corpus: Path, tmp_path: Path) -> None:
    export(corpus, tmp_path / "out", format="webdataset", samples_per_file=10)
    tars = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.tar"))
    assert tars == ["train/00000.tar", "train/00001.tar", "train/00002.tar", "val/00000.tar"]
    with tarfile.open(tmp_path / "out" / "train" / "00001.tar") as archive:
        infos = archive.getmembers()
        document = json.load(archive.extractfile("000010.json"))  # type: ignore[arg-type]
        caption = archive.extractfile("000010.txt").read().decode()  # type: ignore[union-attr]
    assert [info.name for info in infos][:4] == ["000010.jpg", "000010.json", "000010.txt", "000011.jpg"]
    assert {(info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) for info in infos} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert caption == document["caption"] == "A black patch of melanoma, case 1."
    assert document["key"] == "000010"
    stats = json.loads((tmp_path / "out" / "train" / "00002_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (5, 5, {"success": 5})


def test_webdataset_reads_the_tars(corpus: Path, tmp_path: Path) -> None:
    import webdataset

    export(corpus, tmp_path / "out", format="webdataset", samples_per_file=10)
    tars = str(tmp_path / "out" / "train" / "{00000..00002}.tar")
    found = list(webdataset.WebDataset(tars, shardshuffle=False))
    expected = [row for row in prepared(corpus) if row["split"] == "train"]
    assert [sample["jpg"] for sample in found] == [row["image"] for row in expected]
    assert [sample["txt"].decode() for sample in found] == [row["captions"][0]["text"] for row in expected]


@pytest.mark.parametrize(
    ("file", "place", "samples_per_file", "expected"),
    [(0, 0, 10_000, "000000000"), (42, 31, 10_000, "000420031"), (1, 9, 10, "000019"), (3, 0, 1, "00003"),
     (2, 10_000, 10_001, "0000210000")],
)  # fmt: skip
def test_keys(file: int, place: int, samples_per_file: int, expected: str) -> None:
    assert key(file, place, samples_per_file) == expected


def test_webdataset_readers_pass_over_samples_without_the_wanted_caption(corpus: Path, tmp_path: Path) -> None:
    work = export(corpus, tmp_path / "out", format="webdataset", aspects=["raw"], splits=["train"])
    with tarfile.open(tmp_path / "out" / "train" / "00000.tar") as archive:
        names = set(archive.getnames())
    assert {"000000003.jpg", "000000003.json"} <= names
    assert "000000003.txt" not in names
    assert json.loads((tmp_path / "out" / EXPORT_NAME).read_text())["splits"] == {
        "train": {"samples": 25, "captions": 24, "samples_without_caption": 1}
    }
    assert work.samples.splits == {"train": 25}
    assert len(imported(tmp_path / "out", tmp_path / "back", "webdataset")) == 25


def pairs(file: Path) -> list[tuple[str, str]]:
    """What open_clip's own reader finds in a table, or the standard library's where it is not installed whole."""
    try:
        from open_clip_train.data import CsvDataset
    except ImportError:
        with file.open(encoding="utf-8", newline="") as table:
            return [(row["filepath"], row["title"]) for row in csv.DictReader(table, delimiter="\t")]
    data = CsvDataset(str(file), np.asarray, "filepath", "title", sep="\t", tokenizer=lambda texts: texts)
    for index in range(0, len(data), 7):
        image, title = data[index]
        assert image.shape == (40, 48, 3)
        assert title == data.captions[index]
    return list(zip(data.images, data.captions, strict=True))


def test_open_clip_reads_its_table(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(corpus, tmp_path / "out", format="open_clip_csv", samples_per_file=10)
    monkeypatch.chdir(tmp_path / "out")
    found = pairs(tmp_path / "out" / "train.tsv")
    expected = [
        (f"images/train/{row // 10:05d}/{row // 10:05d}{row % 10}.jpg", text)
        for row, sample in enumerate(row for row in prepared(corpus) if row["split"] == "train")
        for text in titles(sample["captions"], ["raw", "ontology", "concept"])
    ]
    assert found == expected
    assert len(found) == 49
    export(corpus, tmp_path / "first", format="open_clip_csv", titles="first", aspects=["ontology"], splits=["val"])
    with (tmp_path / "first" / "val.tsv").open(encoding="utf-8") as table:
        lines = table.read().splitlines()
    assert lines[0] == "filepath\ttitle"
    assert lines[1] == "images/val/00000/000000000.jpg\tThis is a skin photo diagnosed as eczema."
    assert len(lines) == 11


def test_titles_are_one_line_and_quoted_where_they_must_be(tmp_path: Path) -> None:
    odd = 'say "red"\tor\r\n not, 皮疹'
    (drawn,) = [{"captions": [("raw", odd)], "labels": [], "concepts": [], "skin_type": None, "source": "s",
                 "source_id": "1", "meta": None, "split": "train"}]  # fmt: skip
    write_corpus(tmp_path / "corpus", [drawn])
    export(tmp_path / "corpus", tmp_path / "out", format="open_clip_csv")
    with (tmp_path / "out" / "train.tsv").open(encoding="utf-8", newline="") as table:
        rows = list(csv.reader(table, delimiter="\t"))
    assert rows[1][1] == 'say "red" or not, 皮疹'
    (back,) = imported(tmp_path / "out", tmp_path / "back", "csv")
    assert back["captions"] == [{"aspect": "raw", "text": odd}]


@pytest.mark.parametrize("whole", [False, True], ids=["files", "folder"])
def test_datasets_shows_images(corpus: Path, tmp_path: Path, whole: bool) -> None:
    import datasets

    export(corpus, tmp_path / "out", format="parquet", samples_per_file=10)
    cache = str(tmp_path / "cache")
    if whole:
        found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=cache)
    else:
        files = {split: str(tmp_path / "out" / "data" / f"{split}-*.parquet") for split in ("train", "val")}
        found = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
    # `datasets` calls a folder's val split validation.
    sizes = {split.replace("validation", "val"): len(part) for split, part in found.items()}
    assert sizes == {"train": 25, "val": 10}
    train = found["train"]
    assert isinstance(train.features["image"], datasets.Image)
    assert train[3]["image"].size == (48, 40)
    first = next(row for row in prepared(corpus) if row["split"] == "train")
    assert train[0]["caption"] == first["captions"][0]["text"]
    assert train[0]["captions"] == first["captions"]
    assert (train[0]["labels"], train[0]["skin_type"], train[0]["sample_id"]) == (
        first["labels"], first["skin_type"], first["sample_id"],
    )  # fmt: skip


def test_half_an_export_is_finished_to_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for format in FORMATS:
        output = tmp_path / format
        export(corpus, output, format=format, samples_per_file=10)
        whole = content(output)
        work = planned(corpus, output, format=format, samples_per_file=10)
        gone: list[Part] = list(work.parts[::2])
        for part in gone[:1]:
            storage.remove(output / STATE / f"{part.name}.json")
        for part in gone[1:]:
            storage.remove(output / part.paths[0])
        (output / EXPORT_NAME).unlink()
        (output / ".x.tar.12-34.part").write_bytes(b"half")
        found = begin(work)
        assert set(work.parts) - set(found) == set(gone)
        commit(work, {part: found.get(part) or work.write(part) for part in work.parts})
        assert content(output) == whole


def test_nothing_is_written_again(corpus: Path, tmp_path: Path) -> None:
    export(corpus, tmp_path / "out", format="open_clip_csv")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    work = planned(corpus, tmp_path / "out", format="open_clip_csv")
    found: dict[Part, PartRecord] = begin(work)
    assert len(found) == len(work.parts)
    _, unchanged = commit(work, found)
    assert unchanged
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


def test_another_export_in_the_folder_is_refused_or_replaced(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(corpus, output, format="webdataset", samples_per_file=5)
    with pytest.raises(CorpusError, match=r"holds an export of this corpus by other settings: .*replace=true"):
        begin(planned(corpus, output, format="webdataset", samples_per_file=10))
    write_prepared_corpus(tmp_path / "other", 4)
    with pytest.raises(CorpusError, match="holds an export of another corpus"):
        begin(planned(tmp_path / "other", output, format="parquet"))
    assert (output / EXPORT_NAME).exists()
    (output / "mine.txt").write_text("not of the export", encoding="utf-8")
    export(tmp_path / "other", output, format="parquet", replace=True)
    export(tmp_path / "other", tmp_path / "fresh", format="parquet")
    (output / "mine.txt").unlink()
    assert content(output) == content(tmp_path / "fresh")
    with pytest.raises(CorpusError, match="holds a prepared corpus"):
        begin(planned(corpus, tmp_path / "other", format="parquet"))


def test_replacing_leaves_what_is_not_of_the_export(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    export(corpus, output, format="open_clip_csv", samples_per_file=5)
    folder = next((output / "images" / "train").iterdir())
    foreign = [output / "mine.txt", folder / "notes.jpg", output / STATE / "own.json", output / "images" / "x" / "y"]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_text("not of the export", encoding="utf-8")
    # As a killed run leaves one.
    (folder / ".000000000.jpg.a1b2c3d4.part").write_bytes(b"half")
    export(corpus, output, format="parquet", replace=True)
    assert "keeps 4 files that are not of this program's making: '.export/own.json', " in capsys.readouterr().out
    assert all(file.read_text(encoding="utf-8") == "not of the export" for file in foreign)
    export(corpus, tmp_path / "fresh", format="parquet")
    for file in foreign:
        file.unlink()
    assert content(output) == content(tmp_path / "fresh")


LEADING_OUT = ["../victim", "/etc/x", "a/../../b", "data\\..\\..\\x", "s3://bucket/x"]


@pytest.mark.parametrize("name", LEADING_OUT)
def test_an_export_that_names_files_outside_is_refused_and_nothing_goes(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    victim = tmp_path / "victim" / "precious.txt"
    victim.parent.mkdir()
    victim.write_text("precious", encoding="utf-8")
    work = export(corpus, output, format="webdataset")
    started = storage.read_json(output / STATE / "started.json")
    storage.write_json(output / STATE / "started.json", started | {"paths": [*started["paths"], name], "key": "other"})
    before = content(output)
    with pytest.raises(CorpusError, match=r"started.json is no record .*is no name of a file inside a folder") as error:
        begin(planned(corpus, output, format="webdataset", replace=True))
    assert "\n" not in str(error.value)
    assert content(output) == before
    assert victim.exists()
    # A record of a part that names such a file.
    storage.write_json(output / STATE / "started.json", started)
    record = output / STATE / f"{work.parts[0].name}.json"
    files = [{"path": name, "num_bytes": 8, "sha256": "0"}]
    storage.write_json(record, {"files": files, "counts": {}})
    with pytest.raises(CorpusError, match="is no name of a file inside a folder"):
        begin(planned(corpus, output, format="webdataset"))


@pytest.mark.parametrize("field", ["path", "split"])
@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_corpus_that_names_files_outside_is_refused(name: str, field: str, corpus: Path, tmp_path: Path) -> None:
    document = storage.read_json(corpus / MANIFEST_NAME)
    document["shards"][0][field] = name
    storage.write_json(corpus / MANIFEST_NAME, document)
    with pytest.raises(CorpusError, match=rf"shards.0.{field}: .* is no name of a file inside a folder") as error:
        planned(corpus, tmp_path / "out", format="parquet")
    assert "\n" not in str(error.value)


def test_an_object_store_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpus"
    write_prepared_corpus(corpus, {"train": 3})
    with faulty_s3() as proxy:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage._remote_filesystem.cache_clear()
        storage.copy_tree(str(corpus), f"s3://{BUCKET}/corpus")
        for format, source in SOURCES.items():
            remote, local = f"s3://{BUCKET}/{format}", tmp_path / format
            export(f"s3://{BUCKET}/corpus", remote, format=format)
            export(corpus, local, format=format)
            here = {name: data for name, data in content(local).items() if not name.startswith(STATE)}
            files = [file for file in storage.list_files(remote, recursive=True) if STATE not in file]
            assert {file[len(remote) + 1 :]: storage.read_bytes(file) for file in files} == here
            proxy.inject(503, 1, method="GET", key=f"{format}/")
            back = imported(remote, tmp_path / f"back {format}", source, num_fetch_threads=2)
            assert sorted(row["image"] for row in back) == sorted(row["image"] for row in prepared(corpus))
            assert proxy.fired == 1
            proxy.reset()
    storage._remote_filesystem.cache_clear()


def test_a_damaged_corpus_is_one_clear_error(corpus: Path, tmp_path: Path) -> None:
    shard = min((corpus / "data").iterdir())
    shard.write_bytes(shard.read_bytes()[:200])
    work = planned(corpus, tmp_path / "out", format="webdataset")
    part = next(part for part in work.parts if part.split == shard.name.partition("-")[0])
    with pytest.raises(CorpusError, match=r"cannot read row group 0 of .*restore it or prepare again"):
        work.write(part)
    assert not list((tmp_path / "out").rglob("*.tar*"))
    (corpus / ONTOLOGY_NAME).write_text('{"root": []}', encoding="utf-8")
    with pytest.raises(CorpusError, match=r"ontology\.json is not the tree of the corpus's manifest"):
        planned(corpus, tmp_path / "out", format="webdataset")
    with pytest.raises(CorpusError, match="no split 'test'"):
        planned(corpus, tmp_path / "out", format="webdataset", splits=["test"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dermray": 99}, "this code reads samples of schema 1"),
        ({"captions": [{"aspect": "song", "text": "x"}]}, r"captions\.0\.aspect"),
        ({"labels": "psoriasis"}, "labels"),
        ({"skin_type": 7}, "skin_type"),
        ({"source": ""}, "source"),
        ({"phash": "1" * 17}, "phash"),
        ({"phash": "hash"}, "phash"),
    ],
)
def test_a_record_that_is_none_is_one_bad_row(corpus: Path, tmp_path: Path, change: Any, message: str) -> None:
    row = next(iter(prepared(corpus)))
    document = exchange.to_document(row)
    assert exchange.from_document({**document, "added by hand": 1})["labels"] == row["labels"]
    with pytest.raises(ValueError, match=message):
        exchange.from_document({**document, **change})
    export(corpus, tmp_path / "out", format="open_clip_csv")
    table = tmp_path / "out" / "metadata.csv"
    with table.open(encoding="utf-8", newline="") as source:
        rows = list(csv.reader(source))
    rows[2][2] = json.dumps({**document, **change})
    rows[3][2] = "{"
    with table.open("w", encoding="utf-8", newline="") as sink:
        csv.writer(sink).writerows(rows)
    raw = READERS["csv"](SourceRequest(str(tmp_path / "out")))
    assert [(bad.row, bad.reason) for bad in raw.dropped] == [(2, "malformed_row"), (3, "malformed_row")]
    assert raw.table.num_rows == 33


def test_the_record_has_all_fields_of_a_sample() -> None:
    made_again = {"sample_id", "image", "width", "height", "duplicate_group"}
    assert set(exchange.FIELDS) == set(WHOLE.names) - made_again
    assert set(exchange._Meta.model_fields) == set(META.names)


def test_labels_that_the_tree_does_not_have_stay_out(tmp_path: Path) -> None:
    write_prepared_corpus(tmp_path / "corpus", {"train": 4})
    export(tmp_path / "corpus", tmp_path / "out", format="parquet")
    (tmp_path / "out" / ONTOLOGY_NAME).write_text('{"root": ["psoriasis"]}', encoding="utf-8")
    back = imported(tmp_path / "out", tmp_path / "back", "parquet")
    assert (
        {label for row in back for label in row["labels"]} == {"psoriasis"} == set(Ontology.load(str(tmp_path / "out")))
    )
