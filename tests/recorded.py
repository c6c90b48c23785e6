"""What an earlier version left (`tests/fixtures/README.md`), unpacked for a test."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermray.config import parse
from dermray.train.settings import PretrainConfig

ARCHIVE = Path(__file__).parent / "fixtures" / "contrastive_run.zip"


@dataclass(frozen=True)
class Recorded:
    """The unpacked folder and the content of its `expected.json`."""

    root: Path
    expected: dict[str, Any]

    def config(self, output: str, *overrides: str) -> PretrainConfig:
        """The configuration of the recorded run, with one of its outputs: `run` or `whole`."""
        places = [f"corpus={self.root / 'corpus'}", f"output={self.root / output}", f"model={self.root / 'start'}"]
        return parse(PretrainConfig, [*places, "tracking.enabled=false", *self.expected["overrides"], *overrides])

    def losses(self) -> dict[int, float]:
        """Of the undisturbed run, by step."""
        return {step: metrics["loss"] for step, metrics in self.expected["records"] if "loss" in metrics}


def unpacked(folder: Path) -> Recorded:
    """The recorded files in an empty folder."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    for file in folder.rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        if "@ROOT@" in text:
            file.write_text(text.replace("@ROOT@", str(folder)), encoding="utf-8")
    return Recorded(folder, json.loads((folder / "expected.json").read_text(encoding="utf-8")))
