"""jobs/evaluate.py under SIGKILL while it encodes: what was finished is kept, the rest is done by the next run.

That one loses its encoder, which another one follows. None of it brings a line of Ray's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from dermray.evaluate import features, suite
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.vectors.encoder import Encoder
from tests.conftest import ROOT
from tests.corpora import write_model, write_prepared_corpus

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NUM_SAMPLES, ROWS_PER_GROUP = 480, 4
DEADLINE_S = 120
BROKEN = 7


def kept(cache: Path) -> dict[Path, int]:
    """Parts of images by their time of change; what is being written begins with a dot."""
    return {file: file.stat().st_mtime_ns for file in cache.glob("*/images/*/[!.]*.parquet")}


def kill_an_encoder(cache: Path, num_parts: int) -> None:
    """End the encoder once so many parts are there."""
    end = time.monotonic() + DEADLINE_S
    while len(kept(cache)) < num_parts and time.monotonic() < end:
        time.sleep(0.002)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "EncodeActor" in " ".join(process.cmdline()):
                process.kill()


@pytest.mark.long
def test_killed_while_it_encodes_and_run_again(tmp_path: Path) -> None:
    model, corpus, cache = (str(tmp_path / name) for name in ("model", "corpus", "cache"))
    write_model(Path(model))
    write_prepared_corpus(Path(corpus), {"val": NUM_SAMPLES}, row_group_size=ROWS_PER_GROUP, broken=[BROKEN])
    arguments = [f"model={model}", f"corpus={corpus}", f"output={tmp_path / 'out'}", f"cache={cache}", "batch_size=1"]
    arguments += ["num_actors=1", "tracking.enabled=false"]
    address = f"cluster.address={ray.get_runtime_context().gcs_address}"
    killed = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "jobs" / "evaluate.py"),
            *arguments,
            address,
            "num_actors=1",
            "tracking.enabled=false",
        ],
        stdout=(tmp_path / "said").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + DEADLINE_S
        while len(kept(Path(cache))) < 5:
            assert killed.poll() is None, "the job ended before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.002)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    before = kept(Path(cache))
    num_units = NUM_SAMPLES // ROWS_PER_GROUP
    assert 5 <= len(before) < num_units
    # Ray warns of constructors' arguments that an actor's restart would miss.
    assert "core_worker" not in (tmp_path / "said").read_text()
    config = EvaluateConfig(model=model, corpus=corpus, output="unused", bootstrap=0, cache=cache, num_actors=1)
    said: list[str] = []
    lost = threading.Thread(target=kill_an_encoder, args=(Path(cache), len(before) + 3))
    lost.start()
    resumed = suite.evaluate(config, say=said.append)
    lost.join()
    assert [line for line in said if line.startswith("an encoder is lost (ActorDiedError); others go on with the ")]
    after = kept(Path(cache))
    assert len(after) == num_units
    assert {file: after[file] for file in before} == before
    # An actor of the killed job may have finished some more parts before Ray ended it.
    assert resumed.document["engine"]["num_images_encoded"] <= ROWS_PER_GROUP * (num_units - len(before))
    samples = Samples.load(corpus, "val")
    (found,) = features.compute([samples], [], model_uri=model, cache=cache)
    assert found.num_encoded == 0
    readable = [row for row in range(NUM_SAMPLES) if row != BROKEN]
    images = samples.read_images(readable)
    undisturbed = Encoder.load(model, device="cpu").encode_images([images[row] for row in readable])
    np.testing.assert_allclose(found.images[readable], undisturbed, atol=1e-5)
    assert np.flatnonzero(~found.usable).tolist() == [BROKEN]
