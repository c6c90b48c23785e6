"""What an objective of the tests alone learns goes all the way: killed, resumed, exported, scored, promoted, served."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image

from dermray.commands import evaluate, promote, register
from dermray.config import parse
from dermray.errors import TrackingError
from dermray.masks import encode_mask
from dermray.train.pretrain import PretrainResult, pretrain
from dermray.train.settings import PretrainConfig
from dermray.vectors.encoder import Encoder
from tests import distilled, rotation_model
from tests.corpora import add_side_table, write_prepared_corpus
from tests.fault.test_pretrain_kill import Killer, training_workers, wait_for
from tests.serving import data_uri, running
from tests.turned import turn

pytestmark = [
    *(pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(600)),
    pytest.mark.usefixtures("ray_cluster"),
]
NUM_STEPS = 240
NAME = "own"


def bright_above(index: int) -> bytes:
    """An encoded image that is dark below, so that one sees how it was turned."""
    random = np.random.default_rng(index)
    rows = np.linspace(220, 30, 40)[:, None, None] * random.uniform(0.8, 1.1, 3)
    pixels = np.clip(rows + random.normal(0, 12, (40, 48, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def mask_of(index: int) -> bytes | None:
    """The middle of a picture, of another width each; there is none for every fourth."""
    mask = np.zeros((40, 48), np.uint8)
    mask[4:36, 4 + index % 5 : 44] = 1
    return None if index % 4 == 3 else encode_mask(mask)


def untrained_rotation(folder: Path) -> None:
    torch.manual_seed(5)
    rotation_model.save(rotation_model.layers(16), str(folder), {})


def untrained_student(folder: Path) -> None:
    torch.manual_seed(5)
    distilled.save(dict(distilled.Student().named_parameters()), torch.nn.Identity(), str(folder), {})


# Import path of the objective, that of the task that scores it, and a model that has learned nothing.
OBJECTIVES: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "rotation": ("tests.rotation:OBJECTIVE", "tests.turned:turned", untrained_rotation),
    "distilled": ("tests.distilled:OBJECTIVE", "tests.agreement:agreement", untrained_student),
}


def learned(corpus: Path, output: Path, objective: str) -> PretrainResult:
    keys = [
        *(f"corpus={corpus}", f"output={output}", f"objective.kind={objective}", "num_workers=2"),
        *("tracking.enabled=false", "train.global_batch_size=16", f"train.max_steps={NUM_STEPS}", "optim.lr=0.003"),
        *("train.checkpoint_every_steps=20", "train.log_every_steps=1", "optim.warmup_steps=0", "seed=3"),
    ]
    return pretrain(parse(PretrainConfig, keys), on_record=lambda _: None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_it_learns_survives_a_kill_and_is_scored_promoted_and_served(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    objective, task, untrained = OBJECTIVES[name]
    corpus = tmp_path / "corpus"
    write_prepared_corpus(corpus, {"train": 160, "val": 64}, samples_per_shard=32, draw=bright_above)
    add_side_table(corpus, "masks", "mask", "mask", mask_of)
    # Lesions of three images: a pair, and one in no item.
    add_side_table(corpus, "lesions", "lesion", "text", lambda index: f"lesion {index // 3}")

    whole = learned(corpus, tmp_path / "whole", objective)
    wait_for(lambda: not training_workers(), "the end of the workers", interval_s=0.2)
    killer = Killer(tmp_path / "killed")
    killer.start()
    killed = learned(corpus, tmp_path / "killed", objective)
    killer.join(1)
    assert killer.killed is not None, "no worker was killed"
    assert not killer.finished_at_kill
    assert 0 < killer.steps_at_kill[-1] < NUM_STEPS
    assert killed.weights_sha256 == whole.weights_sha256

    folder = tmp_path / "killed" / "model"
    kept = safetensors.torch.load_file(folder / "model.safetensors").get("unused")
    assert kept is None or torch.equal(kept, torch.ones(3)), "what gets no gradient decayed"
    untrained(tmp_path / "untrained")
    for model in (tmp_path / "untrained", folder):
        report = f"{model}-report"
        scored = [f"model={model}", f"corpus={corpus}", "split=val", f"output={report}", f"tasks=[{task}]"]
        assert evaluate.main([*scored, "bootstrap=200", "num_actors=1"]) == 0
        assert register.main([f"model={model}", f"report={report}", f"name={NAME}", "alias=null"]) == 0
    # It falls to what has learned, by the score of its own, and does not come back.
    assert promote.main([f"name={NAME}", "candidate=1"]) == 0
    assert promote.main([f"name={NAME}", "candidate=2"]) == 0
    with pytest.raises(TrackingError, match=f"{task.partition(':')[2]}.* may be worse by"):
        promote.main([f"name={NAME}", "candidate=1"])

    asked = turn(bright_above(1000), 1)
    encoder = Encoder.load(str(folder))
    (vector,) = encoder.encode_images([asked])
    (row,) = (
        mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
        .predict(pd.DataFrame({"image": [asked]}))
        .to_dict("records")
    )
    np.testing.assert_allclose(row["embedding"], vector, atol=1e-5)
    with running(model=f"models:/{NAME}@champion", device="cpu") as url:
        embedded = httpx.post(f"{url}/v1/embeddings", json={"input": [data_uri(asked, "image/png")]}, timeout=60)
        predicted = httpx.post(f"{url}/v1/predict", json={"image": data_uri(asked, "image/png")}, timeout=60)
        text = httpx.post(f"{url}/v1/embeddings", json={"input": ["a mole"]}, timeout=60)
    np.testing.assert_allclose(embedded.json()["data"][0]["embedding"], vector, atol=1e-5)
    assert embedded.json()["model_info"]["digest"] == killed.weights_sha256
    assert (text.status_code, text.json()["error"]["code"]) == (422, "not_answered")
    check_prediction(encoder, asked, row, predicted)


def check_prediction(encoder: Encoder, asked: bytes, row: dict[str, Any], served: httpx.Response) -> None:
    """The same through MLflow and HTTP where the kind predicts, and true; a refusal where it does not."""
    if "predictions" not in encoder.answers:
        assert (served.status_code, "prediction" in row) == (422, False)
        return
    (expected,), _ = encoder.predict_readable([asked])
    assert expected is not None
    assert int(expected["turns"].argmax()) == 1
    for given in (row["prediction"], served.json()["prediction"]):
        np.testing.assert_allclose(given["turns"], expected["turns"], atol=1e-5)
