"""The package's table of names: every row has a source, and no spelling leads to two diseases."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dermray.corpus import branches, spelling
from dermray.corpus.ontology import Ontology
from dermray.corpus.synonyms import Synonyms

TABLE = Synonyms.load()
DOCUMENT = TABLE.document
IDENTIFIERS = {"do": r"DOID:\d+", "wikipedia": r"[A-Z][\w' -]+"}
# The shape of Derm1M's tree, in words of our own: two branches, and what hangs below both.
CLINIC = Ontology(
    {
        "root": ["inflammation", "growths"],
        "inflammation": ["Acne vulgaris", "Eczema", "Bullous disease", "infections", "Urticaria"],
        "infections": ["viral", "fungal"],
        "viral": ["Herpes zoster", "Molluscum contagiosum"],
        "fungal": ["Tinea", "Tinea pedis"],
        "Bullous disease": ["Pemphigus vulgaris"],
        "growths": ["benign", "malignant"],
        "benign": ["melanocytic", "non-melanocytic"],
        "malignant": ["melanocytic", "non-melanocytic"],
        "melanocytic": ["Melanocytic nevus", "Malignant melanoma, melanoma", "Blue nevus"],
        "non-melanocytic": ["Basal cell carcinoma", "Squamous cell carcinoma", "Seborrheic keratosis", "Lipoma"],
        "Seborrheic keratosis": [],
        "Eczema": ["Solar damage, Actinic keratosis"],
    }
)


def folded(text: str) -> str:
    return spelling.spelling(spelling.key(text))


@pytest.mark.parametrize("part", ["spellings", "broader", "branches", "words", "ambiguous"])
def test_every_row_names_its_source(part: str) -> None:
    for row in DOCUMENT[part]:
        source = DOCUMENT["sources"][row["source"]]
        assert all(source[name] for name in ("title", "licence")), row
        pattern = IDENTIFIERS.get(row["source"])
        assert re.fullmatch(pattern, row["id"]) if pattern else "id" not in row, row


def test_no_spelling_leads_to_two_diseases_and_none_that_is_ambiguous_to_any() -> None:
    times = Counter(folded(row["spelling"]) for row in DOCUMENT["spellings"])
    assert [text for text, number in times.items() if number > 1] == []
    assert len(times) > 250
    for row in DOCUMENT["ambiguous"]:
        assert len(row["may_mean"]) > 1
        assert folded(row["spelling"]) not in times, row
        assert TABLE.meaning(row["spelling"]) is None
        assert TABLE.may_mean(row["spelling"].upper()) == tuple(row["may_mean"])


def test_what_rows_refer_to_is_there_and_nothing_is_broader_than_itself() -> None:
    names = {row["means"] for row in DOCUMENT["spellings"]}
    assert {row["name"] for row in DOCUMENT["branches"]} <= names
    assert {row["branch"] for row in (*DOCUMENT["branches"], *DOCUMENT["words"])} == {"benign", "malignant"}
    assert {name for row in DOCUMENT["broader"] for name in (row["of"], row["is"])} <= names
    assert max(Counter(row["of"] for row in DOCUMENT["broader"]).values()) == 1
    for name in names:
        assert next(TABLE.meanings(name)).name == name
        assert len({each.name for each in TABLE.meanings(name)}) <= 5


def test_no_disease_is_called_benign_whose_name_or_broader_disease_is_malignant() -> None:
    said = {row["name"]: row["branch"] for row in DOCUMENT["branches"]}
    for row in DOCUMENT["broader"]:
        assert said.get(row["of"], said.get(row["is"])) == said.get(row["is"], said.get(row["of"])), row
    for name, branch in said.items():
        words = {TABLE.branch(f"x {word}") for word in spelling.singular(spelling.key(name)).split(" ")} - {None}
        assert words <= {branch}, name


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("Rodent ulcer", "Basal cell carcinoma"),
        ("BCC", "Basal cell carcinoma"),
        ("bcc ", "Basal cell carcinoma"),
        ("Mole", "Melanocytic nevus"),
        ("moles", "Melanocytic nevus"),
        ("AK", "Solar damage, Actinic keratosis"),
        ("Solar keratosis", "Solar damage, Actinic keratosis"),
        ("solar keratoses", "Solar damage, Actinic keratosis"),
        ("Seb K", "Seborrheic keratosis"),
        ("seborrhoeic keratosis", "Seborrheic keratosis"),
        ("SCC", "Squamous cell carcinoma"),
        ("Naevus", "Melanocytic nevus"),
        ("nevus", "Melanocytic nevus"),
        ("acne", "Acne vulgaris"),
        ("ringworm", "Tinea"),
        ("hives", "Urticaria"),
        ("shingles", "Herpes zoster"),
        # No node is warts or pemphigus: the nearest that every wart, every pemphigus is one of.
        ("warts", "viral"),
        ("pemphigus", "Bullous disease"),
        ("athlete\u2019s foot", "Tinea pedis"),
        ("MEL", "Malignant melanoma, melanoma"),
        ("NV", "Melanocytic nevus"),
        ("SEK", "Seborrheic keratosis"),
        ("SSM", "Malignant melanoma, melanoma"),
        ("LMM", "Malignant melanoma, melanoma"),
        ("melanoma in situ", "Malignant melanoma, melanoma"),
        ("nodular BCC", "Basal cell carcinoma"),
        ("morphoeic BCC", "Basal cell carcinoma"),
        ("well-differentiated SCC", "Squamous cell carcinoma"),
        ("senile wart", "Seborrheic keratosis"),
        ("intradermal naevus", "Melanocytic nevus"),
        ("blue mole", "Blue nevus"),
        ("atopic eczema", "Eczema"),
        ("jock itch", "Tinea"),
        # No node of its own, and none that surely is broader.
        ("SCC in situ", None),
        ("MCC", None),
        # What could mean two things means none.
        ("NMSC", None),
        ("non-melanoma skin cancer", None),
        ("angioma", None),
        ("SK", None),
        ("HS", None),
        ("herpes", None),
        ("birthmark", None),
        ("akiec", None),
    ],
)
def test_labels_of_an_ordinary_clinic(text: str, node: str | None) -> None:
    assert CLINIC.resolve(text) == node


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("Merkel cell carcinoma", "malignant"),
        ("Superficial spreading melanomas", "malignant"),
        ("Dermatofibrosarcoma protuberans", "malignant"),
        ("Cutaneous T-cell lymphoma", "malignant"),
        ("skin cancer", "malignant"),
        ("pseudolymphoma", None),
        ("pseudo-lymphoma", None),
        ("benign juvenile melanoma", None),
        ("keratoacanthoma", None),
        ("moles", "benign"),
        ("haemangioma", "benign"),
        ("Lipomas", "benign"),
        ("angiokeratoma", "benign"),
        ("neurofibroma", "benign"),
        ("extramammary Paget disease", "malignant"),
        ("kaposiform hemangioendothelioma", None),
        ("hemangiosarcoma", "malignant"),
        ("dermatofibroma", "benign"),
        ("MCC", "malignant"),
        ("DFSP", "malignant"),
        ("LMM", "malignant"),
        ("SCC in situ", "malignant"),
        ("Bowen disease", "malignant"),
        ("Hutchinson\u2019s melanotic freckle", "malignant"),
        ("blue naevi", "benign"),
        ("Gorlin syndrome", None),
        ("mela\u00adnoma of the wobble", "malignant"),
        ("\uff2d\uff45\uff4c\uff41\uff4e\uff4f\uff4d\uff41 of the wobble", "malignant"),
        ("NMSC", None),
        ("psoriasis", None),
    ],
)
def test_benign_or_malignant_by_the_table_or_by_a_word_of_the_name(name: str, branch: str | None) -> None:
    assert TABLE.branch(name) == branch


@pytest.mark.parametrize(
    "alike",
    [
        "Bowen's disease|Bowens disease|Bowen disease|SCCIS|SCC in situ|squamous cell carcinoma in situ|IEC|BOD",
        "Lentigo maligna|Hutchinson's freckle",
        "lentigo maligna melanoma|LMM",
        "Dermatofibrosarcoma protuberans|DFSP",
        "Merkel cell carcinoma|Merkel-cell carcinoma|MCC|neuroendocrine carcinoma of the skin",
        "Epidermoid cyst|epidermal inclusion cyst|Epidermal cysts",
        "Pyogenic granuloma|lobular capillary haemangioma",
        "Cherry angioma|Campbell de Morgan spots|senile angioma",
        "atypical naevus|dysplastic nevus|Clark's nevus",
        "nummular eczema|discoid eczema|nummular dermatitis",
        "tinea versicolor|pityriasis versicolor",
        "solar lentigo|actinic lentigo|lentigo senilis",
        # Full width, accents for apostrophes, and what nobody sees: a byte order mark, a soft hyphen, a NUL.
        "Bowen's disease|Bowen\u00b4s disease|Bowen`s disease|\ufeffBowen\u2018s dis\u00adease\0",
        "Bowen disease|\uff22\uff4f\uff57\uff45\uff4e disease",
    ],
)
def test_what_a_clinic_calls_one_disease_is_one(alike: str) -> None:
    meanings = {text: TABLE.meaning(text) for text in alike.split("|")}
    assert None not in meanings.values(), meanings
    assert len(set(meanings.values())) == 1, meanings


DENIED = """no melanoma|not melanoma|not a melanoma|rule out melanoma|r/o melanoma|?melanoma|? melanoma|melanoma?
melanoma excluded|melanoma ruled out|melanoma - unlikely|melanoma (excluded)|melanoma, excluded
melanoma, to be ruled out|excluded, melanoma|melanoma, ?|query melanoma|suspected melanoma
melanoma, suspected|possible melanoma|without melanoma|melanoma vs nevus|melanoma or nevus
negative for melanoma|melanoma, not seen|history of melanoma|Non-melanoma|nonmelanoma"""


@pytest.mark.parametrize("text", re.split(r"[|\n]", DENIED))
def test_a_label_that_denies_or_questions_a_disease_names_none(text: str) -> None:
    assert CLINIC.resolve(text) is None
    assert CLINIC.resolve_all(text) == ((), (text,))
    assert TABLE.branch(text) is None or "," in text
    # Without a tree it is a class of its own, and takes no row of the disease.
    tree = Ontology.folded({text: 2, "melanoma": 1, "nevus": 1})
    assert len(tree) == 3
    assert tree.resolve("melanoma") == "melanoma"
    (own,) = tree.resolve_all(text).labels
    assert own not in ("melanoma", "nevus")
    alone = Ontology.folded({text: 1})
    assert len(alone) == 1
    assert alone.resolve("melanoma") is None
    for node in (text, own):
        grown = Ontology({"root": ["benign", "malignant"], "benign": [node], "malignant": [node]})
        _, (found,) = branches.learn(grown, {node: {node: Counter(benign=3)}})
        assert found.chosen is None or "non" in text.lower()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("melanoma, no ulceration", ["Malignant melanoma, melanoma"]),
        ("melanoma, not otherwise specified", ["Malignant melanoma, melanoma"]),
        ("nevus, not melanoma", ["Melanocytic nevus"]),
        ("nevus, melanoma excluded", ["Melanocytic nevus"]),
        ("Northern melanoma", []),
    ],
)
def test_words_that_deny_something_else_deny_no_disease(text: str, names: list[str]) -> None:
    assert list(CLINIC.resolve_all(text).labels) == names


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("melanoma, no ulceration", "malignant"),
        ("melanoma not otherwise specified", "malignant"),
        ("non-Hodgkin lymphoma", "malignant"),
        ("non-melanoma skin cancer", "malignant"),
        ("nodular melanoma", "malignant"),
    ],
)
def test_words_that_deny_something_else_leave_the_branch(name: str, branch: str) -> None:
    assert TABLE.branch(name) == branch


def test_names_of_the_tree_come_before_those_of_the_table() -> None:
    tree = Ontology({"root": ["SK", "nevus", "Melanocytic nevus"]})
    assert (tree.resolve("sk"), tree.resolve("Naevi"), tree.resolve("mole")) == ("SK", "nevus", "Melanocytic nevus")


def test_spellings_of_one_disease_become_one_name() -> None:
    labels = {
        "Melanoma": 3,
        "melanoma": 4,
        "MELANOMA ": 1,
        "Nevus": 4,
        "nevus": 4,
        "BCC": 9,
        "rodent ulcer": 1,
        "SK": 2,
    }
    names = TABLE.unify(labels)
    assert {names[each] for each in ("Melanoma", "melanoma", "MELANOMA ")} == {"melanoma"}
    assert names["Nevus"] == names["nevus"]
    assert names["BCC"] == names["rodent ulcer"] == "rodent ulcer"
    assert TABLE.unify({"BCC": 9}) == {"BCC": "Basal cell carcinoma"}
    assert names["SK"] == "SK"
    tree = Ontology.folded(labels)
    assert len(tree) == 4
    assert all(tree.resolve(label) == name for label, name in names.items())


def test_a_fixed_class_list_stays_as_it_is() -> None:
    tree = Ontology.folded(
        {"BCC": 2, "eczema": 1, "Eczema": 1}, fixed=["melanoma", "malignant melanoma", "basal cell carcinoma"]
    )
    assert set(tree) == {"melanoma", "malignant melanoma", "basal cell carcinoma", "Eczema"}
    assert tree.resolve("BCC") == "basal cell carcinoma"


@given(st.text(max_size=30))
def test_any_text_has_one_folding_and_at_most_one_meaning(text: str) -> None:
    key = spelling.key(text)
    assert spelling.key(key) == key
    meaning = TABLE.meaning(text)
    assert meaning is None or TABLE.meaning(f" {text.upper()} ") in (meaning, None)
    spelling.is_placeholder(text)


@pytest.mark.parametrize("number", ["1.0", "01", "1.00", " 1"])
def test_a_class_by_number_is_one_however_it_is_written(number: str) -> None:
    others = ["10", "-2", "1.5", "-1.5", ".5", "5", "1-2", "12"]
    tree = Ontology.folded({"1": 2, number: 1, **dict.fromkeys(others, 1)})
    assert set(tree) == {"1", *others}
    assert tree.resolve(number) == "1"


NOTHING = """\ufeffnan|n\u200ban|nan|NaN|None|unknown|UNK|N/A|n.a.|#N/A|-|--|\u2013|-1|-1.0|null|blank|?||  |
not available|<NA>|#REF!|#VALUE!|#NAME?|(blank)|(null)|<null>|\\N|No age information|No visual concepts
no definitive diagnosis"""


@pytest.mark.parametrize("text", re.split(r"[|\n]", NOTHING))
def test_placeholders_say_nothing(text: str) -> None:
    assert spelling.is_placeholder(text)


@pytest.mark.parametrize("text", ["1", "0", "nanny", "none of these", "unknown rash", "normal", "-12", "a", "N"])
def test_other_cells_say_something(text: str) -> None:
    assert not spelling.is_placeholder(text)
