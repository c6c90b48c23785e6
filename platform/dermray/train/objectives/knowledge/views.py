"""A sample as knowledge sees it: texts about the node of the disease tree that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dermray.errors import CorpusError
from dermray.ingest.tokens import TextEncoder
from dermray.ingest.views import Arrays, ArraySpec, Item, Row
from dermray.train.objectives.contrastive.views import TOKENS
from dermray.train.objectives.knowledge.nodes import drawn, node_of

NODE = "node"


@dataclass(frozen=True)
class NodeTexts:
    """`tokens` int32 `[n, K, L]` of texts about a sample's node, and its number, `node` int64 `[n]`.

    Texts are names, synonyms and the path of the node, and as its attributes the sample's concept captions, or its
    concepts where it has none.

    Attributes:
        encode_texts: makes tokens of texts.
        texts: how many are drawn, K.
        nodes: number of each label that is a node.
        said: what the tree says of each node.
    """

    encode_texts: TextEncoder
    texts: int
    nodes: Mapping[str, int]
    said: Sequence[Sequence[str]]
    columns = ("labels", "captions", "concepts")

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        context_length = self.encode_texts([""]).shape[1]
        return {TOKENS: ArraySpec("int32", (self.texts, context_length)), NODE: ArraySpec("int64", ())}

    def specs(self, step: int) -> Mapping[str, ArraySpec]:
        """The same at every step."""
        return self._specs

    def make(self, items: Sequence[Item], out: Arrays) -> None:
        """Draw texts, tokenise.

        Raises:
            CorpusError: a sample stands for no node.
        """
        every: list[str] = []
        for place, item in enumerate(items):
            (row,) = item.rows
            node = node_of(row["labels"], self.nodes)
            if node < 0:
                raise CorpusError(
                    f"sample {row['sample_id']} has no label of the disease tree; prepare the corpus again"
                )
            every += drawn([*self.said[node], *attributes(row)], self.texts, item.random)
            out[NODE][place] = node
        out[TOKENS][:] = self.encode_texts(every).reshape(out[TOKENS].shape)


def attributes(row: Row) -> list[str]:
    """What a sample shows: its concept captions, or its concepts in one text."""
    captions = [caption["text"] for caption in row["captions"] if caption["aspect"] == "concept"]
    said = [text for text in captions if text.strip()]
    return said or ([", ".join(row["concepts"])] if row["concepts"] else [])
