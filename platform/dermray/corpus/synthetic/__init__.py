"""The embedded corpus: skin and lesions drawn from attributes, with captions, labels and an ontology.

It needs no download and no licence, and it is written in the raw layout of Derm1M, so that everything after it
takes the same road as the real corpus. The pictures are drawings: a model trained on them knows nothing about
patients.
"""

from __future__ import annotations

from dermray.corpus.synthetic.condition import Condition
from dermray.corpus.synthetic.conditions import CONDITIONS, ontology
from dermray.corpus.synthetic.drawing import Attributes, draw
from dermray.corpus.synthetic.sheet import contact_sheet
from dermray.corpus.synthetic.writer import GENERATOR_VERSION, TABLE_NAME, Summary, write_corpus

__all__ = [
    "CONDITIONS",
    "GENERATOR_VERSION",
    "TABLE_NAME",
    "Attributes",
    "Condition",
    "Summary",
    "contact_sheet",
    "draw",
    "ontology",
    "write_corpus",
]
