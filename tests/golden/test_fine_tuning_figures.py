"""Layer-wise rates and groups equal the published figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dermray.errors import ConfigError
from dermray.train import layer_decay

FACTS = json.loads((Path(__file__).parent / "panderm_finetune.json").read_text())
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
