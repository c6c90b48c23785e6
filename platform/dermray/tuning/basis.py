"""What a trial's figures follow from, kept beside them: a sweep must not tell those of something else as its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dermray import redaction
from dermray.ingest.corpora import Corpora
from dermray.train import checkpoint, epochs, pretrain
from dermray.train.settings import PretrainConfig

# Of how many settings that differ a message says the values.
NUM_TOLD = 8


@dataclass(frozen=True)
class Basis:
    """What decides a trial's figures.

    Attributes:
        corpus_digest: of the corpus; of several the digests of all in their order, with + between them.
        settings: by dotted key what has a say, as JSON has it, with secrets hidden.
        space: with `search=tpe` what trials are proposed from, by `space.KEY`, as JSON has it; None: they are drawn
            beforehand, or an earlier version did not write it down.
    """

    corpus_digest: str
    settings: dict[str, Any]
    space: dict[str, Any] | None = None

    def differences(self, now: Basis) -> str:
        """What is otherwise now, in words; empty if nothing is."""
        found = checkpoint.differing_settings(self.settings, now.settings)
        if self.corpus_digest != now.corpus_digest:
            found = [checkpoint.other_corpora(self.corpus_digest, now.corpus_digest), *found]
        if self.space is not None and now.space is not None:
            found += checkpoint.differing_settings(self.space, now.space)
        more = len(found) - NUM_TOLD
        return "; ".join(found[:NUM_TOLD]) + (f"; and {more} more" if more > 0 else "")


def of_training(config: PretrainConfig, corpora: Corpora, space: dict[str, Any] | None) -> Basis:
    """All that decides the weights of a training, and on what it validates.

    Args:
        config: of the training.
        corpora: that it learns from.
        space: as `Basis.space`.

    Raises:
        CorpusError: a corpus has no such split.
    """
    validation = config.validation.model_dump(mode="json")
    settings = {
        **epochs.trajectory(pretrain.located(config), corpora),
        **{f"validation.{key}": value for key, value in validation.items()},
    }
    return Basis(corpora.digest, redaction.hidden(settings), space)
