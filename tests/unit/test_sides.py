"""Trees that name the branches benign and malignant in other words or places: no malignancy is shown as benign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dermray.corpus import branches, sides
from dermray.corpus.ontology import Ontology
from dermray.prepare import samples
from dermray.raw.sources import READERS, SourceRequest
from tests.raw_sources import LAYOUTS

MELANOMA = (
    "melanoma",
    "Malignant melanoma, melanoma",
    "Merkel cell carcinoma",
    "BCC",
    "nodular mela\u00adnoma of the toe",
)


@pytest.mark.parametrize(
    ("names", "side"),
    [
        ("benign|Benign lesions|BENIGN|benignant|gutartig|Gutartige Hautl\u00e4sionen|b\u00e9nignes|benigno", "benign"),
        ("non-malignant|Nonmalignant|not malignant|not cancer|non-cancerous|nicht maligne|\u826f\u6027", "benign"),
        ("malignant|Malignancies|b\u00f6sartig|BOESARTIG|maligno|L\u00e9sions malignes|Skin cancer", "malignant"),
        ("non-benign|\u76ae\u80a4\u6076\u6027\u80bf\u7624|non-melanoma skin cancer", "malignant"),
        ("benign/malignant|premalignant|pre-malignant|root|growths|neuroma|benighted or malingering", None),
    ],
)
def test_which_side_a_name_says(names: str, side: str | None) -> None:
    found = {name: sides.side_of(name) for name in names.split("|")}
    assert found == dict.fromkeys(names.split("|"), side) | ({"benighted or malingering": None} if side is None else {})


@pytest.mark.parametrize(
    ("names", "expected"),
    [("non-neoplastic|Nonneoplastic|Infections|bacterial", True), ("non-infectious|neoplastic|viral|tumours", False)],
)
def test_which_branches_hold_no_growth(names: str, expected: bool) -> None:
    assert {sides.is_no_growth(name) for name in names.split("|")} == {expected}


@pytest.mark.parametrize(
    ("names", "expected"),
    [("malignant|Skin cancer|Malignant skin lesions", True), ("malignant melanoma|breast cancer|growths", False)],
)
def test_which_branches_may_hold_any_disease_of_their_side(names: str, expected: bool) -> None:
    assert {sides.is_general(name) for name in names.split("|")} == {expected}


# A tree, with {} for a malignancy, and what its path must be above it.
TREES: dict[str, tuple[dict[str, list[str]], list[str]]] = {
    "renamed": (
        {"root": ["Benign lesions", "Skin cancer"], "Benign lesions": ["{}"], "Skin cancer": ["lump"]},
        ["Skin cancer"],
    ),
    "German": (
        {"root": ["gutartig", "b\u00f6sartig"], "gutartig": ["{}"], "b\u00f6sartig": ["lump"]},
        ["b\u00f6sartig"],
    ),
    "denied": (
        {"root": ["non-malignant", "malignant"], "non-malignant": ["{}"], "malignant": ["lump"]},
        ["malignant"],
    ),
    "not cancer": (
        {"root": ["not cancer", "cancer"], "not cancer": ["skin"], "skin": ["{}"], "cancer": ["lump"]},
        ["cancer"],
    ),
    "a benign disease": ({"root": ["Nevi"], "Nevi": ["{}", "blue nevus"]}, []),
    "a benign disease beside the branch": (
        {"root": ["Nevi", "malignant"], "Nevi": ["{}"], "malignant": ["lump"]},
        ["malignant"],
    ),
    "another malignancy is no branch": (
        {"root": ["benign", "Sarcoma, malignant"], "benign": ["{}"], "Sarcoma, malignant": ["lump"]},
        [],
    ),
    "malignant below benign": (
        {"root": ["benign"], "benign": ["malignant", "lump"], "malignant": ["{}"]},
        ["malignant"],
    ),
    "benign below malignant": ({"root": ["malignant"], "malignant": ["benign"], "benign": ["{}"]}, ["malignant"]),
    "no neoplasm": ({"root": ["non-neoplastic", "malignant"], "non-neoplastic": ["{}"], "malignant": ["lump"]}, []),
}


@pytest.mark.parametrize("name", MELANOMA)
@pytest.mark.parametrize("shape", TREES)
def test_no_malignancy_is_below_what_is_benign_in_other_words_or_places(shape: str, name: str) -> None:
    written, above = TREES[shape]
    tree = Ontology({key: [child.format(name) for child in below] for key, below in written.items()})
    for settled in (branches.settled(tree), branches.settled(branches.settled(tree))):
        assert settled.path(name) == [*above, name]
    given = ", ".join([*tree.ancestors(name), *name.split(", ")])
    learned, _ = branches.learn(tree, branches.votes(tree, [([name], given, 3)]))
    assert learned.path(name) == [*above, name]


def said(tree: Ontology, labels: list[str], path: str, captions: list[dict[str, Any]] | None = None) -> tuple[Any, ...]:
    row: samples.RawRow = {"labels": labels, "hierarchy": path, "captions": captions or [], "concepts": []}
    found = samples.resolve_labels(row, tree)
    told = samples._captions(row, found, tree, 0)
    return (
        found.labels,
        [text.partition(" diagnosed as ")[2] for _, text in told],
        samples.contradicts(row, found, tree),
    )


def test_a_malignancy_that_the_tree_lacks_does_not_become_a_benign_node_of_its_path() -> None:
    tree = Ontology({"root": ["benign", "malignant"], "benign": ["Nevus"], "malignant": ["Melanoma"]})
    assert said(tree, ["wobble sarcoma"], "benign, nevus") == ((), ["wobble sarcoma."], True)
    assert said(tree, ["wobble sarcoma"], "malignant") == (("malignant",), ["malignant."], False)
    assert said(tree, ["wobble lump"], "benign, nevus") == (("Nevus",), ["benign, nevus."], False)
    flat = Ontology({"root": ["Melanoma", "Nevus"]})
    assert said(flat, ["Melanoma"], "gutartig, melanoma") == (("Melanoma",), ["melanoma."], True)
    # A row of two: what is benign in its path may be said of the other one.
    both = "growths, benign, nevus, malignant, melanoma"
    assert said(tree, ["Melanoma", "Nevus"], both) == (("Melanoma", "Nevus"), [f"{both}."], False)


def test_a_sentence_of_the_source_that_puts_a_malignancy_under_benign_is_written_anew(tmp_path: Path) -> None:
    layout = LAYOUTS["make_table"]
    layout.write(tmp_path)
    table = tmp_path / str(layout.table)
    wrong = "This is a skin photo diagnosed as benign, melanocytic, psoriasis."
    plain = table.read_text(encoding="utf-8").replace(
        "diagnosed as inflammatory, psoriasis", "diagnosed as benign, melanocytic, psoriasis"
    )
    table.write_text(plain.replace("psoriasis", "melanoma").replace("inflammatory", "malignant"), encoding="utf-8")
    tree = {"root": ["benign", "malignant"], "benign": ["nevus"], "malignant": ["melanoma"]}
    (tmp_path / "ontology.json").write_text(json.dumps(tree), encoding="utf-8")
    raw = READERS["make_table"](SourceRequest(str(tmp_path)))
    row = raw.table.to_pylist()[0]
    assert wrong.replace("psoriasis", "melanoma") in [each["text"] for each in row["captions"]]
    assert raw.ontology is not None
    found = samples.resolve_labels(row, raw.ontology)
    sentences = [text for aspect, text in samples._captions(row, found, raw.ontology, 0) if aspect == "ontology"]
    assert sentences == ["This is a skin photo diagnosed as malignant, melanoma."]
