"""MAKE as an objective: texts of a sample, patches of a tower, a step by micro-batches, and what is refused."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from dermray import models
from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.errors import ConfigError, CorpusError, ModelError
from dermray.ingest.loader import Batch
from dermray.ingest.views import Item
from dermray.losses.make import objective
from dermray.train import pretrain
from dermray.train.objectives import contract
from dermray.train.objectives.contrastive.diagnoses import tree_of
from dermray.train.objectives.make import OBJECTIVE
from dermray.train.objectives.make.patches import give_patches, image_and_patches
from dermray.train.objectives.make.views import ImageAndTexts, chosen_texts
from dermray.train.settings import PretrainConfig
from tests.corpora import MODEL_CFG, sample, write_model, write_prepared_corpus, write_shard
from tests.golden.test_make_loss import load

CPU = torch.device("cpu")
KEYS = ("objective.kind=make", "train.global_batch_size=8", "objective.sub_captions=2", "tracking.enabled=false")


def captions(**of: list[str]) -> list[dict[str, str]]:
    return [{"aspect": aspect, "text": text} for aspect, texts in of.items() for text in texts]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ["", "", "", "", ""]),
        (
            {"concept": ["C."], "ontology": ["O."], "raw": ["A. B."], "sub": ["A.", "B."]},
            ["A. B.", "O.", "C.", "A.", "B."],
        ),
        ({"raw": ["A."], "sub": ["A.", "B.", "C."]}, ["A.", "", "", "A.", "B."]),
        ({"raw": ["  "], "ontology": ["O."]}, ["", "O.", "", "", ""]),
    ],
)
def test_texts_of_a_sample_in_order(given: dict[str, list[str]], wanted: list[str]) -> None:
    assert chosen_texts(captions(**given), 2, np.random.default_rng(0)) == wanted


def test_sub_captions_are_those_of_the_raw_caption_that_was_drawn() -> None:
    texts = ["sub: Said by a model.", "raw: One  red. Two.", "sub: One red.", "sub: Two.", "raw: Three.", "sub: Three."]
    given = [dict(zip(("aspect", "text"), each.split(": "), strict=True)) for each in texts]
    seen = {tuple(chosen_texts(given, 3, np.random.default_rng(seed))) for seed in range(20)}
    assert seen == {
        ("One  red. Two.", "", "", "Said by a model.", "One red.", "Two."),
        ("Three.", "", "", "Said by a model.", "Three.", ""),
    }


def made(*rows: dict[str, Any], **given: Any) -> dict[str, np.ndarray]:
    config = parse(PretrainConfig, ["corpus=c", "output=o"])
    tokenizer = open_clip.SimpleTokenizer(context_length=24)
    views = ImageAndTexts(config.data, 16, lambda texts: tokenizer(texts).numpy().astype(np.int32), **given)
    items = [Item([{"duplicate_group": None} | row], np.random.default_rng(0)) for row in rows]  # type: ignore[list-item]
    out = {name: spec.empty(len(rows)) for name, spec in views.specs(0).items()}
    views.make(items, out)
    return out


def test_views_say_what_a_sample_has() -> None:
    first, second = sample(0, "train"), sample(1, "train", labelled=False, raw=False)
    second["duplicate_group"] = first["sample_id"]
    out = made(first, second, sub_captions=1, diagnoses={"melanoma": 0, "eczema, dermatitis": 1})
    assert out["tokens"].shape == (2, 4, 24)
    assert out["valid"].tolist() == [[True, True, False, False], [False, True, False, False]]
    assert out["diagnosis"].tolist() == [1, -1]
    assert out["image_group"][0] == out["image_group"][1] >= 0
    assert np.array_equal(out["tokens"][0, 2], out["tokens"][1, 0]), "what is missing is the empty text"


def test_a_sample_without_any_text_is_named() -> None:
    row = sample(0, "train") | {"captions": captions(raw=[" "])}
    with pytest.raises(CorpusError, match=f"sample {row['sample_id']} has none of the texts"):
        made(row, sub_captions=1)


def test_patches_are_those_of_the_published_figures() -> None:
    arrays = load("make_forward_patch_weighting")
    model = open_clip.CLIP(
        16,
        {"image_size": 24, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2},
    ).eval()
    model.load_state_dict({name[6:]: value for name, value in arrays.items() if name.startswith("state.")})
    names = set(model.state_dict())
    give_patches(model, "golden")
    assert set(model.state_dict()) == names
    image, patches, text, scale = model(arrays["images"], arrays["tokens"][:, 0])
    close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    for got, name in ((image, "image_features"), (patches, "patch_embeddings"), (text, "text_features")):
        close(got, arrays[name])
    close(scale, arrays["logit_scale_exp"])
    # Evaluation and serving ask for images alone.
    close(model.encode_image(arrays["images"], normalize=True), arrays["image_features"])


def test_a_patch_of_panderm_is_what_the_tower_makes_of_it_alone() -> None:
    torch.manual_seed(0)
    model, _, _ = models.create("panderm_tiny_bert")
    visual = model.get_submodule("visual")
    pixels = torch.randn(2, 3, visual.image_size, visual.image_size)
    image, patches = image_and_patches(visual, pixels)
    torch.testing.assert_close(image, visual(pixels))
    tokens = visual.forward_tokens(pixels)
    torch.testing.assert_close(patches[:, 3], visual.head(visual.norm(tokens[:, 4])))


@pytest.mark.parametrize("vision_cfg", [{"layers": [1, 1, 1, 1], "width": 16}, {"attentional_pool": True}])
def test_a_tower_without_patches_is_named(vision_cfg: dict[str, Any]) -> None:
    config = MODEL_CFG | {"vision_cfg": MODEL_CFG["vision_cfg"] | vision_cfg}
    with pytest.raises(ModelError, match=r"'odd': its vision tower \((ModifiedResNet|VisionTransformer)\) gives no"):
        give_patches(open_clip.CLIP(**config), "odd")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("make")
    write_prepared_corpus(folder / "corpus", {"train": 16})
    return f"corpus={folder / 'corpus'}", f"model={write_model(folder / 'model')}"


def batch_of(views: ImageAndTexts, samples: np.ndarray | None = None) -> Batch:
    rows = [
        sample(index, "train", raw=index % 3 != 0, labelled=index != 5) | {"duplicate_group": None}
        for index in range(6)
    ]
    items = [Item([row], np.random.default_rng(index)) for index, row in enumerate(rows)]  # type: ignore[list-item]
    out = {name: spec.empty(len(rows)) for name, spec in views.specs(0).items()}
    views.make(items, out)
    arrays = {name: torch.from_numpy(value) for name, value in out.items()}
    return Batch(0, 0, np.arange(6), arrays, samples)


def step(
    places: tuple[str, str], *keys: str, samples: np.ndarray | None = None
) -> tuple[contract.Built, float, dict[str, Any]]:
    """What a step left: the objective, its loss, and the gradients."""
    config = parse(PretrainConfig, [*places, "output=o", *KEYS, *keys])
    built = contract.module_of("make").build(config, CPU)
    assert isinstance(built.views, ImageAndTexts)
    outcome = built.objective.backward(built.model, batch_of(built.views, samples), CPU, nullcontext)
    assert outcome.figures.keys() == {"text_tokens", "mkcl", "local"}
    return built, float(outcome.loss), {name: each.grad for name, each in built.model.named_parameters()}


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("objective.soft_targets=true", "objective.divergence=kl"),
        ("objective.mask_duplicates=[text, image, diagnosis]", "objective.negatives=valid"),
        ("objective.mode=released",),
    ],
)
def test_micro_batches_give_the_gradient_of_the_batch(places: tuple[str, str], keys: tuple[str, ...]) -> None:
    _, loss, whole = step(places, *keys)
    _, again, parts = step(places, *keys, "train.micro_batch_size=2")
    assert again == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        assert gradient is not None, f"{name} without a gradient would stop DistributedDataParallel"
        torch.testing.assert_close(parts[name], gradient, atol=2e-5, rtol=1e-3)


def test_every_key_changes_the_loss(places: tuple[str, str]) -> None:
    variants: list[tuple[str, ...]] = [
        (),
        ("objective.lambda_s=0",),
        ("objective.lambda_m=0",),
        ("objective.sigma=0.1",),
        ("objective.negatives=valid",),
        ("objective.mode=released",),
        *((f"objective.mask_duplicates=[{kind}]",) for kind in ("text", "diagnosis")),
        ("objective.soft_targets=true",),
        ("objective.soft_targets=true", "objective.beta=0.2"),
        ("objective.soft_targets=true", "objective.temperature=0.5"),
        ("objective.soft_targets=true", "objective.divergence=kl"),
    ]
    losses = [step(places, *keys)[1] for keys in variants]
    losses.append(step(places, samples=np.array([0, 0, 1, 2, 3, 4]))[1])
    assert len({round(loss, 6) for loss in losses}) == len(losses)


def test_a_step_is_the_loss_of_what_the_towers_give(places: tuple[str, str]) -> None:
    built, loss, _ = step(places, "objective.soft_targets=true")
    assert isinstance(built.views, ImageAndTexts)
    batch = batch_of(built.views)
    model = built.model
    pixels = batch["pixels"].permute(0, 3, 1, 2).float()
    levels = (pixels - built.objective._mean) / built.objective._std
    tokens = batch["tokens"].long()
    image, patches, text, scale = model(levels, tokens.flatten(0, 1))
    text = text.view(6, 5, -1)
    similar = torch.einsum("bpd,bd->bp", patches, text[:, 0]).clamp(min=0)
    local = torch.einsum("bp,bpd->bd", torch.nn.functional.normalize(similar, dim=1), patches)
    tree = tree_of(parse(PretrainConfig, [*places, "output=o", *KEYS]))
    similarity = torch.from_numpy(tree.similarity(list(tree)))
    terms = objective(image, local, text, batch["valid"], scale, labels=batch["diagnosis"], similarity=similarity)
    assert loss == pytest.approx(terms.total.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["loss.mask_duplicates=true"], "leave out loss.* and data.captions"),
        (["data.captions={ontology: 1}"], "leave out loss.* and data.captions"),
        (["objective.mode=released", "num_workers=2"], "objective.mode=released is for num_workers=1"),
        (["objective.soft_targets=true", "objective.mask_duplicates=[text]"], "leave mask_duplicates empty"),
    ],
)
def test_keys_that_do_not_fit_are_refused(places: tuple[str, str], keys: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain.check(parse(PretrainConfig, [*places, "output=o", *KEYS, *keys]))


def test_a_graded_key_without_soft_targets_is_refused() -> None:
    with pytest.raises(ConfigError, match="beta means something with soft_targets=true alone"):
        parse(PretrainConfig, ["corpus=c", "output=o", *KEYS, "objective.beta=0.3"])


@pytest.mark.parametrize(("sub_captions", "drawn"), [(2, [1, 1, 0]), (0, [1, 0, 0])])
def test_samples_without_a_text_that_is_read_are_not_drawn(sub_captions: int, drawn: list[int], tmp_path: Path) -> None:
    texts = [captions(raw=["A. B."], sub=["A."]), captions(sub=["A."]), []]
    rows = [sample(number, "train") | {"captions": each} for number, each in enumerate(texts)]
    (tmp_path / "data").mkdir()
    shard = write_shard(tmp_path, "data/train-00000.parquet", "train", rows, 2)
    split = Manifest(shards=(shard,), provenance={"untexted": {"train": 1}}).select("train")
    config = parse(PretrainConfig, [f"corpus={tmp_path}", "output=o", *KEYS, f"objective.sub_captions={sub_captions}"])
    assert OBJECTIVE.counts is not None
    counts = OBJECTIVE.counts(config, split)
    assert counts is not None
    assert counts(0).tolist() == drawn


def test_what_the_corpus_or_model_lacks_is_refused_before_workers_start(
    places: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.check(parse(PretrainConfig, [*places, "output=o", *KEYS]))
    assert "objective.sub_captions=2, and " in capsys.readouterr().out
    with pytest.raises(ModelError, match="'RN50': its vision tower gives no features of patches"):
        pretrain.check(parse(PretrainConfig, [places[0], "model=RN50", "output=o", *KEYS]))
    write_prepared_corpus(tmp_path / "corpus", {"train": 16})
    (tmp_path / "corpus" / "ontology.json").unlink()
    manifest = Manifest.load(str(tmp_path / "corpus")).model_copy(update={"ontology_sha256": None})
    manifest.save(str(tmp_path / "corpus"))
    run = [f"corpus={tmp_path / 'corpus'}", places[1], "output=o", *KEYS]
    with pytest.raises(CorpusError, match="the disease tree is expected there"):
        pretrain.check(parse(PretrainConfig, [*run, "objective.soft_targets=true"]))
    biased = write_model(tmp_path / "model", model_cfg=MODEL_CFG | {"init_logit_bias": -10.0})
    with pytest.raises(ModelError, match="has a logit bias"):
        pretrain.check(parse(PretrainConfig, [places[0], f"model={biased}", "output=o", *KEYS]))
