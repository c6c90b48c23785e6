"""Population-based training (Jaderberg et al., 2017): which trials go on from whose checkpoint, and with what.

    OUTPUT/population/generation-001.json    written before the first of its exploits is carried out

All trials train to the same validation and pause there. Then each of the worst goes on from the checkpoint of one of
the best, with perturbed settings. A decision depends on the seed, the generation and the scores, on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from dermray import documents, storage
from dermray.tuning import space as spaces
from dermray.tuning.plan import Trial
from dermray.tuning.records import Exploit
from dermray.tuning.settings import SweepConfig

FOLDER = "population"
_EXPLOITS = TypeAdapter(list[Exploit])


@dataclass(frozen=True)
class Member:
    """A trial that has come to the end of a generation.

    Attributes:
        score: the objective at its end; None if the trial failed.
        sha256: of its checkpoint's state; empty if the trial failed.
    """

    name: str
    params: dict[str, Any]
    score: float | None
    sha256: str = ""


def pauses(perturbation_interval: int, trial: Trial) -> list[int]:
    """Steps at which the generations of a population end, without the last, which ends with the training."""
    every_steps = trial.config.validation.every_steps
    assert every_steps is not None
    stride = every_steps * perturbation_interval
    return list(range(stride, trial.num_steps, stride))


def exploits(config: SweepConfig, members: Sequence[Member], *, generation: int, step: int) -> list[Exploit]:
    """Truncation selection: each of the worst, and each that failed, takes one of the best for its donor.

    A trial whose score is no worse than its donor's goes on as it is. Without a trial that has a score nobody exploits.

    Args:
        members: all trials, in their order.
        generation: that has ended, from 1.
        step: at which all of them pause.
    """
    sign = 1.0 if config.mode == "max" else -1.0
    scored = sorted((m for m in members if m.score is not None), key=lambda m: -sign * (m.score or 0.0))
    failed = [member for member in members if member.score is None]
    share = min(math.ceil(config.scheduler.quantile_fraction * len(members)), len(members) // 2)
    best = scored[:share]
    worst = [*scored[share:], *failed][-max(share, len(failed)) :] if best else []
    found = []
    for member in worst:
        number = members.index(member)
        random = np.random.default_rng([config.seed, generation, number])
        donor = best[int(random.integers(len(best)))]
        assert donor.score is not None
        if member.score is not None and sign * member.score >= sign * donor.score:
            continue
        params = spaces.explore(
            config.ordered_space,
            donor.params,
            random,
            resample_probability=config.scheduler.resample_probability,
        )
        found.append(
            Exploit(generation, member.name, member.score, donor.name, donor.score, step, donor.sha256, params)
        )
    return found


def save(output: str, generation: int, decided: Sequence[Exploit]) -> None:
    """Write down what was decided after a generation."""
    storage.write_json(_uri(output, generation), {"exploits": [asdict(exploit) for exploit in decided]})


def load(output: str, generation: int) -> list[Exploit] | None:
    """What was decided after a generation; None if that is still open."""
    try:
        document = storage.read_object(_uri(output, generation))
    except FileNotFoundError:
        return None
    advice = "give the sweep a new output"
    return documents.as_record(_EXPLOITS, document.get("exploits"), _uri(output, generation), advice)


def _uri(output: str, generation: int) -> str:
    return storage.join(output, FOLDER, f"generation-{generation:03d}.json")
