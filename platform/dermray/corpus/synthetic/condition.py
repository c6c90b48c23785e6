"""What a disease of the synthetic corpus is, and the nodes of the tree that several of them hang below."""

from __future__ import annotations

from dataclasses import dataclass

from dermray.corpus.synthetic.lesions import LesionGroup

ALL_TYPES = (1, 2, 3, 4, 5, 6)
LIGHT_TYPES = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Condition:
    """One leaf of the ontology. `path` runs from the root's child to the leaf, whose name is `name`."""

    name: str
    path: tuple[str, ...]
    morphology: str
    colour: str
    border: str
    scale: str
    distribution: str
    sites: tuple[str, ...]
    concepts: tuple[str, ...]
    groups: tuple[LesionGroup, ...]
    synonyms: tuple[str, ...] = ()
    symptoms: tuple[str, ...] = ()
    sometimes: tuple[tuple[str, float], ...] = ()  # surface of the first group, and how often it is drawn
    skin_types: tuple[int, ...] = ALL_TYPES
    ages: tuple[int, int] = (18, 80)

    @property
    def node(self) -> str:
        """The leaf's name in `ontology.json`: all synonyms, separated by commas."""
        return ", ".join((self.name, *self.synonyms))


INFECTIOUS = ("inflammatory", "infectious")
FUNGAL, BACTERIAL, VIRAL = (*INFECTIOUS, "fungal"), (*INFECTIOUS, "bacterial"), (*INFECTIOUS, "viral")
NON_INFECTIOUS = ("inflammatory", "non-infectious")
ECZEMA = (*NON_INFECTIOUS, "eczema")
PAPULOSQUAMOUS = (*NON_INFECTIOUS, "papulosquamous disease")
PIGMENTARY = (*NON_INFECTIOUS, "pigmentary disorder")
BENIGN, MALIGNANT = ("proliferations", "benign"), ("proliferations", "malignant")
EXTENSOR = ("elbow", "knee", "leg", "arm", "back")
TRUNK = ("back", "chest", "abdomen", "shoulder")
