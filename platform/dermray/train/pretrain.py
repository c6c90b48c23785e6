"""The driver of a pretraining: it checks, launches workers with Ray Train, listens, and passes on an interruption.

The truth about progress is in the output: checkpoints with manifests. A restarted worker group, or the same job
started again, finds the latest one and goes on; nothing depends on Ray's own record of the run.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from dermray import cluster, interrupts, ledger, models, storage
from dermray.corpus import shares
from dermray.errors import ClaimError, ConfigError, DermRayError, StoppedError
from dermray.ingest.corpora import Corpora
from dermray.models import hub
from dermray.train import checkpoint, effects, elastic, epochs, stopping, toy, worker
from dermray.train.objectives import contract, kinds
from dermray.train.progress import ProgressListener, StepRecord
from dermray.train.settings import PretrainConfig


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
    stop_requested: Callable[[], bool] = lambda: False,
) -> PretrainResult:
    """Train to the end, resuming from the output's latest checkpoint; needs a connected Ray cluster.

    Args:
        on_record: called in the driver for every logged step.
        on_notice: called in the driver with a line when workers start, and each time they are ready.
        provenance: facts for the model folder's `dermray.json` (MLflow run id, code version).
        extra_callbacks: Ray Train callbacks, e.g. Tune's.
        until_step: pause there, with a validation and a checkpoint; another call goes on.
        stop_requested: asked now and then, from another thread, whether to stop as at a signal.

    Raises:
        ClaimError: another run writes into the output, or has taken it over.
        DermRayError: bad corpus, model, plan or checkpoint, or workers that never fit, before they start where
            possible; or the training failed more often than `train.max_failures`, or twice in the same way.
        StoppedError: `until_step` is reached, or a signal came; workers that trained have written a checkpoint.
    """
    config = located(config)
    with ledger.claim(config.output, wait_s=config.wait_for_output_s) as claim:
        return _pretrain(
            config,
            claim,
            on_record=on_record,
            on_notice=on_notice,
            provenance=provenance,
            extra_callbacks=extra_callbacks,
            until_step=until_step,
            stop_requested=stop_requested,
        )


def _pretrain(
    config: PretrainConfig,
    claim: ledger.Claim,
    *,
    on_record: Callable[[StepRecord], None],
    on_notice: Callable[[str], None],
    provenance: dict[str, Any] | None,
    extra_callbacks: list[Any] | None,
    until_step: int | None,
    stop_requested: Callable[[], bool],
) -> PretrainResult:
    """As `pretrain`, inside a claim of the output."""
    finished = check(config)
    if finished is not None:
        return finished
    latest = checkpoint.committed(config.output)
    # Ray Train asks for storage that every node sees, and takes up an earlier attempt where it finds its name again.
    scratch = storage.join(config.output, worker.SCRATCH_FOLDER)
    filesystem, path = storage.filesystem(scratch)
    workers = _workers(config)
    # Also notes of failures, which a killed driver may have left there.
    storage.remove(scratch)
    listening = ProgressListener(on_record, on_notice, workers=workers.in_words(), stop_requested=stop_requested)
    with (
        interrupts.telling(lambda: what_is_kept(config.output)),
        listening as listener,
        interrupts.stopping(listener.request_stop, grace_s=config.train.grace_s),
    ):
        on_notice("starting the workers")
        trainer = _trainer(
            config,
            workers,
            functools.partial(worker.train_worker, config, provenance or {}, claim, listener.channel, until_step),
            torch_config=TorchConfig(timeout_s=config.train.collective_timeout_s),
            run_config=RunConfig(
                # Ray's dashboard shows it.
                name=f"{re.sub(r'[^A-Za-z0-9._-]', '-', storage.name_of(config.output))}-{uuid.uuid4().hex[:8]}",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=config.train.max_failures),
                worker_runtime_env=_worker_environment(config),
                callbacks=[*stopping.callbacks(listener.channel), *(extra_callbacks or [])],
            ),
        )
        try:
            summary = _fit(trainer, listener, config)
        finally:
            with contextlib.suppress(ClaimError):
                # Else it is the scratch of the run that has taken the output over.
                claim.confirm()
                storage.remove(scratch)
    if worker.FAILED in summary:
        raise DermRayError(summary[worker.FAILED])
    if worker.STOPPED_STEP in summary:
        raise StoppedError(f"stopped at step {summary[worker.STOPPED_STEP]}; the same command again goes on from there")
    resumed_step = latest[-1].step if latest else 0
    return PretrainResult(**summary, resumed_step=resumed_step)


def _worker_environment(config: PretrainConfig) -> dict[str, Any]:
    """Workers take from this machine's cache what the driver has fetched; other machines have caches of their own."""
    if cluster.num_nodes() > 1 or not hub.concerns(config.model, *config.initial_weights().values()):
        return {}
    return {"env_vars": hub.environment()}


def _fit(trainer: TorchTrainer, listener: ProgressListener, config: PretrainConfig) -> dict[str, Any]:
    """What rank 0 returned.

    Raises:
        DermRayError: the training failed for good, or this machine's Ray node is lost.
        StoppedError: it was to stop, and did not come to a checkpoint.
    """
    try:
        return dict(trainer.fit().return_value)
    except ray.train.TrainingFailedError as error:
        raise _as_own_error(error) from error
    except (RayActorError, KeyboardInterrupt) as error:
        trained = listener.is_training
        listener.abort()
        by_hand = isinstance(error, KeyboardInterrupt) and not listener.stop_was_requested
        if interrupts.loss() is not None or by_hand:
            raise
        if not listener.stop_was_requested:
            raise DermRayError(
                f"the controller of the training was lost ({type(error).__name__}); {what_is_kept(config.output)}"
            ) from error
        when = f"aborted {config.train.grace_s:g} s after the signal (train.grace_s), before a checkpoint was written"
        raise StoppedError(
            f"{when if trained else 'stopped before the workers trained'}; {what_is_kept(config.output)}"
        ) from None


def what_is_kept(output: str) -> str:
    """What the same command will begin with."""
    steps = [info.step for info in checkpoint.committed(output)]
    if not steps:
        return "there is no checkpoint yet, so the same command again begins at step 1"
    return f"the checkpoint of step {steps[-1]} is kept, and the same command again goes on from it"


def check(config: PretrainConfig, *, fresh: bool = False) -> PretrainResult | None:
    """Refuse what could only fail on every worker, before Ray or MLflow know of the run.

    Args:
        fresh: leave out what the output may hold.

    Returns:
        The result, when the output holds a finished run of this very configuration.

    Raises:
        ConfigError: no score of the name in train.keep_best.
        PlanError: no number of workers that is asked for fits the corpus and the global batch.
        DermRayError: bad corpus, split, model, or an output that belongs to another run.
    """
    config = located(config)
    corpora = Corpora.load(config.corpus_uris)
    finished = None if fresh else _finished(config, corpora)
    if finished is None:
        _check_before_start(config, corpora, fresh)
    return finished


def located(config: PretrainConfig) -> PretrainConfig:
    """The toy of the configuration where it asks for one, with absolute URIs: workers run in folders of their own."""
    config = toy.shrunk(config)
    return config.model_copy(
        update={
            "output": storage.normalise(config.output),
            "corpus": shares.with_uris(config.corpus),
            "model": models.located(config.model),
            **{key: models.located_weights(source) for key, source in config.initial_weights().items()},
        }
    )


def _check_before_start(config: PretrainConfig, corpora: Corpora, fresh: bool) -> None:
    corpora.require_columns(kinds.columns_of(config))
    kinds.require_parts(config)
    _world_sizes(config, corpora)
    scores = kinds.find(config.objective.kind).scores
    if config.train.keep_best is not None and config.train.keep_best not in scores:
        told = ", ".join(scores) or "none, since the objective does not validate"
        raise ConfigError(f"train.keep_best={config.train.keep_best}: no such score; there are {told}")
    if config.validation.every_steps:
        corpora.select(config.validation.split)
    contract.module_of(config.objective.kind).check(config)
    for info in [] if fresh else checkpoint.committed(config.output)[-1:]:
        checkpoint.require_same_run(
            info,
            trajectory=epochs.trajectory(config, corpora),
            corpus_digest=corpora.digest,
            force=config.resume == "force",
        )


def _finished(config: PretrainConfig, corpora: Corpora) -> PretrainResult | None:
    try:
        summary = storage.read_json(storage.join(config.output, worker.SUMMARY_NAME))
    except FileNotFoundError:
        return None
    info = checkpoint.CheckpointInfo(
        config.output, summary["num_steps"], "", summary.pop("trajectory"), summary.pop("corpus_digest")
    )
    trajectory, digest = epochs.trajectory(config, corpora), corpora.digest
    if config.resume == "force" and checkpoint.differences(info, trajectory=trajectory, corpus_digest=digest):
        return None
    checkpoint.require_same_run(info, trajectory=trajectory, corpus_digest=digest)
    return PretrainResult(**summary, resumed_step=summary["num_steps"])


def _world_sizes(config: PretrainConfig, corpora: Corpora) -> tuple[int, ...]:
    """The numbers of workers that the run may have, ascending.

    Raises:
        PlanError: the plan admits none of them.
    """
    plan = epochs.first(config, corpora)
    if config.elastic:
        return elastic.admitted_sizes(plan.world_sizes, least=config.least_workers, most=config.most_workers)
    plan.streams_of(0, config.most_workers)
    return (config.most_workers,)


@dataclass(frozen=True)
class _Workers:
    """How many training workers there may be, ascending, and what each of them reserves."""

    sizes: tuple[int, ...]
    resources: dict[str, float]

    def in_words(self) -> str:
        """For messages: "2 training workers of 1 CPU and 1 GPU"."""
        return cluster.in_words("training worker", self.resources, count=self.sizes[0])


def without_effect(config: PretrainConfig) -> list[str]:
    """A line for each setting that cannot do what it says, for whoever starts the run.

    Raises:
        DermRayError: no corpus, or one that does not fill a global batch.
    """
    corpora = Corpora.load(config.corpus_uris)
    steps_per_epoch = len(epochs.first(config, corpora))
    told = effects.without_effect(config, config.num_steps(steps_per_epoch), steps_per_epoch)
    return told if corpora.one_tree else [*told, _of_trees(corpora)]


def _of_trees(corpora: Corpora) -> str:
    each = zip(corpora.uris, corpora.manifests, strict=True)
    first = next(uri for uri, manifest in each if manifest.ontology_sha256 is not None)
    return (
        f"the corpora have different disease trees: the model folder gets that of {first}, and validation tells "
        "classes apart by their names alone"
    )


def samples_of_an_epoch(config: PretrainConfig) -> str:
    """A line about what an epoch takes of the split's samples, for whoever starts the run.

    Raises:
        AssertionError: the plan has lost samples.
        DermRayError: as `without_effect`.
    """
    return epochs.account(config, Corpora.load(config.corpus_uris))


def require_room(config: PretrainConfig) -> None:
    """Refuse workers that can never start on the connected cluster, before a run is begun for them.

    Raises:
        ConfigError: there are too few CPUs or GPUs for the fewest workers, or no CPU would be left for decoding.
    """
    _workers(located(config))


def _workers(config: PretrainConfig) -> _Workers:
    sizes = _world_sizes(config, Corpora.load(config.corpus_uris))
    workers = _Workers(sizes, _resources_per_worker(config, sizes))
    instead = "set use_gpu=false" if "GPU" in workers.resources else "cpus_per_worker"
    cluster.require("training worker", workers.resources, count=sizes[0], advice=f"lower num_workers or {instead}")
    cluster.require("decoding task", {"CPU": config.data.cpus_per_task}, advice="lower data.cpus_per_task")
    return workers


def _trainer(
    config: PretrainConfig, workers: _Workers, train_worker: Callable[[], Any], **options: Any
) -> TorchTrainer:
    """Ray Train's trainer of as many workers as the configuration asks for."""
    sizes, resources = workers.sizes, workers.resources
    scaling = ScalingConfig(
        num_workers=(sizes[0], sizes[-1]) if config.elastic else sizes[-1],
        use_gpu="GPU" in resources,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=config.train.resize_every_s,
    )
    if not config.elastic:
        return elastic.QuietTorchTrainer(train_worker, scaling_config=scaling, **options)
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
        raise ConfigError(
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
