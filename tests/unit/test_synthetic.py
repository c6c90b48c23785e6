"""The synthetic corpus: its tree, its pictures, its words, and what lies in the folder."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermray.corpus.ontology import Ontology
from dermray.corpus.synthetic import CONDITIONS, TABLE_NAME, Condition, contact_sheet, draw, ontology, write_corpus
from dermray.corpus.synthetic.surface import SURFACES
from dermray.corpus.synthetic.wording import (
    COLUMNS,
    MAX_TRUNCATED_WORDS,
    NO_AGE,
    NO_CONCEPTS,
    NO_DIAGNOSIS,
    NO_GENDER,
    NO_LOCATION,
    NO_SYMPTOMS,
    SOURCES,
    describe,
    truncate,
)
from dermray.errors import ConfigError, StorageError

NUM_IMAGES, SEED = 96, 11


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small corpus for all tests that only read it."""
    folder = tmp_path_factory.mktemp("synthetic") / "raw"
    write_corpus(folder, num_images=NUM_IMAGES, seed=SEED, workers=1)
    return folder


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / TABLE_NAME).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def drawn_rows(num: int) -> list[dict[str, str]]:
    """Rows of many small drawings, to see shares that a small corpus cannot show."""
    rows = []
    for index in range(num):
        rng = np.random.default_rng([5, index])
        _, attributes = draw(CONDITIONS[index % len(CONDITIONS)], rng, size=(24, 32))
        rows.append(describe(attributes, rng, SOURCES[index % len(SOURCES)]))
    return rows


def test_ontology_is_a_tree_of_four_levels_that_holds_every_condition() -> None:
    tree = Ontology.from_json(ontology())
    assert len(CONDITIONS) >= 24
    levels = Counter(len(condition.path) for condition in CONDITIONS)
    assert max(levels) == 4
    assert levels[3] + levels[4] >= 0.8 * len(CONDITIONS)
    assert any("," in name for name in ontology())
    for condition in CONDITIONS:
        assert condition.name == condition.path[-1] == condition.name.lower()
        for word in (condition.name, *condition.synonyms):
            assert tree.resolve(word) == condition.node
        assert tuple(tree.path(condition.node)) == (*condition.path[:-1], condition.node)
        assert ontology()[condition.node] == []


def test_names_and_looks_are_distinct() -> None:
    words = [word for condition in CONDITIONS for word in (condition.name, *condition.synonyms)]
    assert len(set(words)) == len(words)
    assert len({condition.groups for condition in CONDITIONS}) == len(CONDITIONS)
    used = {name for condition in CONDITIONS for group in condition.groups for name in group.surface}
    used |= {name for condition in CONDITIONS for name, _ in condition.sometimes}
    assert used == set(SURFACES)


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.name)
def test_draw_gives_a_picture_of_the_size_and_depends_on_the_generator_alone(condition: Condition) -> None:
    first, attributes = draw(condition, np.random.default_rng([1, 2]), size=(60, 80))
    again, same = draw(condition, np.random.default_rng([1, 2]), size=(60, 80))
    other, _ = draw(condition, np.random.default_rng([1, 3]), size=(60, 80))
    assert first.shape == (60, 80, 3)
    assert first.dtype == np.uint8
    assert first.std() > 5
    np.testing.assert_array_equal(first, again)
    assert attributes == same
    assert np.abs(first.astype(int) - other).mean() > 3
    assert attributes.skin_type in condition.skin_types
    assert attributes.site in condition.sites
    assert set(condition.concepts) <= set(attributes.concepts)


def test_draw_admits_portrait_square_and_tiny_sizes() -> None:
    for size in ((90, 60), (64, 64), (12, 16)):
        for index, condition in enumerate(CONDITIONS):
            photograph, _ = draw(condition, np.random.default_rng(index), size=size)
            assert photograph.shape == (*size, 3)


def test_skin_darkens_with_its_type() -> None:
    nevus = next(condition for condition in CONDITIONS if condition.name == "melanocytic nevus")
    brightness = [
        np.mean([draw(nevus, np.random.default_rng(k), size=(48, 64), skin_type=skin_type)[0] for k in range(8)])
        for skin_type in range(1, 7)
    ]
    assert brightness == sorted(brightness, reverse=True)
    assert brightness[0] > 2 * brightness[-1]


def test_conditions_look_different_at_training_size() -> None:
    """On one skin type, the nearest class mean of thumbnails and colour histograms beats chance twelve-fold."""

    def features(condition: Condition, index: int) -> np.ndarray:
        skin_type = min(condition.skin_types, key=lambda candidate: abs(candidate - 3))
        photograph, _ = draw(condition, np.random.default_rng([index, 77]), size=(64, 64), skin_type=skin_type)
        small = np.asarray(Image.fromarray(photograph).resize((8, 8))).reshape(-1) / 255
        colours = np.histogramdd(photograph.reshape(-1, 3) / 256, bins=(5, 5, 5), range=[(0, 1)] * 3)[0].reshape(-1)
        return np.concatenate([small, 3 * np.sqrt(colours / colours.sum())])

    means = np.stack([np.mean([features(c, k) for k in range(16)], axis=0) for c in CONDITIONS])
    hits = [
        int(np.argmin(((means - features(c, 100 + k)) ** 2).sum(1))) == label
        for label, c in enumerate(CONDITIONS)
        for k in range(4)
    ]
    assert np.mean(hits) > 12 / len(CONDITIONS)


def test_corpus_has_the_layout_of_the_release(corpus: Path) -> None:
    rows = read_rows(corpus)
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == NUM_IMAGES == len({row["filename"] for row in rows})
    assert json.loads((corpus / "ontology.json").read_text("utf-8")) == ontology()
    folders = {source.name: source.folder for source in SOURCES}
    for row in rows:
        assert row["filename"].startswith(folders[row["source"]] + "/")
        with Image.open(corpus / row["filename"]) as image:
            assert image.format == {"jpg": "JPEG", "png": "PNG"}[row["filename"].rsplit(".", 1)[1]]
            assert min(image.size) >= 112
            image.load()
    sizes = {Image.open(corpus / row["filename"]).size for row in rows}
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)
    assert not list(corpus.rglob("*.part"))
    on_disk = {str(path.relative_to(corpus)) for path in corpus.rglob("*.*g") if path.parent != corpus}
    assert on_disk == {row["filename"] for row in rows}
    assert any(" " in name for name in on_disk)
    assert any(not name.isascii() for name in on_disk)


def test_classes_are_balanced_and_counted(corpus: Path) -> None:
    summary = write_corpus(corpus, num_images=NUM_IMAGES, seed=SEED)
    rows = read_rows(corpus)
    names = {", ".join(condition.path): condition.name for condition in CONDITIONS}
    counts = Counter(names.get(row["hierarchical_disease_label"]) for row in rows)
    assert summary["num_conditions"] == len(counts.keys() - {None})
    assert max(count for name, count in counts.items() if name) <= NUM_IMAGES // len(CONDITIONS)
    concepts = {word for row in rows for word in row["skin_concept"].split(", ")} - {NO_CONCEPTS}
    assert summary["num_concepts"] == len(concepts) >= 20
    assert summary["num_images"] == NUM_IMAGES
    assert Path(summary["table"]) == corpus / TABLE_NAME


def test_labels_resolve_in_the_tree(corpus: Path) -> None:
    tree = Ontology.load(str(corpus))
    for row in read_rows(corpus):
        for label in filter(None, row["disease_label"].split(", ")):
            assert label == NO_DIAGNOSIS or tree.resolve(label) is not None
        for node in filter(None, row["hierarchical_disease_label"].split(", ")):
            assert tree.resolve(node) is not None


def test_missing_fields_occur_about_as_often_as_meant() -> None:
    rows = drawn_rows(1500)

    def share(column: str, value: str) -> float:
        return sum(row[column] == value for row in rows) / len(rows)

    assert 0.01 < share("disease_label", NO_DIAGNOSIS) < 0.04
    assert 0.02 < share("hierarchical_disease_label", "") < 0.07
    assert 0.10 < share("skin_concept", NO_CONCEPTS) < 0.26
    assert 0.45 < share("body_location", NO_LOCATION) < 0.65
    assert share("symptoms", NO_SYMPTOMS) > 0.6
    assert 0.65 < share("age", NO_AGE) < 0.85
    assert 0.62 < share("gender", NO_GENDER) < 0.82
    assert all(row["hierarchical_disease_label"] == "" for row in rows if row["disease_label"] == NO_DIAGNOSIS)
    assert any(", " in row["disease_label"] for row in rows)
    assert all(row["age"] == NO_AGE or 0 <= int(row["age"]) <= 100 for row in rows)


def test_captions_vary_name_the_condition_and_read_well() -> None:
    rows = drawn_rows(1500)
    captions = [row["caption"] for row in rows]
    assert len(set(captions)) > 0.8 * len(captions)
    named = [
        any(word in row["caption"].lower() for word in (condition.name, *condition.synonyms))
        for row, condition in zip(rows, CONDITIONS * 47, strict=False)
        if row["disease_label"] != NO_DIAGNOSIS
    ]
    assert np.mean(named) > 0.97
    assert 0 < sum(len(caption.split()) == 1 for caption in captions) < 0.03 * len(captions)
    assert any(len(caption.split()) > MAX_TRUNCATED_WORDS for caption in captions)
    for caption in captions:
        assert caption[0].isupper()
        assert not re.search(r"[{}]|  |\ba [aeio]|\ban [^aeio8]|border border|bullas", caption), caption


def test_truncate_keeps_whole_sentences_and_cuts_one_that_is_too_long() -> None:
    short = "A red plaque on the arm."
    sentence = " ".join(["word"] * 29) + " end."
    assert truncate(short) == short
    assert truncate(f"{sentence} {sentence}") == sentence
    assert truncate(" ".join(["word"] * 80)).split() == ["word"] * MAX_TRUNCATED_WORDS
    assert all(len(row["truncated_caption"].split()) <= MAX_TRUNCATED_WORDS for row in drawn_rows(200))


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_corpus(one, num_images=310, seed=3, workers=1)
    write_corpus(two, num_images=310, seed=3, workers=2)
    assert digests(one) == digests(two)


def test_seed_changes_the_pictures_and_the_words(tmp_path: Path, corpus: Path) -> None:
    write_corpus(tmp_path / "other", num_images=NUM_IMAGES, seed=SEED + 1, workers=1)
    ours, theirs = set(digests(corpus).values()), set(digests(tmp_path / "other").values())
    assert len(ours & theirs) == 1  # ontology.json


def test_finished_corpus_is_left_alone_and_an_unfinished_one_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    first = write_corpus(folder, num_images=6, seed=0, workers=1)
    image = next(iter(sorted(folder.rglob("*.jpg"))))
    whole = digests(folder)
    image.write_bytes(b"touched")
    assert write_corpus(folder, num_images=6, seed=0, workers=1) == first
    assert image.read_bytes() == b"touched"
    (folder / TABLE_NAME).unlink()
    write_corpus(folder, num_images=6, seed=0, workers=1)
    assert digests(folder) == whole
    write_corpus(folder, num_images=4, seed=0, workers=1)
    assert len(read_rows(folder)) == 4 == sum(path.parent != folder for path in folder.rglob("*.*g"))


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / TABLE_NAME).write_text("filename,caption\n", "utf-8")
    with pytest.raises(StorageError, match="choose another output folder"):
        write_corpus(tmp_path, num_images=2, seed=0)
    assert (tmp_path / TABLE_NAME).read_text("utf-8") == "filename,caption\n"


def test_unwritable_output_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(StorageError, match="cannot write the synthetic corpus"):
        write_corpus(tmp_path / "file" / "raw", num_images=2, seed=0)


@pytest.mark.parametrize(("num_images", "seed", "workers"), [(0, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_impossible_numbers_are_refused(tmp_path: Path, num_images: int, seed: int, workers: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 image"):
        write_corpus(tmp_path / "raw", num_images=num_images, seed=seed, workers=workers)
    assert not (tmp_path / "raw").exists()


def test_contact_sheet_is_a_jpeg_that_fits_the_docs(tmp_path: Path) -> None:
    path = contact_sheet(tmp_path / "sheet.jpg", seed=1)
    assert path.stat().st_size <= 300_000
    with Image.open(io.BytesIO(path.read_bytes())) as sheet:
        assert sheet.format == "JPEG"
        assert sheet.width > 1000
