"""The published words of concept annotation (MONET, Kim et al., 2024): what is asked of an image. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from dermray import documents

TERMS_NAME = "concept_terms.json"


@dataclass(frozen=True)
class Prompts:
    """The published words: templates (`{}` is a term), a reference sentence each, and the terms of each concept."""

    templates: tuple[str, ...]
    references: tuple[str, ...]
    terms: dict[str, tuple[str, ...]]

    @classmethod
    @lru_cache(maxsize=1)
    def load(cls) -> Prompts:
        """Read the data file that comes with the package."""
        text = resources.files("dermray.predict").joinpath(TERMS_NAME).read_text(encoding="utf-8")
        document = documents.parse_json(text, TERMS_NAME)
        terms = {concept: tuple(words) for concept, words in document["terms"].items()}
        return cls(tuple(document["templates"]), tuple(document["references"]), terms)

    def targets(self, concept: str) -> list[str]:
        """Every template with every term of a concept, template by template."""
        return [template.replace("{}", term) for template in self.templates for term in self.terms[concept]]
