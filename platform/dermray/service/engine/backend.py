"""What the routes need of a model, whoever provides it. Nothing here knows of HTTP, Ray or torch.

Providers are an engine in this process (`engine.engine.Engine`) and a handle on encoder replicas
(`fleet.replica.ReplicaBackend`); contract tests use one that needs no weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from dermray.predict import ServedModel
from dermray.service.engine.verb import Verb
from dermray.service.engine.verbs.annotate import ANNOTATE
from dermray.service.engine.verbs.classify import CLASSIFY
from dermray.service.engine.verbs.embed import EMBED
from dermray.service.engine.verbs.predict import PREDICT


class Backend(ABC):
    """A served model; routes ask only what is in `model.answers`.

    Every method may raise `Refusal` (429, 503) when it cannot answer now.
    """

    embed = EMBED
    classify = CLASSIFY
    annotate = ANNOTATE
    predict = PREDICT

    @property
    @abstractmethod
    def model(self) -> ServedModel:
        """The identity that every answer carries."""

    @abstractmethod
    async def ask(self, verb: Verb[Any, Any], *question: Any) -> Any:
        """The answer to a verb's question; `backend.embed(images, texts)` is `backend.ask(EMBED, images, texts)`."""

    @abstractmethod
    async def probe(self) -> None:
        """Return when the model has just answered a question of our own; raise otherwise."""


VERBS: dict[str, Verb[Any, Any]] = {verb.name: verb for verb in vars(Backend).values() if isinstance(verb, Verb)}
