"""A clinic's own table, as a spreadsheet saves it, from file to report: every row told, every label accounted for."""

from __future__ import annotations

import csv
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dermray import storage
from dermray.commands import evaluate as evaluate_job
from dermray.commands import prepare as prepare_job
from dermray.commands import register as register_job
from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.evaluate.classes import classes_of
from dermray.evaluate.tables import Layout, RawTable
from dermray.prepare import report
from dermray.prepare.pipeline import prepare
from dermray.prepare.settings import PrepareConfig
from tests.corpora import write_model
from tests.printed import alarming
from tests.raw_sources import write_images

HEADER = ["Photo ", "Diagnosis", "Age", "Sex", "Skin type", "Patient", ""]
BCC, AK, SEB_K = "Rodent ulcer", "Solar keratosis", "Seborrhoeic keratosis"
# What the cells say, and the condition that they mean; None: nothing.
SAID: list[tuple[str, str | None]] = [
    *[
        ("BCC", BCC),
        ("Rodent ulcer", BCC),
        ("rodent ulcer ", BCC),
        ("Rodent ulcer", BCC),
        ("b.c.c.", BCC),
        ("BCCs", BCC),
    ],
    *[("AK", AK), ("Solar keratosis", AK), ("Solar keratosis", AK), ("actinic keratoses", AK)],
    *[("Seb K", SEB_K), ("Seborrhoeic keratosis", SEB_K), ("seborrheic-keratosis", SEB_K)],
    *[("SCC", "Squamous cell carcinoma"), ("MEL", "Melanoma"), ("Naevus", "Naevus"), ("?SCC", "?SCC"), ("SK", "SK")],
    *[("Acne", "Acne"), ("Ringworm", "Ringworm"), ("nan", None), ("unknown", None), ("-1", None)],
]
PATIENTS = [("45-49", "F", "FST3"), ("85+", "woman", "III"), ("6 months", "M", "Fitzpatrick 2"), ("40s", "W", "-1")]


def write_clinic(folder: Path) -> int:
    """Draw the photographs and write the table; its number of rows."""
    accented = "Läsion.jpg"
    drawn = [f"{number}.jpg" for number in range(len(SAID))]
    write_images(folder / "photos", unicodedata.normalize("NFD", accented), *drawn)
    rows = [[f"photos/{n}.jpg", said, *PATIENTS[n % 4], f"P{n}"] for n, (said, _) in enumerate(SAID)]
    rows[1][0] = "photos\\1.jpg"
    rows += [
        [f"photos/{unicodedata.normalize('NFC', accented)}", "BCC, AK", "50", "F", "II", "P90"],
        ["photos/not-there.jpg", "BCC", "50", "F", "II", "P91"],
        rows[0],
        ["photos/2.jpg", "BCC", "50", "F", "II", "P92", "", "too", "many"],
        ["photos/copy of 3.jpg", "MEL", "50", "F", "II", "P93"],
    ]
    shutil.copy(folder / "photos" / "3.jpg", folder / "photos" / "copy of 3.jpg")
    with (folder / "photos.csv").open("w", encoding="utf-8-sig", newline="") as sink:
        csv.writer(sink, delimiter=";").writerows([HEADER, *([*row, ""] if len(row) < 7 else row for row in rows)])
    return len(rows)


def keys_of(folder: Path, output: Path) -> list[str]:
    """The arguments of a preparation."""
    columns = {"image": "Photo", "label": "Diagnosis", "age": "Age", "sex": "Sex", "patient_id": "Patient"}
    keys = [f"columns.{key}={name}" for key, name in (columns | {"skin_type": "Skin type"}).items()]
    keys += ["source=csv", "table=photos.csv", "split.val=0.3", "max_dropped_fraction=0.5"]
    return [f"input={folder}", f"output={output}", *keys]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_clinics_table_goes_to_its_report_with_every_row_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "clinic", tmp_path / "prepared"
    num_rows = write_clinic(folder)
    prepare(parse(PrepareConfig, keys_of(folder, output)))

    stats = storage.read_json(str(output / report.STATS))
    assert stats["dropped"] == {"empty_caption": 3, "malformed_row": 1, "missing_file": 1}
    assert stats["rows"] == {"in": num_rows, "in_samples": num_rows - 5, "dropped": 5}
    meant = Counter(label for _, label in SAID if label) + Counter([BCC, AK, "Melanoma"])
    assert stats["labels"] == meant
    assert (stats["rows_labelled"], stats["rows_resolved"], stats["unresolved_labels"]) == (num_rows - 5,) * 2 + ({},)
    assert stats["not_understood"] == {"age": {"40s": 5}, "sex": {"W": 5}}
    assert stats["placeholders"] == {"-1": 1, "nan": 1, "unknown": 1}
    twice = "photos/3.jpg and photos/copy of 3.jpg: Rodent ulcer; Melanoma"
    assert stats["told"] == {
        "labels that make classes of their own": {"?SCC": 1, "SK": 1},
        "equal images whose rows name different diseases": {twice: 1},
    }

    shards = [output / shard.path for shard in Manifest.load(str(output)).shards]
    samples = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    by_image = {sample["source_id"]: sample for sample in samples}
    assert by_image["photos\\1.jpg"]["labels"] == [BCC]
    assert by_image[f"photos/{unicodedata.normalize('NFC', 'Läsion.jpg')}"]["labels"] == [BCC, AK]
    named = by_image["photos/0.jpg"]["captions"][0]["text"]
    assert named == f"This is a skin photo diagnosed as {BCC}."
    # What the row of the first file does not say, that of its copy does.
    assert Counter(sample["skin_type"] for sample in samples)[None] == 4

    out = capsys.readouterr().out
    assert f"1 images lie in several files whose rows name different diseases, and get them all: {twice!r} (1)" in out
    assert "?SCC (1), SK (1; could be Seborrheic keratosis or Solar keratosis)" in out
    assert "5 rows have no sex that is understood; it is kept as written: 'W' (5)" in out
    html = (output / report.REPORT).read_text(encoding="utf-8")
    assert all(text in html for text in [*meant, *stats["dropped"], "40s", "photos/not-there.jpg", twice])


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.usefixtures("ray_cluster")
def test_a_clinics_table_goes_from_a_dry_run_to_a_registered_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the commands of docs/quickstart.md, but for the training; each says what it leaves out, and nothing alarms."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder, corpus = tmp_path / "clinic", tmp_path / "prepared"
    num_rows, model = write_clinic(folder), write_model(tmp_path / "model")
    keys = keys_of(folder, corpus)
    assert prepare_job.main(["--dry-run", *keys]) == 0
    assert not corpus.exists()
    looked = capfd.readouterr().out
    assert prepare_job.main(keys) == 0
    prepared = capfd.readouterr()
    found = [line for line in looked.splitlines() if line.startswith("prepare: ")]
    assert set(found) <= set(prepared.out.splitlines())
    assert f"5 of {num_rows} rows dropped: empty_caption 3 (rows 21, 22, 23), " in prepared.out

    scored = [f"model={model}", "tasks=[zero_shot]", "bootstrap=20", "num_actors=1"]
    assert evaluate_job.main([*scored, f"corpus={corpus}", f"output={tmp_path / 'report'}"]) == 0
    own = [f"data={folder / 'photos.csv'}", "columns.image=Photo", "columns.label=Diagnosis"]
    assert evaluate_job.main([*scored, *own, f"output={tmp_path / 'own'}"]) == 0
    evaluated = capfd.readouterr()
    report = storage.read_json(str(tmp_path / "report" / "report.json"))
    manifest = Manifest.load(str(corpus))
    rows = report["corpus"]["rows"]
    assert rows == {
        "in": manifest.num_samples,
        "used": manifest.splits["val"],
        "told": {"in another split": manifest.splits["train"]},
    }
    report = storage.read_json(str(tmp_path / "own" / "report.json"))
    task, rows = report["tasks"]["zero_shot"], report["corpus"]["rows"]
    assert (rows["in"], rows["used"]) == (num_rows, num_rows - 1)
    assert task["num_samples"] + sum(task["excluded"].values()) == num_rows
    assert task["excluded"]["image not readable"] == 1
    assert report["corpus"]["told"] == {
        "age": {"40s": 5},
        "sex": {"W": 5},
        "labels that make classes of their own": {"?SCC": 1, "SK": 1},
        "images": {"rows name an image that an earlier row names": 1},
    }
    assert f"zero_shot: {task['num_samples']} of {num_rows} samples; left out: " in evaluated.out

    arguments = [f"model={model}", f"report={tmp_path / 'report'}", "name=clinic"]
    assert register_job.main(arguments) == 0
    registered = capfd.readouterr()
    assert "models:/clinic@champion now is this version" in registered.out
    said = "".join(each.out + each.err for each in (prepared, evaluated, registered))
    assert alarming(said) == []


def test_the_same_table_is_scored_by_the_same_classes(tmp_path: Path) -> None:
    num_rows = write_clinic(tmp_path)
    layout = Layout(image=("Photo",), label=("Diagnosis",))
    samples = RawTable.read(str(tmp_path / "photos.csv"), layout).samples(None)
    classes = classes_of(samples)
    excluded = classes.excluded() | samples.dropped
    assert set(classes.names) == {label for _, label in SAID if label}
    assert int((classes.targets >= 0).sum()) + sum(excluded.values()) == num_rows
    assert {reason: number for reason, number in excluded.items() if "nothing" in reason} == {
        f"label {text!r} says nothing": 1 for text in ("nan", "unknown", "-1")
    }
