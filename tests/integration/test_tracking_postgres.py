"""MLflow as a team runs it: a server over PostgreSQL and an S3 store, both real, on loopback.

Slow: a database, an object store and a server come up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import psycopg2
import pytest

from dermray import storage, tracking
from dermray.config import TrackingConfig
from dermray.release import verification
from dermray.tracking import lineage
from tests.lineage import Chain
from tests.mlflow_server import MlflowServer
from tests.postgres import postgres
from tests.s3 import BUCKET, faulty_s3

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def database() -> Iterator[str]:
    with postgres() as uri:
        yield uri


def test_a_chain_on_postgresql_and_s3(database: str, tmp_path: Path) -> None:
    with faulty_s3() as s3:
        # Jobs have no keys: what they upload goes through the server.
        environment = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": s3.url}
        artifacts = f"s3://{BUCKET}/mlflow"
        # Without a driver's name SQLAlchemy takes psycopg 3.
        backend = database.replace("postgresql:", "postgresql+psycopg2:")
        with MlflowServer(tmp_path / "s", backend=backend, artifacts=artifacts, environment=environment) as server:
            _walk(server.url, tmp_path)
        objects = boto3.client(
            "s3", endpoint_url=s3.url, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
        ).list_objects_v2(Bucket=BUCKET, Prefix="mlflow/")["Contents"]
    keys = {one["Key"].rpartition("/")[2] for one in objects}
    assert {"config.yaml", "packages.txt", "MLmodel", "open_clip_model.safetensors"} <= keys
    with psycopg2.connect(database) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step")
        assert cursor.fetchall() == [(step, step / 4) for step in range(1, 2001)]
        cursor.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED' AND lifecycle_stage = 'active'")
        assert cursor.fetchall() == [(5,)]


def _walk(url: str, folder: Path) -> None:
    chain = Chain(folder, TrackingConfig(uri=url, spool=str(folder / "spool")))
    chain.prepare()
    with chain.run("train") as current:
        for step in range(1, 2001):
            current.log_metrics({"loss": step / 4}, step=step)
    model = chain.pretrain("m")
    chain.register(model, chain.evaluate(model, {"accuracy": (0.5, 0.4, 0.6)}))
    resolved = tracking.resolve_model("models:/derm@champion", chain.config)
    weights = "open_clip_model.safetensors"
    assert storage.sha256(storage.join(resolved.folder_uri, weights)) == storage.sha256(model / weights)
    graph = lineage.trace("models:/derm@champion", chain.config)
    assert {"raw", "corpus", "model", "report", "run", "version"} == {node.kind for node in graph.nodes.values()}
    states = {finding.node.partition(":")[0]: finding.state for finding in verification.verify(graph, chain.config)}
    assert states == {"corpus": "same", "model": "same", "report": "same", "version": "same", "raw": "unchecked"}
