"""Evaluation against the published way, and retrieval at size: `python benchmarks/evaluate.py [suite|retrieval] [N]`.

`suite`: zero-shot, concepts, retrieval and linear probe together on N (5,000) images of 256 pixels, 3/5 scored and 2/5
to learn from, with one small ViT. The published way is one process: a script a task, each with a torch DataLoader,
Pillow and open_clip's transform over the images that it needs, and its own texts. Ours is `dermray.evaluate.suite` as
the job runs it: the start of Ray, actors, files of vectors and the HTML report are in its time. Two more figures tell
what comes from where: the published way if it shared its vectors (one DataLoader pass), and ours once more with the
vectors that it kept. Neither side computes intervals. Scores of both sides must agree.

`retrieval`: all ranks of N x N (100,000) pairs of 512 dimensions, both directions: seconds and peak memory.
"""

from __future__ import annotations

import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dermray import cluster, entry, images, models, storage
from dermray.config import ClusterConfig
from dermray.corpus.manifest import Manifest, Shard
from dermray.corpus.schema import SAMPLE
from dermray.evaluate import suite
from dermray.evaluate.concepts import TEMPERATURE, Prompts
from dermray.evaluate.report import Report
from dermray.evaluate.settings import EvaluateConfig
from dermray.predict.zero_shot import TEMPLATES

ROUNDS = 1
BATCH_SIZE = 64
ROWS_PER_GROUP = 50
CLASSES = ("melanoma", "nevus", "basal cell carcinoma", "psoriasis", "eczema", "acne", "vitiligo")
CONCEPTS = ("papule", "plaque", "scale", "erythema", "ulcer")
MODEL_CFG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 112, "layers": 4, "width": 128, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
DIM = 512


def main() -> int:
    part = sys.argv[1] if len(sys.argv) > 1 else "all"
    if part == "--retrieval":
        return measure_retrieval(int(sys.argv[2]))
    number = int(sys.argv[2]) if len(sys.argv) > 2 else None
    if part in ("all", "suite"):
        compare(number or 5000)
    if part in ("all", "retrieval"):
        # A process of its own: its peak is that of retrieval alone.
        subprocess.run([sys.executable, __file__, "--retrieval", str(number or 100_000)], check=True)
    return 0


def compare(number: int) -> None:
    with tempfile.TemporaryDirectory(prefix="dermray-bench-") as name:
        folder = Path(name)
        data = write(folder, number)
        seconds: dict[str, list[float]] = {}
        for turn in range(ROUNDS):
            ways: dict[str, Callable[[], dict[str, float]]] = {
                "published": lambda: published(folder, data, shared=False),
                "published, vectors shared": lambda: published(folder, data, shared=True),
                "ours": lambda turn=turn: ours(folder, f"cache-{turn}"),  # type: ignore[misc]
                "ours, vectors kept": lambda turn=turn: ours(folder, f"cache-{turn}"),  # type: ignore[misc]
            }
            scores = {}
            for way, run in ways.items():
                began = time.perf_counter()
                scores[way] = run()
                seconds.setdefault(way, []).append(time.perf_counter() - began)
                print(f"{way:<26} {seconds[way][-1]:7.1f} s  {show(scores[way])}", flush=True)
            agree(scores)
        base = statistics.median(seconds["published"])
        for way, times in seconds.items():
            median = statistics.median(times)
            print(f"{way}: {median:.1f} s, the published way takes {base / median:.2f} times as long")


def show(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def agree(scores: dict[str, dict[str, float]]) -> None:
    for name, value in scores["published"].items():
        for way, other in scores.items():
            # A linear probe that stops early is not exactly at its optimum; one image in a hundred may fall otherwise.
            assert abs(other[name] - value) < (0.02 if name == "linear_probe" else 2e-3), (
                way,
                name,
                value,
                other[name],
            )


@dataclass(frozen=True)
class Data:
    """Rows in the order of the splits: encoded image, class, marks of the concepts, caption."""

    encoded: list[bytes]
    labels: np.ndarray
    marks: np.ndarray
    captions: list[str]
    num_scored: int


def write(folder: Path, number: int) -> Data:
    """A model, and pictures whose colours go with their class, as files and as a prepared corpus."""
    rng = np.random.default_rng(0)
    labels, marks = rng.integers(0, len(CLASSES), number), rng.integers(0, 2, (number, len(CONCEPTS)))
    encoded = [images.encode_jpeg(photograph(rng, int(label)), 90) for label in labels]
    captions = [f"a patch of {CLASSES[label]} on the forearm, case {row}" for row, label in enumerate(labels)]
    num_scored = number * 3 // 5
    write_model(folder / "model")
    write_corpus(folder / "corpus", Data(encoded, labels, marks, captions, num_scored))
    return Data(encoded, labels, marks, captions, num_scored)


def photograph(rng: np.random.Generator, label: int) -> np.ndarray:
    """A smooth picture with some grain, uint8 `[256, 340, 3]`."""
    coarse = np.clip(rng.normal(60 + 22 * label, 40, (8, 10, 3)), 0, 255).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((340, 256), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def write_model(folder: Path) -> None:
    import open_clip
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL_CFG)
    set_model_preprocess_cfg(model, vars(PreprocessCfg(size=MODEL_CFG["vision_cfg"]["image_size"])))  # type: ignore[index]
    models.save(model, str(folder), model_cfg=MODEL_CFG, provenance={})


def write_corpus(folder: Path, data: Data) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    shards = []
    for split, rows in (("test", range(data.num_scored)), ("train", range(data.num_scored, len(data.encoded)))):
        table = [
            {
                "sample_id": f"{row:032x}", "image": data.encoded[row], "width": 340, "height": 256,
                "captions": [{"aspect": "raw", "text": data.captions[row]}], "labels": [CLASSES[data.labels[row]]],
                "concepts": [name for name, mark in zip(CONCEPTS, data.marks[row], strict=True) if mark],
                "skin_type": None, "source": "bench", "source_id": str(row), "meta": None, "split": split,
            }
            for row in rows
        ]  # fmt: skip
        path = folder / "data" / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(table, schema=SAMPLE), path, row_group_size=ROWS_PER_GROUP)
        groups = [
            pq.ParquetFile(path).metadata.row_group(one).num_rows for one in range(-(-len(rows) // ROWS_PER_GROUP))
        ]
        shards.append(
            Shard(
                path=f"data/{split}.parquet", split=split, num_samples=len(rows), num_bytes=path.stat().st_size,
                sha256=storage.sha256(path), row_groups=tuple(groups),
            )
        )  # fmt: skip
    Manifest(shards=tuple(shards)).save(str(folder))


def ours(folder: Path, cache: str) -> dict[str, float]:
    """The suite, with the start and the end of Ray."""
    import ray

    cluster.connect(ClusterConfig())
    config = EvaluateConfig(
        model=str(folder / "model"),
        corpus=str(folder / "corpus"),
        output=str(folder / "out"),
        split="test",
        tasks=("zero_shot", "concepts", "retrieval", "linear_probe"),
        classes=CLASSES,
        label_fractions=(1.0,),
        bootstrap=0,
        cache=str(folder / cache),
    )
    report = suite.evaluate(config)
    assert isinstance(report, Report)
    report.save(config.output)
    ray.shutdown()
    found = report.metrics()
    names = (
        "zero_shot/accuracy",
        "concepts/mean_auroc",
        "retrieval/image_to_text_R_at_10",
        "linear_probe/100pct_accuracy",
    )
    return {name.partition("/")[0]: found[name] for name in names}


class Pictures(Dataset):
    """Pillow and open_clip's transform, as the published scripts read images."""

    def __init__(self, encoded: list[bytes], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self._encoded, self._transform = encoded, transform

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._transform(Image.open(io.BytesIO(self._encoded[index])).convert("RGB"))


def published(folder: Path, data: Data, *, shared: bool) -> dict[str, float]:
    """Four scripts in turn, each of which loads the model and encodes what it needs; `shared`: images once for all."""
    scored, labels = data.encoded[: data.num_scored], data.labels[: data.num_scored]
    kept: dict[int, torch.Tensor] = {}

    def features(model: Any, transform: Any, encoded: list[bytes]) -> torch.Tensor:
        if shared and len(data.encoded) not in kept:
            kept[len(data.encoded)] = encode(model, transform, data.encoded)
        return kept[len(data.encoded)][: len(encoded)] if shared else encode(model, transform, encoded)

    model, transform, tokenizer = models.create(str(folder / "model"))
    image = F.normalize(features(model, transform, scored), dim=-1)
    prompts = [template.replace("{}", name) for name in CLASSES for template in TEMPLATES]
    weights = F.normalize(
        encode_texts(model, tokenizer, prompts).reshape(len(CLASSES), -1, image.shape[1]).mean(1), dim=-1
    )
    found = {"zero_shot": float(((image @ weights.T).argmax(dim=1).numpy() == labels).mean())}

    model, transform, tokenizer = models.create(str(folder / "model"))
    image = F.normalize(features(model, transform, scored), dim=-1)
    found["concepts"] = concept_auroc(
        image, data.marks[: data.num_scored], lambda texts: encode_texts(model, tokenizer, texts)
    )

    model, transform, tokenizer = models.create(str(folder / "model"))
    image = F.normalize(features(model, transform, scored), dim=-1)
    ranking = torch.argsort(image @ encode_texts(model, tokenizer, data.captions[: data.num_scored]).T, descending=True)
    ranks = (ranking == torch.arange(len(ranking))[:, None]).float().argmax(dim=1)
    found["retrieval"] = float((ranks < 10).float().mean())

    model, transform, _ = models.create(str(folder / "model"))
    image = features(model, transform, data.encoded)
    found["linear_probe"] = probe_accuracy(
        image[data.num_scored :], data.labels[data.num_scored :], image[: data.num_scored], labels
    )
    return found


@torch.inference_mode()
def encode(model: Any, transform: Any, encoded: list[bytes]) -> torch.Tensor:
    return torch.cat(
        [model.encode_image(batch) for batch in DataLoader(Pictures(encoded, transform), batch_size=BATCH_SIZE)]
    )


@torch.inference_mode()
def encode_texts(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    starts = range(0, len(texts), BATCH_SIZE)
    return torch.cat([F.normalize(model.encode_text(tokenizer(texts[s : s + BATCH_SIZE])), dim=-1) for s in starts])


def concept_auroc(image: torch.Tensor, marks: np.ndarray, of_texts: Callable[[list[str]], torch.Tensor]) -> float:
    from sklearn.metrics import roc_auc_score

    prompts = Prompts.load()
    areas = []
    for column, name in enumerate(CONCEPTS):
        target = of_texts(prompts.targets(name)).reshape(len(prompts.templates), -1, image.shape[1])
        reference = of_texts(list(prompts.references))
        cosines = torch.stack([torch.einsum("nd,tkd->ntk", image, target).mean(2), image @ reference.T])
        areas.append(
            roc_auc_score(marks[:, column], torch.softmax(cosines / TEMPERATURE, dim=0)[0].mean(dim=1).numpy())
        )
    return float(np.mean(areas))


def probe_accuracy(train: torch.Tensor, train_labels: np.ndarray, test: torch.Tensor, labels: np.ndarray) -> float:
    """One linear layer by torch's L-BFGS in float32, 1,000 iterations at most, as published."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(train.shape[1], len(CLASSES))
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=1000, line_search_fn="strong_wolfe")
    strength = 0.5 * 100 / (train.shape[1] * len(CLASSES))
    targets = torch.from_numpy(train_labels)
    train, test = train.clone(), test.clone()

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(layer(train), targets) + strength * layer.weight.norm()
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        return float((layer(test).argmax(dim=1).numpy() == labels).mean())


def measure_retrieval(number: int) -> int:
    from dermray.evaluate.retrieval import retrieval_metrics

    rng = np.random.default_rng(0)
    texts = rng.standard_normal((number, DIM), dtype=np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    pictures = rng.standard_normal((number, DIM), dtype=np.float32)
    # Partners with a cosine of 0.2: half the way between found at once and lost among the others.
    pictures = 0.2 * texts + np.sqrt(0.96) * pictures / np.linalg.norm(pictures, axis=1, keepdims=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    found = retrieval_metrics(pictures, texts)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"retrieval of {number:,} x {number:,} x {DIM}: {seconds:.1f} s with {torch.get_num_threads()} threads, peak "
          f"memory {peak / 2**20:.2f} GiB ({before / 2**20:.2f} before it began)")  # fmt: skip
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(entry.run_job(main))
