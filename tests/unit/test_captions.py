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
    joined,
    named_in,
    ontology_caption,
    parents,
    sub_captions,
    with_sub_captions,
)
from dermray.corpus.ontology import Ontology
from dermray.corpus.sentences import sentences
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
        # Lists, by bullets, numbers and lines.
        ("\u2022 Red papule \u2022 Scale, 2 cm", ["\u2022 Red papule", "\u2022 Scale, 2 cm"]),
        ("Seen: \u2022 papules \u2022 scale.", ["Seen: \u2022 papules", "\u2022 scale."]),
        ("1) Red papule 2) Scale 3) Crust", ["1) Red papule", "2) Scale", "3) Crust"]),
        ("Findings: 1. papules 2. scale", ["Findings: 1. papules", "2. scale"]),
        ("Signs are (1) itch, (2) pain and (3) scale.", ["Signs are (1) itch, (2) pain and (3) scale."]),
        ("1) Red papule, grade 3) or 4) Scale", ["1) Red papule, grade 3) or 4) Scale"]),
        ("Plaques:\n- on the elbow\n- on the knee", ["Plaques:", "- on the elbow", "- on the knee"]),
        ("Red patch on the\nnose and\nChin", ["Red patch on the nose and Chin"]),
        ("Itchy at night\nAny ideas?\nseen by Dr.\nSmith", ["Itchy at night", "Any ideas?", "seen by Dr. Smith"]),
        ("a red patch\n\nit itches", ["a red patch", "it itches"]),
        # Talk.
        (
            "i have a rash. it itches at night. any ideas? thanks!",
            ["i have a rash.", "it itches at night.", "any ideas?", "thanks!"],
        ),
        ('"Is it ringworm?" asked the poster. Yes!', ['"Is it ringworm?" asked the poster.', "Yes!"]),
        ("It came back\u2026 and went. So?! Well.", ["It came back\u2026 and went.", "So?!", "Well."]),
        ("It itched\u2026 Then it went.", ["It itched\u2026", "Then it went."]),
        # Letters and numbers that end a sentence, and those that do not.
        ("He took vitamin C. Cream helped.", ["He took vitamin C.", "Cream helped."]),
        ("Fitzpatrick type 3. Topical steroids.", ["Fitzpatrick type 3.", "Topical steroids."]),
        ("Pain? No. Itch? See no. 3 of J. Smith.", ["Pain?", "No.", "Itch?", "See no. 3 of J. Smith."]),
        ("Growth of 18.6% or 2.5 cm. Margins vs. 0.5 cm.", ["Growth of 18.6% or 2.5 cm.", "Margins vs. 0.5 cm."]),
        ("It healed. (See Fig. 2.) He left.", ["It healed.", "(See Fig. 2.)", "He left."]),
        ("Papule. \u2013 Scale on it.", ["Papule.", "\u2013 Scale on it."]),
        # The gap was forgotten; and where none belongs.
        ("A plaque on the nose.The border is sharp.", ["A plaque on the nose.", "The border is sharp."]),
        ("See S.aureus at www.skin.Org, e.g.Here", ["See S.aureus at www.skin.Org, e.g.Here"]),
        (
            "It is 2 cm.The border is sharp. Wow!That itches.",
            ["It is 2 cm.", "The border is sharp.", "Wow!", "That itches."],
        ),
        ("Photo by J. A. Smith shows a plaque.", ["Photo by J. A. Smith shows a plaque."]),
        ("He took 5 mg. Improved since.", ["He took 5 mg.", "Improved since."]),
        ("Skin type IV. Then it went.", ["Skin type IV.", "Then it went."]),
        ("a) red skin\nb) scaly skin", ["a) red skin", "b) scaly skin"]),
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
        "\u2022",
        "-",
        "2)",
        "vitamin",
        "it",
        "rash.The",
        "\n",
        "\n\n",
        "\u2026",
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


def test_sub_captions_leave_placeholders_and_bullets_out() -> None:
    assert sub_captions("\u2022 Red papule \u2022 None \u2022-5 \u00b0C felt cold") == [
        "Red papule",
        "-5 \u00b0C felt cold",
    ]
    assert sub_captions("Red papule. None") == ["Red papule."]
    assert sub_captions("None") == []


def test_sub_captions_come_behind_the_caption_that_they_are_of() -> None:
    captions = [("raw", "Red rash. It itches."), ("raw", "Scaly too."), ("ontology", "o")]
    made = with_sub_captions(captions, sub_captions)
    assert made == [
        *[("raw", "Red rash. It itches."), ("ontology", "o"), ("sub", "Red rash."), ("sub", "It itches.")],
        *[("raw", "Scaly too."), ("sub", "Scaly too.")],
    ]
    assert parents([aspect for aspect, _ in made]) == [None, None, 0, 0, None, 4]
    assert parents(["sub", "raw"]) == [None, None]
    assert with_sub_captions([("concept", "c")], sub_captions) == [("concept", "c")]


def test_at_most_eight_sub_captions() -> None:
    assert sub_captions(" ".join(f"Word{number} here." for number in range(12))) == [
        f"Word{number} here." for number in range(8)
    ]


def test_long_texts_without_a_gap_take_no_time() -> None:
    for text in ("." * 50_000, "a." * 25_000, "\u3002" * 50_000, "(" * 50_000, "x" * 50_000):
        assert "".join(sentences(text)) == text


def test_sub_captions_of_one_image_stay_with_the_caption_that_they_are_parts_of() -> None:
    first = [("raw", "A"), ("ontology", "o"), ("sub", "a"), ("raw", "B"), ("sub", "b")]
    second = [("raw", "A"), ("sub", "a"), ("sub", "c"), ("raw", "C"), ("sub", "d")]
    found = joined([first, second])
    assert [text for _, text in found] == ["A", "o", "a", "c", "B", "b", "C", "d"]
    assert parents([aspect for aspect, _ in found]) == [None, None, 0, 0, None, 4, None, 6]
    assert joined([first]) == joined([first, first]) == first
