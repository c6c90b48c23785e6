"""What each worker of a pretraining does: build, restore, loop, save. Needs Ray Train around it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import ray.train
import ray.util
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.train.torch import get_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dermray import __version__, redaction, storage
from dermray.corpus.ontology import ONTOLOGY_NAME
from dermray.corpus.shards import label_counts
from dermray.errors import CheckpointError, ClaimError, ConfigError, DermRayError, NonFiniteError
from dermray.ingest.corpora import Corpora
from dermray.ingest.loader import Loader
from dermray.ledger import Claim
from dermray.losses.gather import world
from dermray.train import checkpoint, epochs, failures, loop, numerics
from dermray.train.checkpoint_writer import CheckpointWriter
from dermray.train.objectives import contract as objectives
from dermray.train.objectives.contract import Scores
from dermray.train.optimiser import build_optimiser, scheduled
from dermray.train.progress import StepRecord, wait_until_heard
from dermray.train.settings import PretrainConfig
from dermray.train.stopping import StopPoll

MODEL_FOLDER = "model"
SCRATCH_FOLDER = "ray-train"
SUMMARY_NAME = "summary.json"
# Keys of what a rank returns instead of a summary.
FAILED = "failed"
STOPPED_STEP = "stopped_step"


def train_worker(
    config: PretrainConfig,
    provenance: dict[str, Any],
    claim: Claim,
    channel: ActorHandle,
    until_step: int | None = None,
) -> dict[str, Any]:
    """One rank, from its weights to the summary.

    Args:
        claim: the driver's, of the output.
        until_step: pause there.

    Returns:
        The summary; or, under the key `FAILED`, why another attempt would fail as this one did; or, under
        `STOPPED_STEP`, where the run was stopped.
    """
    redaction.install()
    rank, world_size = world()
    scratch = storage.join(config.output, SCRATCH_FOLDER)
    try:
        claim.confirm()
    except ClaimError as error:
        return {FAILED: str(error)}
    failed = failures.repeated(scratch)
    if failed is not None:
        return {FAILED: f"{failed} (twice at the same step, so there is no third attempt)"}
    trainer = None
    try:
        if rank == 0:
            channel.load.remote()
        device = get_device()
        numerics.settle(config, device)
        corpora = Corpora.load(config.corpus_uris)
        with failures.memory_explained(config.samples_at_once(world_size)):
            trainer, loader, built = _build(config, corpora, device)
            _restore(config, corpora, trainer)
            if rank == 0:
                channel.ready.remote(_ready(trainer))
            if _train(config, corpora, trainer, loader, built.validate, claim, channel, until_step):
                return {STOPPED_STEP: trainer.step}
            return _finish(config, corpora, trainer, built, provenance, claim, channel)
    except ClaimError:
        # The other ranks do not know yet; started again, all of them see it. The notes of failures are another run's.
        raise
    except NonFiniteError as error:
        # Every rank has met the same; an exception would only have Ray Train start them all again.
        return {FAILED: str(error)}
    except DermRayError as error:
        failures.record(scratch, rank, 0 if trainer is None else trainer.step, error)
        raise


def _train(
    config: PretrainConfig,
    corpora: Corpora,
    trainer: loop.Trainer,
    loader: Loader,
    validate: Callable[[nn.Module], Scores] | None,
    claim: Claim,
    channel: ActorHandle,
    until_step: int | None,
) -> bool:
    """Train to the end, or until the run is to stop: then the answer is true."""
    rank, _ = world()
    writer = CheckpointWriter(
        functools.partial(_save, config, epochs.trajectory(config, corpora), corpora.digest, claim)
    )
    stopped = loop.run(
        trainer,
        loader.batches(trainer.step),
        on_record=functools.partial(_send, channel, rank),
        on_checkpoint=functools.partial(_save_behind, writer, rank),
        on_validation=functools.partial(_validate, validate, config.train.keep_best),
        stop_requested=StopPoll(channel) if rank == 0 else lambda: False,
        until_step=until_step,
    )
    writer.wait()
    return stopped


def _build(
    config: PretrainConfig, corpora: Corpora, device: torch.device
) -> tuple[loop.Trainer, Loader, objectives.Built]:
    """Model, optimiser and loader of this rank, around what the objective brings."""
    rank, world_size = world()
    built = objectives.module_of(config.objective.kind).build(config, device)
    objectives.require_told(config, built.views)
    numerics.prepare(built.model, config.train)
    split = corpora.select(config.data.split)
    loader = Loader(
        corpora=split,
        settings=config.data,
        views=built.views,
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        rank=rank,
        world_size=world_size,
        num_steps=0,
        counts=epochs.counts(config, split),
        items=epochs.items(config, split),
    )
    loader.num_steps = config.num_steps(loader.steps_per_epoch)
    trainer = loop.Trainer(
        config=config,
        objective=built.objective,
        model=built.model,
        wrapped=_wrap(built.model, device, world_size, unused_parameters=built.unused_parameters),
        optimiser=build_optimiser(built.model, config.optim, built.groups),
        device=device,
        num_steps=loader.num_steps,
        num_hosts=_num_hosts(world_size),
        schedule=built.schedule or scheduled(config.optim, loader.steps_per_epoch),
    )
    return trainer, loader, built


def _num_hosts(world_size: int) -> int:
    """Machines that the ranks are on."""
    if world_size == 1:
        return 1
    names: list[str] = [""] * world_size
    dist.all_gather_object(names, ray.util.get_node_ip_address())
    return len(set(names))


def _restore(config: PretrainConfig, corpora: Corpora, trainer: loop.Trainer) -> None:
    """Go on from the latest checkpoint, if there is one."""
    latest = checkpoint.load_latest(
        config.output,
        trajectory=epochs.trajectory(config, corpora),
        corpus_digest=corpora.digest,
        force=config.resume == "force",
    )
    if latest is not None:
        trainer.restore(latest[1])
    _require_agreement(trainer.step, world()[1])


def _ready(trainer: loop.Trainer) -> str:
    device = trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    slow = "; the first steps compile and take a minute or more" if trainer.config.train.compile else ""
    return f"ready on {name}: training from step {trainer.step + 1} of {trainer.num_steps}{slow}"


def _wrap(model: nn.Module, device: torch.device, world_size: int, *, unused_parameters: bool) -> nn.Module:
    if world_size == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=device_ids, gradient_as_bucket_view=True, find_unused_parameters=unused_parameters
    )


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


def _save(
    config: PretrainConfig,
    trajectory: dict[str, Any],
    corpus_digest: str,
    claim: Claim,
    step: int,
    state: dict[str, Any],
    scores: Mapping[str, float],
) -> None:
    train = config.train
    claim.confirm()
    checkpoint.save(
        config.output,
        step,
        state,
        trajectory=trajectory,
        corpus_digest=corpus_digest,
        retention=checkpoint.Retention(train.keep_checkpoints, train.keep_best, config.best_mode),
        scores=scores,
        confirm=claim.confirm,
    )


def _save_behind(writer: CheckpointWriter, rank: int, trainer: loop.Trainer, scores: dict[str, float]) -> None:
    if rank == 0:
        writer.submit(trainer.step, trainer.state(), scores)


def _validate(validate: Callable[[nn.Module], Scores] | None, keep_best: str | None, trainer: loop.Trainer) -> Scores:
    """Score, and tell Ray Train, whose callbacks (Tune's) decide by these figures.

    Nothing else is reported to Ray Train: its controller takes one report a poll, so step metrics go another way.

    Raises:
        ConfigError: there is no score by which the best checkpoint shall be kept.
    """
    scores = validate(trainer.model) if validate is not None else {}
    if validate is not None and keep_best is not None and keep_best not in scores:
        raise ConfigError(f"train.keep_best={keep_best}: no such score; validation gives {', '.join(sorted(scores))}")
    ray.train.report({"step": trainer.step, **scores})
    return scores


def _finish(
    config: PretrainConfig,
    corpora: Corpora,
    trainer: loop.Trainer,
    built: objectives.Built,
    provenance: dict[str, Any],
    claim: Claim,
    channel: ActorHandle,
) -> dict[str, Any]:
    """Rank 0 writes the model folder and then the summary, which marks the run as finished."""
    summary: dict[str, Any] = {
        "model_uri": storage.join(config.output, MODEL_FOLDER),
        "weights_sha256": "",
        "metrics": trainer.metrics,
        "num_steps": trainer.num_steps,
    }
    if world()[0] == 0:
        claim.confirm()
        for ontology in _trees(corpora)[:1]:
            storage.write_bytes(storage.join(summary["model_uri"], ONTOLOGY_NAME), storage.read_bytes(ontology))
        with trainer.averaged():
            summary["weights_sha256"] = built.export(
                trainer.model,
                summary["model_uri"],
                {
                    "code_version": __version__,
                    "corpus_digest": corpora.digest,
                    "corpus": config.recorded(include={"corpus"})["corpus"],
                    "classes": _classes(corpora.select(config.data.split)),
                    "recipe": config.recorded(exclude={"tracking", "cluster"}),
                    **provenance,
                },
            )
        # A driver that is killed before it has logged the last figures would find a finished run, which sends none.
        wait_until_heard(channel)
        claim.confirm()
        storage.write_json(
            storage.join(config.output, SUMMARY_NAME),
            {**summary, "trajectory": epochs.trajectory(config, corpora), "corpus_digest": corpora.digest},
        )
    return summary


def _trees(corpora: Corpora) -> list[str]:
    """The files of the disease trees that the corpora have."""
    files = (storage.join(uri, ONTOLOGY_NAME) for uri in corpora.uris)
    return [file for file in files if storage.exists(file)]


def _classes(split: Corpora) -> list[str]:
    """The labels of all corpora, most frequent first, ties by name."""
    counts = Counter[str]()
    for uri, manifest in zip(split.uris, split.manifests, strict=True):
        counts.update(label_counts(uri, manifest))
    return sorted(counts, key=lambda label: (-counts[label], label))
