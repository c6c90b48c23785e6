"""A whole chain of runs in a SQLite store, with real files and without Ray: prepare, pretrain, evaluate, register."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermray import storage, tracking
from dermray.config import Config, TrackingConfig
from dermray.corpus.manifest import Manifest
from tests.corpora import write_model, write_prepared_corpus

Metrics = dict[str, tuple[float, float, float]]


class ChainConfig(Config):
    """Stands for the settings of every job of the chain."""

    corpus: str = "corpus"


@dataclass
class Chain:
    """The folders of a chain and its store."""

    folder: Path
    config: TrackingConfig

    def run(self, kind: str) -> Any:
        return tracking.run(self.config, kind=kind, name=f"{kind} tiny", resolved=ChainConfig())

    def prepare(self) -> Manifest:
        write_prepared_corpus(self.folder / "corpus", {"train": 8, "val": 4})
        manifest = Manifest.load(str(self.folder / "corpus"))
        with self.run("prepare") as current:
            current.log_artifact("input", "raw", str(self.folder / "raw"), manifest.source_digest)
            current.log_corpus(str(self.folder / "corpus"), manifest, context="output")
        return manifest

    def pretrain(self, name: str, *, seed: int = 0, licence: str | None = "CC-BY-4.0") -> Path:
        manifest = Manifest.load(str(self.folder / "corpus"))
        folder = self.folder / name / "model"
        with self.run("pretrain") as current:
            current.log_corpus(str(self.folder / "corpus"), manifest, context="training")
            facts = {**tracking.provenance(current, manifest), "licences": [licence], "corpus_digest": manifest.digest}
            write_model(folder, seed=seed, provenance=facts)
            digest = storage.sha256(folder / "open_clip_model.safetensors")
            current.log_artifact("output", "model", str(folder), digest)
        return folder

    def evaluate(self, model: Path, metrics: Metrics) -> Path:
        folder = model.parent / "report"
        manifest = Manifest.load(str(self.folder / "corpus"))
        digest = storage.sha256(model / "open_clip_model.safetensors")
        document = {
            "schema_version": 1,
            "model": {"uri": str(model), "model_digest": digest},
            "corpus": {"uri": str(self.folder / "corpus"), "digest": manifest.digest, "split": "val"},
            "tasks": {
                "zero_shot": {
                    "num_samples": 4,
                    "templates": ["{}"],
                    "metrics": {
                        name: {"value": value, "low": low, "high": high} for name, (value, low, high) in metrics.items()
                    },
                }
            },
        }
        with self.run("evaluate") as current:
            current.log_corpus(str(self.folder / "corpus"), manifest, context="evaluation")
            storage.write_json(folder / "report.json", document)
            current.log_artifact("input", "model", str(model), digest)
            current.log_artifact("output", "report", str(folder), storage.sha256(folder / "report.json"))
        return folder

    def register(self, model: Path, report: Path, name: str = "derm", **overrides: Any) -> str:
        from dermray.commands import register

        arguments = {
            "model": model,
            "report": report,
            "name": name,
            "metric": "zero_shot.accuracy",
            "tracking.uri": self.config.uri,
            "tracking.experiment": self.config.experiment,
            **overrides,
        }
        assert register.main([f"{key}={value}" for key, value in arguments.items()]) == 0
        versions = tracking.client(self.config).search_model_versions(f"name='{name}'")
        return str(max(int(version.version) for version in versions))
