"""The head over images and facts of a case equals DermFM-Zero's, for each choice of modalities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermray.errors import ModelError
from dermray.models.fusion import CrossFusion

FILE = Path(__file__).parent / "multimodal_fusion.npz"
CONFIG = json.loads(FILE.with_suffix(".json").read_text())["config"]
SIZES = {
    "hidden": CONFIG["hidden_dim"],
    "meta": CONFIG["meta_dim"],
    "heads": CONFIG["num_head"],
    "depth": CONFIG["att_depth"],
    "meta_heads": CONFIG["meta_num_head"],
    "meta_depth": CONFIG["meta_att_depth"],
    "num_classes": CONFIG["classes"],
}
FEATURES = {"clinical": "clinical_feature", "dermoscopic": "dermoscopic_feature", "meta": "text_feature"}


@pytest.fixture(scope="module", params=["cdm", "cm", "cd"])
def case(request):
    """The model of some modalities, its inputs, and the published arrays."""
    with np.load(FILE) as file:
        prefix = f"{request.param}."
        arrays = {
            name.removeprefix(prefix): torch.from_numpy(file[name]) for name in file.files if name.startswith(prefix)
        }
    model = CrossFusion(**SIZES, modalities=request.param)
    model.load_state_dict({k.removeprefix("state."): v for k, v in arrays.items() if k.startswith("state.")})
    given = {name: arrays[feature] for name, feature in FEATURES.items() if feature in arrays}
    return model.eval(), given, arrays


def test_what_is_fused_the_logits_and_the_loss(case):
    model, given, arrays = case
    for name, fused in model.fuse(**given).items():
        if f"{name}_fused" in arrays:
            torch.testing.assert_close(fused, arrays[f"{name}_fused"], atol=2e-5, rtol=1e-5)
    logits = model(**given)
    torch.testing.assert_close(logits, arrays["logits"], atol=2e-5, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits, arrays["labels"])
    assert loss.item() == pytest.approx(float(arrays["loss"]), abs=1e-5)
    # All that the model has is used.
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_other_vectors_than_the_models_are_refused(case):
    model, given, _ = case
    with pytest.raises(ModelError, match="this model takes clinical"):
        model(**dict(list(given.items())[:-1]))
    with pytest.raises(
        ModelError, match="given are clinical, dermoscopic, meta" if len(given) < 3 else "given are none"
    ):
        model(**dict.fromkeys(FEATURES, given["clinical"]) if len(given) < 3 else {})


def test_sizes_and_names_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="'dm'"):
        CrossFusion(**SIZES, modalities="dm")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="heads 3"):
        CrossFusion(**{**SIZES, "heads": 3})
    # Two images side by side are 32 wide.
    with pytest.raises(ModelError, match="32 one of meta_heads 5"):
        CrossFusion(**{**SIZES, "meta_heads": 5})
    assert CrossFusion(**{**SIZES, "meta_heads": 32})
