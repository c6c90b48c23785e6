"""Tokenisers that decoding tasks can carry: equal to open_clip's, without open_clip or torch.

Importing those takes a worker process some seconds and half a gigabyte, for what a table of words and a few lines do.
`portable` takes a tokeniser apart in the training worker; what it does not know goes to the tasks as it came.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import ftfy
import numpy as np
import numpy.typing as npt
import regex
from tokenizers import Tokenizer, models, pre_tokenizers

# Words, with the marks around them, whose tokens a process remembers; a corpus of captions has some ten thousand.
MAX_WORDS = 200_000
# Characters of one that is remembered: scripts without blanks make a word of a sentence, which does not come again.
MAX_WORD_LENGTH = 40
# What a tokeniser that was taken apart is compared with the original on.
PROBES = (
    "",
    "A 3.5 cm scaly plaque (silvery-white) on the patient's elbow; it's psoriasis vulgaris, isn't it?",
    "  Sj\u00f6gren\u2019s &amp; Beh\u00e7et's\n\tsyndrome: 10\u201320 \u00b5m, \u00d740, \u22652 lesions\u2026  ",
    "seborrhoeic keratosis " * 200,
    "<start_of_text> [SEP] [MASK] \u76ae\u819a\u708e \U0001f642",
)


class TextEncoder(Protocol):
    """N texts → int32 `[N, L]`, cut and padded to the context length."""

    def __call__(self, texts: list[str]) -> npt.NDArray[np.int32]:
        """Tokenise."""
        ...


@dataclass(frozen=True)
class AsGiven:
    """A tokeniser that is made in the process that uses it.

    Attributes:
        factory: picklable; called each time, so it should remember what it made.
    """

    factory: Callable[[], Callable[[list[str]], Any]]

    def __call__(self, texts: list[str]) -> npt.NDArray[np.int32]:
        """Tokenise."""
        return self.factory()(texts).numpy().astype(np.int32)


@dataclass(frozen=True)
class ClipTokens:
    """OpenAI's byte-pair encoding as open_clip's `SimpleTokenizer` does it, blank by blank.

    Its words never reach over a blank, so what stands between two is encoded once and remembered.

    Attributes:
        vocabulary: token of every piece of a word.
        merges: pairs of pieces that become one, the first of them first.
        pattern: regular expression that finds words.
        specials: words that are a token of their own.
        start: token before a text.
        end: token after it, also of a text that is cut.
        context_length: L.
    """

    vocabulary: dict[str, int] = field(repr=False)
    merges: list[tuple[str, str]] = field(repr=False)
    pattern: str
    specials: dict[str, int]
    start: int
    end: int
    context_length: int
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made here: reading a `Tokenizer` back takes twice as long as making it."""
        return {name: value for name, value in vars(self).items() if name != "_words"} | {"_known": {}}

    @cached_property
    def _words(self) -> Tokenizer:
        """Byte-pair encoding of one word."""
        words = Tokenizer(
            models.BPE(vocab=self.vocabulary, merges=self.merges, end_of_word_suffix="</w>", dropout=None)
        )
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return words

    def __call__(self, texts: list[str]) -> npt.NDArray[np.int32]:
        """Tokenise."""
        tokens = np.zeros((len(texts), self.context_length), dtype=np.int32)
        for row, text in enumerate(texts):
            ids = [self.start]
            for part in _clean(text).lower().split(" "):
                ids += self._known.get(part) or self._encode(part)
            ids = ids[: self.context_length - 1]
            tokens[row, : len(ids)] = ids
            tokens[row, len(ids)] = self.end
        return tokens

    def _encode(self, part: str) -> list[int]:
        if len(self._known) >= MAX_WORDS:
            self._known.clear()
        ids: list[int] = []
        for word in regex.findall(self.pattern, part, regex.IGNORECASE):
            special = self.specials.get(word)
            ids += self._words.encode(word, add_special_tokens=False).ids if special is None else [special]
        if len(part) <= MAX_WORD_LENGTH:
            self._known[part] = ids
        return ids


@dataclass(frozen=True)
class FastTokens:
    """A fast tokeniser of transformers, called as open_clip's `HFTokenizer` calls it.

    Attributes:
        backend: with truncation and padding to the context length set.
        lower: whether texts become lower case first.
    """

    backend: Tokenizer
    lower: bool

    def __call__(self, texts: list[str]) -> npt.NDArray[np.int32]:
        """Tokenise."""
        # Ray shares the cores out; a batch would take them all for each task.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        cleaned = [_clean(text).lower() if self.lower else _clean(text) for text in texts]
        encoded = self.backend.encode_batch_fast(cleaned)
        return np.array([one.ids for one in encoded], dtype=np.int32)


def portable(factory: Callable[[], Callable[[list[str]], Any]]) -> TextEncoder:
    """The tokeniser that `factory` makes, in a form that needs neither torch nor open_clip where it is known.

    Args:
        factory: makes a tokeniser N texts → int64 tensor `[N, L]`; picklable, and cheap to call again.
    """
    tokenizer = factory()
    for attempt in (_clip, _fast):
        made = attempt(tokenizer)
        if made is not None and np.array_equal(made(list(PROBES)), tokenizer(list(PROBES)).numpy()):
            return made
    return AsGiven(factory)


def _clip(tokenizer: Any) -> ClipTokens | None:
    from open_clip.tokenizer import SimpleTokenizer, _clean_lower

    if (
        type(tokenizer) is not SimpleTokenizer
        or tokenizer.clean_fn is not _clean_lower
        or tokenizer.reduction_fn is not None
    ):
        return None
    specials = {tokenizer.decoder[token]: token for token in tokenizer.all_special_ids}
    return ClipTokens(
        tokenizer.encoder,
        list(tokenizer.bpe_ranks),
        tokenizer.pat.pattern,
        specials,
        tokenizer.sot_token_id,
        tokenizer.eot_token_id,
        tokenizer.context_length,
    )


def _fast(tokenizer: Any) -> FastTokens | None:
    from open_clip.tokenizer import HFTokenizer, _clean_lower, _clean_whitespace

    wrapper = tokenizer.load() if hasattr(tokenizer, "load") else tokenizer
    if not isinstance(wrapper, HFTokenizer) or wrapper.clean_fn not in (_clean_lower, _clean_whitespace):
        return None
    backend = getattr(wrapper.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # The call has transformers set truncation and padding.
    wrapper(list(PROBES))
    return FastTokens(Tokenizer.from_str(backend.to_str()), wrapper.clean_fn is _clean_lower)


def _clean(text: str) -> str:
    """Mend encodings, resolve HTML entities, leave single blanks; of printable ASCII only the blanks are to do."""
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())
