"""The pyfunc flavour: saved without a pickle, loaded by MLflow alone, and equal to the encoder."""

from __future__ import annotations

import mlflow
import numpy as np
import pandas as pd
import pytest

from dermray.encoder import Encoder
from dermray.tracking_pyfunc import save
from tests.serving import data_uri, photograph, save_tiny_model


def test_mlflow_serves_the_same_vectors_and_rankings(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny")
    save(folder, tmp_path / "flavour")
    assert not list((tmp_path / "flavour").rglob("*.pkl"))
    model = mlflow.pyfunc.load_model(str(tmp_path / "flavour"))
    encoder = Encoder.load(str(folder), device="cpu")
    frame = pd.DataFrame({"input": ["psoriasis", data_uri(photograph(2))]})
    answer = model.predict(frame, params={"labels": "melanoma, psoriasis"})
    expected = np.concatenate([encoder.encode_texts(["psoriasis"]), encoder.encode_images([photograph(2)])])
    np.testing.assert_allclose(np.array(answer["embedding"].tolist()), expected, atol=1e-5)
    assert answer["ranking"][0] is None
    assert {one["label"] for one in answer["ranking"][1]} == {"melanoma", "psoriasis"}
    assert sum(one["probability"] for one in answer["ranking"][1]) == pytest.approx(1)
    assert list(model.predict(frame[:1]).columns) == ["embedding"]
    # What is not a usable image is named by its row.
    with pytest.raises(Exception, match="row 1: "):
        model.predict(pd.DataFrame({"input": ["a", data_uri(b"no image")]}))
