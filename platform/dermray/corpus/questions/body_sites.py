"""Which regions of the body a site lies in, so that it can be told which sites are surely not each other.

The words are those of published tables and of everyday English (`body_sites.json`). A site on the border of two
regions (groin, shoulder) lies in both. Nothing is guessed: a text with a word that the table does not hold is in none.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from importlib import resources

from dermray import documents
from dermray.corpus import spelling

TABLE_NAME = "body_sites.json"
_SEPARATORS = re.compile(r"[\s,;/&+()._:-]+")


@cache
def regions(site: str) -> frozenset[str]:
    """The regions that a body site names, empty where a word of it is not in the table.

    `left forearm` → upper limb; `palms/soles` → upper limb, lower limb; `back, near the old scar` → none.
    """
    places, qualifiers = _table()
    longest = max(len(words) for words in places)
    words, found, start = _words(site), set[str](), 0
    while start < len(words):
        for end in range(min(len(words), start + longest), start, -1):
            if named := places.get(words[start:end]):
                found |= named
                start = end
                break
        else:
            if words[start] not in qualifiers:
                return frozenset()
            start += 1
    return frozenset(found)


@cache
def _table() -> tuple[dict[tuple[str, ...], set[str]], frozenset[str]]:
    """Words of a site → its regions, and the words that name no site."""
    text = resources.files(__package__).joinpath(TABLE_NAME).read_text(encoding="utf-8")
    document = documents.parse_json(text, TABLE_NAME)
    places: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for region, sites in document["regions"].items():
        for site in sites:
            places[_words(site)].add(region)
    return dict(places), frozenset(word for each in document["qualifiers"] for word in _words(each))


def _words(text: str) -> tuple[str, ...]:
    return tuple(spelling.singular(_SEPARATORS.sub(" ", text.casefold()).strip()).split())
