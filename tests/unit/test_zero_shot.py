"""The zero-shot task: classes from labels, names from synonyms, exclusions counted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dermray.config import parse
from dermray.corpus import branches
from dermray.corpus.ontology import Ontology
from dermray.errors import ConfigError, CorpusError, EvaluationError
from dermray.evaluate.features import Features
from dermray.evaluate.report import build
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.tasks.contract import Context
from dermray.evaluate.tasks.retrieval.module import Retrieval
from dermray.evaluate.tasks.zero_shot.module import ZeroShot
from dermray.predict.zero_shot import TEMPLATES, classifier_weights, fill, hierarchy_hits
from dermray.vectors.encoder_info import EncoderInfo
from tests.corpora import CONDITIONS, write_prepared_corpus

INFO = EncoderInfo("tiny", 4, 32, 24, "a" * 64, "b" * 64, 1000)


def features(samples: Samples, images: np.ndarray, texts: dict[str, np.ndarray], broken: list[int]) -> Features:
    return Features(
        info=INFO,
        images=images.astype(np.float32),
        lengths=np.ones(len(samples), dtype=np.float32),
        reasons=np.array(["not_an_image" if row in broken else "" for row in range(len(samples))], dtype=object),
        duration_s=1.0,
        num_encoded=len(samples),
        num_actors=1,
        _texts=np.stack(list(texts.values())).astype(np.float32),
        _text_rows={text: row for row, text in enumerate(texts)},
    )


def one_hot_of(text: str) -> np.ndarray:
    """The axis of the condition that a prompt or caption names."""
    names = [(row, one.strip()) for row, name in enumerate(CONDITIONS) for one in name.split(",")]
    return np.eye(4)[next(row for row, name in names if name in text)]


@pytest.fixture
def context(tmp_path):
    """A model that is always right, on a split with one unlabelled and one unreadable sample."""
    write_prepared_corpus(tmp_path / "corpus", {"val": 40}, unlabelled=[3], broken=[6], without_raw=[8, 9])
    config = EvaluateConfig(model="m", corpus=str(tmp_path / "corpus"), output="o", bootstrap=50)
    samples = Samples.load(config.corpus, "val")
    texts = {text: one_hot_of(text) for task in (ZeroShot(), Retrieval()) for text in task.texts(samples, config)}
    images = np.eye(4)[[index % 4 for index in range(40)]]
    images[6] = 0
    return Context(config, samples, features(samples, images, texts, broken=[6]))


def test_prompts_use_the_first_synonym(context):
    prompts = ZeroShot().texts(context.samples, context.config)
    by_first, by_all = prompts[: 4 * len(TEMPLATES)], prompts[4 * len(TEMPLATES) :]
    assert "A skin image of eczema." in by_first
    assert not any("dermatitis" in prompt for prompt in by_first)
    assert len(by_all) == 5 * len(TEMPLATES)
    assert "A skin image of dermatitis." in by_all


def test_synonyms_are_averaged_into_one_class(context):
    texts = context.features._text_rows
    for text, row in texts.items():
        if "dermatitis" in text:
            # By this name the model takes eczema for its opposite, and surer than it knows it by the first.
            context.features._texts[row] = [-3.0, 0.0, 0.0, 0.0]
    result = ZeroShot().run(context)
    assert result.details["num_classes_with_synonyms"] == 1
    assert result.metrics["accuracy"].value == 1.0
    assert result.metrics["synonyms_accuracy"].value < 1.0


def test_right_at_a_level_of_the_tree(context):
    images = context.features.images
    # Psoriasis taken for eczema is right at the first level, a nevus taken for psoriasis at none.
    images[1], images[7] = images[0], images[1 + 4]
    result = ZeroShot().run(context)
    assert result.metrics["accuracy"].value == pytest.approx(36 / 38)
    assert result.metrics["level_1_accuracy"].value == pytest.approx(37 / 38)
    assert result.metrics["level_2_accuracy"].value == pytest.approx(36 / 38)
    assert result.details["num_samples_by_level"] == {"1": 38, "2": 38}


def test_levels_count_only_what_is_known_and_only_as_deep_as_the_class():
    tree = Ontology({"root": ["a", "b"], "a": ["x"], "b": ["x", "y"], "y": ["z"]})
    truth, predictions = np.array([0, 0, 1, 2]), np.array([2, 1, 2, 1])
    found = hierarchy_hits(tree, ["x", "y", "z"], truth, predictions)
    # x lies below a or b, and nobody knows: at level 1 it counts as no truth.
    assert [(each.rows.tolist(), each.hits.tolist(), each.num_open) for each in found.values()] == [
        ([2, 3], [1.0, 1.0], 2),
        ([0, 1, 2, 3], [0.0, 0.0, 1.0, 1.0], 0),
        ([3], [0.0], 0),
    ]


def test_a_nevus_taken_for_a_melanoma_is_wrong_from_the_level_that_parts_them():
    tree = {
        "root": ["benign", "malignant"],
        "benign": ["melanocytic"],
        "malignant": ["melanocytic"],
        "melanocytic": ["nevus", "melanoma"],
    }
    truth, predictions = np.array([0, 0, 1]), np.array([0, 1, 0])
    flat = hierarchy_hits(Ontology(tree), ["nevus", "melanoma"], truth, predictions)
    assert (flat[1].rows.tolist(), flat[1].num_open) == ([], 3)
    learned = hierarchy_hits(branches.settled(Ontology(tree)), ["nevus", "melanoma"], truth, predictions)
    assert (learned[1].hits.tolist(), learned[1].num_open) == ([1.0, 0.0, 0.0], 0)


def test_fixed_classes_keep_their_order_and_count_what_is_outside(context):
    samples = replace(context.samples, class_names=("nevus", "eczema", "psoriasis"))
    result = ZeroShot().run(replace(context, samples=samples))
    assert [row["name"] for row in result.details["classes"]] == ["nevus", "eczema", "psoriasis"]
    # The list has no melanoma: every fourth sample is outside, one of them unreadable.
    assert result.excluded == {"without a label": 0, "label outside the class list": 10, "image not readable": 0} | {
        "without a label": 1
    }
    assert result.num_samples == 29
    assert result.metrics["accuracy"].value == 1.0


def test_no_label_of_the_class_list_is_said(context):
    samples = replace(context.samples, class_names=("scabies", "acne"))
    with pytest.raises(EvaluationError, match="no sample of the split 'val' has a label among the 2 classes"):
        ZeroShot().run(replace(context, samples=samples))


def test_perfect_model(context):
    result = ZeroShot().run(context)
    assert result.num_samples == 38
    assert result.excluded == {"without a label": 1, "image not readable": 1}
    assert all(metric.value == pytest.approx(1.0) for metric in result.metrics.values())
    assert result.details["chance"] == 0.25
    assert [row["label"] for row in result.details["classes"]] == list(CONDITIONS)
    assert np.trace(result.details["confusion"]) == 38
    assert {one["guesses"][0]["name"] for one in result.details["examples"]["right"]} == {
        name.partition(",")[0] for name in CONDITIONS
    }
    assert result.details["examples"]["wrong"] == []
    json.dumps(result.details, allow_nan=False)


def test_mistakes_are_shown_most_confident_first(context):
    images = context.features.images
    images[[0, 4]] = images[1]
    images[12] = images[12] * 0.6 + images[13] * 0.8
    result = ZeroShot().run(context)
    wrong = result.details["examples"]["wrong"]
    assert [one["index"] for one in wrong] == [0, 4]
    assert wrong[0]["name"] == "eczema"
    assert wrong[0]["guesses"][0] == {"name": "psoriasis", "probability": pytest.approx(1.0)}
    assert result.metrics["accuracy"].value == pytest.approx(35 / 38)


def test_most_specific_label_counts(context):
    context.samples.labels[0] = ["inflammatory", "psoriasis", "eczema, dermatitis"]
    result = ZeroShot().run(context)
    assert result.details["num_samples_with_several_labels"] == 1
    assert result.details["confusion"][1][0] == 1


def test_nothing_to_score_is_said(context):
    for labels in context.samples.labels:
        labels.clear()
    with pytest.raises(EvaluationError, match="no sample of the split 'val' has a label"):
        ZeroShot().run(context)


def test_retrieval_task_counts_what_it_leaves_out(context):
    result = Retrieval().run(context)
    assert result.num_samples == 37
    assert result.excluded == {"without a raw caption": 2, "image not readable": 1}
    # Ten images share each condition's vector, so the own caption stands anywhere among nine or ten that tie.
    assert result.metrics["image_to_text_R@1"].value == pytest.approx(4 / 37)
    assert result.metrics["image_to_text_R@10"].value == pytest.approx(1.0)
    assert all(one["captions"][0]["is_own"] in (True, False) for one in result.details["examples"])
    json.dumps(result.details, allow_nan=False)


def test_report_document_and_page(context, tmp_path):
    results = {"zero_shot": ZeroShot().run(context), "retrieval": Retrieval().run(context)}
    report = build(context, results, model_uri="models/tiny", duration_s=2.0)
    report.save(str(tmp_path / "out"))
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["schema_version"] == 1
    assert document["corpus"]["digest"] == context.samples.corpus_digest
    assert document["model"]["model_digest"] == INFO.model_digest
    assert document["engine"]["failed_images"] == {"not_an_image": 1}
    page = (tmp_path / "out" / "report.html").read_text()
    for needle in (INFO.model_digest, INFO.preprocessing_digest, context.samples.corpus_digest, TEMPLATES[3]):
        assert needle in page
    assert "data:image/jpeg;base64," in page
    assert "not_an_image" in page
    metrics = report.metrics()
    assert metrics["zero_shot/accuracy"] == 1.0
    assert {"retrieval/image_to_text_R_at_1", "zero_shot/accuracy_low", "zero_shot/accuracy_high"} <= set(metrics)
    assert report.headline()[:2] == [
        "zero_shot (38 samples): accuracy 100.0 % [100.0, 100.0], top5_accuracy 100.0 % [100.0, 100.0], "
        "macro_auroc 100.0 % [100.0, 100.0]",
        "zero_shot: 38 of 40 samples; left out: without a label 1, image not readable 1",
    ]
    assert document["corpus"]["rows"] == {"in": 40, "used": 40, "told": {}}


def test_classifier_weights_are_unit_vectors_of_the_means():
    features = torch.nn.functional.normalize(torch.randn(5, 3, 7, generator=torch.manual_seed(0)), dim=-1)
    weights = classifier_weights(features)
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(weights[2], features[2].sum(dim=0) / features[2].sum(dim=0).norm())


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], TEMPLATES, "at least one class"),
        (["acne", "nevus", "acne"], TEMPLATES, "'acne' is given more than once"),
        (["acne", " "], TEMPLATES, "empty"),
        (["acne"], ["a skin image"], "has no {}"),
    ],
)
def test_bad_classes_are_named(names, templates, message):
    with pytest.raises(EvaluationError, match=message):
        fill(names, templates)


def test_braces_in_a_class_name_stay(tmp_path):
    assert fill(["type {0}"], ["a {}"]) == ["a type {0}"]


def test_missing_split_lists_those_there_are(tmp_path):
    write_prepared_corpus(tmp_path / "corpus", {"train": 8, "holdout": 4})
    with pytest.raises(CorpusError, match=r"no split 'val'; it has: train \(8\), holdout \(4\)"):
        Samples.load(str(tmp_path / "corpus"), "val")


def test_first_samples_only(tmp_path):
    write_prepared_corpus(tmp_path / "corpus", {"val": 40}, row_group_size=8)
    samples = Samples.load(str(tmp_path / "corpus"), "val", max_samples=19)
    assert len(samples) == 19
    assert [group.num_rows for group in samples.images] == [8, 8, 3]
    everything = Samples.load(str(tmp_path / "corpus"), "val")
    assert everything.ids[:19] == samples.ids
    assert everything.read_images([39, 0, 17])[17] == samples.read_images([17])[17]


def test_template_without_a_place_is_a_config_error():
    with pytest.raises(ConfigError, match=r"templates: the template 'skin' has no \{\}"):
        parse(EvaluateConfig, ["model=m", "corpus=c", "output=o", "templates=[skin]"])
