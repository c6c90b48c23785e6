"""Questions and answers: which answers are surely wrong, the draw, the evaluation task and the export."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dermray.corpus.ontology import Ontology
from dermray.corpus.questions import findings
from dermray.corpus.questions.body_sites import regions
from dermray.corpus.questions.closed import ALL_NAMED, KINDS, NOTHING_WRONG, Asker, Facts, Pool, Question
from dermray.corpus.questions.kinship import Sense
from dermray.corpus.questions.templates import Templates
from dermray.errors import EvaluationError
from dermray.evaluate.compare import compare
from dermray.evaluate.features import Features
from dermray.evaluate.predictions import OwnPredictions
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tasks.contract import Context, TaskResult
from dermray.evaluate.tasks.vqa.module import PARTS, SCORER, _ask
from dermray.export.instruct import closed_pair
from tests.evaluation import INFO
from tests.unit.test_export_formats import export, prepared, write_corpus

ONTOLOGY = Ontology.from_json(
    {
        "root": ["inflammatory", "neoplastic"],
        "inflammatory": ["eczema, dermatitis", "psoriasis"],
        "eczema, dermatitis": ["hand eczema"],
        "neoplastic": ["melanoma", "nevus", "Malignant lesions"],
    }
)
SITES = ("back", "left forearm", "face", "sole", "shoulder", "somewhere odd")
MODALITIES = ("clinical", "dermoscopic", "pathology")
CONCEPTS = ("papule", "scale", "pigment network", "atypical pigment network", "ulcer")


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("left forearm", {"upper limb"}),
        ("Lower extremities", {"lower limb"}),
        ("palms/soles", {"upper limb", "lower limb"}),
        ("head/neck", {"head and neck"}),
        ("back of the hand", {"upper limb"}),
        ("lower back", {"trunk"}),
        ("shoulder", {"trunk", "upper limb"}),
        ("oral/genital", {"head and neck", "genital and perianal skin"}),
        ("back, near the old scar", set()),
        ("left", set()),
        ("", set()),
    ],
)
def test_regions_of_a_site(site: str, expected: set[str]) -> None:
    assert regions(site) == expected


@pytest.mark.parametrize(
    ("label", "other", "expected"),
    [
        ("melanoma", "nevus", False),
        ("melanoma", "melanoma", True),
        ("hand eczema", "eczema, dermatitis", True),
        ("eczema, dermatitis", "hand eczema", True),
        ("inflammatory", "hand eczema", True),
        ("psoriasis", "hand eczema", False),
        # A name of no node: one of the node's names, or of the package's table.
        ("dermatitis", "eczema, dermatitis", True),
        ("BCC", "basal cell carcinoma", True),
        ("malignant melanoma", "melanoma", True),
        # What says malignant and nothing else is wrong for a benign disease only.
        ("melanoma", "Malignant lesions", True),
        ("nevus", "Malignant lesions", False),
        ("psoriasis of nobody knows what", "Malignant lesions", True),
        # A name whose words all lie in the other's.
        ("psoriasis", "pustular psoriasis", True),
        ("Melanoma", "superficial spreading melanoma (SSM)", True),
        ("BCC", "solid-cystic basal cell carcinoma", True),
        ("eczema", "dyshidrosiform eczema", True),
        ("contact dermatitis", "Allergic contact dermatitis", True),
        ("ulcers", "stasis ulcer", True),
        ("pustular psoriasis", "pustular eczema", False),
        ("melanoma", "non-melanoma", False),
        # Families that no word tells, and two members of one that has a name for all.
        ("melanocytic nevi", "dysplastic nevus", True),
        ("Bowen's disease", "squamous cell carcinoma", True),
        ("akiec", "SCC", True),
        ("solar keratosis", "Bowen's disease", True),
        ("bkl", "seborrhoeic keratoses", True),
        ("benign keratosis", "solar lentigo", True),
        ("vasc", "cherry angioma", True),
        ("vascular lesions", "pyogenic granuloma", True),
        ("pyogenic granuloma", "cherry angioma", False),
        ("lichen simplex", "contact dermatitis", False),
        ("dyshidrosis", "eczema", True),
        ("squamous cell carcinoma", "basal cell carcinoma", False),
    ],
)
def test_what_may_both_be_true(label: str, other: str, expected: bool) -> None:
    one, two = Sense.of(label, ONTOLOGY), Sense.of(other, ONTOLOGY)
    assert one.may_hold_with(two) is two.may_hold_with(one) is expected


@pytest.mark.parametrize(
    ("mark", "finding", "expected"),
    [
        ("scale", "papule", False),
        ("Brown(Hyperpigmentation)", "hyperpigmentation", True),
        ("purpura/petechiae", "petechia", True),
        ("erythema", "red plaques", True),
        ("Scaly", "desquamation", True),
        ("ulcer", "ulcerated surface", True),
        ("crusts", "crusted", True),
        ("papular", "papules", True),
        ("pigmentation", "hyperpigmented", True),
        ("pigment network", "atypical pigment network", True),
        ("dome-shaped", "irregularly shaped", False),
    ],
)
def test_which_findings_could_be_one(mark: str, finding: str, expected: bool) -> None:
    assert findings.may_hold_with(mark, finding) is findings.may_hold_with(finding, mark) is expected
    others = [Facts("other", None, (), (finding,), None, None)]
    one = Facts("one", None, (), (mark,), None, None)
    found = Asker(Pool.of([one, *others]), ONTOLOGY).ask(one)["absent"]
    assert (found == NOTHING_WRONG) is expected


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["A plaque."], {"ulcer", "scale"}),
        (["A plaque.", "It is not Ulcerated."], {"scale"}),
        (["An ulcer that scales"], {ALL_NAMED}),
    ],
)
def test_a_finding_that_a_caption_names_is_not_asked_as_absent(captions: list[str], expected: set[str]) -> None:
    found = set()
    for number in range(40):
        one = Facts(f"{number}", None, (), ("papule",), None, None, tuple(captions))
        others = [replace(one, sample_id=f"other {name}", concepts=(name,)) for name in ("ulcer", "scale")]
        asked = Asker(Pool.of([one, *others]), ONTOLOGY).ask(one)["absent"]
        found.add(
            asked if isinstance(asked, str) else re.split(r"Does this picture show |Can | can|[?]", asked.text)[1]
        )
    assert {each.removesuffix(" be seen in this picture") for each in found} == expected


def test_photographs_are_not_asked_against_each_other_and_a_label_outside_the_classes_is_told_as_that() -> None:
    kinds = ("clinical", "total-body", "dermoscopic")
    samples = [Facts(kind, None, ("melanoma",), (), None, kind) for kind in kinds]
    asker = Asker(Pool.of(samples, {"nevus": "nevus"}), ONTOLOGY)
    asked = {each.sample_id: asker.ask(each) for each in samples}
    options = [set(one.options) for kind in kinds if isinstance(one := asked[kind]["modality"], Question)]
    photographs = ["clinical photograph", "total-body photograph"]
    assert options == [{name, "dermoscopic image"} for name in photographs] + [{*photographs, "dermoscopic image"}]
    assert {found["condition"] for found in asked.values()} == {"label outside the class list"}
    assert asker.ask(Facts("none", None, (), (), None, None))["condition"] == "without a label"


# Of four regions; how often each occurs goes down with its place.
SKEWED_SITES = (
    *("back", "face", "forearm", "chest", "leg", "scalp", "hand", "foot", "abdomen", "nose", "thigh", "elbow", "ear"),
    *("toe", "finger", "cheek", "breast", "knee", "wrist", "ankle", "chin", "flank", "heel", "palm"),
)
SKEWED_FINDINGS = tuple(f"finding{letter}" for letter in "abcdefghijklmnopqrstuvwx")


def test_who_knows_only_what_is_frequent_scores_chance() -> None:
    draw, names = np.random.default_rng(0), (SKEWED_SITES, SKEWED_FINDINGS)
    shares = 1 / (np.arange(len(SKEWED_SITES)) + 2)
    shares /= shares.sum()
    samples = [
        Facts(f"sample {number}", None, (), tuple(draw.choice(names[1], draw.integers(1, 4), False, shares)),
              str(draw.choice(names[0], p=shares)), None)
        for number in range(3000)
    ]  # fmt: skip
    times = Counter(each.body_site for each in samples) + Counter(one for each in samples for one in each.concepts)
    asker, right = Asker(Pool.of(samples), ONTOLOGY), dict[str, list[bool]]()
    mean = sum(times[name] for name in SKEWED_FINDINGS) / len(SKEWED_FINDINGS)
    for each in samples:
        for kind, question in asker.ask(each).items():
            if isinstance(question, Question) and kind == "body_site":
                most = max(range(len(question.options)), key=lambda place: times[question.options[place]])
                right.setdefault(kind, []).append(most == question.answer)
            elif isinstance(question, Question):
                (named,) = (name for name in SKEWED_FINDINGS if name in question.text)
                right.setdefault("presence", []).append((times[named] > mean) == (kind == "present"))
    assert [len(each) for each in right.values()] == [3000, 6000]
    assert np.mean(right["body_site"]) == pytest.approx(1 / 4, abs=0.05)
    assert np.mean(right["presence"]) == pytest.approx(1 / 2, abs=0.05)


facts = st.builds(
    lambda number, labels, concepts, site, modality: Facts(
        f"sample {number}", ONTOLOGY.deepest(labels), tuple(labels), tuple(concepts), site, modality
    ),
    st.integers(0, 10**6),
    st.lists(st.sampled_from(list(ONTOLOGY)), max_size=2, unique=True),
    st.lists(st.sampled_from(CONCEPTS), max_size=3, unique=True),
    st.none() | st.sampled_from(SITES),
    st.none() | st.sampled_from(MODALITIES),
)


def shown(label: str) -> str:
    return label.partition(",")[0]


@examples(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(samples=st.lists(facts, min_size=1, max_size=12, unique_by=lambda each: each.sample_id), seed=st.integers(0, 3))
def test_no_wrong_answer_is_true_and_order_changes_nothing(samples: list[Facts], seed: int) -> None:
    asker = Asker(Pool.of(samples), ONTOLOGY, seed)
    asked = {each.sample_id: asker.ask(each) for each in samples}
    turned = Asker(Pool.of(reversed(samples)), ONTOLOGY, seed)
    assert asked == {each.sample_id: turned.ask(each) for each in reversed(samples)}
    for each in samples:
        found = asked[each.sample_id]
        assert tuple(found) == KINDS
        for question in found.values():
            if isinstance(question, Question):
                assert 2 <= len(set(question.options)) == len(question.options) == len(question.statements) <= 4
        if isinstance(one := found["condition"], Question):
            assert one.options[one.answer] == shown(str(each.condition))
            true = {shown(name) for label in each.labels for name in [label, *ONTOLOGY.ancestors(label)]}
            true |= {shown(name) for label in each.labels for name in ONTOLOGY.descendants(label)}
            assert true & {*one.options} == {shown(str(each.condition))}
        if isinstance(one := found["body_site"], Question):
            assert one.options[one.answer] == each.body_site
            wrong = [regions(site) for site in one.options if site != each.body_site]
            assert all(other and not other & regions(str(each.body_site)) for other in wrong)
        if isinstance(one := found["absent"], Question):
            (named,) = [name for name in sorted(CONCEPTS, key=len) if f" {name}" in f" {one.text}"][-1:]
            assert not any(named in mark or mark in named for mark in each.concepts)
            assert one.options[one.answer] == "No"


def samples_of(rows: list[dict[str, Any]]) -> Samples:
    return Samples(
        uri="u",
        split="all",
        corpus_digest="d",
        images=(),
        ids=[f"sample {number}" for number in range(len(rows))],
        captions=[None] * len(rows),
        labels=[row.get("labels", []) for row in rows],
        concepts=[row.get("concepts", []) for row in rows],
        ontology=ONTOLOGY,
        groups={name: [row.get(name) for row in rows] for name in ("body_site", "modality")},
    )


ROWS = [
    {"labels": ["melanoma"], "concepts": ["papule"], "body_site": "back", "modality": "clinical"},
    {"labels": ["nevus"], "concepts": ["scale"], "body_site": "face", "modality": "dermoscopic"},
    {"labels": ["psoriasis"], "concepts": ["ulcer", "scale"], "body_site": "somewhere odd", "modality": "clinical"},
    {"labels": ["hand eczema"], "body_site": "sole"},
    {},
    {"labels": ["nevus"], "concepts": ["papule"], "modality": "pathology"},
]
# What a picture or a text may hold; the last is in every picture and text without a finding, and faint.
WORDS = (
    *("melanoma", "nevus", "psoriasis", "hand eczema", "back", "face", "sole"),
    *("clinical photograph", "dermoscopic image", "histopathology image", "papule", "scale", "ulcer"),
)
NAMES = {"clinical": "clinical photograph", "dermoscopic": "dermoscopic image", "pathology": "histopathology image"}


def knowing(text: str) -> np.ndarray:
    """A vector along the words of a text; of a text without any, along an axis that every picture has a little of."""
    found = np.array([word in text for word in WORDS] + [False], dtype=np.float32)
    found[-1] = not found.any()
    return found / np.linalg.norm(found)


def run(
    rows: list[dict[str, Any]], text_vector: Any = knowing, *, broken: tuple[int, ...] = (), seed: int = 0
) -> TaskResult:
    samples = samples_of(rows)
    config = EvaluateConfig(
        model="m", corpus="c", output="o", tasks=("vqa",), bootstrap=40, seed=seed, min_group_size=2
    )
    texts = SCORER.texts(samples, config)
    pictures = []
    for row in rows:
        said = [*row.get("labels", []), *row.get("concepts", []), row.get("body_site"), NAMES.get(row.get("modality"))]
        pictures.append(np.array([word in said for word in WORDS] + [0.2], dtype=np.float32))
    features = Features(
        info=INFO,
        images=np.stack([each / np.linalg.norm(each) for each in pictures]),
        lengths=np.ones(len(rows), dtype=np.float32),
        reasons=np.array(["missing" if row in broken else "" for row in range(len(rows))], dtype=object),
        duration_s=1.0,
        num_encoded=len(rows),
        num_actors=1,
        _texts=np.stack([text_vector(text) for text in [*texts, ""]]).astype(np.float32),
        _text_rows={text: row for row, text in enumerate(texts)},
    )
    return SCORER.run(Context(config, samples, features))


def test_a_model_that_knows_is_right_and_what_is_not_asked_is_counted() -> None:
    result = run(ROWS, broken=(5,))
    assert {name: metric.value for name, metric in result.metrics.items()} == dict.fromkeys(PARTS, 1.0)
    assert result.num_samples == 4
    assert result.excluded == {"nothing to ask": 1, "image not readable": 1}
    kinds = {row["kind"]: row for row in result.details["kinds"]}
    assert {kind: row["num_questions"] for kind, row in kinds.items()} == {
        "condition": 4, "body_site": 3, "modality": 3, "present": 3, "absent": 3,
    }  # fmt: skip
    unreadable = {"image not readable": 1}
    assert kinds["condition"]["not_asked"] == unreadable | {"without a label": 1}
    assert kinds["body_site"]["not_asked"] == unreadable | {
        "without a body site": 1, "body site of no known region": 1,
    }  # fmt: skip
    assert kinds["absent"]["not_asked"] == unreadable | {"without a mark of any finding": 2}
    # Four conditions and all of them wrong for each other; three sites; two kinds of picture beside the right one.
    assert [kinds[kind]["chance"] for kind in KINDS] == pytest.approx([1 / 4, 1 / 3, 1 / 3, 1 / 2, 1 / 2])
    assert result.details["num_questions"] == 16
    assert result.details["chance"]["accuracy"] == pytest.approx((4 / 4 + 3 / 3 + 3 / 3 + 6 / 2) / 16)


def test_models_that_know_nothing_score_chance() -> None:
    alike = run(ROWS, lambda text: np.ones(len(WORDS) + 1) / np.sqrt(len(WORDS) + 1))
    assert {name: metric.value for name, metric in alike.metrics.items()} == pytest.approx(alike.details["chance"])
    # One that finds everything in every picture.
    yes = run(ROWS, lambda text: np.ones(len(WORDS) + 1) * (1.0 if any(word in text for word in WORDS) else -1.0))
    found = {name: metric.value for name, metric in yes.metrics.items()}
    assert (found["present_accuracy"], found["absent_accuracy"], found["presence_accuracy"]) == (1.0, 0.0, 0.5)
    with pytest.raises(EvaluationError, match="something to ask"):
        run([{}])


def test_two_models_are_compared_on_the_same_questions() -> None:
    knows, guesses = run(ROWS * 4), run(ROWS * 4, lambda text: np.ones(len(WORDS) + 1))
    said = [replace(one.predictions, scored_by="vqa") for one in (guesses, knows)]  # type: ignore[type-var]
    assert all(isinstance(one, OwnPredictions) for one in said)
    differences = compare(*said, bootstrap=200)  # type: ignore[arg-type]
    assert set(differences) == set(PARTS)
    assert differences["condition_accuracy"].is_better("condition_accuracy")
    assert differences["condition_accuracy"].difference.value == pytest.approx(3 / 4)
    other = replace(run(ROWS * 4, seed=1).predictions, scored_by="vqa")  # type: ignore[type-var]
    with pytest.raises(EvaluationError, match="other true condition"):
        compare(said[0], other)  # type: ignore[arg-type]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    def sample(number: int, split: str, **more: Any) -> dict[str, Any]:
        nothing = {"labels": [], "concepts": [], "skin_type": None, "meta": None, "captions": []}
        return {**nothing, "source": "s", "source_id": f"{number}.jpg", "split": split, **more}

    meta = dict.fromkeys(("age", "sex", "symptoms", "patient_id", "lesion_id", "extra"))
    back = {**meta, "body_site": "Back"}
    drawn = [
        sample(0, "train", labels=["hand eczema"], concepts=["Papule"], skin_type=3, meta=back),
        sample(1, "train", labels=["Nevus"], concepts=["scale"], captions=[("raw", "A  brown\nspot.")]),
        sample(2, "train", meta={**meta, "body_site": "face"}),
        sample(3, "val", labels=["银屑病", "Nevus"], captions=[("ontology", "x")]),
        sample(4, "val", labels=["hand eczema"]),
    ]
    write_corpus(tmp_path / "corpus", drawn)
    return tmp_path / "corpus"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_an_export_of_questions_and_answers(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(corpus, out, format="instruct", samples_per_file=2)
    rows = {row["sample_id"]: row for row in prepared(corpus)}
    said = {}
    for split in ("train", "val"):
        for line in lines(out / f"{split}.jsonl"):
            assert list(line) == ["id", "image", "conversations"]
            name, _, kind = line["id"].partition("-")
            human, gpt = line["conversations"]
            assert (human["from"], gpt["from"], rows[name]["split"]) == ("human", "gpt", split)
            assert (out / line["image"]).read_bytes() == rows[name]["image"]
            assert human["value"].startswith("<image>\n")
            assert said.setdefault((rows[name]["source_id"], kind), (human["value"][8:], gpt["value"])) is not None
    assert {kind for number, kind in said if number == "0.jpg"} == {
        *("diagnosis", "tree", "findings", "site", "skin_type"),
        *("closed_condition", "closed_body_site", "closed_present", "closed_absent"),
    }
    assert said["0.jpg", "tree"][1] == "From the general to the specific: inflammatory > eczema > hand eczema."
    assert said["0.jpg", "closed_present"][1] == "Yes"
    assert said["0.jpg", "closed_absent"][0].endswith(" Answer yes or no.")
    assert "scale" in said["0.jpg", "closed_absent"][0]
    assert said["1.jpg", "description"][1] == "A brown spot."
    assert "银屑病 and Nevus" in said["3.jpg", "diagnosis"][1]
    question, answer = said["0.jpg", "closed_body_site"]
    assert f"\n{answer}\n" in question
    assert answer[1:] == ". back"
    assert len(said) == sum(len(lines(out / f"{split}.jsonl")) for split in ("train", "val"))


def test_a_record_holds_one_image_token(tmp_path: Path) -> None:
    nothing = {"labels": [], "skin_type": None, "meta": None, "source": "s", "split": "train"}
    captions = ["A <image> spot.", "A spot.", "<image>"]
    concepts = [["papule"], ["<image> scale"], ["ulcer"]]
    rows = [
        {**nothing, "source_id": f"{number}.jpg", "concepts": marks, "captions": [("raw", caption)]}
        for number, (marks, caption) in enumerate(zip(concepts, captions, strict=True))
    ]
    write_corpus(tmp_path / "corpus", rows)
    export(tmp_path / "corpus", tmp_path / "out", format="instruct")
    written = lines(tmp_path / "out" / "train.jsonl")
    assert {"".join(turn["value"] for turn in line["conversations"]).count("<image>") for line in written} == {1}
    counts = json.loads((tmp_path / "out" / "export.json").read_text())["splits"]["train"]
    assert (counts["asked.description"], counts["not_asked.description.<image> in its words"]) == (1, 2)
    assert (counts["asked.findings"], counts["not_asked.findings.<image> in its words"]) == (2, 1)
    assert counts["not_asked.closed_present.<image> in its words"] == 1


def test_every_sample_is_asked_or_told_by_kind_and_closed_questions_are_those_of_the_task(
    corpus: Path, tmp_path: Path
) -> None:
    export(corpus, tmp_path / "out", format="instruct")
    splits = json.loads((tmp_path / "out" / "export.json").read_text())["splits"]
    for split, size in (("train", 3), ("val", 2)):
        counts = Counter[str]()
        for name, count in splits[split].items():
            if name.startswith(("asked.", "not_asked.")):
                counts[name.split(".")[1]] += count
        assert counts == dict.fromkeys(counts, size)
        assert len(counts) == 7 + len(KINDS)
        assert sum(n for name, n in splits[split].items() if name.startswith("asked.")) == len(
            lines(tmp_path / "out" / f"{split}.jsonl")
        )
        samples = Samples.load(str(corpus), split)
        written = {line["id"]: line["conversations"] for line in lines(tmp_path / "out" / f"{split}.jsonl")}
        closed = {
            f"{name}-closed_{kind}": closed_pair(question, Templates.load())
            for name, kinds in zip(samples.ids, _ask(samples, 0), strict=True)
            for kind, question in kinds.items()
            if isinstance(question, Question)
        }
        assert {name for name in written if "-closed_" in name} == set(closed)
        for name, pair in closed.items():
            human, gpt = written[name]
            assert (human["value"], gpt["value"]) == (f"<image>\n{pair.question}", pair.answer)
    assert splits["train"]["not_asked.description.no caption"] == 2
