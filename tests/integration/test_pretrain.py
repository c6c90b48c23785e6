"""Pretraining on the session's Ray cluster with one and two workers: what it leaves, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import open_clip
import pytest
import torch

from dermray import models
from dermray.config import parse
from dermray.corpus.manifest import Manifest
from dermray.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    DermRayError,
    PlanError,
    SplitError,
    StoppedError,
)
from dermray.train import checkpoint
from dermray.train.objectives.contrastive.validation import Validator
from dermray.train.pretrain import check, pretrain
from dermray.train.progress import StepRecord
from dermray.train.settings import PretrainConfig
from tests import pretraining
from tests.conftest import ROOT
from tests.corpora import write_prepared_corpus

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def refuse_records(record: StepRecord) -> None:
    raise AssertionError(f"work was done: {record}")


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_leaves_checkpoints_a_model_folder_and_a_summary(root: Path, num_workers: int) -> None:
    output, result, records = pretraining.undisturbed(root, num_workers)
    assert [record.step for record in records] == list(range(1, pretraining.NUM_STEPS + 1))
    losses = [record.metrics["loss"] for record in records]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < sum(losses[:5]), "it learns"
    assert result.metrics == records[-1].metrics
    assert (result.num_steps, result.resumed_step) == (pretraining.NUM_STEPS, 0)

    committed = checkpoint.committed(str(output))
    assert [info.step for info in committed] == [pretraining.NUM_STEPS - pretraining.CHECKPOINT_EVERY, result.num_steps]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["weights_sha256"] == result.weights_sha256

    provenance = json.loads((output / "model" / models.DERMRAY_NAME).read_text())
    assert provenance["weights_sha256"] == result.weights_sha256
    assert provenance["corpus_digest"] == Manifest.load(str(pretraining.corpus(root))).digest
    assert provenance["recipe"]["optim"]["lr"] == 1e-3
    assert set(provenance["classes"]) == {"eczema, dermatitis", "psoriasis", "melanoma", "nevus"}
    trained, _, _ = open_clip.create_model_and_transforms(f"local-dir:{output / 'model'}")
    latest = checkpoint.load_latest(
        str(output), trajectory=committed[-1].trajectory, corpus_digest=provenance["corpus_digest"]
    )
    assert latest is not None
    assert trained.state_dict().keys() == latest[1]["model"].keys()
    for key, value in trained.state_dict().items():
        assert torch.equal(value, latest[1]["model"][key])


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["dermlip_panderm_pubmed256", "make_vit_b16"])
def test_the_toy_of_a_recipe_trains_end_to_end(root: Path, tmp_path: Path, recipe: str) -> None:
    """A PanDerm tower, a language model, blocks of both that are recomputed; and what whoever watches is told.

    And several texts of a sample, patches, a tower that is locked but for its projection, and a cooldown.
    """
    locked = ("train.lock=image", "train.lock_image_unlocked_groups=1", "optim.factors={image: 0.5}")
    cooled = ("optim.schedule=constant_cooldown", "optim.cooldown_epochs=1")
    config = parse(
        PretrainConfig,
        [
            "--config", str(ROOT / "jobs" / "configs" / f"{recipe}.yaml"),
            f"corpus={pretraining.corpus(root)}", f"output={tmp_path / 'out'}", "toy=true", "train.epochs=3",
            "train.grad_checkpointing=1", "train.grad_checkpointing_keeps=products", "tracking.enabled=false",
            *((*locked, *cooled) if recipe == "make_vit_b16" else ()),
        ],
    )  # fmt: skip
    notices: list[str] = []
    records: list[StepRecord] = []
    result = pretrain(config, on_record=records.append, on_notice=notices.append)
    assert result.num_steps == records[-1].step == 6
    assert records[-1].metrics["model_tflops_per_s"] > 0
    if recipe == "make_vit_b16":
        assert records[-1].metrics["lr"] == pytest.approx(config.optim.lr / 2), "the second step of two"
    # Others of the session may hold the cluster's CPUs for a while.
    told = [line for line in notices if not line.startswith("waiting for ")]
    assert told == ["starting the workers", "ready on CPU: training from step 1 of 6"]
    trained, _, tokenizer = models.create(result.model_uri)
    assert trained.encode_text(tokenizer(["psoriasis"])).isfinite().all()  # type: ignore[operator]


@pytest.mark.long
def test_the_toy_of_knowledge_teaches_the_toy_of_dermfm(root: Path, tmp_path: Path) -> None:
    """Texts alone, then images of several sizes; two workers, of which each sees the same sizes."""
    records: list[StepRecord] = []

    def run(recipe: str, *keys: str) -> str:
        config = parse(
            PretrainConfig,
            [
                "--config", str(ROOT / "jobs" / "configs" / f"{recipe}.yaml"), "tracking.enabled=false",
                f"corpus={pretraining.corpus(root)}", f"output={tmp_path / recipe}", "toy=true", "num_workers=2", *keys,
            ],
        )  # fmt: skip
        records.clear()
        return pretrain(config, on_record=records.append).model_uri

    encoder = run("knowledge_pubmed256", "train.epochs=6", "optim.lr=1e-3")
    losses = [record.metrics["loss"] for record in records]
    assert losses[-1] < losses[0]
    model = run("dermfm_open_panderm_l", "train.epochs=2", f"objective.knowledge={encoder}", "objective.scale_jitter=1")
    assert records[-1].metrics["knowledge"] > 0
    assert records[-1].metrics["image_area"] > 1
    trained, _, tokenizer = models.create(model)
    assert trained.encode_text(tokenizer(["psoriasis"])).isfinite().all()  # type: ignore[operator]
    assert not [name for name in trained.state_dict() if not name.startswith(("visual.", "text.", "logit_scale"))]


def test_the_world_size_changes_rounding_and_nothing_else(root: Path) -> None:
    """The same global batches, pixels and captions: losses agree to what the order of additions allows."""
    _, one, records_of_one = pretraining.undisturbed(root, 1)
    _, two, records_of_two = pretraining.undisturbed(root, 2)
    for left, right in zip(records_of_one, records_of_two, strict=True):
        assert left.metrics["loss"] == pytest.approx(right.metrics["loss"], rel=1e-3)
        assert left.metrics["lr"] == pytest.approx(right.metrics["lr"], rel=1e-6)
    assert records_of_one[0].metrics["loss"] == pytest.approx(records_of_two[0].metrics["loss"], rel=1e-5)
    left, _, _ = models.create(one.model_uri)
    right, _, _ = models.create(two.model_uri)
    start, _, _ = models.create(str(pretraining.model(root)))
    for key, value in left.state_dict().items():
        moved = (value - start.state_dict()[key]).abs().max()
        assert (value - right.state_dict()[key]).abs().max() <= 0.05 * moved + 1e-6, key


def test_the_same_call_again_has_nothing_to_do(root: Path) -> None:
    output, result, _ = pretraining.undisturbed(root, 2)
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    again = pretrain(pretraining.configured(root, output, "num_workers=2"), on_record=refuse_records)
    assert again.weights_sha256 == result.weights_sha256
    assert again.resumed_step == again.num_steps == pretraining.NUM_STEPS
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_with_the_same_output_are_refused_by_name(root: Path, tmp_path: Path, finished: bool) -> None:
    output = Path(shutil.copytree(pretraining.undisturbed(root, 1)[0], tmp_path / "copy"))
    if not finished:
        (output / "summary.json").unlink()
    config = pretraining.configured(root, output, "optim.lr=2e-3")
    with pytest.raises(CheckpointError, match=r"made with other settings: optim\.lr was 0\.001, now 0\.002\."):
        pretrain(config, on_record=refuse_records)


def test_a_lost_summary_is_written_again_without_a_step(root: Path, tmp_path: Path) -> None:
    """A kill between the last checkpoint and the summary; from another working directory, by relative names."""
    _, result, records = pretraining.undisturbed(root, 1)
    output = Path(shutil.copytree(pretraining.undisturbed(root, 1)[0], tmp_path / "copy"))
    (output / "summary.json").unlink()
    shutil.rmtree(output / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        model = pretraining.model(root)
        relative = "/".join([".."] * len(tmp_path.parts[1:])) + str(model)
        config = pretraining.configured(root, Path("copy"), f"model={relative}")
        again, repeated = pretraining.run(config)
    assert again.weights_sha256 == result.weights_sha256
    assert again.resumed_step == pretraining.NUM_STEPS
    assert again.metrics == records[-1].metrics
    assert repeated == []
    assert (output / "summary.json").exists()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["num_workers=3"], PlanError, "3 workers cannot share 10 streams evenly; .* admit 1, 2, 4, 8 workers"),
        (["train.global_batch_size=96"], PlanError, "80 samples, fewer than one global batch of 96"),
        (
            ["validation.every_steps=4", "train.keep_best=accuracy"],
            ConfigError,
            "train.keep_best=accuracy: no such score",
        ),
        (["data.split=nosuch"], SplitError, "no split 'nosuch'; it has: train"),
        (["validation.every_steps=4", "validation.split=nosuch"], SplitError, "no split 'nosuch'"),
        (["model=dermray_tyni"], DermRayError, "unknown model 'dermray_tyni'.*did you mean dermray_tiny"),
        (["corpus=/nosuch"], CorpusError, "/nosuch is not a prepared corpus"),
    ],
)
def test_what_cannot_work_is_refused_before_workers_start(
    root: Path, tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    config = pretraining.configured(root, tmp_path / "output", *overrides)
    for refuse in (check, lambda c: pretrain(c, on_record=refuse_records)):
        with pytest.raises(error, match=message) as refused:
            refuse(config)
    assert (refused.value.exit_code == 2) == (error in (ConfigError, PlanError, SplitError))
    assert not (tmp_path / "output").exists()


def test_too_many_cpus_are_refused_rather_than_waited_for(root: Path, tmp_path: Path) -> None:
    config = pretraining.configured(root, tmp_path / "output", "num_workers=2", "cpus_per_worker=2")
    with pytest.raises(ConfigError, match="2 workers of 2 CPUs leave no CPU of the cluster's 4 for decoding"):
        pretrain(config, on_record=refuse_records)


@pytest.mark.long
def test_an_error_of_a_worker_reaches_the_driver_as_it_is(root: Path, tmp_path: Path) -> None:
    """A damaged image, found by a decoding task of a worker on the way; met twice at one step, it ends the run."""
    corpus = tmp_path / "corpus"
    write_prepared_corpus(corpus, {"train": pretraining.NUM_SAMPLES}, broken=[7])
    config = pretraining.configured(root, tmp_path / "output", f"corpus={corpus}", "train.max_failures=9")
    with pytest.raises(DermRayError, match="the image of sample [0-9a-f]{32} is damaged") as caught:
        pretraining.run(config)
    assert "\n" not in str(caught.value)
    assert "twice at the same step" in str(caught.value)


@pytest.mark.long
def test_a_loss_that_is_no_number_to_the_end_ends_a_run_once_and_leaves_sound_weights(
    root: Path, tmp_path: Path
) -> None:
    """A rate that throws the weights where their products overflow: no later step has a gradient that is a number."""
    output, steps = tmp_path / "output", 4
    overrides = ("optim.lr=1e30", "optim.warmup_steps=0", "num_workers=2", "train.max_failures=9")
    config = pretraining.configured(root, output, *overrides, "train.checkpoint_every_steps=1")
    said = rf"steps \d to {steps + 1} had gradients that are not finite, more than train.max_skipped_steps=3 in a row"
    records: list[StepRecord] = []
    with pytest.raises(DermRayError, match=rf"{said}; .* is nan \(not finite on ranks \[0, 1\]\); lower optim.lr"):
        pretrain(config, on_record=records.append)
    assert [record.step for record in records] == list(range(1, steps + 1)), "no step is tried again"
    assert not (output / "model").exists()
    assert not (output / "summary.json").exists()
    latest = checkpoint.load_latest(
        str(output), trajectory=config.trajectory(), corpus_digest=Manifest.load(str(pretraining.corpus(root))).digest
    )
    assert latest is not None
    assert all(torch.isfinite(value).all() for value in latest[1]["model"].values())


def test_a_stop_ends_the_controller_where_no_worker_trains_yet(root: Path, tmp_path: Path) -> None:
    """Outside the main thread of a job nothing else would end it: a step would be taken first."""
    config = pretraining.configured(root, tmp_path / "out")
    with pytest.raises(StoppedError, match=r"^stopped before the workers trained; there is no checkpoint yet"):
        pretrain(config, on_record=refuse_records, stop_requested=lambda: True)
    pretraining.free_places()
    assert not checkpoint.committed(config.output)


@pytest.mark.long
def test_validation_scores_come_at_their_cadence(root: Path, tmp_path: Path) -> None:
    """Two workers share the scoring; the weights stay those of a run without validation."""
    config = pretraining.configured(
        root,
        tmp_path / "output",
        "num_workers=2",
        "validation.every_steps=8",
        "train.keep_best=validation_zero_shot_accuracy",
        "train.keep_checkpoints=1",
    )
    result, records = pretraining.run(config)
    scored = [record for record in records if "validation_zero_shot_accuracy" in record.metrics]
    assert [record.step for record in scored] == [8, 16]
    for record in scored:
        assert 0 <= record.metrics["validation_zero_shot_accuracy"] <= 1
        assert 0 <= record.metrics["validation_image_to_text_R_at_1"] <= 1
    assert result.metrics.keys() >= {"loss", "validation_zero_shot_accuracy"}
    model, transform, tokenizer = models.create(result.model_uri)
    alone = Validator(config.corpus, config.validation, transform, tokenizer)(model)
    assert scored[-1].metrics == pytest.approx(alone)
    assert result.weights_sha256 == pretraining.undisturbed(root, 2)[1].weights_sha256
    committed = checkpoint.committed(str(tmp_path / "output"))
    accuracies = {record.step: record.metrics["validation_zero_shot_accuracy"] for record in scored}
    best = max(accuracies, key=lambda step: (accuracies[step], step))
    assert {info.step for info in committed} == {best, pretraining.NUM_STEPS}
    assert all(info.scores["validation_zero_shot_accuracy"] == accuracies[info.step] for info in committed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.crop_scale=[0.9, 0.4]", "crop_scale: needs 0 < low <= high <= 1"),
        ("data.captions={}", "captions: needs at least one aspect"),
        ("data.captions={raw: -1}", "captions: needs at least one aspect"),
        ("data.captions={spoken: 1}", "spoken"),
    ],
)
def test_impossible_data_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PretrainConfig, ["corpus=c", "output=o", override])
