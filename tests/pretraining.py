"""A pretraining small enough for tests: one corpus, one model and one configuration that several files share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.util
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup

from dermray.config import parse
from dermray.train.pretrain import PretrainResult, pretrain
from dermray.train.progress import StepRecord
from dermray.train.settings import PretrainConfig
from tests.corpora import write_model, write_prepared_corpus

# 80 samples in 10 row groups: 5 steps an epoch, 8 streams, so 1, 2, 4 or 8 workers; the fourth epoch is cut.
NUM_SAMPLES = 80
ROW_GROUP_SIZE = 8
GLOBAL_BATCH_SIZE = 16
NUM_STEPS = 16
CHECKPOINT_EVERY = 4
# A vision tower whose step takes long enough for a process to be killed between two checkpoints.
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "layers": 3, "width": 128, "head_width": 32, "patch_size": 4},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
OVERRIDES = (
    f"train.epochs={NUM_STEPS / 5}",
    f"train.global_batch_size={GLOBAL_BATCH_SIZE}",
    "train.log_every_steps=1",
    f"train.checkpoint_every_steps={CHECKPOINT_EVERY}",
    "data.captions={raw: 1.0, ontology: 1.0}",
    "data.crop_scale=[0.3, 1.0]",
    "data.horizontal_flip=0.5",
    "optim.lr=1e-3",
    "optim.warmup_steps=4",
    "seed=11",
)


@functools.cache
def corpus(root: Path) -> Path:
    """The corpus of the session under `root`."""
    folder = root / "pretraining" / "corpus"
    write_prepared_corpus(
        folder, {"train": NUM_SAMPLES, "val": 16}, row_group_size=ROW_GROUP_SIZE, samples_per_shard=32
    )
    return folder


@functools.cache
def model(root: Path) -> Path:
    """The model folder that training begins with."""
    return write_model(root / "pretraining" / "model", model_cfg=MODEL_CFG)


def configured(root: Path, output: Path, *overrides: str) -> PretrainConfig:
    """The shared configuration with its own output; tracking is off unless an override says otherwise."""
    return parse(
        PretrainConfig,
        [
            f"corpus={corpus(root)}",
            f"output={output}",
            f"model={model(root)}",
            "tracking.enabled=false",
            *OVERRIDES,
            *overrides,
        ],
    )


def run(
    config: PretrainConfig, on_record: Callable[[StepRecord], None] = lambda _: None
) -> tuple[PretrainResult, list[StepRecord]]:
    """Pretrain on the connected cluster and keep the records."""
    records: list[StepRecord] = []

    def keep(record: StepRecord) -> None:
        records.append(record)
        on_record(record)

    return pretrain(config, on_record=keep), records


@functools.cache
def undisturbed(root: Path, num_workers: int) -> tuple[Path, PretrainResult, list[StepRecord]]:
    """Output, result and records of a run that nothing happened to; made once a session."""
    output = root / "pretraining" / f"undisturbed-{num_workers}"
    result, records = run(configured(root, output, f"num_workers={num_workers}"))
    return output, result, records


def free_places() -> None:
    """Give back what a controller had reserved that was ended while it started workers: Ray would at the job's end."""
    for name, group in ray.util.placement_group_table().items():
        if group["state"] != "REMOVED":
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))
