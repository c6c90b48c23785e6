"""The export of MAKE's training table: the released columns, and samples that come back from it as they were."""

from __future__ import annotations

import csv
import json
import tempfile
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dermray.corpus.captions import parents
from dermray.corpus.schema import CAPTION_ASPECTS
from dermray.export.parts import NOT_CARRIED
from tests.raw_sources import MAKE_ROW
from tests.unit.test_export_formats import JPEGS, content, export, imported, prepared, texts, write_corpus

Drawn = dict[str, Any]
# What the reader gives a row by itself: where its image lies.
BY_PLACE = ("source_id", "meta", "phash")


def drawn(captions: list[tuple[str, str]], **others: Any) -> Drawn:
    said = {"labels": [], "concepts": [], "skin_type": None, "source": "derm1m", "source_id": "1", "meta": None}
    return {**said, "captions": captions, "split": "train", **others}


def table(folder: Path, split: str = "train") -> list[dict[str, str]]:
    with (folder / f"MAKE_{split}.csv").open(encoding="utf-8", newline="") as rows:
        return list(csv.DictReader(rows))


def counts(folder: Path, split: str = "train") -> dict[str, int]:
    found: dict[str, int] = json.loads((folder / "export.json").read_text())["splits"][split]
    return found


def ordered(sample: Drawn) -> list[tuple[str, str]]:
    return sorted((caption["aspect"], caption["text"]) for caption in sample["captions"])


META = {"age": 45.0, "sex": "male", "body_site": "neck", "symptoms": "itch", "patient_id": None, "lesion_id": None}
EXTRA = json.dumps({"source": "youtube", "source_type": "edu"})
SENTENCES = [
    ("raw", "Red patch. It itches."),
    ("ontology", "This is a skin photo diagnosed as inflammatory, eczema."),
    ("concept", "This skin photo shows red, patch."),
    ("sub", "Red patch."),
    ("sub", "It itches."),
]
WHOLE = drawn(SENTENCES, labels=["eczema, dermatitis"], concepts=["red", "patch"], meta={**META, "extra": EXTRA})


def test_a_row_is_as_the_released_ones(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [WHOLE])
    export(tmp_path / "corpus", tmp_path / "out", format="make_table")
    (row,) = table(tmp_path / "out")
    assert list(row)[:13] == [
        *("filename", "caption", "truncated_caption", "source", "source_type", "standardized_disease"),
        *("ontology_final", "skin_concept_standarized", "augmented_caption", "body_location", "symptoms"),
        *("age", "gender"),
    ]
    assert set(row) == {*MAKE_ROW, "filename", "augmented_caption"}
    assert len(row) == 26
    shared = set(MAKE_ROW) - {"standardized_disease", "source", "source_type", "ontology_caption"}
    changed = {"ontology_final": "inflammatory, eczema", "subcaption_1": "Red patch.", "subcaption_2": "It itches."}
    assert {name: row[name] for name in shared} == {name: MAKE_ROW[name] for name in shared} | changed
    assert (row["filename"], row["standardized_disease"]) == ("images/train/00000/000000000.jpg", "eczema")
    assert (tmp_path / "out" / row["filename"]).read_bytes() == JPEGS[0]
    assert (row["source"], row["source_type"]) == ("youtube", "edu")
    assert row["augmented_caption"] == "".join(text for _, text in SENTENCES[:3])
    lost = {name: count for name, count in counts(tmp_path / "out").items() if name.startswith(NOT_CARRIED)}
    assert lost == {f"{NOT_CARRIED}source_id": 1}


def test_what_is_not_there_is_masked_in_the_order_caption_ontology_visual(tmp_path: Path) -> None:
    kinds = [[0], [1], [2], [0, 2], [3]]
    write_corpus(tmp_path / "corpus", [drawn([SENTENCES[place] for place in kind]) for kind in kinds])
    export(tmp_path / "corpus", tmp_path / "out", format="make_table")
    rows = table(tmp_path / "out")
    assert [literal_eval(row["knowledge_masks"]) for row in rows] == [
        [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 0],
    ]  # fmt: skip
    assert [(row["sub_captions"], literal_eval(row["sub_caption_mask"])[:2]) for row in rows[3:]] == [
        ("0", [0, 0]),
        ("1", [1, 0]),
    ]
    assert rows[0]["standardized_disease"] == "no definitive diagnosis"


def test_sub_captions_are_in_the_row_of_their_raw_caption(tmp_path: Path) -> None:
    captions = [*SENTENCES[:4], ("raw", "A plaque. It bled."), ("sub", "A plaque."), ("sub", "It bled.")]
    assert parents([aspect for aspect, _ in captions]) == [None, None, None, 0, None, 4, 4]
    # As a language model leaves them: the sentences behind.
    behind = [captions[0], captions[3], *captions[1:3]]
    write_corpus(tmp_path / "corpus", [drawn(captions), drawn(behind)])
    export(tmp_path / "corpus", tmp_path / "out", format="make_table")
    first, second, third = table(tmp_path / "out")
    assert (third["knowledge_masks"], third["subcaption_1"]) == ("[1, 1, 1]", "Red patch.")
    assert counts(tmp_path / "out")[f"{NOT_CARRIED}order of captions"] == 1
    assert (first["truncated_caption"], first["subcaption_1"]) == ("Red patch. It itches.", "Red patch.")
    assert (second["truncated_caption"], second["subcaption_2"]) == ("A plaque. It bled.", "It bled.")
    assert second["knowledge_masks"] == "[1, 1, 1]"
    assert first["filename"] == second["filename"]
    back = {each["image"]: each for each in imported(tmp_path / "out", tmp_path / "back", "make_table")}[JPEGS[0]]
    assert [(each["aspect"], each["text"]) for each in back["captions"]] == captions


aspects = st.sampled_from(CAPTION_ASPECTS)
# What ends a row, or a text, unless it is written with care.
odd_texts = st.tuples(texts, st.sampled_from(["\r", "\0", "\n", "\r\n", '"\r,"', "\x0b\x1c"]), texts).map("".join)
# Of a diagnosis or of concepts no sentence is made where the row has one.
sentences = st.tuples(st.just("ontology"), texts), st.tuples(st.just("concept"), texts)
samples = st.lists(
    st.builds(
        lambda raw, ontology, concept, more, labels, concepts, split, age: drawn(
            list(dict.fromkeys([("raw", raw), ontology, concept, *more])),
            labels=labels,
            concepts=concepts,
            split=split,
            meta={**META, "age": age, "extra": EXTRA},
        ),
        texts | odd_texts,
        *sentences,
        st.lists(st.tuples(aspects, texts), max_size=7),
        st.lists(st.sampled_from(["eczema, dermatitis", "银屑病", "Nevus", "hand eczema"]), max_size=1),
        st.lists(st.sampled_from(["red", "a, b", "皮疹"]), max_size=2, unique=True),
        st.sampled_from(["train", "val", "test"]),
        st.none() | st.floats(0, 130, width=16),
    ),
    min_size=1,
    max_size=len(JPEGS),
)


@examples(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    # As for the other formats.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(drawn=samples)
def test_reading_gives_the_same_samples_but_those_that_are_told(tmp_path: Path, drawn: list[Drawn]) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    write_corpus(folder / "corpus", drawn)
    export(folder / "corpus", folder / "out", format="make_table", samples_per_file=3)
    before = {sample["image"]: sample for sample in prepared(folder / "corpus")}
    options = {}
    if {each["split"] for each in drawn} == {"train"}:
        options = {"split": "train"}
    back = {sample["image"]: sample for sample in imported(folder / "out", folder / "back", "make_table", **options)}
    assert back.keys() == before.keys()
    splits = {sample["split"] for sample in before.values()}
    told = {split: counts(folder / "out", split) for split in splits}
    fields = {"captions", "labels", "concepts", "meta.age"}
    for image, sample in before.items():
        if back[image]["captions"] != sample["captions"] and ordered(back[image]) == ordered(sample):
            told[sample["split"]][f"{NOT_CARRIED}order of captions"] -= 1
            back[image]["captions"] = sample["captions"]
    assert not any(each.get(f"{NOT_CARRIED}order of captions") for each in told.values())
    for split in splits:
        pairs = [(before[image], back[image]) for image in before if before[image]["split"] == split]
        for name in fields:
            found = [
                [(side["meta"] or {}).get("age") if name == "meta.age" else side[name] for side in pair]
                for pair in pairs
            ]
            assert sum(old != new for old, new in found if old is not None) == told[split].get(
                f"{NOT_CARRIED}{name}", 0
            )
    for image, sample in before.items():
        same = {name: value for name, value in sample.items() if name not in {*BY_PLACE, *fields}}
        assert {name: back[image][name] for name in same} == same


def test_what_has_no_place_is_told_by_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patient = {**META, "age": None, "patient_id": "p", "extra": json.dumps({"ward": "7", "source": "x"})}
    write_corpus(
        tmp_path / "corpus",
        [
            drawn(SENTENCES, skin_type=2, meta=patient, source="clinic"),
            drawn([("raw", "N/A"), ("raw", "two\nlines")], labels=["Nevus"], concepts=["Red"]),
            drawn(SENTENCES[:1], labels=["Nevus"], split="val"),
        ],
    )
    export(tmp_path / "corpus", tmp_path / "out", format="make_table")
    told = {name: count for name, count in counts(tmp_path / "out").items() if name.startswith(NOT_CARRIED)}
    once = ("absence of a sentence", "captions", "concepts", "meta.extra", "meta.patient_id", "skin_type", "source")
    assert told == {**{f"{NOT_CARRIED}{name}": 1 for name in once}, f"{NOT_CARRIED}source_id": 2}
    assert counts(tmp_path / "out", "val")[f"{NOT_CARRIED}absence of a sentence"] == 1


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [WHOLE, drawn(SENTENCES[:1], split="val")])
    for name in ("a", "b"):
        export(tmp_path / "corpus", tmp_path / name, format="make_table")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert {"MAKE_train.csv", "MAKE_val.csv", "export.json", "ontology.json"} < set(content(tmp_path / "a"))
