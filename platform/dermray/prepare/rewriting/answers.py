"""What comes back from a language model, checked: an answer is text from outside, and may be anything.

The protocol is chat completions of the OpenAI API; the content of the message is the JSON that our prompts ask for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from dermray.corpus.captions import MAX_SUB_CAPTIONS

Reason = Literal["llm_malformed", "llm_refused", "llm_failed"]
MALFORMED: Reason = "llm_malformed"
REFUSED: Reason = "llm_refused"
FAILED: Reason = "llm_failed"
REASONS: dict[Reason, str] = {
    MALFORMED: "the answer is not what was asked for",
    REFUSED: "the model declines to answer",
    FAILED: "the endpoint gives no answer",
}

MAX_TEXT_CHARS = 4000
_FENCED = re.compile(r"\s*```(?:json)?\s*\n(?P<inside>.*)\n\s*```\s*", re.S)
AnswersT = TypeVar("AnswersT", bound=BaseModel)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class AnswerError(Exception):
    """A request gave no usable answer; fewer captions at once may. `reason` is a short stable word."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Usage(BaseModel):
    """Tokens that the endpoint says it has counted."""

    prompt_tokens: int = Field(0, ge=0, le=1 << 40)
    completion_tokens: int = Field(0, ge=0, le=1 << 40)


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: Usage = Usage()

    @field_validator("usage", mode="wrap")
    @classmethod
    def _if_it_can_be_read(cls, usage: Any, read: ValidatorFunctionWrapHandler) -> Usage:
        try:
            return read(usage)
        except ValidationError:
            return Usage()


class _Decomposed(BaseModel):
    id: int
    sub_captions: list[str]

    def texts(self) -> list[str]:
        return self.sub_captions


class _Rewritten(BaseModel):
    id: int
    caption: str

    def texts(self) -> list[str]:
        return [self.caption]


class _AllDecomposed(BaseModel):
    answers: list[_Decomposed]


class _AllRewritten(BaseModel):
    answers: list[_Rewritten]


def message_of(body: bytes) -> tuple[str, Usage]:
    """The message in the body of a chat completion, and what it took.

    Raises:
        AnswerError: the body is no chat completion, the message was cut off, or the model declined.
    """
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError:
        raise AnswerError(MALFORMED, "the body is no chat completion") from None
    choice = completion.choices[0]
    if choice.message.refusal or choice.finish_reason == "content_filter":
        raise AnswerError(REFUSED, choice.message.refusal or "content filter")
    if choice.finish_reason == "length":
        raise AnswerError(MALFORMED, "the answer is longer than max_tokens allows")
    return choice.message.content or "", completion.usage


def sub_captions_of(content: str, num_captions: int) -> list[list[str]]:
    """The sub-captions of each caption of a request, 1 to `MAX_SUB_CAPTIONS` each, in the order asked.

    Raises:
        AnswerError: the content is not what the prompt asks for.
    """
    return _in_order(_parsed(_AllDecomposed, content).answers, num_captions, MAX_SUB_CAPTIONS)


def rewritten_of(content: str, num_captions: int) -> list[list[str]]:
    """The new caption of each caption of a request, as a list of one, in the order asked.

    Raises:
        AnswerError: the content is not what the prompt asks for.
    """
    return _in_order(_parsed(_AllRewritten, content).answers, num_captions, 1)


def checked(texts: Iterable[str], limit: int) -> list[str]:
    """Texts with white space collapsed, each once.

    Raises:
        AnswerError: there are none or more than `limit`; or one is blank, too long, or holds control characters.
    """
    collapsed = [" ".join(text.split()) for text in texts]
    if not 1 <= len(collapsed) <= limit:
        raise AnswerError(MALFORMED, f"{len(collapsed)} texts where 1 to {limit} were asked for")
    for text in collapsed:
        if not text or len(text) > MAX_TEXT_CHARS or _CONTROL.search(text):
            raise AnswerError(MALFORMED, "a text is blank, too long, or holds control characters")
    return list(dict.fromkeys(collapsed))


def _parsed(model: type[AnswersT], content: str) -> AnswersT:
    # Models put JSON into a code block however plainly they are told not to.
    fenced = _FENCED.fullmatch(content)
    try:
        return model.model_validate_json(fenced["inside"] if fenced else content)
    except ValidationError:
        raise AnswerError(MALFORMED, "the message is not the JSON that was asked for") from None


def _in_order(answers: Sequence[_Decomposed | _Rewritten], num_captions: int, limit: int) -> list[list[str]]:
    by_id = {answer.id: answer for answer in answers}
    if len(answers) != num_captions or by_id.keys() != set(range(1, num_captions + 1)):
        raise AnswerError(MALFORMED, f"{len(answers)} answers to {num_captions} captions, or to others than asked")
    return [checked(by_id[number].texts(), limit) for number in range(1, num_captions + 1)]
