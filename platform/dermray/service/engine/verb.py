"""What a verb is: one question to a model, declared in one place and known by its name everywhere else.

`dermray.service.engine.verbs` has a file for each, `Backend` lists them. No HTTP, Ray or torch.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

from dermray.models.kinds import Answer
from dermray.service.engine.answers import Rejection

if TYPE_CHECKING:
    from dermray.service.engine.engine import Engine
    from dermray.vectors.encoder import Encoder

TakesT = ParamSpec("TakesT")
AnswerT = TypeVar("AnswerT")
ResultT = TypeVar("ResultT")
# A thread of an engine's each, so that a long batch of texts does not hold up an image.
Lane = Literal["images", "texts"]


@dataclass(frozen=True, slots=True)
class Pass(Generic[ResultT]):
    """How questions are batched: what the model computes of the decoded images, or the texts, of many at once.

    Attributes:
        lane: where it waits its turn; one pass at a time in each.
        compute: the model and N items (pixels float32 `[3, S, S]`, or texts) → N results, in order.
        fault: what is wrong with a result, as one sentence; None: nothing is.
    """

    lane: Lane
    compute: Callable[[Encoder, list[Any]], Iterable[ResultT]]
    fault: Callable[[ResultT], str | None]


class Answering(Protocol):
    """Who answers verbs."""

    async def ask(self, verb: Verb[Any, Any], *question: Any) -> Any:
        """The answer to a verb's question."""


@dataclass(frozen=True)
class Verb(Generic[TakesT, AnswerT]):
    """One question. As an attribute of a `Backend` it is the method that asks it.

    Attributes:
        answer: how an engine answers; the function's name is the verb's, its other parameters are what it takes.
        needs: what models of a kind must give to be asked.
        check: refuses a question that costs too much, before it takes a place among those that wait.
        probe: asks a question of our own as far as the model answers; returns the images that were rejected.
    """

    answer: Callable[Concatenate[Engine, TakesT], Coroutine[Any, Any, AnswerT]]
    needs: tuple[Answer, ...] = ()
    check: Callable[Concatenate[Engine, TakesT], None] | None = None
    probe: Callable[[Engine], Awaitable[Sequence[Rejection]]] | None = None

    @property
    def name(self) -> str:
        """What it is called on every backend, and between processes."""
        return self.answer.__name__

    @overload
    def __get__(self, asked: None, owner: type) -> Verb[TakesT, AnswerT]: ...

    @overload
    def __get__(self, asked: Answering, owner: type) -> Callable[TakesT, Coroutine[Any, Any, AnswerT]]: ...

    def __get__(self, asked: Answering | None, owner: type) -> Any:
        return self if asked is None else functools.partial(asked.ask, self)
