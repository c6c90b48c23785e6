"""Layer-wise rates and groups, scores and averaged weights equal the published figures of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.errors import ConfigError
from dermray.evaluate.metrics import classification
from dermray.train import layer_decay
from dermray.train.ema import Ema

FILE = Path(__file__).parent / "panderm_finetune.npz"
FACTS = json.loads(FILE.with_suffix(".json").read_text())
# The position table is not trained and in no group.
TRAINED = [each for each in FACTS["parameters"] if each["group"] is not None]


def test_layer_wise_rates_are_the_published_ones():
    scales = layer_decay.scales(
        [each["name"] for each in TRAINED],
        num_layers=FACTS["config"]["tower"]["depth"],
        decay=FACTS["config"]["layer_decay"],
    )
    assert scales == [each["lr_scale"] for each in TRAINED]


def test_what_decays_is_what_is_published_to():
    decays = layer_decay.decayed([(each["name"], each["shape"]) for each in TRAINED])
    assert decays == [each["weight_decay"] > 0 for each in TRAINED]
    assert layer_decay.decayed([("pos_embed", (1, 5, 16)), ("mask_token", (1, 1, 16))]) == [False, True]


@pytest.mark.parametrize("decay", [0.0, 1.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ConfigError, match="layer decay"):
        layer_decay.scales(["head.weight"], num_layers=2, decay=decay)


def test_a_block_that_the_tower_has_not_is_named():
    with pytest.raises(ConfigError, match=r"blocks\.2\.norm1\.bias"):
        layer_decay.scales(["blocks.2.norm1.bias"], num_layers=2, decay=0.5)
    assert layer_decay.scales(["blocks.10.attn.proj.weight", "mask_token"], num_layers=12, decay=0.5) == [0.25, 0.5**13]


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


# Names of ours, and of theirs.
SCORES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced_accuracy",
    "top5_accuracy": "top5 accuracy",
    "weighted_f1": "weighted_f1",
    "macro_auroc": "auc_roc",
}


@pytest.mark.parametrize("facts", ["metrics_float64", "metrics_with_class_1_absent"])
def test_our_scores_are_those_of_the_published_fine_tuning(arrays, facts):
    labels, published = arrays["metric_labels"], FACTS[facts]
    kept = np.ones(len(labels), dtype=bool) if facts == "metrics_float64" else labels != 1
    logits = arrays["metric_logits"][kept].astype(np.float64)
    found = classification(torch.from_numpy(logits).softmax(dim=1), labels[kept], bootstrap=0)
    for ours, theirs in SCORES.items():
        # The published area is not defined where a class has no sample; ours is the mean over the others.
        if published[theirs] is not None:
            assert found[ours].value == pytest.approx(published[theirs], abs=1e-9), ours


def test_our_averaged_weights_are_the_published_ones(arrays):
    model = torch.nn.Linear(4, 3, bias=False)
    model.weight.data = torch.from_numpy(arrays["ema_initial_weight"]).clone()
    average = Ema(model, FACTS["config"]["ema"])
    for weights in arrays["ema_model_weights"]:
        model.weight.data = torch.from_numpy(weights)
        average.update(torch.tensor(1.0))
    np.testing.assert_allclose(average.averages["weight"], arrays["ema_weight_after_3"], atol=1e-6)
