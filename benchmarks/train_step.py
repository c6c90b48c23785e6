"""Our training step against open_clip's trainer: `python benchmarks/train_step.py [case …]`.

Cases: `clip` and `long_texts`, data excluded: both sides get the same tensors in memory, and `with_data`: their CSV
dataset on original JPEGs against our loader on the corpus prepared from them. Theirs is `train_one_epoch` of
`open_clip_train` (the code of `python -m open_clip_train.main`) with the loss, optimiser and groups that its `main`
makes; ours is `Trainer.train_step`. Both sides train copies of one model in one process, in float32, with the same
batch, in interleaved rounds. On a CPU the models are smaller than the published ones, of the same kind.
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import open_clip
import pandas as pd
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from open_clip_train.data import get_csv_dataset
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch import nn

from dermray import cluster, entry, images, models
from dermray.config import ClusterConfig, parse, validate
from dermray.corpus.manifest import Manifest
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.corpora import Corpora
from dermray.ingest.loader import Batch, Loader
from dermray.ingest.tokens import portable
from dermray.models import towers
from dermray.models.texts import accept_short
from dermray.prepare.pipeline import prepare
from dermray.prepare.settings import PrepareConfig
from dermray.train import loop
from dermray.train.objectives.contrastive.module import Contrastive
from dermray.train.objectives.contrastive.views import ImageAndCaption
from dermray.train.optimiser import build_optimiser
from dermray.train.settings import PretrainConfig

CPU = torch.device("cpu")
ROUNDS = 3
# Of the published captions: mean of words, and a spread that a log-normal law gives them.
MEAN_WORDS, WORDS_SIGMA = 41, 0.6
WORD_PIECES_PER_WORD = 1.35
PLAIN = models.Preprocessing(224, (0.5,) * 3, (0.25,) * 3)
NUM_IMAGES = 1536
WITH_DATA_BATCH = 32
WORDS = (
    "a",
    "the",
    "red",
    "scaly",
    "plaque",
    "papule",
    "nodule",
    "forearm",
    "with",
    "irregular",
    "border",
    "and",
    "on",
)
JITTER: dict[str, Any] = {"color_jitter": (0.32, 0.32, 0.32, 0.08), "color_jitter_prob": 0.8, "grayscale_prob": 0.2}
# PanDerm-B with PubMedBERT, at half the width and half the depth.
LONG_TEXTS_CFG: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {
        "tower": "panderm", "image_size": 224, "layers": 6, "width": 384, "head_width": 64, "patch_size": 16,
    },
    "text_cfg": {
        "context_length": 256, "vocab_size": 30522, "hf_model_name": "dermray:wordpiece_tiny",
        "hf_tokenizer_name": "dermray:wordpiece_tiny", "hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp",
        "hf_config": {
            "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6,
            "num_attention_heads": 6, "intermediate_size": 1536, "max_position_embeddings": 512, "pad_token_id": 0,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What both sides train.

    Attributes:
        name: on the command line; in `train_step_gpu.py` that of the architecture.
        batch_size: samples of a step.
        num_steps: measured steps of a round.
        vocabulary: token ids run from 1 to it; the last one ends a text.
        context_length: to which texts are padded.
        pieces_per_word: tokens for a word of a caption.
    """

    name: str
    batch_size: int
    num_steps: int
    vocabulary: int
    context_length: int
    pieces_per_word: float

    def model(self) -> nn.Module:
        """With random weights, in training mode."""
        torch.manual_seed(0)
        made = towers.build(LONG_TEXTS_CFG) if self.name == "long_texts" else models.create("ViT-S-32")[0]
        accept_short(made)
        return made.train()


CASES = {
    "clip": Case("clip", 32, 3, 49407, 77, 1.3),
    "long_texts": Case("long_texts", 16, 2, 30521, 256, WORD_PIECES_PER_WORD),
}


Sides = tuple[Callable[[], float], Callable[[], float]]


def main() -> int:
    """Measure the cases named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=[*CASES, "with_data"], help="clip, long_texts, with_data")
    logging.disable(logging.INFO)
    for name in parser.parse_args().cases:
        if name == "with_data":
            with tempfile.TemporaryDirectory(prefix="dermray-bench-") as folder:
                compare(f"with_data: dermray_tiny, batch {WITH_DATA_BATCH}", *with_data(Path(folder)))
        else:
            case = CASES[name]
            compare(f"{name}: batch {case.batch_size}, {case.context_length} tokens", *without_data(case))
    return 0


def compare(title: str, theirs: Callable[[], float], ours: Callable[[], float]) -> None:
    """Run both sides in turn; each returns samples a second."""
    theirs(), ours()
    ratios = []
    for _ in range(ROUNDS):
        published, own = theirs(), ours()
        ratios.append(own / published)
        print(
            f"{title}: open_clip_train {published:.2f} samples/s, ours {own:.2f}, ratio {own / published:.2f}",
            flush=True,
        )
    print(f"{title}: median ratio {statistics.median(ratios):.2f}", flush=True)


def without_data(case: Case) -> Sides:
    """Both sides on the same tensors; the pixels come normalised to theirs and as bytes to ours, which jitters none."""
    batches = [synthetic_batch(case, step) for step in range(case.num_steps)]
    model = case.model()
    published = OpenClip(copy.deepcopy(model), case.batch_size)
    trainer = our_trainer(model, configured(case.batch_size))

    def theirs() -> float:
        ready = [
            ((batch["pixels"].permute(0, 3, 1, 2).contiguous().float() / 255 - 0.5) / 0.25, batch["tokens"].long())
            for batch in batches
        ]
        return published.train(ready, case.num_steps)

    def ours() -> float:
        return train_ours(trainer, batches, case.num_steps)

    return theirs, ours


def synthetic_batch(case: Case, step: int) -> Batch:
    """Noise, and captions of the published length, no two alike."""
    random = np.random.default_rng(step)
    lengths = np.clip(num_words(random, case.batch_size) * case.pieces_per_word + 2, 4, case.context_length).astype(int)
    tokens = np.zeros((case.batch_size, case.context_length), dtype=np.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = random.integers(1, case.vocabulary - 1, length - 1)
        row[length - 1] = case.vocabulary
    return Batch(
        step=step,
        epoch=0,
        draws=np.arange(case.batch_size),
        arrays={
            "pixels": torch.from_numpy(random.integers(0, 256, (case.batch_size, 224, 224, 3), dtype=np.uint8)),
            "tokens": torch.from_numpy(tokens),
        },
    )


def num_words(random: np.random.Generator, num_captions: int) -> np.ndarray:
    """Words of captions, int64 `[num_captions]`, at least 4."""
    words = random.lognormal(np.log(MEAN_WORDS) - WORDS_SIGMA**2 / 2, WORDS_SIGMA, num_captions)
    return np.maximum(words, 4).astype(np.int64)


class OpenClip:
    """Their trainer around a model: arguments, loss, optimiser and schedule as their `main` makes them."""

    def __init__(self, model: nn.Module, batch_size: int, device: torch.device = CPU, precision: str = "fp32") -> None:
        self.args = parse_args(["--model", "ViT-S-32", "--batch-size", str(batch_size), "--precision", precision])
        # What `main` finds out about devices and processes, and derives.
        found = {"device": str(device), "distributed": False, "rank": 0, "local_rank": 0, "world_size": 1}
        vars(self.args).update(found, distill=False, wandb=False)
        self.model = model
        self.model.output_dict = True  # type: ignore[assignment]
        self.loss = open_clip.create_loss(self.args)
        self.optimiser = build_plain_adamw(model)
        self.schedule = cosine_lr(self.optimiser, 1e-4, 10, 100_000)

    def train(self, batches: Iterable[Any], num_batches: int) -> float:
        """Samples a second from the first batch `(normalised pixels, tokens)` on."""
        timed = Timed(batches, num_batches, self.args.batch_size)
        data = {"train": SimpleNamespace(dataloader=timed, set_epoch=lambda _: None)}
        train_one_epoch(self.model, data, self.loss, 0, self.optimiser, None, self.schedule, None, self.args)
        return timed.samples_per_s()


class Timed:
    """Batches, as their trainer asks for them; the clock starts when the first one has come."""

    def __init__(self, batches: Iterable[Any], num_batches: int, batch_size: int) -> None:
        self.num_batches, self.num_samples = num_batches, num_batches * batch_size
        self._batches = batches
        self._begun = 0.0

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._batches):
            self._begun = self._begun if number else time.perf_counter()
            yield batch

    def samples_per_s(self) -> float:
        """From the first batch to now."""
        return self.num_samples / (time.perf_counter() - self._begun)


def build_plain_adamw(model: nn.Module) -> torch.optim.AdamW:
    """As their `main` does: the same groups as ours, and torch's default implementation."""
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in build_optimiser(model, configured(1).optim).param_groups
    ]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6)


def configured(batch_size: int, **data: Any) -> PretrainConfig:
    tree = {"corpus": "c", "output": "o", "train": {"global_batch_size": batch_size}, "data": data}
    return validate(PretrainConfig, tree)


def our_trainer(
    model: nn.Module, config: PretrainConfig, preprocess: models.Preprocessing = PLAIN, device: torch.device = CPU
) -> loop.Trainer:
    color = ColorAugmentation(config.data, 0)
    return loop.Trainer(
        config=config,
        objective=Contrastive(preprocess.mean, preprocess.std, device, color, config.loss),
        model=model,
        wrapped=model,
        optimiser=build_optimiser(model, config.optim),
        device=device,
        num_steps=100_000,
    )


def train_ours(trainer: loop.Trainer, batches: Iterable[Batch], num_batches: int) -> float:
    """Samples a second from the first batch on."""
    timed = Timed(batches, num_batches, trainer.config.train.global_batch_size)
    for batch in timed:
        logs = trainer.train_step(batch)
    assert logs["loss"].value.isfinite().item()
    return timed.samples_per_s()


def with_data(folder: Path) -> Sides:
    """Both sides read, decode, crop, jitter, tokenise and train: from their table and from our corpus of it."""
    name, batch_size = "dermray_tiny", WITH_DATA_BATCH
    table, corpus = write_corpora(folder)
    model, _, tokenizer = models.create(name)
    preprocess = models.preprocessing(model)
    published = OpenClip(copy.deepcopy(model).train(), batch_size)
    trainer = our_trainer(model.train(), configured(batch_size, **JITTER), preprocess)
    augmentation = AugmentationCfg(
        scale=(0.4, 1.0), color_jitter=JITTER["color_jitter"], color_jitter_prob=0.8, gray_scale_prob=0.2
    )
    transform = image_transform_v2(
        PreprocessCfg(size=preprocess.size, mean=preprocess.mean, std=preprocess.std),
        is_train=True,
        aug_cfg=augmentation,
    )
    vars(published.args).update(
        train_data=str(table), csv_separator=",", csv_img_key="image", csv_caption_key="caption", workers=os.cpu_count()
    )
    manifest = Manifest.load(str(corpus)).select("train")
    num_batches = NUM_IMAGES // batch_size

    def theirs() -> float:
        loader = get_csv_dataset(published.args, transform, is_train=True, tokenizer=tokenizer).dataloader
        return published.train(loader, num_batches)

    def ours() -> float:
        loader = Loader(
            corpora=Corpora.of(str(corpus), manifest),
            settings=trainer.config.data,
            views=ImageAndCaption(
                trainer.config.data, preprocess.size, portable(functools.partial(models.tokenizer, name))
            ),
            seed=0,
            global_batch_size=batch_size,
            rank=0,
            world_size=1,
            num_steps=num_batches,
        )
        return train_ours(trainer, loader.batches(), num_batches)

    return theirs, ours


def write_corpora(folder: Path) -> tuple[Path, Path]:
    """A table of photographs in the published size, and the corpus prepared from it."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(NUM_IMAGES):
        (folder / f"{number}.jpg").write_bytes(images.encode_jpeg(photograph(random), 90))
        words = random.choice(
            WORDS, max(4, int(random.lognormal(np.log(MEAN_WORDS) - WORDS_SIGMA**2 / 2, WORDS_SIGMA)))
        )
        rows.append({"image": f"{number}.jpg", "caption": " ".join(words)})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    table = folder / "open_clip.csv"
    pd.DataFrame([{**row, "image": str(folder / row["image"])} for row in rows]).to_csv(table, index=False)
    cluster.connect(ClusterConfig())
    prepare(
        parse(
            PrepareConfig,
            [
                "source=csv", f"input={folder}", f"output={folder / 'corpus'}", "split=train", "row_group_size=32",
                "near_duplicates=keep", "columns.image=image", "columns.caption=caption",
            ],
        )
    )  # fmt: skip
    return table, folder / "corpus"


def photograph(random: np.random.Generator) -> np.ndarray:
    """A smooth picture with some grain, uint8 `[450, 600, 3]`."""
    coarse = random.integers(60, 220, (8, 10, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (600, 450), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(smooth + random.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
