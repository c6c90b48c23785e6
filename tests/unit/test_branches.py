"""A disease under benign and malignant: learned, shown, put into words and scored on the branch that is meant, or none.

The tree has the shape of Derm1M's, in few words: two branches, and one node below both that holds what is below each.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from dermray.config import parse
from dermray.corpus import branches
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.corpus.synonyms import Synonyms
from dermray.errors import CorpusError
from dermray.evaluate.classes import classes_of
from dermray.evaluate.samples import Samples
from dermray.predict.classifier import RankedClass
from dermray.predict.hierarchy import roll_up
from dermray.predict.zero_shot import hierarchy_hits
from dermray.prepare import pipeline, samples
from dermray.prepare.commit import commit, generation_of
from dermray.prepare.reconcile import reconcile
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import ShardMaker
from dermray.service.fleet.catalogue import Catalogue
from dermray.service.http.routes import create_app
from dermray.service.settings import LimitsConfig
from tests.raw_sources import write_images, write_table
from tests.serving import LOCAL, DummyBackend, data_uri, photograph

TREE = {
    "root": ["growths", "inflammation"],
    "inflammation": ["Psoriasis"],
    "growths": ["benign", "cysts", "malignant"],
    "benign": ["melanocytic", "non-melanocytic"],
    "malignant": ["melanocytic", "non-melanocytic"],
    "melanocytic": ["Melanocytic nevus", "Malignant melanoma, melanoma", "Spitz tumour"],
    "non-melanocytic": [
        "Basal cell carcinoma",
        "Squamous cell carcinoma",
        "Seborrheic keratosis",
        "Lump of both kinds",
        "Lump of one kind",
        "Lump that nobody has",
    ],
    "Seborrheic keratosis": ["Irritated keratosis"],
}
MALIGNANT = ("Malignant melanoma, melanoma", "Basal cell carcinoma", "Squamous cell carcinoma")
OPEN = ("Lump of both kinds", "Lump that nobody has", "Spitz tumour")
# label, published path, rows
ROWS = [
    ("malignant melanoma", "growths, malignant, melanocytic, malignant melanoma", 3),
    # A slip of the table: its caption must not repeat it.
    ("melanoma", "growths, benign, melanocytic, melanoma", 1),
    ("basal cell carcinoma", "growths, malignant, non-melanocytic, basal cell carcinoma", 2),
    ("squamous cell carcinoma", "", 1),
    ("irritated keratosis", "growths, benign, non-melanocytic, seborrheic keratosis, irritated keratosis", 2),
    ("melanocytic nevus", "", 2),
    ("lump of one kind", "growths, benign, non-melanocytic, lump of one kind", 2),
    ("lump of both kinds", "growths, benign, non-melanocytic, lump of both kinds", 2),
    ("lump of both kinds", "growths, malignant, non-melanocytic, lump of both kinds", 1),
    ("psoriasis", "inflammation, psoriasis", 1),
]


def derm1m(folder: Path) -> Path:
    """The rows in Derm1M's layout."""
    said = ("source", "source_type", "skin_concept", "body_location", "symptoms", "age", "gender")
    rows = [
        {"filename": f"{number:02d}-{time}.jpg", "truncated_caption": f"Picture {number} {time} of a patch."}
        | {"disease_label": label, "hierarchical_disease_label": path}
        | dict.fromkeys(said, "")
        for number, (label, path, times) in enumerate(ROWS)
        for time in range(times)
    ]
    write_table(folder / "Derm1M_v2_pretrain.csv", rows)
    write_images(folder, *(row["filename"] for row in rows))
    (folder / "ontology.json").write_text(json.dumps(TREE), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus prepared in this process, by the steps that the job takes, in their order."""
    folder = tmp_path_factory.mktemp("branches")
    output = folder / "corpus"
    keys = ["source=derm1m", f"input={derm1m(folder / 'raw')}", f"output={output}", "split=test", "min_contrast=0"]
    config = parse(PrepareConfig, [*keys, "near_duplicates=keep"])
    work = pipeline.read(config)
    made = [ShardMaker(config, work.ontology).make(spec).record for spec in work.plan.shards]
    decided = reconcile([], made, policy="keep", near_groups=lambda hashes: np.arange(len(hashes)))
    final = [record for record in decided.shards if record in made]
    generation = generation_of(config, work, made, decided, final)
    commit(config, work.committed, generation, made, final, {}, {"stages": {"plan": 1.0}, "tasks": {}, "ray_data": []})
    return output


@pytest.fixture(scope="module")
def tree(corpus: Path) -> Ontology:
    return branches.load(str(corpus))


@pytest.fixture(scope="module")
def stats(corpus: Path) -> dict[str, Any]:
    return json.loads((corpus / "report" / "stats.json").read_text(encoding="utf-8"))


def test_rows_and_table_say_which_branch_is_meant_and_disagreement_says_nothing(tree: Ontology) -> None:
    for node in MALIGNANT:
        assert tree.path(node)[:2] == ["growths", "malignant"]
    assert tree.path("Melanocytic nevus") == ["growths", "benign", "melanocytic", "Melanocytic nevus"]
    assert tree.path("Lump of one kind")[1] == "benign"
    assert tree.path("Irritated keratosis")[1] == "benign"
    for node in OPEN:
        assert tree.path(node)[1] in ("melanocytic", "non-melanocytic")
        assert tree.levels(node)[1] is None


def test_the_tree_is_of_the_form_that_earlier_readers_load(corpus: Path) -> None:
    document = json.loads((corpus / "ontology.json").read_text(encoding="utf-8"))
    listed = Counter(child for below in document.values() for child in below)
    for name, below in document.items():
        assert isinstance(below, list)
        assert all(isinstance(child, str) and child.strip() for child in below)
        assert len(set(below)) == len(below)
        assert name == "root" or listed[name] > 0
    assert set(document) == {"root", *listed}
    assert Ontology.from_json(document).to_json() == document
    # Where they look for the shortest way up, they find the right branch.
    assert MALIGNANT[0] in document["malignant"]
    assert MALIGNANT[0] not in document["benign"]
    assert Manifest.load(str(corpus)).num_samples == sum(times for _, _, times in ROWS)


def test_what_was_learned_and_what_stays_open_is_in_the_report(corpus: Path, stats: dict[str, Any]) -> None:
    said = {kind: {each["node"]: each for each in stats["branches"][kind]} for kind in ("rows", "table", "open")}
    assert said["rows"]["Lump of one kind"]["rows"] == {"benign": 2}
    assert said["table"]["Malignant melanoma, melanoma"]["rows"] == {"malignant": 3, "benign": 1}
    assert said["open"]["Lump of both kinds"]["rows"] == {"benign": 2, "malignant": 1}
    assert said["open"]["Lump that nobody has"]["rows"] == {}
    assert stats["rows_contradicted"] == 1
    assert stats["branches"]["contradicts"] == []
    page = (corpus / "report" / "report.html").read_text(encoding="utf-8")
    assert "Nodes with several paths" in page
    assert "1 rows name another branch" in page
    covered = {level["level"]: level["covered"] for level in stats["levels"]}
    assert covered[2] == 3  # benign, malignant, Psoriasis


def test_no_caption_puts_a_malignancy_under_benign(corpus: Path) -> None:
    captions = []
    for file in (corpus / "data").iterdir():
        for row in pq.read_table(file, columns=["labels", "captions"]).to_pylist():
            named = [each["text"] for each in row["captions"] if each["aspect"] == "ontology"]
            captions += named
            if set(row["labels"]) & set(MALIGNANT):
                assert all("benign" not in text for text in named)
                assert all("malignant, " in text for text in named)
            if set(row["labels"]) & {"Melanocytic nevus"}:
                assert all("malignant" not in text for text in named)
    assert len(captions) == sum(times for _, _, times in ROWS)


def test_no_answer_of_the_service_puts_a_malignancy_under_benign(tree: Ontology) -> None:
    labels = ["melanoma", "BCC", "squamous cell carcinoma", "nevus", "lump of both kinds", "psoriasis"]
    with TestClient(create_app(Catalogue.of(DummyBackend(), tree), LimitsConfig()), base_url=LOCAL) as client:
        answer = client.post("/v1/classify", json={"image": data_uri(photograph()), "labels": labels}).json()
        below = client.post("/v1/classify", json={"image": data_uri(photograph()), "ontology": "benign"}).json()
    paths = {one["label"]: one["path"] for one in answer["ranking"]}
    chances = {one["label"]: one["probability"] for one in answer["ranking"]}
    for label in labels[:3]:
        assert paths[label][:2] == ["growths", "malignant"]
    assert paths["nevus"][:2] == ["growths", "benign"]
    assert paths["lump of both kinds"] == ["growths", "non-melanocytic", "Lump of both kinds"]
    nodes = {one["node"]: one for one in answer["hierarchy"]}
    assert nodes["malignant"]["probability"] == pytest.approx(sum(chances[label] for label in labels[:3]))
    assert nodes["benign"]["probability"] == pytest.approx(chances["nevus"])
    assert nodes["melanocytic"]["path"] == ["growths", "melanocytic"]
    ranked = {tree.resolve(one["label"]) for one in below["ranking"]}
    assert "Melanocytic nevus" in ranked
    assert not ranked & {*MALIGNANT, *OPEN}


def test_a_ranking_rolled_up_counts_a_class_only_where_it_surely_is() -> None:
    ranking = [RankedClass("Malignant melanoma, melanoma", 0.6, 1.0), RankedClass("Lump of both kinds", 0.4, 0.5)]
    nodes = {one.node: one.probability for one in roll_up(ranking, Ontology(TREE))}
    assert nodes == {"growths": pytest.approx(1.0), "melanocytic": 0.6, "non-melanocytic": 0.4}


def test_no_score_counts_a_nevus_taken_for_a_melanoma_as_right_at_the_level_that_parts_them(corpus: Path) -> None:
    samples = Samples.load(str(corpus), "test")
    classes = classes_of(samples)
    number = {label: place for place, label in enumerate(classes.labels)}
    melanoma, nevus, both = number[MALIGNANT[0]], number["Melanocytic nevus"], number["Lump of both kinds"]
    truth = np.array([nevus, melanoma, nevus, both, melanoma])
    guesses = np.array([melanoma, nevus, nevus, nevus, both])
    second = hierarchy_hits(samples.ontology, classes.nodes, truth, guesses)[2]
    assert (second.rows.tolist(), second.hits.tolist(), second.num_open) == ([0, 1, 2], [0.0, 0.0, 1.0], 2)


def test_classes_benign_and_malignant_get_no_sample_that_may_be_either() -> None:
    labels = [["Malignant melanoma, melanoma"], ["Lump of both kinds"], ["Melanocytic nevus"]]
    samples = Samples(
        "x", "test", "0", (), ["a", "b", "c"], [None] * 3, labels, [[]] * 3, branches.settled(Ontology(TREE))
    )
    fixed = Samples(**{**vars(samples), "class_names": ("benign", "malignant")})
    assert classes_of(fixed).targets.tolist() == [1, -2, 0]


def test_rows_that_take_another_way_than_a_corpus_has_learned_open_it_again() -> None:
    def told(count: int, side: str) -> list[tuple[list[str], str, int]]:
        return [(["Lump of one kind"], f"growths, {side}, non-melanocytic, lump of one kind", count)]

    first, _ = branches.learn(Ontology(TREE), branches.votes(Ontology(TREE), told(5, "benign")))
    assert first.path("Lump of one kind")[1] == "benign"
    again, _ = branches.learn(first, branches.votes(first, told(2, "benign")))
    assert again.to_json() == first.to_json()
    joined = first.union(Ontology(TREE))
    second, found = branches.learn(joined, branches.votes(joined, told(1, "malignant")))
    assert second.path("Lump of one kind") == ["growths", "non-melanocytic", "Lump of one kind"]
    assert [each.chosen for each in found if each.node == "Lump of one kind"] == [None]


@pytest.mark.parametrize("name", ["Lentigo maligna", "Leukaemia cutis", "Malignant blue nevus", "Bowen's disease"])
def test_rows_alone_put_no_name_that_warns_under_benign(name: str) -> None:
    known = Synonyms.load().branch(name)
    tree = Ontology({**TREE, "melanocytic": [*TREE["melanocytic"], name]})
    for side, path in (("benign", None), ("malignant", "malignant")):
        rows = [((name,), f"growths, {side}, melanocytic, {name}", 3)]
        learned, _ = branches.learn(tree, branches.votes(tree, rows))
        # Once more, as a corpus that rows join.
        again, found = branches.learn(learned, branches.votes(learned, rows))
        assert [each.chosen for each in found if each.node == name] == [known or path]
        assert (again.path(name)[1] == "malignant") == ("malignant" in (side, known))
        assert "benign" not in again.path(name)


OLD_TREES = {
    "a mark of rows": {
        "growths": ["benign", "malignant"],
        "benign": ["skin", "{}"],
        "malignant": ["skin"],
        "skin": ["{}"],
    },
    "a mark above the branches": {
        **{"growths": ["benign", "malignant"], "benign": ["firm"], "malignant": ["soft"]},
        **{"firm": ["skin", "{}"], "soft": ["skin"], "skin": ["{}"]},
    },
    "a leaf": {"growths": ["benign", "malignant"], "benign": ["{}"], "malignant": ["lump"]},
    "a node with children": {
        "growths": ["benign", "malignant"],
        "benign": ["{}"],
        "malignant": ["lump"],
        "{}": ["kind of {}"],
    },
    "below a node": {"growths": ["benign", "malignant"], "benign": ["skin"], "malignant": ["lump"], "skin": ["{}"]},
    "two branches malignant": {
        **{"growths": ["benign", "malignant one", "malignant two"], "benign": ["skin", "{}"], "skin": ["{}"]},
        **{"malignant one": ["skin", "lump"], "malignant two": ["skin", "lump"]},
    },
    "two branches elsewhere": {
        **{"growths": ["benign", "malignant one", "malignant two"], "benign": ["{}"]},
        **{"malignant one": ["lump"], "malignant two": ["lump"]},
    },
    "no branch malignant": {"growths": ["benign"], "benign": ["{}"], "{}": ["kind of {}"]},
}


@pytest.mark.parametrize("name", ["Malignant melanoma, melanoma", "Bowen's disease", "MCC", "Lentigo maligna"])
@pytest.mark.parametrize("shape", list(OLD_TREES))
def test_no_tree_of_an_old_corpus_puts_a_malignancy_under_benign(tmp_path: Path, shape: str, name: str) -> None:
    old = {key.format(name): [child.format(name) for child in below] for key, below in OLD_TREES[shape].items()}
    (tmp_path / "ontology.json").write_text(json.dumps({"root": ["growths"], **old}), encoding="utf-8")
    tree = branches.load(str(tmp_path))
    below = [name, *tree.descendants(name)]
    assert len(below) == len([key for key in old if key == name]) + 1
    for node in below:
        assert "benign" not in tree.path(node)
        assert "benign" not in tree.levels(node)
    assert not set(below) & set(tree.descendants("benign"))
    if shape in ("a mark of rows", "a mark above the branches", "a leaf"):
        assert tree.path(name)[:2] == ["growths", "malignant"]
    assert branches.contradictions(tree) == []
    assert branches.settled(tree).to_json() == tree.to_json()


def test_the_sentences_of_an_old_corpus_are_told_and_written_anew(tmp_path: Path) -> None:
    """The tree of an old corpus is settled where it is loaded; its captions are not."""
    tree = {"root": ["benign", "malignant"], "benign": ["MCC", "Lipoma"], "malignant": ["lump"]}
    write_images(tmp_path / "raw", "0.jpg")
    write_table(tmp_path / "raw" / "metadata.csv", [{"image": "0.jpg", "label": "Merkel cell carcinoma"}])
    (tmp_path / "raw" / "ontology.json").write_text(json.dumps(tree), encoding="utf-8")
    corpus = tmp_path / "corpus"
    config = parse(PrepareConfig, ["source=csv", f"input={tmp_path / 'raw'}", f"output={corpus}", "split=val"])

    (spec,) = pipeline.read(config).plan.shards

    def shard_of(ontology: Ontology) -> tuple[str, list[str]]:
        record = ShardMaker(config, ontology).make(spec).record
        assert record.shard is not None
        (row,) = pq.read_table(corpus / record.shard.path).to_pylist()
        manifest = Manifest(shards=(record.shard,), ontology_sha256="0" * 64, provenance={})
        manifest.save(str(corpus))
        (corpus / "ontology.json").write_text(json.dumps(ontology.to_json()), encoding="utf-8")
        return record.key, [each["text"] for each in row["captions"] if each["aspect"] == "ontology"]

    old, said = shard_of(Ontology(tree))
    assert said == ["This is a skin photo diagnosed as benign, mcc."]
    (line,) = branches.told_of_old(str(corpus))
    assert line.startswith(f"{corpus} was prepared before this version knew MCC as malignant: captions of the aspect")
    # The tree is part of a shard's name, so that the same command makes it anew.
    new, said = shard_of(branches.settled(Ontology(tree)))
    assert (new == old, said) == (False, ["This is a skin photo diagnosed as malignant, mcc."])
    assert list(branches.told_of_old(str(corpus))) == []
    (corpus / "ontology.json").unlink()
    assert list(branches.told_of_old(str(corpus))) == []


def test_a_leaf_under_two_parents_goes_where_all_rows_put_it() -> None:
    tree = Ontology({"root": ["viral", "genital"], "viral": ["wart of one place"], "genital": ["wart of one place"]})
    rows = [(["wart of one place"], "viral, wart of one place", 4)]
    learned, _ = branches.learn(tree, branches.votes(tree, rows))
    assert learned.path("wart of one place") == ["viral", "wart of one place"]


def test_a_tree_that_puts_a_malignancy_under_benign_is_told_of() -> None:
    tree = Ontology({"root": ["benign", "malignant"], "benign": ["Merkel cell carcinoma"], "malignant": ["lump"]})
    assert branches.contradictions(tree) == ["Merkel cell carcinoma"]
    assert branches.contradictions(branches.settled(Ontology(TREE))) == []


def test_a_malignancy_that_the_tree_hangs_among_infections_is_open() -> None:
    tree = Ontology(
        {
            "root": ["infectious", "growths"],
            "infectious": ["bacterial"],
            "bacterial": ["Mycosis fungoides", "Impetigo"],
            "growths": ["benign", "malignant"],
            "benign": ["Lipoma"],
            "malignant": ["Sezary syndrome"],
        }
    )
    rows = [(["Mycosis fungoides"], "infectious, bacterial, mycosis fungoides", 5)]
    for said in ([], rows):
        learned, found = branches.learn(tree, branches.votes(tree, said))
        assert [(each.node, each.chosen) for each in found] == [("Mycosis fungoides", None)]
        assert not learned.is_certain("Mycosis fungoides")
        assert learned.path("Mycosis fungoides") == ["Mycosis fungoides"]
        assert learned.path("Impetigo") == ["infectious", "bacterial", "Impetigo"]
        again, _ = branches.learn(learned, branches.votes(learned, said))
        assert again.to_json() == learned.to_json()
        assert caption("Mycosis fungoides", "infectious, bacterial, mycosis fungoides", learned) == "mycosis fungoides"
        path = "growths, malignant, mycosis fungoides"
        assert caption("Mycosis fungoides", path, learned) == path, "what the table does not deny is the row's to say"
        assert caption("Impetigo", "infectious, bacterial, impetigo", learned) == "infectious, bacterial, impetigo"
        assert caption("Lipoma", "growths, malignant, lipoma", learned) == "growths, benign, lipoma"
        assert caption("Sezary syndrome", "growths, benign, sezary syndrome", learned).endswith(
            "malignant, sezary syndrome"
        )


def caption(label: str, path: str, tree: Ontology) -> str:
    """What the sentence over the diagnosis names, for a row that brings a published path."""
    row: samples.RawRow = {"labels": [label], "hierarchy": path, "captions": [], "concepts": []}
    ((aspect, text),) = samples._captions(row, samples.resolve_labels(row, tree), tree, 0)
    assert aspect == "ontology"
    return text.removeprefix("This is a skin photo diagnosed as ").removesuffix(".")


def test_a_missing_tree_is_said(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"ontology\.json does not exist"):
        branches.load(str(tmp_path))
