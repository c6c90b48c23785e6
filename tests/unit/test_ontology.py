"""The disease tree: paths, levels, resolution of text, and what a malformed file says."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dermray.corpus import graph, spelling
from dermray.corpus.ontology import ROOT, Ontology
from dermray.errors import CorpusError, OntologyError

TREE = {
    "root": ["inflammatory", "proliferations", "Nail diseases, nail disease"],
    "inflammatory": ["eczema", "Lichen planus", "psoriasis"],
    "eczema": ["contact dermatitis", "Dyshidrosis, dyshidrotic eczema"],
    "contact dermatitis": ["Allergic contact dermatitis"],
    "proliferations": ["benign", "malignant"],
    "benign": ["melanocytic", "Seborrheic keratosis"],
    "malignant": ["melanocytic", "Basal cell carcinoma"],
    "melanocytic": ["Melanocytic nevus", "Malignant melanoma, melanoma"],
    "Seborrheic keratosis": ["Seborrheic keratoses"],
    "Nail diseases, nail disease": [
        "Sweet's nail, sweet\u2019s nails",
        "Hyperkeratosis",
        "Keratoderma, Hyperkeratosis",
    ],
}


@pytest.fixture(scope="module")
def tree() -> Ontology:
    return Ontology(TREE)


def test_path_level_and_neighbours(tree: Ontology) -> None:
    assert tree.path("Allergic contact dermatitis") == [
        "inflammatory",
        "eczema",
        "contact dermatitis",
        "Allergic contact dermatitis",
    ]
    assert tree.level("inflammatory") == 1
    assert tree.level("Allergic contact dermatitis") == 4
    assert tree.ancestors("Allergic contact dermatitis") == ["contact dermatitis", "eczema", "inflammatory"]
    assert tree.descendants("eczema") == [
        "contact dermatitis",
        "Allergic contact dermatitis",
        "Dyshidrosis, dyshidrotic eczema",
    ]
    assert tree.children("benign") == ["melanocytic", "Seborrheic keratosis"]
    assert "psoriasis" in tree.leaves()
    assert "eczema" not in tree.leaves()
    assert "eczema" in tree
    assert ROOT not in tree
    assert len(list(tree)) == len(tree) == 20


def test_a_node_under_two_parents(tree: Ontology) -> None:
    melanoma = "Malignant melanoma, melanoma"
    assert tree.path("melanocytic") == ["proliferations", "melanocytic"]
    assert tree.path(melanoma) == ["proliferations", "melanocytic", melanoma]
    assert tree.levels(melanoma) == ["proliferations", None, "melanocytic", melanoma]
    assert not tree.is_certain(melanoma)
    assert tree.is_certain("Basal cell carcinoma")
    assert tree.ancestors("melanocytic") == ["benign", "malignant", "proliferations"]
    assert tree.descendants("melanocytic") == ["Melanocytic nevus", melanoma]
    assert tree.descendants("benign") == ["Seborrheic keratosis", "Seborrheic keratoses"]


def test_similarity_counts_what_is_above_both_on_every_path(tree: Ontology) -> None:
    names = ["Melanocytic nevus", "Malignant melanoma, melanoma", "Seborrheic keratosis", "psoriasis", "benign"]
    # Whether a nevus is benign this tree leaves open; that it is melanocytic, two levels above, it does not.
    expected = [
        [1, 3 / 4, 1 / 3.5, 0, 2 / 6],
        [3 / 4, 1, 1 / 3.5, 0, 2 / 6],
        [2 / 7, 2 / 7, 1, 0, 4 / 5],
        [0, 0, 0, 1, 0],
        [2 / 6, 2 / 6, 4 / 5, 0, 1],
    ]
    np.testing.assert_allclose(tree.similarity(names), expected)
    assert tree.similarity([]).shape == (0, 0)
    for name in ("wart", ROOT):
        with pytest.raises(OntologyError, match=name):
            tree.similarity([name])


def test_an_ancestor_that_lists_a_node_says_which_branch_is_meant() -> None:
    melanoma = "Malignant melanoma, melanoma"
    tree = Ontology(TREE | {"malignant": [*TREE["malignant"], melanoma]})
    path = ["proliferations", "malignant", "melanocytic", melanoma]
    assert tree.path(melanoma) == tree.levels(melanoma) == path
    assert (tree.level(melanoma), tree.is_certain(melanoma), tree.branch_marks(melanoma)) == (4, True, ["malignant"])
    assert set(tree.descendants("malignant")) == {"Basal cell carcinoma", melanoma}
    assert tree.path("Melanocytic nevus") == ["proliferations", "melanocytic", "Melanocytic nevus"]
    both = Ontology(tree.to_json() | {"benign": [*TREE["benign"], melanoma]})
    assert both.path(melanoma) == Ontology(TREE).path(melanoma)
    assert tree.union(both).path(melanoma) == Ontology(TREE).path(melanoma)


def test_levels_are_unknown_from_where_paths_of_several_lengths_meet() -> None:
    tree = Ontology({"root": ["a", "b"], "a": ["x"], "b": ["c"], "c": ["x"], "x": ["y"]})
    assert tree.path("y") == ["x", "y"]
    assert tree.levels("y") == [None, None, None, None]
    assert tree.levels("c") == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("PSORIASIS", "psoriasis"),
        ("  lichen-planus ", "Lichen planus"),
        ("melanoma", "Malignant melanoma, melanoma"),
        ("Melanomas", "Malignant melanoma, melanoma"),
        ("malignant melanoma, melanoma", "Malignant melanoma, melanoma"),
        ("melanocytic nevi", "Melanocytic nevus"),
        ("basal-cell carcinomas", "Basal cell carcinoma"),
        ("basal\u2011cell\u2013carcinoma", "Basal cell carcinoma"),
        ("seborrheic keratosis", "Seborrheic keratosis"),
        ("seborrheic keratoses", "Seborrheic keratoses"),
        ("Sweets nail", "Sweet's nail, sweet\u2019s nails"),
        ("hyperkeratosis", "Hyperkeratosis"),
        ("keratoderma", "Keratoderma, Hyperkeratosis"),
        ("psoriasi", None),
        ("cell carcinoma", None),
        ("melanoma of the eye", None),
        ("root", None),
        ("", None),
        (" , ", None),
    ],
)
def test_resolve(tree: Ontology, text: str, node: str | None) -> None:
    assert tree.resolve(text) == node


SPELLED = {
    "root": [
        "Seborrheic keratosis",
        "oedema",
        "Naevus",
        "Tumor, tumour of the skin",
        "Sj\u00f6gren syndrome",
        "a",
        "b",
    ],
    "Seborrheic keratosis": ["Seborrheic keratoses"],
    "a": ["Discoloured nail", "Photoaging", "Leukoderma", "Haemangioma"],
    "b": ["discolored nails", "Localised scleroderma", "Lupus, erythematosus"],
}


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("seborrhoeic keratosis", "Seborrheic keratosis"),
        ("Seborrheic keratoses", "Seborrheic keratoses"),
        ("edema", "oedema"),
        ("nevi", "Naevus"),
        ("n\u00e6vus", "Naevus"),
        ("tumours", "Tumor, tumour of the skin"),
        ("tumor of the skin", "Tumor, tumour of the skin"),
        ("Sjogren's syndrome", "Sj\u00f6gren syndrome"),
        ("photo-ageing", "Photoaging"),
        ("photo-aging", "Photoaging"),
        ("leucoderma", "Leukoderma"),
        ("hemangiomas", "Haemangioma"),
        ("localized scleroderma", "Localised scleroderma"),
        ("discoloured nail", "Discoloured nail"),
        ("dis-colored-nail", None),
        ("edem", None),
        ("hemangiom", None),
    ],
)
def test_spelling(text: str, node: str | None) -> None:
    assert Ontology(SPELLED).resolve(text) == node


def test_a_text_longer_than_any_name_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    long = ", ".join(f"word{number}" for number in range(60))
    tree = Ontology({"root": [long, "Nevus"]})
    assert tree.resolve(long.upper()) == long
    monkeypatch.setattr(spelling, "key", lambda text: pytest.fail("it is looked at"))
    # As long as it stands, and as long once its ligature of eighteen letters is taken apart.
    for text in ("nevus" + " " * 10_000, "\ufdfa" * 100):
        assert tree.resolve(text) is None
        assert not tree.is_broader(text)


def test_suggestions_are_for_people_only() -> None:
    tree = Ontology(TREE)
    assert tree.resolve("melanomma") is None
    assert [each.name for each in tree.suggest("melanomma")] == ["Malignant melanoma, melanoma"]
    assert tree.suggest("planus lichen")[0] == ("Lichen planus", 100.0)
    assert [each.name for each in tree.suggest("contact", limit=1)] == ["contact dermatitis"]
    assert tree.suggest("fracture of the femur") == tree.suggest(" , ") == tree.suggest("melanomma", limit=0) == []
    scores = [each.score for each in tree.suggest("dermatitis contact allergic eczema", limit=9)]
    assert scores == sorted(scores, reverse=True)


def test_from_paths() -> None:
    tree = Ontology.from_paths([["malignant", "melanoma", "melanoma", "ssm"], ["benign", "", "nevus"], ["malignant"]])
    assert (
        tree.to_json()
        == {
            "root": ["benign", "malignant"],
            "malignant": ["melanoma"],
            "melanoma": ["ssm"],
            "benign": ["nevus"],
            "nevus": [],
            "ssm": [],
        }
        | {}
    )
    with pytest.raises(OntologyError, match="cycle"):
        Ontology.from_paths([["a", "b"], ["b", "a"]])


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(sorted), max_size=12))
def test_from_paths_holds_every_path(numbers: list[list[int]]) -> None:
    paths = [[f"n{number}" for number in path] for path in numbers]
    tree = Ontology.from_paths(paths)
    assert set(tree) == {name for path in paths for name in path}
    assert all(path[-1] in tree and set(tree.path(path[-1])) <= {*path, *tree.ancestors(path[-1])} for path in paths)
    assert all(set(path[:-1]) <= set(tree.ancestors(path[-1])) for path in paths)
    assert all(tree.resolve(name) == name for name in tree)


@pytest.mark.parametrize(
    ("text", "labels", "unresolved"),
    [
        ("lichen planus, psoriasis", ["Lichen planus", "psoriasis"], []),
        ("Nail diseases, nail disease", ["Nail diseases, nail disease"], []),
        ("nail diseases, nail disease, psoriasis", ["Nail diseases, nail disease", "psoriasis"], []),
        ("eczema, allergic contact dermatitis", ["Allergic contact dermatitis"], []),
        ("psoriasis, moon sickness, psoriasis", ["psoriasis"], ["moon sickness"]),
        ("inflammatory, eczema, contact dermatitis", ["contact dermatitis"], []),
        ("", [], []),
    ],
)
def test_resolve_all(tree: Ontology, text: str, labels: list[str], unresolved: list[str]) -> None:
    assert tree.resolve_all(text) == (tuple(labels), tuple(unresolved))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"root": ["a"], "a": ["b"], "b": ["a"]}, r"cycle: a > b > a|cycle: b > a > b"),
        ({"root": ["a"], "a": ["a"]}, "cycle: a > a"),
        ({"root": ["a"], "a": ["root"]}, "cycle"),
        ({"root": ["a"], "b": ["c"]}, "'b' is under no parent"),
        ({"root": ["a"], "b": [], "c": [], "d": [], "e": []}, "'b', 'c', 'd' and 1 more are under no parent"),
        ({"root": ["a"], "b": ["c"], "c": ["b"]}, "cycle: b > c > b|cycle: c > b > c"),
        ({"root": ["root"]}, "cycle"),
        ({"a": ["b"]}, "no node 'root'"),
        ({"root": "a"}, "'root' must have a list"),
        ({"root": ["a", 3]}, "'root' must have a list"),
        ({"root": [""]}, "'root' must have a list"),
        (["root"], "expected a JSON object"),
    ],
)
def test_malformed_trees_are_refused(document: object, message: str) -> None:
    with pytest.raises(OntologyError, match=message):
        Ontology.from_json(document)


def test_load_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"ontology\.json does not exist"):
        Ontology.load(str(tmp_path))
    file = tmp_path / "ontology.json"
    file.write_text(json.dumps({"root": ["a"], "b": []}), encoding="utf-8")
    with pytest.raises(OntologyError, match=rf"{file}: 'b' is under no parent"):
        Ontology.load(str(tmp_path))
    file.write_text('{"root": ["a", "b"], "a": ["c"], "b": ["d"], "b": ["e"]}', encoding="utf-8")
    with pytest.raises(OntologyError, match=r"ontology\.json: 1 nodes stand twice \('b'\): write the children of each"):
        Ontology.load(str(tmp_path))
    file.write_text(json.dumps(TREE), encoding="utf-8")
    loaded = Ontology.load(str(file))
    assert loaded.to_json() == Ontology(TREE).to_json()
    assert Ontology.from_json(loaded.to_json()).to_json() == loaded.to_json()


def test_unknown_node_is_named(tree: Ontology) -> None:
    with pytest.raises(OntologyError, match="no node 'melanoma'"):
        tree.path("melanoma")


def test_flat() -> None:
    flat = Ontology.flat(["nevus", "melanoma", "nevus"])
    assert flat.children(ROOT) == ["melanoma", "nevus"]
    assert flat.path("nevus") == ["nevus"]


@st.composite
def dags(draw: st.DrawFn) -> dict[str, list[str]]:
    """Nodes n0, n1, … each under one or two earlier ones, listed in any order."""
    size = draw(st.integers(1, 25))
    names = [ROOT] + [f"n{number}" for number in range(size)]
    children: dict[str, list[str]] = {name: [] for name in names}
    for number in range(1, len(names)):
        parents = draw(st.lists(st.integers(0, number - 1), min_size=1, max_size=2, unique=True))
        for parent in parents:
            children[names[parent]].append(names[number])
    order = draw(st.permutations(names))
    return {name: children[name] for name in order}


def above(document: dict[str, list[str]], name: str) -> list[str]:
    """Every node that lists one, and the root only where nothing else does."""
    return [parent for parent, below in document.items() if name in below]


def every_path(tree: Ontology, document: dict[str, list[str]], name: str) -> list[list[str]]:
    """All ways from the root that go by the marks of each node on them, found one by one."""
    found: list[list[str]] = []
    for parent in tree.parents(name):
        for path in every_path(tree, document, parent) if parent != ROOT else [[]]:
            reachable = [mark for mark in tree.branch_marks(name) if mark in tree.ancestors(parent)]
            if not reachable or any(mark in path for mark in reachable):
                found.append([*path, name])
    return found


@settings(deadline=None)
@given(dags())
def test_paths_agree_with_parents_and_levels(document: dict[str, list[str]]) -> None:
    tree = Ontology.from_json(document)
    assert sorted(tree) == sorted(name for name in document if name != ROOT)
    position = {name: place for place, name in enumerate(tree)}
    for name in tree:
        paths = every_path(tree, document, name)
        if not paths:
            # Marks that rule each other out: nothing to compare with.
            continue
        everywhere = set.intersection(*(set(path) for path in paths))
        # What marks further up rule out may still count, so less may be known than holds, and never more.
        assert set(tree.path(name)) <= everywhere
        assert {name} <= set(tree.path(name))
        if not any(tree.branch_marks(node) or ROOT in above(document, node) for node in (name, *tree.ancestors(name))):
            assert set(tree.path(name)) == everywhere
        if tree.is_certain(name):
            assert paths == [tree.path(name)]
        for number, node in enumerate(tree.levels(name)):
            assert node is None or all(path[number : number + 1] == [node] for path in paths)
        assert set(tree.ancestors(name)) >= {node for path in paths for node in path[:-1]}
        assert set(tree.descendants(name)) == {node for node in tree if name in tree.path(node) and node != name}
        assert all(position[above] < position[name] for above in tree.ancestors(name))
        assert tree.resolve(name) == name
    similarity = tree.similarity(list(tree))
    assert np.array_equal(similarity, similarity.T)
    assert (np.diag(similarity) == 1).all()
    assert ((similarity >= 0) & (similarity <= 1)).all()


@settings(deadline=None)
@given(dags(), st.data())
def test_a_back_edge_is_found_to_be_a_cycle(document: dict[str, list[str]], data: st.DataObject) -> None:
    tree = Ontology.from_json(document)
    name = data.draw(st.sampled_from(list(tree)))
    below = data.draw(st.sampled_from([name, *tree.descendants(name)]))
    document[below] = [*document[below], name]
    with pytest.raises(OntologyError, match="cycle") as caught:
        Ontology.from_json(document)
    walk = str(caught.value).partition("cycle: ")[2].split(" > ")
    assert walk[0] == walk[-1]
    assert all(child in document[parent] for parent, child in pairwise(walk))


def test_what_no_tree_has_is_refused_before_it_costs_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    number = 50_000
    chain = {ROOT: ["n0"]} | {f"n{place}": [f"n{place + 1}"] for place in range(number)}
    with pytest.raises(OntologyError, match="'n200' is more than 200 levels below 'root'"):
        Ontology(chain)
    ring = {ROOT: ["a"]} | {f"n{place}": [f"n{(place + 1) % number}"] for place in range(number)}
    with pytest.raises(OntologyError, match=r"cycle: n0 > n1 > .* > \u2026 49,989 more \u2026 > n0$") as caught:
        Ontology(ring)
    assert len(str(caught.value)) < 300
    monkeypatch.setattr(graph, "MAX_NODES", 3)
    with pytest.raises(OntologyError, match="it has 4 nodes; an ontology may have 3"):
        Ontology.flat("abc")
    monkeypatch.setattr(graph, "MAX_NODES", 10)
    monkeypatch.setattr(graph, "MAX_EDGES", 3)
    with pytest.raises(OntologyError, match="list 4 children; an ontology may list 3"):
        Ontology({ROOT: ["a", "b"], "a": ["c"], "b": ["c"]})


def test_the_work_grows_with_the_tree_and_not_with_its_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 ** 150 paths lead to the last node.
    layers = 150
    wide = {ROOT: ["a0", "b0"]} | {
        f"{side}{depth}": [f"a{depth + 1}", f"b{depth + 1}"] for depth in range(layers) for side in "ab"
    }
    tree = Ontology(wide)
    last = f"a{layers}"
    assert tree.path(last) == [last]
    assert tree.levels(last) == [None] * layers + [last]
    assert tree.level(last) == layers + 1
    assert len(tree.ancestors(last)) == 2 * layers
    assert tree.resolve(last.upper()) == last
    assert tree._steps < 40 * len(tree)
    monkeypatch.setattr(graph, "MAX_STEPS", 100)
    with pytest.raises(OntologyError, match="cannot be told apart"):
        Ontology(wide).path(last)


def test_a_cell_of_many_commas_is_looked_up_part_by_part(tree: Ontology, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = Ontology.resolve
    monkeypatch.setattr(Ontology, "resolve", lambda self, text: asked.append(text) or real(self, text))
    found = Ontology(TREE).resolve_all(", ".join(["moon sickness", "psoriasis"] * 500))
    assert found.labels == ("psoriasis",)
    assert len(found.unresolved) == 500
    assert len(asked) <= 3 * 1000
    assert tree.suggest("x" * 1_000_000) == []


def test_two_trees_unite_and_a_node_stays_where_it_is_known_better() -> None:
    published = Ontology({"root": ["malignant", "benign"], "malignant": ["melanoma"], "benign": ["nevus"]})
    flat = Ontology.flat(["melanoma", "urticaria"])
    both = published.union(flat)
    assert both.path("melanoma") == ["malignant", "melanoma"]
    assert both.path("urticaria") == ["urticaria"]
    assert flat.union(published).level("melanoma") == 2
    assert both.union(flat).to_json() == both.to_json()


def test_trees_that_contradict_each_other_do_not_unite() -> None:
    with pytest.raises(OntologyError, match="cycle"):
        Ontology({"root": ["a"], "a": ["b"]}).union(Ontology({"root": ["b"], "b": ["a"]}))
