"""One table, read by preparation and by evaluation: the same rows, labels and captions, or a word about it."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dermray.config import parse
from dermray.corpus import spelling
from dermray.corpus.ontology import Ontology
from dermray.corpus.synonyms import Synonyms
from dermray.errors import ConfigError, CorpusError
from dermray.evaluate import cases
from dermray.evaluate.cases import Case
from dermray.evaluate.classes import classes_of
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics.groups import SKIN_TYPES, age_band
from dermray.evaluate.tables import Layout, RawTable
from dermray.prepare import samples as samples_of
from dermray.prepare.labels import counted
from dermray.raw import sources
from dermray.raw.sources import SourceRequest
from dermray.raw.splits import split_name
from tests.raw_sources import write_images, write_table


def labelled(folder: Path, *labels: str) -> Path:
    rows = [{"image": f"{number}.jpg", "label": label} for number, label in enumerate(labels)]
    write_table(folder / "metadata.csv", rows)
    write_images(folder, "0.jpg")
    return folder


def scored(folder: Path, *keys: str) -> Case:
    return cases.of_config(parse(EvaluateConfig, ["model=m", "output=o", f"data={folder / 'metadata.csv'}", *keys]))


def test_numbers_of_classes_that_count_from_1_are_refused(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "one", "1", "2.0", "3", "1")
    with pytest.raises(CorpusError, match="labels from 1 to 3, and numbers count the 3 classes from 0: subtract 1"):
        scored(folder, "classes=[melanoma,nevus,eczema]")
    case = scored(folder, "classes=[other,melanoma,nevus,eczema]")
    assert classes_of(case.samples).targets.tolist() == [1, 2, 3, 1]
    case = scored(labelled(tmp_path / "zero", "0", "2"), "classes=[melanoma,nevus,eczema]")
    assert classes_of(case.samples).targets.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("[Nevus,nevus]", "the class names 'Nevus' and 'nevus' are one"),
        ("[1,1.0]", "the class names '1' and '1.0' are one"),
        ("[nevus,nan]", "'nan' says nothing"),
        ("['',nevus]", "'' says nothing"),
    ],
)
def test_a_class_that_no_label_can_be_of_is_refused(tmp_path: Path, classes: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scored(labelled(tmp_path, "nevus"), f"classes={classes}")


def test_a_split_of_a_table_without_splits_is_told(tmp_path: Path) -> None:
    case = scored(labelled(tmp_path, "nevus", "melanoma"), "split=val")
    assert case.samples.split == "all"
    (line,) = case.told
    assert line.startswith("split=val has no effect: ")
    assert line.endswith("metadata.csv has no column 'split'")


def test_images_that_stand_in_several_rows_or_are_learnt_from_as_well_are_told(tmp_path: Path) -> None:
    rows = [("0.jpg", "train"), ("1.jpg", "train"), ("./0.jpg", "test"), ("2.jpg", "test"), ("2.jpg", "test")]
    write_table(
        tmp_path / "metadata.csv",
        [{"image": image, "split": split, "label": "nevus" if image < "2" else "acne"} for image, split in rows],
    )
    write_images(tmp_path, "0.jpg")
    case = scored(tmp_path)
    assert [line.partition(".csv: ")[2] for line in case.told] == [
        "1 rows name an image that an earlier row names",
        "1 images to score are learnt from as well",
    ]
    write_table(tmp_path / "metadata.csv", [{"image": f"{row}.jpg", "label": "nevus"} for row in range(3)])
    assert scored(tmp_path).told == ()


def test_labels_outside_a_class_list_are_told_by_name(tmp_path: Path) -> None:
    folder = labelled(tmp_path, "melanoma", "Nevi", "Melanomma", "5", "0", "Melanomma", "nan")
    case = scored(folder, "classes=[melanoma,nevus]")
    assert case.samples.told == {"labels outside the class list": {"Melanomma": 2, "5": 1}}
    (line,) = case.told
    assert line.endswith("metadata.csv: 3 labels are of no class of the list: 'Melanomma' (2), '5' (1)")


LABELS = """Melanoma|melanoma |MELANOMA|nevus|nan||unknown|1|1.0|-1|BCC|BCC, AK|no melanoma|Eczema; AK|['BCC','AK']
melanoma?|\ufeffnevus|n\u00adevus|\uff2eevus|-2|2|01|AK/BCC|None, BCC|B.C.C.|[1, 2]|a"b|'BCC'"""
CELLS = {
    "label": re.split(r"[|\n]", LABELS),
    "caption": ["", "nan", "A patch.", "A  patch.", "['a', 'b']", "x\ny", "\u200b", "-", "[nan]", '"q"', "a,b"],
    "split": ["train", "Test", "TEST ", "dev", "", "nan", "0", "holdout", "Training set"],
    "age": ["45", "45.0", "", "nan", "AGE_30_TO_39", "85+", "6 months", "x", "45 yo", "-1", "131", "45,5", "4 5"],
    "sex": ["F", "m", "Woman", "", "w", "Female ", "nan"],
    "skin_type": ["II", "2.0", "FST3", "7", "", "III/IV", "iii", "2 "],
    "image": ["0.jpg", "0.jpg", "./0.jpg", "nowhere.jpg", "", "../x.jpg"],
}
ROWS = st.lists(st.fixed_dictionaries({name: st.sampled_from(cells) for name, cells in CELLS.items()}), max_size=8)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=ROWS,
    separator=st.sampled_from(",;\t"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    tail=st.sampled_from(["", "too;few,cells\tfor a row\n"]),
)
def test_both_jobs_read_the_same_of_any_table(
    tmp_path: Path, rows: list[dict[str, str]], separator: str, encoding: str, tail: str
) -> None:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(CELLS), delimiter=separator, lineterminator="\n")
    writer.writeheader()
    # So many that one malformed row leaves the separator certain.
    writer.writerows([{**dict.fromkeys(CELLS, ""), "image": "0.jpg", "label": "BCC"}] * 10 + rows)
    (tmp_path / "metadata.csv").write_bytes((sink.getvalue() + tail).encode(encoding))
    write_images(tmp_path, "0.jpg")
    request = SourceRequest(str(tmp_path))
    raw = sources.read("csv", request)
    tree = Ontology.folded(counted(raw.table))
    layout = Layout(**{name: (name,) for name in ("image", "label", "caption", "split")})
    samples = RawTable.read(str(tmp_path / "metadata.csv"), layout).samples(None)
    assert samples.rows["in"] == raw.num_rows == len(rows) + 10 + bool(tail)
    prepared = [row for row in raw.table.to_pylist() if row["image"] and not row["image"].startswith("..")]
    assert len(samples) == samples.rows["used"] == len(prepared)
    for place, row in enumerate(prepared):
        said = {dimension: members[place] for dimension, members in samples.groups.items()}
        found = samples_of.resolve_labels(row, tree)
        # What a list names besides diseases is told by the one and by the other.
        known = [one for one in samples.labels[place] if not found.unresolved or Synonyms.load().meaning(one)]
        assert sorted(map(spelling.key, found.labels)) == sorted(map(spelling.key, known))
        assert samples.captions[place] == next((each["text"] for each in row["captions"]), None)
        assert said["age"] == age_band(row["meta"]["age"])
        assert said["sex"] == row["meta"]["sex"]
        assert said["skin_type"] == (SKIN_TYPES[row["skin_type"] - 1] if row["skin_type"] else None)
    splits = Counter(split_name(row["split"] or "") for row in raw.table.to_pylist())
    assert RawTable.read(str(tmp_path / "metadata.csv"), layout).splits == splits
