"""MAKE's whole training step against the plain one: `python benchmarks/make_step.py [--corpus URI] [--batch N]`.

Both train copies of one small ViT (ViT-S-32) on the same images and the same eleven texts of every sample in float32,
by the same loss. The plain step is what the formulas say: all texts, those that a sample lacks included, padded to the
whole context length and encoded. Ours is `Trainer.train_step` with the objective `make`: equal texts once, texts of
like length together, no needless padding. Without a corpus, texts have the lengths that Derm1M's have: a raw caption of
41 words on average, cut into sub-captions of some 14 words, an ontology and a concept caption; `--corpus` takes the
texts of a corpus prepared with `sub_captions=8` instead. The losses of both must agree. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from train_step import CPU, PLAIN, WORDS, build_plain_adamw, num_words

from dermray import entry, models
from dermray.config import validate
from dermray.corpus.captions import MAX_SUB_CAPTIONS
from dermray.corpus.manifest import Manifest
from dermray.corpus.shards import ShardIndex
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Batch
from dermray.losses import MakeLoss
from dermray.models.texts import accept_short
from dermray.train import loop
from dermray.train.objectives.make.module import Make
from dermray.train.objectives.make.patches import give_patches
from dermray.train.objectives.make.settings import MakeConfig
from dermray.train.objectives.make.views import chosen_texts
from dermray.train.optimiser import build_optimiser
from dermray.train.settings import PretrainConfig

MODEL, CONTEXT = "ViT-S-32", 77
ROUNDS, STEPS = 3, 2
WORDS_OF_SUB = 14
# Shares of samples of Derm1M that have an ontology and a concept caption.
WITH_ONTOLOGY, WITH_CONCEPTS = 0.8, 0.5
# float32 sums of different order, through a whole model.
CLOSE = 1e-3


def main() -> int:
    """Measure and print the ratio of each round and their median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="prepared with sub_captions=8")
    parser.add_argument("--batch", type=int, default=16)
    asked = parser.parse_args()
    random = np.random.default_rng(0)
    every = drawn(random, asked.batch * STEPS) if asked.corpus is None else read(asked.corpus, random)
    if len(every) < asked.batch * STEPS:
        raise SystemExit(f"{asked.corpus} has {len(every)} samples with texts, fewer than {asked.batch * STEPS}")
    tokenizer = models.tokenizer(MODEL)
    batches = [
        made(every[step * asked.batch : (step + 1) * asked.batch], tokenizer, step, random) for step in range(STEPS)
    ]
    told = np.concatenate([batch["valid"].numpy() for batch in batches])
    lengths = np.concatenate([(batch["tokens"] != 0).sum(dim=2).numpy() for batch in batches])
    num_texts, num_tokens = told.sum(axis=1).mean(), lengths[told].mean()
    print(f"texts a sample: {num_texts:.1f} of {told.shape[1]}, tokens of one: {num_tokens:.1f}")
    compare(batches, asked.batch)
    return 0


def compare(batches: list[Batch], batch_size: int) -> None:
    """Both sides in turn."""
    torch.manual_seed(0)
    model, _, _ = models.create(MODEL)
    give_patches(model, MODEL)
    plain, ours = plain_side(copy.deepcopy(model).train(), batches), our_side(model.train(), batches, batch_size)
    values = plain(), ours()
    assert abs(values[0] - values[1]) < CLOSE, f"the losses {values} are apart"
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for side in (plain, ours):
            began = time.perf_counter()
            side()
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
        rates = [batch_size * len(batches) / each for each in seconds]
        print(f"plain {rates[0]:.2f} samples/s, ours {rates[1]:.2f}, ratio {ratios[-1]:.2f}", flush=True)
    print(f"batch {batch_size}: median ratio {statistics.median(ratios):.2f}")


def plain_side(model: nn.Module, batches: list[Batch]) -> Callable[[], float]:
    """All texts at full length; the loss of the first batch is returned."""
    loss, optimiser = MakeLoss(), build_plain_adamw(model)

    def run() -> float:
        values = []
        for batch in batches:
            tokens = batch["tokens"].long()
            pixels = (batch["pixels"].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
            image, patches, text, scale = model(pixels, tokens.flatten(0, 1))
            value = loss(image, patches, text.view(*tokens.shape[:2], -1), batch["valid"], scale)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            values.append(value.item())
        return values[0]

    return run


def our_side(model: nn.Module, batches: list[Batch], batch_size: int) -> Callable[[], float]:
    """The step of training; the loss of the first batch is returned."""
    accept_short(model)
    settings = {"train": {"global_batch_size": batch_size}, "objective": {"kind": "make"}}
    config = validate(PretrainConfig, {"corpus": "c", "output": "o", **settings})
    trainer = loop.Trainer(
        config=config,
        objective=Make(PLAIN.mean, PLAIN.std, CPU, ColorAugmentation(config.data, 0), MakeConfig(kind="make")),
        model=model,
        wrapped=model,
        optimiser=build_optimiser(model, config.optim),
        device=CPU,
        num_steps=100_000,
    )

    def run() -> float:
        values = [trainer.train_step(batch)["loss"].value for batch in batches]
        return float(values[0])

    return run


def drawn(random: np.random.Generator, number: int) -> list[list[str]]:
    """Texts of so many samples, N each, the empty one for what a sample lacks."""
    every = []
    for length in num_words(random, number):
        raw = [str(word) for word in random.choice(WORDS, length)]
        subs = [" ".join(raw[at : at + WORDS_OF_SUB]) for at in range(0, length, WORDS_OF_SUB)][:MAX_SUB_CAPTIONS]
        ontology = f"this is a photo of {' '.join(random.choice(WORDS, 8))}" if random.random() < WITH_ONTOLOGY else ""
        concepts = f"showing {' '.join(random.choice(WORDS, 4))}" if random.random() < WITH_CONCEPTS else ""
        every.append([" ".join(raw), ontology, concepts, *subs, *[""] * (MAX_SUB_CAPTIONS - len(subs))])
    return every


def read(corpus: str, random: np.random.Generator) -> list[list[str]]:
    """Texts of the samples of a prepared corpus that have some."""
    found = []
    for table in ShardIndex.of(corpus, Manifest.load(corpus), "pages").row_groups(["captions"]):
        texts = [chosen_texts(captions, MAX_SUB_CAPTIONS, random) for captions in table["captions"].to_pylist()]
        found += [each for each in texts if any(each)]
    return found


def made(texts: list[list[str]], tokenizer: Callable, step: int, random: np.random.Generator) -> Batch:
    """A batch with noise for images."""
    num = len(texts)
    tokens = tokenizer([text for each in texts for text in each]).view(num, -1, CONTEXT)
    arrays = {
        "pixels": torch.from_numpy(random.integers(0, 256, (num, 224, 224, 3), dtype=np.uint8)),
        "tokens": tokens,
        "valid": torch.tensor([[bool(text) for text in each] for each in texts]),
        "diagnosis": torch.full((num,), -1),
        "image_group": torch.arange(num),
    }
    return Batch(step=step, epoch=0, draws=np.arange(num), arrays=arrays)


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
