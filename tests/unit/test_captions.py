"""Caption aspects and their sentences."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.corpus.captions import (
    CONCEPT_TEMPLATE,
    ONTOLOGY_TEMPLATE,
    concept_caption,
    diagnosis_path,
    distinct,
    named_in,
    ontology_caption,
    sentences,
    sub_captions,
)
from dermray.corpus.ontology import Ontology
from tests.unit.test_ontology import TREE


def test_sentences() -> None:
    assert (
        ontology_caption(["inflammatory", "eczema", "contact dermatitis"])
        == "This is a skin photo diagnosed as inflammatory, eczema, contact dermatitis."
    )
    assert concept_caption(["red", "patch"]) == "This skin photo shows red, patch."


def test_what_a_sentence_names_is_as_it_was_put_in() -> None:
    assert named_in(ONTOLOGY_TEMPLATE, ontology_caption(["a", "b (c.)"]) or "") == "a, b (c.)"
    assert named_in(CONCEPT_TEMPLATE, "this Skin photo shows red. ") == "red"
    assert [named_in(CONCEPT_TEMPLATE, text) for text in ("", "Red.", "This skin photo shows .")] == [None] * 3


def test_nothing_to_say() -> None:
    assert ontology_caption([]) is None
    assert ontology_caption([" "]) is None
    assert ontology_caption(["nan", "N/A"]) is None
    assert ontology_caption(["eczema", "unknown"]) == "This is a skin photo diagnosed as eczema."
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Irritant dermatitis. Patches sparing the folds.", ["Irritant dermatitis.", "Patches sparing the folds."]),
        ("Seen by Dr. J. P. Smith, e.g. in Fig. 2. He left.", ["Seen by Dr. J. P. Smith, e.g. in Fig. 2.", "He left."]),
        (
            "A lesion of approx. 2 cm. in diameter vs. Controls.",
            ["A lesion of approx. 2 cm. in diameter vs. Controls."],
        ),
        ("Given i.v. Penicillin and i.m. steroids.", ["Given i.v. Penicillin and i.m. steroids."]),
        ("It measures 2 cm. The border is sharp.", ["It measures 2 cm.", "The border is sharp."]),
        ("Smith et al. Arch Dermatol found S. aureus.", ["Smith et al. Arch Dermatol found S. aureus."]),
        ("1. Red papule (0.5 cm). 2. Scale.", ["1. Red papule (0.5 cm).", "2. Scale."]),
        ('"Dirty neck." Then he left!  Why? Gone', ['"Dirty neck."', "Then he left!", "Why?", "Gone"]),
        ("Itching... and pain. It went.", ["Itching... and pain.", "It went."]),
        ("\u60a3\u8005\u7537\u6027\u3002\u7619\u75d2\uff1f", ["\u60a3\u8005\u7537\u6027\u3002", "\u7619\u75d2\uff1f"]),
        ("one line\r\nand another", ["one line and another"]),
        ("3. 4. 5.", ["3. 4. 5."]),
        ("Grade seen. (3.)", ["Grade seen. (3.)"]),
        ("no full stop", ["no full stop"]),
        ("  ", []),
        ("", []),
    ],
)
def test_sentences_of_a_caption(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


WORDS = st.sampled_from(
    [
        "The",
        "A",
        "Dr.",
        "e.g.",
        "i.v.",
        "cm.",
        "Fig.",
        "approx.",
        "2",
        "3.5",
        "Papule",
        "papule.",
        "lesion!",
        "(red)",
        "S.",
        "aureus?",
        "1.",
        "“Well.”",
        "皮疹。",
        "...",
        "X",
    ]
)


@settings(deadline=None)
@given(st.one_of(st.lists(WORDS, max_size=30).map(" ".join), st.text(max_size=80)))
def test_sentences_lose_nothing_and_are_whole(text: str) -> None:
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence == " ".join(sentence.split()) != "" for sentence in found)
    assert [part for sentence in found for part in sentences(sentence)] == found


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["Red papule.", "Scaly plaque.", "The nose, e.g. its tip."]), max_size=20).map(" ".join)
)
def test_sub_captions_are_the_first_distinct_sentences(text: str) -> None:
    parts = sub_captions(text, 2)
    assert len(parts) <= 2
    assert parts == list(dict.fromkeys(sentences(text)))[:2]


def test_sub_captions_leave_placeholders_out() -> None:
    assert sub_captions("Red papule. None") == ["Red papule."]
    assert sub_captions("None") == []


def test_at_most_eight_sub_captions() -> None:
    assert sub_captions(" ".join(f"Word{number} here." for number in range(12))) == [
        f"Word{number} here." for number in range(8)
    ]


def test_long_texts_without_a_gap_take_no_time() -> None:
    for text in ("." * 50_000, "a." * 25_000, "\u3002" * 50_000, "(" * 50_000, "x" * 50_000):
        assert "".join(sentences(text)) == text
