"""The whole road on this machine: synthesize, prepare, pretrain, evaluate, register, serve, ask. `make demo`.

Every stage but the last runs as the command a user would type, on one local Ray cluster that this process starts. A
second call finds finished stages finished.
"""

from __future__ import annotations

import base64
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from dermray import entry, scales, storage
from dermray.config import ClusterConfig, Config, TrackingConfig, load
from dermray.errors import DermRayError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "jobs/configs/demo.yaml"
MODEL_NAME = "dermray-demo"
NUM_LATENCY_REQUESTS = 30


class DemoConfig(Config):
    """Everything `jobs/demo.py` can be told."""

    output: str = Field("demo-output", description="local folder for everything the demo makes")
    num_images: int = Field(3000, ge=100, description="synthetic photographs to draw")
    epochs: float | None = Field(None, gt=0, description="passes over the corpus; empty: the recipe's")
    seed: int = Field(0, ge=0, description="of corpus, split and training")


@dataclass
class Demo:
    """The stages in order; each leaves its figures in `figures`."""

    config: DemoConfig
    folder: Path
    environment: dict[str, str]
    figures: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Run every stage and print what was made."""
        started = time.monotonic()
        self._stage("1/6 draw the corpus", "half a minute", self.synthesize)
        self._stage("2/6 prepare it on Ray", "half a minute", self.prepare)
        self._stage("3/6 pretrain a tiny CLIP with Ray Train", "5 minutes", self.pretrain)
        self._stage("4/6 evaluate on held-out images", "a minute", self.evaluate)
        self._stage("5/6 register in MLflow", "some seconds", self.register)
        self._stage("6/6 serve with Ray Serve and ask", "half a minute", self.serve)
        self.figures["total_s"] = time.monotonic() - started
        self.track()
        self.summarise()

    def _stage(self, title: str, expectation: str, action: Any) -> None:
        print(f"\n== {title} (about {expectation})", flush=True)
        started = time.monotonic()
        action()
        print(f"   done in {time.monotonic() - started:.0f} s", flush=True)

    def _job(self, *arguments: str) -> None:
        command = [sys.executable, *arguments]
        print("$ python " + shlex.join(arguments), flush=True)
        code = subprocess.run(command, cwd=ROOT, env=self.environment, check=False).returncode
        if code:
            raise DermRayError(f"this stage ended with exit code {code}: python {shlex.join(arguments)}")

    def synthesize(self) -> None:
        """Draw images, captions and an ontology in Derm1M's raw layout."""
        self._job(
            "jobs/synthesize.py",
            f"output={self.folder / 'raw'}",
            f"num_images={self.config.num_images}",
            f"seed={self.config.seed}",
        )

    def prepare(self) -> None:
        """Raw layout to Parquet shards; the demo's model looks at 64 pixels, so 96 are kept."""
        corpus = self.folder / "corpus"
        self._job(
            "jobs/prepare.py",
            "source=derm1m",
            f"input={self.folder / 'raw'}",
            f"output={corpus}",
            "split.val=0.15",
            "image_size=96",
            "rows_per_shard=256",
            "row_group_size=32",
            f"seed={self.config.seed}",
            "run_name=demo: prepare",
        )
        self.figures["samples_prepared"] = storage.read_json(corpus / "manifest.json")["num_samples"]

    def pretrain(self) -> None:
        """Two data-parallel workers on the CPU."""
        epochs = [] if self.config.epochs is None else [f"train.epochs={self.config.epochs}"]
        self._job(
            "jobs/pretrain.py",
            "--config",
            RECIPE,
            f"corpus={self.folder / 'corpus'}",
            f"output={self.folder / 'pretrain'}",
            f"seed={self.config.seed}",
            "run_name=demo: pretrain",
            *epochs,
        )
        summary = storage.read_json(self.folder / "pretrain" / "summary.json")
        self.figures["training_samples_per_s"] = summary["metrics"]["mean_samples_per_s"]

    def evaluate(self) -> None:
        """Zero-shot classification and retrieval on the held-out split."""
        self._job(
            "jobs/evaluate.py",
            f"model={self.folder / 'pretrain' / 'model'}",
            f"corpus={self.folder / 'corpus'}",
            f"output={self.folder / 'report'}",
            "split=val",
            "run_name=demo: evaluate",
        )
        tasks = storage.read_json(self.folder / "report" / "report.json")["tasks"]
        accuracy = tasks["zero_shot"]["metrics"]["accuracy"]
        self.figures["zero_shot_accuracy"] = accuracy["value"]
        self.figures["zero_shot_accuracy_low"] = accuracy["low"]
        self.figures["zero_shot_accuracy_high"] = accuracy["high"]
        for direction in scales.RETRIEVAL_WAYS:
            for k in (1, 5, 10):
                value = tasks["retrieval"]["metrics"][f"{direction}_R@{k}"]["value"]
                self.figures[f"{direction}_R_at_{k}"] = value

    def register(self) -> None:
        """A version in the MLflow registry; the alias moves when it is the best so far."""
        self._job(
            "jobs/register.py",
            f"model={self.folder / 'pretrain' / 'model'}",
            f"report={self.folder / 'report'}",
            f"name={MODEL_NAME}",
            "run_name=demo: register",
        )

    def serve(self) -> None:
        """Bring the registered model up on a free port, ask it about one held-out photograph, take it down."""
        import httpx
        from ray import serve
        from ray.serve.config import HTTPOptions

        sys.path.insert(0, str(ROOT))
        from dermray.service.fleet.command import start_serve, stop_serve
        from serve.app import build

        port = _free_port()
        start_serve(HTTPOptions(host="127.0.0.1", port=port))
        try:
            serve.run(build({"model": f"models:/{MODEL_NAME}@champion"}), name="demo")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                self._ask(client)
        finally:
            stop_serve()

    def _ask(self, client: Any) -> None:
        image, condition = self._held_out_image()
        body = {"image": "data:image/jpeg;base64," + base64.b64encode(image).decode()}
        seconds = []
        for _ in range(NUM_LATENCY_REQUESTS):
            started = time.perf_counter()
            answer = client.post("/v1/classify", json=body)
            seconds.append(time.perf_counter() - started)
            answer.raise_for_status()
        print(f"POST /v1/classify with a held-out photograph of: {condition}")
        for guess in answer.json()["ranking"][:3]:
            print(f"   {guess['probability']:6.1%}  {guess['label']}")
        # The first request builds the text classifier; the others find it cached.
        self.figures["request_latency_ms_p50"] = statistics.median(seconds[1:]) * 1000
        self.figures["request_latency_ms_first"] = seconds[0] * 1000

    def _held_out_image(self) -> tuple[bytes, str]:
        from dermray.evaluate.samples import Samples

        samples = Samples.load(str(self.folder / "corpus"), "val")
        index = next(i for i, labels in enumerate(samples.labels) if labels)
        return samples.read_images([index])[index], samples.labels[index][0]

    def track(self) -> None:
        """The demo's figures as an MLflow run of their own."""
        from dermray import tracking

        with tracking.run(TrackingConfig(), kind="demo", name="demo: figures", resolved=self.config) as current:
            current.log_metrics(self.figures)

    def summarise(self) -> None:
        """What was made and where to look."""
        f = self.figures
        print(f"\n== all done in {f['total_s'] / 60:.1f} minutes")
        print(f"samples prepared        {f['samples_prepared']:,}")
        print(f"training                {f['training_samples_per_s']:,.0f} samples/s")
        print(
            f"zero-shot top-1         {f['zero_shot_accuracy']:.1%} "
            f"(95 % interval {f['zero_shot_accuracy_low']:.1%} to {f['zero_shot_accuracy_high']:.1%})"
        )
        for direction in scales.RETRIEVAL_WAYS:
            ranks = "  ".join(f"R@{k} {f[f'{direction}_R_at_{k}']:.1%}" for k in (1, 5, 10))
            print(f"{direction.replace('_', ' '):<23} {ranks}")
        print(f"request latency         {f['request_latency_ms_p50']:.0f} ms (median over HTTP)")
        shown, programs = os.path.relpath(self.folder), Path(os.path.relpath(sys.executable)).parent
        print("\nLook at:")
        print(f"  corpus report      {shown}/corpus/report/report.html")
        print(f"  evaluation report  {shown}/report/report.html")
        print(f"  runs and models    {programs}/mlflow ui --backend-store-uri sqlite:///mlflow.db")
        print(f"  serve the model    {programs}/serve run serve.app:build model=models:/{MODEL_NAME}@champion")
        print("                     then open http://127.0.0.1:8000")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see `--help`."""
    config = load(
        DemoConfig,
        argv,
        prog="jobs/demo.py",
        description="Synthesize a corpus, then prepare, pretrain, evaluate, register and serve on this machine.",
    )
    import ray

    from dermray import cluster

    os.chdir(ROOT)
    print("== start a local Ray cluster", flush=True)
    cluster.connect(ClusterConfig())
    address = ray.get_runtime_context().gcs_address
    try:
        Demo(config, storage.local_path(config.output), {**os.environ, "RAY_ADDRESS": address}).run()
    finally:
        ray.shutdown()
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
