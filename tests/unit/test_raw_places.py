"""Where images are: litter, several files of one name, spellings, archives sorted by kind; every row is told."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest

from dermray.corpus.captions import ontology_caption
from dermray.raw import sources
from dermray.raw.fetch import MISSING_FILE, OUTSIDE, ImageStore
from dermray.raw.litter import litter, told
from dermray.raw.sources import RawRows, SourceRequest
from tests.raw_sources import LAYOUTS

LITTER = (".ipynb_checkpoints/a-checkpoint.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "._1.jpg", "__MACOSX/._a.jpg")


def put(folder: Path, name: str, content: bytes = b"x") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def read(source: str, folder: Path) -> tuple[RawRows, SourceRequest]:
    request = SourceRequest(str(folder))
    return sources.read(source, request), request


@pytest.mark.parametrize("name", LITTER)
def test_litter_is_told_from_data(name: str) -> None:
    assert litter(name)
    assert litter(f"images.zip!/{name}")
    for fine in ("a.jpg", "a/b._1.jpg", "../a.jpg", "./a.jpg", "eaDir/a.jpg", "a.zip!/b.jpg"):
        assert litter(fine) is None


@pytest.mark.parametrize("archived", [False, True])
def test_a_folder_of_images_passes_over_litter(tmp_path: Path, archived: bool) -> None:
    names = ["psoriasis/a.jpg", "acne/b.jpg", *(f"psoriasis/{name}" for name in LITTER), "@eaDir/x/b.jpg"]
    for name in names:
        put(tmp_path / "pictures", name)
    if archived:
        with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
            for name in names:
                archive.write(tmp_path / "pictures" / name, name)
        for name in names:
            (tmp_path / "pictures" / name).unlink()
    raw, request = read("image_folder", tmp_path)
    assert sorted(raw.table["labels"].to_pylist()) == [["acne"], ["psoriasis"]]
    assert request.findings.passed_over == {".ipynb_checkpoints": 1, "@eaDir": 2, "._*": 1, "__MACOSX": 1}
    assert "passed over 5 files" in told(request.findings.passed_over)


def test_a_folder_of_images_folds_labels_and_tells_files_that_are_no_images(tmp_path: Path) -> None:
    for name in ("BCC/a.jpg", "Basal cell carcinoma/b.HEIC", "unknown/c.dcm", "BCC/d.cr2", "BCC/notes.docx", "ORDER"):
        put(tmp_path, name)
    raw, request = read("image_folder", tmp_path)
    said = {row["source_id"]: [each["text"] for each in row["captions"]] for row in raw.table.to_pylist()}
    sentence = ontology_caption(["Basal cell carcinoma"])
    assert said == {"BCC/a.jpg": [sentence], "Basal cell carcinoma/b.HEIC": [sentence], "unknown/c.dcm": []}
    assert raw.ontology is None
    assert request.findings.not_read == {".cr2": 1, ".docx": 1, "without an ending": 1}
    assert request.findings.placeholders == {"unknown": 1}


@pytest.mark.parametrize("ending", [".jfif", ".JPE", ".jif", ".pjpeg", ".apng"])
def test_every_ending_of_a_format_is_an_image(tmp_path: Path, ending: str) -> None:
    put(tmp_path / "folder", f"BCC/a{ending}")
    (tmp_path / "tars").mkdir()
    tar(tmp_path / "tars" / "0.tar", [(f"a{ending}", b"x"), ("a.txt", b"A patch.")])
    for source, folder in (("image_folder", "folder"), ("webdataset", "tars")):
        raw, request = read(source, tmp_path / folder)
        assert raw.table["image"].to_pylist()[0].endswith(f"a{ending}")
        assert not request.findings.not_read
    # Where a table gives only names.
    LAYOUTS["ham10000"].write(tmp_path / "table")
    (first, *_) = [file for file in (tmp_path / "table").rglob("*.jpg") if file.stem == first_image(tmp_path / "table")]
    first.rename(first.with_suffix(ending))
    raw, _ = read("ham10000", tmp_path / "table")
    assert raw.table["image"].to_pylist()[0].endswith(ending)


def first_image(folder: Path) -> str:
    with (folder / str(LAYOUTS["ham10000"].table)).open(newline="") as table:
        return next(csv.DictReader(table))["image_id"]


def test_sentences_of_a_tar_name_diseases_and_what_is_no_file_is_told(tmp_path: Path) -> None:
    documents = [{"label": "BCC"}, {"labels": ["nan", "Rodent ulcer"]}, {"label": "Unknown"}]
    files = [(f"{n}{end}", json.dumps(one).encode()) for n, one in enumerate(documents) for end in (".jpg", ".json")]
    tar(tmp_path / "0.tar", [*files, ("../out.jpg", b"x")])
    raw, request = read("webdataset", tmp_path)
    sentence = ontology_caption(["Rodent ulcer"])
    assert [[each["text"] for each in row["captions"]] for row in raw.table.to_pylist()] == [[sentence]] * 2 + [[]]
    assert request.findings.placeholders == {"nan": 1, "unknown": 1}
    assert request.findings.not_read == {"links, and names that lead out of the archive": 1}


NAMED = [source for source in sorted(LAYOUTS) if source in ("ham10000", "isic", "fitzpatrick17k", "skincap", "skincon")]


@pytest.mark.parametrize("source", NAMED)
def test_several_files_of_one_name_are_refused_with_their_paths(source: str, tmp_path: Path) -> None:
    LAYOUTS[source].write(tmp_path)
    before, _ = read(source, tmp_path)
    first = before.table.to_pylist()[0]
    name = Path(first["image"].rpartition("!/")[2]).name
    put(tmp_path, f"GroundTruth_masks/{name}")
    put(tmp_path, f"other_masks/{name}")
    after, _ = read(source, tmp_path)
    dropped = {row.source_id: row for row in after.dropped if row.reason == "ambiguous_image"}
    assert after.num_rows == before.num_rows
    kept = {row["source_id"]: row["image"] for row in after.table.to_pylist()}
    # Either the release's own folder holds it, or nobody can tell.
    assert kept.get(first["source_id"]) == first["image"] or "GroundTruth_masks" in dropped[first["source_id"]].detail


def test_masks_beside_ham10000_are_not_taken_for_its_images(tmp_path: Path) -> None:
    row = {"dx_type": "histo", "age": "45", "sex": "female", "localization": "back", "dx": "mel"}
    rows = [{"lesion_id": f"l{number}", "image_id": f"ISIC_{number}", **row} for number in range(6)]
    with (tmp_path / "HAM10000_metadata.csv").open("w", newline="") as sink:
        writer = csv.DictWriter(sink, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for number in range(6):
        put(tmp_path, f"HAM10000_images_part_1/ISIC_{number}.jpg")
        put(tmp_path, f"GroundTruth_masks/ISIC_{number}.png")
    raw, _ = read("ham10000", tmp_path)
    assert raw.table["image"].to_pylist() == [f"HAM10000_images_part_1/ISIC_{number}.jpg" for number in range(6)]
    assert not raw.dropped


@pytest.mark.parametrize(
    ("written", "on_disk"),
    [
        ("images\\8.jpg", "images/8.jpg"),
        (".\\images\\9.jpg", "images/9.jpg"),
        (unicodedata.normalize("NFC", "bilder/fußpilz é.jpg"), unicodedata.normalize("NFD", "bilder/fußpilz é.jpg")),
        (unicodedata.normalize("NFD", "é\\a.jpg"), unicodedata.normalize("NFC", "é/a.jpg")),
    ],
)
def test_other_spellings_of_a_path_are_found(tmp_path: Path, written: str, on_disk: str) -> None:
    put(tmp_path, on_disk, b"pixels")
    fetched = ImageStore(str(tmp_path), max_bytes=100, follow_links=False).fetch(written)
    assert (fetched.path, fetched.data) == (written, b"pixels")


def test_what_is_not_found_names_what_is_there(tmp_path: Path) -> None:
    put(tmp_path, "images/A.JPG")
    put(tmp_path / "inner", "b.jpg")
    store = ImageStore(str(tmp_path), max_bytes=100, follow_links=False)
    fetched = store.fetch("images/a.jpg")
    assert (fetched.reason, "'A.JPG' is there" in fetched.detail) == (MISSING_FILE, True)
    for written in ("IMAGES/a.jpg", "Images\\A.jpg"):
        assert "'images/A.JPG' is there: write it like this" in store.fetch(written).detail
    assert "is there" not in store.fetch("IMAGES/c.jpg").detail
    assert (
        "'b.jpg' is there"
        in ImageStore(str(tmp_path / "inner"), max_bytes=100, follow_links=False).fetch("B.jpg").detail
    )
    for name in (unicodedata.normalize("NFC", "é.jpg"), unicodedata.normalize("NFD", "é.jpg")):
        put(tmp_path, name)
    unclear = store.fetch(".\\" + unicodedata.normalize("NFD", "é.jpg"))
    assert (unclear.data, unclear.reason) == (None, MISSING_FILE)
    assert "are there: write one of them" in unclear.detail
    inner = ImageStore(str(tmp_path / "inner"), max_bytes=100, follow_links=False)
    for outside in ("..\\images\\A.JPG", "a\\..\\..\\images\\A.JPG"):
        assert inner.fetch(outside).reason in (MISSING_FILE, OUTSIDE)


def tar(file: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


KEYS = ["case 1.5 cm", "PAT_8.left.arm.png", "plain", "deep/a.b"]


@pytest.mark.parametrize("by_kind", [False, True])
def test_every_sample_of_a_tar_comes_out_with_its_text(tmp_path: Path, by_kind: bool) -> None:
    files = [(f"{key}{end}", key.encode()) for key in KEYS for end in (".jpg", ".txt")]
    if by_kind:
        files.sort(key=lambda file: file[0].endswith(".txt"))
    extra = [("plain.cls", b"3"), ("plain.seg.png", b"mask"), ("__MACOSX/._plain.jpg", b""), ("README", b"hello")]
    tar(tmp_path / "0.tar", [*files, *extra])
    raw, request = read("webdataset", tmp_path)
    assert [row["captions"][0]["text"] for row in raw.table.to_pylist()] == KEYS
    assert [row["image"].rpartition("/")[2] for row in raw.table.to_pylist()] == [
        f"{Path(key).name}.jpg" for key in KEYS
    ]
    assert request.findings.not_read == {".cls": 1, ".seg.png": 1, "without an ending": 1}
    assert request.findings.passed_over == {"__MACOSX": 1}


def test_joined_tars_keep_their_samples_and_odd_numbers_stay_json(tmp_path: Path) -> None:
    one = [("a.jpg", b"1"), ("a.txt", b"first"), ("b.jpg", b"2"), ("b.png", b"2"), ("b.txt", b"x")]
    two = [
        ("a.jpg", b"3"),
        ("a.json", b'{"caption": "again", "score": NaN, "weight": -Infinity, "age": "AGE_30_TO_39"}'),
    ]
    tar(tmp_path / "0.tar", [*one, *two])
    raw, request = read("webdataset", tmp_path)
    assert [row["captions"][0]["text"] for row in raw.table.to_pylist()] == ["first", "x", "again"]
    assert request.findings.not_read == {"a second image of one sample": 1}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    extra = json.loads(raw.table.to_pylist()[2]["meta"]["extra"], parse_constant=refuse)
    assert extra == {"age": "AGE_30_TO_39", "weight": "-inf"}
