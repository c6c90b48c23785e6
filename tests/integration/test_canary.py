"""Secrets in the environment, in URIs and in settings of whole jobs: none is printed, recorded or left in a file."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import raw_corpus
from tests.conftest import ROOT
from tests.corpora import write_model
from tests.mlflow_server import MlflowServer
from tests.s3 import BUCKET, faulty_s3, stored_objects

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

CANARY = "kq7Vx2mZp9LwT4bN8sRdCanary"
ENVIRONMENT = (
    "DERMRAY_SERVE_TOKENS", "DERMRAY_SERVE_ADMIN_TOKENS", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
)  # fmt: skip
URI = f"s3://AKIAIOSFODNN7EXAMPLE:{CANARY}@bucket/folder"
SIGNED = f"s3://bucket/folder?X-Amz-Signature={CANARY}"
DATABASE = f"postgresql://writer:{CANARY}@127.0.0.1:1/mlflow"
COMMANDS = {
    "dry run": [
        "jobs/prepare.py", "source=csv", "input={raw}", "output={out}", "--dry-run", f"run_name=token={CANARY}",
    ],
    "input with a key": ["jobs/prepare.py", "source=csv", f"input={URI}", "output={out}"],
    "signed input": ["jobs/prepare.py", "source=csv", f"input={SIGNED}", "output={out}"],
    "print the settings": [
        "jobs/prepare.py", "source=csv", "input={raw}", "output={out}", f"tracking.uri={DATABASE}", "--print-config",
    ],
    "pretrain on a corpus with a key": ["jobs/pretrain.py", f"corpus={URI}", "output={out}"],
    "evaluate a model with a key": ["jobs/evaluate.py", f"model={URI}", "corpus={raw}", "output={out}"],
    "export": ["jobs/export.py", f"corpus={URI}", "output={out}", "format=parquet"],
    "compare": ["jobs/compare.py", f"reports=[{URI},{SIGNED}]", "output={out}"],
    "lineage": ["jobs/lineage.py", f"of={URI}"],
    "lineage in a database": ["jobs/lineage.py", "of=models:/a@b", f"tracking.uri={DATABASE}"],
    "promote": ["jobs/promote.py", "candidate=1", f"tracking.uri={DATABASE}"],
    "deliver": ["jobs/deliver.py", f"tracking.uri={DATABASE}"],
    "unknown key": ["jobs/register.py", f"password={CANARY}"],
    "synthesize": ["jobs/synthesize.py", "output={out}", "num_images=8"],
    "sweep": ["tune/sweep.py", f"corpus={URI}", "output={out}"],
}  # fmt: skip


def secretive() -> dict[str, str]:
    """An environment that is full of secrets."""
    return {**os.environ, **dict.fromkeys(ENVIRONMENT, CANARY), "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"}


def with_canary(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_secret_of_a_job_is_printed_recorded_or_left_behind(name: str, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw_corpus.write(raw, num_good=4)
    arguments = [part.replace("{raw}", str(raw)).replace("{out}", str(out)) for part in COMMANDS[name]]
    environment = secretive()
    environment |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "DERMRAY_SPOOL": str(tmp_path / "spool")}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    done = subprocess.run(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert CANARY not in said
    assert "Traceback" not in said
    assert not with_canary(tmp_path)


# A job whose cluster leaves its logs.
LOGGED = """
import runpy, sys
from dermray import cluster
cluster.keep_logs()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STORE = f"s3://{BUCKET}/chain"
CHAIN = {
    "prepare": ["source=csv", "input={folder}/raw", f"output={STORE}/corpus", "split={val: 0.3}", "rows_per_shard=16"],
    "pretrain": [
        f"corpus={STORE}/corpus", f"output={STORE}/run", "model={folder}/model", "train.epochs=1",
        "train.global_batch_size=8", "train.checkpoint_every_steps=2", "optim.warmup_steps=1",
    ],
    "evaluate": [
        f"corpus={STORE}/corpus", f"model={STORE}/run/model", f"output={STORE}/report", "split=val", "bootstrap=20",
        "tasks=[zero_shot,retrieval]", "cache={folder}/cache",
    ],
}  # fmt: skip


@pytest.fixture
def sessions() -> Iterator[Path]:
    """Where Ray keeps its sessions: below a short path, as its sockets lie there too."""
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_no_secret_of_a_chain_is_in_its_outputs_its_records_or_the_logs_of_ray(tmp_path: Path, sessions: Path) -> None:
    """From raw rows to a report, on a store and a server that want credentials, each job with a cluster of its own."""
    raw_corpus.write(tmp_path / "raw", num_good=40)
    write_model(tmp_path / "model")
    with faulty_s3() as s3, MlflowServer(tmp_path / "mlflow") as mlflow:
        environment = {**s3.environment, **secretive(), "RAY_TMPDIR": str(sessions)}
        environment["AWS_ENDPOINT_URL"] = s3.url
        environment.pop("RAY_ADDRESS", None)
        tracking = [f"tracking.uri={mlflow.url.replace('//', f'//writer:{CANARY}@')}", f"tracking.spool={tmp_path}/s"]
        for job, keys in CHAIN.items():
            arguments = [key.replace("{folder}", str(tmp_path)) for key in keys]
            done = subprocess.run(
                [sys.executable, "-c", LOGGED, str(ROOT / f"jobs/{job}.py"), *arguments, *tracking],
                cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            assert CANARY not in done.stdout + done.stderr
        outputs = stored_objects(s3)
    assert {"chain/corpus/manifest.json", "chain/run/summary.json", "chain/report/report.json"} <= outputs.keys()
    assert not [name for name, content in outputs.items() if CANARY.encode() in content]
    assert len(list(sessions.glob("ray/session_2*/logs/raylet.out"))) == len(CHAIN)
    assert len(list(sessions.glob("ray/session_2*/logs/worker-*.err"))) >= len(CHAIN)
    assert not with_canary(sessions)
    assert not with_canary(tmp_path)
