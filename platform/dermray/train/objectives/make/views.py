"""A sample as MAKE sees it: one crop of its image and a text of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dermray import images
from dermray.corpus.captions import parents
from dermray.errors import CorpusError
from dermray.ingest.settings import DataConfig
from dermray.ingest.tokens import TextEncoder
from dermray.ingest.views import Arrays, ArraySpec, Item, Row
from dermray.train.objectives.contrastive.diagnoses import DIAGNOSIS, diagnosis_of
from dermray.train.objectives.contrastive.views import PIXELS, TOKENS, write_crop
from dermray.train.objectives.make.sizes import Sizes

VALID, IMAGE_GROUP = "valid", "image_group"
# Hex digits of a sample's id that make a number of 60 bits.
ID_DIGITS = 15


@dataclass(frozen=True)
class ImageAndTexts:
    """`pixels` uint8 `[n, S, S, 3]`, `tokens` int32 `[n, N, L]`, and what a sample has of them and is.

    `valid` bool `[n, N]` says which texts there are; where there is none, `tokens` are those of the empty text.
    `diagnosis` int64 `[n]` is the number of the sample's first label, -1 without one, and `image_group` int64 `[n]` is
    equal for near-duplicates. Texts lie in the order raw, ontology, concept, sub-captions.

    Attributes:
        settings: crops.
        image_size: side S of the square images, in pixels.
        encode_texts: makes tokens of texts.
        sub_captions: how many are read, N - 3.
        diagnoses: number of each label that counts.
        sizes: of the images of each global step; None: always `image_size`.
    """

    settings: DataConfig
    image_size: int
    encode_texts: TextEncoder
    sub_captions: int
    diagnoses: Mapping[str, int] = field(default_factory=dict)
    sizes: Sizes | None = None
    columns = ("image", "captions", "labels", "duplicate_group")

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        context_length, num_texts = self.encode_texts([""]).shape[1], 3 + self.sub_captions
        return {
            PIXELS: ArraySpec("uint8", (self.image_size, self.image_size, 3)),
            TOKENS: ArraySpec("int32", (num_texts, context_length)),
            VALID: ArraySpec("bool", (num_texts,)),
            DIAGNOSIS: ArraySpec("int64", ()),
            IMAGE_GROUP: ArraySpec("int64", ()),
        }

    def specs(self, step: int) -> Mapping[str, ArraySpec]:
        """The same at every step, but for the side of the images where `sizes` says so."""
        if self.sizes is None:
            return self._specs
        side = self.sizes.at(step)
        return {**self._specs, PIXELS: ArraySpec("uint8", (side, side, 3))}

    def make(self, items: Sequence[Item], out: Arrays) -> None:
        """Decode, crop, choose texts, tokenise.

        Raises:
            CorpusError: an image is damaged, or a sample has no text at all.
        """
        images.use_one_core()
        every: list[str] = []
        for place, item in enumerate(items):
            (row,) = item.rows
            write_crop(item, self.settings, out[PIXELS][place])
            texts = chosen_texts(row["captions"], self.sub_captions, item.random)
            out[VALID][place] = [bool(text) for text in texts]
            if not any(texts):
                raise CorpusError(
                    f"sample {row['sample_id']} has none of the texts that MAKE compares an image with (raw, ontology, "
                    "concept, sub); prepare the corpus again"
                )
            every += texts
            out[DIAGNOSIS][place] = diagnosis_of(row, self.diagnoses)
            out[IMAGE_GROUP][place] = _group(row)
        out[TOKENS][:] = self.encode_texts(every).reshape(out[TOKENS].shape)


def chosen_texts(captions: Sequence[Mapping[str, str]], sub_captions: int, random: np.random.Generator) -> list[str]:
    """A sample's N texts in MAKE's order, the empty text for each that it lacks.

    Of several captions of one kind one is drawn. Sub-captions are the first ones of the raw caption that was drawn, and
    those that are part of no raw caption.

    Args:
        captions: with `aspect` and `text`.
        sub_captions: N - 3.
        random: what is drawn from.
    """
    of: dict[str, list[str]] = {}
    for caption in captions:
        if caption["text"].strip():
            of.setdefault(caption["aspect"], []).append(caption["text"])
    whole = [_drawn(of.get(aspect, []), random) for aspect in ("raw", "ontology", "concept")]
    owners = parents([caption["aspect"] for caption in captions])
    subs = [
        caption["text"]
        for caption, owner in zip(captions, owners, strict=True)
        if caption["aspect"] == "sub"
        and caption["text"].strip()
        and (owner is None or captions[owner]["text"] == whole[0])
    ][:sub_captions]
    return whole + subs + [""] * (sub_captions - len(subs))


def _drawn(texts: Sequence[str], random: np.random.Generator) -> str:
    if len(texts) < 2:
        return texts[0] if texts else ""
    return texts[int(random.integers(len(texts)))]


def _group(row: Row) -> int:
    return int((row["duplicate_group"] or row["sample_id"])[:ID_DIGITS], 16)
