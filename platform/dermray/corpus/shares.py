"""How a key names one prepared corpus or several: `URI`, `[URI, URI2]`, `[{uri: URI, weight: 2}, …]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from dermray import documents, storage
from dermray.config import Config, DecidesWeights, LeavesWeights, absolute

# Between the digests of several corpora; none is hexadecimal.
DIGESTS_JOIN = "+"


class CorpusShare(Config):
    """One of several corpora of a run."""

    uri: LeavesWeights[str] = Field(description="URI of a prepared corpus")
    weight: DecidesWeights[float | None] = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="share of an epoch's draws, over the sum of all weights; empty for all: each sample once",
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value


def _one_or_several(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return value
    shares = []
    for place, part in enumerate(value, 1):
        try:
            shares.append(CorpusShare.model_validate(part))
        except ValidationError as error:
            raise ValueError(f"entry {place} of {len(value)}: {documents.first_fault(error)}") from None
    if not shares:
        raise ValueError("needs a URI, or several")
    uris = [storage.normalise(share.uri) for share in shares]
    if len(set(uris)) < len(uris):
        raise ValueError(f"{max(uris, key=uris.count)} stands there twice; give it a greater weight instead")
    if len({share.weight is None for share in shares}) > 1:
        raise ValueError("give every corpus a weight, or none")
    return shares[0].uri if len(shares) == 1 else tuple(shares)


# The type of such a key; a list of one is that one's URI.
CorpusShares: TypeAlias = Annotated[str | tuple[CorpusShare, ...], BeforeValidator(_one_or_several)]


def shares_of(corpus: str | tuple[CorpusShare, ...]) -> tuple[CorpusShare, ...]:
    """Of such a key the corpora, a single one too."""
    return (CorpusShare(uri=corpus),) if isinstance(corpus, str) else corpus


def uris_of(corpus: str | tuple[CorpusShare, ...]) -> tuple[str, ...]:
    """Where they are."""
    return tuple(share.uri for share in shares_of(corpus))


def with_uris(
    corpus: str | tuple[CorpusShare, ...], change: Callable[[str], str] = storage.normalise
) -> str | tuple[CorpusShare, ...]:
    """The same corpora with other URIs: absolute ones, where nothing else is said."""
    if isinstance(corpus, str):
        return change(corpus)
    return tuple(share.model_copy(update={"uri": change(share.uri)}) for share in corpus)


def _absolute(corpus: str | tuple[CorpusShare, ...]) -> str | tuple[CorpusShare, ...]:
    return with_uris(corpus, absolute)


# As `CorpusShares`, with absolute URIs (`config.Uri`).
LocatedCorpora: TypeAlias = Annotated[CorpusShares, AfterValidator(_absolute)]
