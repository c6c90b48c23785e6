"""Caption aspects and their sentences."""

from __future__ import annotations

from dermray.corpus.captions import concept_caption, diagnosis_path, distinct, ontology_caption
from dermray.corpus.ontology import Ontology
from tests.unit.test_ontology import TREE


def test_sentences() -> None:
    assert (
        ontology_caption(["inflammatory", "eczema", "contact dermatitis"])
        == "This is a skin photo diagnosed as inflammatory, eczema, contact dermatitis."
    )
    assert concept_caption(["red", "patch"]) == "This skin photo shows red, patch."


def test_nothing_to_say() -> None:
    assert ontology_caption([]) is None
    assert ontology_caption([" "]) is None
    assert concept_caption([]) is None


def test_names_come_once_and_stripped() -> None:
    assert ontology_caption([" eczema", "eczema ", ""]) == "This is a skin photo diagnosed as eczema."
    assert concept_caption(["red", "red"]) == "This skin photo shows red."


def test_diagnosis_path_shares_ancestors_and_shows_the_first_synonym() -> None:
    tree = Ontology(TREE)
    assert diagnosis_path(["Lichen planus", "psoriasis"], tree) == ["inflammatory", "lichen planus", "psoriasis"]
    assert diagnosis_path(["Nail diseases, nail disease"], tree) == ["nail diseases"]


def test_diagnosis_path_does_not_say_what_is_not_sure() -> None:
    assert diagnosis_path(["Malignant melanoma, melanoma"], Ontology(TREE)) == [
        "proliferations",
        "melanocytic",
        "malignant melanoma",
    ]


def test_distinct_keeps_order_and_aspects() -> None:
    captions = [("raw", "a"), ("ontology", "a"), ("raw", "a"), ("concept", "  "), ("raw", "b")]
    assert distinct(captions) == [("raw", "a"), ("ontology", "a"), ("raw", "b")]
