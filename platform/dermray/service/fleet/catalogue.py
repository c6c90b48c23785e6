"""The models that are served, each with the version that answers now and the one before it. No Ray, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dermray.corpus.ontology import Ontology
from dermray.models.kinds import IN_WORDS, Answer
from dermray.predict import ModelSource, ServedModel
from dermray.service.engine.backend import Backend
from dermray.service.refusals import Refusal


class Fleet(Protocol):
    """The processes in which the versions of one model run."""

    async def start(self, source: ModelSource) -> Backend:
        """Load a version and return what answers with it."""


@dataclass(frozen=True, slots=True)
class Served:
    """One version at work."""

    backend: Backend
    ontology: Ontology | None = None
    source: ModelSource | None = None

    @property
    def model(self) -> ServedModel:
        """Its identity."""
        return self.backend.model

    def require(self, *answers: Answer) -> None:
        """Refuse a question that models of this kind do not answer.

        Raises:
            Refusal: 422; says what the model gives.
        """
        missing = [answer for answer in answers if answer not in self.model.answers]
        if missing:
            gives = ", ".join(IN_WORDS[one] for one in IN_WORDS if one in self.model.answers)
            raise Refusal(
                422,
                f"model: {self.model.name} is of the kind {self.model.kind} and gives no {IN_WORDS[missing[0]]}, which "
                f"this needs; it gives {gives}",
                code="not_answered",
                param="model",
            )


class Slot:
    """One served model. Requests that have begun keep the version they began with; a change is one assignment."""

    def __init__(self, served: Served) -> None:
        self.current = served


class Catalogue:
    """The served models; the first one answers when a request names none."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)

    @classmethod
    def of(cls, backend: Backend, ontology: Ontology | None = None) -> Catalogue:
        """One model alone."""
        return cls([Slot(Served(backend, ontology))])

    @property
    def default(self) -> Served:
        """What answers when no model is named."""
        return self.slots[0].current

    @property
    def served(self) -> list[Served]:
        """Every version that answers now."""
        return [slot.current for slot in self.slots]

    def find(self, asked: str | None) -> Served:
        """The version that a request's `model` field means.

        Raises:
            Refusal: 404.
        """
        return self.slot(asked).current

    def slot(self, asked: str | None) -> Slot:
        """The slot of a model by any of its current names.

        Raises:
            Refusal: 404.
        """
        if not asked:
            return self.slots[0]
        for slot in self.slots:
            if asked in slot.current.model.names:
                return slot
        known = ", ".join(repr(served.model.name) for served in self.served)
        message = f"model: {asked[:80]!r} is not served here; ask for {known} or leave the field out"
        raise Refusal(404, message, code="model_not_found", param="model")
