"""The driver of a pretraining: it checks, launches workers with Ray Train, listens, and passes on SIGTERM.

The truth about progress is in the output: checkpoints with manifests. A restarted worker group, or the same job
started again, finds the latest one and goes on; nothing depends on Ray's own record of the run.
"""

from __future__ import annotations

import functools
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from dermray import cluster, models, storage
from dermray.corpus.manifest import Manifest
from dermray.errors import DermRayError, StoppedError
from dermray.ingest.plan import EpochPlan
from dermray.train import checkpoint, elastic, toy, worker
from dermray.train.progress import ProgressListener, StepRecord
from dermray.train.settings import PretrainConfig
from dermray.train.stopping import on_sigterm
from dermray.train.task import trained_architecture


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
    on_notice: Callable[[str], None] = lambda _: None,
    provenance: dict[str, Any] | None = None,
    extra_callbacks: list[Any] | None = None,
    until_step: int | None = None,
) -> PretrainResult:
    """Train to the end, resuming from the output's latest checkpoint; needs a connected Ray cluster.

    Args:
        on_record: called in the driver for every logged step.
        on_notice: called in the driver with a line when workers start, and each time they are ready.
        provenance: facts for the model folder's `dermray.json` (MLflow run id, code version).
        extra_callbacks: Ray Train callbacks, e.g. Tune's.
        until_step: pause there, with a validation and a checkpoint; another call goes on.

    Raises:
        DermRayError: bad corpus, model, plan or checkpoint, before workers start where possible; or the training
            failed more often than `train.max_failures`, or twice in the same way.
        StoppedError: `until_step` is reached, or SIGTERM came; the workers have written a checkpoint.
    """
    config = located(config)
    finished = check(config)
    if finished is not None:
        return finished
    latest = checkpoint.committed(config.output)
    # Ray Train asks for storage that every node sees, and takes up an earlier attempt where it finds its name again.
    scratch = storage.join(config.output, worker.SCRATCH_FOLDER)
    filesystem, path = storage.filesystem(scratch)
    # Also notes of failures, which a killed driver may have left there.
    storage.remove(scratch)
    on_notice("starting the workers")
    listening = ProgressListener(on_record, on_notice)
    with listening as listener, on_sigterm(listener.request_stop, grace_s=config.train.grace_s):
        trainer = _trainer(
            config,
            functools.partial(worker.train_worker, config, provenance or {}, listener.channel, until_step),
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
        except SystemExit:
            # How Ray Train ends a process that was interrupted: as if all were well.
            if not listener.stop_was_requested:
                raise KeyboardInterrupt from None
            raise StoppedError(
                f"aborted {config.train.grace_s:g} s after SIGTERM (train.grace_s), before a checkpoint was written; "
                "the same command again goes on from the one before"
            ) from None
        finally:
            storage.remove(scratch)
    if worker.FAILED in summary:
        raise DermRayError(summary[worker.FAILED])
    if worker.STOPPED_STEP in summary:
        raise StoppedError(f"stopped at step {summary[worker.STOPPED_STEP]}; the same command again goes on from there")
    resumed_step = latest[-1].step if latest else 0
    return PretrainResult(**summary, resumed_step=resumed_step)


def check(config: PretrainConfig, *, fresh: bool = False) -> PretrainResult | None:
    """Refuse what could only fail on every worker, before Ray or MLflow know of the run.

    Args:
        fresh: leave out what the output may hold.

    Returns:
        The result, when the output holds a finished run of this very configuration.

    Raises:
        DermRayError: bad corpus, split, model, number of workers, or an output that belongs to another run.
    """
    config = located(config)
    manifest = Manifest.load(config.corpus)
    finished = None if fresh else _finished(config, manifest)
    if finished is None:
        _check_before_start(config, manifest, fresh)
    return finished


def located(config: PretrainConfig) -> PretrainConfig:
    """The toy of the configuration where it asks for one, with absolute URIs: workers run in folders of their own."""
    config = toy.shrunk(config)
    return config.model_copy(
        update={
            "output": storage.normalise(config.output),
            "corpus": storage.normalise(config.corpus),
            "model": models.located(config.model),
            **{key: models.located_weights(source) for key, source in config.initial_weights().items()},
        }
    )


def _check_before_start(config: PretrainConfig, manifest: Manifest, fresh: bool) -> None:
    _world_sizes(config, manifest)
    if config.validation.every_steps:
        manifest.select(config.validation.split)
    models.check(config.model, **config.initial_weights())
    trained_architecture(models.architecture(config.model), config.loss)
    for info in [] if fresh else checkpoint.committed(config.output)[-1:]:
        checkpoint.require_same_run(
            info,
            trajectory=config.trajectory(),
            corpus_digest=manifest.digest,
            force=config.resume == "force",
        )


def _finished(config: PretrainConfig, manifest: Manifest) -> PretrainResult | None:
    try:
        summary = storage.read_json(storage.join(config.output, worker.SUMMARY_NAME))
    except FileNotFoundError:
        return None
    info = checkpoint.CheckpointInfo(
        config.output, summary["num_steps"], "", summary.pop("trajectory"), summary.pop("corpus_digest")
    )
    trajectory, digest = config.trajectory(), manifest.digest
    if config.resume == "force" and checkpoint.differences(info, trajectory=trajectory, corpus_digest=digest):
        return None
    checkpoint.require_same_run(info, trajectory=trajectory, corpus_digest=digest)
    return PretrainResult(**summary, resumed_step=summary["num_steps"])


def _world_sizes(config: PretrainConfig, manifest: Manifest) -> tuple[int, ...]:
    """The numbers of workers that the run may have, ascending.

    Raises:
        PlanError: the plan admits none of them.
    """
    plan = EpochPlan(
        manifest.select(config.data.split),
        seed=config.seed,
        epoch=0,
        global_batch_size=config.train.global_batch_size,
    )
    if config.elastic:
        return elastic.admitted_sizes(plan.world_sizes, least=config.least_workers, most=config.most_workers)
    plan.streams_of(0, config.most_workers)
    return (config.most_workers,)


def _trainer(config: PretrainConfig, train_worker: Callable[[], Any], **options: Any) -> TorchTrainer:
    """Ray Train's trainer of as many workers as the configuration asks for.

    Raises:
        DermRayError: even the fewest workers would leave no CPU for decoding.
    """
    sizes = _world_sizes(config, Manifest.load(config.corpus))
    resources = _resources_per_worker(config, sizes)
    scaling = ScalingConfig(
        num_workers=(sizes[0], sizes[-1]) if config.elastic else sizes[-1],
        use_gpu="GPU" in resources,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=config.train.resize_every_s,
    )
    if not config.elastic:
        return TorchTrainer(train_worker, scaling_config=scaling, **options)
    return elastic.ElasticTorchTrainer(
        train_worker,
        scaling_config=scaling,
        admitted=sizes,
        decoding_cpus=config.data.cpus_per_task,
        **options,
    )


def _resources_per_worker(config: PretrainConfig, sizes: tuple[int, ...]) -> dict[str, float]:
    use_gpu = cluster.num_gpus() > 0 if config.use_gpu is None else config.use_gpu
    cpus = config.cpus_per_worker
    if cpus is None:
        # Workers and decoding tasks share the cores of a CPU cluster; a GPU worker needs one core to feed its card.
        cpus = 1.0 if use_gpu else math.floor(cluster.num_cpus() / 2 / sizes[-1] * 1000) / 1000
    if cpus * sizes[0] + config.data.cpus_per_task > cluster.num_cpus():
        raise DermRayError(
            f"{sizes[0]} workers of {cpus:g} CPUs leave no CPU of the cluster's {cluster.num_cpus():g} for "
            f"decoding, which takes {config.data.cpus_per_task:g} a task; lower cpus_per_worker, num_workers or "
            "data.cpus_per_task"
        )
    return {"CPU": cpus, **({"GPU": 1.0} if use_gpu else {})}


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
