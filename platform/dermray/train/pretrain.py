"""Ray Train glue: a driver that launches workers and listens, and what each worker does.

The truth about progress is in the output: checkpoints with manifests. A restarted worker group, or the same job
started again, finds the latest one and goes on; nothing depends on Ray's own record of the run.
"""

from __future__ import annotations

import functools
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dermray import __version__, cluster, models, storage
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import ONTOLOGY_NAME
from dermray.corpus.shards import label_counts
from dermray.errors import CheckpointError, DermRayError
from dermray.ingest.color import ColorAugmentation
from dermray.ingest.loader import Loader
from dermray.ingest.plan import EpochPlan
from dermray.losses.gather import world
from dermray.train import checkpoint, loop, toy
from dermray.train.optimiser import build_optimiser
from dermray.train.progress import ProgressListener, StepRecord
from dermray.train.settings import PretrainConfig
from dermray.train.task import ContrastiveTask, fit_to_loss, trained_architecture
from dermray.train.validation import Validator

MODEL_FOLDER = "model"
SCRATCH_FOLDER = "ray-train"
SUMMARY_NAME = "summary.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run leaves.

    Attributes:
        model_uri: the model folder.
        weights_sha256: digest of its weights.
        metrics: of the last step.
        resumed_step: the step this call began at; `num_steps` when there was nothing left to do.
    """

    model_uri: str
    weights_sha256: str
    metrics: dict[str, float]
    num_steps: int
    resumed_step: int


def pretrain(
    config: PretrainConfig,
    *,
    on_record: Callable[[StepRecord], None],
    provenance: dict[str, Any] | None = None,
    extra_callbacks: list[Any] | None = None,
) -> PretrainResult:
    """Train to the end, resuming from the output's latest checkpoint; needs a connected Ray cluster.

    Args:
        on_record: called in the driver for every logged step.
        provenance: facts for the model folder's `dermray.json` (MLflow run id, code version).
        extra_callbacks: Ray Train callbacks, e.g. Tune's.

    Raises:
        DermRayError: bad corpus, model, plan or checkpoint, before workers start where possible; or the training
            failed more often than `train.max_failures`.
    """
    config = located(config)
    finished = check(config)
    if finished is not None:
        return finished
    latest = checkpoint.committed(config.output)
    # Ray Train asks for storage that every node sees, and takes up an earlier attempt where it finds its name again.
    scratch = storage.join(config.output, SCRATCH_FOLDER)
    filesystem, path = storage.filesystem(scratch)
    with ProgressListener(on_record) as listener:
        trainer = TorchTrainer(
            functools.partial(_train_worker, config, provenance or {}, listener.channel),
            scaling_config=_scaling(config),
            torch_config=TorchConfig(timeout_s=config.train.collective_timeout_s),
            run_config=RunConfig(
                name=f"attempt-{uuid.uuid4().hex[:8]}",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=config.train.max_failures),
                callbacks=extra_callbacks or [],
            ),
        )
        try:
            summary = trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            raise _as_own_error(error) from error
        finally:
            storage.remove(scratch)
    resumed_step = latest[-1].step if latest else 0
    return PretrainResult(**summary, resumed_step=resumed_step)


def check(config: PretrainConfig) -> PretrainResult | None:
    """Refuse what could only fail on every worker, before Ray or MLflow know of the run.

    Returns:
        The result, when the output holds a finished run of this very configuration.

    Raises:
        DermRayError: bad corpus, split, model, number of workers, or an output that belongs to another run.
    """
    config = located(config)
    manifest = Manifest.load(config.corpus)
    finished = _finished(config, manifest)
    if finished is None:
        _check_before_start(config, manifest)
    return finished


def located(config: PretrainConfig) -> PretrainConfig:
    """The toy of the configuration where it asks for one, with absolute URIs: workers run in folders of their own."""
    config = toy.shrunk(config)
    return config.model_copy(
        update={
            "output": storage.normalise(config.output),
            "corpus": storage.normalise(config.corpus),
            "model": models.located(config.model),
            **{key: models.located_weights(source) for key, source in _initial_weights(config).items()},
        }
    )


def _initial_weights(config: PretrainConfig) -> dict[str, str | None]:
    return {
        "pretrained": config.pretrained,
        "pretrained_image": config.pretrained_image,
        "pretrained_text": config.pretrained_text,
    }


def _check_before_start(config: PretrainConfig, manifest: Manifest) -> None:
    plan = EpochPlan(
        manifest.select(config.data.split),
        seed=config.seed,
        epoch=0,
        global_batch_size=config.train.global_batch_size,
    )
    plan.streams_of(0, config.num_workers)
    if config.validation.every_steps:
        manifest.select(config.validation.split)
    models.check(config.model, **_initial_weights(config))
    trained_architecture(models.architecture(config.model), config.loss)
    for info in checkpoint.committed(config.output)[-1:]:
        checkpoint.require_same_run(info, trajectory=config.trajectory(), corpus_digest=manifest.digest)


def _finished(config: PretrainConfig, manifest: Manifest) -> PretrainResult | None:
    try:
        summary = storage.read_json(storage.join(config.output, SUMMARY_NAME))
    except FileNotFoundError:
        return None
    info = checkpoint.CheckpointInfo(
        config.output, summary["num_steps"], "", summary.pop("trajectory"), summary.pop("corpus_digest")
    )
    checkpoint.require_same_run(info, trajectory=config.trajectory(), corpus_digest=manifest.digest)
    return PretrainResult(**summary, resumed_step=summary["num_steps"])


def _scaling(config: PretrainConfig) -> ScalingConfig:
    use_gpu = cluster.num_gpus() > 0 if config.use_gpu is None else config.use_gpu
    cpus = config.cpus_per_worker
    if cpus is None:
        # Workers and decoding tasks share the cores of a CPU cluster; a GPU worker needs one core to feed its card.
        cpus = 1.0 if use_gpu else round(cluster.num_cpus() / 2 / config.num_workers, 3)
    needed = cpus * config.num_workers
    if needed >= cluster.num_cpus():
        raise DermRayError(
            f"{config.num_workers} workers of {cpus:g} CPUs leave no CPU of the cluster's {cluster.num_cpus():g} for "
            "decoding; lower cpus_per_worker or num_workers"
        )
    resources = {"CPU": cpus, **({"GPU": 1.0} if use_gpu else {})}
    return ScalingConfig(num_workers=config.num_workers, use_gpu=use_gpu, resources_per_worker=resources)


def _as_own_error(error: ray.train.TrainingFailedError) -> DermRayError:
    """The first of our errors among the workers' failures, else the failure itself in one line."""
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, DermRayError):
                return cause
            cause = cause.__cause__ or getattr(cause, "cause", None)
    first = next(iter(failures.values()), error)
    return DermRayError(f"training failed: {' '.join(str(first).split())[-800:]}")


def _train_worker(config: PretrainConfig, provenance: dict[str, Any], channel: ActorHandle) -> dict[str, Any]:
    """One rank: build, restore, loop, save. Returns the summary."""
    rank, world_size = world()
    device = get_device()
    _settle_numerics(config, device)
    manifest = Manifest.load(config.corpus)
    model, image_transform, tokenizer = models.create(config.model, **_initial_weights(config))
    fit_to_loss(model, models.architecture(config.model), config.loss)
    model = model.to(device).train()
    preprocess = models.preprocessing(model)
    loader = Loader(
        corpus=config.corpus,
        manifest=manifest.select(config.data.split),
        settings=config.data,
        image_size=preprocess.size,
        tokenizer=functools.partial(models.tokenizer, config.model, config.pretrained_text),
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        rank=rank,
        world_size=world_size,
        num_steps=0,
    )
    loader.num_steps = config.num_steps(loader.steps_per_epoch)
    trainer = loop.Trainer(
        config=config,
        task=ContrastiveTask(
            preprocess.mean,
            preprocess.std,
            device,
            ColorAugmentation(config.data, config.seed),
            config.loss,
            config.train.micro_batch_size,
        ),
        model=model,
        wrapped=_wrap(model, device, world_size),
        optimiser=build_optimiser(model, config.optim, fused=True),
        device=device,
        num_steps=loader.num_steps,
    )
    validator = None
    if rank == 0 and config.validation.every_steps:
        validator = Validator(config.corpus, config.validation, image_transform, tokenizer)
    latest = checkpoint.load_latest(config.output, trajectory=config.trajectory(), corpus_digest=manifest.digest)
    if latest is not None:
        trainer.restore(latest[1])
        del latest
    _require_agreement(trainer.step, world_size)
    loop.run(
        trainer,
        loader.batches(trainer.step),
        on_record=functools.partial(_send, channel, rank),
        on_checkpoint=functools.partial(_save_checkpoint, config, manifest.digest, rank),
        on_validation=functools.partial(_validate, validator),
    )
    return _finish(config, manifest, trainer, provenance, rank)


def _settle_numerics(config: PretrainConfig, device: torch.device) -> None:
    """Equal seeds and, on CPU, a fixed number of threads: the order of additions must not depend on the machine."""
    torch.manual_seed(config.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.num_workers))


def _wrap(model: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    if world_size == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def _require_agreement(step: int, world_size: int) -> None:
    """Every rank must go on from the same checkpoint.

    Raises:
        CheckpointError: they found different ones.
    """
    if world_size == 1:
        return
    steps: list[int] = [0] * world_size
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the workers would go on from different steps, {steps}: output must be one place that every node sees"
        )


def _send(channel: ActorHandle, rank: int, record: StepRecord) -> None:
    if rank == 0:
        channel.push.remote(record)


def _save_checkpoint(config: PretrainConfig, corpus_digest: str, rank: int, trainer: loop.Trainer) -> None:
    if rank == 0:
        checkpoint.save(
            config.output,
            trainer.step,
            trainer.state(),
            trajectory=config.trajectory(),
            corpus_digest=corpus_digest,
            keep=config.train.keep_checkpoints,
        )


def _validate(validator: Validator | None, trainer: loop.Trainer) -> dict[str, float]:
    """Score on rank 0, and tell Ray Train, whose callbacks (Tune's) decide by these figures.

    Nothing else is reported to Ray Train: its controller takes one report a poll, so step metrics go another way.
    """
    scores = validator(trainer.model) if validator is not None else {}
    ray.train.report({"step": trainer.step, **scores})
    return scores


def _finish(
    config: PretrainConfig, manifest: Manifest, trainer: loop.Trainer, provenance: dict[str, Any], rank: int
) -> dict[str, Any]:
    """Rank 0 writes the model folder and then the summary, which marks the run as finished."""
    summary: dict[str, Any] = {
        "model_uri": storage.join(config.output, MODEL_FOLDER),
        "weights_sha256": "",
        "metrics": trainer.metrics,
        "num_steps": trainer.num_steps,
    }
    if rank == 0:
        ontology = storage.join(config.corpus, ONTOLOGY_NAME)
        if storage.exists(ontology):
            storage.write_bytes(storage.join(summary["model_uri"], ONTOLOGY_NAME), storage.read_bytes(ontology))
        summary["weights_sha256"] = models.save(
            trainer.model,
            summary["model_uri"],
            model_cfg=trained_architecture(models.architecture(config.model), config.loss),
            provenance={
                "code_version": __version__,
                "corpus_digest": manifest.digest,
                "corpus": config.corpus,
                "classes": list(label_counts(config.corpus, manifest.select(config.data.split))),
                "recipe": config.model_dump(mode="json", exclude={"tracking", "cluster"}),
                **provenance,
            },
        )
        storage.write_json(
            storage.join(config.output, SUMMARY_NAME),
            {**summary, "trajectory": config.trajectory(), "corpus_digest": manifest.digest},
        )
    return summary
