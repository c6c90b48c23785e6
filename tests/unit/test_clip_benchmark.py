"""LAION's CLIP_benchmark loads our models, and its scores are ours."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dermray.evaluate import clip_benchmark, zero_shot
from dermray.evaluate.retrieval import retrieval_metrics
from dermray.evaluate.statistics.metrics import classification
from dermray.vectors.encoder import Encoder
from tests.corpora import MODEL_CFG, jpeg, write_model

CLASSES = ["eczema", "psoriasis", "melanoma", "nevus", "acne", "vitiligo", "rosacea"]
TEMPLATES = ["This is a skin image of {}", "{}, a skin disorder, is shown in this image."]
NUM_IMAGES = 42


class Images(list):
    """What a DataLoader reads: (image, target) with the classes beside it, as torchvision's data sets have them."""

    classes = CLASSES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "model", seed=4))


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    colours = np.random.default_rng(0).integers(20, 235, (NUM_IMAGES, 3)).tolist()
    return [jpeg(tuple(colour), seed=number) for number, colour in enumerate(colours)]


@pytest.fixture(scope="module")
def loaded(folder: str) -> tuple[Any, Any, Any]:
    from clip_benchmark.models import load_clip

    clip_benchmark.register()
    clip_benchmark.register()
    model, transform, tokenizer = load_clip("dermray", folder, "", None, device="cpu")
    return model.eval(), transform, tokenizer


def loader(transform: Any, encoded: list[bytes], targets: list[Any]) -> DataLoader:
    rows = Images(
        (transform(Image.open(io.BytesIO(data))), target) for data, target in zip(encoded, targets, strict=True)
    )
    return DataLoader(
        rows, batch_size=5, collate_fn=lambda batch: (torch.stack([x for x, _ in batch]), _targets(batch))
    )


def _targets(batch: list[tuple[Any, Any]]) -> Any:
    targets = [target for _, target in batch]
    return torch.tensor(targets) if isinstance(targets[0], int) else targets


def test_zero_shot_scores_agree(folder: str, encoded: list[bytes], loaded: tuple[Any, Any, Any]) -> None:
    from clip_benchmark.metrics import zeroshot_classification

    model, transform, tokenizer = loaded
    labels = np.random.default_rng(1).integers(0, len(CLASSES), NUM_IMAGES)
    theirs = zeroshot_classification.evaluate(
        model,
        loader(transform, encoded, labels.tolist()),
        tokenizer,
        CLASSES,
        [template.replace("{}", "{c}") for template in TEMPLATES],
        "cpu",
        amp=False,
    )
    encoder = Encoder.load(folder, device="cpu")
    classifier = torch.from_numpy(zero_shot.build_classifier(encoder, CLASSES, TEMPLATES))
    scores = zero_shot.probabilities(torch.from_numpy(encoder.encode_images(encoded)), classifier).numpy()
    ours = classification(scores, labels, bootstrap=0)
    for their_name, name in (
        ("acc1", "accuracy"),
        ("acc5", "top5_accuracy"),
        ("mean_per_class_recall", "balanced_accuracy"),
    ):
        assert theirs[their_name] == pytest.approx(ours[name].value, abs=1e-6), name
    assert 0 < theirs["acc1"] < theirs["acc5"] < 1


def test_retrieval_scores_agree(folder: str, encoded: list[bytes], loaded: tuple[Any, Any, Any]) -> None:
    from clip_benchmark.metrics import zeroshot_retrieval

    model, transform, tokenizer = loaded
    captions = [f"a patch of {CLASSES[number % 7]}, case {number}" for number in range(NUM_IMAGES)]
    theirs = zeroshot_retrieval.evaluate(
        model,
        loader(transform, encoded, [[caption] for caption in captions]),
        tokenizer,
        "cpu",
        amp=False,
        recall_k_list=[1, 5, 10],
    )
    encoder = Encoder.load(folder, device="cpu")
    ours = retrieval_metrics(encoder.encode_images(encoded), encoder.encode_texts(captions), ks=(1, 5, 10))
    for k in (1, 5, 10):
        assert theirs[f"image_retrieval_recall@{k}"] == pytest.approx(ours[f"text_to_image_R@{k}"], abs=1e-6), k
        assert theirs[f"text_retrieval_recall@{k}"] == pytest.approx(ours[f"image_to_text_R@{k}"], abs=1e-6), k
    assert 0 < ours["image_to_text_R@10"] < 1


def test_its_command_line_takes_our_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its data set for trying out has one blank image of 224 pixels.
    vision = MODEL_CFG["vision_cfg"] | {"image_size": 224, "patch_size": 32}
    model = write_model(tmp_path / "model", model_cfg={**MODEL_CFG, "vision_cfg": vision})
    output = tmp_path / "result.json"
    command = ["eval", "--model_type", "dermray", "--model", str(model), "--pretrained", "none", "--dataset", "dummy"]
    settings = ["--task", "zeroshot_classification", "--output", str(output), "--no_amp", "--num_workers", "0"]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *command, *settings])
    assert clip_benchmark.main() == 0
    assert json.loads(output.read_text())["metrics"]["acc1"] in (0.0, 1.0)
